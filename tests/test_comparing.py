"""`compare`: two captures layer by layer, against NumPy in double precision, and by hand."""

from __future__ import annotations

import copy
import html.parser
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor, nn

import fmapkit
from fmapkit import (
    AmbiguousMapError,
    ArgumentError,
    FeatureMaps,
    FmapkitError,
    MapOverwrittenError,
    NoPassError,
    UnknownLayerError,
    capture,
    compare,
)
from fmapkit.comparing import Comparison, Difference
from tests.checks import Residual as Net
from tests.checks import needs_compiled
from tests.truth import seed


class Renamed(nn.Module):
    """The same with other names, a level deeper."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"first": net.conv1, "norm": net.bn1, "second": net.conv2})
        self.head = net.fc

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body["norm"](self.body["first"](x)))
        return self.head(F.relu(self.body["second"](x) + x).mean((2, 3)))


NAMES = {"conv1": "body.first", "conv2": "body.second", "fc": "head"}


@pytest.fixture
def net() -> Net:
    seed(0)
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 5, 5)


def run(model: nn.Module, *inputs: Tensor, **options: Any) -> FeatureMaps:
    with capture(model, **options) as maps, torch.no_grad():
        model(*inputs)
    return maps


class Given(nn.Module):
    """Returns what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def of_values(a: Any, b: Any, **options: Any) -> Difference:
    """The difference of two tensors, as the output of a model that gives them back."""
    maps = [run(Given(), torch.as_tensor(t), kinds="output") for t in (a, b)]
    (found,) = compare(*maps, **options)
    return found


# -- the figures ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(
    values=npst.arrays(
        np.float32,
        st.tuples(st.just(2), st.integers(1, 3), st.integers(1, 4)),
        elements=st.floats(-1e6, 1e6, width=32),
    )
)
def test_figures_against_numpy(values: np.ndarray[Any, Any]) -> None:
    a, b = values.astype(np.float64)
    found = of_values(values[0], values[1])
    size, error = np.linalg.norm(a), np.abs(a - b)
    assert found.absolute == error.max()
    assert found.equal == (not error.any())
    if error.any():
        expected = np.linalg.norm(a - b) / size if size else math.inf
        assert found.relative == pytest.approx(expected, rel=1e-12)
        both = size * np.linalg.norm(b)
        assert found.cosine == pytest.approx((a * b).sum() / both if both else 0.0, abs=1e-12)
    else:
        assert (found.relative, found.cosine) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("a", "b", "absolute", "relative", "cosine"),
    [
        # By hand: |3-4i| forms; ‖(0, 1)‖ / ‖(3, 4)‖ = 1/5; (3·3 + 4·5) / (5·√34).
        ([3.0, 4.0], [3.0, 5.0], 1.0, 0.2, 29 / (5 * math.sqrt(34))),
        ([0.0, 0.0], [0.0, 2.0], 2.0, math.inf, 0.0),
        ([0.0, 2.0], [0.0, 0.0], 2.0, 1.0, 0.0),
        ([1.0, 2.0], [-1.0, -2.0], 4.0, 2.0, -1.0),
        ([math.nan, 2.0], [math.nan, 2.0], 0.0, 0.0, 1.0),
        ([math.inf, 2.0], [math.inf, 2.0], 0.0, 0.0, 1.0),
        # What both have at a place where it is not finite is no error; the rest counts.
        ([math.inf, 4.0], [math.inf, 2.0], 2.0, 0.5, 1.0),
        ([math.nan, 2.0], [1.0, 2.0], math.inf, math.inf, math.nan),
        ([1.0, 2.0], [1.0, -math.inf], math.inf, math.inf, math.nan),
        ([math.inf, 2.0], [-math.inf, 2.0], math.inf, math.inf, math.nan),
        ([math.nan, 2.0], [math.inf, 2.0], math.inf, math.inf, math.nan),
        ([1e300, 0.0], [1e300, 1e290], 1e290, 1e-10, 1.0),  # whose squares overflow
        ([1e-300, 0.0], [1e-300, 1e-310], 1e-310, 1e-10, 1.0),  # whose squares vanish
        ([], [], 0.0, 0.0, 1.0),
    ],
)
def test_figures_by_hand(
    a: list[float], b: list[float], absolute: float, relative: float, cosine: float
) -> None:
    found = of_values(*(torch.tensor(v, dtype=torch.float64) for v in (a, b)))
    assert found.absolute == absolute
    assert found.relative == pytest.approx(relative, rel=1e-9)
    assert found.cosine == pytest.approx(cosine, rel=1e-12, nan_ok=True)
    assert found.departs == (absolute > 0)
    assert found.equal == (absolute == 0)


