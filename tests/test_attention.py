"""Attention probabilities: against what a forward writes down itself, and torch's own formula."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fmapkit import ArgumentError, CaptureWarning, capture, edits
from fmapkit.edits import Where
from tests.truth import same_bits

WIDTH, HEADS = 12, 3


class Attention(nn.Module):
    """Eager attention, in many spellings; it writes the probabilities down itself."""

    def __init__(self, spelling: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.spelling = spelling
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.softmax = nn.Softmax(dim=-1)
        self.drop = nn.Dropout(dropout)
        self.inplace = nn.Dropout(dropout, inplace=True)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        qkv = self.qkv(x).view(n, t, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = getattr(self, self.spelling)(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(n, t, -1))

    def note(self, p: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            self.seen.append(p.detach().clone())
        return p

    def matmul(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.drop(self.note((q @ k.mT * 0.5).softmax(-1))) @ v

    def modules_(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = self.note(self.softmax(torch.matmul(q, k.transpose(-2, -1)) / 2.0))
        return torch.matmul(self.inplace(p), v)

    def masked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
        p = self.note(F.softmax(scores, dim=-1, dtype=torch.float64)).to(v.dtype)
        return F.dropout(p, self.drop.p, self.training) @ v

    def einsum(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = self.note(torch.einsum("bhid,bhjd->bhij", q, k).softmax(dim=3))
        return torch.einsum("bhij,bhjd->bhid", self.drop(p), v)

    def transposed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keys first: a column of scores for each query; values on the left."""
        p = self.note((k @ q.mT).softmax(-2))
        return (v.mT @ self.drop(p)).mT

    def returned(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Weighs two values, and is used for something else, too."""
        p = self.note((q @ k.mT).softmax(-1))
        return p @ v + p @ v.flip(-1) + p.amax(-1, keepdim=True)


def gradients(model: nn.Module, out: Tensor) -> list[Tensor]:
    if not out.requires_grad:
        return []
    model.zero_grad()
    out.float().square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


SPELLINGS = ["matmul", "modules_", "masked", "einsum", "transposed", "returned"]


class Net(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.attn = attention
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.attn(x)).softmax(-1)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_eager(spelling: str, train: bool) -> None:
    torch.manual_seed(0)
    model = Net(Attention(spelling, dropout=0.3)).train(train)
    x = torch.randn(2, 5, WIDTH)
    learns = not (train and spelling == "modules_")  # dropout in place spoils softmax's backward
    torch.manual_seed(1)
    with torch.set_grad_enabled(learns):
        bare = model(x)
    state, grads = torch.get_rng_state(), gradients(model, bare)
    attention: Any = model.attn
    with capture(model, kinds="attention") as maps:
        for _ in range(3):
            attention.seen.clear()
            torch.manual_seed(1)
            with torch.set_grad_enabled(learns):
                out = model(x)
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.equal(out, bare)
            assert all(map(torch.equal, gradients(model, out), grads))
            [fm] = list(maps)
            assert torch.equal(fm.tensor, attention.seen[0])
            assert (fm.layer, fm.kind, fm.call, fm.filter_dim) == ("attn", "attention", 0, 1)
            assert fm.filters == range(HEADS)
            assert torch.equal(maps["attn", "attention", 2].tensor, attention.seen[0][:, 2])
            assert not fm.tensor.requires_grad
    assert maps.missed == []
    assert all("_compiled_call_impl" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_whose_filters_are_a_heads_queries_keys_and_values(spelling: str) -> None:
    model, x = Net(Attention(spelling)).eval(), torch.randn(2, 5, WIDTH)
    with capture(model, kinds="attention") as maps:
        model(x)
    heads = maps["attn", "attention"].heads
    for part, projection in enumerate((heads.query, heads.key, heads.value)):
        first = part * WIDTH
        assert projection.layer == "attn.qkv"
        assert projection.filters == tuple(range(first + s, first + s + 4) for s in (0, 4, 8))


# -- fused ------------------------------------------------------------------------------------


class Fused(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.groups = 1 if options.get("enable_gqa") else HEADS
        size = WIDTH // HEADS
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, self.groups * size)
        self.v, self.proj = nn.Linear(WIDTH, self.groups * size), nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> Any:
        pairs = (self.q, HEADS), (self.k, self.groups), (self.v, self.groups)
        return [p(x).view(*x.shape[:2], h, -1).transpose(1, 2) for p, h in pairs]

    def forward(self, x: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*self.heads(x), **self.options)
        return self.proj(out.transpose(1, 2).reshape(*x.shape[:2], -1))

    def truth(self, x: Tensor) -> Tensor:
        """torch's own reference, which returns the probabilities."""
        q, k, v = self.heads(x)
        given = {k: v for k, v in self.options.items() if k != "dropout_p"}
        mask = given.get("attn_mask")
        if mask is not None and mask.dtype is torch.bool:  # which it would add as it is
            numbers = torch.zeros(mask.shape, dtype=x.dtype)
            given["attn_mask"] = numbers.masked_fill(~mask, -torch.inf)
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, **given)[1]


