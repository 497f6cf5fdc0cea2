"""The page to share: what it says is what the maps are, in a real browser."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

import fmapkit
from fmapkit import FeatureMaps, capture
from fmapkit.analysis import DeadFilters, Statistics
from fmapkit.page.encoding import LEVELS, png, quantised

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


class Net(nn.Module):
    """Convolutions, one of them wide, a residual sum in place, a token layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.tokens = nn.Linear(6, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        y = self.conv2(x)
        y += x
        y = torch.relu(y)
        t = nn.functional.gelu(self.tokens(y.flatten(2).transpose(1, 2)))
        return self.head(t.mean(1))


@pytest.fixture(scope="module")
def shown() -> tuple[FeatureMaps, Tensor]:
    torch.manual_seed(3)
    model, images = Net(), torch.rand(2, 3, 12, 10)
    with capture(model) as maps, torch.no_grad():
        model(images)
    return maps, images


def _data(path: Path) -> list[dict[str, Any]]:
    """The page's sections, read back."""
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S
    )
    assert found
    sections: list[dict[str, Any]] = json.loads(found[1])["sections"]
    return sections


def _codes(panel: dict[str, Any]) -> np.ndarray[Any, Any]:
    raw = zlib.decompress(base64.b64decode(panel["data"]))
    return np.frombuffer(raw, np.uint8).reshape(panel["shape"])


def _assert_shows(panel: dict[str, Any], truth: np.ndarray[Any, Any]) -> None:
    """Each value, to half a step."""
    back = (_codes(panel).astype(float) - panel["zero"]) * panel["step"]
    assert np.abs(back - truth).max() <= panel["step"] / 2 * (1 + 1e-9)


# -- values ------------------------------------------------------------------------------------


@given(
    arrays(
        np.float64,
        (2, 3, 2),
        elements=st.floats(allow_nan=True, allow_infinity=True, width=64),
    ),
    st.booleans(),
)
def test_codes_are_within_half_a_step_and_zero_is_exact(
    values: np.ndarray[Any, Any], signed: bool
) -> None:
    codes, zero, step = quantised(values, signed=signed)
    finite = np.isfinite(values)
    assert ((codes > 0) == finite).all()
    # In units of the largest, so that the check itself does not overflow.
    unit = max(np.abs(values[finite]).max(initial=0.0), 1e-300)
    back = (codes.astype(float) - zero) * (step / unit)
    off = np.abs(back - np.where(finite, values, 0.0) / unit)[finite]
    spread = (max(values[finite].max(initial=0), 0) / unit) - (
        min(values[finite].min(initial=0), 0) / unit
    )
    if signed:
        spread = 2.0
    assert (off <= spread / (LEVELS - 1) / 2 + 1e-9).all()
    assert (back[finite & (values == 0)] == 0).all()
    assert 1 <= zero <= 255


def test_a_png_is_read_back_by_somebody_else() -> None:
    image = pytest.importorskip("matplotlib.image")
    for shape in ((5, 7), (5, 7, 3)):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        head, _, data = png(pixels).partition(",")
        assert head == "data:image/png;base64"
        back = image.imread(io.BytesIO(base64.b64decode(data)), format="png")
        assert (np.rint(back * 255).astype(np.uint8) == pixels).all()


