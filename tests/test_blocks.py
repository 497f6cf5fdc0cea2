"""Blocks that follow each other on one model: the next one goes on with what was learned."""

from __future__ import annotations

import copy
import gc
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fmapkit
from fmapkit import CaptureWarning, capture
from fmapkit.errors import UnknownLayerError
from fmapkit.missed import Reason
from fmapkit.session import resting
from tests import truth
from tests.checks import needs_compiled

_ALIKE = resting._ALIKE


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is relied on from the fourth block on."""
    monkeypatch.setattr(resting, "_ALIKE", 2)


class Net(nn.Module):
    """A residual net with an in-place ReLU, and a way that only a list tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.hidden = [False]

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.norm(self.conv(x))
        if self.hidden[0]:
            y = torch.tanh(self.conv(y))
        y += x
        return self.head(self.relu(y).mean((2, 3)))


def _net() -> Net:
    truth.seed(0)
    return Net().eval()


def _input(n: int = 0, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 6, 6), generator=torch.Generator().manual_seed(n))


def _pass(
    model: nn.Module, bare: nn.Module, n: int = 0, train: bool = False, **asked: Any
) -> tuple[fmapkit.FeatureMaps, list[truth.Run]]:
    """One pass in a block of its own, beside the bare copy; its maps, and the true runs."""
    args = (_input(n),)
    true = truth.run_pass(bare, args, train=train, seed_=n, witness=True)
    before = truth.fingerprint(model)
    with capture(model, **asked) as maps:
        seen = truth.run_pass(model, args, train=train, seed_=n)
    truth.assert_same_pass(true, seen)
    if not train:
        truth.assert_nothing_left(before, model)
    return maps, true.truth


def _whole(maps: fmapkit.FeatureMaps, runs: list[truth.Run]) -> None:
    assert maps.missed == []
    truth.assert_captured_exactly_once(maps, runs)


def test_a_fourth_block_traces_nothing(traced: list[None]) -> None:
    model, bare, counts = _net(), _net(), []
    for n in range(6):
        before = len(traced)
        maps, runs = _pass(model, bare, n)
        _whole(maps, runs)
        counts.append(len(traced) - before)
    assert counts == [1, 1, 1, 0, 0, 0]


def test_many_blocks_are_traced_before(traced: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resting, "_ALIKE", _ALIKE)
    model = _net()
    for n in range(20):
        with torch.no_grad(), capture(model) as maps:
            model(_input(n))
        assert len(maps) == 5
    assert len(traced) == 17


@pytest.mark.parametrize("asked", [{"detach": False}, {"gradients": True}, {"keep": "all"}])
def test_in_training(asked: dict[str, Any], traced: list[None]) -> None:
    model, bare = _net().train(), _net().train()
    for n in range(5):
        maps, runs = _pass(model, bare, n, train=True, **asked)
        _whole(maps, runs)
        if "detach" in asked:
            assert maps["stem"].tensor.grad_fn is not None
        if "gradients" in asked:
            assert maps["stem"].grad is not None
        with torch.no_grad():
            for net in (model, bare):
                for p in net.parameters():
                    p -= 0.1 * p.grad
    assert len(traced) == 3


def test_each_block_has_its_own_maps(traced: list[None]) -> None:
    model, bare = _net(), _net()
    every = [_pass(model, bare, n) for n in range(6)]
    for maps, runs in every:
        _whole(maps, runs)
        assert [fm.step for fm in maps] == [0] * len(maps)
    every[0][0].clear()
    assert len(every[0][0]) == 0
    _whole(*every[1])
    assert len(traced) == 3


def test_several_passes_in_each_block(traced: list[None]) -> None:
    model, bare = _net(), _net()
    for _ in range(5):
        with capture(model, keep="all") as maps:
            for n in range(3):
                true = truth.run_pass(bare, (_input(n),), train=False, witness=True)
                truth.assert_same_pass(true, truth.run_pass(model, (_input(n),), train=False))
                truth.assert_captured_exactly_once(
                    types.SimpleNamespace(
                        select=lambda n=n, maps=maps, **k: maps.select(**{**k, "step": n}),
                        missed=maps.missed,
                    ),
                    true.truth,
                )
        assert sorted({fm.step for fm in maps.select()}) == [0, 1, 2]
    assert len(traced) == 3


def test_functions_have_their_own_code_between_blocks() -> None:
    model, code = _net(), Net.forward.__code__
    for n in range(4):
        with capture(model) as maps:
            model(_input(n))
            assert Net.forward.__code__ is not code
        assert Net.forward.__code__ is code
        assert maps.missed == []


# -- what may have changed between two blocks ------------------------------------------------------


def _set_hidden(model: Net) -> None:
    model.hidden[0] = not model.hidden[0]