def test_complex_and_whole_numbers() -> None:
    found = of_values(torch.tensor([3 + 4j, 0]), torch.tensor([3 + 4j, 3j]))
    assert (found.absolute, found.relative) == (3.0, pytest.approx(3 / 5))
    found = of_values(torch.tensor([2**60, 1]), torch.tensor([2**60, 2]))
    assert found.absolute == 1.0
    assert found.departs  # of whole numbers no rounding is allowed for
    assert of_values(torch.tensor([True, False]), torch.tensor([True, True])).departs


def test_the_filter_in_which_the_error_is_greatest(net: Net, x: Tensor) -> None:
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.conv1.bias[1] += 0.01
        other.conv1.bias[3] += 1.0
    c = compare(run(net, x), run(other, x))
    assert c["conv1", "preactivation"].filter == 3
    assert c["fc"].filter in (0, 1)
    picked = compare(*(run(m, x, filters={"conv1": [1, 3]}) for m in (net, other)))
    assert picked["conv1", "preactivation"].filter == 3
    assert of_values(torch.zeros(3), torch.ones(3)).filter is None  # without a filter axis


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [
        # 16 roundings of half a unit in the last place: 8 · 2^-23, 8 · 2^-10, 8 · 2^-7.
        ((torch.float32, torch.float32), 8 * 2**-23),
        ((torch.float32, torch.float16), 8 * 2**-10),
        ((torch.bfloat16, torch.float32), 8 * 2**-7),
        ((torch.float64, torch.float64), 8 * 2**-52),
    ],
)
def test_the_tolerance_is_that_of_the_coarser_type(
    dtypes: tuple[torch.dtype, torch.dtype], tolerance: float
) -> None:
    one = torch.ones(4)
    found = of_values(one.to(dtypes[0]), one.to(dtypes[1]))
    assert found.tolerance == tolerance
    assert found.dtypes == dtypes
    assert of_values(one, one * 1.01, tolerance=0.02).departs is False
    assert of_values(one, one * 1.03, tolerance=0.02).departs


# -- where two runs part --------------------------------------------------------------------------


def test_the_same_twice(net: Net, x: Tensor) -> None:
    c = compare(run(net, x), run(net, x))
    assert c.equal
    assert c.first is None
    assert c.first_unequal is None
    assert len(c) == 5
    assert [(d.layer, d.kind) for d in c] == [
        ("conv1", "preactivation"),
        ("conv1", "activation"),
        ("conv2", "preactivation"),
        ("conv2", "activation"),
        ("fc", "preactivation"),
    ]


@pytest.mark.parametrize(
    ("part", "first"),
    [
        ("conv1.weight", ("conv1", "preactivation")),
        ("bn1.bias", ("conv1", "preactivation")),
        ("conv2.bias", ("conv2", "preactivation")),
        ("fc.weight", ("fc", "preactivation")),
    ],
)
def test_the_first_layer_that_departs(
    net: Net, x: Tensor, part: str, first: tuple[str, str]
) -> None:
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.get_parameter(part).add_(0.1)
    c = compare(run(net, x), run(other, x))
    assert c.first is c.first_unequal
    assert c.first is not None
    assert (c.first.layer, c.first.kind) == first
    every = [(d.layer, d.kind) for d in c]
    at = every.index(first)
    assert all(d.equal for d in list(c)[:at])
    assert not c.equal


