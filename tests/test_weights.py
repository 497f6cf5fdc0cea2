"""`fm.weight` and `fm.bias`: the filters beside their maps."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

from fmapkit import CaptureWarning, FeatureMap, FeatureMaps, capture, register_layer
from fmapkit.errors import (
    ArgumentError,
    FilterRangeError,
    KindNotCapturedError,
    MapOverwrittenError,
    MapReleasedError,
)
from tests.checks import needs_compiled
from tests.strategies import Model, models

KINDS = ("input", "response", "preactivation", "activation")


def pair(maps: FeatureMaps, layer: str, call: int = 0) -> tuple[FeatureMap, FeatureMap]:
    """The input and the response of one call of a layer."""
    found = {fm.kind: fm for fm in maps.select(layer=layer, call=call, step=-1)}
    return found["input"], found["response"]


class Every(nn.Module):
    """A layer of each form, and what comes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.group = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.gated = nn.Linear(6, 12)
        self.both = nn.Bilinear(6, 6, 5)
        self.mix = nn.Module()
        self.mix.table = nn.Parameter(torch.randn(5, 4))
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x), inplace=True)
        x = self.group(x).relu_() + x
        x = self.up(x).relu().mean((2, 3))
        gate, value = self.gated(x).chunk(2, -1)
        x = F.silu(gate) * value
        x = torch.tanh(self.both(x, x))
        x = torch.addmm(self.shift, x, self.mix.table)
        return F.linear(x.sigmoid(), self.mix.table[1:3])


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "conv": lambda x, w, b: F.conv2d(x, w, b, padding=1),
    "group": lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=4),
    "gated": F.linear,
    "both": lambda x, w, b: F.bilinear(x, x, w, b),
}


@pytest.mark.parametrize("grad", [False, True])
def test_weights_beside_their_maps(grad: bool) -> None:
    """In traced and in tapped passes, the layer's own result comes out of the maps alone."""
    model = Every()
    with capture(model, kinds=KINDS) as maps, torch.set_grad_enabled(grad):
        for _ in range(3):
            model(torch.randn(2, 3, 6, 6))
            for layer, form in FORMS.items():
                x, y = pair(maps, layer)
                assert y.weight is not None
                assert torch.equal(form(x.tensor, y.weight, y.bias), y.tensor), layer
                assert not y.weight.requires_grad
                assert x.weight is None
                assert x.bias is None
            x, y = pair(maps, "up")
            assert y.weight is not None
            assert y.weight.shape == (6, 4, 2, 2)
            own = y.weight.unflatten(0, (2, 3)).transpose(1, 2).flatten(0, 1)
            assert torch.equal(F.conv_transpose2d(x.tensor, own, y.bias, groups=2), y.tensor)
            first, last = (
                pair(maps, "mix.table" if "mix.table" in maps else "mix", c) for c in (0, 1)
            )
            assert first[1].weight is not None
            assert last[1].weight is not None
            product = torch.addmm(first[1].bias, first[0].tensor, first[1].weight.t())
            assert torch.equal(product, first[1].tensor)
            assert torch.equal(F.linear(last[0].tensor, last[1].weight), last[1].tensor)
            assert last[1].bias is None
            assert list(last[1].filters or ()) == [1, 2]


def test_weight_is_a_view_by_filter() -> None:
    """A filter's weights are those of its row; views, wherever there is one."""
    model = Every()
    with capture(model) as maps, torch.no_grad():
        model(torch.randn(2, 3, 6, 6))
    for fm in maps:
        assert fm.weight is not None
        for one in fm:
            assert one.weight is not None
            assert torch.equal(one.weight, fm.weight[one.filter - fm.filters[0]])  # type: ignore
    up = maps["up"]
    assert torch.equal(up[4].weight, model.up.weight[4:, 1])  # type: ignore[arg-type]
    for fm, parameter in ((maps["conv"], model.conv.weight), (up[4], model.up.weight)):
        assert fm.weight is not None
        assert fm.weight.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    assert torch.equal(maps["conv"][2].bias, model.conv.bias[2])  # type: ignore
    gate = maps["gated"]
    assert gate.filters == range(6)
    assert torch.equal(gate.weight, model.gated.weight[:6])  # type: ignore[arg-type]
    assert torch.equal(gate.bias, model.gated.bias[:6])  # type: ignore[arg-type]


