"""Edits of inputs, outputs, positions, calls and steps: compared with hooks written by hand."""

from __future__ import annotations

import copy
import gc
import itertools
import re
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmapkit import (
    ArgumentError,
    EditError,
    FeatureMap,
    FilterRangeError,
    capture,
    edits,
)
from fmapkit.edits import Where
from fmapkit.torchlib.nested import leaves, rebuilt
from tests import truth

Change = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """Attention and a gated MLP around a residual stream; returns a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.act = nn.GELU()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        h = self.norm(x)
        mixed, weights = self.attn(h, h, h, attn_mask=mask)
        x = x + mixed
        return x + self.down(self.act(self.up(x))), {"weights": weights}


class Tokens(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.h = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.h:
            x, _ = block(x, mask=None)
        return self.head(x)


class Images(nn.Module):
    """Residual blocks with what tutorials trip over: in place, functional, a data-dependent one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        x = x + self.body(x)
        if float(x.detach().sum()) < 1e9:
            x = self.pool(x)
        return self.fc(x.mean((2, 3)))


def tokens(seed: int = 0) -> tuple[Tokens, Tensor]:
    torch.manual_seed(seed)
    return Tokens().train(), torch.randint(0, 11, (3, 5))


def images() -> tuple[Images, Tensor]:
    torch.manual_seed(0)
    return Images().train(), torch.randn(3, 3, 6, 6)


def by_hook(module: nn.Module, kind: str, change: Callable[[Any], Any]) -> Any:
    """What one would write: a forward hook, or a pre hook."""
    if kind == "output":
        return module.register_forward_hook(lambda m, args, out: change(out))
    return module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))


def same_as_hooks(
    model: nn.Module,
    x: Tensor,
    edit: dict[Any, Any],
    hooks: list[tuple[str, str, Callable[[Any], Any]]],
    passes: int = 3,
) -> None:
    """Outputs, gradients and buffers of three training steps, bit for bit."""
    hand = copy.deepcopy(model)
    for name, kind, change in hooks:
        by_hook(hand.get_submodule(name), kind, change)
    with capture(model, edit=edit) as maps:
        for _ in range(passes):
            expected, got = hand(x), model(x)
            assert torch.equal(got, expected)
            for net, out in ((hand, expected), (model, got)):
                net.zero_grad()
                out.square().sum().backward()
            truth.assert_same_gradients(hand, model)
            for p, q in zip(hand.buffers(), model.buffers(), strict=True):
                assert torch.equal(p, q)
    assert maps.missed == []
    assert not torch.equal(expected, copy.deepcopy(model)(x))  # the edit changed something
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all("_compiled_call_impl" not in m.__dict__ for m in model.modules())


V = torch.linspace(-1, 1, 6)
W = torch.linspace(-1, 1, 4)


def at_last(change: Change) -> Change:
    def hook(o: Tensor) -> Tensor:
        o = o.clone()
        o[:, -1] = change(o[:, -1])
        return o

    return hook


def first(change: Change) -> Callable[[Any], Any]:
    return lambda o: (change(o[0]), *o[1:])


def head_slice(o: Tensor) -> Tensor:
    o = o.clone()
    o[..., 3:6] = o[..., 3:6] * 0
    return o


TOKEN_CASES = {
    "residual stream": (
        {("h.1", "output", "[0]"): edits.add(V)},
        [("h.1", "output", first(lambda o: o + V))],
    ),
    "two blocks and the input of the third": (
        {
            ("h.[01]", "output", "[0]"): edits.scale(0.5),
            ("h.2", "input"): lambda fm: fm.tensor - V,
        },
        [
            ("h.0", "output", first(lambda o: o * 0.5)),
            ("h.1", "output", first(lambda o: o * 0.5)),
            ("h.2", "input", lambda x: x - V),
        ],
    ),
    "the last token": (
        {Where("h.1", "output", path="[0]", at=-1, filter_axis=-1): edits.add(V)},
        [("h.1", "output", first(at_last(lambda t: t + V)))],
    ),
    "embedding": (
        {"embed": edits.add(V)},
        [("embed", "output", lambda o: o + V)],
    ),
    "a nested path": (
        {("h.1", "output", "[1]['weights']"): edits.zero(), ("head", "input"): edits.add(V)},
        [("head", "input", lambda x: x + V)],
    ),
    "a slice of filters of an input": (
        {("h.1.down", "input", range(3, 6)): edits.zero()},
        [("h.1.down", "input", head_slice)],
    ),
    "a filter layer's output, and a norm's": (
        {("h.0.up", "output"): edits.scale(2.0), "h.0.norm": edits.add(V)},
        [
            ("h.0.up", "output", lambda o: o * 2.0),
            ("h.0.norm", "output", lambda o: o + V),
        ],
    ),
    "the module of a nonlinearity": (
        {"h.1.act": edits.clamp(0.0, 0.2)},
        [("h.1.act", "output", lambda o: o.clamp(0.0, 0.2))],
    ),
}


