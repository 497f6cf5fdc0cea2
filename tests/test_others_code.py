"""Code of the user's that torch calls at each of its functions: modes, and subclasses of `Tensor`.

Such code sees the model's functions, and nothing that fmapkit makes of tensors beside them; and a
map is what the model's tensor was, not what that code makes of a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fmapkit import capture
from fmapkit.analysis import Statistics
from tests.checks import tags

EXPECTED = [("a", 0, "relu", range(4)), ("b", 0, "sigmoid", range(4)), ("c", 0, "tanh", range(4))]
SILENT = {"__get__", "is_inference", "stride", "dim", "is_floating_point", "is_contiguous", "size"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.a(x))
        x = torch.sigmoid(self.b(x) * 2)
        return self.act(self.c(x))  # type: ignore[no-any-return]


class Noisy(TorchFunctionMode):
    """Analog hardware: each function's result is a little off."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__
        if name not in SILENT:
            self.ran.append(name)
        if isinstance(out, Tensor) and out.is_floating_point() and name != "__get__":
            out = out.add_(torch.randn_like(out), alpha=0.1) if name.endswith("_") else out * 1.1
        return out


class NoisyBelow(TorchDispatchMode):
    """The same below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ran.append(func.__name__)
        if isinstance(out, Tensor) and not func.is_view and func._schema.name[-1] != "_":
            out = out * 1.1 + torch.randn_like(out) * 0.1
        return out


OPTIONS: list[dict[str, Any]] = [
    *({}, {"detach": False}, {"gradients": True}, {"dtype": torch.float64}, {"filters": 1}),
    *({"check": "finite"}, {"weights": True}, {"kinds": ("input", "response", "activation")}),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("noise", [Noisy, NoisyBelow])
def test_a_mode_sees_what_the_model_runs_and_that_alone(
    noise: Any, mode: Any, options: Any
) -> None:
    model = Net()
    bare = copy.deepcopy(model)
    shown = Statistics()
    with mode(), capture(model, analyses=shown, **options) as maps:
        for step in range(4):
            x = torch.randn(2, 3)
            seen = []
            for net in (bare, model):
                torch.manual_seed(step)
                with noise() as noisy:
                    y = net(x)
                seen.append((y.detach().clone(), torch.get_rng_state(), noisy.ran))
            assert torch.equal(seen[0][0], seen[1][0])
            assert torch.equal(seen[0][1], seen[1][1])
            assert seen[0][2] == seen[1][2]
            assert [tag[:3] for tag in tags(maps)] == [tag[:3] for tag in EXPECTED]
            assert torch.equal(maps["c"].tensor, _as_held(y, options))
    assert list(maps.missed) == []


@pytest.mark.parametrize("noise", [Noisy])
def test_a_mode_does_not_see_whether_inputs_share_memory(noise: Any) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(x) + y

    model = Two()
    bare = copy.deepcopy(model)
    with torch.no_grad(), capture(model):
        for _ in range(4):
            x, y = torch.randn(2, 2, 3)
            ran = []
            for net in (bare, model):
                with noise() as noisy:
                    net(x, y)
                ran.append(noisy.ran)
            assert ran[0] == ran[1]


def _as_held(y: Tensor, options: dict[str, Any]) -> Tensor:
    y = y.detach()
    return y[:, 1:2] if "filters" in options else y.to(options.get("dtype", y.dtype))


class Marked(Tensor):
    """Goes on in what is computed from it; its code decides by what has run so far."""

    ran = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is F.linear:
            cls.ran += 1
        return out


class Weight(nn.Parameter):
    """A weight with code of its own, as those of quantisers."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = args
            return F.linear(x, weight.detach().as_subclass(Tensor) * 1.0, bias)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("grads", [False, True])
def test_a_tensor_with_code_of_its_own_is_captured_in_every_pass(grads: bool) -> None:
    model = Net()
    bare = copy.deepcopy(model)
    with torch.set_grad_enabled(grads), capture(model) as maps:
        for step in range(8):
            x = torch.randn(2, 3)
            given = x.as_subclass(Marked) if step not in (3, 4) else x  # type: ignore[arg-type]
            y = model(given)
            assert type(y) is type(given)
            assert torch.equal(y.as_subclass(Tensor), bare(x))
            assert tags(maps) == EXPECTED
            z = bare.a(x)
            assert torch.equal(maps["a", "preactivation"].tensor, z)
            assert torch.equal(maps["a"].tensor, z.relu())
    assert list(maps.missed) == []