def test_filters_picked() -> None:
    """With `filters=`, of these alone, in their order."""
    model = Every()
    with capture(model, "conv", filters=[5, 2]) as maps, torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 3, 6, 6))
    assert torch.equal(maps["conv"].weight, model.conv.weight[[5, 2]])  # type: ignore[arg-type]
    assert torch.equal(maps["conv"][2].weight, model.conv.weight[2])  # type: ignore[arg-type]
    assert torch.equal(maps["conv"].bias, model.conv.bias[[5, 2]])  # type: ignore


class Fused(nn.Module):
    """Queries, keys and values of one product, by head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.relu(q) @ F.elu(k).transpose(-1, -2) @ torch.tanh(v)


def test_fused_rows_by_head() -> None:
    """Filters that lie along two axes: so do their weights."""
    model = Fused()
    with capture(model, kinds="activation") as maps, torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 5, 8))
    by_head = model.qkv.weight.view(3, 2, 4, 8)
    for i, sigma in enumerate(("relu", "elu", "tanh")):
        (fm,) = maps.select(layer="qkv", nonlinearity=sigma)
        assert torch.equal(fm.weight, by_head[i])  # type: ignore[arg-type]
        assert torch.equal(fm.bias, model.qkv.bias.view(3, 2, 4)[i])  # type: ignore[arg-type]
    pytest.importorskip("matplotlib").use("Agg")
    maps.plot(weights=True)  # where filters lie along several axes, without them
    with pytest.raises(ArgumentError, match=r"lie along several axes; fm.weight has their weights"):
        fm.plot(weights=True)
    with pytest.raises(ArgumentError, match="weights must be True or False, not 1"):
        capture(model, weights=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("cross", [False, True])
def test_multihead_attention(cross: bool) -> None:
    """The rows of `in_proj_weight` that a product used, where torch splits it."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    with capture(attention, kinds=("input", "response")) as maps:
        for _ in range(2):
            attention(x, memory if cross else x, memory if cross else x)
        for y in maps.select(kind="response", step=-1):
            (x_in,) = [
                fm for fm in maps.select(layer=y.layer, kind="input", step=-1) if fm.call == y.call
            ]
            assert y.weight is not None
            assert y.filters is not None
            source = attention.in_proj_weight if "in_proj" in y.layer else None
            if source is not None:
                assert torch.equal(y.weight, source[list(y.filters)])
            # torch folds the batch into rows, or not, by whether the weight requires a gradient.
            weight = nn.Parameter(y.weight)
            assert torch.equal(F.linear(x_in.tensor, weight, y.bias), y.tensor)


class LowRank(nn.Module):
    """A weight with a sum of low rank, put together in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down)


def computed() -> list[nn.Module]:
    return [
        nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU()),
        nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 6)), nn.ReLU()),
        nn.Sequential(LowRank(), nn.ReLU(inplace=True)),
        nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 6)), nn.ReLU()),
    ]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("which", range(4))
def test_computed_weights_as_they_were_used(which: int) -> None:
    """A weight that each pass makes anew is held on request, and not guessed at otherwise."""
    model = computed()[which]
    with capture(model, kinds=KINDS, weights=True, keep=3) as maps:
        for _ in range(3):
            model(torch.randn(3, 4)).sum().backward()
    for step in range(3):
        x, y = (maps.select(kind=k, step=step)[0] for k in ("input", "response"))
        assert y.weight is not None
        assert torch.equal(F.linear(x.tensor, y.weight, y.bias), y.tensor)
    with capture(model) as maps, torch.no_grad():
        for _ in range(2):
            model(torch.randn(3, 4))
        fm = next(iter(maps))
        with pytest.raises(KindNotCapturedError) as error:
            _ = fm.weight
    assert str(error.value) == (
        f"the weight behind the preactivation of layer {fm.layer!r} (step 1, call 0) was computed "
        "in the pass, and was not held; capture(model, weights=True) holds it (an eager model is "
        "traced there in each pass)"
    )


def test_spectral_norm_of_each_call() -> None:
    """In training, each call has its own weight."""
    layer = parametrizations.spectral_norm(nn.Linear(4, 4))
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU())
    with capture(model, kinds=KINDS, weights=True) as maps:
        for _ in range(3):
            for vector in layer.parametrizations.weight[0].buffers():  # far from converged
                vector.copy_(F.normalize(torch.randn(4), dim=0))
            model(torch.randn(3, 4))
    first, second = (pair(maps, "0", call) for call in (0, 1))
    assert not torch.equal(first[1].weight, second[1].weight)  # type: ignore[arg-type]
    for x, y in (first, second):
        assert torch.equal(F.linear(x.tensor, y.weight, y.bias), y.tensor)  # type: ignore


def test_capturing_weights_changes_nothing() -> None:
    """Outputs, gradients and buffers are the same bits."""
    for model in computed()[:3]:
        twin = copy.deepcopy(model)
        x = torch.randn(3, 4)
        with capture(model, weights=True):
            for _ in range(3):
                model(x).sum().backward()
        for _ in range(3):
            twin(x).sum().backward()
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine.grad, other.grad)  # type: ignore[arg-type]
        for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(mine, other)


def test_a_step_since() -> None:
    """The parameter as it is; with `weights=True`, an error once it was written to."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with capture(model, weights=True) as maps, torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 4))
            assert torch.equal(maps["0"].weight, model[0].weight)  # type: ignore
            model[0].weight.mul_(2)
        with pytest.raises(MapOverwrittenError) as error:
            _ = maps["0"].weight
        assert str(error.value) == (
            "the weight behind the activation of layer '0' (step 2, call 0) was written to after "
            "the pass; read and clone it before the optimiser's step"
        )
        assert torch.equal(maps["0"].bias, model[0].bias)  # type: ignore
    with capture(model) as maps, torch.no_grad():
        model(torch.randn(2, 4))
        model[0].weight.mul_(2)
    assert torch.equal(maps["0"].weight, model[0].weight)  # type: ignore