@pytest.mark.parametrize("case", TOKEN_CASES)
def test_of_tokens(case: str) -> None:
    model, ids = tokens()
    same_as_hooks(model, ids, *TOKEN_CASES[case])


def pixel(o: Tensor) -> Tensor:
    o = o.clone()
    o[:, :, 2, -1] = o[:, :, 2, -1] + W
    return o


def window(o: Tensor) -> Tensor:
    o = o.clone()
    o[:, 1:3, 1:4, 2:] = 0
    return o


IMAGE_CASES = {
    "a block": ({"body": edits.add(W)}, [("body", "output", lambda o: o + W[:, None, None])]),
    "a pixel": (
        {Where("body", "output", at=(2, -1)): edits.add(W)},
        [("body", "output", pixel)],
    ),
    "filters of a window": (
        {Where("body", "output", (1, 2), at=(slice(1, 4), slice(2, None))): edits.zero()},
        [("body", "output", window)],
    ),
    "an image": (
        {("stem", "input"): edits.scale(0.5)},
        [("stem", "input", lambda x: x * 0.5)],
    ),
    "what is written to in place": (
        {("body.0", "output"): edits.scale(2.0), ("body.1", "output"): edits.add(W)},
        [
            ("body.0", "output", lambda o: o * 2.0),
            ("body.1", "output", lambda o: o + W[:, None, None]),
        ],
    ),
}


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_of_pixels(case: str) -> None:
    model, x = images()
    same_as_hooks(model, x, *IMAGE_CASES[case])


def test_what_was_and_what_went_on() -> None:
    model, ids = tokens()
    bare: dict[str, Any] = {}
    handle = model.h[1].register_forward_hook(lambda m, a, o: bare.update(out=o[0]))
    model(ids)
    handle.remove()
    edit = {("h.1", "output", "[0]"): edits.add(V), ("h.2.up", "input"): edits.scale(2.0)}
    with capture(model, ["h.1", "h.2.up"], kinds=("input", "output"), edit=edit) as maps:
        for _ in range(3):
            model(ids)
            stream = maps.select(layer="h.1", path="[0]")[0]
            assert torch.equal(stream.tensor, bare["out"].detach())
            assert torch.equal(stream.edited, stream.tensor + V)
            assert maps.select(layer="h.1", path="[1]['weights']")[0].edited is None
            x = maps["h.2.up", "input"]
            assert torch.equal(x.edited, x.tensor * 2.0)
            up = maps["h.2.up", "output"].tensor
            assert torch.equal(up, F.linear(x.edited, model.h[2].up.weight, model.h[2].up.bias))
            assert not x.edited.requires_grad


# -- calls and steps --------------------------------------------------------------------------


class Thrice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.fc(x))
        return x


@pytest.mark.parametrize("kind", ["input", "response", "preactivation", "activation", "output"])
def test_one_call_of_three(kind: str) -> None:
    model, x = Thrice(), torch.randn(2, 4)
    y = x
    for n in range(3):
        double = (lambda t: t * 2) if n == 1 else (lambda t: t)
        y = double(y) if kind == "input" else y
        z = model.fc(y)
        z = z if kind in ("input", "activation") else double(z)
        y = double(torch.tanh(z)) if kind == "activation" else torch.tanh(z)
    for call in (1, [1], lambda n: n == 1):
        with capture(model, edit={Where("fc", kind, call=call): edits.scale(2.0)}) as maps:
            for _ in range(3):
                assert torch.equal(model(x), y)
            found = [fm.edited is not None for fm in maps.select(kind="activation")]
            assert found == [False, kind == "activation", False]


@pytest.mark.parametrize("kind", ["input", "response", "preactivation", "activation", "output"])
def test_one_step_of_five(kind: str) -> None:
    """Also one that comes after steps in which nothing was edited, and a plan could be made."""
    model, x = Thrice(), torch.randn(2, 4)
    bare = model(x)
    with capture(model, edit={Where("fc", kind, step=3): edits.zero()}):
        same = [torch.equal(model(x), bare) for _ in range(5)]
    assert same == [True, True, True, False, True]
    with capture(model, edit={Where("fc", kind, step=range(1, 3)): edits.zero()}):
        assert [torch.equal(model(x), bare) for _ in range(4)] == [True, False, False, True]