def test_the_page_holds_each_map_in_order(
    shown: tuple[FeatureMaps, Tensor], tmp_path: Path
) -> None:
    maps, images = shown
    path = maps.to_html(tmp_path / "maps.html", image=images, sample=1)
    assert path == tmp_path / "maps.html"
    first, table, *layers = _data(path)
    assert (first["name"], table["name"]) == ("What the model was given", "All maps")
    assert [s["name"] for s in layers] == ["conv1", "conv2", "tokens", "head"]
    assert [[p["heading"] for p in s["panels"]] for s in layers] == [
        ["z", "a = relu(z)"],
        ["z", "a = relu(z)"],
        ["z", "a = gelu(z)"],
        ["z"],
    ]
    for section in layers:
        for panel in section["panels"]:
            kind = "preactivation" if panel["heading"] == "z" else "activation"
            sample = maps[section["name"], kind].tensor[1]
            if section["name"] == "tokens":
                sample = sample.T  # filters lie along the last axis
            truth = sample.double().numpy().reshape(panel["shape"])
            _assert_shows(panel, truth)
            facts = dict(panel["facts"])
            flat = truth.reshape(len(truth), -1)
            assert facts["max"] == [float(f"{v:.6g}") for v in flat.max(1)]
            assert np.allclose(facts["mean"], flat.mean(1), rtol=1e-5, atol=0)
            assert np.allclose(facts["share of zeros"], (flat == 0).mean(1), rtol=1e-5)


def test_large_images_are_means_and_weak_filters_are_left_out_and_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 9, 1, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1, 9, 2, 8, 3, 7, 4, 6, 5.0]).view(9, 1, 1, 1))
    x = torch.rand(1, 1, 11, 8)
    with capture(model) as maps, torch.no_grad():
        model(x)
    _, layer = _data(maps.to_html(tmp_path / "m.html", max_side=4, max_filters=3))
    a = layer["panels"][1]
    assert a["note"] == ("9 filters, the 3 strongest of them here, 11×8 drawn as means of 3×2")
    assert a["labels"] == [1, 3, 5]  # weights 9, 8, 7, in the order of their numbers
    assert layer["panels"][0]["labels"] == [1, 3, 5]
    assert a["shape"] == [3, 4, 4]
    whole = maps["0"].tensor[0, [1, 3, 5]].double()
    # Rows 0–2, 3–5, 6–8, 9–10; columns in pairs.
    truth = torch.stack([whole[:, r : r + 3].mean(1) for r in (0, 3, 6, 9)], 1)
    truth = truth.view(3, 4, 4, 2).mean(-1)
    _assert_shows(a, truth.numpy())
    assert dict(a["facts"])["max"] == [float(f"{v:.6g}") for v in whole.flatten(1).amax(1)]


def test_a_layer_keeps_the_same_filters_of_z_as_of_a(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-9.0], [2.0], [-8.0]]))
    with capture(model) as maps, torch.no_grad():
        model(torch.ones(1, 1))
    _, layer = _data(maps.to_html(tmp_path / "m.html", max_filters=2))
    assert [panel["labels"] for panel in layer["panels"]] == [[0, 2], [0, 2]]  # not 1 and 3


def test_what_is_not_a_number_is_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, math.nan, math.inf]))
    with capture(model) as maps, torch.no_grad():
        model(torch.zeros(1, 2))
    _, layer = _data(maps.to_html(tmp_path / "m.html"))
    z = layer["panels"][0]
    assert _codes(z).ravel().tolist() == [255, 0, 0]
    assert dict(z["facts"])["NaN or infinite"] == [0, 1, 1]
    assert dict(z["facts"])["max"] == [1, "nan", "nan"]


@pytest.mark.parametrize(("sigma", "colours"), [(nn.Tanh(), "signed"), (nn.GELU(), "positive")])
def test_activations_of_both_signs_have_0_in_the_middle(
    sigma: nn.Module, colours: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(1, 1), sigma)
    with capture(model) as maps, torch.no_grad():
        model[1].weight.fill_(1.0)
        model(torch.linspace(-3, 3, 61).view(1, -1, 1))
    _, layer = _data(maps.to_html(tmp_path / "m.html"))
    a = layer["panels"][1]
    assert (a["colours"], a["zero"] == 128) == (colours, colours == "signed")


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("</script><b>", nn.Linear(2, 2))
    with capture(model) as maps, torch.no_grad():
        model(torch.zeros(1, 2))
    path = maps.to_html(tmp_path / "m.html", title="<i>{{data}}")
    text = path.read_text("utf-8")
    assert text.count("</script>") == 2
    assert "<title>&lt;i&gt;{{data}}</title>" in text
    assert _data(path)[1]["name"] == "</script><b>"
    assert "http" not in text.replace("http-equiv", "")  # nothing is loaded from anywhere


