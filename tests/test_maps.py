"""What the user reads: kinds, filters, keep, every, selection, views, tables, pictures."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import re
import sys
from collections import namedtuple
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fmapkit.maps
from fmapkit import AmbiguousMapError, FeatureMap, NoPassError, capture
from tests.checks import images

KINDS = ("input", "response", "preactivation", "activation", "output")


class Net(nn.Module):
    """conv-norm-relu_, a residual sum, a linear head: every relation between the kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(y)
        out += y
        return self.head(self.relu(out).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def steps(n: int = 3) -> list[Tensor]:
    return [x for (x,) in images(2, 3, 6, 6, n=n)]


def by_hand(model: Net, x: Tensor) -> dict[tuple[str, str], Tensor]:
    """Every map, out of place, from the definition in DESIGN section 1."""
    m = copy.deepcopy(model)
    with torch.no_grad():
        r1 = m.conv1(x)
        z1 = m.bn1(r1)
        a1 = F.relu(z1)
        r2 = m.conv2(a1)
        z2 = r2 + a1
        a2 = F.relu(z2)
        x3 = a2.mean((2, 3))
        z3 = m.head(x3)
    return {
        ("conv1", "input"): x,
        ("conv1", "response"): r1,
        ("conv1", "preactivation"): z1,
        ("conv1", "activation"): a1,
        ("conv2", "input"): a1,
        ("conv2", "response"): r2,
        ("conv2", "preactivation"): z2,
        ("conv2", "activation"): a2,
        ("head", "input"): x3,
        ("head", "response"): z3,
        ("head", "preactivation"): z3,  # no σ follows: the preactivation is the response
    }


# -- kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_all_kinds(training: bool, grad: bool) -> None:
    model = net().train(training)
    with capture(model, kinds=KINDS) as maps, torch.set_grad_enabled(grad):
        for step, x in enumerate(steps()):
            want = by_hand(model, x)
            out = model(x)
            for (layer, kind), value in want.items():
                fm = maps[layer, kind]
                assert torch.equal(fm.tensor, value), (layer, kind)
                assert (fm.layer, fm.kind, fm.call, fm.step) == (layer, kind, 0, step)
                assert not fm.tensor.requires_grad
                sigma = "relu" if layer != "head" and kind in KINDS[2:4] else None
                assert fm.nonlinearity == sigma
            got = {(fm.layer, fm.kind) for fm in maps if fm.kind != "output"}
            assert got == set(want)
            assert torch.equal(maps["", "output"].tensor, out)
            # One name, several maps: relu runs twice, so its output is asked for by call.
            outputs = maps.select(layer="relu", kind="output", step=-1)
            assert [fm.call for fm in outputs] == [0, 1]
            assert torch.equal(outputs[0].tensor, want["conv1", "activation"])


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_alone(kind: str) -> None:
    model = net()
    with capture(model, kinds=kind) as maps:
        for x in steps():
            want = by_hand(model, x)
            model(x)
            assert {fm.kind for fm in maps} == {kind}
            for (layer, k), value in want.items():
                if k == kind:
                    assert torch.equal(maps[layer, k].tensor, value)


def test_response_is_the_preactivation_where_nothing_is_between() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    with capture(model, kinds=KINDS[:4]) as maps:
        for (x,) in images(2, 4):
            model(x)
            for layer in ("0", "2"):
                response, z = maps[layer, "response"], maps[layer, "preactivation"]
                assert response.tensor.data_ptr() == z.tensor.data_ptr()
            assert maps["2", "input"].tensor.data_ptr() == maps["0"].tensor.data_ptr()
            # x, z (= response), a (= the next input), and the logits: 8 + 10 + 10 + 4 floats.
            assert maps.nbytes == 4 * (8 + 10 + 10 + 4)
            assert maps.bytes_copied == 0


def test_maps_are_the_models_own_memory() -> None:
    # Out of place, nothing is copied: what the model returned is what is held.
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    with capture(model) as maps, torch.no_grad():
        for (x,) in images(2, 4):
            out = model(x)
            assert maps["0"].tensor.data_ptr() == out.data_ptr()
            assert maps.bytes_copied == 0


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_a_dropout_in_place_writes_in_training_alone(kind: Any, training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), kind(0.5, inplace=True))
    model.train(training)
    x = torch.randn(3, 4)
    with torch.no_grad(), capture(model) as maps:
        for _ in range(4):
            out = model(x)
            a = maps["0", "activation"].tensor
            assert (a.data_ptr() == out.data_ptr()) is not training  # no copy where none is needed
            torch.testing.assert_close(a, F.relu(F.linear(x, model[0].weight, model[0].bias)))