# -- positions --------------------------------------------------------------------------------


def _by_loops(t: Tensor, points: list[tuple[int, tuple[int, ...]]], fdim: int) -> Tensor:
    """Add 1 + filter to the value of each filter at each (sample, position): one at a time."""
    moved = t.clone().movedim(fdim, -1)
    for sample, place in points:
        for f in range(moved.shape[-1]):
            moved[(sample, *place, f)] += 1 + f
    return moved.movedim(-1, fdim)


@st.composite
def _picks(draw: st.DrawFn) -> tuple[tuple[int, ...], int, Any, list[tuple[int, tuple[int, ...]]]]:
    """A shape, its axis of filters, an `at`, and the points that it means."""
    n, c = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    extents = draw(st.lists(st.integers(2, 4), min_size=1, max_size=2))
    shape = [n, *extents]
    fdim = draw(st.sampled_from([1, len(extents) + 1]))
    shape.insert(fdim, c)
    form = draw(st.sampled_from(["int", "slice", "lists", "own", "several own", "mask", "masks"]))
    axes = range(len(extents))
    every = list(itertools.product(*map(range, extents)))
    ints = [draw(st.integers(-e, e - 1)) for e in extents]
    if form == "int":
        at: Any = tuple(ints)
        places = [[tuple(i % e for i, e in zip(ints, extents, strict=True))]] * n
    elif form == "slice":
        parts = [
            slice(draw(st.integers(0, e - 1)), draw(st.sampled_from([None, e]))) for e in extents
        ]
        at = tuple(parts)
        ranges = [range(e)[p] for p, e in zip(parts, extents, strict=True)]
        places = [list(itertools.product(*ranges))] * n
    elif form == "lists":
        picked = draw(st.lists(st.sampled_from(every), min_size=1, max_size=3, unique=True))
        at = tuple([p[i] for p in picked] for i in axes)
        places = [picked] * n
    elif form in ("own", "several own"):
        k = 1 if form == "own" else draw(st.integers(1, 2))
        sets = st.lists(st.sampled_from(every), min_size=k, max_size=k, unique=True)
        places = [draw(sets) for _ in range(n)]
        at = tuple(torch.tensor([[p[i] for p in of] for of in places]) for i in axes)
        if form == "own":
            at = tuple(t[:, 0] for t in at)
    else:
        bits = [[draw(st.booleans()) for _ in every] for _ in range(n if form == "masks" else 1)]
        mask = torch.tensor(bits).reshape(-1, *extents)
        at = mask if form == "masks" else mask[0]
        bits = bits if form == "masks" else bits * n
        places = [[p for p, b in zip(every, row, strict=True) if b] for row in bits]
    if len(extents) == 1 and isinstance(at, tuple):
        at = at[0]
    points = [(sample, place) for sample, of in enumerate(places) for place in of]
    return tuple(shape), fdim, at, points


@settings(max_examples=150, deadline=None)
@given(_picks())
def test_positions_are_those_that_loops_would_visit(pick: Any) -> None:
    shape, fdim, at, points = pick
    t = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    fm = FeatureMap(t, "output", "x", filter_dim=fdim, filters=range(shape[fdim]))
    from fmapkit.editing.positions import part_of

    part, put = part_of(fm, Where("x", "output", at=at))
    assert part.filter_dim is not None
    assert part.shape[part.filter_dim] == shape[fdim]
    new = edits.add(torch.arange(1.0, 1 + shape[fdim]))(part)
    assert torch.equal(put(new), _by_loops(t, points, fdim))
    assert torch.equal(t.flatten(), torch.arange(float(t.numel())))  # the map is as it was