@pytest.mark.parametrize("model", [nn.Conv3d(1, 2, 1), nn.Conv1d(1, 2, 1), nn.Conv2d(1, 2, 1)])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_other_shapes_and_unbatched_maps(
    model: nn.Module, batch: tuple[int, ...], tmp_path: Path
) -> None:
    spatial = {nn.Conv1d: (7,), nn.Conv2d: (7, 5), nn.Conv3d: (4, 7, 5)}[type(model)]
    net = nn.Sequential(model, nn.Tanh())
    with capture(net, dtype=torch.bfloat16) as maps, torch.no_grad():
        net(torch.randn(*batch, 1, *spatial))
    _, layer = _data(maps.to_html(tmp_path / "m.html"))
    a = layer["panels"][1]
    assert a["shape"] == [2, *(1,) * (2 - len(spatial)), *spatial[-2:]]
    assert a["note"] == "2 filters" + (", slice 2 of 4" if len(spatial) == 3 else "")
    whole = maps["0"].tensor[(0,) if batch else ...].double()
    middle = whole[:, 2] if len(spatial) == 3 else whole
    _assert_shows(a, middle.numpy().reshape(a["shape"]))


def test_sparse_and_complex_maps(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sparse, self.complex = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.sparse(x.to_sparse())
            return self.complex(torch.complex(x, x))

    odd = Odd()
    with capture(odd, kinds="output", layers=["sparse", "complex"]) as maps, torch.no_grad():
        odd(torch.tensor([[3.0, -4.0]]))
    _, sparse, complex_ = _data(maps.to_html(tmp_path / "m.html"))
    assert sparse["note"] == "output: not drawn: it is sparse or nested."
    assert dict(complex_["panels"][0]["facts"])["max"] == [4.24264, 5.65685]  # |3+3i|, |4+4i|


def test_tokens_as_the_image_that_they_were_cut_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))
    with capture(model) as maps, torch.no_grad():
        model(torch.randn(2, 13, 3))  # a class token, and 4×3 patches
    _, layer, _ = _data(maps.to_html(tmp_path / "m.html", grid=(4, 3), sample=1))
    a = layer["panels"][1]
    assert a["note"] == "5 filters, tokens as 4×3 without the first 1"
    assert (a["form"], a["shape"]) == ("image", [5, 4, 3])
    truth = maps["0"].tensor[1, 1:].T.reshape(5, 4, 3).double().numpy()
    _assert_shows(a, truth)
    assert _said(maps, tmp_path / "n.html", grid=(4, 4)) == (
        "grid=(4, 4) takes maps of shape (samples, tokens, filters) with 16 tokens or more, and "
        "there is none"
    )


def test_an_image_as_it_was_before_it_was_normalised(
    shown: tuple[FeatureMaps, Tensor], tmp_path: Path
) -> None:
    maps, images = shown
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.2, 0.3]
    scaled = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    one = _data(maps.to_html(tmp_path / "a.html", image=images))[0]
    two = _data(maps.to_html(tmp_path / "b.html", image=scaled, mean=mean, std=std))[0]
    assert one == two
    assert _said(maps, tmp_path / "n.html", image=images, mean=mean) == (
        "mean= and std= go together: the image is (x - mean) / std"
    )


# -- errors ------------------------------------------------------------------------------------


def _said(maps: FeatureMaps, path: Path, *args: Any, **options: Any) -> str:
    with pytest.raises(fmapkit.FmapkitError) as caught:
        maps.to_html(path, *args, **options)
    assert not path.exists()
    return str(caught.value)