ROWS = torch.tensor([[1, 0, 0, 0, 1], [1] * 5, [0] * 5, [0, 1, 1, 0, 0], [1] * 5]).bool()
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "mask of bools, with a row that sees nothing": {"attn_mask": ROWS},
    "mask of numbers": {"attn_mask": torch.linspace(-2, 2, 50).view(2, 1, 5, 5)},
    "grouped queries": {"enable_gqa": True, "is_causal": True},
    "dropout": {"dropout_p": 0.5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_fused(options: str, dtype: torch.dtype) -> None:
    if "enable_gqa" in OPTIONS[options] and torch.__version__ < "2.5":
        pytest.skip("torch has enable_gqa from 2.5 on")
    torch.manual_seed(0)
    given = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in OPTIONS[options].items()
    }
    model = Net(Fused(**given)).to(dtype)
    x = torch.randn(2, 5, WIDTH, dtype=dtype)
    attention: Any = model.attn
    torch.manual_seed(1)
    bare = model(x)
    state, grads = torch.get_rng_state(), gradients(model, bare)
    expected = attention.truth(model.stem(x)).detach()
    with capture(model, kinds="attention") as maps:
        for _ in range(3):
            torch.manual_seed(1)
            out = model(x)
            assert torch.equal(torch.get_rng_state(), state)
            assert same_bits(out, bare)  # of a row that sees nothing, torch 2.4 gives NaN
            assert all(map(same_bits, gradients(model, out), grads))
            fm = maps["attn", "attention"]
            assert fm.dtype is dtype
            close = 1e-6 if dtype is torch.float32 else 1e-2
            assert torch.allclose(fm.tensor, expected, atol=close, equal_nan=True)
            assert (fm.filter_dim, fm.filters) == (1, range(HEADS))
            heads = fm.heads
            own = (range(4), range(4, 8), range(8, 12))
            assert (heads.query.layer, heads.query.filters) == ("attn.q", own)
            assert (heads.key.layer, heads.value.layer) == ("attn.k", "attn.v")
            assert heads.key.filters == ((range(4),) if attention.groups == 1 else own)
    assert maps.missed == []


def test_probabilities_explain_what_the_kernel_returned() -> None:
    torch.manual_seed(0)
    model, x = Fused(is_causal=True), torch.randn(2, 5, WIDTH)
    with capture(model, kinds=("attention", "input", "response")) as maps:
        model(x)
    v = maps["v", "response"].tensor.view(2, 5, HEADS, -1).transpose(1, 2)
    p = maps["", "attention"].tensor
    mixed = (p @ v).transpose(1, 2).reshape(2, 5, -1)
    assert torch.allclose(maps["proj", "input"].tensor, mixed, atol=1e-6)


def test_a_head_is_silenced_by_the_filters_of_its_values() -> None:
    torch.manual_seed(0)
    model, x = Net(Fused()).eval(), torch.randn(2, 5, WIDTH)
    with capture(model, kinds="attention") as maps:
        model(x)
    value = maps["attn", "attention"].heads.value
    attention: Any = model.attn

    def silence(m: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[..., 4:8] = 0
        return out

    handle = attention.v.register_forward_hook(silence)
    expected = model(x)
    handle.remove()
    where = Where(value.layer, "response", value.filters[1])
    with capture(model, edit={where: edits.zero()}):
        assert torch.equal(model(x), expected)


def test_in_the_graph_and_autocast() -> None:
    torch.manual_seed(0)
    model, x = Fused(), torch.randn(2, 5, WIDTH)
    with capture(model, kinds="attention", detach=False) as maps:
        model(x)
        loss = maps["", "attention"].tensor[:, :, 0].square().sum()
        loss.backward()
        got = model.q.weight.grad.clone()
    model.zero_grad()
    model.truth(x)[:, :, 0].square().sum().backward()
    assert torch.allclose(got, model.q.weight.grad, atol=1e-6)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        capture(model, kinds="attention") as maps,
    ):
        bare = model(x)
        assert maps["", "attention"].dtype is torch.bfloat16
        assert torch.equal(model(x), bare)


