"""torch's own transformer layers are read by taps in every mode, also where torch fuses them.

What comes out is compared to an untouched copy, bit for bit. The maps are compared to those of a
first pass in a block of its own on such a copy, which is traced, and the projections of attention,
and the layer's inside, to what the layer's parts give by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmapkit import FeatureMaps, capture
from fmapkit.missed import Reason
from fmapkit.session import fused_paths
from fmapkit.torchlib.fused import kernels
from fmapkit.torchlib.fused.looks import FusedLooks
from tests.truth import assert_nothing_left, assert_same_gradients, fingerprint

WIDTH = 16


def _layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, dropout=0.0, **options)


class Attentions(nn.Module):
    """Attention between layers of the model's own: a function, and a module in place."""

    def __init__(self, weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)
        self.second = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.act = nn.ReLU(inplace=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x, x, x, need_weights=self.weights)[0]
        x = x + self.down(self.act(self.up(x)))
        y, _ = self.second(x, x, x, need_weights=self.weights)
        return F.gelu(self.up(x + y))


class Decoding(nn.Module):
    """A decoder, whose attention to the encoder's output torch never fuses."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, 2, 32, batch_first=True, dropout=0.0)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(x, x.flip(0)))


class Masked(nn.Module):
    """An encoder with a mask; with padding, torch may take nested tensors."""

    def __init__(self, causal: bool, padding: bool) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(_layer(), 2)
        self.causal, self.padding = causal, padding

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length) if self.causal else None
        pad = torch.arange(length).expand(x.shape[:2]) >= length - 1 if self.padding else None
        return self.encoder(x, mask=mask, src_key_padding_mask=pad).relu()


class Frozen(nn.Module):
    """An encoder without gradients inside a model that has them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.TransformerEncoder(_layer(), 2), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.head(x).relu()


class OwnAttention(nn.MultiheadAttention):
    """A subclass that calls torch's forward."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class OwnLayer(nn.TransformerEncoderLayer):
    """The same of a layer; what it returns is changed."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(src, *args, **kwargs) * 2