@pytest.mark.parametrize("at", [1, 2])
def test_hidden_state_before_anything_is_relied_on(at: int) -> None:
    model, bare = _net(), _net()
    for n in range(6):
        if n == at:
            _set_hidden(model)
            _set_hidden(bare)
        _whole(*_pass(model, bare, n))


def test_hidden_state_later_is_named_once_and_never_relied_on_again(traced: list[None]) -> None:
    model, bare, lost = _net(), _net(), []
    for n in range(12):
        if n in (4, 5, 9):
            _set_hidden(model)
            _set_hidden(bare)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", CaptureWarning)
            maps, runs = _pass(model, bare, n)
        if maps.missed:
            lost.append(n)
            assert [m.why for m in maps.missed] == [Reason.NEW_PATH]
            assert len(told) == 1
            for pair in truth.captured_pairs(maps):
                assert any(truth.same_bits(pair.z, run.z) for run in runs)
        else:
            _whole(maps, runs)
    assert lost == [4]
    assert len(traced) == 3 + 7


def _trains(model: nn.Module) -> None:
    model.train()


def _adds(model: Any) -> None:
    model.stem = nn.Sequential(model.stem, nn.Tanh())


def _gelu(model: Any) -> None:
    model.relu = nn.GELU()


def _forward(model: Any) -> None:
    def forward(x: Tensor) -> Tensor:
        out: Tensor = model.head(torch.sigmoid(model.stem(x)).mean((2, 3)))
        return out

    model.forward = forward


def _double(model: nn.Module) -> None:
    model.bfloat16()
    model.float()


def _hook(model: Any) -> None:
    model.conv.register_forward_hook(lambda module, args, output: output * 2)


def _weights(model: Any) -> None:
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})


def _normed(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.conv)


def _swapped(model: Any) -> None:
    model.conv.weight = nn.Parameter(model.conv.weight.detach() * 3)


def _renamed(model: Any) -> None:
    conv = model.conv
    del model.conv
    model.conv2 = conv
    model.forward = lambda x: model.head(model.relu(model.conv2(model.stem(x))).mean((2, 3)))


def _channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def _frozen(model: nn.Module) -> None:
    model.requires_grad_(False)


def _pruned(model: Any) -> None:
    nn.utils.prune.l1_unstructured(model.conv, "weight", 0.5)


def _copied(model: Any) -> None:
    model.conv = copy.deepcopy(model.conv)


def _out_of_place(model: Any) -> None:
    model.relu.inplace = False


CHANGES = [_trains, _adds, _gelu, _forward, _double, _hook, _weights, _normed, _swapped, _renamed]
CHANGES += [_channels_last, _frozen, _pruned, _copied, _out_of_place]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_what_can_be_compared_costs_nothing(change: Callable[[Any], None], at: int) -> None:
    model, bare = _net(), _net()
    for n in range(8):
        if n == at:
            change(model)
            change(bare)
        maps, runs = _pass(model, bare, n)
        _whole(maps, runs)


def test_another_size_or_mode_is_traced(traced: list[None]) -> None:
    model, bare = _net(), _net()
    shapes = [(2, 3, 6, 6)] * 5 + [(1, 3, 6, 6)] + [(4, 3, 8, 8)] * 4
    for n, shape in enumerate(shapes):
        x = _input(n, *shape)
        with torch.set_grad_enabled(n % 2 == 0), truth.Witness(bare) as watch:
            bare(x)
        with torch.set_grad_enabled(n % 2 == 0), capture(model) as maps:
            model(x)
        _whole(maps, watch.runs)


def test_hidden_state_of_a_helper_that_was_exchanged() -> None:
    space: dict[str, Any] = {"torch": torch, "helper": torch.relu}
    exec("def forward(self, x): return self.head(helper(self.stem(x)).mean((2, 3)))", space)
    for at in range(1, 6):
        model, bare = _net(), _net()
        space["helper"] = torch.relu
        for net in (model, bare):
            net.forward = types.MethodType(space["forward"], net)
        for n in range(7):
            if n == at:
                space["helper"] = torch.tanh
            maps, runs = _pass(model, bare, n)
            _whole(maps, runs)


@needs_compiled
def test_compiled_between_blocks() -> None:
    model, kept = _net(), []
    for n in range(8):
        if n == 5:
            model.compile(backend="eager")
        with torch.no_grad(), capture(model) as maps:
            model(_input(n))
        kept.append(maps)
        assert maps.missed == []
        with torch.no_grad():
            assert torch.equal(maps["stem"].tensor, torch.relu(model.stem(_input(n))))
    with torch.no_grad(), capture(torch.compile(model, backend="eager")) as maps:
        model(_input())
    assert len(maps) == len(kept[0])


