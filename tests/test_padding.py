"""`maps.batch(mask=…)`: analyses are shown sequences without their padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import ArgumentError, FeatureMap, capture
from fmapkit.analysis import DeadFilters, Similarity, Statistics, TopInputs
from fmapkit.missed import Reason


class Reader(nn.Module):
    """Tokens through an embedding, a convolution along them, and a head over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(20, 6), nn.Linear(6, 5)
        self.along, self.head = nn.Conv1d(6, 4, 3, padding=1), nn.Linear(9, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        a, b = F.gelu(self.up(x)), self.along(x.transpose(1, 2)).relu()
        return self.head(torch.cat([a.mean(1), b.mean(2)], 1)).tanh()


LENGTHS = torch.tensor([[7], [2], [5], [1]])
IDS = torch.arange(28).reshape(4, 7) % 20
MASK = torch.arange(7) < LENGTHS


class Seen:
    """An analysis that keeps what it is shown."""

    def __init__(self) -> None:
        self.maps: list[tuple[FeatureMap, Tensor]] = []

    def update(self, fm: FeatureMap) -> None:
        self.maps.append((fm, fm.tensor.clone()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_what_is_shown_is_what_the_mask_keeps(dtype: torch.dtype) -> None:
    """In the first pass, and in those that are replayed; the convolution's axes are turned."""
    model, seen = Reader().eval(), Seen()
    with capture(model, analyses=seen) as maps:
        for _ in range(4):
            seen.maps.clear()
            maps.batch([10, 11, 12, 13], mask=MASK.to(dtype))
            model(IDS)
            of_sample = torch.tensor([10, 11, 12, 13]).repeat_interleave(LENGTHS[:, 0])
            assert len(seen.maps) == len(maps)
            for (fm, shown), held in zip(seen.maps, maps, strict=True):
                whole = held.tensor
                if fm.layer == "head":
                    assert torch.equal(shown, whole)
                    assert fm.ids is not None
                    assert fm.ids.tolist() == [10, 11, 12, 13]
                    continue
                turned = whole.transpose(1, 2) if fm.layer == "along" else whole
                assert torch.equal(shown, turned[MASK])
                assert fm.filter_dim == 1
                assert fm.ids is not None
                assert torch.equal(fm.ids, of_sample)
            assert maps["up"].shape == (4, 7, 5)
    assert not maps.missed


@torch.no_grad()
def test_statistics_are_those_of_the_texts_one_by_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 5), nn.ReLU()).eval()
    padded, alone = Statistics(), Statistics()
    dead, dead_alone = DeadFilters(after=3), DeadFilters(after=3)
    with capture(model, analyses=[padded, dead]) as maps:
        for _ in range(3):
            maps.batch(mask=MASK)
            model(IDS)
    with capture(model, analyses=[alone, dead_alone]):
        for _ in range(3):
            for ids, length in zip(IDS, LENGTHS[:, 0].tolist(), strict=True):
                model(ids[None, :length].reshape(length, 1))
    for key in ("1", ("1", "preactivation")):
        one, other = padded[key], alone[key]
        assert torch.equal(one.count, other.count)
        torch.testing.assert_close(one.mean, other.mean)
        torch.testing.assert_close(one.std, other.std)
        assert torch.equal(one.maximum, other.maximum)
        assert torch.equal(one.zero_fraction, other.zero_fraction)
    assert torch.equal(dead["1"].inputs, dead_alone["1"].inputs)


@torch.no_grad()
def test_the_strongest_input_is_no_padding() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU()).eval()
    model[0].weight.fill_(1.0)
    model[0].bias.zero_()
    x = torch.tensor([[[1.0], [9.0]], [[2.0], [3.0]]])
    top, whole = TopInputs(k=1), TopInputs(k=1)
    for analysis, mask in (top, torch.tensor([[1, 0], [1, 1]])), (whole, None):
        with capture(model, analyses=analysis) as maps:
            maps.batch([40, 41], mask=mask)
            model(x)
    assert top["0"].inputs.tolist() == [[41]]
    assert whole["0"].inputs.tolist() == [[40]]