class PastTheCall(nn.Module):
    """Forwards called by name, past hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.layer, self.head = _layer(), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + nn.MultiheadAttention.forward(self.attention, x, x, x, need_weights=False)[0]
        return self.head(self.layer.forward(x)).relu()


def _own_layer() -> OwnLayer:
    return OwnLayer(WIDTH, 2, 32, batch_first=True, dropout=0.0)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layer": _layer,
    "norm first": lambda: nn.Sequential(_layer(norm_first=True), nn.Linear(WIDTH, 4), nn.ReLU()),
    "gelu": lambda: nn.Sequential(_layer(activation="gelu"), _layer(activation="gelu")),
    "in place": lambda: nn.Sequential(_layer(activation=nn.ReLU(inplace=True)), nn.ReLU()),
    "its own": lambda: nn.Sequential(_layer(activation=nn.SiLU()), nn.ReLU()),
    "encoder": lambda: nn.TransformerEncoder(_layer(), 3),
    "attentions": Attentions,
    "weights": lambda: Attentions(weights=True),
    "no bias": lambda: Attentions(bias=False),
    "alone": lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True),
    "decoder": Decoding,
    "causal": lambda: Masked(True, False),
    "padding": lambda: Masked(False, True),
    "two encoders": lambda: nn.Sequential(Masked(False, True), Masked(False, True)),
    "both": lambda: Masked(True, True),
    "frozen": Frozen,
    "own attention": lambda: nn.Sequential(OwnAttention(WIDTH, 2, batch_first=True), nn.ReLU()),
    "own layer": lambda: nn.Sequential(_own_layer(), nn.Linear(WIDTH, 3), nn.ReLU()),
    "own layers": lambda: nn.TransformerEncoder(_own_layer(), 2),
    "past the call": PastTheCall,
}


@contextmanager
def _way(mode: str, model: nn.Module) -> Iterator[None]:
    """One of the ways to run a model, by which torch decides whether to fuse."""
    train, grad = mode.startswith("train"), "no_grad" not in mode
    before = torch.backends.mha.get_fastpath_enabled()
    model.train(train)
    for parameter in model.parameters():
        parameter.requires_grad_("frozen" not in mode)
    torch.backends.mha.set_fastpath_enabled("slow" not in mode)
    try:
        with torch.inference_mode() if "inference" in mode else torch.set_grad_enabled(grad):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


EVERY = ("input", "response", "preactivation", "activation", "output", "attention")
WAYS = [
    *("train", "train no_grad", "eval", "eval no_grad", "eval frozen", "eval inference no_grad"),
    *("eval slow no_grad", "eval slow"),
]


def _call(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x, x, x) if isinstance(model, nn.MultiheadAttention) else model(x)
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _told(maps: FeatureMaps) -> list[tuple[Any, ...]]:
    return [(m.layer, m.kind, m.call, m.filters, m.nonlinearity) for m in maps]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    passes=st.lists(
        st.tuples(st.sampled_from(WAYS), st.integers(1, 3), st.integers(2, 5)),
        min_size=3,
        max_size=7,
    ),
    kinds=st.sampled_from([None, EVERY, "response", "activation", "attention", "output"]),
    seed=st.integers(0, 1000),
)
def test_any_sequence_of_ways_to_run_it(
    name: str, passes: list[tuple[str, int, int]], kinds: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    model = MODELS[name]()
    bare = copy.deepcopy(model)
    before = fingerprint(model)
    options = {} if kinds is None else {"kinds": kinds}
    with capture(model, keep=1, **options) as maps:
        for number, (way, batch, length) in enumerate(passes):
            x = torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(number))
            with _way(way, bare):
                expected = _call(bare, x)
            with _way(way, model):
                out = _call(model, x)
            assert torch.equal(out, expected), (way, number)
            assert out.requires_grad == expected.requires_grad
            fresh = copy.deepcopy(bare)
            with _way(way, fresh), capture(fresh, **options) as learned:
                _call(fresh, x)
            assert _told(maps) == _told(learned), (way, number)
            for ours, theirs in zip(maps, learned, strict=True):
                assert torch.equal(ours.tensor, theirs.tensor), (way, number, ours.layer, ours.kind)
            assert {(m.layer, m.reason) for m in learned.missed} <= {
                (m.layer, m.reason) for m in maps.missed
            }
    model.train(True).requires_grad_(True)
    assert_nothing_left(before, model)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("way", ["train", "eval", "eval no_grad"])
def test_gradients(name: str, way: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    bare = copy.deepcopy(model)
    with capture(model):
        for number in range(4):
            x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(number))
            for one in (model, bare):
                with _way(way, one):
                    out = _call(one, x)
                    if out.requires_grad:
                        out.square().sum().backward()
    assert_same_gradients(model, bare)


@pytest.mark.parametrize(
    "name",
    [
        *("layer", "encoder", "attentions", "decoder", "gelu", "its own", "own attention"),
        *("own layer", "own layers"),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_no_pass_but_the_first_is_traced(name: str, way: str, traced: list[None]) -> None:
    model = MODELS[name]()
    with _way(way, model), capture(model):
        _call(model, torch.randn(2, 4, WIDTH))
        first = len(traced)
        for _ in range(3):
            _call(model, torch.randn(2, 4, WIDTH))
    assert first == 1
    # A survey may find code that did not record: the pass after it is traced, too.
    assert len(traced) <= 2


@torch.no_grad()
def test_the_maps_beside_a_fused_layer_are_those_of_its_parts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(_layer(), _layer()).eval()
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for number in range(4):
            x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(number))
            model(x)
            for place, layer in enumerate(bare):
                attention = layer.self_attn
                z = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
                found = maps[f"{place}.self_attn.in_proj", "preactivation"].tensor
                torch.testing.assert_close(found.transpose(0, 1), z)
                x1 = layer.norm1(x + attention(x, x, x)[0])
                z = layer.linear1(x1)
                torch.testing.assert_close(maps[f"{place}.linear1", "preactivation"].tensor, z)
                torch.testing.assert_close(maps[f"{place}.linear1"].tensor, z.relu())
                x = layer(x)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"kinds": "activation"}, {"layers": ["up", "down"]}, {}])
def test_the_ordinary_path_runs_in_a_traced_pass_alone(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ordinary, fused = Attentions().eval(), [], []
    path, kernel = fused_paths.OrdinaryPath, FusedLooks.kernel
    monkeypatch.setattr(fused_paths, "OrdinaryPath", lambda *a: ordinary.append(0) or path(*a))
    monkeypatch.setattr(FusedLooks, "kernel", lambda *a: fused.append(0) or kernel(*a))
    with capture(model, **options) as maps:
        model(torch.randn(2, 4, WIDTH))
        assert len(ordinary) == 2
        for _ in range(4):
            ordinary.clear()
            fused.clear()
            model(torch.randn(2, 4, WIDTH))
    assert not ordinary
    assert len(fused) == (0 if options else 2)
    assert not maps.missed


@torch.no_grad()
def test_the_output_is_the_fused_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OwnAttention(64, 4, batch_first=True), Attentions64()).eval()
    bare = copy.deepcopy(model)
    with capture(model, kinds="output") as maps:
        for number in range(4):
            x = torch.randn(4, 33, 64, generator=torch.Generator().manual_seed(number))
            model(x)
            first = bare[0](x)
            assert torch.equal(maps["0", "output"].tensor, first)
            second = bare[1].attention(first, first, first, need_weights=False)[0]
            assert torch.equal(maps.select("1.attention", kind="output")[0].tensor, second)


def _attention_by_hand(attention: nn.MultiheadAttention, x: Tensor) -> dict[str, Tensor]:
    """The operators that the kernel runs on the CPU, one by one."""
    heads, width = attention.num_heads, attention.embed_dim
    samples, tokens = x.shape[:2]
    bias: Any = attention.in_proj_bias
    weight: Any = attention.in_proj_weight
    product = torch.mm(x.reshape(-1, width), weight.t()).view(samples, tokens, -1)
    parts = torch._transform_bias_rescale_qkv(product, bias, heads)
    q, k, v = (t.view(samples * heads, tokens, -1) for t in parts)
    shares = torch.bmm(q, k.transpose(2, 1)).softmax(-1)
    mixed = torch.bmm(shares, v).view(samples, heads, tokens, -1).permute(0, 2, 1, 3)
    own = attention.out_proj
    out = torch.addmm(own.bias, mixed.reshape(-1, width), own.weight.t())
    return {"in_proj": product + bias, "out_proj": out.view(samples, tokens, width)}


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("way", ["steps", "mode"])
def test_the_maps_are_what_the_kernel_computes_to_the_bit(
    activation: str, samples: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, which is seen to be what the kernel does by what it returns."""
    torch.manual_seed(0)
    if way == "mode":
        monkeypatch.setattr(kernels, "in_steps", lambda *_: None)
    layer = nn.TransformerEncoderLayer(
        64, 4, 96, batch_first=True, dropout=0.0, activation=activation
    ).eval()
    bare = copy.deepcopy(layer)
    with capture(layer) as maps:
        for number in range(3):
            x = torch.randn(samples, 7, 64, generator=torch.Generator().manual_seed(number))
            out = layer(x)
            by_hand = _attention_by_hand(bare.self_attn, x)
            y = bare.norm1(by_hand["out_proj"] + x)
            z = torch.addmm(bare.linear1.bias, y.view(-1, 64), bare.linear1.weight.t())
            a = z.relu() if activation == "relu" else F.gelu(z)
            z2 = torch.addmm(bare.linear2.bias, a, bare.linear2.weight.t()).view_as(x)
            assert torch.equal(out, bare.norm2(z2 + y))
            found = {(m.layer, m.kind): m.tensor for m in maps}
            of = ("self_attn.in_proj", "preactivation")
            assert torch.equal(found[of].transpose(0, 1), by_hand["in_proj"])
            turned = by_hand["out_proj"].transpose(0, 1).reshape(-1, 64)
            assert torch.equal(found["self_attn.out_proj", "preactivation"], turned)
            assert torch.equal(found["linear1", "preactivation"].view(z.shape), z)
            assert torch.equal(found["linear1", "activation"].view(z.shape), a)
            assert torch.equal(found["linear2", "preactivation"], z2)
            assert len(found) == 5
    assert not maps.missed


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_of_padding_nothing_is_computed(activation: str, traced: list[None]) -> None:
    """An encoder leaves it out by nested tensors: its maps are those of each text by itself."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, activation=activation)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(64)).eval()
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for number in range(5):
            x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(number))
            lengths = [7, 2 + number % 3, 5]
            padding = torch.arange(7) >= torch.tensor(lengths)[:, None]
            out = model(x, src_key_padding_mask=padding)
            assert torch.equal(out, bare(x, src_key_padding_mask=padding))
            found = {(m.layer, m.kind): m.tensor for m in maps}
            assert len(found) == 10
            for sample, length in enumerate(lengths):
                y = x[sample : sample + 1, :length]
                for n, one in enumerate(bare.layers):
                    own = one.self_attn
                    of = f"layers.{n}.self_attn.in_proj", "preactivation"
                    z = F.linear(y, own.in_proj_weight, own.in_proj_bias)
                    torch.testing.assert_close(found[of][:length, sample], z[0])
                    assert not found[of][length:, sample].any()
                    of = f"layers.{n}.self_attn.out_proj", "preactivation"
                    z = _attention_by_hand(own, y)["out_proj"]
                    turned = found[of].view(7, 3, 64)
                    torch.testing.assert_close(turned[:length, sample], z[0])
                    z = one.linear1(one.norm1(y + z))
                    a = z.relu() if activation == "relu" else F.gelu(z)
                    for kind, truth in ("preactivation", z), ("activation", a):
                        tensor = found[f"layers.{n}.linear1", kind]
                        torch.testing.assert_close(tensor[sample, :length], truth[0])
                        assert not tensor[sample, length:].any()
                    y = one(y)
    assert not maps.missed
    assert len(traced) <= 2


def _one_by_one(options: dict[str, Any]) -> None:
    """A replayed pass gives what a first one on a copy gives, and no pass is lost."""
    torch.manual_seed(0)
    model = nn.Sequential(
        _layer(), nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, WIDTH), Attentions()
    )
    model.eval()
    with torch.no_grad(), capture(model, keep=1, **options) as maps:
        for number in range(4):
            x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(number))
            model(x)
            fresh = copy.deepcopy(model)
            with capture(fresh, **options) as learned:
                fresh(x)
            assert _told(maps) == _told(learned)
            for ours, theirs in zip(maps, learned, strict=True):
                assert torch.equal(ours.tensor, theirs.tensor), (number, ours.layer, ours.kind)
    assert {m.reason for m in maps.missed} == {m.reason for m in learned.missed}


@pytest.mark.parametrize(
    "options",
    [
        {"layers": "0.linear1"},
        {"layers": "0.self_attn.in_proj", "kinds": "preactivation"},
        {"filters": {"0.linear1": [3, 5], "0.self_attn.out_proj": [0, 2]}},
        {"dtype": torch.float64},
        {"kinds": "response"},
        {"kinds": "activation"},
        {"kinds": ["output", "activation"]},
        {"detach": False},
        {"layers": "0.linear1", "stop": True},
    ],
    ids=str,
)
def test_whatever_is_asked_for(options: dict[str, Any]) -> None:
    _one_by_one(options)


@torch.no_grad()
def test_inputs_of_other_sizes(traced: list[None]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(_layer(), _layer()).eval()
    with capture(model) as maps:
        for samples, tokens in [(2, 4), (3, 7), (1, 7), (4, 2), (2, 9), (5, 3)]:
            x = torch.randn(samples, tokens, WIDTH)
            model(x)
            z = model[0].linear1(
                model[0].norm1(x + _attention_by_hand(model[0].self_attn, x)["out_proj"])
            )
            assert maps["0.linear1", "preactivation"].shape == (samples, tokens, 32)
            torch.testing.assert_close(maps["0.linear1", "preactivation"].tensor, z)
    assert len(traced) <= 3
    assert not maps.missed


@torch.no_grad()
@pytest.mark.parametrize("where", ["layer", "inside", "everywhere", "before"])
def test_hooks_of_others_are_called(where: str) -> None:
    """Torch asks for those inside a layer; attention, and the layer's own, it calls in any case."""
    torch.manual_seed(0)
    model = Attentions().eval()
    bare, seen, expected = copy.deepcopy(model), [], []
    handles = []

    def hook(into: list[Any]) -> Callable[..., None]:
        return lambda module, *_: into.append(type(module).__name__)

    with capture(model) as maps:
        for number in range(6):
            x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(number))
            if number == 3:
                for one, into in (model, seen), (bare, expected):
                    if where == "before":
                        handles.append(one.first.register_forward_pre_hook(hook(into)))
                    elif where != "everywhere":
                        of = one.first if where == "layer" else one.first.out_proj
                        handles.append(of.register_forward_hook(hook(into)))
            if where == "everywhere" and number > 2:
                for one, into in (model, seen), (bare, expected):
                    handle = nn.modules.module.register_module_forward_hook(hook(into))
                    one(x)
                    handle.remove()
            else:
                assert torch.equal(model(x), bare(x))
            first = maps["first.out_proj", "preactivation"].tensor
            truth = _attention_by_hand(bare.first, x)["out_proj"]
            torch.testing.assert_close(first, truth.transpose(0, 1).reshape(-1, WIDTH))
    assert seen == expected
    assert seen if where != "inside" else not seen


