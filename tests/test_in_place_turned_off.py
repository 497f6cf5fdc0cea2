"""A σ that was in place, and in the next pass is not: the model's tensor stays what it is.

Known sites have an in-place σ run into new memory. What the call itself asks for counts there, and
not what the traced pass asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture

# What the forward below decides by: nothing tells of it before the pass.
ASKED = [True]


class _Own(nn.SiLU):
    pass


def _by_keyword(act: nn.Module, z: Tensor) -> Tensor:
    return F.relu(z, inplace=ASKED[0])


def _by_place(act: nn.Module, z: Tensor) -> Tensor:
    return F.leaky_relu(z, 0.1, ASKED[0])


def _by_method(act: nn.Module, z: Tensor) -> Tensor:
    return (z.relu_ if ASKED[0] else z.relu)()


def _by_function(act: nn.Module, z: Tensor) -> Tensor:
    return (torch.relu_ if ASKED[0] else torch.relu)(z)


def _by_attribute(act: nn.Module, z: Tensor) -> Tensor:
    act.inplace = ASKED[0]  # type: ignore[assignment]
    out: Tensor = act(z)
    return out


def _by_setattr(act: nn.Module, z: Tensor) -> Tensor:
    setattr(act, "inplace", ASKED[0])  # noqa: B010
    out: Tensor = act(z)
    return out


def _by_forward(act: nn.Module, z: Tensor) -> Tensor:
    if not ASKED[0]:
        act.forward = lambda t: t.tanh()  # type: ignore[method-assign]
    out: Tensor = act(z)
    return out


def _by_class(act: nn.Module, z: Tensor) -> Tensor:
    act.__class__ = nn.ReLU if ASKED[0] else _Own
    out: Tensor = act(z)
    return out


class Net(nn.Module):
    """Uses z after its σ has run."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU(inplace=True)
        self.how = how

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.conv(x)
        return self.how(self.act, z), z + 1


WAYS = [
    *(_by_keyword, _by_place, _by_method, _by_function),
    *(_by_attribute, _by_setattr, _by_forward, _by_class),
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("how", WAYS)
def test_what_the_call_asks_for_is_what_the_model_gets(how: Any, mode: Any) -> None:
    model = Net(how)
    bare = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)
    ASKED[0] = True
    with mode(), capture(model) as maps:
        for step in range(8):
            ASKED[0] = step not in (4, 6)
            z = bare.conv(x).detach().clone()
            for got, truth in zip(model(x), bare(x), strict=True):
                assert torch.equal(got, truth)
            for fm in maps.select(kind="preactivation", step=step):
                assert torch.equal(fm.tensor, z)
    assert maps.missed
