"""Edits of what modules are given and return, in passes that are replayed: as hooks make them."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmapkit import EditError, capture, edits
from fmapkit.edits import Where

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


class Block(nn.Module):
    """One of several ways in which code goes on with what it has."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(6, 6), nn.ReLU(inplace="act_" in how)
        self.how = how

    def forward(self, x: Tensor) -> Any:
        if "before_" in self.how:
            x += 1
        y = self.act(self.fc(x))
        if "residual" in self.how:
            y = x + y
        if "same" in self.how:
            y = self.act(y)
        return (y, {"x": x}) if "nested" in self.how else y


class Net(nn.Module):
    def __init__(self, hows: list[str]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(how) for how in hows)
        self.head, self.last = nn.Linear(6, 3), nn.Tanh()
        self.options: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
            if "add_" in self.options:
                x.add_(0.5)
        if self.options.get("swap"):
            x = x.transpose(0, 1)
        return self.last(self.head(x))


Pair = tuple[str, Tensor, Tensor]


@contextmanager
def hooked(model: Net, at: str, kind: str, change: Callable[[Tensor], Tensor]) -> Iterator[Any]:
    """The same edit by a hook; what each σ was given and gave."""
    pairs: list[Pair] = []
    was: list[Tensor] = []
    handles = []
    names = {m: n for n, m in model.named_modules()}

    def edit(module: nn.Module, args: Any, output: Any = None) -> Any:
        if kind == "input":
            return (change(args[0]), *args[1:])
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handles.append(
        model.get_submodule(at).register_forward_pre_hook(edit)
        if kind == "input"
        else model.get_submodule(at).register_forward_hook(edit)
    )

    def before(module: nn.Module, args: Any) -> None:
        was.append(args[0].detach().clone())

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        pairs.append((names[module], was.pop(), output.detach().clone()))

    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.Tanh)):
            handles += [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after),
            ]
    try:
        yield pairs
    finally:
        for handle in handles:
            handle.remove()


def check_pass(maps: Any, pairs: list[Pair]) -> None:
    z = [fm.tensor for fm in maps if fm.kind == "preactivation" and fm.nonlinearity]
    a = [fm.tensor for fm in maps if fm.kind == "activation"]
    assert len(z) == len(a) == len(pairs)
    for got_z, got_a, (_, true_z, true_a) in zip(z, a, pairs, strict=True):
        assert torch.equal(got_z, true_z)
        assert torch.equal(got_a, true_a)


HOWS = ["", "act_", "residual", "residual act_", "before_ act_", "nested", "nested act_", "same"]
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda t: t + 0.25,
    "scale": lambda t: t * -1.5,
    "itself": lambda t: t,
    "sometimes": lambda t: t if t.flatten()[0] > 0 else t - 1,
    "clone": lambda t: t.clone(),
}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_replayed_passes_are_those_with_hooks(number: int) -> None:
    rng = random.Random(number)
    torch.manual_seed(number)
    hows = [rng.choice(HOWS) for _ in range(rng.randint(1, 4))]
    model = Net(hows)
    if rng.random() < 0.3:
        model.options["add_"] = True
    bare = copy.deepcopy(model)
    at = f"blocks.{rng.randrange(len(hows))}"
    kind, change = rng.choice(["input", "output"]), CHANGES[rng.choice(list(CHANGES))]
    nested = kind == "output" and "nested" in hows[int(at[-1])]
    where = Where(at, kind, path="[0]" if nested else None)
    mode = rng.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
    with mode(), capture(model, edit={where: lambda fm: change(fm.tensor)}) as maps:
        for _ in range(6):
            x = torch.randn(rng.choice([2, 3]), 6)
            with hooked(bare, at, kind, change) as pairs:
                y = bare(x.clone())
            assert torch.equal(model(x.clone()), y)
            if maps.missed:  # named: which tensor goes on differs from pass to pass
                assert mode is torch.inference_mode
                continue
            check_pass(maps, pairs)
            if y.requires_grad:
                mine = gradients(model, x)
                with hooked(bare, at, kind, change):
                    theirs = gradients(bare, x)
                assert (mine is None) == (theirs is None)
                assert all(map(torch.equal, mine or (), theirs or ()))


def gradients(model: nn.Module, x: Tensor) -> Any:
    """Of all parameters; None where the model overwrites what its backward needs."""
    loss = model(x.clone()).sum()
    try:
        return torch.autograd.grad(loss, list(model.parameters()))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None


