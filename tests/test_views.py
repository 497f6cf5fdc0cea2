"""Views of a map against their formulas, and what is drawn of them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fmapkit
from fmapkit import (
    ArgumentError,
    FeatureMaps,
    FilterRangeError,
    UnknownLayerError,
    capture,
    views,
)
from tests.test_statistics import fmap

# -- values --------------------------------------------------------------------------------------


def test_contrast_normalised_by_hand() -> None:
    """Each value by its own loop, in float64, after the formula."""
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    size, sigma, reach = 5, 1.25, 2
    place = np.arange(size) - reach
    line = np.exp(-(place**2) / (2 * sigma**2))
    window = np.outer(line, line)

    def mean(values: np.ndarray[Any, Any], i: int, j: int) -> float:
        total = weight = 0.0
        for p in range(-reach, reach + 1):
            for q in range(-reach, reach + 1):
                if 0 <= i + p < 6 and 0 <= j + q < 5:
                    w = window[p + reach, q + reach]
                    total += w * values[:, i + p, j + q].mean()
                    weight += w
        return total / weight

    for n in range(2):
        values = x[n].numpy()
        v, s = np.empty_like(values), np.empty((6, 5))
        for i in range(6):
            for j in range(5):
                v[:, i, j] = values[:, i, j] - mean(values, i, j)
        for i in range(6):
            for j in range(5):
                s[i, j] = np.sqrt(mean(v**2, i, j))
        right = v / np.maximum(s, s.mean())
        found = views.contrast_normalised(fmap(x), 5).tensor[n].numpy()
        np.testing.assert_allclose(found, right, rtol=1e-10, atol=1e-12)
    unbatched = views.contrast_normalised(fmap(x[0], 0), 5)
    assert unbatched.filter_dim == 0
    torch.testing.assert_close(unbatched.tensor, views.contrast_normalised(fmap(x), 5).tensor[0])
    last = views.contrast_normalised(fmap(x.permute(0, 2, 3, 1), 3), 5)
    torch.testing.assert_close(last.tensor, views.contrast_normalised(fmap(x), 5).tensor)
    assert views.contrast_normalised(fmap(torch.zeros(1, 2, 4, 4))).tensor.eq(0).all()


def test_sparsity_by_hand() -> None:
    x = torch.randn(4, 3, 5).relu()
    x[:, 2] = 0
    x[0, 2, 0] = 2
    rows = x.movedim(1, 0).flatten(1).double()
    n = rows.shape[1]
    assert torch.equal(views.sparsity(fmap(x)), (rows == 0).double().mean(1))
    for r, hoyer, rolls in zip(
        rows, views.sparsity(fmap(x), "hoyer"), views.sparsity(fmap(x), "treves-rolls"), strict=True
    ):
        assert float(hoyer) == pytest.approx(
            float((n**0.5 - r.abs().sum() / r.norm()) / (n**0.5 - 1))
        )
        assert float(rolls) == pytest.approx(
            float((1 - r.mean() ** 2 / r.square().mean()) / (1 - 1 / n))
        )
    assert float(views.sparsity(fmap(x), "hoyer")[2]) == pytest.approx(1)
    assert float(views.sparsity(fmap(x), "treves-rolls")[2]) == pytest.approx(1)


def test_strongest() -> None:
    x = torch.tensor([[[0.0, 1.0], [5.0, -9.0], [2.0, 2.0]], [[7.0, 0.0], [5.0, 0.0], [2.0, 2.0]]])
    fm = fmap(x, filters=(10, 20, 30))
    assert views.strongest(fm) == [10, 20, 30]
    assert views.strongest(fm, 2, sample=0) == [20, 30]
    assert views.strongest(fm, sample=0, by="mean") == [30, 10, 20]
    assert views.strongest(fmap(torch.zeros(1, 3))) == [0, 1, 2]


def test_upsampled_and_grid() -> None:
    x = torch.randn(2, 3, 4, 5)
    large = views.upsampled(fmap(x), (8, 10))
    assert torch.equal(large.tensor, F.interpolate(x, size=(8, 10), mode="bilinear"))
    assert views.upsampled(fmap(x), 7, "nearest").shape == (2, 3, 7, 7)
    tokens = torch.randn(2, 1 + 6, 3)  # a class token, then two rows of three
    grid = views.as_grid(fmap(tokens, 2), 2, 3)
    assert torch.equal(grid.tensor, tokens[:, 1:].transpose(1, 2).reshape(2, 3, 2, 3))
    assert grid.tensor.data_ptr() == tokens[:, 1:].data_ptr()
    assert torch.equal(grid[1].tensor, tokens[:, 1:, 1].reshape(2, 2, 3))


def test_unnormalised() -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.1, 0.3]
    image = torch.rand(3, 4, 5)
    normal = (image - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(views.unnormalised(normal, mean, std), image)
    torch.testing.assert_close(views.unnormalised(normal[None], mean, std)[0], image)
    torch.testing.assert_close(
        views.unnormalised(torch.zeros(4, 5), 0.5, 0.1), torch.full((4, 5), 0.5)
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda fm: views.contrast_normalised(fm, 4), "size must be a positive odd number of loc"),
        (
            lambda fm: views.contrast_normalised(fm, sigma=0),
            "sigma must be a positive number",
        ),
        (lambda fm: views.sparsity(fm, "hoyr"), "not 'hoyr'; did you mean 'hoyer'?"),
        (lambda fm: views.strongest(fm, by="sum"), "by must be 'max' or 'mean', not 'sum'"),
        (lambda fm: views.strongest(fm, sample=2), "sample 2 is out of range: the map has 2"),
        (lambda fm: views.upsampled(fm, (3,)), "size must be rows and columns, not (3,)"),
        (lambda fm: views.upsampled(fm, 3, "linear"), "mode must be 'nearest', 'bilinear' or"),
        (lambda fm: views.as_grid(fm, 0, 2), "rows must be a positive int, not 0"),
        (
            lambda fm: views.as_grid(fm, 1, 2),
            "the activation of layer 'conv' has no positions: its",
        ),
        (
            lambda fm: views.unnormalised(fm.tensor, [1, 2], 1),
            "mean has 2 numbers, and the",
        ),
        (lambda fm: fm.plot(grid=(2, 2)), "has no positions"),
        (lambda fm: fm.plot(filters="strong"), "not 'strong'; did you mean 'strongest'?"),
        (
            lambda fm: fm.plot(overlay=torch.zeros(2, 4, 4)),
            "overlay must have shape (H, W), ",
        ),
        (lambda fm: fm.plot(overlay=torch.zeros(4, 4), mean=0.5), "mean= and std= go together"),
        (
            lambda fm: fm.plot(weights=True),
            "weights=True: no layer with weights made",
        ),
        (lambda fm: fm.plot(columns=0), "columns must be a positive int, not 0"),
    ],
)
def test_arguments(call: Any, says: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ArgumentError) as error:
        call(fmap(torch.randn(2, 3, 4, 4)))
    assert says in str(error.value)


def test_without_a_filter_axis() -> None:
    for fm in (fmap(torch.randn(2, 3), None), fmap(torch.randn(2, 3))[1]):
        for view in (views.strongest, views.sparsity, views.contrast_normalised):
            with pytest.raises(FilterRangeError, match="has no single filter axis"):
                view(fm)
    pytest.importorskip("matplotlib")
    with pytest.raises(FilterRangeError, match="filter 7 is out of range"):
        fmap(torch.randn(2, 3)).plot(filters=[1, 7])


# -- pictures ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 6, 3)
        self.mono = nn.Conv2d(1, 6, 3)
        self.line, self.head = nn.Conv1d(6, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.mono(x[:, :1]))
        x = F.relu(self.conv2(F.relu_(self.conv1(x)))) + y
        return self.head(self.line(x.flatten(2)).tanh().mean(2))


@pytest.fixture(scope="module")
def maps() -> FeatureMaps:
    pytest.importorskip("matplotlib").use("Agg")
    model, x = Net(), torch.randn(2, 3, 8, 8)
    with capture(model) as found, torch.no_grad():
        for _ in range(2):
            model(x)
    return found


def test_every_plot_is_drawn(maps: FeatureMaps) -> None:
    from matplotlib import pyplot

    image = torch.rand(3, 8, 8)
    every = [
        maps.plot(filters="strongest", weights=True, image=image, mean=0.1, std=0.9),
        maps.plot("conv*", filters=[3, 1], max_filters=20),
        maps["conv1"].plot(weights=True, filters=[4, 2], columns=3),
        maps["conv1"].plot(overlay=image),
        maps["conv1"].plot(overlay=image[0]),
        maps["conv1"][3].plot(weights=True),
        maps["line"].plot(weights=True),
        *(maps.plot_filters(layer) for layer in ("conv2", "mono", "line", "head")),
        maps.plot_filters("conv1", filters=[5, 2], scale="filter"),
        maps.plot_filters("head", shape=(2, 2)),
    ]
    for figure in every:
        figure.savefig(io.BytesIO(), dpi=20)
    assert not pyplot.get_fignums()  # nothing is left open


def test_what_a_picture_shows(maps: FeatureMaps) -> None:
    """The strongest filters first, the same in every row of a layer, of their own weights."""
    from fmapkit.plot import _pictures

    a, z = maps["conv1"], maps["conv1", "preactivation"]
    order = views.strongest(a, 5, sample=1)
    picture = _pictures.of_map(a, 1, 5, "strongest")
    assert picture.labels == order
    assert picture.caption == "5 of 20 filters, the strongest"
    np.testing.assert_array_equal(picture.values, a.tensor[1, order].double().numpy())
    figure = maps.plot("conv1", filters="strongest", sample=1, max_filters=5, weights=True)
    drawn = [[t.get_text() for t in ax.texts] for ax in figure.axes if ax.texts]
    assert drawn == [[str(f) for f in order]] * 3
    assert z.weight is not None
    weights = _pictures.of_weights(z.weight[order], order, 20)
    reach = float(z.weight[order].abs().max())
    colours = z.weight[order].movedim(1, 3).double().numpy() / (2 * reach) + 0.5
    np.testing.assert_allclose(weights.values, colours, atol=1e-6)
    two = _pictures.of_weights(maps["conv2"].weight[:2], [0, 1], 6)  # type: ignore[index]
    np.testing.assert_allclose(
        two.values,
        maps["conv2"].weight[:2].double().square().sum(1).sqrt().numpy(),  # type: ignore
    )
    assert not two.signed


def test_many_filters_are_one_image() -> None:
    """512 tiles are drawn at once, with the number of the first in each row."""
    pytest.importorskip("matplotlib")
    figure = fmap(torch.rand(1, 512, 4, 4)).plot(max_filters=512)
    ax = figure.axes[0]
    assert len(ax.images) == 1
    assert not ax.texts
    assert [t.get_text() for t in ax.get_yticklabels()][:3] == ["0", "32", "64"]
    figure.savefig(io.BytesIO(), dpi=20)
    again = pickle.loads(pickle.dumps(figure))
    assert type(again) is type(figure)
    assert again._repr_png_()[:4] == b"\x89PNG"


def test_plot_filters_of_what_has_none(maps: FeatureMaps) -> None:
    with pytest.raises(UnknownLayerError, match="'conv' matches no layer; did you mean 'conv2' or"):
        maps.plot_filters("conv")
    with pytest.raises(ArgumentError, match="shape=\\(3, 3\\) is of 9 inputs, and a filter has 4"):
        maps.plot_filters("head", shape=(3, 3))
    with pytest.raises(ArgumentError, match="scale must be 'layer' or 'filter', not 'all'"):
        maps.plot_filters("head", scale="all")  # type: ignore[arg-type]
    model = nn.Sequential(nn.ReLU())
    with capture(model) as bare, torch.no_grad():
        model(torch.randn(2, 3))
    with pytest.raises(ArgumentError, match="no layer with weights made the maps of '0'"):
        bare.plot_filters("0")


NOTEBOOK = """
import torch
from fmapkit import FeatureMap
fm = FeatureMap(torch.rand(2, 4, 3, 3), "activation", "conv", filter_dim=1, filters=range(4))
"""


def test_a_notebook_shows_a_figure_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not it has imported pyplot."""
    monkeypatch.setenv("PYTHONPATH", str(Path(fmapkit.__file__).parents[1]))
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    cells = [NOTEBOOK, "fm.plot()", "%matplotlib inline\nfm.plot()", "figure = fm.plot()"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    client.NotebookClient(book, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    shown = [sum("image/png" in o.get("data", {}) for o in cell.outputs) for cell in book.cells]
    assert shown == [0, 1, 1, 0]


def test_pixels_of_whole_numbers_and_of_a_batch() -> None:
    pixels = pytest.importorskip("fmapkit.plot").pixels
    draw = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=draw)
    expected = (whole[1].double() / 255).permute(1, 2, 0).numpy()
    for image in (whole, whole.numpy(), whole.long(), whole.float() / 255):
        assert np.allclose(pixels(image, sample=1), expected)
    assert np.allclose(pixels(whole[1, :1]), expected[..., 0])
    assert pixels(torch.tensor([[True, False]])).tolist() == [[1.0, 0.0]]
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    shape = (3, 1, 1)
    given = (whole / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    assert np.allclose(pixels(given, mean, std, sample=1), expected, atol=1e-6)
    with pytest.raises(ArgumentError, match="sample 2 is out of range: image has shape"):
        pixels(whole, sample=2)
