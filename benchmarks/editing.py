"""What edits, patching and attention cost, beside the same thing done by a hook by hand.

Each contender has a copy of the model for itself, with its capture open or its hook set, and takes
turns with the bare model: the median of the pairs' ratios, of CPU time. Patching is timed as a
whole, against as many bare passes as it makes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Figures, Timed, environment, interleave, resting
from benchmarks.models import GPT, ResNet
from fmapkit import capture, edits, patch
from fmapkit.edits import Where

__all__ = ["CASES", "Case", "hooked", "measured", "patching", "run", "silencing", "steering"]

Contender = Callable[[nn.Module], AbstractContextManager[Any]]


@contextmanager
def hooked(name: str, change: Callable[[Tensor], Tensor], model: nn.Module) -> Iterator[None]:
    """A forward hook by hand."""
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: change(out))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _scores_by_hand(model: nn.Module) -> Iterator[None]:
    """What one would write for fused attention: the probabilities beside each call, kept."""
    kept: list[Tensor] = []
    fused = F.scaled_dot_product_attention

    def both(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        kept.append(scores.masked_fill(~seen, -torch.inf).softmax(-1))
        del kept[:-6]  # of the latest pass
        out: Tensor = fused(q, k, v, **options)
        return out

    forward = model.forward

    def patched(*args: Any) -> Any:
        F.scaled_dot_product_attention = both  # type: ignore[assignment]
        try:
            return forward(*args)
        finally:
            F.scaled_dot_product_attention = fused

    model.forward = patched
    yield


def _last(v: Tensor, out: Tensor) -> Tensor:
    out = out.clone()
    out[:, -1] = out[:, -1] + v
    return out


@dataclass(frozen=True)
class Case:
    """A model, what it is given, and who takes part."""

    name: str
    model: Callable[[], nn.Module]
    given: Callable[[], Tensor]
    contenders: dict[str, Contender]


def steering(layer: str, width: int, last: str) -> dict[str, Contender]:
    """Adding a vector to what a block returns, and attention probabilities.

    Args:
        layer: the block.
        width: of its residual stream.
        last: a layer of which one map is held, so that what is timed is the edit.
    """
    v = torch.randn(width)
    held: Any = {"layers": last, "kinds": "response"}
    at = Where(layer, "output", at=-1, filter_axis=-1)
    return {
        "hook by hand: add": partial(hooked, layer, lambda out: out + v),
        "edit: add": lambda m: capture(m, **held, edit={(layer, "output"): edits.add(v)}),
        "hook by hand: the last token": partial(hooked, layer, partial(_last, v)),
        "edit: the last token": lambda m: capture(m, **held, edit={at: edits.add(v)}),
        "capture without an edit": lambda m: capture(m, **held),
        "attention by hand": _scores_by_hand,
        'kinds="attention"': lambda m: capture(m, kinds="attention"),
    }


def silencing(layer: str) -> dict[str, Contender]:
    """One filter of what a block of convolutions returns is zero."""

    def one(out: Tensor) -> Tensor:
        out = out.clone()
        out[:, 5] = 0
        return out

    held: Any = {"layers": "fc", "kinds": "response"}
    return {
        "hook by hand: one filter": partial(hooked, layer, one),
        "edit: one filter": lambda m: capture(m, **held, edit={(layer, "output", 5): edits.zero()}),
        "edit: an activation": lambda m: capture(
            m, **held, edit={("layer2.0.conv1", "activation", 5): edits.zero()}
        ),
        "capture without an edit": lambda m: capture(m, **held),
    }


CASES = [
    Case(
        "GPT, 6 layers, 1x64 tokens",
        GPT,
        lambda: torch.randint(0, 1024, (1, 64)),
        steering("h.3", 256, "lm_head"),
    ),
    Case(
        "GPT, 6 layers, 8x128 tokens",
        GPT,
        lambda: torch.randint(0, 1024, (8, 128)),
        steering("h.3", 256, "lm_head"),
    ),
    Case(
        "ResNet-18, 2x3x160x160",
        ResNet,
        lambda: torch.randn(2, 3, 160, 160),
        silencing("layer2"),
    ),
]


def measured(case: Case, budget: float) -> dict[str, Figures]:
    """The figures of each contender in a case, in seconds and ratios.

    Raises:
        RuntimeError: a contender failed.
    """
    torch.manual_seed(0)
    bare, given = case.model().eval(), case.given()
    with torch.no_grad(), ExitStack() as blocks:
        timed = {}
        for name, contender in case.contenders.items():
            model = copy.deepcopy(bare)
            awake = resting(blocks.enter_context(contender(model)))
            timed[name] = Timed(partial(model, given), partial(bare, given), awake=awake)
        pairs, failed = interleave(timed, budget)
    if failed:
        raise RuntimeError(str(failed))
    return {name: Figures.of(of) for name, of in pairs.items()}


def patching(budget: float) -> dict[str, Figures]:
    """Patching of 6 layers by 16 positions, against 98 bare passes."""
    torch.manual_seed(0)
    model = GPT().eval()
    clean, corrupted = torch.randint(0, 1024, (2, 1, 16))

    def whole(batch_size: int) -> None:
        patch(
            model,
            clean,
            corrupted,
            lambda out: out[:, -1, 3] - out[:, -1, 5],
            layers="h.?",
            positions="each",
            filter_axis=-1,
            batch_size=batch_size,
            progress=False,
        )

    def bare() -> None:
        with torch.no_grad():
            for _ in range(2 + 6 * 16):
                model(clean)

    timed = {f"patch, batch_size={size}": Timed(partial(whole, size), bare) for size in (1, 16)}
    pairs, failed = interleave(timed, budget, block=0)
    if failed:
        raise RuntimeError(str(failed))
    return {name: Figures.of(of) for name, of in pairs.items()}


def _table(title: str, figures: dict[str, Figures]) -> None:
    print(f"\n{title}")
    print(f"  {'':30s} {'CPU ratio':>9s} {'quartiles':>15s} {'extra':>10s}")
    for name, f in figures.items():
        print(
            f"  {name:30s} {f.cpu:9.3f}   {f.cpu_low:5.3f} to {f.cpu_high:5.3f} "
            f"{f.extra * 1e3:7.2f} ms"
        )


def run(budget: float, threads: int = 1) -> None:
    """Print the tables.

    Args:
        budget: seconds for each contender.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    for case in CASES:
        _table(case.name, measured(case, budget))
    _table("GPT, 6 layers by 16 positions, beside 98 bare passes", patching(budget))
