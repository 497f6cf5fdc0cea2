"""What `Statistics` costs, beside a read of each map, with numba and without.

A read is a sum over float32 of as many bytes, as what reads nothing twice and does next to nothing
else. A map that lies in memory is read from there: maps are taken in turn from more of it than a
cache of usual size holds. One that lies in the cache, as a layer leaves a map that is not large, is
the same one again and again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.models import ResNet
from fmapkit import FeatureMap, capture
from fmapkit.analysis import Analysis, DeadFilters, Statistics, _of_map
from fmapkit.analysis._moments import by_filter

__all__ = ["CASES", "Case", "run", "time_of"]

_POOL = 2**28  # bytes of memory that the maps of a case take turns in
_CACHE = 2**23  # bytes of a map that stays in the cache


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
    Case("bfloat16 tokens 8x512x768", (8, 512, 768), 2, torch.bfloat16, sigma="gelu"),
]


class _WithoutNumba(Statistics):
    """As where the extra `fast` is not installed."""

    def update(self, fm: FeatureMap) -> None:
        known, _of_map._fused = _of_map._fused, lambda: None  # type: ignore[assignment]
        try:
            super().update(fm)
        finally:
            _of_map._fused = known


CONTENDERS: dict[str, Callable[[], Analysis]] = {
    "Statistics": Statistics,
    "without numba": _WithoutNumba,
    "compiled": lambda: Statistics(compile=True),
    'with bins="log2"': lambda: Statistics(bins="log2"),
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


def _maps(case: Case, device: str, cached: bool) -> list[FeatureMap]:
    one = torch.randn(case.shape).relu().to(case.dtype)
    count = 1 if cached else max(2, min(64, _POOL // (one.numel() * one.element_size())))
    maps = []
    for _ in range(count):
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


def _in_turn(
    calls: Sequence[Callable[[FeatureMap], object]],
    maps: list[FeatureMap],
    seconds: float,
    device: str,
    touch: Callable[[FeatureMap], object] | None,
) -> list[float]:
    """Median seconds of each call, over about so many for each.

    They take turns, in an order drawn anew each time: what one has written is put back to memory
    during the next. With several maps, none has been read lately by another; what is touched before
    has.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter  # what others do does not count
    times: list[list[float]] = [[] for _ in calls]
    turn, order = 0, list(range(len(calls)))
    while turn < 8 or sum(map(sum, times)) < seconds * len(calls):
        random.shuffle(order)
        for place, n in enumerate(order):
            fm = maps[(turn + place * len(maps) // len(calls)) % len(maps)]
            if touch is not None:
                touch(fm)
            start = clock()
            calls[n](fm)
            if device != "cpu":
                torch.cuda.synchronize()
            times[n].append(clock() - start)
        turn += 1
    return [sorted(some[3:])[len(some[3:]) // 2] for some in times]


def _of_a_case(case: Case, device: str, seconds: float, compiled: bool, cached: bool) -> None:
    maps = _maps(case, device, cached)
    size = maps[0].nbytes
    read = [torch.ones(size // 4, device=device) for _ in maps]
    number = {id(fm): n for n, fm in enumerate(maps)}
    calls: dict[str, Callable[[FeatureMap], object]] = {
        "one read": lambda fm: read[number[id(fm)]].sum()
    }
    fused = _of_map._fused() if device == "cpu" else None
    if fused is not None:
        none = np.zeros(case.shape[case.dim])
        calls["the loop alone"] = lambda fm: fused.sums(by_filter(fm.tensor, case.dim), none, None)
    for name, make in CONTENDERS.items():
        if name != "compiled" or compiled:
            calls[name] = make().update

    def touch(fm: FeatureMap) -> None:
        calls["one read"](fm)
        fm.tensor.sum()

    took = _in_turn(list(calls.values()), maps, seconds, device, touch if cached else None)
    print(f"{case.name}, {size / 1e6:.2f} MB, in {'the cache' if cached else 'memory'}")
    for name, each in zip(calls, took, strict=True):
        reads = "" if name == "one read" else f"{each / took[0]:7.1f} reads"
        print(f"  {name:20s} {each * 1e3:9.3f} ms {reads}".rstrip())


def _of_a_model(device: str, seconds: float) -> None:
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
    floor = time_of(torch.ones(size // 4, device=device).sum, seconds, device)
    print(
        f"resnet18 8x3x160x160, {len(stats)} kinds of map, {size / 1e6:.1f} MB: a captured pass "
        f"takes {without * 1e3:.1f} ms,\n  with statistics {with_ * 1e3:.1f} ms; "
        f"they take {(with_ - without) * 1e3:.1f} ms, {(with_ - without) / floor:.1f} reads of "
        f"{floor * 1e3:.2f} ms"
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
    print(f"{device}, {threads} threads")
    for case in CASES:
        size = torch.empty(case.shape, dtype=case.dtype, device="meta").nbytes
        for cached in (False, True) if size <= _CACHE else (False,):
            _of_a_case(case, device, seconds, compiled, cached)
    _of_a_model(device, seconds)