def test_a_weight_with_code_of_its_own_is_captured_in_every_pass() -> None:
    model = Net()
    bare = copy.deepcopy(model)
    for layer in (model.b, model.c):
        layer.weight = layer.weight.data.as_subclass(Weight)  # type: ignore[arg-type, assignment]
    with torch.no_grad(), capture(model) as maps:
        for _ in range(6):
            x = torch.randn(2, 3)
            assert torch.equal(model(x), bare(x))
            assert [(layer, sigma) for layer, _, sigma, _ in tags(maps)] == [
                (layer, sigma) for layer, _, sigma, _ in EXPECTED
            ]
    assert list(maps.missed) == []


class Once(list[Tensor]):
    """Gives its elements once: a stream."""

    def __iter__(self) -> Iterator[Tensor]:
        while len(self):
            yield self.pop(0)


class Lazy(dict[str, Tensor]):
    """Counts who looks at it."""

    looks = 0

    def items(self) -> Any:
        self.looks += 1
        return super().items()

    def values(self) -> Any:
        self.looks += 1
        return super().values()

    def __len__(self) -> int:
        self.looks += 1
        return super().__len__()


class TakesContainers(nn.Module):
    """Uses up one, and tells of looks at the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, given: Any) -> Tensor:
        x = torch.stack(list(given)).sum(0) if type(given) is Once else given["x"]
        looks = given.looks if type(given) is Lazy else 0
        return torch.relu(self.fc(x)) + looks


@torch.no_grad()
@pytest.mark.parametrize("kind", [Once, Lazy])
def test_containers_of_the_users_are_looked_at_past_their_code(kind: Any) -> None:
    model = TakesContainers()
    with capture(model) as maps:
        for _ in range(6):
            x, y = torch.randn(2, 2, 4)
            given = Once([x, y]) if kind is Once else Lazy(x=x)
            z = F.linear(x + y if kind is Once else x, model.fc.weight, model.fc.bias)
            assert torch.equal(model(given), z.relu())
            assert torch.equal(maps["fc", "activation"].tensor, z.relu())
    assert not maps.missed


class Compared:
    """It is not to be compared with anything."""

    def __eq__(self, other: object) -> bool:
        raise AttributeError("compared")

    __hash__ = object.__hash__


class Remembers(nn.Module):
    """An attribute is None at first, and another object in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.state = nn.Linear(4, 4), None

    def forward(self, x: Tensor) -> Tensor:
        self.state = Compared()  # type: ignore[assignment]
        return torch.relu(self.fc(x))


@torch.no_grad()
def test_attributes_are_compared_past_the_users_code() -> None:
    model = Remembers()
    with capture(model) as maps:
        for _ in range(6):
            model(torch.randn(2, 4))
            assert [fm.kind for fm in maps] == ["preactivation", "activation"]
    assert not maps.missed


class Entered(nn.Module):
    """Runs in what it has as an attribute."""

    def __init__(self, by_stack: bool) -> None:
        super().__init__()
        self.fc, self.out, self.by_stack = nn.Linear(4, 4), nn.Linear(4, 4), by_stack
        self.context: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.by_stack:
            with ExitStack() as stack:
                stack.enter_context(self.context)
                y = self.inside(x)
        else:
            with self.context:
                y = self.inside(x)
        z: Tensor = self.out(y)
        return z

    def inside(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc(x))
        self.truth = h.clone()
        return h.float().add_(1)


class Doubles(TorchFunctionMode):
    """ReLU gives twice what it gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.relu else out


def _autocast(enabled: bool = True) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("by_stack", [False, True])
@pytest.mark.parametrize(
    ("before", "after"),
    [(_autocast, nullcontext), (_autocast, lambda: _autocast(False)), (nullcontext, Doubles)],
    ids=["none", "off", "a mode"],
)
def test_what_a_with_statement_enters_is_exchanged(
    before: Any, after: Any, by_stack: bool, mode: Any
) -> None:
    model, lost = Entered(by_stack), 0
    with mode(), capture(model) as maps:
        for n in range(9):
            model.context = before() if n < 4 else after()
            model(torch.randn(2, 4))
            if not maps:
                lost += 1
                assert maps.missed
                continue
            factor = 2 if after is Doubles and n >= 4 else 1
            assert torch.equal(maps["fc", "activation"].tensor * factor, model.truth)
    assert lost < 3