@pytest.mark.parametrize("kind", ["input", "output"])
def test_two_passes_are_traced(kind: str, traced: list[None]) -> None:
    model, x = Net(["residual", "act_", ""]), torch.randn(2, 6)
    with torch.no_grad(), capture(model, edit={("blocks.1", kind): edits.scale(2.0)}):
        for _ in range(10):
            model(x)
    assert len(traced) <= 2


def test_an_edit_of_one_step_leaves_the_others_alone(traced: list[None]) -> None:
    model, x = Net(["", ""]), torch.randn(2, 6)
    with torch.no_grad():
        y = model(x)
        where = Where("blocks.0", "output", step=lambda n: n in (2, 5))
        with capture(model, edit={where: edits.add(1.0)}) as maps:
            for step in range(8):
                assert torch.equal(model(x), y) == (step not in (2, 5))
                assert len(maps) == 6
    assert len(traced) <= 3
    assert not maps.missed


def test_what_went_on_is_told(traced: list[None]) -> None:
    model = Net(["residual", "nested"])
    where = {
        Where("blocks.0", "output"): edits.scale(2.0),
        Where("blocks.1", "output", path="[1]['x']"): edits.zero(),
    }
    with torch.no_grad(), capture(model, "blocks.*", kinds="output", edit=where) as maps:
        for n in range(5):
            model(torch.randn(2, 6))
            first = maps["blocks.0", "output"]
            assert torch.equal(first.edited, first.tensor * 2)
            by_path = {fm.path: fm for fm in maps.select("blocks.1", "output")}
            assert not by_path["[1]['x']"].edited.any()
            assert torch.equal(by_path["[1]['x']"].tensor, first.edited)
            assert by_path["[0]"].edited is None
            assert len(traced) <= 2, n


