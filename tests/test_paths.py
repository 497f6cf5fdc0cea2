"""Later passes of models, as a hostile stranger would write them.

A pass is read by the plan of an earlier one that took the same way through its code.
Whatever a later pass does otherwise, it must be captured as if it were the first, or be named.
There are two truths for that: the witness below autograd saw what ran, beside a bare copy of the
model; and each pass in a block of its own gives the same labels and the same bits.
"""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import pickle
import sys
import threading
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from fmapkit import CaptureWarning, capture
from tests import truth
from tests.checks import strayed

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


@dataclass
class Turn:
    """One pass: what goes in, and what is done to the model before it."""

    args: tuple[Any, ...]
    before: Callable[[Any], None] = field(default=lambda _: None)


def turns(*shapes: Sequence[int], before: Callable[[Any], None] | None = None) -> list[Turn]:
    """Passes on random tensors of these shapes."""
    made = [random(*shape, n=n) for n, shape in enumerate(shapes)]
    return [Turn((x,), before or (lambda _: None)) for x in made]


def random(*shape: int, n: int) -> Tensor:
    """The n-th tensor of a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(n))


def put(**values: Any) -> Callable[[Any], None]:
    """Sets attributes of the model."""

    def change(model: Any) -> None:
        for name, value in values.items():
            setattr(model, name, value)

    return change


Label = tuple[Any, ...]


def labels(maps: Any) -> list[Label]:
    """Every tag of every map of the latest pass."""
    return [
        (m.layer, m.kind, m.call, m.nonlinearity, m.filter_dim, m.filters, m.path) for m in maps
    ]


@dataclass
class Seen:
    """What a capture gave."""

    labels: list[list[Label]]
    missed: set[tuple[str, str]]


def hold(
    model: nn.Module,
    passes: Sequence[Turn],
    *,
    train: bool = False,
    order: bool = True,
    most: int = 0,
    **options: Any,
) -> Seen:
    """Run the passes, and compare them with both truths.

    Args:
        model: to run, in train or eval mode as `train` says.
        passes: with what.
        train: with a backward pass.
        order: whether maps come in order of execution.
        most: how many passes may be cut short, and named: they decide by what is hidden.
        options: of `capture`.
    """
    model.train(train)
    bare, alone = copy.deepcopy(model), copy.deepcopy(model)
    given: list[list[Label]] = []
    lost = 0
    with capture(model, **options) as maps:
        for n, turn in enumerate(passes):
            for each in (bare, model, alone):
                turn.before(each)
            true = truth.run_pass(bare, turn.args, train=train, seed_=n, witness=True)
            seen = truth.run_pass(model, turn.args, train=train, seed_=n)
            truth.assert_same_pass(true, seen)
            given.append(labels(maps))
            with capture(alone, **options) as own:
                truth.run_pass(alone, turn.args, train=train, seed_=n)
            same = [truth.same_bits(m.tensor, o.tensor) for m, o in zip(maps, own, strict=False)]
            if len(maps) < len(own):
                lost += 1
                assert lost <= most, f"pass {n}: {maps.missed}"
                assert any("took a way" in m.reason for m in maps.missed)
            else:
                assert given[n] == labels(own), f"pass {n}"
                assert all(same), f"pass {n}"
                truth.assert_captured_exactly_once(maps, true.truth, order=order)
            del own  # the next block begins anew
        missed = {(m.layer, m.reason) for m in maps.missed}
    truth.assert_nothing_left(truth.fingerprint(bare), model)
    assert truth.modes() == truth.NO_MODES
    return Seen(given, missed)


def of(seen: Seen, sigma: str) -> list[tuple[Any, ...]]:
    """Per pass, the layer, the filter axis and the filters of the last activation of a σ."""
    found = []
    for each in seen.labels:
        last = [t for t in each if t[1] == "activation" and t[3] == sigma][-1]
        found.append((last[0], last[4], last[5]))
    return found


class Unproven(nn.Module):
    """Has layers to choose from. `look` is a branch on data, so that no proof holds."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 4)
        self.two = nn.Linear(3, 4)
        self.next = nn.Linear(4, 4)
        self.conv = nn.Conv1d(3, 4, 1)
        self.relu = nn.ReLU()
        self.way: Any = 0

    def look(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            x = torch.relu(x)
        return x


# -- sizes ------------------------------------------------------------------------------------


class _Positions(nn.Module):
    """Numbers of its own, and one that follows the length."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.table = nn.Linear(4, 8), nn.Parameter(torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        return (self.up(x) + self.table[:length].view(1, length, 2 * 4)).relu()


class _Tokens(_Positions):
    """A number that follows two sizes at once."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[0] * x.shape[1]
        return self.up(x.reshape(tokens, 4)).reshape(tokens, 2, 4).relu()


def test_a_number_that_was_the_same_by_chance_may_follow_sizes() -> None:
    model = _Tokens()
    with capture(model) as maps:
        for batch, length in [(3, 8), (2, 12), (3, 5), (4, 6), (1, 7)]:
            out = model(torch.randn(batch, length, 4))
            assert torch.equal(maps["up"].tensor, out)
    assert not maps.missed


@pytest.mark.parametrize("sizes", [[(2, 3), (5, 3), (5, 4)], [(2, 3), (2, 4), (5, 4), (3, 7)]])
def test_a_size_that_changes_for_the_first_time_costs_no_map(sizes: list[tuple[int, int]]) -> None:
    model = _Positions()
    with capture(model) as maps:
        for batch, length in [*sizes, (7, 9), (2, 2)]:
            x = torch.randn(batch, length, 4)
            out = model(x)
            assert torch.equal(maps["up"].tensor, out)
    assert not maps.missed


def test_the_summand_that_is_as_large_as_the_sum_gives_it_its_layer() -> None:
    class Sum(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            x = self.look(x)
            return F.relu(self.one(x[:1]) + self.two(x))

    seen = hold(Sum(), turns(*[(1, 3)] * 3, *[(2, 3)] * 2, (1, 3)))
    assert [layer for layer, *_ in of(seen, "relu")] == ["one"] * 3 + ["two"] * 2 + ["one"]


def test_a_squeeze_moves_the_filters_where_sizes_say() -> None:
    class Squeeze(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(self.look(x)).squeeze())

    seen = hold(Squeeze(), turns(*[(1, 3, 5)] * 3, *[(5, 3, 1)] * 2, (1, 3, 5)))
    assert [dim for _, dim, _ in of(seen, "relu")] == [0] * 3 + [1] * 2 + [0]


def test_a_flatten_keeps_filters_only_where_they_have_one_pixel_each() -> None:
    class Flat(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(self.look(x)).flatten(1))

    seen = hold(Flat(), turns(*[(2, 3, 1)] * 3, *[(2, 3, 2)] * 2))
    assert [layer for layer, *_ in of(seen, "relu")] == ["conv"] * 3 + [":relu"] * 2


def test_a_leaf_that_squeezes_is_given_other_sizes() -> None:
    class Squeezed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.squeeze()

    class Leaf(Unproven):
        def __init__(self) -> None:
            super().__init__()
            self.squeezed = Squeezed()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.squeezed(self.conv(self.look(x))))

    model = Leaf().eval()
    bare = copy.deepcopy(model)
    with capture(model) as maps, torch.no_grad():
        for n, turn in enumerate(turns(*[(2, 3, 5)] * 3, *[(1, 3, 5)] * 2)):
            true = truth.run_pass(bare, turn.args, train=False, witness=True)
            model(*turn.args)
            truth.assert_captured_exactly_once(maps, true.truth)
            assert maps["conv"].filter_dim == int(n < 3)


class Leaf(Unproven):
    """Takes apart what a module of its own gives."""

    def __init__(self, split: nn.Module) -> None:
        super().__init__()
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.split(self.one(self.look(x)))
        return torch.stack([torch.tanh(p) for p in pieces]).sum(0)


def test_a_leaf_returns_more_tensors_than_before() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return F.relu(x).split(1)

    hold(Leaf(Split()), turns(*[(3, 3)] * 3, *[(2, 3)] * 2, (4, 3)))


def test_a_leaf_without_a_nonlinearity_returns_more_tensors_than_before() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.split(1)

    model = Leaf(Split()).eval()
    bare = copy.deepcopy(model)
    with capture(model) as maps, torch.no_grad():
        for turn in turns(*[(3, 3)] * 3, *[(2, 3)] * 3):
            true = truth.run_pass(bare, turn.args, train=False, witness=True)
            seen = truth.run_pass(model, turn.args, train=False)
            truth.assert_same_pass(true, seen)
            truth.assert_captured_exactly_once(maps, true.truth)
            assert set(maps.layers) <= {"one"} or [m.layer for m in maps.missed] == ["split"]


def test_a_weight_that_the_model_computes_has_more_rows_than_before() -> None:
    class Grows(Unproven):
        def forward(self, x: Tensor, rows: Tensor) -> Tensor:
            return F.relu(F.linear(self.look(x), torch.ones(len(rows), 3)))

    passes = [Turn((torch.randn(2, 3), torch.zeros(n))) for n in (4, 4, 4, 6, 6, 4, 6)]
    seen = hold(Grows(), passes)
    assert [len(filters) for _, _, filters in of(seen, "relu")] == [4, 4, 4, 6, 6, 4, 6]


def test_a_norm_without_weights_has_more_channels_than_before() -> None:
    class Norm(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.instance_norm(self.look(x)))

    seen = hold(Norm(), turns(*[(2, 3, 4)] * 3, *[(2, 5, 4)] * 2))
    assert [len(filters) for _, _, filters in of(seen, "relu")] == [3] * 3 + [5] * 2


def test_a_module_is_one_nonlinearity_only_where_the_shape_stays() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.zeros(3, 1))

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:
                x = x * 1
            return torch.relu(x) + torch.exp(x) + self.shift

    class Model(Unproven):
        def __init__(self) -> None:
            super().__init__()
            self.sigma = Broadcast()

        def forward(self, x: Tensor) -> Tensor:
            return self.sigma(self.one(self.look(x)))

    model = Model().eval()
    for first, later in ((1, 3), (3, 1)):
        got = []
        with capture(model) as maps, torch.no_grad():
            for n in (first, first, first, later, later, first):
                model(torch.randn(n, 3))
                got.append({m.nonlinearity for m in maps.select(kind="activation")})
        for n, names in zip((first, first, first, later, later, first), got, strict=True):
            assert names == ({"relu"} if n == 1 else {"Broadcast"})


