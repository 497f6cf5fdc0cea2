"""What is read out of φ: kernel, probes, distances, losses; each against another computation."""

from __future__ import annotations

import copy
import itertools
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmapkit import ArgumentError, feature_map
from fmapkit.phi import (
    gram,
    kept,
    perceptual_loss,
    probe,
    singular_values,
    style_loss,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.fc = nn.Linear(5 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(x).flatten(1))

    def first(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()

    def last(self, x: Tensor) -> Tensor:
        return F.relu(self.down(self.relu(self.bn(self.conv(x)))))


def _net(dtype: torch.dtype = torch.float32) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net().to(dtype).eval(), torch.randn(12, 1, 6, 6, dtype=dtype)


# -- the kernel -------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", ["linear", "cosine", "rbf"])
def test_kernels_are_those_of_scikit_learn(kind: Any, centred: bool) -> None:
    sklearn = pytest.importorskip("sklearn")
    from sklearn.metrics import pairwise
    from sklearn.preprocessing import KernelCenterer

    assert sklearn
    net, x = _net(torch.float64)
    phi = feature_map(net, "down")
    a, b = (net.last(t).flatten(1).detach().numpy() for t in (x[:7], x[7:]))
    by_hand = {
        "linear": pairwise.linear_kernel,
        "cosine": pairwise.cosine_similarity,
        "rbf": pairwise.rbf_kernel,
    }[kind]
    own, across = by_hand(a), by_hand(a, b)
    if centred:  # scikit-learn's test points are rows
        fitted = KernelCenterer().fit(own)
        own, across = fitted.transform(own), fitted.transform(across.T).T
    with torch.no_grad():
        for y, expected in ((None, own), (x[7:], across)):
            found = phi.kernel(x[:7], y, kind=kind, centred=centred)
            assert np.abs(found.numpy() - expected).max() < 1e-12 * np.abs(own).max()
    assert phi.kernel(x[:7], kind=kind, centred=centred).requires_grad


@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_a_kernel_is_symmetric_and_positive_and_has_the_gradient_of_its_features(seed: int) -> None:
    net, _ = _net(torch.float64)
    x = torch.randn(6, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    phi = feature_map(net, "down")
    for kind in ("linear", "cosine", "rbf"):
        for centred in (False, True):
            k = phi.kernel(x, kind=kind, centred=centred)  # type: ignore[arg-type]
            assert torch.allclose(k, k.T, atol=1e-12)
            assert torch.linalg.eigvalsh(k.detach()).min() > -1e-10
    x.requires_grad_()
    ours = torch.autograd.grad(phi.kernel(x)[0, 1], x)[0]
    f = net.last(x).flatten(1)
    assert torch.equal(ours, torch.autograd.grad((f @ f.T)[0, 1], x)[0])


def test_kernels_of_halves_are_summed_in_float32_and_of_any_call() -> None:
    net, x = _net()
    phi = feature_map(net.bfloat16(), "down")
    found = phi.kernel((x.bfloat16(),), {"x": x[:3].bfloat16()})
    f = net.last(x.bfloat16()).flatten(1).float()
    assert found.dtype == torch.float32
    assert torch.equal(found, f @ net.last(x[:3].bfloat16()).flatten(1).float().T)


def test_features_without_samples_without_axes_and_complex_ones() -> None:
    net, x = _net()
    assert feature_map(net, "conv").kernel(x[:0], x).shape == (0, 12)
    one_each = feature_map(net, "conv", pool=lambda t: t.mean((1, 2, 3)))
    assert one_each.kernel(x).shape == (12, 12)
    with pytest.raises(ArgumentError) as caught:
        feature_map(net, "conv", pool=torch.mean).kernel(x)
    assert str(caught.value) == "features have no axis of samples: each call gave one number"
    with pytest.raises(ArgumentError) as caught:
        feature_map(net, "conv", pool=torch.fft.fft).kernel(x)
    assert str(caught.value) == ("features are complex: pool=torch.view_as_real makes them real")


# -- probes -----------------------------------------------------------------------------------


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 1, 6, 6, generator=generator)
    y = (x.mean((1, 2, 3)) > 0).long() + 2 * (x[:, 0, 0, 0] > 1).long()
    return x, y


def test_probe_scores_are_those_of_scikit_learn_on_features_by_hand() -> None:
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    net, _ = _net()
    net.train()
    before = copy.deepcopy(net.state_dict())
    x, y = _data()
    phi = feature_map(net, ["conv", "down"], pool="mean")
    loader = list(zip(x.split(16), y.split(16), strict=True))
    default = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    for estimator, mine in ((default, None), (knn := KNeighborsClassifier(3), knn)):
        found = probe(phi, loader, estimator=mine, cv=4)
        assert net.training
        assert net.bn.training
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        again = probe(phi, x, y, estimator=mine, cv=4, batch_size=16)
        third = probe(phi, x.split(16), y, estimator=mine, cv=4)
        net.eval()
        for layer, by_hand in (("conv", net.first), ("down", net.last)):
            features = [by_hand(part).mean((2, 3)).detach() for part in x.split(16)]
            expected = cross_val_score(estimator, torch.cat(features).numpy(), y.numpy(), cv=4)
            for one in (found, again, third):
                assert np.array_equal(one[layer], expected)
        net.train()
    assert found.layers == ("conv", "down")
    assert found.features == (4, 5)
    assert found.chance == y.bincount().max().item() / 60
    assert found.best in found.layers
    assert found.estimators["down"].predict(torch.cat(features).numpy()).shape == (60,)


def test_probe_of_numbers_is_a_regression_and_any_scoring_goes() -> None:
    pytest.importorskip("sklearn")
    net, _ = _net()
    x, y = _data()
    found = probe(feature_map(net, "conv", pool="mean"), x, x.mean((1, 2, 3)))
    assert found.scoring == "R²"
    assert found.chance is None
    assert found.mean[0] > 0.5
    halves = probe(feature_map(net, "conv", pool="mean"), x, x.mean((1, 2, 3)).bfloat16())
    assert halves.mean[0] == pytest.approx(found.mean[0], abs=0.05)
    named = probe(feature_map(net, "conv", pool="mean"), x, y, scoring="balanced_accuracy")
    assert named.scoring == "balanced_accuracy"
    assert named.chance is None


def test_several_kinds_of_one_layer_are_each_read() -> None:
    net, x = Net().eval(), torch.randn(20, 1, 6, 6)
    asked = [("conv", "preactivation"), "conv", ("conv", "response")]
    several = feature_map(net, asked)
    by_name = feature_map(net, {"z": asked[0], "a": asked[1], "r": asked[2]})
    rows, named = kept(several, x), kept(by_name, x)
    assert rows.layers == ("conv preactivation", "conv", "conv response")
    assert several.layers == list(rows.layers)
    assert [k.smallest for k in rows] == [k.smallest for k in named]
    assert len(probe(several, x, torch.arange(20) % 2)) == 3


def test_the_probes_table_and_picture() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    net, _ = _net()
    found = probe(feature_map(net, ["conv", "down"], pool="mean"), *_data(), cv=3)
    lines = repr(found).splitlines()
    assert lines[0].split() == ["layer", "features", "mean", "std", "least", "most"]
    assert lines[2].split()[:3] == ["conv", "4", f"{found.mean[0]:.3f}"]
    assert lines[-1] == f"Probe: accuracy over 3 folds, {found.chance:.3f} by chance"
    axes = found.plot().axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["conv", "down"]
    assert np.array_equal(axes.lines[3].get_ydata(), found.mean)
    pyplot.close("all")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([],), "probe needs data, and there are none"),
        ((torch.zeros(4, 1, 6, 6),), "probe of a tensor of inputs needs labels="),
        ((3, [1]), "data must be a tensor of inputs or batches of them, not int"),
        (
            ([torch.zeros(4, 1, 6, 6)],),
            "without labels=, each batch is a pair (inputs, labels), and this one is Tensor",
        ),
        (
            (torch.zeros(4, 1, 6, 6), torch.zeros(3).long()),
            "probe has 3 labels, and 4 samples of layer 'conv'",
        ),
        (
            (torch.zeros(4, 1, 6, 6), torch.zeros(4, 2)),
            "labels must be one for each sample, not of shape (4, 2)",
        ),
        (
            (torch.full((4, 1, 6, 6), torch.nan), torch.zeros(4)),
            "features of layer 'conv' are not all finite",
        ),
    ],
)
def test_errors_of_probes(arguments: Any, text: str) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(ArgumentError) as caught:
        probe(feature_map(_net()[0], "conv"), *arguments)
    assert str(caught.value) == text


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    phi = feature_map(_net()[0], "conv")
    for call in (lambda: probe(phi, *_data()), phi.transformer):
        with pytest.raises(ImportError) as caught:
            call()
        assert str(caught.value) == (
            "probes and transformers need scikit-learn: pip install fmapkit[sklearn]"
        )


