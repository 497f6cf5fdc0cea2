"""`TopInputs` against sorting all scores, with every input kept."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fmapkit import ArgumentError, CaptureWarning, FeatureMap, FilterRangeError, capture
from fmapkit.analysis import Analysis, Context, LayerTops, TopInputs
from fmapkit.explain import receptive_field
from fmapkit.reasons import Reason
from tests.test_statistics import fmap, through_file


def expected(
    values: Tensor, ids: list[int], k: int, by: str
) -> list[list[tuple[int, float, tuple[int, ...]]]]:
    """By sorting: for each filter the k strongest inputs, each once, of equals the lower number."""
    found = []
    for f in range(values.shape[1]):
        best: dict[int, tuple[float, tuple[int, ...]]] = {}
        for n, number in enumerate(ids):
            one = values[n, f]
            flat = one.flatten().tolist()
            score = max(flat) if by == "max" else one.double().mean().item()
            place = flat.index(max(flat))
            at = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), one.shape))
            if number not in best or score > best[number][0]:
                best[number] = (score, at if one.dim() else ())
        order = sorted(best.items(), key=lambda item: (-item[1][0], item[0]))[:k]
        found.append([(number, score, at) for number, (score, at) in order])
    return found


@given(
    st.integers(0, 2**16),
    st.integers(1, 5),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.sampled_from([(), (3,), (2, 4), (2, 1, 3)]),
    st.sampled_from(["max", "mean"]),
    st.booleans(),
    st.booleans(),
)
def test_the_strongest_of_all(
    seed: int,
    k: int,
    sizes: list[int],
    locations: tuple[int, ...],
    by: Any,
    numbered: bool,
    coarse: bool,
) -> None:
    """In any batches, with equals, with numbers that come again."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(sizes), 3, *locations, generator=generator)
    if coarse:  # many are equal
        values = values.round()
    ids = torch.randint(0, 5, (len(values),), generator=generator) if numbered else None
    top = TopInputs(k, by=by)
    given_ids = ids.split(sizes) if ids is not None else [None] * len(sizes)
    for step, (part, its) in enumerate(zip(values.split(sizes), given_ids, strict=True)):
        top.update(fmap(part, step=step, ids=its))
    known = ids.tolist() if ids is not None else list(range(len(values)))
    right = expected(values, known, k, by)
    for filter in range(3):
        for hit, (number, score, at) in zip(top["conv"][filter], right[filter], strict=True):
            assert hit.input == number
            assert hit.at == at
            assert hit.score == pytest.approx(score, rel=1e-6, abs=1e-6)


