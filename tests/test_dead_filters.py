"""Dead filters, against a count by hand and against a loop over what each input did."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fmapkit import (
    AmbiguousMapError,
    ArgumentError,
    CaptureWarning,
    FeatureMap,
    MapLookupError,
    NoPassError,
    UnknownLayerError,
    capture,
)
from fmapkit.analysis import Analysis, DeadFilters, LayerFirings
from fmapkit.analysis import dead as dead_module
from fmapkit.analysis.dead import SPANS
from tests.test_statistics import NoWaiting, as_on_a_device, feed, fmap, pickled, through_file


def relu(*rows: list[float], step: int = 0, **tags: Any) -> FeatureMap:
    """A map of a linear layer, an input a row."""
    return fmap(torch.tensor(rows), nonlinearity="relu", step=step, layer="fc", **tags)


# -- what is counted, by hand -------------------------------------------------------------------


def test_since_when_and_revivals() -> None:
    """Three filters, two inputs a pass, dead after 4 inputs.

    inputs      0 1 | 2 3 | 4 5 | 6 7 | 8 9
    filter 0    1 0 | 0 1 | 0 0 | 0 0 | 0 0   last in the pass that ends at input 4: dead at 8
    filter 1    0 0 | 0 0 | 0 0 | 0 5 | 0 0   silent for 6 inputs, back at 8: one revival
    filter 2    0 0 | 0 0 | 0 0 | 0 0 | 0 0   never: dead at 4
    """
    passes = [
        ([1.0, 0, 0], [0.0, 0, 0]),
        ([0.0, 0, 0], [1.0, 0, 0]),
        ([0.0, 0, 0], [0.0, 0, 0]),
        ([0.0, 0, 0], [0.0, 5, 0]),
        ([0.0, 0, 0], [0.0, 0, 0]),
    ]
    dead = DeadFilters(after=4)
    expected = [[], [1, 2], [1, 2], [0, 2], [0, 2]]
    for step, (values, filters) in enumerate(zip(passes, expected, strict=True)):
        dead.update(relu(*values, step=step))
        assert dead["fc"].dead_filters == filters, step
    s = dead["fc"]
    assert s.inputs.tolist() == [10, 10, 10]
    assert s.last_input.tolist() == [4, 8, 0]
    assert s.last_step.tolist() == [1, 3, -1]
    assert s.revivals.tolist() == [0, 1, 0]
    assert s.never.tolist() == [False, False, True]
    assert s.dead.tolist() == [True, False, True]
    assert s.rule == "zeros"
    assert dead.report().splitlines() == [
        "layer  σ     by     inputs  filters  dead  share  never fired  since input  since step  "
        "revivals",
        "─────  ────  ─────  ──────  ───────  ────  ─────  ───────────  ───────────  ──────────  "
        "────────",
        "fc     relu  zeros      10        3     2  66.7%            1    the start           –  "
        "       1",
        "DeadFilters: 2 of 3 filters silent over 4 inputs",
    ]
    assert repr(dead) == dead.report()
    assert repr(s).splitlines() == [
        "filter  since input  since step  revivals",
        "──────  ───────────  ──────────  ────────",
        "     0            4           1         0",
        "     2    the start           –         0",
        "LayerFirings: 'fc', 2 of 3 filters dead after 10 inputs (by zeros)",
    ]


@pytest.mark.parametrize(
    ("shape", "dim", "inputs"),
    [((5, 3), 1, 5), ((5, 3, 4, 4), 1, 5), ((3, 4, 4), 0, 1), ((3,), 0, 1), ((5, 7, 3), -1, 5)],
)
def test_what_an_input_is(shape: tuple[int, ...], dim: int, inputs: int) -> None:
    x = torch.zeros(shape)
    x.select(dim, 1)[(-1,) * (len(shape) - 1)] = 1
    dead = DeadFilters(after=1)
    dead.update(fmap(x, dim, nonlinearity="relu"))
    assert dead["conv"].inputs.tolist() == [inputs] * 3
    assert dead["conv"].dead_filters == [0, 2]
    dead.update(fmap(x[:0] if dim else torch.zeros(3, 0), dim, nonlinearity="relu"))
    assert dead["conv"].inputs.tolist() == [inputs] * 3


def test_a_map_without_a_filter_axis() -> None:
    dead = DeadFilters(after=2)
    dead.update(fmap(torch.zeros(2, 3), None))
    assert dead["conv"].filters is None
    assert dead["conv"].dead_filters == [0]
    assert "conv" in dead
    assert len(dead["conv"]) == 1


@st.composite
def hook_points(draw: st.DrawFn) -> list[np.ndarray[Any, Any]]:
    """Batches (inputs, 3) of whether a filter fires; often it does not for long."""
    sizes = draw(st.lists(st.sampled_from([1, 1, 2, 7, 40, 150]), min_size=1, max_size=12))
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    chances = draw(st.lists(st.sampled_from([0.0, 0.01, 0.2, 1.0]), min_size=3, max_size=3))
    awake = [[draw(st.booleans()) for _ in range(3)] for _ in sizes]
    return [
        (generator.random((n, 3)) < chances) & np.array(a)
        for n, a in zip(sizes, awake, strict=True)
    ]


@given(hook_points(), st.integers(1, 60))
def test_against_a_loop(batches: list[np.ndarray[Any, Any]], after: int) -> None:
    dead = DeadFilters(after=after)
    seen, last, steps, revivals = 0, [0] * 3, [-1] * 3, [0] * 3
    ranges = []
    for step, batch in enumerate(batches):
        dead.update(fmap(torch.from_numpy(batch).float(), nonlinearity="relu", step=step))
        fired = batch.any(0)
        for k in range(3):
            if fired[k]:
                revivals[k] += seen - last[k] >= after
                last[k], steps[k] = seen + len(batch), step
        ranges.append((seen, seen + len(batch), fired))
        seen += len(batch)
        s = dead["conv"]
        assert s.dead_filters == [k for k in range(3) if seen - last[k] >= after]
    assert s.last_input.tolist() == last
    assert s.last_step.tolist() == steps
    assert s.revivals.tolist() == revivals
    assert s.history.shape == (SPANS, 3)
    assert seen <= SPANS * s.span < 2 * max(seen, SPANS)
    for n in range(SPANS):
        begin, end = n * s.span, (n + 1) * s.span
        expected = np.zeros(3, bool)
        for first, past, fired in ranges:
            if first < end and past > begin:
                expected |= fired
        assert s.history[n].tolist() == expected.tolist(), n


# -- what fires ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("sigma", "silent", "loud", "rule"),
    [
        ("relu", [0.0, -0.0], [0.0, 1e-30], "zeros"),
        ("relu6", [0.0, 0.0], [6.0, 6.0], "zeros"),
        ("softshrink", [0.0, 0.0], [0.0, -1.0], "zeros"),
        ("gelu", [0.0, 0.0], [-1e-3, 0.0], "zeros"),
        ("unheard_of", [0.0, 0.0], [1.0, 0.0], "zeros"),
        (None, [0.0, 0.0], [1.0, 0.0], "zeros"),
        ("sigmoid", [1.0, 0.0], [1.0, 0.5], "saturation"),
        ("tanh", [1.0, -0.99], [1.0, 0.0], "saturation"),
        ("hardsigmoid", [0.0, 1.0], [0.0, 0.5], "saturation"),
        ("relu", [0.0, 0.0], [float("nan"), 0.0], "zeros"),
        ("tanh", [1.0, 1.0], [float("nan"), 1.0], "saturation"),
        ("relu", [0.0, 0.0], [float("inf"), 0.0], "zeros"),
    ],
)
def test_what_fires(
    sigma: str | None, silent: list[float], loud: list[float], rule: str, dtype: torch.dtype
) -> None:
    x = torch.tensor([silent, loud], dtype=torch.float64).T.to(dtype)
    for shaped in (x, x.T.reshape(1, 2, 2), x.reshape(2, 2, 1)):
        dead = DeadFilters(after=1)
        dead.update(fmap(shaped, nonlinearity=sigma))
        assert dead["conv"].dead_filters == [0]
        assert dead["conv"].rule == rule


def test_threshold_and_bounds_of_your_own() -> None:
    x = torch.tensor([[0.05, -0.05, 0.2, -0.2]])
    dead = DeadFilters(after=1, threshold=0.1)
    dead.update(fmap(x, nonlinearity="gelu"))
    assert dead["conv"].dead_filters == [0, 1]
    dead = DeadFilters(after=1, saturation={"hardtanh": (-0.1, 0.1)})
    dead.update(fmap(x, nonlinearity="hardtanh"))
    assert dead["conv"].dead_filters == [2, 3]
    assert dead["conv"].rule == "saturation"


def test_other_kinds_are_passed_over() -> None:
    dead = DeadFilters()
    for kind in ("input", "response", "preactivation", "output"):
        dead.update(fmap(torch.ones(2, 3), kind=kind))
    assert len(dead) == 0
    assert repr(dead) == "DeadFilters: no activation seen yet"


# -- in a capture -------------------------------------------------------------------------------


def test_a_filter_that_dies_and_comes_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3))
    bias = model[0].bias
    assert isinstance(bias, Tensor)
    dead = DeadFilters(after=10)
    with capture(model) as maps, torch.no_grad():
        for step in range(12):
            before = bias[2].clone()
            if 3 <= step < 9:
                bias[2] = -1e6
            model(torch.randn(3, 1, 6, 6))
            bias[2] = before
            for fm in maps:
                dead.update(fm)
            assert dead["0"].dead_filters == ([2] if 6 <= step < 9 else []), step
    s = dead["0"]
    assert s.revivals.tolist() == [0, 0, 1, 0]
    assert s.inputs.tolist() == [36] * 4
    assert s.last_step.tolist() == [11] * 4
    # Inputs 9 to 26 went through while it was silent.
    assert s.span == 1
    assert s.history[:36, 2].tolist() == [not 9 <= n < 27 for n in range(36)]
    assert dead.layers == ["0"]
    assert "3" not in dead


def test_picked_filters_and_parts() -> None:
    dead = DeadFilters(after=1)
    x = torch.tensor([[1.0, 0, 0, 1, 0]])
    dead.update(fmap(x[:, 2:], filters=(7, 8, 9)))
    dead.update(fmap(x[:, :2], filters=(1, 4)))
    s = dead["conv"]
    assert s.filters == (1, 4, 7, 8, 9)
    assert s.dead_filters == [4, 7, 9]
    with pytest.warns(CaptureWarning, match=re.escape("dead.reset() begins anew")):
        dead.update(fmap(x))
    assert list(dead.missed) == [("conv", "activation")]
    dead.reset()
    dead.update(fmap(x))
    assert dead["conv"].dead_filters == [1, 2, 4]


# -- no waiting, nothing kept -------------------------------------------------------------------


def test_update_waits_for_nothing() -> None:
    dead = DeadFilters(after=1)
    with as_on_a_device(), NoWaiting():
        feed(dead)
        _ = [s.dead for s in dead]
    assert dead.layers == ["relu", "sigmoid", "gelu", "half"]


@given(
    st.sampled_from([(1, 4, 900), (50, 4, 3), (300, 4, 1), (7, 1, 40)]),
    st.integers(1, 200),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.integers(0, 2**16),
)
def test_the_only_value_that_fires_is_found(
    shape: tuple[int, int, int], first: int, threshold: float, dtype: torch.dtype, seed: int
) -> None:
    """Wherever it is; filters that have fired are looked at no further."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator) * threshold / 2 - threshold / 4
    fires = torch.rand(shape[1], generator=generator) < 0.6
    where = torch.randint(shape[0] * shape[2], (shape[1],), generator=generator)
    for n, (fired, at) in enumerate(zip(fires.tolist(), where.tolist(), strict=True)):
        value = (1.0, -1.0, torch.nan)[int(at) % 3 if dtype != torch.int64 else int(at) % 2]
        if fired:
            x[at // shape[2], n, at % shape[2]] = value
    x = x.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dead_module, "_FIRST", first)
        patch.setattr(dead_module, "_BLOCK", 4 * first)
        dead = DeadFilters(after=1, threshold=threshold)
        dead.update(fmap(x))
    assert dead["conv"].dead_filters == [n for n, f in enumerate(fires.tolist()) if not f]
    with as_on_a_device():
        dead.update(fmap(x))
    assert dead["conv"].dead_filters == [n for n, f in enumerate(fires.tolist()) if not f]