def test_a_transformer_in_a_pipeline_has_phi_itself_not_a_copy() -> None:
    pytest.importorskip("sklearn")
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline

    net, _ = _net()
    x, y = _data()
    phi = feature_map(net.train(), "down", pool="mean")
    transformer = phi.transformer(shape=(1, 6, 6), batch_size=25)
    assert clone(transformer).phi is phi
    pipeline = make_pipeline(transformer, LogisticRegression(max_iter=1000))
    table = x.double().flatten(1).numpy()  # of another type than the model
    scores = cross_val_score(pipeline, table, y.numpy(), cv=3)
    assert net.training
    net.eval()
    by_hand = torch.cat([net.last(part).mean((2, 3)).detach() for part in x.split(25)])
    assert np.array_equal(transformer.fit_transform(table), by_hand.numpy())
    assert (
        np.abs(scores - cross_val_score(pipeline[1], by_hand.numpy(), y.numpy(), cv=3)).max()
        < 0.051
    )
    with pytest.raises(ArgumentError) as caught:
        transformer.transform(table[:, :35])
    assert str(caught.value) == "samples of shape (35,) cannot be given as (1, 6, 6)"


# -- captum -----------------------------------------------------------------------------------


def test_captum_attributes_through_phi() -> None:
    attr = pytest.importorskip("captum.attr")
    net, x = _net()
    phi = feature_map(net, "down", pool="mean")

    class ByHand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net.last(x).mean((2, 3))

    for target in (0, 4):
        ours, theirs = (
            attr.IntegratedGradients(f).attribute(x[:3], target=target, n_steps=8)
            for f in (phi, ByHand())
        )
        assert torch.equal(ours, theirs)
        ours, theirs = (
            attr.Occlusion(f).attribute(x[:3], (1, 2, 2), strides=2, target=target)
            for f in (phi, ByHand())
        )
        assert torch.equal(ours, theirs)
    assert ours.abs().max() > 0


