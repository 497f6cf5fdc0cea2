"""The quick question asked before each pass, and the reasons told where its answer is no."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fmapkit.session.unseen import recorded
from fmapkit.torchlib.modes import nothing_between

Seen = list[tuple[bool, str]]


class Asks(nn.Module):
    """Asks both while somebody may look on."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.tell = seen.append  # torch.export compares the module's lists before and after

    def forward(self, x: Tensor) -> Tensor:
        self.tell((nothing_between(), recorded()))
        return x + 1


class _Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _with(mode: Any, model: nn.Module, x: Tensor) -> None:
    with mode:
        model(x)


RECORDING: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "torch.jit.trace": lambda m, x: torch.jit.trace(m, (x,)),
    "torch.export": lambda m, x: torch.export.export(m, (x,), strict=False),
    "make_fx": lambda m, x: make_fx(m)(x),
    "make_fx, before dispatch": lambda m, x: make_fx(m, pre_dispatch=True)(x),
}
LOOKING: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "a function mode": lambda m, x: _with(_Function(), m, x),
    "a dispatch mode": lambda m, x: _with(_Dispatch(), m, x),
    "vmap": lambda m, x: torch.func.vmap(m)(x),
    "grad": lambda m, x: torch.func.grad(lambda t: m(t).sum())(x),
}


@pytest.mark.parametrize("by", RECORDING)
def test_what_records_stands_between(by: str) -> None:
    seen: Seen = []
    RECORDING[by](Asks(seen), torch.ones(2, 3))
    reasons = {why for nothing, why in seen if not nothing}
    assert {why for nothing, why in seen if nothing} <= {""}  # it is run plainly, too, to compare
    assert reasons
    assert all(by.partition(",")[0] in why for why in reasons)


@pytest.mark.parametrize("by", LOOKING)
def test_what_looks_on_stands_between(by: str) -> None:
    seen: Seen = []
    LOOKING[by](Asks(seen), torch.ones(2, 3))
    assert seen == [(False, "")]


def test_else_nothing_does() -> None:
    seen: Seen = []
    Asks(seen)(torch.ones(2, 3))
    assert seen == [(True, "")]
