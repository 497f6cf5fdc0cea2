"""Receptive fields: against changing each pixel, closed forms, published sizes, and the probe."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmapkit import ArgumentError, FmapkitError, capture
from fmapkit.explain import Box, Span, _follow, receptive_field
from fmapkit.explain._fields import NONE, Fields
from fmapkit.explain._probe import probe
from tests.explain_nets import STEPS, Before, Masked, fitting, seen

# Of weights and images, until each pixel that can matter has mattered in one of them.
DRAWS = 100
EXAMPLES = int(os.environ.get("FMAPKIT_EXPLAIN_EXAMPLES", "40"))


def _boxes(changed: Tensor) -> list[tuple[int, ...]]:
    found = []
    for one in changed.flatten(0, 1):
        rows, columns = one.any(1).nonzero().flatten(), one.any(0).nonzero().flatten()
        if len(rows) == 0:
            found.append((0, 0, 0, 0))
            continue
        edges = (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)
        found.append(tuple(int(e) for e in edges))
    return found


@given(st.lists(STEPS, min_size=1, max_size=5), st.integers(5, 9), st.integers(4, 9))
@settings(max_examples=EXAMPLES)
def test_boxes_hold_the_pixels_that_change_a_location(
    steps: list[nn.Module], height: int, width: int
) -> None:
    image = torch.randn(1, 2, height, width)
    model = fitting(steps, image).eval()
    last = str(len(model) - 1)
    field = receptive_field(model, last, image, kind="response")
    rows, columns = field.shape
    boxes = [tuple(field.box(y, x)) for y in range(rows) for x in range(columns)]
    for changed in islice(seen(model, image), DRAWS):
        if _boxes(changed) == boxes:
            break
    assert boxes == _boxes(changed), model
    assert not field.assumed
    assert not field.decided


# -- closed forms ----------------------------------------------------------------------------------

Layer = tuple[int, int, int, int]  # kernel, stride, padding, dilation


def _closed_form(layers: list[Layer]) -> tuple[int, int, int]:
    """Size, stride and padding by the recurrence of Araujo et al. 2019, with dilation."""
    size, stride, padding = 1, 1, 0
    for kernel, step, pad, dilation in layers:
        size += dilation * (kernel - 1) * stride
        padding += pad * stride
        stride *= step
    return size, stride, padding


def _stack(layers: list[Layer]) -> nn.Sequential:
    steps: list[nn.Module] = []
    for kernel, stride, padding, dilation in layers:
        steps += [nn.Conv2d(1, 1, kernel, stride, padding, dilation), nn.ReLU(inplace=True)]
    return nn.Sequential(*steps)


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 2), st.integers(0, 3), st.integers(1, 2)),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=20, phases=(Phase.explicit, Phase.reuse, Phase.generate))
def test_stacks_have_the_closed_form(layers: list[Layer]) -> None:
    field = receptive_field(_stack(layers), str(2 * len(layers) - 2), torch.randn(1, 1, 60, 60))
    size, stride, padding = _closed_form(layers)
    assert field.size == (size, size)
    assert field.stride == (stride, stride)
    assert field.padding == (padding, padding)
    assert field.offset == (-padding, -padding)


WRITERS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": F.relu,
    "relu_": F.relu_,
    "several": lambda z: F.silu(z, inplace=True).mul_(2.0).tanh_(),
    "out": lambda z: torch.clamp(z, min=0, out=z),
    "a": lambda z: F.relu(z).add_(1.0),
    "a part of a": lambda z: (a := F.relu(z), a[:, :2].zero_())[0],
    "another": lambda z: (a := F.relu(z), a.copy_(z.flip(3)))[0],
}


@pytest.mark.parametrize("kind", ["response", "preactivation", "activation", "output"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_map_that_the_model_writes_over_has_the_field_that_it_had(name: str, kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return WRITERS[name](self.conv(x)).sum(1)

    field = receptive_field(Net().eval(), "conv", torch.randn(1, 1, 9, 9), kind=kind)
    assert field.size == (3, 3)
    assert field.box(4, 4) == (3, 3, 6, 6)


@pytest.mark.parametrize("fused", [False, True])
def test_attention_that_is_computed_beside_the_model_is_refused(fused: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            if fused:
                return F.scaled_dot_product_attention(q, k, v)
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    def field() -> Any:
        x = torch.randn(1, 5, 4)
        return receptive_field(Attention().eval(), "", x, kind="attention", axes=1)

    if fused:
        with pytest.raises(ArgumentError, match="torch fuses the attention of layer ''"):
            field()
    else:
        assert field().box(2) == (0, 5)


def _plain(*layers: tuple[int, int, int]) -> nn.Sequential:
    """Convolutions, and pooling where the stride is 2 and the kernel no more than 3."""
    steps: list[nn.Module] = []
    for kernel, stride, padding in layers:
        pool = stride == 2 and kernel <= 3
        steps.append(
            nn.MaxPool2d(kernel, stride, padding)
            if pool
            else nn.Conv2d(1, 1, kernel, stride, padding)
        )
        steps += [] if pool else [nn.ReLU(inplace=True)]
    return nn.Sequential(*steps)


class Bottleneck(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3, stride, 1)
        self.three, self.short = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.two(F.relu(self.one(x))))
        y = self.three(y)
        y += self.short(x)
        return F.relu(y, inplace=True)


def _resnet(blocks: list[int], first: bool) -> nn.Sequential:
    """A ResNet of bottlenecks; the stride is in the first block of a stage, or in its last."""
    steps: list[nn.Module] = [nn.Conv2d(1, 1, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for stage, count in enumerate(blocks):
        for i in range(count):
            at = stage > 0 and i == 0 if first else stage < len(blocks) - 1 and i == count - 1
            steps.append(Bottleneck(2 if at else 1))
    return nn.Sequential(*steps)


_VGG = [(3, 1, 1)] * 2 + [(2, 2, 0)]
_VGG3 = [(3, 1, 1)] * 3 + [(2, 2, 0)]

# Araujo et al. 2019, "Computing Receptive Fields of Convolutional Neural Networks", table 1; the
# ResNets there have their strides in the last block of a stage, those of torchvision in the first.
PUBLISHED: list[tuple[str, Callable[[], nn.Sequential], int, int]] = [
    (
        "AlexNet",
        lambda: _plain((11, 4, 2), (3, 2, 0), (5, 1, 2), (3, 2, 0), *[(3, 1, 1)] * 3, (3, 2, 0)),
        195,
        32,
    ),
    ("VGG-16", lambda: _plain(*_VGG * 2, *_VGG3 * 3), 212, 32),
    ("ResNet-50", lambda: _resnet([3, 4, 6, 3], first=False), 483, 32),
    ("ResNet-152", lambda: _resnet([3, 8, 36, 3], first=False), 1507, 32),
    ("ResNet-50 of torchvision", lambda: _resnet([3, 4, 6, 3], first=True), 427, 32),
]


@pytest.mark.parametrize(
    ("make", "size", "stride"), [p[1:] for p in PUBLISHED], ids=[p[0] for p in PUBLISHED]
)
def test_published_sizes(make: Callable[[], nn.Sequential], size: int, stride: int) -> None:
    model = make()
    # The example is smaller than the fields: they are measured on a longer one.
    field = receptive_field(model, str(len(model) - 1), torch.randn(1, 1, 224, 224), kind="output")
    assert field.size == (size, size)
    assert field.stride == (stride, stride)


def test_upsampling_has_a_fraction_of_a_stride() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 1, 3, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(1, 1, 3, padding=1)
    )
    field = receptive_field(model, "2", torch.randn(1, 1, 16, 16))
    assert field.stride == (Fraction(1, 2), Fraction(1, 2))
    # Three upsampled pixels are of two pixels, which see one more at each side.
    assert field.size == (4, 4)
    assert field.box(4, 5) == Box(0, 1, 4, 5)


def test_global_operations_see_the_whole_input() -> None:
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.relu(y * y.mean((2, 3), keepdim=True))

    field = receptive_field(Squeeze(), "conv", torch.randn(1, 1, 12, 12))
    assert field.whole
    assert field.size == (None, None)
    assert not receptive_field(Squeeze(), "conv", torch.randn(1, 1, 12, 12), kind="response").whole


# -- masks, constants, and what the weights are ----------------------------------------------------


def test_a_mask_on_a_kernel_cuts_the_field() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), Masked(), nn.ReLU(), Masked())
    field = receptive_field(model, "3", torch.randn(1, 1, 9, 9))
    # Two kernels of the rows above and of what is to the left: nothing below, two rows up.
    assert field.box(5, 5) == Box(3, 3, 6, 8)
    assert field.box(0, 0) == Box(0, 0, 1, 1)
    assert field.box(0, 4) == Box(0, 2, 1, 5)  # in the first row, nothing to the right


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
@pytest.mark.parametrize("added", [True, False])
def test_masked_scores_are_not_seen(low: float, added: bool) -> None:
    def causal(x: Tensor) -> Tensor:
        scores = x @ x.transpose(1, 2)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mask = torch.zeros(scores.shape[-2:]).masked_fill(hidden, low)
        scores = scores + mask if added else scores.masked_fill(hidden, low)
        return scores.softmax(-1) @ x

    model = Before(causal, nn.Linear(4, 4))
    field = receptive_field(model, "layer", torch.randn(2, 6, 4), axes=1)
    assert [field.box(t) for t in range(6)] == [Span(0, t + 1) for t in range(6)]


def test_tokens_of_a_language_model() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 8)
            self.places = nn.Parameter(torch.zeros(64, 8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm = nn.LayerNorm(8)
            self.up = nn.Linear(8, 16)

        def forward(self, ids: Tensor, window: int = 3) -> Tensor:
            x = self.table(ids) + self.places[: ids.shape[1]]
            t = torch.arange(ids.shape[1])
            near = (t[None] <= t[:, None]) & (t[None] > t[:, None] - window)
            x = x + self.attention(x, x, x, attn_mask=~near, need_weights=False)[0]
            return F.gelu(self.up(self.norm(x)))

    field = receptive_field(Block().eval(), "up", torch.randint(0, 50, (2, 10)))
    assert field.size == (3,)
    assert field.stride == (1,)
    assert field.box(0) == Span(0, 1)
    assert field.box(-1) == Span(7, 10)
    assert field.box(5) == (3, 6)


@pytest.mark.parametrize("ones", [False, True])
def test_one_hot_tokens_stay_apart(ones: bool) -> None:
    def one_hot(ids: Tensor) -> Tensor:
        hot = torch.zeros(*ids.shape, 7).scatter(2, ids[..., None], 1.0)
        if ones:
            hot = hot.scatter_add(2, ids[..., None], torch.ones(*ids.shape, 1))
        return hot.transpose(1, 2)

    model = Before(one_hot, nn.Conv1d(7, 3, 3))
    field = receptive_field(model, "layer", torch.randint(0, 7, (1, 9)))
    assert [field.box(t) for t in range(7)] == [Span(t, t + 3) for t in range(7)]
    assert not field.assumed


def test_what_the_values_are_makes_no_difference() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU())
    with torch.no_grad():
        model[0].bias.fill_(-1e6)  # dead
        model[2].weight.zero_()  # as before training
    image = torch.randn(1, 1, 9, 9)
    assert receptive_field(model, "2", image).size == (5, 5)
    own = receptive_field(model, "2", image, weights="own")
    assert own.box(2, 2) == Box(0, 0, 0, 0)
    assert own.size == (None, None)


def test_pruned_weights_are_masked() -> None:
    from torch.nn.utils import prune

    conv = nn.Conv2d(1, 1, (1, 5))
    prune.custom_from_mask(conv, "weight", torch.tensor([0, 0, 1, 1, 0]).reshape(1, 1, 1, 5))
    field = receptive_field(nn.Sequential(conv, nn.ReLU()), "0", torch.randn(1, 1, 4, 12))
    assert field.box(0, 1) == Box(0, 3, 1, 5)
    assert field.size == (1, 2)


def test_normalised_values_are_no_mask() -> None:
    mean = torch.tensor(101325.0)  # of a weather model
    model = Before(lambda x: x - mean, nn.Conv2d(1, 1, 3))
    assert receptive_field(model, "layer", mean.expand(1, 1, 8, 8).clone()).size == (3, 3)


# -- kinds, calls, shapes --------------------------------------------------------------------------


def test_any_kind_and_any_call() -> None:
    conv = nn.Conv2d(2, 2, 3)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.MaxPool2d(2, 1), nn.ReLU())
    image = torch.randn(1, 2, 12, 12)
    sizes = {
        (kind, call): receptive_field(model, "0", image, kind=kind, call=call).size
        for kind in ("input", "response", "preactivation", "activation")
        for call in (0, 1)
    }
    assert [sizes[k, 0][0] for k in ("input", "response", "preactivation", "activation")] == [
        1,
        3,
        3,
        3,
    ]
    assert [sizes[k, 1][0] for k in ("input", "response", "preactivation", "activation")] == [
        3,
        5,
        6,
        6,
    ]
    assert receptive_field(model, conv, image, kind="response", call=1).call == 1


def test_tokens_of_an_image() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.up(self.embed(x).flatten(2).transpose(1, 2)))

    field = receptive_field(Patches(), "up", torch.randn(1, 3, 8, 12))
    assert field.shape == (6,)
    assert field.box(4) == Box(4, 4, 8, 8)
    assert field.size == (None, None)


def test_locations_of_other_libraries() -> None:
    field = receptive_field(nn.Sequential(nn.Conv2d(1, 1, 3)), "0", torch.randn(1, 1, 6, 7))
    place = np.unravel_index(np.int64(6), field.shape)
    assert field.box(*place) == field.box(1, 1) == field.box(*torch.tensor([1, 1])) == (1, 1, 4, 4)


@pytest.mark.parametrize(
    ("model", "image", "axes", "box", "at"),
    [
        (nn.Conv1d(2, 2, 3), torch.randn(1, 2, 9), 2, Span(4, 7), (4,)),
        (nn.Conv2d(2, 2, 3), torch.randn(2, 9, 9), (1, 2), Box(1, 2, 4, 5), (1, 2)),
        (nn.Linear(4, 2), torch.randn(1, 7, 4), 1, Span(3, 4), (3,)),
        (
            nn.Conv3d(1, 1, (1, 2, 3)),
            torch.randn(1, 1, 4, 5, 6),
            None,
            (Span(1, 2), Span(1, 3), Span(1, 4)),
            (1, 1, 1),
        ),
    ],
)
def test_inputs_of_other_shapes(
    model: nn.Module, image: Tensor, axes: Any, box: Any, at: Any
) -> None:
    assert receptive_field(nn.Sequential(model), "0", image, axes=axes).box(*at) == box


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 5, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(self.other(y) + self.one(x))

    x, y = torch.randn(1, 1, 9, 9), torch.randn(1, 1, 9, 9)
    # The sum is a map of its first operand's layer.
    assert receptive_field(Two(), "other", (x, y)).size == (3, 3)
    assert receptive_field(Two(), "other", {"y": y, "x": x}).size == (5, 5)


def test_a_model_that_takes_one_size_only() -> None:
    def fixed(x: Tensor) -> Tensor:
        assert x.shape[2:] == (8, 8)
        return x

    model = Before(fixed, nn.Conv2d(1, 1, 17, padding=8))
    field = receptive_field(model, "layer", torch.randn(1, 1, 8, 8))
    assert field.size == (None, None)
    assert field.whole


@pytest.mark.parametrize("size", [7, 9])
def test_a_map_of_a_fixed_size_has_no_stride_but_its_own(size: int) -> None:
    model = Before(lambda x: F.interpolate(x, size), nn.Conv1d(2, 2, 1))
    field = receptive_field(model, "layer", torch.randn(1, 2, 13), axes=2)
    assert [tuple(field.box(i)) for i in range(3)] == [
        (i * 13 // size, i * 13 // size + 1) for i in range(3)
    ]
    assert (field.size, field.stride, field.offset) == ((None,), (None,), (None,))
    twice = receptive_field(model, "layer", torch.randn(1, 2, 2 * size), axes=2)
    assert (twice.size, twice.stride, twice.offset) == ((1,), (2,), (0,))


# -- what cannot be followed -----------------------------------------------------------------------


def test_decisions_by_values_are_told() -> None:
    model = Before(lambda x: x if x.mean() > 0 else x.flip(2), nn.Conv2d(1, 1, 3))
    field = receptive_field(model, "layer", torch.ones(1, 1, 6, 6))
    assert field.decided
    assert field.box(0, 0) == Box(0, 0, 3, 3)
    assert receptive_field(model, "layer", -torch.ones(1, 1, 6, 6)).box(0, 0) == Box(3, 0, 6, 3)


def test_operators_that_cannot_be_looked_into_are_named() -> None:
    def unpooled(x: Tensor) -> Tensor:
        y, where = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(y, where, 2)

    model = Before(unpooled, nn.Conv2d(1, 1, 1))
    field = receptive_field(model, "layer", torch.randn(1, 1, 8, 8))
    assert field.assumed == ("max_unpool2d",)
    assert field.whole


def test_values_that_leave_torch_are_refused() -> None:
    model = Before(lambda x: torch.from_numpy(x.numpy() * 2), nn.Conv2d(1, 1, 3))
    with pytest.raises(ArgumentError) as caught:
        receptive_field(model, "layer", torch.randn(1, 1, 6, 6))
    assert str(caught.value) == (
        "receptive_field follows what torch computes, and the model hands a tensor of shape "
        "(1, 1, 6, 6) on to another library (numpy)"
    )


_CONV = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 3))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: receptive_field(_CONV, "0", torch.randn(1, 1, 9)),
            ArgumentError,
            "an input of shape (1, 1, 9) may be (samples, channels, positions), (samples, "
            "positions, features) or one image: say which of its axes are locations, with axes=2, "
            "axes=1 or axes=(1, 2)",
        ),
        (
            lambda: receptive_field(_CONV, "0", torch.randn(1, 1, 9, 9), axes=4),
            ArgumentError,
            "axes must be axes of the input, of shape (1, 1, 9, 9), not 4",
        ),
        (
            lambda: receptive_field(_CONV, "0", torch.randn(1, 1, 9, 9), axes=(2, -2)),
            ArgumentError,
            "axes=(2, -2) names an axis of the input twice",
        ),
        (
            lambda: receptive_field(_CONV, "0", torch.randn(0, 1, 9, 9)),
            ArgumentError,
            "receptive_field needs an input with values, and this one has shape (0, 1, 9, 9)",
        ),
        (
            lambda: receptive_field(_CONV, "0", "an image"),
            ArgumentError,
            "receptive_field needs a tensor among the model's inputs, not 'an image'",
        ),
        (
            lambda: receptive_field(_CONV, "0", torch.randn(1, 1, 9, 9), weights="all"),
            ArgumentError,
            "weights must be 'any' or 'own', not 'all'",
        ),
        (
            lambda: receptive_field(_CONV, "0", torch.randn(1, 1, 9, 9)).box(7, 0),
            ArgumentError,
            "box(7, 0): a location of the activation of layer '0' is 2 ints, within (7, 7)",
        ),
        (
            lambda: receptive_field(_CONV, "0", torch.randn(1, 1, 9, 9)).box(1),
            ArgumentError,
            "box(1,): a location of the activation of layer '0' is 2 ints, within (7, 7)",
        ),
        (
            lambda: receptive_field(_CONV, "0", torch.randn(1, 1, 9, 9), call=3),
            FmapkitError,
            "no map of layer '0' (kind=None, call=3, path=None) in this pass; its maps are of '0'",
        ),
        (
            lambda: receptive_field(_CONV.to_empty(device="meta"), "0", torch.randn(1, 1, 9, 9)),
            ArgumentError,
            "receptive_field follows plain tensors with values, and the model computes with a "
            "Parameter of layout torch.strided on meta",
        ),
    ],
)
def test_errors(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text


def test_compiled_models_are_run_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU())
    image = torch.randn(1, 1, 6, 6)
    assert receptive_field(torch.compile(model), "0", image).size == (3, 3)
    with pytest.raises(ArgumentError) as caught:
        receptive_field(nn.Sequential(torch.compile(model)), "0", image)
    assert str(caught.value) == (
        "receptive_field needs a model that runs eagerly, and '0' is compiled: give the model as "
        "it was before"
    )


def test_the_model_is_as_it_was() -> None:
    torch.manual_seed(0)  # of dropout: a place of which every filter is dropped sees nothing
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.ReLU()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    image = torch.randn(4, 1, 8, 8)
    state, kept = torch.get_rng_state(), image.clone()
    field = receptive_field(model, "0", image)
    assert field.whole  # the statistics of a batch are of all of it
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(image, kept)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model[0]._forward_hooks


def test_a_capture_may_be_open() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    with capture(model) as maps, torch.no_grad():
        model(torch.randn(1, 1, 5, 5))
        assert receptive_field(model, "0", torch.randn(1, 1, 8, 8)).size == (3, 3)
        model(torch.randn(1, 1, 7, 7))
    assert maps["0"].shape == (1, 2, 5, 5)


# -- rules, against the probe ----------------------------------------------------------------------

_X = (1, 4, 6, 5)
_KEEP = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5]).double()
_KERNEL = torch.randn(4, 4, 3, 3).double() * (torch.rand(4, 4, 3, 3) > 0.6)
_SQUARE = torch.randn(5, 5).double() * (torch.rand(5, 5) > 0.5)

OPERATORS: dict[str, Callable[[Tensor], Any]] = {
    "relu": torch.relu,
    "add": lambda x: x + x[:, :, :1],
    "mul by zeros": lambda x: x * _KEEP,
    "div": lambda x: x / x[:, :1],
    "where": lambda x: torch.where(_KEEP > 0, x, x[:, :, :1]),
    "masked fill": lambda x: x.masked_fill(_KEEP > 0, -1.0),
    "add of -inf": lambda x: x + torch.where(_KEEP > 0, 0.0, -math.inf),
    "sum": lambda x: x.sum(2),
    "mean of all": lambda x: x.mean(),
    "amax": lambda x: x.amax((1, 3), keepdim=True),
    "max": lambda x: x.max(3).values,
    "var": lambda x: x.var(2),
    "cumsum": lambda x: x.cumsum(3),
    "softmax": lambda x: x.softmax(3),
    "masked softmax": lambda x: (x + torch.where(_KEEP > 0, 0.0, -math.inf)).softmax(3),
    "log softmax": lambda x: x.log_softmax(2),
    "layer norm": lambda x: F.layer_norm(x, (6, 5)),
    "group norm": lambda x: F.group_norm(x, 2),
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "batch norm in training": lambda x: F.batch_norm(x, None, None, training=True),
    "instance norm": lambda x: F.instance_norm(x),
    "mm": lambda x: x[0, 0] @ _SQUARE,
    "mm from the left": lambda x: _SQUARE[:, :4] @ x[0, :, 0],
    "mm of two": lambda x: x[0, 0] @ x[0, 1].t(),
    "bmm": lambda x: torch.bmm(x[0], _SQUARE.expand(4, 5, 5)),
    "addmm": lambda x: torch.addmm(x[0, 1], x[0, 0], _SQUARE),
    "conv": lambda x: F.conv2d(x, torch.ones(4, 4, 3, 3), stride=2, padding=2, dilation=2),
    "conv with zeros": lambda x: F.conv2d(x, _KERNEL, padding=(0, 3), stride=(1, 2)),
    "conv in groups": lambda x: F.conv2d(x, _KERNEL[:, :2], groups=2, padding=1),
    "conv by data": lambda x: F.conv2d(x, x[:, :, :2, :2]),
    "transposed conv": lambda x: F.conv_transpose2d(
        x, _KERNEL, stride=(2, 3), padding=1, output_padding=(1, 0), dilation=2
    ),
    "transposed conv in groups": lambda x: F.conv_transpose2d(x, _KERNEL[:, :2], groups=2),
    "conv1d": lambda x: F.conv1d(x[:, :, 0], _KERNEL[:, :, 0], padding=1),
    "conv of one sample": lambda x: F.conv2d(x[0], _KERNEL, padding=1),
    "cat": lambda x: torch.cat([x, torch.zeros(1, 1, 6, 5), x[:, 1:2]], 1),
    "index": lambda x: x[:, :, torch.tensor([3, 0, 0])],
    "pad": lambda x: F.pad(x, (1, -1, 2, 0), value=1.0),
    "reflect": lambda x: F.pad(x, (2, 1, 0, 1), mode="reflect"),
    "replicate": lambda x: F.pad(x, (2, 1, 0, 1), mode="replicate"),
    "roll": lambda x: x.roll((1, 2), (2, 3)),
    "tril": lambda x: x.tril(),
    "unfold": lambda x: F.unfold(x, 2, dilation=2),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=1.5),
    "scatter": lambda x: torch.zeros(1, 4, 6, 7).scatter(
        3, torch.tensor([0, 6, 2, 3, 4]).expand(1, 4, 6, 5), x
    ),
    "index put": lambda x: torch.zeros(1, 4, 6, 5).index_put((torch.tensor([0]),), x[:, :, :, :5]),
    "gather": lambda x: x.gather(2, torch.tensor([5, 2]).reshape(1, 1, 2, 1).expand(1, 4, 2, 5)),
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "dilated max pool": lambda x: F.max_pool2d(x, 2, 1, 0, dilation=2),
    "average pool": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "average pool 1d": lambda x: F.avg_pool1d(x[0], 2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, (4, 3)),
    "written": lambda x: torch.zeros(1, 4, 6, 5).index_copy(2, torch.tensor([1]), x[:, :, :1]),
    "kth value": lambda x: x.kthvalue(2, 3).values,
    "sort": lambda x: x.sort(2).values,
    "top k": lambda x: x.topk(2, 3).values,
    "into memory given": lambda x: torch.cat(
        [x, torch.zeros(1, 1, 6, 5)], 1, out=torch.empty(1, 5, 6, 5)
    ),
    "sum into memory given": lambda x: torch.add(x, x.flip(3), out=torch.empty(_X)),
    "in place": lambda x: x.clone().mul_(_KEEP).add_(x.flip(2)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_rules_say_what_the_probe_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by_rule = _fields(OPERATORS[name])
    ran: list[str] = []

    def probed(call: Any) -> Any:
        ran.append(call.name)
        return probe(call)

    monkeypatch.setattr(_follow, "rule_for", lambda call: probed)
    assert torch.equal(by_rule, _fields(OPERATORS[name]))
    assert ran or name in ("tril",)


def _fields(function: Callable[[Tensor], Any]) -> Tensor:
    x = torch.randn(_X, dtype=torch.float64)
    fields = Fields(2)
    rows = torch.full((5, *_X), NONE, dtype=torch.int32)
    down, along = torch.arange(6).reshape(6, 1), torch.arange(5)
    for row, places in enumerate((down, -down, along, -along)):
        rows[row] = places
    fields.put(x, rows)
    torch.set_default_dtype(torch.float64)  # of the constants in the functions
    try:
        with torch.no_grad(), _follow.Follow(fields) as follow:
            out = function(x)
    finally:
        torch.set_default_dtype(torch.float32)
    found = fields.of(out)
    assert found is not None
    assert not follow.assumed
    return found.clone()