def test_copies_only_where_the_model_overwrites() -> None:
    # conv-norm-relu_ runs out of place while captured: no copy. The residual sum overwrites conv2's
    # response, which was not asked for.
    model = net().eval()
    with capture(model) as maps, torch.no_grad():
        for n, x in enumerate(steps()):
            model(x)
            if n:
                assert maps.bytes_copied == 0
    with capture(model, kinds="response") as maps, torch.no_grad():
        for x in steps():
            want = by_hand(model, x)["conv2", "response"]
            model(x)
            assert torch.equal(maps["conv2", "response"].tensor, want)
            assert maps["conv2", "response"].nbytes == want.numel() * 4 <= maps.bytes_copied


# -- which layers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("conv1", ["conv1"]),
        ("conv*", ["conv1", "conv2"]),
        (re.compile("2$"), ["conv2"]),
        (nn.Conv2d, ["conv1", "conv2"]),
        (lambda name: name.startswith("conv"), ["conv1", "conv2"]),
        (lambda name, module: isinstance(module, nn.Linear), ["head"]),
        (["conv2", nn.Linear], ["conv2", "head"]),
        ("*", ["conv1", "conv2", "head"]),
        ((re.compile("1"),), ["conv1"]),
    ],
)
def test_selecting_layers(given: Any, names: list[str]) -> None:
    model = net()
    with capture(model, layers=given, kinds=KINDS[1:4]) as some, capture(model) as all_:
        for x in steps():
            model(x)
            assert some.layers == names
            assert list(dict.fromkeys(fm.layer for fm in all_.select(given))) == names
            for fm in some.select(kind="activation"):
                assert torch.equal(fm.tensor, all_[fm.layer].tensor)


def test_selecting_a_module_itself() -> None:
    model = net()
    with capture(model, layers=model.conv2) as maps:
        for x in steps():
            model(x)
            assert maps.layers == ["conv2"]
            assert maps.select(model.conv2)
            assert not maps.select(model.conv1)


def test_select_by_everything() -> None:
    model = net()
    with capture(model, keep="all") as maps:
        for x in steps():
            model(x)
    assert len(maps.select()) == 3 * 5  # (z, a), (z, a), z in each of three passes
    assert [fm.step for fm in maps.select("conv1", "activation")] == [0, 1, 2]
    assert [fm.step for fm in maps.select(step=1)] == [1] * 5
    assert maps.select(step=-1)[0].step == 2
    assert maps.select(step=-3)[0].step == 0
    assert maps.select(step=7) == []
    assert maps.select(step=-4) == []
    assert maps.select(call=1) == []
    assert len(maps.select(call=0)) == 15
    assert len(maps.select(nonlinearity="relu")) == 12
    assert maps.select(nonlinearity="gelu") == []
    assert {fm.filter for fm in maps.select("conv*", filter=2)} == {2}
    assert len(maps.select(filter=4)) == 3  # only the head has a fifth
    one = maps.select("conv1", "activation", 1, 0, 2)
    assert len(one) == 1
    assert one[0].shape == (2, 6, 6)
    order = [(fm.layer, fm.kind) for fm in maps.select(step=0)]
    assert order == [
        ("conv1", "preactivation"),
        ("conv1", "activation"),
        ("conv2", "preactivation"),
        ("conv2", "activation"),
        ("head", "preactivation"),
    ]


def test_iteration_length_membership() -> None:
    model = net()
    with capture(model) as maps:
        assert len(maps) == 0
        assert list(maps) == []
        assert maps.layers == []
        assert maps.nbytes == 0
        assert "conv1" not in maps
        for x in steps():
            model(x)
            assert len(maps) == len(list(maps)) == 5
            assert [fm.layer for fm in maps] == ["conv1"] * 2 + ["conv2"] * 2 + ["head"]
            assert maps.layers == ["conv1", "conv2", "head"]
            assert "conv1" in maps
            assert "bn1" not in maps
            assert 3 not in maps
            assert maps.nbytes == sum(fm.nbytes for fm in maps)
    assert len(maps) == 5
    assert maps["conv1"].shape == (2, 4, 6, 6)


# -- keep, every, clear --------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3, "all"])
def test_keep(keep: Any) -> None:
    model = net().eval()
    wanted = []
    with capture(model, keep=keep) as maps:
        for n, x in enumerate(steps(5)):
            wanted.append(by_hand(model, x)["conv1", "activation"])
            model(x)
            held = maps.select("conv1", "activation")
            first = 0 if keep == "all" else max(0, n + 1 - keep)
            assert [fm.step for fm in held] == list(range(first, n + 1))
            for fm in held:
                assert torch.equal(fm.tensor, wanted[fm.step])
            assert maps.nbytes == (n + 1 - first) * sum(fm.nbytes for fm in maps)