@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 6))
def test_merged_is_what_one_would_have_seen(seed: int, k: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(7, 2, 3, generator=generator).round()
    ids = torch.randint(0, 6, (7,), generator=generator)
    one, first, second = TopInputs(k), TopInputs(k), TopInputs(k)
    one.update(fmap(values, ids=ids))
    first.update(fmap(values[:cut], ids=ids[:cut]))
    second.update(fmap(values[cut:], ids=ids[cut:]))
    first.merge(second)
    assert torch.equal(first["conv"].scores, one["conv"].scores)
    assert torch.equal(first["conv"].inputs, one["conv"].inputs)


def test_layouts_and_types() -> None:
    """Channels last, tokens with the filters at the end, one sample, half precision, integers."""
    x = torch.randn(4, 3, 5, 6)
    right = expected(x, [0, 1, 2, 3], 2, "max")
    forms = {
        "last": fmap(x.contiguous(memory_format=torch.channels_last)),
        "end": fmap(x.permute(0, 2, 3, 1), 3),
        "half": fmap(x.half().float().half()),
    }
    for name, fm in forms.items():
        top = TopInputs(2)
        top.update(fm)
        for f in range(3):
            for hit, (number, score, at) in zip(top["conv"][f], right[f], strict=True):
                assert hit.score == pytest.approx(score, rel=1e-3), name
                assert (hit.input, hit.at) == (number, at) or name == "half"
    top = TopInputs(2)
    for step in range(3):
        top.update(fmap(x[step], 0, step=step))
    assert [len(top["conv"][f]) for f in range(3)] == [2, 2, 2]
    top = TopInputs(3)
    top.update(fmap(torch.tensor([[float("nan"), -float("inf"), 1.0]])))
    assert [top["conv"][f] for f in range(2)] == [[], []]
    assert top["conv"][2] == [(0, 1.0, ())]
    assert [line.split() for line in repr(top["conv"]).splitlines()[2:]] == [
        *(["0", "–", "–", "–"], ["1", "–", "–", "–"], ["2", "1", "0"]),
        ["LayerTops:", "'conv',", "activation,", "1", "inputs"],
    ]


def test_a_function_of_the_values() -> None:
    x = torch.randn(5, 3, 4)
    top = TopInputs(5, by=lambda values: (values > 0).float().sum(2))
    top.update(fmap(x))
    counts = (x > 0).sum(2)
    for f in range(3):
        assert [h.score for h in top["conv"][f]] == sorted(counts[:, f].tolist(), reverse=True)
        for hit in top["conv"][f]:
            assert hit.at == (int(x[hit.input, f].argmax()),)
    wrong = TopInputs(by=lambda values: values.mean())
    with pytest.raises(
        ArgumentError, match=r"scores \(samples, filters\) = \(5, 3\); it gave \(\)"
    ):
        wrong.update(fmap(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.conv1(x))
        x = F.relu(self.conv2(x))
        return self.head(x.amax((2, 3))).sigmoid()


IMAGES = torch.randn(23, 1, 9, 9, generator=torch.Generator().manual_seed(0))


def seen(model: nn.Module, numbered: bool = False, **options: Any) -> TopInputs:
    top = TopInputs(4, **options)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1)) if numbered else None
    with capture(model, analyses=top, keep=0) as maps, torch.no_grad():
        for chosen in (torch.arange(23) if order is None else order).split(5):
            if numbered:
                maps.batch(chosen)
            model(IMAGES[chosen])
    return top


@pytest.mark.parametrize("numbered", [False, True])
def test_in_a_capture(numbered: bool) -> None:
    """While passes are traced and tapped; inputs counted, or with numbers of the user's."""
    model = Net()
    top = seen(model, numbered)
    assert isinstance(top, Analysis)
    with capture(model, kinds="activation") as maps, torch.no_grad():
        model(IMAGES)
    assert top.layers == ["conv1", "conv2", "head"]
    for fm in maps:
        values = fm.tensor
        right = expected(values, list(range(23)), 4, "max")
        found = top[fm.layer]
        assert isinstance(found, LayerTops)
        for f in range(len(found)):
            for hit, (number, score, at) in zip(found[f], right[f], strict=True):
                assert (hit.input, hit.at) == (number, at)
                assert hit.score == pytest.approx(score, rel=1e-5)
    assert str(top).splitlines()[-1] == "TopInputs: 4 inputs of each filter, by max"


def test_numbers_are_for_one_pass() -> None:
    model = Net()
    with capture(model) as maps, torch.no_grad():
        maps.batch([3, 1])
        model(IMAGES[:2])
        assert maps["conv1"].ids.tolist() == [3, 1]  # type: ignore[union-attr]
        model(IMAGES[:2])
        assert maps["conv1"].ids is None
        for wrong in ([1.5], "ab", torch.zeros(2, 2, dtype=torch.int64), 3, torch.ones(2)):
            with pytest.raises(ArgumentError, match="batch takes a whole number for each input"):
                maps.batch(wrong)  # type: ignore[arg-type]


