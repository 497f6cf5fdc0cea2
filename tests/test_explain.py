"""Projection, occlusion, Grad-CAM and the effective field: against captum and by formula."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import (
    AmbiguousMapError,
    ArgumentError,
    CaptureWarning,
    FilterRangeError,
    NotAModuleError,
    capture,
    edits,
)
from fmapkit.explain import (
    effective_field,
    grad_cam,
    occlusion,
    plot_heat,
    plot_projection,
    project,
    receptive_field,
)
from tests.explain_nets import Before

STYLES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "module": lambda m, x: m(x),
    "module in place": lambda m, x: nn.ReLU(inplace=True)(x),
    "registered in place": lambda m, x: _in_place(m)(x),
    "functional": lambda m, x: F.relu(x),
    "in place": lambda m, x: F.relu(x, inplace=True),
    "method": lambda m, x: x.relu(),
    "method in place": lambda m, x: x.relu_(),
    "clamp": lambda m, x: x.clamp(min=0),
    "clamp in place": lambda m, x: x.clamp_(min=0),
    "maximum": lambda m, x: torch.maximum(x, torch.zeros(())),
    "threshold": lambda m, x: F.threshold(x, 0.0, 0.0),
    "compared": lambda m, x: x * (x > 0),
}


def _in_place(relu: nn.Module) -> nn.Module:
    relu.inplace = True  # type: ignore[assignment]
    return relu


class Net(nn.Module):
    """A norm, pooling with switches, a residual sum in place, and ReLUs of one style."""

    def __init__(self, style: str = "module") -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2, self.c3 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 6, 3)
        self.r1, self.r2, self.r3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.fc = nn.Linear(6, 5)
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        sigma = STYLES[self.style]
        x = F.max_pool2d(sigma(self.r1, self.b1(self.c1(x))), 2)
        y = self.c2(x)
        y += x
        y = sigma(self.r3, self.c3(sigma(self.r2, y)))
        return self.fc(y.mean((2, 3)))


def _net(style: str = "module") -> Net:
    torch.manual_seed(3)
    return Net(style).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


# -- projection ------------------------------------------------------------------------------------


@pytest.fixture
def neuron(images: Tensor) -> tuple[int, int, int]:
    """A filter of c3 and a location, active in the first image."""
    model = _net()
    with capture(model, "c3") as maps, torch.no_grad():
        model(images)
    filter, place = divmod(int(maps["c3"].tensor[0].argmax()), 16)
    return filter, *divmod(place, 4)


_CAPTUM = {
    "deconvnet": "NeuronDeconvolution",
    "guided": "NeuronGuidedBackprop",
    "gradient": "NeuronGradient",
}


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not", "ignore:Setting backward hooks")
@pytest.mark.parametrize("method", _CAPTUM)
def test_projections_are_captums(method: Any, images: Tensor, neuron: tuple[int, int, int]) -> None:
    attr = pytest.importorskip("captum.attr")
    model = _net()
    expected = getattr(attr, _CAPTUM[method])(model, model.r3).attribute(
        images.clone(), neuron_selector=neuron
    )
    found = project(model, images, "c3", neuron[0], method=method, at=neuron[1:])
    assert expected.abs().max() > 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["deconvnet", "guided", "gradient"])
@pytest.mark.parametrize("style", [s for s in STYLES if s not in ("module", "compared")])
def test_relus_in_any_form_pass_on_the_same(
    style: str, method: Any, images: Tensor, neuron: tuple[int, int, int]
) -> None:
    """captum acts on `nn.ReLU` alone: the net of modules, with which it agrees, is the truth."""
    expected = project(_net(), images, "c3", neuron[0], method=method, at=neuron[1:])
    model = _net(style)
    found = project(model, images, "c3", neuron[0], method=method, at=neuron[1:])
    assert expected.abs().max() > 0
    assert torch.equal(found, expected)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["deconvnet", "guided", "gradient"])
def test_projections_have_the_formula(method: str) -> None:
    """Two layers, by hand: what comes back is weighed, passed by the ReLU's rule, weighed again."""
    one, two = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
    x = torch.randn(5, 4, dtype=torch.float64)

    z1 = one(x)
    z2 = two(F.relu(z1))
    back = torch.zeros_like(z2)
    back[:, 1] = F.relu(z2)[:, 1]  # the values of the filter go back

    def passed(g: Tensor, z: Tensor) -> Tensor:
        g = g.clamp(min=0) if method != "gradient" else g
        return g * (z > 0) if method != "deconvnet" else g

    expected = passed(passed(back, z2) @ two.weight, z1) @ one.weight
    model = nn.Sequential(one, nn.ReLU(), two, nn.ReLU())
    found = project(model, x, "2", 1, method=method, start="map")  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-14)