def test_every() -> None:
    model = net().eval()
    with capture(model, every=3) as maps:
        for n, x in enumerate(steps(7)):
            want = by_hand(model, x)["conv1", "activation"]
            model(x)
            assert maps["conv1"].step == n - n % 3
            assert torch.equal(maps["conv1"].tensor, want) == (n % 3 == 0)
    with capture(model, every=2, keep=2) as maps:
        for x in steps(6):
            model(x)
        assert [fm.step for fm in maps.select("conv1", "activation")] == [2, 4]


def test_clear_lets_go() -> None:
    model = net()
    with capture(model, keep="all") as maps:
        for x in steps():
            model(x)
        a = maps["conv1"]
        values = a.tensor.clone()
        maps.clear()
        assert len(maps) == 0
        assert maps.nbytes == 0
        assert maps.layers == []
        with pytest.raises(NoPassError, match=r"\(clear\(\) was called"):
            maps["conv1"]
        assert torch.equal(a.tensor, values)  # one read before stays
        want = by_hand(model, x)["conv1", "activation"]
        model(x)
        assert len(maps) == 5
        assert maps["conv1"].step == 3
        assert torch.equal(maps["conv1"].tensor, want)


# -- filters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "held"),
    [
        (1, {"conv1": [1], "conv2": [1], "head": [1]}),
        ([3, 0], {"conv1": [3, 0], "conv2": [3, 0], "head": [3, 0]}),
        (range(2), {"conv1": [0, 1], "conv2": [0, 1], "head": [0, 1]}),
        (-1, {"conv1": [3], "conv2": [3], "head": [4]}),
        ({"conv1": 2, "head": [4, 1]}, {"conv1": [2], "conv2": range(4), "head": [4, 1]}),
    ],
)
def test_filters(given: Any, held: dict[str, Any]) -> None:
    model = net()
    with capture(model, filters=given, kinds=KINDS[1:4]) as maps:
        for x in steps():
            want = by_hand(model, x)
            model(x)
            assert maps.layers == list(held)
            for fm in maps:
                assert list(fm.filters or ()) == list(held[fm.layer])
                assert len(fm) == len(held[fm.layer])
                assert torch.equal(
                    fm.tensor, want[fm.layer, fm.kind].index_select(1, torch.tensor(held[fm.layer]))
                )
                for one in fm:
                    assert one.filter in held[fm.layer]
                    assert torch.equal(one.tensor, want[fm.layer, fm.kind][:, one.filter])
                    assert torch.equal(maps[fm.layer, fm.kind, one.filter].tensor, one.tensor)


def test_filters_hold_memory_in_proportion() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True))
    sizes = []
    for filters in ([0], [0, 5], list(range(8)), None):
        with capture(model, filters=filters) as maps:
            for x in steps():
                model(x)
                gc.collect()
            sizes.append(maps.nbytes)
            assert maps.nbytes == sum(fm.nbytes for fm in maps)
    assert sizes == [sizes[0] * k for k in (1, 2, 8, 16)]


def test_negative_filters_of_a_map() -> None:
    model = net()
    with capture(model) as maps:
        for x in steps():
            model(x)
            a = maps["conv1"]
            assert a[-1].filter == 3
            assert a[np.int64(2)].filter == 2


# -- views ---------------------------------------------------------------------------------------


def test_maps_of_filters_are_views() -> None:
    model = net()
    with capture(model) as maps:
        for x in steps():
            model(x)
            a = maps["conv1"]
            assert a.filter_dim == 1
            assert a.filters == range(4)
            assert len(a) == 4
            for k, one in enumerate(a):
                assert one.filter == k
                assert one.filter_dim is None
                assert one.filters is None
                assert one.tensor.data_ptr() == a.tensor[:, k].data_ptr()
                assert one.tensor._base is not None
                assert one.shape == (2, 6, 6)
                assert torch.equal(one.tensor, a.tensor[:, k])
            assert a[2].tensor.data_ptr() == maps["conv1", "activation", 2].tensor.data_ptr()
            assert maps["conv1"].tensor.data_ptr() == a.tensor.data_ptr()


