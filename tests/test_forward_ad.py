"""Forward-mode derivatives of a captured model: what torch computes beside the values is the same.

A dual tensor has a tangent besides its values, which goes where the values go: an in-place σ that
ran into other memory would lose it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture

SIGMAS = {
    "module": lambda m, z: m.act(z),
    "function": lambda m, z: F.relu_(z),
    "method": lambda m, z: z.tanh_(),
    "by hand": lambda m, z: m.own(z),
}


class Own(nn.Module):
    """One nonlinearity written by hand, in place."""

    def forward(self, z: Tensor) -> Tensor:
        return z.mul_(torch.sigmoid(z))


class Net(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(3, 4), nn.Linear(4, 5), how
        self.act, self.own = nn.ReLU(inplace=True), Own()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = SIGMAS[self.how](self, self.a(x))
        return F.silu(self.b(y), inplace=True)


def _derivative(model: nn.Module, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    with fwAD.dual_level():
        value, along = fwAD.unpack_dual(model(fwAD.make_dual(x, tangent)))
        assert along is not None
        return value.clone(), along.clone()


@pytest.mark.parametrize("options", [{}, {"detach": False}, {"gradients": True}])
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("how", SIGMAS)
def test_tangents_are_those_of_the_bare_model(how: str, grads: bool, options: Any) -> None:
    model = Net(how)
    bare = copy.deepcopy(model)
    with torch.set_grad_enabled(grads), capture(model, **options) as maps:
        for step in range(5):  # both kinds of passes, one after the other
            x, tangent = torch.randn(2, 3), torch.randn(2, 3)
            if step in (0, 2, 3):
                for got, truth in zip(
                    _derivative(model, x, tangent), _derivative(bare, x, tangent), strict=True
                ):
                    assert torch.equal(got, truth)
            else:
                assert torch.equal(model(x), bare(x))
            z = bare.a(x)
            assert torch.equal(maps["a", "preactivation"].tensor, z)
            assert torch.equal(maps["a"].tensor, SIGMAS[how](bare, z.clone()))
    assert list(maps.missed) == []