def test_pooling_goes_back_by_its_switches() -> None:
    model = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(1, 1, 1, bias=False), nn.ReLU())
    nn.init.ones_(model[1].weight)
    image = torch.tensor([[1.0, 5.0, 2.0, 0.0], [3.0, 4.0, 7.0, 1.0]]).reshape(1, 1, 2, 4)
    found = project(model, image, "1", 0, start="map")
    assert found.flatten().tolist() == [0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 7.0, 0.0]


def test_relu6_is_a_relu_and_others_pass_their_gradient() -> None:
    bounded = nn.Sequential(nn.Linear(3, 4), nn.ReLU6(), nn.Linear(4, 2))
    x = 9 * torch.randn(6, 3)
    found = project(bounded, x, "2", 0, kind="response")
    expected = bounded[2].weight[0].clamp(min=0) @ bounded[0].weight
    torch.testing.assert_close(found, expected.detach().expand(6, 3))
    leaky = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.3), nn.Linear(4, 4), nn.ReLU())
    gradient = project(leaky, x, "2", 1, method="gradient")
    guided = project(leaky, x, "2", 1, method="guided")
    assert torch.equal(gradient, guided)  # the one ReLU is at the map, where 1 comes


def test_where_a_map_is_projected_from(images: Tensor) -> None:
    model = _net()
    with capture(model, "c3") as maps, torch.no_grad():
        model(images)
    values = maps["c3"].tensor[:, 2]
    places = [tuple(divmod(int(v.argmax()), 4)) for v in values]
    strongest = project(model, images, "c3", 2, at="strongest")
    assert torch.equal(strongest, project(model, images, "c3", 2, at=places))
    each = [project(model, images[i : i + 1], "c3", 2, at=places[i]) for i in (0, 1)]
    torch.testing.assert_close(strongest, torch.cat(each))
    whole = project(model, images, "c3", 2, method="gradient")
    parts = [
        project(model, images, "c3", 2, method="gradient", at=(y, x))
        for y in range(4)
        for x in range(4)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).sum(0))
    one = project(model, images, "c3", 2, method="gradient", at=(-1, 0), start="map")
    scaled = (
        project(model, images, "c3", 2, method="gradient", at=(3, 0))
        * values[:, 3, 0, None, None, None]
    )
    torch.testing.assert_close(one, scaled)


def test_a_projection_stays_in_the_receptive_field(images: Tensor) -> None:
    model = _net()
    box = receptive_field(model, "c3", images).box(1, 2)
    found = project(model, images, "c3", at=(1, 2), method="gradient")
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[box.top : box.bottom, box.left : box.right] = True
    assert not found[:, :, ~inside].any()
    assert found[:, :, inside].any()


