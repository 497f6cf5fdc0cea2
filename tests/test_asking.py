"""Questions that people ask in the wrong words: what the answer says, and that it is right."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fmapkit
from fmapkit import (
    AmbiguousMapError,
    ArgumentError,
    CaptureStateError,
    CaptureWarning,
    DistributedError,
    FmapkitError,
    MapLookupError,
    NonFiniteError,
    NoPassError,
    NotAModuleError,
    UnknownLayerError,
    capture,
    edits,
)
from fmapkit.analysis import Statistics
from fmapkit.kinds import KINDS, Kind
from tests.truth import seed

ROOT = Path(__file__).parent.parent


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.fc2 = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


class Net(nn.Module):
    """Twelve blocks in a list, the first of which has another name, too."""

    def __init__(self, depth: int = 12) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.first = self.blocks[0]
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def generate(self, x: Tensor, tokens: int) -> Tensor:
        """As a language model does: the output decides what comes next."""
        for _ in range(tokens):
            x = x + self(x).mean()
        return x


@pytest.fixture
def net() -> Net:
    seed(0)
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3)


def raised(error: type[FmapkitError], ask: Any) -> FmapkitError:
    with pytest.raises(error) as caught:
        ask()
    assert type(caught.value) is error
    return caught.value


CAPTURED = (
    "'stem', 'blocks.0.fc1', 'blocks.0.fc2', 'blocks.1.fc1', 'blocks.1.fc2', 'blocks.2.fc1', "
    "'blocks.2.fc2', 'blocks.3.fc1', … (26 in all)"
)


# -- look-ups -------------------------------------------------------------------------------------


def test_a_glob_in_a_look_up(net: Net, x: Tensor) -> None:
    with capture(net) as maps:
        net(x)
    error = raised(MapLookupError, lambda: maps["blocks.1.*"])
    assert str(error) == (
        "maps['blocks.1.*'] is one map, and a glob may mean several: "
        "maps.select(layers='blocks.1.*') gives them all (2 of those captured fit: 'blocks.1.fc1', "
        "'blocks.1.fc2')"
    )
    assert error.candidates == ("blocks.1.fc1", "blocks.1.fc2")
    assert [fm.layer for fm in maps.select("blocks.1.*", "preactivation")] == [*error.candidates]
    error = raised(MapLookupError, lambda: maps["block1.*", "activation"])
    assert str(error) == (
        "maps['block1.*'] is one map, and a glob may mean several: maps.select(layers='block1.*') "
        f"gives them all (none of those captured fits: {CAPTURED})"
    )


def test_a_filter_in_the_place_of_the_kind(net: Net, x: Tensor) -> None:
    with capture(net) as maps:
        net(x)
    error = raised(MapLookupError, lambda: maps["stem", 3])
    assert str(error) == (
        "maps['stem', 3]: a filter is the third item, after the kind: "
        "maps['stem', 'activation', 3], or maps['stem'][3]"
    )
    assert (error.layer, error.filter) == ("stem", 3)
    assert torch.equal(maps["stem", "activation", 3].tensor, maps["stem"][3].tensor)


@pytest.mark.parametrize("key", [nn.Linear, re.compile("stem"), ["stem"], nn.Identity()])
def test_what_only_select_takes(net: Net, x: Tensor, key: Any) -> None:
    with capture(net) as maps:
        net(x)
    error = raised(MapLookupError, lambda: maps[key])
    assert str(error) == (
        f"maps[{key!r}]: the key is a layer's name, (layer, kind) or (layer, kind, filter); "
        "by modules, types, patterns or several names: maps.select(layers=…)"
    )


def test_a_container_that_is_never_called(net: Net, x: Tensor) -> None:
    with capture(net) as maps:
        net(x)
    error = raised(UnknownLayerError, lambda: maps["blocks"])
    assert str(error) == (
        "'blocks' is a ModuleList, which is never called and has no map of its own; ask for what "
        "it holds: 'blocks.0', 'blocks.1', 'blocks.2', 'blocks.3', 'blocks.4', 'blocks.5', "
        f"'blocks.6', 'blocks.7', … (12 in all) (captured: {CAPTURED})"
    )
    assert error.candidates == tuple(f"blocks.{n}" for n in range(12))
    error = raised(UnknownLayerError, lambda: maps.select("blocks"))
    assert str(error) == (
        "layers='blocks' means 'blocks', of which no map is held: what a module returns is "
        "captured by capture(model, layers='blocks', kinds='output'); for the layers in it, "
        f"layers='blocks.*' (held: {CAPTURED})"
    )
    with capture(net, layers="blocks") as maps:
        net(x)
    assert maps.layers == [f"blocks.{n}" for n in range(12)]
    assert [fm.layer for fm in maps.select("blocks")] == maps.layers
    assert {fm.kind for fm in maps} == {"output"}


def test_a_block_of_which_only_the_layers_are_held(net: Net, x: Tensor) -> None:
    with capture(net) as maps:
        net(x)
    error = raised(UnknownLayerError, lambda: maps["blocks.3"])
    assert str(error) == (
        "no map of 'blocks.3' in the latest pass: either it did not run, or no filter of its own "
        "reached a nonlinearity; for what it returns, capture(model, layers='blocks.3', "
        "kinds='output'); for the layers in it, maps.select(layers='blocks.3.*') "
        f"(captured: {CAPTURED})"
    )
    assert error.candidates == ("blocks.3.fc1", "blocks.3.fc2")


def test_before_any_pass(net: Net, x: Tensor) -> None:
    with capture(net) as maps:
        error = raised(NoPassError, lambda: maps["stem"])
        text = (
            "no map of 'stem' yet: no forward pass has run inside the capture block; call the "
            "model inside `with capture(model) as maps:` first"
        )
        assert str(error) == text
        error = raised(NoPassError, lambda: maps["stm"])
        assert str(error) == (
            text.replace("'stem'", "'stm'")
            + "; and no module is called that; did you mean 'stem' or 'first'?"
        )
        assert error.candidates == ("stem", "first")
        assert maps.select("stem") == []
        assert maps.select("blocks") == []
        error = raised(UnknownLayerError, lambda: maps.select("stm"))
        assert str(error) == (
            "layers='stm' matches no layer; did you mean 'stem' or 'first'? (no map is held yet)"
        )
        net(x)
        maps["stem"]


# -- select ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("stme", "layers='stme' matches no layer; did you mean 'stem'? (held: 'stem', 'head')"),
        ("stme*", "layers='stme*' matches no layer; did you mean 'stem'? (held: 'stem', 'head')"),
        (re.compile("^x"), "layers=re.compile('^x') matches no layer (held: 'stem', 'head')"),
        (["stem", "haed"], "layers='haed' matches no layer; did you mean 'head'? (held: 'stem', "),
        ("blocks.2.fc1", "layers='blocks.2.fc1' was not selected in capture(layers=...); held: "),
    ],
)
def test_names_and_globs_that_match_nothing(net: Net, x: Tensor, layers: Any, text: str) -> None:
    with capture(net, ["stem", "head"]) as maps:
        net(x)
    assert str(raised(UnknownLayerError, lambda: maps.select(layers))).startswith(text)


def test_what_may_be_empty(net: Net, x: Tensor) -> None:
    """A type, a module or a callable says what is wanted, whether or not there is any."""
    with capture(net, ["stem", "head"]) as maps:
        net(x)
    for layers in (nn.Conv2d, net.blocks[1].fc1, lambda name: name == "nobody"):
        assert maps.select(layers) == []
    assert maps.select("head", "activation") == []
    assert maps.select("stem", call=7) == []

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x) if x.sum() > 0 else self.b(x))

    model = Sometimes()
    with capture(model) as maps:
        model(torch.ones(1, 3))
    assert maps.select("b") == []  # a layer of the model, that did not run
    assert [fm.layer for fm in maps.select("a")] == ["a", "a"]


def test_the_first_argument_is_layers_and_layer_means_the_same(net: Net, x: Tensor) -> None:
    with capture(net) as maps:
        net(x)
    every = [maps.select(**{key: "stem"}) for key in ("layers", "layer")]
    assert [[fm.kind for fm in found] for found in every] == [["preactivation", "activation"]] * 2
    error = raised(ArgumentError, lambda: maps.select("stem", layer="stem"))
    assert str(error) == "layer= and layers= are the same: give one of them"
    for method in (capture.__init__, fmapkit.FeatureMaps.select, fmapkit.FeatureMaps.plot):
        assert list(inspect.signature(method).parameters)[1:3].count("layers") == 1
    assert "layers" in inspect.signature(fmapkit.compare).parameters


@pytest.mark.parametrize("where", ["capture", "select", "edit"])
def test_one_character_and_two_digits(net: Net, x: Tensor, where: str) -> None:
    """`?` is one character: blocks.10 and blocks.11 are left out, and that is said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if where == "capture":
            with capture(net, "blocks.?.fc1") as maps:
                net(x)
            assert len(maps.layers) == 10
        elif where == "select":
            with capture(net) as maps:
                net(x)
            assert len(maps.select("blocks.?.fc1", "activation")) == 10
        else:
            with capture(net, edit={"blocks.?.fc1": edits.scale(1.0)}):
                net(x)
    argument = "edit" if where == "edit" else "layers"
    assert [str(w.message) for w in caught] == [
        f"{argument}='blocks.?.fc1' leaves out 'blocks.10.fc1', 'blocks.11.fc1': ? stands for one "
        r"character; re.compile(r'^blocks\.\d+\.fc1$') takes numbers of any length"
    ]
    assert caught[0].filename == __file__
    pattern = str(caught[0].message).split("r'")[1].split("'")[0]
    with capture(net, re.compile(pattern)) as maps:
        net(x)
    assert len(maps.layers) == 12