def test_a_map_whose_filters_fire_is_not_read_to_its_end() -> None:
    looked = []
    quiet = dead_module._quiet

    def counted(values: Tensor, *others: Any) -> Tensor:
        looked.append(values.numel())
        return quiet(values, *others)

    x = torch.ones(64, 8, 32, 32)
    x[:, 3] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dead_module, "_quiet", counted)
        dead = DeadFilters(after=1)
        dead.update(fmap(x))
    assert dead["conv"].dead_filters == [3]
    assert sum(looked) < x.numel() // 4
    assert max(looked) <= 2**17  # nor is more copied at a time


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_is_not_waited_for() -> None:
    x = torch.tensor([[0.0, 1.0]], device="cuda").repeat(300, 1)
    dead = DeadFilters(after=500)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            dead.update(fmap(x, nonlinearity="relu"))
        s = dead["conv"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert s.dead_filters == [0]


def test_memory_is_fixed_and_no_map_is_kept() -> None:
    dead, sizes = DeadFilters(), set()
    x = torch.ones(8, 3, 4, 4)
    for _ in range(300):
        dead.update(fmap(x, nonlinearity="relu"))
        (group,) = dead.state_dict()["groups"]
        sizes.add(tuple(t.nbytes for t in group["tensors"].values()))
    assert len(sizes) == 1
    x.zero_()
    assert dead["conv"].last_input.tolist() == [2400] * 3


def test_in_inference_mode_and_out_of_it() -> None:
    dead = DeadFilters(after=4)
    for mode in (torch.inference_mode, torch.enable_grad, torch.inference_mode):
        with mode():
            dead.update(fmap(torch.tensor([[0.0, 1.0]] * 2), nonlinearity="relu"))
    assert dead["conv"].dead_filters == [0]


# -- look-ups, words, copies --------------------------------------------------------------------


def test_lookups() -> None:
    dead = DeadFilters()
    assert dead
    assert isinstance(dead, Analysis)
    with pytest.raises(NoPassError, match=re.escape("analyses=[dead]")):
        dead["fc"]
    dead.update(relu([1.0, 0.0]))
    dead.update(fmap(torch.ones(1, 2), layer="fc", nonlinearity="tanh"))
    with pytest.raises(AmbiguousMapError, match=re.escape("dead.select(layer='fc'")):
        dead["fc"]
    with pytest.raises(UnknownLayerError, match="no layer 'cf'; did you mean 'fc'"):
        dead["cf"]
    (s,) = dead.select("f*", nonlinearity="tanh")
    assert isinstance(s, LayerFirings)
    assert s.nonlinearity == "tanh"
    assert [s.nonlinearity for s in dead] == ["relu", "tanh"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"after": 0}, "after must be a positive int, not 0"),
        ({"after": 1.5}, "not 1.5"),
        ({"after": True}, "not True"),
        ({"threshold": -1}, "at least 0, not -1"),
        ({"threshold": float("nan")}, "not nan"),
        ({"saturation": {"tanh": None}}, "(low, high)"),
    ],
)
def test_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(says)):
        DeadFilters(**options)