def test_a_part_is_laid_out_as_the_map() -> None:
    t = torch.randn(2, 3, 4, 5)
    fm = FeatureMap(t, "output", "x", filter_dim=1, filters=range(3))
    from fmapkit.editing.positions import part_of

    ys, xs = torch.tensor([1, 3]), torch.tensor([0, 4])
    cases = [
        ((1, 2), t[:, :, 1, 2]),
        ((slice(1, 3), 2), t[:, :, 1:3, 2]),
        (([0, 3], [1, 1]), t[:, :, [0, 3], [1, 1]]),
        ((ys, xs), torch.stack([t[0, :, 1, 0], t[1, :, 3, 4]])),
        (lambda fm: (fm.shape[2] - 1, 0), t[:, :, 3, 0]),
    ]
    for at, expected in cases:
        part, _ = part_of(fm, Where("x", "output", at=at))
        assert torch.equal(part.tensor, expected)
        assert part.filter_dim == 1
    part, _ = part_of(fm, Where("x", "output", 2, at=(1, 2)))
    assert torch.equal(part.tensor, t[:, 2, 1, 2])
    assert (part.filter, part.filter_dim) == (2, None)
    single = FeatureMap(t[0], "output", "x", filter_dim=0, filters=range(3))
    assert torch.equal(part_of(single, Where("x", "output", at=(1, 2)))[0].tensor, t[0, :, 1, 2])
    first = FeatureMap(torch.randn(4, 2, 3), "output", "x", filter_dim=2, filters=range(3))
    part, _ = part_of(first, Where("x", "output", at=-1, batch_axis=1))
    assert torch.equal(part.tensor, first.tensor[-1])


BAD_PLACES = [
    ({"at": 9}, "at=9 is outside of the output of layer 'x', of shape (2, 5, 3): index 9 is out"),
    (
        {"at": slice(None, None, -1)},
        "at=slice(None, None, -1) is no part of a tensor: step must be",
    ),
    ({"at": (1, 2)}, "at= says a place along 2 axes, and the output of layer 'x', of shape"),
    ({"at": torch.tensor([1, 2, 3])}, "positions that all share are a list"),
    ({"at": torch.ones(4, dtype=torch.bool)}, "at= is a mask of shape (4,), and the output"),
    ({"at": -1, "filter_axis": 7}, "has 3 axes, so filter_axis=7 is none of them"),
    ({"at": -1, "batch_axis": 5}, "has no axis 5, as batch_axis= says"),
    ({"at": -1, "batch_axis": 2}, "batch_axis=2 is the axis of filters of the output"),
]


@pytest.mark.parametrize(("given", "text"), BAD_PLACES)
def test_places_that_are_not_there(given: dict[str, Any], text: str) -> None:
    model, x = nn.Sequential(OrderedDict(x=nn.Linear(4, 3))), torch.randn(2, 5, 4)
    with (
        capture(model, edit={Where("x", "output", **given): edits.zero()}),
        pytest.raises(EditError, match=re.escape(text)),
    ):
        model(x)


NOWHERE = [
    slice(7, 9),
    slice(2, 2),
    torch.zeros(5, dtype=torch.bool),
    torch.zeros(2, 0, dtype=torch.long),
    lambda fm: fm.tensor[..., 0] > 1e6,
]


@pytest.mark.parametrize("at", NOWHERE)
def test_no_position_is_no_place(at: Any) -> None:
    model, x = nn.Sequential(OrderedDict(x=nn.Linear(4, 3))), torch.randn(2, 5, 4)
    y = model(x)
    with (
        capture(model, edit={Where("x", "output", at=at): edits.zero()}),
        pytest.raises(EditError, match="at= is no position of any map that there was"),
    ):
        model(x)
    with capture(model, edit={Where("x", "output", at=at, optional=True): edits.zero()}) as maps:
        assert torch.equal(model(x), y)
        assert all(fm.edited is None for fm in maps)
    with capture(model, edit={Where("x", "output", at=slice(0, 2)): edits.zero()}):
        assert model(x[:0]).shape == (0, 5, 3)  # a map without values has no place to be missed


def test_a_map_without_known_filters_says_what_to_do() -> None:
    model, ids = tokens()
    text = (
        "the output at [0] of layer 'h.1', of shape (3, 5, 6), has no axis of filters that the "
        "data tells of, so its positions cannot be told from them: say it with "
        "edits.Where(..., filter_axis=-1)"
    )
    with (
        capture(model, edit={Where("h.1", "output", path="[0]", at=-1): edits.zero()}),
        pytest.raises(EditError, match=f"^{re.escape(text)}$"),
    ):
        model(ids)
    with (
        capture(model, edit={("h.1", "output", "[0]"): edits.only(2)}),
        pytest.raises(EditError, match="has no axis of filters that the data tells of"),
    ):
        model(ids)
    square = torch.randint(0, 11, (3, 6))  # as many tokens as hidden units: a vector may be either
    with (
        capture(model, edit={("h.1", "output", "[0]"): edits.add(V)}),
        pytest.raises(EditError, match="the data does not tell which axis that is"),
    ):
        model(square)


# -- the usual edits --------------------------------------------------------------------------


