"""A plain model calls what torch.compile has compiled: it runs as without a capture, and is named.

With a mode on torch's stack, dynamo would compile the mode's own code into it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fmapkit import CaptureWarning, capture
from fmapkit.missed import Reason

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# torch 2.4 takes other ways past a user's mode, and does not say that it exports.
_OLD = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 5)


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def _body(h: Tensor) -> Tensor:
    return F.gelu(h) * torch.sigmoid(h) + 1


class Net(nn.Module):
    """Two layers, with a compiled callable in between."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(4, 4), nn.Linear(4, 4), way
        self.function = torch.compile(lambda h: _body(h), backend="eager")
        self.parts = [torch.compile(nn.Sequential(nn.Linear(4, 4), nn.GELU()), backend="eager")]
        self.method = torch.compile(self.plain, backend="eager")

    def plain(self, h: Tensor) -> Tensor:
        return _body(h)

    @torch.compile(backend="eager")
    def decorated(self, h: Tensor) -> Tensor:
        return _body(h)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if self.way == "in a list":
            h = self.parts[0](h)
        elif self.way == "made in the forward":
            h = torch.compile(_body, backend="eager")(h)
        else:
            h = getattr(self, self.way)(h)
        return F.relu(self.b(h))


WAYS = ["function", "method", "decorated", "in a list", "made in the forward"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("way", WAYS)
def test_it_runs_as_without_a_capture(way: str, mode: Callable[[], Any]) -> None:
    model = Net(way)
    with mode():
        x = torch.randn(2, 4)
        expected = model(x)
        compiled = counters["frames"]["ok"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CaptureWarning)
            with capture(model) as maps:
                for _ in range(4):
                    assert torch.equal(model(x), expected)
                    a = F.relu(F.linear(x, model.a.weight, model.a.bias))
                    assert torch.equal(maps["a"].tensor, a)
                    assert torch.equal(maps["b"].tensor, expected)
                    assert len(maps) == 4
    assert [m.why for m in maps.missed] == [Reason.COMPILED_FUNCTION]
    # A function that is called anew is compiled anew; none of ours is.
    assert counters["frames"]["ok"] <= compiled + 4


@pytest.mark.skipif(_OLD, reason="of torch 2.5 or newer")
def test_two_captures_and_a_mode_of_the_users() -> None:
    seen: list[str] = []

    class Watches(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    model, x = Net("function"), torch.randn(2, 4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with Watches():
            expected = model(x)
        bare, seen[:] = list(seen), []
        with capture(model) as outer, capture(model) as inner:
            for _ in range(3):
                with Watches():
                    assert torch.equal(model(x), expected)
                assert [name for name in seen if name == "gelu"] == ["gelu"] * bare.count("gelu")
                seen.clear()
    for maps in (outer, inner):
        assert [m.why for m in maps.missed] == [Reason.COMPILED_FUNCTION]


def test_what_it_overwrites_in_inference_mode() -> None:
    """No version tells of that write."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.write = torch.compile(lambda h: h.mul_(3), backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(x))
            self.write(h)
            return h.clone()

    model = Writes()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model) as maps:
            for _ in range(5):
                x = torch.randn(2, 4)
                a = F.relu(F.linear(x, model.a.weight, model.a.bias))
                assert torch.equal(model(x), a * 3)
                assert torch.equal(maps["a"].tensor, a)


def test_gradients_go_through() -> None:
    model = Net("function")
    bare, x = copy.deepcopy(model), torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model):
            for _ in range(4):
                for each in (model, bare):
                    each.zero_grad()
                    each(x).sum().backward()
                pairs = zip(model.parameters(), bare.parameters(), strict=True)
                assert all(torch.equal(p.grad, q.grad) for p, q in pairs)  # type: ignore[arg-type]


@pytest.mark.skipif(_OLD, reason="of torch 2.5 or newer")
def test_a_part_is_exported_in_the_forward() -> None:
    """What stands for tensors meanwhile is no map."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            program = torch.export.export(nn.Sequential(self.b, nn.GELU()), (x,)).module()
            y: Tensor = program(F.relu(self.a(x)))
            return y

    model, x = Net(), torch.randn(2, 8)
    with torch.no_grad():
        expected = model(x)
        with capture(model) as maps:
            for _ in range(3):
                assert torch.equal(model(x), expected)
                assert [fm.layer for fm in maps] == ["a", "a", "b", "b"]
                assert all(type(fm.tensor) is Tensor for fm in maps)
                assert torch.equal(maps["b"].tensor, expected)