def test_errors(shown: tuple[FeatureMaps, Tensor], tmp_path: Path) -> None:
    maps, images = shown
    path = tmp_path / "m.html"
    assert _said(maps, path, sample=2) == (
        "sample 2 is out of range: the preactivation of layer 'conv1' has shape (2, 6, 12, 10), so "
        "2 samples"
    )
    assert _said(maps, path, max_side=0) == "max_side must be a positive int, not 0"
    assert _said(maps, path, max_filters=True) == "max_filters must be a positive int, not True"
    assert _said(maps, path, "conv3") == (
        "layers='conv3' matches no layer; did you mean 'conv2' or 'conv1'? (held: 'conv1', "
        "'conv2', 'tokens', 'head')"
    )
    assert _said(maps, path, image=torch.rand(2, 4, 4)) == (
        "image must have shape (H, W), (1, H, W) or (3, H, W), or be a batch of these, not "
        "(2, 4, 4)"
    )
    assert _said(maps, path, sample=1, image=images[:1]) == (
        "sample 1 is out of range: image has shape (1, 3, 12, 10), so 1 samples"
    )
    with capture(Net()) as nothing:
        pass
    assert _said(nothing, path) == (
        "nothing to show: no maps are held; run the model in the block first"
    )


def test_an_empty_batch(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    with capture(model) as maps, torch.no_grad():
        model(torch.zeros(0, 1, 3, 3))
    assert "so 0 samples" in _said(maps, tmp_path / "m.html")


def test_images_in_other_ranges(shown: tuple[FeatureMaps, Tensor], tmp_path: Path) -> None:
    maps, _ = shown
    path = tmp_path / "m.html"
    assert _data(maps.to_html(path, image=np.zeros((4, 4), np.uint8)))[0]["note"] == ""
    given = torch.linspace(-2, 2, 27).view(3, 3, 3)
    assert _data(maps.to_html(path, image=given))[0]["note"] == (
        "Values from -2 to 2 were spread over black to white."
    )


# -- analyses ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched() -> tuple[Statistics, DeadFilters]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([9.0, 9.0, -100.0, 9.0]))
    stats, dead = Statistics(bins=[0.0, 1.0]), DeadFilters(after=4)
    with capture(model, analyses=[stats, dead], keep=0), torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 1, 2, 2))
    return stats, dead


def test_analyses_show_the_same_table_in_a_notebook(
    watched: tuple[Statistics, DeadFilters],
) -> None:
    for shown in (*watched, watched[0]["0"], watched[1]["0"]):
        text, html = repr(shown), shown._repr_html_()
        assert html.startswith("<table><caption>" + text.splitlines()[-1].replace("'", "&#x27;"))
        cells = re.findall(r"<t[dh] [^>]*>(.*?)</t[dh]>", html)
        words = [w for line in text.splitlines()[:-1] for w in re.split(r"\s{2,}", line.strip())]
        said = [w for w in words if w.strip("─")]
        assert [c for c in cells if c] == said


def test_pages_of_analyses(watched: tuple[Statistics, DeadFilters], tmp_path: Path) -> None:
    stats, dead = watched
    table, *sections = _data(stats.to_html(tmp_path / "s.html"))
    assert table["html"] == stats._repr_html_()
    assert [s["name"] for s in sections] == ["0", "0", "3"]
    mean, std, histogram = sections[1]["panels"]
    assert dict(mean["facts"])["mean"] == [float(f"{v:.6g}") for v in stats["0"].mean.tolist()]
    assert std["heading"] == "std"
    assert histogram["places"] == ["below 0", "0 to 1", "1 and above"]
    _, strip = _data(dead.to_html(tmp_path / "d.html"))
    (panel,) = strip["panels"]
    assert panel["note"] == "1 of 4 filters dead, by zeros"
    # 12 inputs, of which one map holds four; only filter 2 never fired.
    assert _codes(panel)[:, 0].tolist() == [[0] * 12, [0] * 12, [2] * 12, [0] * 12]


