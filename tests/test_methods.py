"""Passes through other methods than the model's call."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import ArgumentError, capture, edits
from tests import truth


class Coder(nn.Module):
    """A module whose methods call its parts, functions, each other, and its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(6, 3), nn.Linear(3, 6)
        self.norm, self.act = nn.BatchNorm1d(3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def encode(self, x: Tensor, *, twice: bool = False) -> Tensor:
        z = self.act(self.norm(self.down(x)))
        return z * 2 if twice else z

    def decode(self, z: Tensor) -> Tensor:
        return torch.tanh(self.up(z))

    def both(self, x: Tensor) -> Tensor:
        return self(x) + self.decode(self.encode(x))

    def fails(self, x: Tensor) -> Tensor:
        raise ValueError(str(self.down(x).shape))

    def interrupted(self, x: Tensor) -> Tensor:
        self.down(x)
        raise KeyboardInterrupt

    def pieces(self, x: Tensor) -> Iterator[Tensor]:
        yield self.down(x)

    @staticmethod
    def plain(x: Tensor) -> Tensor:
        return x + 1


def coder() -> tuple[Coder, Tensor]:
    torch.manual_seed(0)
    return Coder().train(), torch.randn(4, 6)


@pytest.mark.parametrize("train", [False, True])
def test_a_method_is_a_pass(train: bool) -> None:
    model, x = coder()
    model.train(train)
    hand = copy.deepcopy(model)
    before = truth.fingerprint(hand)
    kinds = ("preactivation", "activation", "output")
    with capture(model, kinds=kinds, method="encode", keep="all") as maps:
        for step in range(4):
            seen: dict[str, Tensor] = {}
            handle = hand.norm.register_forward_hook(
                lambda m, a, out, seen=seen: seen.update(z=out.clone())
            )
            expected = hand.encode(x, twice=True)
            handle.remove()
            got = model.encode(x, twice=True)
            assert torch.equal(got, expected)
            for net, out in ((hand, expected), (model, got)):
                net.zero_grad()
                out.square().sum().backward()
            truth.assert_same_gradients(hand, model)
            z, a = maps["down", "preactivation"], maps["down"]
            assert z.step == a.step == step
            assert torch.equal(z.tensor, seen["z"])
            assert torch.equal(a.tensor, seen["z"].relu())
            assert torch.equal(maps["", "output"].tensor, expected)
            assert maps.layers == ["down", "norm", "act", ""]
    assert maps.missed == []
    assert [p.step for p in maps.select(layer="down", kind="activation")] == [0, 1, 2, 3]
    assert "encode" not in model.__dict__
    assert before is not None
    assert type(model.encode) is type(hand.encode)


def test_several_methods_and_the_call_itself() -> None:
    model, x = coder()
    model.eval()
    with torch.no_grad():
        z = model.encode(x)
        bare = [z, model.decode(z), model(x), model.both(x)]
        with capture(model, method=["encode", "decode", "both"], keep="all") as maps:
            got = [model.encode(x), model.decode(z), model(x), model.both(x)]
        assert all(map(torch.equal, got, bare))
    found = [
        [(fm.layer, fm.call) for fm in maps.select(step=step, kind="activation")]
        for step in range(4)
    ]
    # What a pass calls is a part of it: `both` calls the model, and then two methods.
    one = [("down", 0), ("up", 0)]
    assert found == [[("down", 0)], [("up", 0)], one, [*one, ("down", 1), ("up", 1)]]
    assert maps.missed == []


def test_edits_stop_and_every() -> None:
    model, x = coder()
    model.eval()
    with torch.no_grad():
        bare, normed = model.encode(x), model.norm(model.down(x))
        with capture(model, method="encode", edit={("norm", "output"): edits.scale(2.0)}):
            for _ in range(2):
                assert torch.equal(model.encode(x), F.relu(normed * 2.0))
        ran: list[int] = []
        handle = model.act.register_forward_hook(lambda *a: ran.append(1))
        with capture(model, "norm", method="encode", stop=True) as maps:
            assert torch.equal(model.encode(x), bare)
            assert model.encode(x) is None
            assert len(ran) == 1
            assert torch.equal(maps["norm"].tensor, normed)
        handle.remove()
        with capture(model, method="both", every=2, keep="all") as maps:
            for _ in range(4):
                model.both(x)
        assert sorted({fm.step for fm in maps.select()}) == [0, 2]


def test_a_method_that_fails_leaves_nothing() -> None:
    model, x = coder()
    before = truth.fingerprint(model)
    with capture(model, method=["fails", "interrupted", "encode"]) as maps:
        for _ in range(2):
            with pytest.raises(ValueError, match="4, 3"):
                model.fails(x)
            with pytest.raises(KeyboardInterrupt):
                model.interrupted(x)
        model.encode(x)
        assert maps["down"].step == 4
    model.zero_grad()
    assert not {"fails", "interrupted", "encode"} & set(model.__dict__)
    assert before is not None


def test_two_captures_and_a_users_own_attribute() -> None:
    model, x = coder()
    model.eval()
    mine = model.encode
    model.encode = lambda x: mine(x) + 1  # type: ignore[method-assign]
    own = model.__dict__["encode"]
    expected = model.encode(x)
    first, second = capture(model, method="encode"), capture(model, method="encode")
    a = first.__enter__()
    b = second.__enter__()
    assert torch.equal(model.encode(x), expected)
    first.__exit__(None, None, None)
    assert torch.equal(model.encode(x), expected)
    second.__exit__(None, None, None)
    assert model.__dict__["encode"] is own
    assert (a["down"].step, b["down"].step) == (0, 1)
    assert torch.equal(model.encode(x), expected)


def test_copies_made_in_the_block_are_on_their_own() -> None:
    model, x = coder()
    model.eval()
    with capture(model, method="encode") as maps, torch.no_grad():
        bare = model.encode(x)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with torch.no_grad():
                copied.down.weight.zero_()
                assert not torch.equal(copied.encode(x), bare)
        assert torch.equal(model.encode(x), bare)
        assert maps["down"].step == 1


def test_methods_that_there_are_not() -> None:
    model, _ = coder()
    cases: list[tuple[Any, str]] = [
        ("encod", "method='encod' is no method of Coder; did you mean 'encode'"),
        ("down", "method='down' is no method of Coder (its own: 'both', 'decode', 'encode', "),
        ([], "method must be a method's name, or several, not []"),
        (3, "method must be a method's name, or several, not 3"),
        (["encode", 3], "method=3 is no method of Coder"),
        ("pieces", "method='pieces' is a generator or a coroutine: it runs after it has returned"),
    ]
    for given, text in cases:
        with pytest.raises(ArgumentError, match=re.escape(text)):
            capture(model, method=given)
    with capture(model, method=("plain", "forward")) as maps:
        assert torch.equal(model.plain(torch.zeros(1)), torch.ones(1))
    assert len(maps) == 0