def test_inputs_that_nobody_counted_are_warned_of() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(12, 3)

    def run(top: TopInputs, numbered: bool = False, **options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as given, torch.no_grad():
            warnings.simplefilter("always")
            with capture(model, analyses=top, keep=0, **options) as maps:
                for ids in torch.arange(12).split(2):
                    if numbered:
                        maps.batch(ids)
                    model(x[ids])
                    if ids[0] == 4:
                        top.reset()
        return [str(w.message) for w in given]

    assert run(TopInputs(k=2)) == []  # reset in the middle of a block: it begins anew there
    assert run(TopInputs(k=2), numbered=True, every=3) == []
    top = TopInputs(k=2)
    assert run(top, every=2) == [
        "TopInputs has seen no map of step 1, so the numbers of inputs from step 2 on are not "
        "their places in a data set: every= leaves passes out, a layer may not run in each, or "
        "maps.missed says why; number inputs with maps.batch(ids)"
    ]


@pytest.mark.parametrize("apart", [False, True])
def test_inputs_are_counted_over_blocks_whichever_layers_ran(apart: bool) -> None:
    """Each block of one pass; layers take turns, so that each block begins with another one."""
    torch.manual_seed(0)
    layers, x = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)]), torch.randn(12, 3)
    top, chosen = TopInputs(k=1), 0

    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layers[chosen](x))

    model = Turns()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for n, batch in enumerate(x.split(2)):
            chosen = n % 2
            with capture(model, analyses=top, keep=0):
                model(batch)
            if apart and n == 2:  # gone on from, in another process perhaps
                top = pickle.loads(pickle.dumps(top))
    with torch.no_grad():
        for n, layer in enumerate(layers):
            its = torch.arange(12) // 2 % 2 == n
            right = layer(x).relu().masked_fill(~its[:, None], -1).argmax(0)
            assert top[f"layers.{n}"].inputs.flatten().tolist() == right.tolist()


def test_a_block_whose_first_pass_had_no_such_map_is_warned_of() -> None:
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor, seen: bool) -> Tensor:
            return self.layer(x).relu() if seen else x

    model, top, x = Some(), TopInputs(k=1), torch.randn(2, 3)
    with capture(model, analyses=top, keep=0), torch.no_grad():
        model(x, True)
    with capture(model, analyses=top, keep=0), torch.no_grad():
        model(x, False)
        with pytest.warns(CaptureWarning, match="TopInputs has seen no map of step 0, so the"):
            model(x, True)


def test_blocks_that_are_open_at_once_have_the_same_inputs() -> None:
    model, top = (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU()),
        TopInputs(k=1),
    )
    x = torch.randn(12, 3)
    with capture(model, "0", analyses=top), capture(model, "2", analyses=top), torch.no_grad():
        for batch in x.split(3):
            model(batch)
    with torch.no_grad():
        right = model[:2](x), model(x)
    for name, values in zip(("0", "2"), right, strict=True):
        assert top[name].inputs.flatten().tolist() == values.argmax(0).tolist()


def test_as_many_numbers_as_inputs() -> None:
    model = Net()
    with capture(model) as maps, torch.no_grad():
        for count in (97, 2, 97):
            maps.batch(range(count))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CaptureWarning)
                model(IMAGES[:2])
            ids = maps["conv1"].ids
            assert (ids.tolist() if ids is not None else None) == ([0, 1] if count == 2 else None)
    assert [m.why for m in maps.missed] == [Reason.NUMBERS_OF_OTHERS]
    assert "batch() gave 97 numbers" in maps.missed[0].reason


def test_memory_is_bounded_and_a_shared_layer_counts_an_input_once() -> None:
    torch.manual_seed(0)  # a filter that fires for no input has ten that are the first
    layer = nn.Sequential(nn.Linear(3, 2), nn.ReLU())

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(-x)

    model, top = Twice(), TopInputs(3)
    x = torch.randn(10, 3)
    with capture(model, analyses=top, keep=0), torch.no_grad():
        for _ in range(3):
            model(x)
    found = top["layer.0"]
    assert found.scores.shape == (2, 3)
    with torch.no_grad():
        both = torch.maximum(layer(x), layer(-x))
    for f in range(2):
        # Three passes of ten: the same inputs under other numbers.
        assert [h.score for h in found[f]] == [both[:, f].max().item()] * 3
        assert [h.input % 10 for h in found[f]] == [int(both[:, f].argmax())] * 3