def test_numpy() -> None:
    model = net()
    with capture(model) as maps:
        for x in steps():
            model(x)
            a = maps["conv1"]
            array = a.numpy()
            assert array.dtype == np.float32
            assert array.shape == (2, 4, 6, 6)
            assert array.ctypes.data == a.tensor.data_ptr()  # a view
            assert np.asarray(a).ctypes.data == a.tensor.data_ptr()
            assert np.asarray(a, dtype=np.float64).dtype == np.float64
            assert np.array(a).ctypes.data != a.tensor.data_ptr()
            assert np.allclose(np.maximum(maps["conv1", "preactivation"].numpy(), 0), array)
            assert a[1].numpy().shape == (2, 6, 6)


def test_numpy_of_bfloat16_is_float32() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU()).to(torch.bfloat16)
    with capture(model) as maps:
        for (x,) in images(2, 4):
            model(x.bfloat16())
            a = maps["0"]
            assert a.dtype == torch.bfloat16
            assert a.nbytes == 2 * 10
            assert a.numpy().dtype == np.float32
            assert np.array_equal(a.numpy(), a.tensor.float().numpy())


def test_a_map_is_frozen_and_small() -> None:
    model = net()
    with capture(model) as maps:
        model(steps()[0])
        a = maps["conv1"]
    assert isinstance(a, FeatureMap)
    assert not hasattr(a, "__dict__")
    with pytest.raises(AttributeError):
        a.layer = "other"  # type: ignore[misc]
    assert bool(a)
    assert a.device.type == "cpu"
    assert a.nbytes == 2 * 4 * 36 * 4


def test_python_finds_the_source_and_the_types_of_a_map() -> None:
    assert inspect.getsource(FeatureMap).startswith("@dataclass")
    hints = get_type_hints(FeatureMap)
    assert hints["tensor"] is Tensor
    assert hints["filters"] == range | tuple[int, ...] | None
    assert hints["_whole"] == FeatureMap | None
    assert sys.modules[FeatureMap.__module__].FeatureMap is FeatureMap
    assert fmapkit.maps.FeatureMap is FeatureMap


# -- outputs -------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None


class Block(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.fc, self.form = nn.Linear(4, 4), form

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        match self.form:
            case "tuple":
                return y, (x, {"w": y * 2})
            case "dict":
                return {"w": y, 3: x, "none": None}
            case "list":
                return [y, x]
            case "namedtuple":
                return Pair(y, x)
            case "dataclass":
                return Output(y, (x, y * 2))
        return y


@pytest.mark.parametrize(
    ("form", "paths"),
    [
        ("tensor", [""]),
        ("tuple", ["[0]", "[1][0]", "[1][1]['w']"]),
        ("dict", ["['w']", "[3]"]),
        ("list", ["[0]", "[1]"]),
        ("namedtuple", [".left", ".right"]),
        ("dataclass", [".logits", ".hidden[0]", ".hidden[1]"]),
    ],
)
def test_nested_outputs_have_a_path(form: str, paths: list[str]) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(form)

        def forward(self, x: Tensor) -> Any:
            return self.block(x)

    model = Outer()
    with capture(model, "block") as maps, capture(model, kinds="output") as every:
        for (x,) in images(2, 4):
            out = model(x)
            assert [fm.path for fm in maps] == paths
            assert [fm.kind for fm in maps] == ["output"] * len(paths)
            for fm in maps:
                value = eval("out" + fm.path, {"out": out})
                assert torch.equal(fm.tensor, value)
                assert fm.layer == "block"
                found = every.select("block", path=fm.path)
                assert len(found) == 1
                assert torch.equal(found[0].tensor, value)
            if form == "tensor":
                assert torch.equal(maps["block"].tensor, out)


def test_an_lstm_has_outputs() -> None:
    model = nn.Sequential(nn.LSTM(4, 3))
    with capture(model, "0") as maps:
        for _ in range(3):
            out, (h, c) = model(torch.randn(5, 2, 4))
            assert [fm.path for fm in maps] == ["[0]", "[1][0]", "[1][1]"]
            for fm, value in zip(maps, (out, h, c), strict=True):
                assert torch.equal(fm.tensor, value)
    assert not maps.missed  # what it returns was asked for, and not its gates


def test_a_blocks_output_is_not_held_twice() -> None:
    # layer's output is relu's activation: one piece of memory.
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), nn.Linear(5, 2))
    with capture(model, ["0", "0.0"]) as maps:
        for (x,) in images(2, 4):
            model(x)
            assert maps["0"].kind == "output"
            assert maps["0"].tensor.data_ptr() == maps["0.0"].tensor.data_ptr()
            assert maps.nbytes == 2 * 4 * 10


# -- to look at ----------------------------------------------------------------------------------