@torch.no_grad()
def test_another_capture_of_a_part_sees_it_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(_layer(), nn.ReLU()).eval()
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for number in range(8):
            x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(number))
            if number in (3, 4, 5):
                with capture(model[0]) as inner:
                    assert torch.equal(model(x), bare(x))
                assert inner["linear1"].shape == (2, 4, 32)
            else:
                assert torch.equal(model(x), bare(x))
            alone = copy.deepcopy(bare)
            with capture(alone) as fresh:
                alone(x)
            ours = {(m.layer, m.kind): m.tensor for m in maps}
            for theirs in fresh:
                if (theirs.layer, theirs.kind) in ours:
                    found = ours[theirs.layer, theirs.kind]
                    torch.testing.assert_close(found, theirs.tensor)


@torch.no_grad()
def test_weights_that_two_layers_share() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, batch_first=True, dropout=0.0).eval()
    layer.linear2.weight = layer.linear1.weight
    model = nn.Sequential(layer, nn.ReLU())
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for number in range(3):
            x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(number))
            assert torch.equal(model(x), bare(x))
            y = bare[0].norm1(x + bare[0].self_attn(x, x, x)[0])
            z = bare[0].linear1(y)
            of_weight = [m for m in maps if m.shape[-1] == WIDTH and m.kind == "preactivation"]
            torch.testing.assert_close(maps["0.linear1"].tensor, z.relu())
            assert of_weight