def test_figures_and_other_peoples_analyses(
    shown: tuple[FeatureMaps, Tensor], tmp_path: Path
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")

    class Own:
        def update(self, fm: fmapkit.FeatureMap) -> None: ...

        def __repr__(self) -> str:
            return "<nothing seen>"

    figure = pyplot.figure(figsize=(1, 1))
    *_, own, drawn = _data(shown[0].to_html(tmp_path / "m.html", analyses=[Own(), figure]))
    pyplot.close(figure)
    assert (own["name"], own["html"]) == ("Own", "<pre>&lt;nothing seen&gt;</pre>")
    assert drawn["html"].startswith('<img alt="figure" src="data:image/png;base64,')


# -- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    with sync.sync_playwright() as tools:
        found = tools.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1000, "height": 700}, color_scheme="light")
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    opened = context.new_page()
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text))
    yield opened
    context.close()
    assert not faults
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def _open(page: Any, path: Path) -> None:
    page.goto(path.as_uri())
    page.wait_for_selector("canvas[data-drawn]")


def _canvas(page: Any, layer: str, panel: int) -> Any:
    found = page.locator(f'section[data-name="{layer}"] .scroll > canvas').nth(panel)
    found.scroll_into_view_if_needed()
    page.wait_for_function("node => node.dataset.drawn", arg=found.element_handle())
    return found


def test_values_under_the_pointer(
    page: Any, shown: tuple[FeatureMaps, Tensor], tmp_path: Path
) -> None:
    maps, images = shown
    _open(page, maps.to_html(tmp_path / "m.html", image=images, title="A net"))
    assert page.title() == "A net"
    canvas = _canvas(page, "conv2", 1)
    # Images of 12×10 are drawn 36 pixels wide, 43 high, 4 apart. Filter 3, row 7, column 2:
    canvas.hover(position={"x": 3 * 40 + 36 * 2.5 / 10, "y": 43 * 7.5 / 12})
    text = page.locator("#tip").inner_text()
    found = re.match(r"filter 3 at row 7, column 2: (\S+)\n(.*)", text)
    assert found, text
    a = maps["conv2", "activation"].tensor[0]
    half = float(a.max()) / LEVELS / 2
    assert abs(float(found[1]) - float(a[3, 7, 2])) <= half * 1.01
    assert f"max {float(f'{a[3].max():.4g}'):g}" in found[2]


def test_pixels_have_the_colours_of_the_scale(
    page: Any, shown: tuple[FeatureMaps, Tensor], tmp_path: Path
) -> None:
    colormaps = pytest.importorskip("matplotlib").colormaps
    maps, _ = shown
    _open(page, maps.to_html(tmp_path / "m.html"))
    for panel, name in ((0, "RdBu_r"), (1, "magma")):
        canvas = _canvas(page, "conv1", panel)
        z = maps["conv1", "preactivation" if panel == 0 else "activation"].tensor[0].double()
        high = z.abs().max()
        share = (z[2, 5, 5] / high + 1) / 2 if panel == 0 else z[2, 5, 5] / high
        x, y = int(2 * 40 + 36 * 5.5 / 10), int(43 * 5.5 / 12)
        drawn = canvas.evaluate(
            "(node, [x, y]) => [...node.getContext('2d').getImageData(x, y, 1, 1).data]", [x, y]
        )
        truth = np.array(colormaps[name](float(share))[:3]) * 255
        assert np.abs(np.array(drawn[:3]) - truth).max() < 12  # eleven stops of the same scale