def test_one_character_that_leaves_nothing_out(x: Tensor) -> None:
    net = Net(depth=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layers in ("blocks.?", "blocks.[0-9].fc?", "bl?cks.*"):
            with capture(net, layers):
                net(x)


# -- names ----------------------------------------------------------------------------------------


def test_a_module_that_is_registered_twice(net: Net, x: Tensor) -> None:
    """By either name, everywhere; its maps go by the first."""
    for layers in (None, "first.fc1", "first.*", ["first.fc1"]):
        with capture(net, layers) as maps:
            net(x)
        assert "first.fc1" in maps
        assert maps["first.fc1"].layer == "blocks.0.fc1"
        assert maps.select("first.fc1")[0].layer == "blocks.0.fc1"
        assert maps.select("fir*.fc1")[0].layer == "blocks.0.fc1"
    with capture(net, filters={"first.fc1": [2]}, layers="blocks.0.fc1") as maps:
        net(x)
    assert maps["first.fc1"].filters == (2,)
    with capture(net, edit={"first.fc1": edits.zero()}) as maps:
        net(x)
    edited = maps["first.fc1"].edited
    assert edited is not None
    assert not edited.any()
    with capture(net, "first") as maps:
        net(x)
    assert maps["first"].kind == "output"


def test_keys_and_items(net: Net, x: Tensor) -> None:
    with capture(net, ["stem", "head"]) as maps:
        assert maps.keys() == []
        net(x)
    assert maps.keys() == [
        ("stem", "preactivation"),
        ("stem", "activation"),
        ("head", "preactivation"),
    ]
    assert [(key, fm.layer, fm.kind) for key, fm in maps.items()] == [
        (key, *key)
        for key in maps.keys()  # noqa: SIM118
    ]
    assert all(torch.equal(maps[key].tensor, fm.tensor) for key, fm in maps.items())
    assert maps._ipython_key_completions_() == ["stem", "head", *maps.keys()]


def test_keys_of_a_layer_called_twice() -> None:
    lin = nn.Linear(2, 2)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = lin

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(self.lin(x).relu()).relu()

    model = Twice()
    with capture(model, kinds="activation") as maps:
        model(torch.ones(1, 2))
    assert maps.keys() == [("lin", "activation")]
    assert [fm.call for _, fm in maps.items()] == [0, 1]
    error = raised(AmbiguousMapError, lambda: maps["lin"])
    for candidate, (_, fm) in zip(error.candidates, maps.items(), strict=True):
        (one,) = maps.select(**candidate)
        assert torch.equal(one.tensor, fm.tensor)


def test_ipython_completes_names(net: Net, x: Tensor) -> None:
    completer = pytest.importorskip("IPython.core.completer")
    shell = pytest.importorskip("IPython.core.interactiveshell")
    with capture(net, ["stem", "head"]) as maps:
        net(x)
    ip = shell.InteractiveShell.instance()
    ip.user_ns["maps"] = maps
    ip.Completer.use_jedi = False
    _, found = ip.complete("maps['")
    assert {"stem", "head"} <= {re.split("['\"]", name.rstrip("'\"]"))[-1] for name in found}
    _, found = ip.complete("maps['stem', '")
    assert {"preactivation", "activation"} <= {
        re.split("['\"]", name.rstrip("'\"]"))[-1] for name in found
    }
    del ip.user_ns["maps"]
    assert completer is not None


# -- edits and early stop -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (edits.zero, "edit['stem'] is edits.zero itself, which makes an edit: write edits.zero()"),
        (
            edits.only,
            "edit['stem'] is edits.only itself, which makes an edit: write edits.only(*filters: "
            "'int', at: 'Any' = None)",
        ),
    ],
)
def test_an_edit_without_parentheses(net: Net, edit: Any, text: str) -> None:
    assert str(raised(ArgumentError, lambda: capture(net, edit={"stem": edit}))) == text