# -- which blocks go on ----------------------------------------------------------------------------


def test_what_is_asked_for_tells_sessions_apart(traced: list[None]) -> None:
    model, kept = _net(), []
    asked: list[dict[str, Any]] = [
        {},
        {"layers": "stem"},
        {"layers": ["stem", "conv"]},
        {"layers": model.conv},
        {"layers": nn.Linear},
        {"kinds": "output"},
        {"filters": {"stem": [0, 2]}, "layers": "stem"},
        {"filters": 1},
        {"weights": True},
    ]
    shown: dict[int, Any] = {}
    for _ in range(4):
        for n, each in enumerate(asked):
            with capture(model, **each) as maps:
                model(_input())
            kept.append(maps)
            found = [(fm.layer, fm.kind, fm.filters, tuple(fm.shape)) for fm in maps]
            assert shown.setdefault(n, found) == found
    assert len(traced) == 3 * len(asked)


@pytest.mark.parametrize(
    "asked",
    [
        {"layers": lambda name: True},
        {"edit": {"stem": lambda fm: fm.tensor * 2}},
        {"layers": "stem", "stop": True},
        {"dtype": torch.bfloat16},
        {"max_bytes": 10**9},
        {"check": "finite"},
        {"every": 2},
    ],
)
def test_these_blocks_learn_anew(asked: dict[str, Any], traced: list[None]) -> None:
    model = _net()
    for n in range(4):
        with capture(model, **asked) as maps:  # noqa: F841  (the next block finds it)
            model(_input(n))
    assert len(traced) == 4


def test_arguments_are_checked_in_each_block() -> None:
    model = _net()
    for _ in range(3):
        with capture(model, layers="conv") as maps:
            model(_input())
    del model.conv
    model.forward = lambda x: model.head(model.stem(x).mean((2, 3)))
    with pytest.raises(UnknownLayerError):
        capture(model, layers="conv")
    assert maps.missed == []


def test_maps_of_an_ended_block_have_the_names_of_then() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.b(torch.relu(self.a(x))))

    model, x = Two(), torch.randn(2, 4)
    for within in (False, True):
        with capture(model) as old:
            model(x)
        first = model.a
        if within:
            with capture(model) as maps:
                model(x)
                model.a, model.b = model.b, model.a
                model(x)
        else:
            model.a, model.b = model.b, model.a
            with capture(model) as maps:
                model(x)
        (found,) = old.select(first, kind="preactivation")
        assert (found.layer, found.nonlinearity) == ("a", "relu")
        assert torch.equal(found.tensor, first(x))
        (now,) = maps.select(first, kind="preactivation")
        assert (now.layer, now.nonlinearity) == ("b", "tanh")


def test_nobody_has_the_maps(traced: list[None]) -> None:
    model = _net()
    for n in range(4):
        with capture(model):
            model(_input(n))
        gc.collect()
    assert len(traced) == 4


def test_a_block_that_failed(traced: list[None]) -> None:
    model, bare = _net(), _net()
    for n in range(4):
        kept = _pass(model, bare, n)  # noqa: F841  (the next block finds it)
    with pytest.raises(ZeroDivisionError), capture(model):
        raise ZeroDivisionError
    del traced[:]
    _whole(*_pass(model, bare))
    assert len(traced) == 1


def test_two_at_once(traced: list[None]) -> None:
    model, bare = _net(), _net()
    for n in range(5):
        true = truth.run_pass(bare, (_input(n),), train=False, witness=True).truth
        with capture(model) as outer, capture(model) as inner:
            truth.run_pass(model, (_input(n),), train=False)
        _whole(outer, true)
        _whole(inner, true)
    for n in range(4):
        _whole(*_pass(model, bare, n))


def test_threads_share_no_session() -> None:
    model = _net()
    with torch.no_grad():
        expected = [model(_input(n)) for n in range(20)]
    wrong: list[object] = []

    def run() -> None:
        with torch.no_grad():
            for n in range(20):
                with capture(model) as maps:
                    out = model(_input(n))
                try:
                    assert torch.equal(out, expected[n])
                    assert len(maps) == 5
                    assert not maps.missed
                    assert torch.equal(
                        maps["stem"].tensor, torch.relu(maps["stem", "preactivation"].tensor)
                    )
                except BaseException as error:
                    wrong.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_names_are_told_in_each_block() -> None:
    model = _net()
    for n in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CaptureWarning)
            with capture(model) as maps:
                model.conv(torch.zeros(1, 4, 6, 6))
                model(_input(n))
        assert [(m.layer, m.why) for m in maps.missed] == [("conv", Reason.OUTSIDE_OF_FORWARD)]