def test_the_usual_edits_on_images_and_tokens() -> None:
    torch.manual_seed(0)
    x, d = torch.randn(3, 4, 5, 6), torch.randn(4)
    unit = d.double() / d.double().norm()
    pairs = torch.randn(2, 4)
    planes = torch.linalg.qr(pairs.double().T).Q
    last = x.double().movedim(1, -1)

    def back(t: Tensor) -> Tensor:
        return t.movedim(-1, 1).float()

    cases: list[tuple[Any, Tensor]] = [
        (edits.add(d), x + d[:, None, None]),
        (edits.add(3.0), x + 3.0),
        (edits.set(d), d[:, None, None].expand(3, 4, 5, 6)),
        (edits.scale(d), x * d[:, None, None]),
        (edits.swap([2, 0, 1]), x[[2, 0, 1]]),
        (edits.project_out(d), back(last - (last @ unit)[..., None] * unit)),
        (edits.project_out(-5 * d), back(last - (last @ unit)[..., None] * unit)),
        (edits.project_out(pairs), back(last - last @ planes @ planes.T)),
    ]
    fm = FeatureMap(x, "response", "conv", filter_dim=1, filters=range(4))
    for edit, expected in cases:
        assert torch.allclose(edit(fm), expected, atol=1e-6)
        tokens = FeatureMap(x.movedim(1, -1), "output", "h", filter_dim=3, filters=range(4))
        assert torch.allclose(edit(tokens), expected.movedim(1, -1), atol=1e-6)
    kept = torch.zeros_like(x)
    kept[:, 2, 1, 3] = x[:, 2, 1, 3]
    assert torch.equal(edits.only(2, at=(1, 3))(fm), kept)
    kept[:, :, 1, 3] = x[:, :, 1, 3]
    assert torch.equal(edits.only(at=(1, 3))(fm), kept)
    own = torch.zeros_like(x)
    for n, (i, j) in enumerate([(0, 5), (4, 0), (2, 2)]):
        own[n, [0, 3], i, j] = x[n, [0, 3], i, j]
    each = torch.tensor([0, 4, 2]), torch.tensor([5, 0, 2])
    assert torch.equal(edits.only(0, 3, at=each)(fm), own)