def test_a_function_of_ones_own_is_an_edit(net: Net, x: Tensor) -> None:
    def zero(fm: Any) -> Tensor:
        return torch.zeros_like(fm.tensor)

    with capture(net, edit={"stem": zero}) as maps:
        net(x)
    assert maps["stem"].edited is not None


def test_stop_around_code_that_needs_the_output(net: Net, x: Tensor) -> None:
    """`generate()` gets None from the second pass on; its error says why."""
    with pytest.raises(AttributeError, match="NoneType") as caught, capture(net, "stem", stop=True):
        net.generate(x, 3)
    note = (
        "fmapkit: with stop=True the model's call returns None once the wanted maps are there, "
        "which code that uses its output (a loss, generate()) cannot take: call the model alone, "
        "or leave stop=True out"
    )
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == [note]
    with pytest.raises(AttributeError) as caught, capture(net, "stem"):
        raise AttributeError("'NoneType' object has no attribute 'logits'")
    assert not hasattr(caught.value, "__notes__")  # without stop=, it is none of our business


# -- kinds that type checkers know ----------------------------------------------------------------


def test_kinds_are_a_literal_type() -> None:
    plain = ("input", "response", "preactivation", "activation", "output")
    assert get_args(Kind) == KINDS == (*plain, "attention")