def test_gradients_of_eager_and_of_fused_probabilities() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, WIDTH)
    eager = Attention("matmul")
    with capture(eager, kinds="attention", gradients=True) as maps:
        eager(x).square().sum().backward()
        got = maps["", "attention"].grad
    q, k, v = eager.qkv(x).view(2, 5, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    p = (q @ k.mT * 0.5).softmax(-1).detach().requires_grad_()
    eager.proj((p @ v).transpose(1, 2).reshape(2, 5, -1)).square().sum().backward()
    assert torch.allclose(got, p.grad, atol=1e-6)
    fused, text = Fused(), "computed beside the fused kernel"
    with (
        pytest.warns(CaptureWarning, match=text),
        capture(fused, kinds="attention", gradients=True) as maps,
    ):
        fused(x).square().sum().backward()
    assert maps["", "attention"].grad is None


def test_nobody_counts_the_second_computation() -> None:
    model, x = Fused().eval(), torch.randn(2, 5, WIDTH)
    with FlopCounterMode(display=False) as bare:
        model(x)
    with capture(model, kinds="attention") as maps, FlopCounterMode(display=False) as counted:
        for _ in range(2):
            model(x)
    assert len(maps) == 1
    assert counted.get_total_flops() == 2 * bare.get_total_flops()


# -- torch's own modules ----------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")
def test_multihead_attention(batch_first: bool, need_weights: bool, train: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).train(train)
    model = nn.ModuleDict({"attn": layer})

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = model["attn"]

        def forward(self, q: Tensor, kv: Tensor) -> Tensor:
            return self.attn(q, kv, kv, need_weights=need_weights)[0]

    around = Around().train(train)
    q, kv = torch.randn(2, 4, WIDTH), torch.randn(2, 6, WIDTH)
    if not batch_first:
        q, kv = q.transpose(0, 1), kv.transpose(0, 1)
    _, expected = layer(q, kv, kv, average_attn_weights=False)
    with torch.no_grad():
        bare = around(q, kv)
        with capture(around, kinds="attention") as maps:
            for _ in range(2):
                assert torch.equal(around(q, kv), bare)
                fm = maps["attn", "attention"]
                assert fm.shape == (2, HEADS, 4, 6)
                assert (fm.filter_dim, fm.filters) == (1, range(HEADS))
                assert torch.allclose(fm.tensor, expected, atol=1e-6)


# -- what was asked for -----------------------------------------------------------------------


def test_what_is_no_attention() -> None:
    class Router(nn.Module):
        """Softmaxes that weigh nothing, or weights of the model."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.table = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            p = self.gate(x).softmax(-1)
            return (p @ self.table).softmax(-1) + p.sum(-1, keepdim=True) * (x.mT @ p).mean()

    text = (
        "kinds='attention' was asked for, and no attention was seen in this pass: no softmax that "
        "weighs other data, and no scaled_dot_product_attention"
    )
    router, x = Router(), torch.randn(2, 4)
    with pytest.warns(CaptureWarning, match=text), capture(router, kinds="attention") as maps:
        router(x)
    assert len(maps) == 0
    assert [(m.layer, m.reason) for m in maps.missed] == [("", text)]


@pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")
def test_selection_and_filters() -> None:
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = Fused(), Attention("matmul"), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(self.a(x)).relu())

    model, x = Two(), torch.randn(2, 5, WIDTH)
    with capture(model, ["a", "fc"], kinds="attention") as maps:
        model(x)
    assert [(fm.layer, fm.kind) for fm in maps] == [("a", "attention")]
    assert [m.layer for m in maps.missed] == ["fc"]
    with capture(model, ["a", "b"], kinds=("attention", "output"), filters=[0, 2]) as maps:
        for _ in range(2):
            model(x)
    found = [(fm.layer, fm.kind, fm.filters) for fm in maps if fm.kind == "attention"]
    assert found == [("a", "attention", (0, 2)), ("b", "attention", (0, 2))]
    whole = model.b.seen[-1]
    assert torch.equal(maps["b", "attention"].tensor, whole[:, [0, 2]])
    with capture(model, kinds=("activation", "attention")) as maps:
        model(x)
    assert [(fm.layer, fm.kind) for fm in maps] == [
        ("a", "attention"),
        ("b", "attention"),
        ("b.proj", "activation"),
    ]


def test_a_fused_call_that_nobody_can_look_into_is_named() -> None:
    class Kernel(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
            return out[0]

    model = nn.Sequential(Kernel())
    with (
        pytest.warns(CaptureWarning, match="inside one fused call, whose probabilities nobody"),
        capture(model, "0", kinds="attention") as maps,
        torch.no_grad(),
    ):
        model(torch.randn(1, 2, 4, 8))
    assert [m.layer for m in maps.missed] == ["0"]


def test_a_compiled_model_is_refused() -> None:
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    text = "kinds='attention' needs a model that runs eagerly, and 'Sequential' is compiled"
    with pytest.raises(ArgumentError, match=f"^{re.escape(text)}$"):
        capture(compiled, kinds="attention")