class Heads(Reader):
    """The same, and a layer of each third of a token: (samples, positions, 2, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(3, 5)

    def forward(self, ids: Tensor) -> Tensor:
        self.heads(self.embed(ids).unflatten(2, (2, 3))).relu()
        return super().forward(ids)


def spread(values: Tensor) -> Tensor:
    return values.reshape(*values.shape[:2], -1).std(2, correction=0)


@torch.no_grad()
@pytest.mark.parametrize("numbers", [None, [10, 11, 12, 13, 14]])
@pytest.mark.parametrize("by", ["max", "mean", spread])
@pytest.mark.parametrize("layer", ["up", "along", "heads", "head"])
def test_the_strongest_inputs_are_those_of_texts_without_their_padding(
    layer: str, by: Any, numbers: list[int] | None
) -> None:
    """Texts, not tokens, have numbers, and a place in them is one of the padded map."""
    torch.manual_seed(0)
    model, top = Heads().eval(), TopInputs(k=3, by=by)
    mask = torch.cat([MASK, torch.zeros(1, 7, dtype=torch.bool)])  # nothing is left of the last
    texts, known = torch.randint(0, 20, (10, 7)), numbers or list(range(10))
    with capture(model, analyses=top, keep="all") as maps:
        for part in texts.split(5):
            maps.batch(numbers, mask=mask)
            model(part)
        held = torch.cat([fm.tensor for fm in maps.select(layers=layer, kind="activation")])
    whole = held if layer == "along" else held.movedim(-1, 1)
    lengths = [*LENGTHS[:, 0].tolist(), 0] * 2
    for f in range(whole.shape[1]):
        hits: dict[int, tuple[float, tuple[int, ...]]] = {}
        for n, length in enumerate(lengths):
            text = whole[n, f] if layer == "head" else whole[n, f, :length]
            if text.numel():
                its = text.double()
                score = {"max": its.max(), "mean": its.mean()}.get(by)
                score = float(its.std(correction=0) if score is None else score)
                place = torch.unravel_index(text.argmax(), text.shape) if text.dim() else ()
                hit = score, tuple(map(int, place))
                number = known[n % len(known)]
                hits[number] = max(hits.get(number, hit), hit, key=lambda h: h[0])
        order = sorted(hits, key=lambda number: (-hits[number][0], number))[:3]
        assert [h.input for h in top[layer][f]] == order
        assert [h.at for h in top[layer][f]] == [hits[n][1] for n in order]
        assert [h.score for h in top[layer][f]] == pytest.approx([hits[n][0] for n in order])
    if layer == "up" and numbers is None:
        for contexts in top[layer].contexts(texts, before=0, after=0).values():
            for c in contexts:
                assert c.tokens == (int(texts[c.hit.input, c.hit.at[0]]),)


@torch.no_grad()
def test_two_models_are_compared_on_texts_alone() -> None:
    torch.manual_seed(0)
    one, other = (nn.Sequential(nn.Linear(6, 5), nn.ReLU()).eval() for _ in range(2))
    x = torch.randn(4, 7, 6)
    noisy = torch.where(MASK[..., None], x, 100.0)
    found = []
    for given in x, noisy:
        alike = Similarity()
        with (
            capture(one, "0", analyses=alike.first) as a,
            capture(other, "0", analyses=alike.second) as b,
        ):
            a.batch(mask=MASK)
            b.batch(mask=MASK)
            one(given)
            other(given)
        found.append(alike)
    assert str(found[0]) == str(found[1])


@torch.no_grad()
def test_a_mask_goes_with_one_pass() -> None:
    model, seen = Reader().eval(), Seen()
    with capture(model, "up", analyses=seen) as maps:
        maps.batch(mask=MASK)
        model(IDS)
        model(IDS)
        maps.batch(mask=MASK[:3])
        model(IDS)
    assert [tuple(t.shape) for _, t in seen.maps] == [(15, 5)] * 2 + [(4, 7, 5)] * 4
    assert [(m.layer, m.why) for m in maps.missed] == [("", Reason.MASK_OF_OTHERS)]
    text = (
        "batch() gave a mask of 3 samples, and no input of the pass that followed has an axis of "
    )
    assert maps.missed[0].reason == f"{text}so many entries: analyses were shown its padding, too"


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(3, 2), r"\(3, 2\)"),
        (torch.ones(3, dtype=torch.bool), r"\(3,\)"),
        ([[1, 0]], "list"),
    ],
)
def test_what_is_no_mask_is_refused(mask: Any, said: str) -> None:
    refused = pytest.raises(ArgumentError, match=rf"a mask \(samples, positions\) .* not {said}")
    with capture(Reader()) as maps, refused:
        maps.batch(mask=mask)