def test_what_is_between_is_told_by_kind(net: Net, x: Tensor) -> None:
    """A norm that differs: the response is the same, the preactivation is not."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.bn1.weight.mul_(2)
    kinds = ("response", "preactivation")
    c = compare(run(net, x, kinds=kinds), run(other, x, kinds=kinds))
    assert c["conv1", "response"].equal
    assert c.first is c["conv1", "preactivation"]


def test_float32_and_bfloat16(net: Net, x: Tensor) -> None:
    half = copy.deepcopy(net).bfloat16()
    c = compare(run(net, x), run(half, x.bfloat16()))
    assert c.first is None
    assert not c.equal
    by_hand = net.bn1(net.conv1(x)).detach().double()
    other = half.bn1(half.conv1(x.bfloat16())).detach().double()
    d = c["conv1", "preactivation"]
    assert d.relative == pytest.approx(float((by_hand - other).norm() / by_hand.norm()), rel=1e-9)
    strict = compare(run(net, x), run(half, x.bfloat16()), tolerance=1e-6)
    assert strict.first is strict["conv1", "preactivation"]


@needs_compiled
def test_eager_and_compiled(net: Net, x: Tensor) -> None:
    compiled = torch.compile(copy.deepcopy(net), backend="eager")
    c = compare(run(net, x), run(compiled, x))
    assert len(c) == 5
    assert c.first is None


def test_before_and_after_a_refactor(net: Net, x: Tensor) -> None:
    before, after = run(net, x), run(Renamed(copy.deepcopy(net)), x)
    with pytest.raises(ArgumentError) as caught:
        compare(before, after)
    assert str(caught.value) == (
        "no map of the first ('conv1', 'conv2', 'fc') goes by the name of one of the second "
        "('body.first', 'body.second', 'head'): match='order' goes by order and shape, "
        "match={...} by a dict of names"
    )
    for match in ("order", NAMES, NAMES.__getitem__):
        c = compare(before, after, match=match)  # type: ignore[arg-type]
        assert c.equal
        assert [d.other for d in c if d.kind == "preactivation"] == list(NAMES.values())


def test_a_whole_part_is_renamed_by_one_name(x: Tensor) -> None:
    seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GELU())
    one = nn.ModuleDict({"encoder": body, "encoder2": nn.Conv2d(4, 2, 1)})
    two = nn.ModuleDict({"stages": nn.ModuleDict({"x": body}), "encoder2": one["encoder2"]})

    class Runs(nn.Module):
        def __init__(self, parts: nn.ModuleDict, encoder: Callable[[nn.ModuleDict], Any]) -> None:
            super().__init__()
            self.parts, self.encoder_of = parts, encoder

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["encoder2"](self.encoder_of(self.parts)(x))

    a = run(Runs(one, lambda parts: parts["encoder"]), x)
    b = run(Runs(two, lambda parts: parts["stages"]["x"]), x)
    c = compare(a, b, match={"parts.encoder": "parts.stages.x"})
    assert c.equal
    assert [(d.layer, d.other) for d in c if d.kind == "preactivation"] == [
        ("parts.encoder.0", "parts.stages.x.0"),
        ("parts.encoder.2", "parts.stages.x.2"),
        ("parts.encoder2", "parts.encoder2"),  # which only begins like the key
    ]


def test_the_root_as_a_name(net: Net, x: Tensor) -> None:
    whole = nn.Sequential(net)
    a, b = run(net, x, kinds="output"), run(whole, x, kinds="output")
    there = compare(a, b, match={"": "0"})
    assert there.equal is False  # the Sequential's own output has no counterpart
    assert there.only_b == (("", "output"),)
    assert there.first_unequal is None
    assert len(there) == len(a)
    back = compare(b, a, match={"0": ""})
    assert len(back) == len(a)
    assert back.first_unequal is None


@pytest.mark.parametrize(
    ("match", "text"),
    [
        (
            {"convv1": "body.first"},
            "match={'convv1': 'body.first'}: the first has no map of 'convv1'; did you mean "
            "'conv1' or 'conv2'? (its layers: 'conv1', 'conv2', 'fc')",
        ),
        (
            {"conv1": "body.frist"},
            "match={'conv1': 'body.frist'}: the second has no map of 'body.frist'; did you mean "
            "'body.first' or 'body.second'? (its layers: 'body.first', 'body.second', 'head')",
        ),
        (
            {"conv1": "body.first", "conv2": "body.first"},
            "match gives 'body.first' for 'conv1' and for 'conv2'",
        ),
        (
            "names",
            "match must be 'name', 'order', a dict of the first's names -> the second's, or a "
            "function of the first's names, not 'names'",
        ),
        (
            3,
            "match must be 'name', 'order', a dict of the first's names -> the second's, or a "
            "function of the first's names, not 3",
        ),
    ],
)
def test_mappings_that_cannot_be_meant(net: Net, x: Tensor, match: Any, text: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        compare(run(net, x), run(Renamed(net), x), match=match)
    assert str(caught.value) == text


def test_order_is_refused_where_it_would_be_a_guess(net: Net, x: Tensor) -> None:
    longer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    a, b = run(longer, x), run(longer[:3], x)
    with pytest.raises(ArgumentError) as caught:
        compare(a, b, match="order")
    assert str(caught.value) == (
        "match='order': there are 4 maps in the first and 3 in the second; the first goes on with "
        "the activation of '2' (2×4×5×5); compare some of the layers with layers=, or give a dict "
        "of names as match="
    )
    assert compare(a, b, match="order", layers="0").equal
    c = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())
    with pytest.raises(ArgumentError) as caught:
        compare(b, run(c, x), match="order")
    assert str(caught.value) == (
        "match='order': map 0 is the preactivation of '0' (2×4×5×5) in the first and the "
        "preactivation of '0' (2×5×5×5) in the second; compare some of the layers with layers=, or "
        "give a dict of names as match="
    )
    assert (caught.value.layer, caught.value.kind) == ("0", "preactivation")


def test_maps_that_only_one_has(net: Net, x: Tensor) -> None:
    a, b = run(net, x), run(net, x, kinds="activation")
    c = compare(a, b)
    assert [(d.layer, d.kind) for d in c] == [("conv1", "activation"), ("conv2", "activation")]
    assert c.only_a == tuple((n, "preactivation") for n in ("conv1", "conv2", "fc"))
    assert c.only_b == ()
    assert not c.equal
    assert "only in the first: conv1 preactivation, conv2 preactivation" in repr(c)
    assert compare(a, b, kind="activation").equal
    assert compare(b, a).only_b == c.only_a


def test_some_layers_some_kind_some_step(net: Net) -> None:
    def steps(scale: float) -> FeatureMaps:
        with capture(net, keep="all") as maps, torch.no_grad():
            for step in range(3):
                net(torch.full((1, 3, 4, 4), step * scale))
        return maps

    a, b = steps(1.0), steps(2.0)
    assert compare(a, b, step=0).equal
    assert not compare(a, b, step=1).equal
    assert compare(a, b, layers="conv*", kind="activation", step=0).equal
    assert len(compare(a, b, layers="conv*", kind="activation")) == 2
    with pytest.raises(NoPassError) as caught:
        compare(a, b, step=7)
    assert str(caught.value) == "the first of the two has no maps of step 7 to compare"
    assert caught.value.step == 7
    with pytest.raises(UnknownLayerError, match="layers='cnov' matches no layer"):
        compare(a, b, layers="cnov")


def test_layers_called_twice_and_nested_outputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            z = self.lin(x)
            return {"a": z.relu(), "b": self.lin(z.sigmoid())}  # two σ behind the first call

    seed(0)
    model, x = Twice(), torch.randn(2, 4)
    maps = [run(model, x, kinds=("preactivation", "activation", "output")) for _ in range(2)]
    c = compare(*maps)
    assert c.equal
    assert [(d.layer, d.kind, d.call, d.path, d.nonlinearity) for d in c] == [
        (fm.layer, fm.kind, fm.call, fm.path, fm.nonlinearity) for fm in maps[0]
    ]
    assert {d.path for d in c} >= {"['a']", "['b']"}
    with pytest.raises(AmbiguousMapError, match=re.escape("comparison['lin'] could mean 2")):
        c["lin"]


def test_gradients(net: Net, x: Tensor) -> None:
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.fc.weight[:, 1] *= 2  # the forward up to it is the same, the backward is not
    maps = []
    for model in (net, other):
        with capture(model, gradients=True) as one:
            model(x).sum().backward()
        maps.append(one)
    assert [d.layer for d in compare(*maps) if d.departs] == ["fc"]
    c = compare(*maps, gradients=True)
    assert c["fc"].equal
    d = c["conv2"]
    a, b = (m["conv2"].grad.double() for m in maps)
    assert d.relative == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-9)
    assert d.filter == 1
    assert "5 gradients" in repr(c)
    with pytest.raises(ArgumentError, match="has no gradient: capture"):
        compare(run(net, x), run(net, x), gradients=True)


def test_maps_of_a_file(net: Net, x: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    maps = run(net, x)
    maps.save(tmp_path / "before.safetensors")
    kept = FeatureMaps.load(tmp_path / "before.safetensors")
    assert compare(kept, maps).equal
    assert compare(kept, run(net, x + 1)).first is not None


def test_sparse_and_quantized_and_channels_last(net: Net, x: Tensor) -> None:
    assert of_values(torch.eye(3).to_sparse(), torch.eye(3)).equal
    quantized = torch.quantize_per_tensor(torch.tensor([0.0, 0.26]), 0.25, 0, torch.qint8)
    assert of_values(torch.tensor([0.0, 0.25]), quantized).equal
    near = of_values(torch.tensor([0.0, 0.26]), quantized)
    assert near.tolerance == 0.0625  # its rounding is that of 8 bits, and not of float32
    assert not near.departs
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    c = compare(run(net, x), run(last, x.to(memory_format=torch.channels_last)))
    assert c.first is None


# -- what does not fit ----------------------------------------------------------------------------


def test_another_batch(net: Net, x: Tensor) -> None:
    with pytest.raises(ArgumentError) as caught:
        compare(run(net, x), run(net, x[:1]))
    assert str(caught.value) == (
        "the preactivation of 'conv1' has shape (2, 4, 5, 5) in the first and (1, 4, 5, 5) in the "
        "second: give both models the same input, and hold the same filters"
    )
    assert (caught.value.layer, caught.value.kind) == ("conv1", "preactivation")


def test_inputs_of_other_numbers(net: Net, x: Tensor) -> None:
    maps = []
    for numbers in ([3, 4], [4, 3], [3, 4]):
        with capture(net) as one, torch.no_grad():
            one.batch(numbers)
            net(x)
        maps.append(one)
    assert compare(maps[0], maps[2]).equal
    with pytest.raises(ArgumentError) as caught:
        compare(maps[0], maps[1])
    assert str(caught.value) == (
        "the preactivation of 'conv1' is of other inputs in the second, by the numbers that "
        "maps.batch gave: give both models the same input; step= says which pass of each"
    )


def test_other_filters(net: Net, x: Tensor) -> None:
    maps = [run(net, x, filters={"conv1": f}) for f in ([0, 1], [0, 2])]
    with pytest.raises(
        ArgumentError, match=re.escape("has filters (0, 1) in the first and (0, 2)")
    ):
        compare(*maps)


def test_no_pass(net: Net, x: Tensor) -> None:
    some = run(net, x)
    with capture(net) as none:
        for pair in ((none, some), (some, none)):
            which = "first" if pair[0] is none else "second"
            with pytest.raises(NoPassError) as caught:
                compare(*pair)
            assert str(caught.value) == f"the {which} of the two has no maps to compare"
        net(x)


def test_a_map_that_was_overwritten(net: Net, x: Tensor) -> None:
    with capture(net) as maps, torch.no_grad():
        net(x).add_(1)
    with pytest.raises(MapOverwrittenError):
        compare(maps, run(net, x))


@pytest.mark.parametrize("tolerance", [-1, "1e-3", math.nan, True])
def test_tolerances(net: Net, x: Tensor, tolerance: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        compare(run(net, x), run(net, x), tolerance=tolerance)
    assert str(caught.value) == (
        f"tolerance must be a number of at least 0, or None, not {tolerance!r}"
    )


@pytest.mark.parametrize("kind", ["activaton", 3])
def test_kinds(net: Net, x: Tensor, kind: Any) -> None:
    with pytest.raises(ArgumentError, match="unknown kind"):
        compare(run(net, x), run(net, x), kind=kind)


# -- to look at -----------------------------------------------------------------------------------


@pytest.fixture
def parted(net: Net, x: Tensor) -> Comparison:
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.conv2.bias[2] += 1
    return compare(run(net, x), run(other, x))


def test_the_table(net: Net) -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    for lin, value in ((one, 1.0), (two, 1.5)):
        nn.init.eye_(lin.weight)
        nn.init.constant_(lin.bias, value)
    # z = (3, 4) and (3.5, 4.5): |d| = 0.5, ‖d‖ / ‖z‖ = √0.5 / 5, cosine 28.5 / (5·√32.5)
    x = torch.tensor([[2.0, 3.0]])
    models = [nn.Sequential(nn.Linear(2, 2), lin) for lin in (one, two)]
    for model in models:
        nn.init.eye_(model[0].weight)
        nn.init.zeros_(model[0].bias)
    c = compare(*(run(model, x) for model in models))
    assert repr(c) == (
        "layer  kind           shape  dtype    absolute  relative    cosine  filter\n"
        "─────  ─────────────  ─────  ───────  ────────  ────────  ────────  ──────  ─────\n"
        "0      preactivation  1×2    float32         0         0  1.000000\n"
        "1      preactivation  1×2    float32       0.5      0.14  0.999846       0  first\n"
        "Comparison: 2 maps; the first beyond the tolerance is the preactivation of '1': relative "
        "error 0.14, tolerance 9.5e-07"
    )
    within = compare(*(run(model, x) for model in models), tolerance=0.2)
    assert repr(within).split("\n")[-1] == (
        "Comparison: 2 maps; all within the tolerance; the first that differs is the preactivation "
        "of '1'"
    )
    same = compare(run(models[0], x), run(models[0], x))
    assert repr(same).split("\n")[-1] == "Comparison: 2 maps; every value is the same"


class Cells(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_html_says_what_the_table_says(parted: Comparison, tmp_path: Path) -> None:
    parser = Cells()
    parser.feed(parted._repr_html_())
    rows = repr(parted).split("\n")
    assert parser.cells[0] == rows[-1]
    assert parser.cells[1:9] == rows[0].split()
    assert parser.cells[9:] == [c for row in rows[2:-1] for c in row.split()]
    page = parted.to_html(tmp_path / "c.html").read_text(encoding="utf-8")
    assert parted._repr_html_() in page
    assert page.startswith("<!doctype html>")


def test_layer_names_are_escaped_in_html() -> None:
    model = nn.ModuleDict({"<b>": nn.Linear(2, 2)})
    model.forward = lambda x: model["<b>"](x)  # type: ignore[method-assign]
    maps = run(model, torch.randn(1, 2))
    assert "&lt;b&gt;" in compare(maps, maps)._repr_html_()
    assert "<b>" not in compare(maps, maps)._repr_html_()


def test_look_ups(parted: Comparison) -> None:
    assert parted["conv2"].kind == "activation"
    assert parted["fc"].kind == "preactivation"
    assert parted["conv2", "preactivation"] is parted.first
    with pytest.raises(UnknownLayerError) as caught:
        parted["conv3"]
    assert str(caught.value) == (
        "no map of layer 'conv3' was compared; did you mean 'conv2' or 'conv1'? "
        "(compared: 'conv1', 'conv2', 'fc')"
    )
    assert caught.value.candidates == ("conv2", "conv1")
    assert isinstance(caught.value, FmapkitError)
    assert bool(parted)


def test_the_picture(parted: Comparison, net: Net, x: Tensor) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = parted.plot(title="two runs")
    (ax,) = figure.axes
    assert ax.get_yscale() == "log"
    by_label = {line.get_label(): line for line in ax.get_lines()}
    z = by_label["preactivation"]
    assert list(z.get_xdata()) == [0, 2, 4]
    drawn = dict(zip(z.get_xdata(), z.get_ydata(), strict=True))
    assert drawn[2] == parted["conv2", "preactivation"].relative
    assert drawn[0] < parted["conv1", "preactivation"].tolerance  # 0 lies on the floor
    assert [t.get_text() for t in ax.get_xticklabels()] == ["conv1", "conv2", "fc"]
    assert "first beyond: conv2, preactivation" in [t.get_text() for t in ax.texts]
    assert ax.get_title() == "two runs"
    figure.canvas.draw()
    _, mine = plt.subplots()
    assert compare(run(net, x), run(net, x)).plot(mine) is mine.figure
    same = run(net, torch.full_like(x, math.nan))
    assert compare(run(net, x), same).plot() is not None  # infinite errors
    plt.close("all")
    with pytest.raises(ArgumentError, match="nothing to plot"):
        Comparison((), (), ()).plot()


def test_it_is_exported() -> None:
    assert "compare" in fmapkit.__all__


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cpu_and_gpu(net: Net, x: Tensor) -> None:
    c = compare(run(net, x), run(copy.deepcopy(net).cuda(), x.cuda()), tolerance=1e-3)
    assert c.first is None
