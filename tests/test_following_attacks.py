"""Later passes of unproven models, as a hostile stranger would write them.

A pass is compared with what an earlier one was seen to do (see `_following.py`). Whatever a later
pass does otherwise, it must be captured as if nobody compared: there are two truths for that. The
witness below autograd saw what ran, beside a bare copy of the model; and the same passes with
following switched off give the same labels and the same bits.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fmapkit._following import Follower
from fmapkit._following_maps import FollowedMaps
from fmapkit._following_suspects import FollowedSuspects
from fmapkit._scripts import Scripts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from fmapkit import CaptureWarning, _following, capture
from fmapkit._functions import describe
from tests import truth

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


@contextmanager
def nobody_follows() -> Iterator[None]:
    """Each pass is traced from its start to its end."""
    kept = Scripts._of
    Scripts._of = lambda *_: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Scripts._of = kept  # type: ignore[method-assign]


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
    forced: Callable[[int], None] = lambda _: None,
    **options: Any,
) -> Seen:
    """Run the passes, and compare them with both truths.

    Args:
        model: to run, in train or eval mode as `train` says.
        passes: with what.
        train: with a backward pass.
        order: whether maps come in order of execution.
        forced: called with the number of each followed pass before it.
        options: of `capture`.
    """
    model.train(train)
    bare, off = copy.deepcopy(model), copy.deepcopy(model)
    given: list[list[Label]] = []
    tensors: list[list[Tensor]] = []
    with capture(model, **options) as maps:
        for n, turn in enumerate(passes):
            turn.before(bare)
            turn.before(model)
            true = truth.run_pass(bare, turn.args, train=train, seed_=n, witness=True)
            forced(n)
            seen = truth.run_pass(model, turn.args, train=train, seed_=n)
            forced(-1)
            truth.assert_same_pass(true, seen)
            truth.assert_captured_exactly_once(maps, true.truth, order=order)
            given.append(labels(maps))
            tensors.append([m.tensor.clone() for m in maps])
        missed = {(m.layer, m.reason) for m in maps.missed}
    truth.assert_nothing_left(truth.fingerprint(bare), model)
    assert truth.modes() == truth.NO_MODES
    with nobody_follows(), capture(off, **options) as maps:
        for n, turn in enumerate(passes):
            turn.before(off)
            truth.run_pass(off, turn.args, train=train, seed_=n)
            assert given[n] == labels(maps), f"pass {n}"
            same = [truth.same_bits(m.tensor, t) for m, t in zip(maps, tensors[n], strict=True)]
            assert all(same), f"pass {n}"
        assert missed == {(m.layer, m.reason) for m in maps.missed}
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
        if x.sum() > 1e9:
            x = torch.relu(x)
        return x


# -- sizes ------------------------------------------------------------------------------------


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


def test_a_leaf_returns_more_tensors_than_before() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return F.relu(x).split(1)

    class Leaf(Unproven):
        def __init__(self) -> None:
            super().__init__()
            self.split = Split()

        def forward(self, x: Tensor) -> Tensor:
            pieces = self.split(self.one(self.look(x)))
            return torch.stack([torch.tanh(p) for p in pieces]).sum(0)

    hold(Leaf(), turns(*[(3, 3)] * 3, *[(2, 3)] * 2, (4, 3)))


def test_a_leaf_without_a_nonlinearity_returns_more_tensors_than_before() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.split(1)

    class Leaf(Unproven):
        def __init__(self) -> None:
            super().__init__()
            self.split = Split()

        def forward(self, x: Tensor) -> Tensor:
            pieces = self.split(self.one(self.look(x)))
            return torch.stack([torch.tanh(p) for p in pieces]).sum(0)

    model = Leaf().eval()
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
            if x.sum() > 1e9:
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
        with nobody_follows(), capture(model) as maps, torch.no_grad():
            for n, names in zip((first, first, first, later, later, first), got, strict=True):
                model(torch.randn(n, 3))
                assert names == {m.nonlinearity for m in maps.select(kind="activation")}
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
            if given[0].sum() > 1e9:
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
    seen = hold(Model(), turns(*shapes) + turns(*shapes, before=put(way=1)) + turns(*shapes))
    layers = [layer for layer, *_ in of(seen, "relu")]
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


def test_passes_between_bare_ones_are_followed() -> None:
    class Model(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.next(self.relu(self.one(self.look(x)))))

    model = Model().eval()
    ran = []
    kept = Follower.depart
    Follower.depart = lambda self: (ran.append(1), kept(self))[1]  # type: ignore[method-assign]
    try:
        with capture(model, every=2), torch.no_grad():
            for turn in turns(*[(2, 3)] * 12):
                model(*turn.args)
    finally:
        Follower.depart = kept  # type: ignore[method-assign]
    assert not ran


def test_nobody_follows_a_pass_that_another_capture_has_ended() -> None:
    class Model(Unproven):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.next(self.relu(self.one(self.look(x)))))

    model, x = Model().eval(), torch.randn(2, 3)
    with capture(model) as maps, torch.no_grad():
        for _ in range(4):
            model(x)
        with capture(model, "one", stop=True):
            for _ in range(3):
                model(x)
            assert maps._session._placing.way.follower is None


# -- what is named ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"detach": False}, {"gradients": True}])
def test_a_part_that_is_checkpointed_from_some_pass_on_is_named(options: dict[str, Any]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
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


@pytest.mark.parametrize(
    "place",
    [
        *((Follower, name) for name in ("enter", "leave", "_leaf", "_leaf_left")),
        *((FollowedMaps, name) for name in ("before", "made")),
        (FollowedSuspects, "open"),
        (_following, "tell"),
    ],
    ids=lambda place: place[1],
)
def test_a_fault_of_ours_while_a_pass_is_followed_is_named(
    place: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.relu = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                x = x * 2
            return torch.tanh(self.relu(self.layer(x)))

    class Model(Unproven):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.hand = Block(), Hand()

        def forward(self, x: Tensor) -> Tensor:
            h = self.hand(self.block(self.one(self.look(x))))
            return F.gelu(self.next(h)) if self.way else torch.tanh(self.next(h))

    def fails(*_: Any) -> Any:
        raise ZeroDivisionError("of ours")

    model = Model().eval()
    bare, x = copy.deepcopy(model), torch.zeros(2, 3)
    with capture(model) as maps, torch.no_grad():
        for _ in range(4):
            model(x)
        assert not maps.missed
        with monkeypatch.context() as patch:
            patch.setattr(*place, fails)
            model.way = bare.way = int(place[1] == "tell")
            assert torch.equal(model(x), bare(x))
        assert any("ZeroDivisionError: of ours" in m.reason for m in maps.missed)
        model.way = bare.way = 0
        true = truth.run_pass(bare, (x,), train=False, witness=True)
        for _ in range(2):
            assert torch.equal(model(x), true.outputs[0])
            truth.assert_captured_exactly_once(maps, true.truth)
    truth.assert_nothing_left(truth.fingerprint(bare), model)
    assert truth.modes() == truth.NO_MODES


# -- not a matter of following: plans, and what no pass shows ------------------------------------


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


@pytest.mark.parametrize("same", [1, 6, 12, 10**6])
def test_passes_that_mostly_leave_the_known_roads_are_not_followed_for_long(
    same: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = []
    kept = Follower.__init__

    def begins(this: Any, *given: Any) -> None:
        followed.append(this)
        kept(this, *given)

    monkeypatch.setattr(Follower, "__init__", begins)
    model, x, count = Early().eval(), torch.randn(2, 3), 300
    with capture(model) as maps, torch.no_grad():
        for n in range(count):
            model.way = 0 if n % same == 0 else n
            model(x)
        steps = [script.start for script in maps._session.scripts._known.values()]
        for step in steps:
            steps += [other for other in (step.then, step.instead) if other is not None]
    assert len(steps) < 33 * 20
    if same == 1:
        assert len(followed) > 0.9 * count
    else:
        assert len(followed) < 0.3 * count


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


# -- any unproven model -----------------------------------------------------------------------


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


class _Force:
    """Makes a follower depart at the n-th thing that it is told in a pass."""

    def __init__(self) -> None:
        self.at = self.told = -1

    def now(self) -> bool:
        self.told += 1
        return self.told == self.at

    @contextmanager
    def set(self) -> Iterator[None]:
        """While this is open."""
        kept = {name: getattr(Follower, name) for name in ("call", "enter", "leave", "leaf")}

        def call(this: Any, func: Any, args: Any, kwargs: Any) -> Any:
            if not describe(func).silent and self.now():
                this.depart()
                return this._tracer.__torch_function__(func, (), args, kwargs)
            return kept["call"](this, func, args, kwargs)

        def enter(this: Any, module: Any, args: Any, kwargs: Any) -> str:
            if self.now():
                this.depart()
                return ""
            return str(kept["enter"](this, module, args, kwargs))

        def leave(this: Any, module: Any, output: Any) -> bool:
            if self.now():
                this.depart()
                return False
            return bool(kept["leave"](this, module, output))

        def leaf(this: Any, stand: Any, args: Any, kwargs: Any) -> Any:
            if self.now():
                this.depart()
                return stand.inner(*args, **kwargs)
            return kept["leaf"](this, stand, args, kwargs)

        for made in (call, enter, leave, leaf):
            setattr(Follower, made.__name__, made)
        try:
            yield
        finally:
            for name, method in kept.items():
                setattr(Follower, name, method)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Line], list[int], int, int]:
    """Statements, the batch size of each pass, and where a pass is forced off its road."""
    line = st.builds(Line, st.sampled_from(_WHATS), st.sampled_from([0, 0, 1, 2]))
    lines = draw(st.lists(line, min_size=1, max_size=9))
    sizes = draw(st.lists(st.sampled_from([4, 4, 4, 2, 1]), min_size=5, max_size=5))
    return lines, sizes, draw(st.integers(-1, 40)), draw(st.integers(2, 4))


@given(programs(), st.integers(0, 1000))
@settings(deadline=None)
def test_any_unproven_model_in_any_pass(
    drawn: tuple[list[Line], list[int], int, int], seed: int
) -> None:
    lines, sizes, at, which = drawn
    force = _Force()

    def forced(n: int) -> None:
        force.told, force.at = -1, at if n == which else -2

    passes = [Turn((random(n, 4, n=seed + i),)) for i, n in enumerate(sizes)]
    with warnings.catch_warnings(), force.set():
        warnings.simplefilter("ignore", CaptureWarning)
        hold(Drawn(lines), passes, forced=forced)