def test_what_is_left_out() -> None:
    """Named, once."""
    top = TopInputs()
    top.update(fmap(torch.randn(4, 2)))
    with pytest.warns(CaptureWarning, match="its first axis has 8 entries, and the first map"):
        top.update(fmap(torch.randn(8, 2), layer="folded"))
    with pytest.warns(CaptureWarning, match="its filters do not lie along one axis"):
        top.update(FeatureMap(torch.randn(4, 2), "activation", "none"))
    with pytest.warns(CaptureWarning, match="had 2 filters"):
        top.update(fmap(torch.randn(4, 3)))
    with pytest.warns(CaptureWarning, match="maps.batch gave 3 numbers, and its first axis has 4"):
        top.update(fmap(torch.randn(4, 2), layer="given", ids=torch.arange(3)))
    assert set(top.missed) == {(n, "activation") for n in ("folded", "none", "conv", "given")}
    top.update(fmap(torch.randn(4, 2), kind="preactivation", layer="z"))
    assert top.layers == ["conv"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 0}, "k must be a positive int, not 0"),
        ({"k": True}, "k must be a positive int, not True"),
        ({"by": "sum"}, "by must be 'max', 'mean' or a function, not 'sum'"),
        ({"kinds": "input"}, "kinds takes some of 'response', 'preactivation', 'activation', "),
    ],
)
def test_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError) as error:
        TopInputs(**options)
    assert str(error.value).startswith(says)