# -- what φ keeps -----------------------------------------------------------------------------


def _by_hand(x: np.ndarray[Any, Any], f: np.ndarray[Any, Any]) -> dict[tuple[int, int], float]:
    """The ratio of each pair with d(x, y) > 0, one by one."""
    found = {}
    for i, j in itertools.combinations(range(len(x)), 2):
        apart = np.sqrt(np.sum((x[i] - x[j]) ** 2))
        if apart > 0:
            found[i, j] = float(np.sqrt(np.sum((f[i] - f[j]) ** 2)) / apart)
    return found


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.integers(2, 14))
def test_ratios_pairs_and_collisions_are_those_of_all_pairs_by_hand(seed: int, count: int) -> None:
    net, _ = _net()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    if count > 4:
        x[3] = x[1]  # the same input twice: at distance 0
    found = kept(feature_map(net, ["conv", "down"]), x, batch_size=5)
    for layer, f in (("conv", net.first), ("down", net.last)):
        features = torch.cat([f(part) for part in x.split(5)]).detach()
        ratios = _by_hand(x.flatten(1).double().numpy(), features.flatten(1).double().numpy())
        one = found[layer]
        assert one.smallest == pytest.approx(min(ratios.values()), rel=1e-12)
        assert one.largest == pytest.approx(max(ratios.values()), rel=1e-12)
        assert one.median == pytest.approx(np.median(list(ratios.values())), rel=1e-12)
        assert ratios[one.closest] == pytest.approx(one.smallest, rel=1e-12)
        assert ratios[one.farthest] == pytest.approx(one.largest, rel=1e-12)
        assert one.collisions == sum(r == 0 for r in ratios.values())
        assert one.distortion == one.largest / one.smallest
    assert found.duplicates == int(count > 4)