SNIPPET = """
import torch
from torch import nn
from fmapkit import FeatureMap, FeatureMaps, Kind, capture, compare

def right(model: nn.Module, maps: FeatureMaps, fm: FeatureMap, kind: Kind) -> None:
    capture(model, kinds="activation")
    capture(model, kinds=("input", "output"), check="finite-forward")
    capture(model, kinds=[kind])
    maps["conv", "activation"]
    maps["conv", kind, 3]
    maps.select("conv", "response")
    compare(maps, maps, match={"a": "b"}, kind=kind)
    for (layer, found), one in maps.items():
        assert found == one.kind and layer
    if fm.kind == "preactivation":
        print(fm.layer)

def wrong(model: nn.Module, maps: FeatureMaps, fm: FeatureMap) -> None:
    capture(model, kinds="activaton")  # wrong
    capture(model, kinds=["activation", "outputs"])  # wrong
    maps["conv", "activaton"]  # wrong
    maps["conv", 3]  # wrong
    maps.select("conv", "pre")  # wrong
    capture(model, check="nan")  # wrong
    compare(maps, maps, kind="activaton")  # wrong
    print(fm.kind == "activaton")  # wrong
"""

CONFIG = """
[mypy]
strict = true
mypy_path = {source}
[mypy-torch.*,numpy.*,typing_extensions.*]
follow_imports = skip
[mypy-fmapkit.*]
follow_imports = silent
disallow_subclassing_any = false
"""