def test_noise() -> None:
    fm = FeatureMap(torch.zeros(4, 8, 50, 50), "response", "conv", filter_dim=1, filters=range(8))
    state = torch.get_rng_state()
    first, again = (edits.noise(0.5, seed=3)(fm) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    # 80000 draws: the standard deviation of their mean is 0.5/283, of their deviation 0.5/400.
    assert abs(float(first.mean())) < 0.01
    assert abs(float(first.std()) - 0.5) < 0.01
    torch.manual_seed(7)
    drawn = torch.randn(4, 8, 50, 50) * 0.5
    torch.manual_seed(7)
    assert torch.equal(edits.noise(0.5)(fm), drawn)
    whole = FeatureMap(torch.zeros(2, dtype=torch.long), "input", "embed")
    with pytest.raises(EditError, match=re.escape("has torch.int64")):
        edits.noise(1.0)(whole)


def test_a_steering_vector_can_be_trained() -> None:
    model, ids = tokens()
    v, w = torch.zeros(6, requires_grad=True), torch.zeros(6, requires_grad=True)
    handle = by_hook(model.h[1], "output", first(lambda o: o + w))
    model(ids).logsumexp(-1).sum().backward()
    handle.remove()
    with capture(model, edit={("h.1", "output", "[0]"): edits.add(v)}):
        model(ids).logsumexp(-1).sum().backward()
    assert v.grad.abs().sum() > 0
    assert torch.equal(v.grad, w.grad)


# -- nested outputs ---------------------------------------------------------------------------

Point = namedtuple("Point", "x y")


@dataclass(frozen=True)
class Frozen:
    boxes: Tensor
    rest: Any = None


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_a_value_is_rebuilt_around_another_tensor() -> None:
    t = torch.zeros(1)
    values = [
        t,
        (t, t),
        [t, (t, "x")],
        {"a": t, 3: [t]},
        OrderedDict(a=t),
        Point(t, 2),
        Frozen(t, {"deep": (t,)}),
        Slotted(t),
        UserDict(a=t),
        MappingProxyType({"a": t}),
        torch.max(torch.zeros(2, 2), 0),
        (Frozen(t), Slotted(t), [Point(1, t)]),
    ]
    for value in values:
        paths = [path for path, _ in leaves(value)]
        for path in paths:
            new = torch.ones(1)
            made = rebuilt(value, path, new)
            assert type(made) is type(value)
            found = dict(leaves(made))
            assert list(found) == paths
            assert [p for p, v in found.items() if v is new] == [path]
        assert all(v is not new for _, v in leaves(value))  # the value itself is as it was
    with pytest.raises(KeyError):
        rebuilt((t,), "[1]", t)


def test_a_model_output_keeps_its_items_and_attributes_together() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.BaseModelOutput(torch.zeros(1), hidden_states=(torch.zeros(1),))
    new = torch.ones(1)
    made = rebuilt(value, ".last_hidden_state", new)
    assert made.last_hidden_state is new
    assert made["last_hidden_state"] is new
    assert made[0] is new
    assert value[0] is not new
    assert rebuilt(value, ".hidden_states[0]", new).hidden_states[0] is new


# -- errors -----------------------------------------------------------------------------------


def test_several_tensors_and_no_path() -> None:
    model, ids = tokens()
    text = (
        "edit['h.1'] could mean 2 tensors of the output of 'h.1': '[0]', \"[1]['weights']\"; "
        "say which: ('h.1', 'output', '[0]')"
    )
    before = truth.fingerprint(model)
    with (
        capture(model, edit={"h.1": edits.zero()}),
        pytest.raises(EditError, match=f"^{re.escape(text)}$"),
    ):
        model(ids)
    truth.assert_nothing_left(before, model)


UNDONE = [
    (
        Where("fc", "output", path="[1]"),
        "path='[1]' is none of the tensors that there were ('')",
    ),
    (Where("fc", "output", call=7), "call=7 is none of those that there were (0, 1, 2)"),
    (
        Where("fc", "activation", call=[3, 4]),
        "call=[3, 4] is none of those that there were (0, 1, 2)",
    ),
]


@pytest.mark.parametrize(("where", "why"), UNDONE)
def test_an_edit_that_changed_nothing_is_an_error(where: Where, why: str) -> None:
    model, x = Thrice(), torch.randn(2, 4)
    text = f"edit[{where!r}] changed nothing in this pass (step 0): {why}. "
    with (
        capture(model, edit={where: edits.zero()}),
        pytest.raises(EditError, match=f"^{re.escape(text)}"),
    ):
        model(x)


def test_a_module_that_does_not_run_in_each_pass() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if float(x.sum()) > 0 else self.b(x)

    model, x = Sometimes(), torch.ones(1, 2)
    with capture(model, edit={("a", "output"): edits.zero()}):
        assert not model(x).any()
        with pytest.raises(EditError, match="the layer did not run, or has no output"):
            model(-x)
        assert not model(x).any()
    other = model.b(-x)
    with capture(model, edit={Where("a", "output", optional=True): edits.zero()}) as maps:
        for _ in range(2):
            assert not model(x).any()
            assert torch.equal(model(-x), other)
        assert maps.missed == []


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("layer", "kind"), [("0", "output"), ("0", "input"), ("1", "activation")])
def test_inside_activation_checkpointing_it_is_refused(
    reentrant: bool, layer: str, kind: str
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Tanh())
            self.head = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=reentrant))

    model, x = Net(), torch.randn(3, 2, requires_grad=True)
    with capture(model, edit={(f"body.{layer}", kind): edits.scale(2.0)}):
        for _ in range(2):
            with pytest.raises(EditError, match="inside activation checkpointing, which runs"):
                model(x).sum().backward()
            gc.collect()  # in torch 2.4, a checkpoint that raised is left with its frames
    with capture(model, edit={("head", "input"): edits.scale(2.0)}):  # outside of it
        model(x).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.head(checkpoint(model.body, x, use_reentrant=reentrant) * 2.0).sum().backward()
    assert all(torch.equal(p.grad, q) for p, q in zip(model.parameters(), got, strict=True))