@torch.no_grad()
@pytest.mark.parametrize("kind", [PastTheCall, Attentions, _layer])
def test_a_fault_of_ours_is_named_and_changes_nothing(
    kind: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    bare = copy.deepcopy(model)

    def broken(*args: Any) -> Any:
        raise TypeError("ours")

    kept = []
    with capture(model) as maps:
        for number in range(5):
            if number == 3:
                monkeypatch.setattr(kernels, "in_steps", broken)
            x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(number))
            assert torch.equal(model(x), bare(x))
            if number == 3:
                monkeypatch.undo()
            else:
                kept.append(len(maps))
    assert any("TypeError: ours" in m.reason for m in maps.missed)
    assert kept[0]
    assert len(set(kept)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stepwise", [False, True])
def test_inputs_that_are_not_contiguous(
    dtype: torch.dtype, stepwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first one that is zero throughout tells nothing of the ways in which torch adds up."""
    if not stepwise:
        monkeypatch.setattr(kernels, "in_steps", lambda *_: None)
    torch.manual_seed(0)
    model = nn.Sequential(OwnAttention(WIDTH, 2, batch_first=True), _layer()).eval().to(dtype)
    bare = copy.deepcopy(model)
    with capture(model):
        for tokens, samples in [(7, 3), (1, 4), (5, 2)]:
            for number in range(9):
                x = torch.randn(tokens, samples, WIDTH, dtype=dtype) * (number > 0)
                for one in model, bare:
                    one.requires_grad_(number % 3 > 0)
                with torch.inference_mode() if number % 2 else torch.no_grad():
                    expected = bare(x.transpose(0, 1))
                    out = model(x.transpose(0, 1))
                assert torch.equal(out, expected)
                assert out.stride() == expected.stride()


@pytest.mark.parametrize("kind", [_layer, Attentions])
def test_no_samples_and_no_tokens(kind: Callable[[], nn.Module]) -> None:
    """torch's kernels have ways of their own there, and their operators crash."""
    model = kind().eval()
    bare = copy.deepcopy(model)
    with torch.no_grad(), capture(model) as maps:
        for samples, tokens in [(0, 3), (0, 3), (2, 4), (2, 4), (0, 3), (2, 4)]:
            x = torch.randn(samples, tokens, WIDTH)
            assert torch.equal(model(x), bare(x))
            assert len(maps) >= 5
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True).eval()
    x = torch.randn(3, 0, WIDTH)
    with torch.no_grad(), capture(attention):
        for _ in range(3):
            assert attention(x, x, x)[0].shape == (3, 0, WIDTH)


@pytest.mark.parametrize("kind", [_layer, Attentions])
def test_autocast(kind: Callable[[], nn.Module]) -> None:
    """For the CPU, torch fuses all the same."""
    torch.manual_seed(0)
    model = kind().eval()
    bare = copy.deepcopy(model)
    with torch.no_grad(), capture(model):
        for number, dtype in enumerate([None, torch.bfloat16, None, torch.float16] * 2):
            x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(number))
            found = []
            for one in model, bare:
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    try:
                        found.append(one(x))
                    except RuntimeError as error:  # not all of the kernel's operators take it
                        found.append(str(error))
            ours, theirs = found
            assert type(ours) is type(theirs)
            if isinstance(ours, Tensor):
                assert ours.dtype is theirs.dtype
                assert torch.equal(ours, theirs)
            else:
                assert ours == theirs


