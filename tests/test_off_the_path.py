"""A pass that leaves its known path where an in-place σ is: the model computes what it computes.

Known sites have an in-place σ run into new memory. What the call itself asks for counts there, and
what it is given: not what the traced pass asked for and was given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

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


# -- what it is given -------------------------------------------------------------------------

WITHIN = [0]


def _usual(f: Any, x: Tensor) -> Tensor:
    out: Tensor = f(x)
    return out


class Rows(nn.Module):
    """Overwrites a part of what a layer gave, and gets at the whole by its strides."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.act, self.how = nn.Linear(3, 8), nn.ReLU(inplace=True), how

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(x)[1:2]
        if self.how == "module":
            self.act(z)
        else:
            F.relu_(z)
        return torch.as_strided(z, (2, 8), (8, 1), 0).clone()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("how", ["module", "function"])
def test_a_part_of_what_no_tensor_has_as_a_whole_keeps_its_memory(how: str, mode: Any) -> None:
    model = Rows(how)
    bare = copy.deepcopy(model)
    with mode(), capture(model) as maps:
        for _ in range(3):
            x = torch.randn(2, 3)
            assert torch.equal(model(x), bare(x))
            z = bare.fc(x)[1:2]
            assert torch.equal(maps["fc", "preactivation"].tensor, z)
            assert torch.equal(maps["fc"].tensor, z.relu())


def _vmap(f: Any, x: Tensor) -> Tensor:
    out: Tensor = torch.func.vmap(f)(x)
    return out


def _jvp(f: Any, x: Tensor) -> Tensor:
    out: Tensor = torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]
    return out


def _grad(f: Any, x: Tensor) -> Tensor:
    out: Tensor = torch.func.grad(lambda t: f(t).sum())(x)
    return out