def test_bad_selectors() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"kind": "outputs"}, "the kind must be one of 'input', 'response', 'preactivation', "),
        ({"kind": "activation", "path": "[0]"}, "only an 'input' or an 'output' has paths"),
        ({"kind": "output", "path": 0}, "a path is text such as '[0]' or '.logits'"),
        ({"call": -1}, "call must be a number from 0, several, or a function of the number"),
        ({"step": "first"}, "step must be a number from 0, several, or a function"),
        ({"step": []}, "step must be a number from 0, several, or a function"),
        ({"at": 1.5}, "at must be an int, a slice, a list of ints, a tensor of ints"),
        ({"at": (1, "x")}, "at must be an int, a slice, a list of ints, a tensor of ints"),
        ({"at": torch.tensor([0.5])}, "at must be an int, a slice, a list of ints, a tensor"),
        ({"filter": "3"}, "the filters of Where('conv', filter='3') must be an int"),
        ({"filter_axis": "last"}, "filter_axis must be an int, or None"),
        ({"optional": 1}, "optional must be True or False"),
    ]
    for given_, text in cases:
        with pytest.raises(ArgumentError, match=re.escape(text)):
            Where("conv", **given_)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: edits.noise(0), "std must be a positive number"),
        (lambda: edits.noise(1.0, seed=1.5), "seed must be an int or None"),  # type: ignore[arg-type]
        (lambda: edits.project_out(torch.zeros(3)), "directions that are not 0"),
        (lambda: edits.project_out(torch.ones(2, 3)), "do not depend on each other"),
        (lambda: edits.project_out(torch.ones(1, 2, 3)), "takes a tensor (filters,)"),
        (lambda: edits.swap([0.5]), "swap takes an int for each sample"),  # type: ignore[list-item]
        (lambda: edits.only(at=None), "only() needs at least one filter, or at="),
    ]
    for call, text in calls:
        with pytest.raises(ArgumentError, match=re.escape(text)):
            call()


def test_values_that_do_not_fit() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 6, 6)
    cases: list[tuple[Any, type[Exception], str]] = [
        (edits.add(torch.ones(5)), EditError, "a vector of 5 values has one for each filter, and"),
        (edits.set(torch.ones(9, 4)), EditError, "a value of shape (9, 4) does not fit the out"),
        (edits.project_out(torch.ones(3)), EditError, "a direction of 3 values has one for each"),
        (edits.swap([0, 1, 2]), EditError, "swap([0, 1, 2]) does not fit the 2 samples of the"),
        (edits.swap([0, 5]), EditError, "swap([0, 5]) does not fit the 2 samples of the output"),
        (edits.only(7), FilterRangeError, "filter 7 is out of range for the output of layer '0'"),
    ]
    for edit, error, text in cases:
        with (
            capture(model, edit={("0", "output"): edit}),
            pytest.raises(error, match=re.escape(text)),
        ):
            model(x)


def test_a_module_with_weights_of_its_own_says_the_kind() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.weight.t())

    model = nn.Sequential(Gated(), nn.Linear(3, 1))
    text = (
        "edit['0']: whether '0', which has weights of its own, is a filter layer is known only "
        "when it runs; say the kind, 'activation' or 'output'"
    )
    with pytest.raises(ArgumentError, match=f"^{re.escape(text)}$"):
        capture(model, edit={"0": edits.zero()})
    for kind in ("activation", "output"):
        with capture(model, edit={("0", kind): edits.zero()}):
            assert torch.equal(model(torch.randn(1, 2)), model[1].bias.expand(1, 1))


# -- where nothing can be edited --------------------------------------------------------------


def test_passes_in_which_nothing_can_be_edited_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    before = truth.fingerprint(model)
    with capture(model, edit={"0": edits.zero()}):
        with pytest.raises(EditError, match="edit= cannot be carried out in this call: "):
            torch.func.vmap(model)(x)
        with pytest.raises(EditError, match=re.escape("recorded by torch.jit.trace here")):
            torch.jit.trace(model, x)
        assert not model(x).any()
    truth.assert_nothing_left(before, model)


def test_an_edited_module_that_is_called_outside_of_a_pass() -> None:
    model, _ = tokens()
    text = (
        "edit[('head', 'output')] changed nothing: 'head' was called outside of a pass; "
        "capture(..., method=...) makes a pass of another method than forward"
    )
    with (
        capture(model, edit={("head", "output"): edits.zero()}),
        pytest.raises(EditError, match=f"^{re.escape(text)}$"),
    ):
        model.head(torch.randn(1, 6))


def test_after_the_hooks_of_others_and_by_any_name() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model, x = Shared(), torch.randn(2, 3)
    handle = model.a.register_forward_hook(lambda m, args, out: out + 1)
    with torch.no_grad():
        for name in ("a", "b"):
            with capture(model, edit={(name, "output"): edits.scale(3.0)}):
                for _ in range(2):
                    w, bias = model.a.weight, model.a.bias
                    expected = (F.linear(x, w, bias) + 1) * 3.0
                    expected = (F.linear(expected, w, bias) + 1) * 3.0
                    assert torch.equal(model(x), expected)
    handle.remove()