def test_swapped_parameters() -> None:
    """`functional_call` uses others than the model has."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    others = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for weights in (True, False):
        with capture(model, weights=weights) as maps, torch.no_grad():
            for _ in range(2):
                functional_call(model, others, (torch.randn(2, 4),))
        if weights:
            assert torch.equal(maps["0"].weight, others["0.weight"])  # type: ignore[arg-type]
            continue
        with pytest.raises(MapOverwrittenError, match="is another tensor now than when the layer"):
            _ = maps["0"].weight


def test_a_view_of_a_parameter_whose_layout_changed() -> None:
    """A part is found by its strides, which `channels_last` changes."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank = nn.Parameter(torch.randn(6, 4, 3, 3))
            self.other = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.bank[2:5], padding=1).relu()

    model = Part()
    with capture(model) as maps, torch.no_grad():
        model(torch.randn(1, 4, 5, 5))
    assert torch.equal(maps["bank"].weight, model.bank[2:5])  # type: ignore[arg-type]
    model.to(memory_format=torch.channels_last)
    with pytest.raises(MapOverwrittenError, match="has another shape or layout than when"):
        _ = maps["bank"].weight


def test_fixed_kernels_and_layers_that_are_not_registered() -> None:
    """A buffer, and a layer in a plain list."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.randn(2, 1, 3, 3))
            self.layers = [nn.Conv2d(2, 3, 1)]

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.layers[0](F.relu(F.conv2d(x, self.kernel))))

    model = Odd()
    with capture(model, kinds=KINDS) as maps, torch.no_grad():
        for _ in range(3):
            model(torch.randn(1, 1, 6, 6))
    first, second = maps.select(kind="response")
    assert torch.equal(first.weight, model.kernel)  # type: ignore
    assert torch.equal(second.weight, model.layers[0].weight)  # type: ignore[arg-type]


def test_none_where_no_layer_made_it() -> None:
    """A nonlinearity of the input, a norm alone, an output."""
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2), nn.ReLU())
    with capture(model, kinds=("input", "activation", "output")) as maps, torch.no_grad():
        model(torch.randn(3, 4))
    for fm in maps:
        has = fm.kind == "activation" and fm.layer == "3"
        assert (fm.weight is not None) == has
        assert (fm.bias is not None) == has


def test_weights_that_cannot_be_read() -> None:
    """Named, with the reason."""

    class Given(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.linear(x, x))

    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    register_layer(Opaque, -1)
    opaque = nn.Sequential(Opaque(), nn.ReLU())
    with capture(opaque) as maps, torch.no_grad():
        opaque(torch.randn(2, 3))
    with pytest.raises(KindNotCapturedError) as error:
        _ = maps["0"].weight
    assert str(error.value) == (
        "the activation of layer '0' (step 0, call 0) has no weight to be read: it is a layer by "
        "register_layer, and which weights it uses is not known"
    )
    given = Given()
    with capture(given) as maps, torch.no_grad():
        given(torch.randn(2, 3))
    with pytest.raises(FilterRangeError, match="its filters do not lie along axes of their own"):
        _ = next(iter(maps)).weight


def test_layouts_of_other_functions() -> None:
    """Time, batch, channels; and a sparse weight, which has no rows to view."""

    class Temporal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.conv_tbc(x, self.weight, self.bias, 1))

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.sparse.mm(self.weight, x))

    temporal, sparse = Temporal(), Sparse()
    with capture(temporal, kinds=KINDS) as maps, torch.no_grad():
        for _ in range(2):
            temporal(torch.randn(7, 2, 4))
    x, y = pair(maps, "")
    assert (y.filter_dim, y.filters) == (2, range(6))
    assert y.weight is not None
    assert torch.equal(y.weight, temporal.weight.permute(2, 0, 1))
    back = y.weight.permute(1, 2, 0)
    assert torch.equal(torch.conv_tbc(x.tensor, back, y.bias, 1), y.tensor)  # type: ignore
    with capture(sparse) as maps, torch.no_grad():
        sparse(torch.randn(4, 3))
    with pytest.raises(KindNotCapturedError, match="is sparse, and has no rows to look at"):
        _ = next(iter(maps)).weight


@needs_compiled
def test_weights_of_a_compiled_model() -> None:
    """The same of a graph."""
    model = Every()
    compiled = torch.compile(model, backend="eager")
    with capture(compiled, kinds=KINDS) as maps, torch.no_grad():
        for _ in range(2):
            compiled(torch.randn(2, 3, 6, 6))
    for layer, form in FORMS.items():
        x, y = pair(maps, layer)
        assert y.weight is not None
        assert torch.equal(form(x.tensor, y.weight, y.bias), y.tensor), layer


def test_a_map_keeps_no_module_alive() -> None:
    """Nor the other maps of its pass; and a copy has values and tags alone."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    with capture(model) as maps, torch.no_grad():
        model(torch.randn(2, 4))
    fm = maps["0"]
    for other in (copy.deepcopy(fm), pickle.loads(pickle.dumps(fm))):
        with pytest.raises(MapReleasedError, match="its weight stayed with the model"):
            _ = other.weight
    gone = weakref.ref(model[0]), weakref.ref(maps["2"].tensor)
    del model, maps
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    with pytest.raises(MapReleasedError, match="went with its module"):
        _ = fm.weight