@pytest.mark.parametrize(
    "again", [lambda d: through_file(d, DeadFilters(after=5)), copy.deepcopy, pickled]
)
def test_resumed_is_the_same(again: Callable[[DeadFilters], DeadFilters]) -> None:
    whole, first = DeadFilters(after=5), DeadFilters(after=5)
    for n in range(60):
        fm = relu([float(n % 7 == 0), float(n == 3), 0.0], [0.0, 0.0, 0.0], [0.0] * 3, step=n)
        whole.update(fm)
        if n in (20, 50):
            left, first = first, again(first)
            first.update(fm)
            left.update(relu([1.0, 1.0, 1.0]))  # does not touch the other
        else:
            first.update(fm)
    (a,), (b,) = (d.state_dict()["groups"] for d in (whole, first))
    assert a["span"] == b["span"] == 2
    assert all(torch.equal(a["tensors"][key], b["tensors"][key]) for key in a["tensors"])
    assert first.report() == whole.report()
    # Filter 0 last fired in pass 56, and 9 inputs came after it.
    assert first["fc"].dead_filters == [0, 1, 2]
    assert first["fc"].last_input.tolist() == [3 * 57, 3 * 4, 0]


def test_states_that_do_not_fit() -> None:
    dead = DeadFilters(after=5)
    with pytest.raises(ArgumentError, match=r"what DeadFilters\.state_dict\(\) gave"):
        dead.load_state_dict({})
    with pytest.raises(ArgumentError, match="made with after=6, this has 5"):
        dead.load_state_dict(DeadFilters(after=6).state_dict())


