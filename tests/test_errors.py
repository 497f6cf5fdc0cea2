"""Bad input: each a clear error of fmapkit's own, as early as can be, nothing half-installed.

The text is tested too: it names what was given, what is allowed, and the nearest match.
"""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmapkit
from fmapkit import (
    AmbiguousMapError,
    ArgumentError,
    CaptureStateError,
    CaptureWarning,
    FilterRangeError,
    FmapkitError,
    KindNotCapturedError,
    MapLookupError,
    MapOverwrittenError,
    MapReleasedError,
    MapStateError,
    NoActivationError,
    NoPassError,
    NotAModuleError,
    UnknownLayerError,
    capture,
)
from tests.truth import assert_nothing_left, fingerprint, same_bits, seed


class Net(nn.Module):
    """conv1 - bn1 - relu - conv2 - relu - fc."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.relu(self.conv2(x)).mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    seed(0)
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 5, 5)


def says(*phrases: str) -> str:
    """A pattern for `pytest.raises(match=...)`: all of the phrases, in any order and any case."""
    return "(?is)" + "".join(f"(?=.*{re.escape(phrase)})" for phrase in phrases)


# -- the tree -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (FmapkitError, (Exception,)),
        (ArgumentError, (FmapkitError, ValueError)),
        (NotAModuleError, (ArgumentError, TypeError)),
        (UnknownLayerError, (ArgumentError, MapLookupError)),
        (MapLookupError, (FmapkitError, KeyError)),
        (NoActivationError, (MapLookupError,)),
        (KindNotCapturedError, (MapLookupError,)),
        (AmbiguousMapError, (MapLookupError,)),
        (FilterRangeError, (MapLookupError, IndexError)),
        (NoPassError, (MapLookupError,)),
        (MapStateError, (FmapkitError, RuntimeError)),
        (MapOverwrittenError, (MapStateError,)),
        (MapReleasedError, (MapStateError,)),
        (CaptureStateError, (FmapkitError, RuntimeError)),
        (CaptureWarning, (UserWarning,)),
    ],
)
def test_the_tree(error: type[BaseException], bases: tuple[type[BaseException], ...]) -> None:
    assert all(issubclass(error, base) for base in bases)
    assert error.__name__ in fmapkit.__all__


def test_a_lookup_error_prints_as_text_not_as_the_repr_of_a_key() -> None:
    assert str(UnknownLayerError("no layer 'x'")) == "no layer 'x'"


# -- arguments of capture: at the call, before any hook -------------------------------------------


def _refused(net: nn.Module, error: type[Exception], match: str, *args: Any, **kwargs: Any) -> None:
    before = fingerprint(net)
    with pytest.raises(error, match=match) as caught:
        capture(net, *args, **kwargs)  # not entered: it must fail here
    assert isinstance(caught.value, FmapkitError)
    assert_nothing_left(before, net)


@pytest.mark.parametrize(
    ("given", "named"),
    [(None, "NoneType"), ("resnet18", "str"), (Net, "instance"), (lambda x: x, "function")],
)
def test_no_module(given: Any, named: str) -> None:
    with pytest.raises(NotAModuleError, match=says("nn.Module", named)):
        capture(given)
    with pytest.raises(TypeError):
        capture(given)
    with pytest.raises(ValueError, match="Module"):
        capture(given)


def test_unknown_layer_suggests_the_nearest(net: nn.Module) -> None:
    _refused(net, UnknownLayerError, says("conv9", "did you mean", "'conv1'"), layers="conv9")
    _refused(net, UnknownLayerError, says("conv9"), layers=["conv1", "conv9"])
    _refused(net, ValueError, says("conv9"), "conv9")


def test_unknown_layer_without_a_near_one_lists_what_there_is(net: nn.Module) -> None:
    _refused(net, UnknownLayerError, says("zzzzzz", "conv1", "fc"), layers="zzzzzz")


@pytest.mark.parametrize("layers", ["block*", nn.LSTM, nn.Linear(2, 2), re.compile("^z"), []])
def test_selectors_that_match_nothing(net: nn.Module, layers: Any) -> None:
    _refused(net, ArgumentError, "layers", layers=layers)


@pytest.mark.parametrize("layers", [3, 1.5, object(), [None]])
def test_selectors_of_no_allowed_form(net: nn.Module, layers: Any) -> None:
    _refused(net, ArgumentError, says("glob"), layers=layers)


@pytest.mark.parametrize(
    ("kinds", "phrases"),
    [
        ("activaton", ("activaton", "did you mean", "'activation'")),
        (("preactivation", "rectified"), ("rectified", "'preactivation'", "'output'")),
        ((), ("kinds",)),
        (3, ("kinds", "3")),
    ],
)
def test_unknown_kinds(net: nn.Module, kinds: Any, phrases: tuple[str, ...]) -> None:
    _refused(net, ArgumentError, says(*phrases), kinds=kinds)


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, None, "every", "1"])
def test_keep(net: nn.Module, keep: Any) -> None:
    _refused(net, ArgumentError, says("keep", repr(keep), "positive", "'all'"), keep=keep)


@pytest.mark.parametrize("every", [0, -2, 2.0, True, None, "2"])
def test_every(net: nn.Module, every: Any) -> None:
    _refused(net, ArgumentError, says("every", repr(every), "positive"), every=every)


@pytest.mark.parametrize("filters", [4, -5, [0, 99], {"conv1": 4}, {"conv1": [1, 77]}])
def test_filters_out_of_range(net: nn.Module, filters: Any) -> None:
    _refused(net, FilterRangeError, says("conv1", "4 filters"), layers="conv1", filters=filters)
    _refused(net, IndexError, says("out of range"), layers="conv1", filters=filters)


@pytest.mark.parametrize("filters", ["conv1", 1.5, [], [1.5], [True], {"conv1": []}])
def test_filters_of_no_allowed_form(net: nn.Module, filters: Any) -> None:
    _refused(net, ArgumentError, says("filter"), layers="conv1", filters=filters)


def test_filters_of_an_unknown_layer(net: nn.Module) -> None:
    _refused(net, UnknownLayerError, says("conv9", "conv1"), filters={"conv9": 1})


def test_unknown_option(net: nn.Module) -> None:
    before = fingerprint(net)
    with pytest.raises(TypeError, match="keeep"):
        capture(net, keeep=1)  # type: ignore[call-arg]
    assert_nothing_left(before, net)


# -- the life cycle -------------------------------------------------------------------------------


def test_entered_twice(net: nn.Module, x: Tensor) -> None:
    once = capture(net)
    with once as maps:
        net(x)
        with pytest.raises(CaptureStateError, match=says("entered", "capture(model)")), once:
            pass
        net(x)
        assert maps["conv1"].step == 1  # the first is none the worse for it
    with pytest.raises(CaptureStateError, match=says("used", "capture(model)")), once:
        pass


def test_made_and_never_entered_sets_nothing(net: nn.Module, x: Tensor) -> None:
    before = fingerprint(net)
    capture(net)
    net(x)
    assert_nothing_left(before, net)


# -- look-ups -------------------------------------------------------------------------------------


def test_before_any_pass(net: nn.Module) -> None:
    with capture(net) as maps:
        with pytest.raises(NoPassError, match=says("conv1", "no forward pass")):
            maps["conv1"]
        with pytest.raises(KeyError):
            maps["conv1", "preactivation", 2]
        assert len(maps) == 0
        assert list(maps) == []
        assert maps.select(kind="activation") == []
        assert "conv1" not in maps
        assert maps.layers == []
        repr(maps)
    with pytest.raises(NoPassError):
        maps["conv1"]


@pytest.mark.parametrize(
    ("options", "key", "error", "match"),
    [
        ({}, "conv9", UnknownLayerError, says("conv9", "did you mean", "'conv1'")),
        ({}, ("conv9", "preactivation"), KeyError, "conv9"),
        ({"layers": "conv1"}, "conv2", UnknownLayerError, says("conv2", "not selected", "'conv1'")),
        ({}, "relu", MapLookupError, says("relu", "output")),  # no layer
        ({}, "fc", NoActivationError, says("fc", "no nonlinearity", "preactivation")),
        ({}, ("fc", "activation"), NoActivationError, "fc"),
        (
            {"kinds": "activation"},
            ("conv1", "preactivation"),
            KindNotCapturedError,
            says("preactivation", "kinds", "conv1", "'activation'"),
        ),
        (
            {"kinds": "preactivation"},
            ("conv1", "activation"),
            KindNotCapturedError,
            says("activation", "kinds"),
        ),
        ({}, ("conv1", "activaton"), FmapkitError, says("activaton", "'activation'")),
        *(
            ({}, key, MapLookupError, "layer")
            for key in (3, None, (), ("conv1", "activation", 1, 2), (1, "activation"))
        ),
    ],
)
def test_look_ups(
    net: nn.Module, x: Tensor, options: Any, key: Any, error: type[Exception], match: str
) -> None:
    with capture(net, **options) as maps:
        net(x)
        with pytest.raises(error, match=match):
            maps[key]


def test_what_is_there_and_what_is_selected(net: nn.Module, x: Tensor) -> None:
    with capture(net) as maps:
        net(x)
        assert "conv9" not in maps
        assert "conv1" in maps
        with pytest.raises(ArgumentError, match=says("activaton", "'activation'")):
            maps.select(kind="activaton")


def test_ambiguous_names_the_choices(x: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x).relu()).relu()

    model = Twice().eval()
    with capture(model) as maps:
        model(x)
        with pytest.raises(AmbiguousMapError, match=says("conv", "call", "0", "1", "select")):
            maps["conv"]
        assert len(maps.select(layer="conv", kind="activation")) == 2
        assert len(maps.select(layer="conv", kind="activation", call=1)) == 1


@pytest.mark.parametrize("index", [4, 99, -5])
def test_filter_out_of_range(net: nn.Module, x: Tensor, index: int) -> None:
    with capture(net) as maps:
        net(x)
        phrases = says(str(index), "conv1", "4 filters", "0 to 3")
        with pytest.raises(FilterRangeError, match=phrases):
            maps["conv1", "activation", index]
        with pytest.raises(IndexError):
            maps["conv1"][index]
        assert maps.select(layer="conv1", filter=99) == []


@pytest.mark.parametrize("index", [1.0, "1", None, True, slice(0, 2)])
def test_filter_that_is_no_int(net: nn.Module, x: Tensor, index: Any) -> None:
    with capture(net) as maps:
        net(x)
        with pytest.raises(MapLookupError, match="int"):
            maps["conv1"][index]


def test_filter_that_is_not_held(net: nn.Module, x: Tensor) -> None:
    with capture(net, layers="conv1", filters=[1, 3]) as maps:
        net(x)
        whole = net.bn1(net.conv1(x)).relu()
        assert same_bits(maps["conv1", "activation", 3].tensor, whole[:, 3].detach())
        with pytest.raises(FilterRangeError, match=says("2", "conv1", "1, 3")):
            maps["conv1", "activation", 2]


def test_a_filter_of_a_filter(net: nn.Module, x: Tensor) -> None:
    with capture(net) as maps:
        net(x)
        with pytest.raises(FilterRangeError, match=says("filter 2")):
            maps["conv1"][2][0]


# -- maps that are no longer what they were -------------------------------------------------------


def test_a_map_written_to_by_the_user_raises_when_read_again() -> None:
    seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    with torch.no_grad(), capture(model) as maps:
        out = model(torch.randn(1, 3, 4, 4))
        out.mul_(2)  # the model's output is the activation's memory
        with pytest.raises(MapOverwrittenError, match=says("activation", "'0'", "in place")):
            maps["0"].tensor  # noqa: B018


def test_features_on_disk_name_the_python_that_they_take(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmapkit.data import extract

    monkeypatch.setitem(sys.modules, "zarr", None)
    monkeypatch.setattr("fmapkit.data._place._ZARR_TAKES", (99, 0))
    says = (
        "features on disk need zarr 3.1.4, which takes Python 3.11 or newer, and this is "
        f"Python {platform.python_version()}"
    )
    with pytest.raises(ImportError, match=f"^{re.escape(says)}$"):
        extract(net, [torch.randn(2, 3, 5, 5)], "0", tmp_path / "features", progress=False)


# -- fmapkit's own failures -----------------------------------------------------------------------


def test_a_failing_selector_raises_at_the_call(net: nn.Module) -> None:
    before = fingerprint(net)

    def broken(*_: object) -> bool:
        raise ZeroDivisionError("in the user's selector")

    with pytest.raises(ZeroDivisionError):
        capture(net, layers=broken)
    assert_nothing_left(before, net)


def test_errors_in_forward_are_the_users_own(net: nn.Module) -> None:
    """The model's error comes through unchanged: same type, same text, no wrapping."""
    wrong = torch.randn(2, 7, 5, 5)
    with pytest.raises(RuntimeError) as bare:
        net(wrong)
    for _ in range(2):
        with pytest.raises(RuntimeError) as watched, capture(net) as maps:
            net(wrong)
        assert str(watched.value) == str(bare.value)
        assert type(watched.value) is type(bare.value)
        assert not isinstance(watched.value, FmapkitError)
    repr(maps)