def test_a_module_that_is_traced_in_every_pass() -> None:
    """Units inside of it are read by plans, and tell theirs."""

    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.b = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return F.relu(self.b(x)) if float(x.sum()) > -1 else x

    model = Deciding()
    with capture(model, kinds=KINDS) as maps, torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 4))
    for layer in ("a.0", "b"):
        x, y = pair(maps, layer)
        assert torch.equal(F.linear(x.tensor, y.weight, y.bias), y.tensor)  # type: ignore


def test_parametrized_by_a_user() -> None:
    """Any parametrisation, with buffers of its own or not."""

    class Symmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.triu() + x.triu(1).transpose(-1, -2)

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    with capture(model, kinds=KINDS, weights=True) as maps, torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 4))
    x, y = pair(maps, "0")
    assert torch.equal(y.weight, y.weight.t())  # type: ignore
    assert torch.equal(F.linear(x.tensor, y.weight, y.bias), y.tensor)  # type: ignore[arg-type]


def again(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The response of a layer, from the maps alone."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(module, nn.ConvTranspose2d):
        return F.conv_transpose2d(x, weight.transpose(0, 1), bias, module.stride, module.padding)
    assert isinstance(module, nn.Conv2d)
    return F.conv2d(x, weight, bias, module.stride, module.padding, 1, module.groups)


@settings(max_examples=15)
@given(models(), st.booleans())
def test_of_any_model(drawn: Model, weights: bool) -> None:
    """Whatever comes between layer and σ, each map has the rows of its own filters."""
    model = drawn.build().eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model, kinds=KINDS, weights=weights) as maps:
            for step in range(3):
                model(drawn.inputs(step))
    modules = dict(model.named_modules())
    calls: dict[tuple[str, int], dict[str, FeatureMap]] = {}
    for fm in maps:
        module = modules.get(fm.layer)
        if fm.kind == "input" or not isinstance(getattr(module, "weight", None), Tensor):
            assert fm.weight is None or fm.kind != "input"
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and fm.filters:
            own = module.weight.transpose(0, 1) if "Trans" in str(module) else module.weight
            assert torch.equal(fm.weight, own[list(fm.filters)])  # type: ignore[arg-type]
        calls.setdefault((fm.layer, fm.call), {})[fm.kind] = fm
    for (layer, _), kinds in calls.items():
        x, y = kinds.get("input"), kinds.get("response")
        if x is not None and y is not None and y.weight is not None:
            response = again(modules[layer], x.tensor, y.weight, y.bias)
            assert torch.equal(response, y.tensor)