def test_inputs_by_keyword_and_nested() -> None:
    class Inner(nn.Module):
        def forward(self, *, x: Tensor, extra: dict[str, list[Tensor]]) -> Tensor:
            return x + 2 * extra["y"][0]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            extra = {"y": [x * 10]}
            out = self.inner(x=x, extra=extra)
            return out + 0 * extra["y"][0]  # what it holds itself is as it was

    model, x = Outer(), torch.randn(2, 3)
    cases: list[tuple[Any, Tensor]] = [
        (("inner", "input"), x * 3 + 2 * (x * 10)),
        (("inner", "input", "['x']"), x * 3 + 2 * (x * 10)),
        (("inner", "input", "['extra']['y'][0]"), x + 2 * (x * 10 * 3)),
    ]
    for key, expected in cases:
        with capture(model, edit={key: lambda fm: fm.tensor * 3}):
            for _ in range(2):
                assert torch.equal(model(x), expected)


def test_half_precision_an_empty_batch_and_inference_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        for n in (2, 0):
            x = torch.randn(n, 3, 5, 5, dtype=dtype)
            with torch.inference_mode():
                y = model[0](x)
                y[:, :, 1, 2] = y[:, :, 1, 2] + W.to(dtype)
                expected = model[2](y.relu())
                where = Where("0", "output", at=(1, 2))
                with capture(model, edit={where: edits.add(W)}):
                    for _ in range(2):
                        assert torch.equal(model(x), expected)


def test_a_function_may_call_modules_of_the_model_itself() -> None:
    """A logit lens: what it calls is no part of the pass."""
    model, ids = tokens()
    seen: list[Tensor] = []

    def lens(fm: FeatureMap) -> Tensor:
        seen.append(model.head(fm.tensor))
        return fm.tensor

    with capture(model, "head", kinds="response", edit={("h.1", "output", "[0]"): lens}) as maps:
        for _ in range(3):
            out = model(ids)
            assert torch.equal(maps["head", "response"].tensor, out)
            assert [fm.call for fm in maps] == [0]
            assert not torch.equal(seen[-1], out)
    assert maps.missed == []


def test_what_a_wrapper_carries_is_edited_once() -> None:
    model, x = nn.Sequential(nn.DataParallel(nn.Linear(3, 3)), nn.Tanh()), torch.randn(2, 3)
    with torch.no_grad():
        after, before = torch.tanh(model[0](x) + 1), torch.tanh(model[0](x + 1))
        for kind, expected in (("output", after), ("input", before)):
            with capture(model, edit={("0", kind): edits.add(1.0)}):
                for _ in range(2):
                    assert torch.equal(model(x), expected)


def test_a_way_through_the_code_that_no_pass_has_taken_is_not_run_unedited() -> None:
    ways = {"long": False}

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.extra = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.extra(x).relu() if ways["long"] else x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = Inner(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x))

    model, x = Outer(), torch.randn(2, 3)
    before = truth.fingerprint(model)
    # What modules are given and return needs no way to be known.
    hand = copy.deepcopy(model)
    by_hook(hand.head, "input", lambda x: x * 2)
    by_hook(hand.head, "output", lambda out: out + 1)
    around: Any = {("head", "input"): edits.scale(2.0), ("head", "output"): edits.add(1.0)}
    with capture(model, edit=around), torch.no_grad():
        for way in (False, False, True, True, False, True):
            ways["long"] = way
            assert torch.equal(model(x), hand(x))
    with torch.no_grad():
        short, long = model.head(model.inner.first(x)), model.head.bias.expand(2, 3)
    where, text = Where("inner.extra", "activation", optional=True), "took a way through its code"
    for other in ({}, {("head", "output"): edits.scale(1.0)}):
        ways["long"] = False
        with capture(model, edit={where: edits.zero(), **other}), torch.no_grad():
            for _ in range(3):
                assert torch.equal(model(x), short)
            ways["long"] = True
            with pytest.raises(EditError, match=text):
                model(x)
            for _ in range(3):
                assert torch.equal(model(x), long)
    truth.assert_nothing_left(before, model)


def test_a_call_that_is_broken_off_where_the_model_goes_on() -> None:
    broken: list[bool] = []

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            if broken and broken.pop():
                raise KeyboardInterrupt
            return self.fc(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.inner(x)
            except KeyboardInterrupt:
                return self.inner(x)

    model, x = Outer(), torch.randn(2, 3)
    with torch.no_grad():
        expected = model.inner.fc(x * 2) * 2
        edit: Any = {("inner", "input"): edits.scale(2.0), ("inner", "output"): edits.scale(2.0)}
        with capture(model, edit=edit):
            for _ in range(3):  # in a pass that is learned, and in those that are replayed
                broken.append(True)
                with pytest.raises(EditError, match="a call inside the model was broken off"):
                    model(x)
                assert torch.equal(model(x), expected)
