"""What one (z, a) pair costs, beside a forward hook that does nothing on the same module.

Chains of tiny linear layers with ReLUs, short and long. What a longer chain costs more, divided by
what it has more of sites, is the cost of a site; what every pass costs once drops out.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.measure import environment, seconds
from fmapkit import capture

__all__ = ["run"]

SHORT, LONG = 100, 400  # sites
ROUND = 20  # passes of each before the next one's turn


@contextmanager
def _nothing(model: nn.Module) -> Iterator[None]:
    yield


@contextmanager
def _hooked(model: nn.Module) -> Iterator[None]:
    """A hook that does nothing on each ReLU, which runs out of place, as it does when captured."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        pass

    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
            module.register_forward_hook(hook)
    yield


CONTENDERS: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": _nothing,
    "a hook that does nothing": _hooked,
    "fmapkit, every (z, a)": capture,
}


def _chain(sites: int, inplace: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(sites) for layer in (nn.Linear(16, 16), nn.ReLU(inplace))]
    return nn.Sequential(*layers).eval()


def extra(sites: int, inplace: bool, budget: float) -> dict[str, float]:
    """Seconds that each contender adds to a pass of a chain: median of interleaved pairs."""
    given, bare = torch.randn(4, 16), _chain(sites, inplace)
    models = {name: _chain(sites, inplace) for name in CONTENDERS}
    found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with torch.no_grad(), ExitStack() as blocks:
        for name, contender in CONTENDERS.items():
            blocks.enter_context(contender(models[name]))
            for _ in range(5):
                models[name](given)
        gc.collect()
        gc.disable()
        try:
            end = time.perf_counter() + budget
            while time.perf_counter() < end:
                for name, model in models.items():
                    model(given), bare(given)  # whoever had the turn before has left the caches
                    ours, theirs = partial(model, given), partial(bare, given)
                    for n in range(ROUND):
                        if n % 2:
                            one, other = seconds(ours), seconds(theirs)
                        else:
                            other, one = seconds(theirs), seconds(ours)
                        found[name].append(one - other)
        finally:
            gc.enable()
    return {name: statistics.median(times) for name, times in found.items()}


def run(budget: float, threads: int = 1) -> None:
    """Print the table.

    Args:
        budget: seconds for each chain.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    for inplace in (False, True):
        short, long = (extra(sites, inplace, budget) for sites in (SHORT, LONG))
        each = {n: (long[n] - short[n]) / (LONG - SHORT) * 1e6 for n in CONTENDERS}
        print(f"\n{'in-place ' if inplace else ''}ReLUs: µs a site, and µs a pass besides")
        for name, cost in each.items():
            besides = short[name] * 1e6 - SHORT * cost
            print(f"  {name:28s} {cost:6.2f} {besides:8.0f}")
        ours, hook = each["fmapkit, every (z, a)"], each["a hook that does nothing"]
        print(f"  fmapkit ÷ the hook: {ours / hook:.2f}")