def _inference(f: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        out: Tensor = f(x).clone()
    return out


def _own_gradients(f: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        return torch.autograd.grad(f(y).sum(), y)[0]


def _autocast(f: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out: Tensor = f(x)
    return out


def _as_array(f: Any, x: Tensor) -> Tensor:
    return f(x) + torch.from_numpy(f(x).numpy())  # type: ignore[no-any-return]


class _Doubling(TorchFunctionMode):
    """Knows the in-place form of a function alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        in_place = func is torch.relu_ or (kwargs or {}).get("inplace")
        return out * 2 if in_place else out


def _function_mode(f: Any, x: Tensor) -> Tensor:
    with _Doubling():
        out: Tensor = f(x)
    return out


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _dispatch_mode(f: Any, x: Tensor) -> Tensor:
    with _Counting() as mode:
        out: Tensor = f(x)
    return out + mode.seen.count("aten.relu_.default")


OTHERS = [
    *(_vmap, _jvp, _grad, _inference, _own_gradients, _autocast, _as_array, _function_mode),
    _dispatch_mode,
]


class Within(nn.Module):
    """Has the same code run as usual, or in another mode, by what nothing tells of beforehand."""

    def __init__(self, functional: bool, other: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.functional = functional
        self.ways = [_usual, other]

    def _part(self, x: Tensor) -> Tensor:
        z = self.fc(x)
        out: Tensor = F.relu(z, inplace=True) if self.functional else self.act(z)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ways[WITHIN[0]](self._part, x)
        return out


@pytest.mark.parametrize("asked", [{}, {"filters": [0, 2]}, {"dtype": torch.float64}])
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_what_it_is_given_is_asked_at_the_call(other: Any, functional: bool, asked: Any) -> None:
    model = Within(functional, other)
    bare = copy.deepcopy(model)
    x = torch.randn(3, 4)
    picked = asked.get("filters", [0, 1, 2, 3])
    with torch.no_grad(), capture(model, **asked) as maps:
        for step in range(7):
            WITHIN[0] = int(step == 4)
            assert torch.equal(model(x), bare(x))
            for fm in maps.select(kind="preactivation", step=step):
                assert torch.equal(fm.tensor.float(), bare.fc(x)[:, picked]) or step == 4
        assert len(maps.select(step=6)) == 2
    assert any(not m.layer for m in maps.missed)
    assert not any("failed here" in m.reason for m in maps.missed)


# -- what is done to the model in the middle of a pass ----------------------------------------

Undo = Callable[[], None]
_relu, _forward = F.relu, nn.ReLU.forward


def _pre_hook(model: Any, z: Tensor) -> Undo:
    return model.act.register_forward_pre_hook(lambda m, args: (args[0] * 2,)).remove  # type: ignore[no-any-return]


def _hook(model: Any, z: Tensor) -> Undo:
    return model.act.register_forward_hook(lambda m, args, out: out + 1).remove  # type: ignore[no-any-return]


def _global_pre_hook(model: Any, z: Tensor) -> Undo:
    def add(module: nn.Module, args: Any) -> Any:
        return (args[0] + 1,) if isinstance(module, nn.ReLU) else None

    return torch.nn.modules.module.register_module_forward_pre_hook(add).remove


def _global_hook(model: Any, z: Tensor) -> Undo:
    def double(module: nn.Module, args: Any, out: Any) -> Any:
        return out * 2 if isinstance(module, nn.ReLU) else None

    return torch.nn.modules.module.register_module_forward_hook(double).remove


def _of_the_class(model: Any, z: Tensor) -> Undo:
    nn.ReLU.forward = lambda self, x: _relu(x) * 2  # type: ignore[method-assign]
    return lambda: setattr(nn.ReLU, "forward", _forward)


def _of_torch(model: Any, z: Tensor) -> Undo:
    F.relu = lambda x, inplace=False: torch.tanh(x)
    return lambda: setattr(F, "relu", _relu)


def _of_the_module(model: Any, z: Tensor) -> Undo:
    model.act.forward = lambda x: x.abs()
    return lambda: delattr(model.act, "forward")


def _an_alias(model: Any, z: Tensor) -> Undo:
    model.kept.append(z.detach())
    return lambda: None


def _an_array(model: Any, z: Tensor) -> Undo:
    model.kept.append(torch.from_numpy(z.numpy()))
    return lambda: None


def _other_memory(model: Any, z: Tensor) -> Undo:
    model.kept.append(z.detach())
    z.data = z.data.clone()
    return lambda: None


MIDDLES = [
    *(_pre_hook, _hook, _global_pre_hook, _global_hook, _of_the_class, _of_torch),
    *(_of_the_module, _an_alias, _an_array, _other_memory),
]


class Middle(nn.Module):
    """Has something done to it between two layers."""

    def __init__(self, middle: Callable[[Any, Tensor], Undo]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.middle = middle
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.fc(x)
        undo = self.middle(self, z) if WITHIN[0] else None
        out = self.act(z)
        if undo is not None:
            undo()
        found = [out, z + 1, *(t + 1 for t in self.kept)]
        self.kept.clear()
        return found


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_done_in_the_middle_of_a_pass_is_done(middle: Any, mode: Any) -> None:
    model = Middle(middle)
    bare = copy.deepcopy(model)
    x = torch.randn(3, 4)
    with mode(), capture(model) as maps:
        for step in range(7):
            WITHIN[0] = int(step == 4)
            for got, truth in zip(model(x), bare(x), strict=True):
                assert torch.equal(got, truth)
        assert len(maps.select(step=6)) == 2
    assert not any("failed here" in m.reason for m in maps.missed)


@pytest.mark.parametrize("act", [nn.Tanh(), nn.Sigmoid()])
def test_a_function_of_torchs_that_stands_for_another_between_passes(
    act: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own modules call it by its name, and record nothing."""
    model = nn.Sequential(nn.Linear(4, 4), act)
    name = type(act).__name__.lower()
    other = "sigmoid" if name == "tanh" else "tanh"
    x = torch.randn(3, 4)
    with torch.no_grad(), capture(model) as maps:
        for step in range(6):
            monkeypatch.setattr(torch, name, getattr(torch, other if step == 4 else name))
            model(x)
            monkeypatch.undo()
            tags = {fm.nonlinearity for fm in maps.select(step=step)}
            assert tags == {other if step == 4 else name}


class _Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x + 3).clamp(0, 6) / 6


class _Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), _Swish()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


class _PastAPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.part = nn.Linear(4, 4, bias=False), _Part()

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        h = F.leaky_relu(z)
        if z.sum() > 0:
            return self.part(h)
        return self.part.act(self.part.fc(h))


def test_hooks_of_another_capture_tell_that_one_alone() -> None:
    """A σ that runs past the part it is in, for the first time, is none of its functions' pairs."""
    model = _PastAPart().eval()
    x = torch.randn(3, 4)
    up = x if model.stem(x).sum() > 0 else -x
    with torch.no_grad(), capture(model, every=2):
        model(up)
        with capture(model) as maps:
            for given in (up, -up):
                model(given)
                assert "clamp" not in {m.nonlinearity for m in maps}
            model(-up)
            assert maps["part.fc"].nonlinearity == "_Swish"
