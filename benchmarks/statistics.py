"""What `Statistics` costs, beside its floor: one read of each map at the memory's bandwidth.

The bandwidth is measured here, by a sum over float32, as what reads nothing twice and does next to
nothing else. Maps are taken in turn from more memory than a cache of usual size holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.models import ResNet
from fmapkit import FeatureMap, capture
from fmapkit.analysis import Analysis, DeadFilters, Statistics

__all__ = ["CASES", "Case", "bandwidth", "run", "time_of"]

_POOL = 2**28  # bytes of memory that the maps of a case take turns in


@dataclass(frozen=True)
class Case:
    """A map's form."""

    name: str
    shape: tuple[int, ...]
    dim: int = 1
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    sigma: str = "relu"


CASES = [
    Case("images 8x64x112x112", (8, 64, 112, 112)),
    Case("images 32x512x7x7", (32, 512, 7, 7)),
    Case("images 1x64x16x16", (1, 64, 16, 16)),
    Case("channels last 8x64x56x56", (8, 64, 56, 56), memory_format=torch.channels_last),
    Case("tokens 8x512x3072", (8, 512, 3072), dim=2, sigma="gelu"),
    Case("saturating 8x64x56x56", (8, 64, 56, 56), sigma="tanh"),
    Case("bfloat16 8x64x56x56", (8, 64, 56, 56), dtype=torch.bfloat16),
]
CONTENDERS: dict[str, Callable[[], Analysis]] = {
    "all but a histogram": Statistics,
    "compiled": lambda: Statistics(compile=True),
    'bins="log2"': lambda: Statistics(bins="log2"),
    "DeadFilters": DeadFilters,
}


def time_of(call: Callable[[], object], seconds: float, device: str) -> float:
    """Median time of a call, in seconds, over about so many seconds; on one thread, its own."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter  # what others do does not count

    def once() -> float:
        start = clock()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - start

    for _ in range(3):
        once()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        times.append(once())
    return sorted(times)[len(times) // 2]


def bandwidth(device: str) -> float:
    """Bytes a second of one read, from memory."""
    values = torch.ones(_POOL // 4, device=device)
    return _POOL / time_of(values.sum, 1.0, device)


def _maps(case: Case, device: str) -> list[FeatureMap]:
    one = torch.randn(case.shape).relu().to(case.dtype)
    count = max(1, _POOL // (one.numel() * one.element_size()))
    maps = []
    for _ in range(min(count, 64)):
        tensor = one.to(device, copy=True)
        if tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=case.memory_format)
        maps.append(
            FeatureMap(
                tensor,
                "activation",
                "layer",
                nonlinearity=case.sigma,
                filter_dim=case.dim,
                filters=range(case.shape[case.dim]),
            )
        )
    return maps


def _turn(analysis: Analysis, maps: list[FeatureMap]) -> Callable[[], None]:
    at = 0

    def call() -> None:
        nonlocal at
        analysis.update(maps[at])
        at = (at + 1) % len(maps)

    return call


def _of_a_model(device: str, speed: float, seconds: float) -> None:
    """All maps of a ResNet-18's pass, as capture gives them."""
    model = ResNet().to(device).eval()
    images = torch.randn(8, 3, 160, 160, device=device)
    stats = Statistics()
    with torch.no_grad(), capture(model) as maps:

        def bare() -> Tensor:
            output: Tensor = model(images)
            return output

        def analysed() -> None:
            bare()
            for fm in maps:
                stats.update(fm)

        without = time_of(bare, seconds, device)
        with_ = time_of(analysed, seconds, device)
        size = sum(fm.nbytes for fm in maps)
    floor = size / speed
    print(
        f"resnet18 8x3x160x160, {len(stats)} kinds of map, {size / 1e6:.1f} MB: a captured pass "
        f"takes {without * 1e3:.1f} ms,\n  with statistics {with_ * 1e3:.1f} ms; "
        f"they take {(with_ - without) * 1e3:.1f} ms, {(with_ - without) / floor:.1f} times the "
        f"floor of {floor * 1e3:.2f} ms"
    )


def run(device: str = "cpu", threads: int = 2, seconds: float = 1.0, compiled: bool = True) -> None:
    """Print the table.

    Args:
        device: cpu or cuda.
        threads: of torch.
        seconds: for each figure.
        compiled: measure `compile=True` too, which takes a while to compile.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    speed = bandwidth(device)
    print(f"{device}, {threads} threads: one read at {speed / 1e9:.1f} GB/s is the floor")
    for case in CASES:
        maps = _maps(case, device)
        floor = maps[0].nbytes / speed
        print(f"{case.name}, {maps[0].nbytes / 1e6:.2f} MB, floor {floor * 1e3:.3f} ms")
        for name, make in CONTENDERS.items():
            if name == "compiled" and not compiled:
                continue
            took = time_of(_turn(make(), maps), seconds, device)
            print(f"  {name:20s} {took * 1e3:9.3f} ms {took / floor:7.1f} times the floor")
    _of_a_model(device, speed, seconds)
