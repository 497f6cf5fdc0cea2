"""`patch`: each patched run compared with the same one done by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import ArgumentError, EditError, UnknownLayerError, edits, patch
from fmapkit.edits import Where
from tests import truth

WIDTH, HEADS = 8, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).reshape(n, t, -1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.h:
            x = block(x)
        return self.head(x)


def tokens() -> tuple[Tokens, Tensor, Tensor]:
    torch.manual_seed(0)
    clean = torch.randint(0, 11, (2, 5))
    corrupted = clean.clone()
    corrupted[:, 1] = (clean[:, 1] + 1) % 11
    return Tokens().eval(), clean, corrupted


def difference(logits: Tensor) -> Tensor:
    """How much more one answer is expected than another, for each sample."""
    return logits[:, -1, 3] - logits[:, -1, 5]


@torch.no_grad()
def by_hand(
    model: nn.Module,
    source: Any,
    target: Any,
    metric: Callable[[Any], Any],
    module: nn.Module,
    change: Callable[[Tensor, Tensor], None],
    pre: bool = False,
) -> Any:
    """One patched run: what a hook writes into a clone of what a module returns, or is given."""
    taken: dict[str, Tensor] = {}

    def take(m: nn.Module, args: Any, out: Any = None) -> None:
        taken["x"] = (args[0] if pre else out).clone()

    def put(m: nn.Module, args: Any, out: Any = None) -> Any:
        x = (args[0] if pre else out).clone()
        change(x, taken["x"])
        return (x, *args[1:]) if pre else x

    set_hook = module.register_forward_pre_hook if pre else module.register_forward_hook
    for hook, x in ((take, source), (put, target)):
        handle = set_hook(hook)
        out = model(x)
        handle.remove()
    return metric(out)


def at(p: int) -> Callable[[Tensor, Tensor], None]:
    def change(x: Tensor, other: Tensor) -> None:
        x[:, p] = other[:, p]

    return change


@pytest.mark.parametrize("into", ["corrupted", "clean"])
def test_layer_by_position(into: Any) -> None:
    model, clean, corrupted = tokens()
    before = truth.fingerprint(model)
    found = patch(
        model,
        clean,
        corrupted,
        difference,
        layers="h.?",
        positions="each",
        filter_axis=-1,
        into=into,
    )
    truth.assert_nothing_left(before, model)
    assert found.layers == ("h.0", "h.1", "h.2")
    assert found.positions == (0, 1, 2, 3, 4)
    assert found.effect.shape == (3, 5, 2)
    source, target = (clean, corrupted) if into == "corrupted" else (corrupted, clean)
    for n in range(3):
        for p in range(5):
            expected = by_hand(model, source, target, difference, model.h[n], at(p))
            assert torch.equal(found.effect[n, p], expected), (n, p)
    with torch.no_grad():
        assert torch.equal(found.clean, difference(model(clean)))
        assert torch.equal(found.corrupted, difference(model(corrupted)))
    # The last block at the last position is all that the metric depends on.
    assert torch.equal(found.effect[2, 4], found.clean if into == "corrupted" else found.corrupted)
    there = 1.0 if into == "corrupted" else 0.0
    assert torch.allclose(found.normalized[2, 4], torch.full((2,), there))
    assert torch.allclose(found.normalized[0, 0], torch.full((2,), 1 - there))


def test_heads_are_slices_of_what_the_projection_gets() -> None:
    model, clean, corrupted = tokens()
    heads = [range(4), range(4, 8)]
    found = patch(
        model,
        clean,
        corrupted,
        lambda out: difference(out).mean(),
        layers="h.*.attn.proj",
        kind="input",
        positions=[1, -1],
        filters=heads,
        progress=False,
    )
    assert found.effect.shape == (3, 2, 2)
    for n in range(3):
        for i, p in enumerate((1, -1)):
            for j, head in enumerate(heads):

                def change(x: Tensor, other: Tensor, p: int = p, head: range = head) -> None:
                    x[:, p, list(head)] = other[:, p, list(head)]

                expected = by_hand(
                    model,
                    clean,
                    corrupted,
                    lambda out: difference(out).mean(),
                    model.h[n].attn.proj,
                    change,
                    pre=True,
                )
                assert torch.equal(found.effect[n, i, j], expected)


@pytest.mark.parametrize("kind", ["response", "preactivation", "activation"])
def test_maps_of_layers(kind: str) -> None:
    """Of a layer before a GELU: by the module that returns the map, or gets it."""
    model, clean, corrupted = tokens()
    found = patch(
        model, clean, corrupted, difference, layers="h.*.mlp.0", kind=kind, filters=[3, (1, 2)]
    )
    for n in range(3):
        module = model.h[n].mlp[1] if kind == "activation" else model.h[n].mlp[0]
        for i, group in enumerate(([3], [1, 2])):

            def change(x: Tensor, other: Tensor, group: list[int] = group) -> None:
                x[..., group] = other[..., group]

            expected = by_hand(model, clean, corrupted, difference, module, change)
            assert torch.equal(found.effect[n, i], expected)


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_several_patches_in_one_forward(batch_size: int) -> None:
    model, clean, corrupted = tokens()
    asked: Any = {"layers": "h.?", "positions": "each", "filter_axis": -1}
    alone = patch(model, clean, corrupted, difference, **asked)
    calls = []
    handle = model.head.register_forward_hook(lambda m, a, out: calls.append(len(out)))
    together = patch(model, clean, corrupted, difference, **asked, batch_size=batch_size)
    handle.remove()
    assert torch.allclose(together.effect, alone.effect, atol=1e-5)
    full, rest = divmod(15, batch_size)
    # Clean, corrupted, that without patches in a batch, and the patches; of 2 samples each.
    expected = [2, 2, 2 * batch_size, *[2 * batch_size] * full, *[2 * rest] * bool(rest)]
    assert calls == expected


def test_pixels_and_a_nested_output() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True))
            self.tail = Pair()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.tail(self.body(x))
            return (a * b["w"]).sum((1, 2, 3))

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Any:
            return self.conv(x), {"w": x.sigmoid()}

    torch.manual_seed(0)
    model = Images().eval()
    clean, corrupted = torch.randn(2, 1, 3, 4, 5)
    places = [(0, 0), (3, 4), (slice(1, 3), slice(None))]
    metric: Callable[[Tensor], Tensor] = lambda out: out  # noqa: E731
    found = patch(model, (clean,), (corrupted,), metric, layers="body", positions=places)
    for i, (y, x) in enumerate(places):

        def change(t: Tensor, other: Tensor, y: Any = y, x: Any = x) -> None:
            t[:, :, y, x] = other[:, :, y, x]

        expected = by_hand(model, clean, corrupted, metric, model.body, change)
        assert torch.equal(found.effect[0, i], expected)
    nested = patch(model, {"x": clean}, {"x": corrupted}, metric, layers="tail", path="[1]['w']")
    assert nested.layers == ("tail[1]['w']",)
    with torch.no_grad():
        a = model.tail.conv(model.body(corrupted))
        expected = (a * model.body(clean).sigmoid()).sum((1, 2, 3))
    assert torch.equal(nested.effect[0], expected)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_noise_that_corrupts_and_the_same_in_each_run(batch_size: int) -> None:
    model, clean, _ = tokens()
    subject = Where("embed", "output", at=slice(1, 3), filter_axis=-1)
    found = patch(
        model,
        clean,
        clean,
        difference,
        layers="h.?",
        positions="each",
        filter_axis=-1,
        edit={subject: edits.noise(2.0, seed=4)},
        batch_size=batch_size,
    )

    def corrupt(m: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        drawn = torch.randn(2, 2, WIDTH, generator=torch.Generator().manual_seed(4))
        out[:, 1:3] = out[:, 1:3] + 2.0 * drawn
        return out

    acts: dict[int, Tensor] = {}
    handles = [
        block.register_forward_hook(lambda m, a, out, n=n: acts.update({n: out.clone()}))
        for n, block in enumerate(model.h)
    ]
    with torch.no_grad():
        model(clean)
        [handle.remove() for handle in handles]
        handle = model.embed.register_forward_hook(corrupt)
        assert torch.equal(found.corrupted, difference(model(clean)))
        for n in range(3):
            for p in range(5):

                def put(m: nn.Module, args: Any, out: Tensor, n: int = n, p: int = p) -> Tensor:
                    out = out.clone()
                    out[:, p] = acts[n][:, p]
                    return out

                patching = model.h[n].register_forward_hook(put)
                expected = difference(model(clean))
                patching.remove()
                assert torch.allclose(found.effect[n, p], expected, atol=1e-5)
        handle.remove()


@pytest.mark.parametrize("step", [0, range(2), lambda n: n < 3])
def test_an_edit_of_step_0_is_in_every_run(step: Any) -> None:
    model, clean, _ = tokens()
    asked: dict[str, Any] = {"layers": "h.?", "positions": "each", "filter_axis": -1}
    corrupt = {Where("embed", "output", at=1, filter_axis=-1): edits.noise(2.0, seed=4)}
    at_step = {Where("embed", "output", at=1, filter_axis=-1, step=step): edits.noise(2.0, seed=4)}
    plain = patch(model, clean, clean, difference, edit=corrupt, **asked)
    found = patch(model, clean, clean, difference, edit=at_step, **asked)
    assert torch.equal(found.effect, plain.effect)
    assert not torch.equal(found.effect[0], found.clean.expand_as(found.effect[0]))
    later = {Where("embed", "output", step=1): edits.zero()}
    with pytest.raises(ArgumentError, match="each run of patching is one pass, step 0"):
        patch(model, clean, clean, difference, edit=later, **asked)


def test_a_metric_of_a_layer_ends_each_pass_there() -> None:
    model, clean, corrupted = tokens()
    ran: list[int] = []
    handle = model.h[2].register_forward_hook(lambda *a: ran.append(1))
    metric: Callable[[Tensor], Tensor] = lambda x: x[:, -1].sum(-1)  # noqa: E731
    asked: Any = {"layers": "h.0", "positions": "each", "filter_axis": -1}
    found = patch(model, clean, corrupted, metric, **asked, of="h.1")
    handle.remove()
    assert len(ran) == 2  # the runs that are compared with; of the five patched ones, none
    for p in range(5):

        def first(ids: Tensor) -> Tensor:
            return model.h[1](model.h[0](model.embed(ids)))

        body: Any = first
        expected = by_hand(body, clean, corrupted, metric, model.h[0], at(p))
        assert torch.equal(found.effect[0, p], expected)
    of_a = patch(model, clean, corrupted, metric, **asked, of=("h.2.mlp.0", "activation"))
    assert of_a.effect.shape == (1, 5, 2)
    text = "'h.2' has no output in the run that is patched, or it runs after 'h.1', which the"
    asked["layers"] = ["h.0", "h.2"]
    with pytest.raises(ArgumentError, match=re.escape(text)):
        patch(model, clean, corrupted, metric, **asked, of="h.1")


def test_a_layer_that_runs_twice_is_two_rows() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x).tanh())

    model = Twice().eval()
    clean, corrupted = torch.randn(2, 4, 3)
    found = patch(model, clean, corrupted, lambda out: out.sum(), layers="fc")
    assert found.layers == ("fc (call 0)", "fc (call 1)")
    assert torch.equal(found.effect[0], found.clean)
    assert torch.equal(found.effect[1], found.clean)
    assert repr(found).startswith("Patching(2 layers, output, clean into corrupted; metric: clean")


def test_bad_arguments() -> None:
    model, clean, corrupted = tokens()
    longer = torch.randint(0, 11, (2, 6))
    asked: Any = {"layers": "h.?"}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"into": "both"}, ArgumentError, "into must be 'corrupted' or 'clean', not 'both'"),
        ({"metric": 3}, ArgumentError, "metric must be a function of what the model returns"),
        ({"batch_size": 0}, ArgumentError, "batch_size must be a positive int, not 0"),
        ({"clean": 3}, ArgumentError, "clean must be a tensor, a tuple of arguments or a dict"),
        ({"layers": "g.?"}, UnknownLayerError, "matches no module of Tokens"),
        ({"kind": "outputs"}, ArgumentError, "did you mean 'output'"),
        ({"kind": "activation"}, ArgumentError, "none of these has an activation in this run"),
        ({"positions": 3}, ArgumentError, "positions must be 'each', several of these in a list"),
        ({"positions": []}, ArgumentError, "positions=[] leaves nothing to patch"),
        ({"filters": 3}, ArgumentError, "filters must be several of these in a list, or None"),
        ({"positions": "each"}, ArgumentError, "is not told by the data: say it with filter_axis"),
        ({"positions": [9], "filter_axis": -1}, EditError, "at=9 is outside of"),
        ({"clean": longer}, ArgumentError, "has shape (2, 6, 8) in one run and (2, 5, 8) in the"),
        ({"metric": lambda out: out}, ArgumentError, "metric must give a number, or one for each"),
        ({"batch_size": 2, "corrupted": (clean, clean[0])}, ArgumentError, "have shapes [(2, 5)"),
    ]
    for given, error, text in cases:
        call = {"clean": clean, "corrupted": corrupted, "metric": difference, **asked, **given}
        with pytest.raises(error, match=re.escape(text)):
            patch(model, **call)
    with pytest.raises(ArgumentError, match=re.escape("is in training mode, in which two runs")):
        patch(model.train(), clean, corrupted, difference, **asked)


def test_models_that_mix_samples_are_refused_in_a_batch() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.fc(x)
            return y - y.cumsum(0)  # each sample sees those before it

    model = Mixing().eval()
    clean, corrupted = torch.randn(2, 4, 3)
    patch(model, clean, corrupted, lambda out: out.sum(), layers="fc")
    with pytest.raises(ArgumentError, match="the model or the metric mixes samples of a batch"):
        patch(model, clean, corrupted, lambda out: out.sum(), layers="fc", batch_size=2)

    class Summed(Mixing):
        def forward(self, x: Tensor) -> Any:
            return {"y": self.fc(x), "loss": self.fc(x).sum()}

    text = "which has no row for each: make it return tensors of the batch alone"
    with pytest.raises(ArgumentError, match=re.escape(text)):
        patch(Summed().eval(), clean, corrupted, lambda o: o["y"].sum(), layers="fc", batch_size=2)


def test_the_picture() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    model, clean, corrupted = tokens()
    asked: Any = {"layers": "h.?", "filter_axis": -1}
    found = patch(model, clean, corrupted, difference, positions="each", **asked)
    figure = found.plot(positions=list("abcde"), title="where the fact is")
    [axes, _] = figure.axes
    drawn = axes.images[0].get_array()
    assert torch.allclose(torch.from_numpy(drawn.data.copy()), found.normalized.mean(-1))
    assert [t.get_text() for t in axes.get_yticklabels()] == ["h.0", "h.1", "h.2"]
    assert [t.get_text() for t in axes.get_xticklabels()] == list("abcde")
    assert axes.get_title() == "clean output into the corrupted run"
    patch(model, clean, corrupted, difference, **asked).plot(normalized=False)
    heads = [range(4), range(4, 8)]
    figure = patch(model, clean, corrupted, difference, filters=heads, **asked).plot()
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0…3", "4…7"]
    both = patch(model, clean, corrupted, difference, filters=heads, positions=[0], **asked)
    with pytest.raises(ArgumentError, match="a picture has two axes"):
        both.plot()
    with pytest.raises(ArgumentError, match="positions has 2 labels, and 5 positions were"):
        found.plot(positions=["a", "b"])
    pyplot.close("all")