def test_repr_and_html() -> None:
    model = net()
    with capture(model) as maps:
        assert isinstance(repr(maps), str)
        assert isinstance(maps._repr_html_(), str)
        for x in steps():
            model(x)
        text, html = repr(maps), maps._repr_html_()
        for word in ("conv1", "conv2", "head", "preactivation", "activation", "relu", "float32"):
            assert word in text
            assert word in html
        assert "2×4×6×6" in text
        assert html.count("<tr") >= 6
        assert html.count("<table") == html.count("</table")
        line = repr(maps["conv1"])
        assert "conv1" in line
        assert "activation" in line
        assert "\n" not in line
        assert "filter=2" in repr(maps["conv1"][2])
        maps.clear()
        assert isinstance(repr(maps), str)


def test_html_escapes_names() -> None:
    model = nn.ModuleDict({"<b>": nn.Linear(4, 4)})
    seq = nn.Sequential()
    seq.add_module("<script>", model["<b>"])
    seq.add_module("act", nn.ReLU())
    with capture(seq) as maps:
        seq(torch.randn(2, 4))
    assert "<script>" not in maps._repr_html_()
    assert "&lt;script&gt;" in maps._repr_html_()


def test_plot_gives_a_figure() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    model = net()
    with capture(model, kinds=KINDS) as maps:
        for x in steps():
            model(x)
    figures = [
        maps.plot("conv*"),
        maps.plot(["conv1", "head"], sample=1, max_filters=2),
        maps["conv1"].plot(),
        maps["conv1"][2].plot(),
        maps["head", "preactivation"].plot(sample=1),
    ]
    for figure in figures:
        assert isinstance(figure, Figure)
        figure.savefig(io.BytesIO(), dpi=30)
        pyplot.close(figure)


# -- shared and switched -------------------------------------------------------------------------


def test_the_input_of_a_product_with_its_weight_first_is_the_other_factor() -> None:
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.weight @ x))

    model = Left()
    with torch.no_grad(), capture(model, kinds="input") as maps:
        for _ in range(3):  # learned, then replayed
            x = torch.randn(3, 4)
            model(x)
            assert torch.equal(maps.select(kind="input")[0].tensor, x)


class _SharedAct(nn.Module):
    """Unproven at the top, so that the one activation is a unit that all layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = self.act(layer(x)) if float(x.sum()) < 1e9 else x
        return x


@pytest.mark.parametrize("wanted", ["a", "b", "c"])
def test_one_of_the_layers_that_share_an_activation(wanted: str) -> None:
    model = _SharedAct()
    with capture(model, wanted) as maps, capture(model, filters={wanted: [1]}) as one:
        for _ in range(3):
            model(torch.randn(2, 4))
            assert [(fm.layer, fm.kind) for fm in maps] == [
                (wanted, "preactivation"),
                (wanted, "activation"),
            ]
            assert {fm.layer: len(fm) for fm in one} == {"a": 4, "b": 4, "c": 4} | {wanted: 1}


class _Switched(nn.Module):
    """Proven: which road it takes is a plain attribute's doing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act, self.other = nn.ReLU(), nn.Tanh()
        self.deep = True

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.a(x))
        if self.deep:
            x = self.other(self.b(self.act(x)))
        else:
            x = self.b(self.act(x))
        return self.c(x)


@pytest.mark.parametrize("gradients", [False, True])
def test_plans_of_one_module_take_turns(gradients: bool) -> None:
    model = _Switched()
    with capture(model, gradients=gradients) as maps:
        for n in range(9):
            model.deep = n % 3 != 1
            model(torch.randn(2, 4)).sum().backward()
            found = [fm.nonlinearity for fm in maps.select(kind="activation", step=-1)]
            assert found == ["sigmoid", "relu", *["tanh"] * model.deep]
            for name in ("a", *["b"] * model.deep):
                z, a = maps[name, "preactivation"].tensor, maps[name].tensor
                assert torch.equal(z.sigmoid() if name == "a" else z.tanh(), a)
            assert maps.missed == []


def test_an_ambiguous_look_up_says_what_tells_the_maps_apart() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.lstm(x)[0]
            return out

    model = Recurrent()
    with capture(model, "lstm", kinds="output") as maps:
        model(torch.randn(3, 2, 4))
    with pytest.raises(AmbiguousMapError, match=r"select\(layers='lstm', path=…\)$"):
        maps["lstm"]
    (key,) = dict(maps.items())
    assert key in maps
    assert ("lstm", "activation") not in maps
    assert ("lstm", "output", 1) not in maps
