"""What every hand-written model is put through: bare copy, witness, several passes in a block."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import CaptureWarning, capture
from fmapkit.missed import Reason
from fmapkit.torchlib.dynamo import COMPILED_FROM
from tests import truth

needs_compiled = pytest.mark.skipif(
    torch.__version__ < COMPILED_FROM,
    reason=f"compiled models are captured from torch {COMPILED_FROM} on",
)

Tag = tuple[str, int, str, range | None]


class Residual(nn.Module):
    """conv1 - bn1 - relu_ - conv2, what it was given added in place, a functional σ - fc."""

    def __init__(self, width: int = 4, out: int = 2, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.conv2(x)
        y += x
        return self.fc(F.relu(y).mean((2, 3)))


def strayed(maps: Any) -> bool:
    """Whether a pass was named that left the known ways; nothing else may be."""
    reasons = {m.reason for m in maps.missed}
    assert reasons <= {Reason.NEW_PATH.text()}, reasons
    return bool(reasons)


def tags(maps: Any, kind: str = "activation") -> list[Tag]:
    """(layer, call, σ, filters) of each map of the latest pass, in execution order."""
    found = maps.select(kind=kind, step=-1)
    return [(fm.layer, fm.call, fm.nonlinearity, fm.filters) for fm in found]


def check(
    model: nn.Module,
    passes: Sequence[tuple[Any, ...]],
    expected: Sequence[Tag] | Sequence[Sequence[Tag]] | None = None,
    *,
    train: bool = True,
    missed: bool = False,
    kwargs: dict[str, Any] | None = None,
    order: bool = True,
    **options: Any,
) -> None:
    """Run the passes in one block beside a bare copy, and compare all there is to compare.

    Args:
        model: in the mode (train or eval) it is to be run in.
        passes: positional arguments of each pass.
        expected: the tags of every pass, or a list of them for each pass; None: not compared.
        train: with gradients and a backward pass, or without.
        missed: whether `maps.missed` may name something (runs in what it names are excused).
        kwargs: keyword arguments of each pass.
        order: whether maps come in order of execution.
        options: of `capture`.
    """
    bare = copy.deepcopy(model)
    got = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if missed else "error", CaptureWarning)
        with capture(model, **options) as maps:
            for n, args in enumerate(passes):
                true = truth.run_pass(bare, args, kwargs, train=train, seed_=n, witness=True)
                seen = truth.run_pass(model, args, kwargs, train=train, seed_=n)
                truth.assert_same_pass(true, seen)
                truth.assert_captured_exactly_once(maps, true.truth, order=order)
                got.append(tags(maps))
                if not missed:
                    assert maps.missed == [] or not list(maps.missed), maps.missed
    truth.assert_nothing_left(truth.fingerprint(bare), model)
    if expected is None:
        return
    each = expected if expected and isinstance(expected[0], list) else [expected] * len(passes)
    for n, (tags_, wanted) in enumerate(zip(got, each, strict=True)):
        assert tags_ == list(wanted), f"pass {n}"


def strays(
    model: nn.Module,
    passes: Sequence[tuple[Any, ...]],
    *,
    train: bool = False,
    most: int = 2,
    **options: Any,
) -> list[list[Tag]]:
    """The same, where a few passes may leave the known ways: what they had until then is right.

    Args:
        model: to run.
        passes: positional arguments of each.
        train: with gradients and a backward pass, or without.
        most: how many passes may do so; of a module that does it again, each one is traced.
        options: of `capture`.

    Returns:
        The tags of each pass.
    """
    bare, got, lost = copy.deepcopy(model), [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model, **options) as maps:
            for n, args in enumerate(passes):
                true = truth.run_pass(bare, args, train=train, seed_=n, witness=True)
                seen = truth.run_pass(model, args, train=train, seed_=n)
                truth.assert_same_pass(true, seen)
                got.append(tags(maps))
                pairs = truth.captured_pairs(maps)
                if len(pairs) < len(true.truth) and strayed(maps):
                    lost += 1
                    assert lost <= most, f"pass {n}: lost again"
                    for run, pair in zip(true.truth, pairs, strict=False):  # up to some point
                        assert truth.same_bits(run.z, pair.z), f"pass {n}"
                        assert truth.same_bits(run.a, pair.a), f"pass {n}"
                else:  # whatever was named before excuses nothing
                    read = SimpleNamespace(select=maps.select, missed=[])
                    truth.assert_captured_exactly_once(read, true.truth)
            strayed(maps)
    truth.assert_nothing_left(truth.fingerprint(bare), model)
    return got


def images(
    *shape: int, n: int = 3, offset: int = 0, requires_grad: bool = False
) -> list[tuple[torch.Tensor]]:
    """`n` passes' worth of inputs, each another one."""
    return [
        (torch.randn(*shape, generator=torch.Generator().manual_seed(offset + i)),)
        for i in range(n)
    ]