# -- parameters that torch swaps -----------------------------------------------------------------


def _to(model: nn.Module) -> None:
    model.to(torch.float64)


def _load(model: nn.Module) -> None:
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})


def _one(model: nn.Module) -> None:
    linear = model[0]  # type: ignore[index]
    torch.utils.swap_tensors(linear.weight, nn.Parameter(linear.weight.detach() * 2))


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("how", [_to, _load, _one])
def test_tensors_are_swapped_as_without_capture(
    how: Callable[[nn.Module], None], grads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch swaps no tensor that somebody has a weak reference to."""
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    bare = copy.deepcopy(model)
    with torch.set_grad_enabled(grads), capture(model, kinds=KINDS) as maps:
        for step in range(4):
            x = torch.randn(2, 3, dtype=bare[0].weight.dtype)
            y = model(x)
            assert torch.equal(y, bare(x))
            assert torch.equal(maps["0", "response"].tensor, bare[0](x))
            assert torch.equal(maps["0"].weight, bare[0].weight)  # type: ignore[arg-type]
            del y
            if step in (0, 2):
                how(model)
                how(bare)
    how(model)  # while the maps are there
    how(bare)
    assert torch.equal(model[0].weight, bare[0].weight)


def test_a_map_keeps_no_weights_of_a_model_that_is_gone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with capture(model) as maps:
        model(torch.randn(2, 3))
    fm, weight = maps["0"], weakref.ref(model[0].weight)
    del model, maps
    gc.collect()
    assert weight() is None
    with pytest.raises(MapReleasedError):
        fm.weight  # noqa: B018


# -- exchanged in the pass ---------------------------------------------------------------------


class Exchanging(nn.Module):
    """Its forward puts another buffer in the place of one that is the weight of a layer."""

    def __init__(self, how: str, by_data: bool) -> None:
        super().__init__()
        self.how, self.by_data = how, by_data
        self.fc, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)
        self.used: list[Tensor] = []
        self.register_buffer("W", torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.by_data and float(x.sum()) > 1e9:
            return x
        if self.how == "functional":
            weight = self.W = 0.9 * self.W + 0.1
            x = functional_call(self.inner, {"weight": weight}, (x,))
        elif self.how == "before":
            self.W = 0.9 * self.W + 0.1
            x = F.linear(x, self.W)
        else:
            x = F.linear(x, self.W)
            self.W = 0.9 * self.W + 0.1
        return torch.relu(x)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("by_data", [True, False])
def test_a_buffer_that_the_forward_exchanges(weights: bool, by_data: bool) -> None:
    """In each pass, its weight is the one of that pass, as in a capture of it alone."""
    model = Exchanging("before", by_data)
    with torch.no_grad(), capture(model, weights=weights) as maps:
        for n in range(6):
            model(torch.randn(2, 4))
            fm = maps.select(kind="activation")[-1]
            assert fm.weight is not None
            assert torch.equal(fm.weight, model.W)
            if n == 2:  # not the one of the pass in which the layer was learned
                first, model.W = model.W, torch.zeros(4, 4)
                if not weights:
                    with pytest.raises(MapOverwrittenError, match="is another tensor now"):
                        _ = maps.select(kind="activation")[-1].weight
                model.W = first


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("how", ["after", "functional"])
def test_a_weight_that_is_exchanged_once_it_was_used(how: str, weights: bool) -> None:
    """What is in its place when the pass has ended was not the weight."""
    model = Exchanging(how, by_data=False)
    with torch.no_grad(), capture(model, weights=weights) as maps:
        for _ in range(4):
            model(torch.randn(2, 4))
            fm = maps.select(kind="activation")[-1]
            if how == "functional" and fm.layer == "W":  # the buffer itself
                assert fm.weight is not None
                assert torch.equal(fm.weight, model.W)
                continue
            with pytest.raises(MapOverwrittenError, match="in the pass, after the layer had used"):
                _ = fm.weight
