"""What is stored of a map beyond a reference: filters, dtype=, device=, a budget; and buffers."""

from __future__ import annotations

import random
import sys
import warnings
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.memory import Live
from fmapkit import (
    ArgumentError,
    BudgetError,
    CaptureWarning,
    FeatureMap,
    MapOverwrittenError,
    MapReleasedError,
    capture,
)
from fmapkit.storage.offload import Offload
from tests.checks import Residual
from tests.late import Late, late
from tests.strategies import Model, models
from tests.truth import (
    assert_captured_exactly_once,
    assert_nothing_left,
    assert_same_pass,
    bare_copy,
    fingerprint,
    run_pass,
)

KINDS = ("input", "response", "preactivation", "activation")


class Net(Residual):
    def __init__(self) -> None:
        super().__init__(8, 4)


def image(step: int = 0) -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))


class _CastBack:
    """The maps of a wider dtype, in the model's own."""

    def __init__(self, maps: Any, dtype: torch.dtype) -> None:
        self.maps, self.dtype = maps, dtype

    @property
    def missed(self) -> Any:
        return self.maps.missed

    def select(self, **given: Any) -> list[Any]:
        found = self.maps.select(**given)
        assert all(fm.dtype == torch.float64 for fm in found)
        return [replace(fm, tensor=fm.tensor.to(self.dtype)) for fm in found]


def _drawn(drawn: Model, train: bool, **options: Any) -> None:
    """Every pass of a drawn model under `options` beside a bare one under the witness."""
    model = drawn.build().train(train)
    bare = bare_copy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model, **options) as maps:
            for step in range(4):
                x = drawn.inputs(step)
                try:
                    expected = run_pass(bare, (x.clone(),), train=train, seed_=step, witness=True)
                except RuntimeError:  # in-place code that autograd refuses, capture or not
                    assume(False)
                watched = run_pass(model, (x.clone(),), train=train, seed_=step)
                assert_same_pass(expected, watched)
                read = maps if "dtype" not in options else _CastBack(maps, drawn.dtype)
                assert_captured_exactly_once(read, expected.truth)
    assert_nothing_left(fingerprint(bare), model)
    assert_captured_exactly_once(read, expected.truth)


# -- dtype= and filters= --------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("filters", [None, [3, 1], [-1, 7, 0]])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_filters(dtype: Any, filters: Any, train: bool) -> None:
    """Against hand-written clones at the moment, cast and indexed by NumPy's rules."""
    net = Net().train(train)
    clones: dict[tuple[str, str], Tensor] = {}
    net.bn1.register_forward_hook(
        lambda m, a, out: clones.__setitem__(("conv1", "preactivation"), out.detach().clone())
    )
    net.conv2.register_forward_pre_hook(
        lambda m, a: clones.__setitem__(("conv1", "activation"), a[0].detach().clone())
    )
    with capture(net, ["conv1"], filters=filters, dtype=dtype) as maps:
        for step in range(4):
            with torch.set_grad_enabled(train):
                net(image(step))
            for (layer, kind), clone in clones.items():
                fm = maps[layer, kind]
                places = range(8) if filters is None else [f % 8 for f in filters]
                places = list(dict.fromkeys(places))
                expected = clone[:, places].to(dtype or clone.dtype)
                assert fm.tensor.dtype == expected.dtype
                assert not fm.tensor.requires_grad
                assert torch.equal(fm.tensor, expected)
                assert list(fm.filters or ()) == places
    assert maps.missed == []


def test_what_is_no_float_stays_as_it_is() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x > 0, x.argmax(1)

    model = nn.Sequential(nn.Linear(3, 3), Mixed())
    with capture(model, "1", dtype=torch.float16) as maps:
        for _ in range(2):
            model(torch.randn(2, 3))
        assert [fm.tensor.dtype for fm in maps] == [torch.bool, torch.int64]


