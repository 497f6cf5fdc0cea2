"""A replayed module whose nested output has other tensors than it had when it was learned."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmapkit import CaptureWarning, capture


class Block(nn.Module):
    """Proven; returns a plain attribute beside two maps, in the first place or the last one."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 5)
        self.extra: Any = None
        self.first = first

    def forward(self, x: Tensor) -> Any:
        if self.first:
            return {"extra": self.extra, "a": self.a(x), "b": self.b(x)}
        return {"a": self.a(x), "b": self.b(x), "extra": self.extra}


class Outer(nn.Module):
    """Unproven: traced around the block. σ of what `a` made is outside, `b` has none."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.block = Block(first)

    def forward(self, x: Tensor) -> Any:
        out = self.block(x)
        if float(x.sum()) > 1e9:
            return out
        return torch.relu(out["a"]), out["b"]


# Whether there is an extra tensor, by pass: the first one is learned.
ROADS = list(itertools.product((False, True), repeat=3))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("there", ROADS)
@pytest.mark.parametrize("asked", ["maps", "outputs too"])
def test_labels_stay_with_their_tensors(
    first: bool, there: tuple[bool, ...], asked: str, recwarn: Any
) -> None:
    torch.manual_seed(0)
    model = Outer(first)
    block = model.block
    kinds: Any = ("preactivation", "activation")
    kinds = (*kinds, "output") if asked != "maps" else kinds
    x = torch.randn(2, 4)
    with capture(model, kinds=kinds) as maps, torch.no_grad():
        for with_extra in there:
            block.extra = torch.randn(2, 7) if with_extra else None
            model(x)
            a, b = (x @ m.weight.T + m.bias for m in (block.a, block.b))
            # By hand: a's z reaches a nonlinearity, b's does not.
            expected = {
                ("block.a", "preactivation"): a,
                ("block.a", "activation"): a.relu(),
                ("block.b", "preactivation"): b,
            }
            found = {(fm.layer, fm.kind): fm.tensor for fm in maps if fm.kind != "output"}
            assert found.keys() == expected.keys()
            assert len([fm for fm in maps if fm.kind != "output"]) == 3
            for key, tensor in expected.items():
                torch.testing.assert_close(found[key], tensor)
            if asked == "maps":
                assert maps.missed == []
                continue
            outputs = {fm.path: fm.tensor for fm in maps.select("block", kind="output", step=-1)}
            assert ("['extra']" in outputs) == with_extra
            if with_extra:
                assert torch.equal(outputs["['extra']"], block.extra)
            torch.testing.assert_close(outputs["['a']"], a)
            torch.testing.assert_close(outputs["['b']"], b)
    assert maps.missed == []


def test_a_new_tensor_in_an_attribute_is_there_at_once() -> None:
    model = Block(first=True)
    with capture(model, kinds="output") as maps:
        for n in range(4):
            model.extra = torch.ones(2, 7) if n else None
            model(torch.ones(2, 4))
            paths = [fm.path for fm in maps.select("")]
            assert paths == ["['extra']"] * (n > 0) + ["['a']", "['b']"]
        assert maps.missed == []


def test_a_new_tensor_that_nothing_tells_of_is_named_once_and_there_from_the_next_pass_on() -> None:
    kept: dict[str, Any] = {"extra": None}

    class Kept(Block):
        def forward(self, x: Tensor) -> Any:
            return {"extra": kept["extra"], "a": self.a(x), "b": self.b(x)}

    model = Kept(first=True)
    with capture(model, kinds="output") as maps:
        for n in range(6):
            kept["extra"] = torch.ones(2, 7) if n > 2 else None
            if n == 3:
                with pytest.warns(CaptureWarning, match="took a way"):
                    model(torch.ones(2, 4))
                continue
            model(torch.ones(2, 4))
            paths = [fm.path for fm in maps.select("")]
            assert paths == ["['extra']"] * (n > 3) + ["['a']", "['b']"]
        assert [m.layer for m in maps.missed] == [""]


class Moving(Block):
    """As many tensors in each pass, at other places."""

    def __init__(self) -> None:
        super().__init__(first=True)
        self.more: Any = None

    def forward(self, x: Tensor) -> Any:
        return {"extra": self.extra, "a": self.a(x), "b": self.b(x), "more": self.more}


@pytest.mark.parametrize("there", ROADS)
def test_labels_stay_where_a_tensor_moves(there: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    model = Outer(first=True)
    block = model.block = Moving()
    x = torch.randn(2, 4)
    with capture(model) as maps, torch.no_grad():
        for before in there:
            block.extra, block.more = (x, None) if before else (None, x)
            model(x)
            a, b = (x @ m.weight.T + m.bias for m in (block.a, block.b))
            found = {(fm.layer, fm.kind): fm.tensor for fm in maps}
            assert len(found) == len(maps) == 3
            torch.testing.assert_close(found["block.a", "preactivation"], a)
            torch.testing.assert_close(found["block.a", "activation"], a.relu())
            torch.testing.assert_close(found["block.b", "preactivation"], b)
