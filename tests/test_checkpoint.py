"""Activation checkpointing: the maps are the forward's, once; the recomputation is not seen.

Truth: a bare copy of the model, run beside with the same seeds, under the witness of
tests/truth.py while its forward runs (its backward recomputes unwatched).
"""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from torch.utils.flop_counter import FlopCounterMode

from fmapkit import MapOverwrittenError, capture
from tests import truth
from tests.truth import graph_of, same_bits

PASSES = 3
Run = Callable[[Any, Tensor], Tensor]


def rows(step: int) -> Tensor:
    data = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    return data.requires_grad_()  # a reentrant checkpoint needs one


class Block(nn.Module):
    """Proven: dropout, σ in place as a module and as a function, a sum that overwrites."""

    def __init__(self, σ: type[nn.Module] = nn.ReLU) -> None:  # noqa: PLC2401
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.drop = nn.Dropout(0.4)
        self.act = σ(inplace=True)
        self.two = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.drop(self.norm(self.one(x))))
        y = self.two(y)
        y += x
        return F.silu(y, inplace=True)


class Unproven(Block):
    """The same with a branch on data: no unit as a whole, so its own σ is seen as a function."""

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            return x
        return torch.tanh(super().forward(x))


class Regions(nn.Module):
    """Blocks, each run by `how`, between plain layers."""

    def __init__(self, how: Callable[..., Tensor], block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 6), nn.ELU(inplace=True))
        self.first, self.second = block(), block()
        self.head = nn.Linear(6, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.how(self.first, x)
        x = self.how(lambda y: torch.sigmoid(self.second(y)), x)
        return self.head(x)


def reentrant(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=True)


def modern(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


def to_the_end(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, early_stop=False)


def never_early(function: Any, *args: Any) -> Any:
    with set_checkpoint_early_stop(False):
        return checkpoint(function, *args, use_reentrant=False)


def nested(function: Any, *args: Any) -> Any:
    return modern(lambda *inner: modern(function, *inner), *args)


def nested_reentrant(function: Any, *args: Any) -> Any:
    return reentrant(lambda *inner: reentrant(function, *inner), *args)


def mixed(function: Any, *args: Any) -> Any:
    return modern(lambda *inner: modern(lambda *i: function(*i) * 1.0, *inner), *args)


def selective(*ops: Any) -> Callable[..., Any]:
    def how(function: Any, *args: Any) -> Any:
        # The blocks write to what is saved here: torch lets them, and so goes on with other values.
        context = functools.partial(
            create_selective_checkpoint_contexts, list(ops), allow_cache_entry_mutation=True
        )
        return checkpoint(function, *args, use_reentrant=False, context_fn=context)

    return how


HOWS = {
    "reentrant": reentrant,
    "modern": modern,
    "to the end": to_the_end,
    "never early": never_early,
    "nested": nested,
    "nested reentrant": nested_reentrant,
    "mixed": mixed,
    "selective norm": selective(torch.ops.aten.native_layer_norm.default),
    "selective σ": selective(torch.ops.aten.silu_.default, torch.ops.aten.relu_.default),
    "selective clone": selective(torch.ops.aten.clone.default, torch.ops.aten.index_select.default),
}


def check(model: nn.Module, **options: Any) -> None:
    """Outputs, gradients, RNG and buffers as of a bare copy; the maps as of its forward."""
    bare = copy.deepcopy(model)
    with capture(model, **options) as maps:
        for step in range(PASSES):
            seen: list[Any] = []
            truth.seed(step)
            bare.zero_grad()
            x = rows(step)
            with truth.Witness(bare) as witness:
                true = bare(x)
            truth.loss_of(true).backward()

            truth.seed(step)
            model.zero_grad()
            mine = rows(step)
            out = model(mine)
            seen = [(fm.layer, fm.kind, fm.call, fm.tensor.detach().clone()) for fm in maps]
            truth.loss_of(out).backward()
            after = [(fm.layer, fm.kind, fm.call, fm.tensor) for fm in maps]

            assert not maps.missed
            assert same_bits(out, true)
            assert same_bits(mine.grad, x.grad)
            for p, q in zip(model.parameters(), bare.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                assert p.grad is None or same_bits(p.grad, q.grad)
            for b, c in zip(model.buffers(), bare.buffers(), strict=True):
                assert same_bits(b, c)
            assert torch.equal(truth.torch.get_rng_state(), torch.get_rng_state())
            assert [s[:3] for s in seen] == [a[:3] for a in after]
            assert all(same_bits(s[3], a[3]) for s, a in zip(seen, after, strict=True))
            if "filters" not in options:
                truth.assert_captured_exactly_once(maps, witness.runs)
    truth.assert_nothing_left(truth.fingerprint(bare), model)


@pytest.mark.parametrize("block", [Block, Unproven, lambda: Block(nn.Hardtanh), lambda: Block(nn.ELU)])
@pytest.mark.parametrize("how", HOWS)
def test_the_forward_once_and_nothing_changed(how: str, block: Any) -> None:
    check(Regions(HOWS[how], block))


@pytest.mark.parametrize("how", HOWS)
def test_copies_of_ours_shift_nothing(how: str) -> None:
    # Checkpointing matches what is saved, and which operators run, by their order.
    class Cloning(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x).clone()
            y = y.index_select(1, torch.arange(5, -1, -1))
            return F.silu(F.elu(y), inplace=True).clone()

    check(Regions(HOWS[how], Cloning), kinds=("input", "response", "preactivation", "activation"))
    check(Regions(HOWS[how], Cloning), filters=[0, 3], layers=["*.one", "*.two"])
    if "reentrant" not in how:
        check(Regions(HOWS[how], Cloning), detach=False)
        check(
            Regions(HOWS[how], Cloning), filters=[0, 3], layers=["*.one", "*.two"], detach=False
        )


def test_a_recomputation_that_writes_to_a_map_is_noticed() -> None:
    # The linear layer's output is kept for backward, and written to there once more. Only the
    # maps whose memory that is can tell; they must not hand out what it left there.
    model = Regions(selective(torch.ops.aten.addmm.default))
    with capture(model) as maps:
        for step in range(PASSES):
            out = model(rows(step))
            before = {(fm.layer, fm.kind): fm.tensor.clone() for fm in maps}
            truth.loss_of(out).backward()
            raised = 0
            for key, value in before.items():
                try:
                    assert same_bits(maps[key].tensor, value)
                except MapOverwrittenError:
                    raised += 1
            assert 0 < raised < len(before)