@pytest.mark.parametrize("error", [None, ValueError(), KeyboardInterrupt()], ids=repr)
def test_a_write_that_nobody_announced_is_not_stored(error: BaseException | None) -> None:
    """By what no mode sees; however the pass ends, the map is not taken for what it was."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.fc(x)
            a = torch.relu(z)
            with torch._C.DisableTorchFunction():
                z.detach().zero_()
            if error is not None:
                raise error
            return a

    with capture(model := Writes(), dtype=torch.float64) as maps:
        with suppress(ValueError, KeyboardInterrupt):
            model(torch.randn(3, 4))
        with pytest.raises(MapOverwrittenError):
            maps["fc", "preactivation"]


def test_an_input_has_not_the_filters_of_its_layer() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.warns(CaptureWarning), capture(net, kinds="input", filters=0) as maps:
        net(torch.randn(3, 4)), net(torch.randn(3, 4))
    assert [(m.layer, m.reason) for m in maps.missed] == [
        ("0", "filters= was given, and its input is not of its own filters")
    ]


@pytest.mark.parametrize("layers", ["block", "block.act", None])
def test_filters_without_a_map_to_pick_from_are_named(layers: str | None) -> None:
    """Of a module that is no layer, there is only what it returns; a layer may have no map."""
    block = nn.Sequential(OrderedDict(fc=nn.Linear(4, 4), act=nn.ReLU()))
    net = nn.Sequential(OrderedDict(block=block, last=nn.Linear(4, 3)))
    whole = "filters= was given, and what a module returns is held whole"
    none = "filters= was given for it, and this pass had no map of it"
    filters: Any = 0 if layers else {"block": 0, "block.fc": 0, "last": 0, "block.act": 0}
    expected = [(layers, whole)] if layers else [(n, none) for n in ("block", "block.act", "last")]
    x = torch.randn(3, 4)
    out = bare_copy(block)(x)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with capture(net, layers, kinds="activation", filters=filters) as maps:
            for _ in range(3):
                net(x)
                assert [(m.layer, m.reason) for m in maps.missed] == expected
                (fm,) = maps
                assert torch.equal(fm.tensor, out if layers else out[:, :1])
    assert [w.category for w in warned] == [CaptureWarning]


def test_channels_last_stays_channels_last() -> None:
    net = Net().eval().to(memory_format=torch.channels_last)
    with torch.no_grad(), capture(net, dtype=torch.bfloat16, filters=[0, 1, 5]) as maps:
        for step in range(3):
            net(image(step).to(memory_format=torch.channels_last))
        assert maps["conv1"].tensor.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=25)
@given(models(), st.booleans())
def test_float64_holds_float32_maps_of_any_model(drawn: Model, train: bool) -> None:
    """A wider dtype keeps every bit: cast back, each map is the witness's."""
    _drawn(drawn, train, dtype=torch.float64)


# -- buffers --------------------------------------------------------------------------------------


def test_buffers_are_made_once() -> None:
    net = Net().eval()
    with torch.no_grad(), capture(net, filters=range(4)) as maps:
        made = []
        for step in range(6):
            net(image(step))
            made.append(maps._session.wants.conversion.buffers.made)
        # By hand: z, a of two convolutions, 2x4x6x6 floats each; z of fc, 2x4.
        assert maps.nbytes == 4 * (4 * 2 * 4 * 6 * 6 + 2 * 4)
        assert len(set(made)) == 1  # all of them in the first pass


@pytest.mark.parametrize("how", ["map", "numpy", "view", "one filter"])
def test_a_map_that_somebody_still_has_is_not_written_to(how: str) -> None:
    """`keep=1` lets a pass go; a map read before stays what it was, buffers or not."""
    net = Net().eval()
    read = {
        "map": lambda fm: fm.tensor,
        "numpy": lambda fm: fm.numpy(),
        "view": lambda fm: fm.tensor[0, :, 2],
        "one filter": lambda fm: fm[1].tensor,
    }[how]
    kept: list[tuple[Any, Any]] = []
    with torch.no_grad(), capture(net, filters=range(4), dtype=torch.float64) as maps:
        for step in range(6):
            net(image(step))
            found = read(maps["conv1"])
            kept.append((found, found.copy() if how == "numpy" else found.clone()))
            del found
    for now, then in kept:
        assert np.array_equal(np.asarray(now), np.asarray(then))