class Residual(nn.Module):
    """Writes to what attention returns."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = OwnAttention(WIDTH, 2, batch_first=True), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)
        y += x
        return self.head(y.relu_())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("sizes", [[(1, 4)] * 4, [(3, 1)] * 4, [(3, 4), (2, 5), (1, 4), (4, 1)]])
def test_what_attention_returns_is_written_to(mode: Any, sizes: list[tuple[int, int]]) -> None:
    """Of one sample, or one token, the map of its last layer would lie in the same memory."""
    torch.manual_seed(0)
    model = Residual().eval()
    bare = copy.deepcopy(model)
    kinds = ("response", "preactivation", "activation")
    with mode(), capture(model, kinds=kinds) as maps:
        for number, size in enumerate(sizes * 2):
            x = torch.randn(*size, WIDTH, generator=torch.Generator().manual_seed(number))
            model(x)
            expected = bare.attention(x).transpose(0, 1).reshape(-1, WIDTH)
            assert torch.equal(maps["attention.out_proj", "response"].tensor, expected)
    assert not maps.missed


class Mapped(nn.Module):
    """A layer under `torch.vmap`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = _layer(), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.vmap(self.layer)(x.unflatten(0, (2, -1)))).relu()


@torch.no_grad()
def test_under_a_transform_nothing_of_ours_fails() -> None:
    torch.manual_seed(0)
    model = Mapped().eval()
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for number in range(3):
            x = torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(number))
            assert torch.equal(model(x), bare(x))
    assert not any("failed" in m.reason for m in maps.missed)