@pytest.mark.parametrize("in_place", [False, True])
def test_a_nonlinearity_of_what_carries_nothing_gets_another_rank(in_place: bool) -> None:
    class Mask(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(4) if self.way else torch.ones(2, 4)
            return self.one(self.look(x)) * (torch.relu_(mask) if in_place else F.relu(mask))

    shapes = [(2, 3)] * 3
    hold(Mask(), turns(*shapes, before=put(way=1)) + turns(*shapes, before=put(way=0)))


@pytest.mark.parametrize("first", [0, 1])
def test_an_index_that_is_a_mask_in_some_passes(first: int) -> None:
    class Index(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            index = torch.ones(2, 4, dtype=torch.bool) if self.way else torch.tensor(1)
            return F.relu(self.conv(self.look(x))[index])

    shapes = [(2, 3, 5)] * 3
    later = turns(*shapes, before=put(way=1 - first))
    seen = hold(Index(), turns(*shapes, before=put(way=first)) + later)
    layers = [":relu" if way else "conv" for way in (first, first, first, *[1 - first] * 3)]
    assert [layer for layer, *_ in of(seen, "relu")] == layers


# -- which tensor is which --------------------------------------------------------------------


def test_what_casts_nothing_returns_the_very_same_tensor() -> None:
    """A write to the result is a write to the operand then, which carries something else."""

    class Contiguous(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(self.look(x)).transpose(1, 2)
            y = h.contiguous()  # h itself, where it has one position
            y.relu_()
            return torch.tanh(h) + y

    seen = hold(Contiguous(), turns(*[(2, 3, 5)] * 3, *[(2, 3, 1)] * 3, (2, 3, 5)))
    assert [layer for layer, *_ in of(seen, "tanh")] == ["conv"] * 3 + [":tanh"] * 3 + ["conv"]


@pytest.mark.parametrize("first", [True, False])
def test_a_dropout_that_is_switched_off_returns_the_very_same_tensor(first: bool) -> None:
    class Drop(Unproven):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(self.look(x))
            y = self.drop(h).relu_()
            return torch.tanh(h) + y

    def mode(training: bool) -> Callable[[Any], None]:
        return lambda model: model.drop.train(training)

    shapes = [(2, 3)] * 3
    passes = turns(*shapes, before=mode(first)) + turns(*shapes, before=mode(not first))
    hold(Drop(), passes)


def test_a_dict_given_to_a_leaf_has_its_keys_swapped() -> None:
    class Pick(nn.Module):
        def forward(self, given: dict[str, Tensor]) -> Tensor:
            return F.relu(given["a"])

    class Model(Unproven):
        def __init__(self) -> None:
            super().__init__()
            self.pick = Pick()

        def forward(self, x: Tensor) -> Tensor:
            x = self.look(x)
            one, two = self.one(x), self.two(x)
            return self.pick({"b": one, "a": two} if self.way else {"a": one, "b": two})

    shapes = [(2, 3)] * 3
    seen = hold(Model(), turns(*shapes) + turns(*shapes, before=put(way=1)))
    assert [layer for layer, *_ in of(seen, "relu")] == ["one"] * 3 + ["two"] * 3


def test_a_list_of_numbers_is_changed_in_place() -> None:
    class Order(Unproven):
        def __init__(self) -> None:
            super().__init__()
            self.order, self.sizes = [0, 1, 2], [1, 3]

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(self.look(x)).permute(self.order)
            pieces = self.conv(x).split(self.sizes, 1)
            return F.relu(h).sum() + torch.tanh(pieces[1]).sum()

    def change(model: Any) -> None:
        model.order[:], model.sizes[:] = [0, 2, 1], [3, 1]

    shapes = [(2, 3, 4)] * 3
    seen = hold(Order(), turns(*shapes) + turns(*shapes, before=change))
    assert [dim for _, dim, _ in of(seen, "relu")] == [1] * 3 + [2] * 3
    assert [filters for *_, filters in of(seen, "tanh")] == [range(1, 4)] * 3 + [range(3, 4)] * 3


def test_one_switch_loses_one_pass_of_calls_of_many_kinds() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.table = nn.Linear(3, 3), nn.Linear(3, 3), {"more": False}

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.one(x))
            return torch.tanh(self.two(h)) if self.table["more"] else h

    model, lost = Model(), []
    modes = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    kinds = list(itertools.product(modes, (True, False), (True, False)))
    with capture(model) as maps:
        for n in range(4 * len(kinds)):
            mode, trains, casts = kinds[n % len(kinds)]
            model.table["more"] = n >= len(kinds)  # of each kind, there was one call before
            model.train(trains)
            with mode(), torch.autocast("cpu", torch.bfloat16, enabled=casts):
                model(random(2, 3, n=n))
            lost += [] if len(maps) else [n]
            assert not len(maps) or len(maps.layers) == 1 + model.table["more"]
    assert len(lost) <= 1


class _WritesToItsSecond(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.relu(x)
        y.add_(1)
        return h + y


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("also", [lambda x: x, lambda x: x.view(2, 3), lambda x: x.T.T])
def test_two_inputs_lie_in_one_memory_in_some_passes(mode: Any, also: Any) -> None:
    """So a write to the one is a write to the other."""
    model = _WritesToItsSecond()
    with mode(), capture(model) as maps:
        for n, other in enumerate([Tensor.clone, Tensor.clone, also, also, Tensor.clone, also]):
            x = random(2, 3, n=n)
            z = x.clone()
            model(x, other(x))
            pair = [m.tensor for m in maps]
            assert torch.equal(pair[0], z), n
            assert torch.equal(pair[1], torch.relu(z)), n
    assert not maps.missed


def test_what_decides_in_modules_of_torchs_between_passes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.flat = nn.Conv1d(3, 4, 1), nn.MaxPool1d(2), nn.Flatten(2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.pool(self.conv(x))
            return torch.relu(self.flat(self.conv(x))).sum() + torch.tanh(h[0]).sum()

    def change(model: Any) -> None:
        model.pool.return_indices, model.flat.start_dim = True, 1

    shapes = [(2, 3, 4)] * 3
    seen = hold(Model(), turns(*shapes) + turns(*shapes, before=change))
    assert [at for _, at, _ in of(seen, "tanh")] == [0] * 3 + [1] * 3
    assert [layer for layer, *_ in of(seen, "relu")] == ["conv"] * 3 + [":relu"] * 3


class _Bound(nn.Module):
    """What is a nonlinearity if a number of its own is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 4)
        self.register_buffer("least", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.clamp(self.one(x), min=self.least)
        z = self.one(x)
        return h + torch.maximum(self.one(x), self.least) + torch.where(z > self.least, z, 0.1 * z)


def test_a_buffer_is_zero_in_some_passes() -> None:
    def change(model: Any) -> None:
        model.least += 1

    def change_back(model: Any) -> None:
        model.least.zero_()

    model, same = _Bound(), [(2, 3)] * 3
    passes = turns(*same) + turns((2, 3), before=change) + turns(*same)
    passes += turns((2, 3), before=change_back) + turns(*same)
    bare = copy.deepcopy(model)
    with torch.no_grad(), capture(model) as maps:
        for n, turn in enumerate(passes):
            turn.before(model), turn.before(bare)
            model(*turn.args)
            with capture(bare) as own:
                bare(*turn.args)
            assert labels(maps) == labels(own), n
            assert all(map(truth.same_bits, [m.tensor for m in maps], [m.tensor for m in own]))
            del own
    assert not maps.missed


def test_two_modules_exchange_all_that_they_have() -> None:
    class Part(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(3, 3), act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.fc(x))

    def change(model: Any) -> None:
        one, two = model[0], model[1]
        one.__dict__, two.__dict__ = two.__dict__, one.__dict__

    same = [(2, 3)] * 3
    model = nn.Sequential(Part(nn.ReLU()), Part(nn.Tanh()))
    seen = hold(model, turns(*same) + turns((2, 3), before=change) + turns(*same))
    found = [[t[:1] + t[3:4] for t in each if t[1] == "activation"] for each in seen.labels]
    assert (
        found
        == [[("0.fc", "relu"), ("1.fc", "tanh")]] * 3 + [[("0.fc", "tanh"), ("1.fc", "relu")]] * 4
    )


@torch.library.custom_op(
    "fmapkit_tests::swapped", mutates_args=("x",), schema="(Tensor(a!) x) -> ()"
)
def _swapped(x: Tensor) -> None:
    x.copy_(x.flip(1))


@torch.library.custom_op(
    "fmapkit_tests::into", mutates_args=("out",), schema="(Tensor(a!) out, Tensor x) -> ()"
)
def _into(out: Tensor, x: Tensor) -> None:
    out.copy_(x.flip(1))


@torch.library.custom_op(
    "fmapkit_tests::add", mutates_args=(), schema="(Tensor x, Tensor y) -> Tensor"
)
def _add(x: Tensor, y: Tensor) -> Tensor:
    return (x + y).flip(1).clone()


class _Operators(nn.Module):
    """Calls operators of its own, which write to what they say they write to."""

    def __init__(self, operators: Any) -> None:
        super().__init__()
        self.one, self.operators = nn.Linear(3, 4), operators

    def forward(self, x: Tensor) -> Tensor:
        ours, h, g = self.operators, self.one(x), self.one(x)
        ours.into(h, ours.add(torch.relu(h), g))
        y = torch.tanh(h)
        ours.swapped(y)
        return torch.sigmoid(g) + F.silu(ours.add(g, g)) + y


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("overload", [False, True])
def test_operators_of_others_that_write(overload: bool, mode: Any) -> None:
    """What they write to is copied before, and nobody knows what filters it has after that."""
    ours: Any = torch.ops.fmapkit_tests
    if overload:
        ours = types.SimpleNamespace(
            **{name: getattr(ours, name).default for name in ("swapped", "into", "add")}
        )
    model = _Operators(ours)
    with mode(), capture(model) as maps:
        for n in range(4):
            x = random(2, 3, n=n)
            h = F.linear(x, model.one.weight, model.one.bias)
            model(x)
            pairs = {p.sigma: p for p in truth.captured_pairs(maps)}
            assert torch.equal(pairs["relu"].z, h)
            assert pairs["relu"].layer == pairs["sigmoid"].layer == "one"
            assert torch.equal(pairs["tanh"].a, torch.tanh(torch.relu(h) + h))
            assert pairs["tanh"].layer == ":tanh"
            assert pairs["silu"].layer == ":silu"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", ["storage", "norm", "norm by place"])
def test_a_write_by_another_name(mode: Any, way: str) -> None:
    """Through the storage torch counts none, and in inference mode none at all."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x)
            y = torch.relu(h)
            if way == "storage":
                h.untyped_storage().fill_(0)
            elif way == "norm":
                F.embedding(torch.tensor([0, 1]), h, max_norm=0.1)
            else:
                F.embedding(torch.tensor([0, 1]), h, None, 0.1)
            return y + h

    model = Model()
    with mode(), capture(model) as maps:
        for n in range(4):
            model(random(2, 3, n=n))
            z, a = (maps["one", kind].tensor for kind in ("preactivation", "activation"))
            assert torch.equal(torch.relu(z), a)
            assert z.count_nonzero()
    assert not maps.missed


# -- weights ----------------------------------------------------------------------------------


def test_weights_that_change_places() -> None:
    class Swap(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.two.weight if self.way else self.one.weight
            return F.relu(F.linear(self.look(x), weight))

    def swap(model: Any) -> None:
        model.one.weight, model.two.weight = model.two.weight, model.one.weight
        model.way = 1 - model.way

    seen = hold(Swap(), turns(*[(2, 3)] * 3) + turns((2, 3), before=swap) + turns(*[(2, 3)] * 2))
    assert [layer for layer, *_ in of(seen, "relu")] == ["one"] * 3 + ["two"] * 3


def test_a_weight_that_comes_in_as_an_argument() -> None:
    class Given(Unproven):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return F.relu(F.linear(self.look(x), weight))

    model, x = Given().eval(), torch.randn(2, 3)
    with capture(model) as maps, torch.no_grad():
        for name in ("one", "one", "one", "two", "two", "one"):
            model(x, model.get_submodule(name).weight)
            assert maps.layers == [name]


@pytest.mark.parametrize("traced", [False, True])
def test_a_weight_that_is_no_parameter_is_exchanged(traced: bool) -> None:
    """It goes by the attribute in which it is, in each pass that is traced."""

    class Model(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(F.linear(self.one(x), self.way))
            return self.look(h) if traced else h

    model = Model()
    with capture(model) as maps:
        for n in range(12):
            model.way = random(4, 4, n=n)
            with torch.set_grad_enabled(n % 2 == 1):
                model(random(2, 3, n=n))
            assert maps.layers == ["one", "way"]
    assert not maps.missed


def test_a_script_keeps_no_weights_alive() -> None:
    class Functional(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(F.linear(self.look(x), self.one.weight * 2, self.one.bias))
            return F.gelu(F.linear(h, nn.Parameter(torch.ones(4, 4)) * 2))

    model, x = Functional(), torch.randn(2, 3)
    names = [name for name, _ in model.named_parameters()]
    refs = []
    with capture(model):
        for _ in range(20):
            weights = {n: p * 0.9 for n, p in model.named_parameters()}
            refs += map(weakref.ref, weights.values())
            functional_call(model, weights, (x,)).sum()
            del weights
        model(x)
        gc.collect()
        assert not [ref for ref in refs if ref() is not None]
        for _ in range(20):
            model.one.weight = nn.Parameter(torch.randn(4, 3))
            refs.append(weakref.ref(model.one.weight))
            model(x)
        gc.collect()
        assert len([ref for ref in refs if ref() is not None]) == 1
    assert names == [name for name, _ in model.named_parameters()]


# -- outputs, and who calls ---------------------------------------------------------------------


def test_a_module_returns_another_tensor_that_was_there_anyway() -> None:
    class Pick(nn.Module):
        def forward(self, way: int, *given: Tensor) -> Any:
            if float(given[0].sum()) > 1e9:
                return given
            return given[way] if way < 2 else given

    class Model(Unproven):
        def __init__(self) -> None:
            super().__init__()
            self.pick = Pick()

        def forward(self, x: Tensor) -> Any:
            h = self.one(self.look(x))
            return self.pick(self.way, h, h.t())

    passes = [t for way in (0, 1, 2, 0, 1, 2) for t in turns(*[(4, 3)] * 2, before=put(way=way))]
    seen = hold(Model(), passes, kinds=("output", "activation"), layers=["pick", "one"])
    dims = [[t[4] for t in each if t[0] == "pick"] for each in seen.labels]
    assert dims == [[1]] * 2 + [[0]] * 2 + [[1, 0]] * 2 + [[1]] * 2 + [[0]] * 2 + [[1, 0]] * 2


def test_the_same_function_by_a_module_that_has_no_hooks() -> None:
    """Inside a unit there are none; a scope may call a part of it all the same."""

    class Model(Unproven):
        def __init__(self) -> None:
            super().__init__()
            self.unit = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y = self.unit(self.look(x))
            return y + (self.unit[1](x) if self.way else F.relu(x))

    shapes = [(2, 3)] * 3
    model, layers = Model().eval(), []
    bare = copy.deepcopy(model)
    with capture(model) as maps, torch.no_grad():
        for turn in turns(*shapes) + turns(*shapes, before=put(way=1)) + turns(*shapes):
            turn.before(bare), turn.before(model)
            true = truth.run_pass(bare, turn.args, train=False, witness=True)
            model(*turn.args)
            truth.assert_captured_exactly_once(maps, true.truth)
            layers.append(maps.select(kind="activation", nonlinearity="relu", step=-1)[-1].layer)
        assert [m.layer for m in maps.missed] == ["unit.1"]
    assert layers == [":relu"] * 3 + ["unit.1:relu"] + ["unit.1"] * 5


@pytest.mark.parametrize("first", [0, 1])
def test_a_tensor_is_given_other_memory(first: int) -> None:
    class Moved(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            h = self.one(self.look(x))
            y = F.relu(h)
            if self.way:
                h.data = torch.ones(2, 4)
            return torch.tanh(h) + y

    shapes = [(2, 3)] * 3
    hold(Moved(), turns(*shapes, before=put(way=first)) + turns(*shapes, before=put(way=1 - first)))


# -- what stands before a call ----------------------------------------------------------------


def test_a_copy_of_a_modules_attributes_is_called() -> None:
    """As DataParallel copies modules: what stands before the call is copied, too."""

    class Copies(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            layer: Any = self.next
            if self.way:
                layer = self.next._replicate_for_data_parallel()
                layer.weight, layer.bias = torch.ones(4, 4), torch.zeros(4)
            return self.relu(layer(self.one(self.look(x))))

    shapes = [(2, 3)] * 3
    hold(Copies(), turns(*shapes) + turns(*shapes, before=put(way=1)) + turns(*shapes))


def test_a_hook_that_is_set_in_the_middle_of_a_pass() -> None:
    class Hooked(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            h = self.one(self.look(x))
            if not self.way:
                return self.relu(self.next(h))
            handle = self.next.register_forward_hook(lambda *given: torch.tanh(given[-1]))
            out = self.relu(self.next(h))
            handle.remove()
            return out

    model = Hooked().eval()
    bare = copy.deepcopy(model)
    with capture(model) as maps, torch.no_grad():
        for n, turn in enumerate(turns(*[(2, 3)] * 6)):
            model.way = bare.way = int(n > 3)
            true = truth.run_pass(bare, turn.args, train=False, witness=True)
            seen = truth.run_pass(model, turn.args, train=False)
            truth.assert_same_pass(true, seen)
            truth.assert_captured_exactly_once(maps, true.truth)


# -- what is named ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"detach": False}, {"gradients": True}])
def test_a_part_that_is_checkpointed_from_some_pass_on_is_named(options: dict[str, Any]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:
                x = x * 2
            return F.relu(self.layer(x))

    class Model(Unproven):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Any:
            h = self.one(self.look(x))
            h = checkpoint(self.block, h, use_reentrant=True) if self.way else self.block(h)
            return F.relu(self.next(h))

    shapes = [(2, 3)] * 3
    passes = turns(*shapes) + turns(*shapes, before=put(way=1))
    seen = hold(Model(), passes, train=True, **options)
    assert {layer for layer, _ in seen.missed} == {"block.layer"}


def test_a_vmap_from_some_pass_on_is_named() -> None:
    class Mapped(Unproven):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            if self.way:
                y = torch.vmap(self.relu)(self.kept)
            else:
                y = self.relu(self.kept[0])
            return self.one(self.look(x)) + y.sum()

    model, got = Mapped().eval(), []
    for _ in range(2):
        with capture(model) as maps, torch.no_grad():
            for n in range(6):
                model.way = int(n > 2)
                model(torch.ones(2, 3))
            got.append({m.layer for m in maps.missed})
    assert got == [{"relu"}, {"relu"}]


# -- programs that decide by what is hidden -------------------------------------------------------


class Ways(nn.Module):
    """Its `pick` says which of three ways a pass goes."""

    def __init__(self, pick: Callable[[Any, Tensor], int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.act = nn.ReLU(inplace=True)
        self.gate: Any = None
        self.table: dict[str, Any] = {"way": 0}
        self.rounds: list[int] = [0]
        self.plain = 0
        self.register_buffer("count", torch.zeros(()))
        self._pick = pick

    @property
    def way(self) -> int:
        return self.rounds[0] % 3

    def forward(self, x: Tensor) -> Tensor:
        way = self._pick(self, x)
        if way == 0:
            return self.act(self.layers[0](x))
        if way == 1:
            return torch.tanh(self.layers[1](x))
        return self.layers[0](self.act(self.layers[2](x)))


OUTSIDE: dict[str, int] = {"way": 0}
WAY = 0


def _by_data(model: Ways, x: Tensor) -> int:
    return int(x[0, 0] > 0) + int(x[0, 1] > 0)


def _by_a_buffer(model: Ways, x: Tensor) -> int:
    model.count += 1
    return int(model.count.item()) % 3


def _by_an_attribute(model: Ways, x: Tensor) -> int:
    model.plain = (model.plain + 1) % 3
    return model.plain


def _by_none(model: Ways, x: Tensor) -> int:
    model.gate = None if model.gate is not None else 1
    return 0 if model.gate is None else 1


def _by_a_dict(model: Ways, x: Tensor) -> int:
    model.table["way"] += 1
    return model.table["way"] // 4 % 3


def _by_a_property(model: Ways, x: Tensor) -> int:
    model.rounds[0] += 1
    return model.way


def _by_a_global(model: Ways, x: Tensor) -> int:
    return OUTSIDE["way"] // 3 % 3


def _by_a_module_variable(model: Ways, x: Tensor) -> int:
    return WAY // 3 % 3


def _by_getattr(model: Ways, x: Tensor) -> int:
    return getattr(model, "hidden", 0) or 0


def _by_an_exception(model: Ways, x: Tensor) -> int:
    model.rounds[0] += 1
    try:
        return [0, 1][model.rounds[0] // 3 % 3]
    except IndexError:
        return 2


def _by_a_comprehension(model: Ways, x: Tensor) -> int:
    return sum([1 for v in x[0, :2].tolist() if v > 0])


def _by_a_generator(model: Ways, x: Tensor) -> int:
    return next(n for n in (0, 1, 2) if n == 2 or x[0, n] > 0)


def _by_short_circuit(model: Ways, x: Tensor) -> int:
    return (bool(x[0, 0] > 0) and 1) or (bool(x[0, 1] > 0) and 2) or 0


def _by_a_chain(model: Ways, x: Tensor) -> int:
    return {False: 0, True: 1}[-0.5 < float(x[0, 0]) < 0.5]


def _by_a_match(model: Ways, x: Tensor) -> int:
    match x[0, :2].gt(0).tolist():
        case [True, True]:
            return 1
        case [True, _]:
            return 2
    return 0


def _by_random(model: Ways, x: Tensor) -> int:
    return int(torch.randint(3, ()))


SHOWN = [
    *(_by_data, _by_a_buffer, _by_an_attribute, _by_none, _by_a_comprehension, _by_a_generator),
    *(_by_short_circuit, _by_a_chain, _by_a_match, _by_random),
]
HIDDEN = [
    *(_by_a_dict, _by_a_property, _by_a_global, _by_a_module_variable, _by_getattr),
    *(_by_an_exception,),
]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("pick", [*SHOWN, *HIDDEN])
def test_whatever_decides(pick: Any, inside: bool) -> None:
    model: nn.Module = Ways(pick).eval()
    if inside:
        model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), model, nn.Linear(4, 4)).eval()
    bare, lost = copy.deepcopy(model), 0
    OUTSIDE["way"] = 0
    with capture(model) as maps:
        for n in range(30):
            OUTSIDE["way"] += 1
            globals()["WAY"] = n
            for each in (model, bare):
                own: Any = each[2] if inside else each  # type: ignore[index]
                if n % 4 == 3:
                    object.__setattr__(own, "hidden", n % 3)
            x = random(3, 4, n=n)
            true = truth.run_pass(bare, (x,), train=False, seed_=n, witness=True)
            seen = truth.run_pass(model, (x,), train=False, seed_=n)
            truth.assert_same_pass(true, seen)
            pairs = truth.captured_pairs(maps)
            assert len(pairs) == len(true.truth) or strayed(maps)
            lost += len(pairs) < len(true.truth)
            for run, pair in zip(true.truth, pairs, strict=False):
                assert truth.same_bits(run.z, pair.z), n
                assert truth.same_bits(run.a, pair.a), n
        strayed(maps)
        assert lost <= (0 if pick in SHOWN else 2)
    truth.assert_nothing_left(truth.fingerprint(bare), model)


class _Swallows(nn.Module):
    """A key that is not there says which layer is the last; nobody handles that but `finally`."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.table = {"two": 1}


class _Returns(_Swallows):
    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        try:
            self.table["two"]
            h = self.two(x)
        finally:
            return torch.relu(h)  # noqa: B012


class _Breaks(_Swallows):
    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        for _ in range(2):
            try:
                try:
                    self.table["two"]
                    h = self.two(x)
                except IndexError:
                    h = x
            finally:
                break  # noqa: B012
        return torch.relu(h)


@pytest.mark.parametrize("kind", [_Returns, _Breaks])
def test_a_finally_that_swallows_an_exception(kind: type[nn.Module]) -> None:
    def change(model: Any) -> None:
        model.table.clear()

    shapes = [(2, 3)] * 3
    seen = hold(kind(), turns(*shapes) + turns(*shapes, before=change), most=1)
    layers = [{t[0] for t in each if t[3] == "relu"} for each in seen.labels]
    assert layers == [{"two"}] * 3 + [set()] + [{"one"}] * 2


class _Asks(nn.Module):
    """`hasattr` swallows what a property raises that has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.table = types.SimpleNamespace(two=1)
        self.h: Any = None

    @property
    def refined(self) -> bool:
        self.table.two  # noqa: B018
        self.h = self.two(self.h)
        return True

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.one(x)
        self.ask()
        h, self.h = self.h, None
        return torch.relu(h)

    def ask(self) -> Any:
        return hasattr(self, "refined")


class _AsksOrElse(_Asks):
    def ask(self) -> Any:
        return getattr(self, "refined", None)


class _AsksForMore(_Asks):
    def __getattr__(self, name: str) -> Any:
        if name == "more":
            self.table.two  # noqa: B018
            self.h = self.two(self.h)
            return True
        return super().__getattr__(name)

    def ask(self) -> Any:
        return hasattr(self, "more")


@pytest.mark.parametrize("kind", [_Asks, _AsksOrElse, _AsksForMore])
def test_an_attribute_that_is_made_half_way(kind: type[Any]) -> None:
    model = kind()
    with capture(model) as maps, torch.no_grad():
        for n in range(8):
            if n == 4:
                del model.table.two
            model(random(2, 3, n=n))
            found = [m.layer for m in maps if m.kind == "activation"]
            assert found == ["two" if n < 4 else "one"] or (n == 4 and not found and maps.missed)


# -- functions run twins while the block is open --------------------------------------------------


def _helper(model: Any, x: Tensor) -> Tensor:
    if x.dim() == 2:
        x = model.relu(model.one(x))
    if model.way == "fail":
        raise ValueError("of the user's")
    if model.way == "stop":
        raise KeyboardInterrupt
    return x


class Helped(Unproven):
    """Its code is in several functions."""

    scale = property(lambda self: 2.0)

    @staticmethod
    def doubled(x: Tensor) -> Tensor:
        return x * 2 if x.numel() else x

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.doubled(_helper(self, x))) * self.scale


_FUNCTIONS: list[Any] = [
    *(_helper, Helped.forward, Helped.doubled, Helped.__dict__["scale"].fget),
]


@pytest.fixture
def own_code() -> Iterator[None]:
    """Every function has the code that it had."""
    before = [f.__code__ for f in _FUNCTIONS]
    yield
    assert [f.__code__ for f in _FUNCTIONS] == before
    assert all(f.__code__ is code for f, code in zip(_FUNCTIONS, before, strict=True))


@pytest.mark.parametrize("ends", ["well", "by an error", "by an interrupt", "by an error between"])
def test_after_the_block_functions_have_their_own_code(ends: str, own_code: None) -> None:
    model, x = Helped(), torch.randn(2, 3)
    raised = {"by an error": ValueError, "by an interrupt": KeyboardInterrupt}.get(ends)
    with pytest.raises(raised or ZeroDivisionError), capture(model):  # noqa: PT012
        for _ in range(4):
            model(x)
        assert _helper.__code__ is not None
        model.way = {"by an error": "fail", "by an interrupt": "stop"}.get(ends, 0)
        model(x)
        raise ZeroDivisionError


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_blocks_that_end_in_any_order(order: tuple[int, ...], own_code: None) -> None:
    models, x = [Helped(), Helped(), Helped()], torch.randn(2, 3)
    models[2] = models[0]
    blocks = [capture(model) for model in models]
    maps = [block.__enter__() for block in blocks]
    for _ in range(3):
        for model in models:
            model(x)
    for n, which in enumerate(order):
        blocks[which].__exit__(None, None, None)
        for other in order[n + 1 :]:
            models[other](x)
            assert "one" in maps[other]
    assert not any(m.missed for m in maps)


def test_blocks_in_two_threads(own_code: None) -> None:
    found: list[Any] = []

    def work(seed: int) -> None:
        model = Helped()
        for _ in range(3):
            with capture(model) as maps, torch.no_grad():
                for n in range(8):
                    x = random(2, 3, n=seed + n)
                    model(x)
                    z = F.linear(x, model.one.weight, model.one.bias)
                    found.append(torch.equal(maps["one", "preactivation"].tensor, z))
                found.append(not maps.missed)

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 * 3 * 9
    assert all(found)


def test_tracebacks_and_sources_show_the_users_lines() -> None:
    model, x = Helped(), torch.randn(2, 3)
    source = inspect.getsource(_helper)
    with capture(model):
        for _ in range(4):
            model(x)
        assert inspect.getsource(_helper) == source
        assert inspect.getsource(Helped.forward).startswith("    def forward")
        model.way = "fail"
        with pytest.raises(ValueError, match="of the user's") as caught:
            model(x)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert frames[-1].line == 'raise ValueError("of the user\'s")'
    assert (frames[-1].name, frames[-1].filename) == ("_helper", __file__)
    assert any(
        f.line == "return self.next(self.doubled(_helper(self, x))) * self.scale" for f in frames
    )


def test_a_debugger_sees_each_line_once() -> None:
    model, x = Helped(), torch.randn(2, 3)

    def lines() -> list[int]:
        seen: list[int] = []

        def trace(frame: Any, event: str, _: Any) -> Any:
            if frame.f_code.co_name == "_helper":
                seen.append(frame.f_lineno)
                names = [name for name in frame.f_locals if name.isidentifier()]
                assert names == ["model", "x"]
                frame.f_trace_opcodes = False
                return trace
            return None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            model(x)
        finally:
            sys.settrace(before)
        return list(dict.fromkeys(seen))

    bare = lines()
    with capture(model):
        model(x), model(x), model(x)
        assert lines() == bare


def test_a_profiler_of_the_users_stays() -> None:
    model, x, seen = Helped(), torch.randn(2, 3), []

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name == "_helper":
            seen.append(frame.f_code.co_firstlineno)

    before = sys.getprofile()
    with capture(model) as maps:
        sys.setprofile(profile)
        try:
            for _ in range(4):
                model(x)
                assert sys.getprofile() is profile
        finally:
            sys.setprofile(before)
        for _ in range(4):
            model(x)
            assert sys.getprofile() is before
            assert maps.layers == ["one", "next"]
        assert not maps.missed
    assert seen == [_helper.__code__.co_firstlineno] * 4


def test_copies_and_pickles_in_the_block() -> None:
    model, x = Helped(), torch.randn(2, 3)
    bare = copy.deepcopy(model)(x)
    with capture(model) as maps:
        for _ in range(4):
            model(x)
        assert torch.equal(copy.deepcopy(model)(x), bare)
        method = pickle.loads(pickle.dumps(model.look))
        assert torch.equal(method(x), x)
        assert pickle.loads(pickle.dumps(_helper)) is _helper
        assert copy.deepcopy(Helped.forward) is Helped.forward
        assert not maps.missed


# -- plans, and what no pass shows ------------------------------------


class _Proven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.conv = nn.Linear(3, 4), nn.Linear(3, 4), nn.Conv1d(3, 4, 1)


class _Sum(_Proven):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.one(x[:1]) + self.two(x))


class _Squeeze(_Proven):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x).squeeze())


class _Flat(_Proven):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x).flatten(1))


class _Slice(_Proven):
    def forward(self, x: Tensor, start: int) -> Tensor:
        return F.relu(self.one(x)[:, start : start + 2])


class _Given(_Proven):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.relu(F.linear(x, weight))


class _Norm(_Proven):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.instance_norm(x))


@pytest.mark.parametrize(
    ("kind", "first", "later"),
    [
        (_Sum, (torch.ones(1, 3),), (torch.ones(2, 3),)),
        (_Squeeze, (torch.ones(1, 3, 5),), (torch.ones(5, 3, 1),)),
        (_Flat, (torch.ones(2, 3, 1),), (torch.ones(2, 3, 2),)),
        (_Slice, (torch.ones(2, 3), 0), (torch.ones(2, 3), 2)),
        (_Given, (torch.ones(2, 3), "one"), (torch.ones(2, 3), "two")),
        (_Norm, (torch.ones(2, 3, 4),), (torch.ones(2, 5, 4),)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_proven_model_is_given_what_makes_other_labels(
    kind: type[nn.Module], first: tuple[Any, ...], later: tuple[Any, ...]
) -> None:
    def run(model: nn.Module, given: tuple[Any, ...]) -> None:
        model(*(model.get_submodule(g).weight if isinstance(g, str) else g for g in given))

    model = kind().eval()
    with capture(model) as maps, torch.no_grad():
        run(model, later)
        right = labels(maps)
    with capture(model) as maps, torch.no_grad():
        for given in (first, first, later):
            run(model, given)
        assert labels(maps) == right


def test_a_nonlinearity_in_a_users_hook_on_a_nonlinearity_is_named() -> None:
    class Model(Unproven):
        def __init__(self) -> None:
            super().__init__()
            self.relu.register_forward_hook(lambda *given: torch.tanh(given[-1]))

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.one(self.look(x)))

    model = Model().eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model) as maps:
            for turn in turns(*[(2, 3)] * 4):
                model(*turn.args)
                z, a = maps["one", "preactivation"].tensor, maps["one"].tensor
                assert torch.equal(torch.relu(z), a)
                (missed,) = maps.missed
                assert missed.layer == "relu"
                assert "another nonlinearity (tanh)" in missed.reason


@pytest.mark.parametrize("proven", [True, False])
def test_a_layer_gets_more_filters_by_its_data(proven: bool) -> None:
    class Grows(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.one(self.look(x)))

    model: Any = nn.Sequential()
    if proven:
        model.one, model.relu = nn.Linear(3, 4), nn.ReLU()
    else:
        model = Grows()
    x = torch.randn(2, 3)
    with capture(model.eval()) as maps, torch.no_grad():
        for rows in (4, 4, 4, 6):
            model.one.weight.data, model.one.bias.data = torch.ones(rows, 3), torch.ones(rows)
            model(x)
            assert len(maps["one"]) == rows


# -- what it costs ----------------------------------------------------------------------------


class Early(Unproven):
    """Leaves the known roads at its first step whenever the number is another one."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.look(x), 0.01 * self.way)
        refs = self.__dict__.setdefault("refs", [])
        for layer in (self.one, self.next, self.next, self.next):
            h = self.relu(layer(h))
            refs.append(weakref.ref(h))
        return torch.tanh(h)


@pytest.mark.parametrize("same", [1, 2])
def test_no_tensor_of_a_pass_outlives_its_maps(same: int) -> None:
    model, x = Early().eval(), torch.randn(2, 3)
    gc.collect()
    gc.disable()
    try:
        with capture(model) as maps:
            for n in range(20):
                model.way = 0 if n % same == 0 else n
                model(x)
                maps.clear()
                assert not [ref for ref in model.refs if ref() is not None]
    finally:
        gc.enable()


# -- any model -----------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A statement of a drawn forward."""

    what: str
    arm: int  # 0: always; 1, 2: where the data says so, or where it does not


_WHATS = (
    *("x = self.a(x)", "x = self.b(x)", "x = self.scope(x)", "x = self.unit(x)"),
    *("x = F.relu(x)", "x = torch.tanh(x)", "x = self.relu(x)", "x = self.in_place(x)"),
    *("x = self.silu(x)", "x = self.hand(x)", "x = F.leaky_relu(x, self.slope)"),
    *("x.relu_()", "x = x.sigmoid_()", "y = x", "y = x.clone()", "y = x.float()", "x, y = y, x"),
    *("x = x + y", "x += y", "x = y + x", "x = x * y", "y[:, 0] = 0", "x[:1].tanh_()"),
    *("x = torch.cat([p for p in x.split(2, 1)], 1)", "x = torch.cat(x.chunk(2, 1)[::-1], 1)"),
    *("x = x.reshape(-1, 2, 2).flatten(1)", "x = x.t().contiguous().t()", "x = self.norm(x)"),
    *("x = x[..., torch.tensor([1, 0, 3, 2])]", "x = x[torch.arange(len(x))]"),
    *("x = x[:, self.picks]", "x = x + self.kept", "self.kept = x.detach().mean(0)"),
    *("x = x + self.a(x[:1])", "x = F.linear(x, self.a.weight)", "x = x.permute(self.order)"),
    *("x = self.drop(x)", "self.slope = 0.3 - self.slope", "self.order.reverse()"),
    *("self.order.reverse()", "x = y.add_(x)", "x = torch.stack([x, y]).amax(0)"),
)


class Hand(nn.Module):
    """A nonlinearity written out by hand, with a branch."""

    def forward(self, x: Tensor) -> Tensor:
        if x.tolist()[0][0] > 0.1:  # a mean would be no part of a nonlinearity
            return x * torch.sigmoid(1.7 * x)
        return x * torch.sigmoid(x)


class Scope(nn.Module):
    """Unproven, and chosen by data inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.gelu, self.relu = nn.GELU(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.gelu(self.layer(x))
        return self.relu(x + self.layer(x))


class Drawn(nn.Module):
    """Runs drawn statements on x of shape (n, 4)."""

    def __init__(self, lines: Sequence[Line]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.scope, self.hand, self.drop = Scope(), Hand(), nn.Dropout(0.3)
        self.unit = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
        self.relu, self.in_place, self.silu = nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU()
        self.slope, self.picks, self.order = 0.1, [1, 0, 3, 2], [0, 1]
        self.kept = torch.zeros(4)
        self.lines = tuple(lines)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        for line in self.lines:
            if line.arm == 0 or (line.arm == 1) is bool(x.mean() > 0):
                if line.what == "x = x.permute(self.order)" and len(x) != 4:
                    continue  # would change the shape
                names = {"self": self, "x": x, "y": y, "F": F, "torch": torch}
                exec(line.what, names)
                x, y = names["x"], names["y"]  # type: ignore[assignment]
        return self.b(x)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Line], list[int]]:
    """Statements, and the batch size of each pass."""
    line = st.builds(Line, st.sampled_from(_WHATS), st.sampled_from([0, 0, 1, 2]))
    lines = draw(st.lists(line, min_size=1, max_size=9))
    sizes = draw(st.lists(st.sampled_from([4, 4, 4, 2, 1]), min_size=5, max_size=5))
    return lines, sizes


@given(programs(), st.integers(0, 1000))
@settings(deadline=None)
def test_any_model_in_any_pass(drawn: tuple[list[Line], list[int]], seed: int) -> None:
    lines, sizes = drawn
    passes = [Turn((random(n, 4, n=seed + i),)) for i, n in enumerate(sizes)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        hold(Drawn(lines), passes, most=2)


class Positions(nn.Module):
    """Asks numbers of its own for their truth, as masks of transformers are asked."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.made = made
        self.first, self.act, self.last = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        mask = self.made(x)
        if bool((mask[..., -1] == 0).all()):
            x = x * 2
        return F.relu(self.last(x))


def _positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0]).unsqueeze(0).diff(dim=-1).cumsum(-1) - 1


def _no_padding(x: Tensor) -> Tensor:
    return torch.ones_like(x).to(torch.bool)


def _table(x: Tensor) -> Tensor:
    return torch.tensor([[1.0, 2.0]]).exp()


def _signs(x: Tensor) -> Tensor:
    return x > 0


def _added(x: Tensor) -> Tensor:
    return torch.zeros(3) + x[0, 0]


def _written(x: Tensor) -> Tensor:
    mask = torch.zeros(2, 3)
    mask[0] = x[0, 0]
    return mask


def _scaled(x: Tensor) -> Tensor:
    return torch.full_like(x, 1.0).mul_(x)


def _drawn(x: Tensor) -> Tensor:
    return torch.bernoulli(torch.ones(3) / 2)


_MADE = [(_positions, False), (_no_padding, False), (_table, False), (_signs, True)]
_MADE += [(_added, True), (_written, True), (_scaled, True), (_drawn, True)]


@pytest.mark.parametrize(("made", "by_data"), _MADE)
def test_numbers_of_its_own_are_no_data(made: Any, by_data: bool) -> None:
    model = Positions(made).eval()
    with torch.no_grad(), warnings.catch_warnings(), capture(model) as maps:
        warnings.simplefilter("ignore")  # torch's, of torch.tensor(a tensor)
        for _ in range(5):
            model(torch.rand(3, 4))
        assert len(maps) == 4
        assert maps._session.parts.regions.static(model) is not by_data