def _live(net: nn.Module) -> tuple[Live, int]:
    """A count, and the bytes of the model in it."""
    live = Live()
    live.see([*net.parameters(), *net.buffers()])
    return live, live.bytes


class Nothing:
    def update(self, fm: FeatureMap) -> None:
        pass


COPIES = [{"filters": [0, 2]}, {"dtype": torch.float64}]


@pytest.mark.parametrize("options", COPIES, ids=str)
def test_shapes_that_change_leave_no_buffers_behind(options: dict[str, Any]) -> None:
    net = Net().eval()
    live, own = _live(net)
    with torch.no_grad(), capture(net, **options) as maps, live:
        for step in range(12):
            net(torch.randn(2, 3, 4 + step, 6))
            assert live.bytes - own == maps.nbytes
        maps.clear()
        assert live.bytes == own


@pytest.mark.parametrize("options", COPIES, ids=str)
@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("shapes", [(4, 6), (4, 6, 8), (4, 4, 6, 8), (4, 6, 8, 10)])
def test_shapes_that_alternate_have_buffers_of_their_own(
    options: dict[str, Any], keep: int, shapes: tuple[int, ...]
) -> None:
    """Once each shape has come back, nothing is allocated any more."""
    net = Net().eval()
    bare = bare_copy(net)
    live, own = _live(net)
    of_shape: dict[int, int] = {}
    passes: list[Tensor] = []
    with torch.no_grad(), capture(net, keep=keep, **options) as maps, live:
        buffers = maps._session.wants.conversion.buffers
        for turn in range(6):
            made = buffers.made
            for rows in shapes:
                x = torch.randn(2, 3, rows, 6)
                net(x)
                of_shape[rows] = sum(fm.tensor.nbytes for fm in maps)
                passes = [*passes, bare.bn1(bare.conv1(x))][-keep:]
                for fm, z in zip(maps.select("conv1", "preactivation"), passes, strict=True):
                    picked = z[:, options["filters"]] if "filters" in options else z
                    assert torch.equal(fm.tensor, picked.to(fm.dtype))
                del fm, picked  # whoever has a map has its buffer
            if turn > 2 + keep:
                assert buffers.made == made
            # No more than the maps, and one set for each shape of the last four passes.
            given = sum(t.nbytes for t in (*passes, x))
            idle = live.bytes - own - maps.nbytes - given
            assert idle <= sum(of_shape[rows] for rows in set(shapes))
        maps.clear()
        assert live.bytes == own + given


@pytest.mark.parametrize("options", COPIES, ids=str)
def test_a_shape_that_went_away_is_not_waited_for(options: dict[str, Any]) -> None:
    net = Net().eval()
    live, own = _live(net)
    with torch.no_grad(), capture(net, **options) as maps, live:
        for rows in (4, 6, 4, 6, 4):
            net(torch.randn(2, 3, rows, 6))
        assert live.bytes - own > maps.nbytes  # the buffers for 6 rows
        for _ in range(5):
            net(torch.randn(2, 3, 4, 6))
        assert live.bytes - own == maps.nbytes


@pytest.mark.parametrize("options", COPIES, ids=str)
def test_a_map_that_is_kept_for_good_costs_its_own_bytes(options: dict[str, Any]) -> None:
    net, kept = Net().eval(), []
    live, own = _live(net)
    with torch.no_grad(), capture(net, **options) as maps, live:
        for step in range(12):
            net(image(step))
            if step in (0, 5):
                kept.append(maps["conv1"].tensor)
            else:
                assert live.bytes - own == maps.nbytes + sum(t.nbytes for t in kept)