class Turned(nn.Module):
    """Where filters lie hangs on what nothing announces."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mid, self.act = nn.Conv2d(4, 4, 1), nn.Identity(), nn.ReLU()
        self.options = {"turn": False}

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.options["turn"]:
            x = x.transpose(1, 3)
        return self.act(self.mid(x))


@pytest.mark.parametrize("sizes", [(4, 4), (4, 5, 4)])
def test_filters_are_told_by_the_path_alone(sizes: tuple[int, ...]) -> None:
    """On another path, an edit that needs them says so, and changes none that it is not for."""
    model = Turned().eval()
    with torch.no_grad(), capture(model, edit={("mid", "output", 1): edits.zero()}) as maps:
        for size in (*sizes, *sizes):
            x = torch.randn(1, 4, 4, size)
            y = torch.relu(model.conv(x))
            y[:, 1] = 0
            assert torch.equal(model(x), y)
        model.options["turn"] = True
        x = torch.randn(1, 4, 4, sizes[-1])
        y = torch.relu(model.conv(x))
        y[:, 1] = 0
        with pytest.raises(EditError, match="no axis of filters that the data tells of"):
            model(x)
        assert torch.equal(model(x), y.transpose(1, 3))
        assert maps["conv"].shape == (1, 4 if len(sizes) == 2 else sizes[-1], 4, 4)


def test_what_an_edit_raises_and_the_pass_after_it() -> None:
    model, x = Net(["", "act_"]), torch.randn(2, 6)
    fails = [False]

    def edit(fm: Any) -> Tensor:
        if fails[0]:
            raise KeyError("mine")
        return fm.tensor + 1

    with torch.no_grad(), capture(model, edit={("blocks.0", "output"): edit}) as maps:
        for _ in range(3):
            y = model(x)
        fails[0] = True
        with pytest.raises(KeyError, match="mine"):
            model(x)
        fails[0] = False
        for _ in range(3):
            assert torch.equal(model(x), y)
            assert len(maps) == 6


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.act = Block("act_"), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.block(self.block(x)))


@pytest.mark.parametrize("call", [0, 1, None])
def test_calls_are_counted_in_each_pass(call: int | None, traced: list[None]) -> None:
    model = Twice()
    with (
        torch.no_grad(),
        capture(model, edit={Where("block", "output", call=call): edits.add(1.0)}) as maps,
    ):
        for _ in range(6):
            x = torch.randn(3, 6)
            first = torch.relu(model.block.fc(x)) + (call != 1)
            second = torch.relu(model.block.fc(first)) + (call != 0)
            assert torch.equal(model(x), torch.sigmoid(second))
            assert torch.equal(maps.select(kind="activation")[-1].tensor, torch.sigmoid(second))
    assert len(traced) <= 2


def test_an_edit_that_finds_no_place_in_a_replayed_pass() -> None:
    model, x, off = Net(["", ""]), torch.randn(2, 6), [slice(0, 1)]

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x.unsqueeze(0))
            return out

    tokens = Tokens()
    where = Where("net.blocks.0", "output", at=lambda fm: off[0], filter_axis=-1)
    with torch.no_grad(), capture(tokens, edit={where: edits.zero()}):
        for _ in range(3):
            tokens(x)
        off[0] = slice(7, 9)
        with pytest.raises(EditError, match="at= is no position of any map that there was"):
            tokens(x)
        off[0] = slice(0, 1)
        tokens(x)


def test_generation_is_steered_without_a_trace_of_each_token(traced: list[None]) -> None:
    transformers = pytest.importorskip("transformers")
    gc.unfreeze()  # what conftest.py has frozen: functions that decorators made are hidden by it
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model, v = transformers.LlamaForCausalLM(config).eval(), 3 * torch.randn(8)
    prompt = torch.randint(1, 50, (2, 5))

    def generate() -> Any:
        return model.generate(prompt, max_new_tokens=12, do_sample=False)

    bare = generate()
    layer = model.model.layers[0]
    handle = layer.register_forward_hook(
        lambda m, args, y: (y[0] + v, *y[1:]) if isinstance(y, tuple) else y + v
    )
    steered = generate()
    handle.remove()
    assert not torch.equal(bare, steered)
    with capture(model):
        for _ in range(3):
            generate()
        count = len(traced)
        generate()
    if len(traced) > count:
        pytest.skip("this transformers keeps its cache where each pass is traced")
    where = Where("model.layers.0", "output", filter_axis=-1)
    with capture(model, edit={where: edits.add(v)}) as maps:
        for _ in range(3):
            assert torch.equal(generate(), steered)
        count = len(traced)
        assert torch.equal(generate(), steered)
    assert len(traced) == count  # none of the last twelve passes
    assert not maps.missed


def _parts(model: Net) -> dict[str, Callable[[Any], Tensor]]:
    return {
        "a σ of the model": lambda fm: model.blocks[0].act(fm.tensor - 1),  # type: ignore[operator]
        "a layer of the model": lambda fm: model.blocks[1].fc(fm.tensor),  # type: ignore[operator]
        "functions": lambda fm: torch.relu(fm.tensor) * torch.sigmoid(fm.tensor) + fm.tensor.exp(),
        "decisions": lambda fm: fm.tensor + 1 if fm.tensor.sum() > 0 else fm.tensor * 2,
        "the model": lambda fm: fm.tensor + model(torch.ones(2, 6)).sum(),
    }


class Functions(nn.Module):
    """σ as functions, in code of the model's own and in torch's."""

    def __init__(self, inner: Net) -> None:
        super().__init__()
        self.inner = inner
        self.outer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.inner(torch.tanh(x)))
        return torch.sigmoid(self.outer(y))


@pytest.mark.parametrize("what", list(_parts(Net([""]))))
@pytest.mark.parametrize("at", ["blocks.0", "blocks.1"])
def test_what_an_edit_runs_is_none_of_the_pass(what: str, at: str) -> None:
    torch.manual_seed(0)
    inner = Net(["", "act_"])
    model = Functions(inner)
    edit = _parts(inner)[what]
    bare, outer = copy.deepcopy(inner), copy.deepcopy(model.outer)
    theirs = _parts(bare)[what]

    class Given:
        tensor: Tensor

    def change(t: Tensor) -> Tensor:
        fm = Given()
        fm.tensor = t
        hooks = dict(bare.get_submodule(at)._forward_hooks)
        for module in bare.modules():  # the edit's own calls are none of the pass
            hooks[module] = dict(module._forward_hooks), dict(module._forward_pre_hooks)
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        try:
            return theirs(fm)
        finally:
            for module in bare.modules():
                after, before = hooks[module]
                module._forward_hooks.update(after)
                module._forward_pre_hooks.update(before)

    with torch.no_grad(), capture(model, edit={("inner." + at, "output"): edit}) as maps:
        for _ in range(5):
            x = torch.randn(2, 6)
            with hooked(bare, at, "output", change) as pairs:
                y = torch.relu(bare(torch.tanh(x)))
            assert torch.equal(model(x), torch.sigmoid(outer(y)))
            z = [fm for fm in maps if fm.kind == "activation" and fm.layer.startswith("inner.")]
            known = [a for _, _, a in pairs]
            assert len(z) >= len(known)
            for true in known:
                assert any(torch.equal(fm.tensor, true) for fm in z)
            assert torch.equal(maps["outer"].tensor, torch.sigmoid(outer(y)))
    assert not maps.missed