def test_calls_outside_of_a_pass_are_named_in_a_block_that_goes_on() -> None:
    model, bare = _net(), _net()
    for n in range(5):
        kept, _ = _pass(model, bare, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model) as maps:
            model.relu(torch.zeros(1, 4, 6, 6))
            model(_input())
    assert [(m.layer, m.why) for m in maps.missed] == [("relu", Reason.OUTSIDE_OF_FORWARD)]
    assert len(maps) == len(kept)
    assert kept.missed == []


def test_a_fused_path_is_named_in_each_block(traced: list[None]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 2), nn.ReLU()
    ).eval()
    kinds, found = ("activation", "output"), []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", CaptureWarning)
        for n in range(6):
            x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(n))
            bare = model(x)
            with capture(model, kinds=kinds) as maps:
                assert torch.equal(model(x), bare)
            assert {m.why for m in maps.missed} == {Reason.FUSED_PATH}
            found.append([(fm.layer, fm.kind, fm.nonlinearity) for fm in maps])
            alone = copy.deepcopy(model)
            with capture(alone, kinds=kinds) as own:
                alone(x)
            assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(maps, own, strict=True))
            traced.pop()  # that of the copy
    assert found[1:] == found[:-1]
    assert len(traced) == 3


# -- memory ----------------------------------------------------------------------------------------


def test_the_model_goes_with_its_maps() -> None:
    model: Any = _net()
    for n in range(4):
        with capture(model) as maps:
            model(_input(n))
    gone = weakref.ref(model)
    del model, maps
    gc.collect()
    assert gone() is None


@pytest.mark.usefixtures("collected")
def test_maps_go_at_once() -> None:
    gc.disable()
    try:
        for _ in range(6):
            model = _net()
            with torch.no_grad(), capture(model) as maps:
                model(_input())
            tensor = weakref.ref(maps["stem"].tensor)
            resting_ = weakref.ref(maps._session.resting)
            del maps
            assert tensor() is None
            assert resting_() is None
    finally:
        gc.enable()


def test_maps_that_are_kept_do_not_keep_plans() -> None:
    model, kept = _net(), []
    for n in range(6):
        with capture(model) as maps:
            model(_input(n))
        kept.append(maps)
    sessions = {id(m._session.resting.session) for m in kept if m._session.resting is not None}
    assert len(sessions) == 1


def test_copies_of_a_model_have_nothing_of_it() -> None:
    model = _net()
    for n in range(4):
        with capture(model) as maps:
            model(_input(n))
    other = copy.deepcopy(model)
    with capture(other) as others:
        other(_input(9))
    assert torch.equal(others["stem"].tensor, torch.relu(model.stem(_input(9))))
    assert maps.missed == []
    read = copy.deepcopy(maps)
    assert torch.equal(read["stem"].tensor, maps["stem"].tensor)


class Deciding(nn.Module):
    """Decides by what nobody sees between passes."""

    def __init__(self, depth: int, in_place: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.act = nn.ReLU(inplace=in_place)
        self.state = {"turns": 1, "tanh": False, "skip": 0}

    def forward(self, x: Tensor) -> Tensor:
        for n, layer in enumerate(self.layers):
            if n == self.state["skip"] and n:
                continue
            y = layer(x)
            for _ in range(self.state["turns"]):
                y = self.act(y) if not self.state["tanh"] else torch.tanh(y)
            y += 1
            x = y
        return x


@given(data=st.data(), depth=st.integers(1, 3), in_place=st.booleans())
def test_no_block_is_wrong_whatever_changes(
    data: st.DataObject, depth: int, in_place: bool
) -> None:
    truth.seed(depth)
    model = Deciding(depth, in_place)
    bare, lost = copy.deepcopy(model), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        for n in range(data.draw(st.integers(3, 10))):
            if data.draw(st.booleans()):
                state = data.draw(
                    st.fixed_dictionaries(
                        {
                            "turns": st.integers(1, 2),
                            "tanh": st.booleans(),
                            "skip": st.integers(0, 2),
                        }
                    )
                )
                model.state.update(state)
                bare.state.update(state)
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(n))
            true = truth.run_pass(bare, (x,), train=False, witness=True)
            with capture(model) as maps:
                seen = truth.run_pass(model, (x,), train=False)
            truth.assert_same_pass(true, seen)
            pairs = truth.captured_pairs(maps)
            if len(pairs) == len(true.truth):
                truth.assert_captured_exactly_once(maps, true.truth)
            else:
                lost += 1
                assert [m.why for m in maps.missed] == [Reason.NEW_PATH]
                for run, pair in zip(true.truth, pairs, strict=False):
                    assert truth.same_bits(run.z, pair.z)
                    assert truth.same_bits(run.a, pair.a)
    assert lost <= 1