@torch.no_grad()
@pytest.mark.parametrize("inside", [False, True])
def test_a_forward_of_the_objects_own_is_the_one_that_runs(inside: bool) -> None:
    """As accelerate and others put it there."""
    torch.manual_seed(0)
    layer = _layer().eval()
    model = nn.Sequential(layer, nn.Linear(WIDTH, 4), nn.ReLU()).eval() if inside else layer
    x = torch.randn(2, 4, WIDTH)
    expected = layer(x) * 2
    layer.forward = lambda x: type(layer).forward(layer, x) * 2  # type: ignore[method-assign]
    expected = model[1:](expected) if inside else expected
    with capture(model) as maps:
        for _ in range(4):
            assert torch.equal(model(x), expected)
    assert any("nonlinearity inside" in m.reason for m in maps.missed)


class OwnTensor(Tensor):
    """Torch's functions ask its class."""


@torch.no_grad()
def test_tensors_of_a_class_of_ones_own_are_not_fused() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval()
    bare = copy.deepcopy(model)
    with capture(model):
        for number in range(4):
            x = torch.randn(3, 17, 64, generator=torch.Generator().manual_seed(number))
            if number % 2:
                x = x.as_subclass(OwnTensor)
            out, expected = (m(x).as_subclass(Tensor) for m in (model, bare))
            assert torch.equal(out, expected)