def test_a_projection_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.ReLU(inplace=True)
    ).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    image = torch.randn(3, 1, 6, 6)
    state, kept = torch.get_rng_state(), image.clone()
    with torch.inference_mode():
        project(model, image, "0", 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(image, kept)
    assert not image.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model[0]._forward_hooks


@pytest.mark.filterwarnings("ignore:not captured")
@pytest.mark.parametrize("method", ["deconvnet", "guided"])
def test_a_relu_that_cannot_be_told_is_refused(method: Any, images: Tensor) -> None:
    text = f"^method='{method}' has to see what each nonlinearity receives, and here it cannot: .*"
    with pytest.raises(ArgumentError, match=text + "; use method='gradient'$"):
        project(_net("compared"), images, "c3", 2, method=method)


# -- one location, as an edit ----------------------------------------------------------------------


def test_only_one_location_is_left(images: Tensor) -> None:
    model = _net("in place")
    with capture(model, "c2", edit={"c2": edits.only(3, 5, at=(1, -1))}) as maps, torch.no_grad():
        model(images)
    a = maps["c2"]
    expected = torch.zeros_like(a.tensor)
    expected[:, [3, 5], 1, 5] = a.tensor[:, [3, 5], 1, 5]
    assert torch.equal(a.edited, expected)
    tokens = nn.Sequential(nn.Linear(4, 6), nn.GELU())
    with capture(tokens, edit={"0": edits.only(2, at=3)}) as maps, torch.no_grad():
        out = tokens(torch.randn(2, 5, 4))
    assert out.nonzero()[:, 1:].unique(dim=0).tolist() == [[3, 2]]


# -- occlusion -------------------------------------------------------------------------------------


def _total(model: Net, filter: int) -> Callable[[Tensor], Tensor]:
    def total(x: Tensor) -> Tensor:
        with capture(model, "c3", kinds="activation") as maps:
            model(x)
        return maps["c3"].tensor[:, filter].sum((1, 2))

    return total


@pytest.mark.parametrize(("window", "stride"), [(4, 2), (5, 3), (12, 12), ((3, 5), (2, 4))])
def test_occlusion_is_captums(window: Any, stride: Any, images: Tensor) -> None:
    attr = pytest.importorskip("captum.attr")
    model = _net()
    pair = (window, window) if isinstance(window, int) else window
    steps = (stride, stride) if isinstance(stride, int) else stride
    expected = attr.Occlusion(_total(model, 2)).attribute(
        images, sliding_window_shapes=(3, *pair), strides=(3, *steps), baselines=0.5
    )
    found = occlusion(model, images, "c3", 2, window, stride, fill=0.5)
    assert found.complete
    assert expected.abs().max() > 0
    # captum sums the map in float32, and the order of sums differs.
    torch.testing.assert_close(found.heat().float(), expected[:, 0], rtol=1e-4, atol=2e-6)


def test_drops_are_those_of_each_window(images: Tensor) -> None:
    model = _net("in place")
    grey = torch.full((3, 1, 1), 0.3)
    found = occlusion(model, images, "c3", 2, 5, 4, at=(1, 2), fill=grey, batch_size=3)
    assert found.starts == ((0, 4, 8), (0, 4, 8))  # the last windows are cut at the border

    def value(x: Tensor) -> Tensor:
        with capture(model, "c3") as maps, torch.no_grad():
            model(x)
        return maps["c3"].tensor[:, 2, 1, 2].double()

    for i, top in enumerate((0, 4, 8)):
        for j, left in enumerate((0, 4, 8)):
            covered = images.clone()
            covered[:, :, top : top + 5, left : left + 5] = grey
            drop = value(images) - value(covered)
            torch.testing.assert_close(found.drops[:, i, j], drop, rtol=1e-5, atol=1e-6)


def test_tokens_are_covered_by_another_token() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return F.gelu(self.up(self.table(ids) * mask[..., None]))

    ids, mask = torch.randint(1, 9, (2, 6)), torch.ones(2, 6)
    found = occlusion(Model(), {"ids": ids, "mask": mask}, "up", 1, 1, fill=0, at=[(2,), (4,)])
    assert found.drops.shape == (2, 6)
    assert found.drops[0].nonzero().flatten().tolist() == [2]  # each token sees itself alone
    assert found.drops[1].nonzero().flatten().tolist() == [4]


def test_one_sample_without_an_axis(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    one, batch, axes = images[0], images[:1], (1, 2)
    drops = occlusion(model, one, "0", 1, 4, at=(2, 3), axes=axes).drops
    torch.testing.assert_close(drops, occlusion(model, batch, "0", 1, 4, at=(2, 3)).drops)
    found = project(model, one, "0", 1, at=(2, 3), axes=axes)
    torch.testing.assert_close(found, project(model, batch, "0", 1, at=(2, 3))[0])

    def total(out: Tensor) -> Tensor:
        return out.sum()

    cam = grad_cam(model, one, "0", total, axes=axes)
    torch.testing.assert_close(cam, grad_cam(model, batch, "0", total)[0])
    field = effective_field(model, "2", one, axes=axes)
    torch.testing.assert_close(field, effective_field(model, "2", batch))


def test_a_pass_ends_at_the_layer(images: Tensor) -> None:
    model = _net()
    ran: list[int] = []
    handle = model.fc.register_forward_hook(lambda *_: ran.append(1))
    occlusion(model, images, "c2", 0, 3, batch_size=2)
    handle.remove()
    assert len(ran) == 1  # the first pass alone, which shows which maps there are


def test_ctrl_c_loses_nothing(images: Tensor) -> None:
    model = _net()
    whole = occlusion(model, images, "c3", 2, 4, 3)
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = model.c1.register_forward_pre_hook(interrupt)
    with pytest.warns(CaptureWarning) as caught:
        part = occlusion(model, images, "c3", 2, 4, 3, batch_size=2)
    handle.remove()
    assert str(caught[0].message) == (
        "occlusion was interrupted: what is there is returned, and goes on with resume="
    )
    assert not part.complete
    assert int((~part.drops.isnan()).sum()) == 4  # two windows of two images
    assert part.heat().isfinite().all()
    rest = occlusion(model, images, "c3", 2, 4, 3, resume=part)
    assert rest.complete
    torch.testing.assert_close(rest.drops, whole.drops)
    with pytest.raises(ArgumentError) as error:
        occlusion(model, images, "c3", 1, 4, 3, resume=part)
    assert str(error.value) == "resume= is of another occlusion: give the same arguments again"
    for other in ({"fill": 1.0}, {"at": (2, 2)}):
        with pytest.raises(ArgumentError, match="give the same arguments again"):
            occlusion(model, images, "c3", 2, 4, 3, resume=part, **other)
    with pytest.raises(ArgumentError, match="give the same model and inputs again"):
        occlusion(model, images + 1, "c3", 2, 4, 3, resume=part)


def test_without_tqdm(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert occlusion(_net(), images, "c3", 2, 12).complete


def test_windows_do_not_depend_on_how_many_are_run_at_once() -> None:
    class Tabled(nn.Module):
        """One input has as many rows as there are samples, and is no sample's."""

        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return F.relu(self.c(x) + table.sum() + x.mean())

    model, x, table = Tabled().eval(), torch.randn(2, 3, 8, 8), torch.rand(2)
    alone = occlusion(model, (x, table), "c", 1, 4, batch_size=1)
    together = occlusion(model, (x, table), "c", 1, 4, batch_size=8)
    assert torch.equal(alone.drops, together.drops)


# -- Grad-CAM --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [3, torch.tensor([3, 1])])
@pytest.mark.parametrize(("layer", "module"), [("c3", "r3"), ("c2", "r2"), ("c1", "r1")])
def test_grad_cam_is_captums(target: Any, layer: str, module: str, images: Tensor) -> None:
    attr = pytest.importorskip("captum.attr")
    model = _net()
    cam = attr.LayerGradCam(model, getattr(model, module))
    found = grad_cam(model, images, layer, target, relu=False)
    assert torch.equal(found, cam.attribute(images, target=target)[:, 0])
    upsampled = grad_cam(model, images, layer, target, upsample=True)
    positive = cam.attribute(images, target=target, relu_attributions=True)
    assert torch.equal(
        upsampled, attr.LayerAttribution.interpolate(positive, (12, 12), "bilinear")[:, 0]
    )
    for style in ("in place", "functional", "compared"):
        assert torch.equal(grad_cam(_net(style), images, layer, target, relu=False), found)
    assert all(p.grad is None for p in model.parameters())


def test_grad_cam_of_a_class_of_maps_takes_a_function() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ArgumentError, match=r"\(2, 5, 8, 8\), of which classes may lie along"):
        grad_cam(model, x, "0", target=2)
    found = grad_cam(model, x, "0", target=lambda output: output[:, 2].sum((1, 2)), relu=False)
    weight = model[2].weight.detach()[2]
    a = model[1](model[0](x)).detach()
    torch.testing.assert_close(found, (weight * a).sum(1))


def test_grad_cam_has_the_formula_for_any_output(images: Tensor) -> None:
    model = _net("in place")
    found = grad_cam(
        model, images, "c2", lambda out: (out[:, 1] - out[:, 2]).exp(), kind="preactivation"
    )
    z = model.c2(F.max_pool2d(F.relu(model.b1(model.c1(images))), 2))
    z = (z + F.max_pool2d(F.relu(model.b1(model.c1(images))), 2)).detach().requires_grad_()
    out = model.fc(F.relu(model.c3(F.relu(z))).mean((2, 3)))
    (gradient,) = torch.autograd.grad((out[:, 1] - out[:, 2]).exp().sum(), z)
    expected = F.relu((gradient.mean((2, 3), keepdim=True) * z).sum(1))
    torch.testing.assert_close(found, expected.detach())


def test_grad_cam_of_tokens() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up, self.out = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.out(F.gelu(self.up(self.table(ids))).mean(1))}

    model, ids = Model(), torch.randint(0, 9, (2, 5))
    assert grad_cam(model, ids, "up", 1).shape == (2, 5)
    model.requires_grad_(False)
    with pytest.raises(ArgumentError) as caught:
        grad_cam(model, ids, "up", 1)
    assert str(caught.value) == (
        "the model's output depends on nothing that takes a gradient: the model detaches it, runs "
        "without gradients, or is frozen and has token numbers for an input"
    )


# -- the effective field ---------------------------------------------------------------------------


def test_the_effective_field_is_the_mean_gradient(images: Tensor) -> None:
    model = _net()
    found = effective_field(model, "c3", images, at=(1, 2))
    gradient = project(model, images, "c3", at=(1, 2), method="gradient")
    torch.testing.assert_close(found, gradient.abs().sum(1).mean(0))
    box = receptive_field(model, "c3", images).box(1, 2)
    outside = found.clone()
    outside[box.top : box.bottom, box.left : box.right] = 0
    assert not outside.any()
    assert torch.equal(
        effective_field(model, "c3", images), effective_field(model, "c3", images, at=(2, 2))
    )


def test_random_weights_have_a_gaussian_field() -> None:
    """Luo et al. 2016: of n linear layers with weights of one value, a binomial distribution."""
    model = nn.Sequential(*[nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(4)])
    for conv in model:
        nn.init.ones_(conv.weight)
    found = effective_field(model, "3", torch.randn(1, 1, 15, 15))
    row = torch.tensor([1.0])
    for _ in range(4):
        row = F.conv1d(F.pad(row[None, None], (2, 2)), torch.ones(1, 1, 3))[0, 0]
    expected = torch.zeros(15, 15)
    expected[3:12, 3:12] = torch.outer(row, row)
    assert torch.equal(found, expected)


# -- errors ----------------------------------------------------------------------------------------

_IMAGES = torch.randn(2, 3, 12, 12)


@pytest.mark.filterwarnings("ignore:not captured")
@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: project(_net(), _IMAGES, "c3", 6),
            FilterRangeError,
            "filter 6 is out of range for the activation of layer 'c3', which holds 6 "
            "filters (0 to 5)",
        ),
        (
            lambda: project(_net(), _IMAGES, "c3", 2, at=(4, 0)),
            ArgumentError,
            "at=(4, 0): a location of the activation of layer 'c3' is 2 ints, within (4, 4)",
        ),
        (
            lambda: project(_net(), _IMAGES, "c3", 2, at=[(1, 0)]),
            ArgumentError,
            "at has 1 locations for 2 samples: give one for each",
        ),
        (
            lambda: project(_net(), _IMAGES, "c3", 2, at="largest"),
            ArgumentError,
            "at must be a location, one for each sample, or 'strongest', not 'largest'",
        ),
        (
            lambda: project(_net(), _IMAGES, "c3", method="lrp"),  # type: ignore[arg-type]
            ArgumentError,
            "method must be 'deconvnet', 'guided' or 'gradient', not 'lrp'",
        ),
        (
            lambda: project(_net(), _IMAGES, "c3", start="zeros"),  # type: ignore[arg-type]
            ArgumentError,
            "start must be 'ones' or 'map', not 'zeros'",
        ),
        (
            lambda: project(nn.Sequential(nn.Linear(12, 3), nn.GELU()), _IMAGES, "0", 2),
            ArgumentError,
            "method='deconvnet' says what ReLUs pass on, and there is none between the input and "
            "the activation of layer '0': use method='gradient'",
        ),
        (
            lambda: project(nn.Embedding(5, 3), torch.tensor([[1, 2]]), ""),
            ArgumentError,
            "project differentiates by the model's input, and this one is of torch.int64: give the "
            "model its embeddings instead, or use occlusion",
        ),
        (
            lambda: project(Before(Tensor.detach, nn.Conv2d(3, 2, 3)), _IMAGES, "layer"),
            ArgumentError,
            "no differentiable path leads from the input to the activation of layer 'layer': the "
            "model detaches it, or runs there without gradients",
        ),
        (
            lambda: project(nn.Sequential(_SHARED, nn.ReLU(), _SHARED, nn.ReLU()), _IMAGES, "0"),
            AmbiguousMapError,
            "'0' could mean 2 maps: ('0', 'activation', call=0, path=''), ('0', 'activation', "
            "call=1, path=''); choose with kind=, call= or path=",
        ),
        (
            lambda: occlusion(torch.relu, _IMAGES, "c3"),  # type: ignore[arg-type]
            NotAModuleError,
            "occlusion takes a torch.nn.Module, not builtin_function_or_method",
        ),
        (
            lambda: occlusion(_net(), _IMAGES, "c3", window=13),
            ArgumentError,
            "window=13 is larger than the input, of (12, 12) locations",
        ),
        (
            lambda: occlusion(_net(), _IMAGES, "c3", window=(3, 0)),
            ArgumentError,
            "window must be a positive int, or one for each of the 2 axes of locations, not (3, 0)",
        ),
        (
            lambda: occlusion(_net(), _IMAGES, "c3", batch_size=0),
            ArgumentError,
            "batch_size must be a positive int, not 0",
        ),
        (
            lambda: grad_cam(_net(), _IMAGES, "c3", 5),
            ArgumentError,
            "target must be a class, or one for each sample, of the 5 in an output of shape "
            "(2, 5), not 5",
        ),
        (
            lambda: grad_cam(_net(), _IMAGES, "fc", 1),
            ArgumentError,
            "the preactivation of layer 'fc' has shape (2, 5) and no locations: choose a layer "
            "before they are pooled or flattened",
        ),
        (
            lambda: grad_cam(_net(), _IMAGES, "c3", lambda out: out),
            ArgumentError,
            "target= must give a number, or one for each sample, as a tensor, not one of "
            "shape (2, 5)",
        ),
        (
            lambda: plot_heat(torch.zeros(3)),
            ArgumentError,
            "a heat map has two axes, and this one has shape (3,)",
        ),
        (
            lambda: plot_projection(torch.zeros(2, 3, 4, 4)),
            ArgumentError,
            "a projection to an image has shape (1, H, W) or (3, H, W), not (2, 3, 4, 4): take one "
            "sample of it",
        ),
    ],
)
def test_errors(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text


_SHARED = nn.Conv2d(3, 3, 3)


# -- pictures --------------------------------------------------------------------------------------


def test_pictures(images: Tensor) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    model = _net()
    field = receptive_field(model, "c3", images)
    figure = field.plot(
        1, 2, image=images[0], effective=effective_field(model, "c3", images, at=(1, 2))
    )
    box, patch = field.box(1, 2), figure.axes[0].patches[0]
    assert patch.get_xy() == (box.left, box.top)
    assert (patch.get_width(), patch.get_height()) == (box.right - box.left, box.bottom - box.top)
    drops = occlusion(model, images, "c3", 2, 4)
    figure = drops.plot(images[0])
    assert torch.equal(torch.as_tensor(figure.axes[1].images[1].get_array()), drops.heat()[0])
    figure = plot_projection(project(model, images, "c3", 2)[0], images[0])
    shown = figure.axes[1].images[0].get_array()
    assert shown.shape == (12, 12, 3)
    assert 0.0 <= shown.min() <= shown.max() <= 1.0
    pyplot.close("all")


@pytest.mark.parametrize("method", ["deconvnet", "guided"])
def test_a_nan_in_one_sample_leaves_the_others_their_projection(method: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU()).eval()
    x = torch.randn(2, 3, 9, 9)
    expected = project(model, x[:1], "2", 1, method=method)
    x[1, 0, 4, 4] = torch.nan
    found = project(model, x, "2", 1, method=method)
    torch.testing.assert_close(found[:1], expected)
