"""Whether torch fuses a layer is asked once, and again as soon as anything changes that decides it.

What comes out is compared to an untouched copy, bit for bit, and the maps to those of a block of
its own on another copy.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fmapkit import capture
from fmapkit.torchlib.caching import writes_are_counted
from fmapkit.torchlib.fused.looks import FusedLooks

WIDTH = 16
counted = pytest.mark.skipif(not writes_are_counted, reason="no writes to dicts are counted")


class Two(nn.Module):
    """A layer and an attention, which may get a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.layer(x, src_mask=mask)
        return self.norm(x + self.attention(x, x, x, attn_mask=mask)[0])


def _known() -> list[int]:
    """What is known of layers, each by its identity: a new one is made as torch is asked."""
    return [id(x) for o in gc.get_objects() if type(o) is FusedLooks for x in o._known.values()]


def _inputs(count: int = 3, **options: Any) -> list[Tensor]:
    return [torch.randn(2, 5, WIDTH, **options) for _ in range(count)]


def _same(model: nn.Module, x: Tensor, maps: Any, *given: Any) -> bool:
    """A pass of a captured model gives what a copy gives, and its maps, unless these are lost."""
    bare, other = copy.deepcopy(model), copy.deepcopy(model)
    want = bare(x, *given)
    assert torch.equal(model(x, *given), want)
    if not maps:
        assert maps.missed
        return False
    with capture(other) as truth:
        other(x, *given)
    assert [(fm.layer, fm.kind) for fm in maps] == [(fm.layer, fm.kind) for fm in truth]
    for ours, theirs in zip(maps, truth, strict=True):
        assert torch.equal(ours.tensor, theirs.tensor), (ours.layer, ours.kind)
    return True


@counted
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_asked_once(mode: Any) -> None:
    model = Two().eval()
    gc.collect()
    with mode(), capture(model) as maps:
        for x in _inputs():
            model(x)
        known = _known()
        assert len(known) == 2
        for x in _inputs(4):
            model(x)
            assert _known() == known
        assert _same(model, x, maps)


def _new_weight(model: Two) -> None:
    model.layer.linear1.weight = nn.Parameter(torch.randn(32, WIDTH))


def _other_eps(model: Two) -> None:
    model.layer.norm1.eps = 1e-3  # with two of them, torch does not fuse


def _other_sigma(model: Two) -> None:
    model.layer.activation_relu_or_gelu = 2
    model.layer.activation = torch.nn.functional.gelu


def _odd_heads(model: Two) -> None:
    for attention in (model.layer.self_attn, model.attention):
        attention.num_heads, attention.head_dim = 1, WIDTH


def _a_part(model: Two) -> None:
    model.layer.linear2 = nn.Linear(32, WIDTH)


def _hook(model: Two) -> None:
    model.layer.norm1.register_forward_hook(lambda module, args, output: output * 2)


def _hook_of_attention(model: Two) -> None:
    model.attention.register_forward_pre_hook(lambda module, args: (args[0] * 2,) * 3)


def _pruned(model: Two) -> None:
    prune.random_unstructured(model.layer.linear1, "weight", 0.5)


def _normed(model: Two) -> None:
    parametrizations.weight_norm(model.layer.linear1)


def _normed_and_back(model: Two) -> None:
    parametrizations.weight_norm(model.layer.linear1)
    parametrize.remove_parametrizations(model.layer.linear1, "weight")


def _graph(model: Two) -> None:
    torch.set_grad_enabled(True)


def _training(model: Two) -> None:
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    model.attention.dropout = model.layer.self_attn.dropout = 0.0
    model.train()


def _no_fast_path(model: Two) -> None:
    torch.backends.mha.set_fastpath_enabled(False)


CHANGES: list[Callable[[Two], None]] = [
    *(_new_weight, _other_eps, _other_sigma, _odd_heads, _a_part, _hook, _hook_of_attention),
    *(_pruned, _normed, _normed_and_back, _graph, _training, _no_fast_path),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_may_change(change: Callable[[Two], None]) -> None:
    model = Two().eval()
    try:
        with torch.no_grad(), capture(model) as maps:
            for x in _inputs():
                model(x)
            change(model)
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                assert sum(not _same(model, x, maps) for x in _inputs(5)) < 2
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("grads", [False, True])
def test_weights_get_another_type(grads: bool) -> None:
    model = Two().eval().requires_grad_(grads)
    with torch.no_grad(), capture(model) as maps:
        for dtype in (torch.float32, torch.float64, torch.float32):
            model.to(dtype)
            for x in _inputs(dtype=dtype):
                assert _same(model, x, maps)


def test_masks_come_and_go() -> None:
    model = Two().eval()
    with torch.no_grad(), capture(model) as maps:
        for causal in (False, False, False, True, True, False, True):
            mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
            assert _same(model, *_inputs(1), maps, mask)


def test_another_thing_is_given() -> None:
    model = Two().eval()
    with torch.no_grad(), capture(model) as maps:
        for x in _inputs():
            model(x)
        for x in (torch.randn(5, WIDTH), *_inputs(2), torch.randn(1, 1, WIDTH), *_inputs(2)):
            assert _same(model, x, maps)


class KeyOfItsOwn(nn.Module):
    """Attends to itself, or to another tensor, as an attribute says."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.own = True

    def forward(self, x: Tensor) -> Tensor:
        key = x if self.own else x.flip(1)
        return self.attention(x, key, key, need_weights=False)[0].relu()


def test_a_key_is_the_query_or_not() -> None:
    model = KeyOfItsOwn().eval()
    with torch.no_grad(), capture(model) as maps:
        for own in (True, True, True, False, False, True, False):
            model.own = own
            assert _same(model, *_inputs(1), maps)


def test_the_input_of_a_pass_is_not_kept() -> None:
    model = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True).eval()
    with torch.no_grad(), capture(model, layers=["linear2"]):
        gone = []
        for x in _inputs():
            gone.append(copy.copy(x.untyped_storage()))
            model(x)
        del x
        assert all(torch._C._storage_Use_Count(s._cdata) <= 2 for s in gone)


class OwnNorm(nn.LayerNorm):
    """Its class has what the instances of torch's have."""

    eps = 1e-5

    def __init__(self) -> None:
        super().__init__(WIDTH)
        del self.eps


class Averaged(nn.Linear):
    """Its weight is one of two."""

    average = False
    weight = property(lambda self: self._parameters["mean" if Averaged.average else "weight"])


def test_a_part_has_code_of_its_own() -> None:
    model = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True).eval()
    model.norm1, model.norm2 = OwnNorm(), OwnNorm()
    model.linear1.mean = nn.Parameter(torch.randn(32, WIDTH))
    model.linear1.__class__ = Averaged
    switches = [0, 0, 0, 1, 1, 0, 2, 2, 3, 0]
    inputs = _inputs(len(switches))
    try:
        with torch.no_grad():
            want = []
            for switch, x in zip(switches, inputs, strict=True):
                OwnNorm.eps, Averaged.average = (0.5 if switch & 1 else 1e-5), bool(switch & 2)
                want.append(model(x))
            with capture(model):
                for switch, x, y in zip(switches, inputs, want, strict=True):
                    OwnNorm.eps, Averaged.average = (0.5 if switch & 1 else 1e-5), bool(switch & 2)
                    assert torch.equal(model(x), y)
    finally:
        OwnNorm.eps, Averaged.average = 1e-5, False