def test_find_sort_and_theme(page: Any, shown: tuple[FeatureMaps, Tensor], tmp_path: Path) -> None:
    maps, _ = shown
    _open(page, maps.to_html(tmp_path / "m.html"))

    def layers() -> list[str]:
        found = page.locator("section:not([hidden])").all()
        return [section.get_attribute("data-name") for section in found]

    page.keyboard.press("/")
    page.keyboard.type("conv*")
    assert layers() == ["conv1", "conv2"]
    assert page.locator("#count").inner_text() == "2 of 4 shown"
    page.keyboard.press("Control+a")
    page.keyboard.type("ENS")
    assert layers() == ["tokens"]
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    page.keyboard.press("Escape")
    canvas = _canvas(page, "conv1", 1)
    assert canvas.get_attribute("data-first") == "0"
    page.keyboard.press("s")
    peak = maps["conv1"].tensor[0].flatten(1).amax(1)
    assert canvas.get_attribute("data-first") == str(int(peak.argmax()))
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == "light"
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("t")
    assert page.evaluate(theme) == "dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.emulate_media(color_scheme="dark")
    page.reload()
    assert page.evaluate(theme) == "dark"


def test_enlarged_by_click_and_by_keyboard(
    page: Any, shown: tuple[FeatureMaps, Tensor], tmp_path: Path
) -> None:
    maps, _ = shown
    _open(page, maps.to_html(tmp_path / "m.html"))
    canvas = _canvas(page, "conv2", 0)
    canvas.click(position={"x": 2 * 40 + 5, "y": 5})
    name = page.locator("#large-name")
    name.wait_for()
    assert name.inner_text() == "conv2 · filter 2"
    large = page.locator("#large canvas")
    assert large.count() == 2  # z beside a
    large.nth(1).hover(position={"x": 1, "y": 1})
    a = maps["conv2"].tensor[0]
    said = page.locator("#large-at").inner_text()
    found = re.match(r"a = relu\(z\): filter 2 at row 0, column 0: (\S+)", said)
    assert found, said
    assert abs(float(found[1]) - float(a[2, 0, 0])) <= float(a.max()) / LEVELS
    page.keyboard.press("ArrowRight")
    assert name.inner_text() == "conv2 · filter 3"
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()
    # Back in the map, by keyboard alone.
    assert page.evaluate("document.activeElement.tagName") == "CANVAS"
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").inner_text().startswith("filter 4\nhighest |value| ")
    page.keyboard.press("Enter")
    name.wait_for()
    assert name.inner_text() == "conv2 · filter 4"


def test_a_page_of_analyses_in_the_browser(
    page: Any, watched: tuple[Statistics, DeadFilters], tmp_path: Path
) -> None:
    stats, dead = watched
    _open(page, dead.to_html(tmp_path / "d.html"))
    canvas = _canvas(page, "0", 0)
    # A strip is 48 pixels wide (12 inputs), 7 high, 2 apart; all four stand side by side.
    canvas.hover(position={"x": 2 * 50 + 2, "y": 3})
    said = page.locator("#tip").inner_text()
    assert said.startswith("filter 2 at inputs 0 to 0: silent until now, and dead\n")
    assert "inputs since it fired 12" in said
    _open(page, stats.to_html(tmp_path / "s.html"))
    _canvas(page, "0", 0).hover(position={"x": 16 * 1 + 5, "y": 5})
    said = page.locator("#tip").inner_text()
    z = stats["0", "preactivation"]
    assert said.startswith(f"filter 1: {float(f'{float(z.mean[1]):.4g}'):g}\nmean ")


def test_a_resnet_18_takes_less_than_five_megabytes(page: Any, tmp_path: Path) -> None:
    provider = pytest.importorskip("pytorchcv.model_provider")
    torch.manual_seed(0)
    model = provider.get_model("resnet18").eval()
    images = torch.randn(1, 3, 224, 224)
    with capture(model) as maps, torch.no_grad():
        model(images)
    path = maps.to_html(tmp_path / "m.html", image=images)
    assert path.stat().st_size < 5_000_000
    _open(page, path)
    sections = page.locator("section").count()
    assert sections == 2 + len(maps.layers)
    canvas = _canvas(page, "output", 0)
    assert canvas.get_attribute("aria-label") == "output, z: 1000 filters"
