"""Errors say as data what their message says: whose map, which pass, what could be meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmapkit as fk
from fmapkit import FeatureMaps, FmapkitError, capture, edits, feature_map, views
from fmapkit.analysis import DeadFilters, Similarity, Statistics, TopInputs
from fmapkit.plot import plot_filters, plot_map

X = torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)
DATA = ("layer", "kind", "filter", "call", "step", "candidates", "bytes")


class Net(nn.Module):
    """conv1 - relu - conv2 - relu - conv2 again - fc, with no nonlinearity behind fc."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


NET = Net().eval()


def run(passes: int = 1, **options: Any) -> FeatureMaps:
    """The maps of some passes."""
    with capture(NET, **options) as maps, torch.no_grad():
        for _ in range(passes):
            NET(X)
    return maps


def seen(analysis: Any) -> Any:
    """The analysis, after a pass."""
    run(analyses=analysis)
    return analysis


def overwritten() -> FeatureMaps:
    maps = run(2, layers="conv1", keep=2)
    maps["conv1"].tensor.zero_()
    return maps


def cleared() -> FeatureMaps:
    maps = run()
    maps.clear()
    return maps


def edited(where: Any, function: Any) -> Any:
    with capture(NET, edit={where: function}):
        NET(X)


CONV1 = {"layer": "conv1", "kind": "activation", "call": 0, "step": 0}
CALLS = [
    {
        "layers": "conv2",
        "kind": "activation",
        "call": n,
        "step": 0,
        "path": "",
        "nonlinearity": "relu",
    }
    for n in (0, 1)
]
HELD = ["preactivation", "activation"]
TABLE: list[tuple[str, Callable[[], Any], dict[str, Any]]] = [
    # look-ups
    ("a name", lambda: run()["convl"], {"layer": "convl", "candidates": ("conv2", "conv1")}),
    ("no pass", lambda: run(0)["conv1"], {"layer": "conv1"}),
    ("cleared", lambda: cleared()["conv1"], {"layer": "conv1"}),
    ("let go", lambda: run(keep=0, analyses=Statistics())["conv1"], {"layer": "conv1"}),
    (
        "of a kind, let go",
        lambda: run(keep=0, analyses=Statistics())["conv1", "activation"],
        {"layer": "conv1", "kind": "activation"},
    ),
    (
        "a kind",
        lambda: run()["conv1", "input"],
        {"layer": "conv1", "kind": "input", "candidates": tuple(HELD)},
    ),
    (
        "no activation",
        lambda: run(kinds=("response", "activation"))["fc"],
        {"layer": "fc", "kind": "activation", "candidates": ("response",)},
    ),
    (
        "two calls",
        lambda: run()["conv2"],
        {"layer": "conv2", "candidates": tuple(CALLS)},
    ),
    (
        "a filter",
        lambda: run()["conv1"][4],
        {**CONV1, "filter": 4, "candidates": (0, 1, 2, 3)},
    ),
    ("of one filter", lambda: list(run()["conv1"][2]), {**CONV1, "filter": 2}),
    (
        "select",
        lambda: run().select("cnv1"),
        {"layer": "cnv1", "candidates": ("conv1", "conv2")},
    ),
    # maps that are gone
    ("written to", lambda: overwritten()["conv1"], {**CONV1, "step": 1}),
    (
        "a weight that was not held",
        lambda: _with_other_weights()["conv1"].weight,
        CONV1,
    ),
    # z and a of three calls, (4, 4, 8, 8) in four bytes each, and what fc returns, (4, 2).
    ("a full store", lambda: run(max_bytes=1000), {"step": 0, "bytes": 6 * 4096 + 32}),
    # arguments
    (
        "a layer",
        lambda: capture(NET, "conv9"),
        {"layer": "conv9", "candidates": ("conv2", "conv1")},
    ),
    (
        "filters",
        lambda: capture(NET, "conv1", filters=7),
        {"layer": "conv1", "filter": 7, "candidates": (0, 1, 2, 3)},
    ),
    (
        "kinds",
        lambda: capture(NET, kinds="outpt"),
        {"kind": "outpt", "candidates": ("output",)},
    ),
    # a check
    (
        "a NaN",
        lambda: _with_nan(),
        {"layer": "conv1", "kind": "input", "filter": 1, "call": 0, "step": 0, "candidates": (1,)},
    ),
    # edits
    (
        "an edit's shape",
        lambda: edited("conv1", lambda fm: fm.tensor[:1]),
        CONV1,
    ),
    (
        "an edit's place",
        lambda: edited(("fc", "activation"), edits.zero()),
        {"layer": "fc", "kind": "activation", "step": 0},
    ),
    (
        "positions",
        lambda: edited(edits.Where("fc", "response", at=[3]), edits.zero()),
        {"layer": "fc", "kind": "response", "call": 0, "step": 0},
    ),
    # analyses
    (
        "of statistics",
        lambda: seen(Statistics())["conv3"],
        {"layer": "conv3", "candidates": ("conv2", "conv1")},
    ),
    (
        "of a kind that was not seen",
        lambda: seen(Statistics())["fc", "response"],
        {"layer": "fc", "kind": "response", "candidates": ("preactivation",)},
    ),
    ("before a pass", lambda: DeadFilters()["conv1"], {"layer": "conv1"}),
    (
        "top inputs of a filter",
        lambda: seen(TopInputs(2))["conv1"][9],
        {"layer": "conv1", "kind": "activation", "filter": 9, "candidates": (0, 1, 2, 3)},
    ),
    (
        "similarity",
        lambda: seen(Similarity())["conv1", "conv7"],
        {"layer": "conv7", "candidates": ("conv2", "conv1", "conv2 #1")},
    ),
    # views, pictures
    ("a grid", lambda: views.as_grid(run()["conv1"], 2, 2), CONV1),
    (
        "of one filter, drawn",
        lambda: plot_map(run()["conv1"][1], filters=2),
        {**CONV1, "filter": 1},
    ),
    (
        "weights of",
        lambda: plot_filters(run(), "fcc"),
        {"layer": "fcc", "candidates": ("fc",)},
    ),
    # functions, explanations, comparisons
    (
        "φ of a filter",
        lambda: feature_map(NET, "conv1", filters=5),
        {"layer": "conv1", "filter": 5, "candidates": (0, 1, 2, 3)},
    ),
    (
        "φ without activation",
        lambda: feature_map(NET, "fc", kind="activation")(X),
        {"layer": "fc", "kind": "activation"},
    ),
    (
        "φ of two calls",
        lambda: feature_map(NET, "conv2")(X),
        {
            "layer": "conv2",
            "kind": "activation",
            "candidates": ({"call": 0, "path": ""}, {"call": 1, "path": ""}),
        },
    ),
    (
        "a comparison",
        lambda: fk.compare(run(), run())["conv4"],
        {"layer": "conv4", "candidates": ("conv2", "conv1")},
    ),
]


def _with_other_weights() -> FeatureMaps:
    maps = run(weights=True)
    kept = NET.conv1.weight.detach().clone()
    with torch.no_grad():
        NET.conv1.weight.copy_(kept)
    return maps


def _with_nan() -> None:
    x = X.clone()
    x[0, 1] = float("nan")
    with capture(NET, check="finite"):
        NET(x)


@pytest.mark.parametrize(("raising", "data"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE])
def test_what_an_error_says_is_there_as_data(
    raising: Callable[[], Any], data: dict[str, Any]
) -> None:
    with pytest.raises(FmapkitError) as caught:
        raising()
    error = caught.value
    has = {name: getattr(error, name) for name in DATA}
    assert {k: v for k, v in has.items() if v not in (None, ())} == data


def test_what_is_known_first_stays() -> None:
    error = fk.MapLookupError("no", layer="conv1")
    assert error.about(layer="fc", step=3, candidates=["a"]) is error
    assert (error.layer, error.step, error.candidates) == ("conv1", 3, ("a",))