@pytest.mark.parametrize("options", COPIES, ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_keep_0_takes_no_more_than_a_map_at_a_time(
    options: dict[str, Any], inference: bool
) -> None:
    """Of a proven model: at its peak there are two maps of the model, and copies of one pair."""
    layers = [m for _ in range(6) for m in (nn.Linear(32, 32), nn.ReLU(inplace=True))]
    net, x = nn.Sequential(*layers).eval(), torch.randn(100, 32)
    live, own = _live(net)

    mode = torch.inference_mode() if inference else torch.no_grad()
    with mode, capture(net, keep=0, analyses=Nothing(), **options), live:
        live.see(x)
        net(x)
        live.peak = before = live.bytes
        assert before == own + x.nbytes
        net(x)
        copies = 2 * 100 * (2 * 4 if "filters" in options else 32 * 8)
        assert live.peak <= before + 2 * x.nbytes + copies


# -- keep=0 and max_bytes -------------------------------------------------------------------------


def test_a_budget_refuses_the_pass_that_exceeds_it() -> None:
    net = Net().eval()
    with torch.no_grad(), capture(net, "conv1", keep="all", max_bytes=2 * 4 * 2 * 8 * 36) as maps:
        net(image())  # z and a, 2x8x6x6 floats each: just what is allowed
        assert maps.nbytes == 2 * 4 * 2 * 8 * 36
        with pytest.raises(BudgetError) as caught:
            net(image(1))
        assert str(caught.value) == (
            "the maps of step 1, with 1 older ones take 9,216 bytes, more than max_bytes=4,608; "
            "capture fewer layers, kinds or filters, a narrower dtype=, or use when_full='oldest' "
            "to let older passes go first"
        )
        assert [fm.step for fm in maps.select()] == [0, 0]
        assert torch.equal(F.relu(maps["conv1", "preactivation"].tensor), maps["conv1"].tensor)
    assert not net.relu._forward_hooks
    assert net.relu.inplace


def test_a_budget_lets_the_oldest_go() -> None:
    net = Net().eval()
    one = 2 * 4 * 2 * 8 * 36
    with (
        torch.no_grad(),
        capture(net, "conv1", keep="all", max_bytes=3 * one, when_full="oldest") as maps,
    ):
        for step in range(5):
            net(image(step))
            assert maps.nbytes <= 3 * one
        assert [fm.step for fm in maps.select(kind="activation")] == [2, 3, 4]
    with torch.no_grad(), capture(net, max_bytes=10, when_full="oldest"):
        refused = pytest.raises(BudgetError, match="the maps of step 0 take")
        with refused:
            net(image())


def test_a_budget_tells_what_the_newest_pass_takes_once_the_older_are_gone() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    # z and a, 4 floats for each input: 32 bytes an input.
    with torch.no_grad(), capture(net, keep="all", max_bytes=100, when_full="oldest") as maps:
        net(torch.ones(2, 4))
        with pytest.raises(BudgetError, match="the maps of step 1 take 128 bytes, more than"):
            net(torch.ones(4, 4))
        assert maps.nbytes == 0


class Hoards(nn.Module):
    """What it returns lies in memory that passes share."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = torch.zeros(3, 4, 8)
        self.a = nn.Linear(8, 8)
        self.page: Tensor = self.pages[0]
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        torch.relu(self.a(x))
        if self.fails:
            raise ValueError("it fails")
        return self.page


@pytest.mark.parametrize("options", [{}, {"filters": range(3)}, {"dtype": torch.float64}])
@pytest.mark.parametrize("policy", ["error", "oldest"])
@pytest.mark.parametrize("seed", range(4))
def test_a_budget_is_exact(options: dict[str, Any], policy: Any, seed: int) -> None:
    """Shared memory counts once; passes that were let go, or refused, count no more.

    Another capture keeps everything: what steps take is read off the addresses of its maps.
    """
    drawn = random.Random(seed)
    options = {**options, "kinds": ("preactivation", "activation", "output"), "keep": "all"}
    limit = drawn.choice([1000, 2000, 4000])
    model = Hoards().eval()
    refused = let_go = 0
    with (
        torch.no_grad(),
        capture(model, **options) as everything,
        capture(model, max_bytes=limit, when_full=policy, **options) as maps,
    ):

        def taken(steps: list[int]) -> int:
            kept = [fm.tensor for fm in everything.select() if fm.step in steps]
            storages = [t.untyped_storage() for t in kept]
            return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

        expected: list[int] = []
        for step in range(40):
            rows = drawn.choice([1, 2, 3, 4])
            model.page = model.pages[drawn.randrange(3)][:rows]
            model.fails = drawn.random() < 0.2
            if drawn.random() < 0.05:
                maps.clear()
                expected.clear()
            expected.append(step)
            error: Any = None
            try:
                model(torch.ones(rows, 8))
            except (ValueError, BudgetError) as raised:
                error = raised
            if model.fails:  # its maps are looked at with the next pass
                assert isinstance(error, ValueError)
                continue
            while policy == "oldest" and len(expected) > 1 and taken(expected) > limit:
                expected.pop(0)
                let_go += 1
            if taken(expected) > limit:
                refused += 1
                assert f"take {taken(expected):,} bytes, more than" in str(error)
                expected.pop()
            else:
                assert error is None
                assert maps.nbytes == taken(expected)
            assert sorted({fm.step for fm in maps.select()}) == expected
    assert let_go if policy == "oldest" else refused


def test_what_a_budget_costs_does_not_grow() -> None:
    """Each pass is counted once, however many are kept."""
    net = Net().eval()

    def looks() -> int:
        found = 0

        def look(frame: Any, event: str, _: Any) -> None:
            nonlocal found
            found += event in ("call", "c_call")

        sys.setprofile(look)
        try:
            net(image())
        finally:
            sys.setprofile(None)
        return found

    with torch.no_grad(), capture(net, keep="all", max_bytes=10**9):
        for _ in range(3):
            net(image())
        few = looks()
        for _ in range(20):
            net(image())
        # Twenty more passes; a collection of Python's may fall into either.
        assert looks() <= few + 15


def test_keep_0_holds_nothing() -> None:
    class Peak:
        """The bytes of maps that are alive while each is seen, by the storages' own count."""

        def __init__(self) -> None:
            self.seen: list[str] = []

        def update(self, fm: FeatureMap) -> None:
            self.seen.append(f"{fm.layer} {fm.kind}")

    net, peak = Net().eval(), Peak()
    with torch.no_grad(), capture(net, keep=0, analyses=peak) as maps:
        for step in range(3):
            net(image(step))
            assert maps.nbytes == 0
            assert len(maps) == 0
        with pytest.raises(MapReleasedError) as caught:
            maps["conv1"]
    assert str(caught.value) == (
        "maps['conv1'] was let go: keep=0 leaves each map to the analyses alone; "
        "capture(..., keep=1) keeps the latest pass"
    )
    one = [f"{x} {k}" for x in ("conv1", "conv2") for k in ("preactivation", "activation")]
    assert peak.seen == [*one, "fc preactivation"] * 3


# -- device= --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(models(), st.booleans())
def test_copies_that_are_late_are_right_all_the_same(drawn: Model, train: bool) -> None:
    """Whatever the model overwrites while a copy has yet to read it."""
    with late():
        _drawn(drawn, train, device="cpu")


@settings(max_examples=20, deadline=None)
@given(models())
def test_late_copies_in_a_dtype(drawn: Model) -> None:
    with late():
        _drawn(drawn, False, device="cpu", dtype=torch.float64)


def test_what_the_caller_writes_after_the_pass_waits_for_the_copy() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with late(0.01), torch.no_grad(), capture(net, device="cpu") as maps:
        for _ in range(5):
            out = net(torch.randn(3, 4))
            expected = out.clone()
            out.zero_()
            assert torch.equal(maps["2", "preactivation"].tensor, expected)


def test_buffers_are_not_used_again_while_a_map_is_on_its_way() -> None:
    net = Net().eval()
    with late(0.003) as device, torch.no_grad():
        with capture(net, device="cpu", keep=2) as maps, capture(net, keep=2) as plain:
            for step in range(8):
                net(image(step))
                if step % 3 == 2:
                    for one, other in zip(maps.select(), plain.select(), strict=True):
                        assert (one.layer, one.kind, one.step) == (
                            other.layer,
                            other.kind,
                            other.step,
                        )
                        assert torch.equal(one.tensor, other.tensor)
        assert device.copies == 8 * 5


def test_back_pressure() -> None:
    """No more than the limit is on its way: the model's stream waits, and for the oldest only."""
    device = Late(0.0)
    held = torch.ones(100)
    gate: list[Any] = []
    device._random.random = lambda: 0.0  # type: ignore[method-assign]
    offload = Offload(device, limit=1000)  # bytes; a copy has 400
    for _ in range(2):
        gate.append(offload.send(held, torch.empty(100)))
    assert device.waits == 0
    sent = 0
    for _ in range(10):
        offload.send(held, torch.empty(100))
        sent += 400
        assert offload._bytes <= 1000
    offload.settle()
    assert all(arrival.query() for arrival in gate)
    assert offload._bytes == 0
    device.stop()


def test_on_a_cpu_it_is_no_copy() -> None:
    net = Net().eval()
    copied = []
    for options in ({}, {"device": "cpu"}):
        with torch.no_grad(), capture(net, **options) as maps:
            for _ in range(3):
                net(image())
                copied.append(maps.bytes_copied)
                assert maps._session.wants.conversion.buffers.made == 0
    assert copied[:3] == copied[3:]


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": torch.int8},
            "dtype must be a floating-point torch.dtype such as torch.bfloat16, not torch.int8; "
            "maps of other types are stored as they are",
        ),
        (
            {"dtype": "half"},
            "dtype must be a floating-point torch.dtype such as torch.bfloat16, not 'half'; "
            "maps of other types are stored as they are",
        ),
        (
            {"dtype": torch.float16, "detach": False},
            "dtype= and device= store copies outside of the graph, and detach=False keeps maps in "
            "it; convert them in the loss instead",
        ),
        ({"max_bytes": 0}, "max_bytes must be a positive int (bytes), not 0"),
        ({"max_bytes": True}, "max_bytes must be a positive int (bytes), not True"),
        ({"when_full": "newest"}, "when_full must be 'error' or 'oldest', not 'newest'"),
        (
            {"keep": 0},
            "keep=0 lets go of each map at once, which takes analyses=... to see it before; "
            "keep must be a positive int or 'all' otherwise",
        ),
        (
            {"keep": 0, "max_bytes": 10, "analyses": Nothing()},
            "keep=0 lets go of each map at once, so there is nothing for max_bytes= to limit: give "
            "one of them",
        ),
        (
            {"layers": ["conv1", "fc"], "filters": {"conv1": 0, "conv2": 0}},
            "filters names layer 'conv2', which layers= does not ask for (it asks for conv1, fc)",
        ),
        ({"filters": {}}, "filters={} picks nothing; None, the default, means all"),
        (
            {"filters": 0, "kinds": "output"},
            "filters= picks from the maps of a layer, and what a module returns is held whole: "
            "kinds='output' leaves nothing to pick from",
        ),
        (
            {"analyses": [object]},
            "analyses must be objects with an update(fm: FeatureMap), such as "
            "fmapkit.analysis.Statistics(), not <class 'object'> (a class: make an instance first)",
        ),
        (
            {"when_full": "oldest"},
            "when_full='oldest' says what goes when max_bytes= is reached: give both",
        ),
        ({"device": "meta"}, "device='meta' has no memory: nothing would be held of any map"),
        (
            {"analyses": {"mine": 1}},
            "analyses must be objects with an update(fm: FeatureMap), such as "
            "fmapkit.analysis.Statistics(), not {'mine': 1}",
        ),
        (
            {"analyses": 3},
            "analyses must be objects with an update(fm: FeatureMap), such as "
            "fmapkit.analysis.Statistics(), not 3",
        ),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        capture(Net(), **options)
    assert str(caught.value) == message


def test_a_device_that_is_none() -> None:
    with pytest.raises(ArgumentError, match="device must name a torch device, not 'gpu'"):
        capture(Net(), device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ArgumentError, match="device='cuda': torch sees no CUDA device here"):
            capture(Net(), device="cuda")