def test_mypy_finds_misspelt_kinds(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "snippet.py").write_text(SNIPPET)
    (tmp_path / "mypy.ini").write_text(CONFIG.format(source=ROOT / "src"))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "snippet.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    lines = SNIPPET.splitlines()
    expected = {n for n, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert found == expected, done.stdout + done.stderr


# -- warnings point at the user's line ------------------------------------------------------------


def line_of(marker: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (found,) = [n for n, line in enumerate(lines, 1) if line.rstrip().endswith(f"# {marker}")]
    return found


def test_a_warning_at_the_end_of_a_pass() -> None:
    lstm = nn.LSTM(2, 2)
    with warnings.catch_warnings(record=True) as caught, capture(lstm):
        warnings.simplefilter("always")
        lstm(torch.ones(3, 1, 2))  # the pass
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line_of("the pass"))]
    assert caught[0].category is CaptureWarning


def test_a_warning_at_the_end_of_the_block() -> None:
    class Own(nn.Module):
        def __call__(self, x: Tensor) -> Tensor:
            return x

    model = Own()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with capture(model):  # the block
            model(torch.ones(1))
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line_of("the block"))]


def test_a_warning_in_a_nested_model_and_through_a_helper(tmp_path: Path) -> None:
    """The innermost line outside of fmapkit and torch, whoever wrote it."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))

        def forward(self, x: Tensor) -> Any:
            return self.inner(x)

    def helper(model: nn.Module) -> None:
        model(torch.ones(3, 1, 2))  # in the helper

    model = Outer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with capture(model):
            helper(model)
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line_of("in the helper"))]


def test_a_warning_of_an_analysis() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    model.register_forward_pre_hook(lambda _, args: (args[0].to(torch.complex64),))
    model[0].to(torch.complex64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with capture(model, analyses=Statistics(), keep=0):
            model(torch.ones(3, 2))  # seen by the analysis
    assert caught
    assert {(w.filename, w.lineno) for w in caught} == {(__file__, line_of("seen by the analysis"))}


# -- errors carry data ----------------------------------------------------------------------------


ERRORS = [getattr(fmapkit, name) for name in fmapkit.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_has_the_same_data_and_survives_a_pickle(error: type[FmapkitError]) -> None:
    import pickle

    one = error("text", layer="a", kind="output", filter=1, call=2, step=3, bytes=4, candidates="b")
    again = pickle.loads(pickle.dumps(one))
    for e in (one, again):
        assert str(e) == "text"
        assert (e.layer, e.kind, e.filter, e.call, e.step, e.bytes) == ("a", "output", 1, 2, 3, 4)
        assert e.candidates == ("b",)
    bare = error("text")
    assert bare.layer is bare.kind is bare.step is bare.bytes is None
    assert bare.candidates == ()


def test_all_error_classes_are_tried() -> None:
    assert {NotAModuleError, DistributedError, CaptureStateError, NonFiniteError} < set(ERRORS)


class _Weights(nn.Module):
    """Several weights of its own, beside a layer, a norm and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 3))
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layer(x))
        return F.linear(F.linear(x, self.w1).relu(), self.w2)


def test_a_parameter_that_no_layer_goes_by_is_refused() -> None:
    model = nn.Sequential(_Weights())
    names = ["0.layer.weight", "0.layer.bias", "0.norm.weight", "0.norm.bias", "0.w3"]
    for name in [*names, "0.attention.in_proj_weight", "0.attention.in_proj_bias"]:
        with pytest.raises(UnknownLayerError, match="matches no module of Sequential"):
            capture(model, name)
        with pytest.raises(UnknownLayerError, match="filters names layer"):
            capture(model, filters={name: [0]})
    for name in ("0.w1", "0.attention.in_proj", "0.w1[2]", "0.layer.weight[0]"):
        capture(model, name)
    with capture(model, "0.w1") as maps, torch.no_grad():
        model(torch.randn(5, 4))
    assert maps.layers == ["0.w1"]
