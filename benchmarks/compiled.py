"""What capture costs beside a bare compiled model.

Two copies of a model are compiled by the same backend; one is captured, all (z, a) of every layer.
Their passes alternate, and the median of the ratios of each pair is what counts.
"""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import Tensor, nn

from benchmarks.models import GPT
from fmapkit import capture

__all__ = ["run"]


def small_cnn() -> nn.Module:
    """Six convolutions with norms and in-place ReLUs."""
    layers: list[nn.Module] = []
    width = 3
    for wider in (16, 16, 32, 32, 64, 64):
        layers += [nn.Conv2d(width, wider, 3, padding=1, stride=1 + (wider > width > 3))]
        layers += [nn.BatchNorm2d(wider), nn.ReLU(inplace=True)]
        width = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def seconds(model: nn.Module, given: Tensor) -> float:
    """One forward pass."""
    start = time.perf_counter()
    model(given)
    return time.perf_counter() - start


def run(backend: str, budget: float, threads: int) -> None:
    """Measure and print.

    Args:
        backend: of torch.compile.
        budget: seconds of passes for each case, compilation not counted.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    cases = {
        "small CNN, 4x3x64x64": (small_cnn(), torch.randn(4, 3, 64, 64)),
        "GPT-2-like, 4x64 tokens": (GPT(), torch.randint(1024, (4, 64))),
    }
    print(f"torch {torch.__version__}, {backend}, {threads} threads, without gradients")
    for name, (model, given) in cases.items():
        bare = torch.compile(copy.deepcopy(model).eval(), backend=backend)
        watched = torch.compile(model.eval(), backend=backend)
        with torch.no_grad(), capture(watched) as maps:  # type: ignore[arg-type]
            for _ in range(5):
                bare(given), watched(given)
            pairs: list[tuple[float, float]] = []
            end = time.perf_counter() + budget
            while time.perf_counter() < end:
                pairs.append((seconds(bare, given), seconds(watched, given)))  # type: ignore[arg-type]
            held = len(maps)
        low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        alone = statistics.median(a for a, _ in pairs)
        print(
            f"{name}: {middle:.3f} ({low:.3f} to {high:.3f}) of {1000 * alone:.2f} ms, "
            f"{held} maps, {len(pairs)} pairs"
        )