class Raises(nn.ReLU):
    """Which torch's kernel never calls."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not mine")


class Hinted(nn.Module):
    """Says that its mask is causal, and has none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.attention = _layer(), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.TransformerEncoderLayer.forward(self.layer, x, is_causal=True)
        x = self.attention(x, x, x, need_weights=False, is_causal=True)[0]
        return self.head(x).relu()


@torch.no_grad()
@pytest.mark.parametrize("name", ["hinted", "nested"])
def test_the_ordinary_path_alone_raises(name: str) -> None:
    """It runs for its maps: what it raises, the model does not."""
    torch.manual_seed(0)
    model = {"hinted": Hinted(), "nested": _layer()}[name]
    bare = copy.deepcopy(model.eval())
    with capture(model) as maps:
        for number in range(4):
            x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(number))
            if name == "nested":
                x = torch.nested.nested_tensor([x[0], x[1, :2]])
            out, expected = model(x), bare(x)
            if name == "nested":
                out, expected = (t.to_padded_tensor(0.0) for t in (out, expected))
            assert torch.equal(out, expected)
            if name == "hinted":
                assert maps["head"].shape == (2, 4, 4)
    assert any(m.why is Reason.FUSED_PATH_ALONE for m in maps.missed)


class Counting(nn.Linear):
    """Counts its calls, of which torch's kernel makes none."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sigma", "linear", "object", "attention"])
def test_code_inside_that_torch_leaves_out(name: str) -> None:
    """It does not run for the maps, which are not there, and said to be not."""
    torch.manual_seed(0)
    layer = _layer(activation=Raises()) if name == "sigma" else _layer()
    if name == "linear":
        layer.linear1.__class__ = Counting
    elif name == "object":
        layer.norm1.forward = Raises().forward  # type: ignore[method-assign]
    elif name == "attention":
        layer.self_attn.__class__ = OwnAttention
    model = nn.Sequential(layer, nn.Linear(WIDTH, 4)).eval()
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for _ in range(5):
            x = torch.randn(2, 4, WIDTH)
            assert torch.equal(model(x), bare(x))
            assert [fm.layer for fm in maps] == ["1"]
    assert not getattr(layer.linear1, "calls", 0)
    (missed,) = maps.missed
    assert (missed.layer, missed.why) == ("0", Reason.FUSED_PATH_OWN_CODE)


class Noisy(nn.ReLU):
    """Draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["dropout", "noisy", "attention", "padded"])
