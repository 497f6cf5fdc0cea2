"""Forward hooks of others, in passes that are replayed: their code is a part of the path."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmapkit import capture

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(6, 6), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.fc(x))


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block() for _ in range(blocks)])
        self.head, self.last = nn.Linear(6, 6), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(self.blocks(x)))


State = dict[str, Any]


def hooks(state: State) -> dict[str, Callable[..., Any]]:
    """Each decides by what nothing announces, or by nothing."""

    class Owner:
        def method(self, module: nn.Module, args: Any, output: Tensor) -> Any:
            return output * 0.5 if state["k"] > 1 else None

    class Object:
        def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Any:
            return output - 1 if state["k"] == 1 else None

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        state["kept"] = output

    def mix(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + state["constant"][state["k"]]

    def overwrite(module: nn.Module, args: Any, output: Tensor) -> None:
        if state["k"]:
            output.add_(1)

    def by_data(module: nn.Module, args: Any, output: Tensor) -> Any:
        return -output if output.sum().item() > 0 else None

    return {
        "nothing": lambda module, args, output: None,
        "scale": lambda module, args, output: output * 2,
        "switch": lambda module, args, output: output + 1 if state["k"] else None,
        "sigma": lambda module, args, output: torch.sigmoid(output),
        "sigma, perhaps": lambda m, args, y: torch.relu(y) if state["k"] else y,
        "another module": lambda module, args, y: state["model"].last(y) if state["k"] else None,
        "method": Owner().method,
        "object": Object(),
        "keep": keep,
        "mix": mix,
        "overwrite": overwrite,
        "by data": by_data,
    }


def tags(maps: Any) -> list[tuple[Any, ...]]:
    return [(fm.layer, fm.kind, fm.nonlinearity, fm.call, fm.path, fm.filter_dim) for fm in maps]


PLACES = ["", "blocks", "blocks.0", "blocks.1", "blocks.1.fc", "blocks.0.act", "head"]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**9))
def test_a_long_block_sees_what_a_new_one_does(number: int) -> None:
    rng = random.Random(number)
    torch.manual_seed(number)
    model = Net()
    copied = copy.deepcopy(model)
    state: State = {"k": 0, "constant": torch.randn(3), "model": model}
    twin: State = {**state, "model": copied}
    there, beside = hooks(state), hooks(twin)
    kinds = rng.choice([("preactivation", "activation"), ("response", "activation", "output")])
    handles: list[Any] = []

    def change() -> None:
        if handles and rng.random() < 0.5:
            for handle in handles.pop(rng.randrange(len(handles))):
                handle.remove()
        elif len(handles) < 3:
            place, what = rng.choice(PLACES), rng.choice(list(there))
            pair = (model, there), (copied, beside)
            handles.append([m.get_submodule(place).register_forward_hook(h[what]) for m, h in pair])

    change()
    change()
    with torch.no_grad(), capture(model, kinds=kinds) as maps:
        for _ in range(14):
            if rng.random() < 0.15:
                change()
            if rng.random() < 0.2:
                state["k"] = twin["k"] = rng.randrange(3)
            x = torch.randn(rng.choice([2, 2, 3]), 6)
            known = len(maps.missed)
            y = model(x.clone())
            with capture(copied, kinds=kinds) as fresh:
                assert torch.equal(copied(x.clone()), y)
            if len(maps.missed) > known or not maps:
                continue
            assert tags(maps) == tags(fresh)
            for seen, true in zip(maps, fresh, strict=True):
                assert torch.equal(seen.tensor, true.tensor)


@pytest.mark.parametrize(
    "what", ["nothing", "scale", "switch", "sigma, perhaps", "method", "object"]
)
@pytest.mark.parametrize("place", ["", "blocks", "blocks.1"])
def test_hooks_are_no_reason_to_trace(what: str, place: str, traced: list[None]) -> None:
    state: State = {"k": 1}
    model = Net()
    model.get_submodule(place).register_forward_hook(hooks(state)[what])
    with torch.no_grad(), capture(model) as maps:
        for _ in range(10):
            x = torch.randn(2, 6)
            y = model(x)
            last = maps["head"].tensor
            assert torch.equal(last, y) or place == ""
    assert len(traced) <= 2
    assert not maps.missed


def test_a_hook_that_is_removed_is_noticed() -> None:
    model, x = Net(), torch.randn(2, 6)
    with torch.no_grad(), capture(model) as maps:
        for n in range(12):
            if n % 4 == 0:
                handle = model.blocks[0].register_forward_hook(hooks({"k": 0})["sigma"])
            if n % 4 == 2:
                handle.remove()
            model(x)
            assert ("sigmoid" in {fm.nonlinearity for fm in maps}) == (n % 4 < 2)
    assert not maps.missed