# -- the picture --------------------------------------------------------------------------------


def test_the_picture() -> None:
    """Each filter's states by hand: 0 fired, 1 silent, 2 dead, an input a column."""
    plt = pytest.importorskip("matplotlib.pyplot")
    from fmapkit.analysis.drawn import states

    dead = DeadFilters(after=2)
    for n in range(6):
        dead.update(relu([float(n < 5), float(n < 3), 0.0]))
    expected = [[0, 0, 0, 0, 0, 1], [0, 0, 0, 2, 2, 2], [2, 2, 2, 2, 2, 2]]
    assert states(dead["fc"]).tolist() == expected
    dead.update(fmap(torch.ones(6, 200), layer="wide", nonlinearity="gelu"))
    figure = dead.plot(title="all of them", max_filters=20)
    strip, wide, below = figure.axes
    words = [t.get_text() for t in below.get_legend().get_texts()]
    assert words == ["fired", "silent", "silent until now, and dead"]
    # The longest silent on top: 2, 1, 0.
    (image,) = strip.get_images()
    np.testing.assert_array_equal(image.get_array(), np.array(expected)[::-1])
    assert [t.get_text() for t in strip.get_yticklabels()] == ["2", "1", "0"]
    assert strip.get_title(loc="left") == "fc · relu · 2 of 3 filters dead (67%, by zeros)"
    assert "20 drawn" in wide.get_title(loc="left")
    figure.draw_without_rendering()
    figure = dead.plot("f*", max_layers=1)
    assert len(figure.axes) == 2
    note = "1 more layers are not drawn; choose with layers=… or raise max_layers"
    assert [t.get_text() for t in dead.plot(max_layers=1).texts] == [note]
    plt.close("all")


def test_pictures_that_cannot_be_drawn() -> None:
    pytest.importorskip("matplotlib")
    dead = DeadFilters()
    with pytest.raises(NoPassError, match="no activation has been seen yet"):
        dead.plot()
    dead.update(relu([1.0]))
    with pytest.raises(MapLookupError, match="nothing to plot: 'conv' is none of 'fc'"):
        dead.plot("conv")
    with pytest.raises(ArgumentError, match="max_filters must be a positive int, not 0"):
        dead.plot(max_filters=0)