def test_the_ordinary_path_draws_no_random_numbers(name: str) -> None:
    """Torch fuses a layer whose dropout alone is in training, and drops nothing."""
    torch.manual_seed(0)
    activation = Noisy() if name == "noisy" else nn.ReLU()
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.5, activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    for module in model.modules():
        module.training = isinstance(module, nn.Dropout) and name != "noisy"
        if isinstance(module, nn.MultiheadAttention):
            module.training = name == "attention"
    bare, found = copy.deepcopy(model), []
    padding = torch.tensor([[False] * 4, [False] * 2 + [True] * 2]) if name == "padded" else None
    for one in model, bare:
        torch.manual_seed(1)
        with capture(one) if one is model else torch.no_grad():
            found.append(
                [
                    (one(torch.randn(2, 4, WIDTH), src_key_padding_mask=padding), torch.randn(3))
                    for _ in range(4)
                ]
            )
    for (ours, our_next), (theirs, their_next) in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(our_next, their_next)


@torch.no_grad()
@pytest.mark.parametrize("kinds", ["activation", "response", ("preactivation", "activation")])
def test_a_nonlinearity_in_place(kinds: Any) -> None:
    """In the ordinary path it overwrites what the kernel has computed of the layer before."""
    torch.manual_seed(0)
    layer = _layer(activation=nn.ReLU(inplace=True)).eval()
    with capture(layer, kinds=kinds) as maps:
        for number in range(4):
            x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(number))
            layer(x)
            own = _attention_by_hand(layer.self_attn, x)["out_proj"]
            y = layer.norm1(own + x).view(-1, WIDTH)
            z = torch.addmm(layer.linear1.bias, y, layer.linear1.weight.t()).view(2, 4, 32)
            for kind in {m.kind for m in maps}:
                expected = z.relu() if kind == "activation" else z
                torch.testing.assert_close(maps["linear1", kind].tensor, expected)
    assert bool(maps.missed) is (kinds != "activation")


class Raising:
    """An analysis with an error of its own."""

    def __init__(self, at: int) -> None:
        self.left = at

    def update(self, fm: Any) -> None:
        self.left -= 1
        if not self.left:
            raise ValueError("mine")


@torch.no_grad()
@pytest.mark.parametrize("kind", [_layer, PastTheCall, _own_layer])
@pytest.mark.parametrize("at", [2, 8, 14])
def test_what_an_analysis_raises_is_raised(kind: Callable[[], nn.Module], at: int) -> None:
    model = kind().eval()

    def four_passes() -> None:
        with capture(model, analyses=[Raising(at)]):
            for _ in range(4):
                model(torch.randn(2, 4, WIDTH))

    with pytest.raises(ValueError, match="mine"):
        four_passes()
    with capture(model) as maps:
        model(torch.randn(2, 4, WIDTH))
    assert maps.layers


def test_a_map_with_nan_is_known_for_the_same() -> None:
    """A sample that is masked throughout is NaN; near zero, the others differ in more than bits."""
    kernel, ordinary = torch.tensor([torch.nan, 1.0, 1e-9]), torch.tensor([torch.nan, 1.0, -1e-9])
    kernel, ordinary = kernel.view(1, 3, 1), ordinary.view(1, 3, 1)
    maps = kernels.KernelMaps({"linear1": (kernel, None)}, (1, 3))
    assert maps.fits("linear1", ordinary)
    assert not maps.fits("linear1", ordinary.nan_to_num(0.0))


class Attentions64(nn.Module):
    """Large enough that the two paths differ."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]