def test_two_inputs_in_one_point_are_found_and_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [1, -1, 0]]))
        net[0].bias.fill_(10)
    x = torch.randn(8, 3)
    x[5, :2] = x[2, :2]  # they differ in what the first layer does not see
    found = kept(feature_map(net, ["0", "2"], kind="preactivation"), x)
    for layer in found:
        assert layer.collided == ((2, 5),)
        assert layer.collisions == 1
        assert layer.smallest == 0
        assert layer.closest == (2, 5)
        assert layer.distortion == float("inf")
    near = kept(feature_map(net, "0", kind="preactivation"), x, tolerance=0.99)
    assert near["0"].collisions > 1
    table = repr(found).splitlines()
    assert table[2].split() == ["0", "4", "0", "2,", "5", *table[2].split()[5:]]
    assert table[-1] == "Kept: d(φ(x), φ(y)) / d(x, y) over 28 pairs of 8 inputs"


def test_another_metric_as_a_function_and_as_a_matrix() -> None:
    net, x = _net()
    phi = feature_map(net, "conv")

    def metric(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a.flatten(1).double(), b.flatten(1).double(), p=1)

    by_function, by_matrix = kept(phi, x, metric=metric), kept(phi, x, metric=metric(x, x))
    assert by_function["conv"] == by_matrix["conv"]
    i, j = by_matrix["conv"].closest
    ratio = (net.first(x)[i] - net.first(x)[j]).norm().item() / (x[i] - x[j]).abs().sum().item()
    assert by_matrix["conv"].smallest == pytest.approx(ratio, rel=1e-5)


def test_the_effective_rank_is_known_where_it_can_be() -> None:
    # Of features along k orthogonal directions, equally: k; of equal ones: 0.
    x = torch.cat([torch.eye(5), -torch.eye(5)])
    for zeros, rank in ((0, 5), (2, 3), (4, 1), (5, 0)):
        keep = torch.ones(5)
        keep[:zeros] = 0
        model = nn.Linear(5, 5, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.diag(keep))
        found = kept(feature_map(nn.Sequential(model), "0", kind="response"), x)
        assert found["0"].effective_rank == pytest.approx(rank, abs=1e-6)


def test_the_picture_of_what_is_kept() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    net, x = _net()
    axes = kept(feature_map(net, ["conv", "down"]), x).plot(title="kept").axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["conv", "down"]
    assert axes.get_title("left") == "kept"
    pyplot.close("all")