def test_kept_and_gone_on_from() -> None:
    """The same as not having stopped; also of a copy, and by `torch.save`."""
    x = torch.randn(12, 3, 4)
    whole, part = TopInputs(2), TopInputs(2)
    whole.update(fmap(x[:5]))
    part.update(fmap(x[:5]))
    resumed = through_file(part, TopInputs(2))
    for one in (whole, resumed, copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        one.update(fmap(x[5:], step=1))
        assert torch.equal(one["conv"].inputs, TopInputsOf(x, 2)["conv"].inputs)
    with pytest.raises(ArgumentError, match="k=2, this has 3"):
        TopInputs(3).load_state_dict(part.state_dict())
    with pytest.raises(ArgumentError, match="load_state_dict takes what TopInputs"):
        TopInputs(3).load_state_dict({})
    with pytest.raises(ArgumentError, match=r"merge takes TopInputs, not int"):
        whole.merge(3)  # type: ignore[arg-type]


def TopInputsOf(x: Tensor, k: int) -> TopInputs:  # noqa: N802
    top = TopInputs(k)
    top.update(fmap(x))
    return top


def test_contexts_of_tokens() -> None:
    """The token is marked."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up = nn.Embedding(11, 4), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.up(self.table(x)))

    model, top = Text(), TopInputs(2)
    texts = torch.randint(0, 11, (9, 7))
    with capture(model, analyses=top, keep=0), torch.no_grad():
        for part in texts.split(4):
            model(part)
    values = model(texts)
    found = top["up"].contexts(list(texts), filters=3, before=2, after=1, decode="<{}>".format)
    for context in found[3]:
        assert isinstance(context, Context)
        n, (place,) = context.hit.input, context.hit.at
        assert values[n, :, 3].argmax() == place
        around = texts[n, max(0, place - 2) : place + 2].tolist()
        assert list(context.tokens) == [f"<{t}>" for t in around]
        assert context.tokens[context.marked] == f"<{int(texts[n, place])}>"
        assert f"«<{int(texts[n, place])}>»" in str(context)
    with pytest.raises(ArgumentError) as error:
        top["up"].contexts(list(texts[:0]))
    assert str(error.value) == (
        f"the data set has no input {top['up'][0][0].input} (it has 0): the numbers are those that "
        "maps.batch(ids) gave, or count the inputs from 0 as they came"
    )
    with pytest.raises(ArgumentError, match="it is another data set"):
        top["up"].contexts([[1]] * 9)
    with pytest.raises(ArgumentError, match=r"and of sequences there are contexts\(\)"):
        top["up"].patches(texts, model=model)
    with pytest.raises(FilterRangeError, match="filter 6 is out of range: of the activation of la"):
        top["up"].contexts(texts, filters=6)
    with pytest.raises(
        ArgumentError, match=r"before must be a number of tokens, 0 or more, not -1"
    ):
        top["up"].contexts(texts, before=-1)


@pytest.mark.parametrize("with_field", [False, True])
def test_patches_through_the_receptive_field(with_field: bool) -> None:
    """The pixels that a location sees, cut at the border."""
    model = Net()
    top = seen(model)
    dataset = [(image, n) for n, image in enumerate(IMAGES)]
    told: dict[str, Any] = {"model": model}
    if with_field:
        told = {"field": receptive_field(model, "conv2", IMAGES[:1])}
    found = top["conv2"].patches(dataset, filters=[0, 3], **told)
    assert list(found) == [0, 3]
    for f, patches in found.items():
        for patch, hit in zip(patches, top["conv2"][f], strict=True):
            y, x = hit.at
            # A 3×3 kernel with stride 2 on one with padding 1: rows 2y - 1 to 2y + 3.
            box = (max(0, 2 * y - 1), max(0, 2 * x - 1), min(9, 2 * y + 4), min(9, 2 * x + 4))
            assert patch.hit == hit
            assert patch.box == box
            assert torch.equal(patch.pixels, IMAGES[hit.input][:, box[0] : box[2], box[1] : box[3]])
            assert patch.image is IMAGES[hit.input] or torch.equal(patch.image, IMAGES[hit.input])


def test_patches_that_cannot_be_had() -> None:
    model = Net()
    top = seen(model)
    field = receptive_field(model, "conv2", torch.randn(1, 1, 12, 12))
    told: list[tuple[Any, dict[str, Any], str]] = [
        (IMAGES, {}, "give one of them"),
        (IMAGES, {"model": model, "field": field}, "give one of them"),
        (IMAGES, {"field": field}, "field= is of images of (12, 12) pixels, and the data set has"),
        (IMAGES[:0], {"model": model}, "the data set has no input "),
        (
            ["a"] * 23,
            {"model": model},
            "is str, not an image as a tensor ",
        ),
    ]
    for dataset, options, says in told:
        with pytest.raises(ArgumentError) as error:
            top["conv2"].patches(dataset, **options)
        assert says in str(error.value)
    with pytest.raises(ArgumentError, match="layer 'head' has 0 axes of locations"):
        top["head"].patches(IMAGES, model=model)
    grey = top["conv1"].patches(["a"] * 23, filters=2, model=model, image=lambda _: IMAGES[0, 0])
    assert grey[2][0].image.shape == (1, 9, 9)


def test_plots_of_patches() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    model = Net()
    top = seen(model)
    figure = top["conv2"].plot(
        IMAGES, model=model, filters="strongest", max_filters=3, mean=0, std=1
    )
    order = top["conv2"].strongest(3)
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()] == [str(f) for f in order]
    figure.savefig(io.BytesIO(), dpi=20)
    below = {f: [torch.randn(1, 9, 9) for _ in range(4)] for f in order}
    figure = top["conv2"].plot(IMAGES, model=model, filters=order, below=below, title="T")
    assert len(figure.axes) == 2 * 3 * 4
    # What the border cuts off is grey: the frame is that of the largest patch.
    assert {ax.images[0].get_array().shape[:2] for ax in figure.axes} == {(5, 5)}
    figure.savefig(io.BytesIO(), dpi=20)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"below": {}}, "below has 0 images for filter 0, which has 4 patches"),
        ({"filters": "best"}, "filters must be ints or 'strongest', not 'best'"),
        ({"below": {f: [torch.randn(1, 3, 3)] * 4 for f in range(5)}}, "and the input has (9, 9)"),
    ]
    for options, says in wrong:
        with pytest.raises(ArgumentError) as error:
            top["conv2"].plot(IMAGES, model=model, **options)
        assert says in str(error.value)


def test_tokens_of_an_image_have_patches() -> None:
    """What a token of a vision transformer sees, before and after attention."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = nn.Conv2d(1, 4, 3, stride=3), nn.Linear(4, 6)
            self.late = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.up(self.embed(x).flatten(2).transpose(1, 2)))
            x = torch.softmax(x @ x.transpose(1, 2), -1) @ x
            return F.relu(self.late(x))

    model, top = Patches(), TopInputs(2)
    with capture(model, analyses=top, keep=0), torch.no_grad():
        model(IMAGES)
    for patch in top["up"].patches(IMAGES, filters=1, model=model)[1]:
        row, column = divmod(patch.hit.at[0], 3)
        assert patch.box == (3 * row, 3 * column, 3 * row + 3, 3 * column + 3)
    for patch in top["late"].patches(IMAGES, filters=1, model=model)[1]:
        assert patch.box == (0, 0, 9, 9)