@pytest.mark.parametrize(
    ("inputs", "options", "text"),
    [
        (
            torch.zeros(1, 1, 6, 6),
            {},
            "inputs must be tensors with two samples or more, all with as many",
        ),
        (
            torch.zeros(4, 1, 6, 6),
            {},
            "all inputs are at distance 0: there is no pair to compare",
        ),
        (
            (torch.randn(4, 1, 6, 6),),
            {},
            "of several tensors, metric= has to say how far two inputs are apart: give all "
            "distances as a tensor (N, N)",
        ),
        (
            torch.randn(4, 1, 6, 6),
            {"metric": torch.zeros(3, 3)},
            "metric has shape (3, 3), and the 4 inputs have (4, 4) distances",
        ),
        (
            torch.randn(4, 1, 6, 6),
            {"metric": lambda a, b: torch.zeros(2)},
            "metric must give (n, m) distances for (n, …) and (m, …) inputs",
        ),
        (
            torch.randn(4, 1, 6, 6),
            {"metric": -torch.ones(4, 4)},
            "distances of inputs must be finite, and none below 0",
        ),
        (
            torch.randn(4, 1, 6, 6),
            {"tolerance": 1.5},
            "tolerance must be a share of the largest distance, not 1.5",
        ),
    ],
)
def test_errors_of_kept(inputs: Any, options: Any, text: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        kept(feature_map(_net()[0], "conv"), inputs, **options)
    assert str(caught.value) == text


# -- singular values --------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["conv", "down"])
def test_singular_values_are_those_of_the_matrix(layer: str) -> None:
    net, x = _net(torch.float64)
    x = x[:2]
    by_hand = {"conv": net.first, "down": net.last}[layer]
    expected = torch.stack(
        [
            torch.linalg.svdvals(
                torch.func.jacrev(lambda v: by_hand(v[None]).flatten())(p).reshape(-1, 36)
            )
            for p in x
        ]
    )
    phi = feature_map(net.train(), layer)
    net.eval()
    all_of_them = singular_values(phi, x, None)
    assert all_of_them.shape == expected.shape
    assert (all_of_them - expected).abs().max() < 1e-12 * expected.max()
    some = singular_values(phi, x, 5, tolerance=1e-10)
    assert (some - expected[:, :5]).abs().max() < 1e-9 * expected.max()
    net.float()
    quick = singular_values(phi, x.float(), 5)
    assert (quick - expected[:, :5]).abs().max() < 1e-4 * expected.max()


def test_values_that_come_several_times_are_all_there_and_zeros_too() -> None:
    # The Jacobian of a linear layer is its weight: here with 3 three times, and of rank 4.
    values = torch.tensor([3.0, 3.0, 3.0, 0.5, 0.0, 0.0])
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 6, dtype=torch.float64))[0] for n in (9, 6))
    model = nn.Sequential(nn.Linear(6, 9, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(u @ torch.diag(values.double()) @ v.T)
    phi = feature_map(model, "0", kind="response")
    x = torch.randn(1, 6, dtype=torch.float64)
    for k in (1, 3, 4, 6, None):
        found = singular_values(phi, x, k)
        assert (found[0] - values[: found.shape[1]]).abs().max() < 1e-12


def test_attention_has_a_jacobian_too() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out(F.scaled_dot_product_attention(q, k, v))

    torch.manual_seed(0)
    model, x = Attends(), torch.randn(1, 4, 6)
    found = singular_values(feature_map(model, "out", kind="response"), x, 3)
    matrix = torch.autograd.functional.jacobian(lambda v: model(v).flatten(), x).reshape(24, 24)
    assert (found[0] - torch.linalg.svdvals(matrix)[:3]).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("x", "options", "text"),
    [
        (
            torch.zeros(2, 3).long(),
            {},
            "points must be a floating-point tensor (P, …): there is no derivative with respect to "
            "anything else",
        ),
        (torch.zeros(2, 1, 6, 6), {"k": 0}, "k must be a positive int, not 0"),
        (torch.zeros(2, 1, 6, 6), {"tolerance": -1}, "tolerance must not be below 0: -1"),
    ],
)
def test_errors_of_singular_values(x: Tensor, options: Any, text: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        singular_values(feature_map(_net()[0], "conv"), x, **options)
    assert str(caught.value) == text


def test_a_jacobian_that_is_not_finite_is_refused() -> None:
    points = torch.randn(2, 1, 6, 6)
    points[1, 0, 2, 2] = torch.nan
    root = nn.Sequential(nn.Linear(3, 2), Root())
    for phi, x, number in (
        (feature_map(Net(), "conv"), points, 1),
        (feature_map(root, "1", kind="output"), torch.zeros(1, 3), 0),
    ):
        with pytest.raises(ArgumentError) as error:
            singular_values(phi, x)
        assert str(error.value) == (
            f"the Jacobian at point {number} has a NaN or an infinite value: it has no singular "
            "values"
        )


class Root(nn.Module):
    """A function whose derivative at 0 is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.detach()).abs().sqrt()


def test_readings_of_one_layer_refuse_several() -> None:
    net, x = _net()
    phi = feature_map(net, ["conv", "down"])
    for what, call in (
        ("kernel", lambda: phi.kernel(x)),
        ("a Jacobian", lambda: singular_values(phi, x[:1])),
    ):
        with pytest.raises(ArgumentError) as caught:
            call()
        assert str(caught.value) == f"{what} is of one layer, and this feature_map returns several"


# -- losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [2.0, 0.5], {"down": 0.5, "conv": 2.0}])
def test_losses_have_the_gradients_of_a_model_by_hand_bit_for_bit(weights: Any) -> None:
    net, x = _net()
    a, b = (0.0 + w for w in ([1.0, 1.0] if weights is None else [2.0, 0.5]))
    asked = {"conv": "conv", "down": "down"} if isinstance(weights, dict) else ["conv", "down"]
    phi = feature_map(net, asked)
    image, target = x[:3].clone().requires_grad_(), x[3:6]

    def by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
        first = net.bn(net.conv(x)).relu()
        return first, net.down(first).relu()

    for style in (False, True):
        loss = style_loss if style else perceptual_loss
        for _ in range(3):
            ours = loss(phi(image), phi(target), weights=weights)
            mine = torch.autograd.grad(ours, [image, *net.conv.parameters()])

            def term(y: Tensor, t: Tensor, style: bool = style) -> Tensor:
                if not style:
                    return F.mse_loss(y, t.detach())
                flat = [v.flatten(2) for v in (y, t.detach())]
                grams = [v @ v.transpose(1, 2) / (v.shape[1] * v.shape[2]) for v in flat]
                return (grams[0] - grams[1]).square().sum((1, 2)).mean()

            (y1, y2), (t1, t2) = by_hand(image), by_hand(target)
            theirs = torch.stack([a * term(y1, t1), b * term(y2, t2)]).sum()
            assert torch.equal(ours, theirs)
            expected = torch.autograd.grad(theirs, [image, *net.conv.parameters()])
            assert all(map(torch.equal, mine, expected))


def test_a_style_may_be_one_image_of_another_size() -> None:
    net, x = _net()
    body = nn.Sequential(net.conv, net.bn, net.relu)
    phi = feature_map(body, "0")
    loss = style_loss(phi(x[:3]), phi(torch.randn(1, 1, 9, 4)))
    assert loss.dim() == 0
    assert gram(phi(x)).shape == (12, 4, 4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda f: perceptual_loss(f, f[:1]),
            "features are of the layers [0, 1], and the target's of [0]",
        ),
        (
            lambda f: perceptual_loss(f, (f[0], f[1][:1])),
            "features of layer 1 have shape (2, 5, 3, 3), and the target's (1, 5, 3, 3)",
        ),
        (
            lambda f: style_loss(f, f, weights=[1.0]),
            "weights must be one for each of [0, 1], not [1.0]",
        ),
        (
            lambda f: gram(f[0].flatten(1)),
            "a Gram matrix is of maps (N, C, …), and these features have shape (2, 144); leave out "
            "pool=",
        ),
    ],
)
def test_errors_of_losses(call: Any, text: str) -> None:
    net, x = _net()
    with pytest.raises(ArgumentError) as caught:
        call(feature_map(net, ["conv", "down"])(x[:2]))
    assert str(caught.value) == text
