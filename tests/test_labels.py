"""Whose map is whose, and what is one σ: small models, the expected tags derived in a comment.

Each model runs three passes in one block beside a bare copy: learned, then replayed. `check` asks
the witness (tests/truth.py) for the values, and for the same tags in each pass.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as old_weight_norm

from fmapkit import NoActivationError, capture, register_layer, register_nonlinearity
from tests.checks import check, images, tags
from tests.truth import Witness, assert_captured_exactly_once

IMAGE = (2, 3, 8, 8)


# -- convolutional ------------------------------------------------------------------------------


class Residual(nn.Module):
    """torchvision's BasicBlock: the sum's first operand is the branch, not the shortcut."""

    def __init__(self, inplace: bool, add: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=inplace)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.add == "in place":
            out += identity
        elif self.add == "out of place":
            out = out + identity
        elif self.add == "torch.add":
            out = torch.add(out, identity)
        else:
            out = identity + out
        return self.relu(out)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("add", ["in place", "out of place", "torch.add", "shortcut first"])
def test_a_residual_sum_belongs_to_its_first_operand(inplace: bool, add: str) -> None:
    # relu 1 receives bn1(conv1(x)). relu 2 receives the sum: of conv2's branch, unless the shortcut
    # stands first. One module, two calls; `call` counts those of the layer, so both are 0.
    owner = "stem" if add == "shortcut first" else "conv2"
    check(
        Residual(inplace, add),
        images(*IMAGE),
        [("conv1", 0, "relu", range(4)), (owner, 0, "relu", range(4))],
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(6),
        nn.GroupNorm(2, 6),
        nn.InstanceNorm2d(6, affine=True),
        nn.Identity(),
        nn.Dropout2d(0.5),
        nn.LocalResponseNorm(2),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_norm_between_keeps_the_filters(norm: nn.Module, inplace: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(inplace))
    check(model, images(*IMAGE), [("0", 0, "relu", range(6))])


@pytest.mark.parametrize(
    "between",
    [
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveMaxPool2d(2),
        nn.ZeroPad2d(1),
        nn.ReflectionPad2d(1),
        nn.ReplicationPad2d(1),
        nn.CircularPad2d(1),
        nn.ConstantPad2d(1, 0.5),
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Softmax(dim=1),
        nn.Flatten(2),
        nn.AlphaDropout(0.1),
        nn.FeatureAlphaDropout(0.1),
        nn.ChannelShuffle(1),
    ],
    ids=lambda m: type(m).__name__,
)
def test_pooling_padding_and_resizing_keep_the_filters(between: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), between, nn.Tanh())
    if isinstance(between, nn.ChannelShuffle):  # it reorders the filters: not the conv's order
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ChannelShuffle(3), nn.Tanh())
        with capture(model) as maps:
            for (x,) in images(*IMAGE):
                model(x)
                assert [t for t in tags(maps) if t[0] == "0" and t[3] == range(6)] == []
        return
    check(model, images(*IMAGE), [("0", 0, "tanh", range(6))])


def test_pre_activation_belongs_to_the_layer_before() -> None:
    # norm -> relu -> conv: the first relu receives the stem's filters, the second conv1's; conv2
    # has no σ behind it.
    class PreAct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)
            self.bn2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            out = self.conv1(F.relu(self.bn1(x)))
            out = self.conv2(F.relu(self.bn2(out), inplace=True))
            return out + x

    model = PreAct()
    check(model, images(*IMAGE), [("stem", 0, "relu", range(4)), ("conv1", 0, "relu", range(5))])
    with capture(model) as maps:
        for (x,) in images(*IMAGE):
            model(x)
            with pytest.raises(NoActivationError, match="'conv2' has no activation"):
                maps["conv2"]
            assert maps["conv2", "preactivation"].filters == range(4)


def test_the_first_relu_of_a_model_without_a_layer_before() -> None:
    # norm -> relu on the image: no layer, so the nearest norm.
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.ReLU())
    check(model, images(*IMAGE), [("0", 0, "relu", range(3)), ("2", 0, "relu", range(4))])


def test_dense_connections_belong_to_the_norm() -> None:
    # cat along the filters mixes two layers: the norm that follows names it. The first one is
    # plain: conv0's.
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv0 = nn.Conv2d(3, 4, 1)
            self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
            self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            features = [self.conv0(x)]
            features.append(self.conv1(self.relu(self.norm1(features[0]))))
            features.append(self.conv2(self.relu(self.norm2(torch.cat(features, 1)))))
            return torch.cat(features, 1)

    check(Dense(), images(*IMAGE), [("conv0", 0, "relu", range(4)), ("norm2", 0, "relu", range(6))])


def test_a_cat_without_a_norm_belongs_to_the_sigma() -> None:
    # CReLU-like: no layer, no norm; the module σ by its own name, the functional by its caller.
    class Cat(nn.Module):
        def __init__(self, functional: bool) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.act = nn.ReLU()
            self.functional = functional

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            x = torch.cat([x, -x], 1)
            return F.relu(x) if self.functional else self.act(x)

    check(Cat(False), images(*IMAGE), [("act", 0, "relu", None)])
    check(Cat(True), images(*IMAGE), [(":relu", 0, "relu", None)])
    check(nn.Sequential(Cat(True)), images(*IMAGE), [("0:relu", 0, "relu", None)])


def test_a_cat_along_another_axis_keeps_the_filters() -> None:
    class Batches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.conv(x).chunk(2, 0)
            return F.relu(torch.cat([b, a], 0))

    check(Batches(), images(*IMAGE), [("conv", 0, "relu", range(4))])


@pytest.mark.parametrize("functional", [False, True])
def test_se_gates_belong_to_their_own_layers(functional: bool) -> None:
    # relu receives fc1's filters, sigmoid fc2's; the gate then scales conv's filters, and the last
    # relu receives them.
    class SE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
            self.fc1, self.fc2 = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
            self.lin1, self.lin2 = nn.Linear(6, 2), nn.Linear(2, 6)
            self.relu, self.gate = nn.ReLU(inplace=True), nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.conv(x))
            if functional:
                s = x.mean((2, 3))
                s = torch.sigmoid(self.lin2(F.relu(self.lin1(s), inplace=True)))
                return F.relu(x * s[:, :, None, None])
            s = F.adaptive_avg_pool2d(x, 1)
            return self.relu(x * self.gate(self.fc2(self.relu(self.fc1(s)))))

    first, second = ("lin1", "lin2") if functional else ("fc1", "fc2")
    check(
        SE(),
        images(*IMAGE),
        [
            (first, 0, "relu", range(2)),
            (second, 0, "sigmoid", range(6)),
            ("conv", 0, "relu", range(6)),
        ],
    )


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_convolutions_of_every_dimension(dims: int, transposed: bool, batched: bool) -> None:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    model = nn.Sequential(kind(2, 5, 3), nn.ReLU(inplace=True))
    shape = (*([3] if batched else []), 2, *[5] * dims)
    check(model, images(*shape), [("0", 0, "relu", range(5))])
    with capture(model) as maps:
        for (x,) in images(*shape):
            model(x)
            assert maps["0"].filter_dim == (1 if batched else 0)
            assert maps["0"].shape[maps["0"].filter_dim] == 5


def test_bilinear() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear = nn.Bilinear(3, 4, 5)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.tanh(self.bilinear(a, b))

    passes = [(torch.randn(2, 3), torch.randn(2, 4)) for _ in range(3)]
    check(Pair(), passes, [("bilinear", 0, "tanh", range(5))])


# -- shapes that move ----------------------------------------------------------------------------


def test_levit_flattens_before_its_norm() -> None:
    # LeViT's LinearNorm: linear -> flatten(0, 1) -> BatchNorm1d -> reshape_as -> Hardswish.
    class LinearNorm(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.c, self.bn = nn.Linear(i, o, bias=False), nn.BatchNorm1d(o)

        def forward(self, x: Tensor) -> Tensor:
            x = self.c(x)
            return self.bn(x.flatten(0, 1)).reshape_as(x)

    model = nn.Sequential(LinearNorm(3, 6), nn.Hardswish(), LinearNorm(6, 4), nn.Hardswish())
    check(
        model,
        images(2, 5, 3),
        [("0.c", 0, "hardswish", range(6)), ("2.c", 0, "hardswish", range(4))],
    )


def test_pvt_and_segformer_mix_ffn() -> None:
    # linear (B, N, C) -> transpose, view (B, C, H, W) -> depthwise conv -> flatten, transpose ->
    # GELU: the depthwise convolution is the nearest layer; and without it, the linear.
    class MixFFN(nn.Module):
        def __init__(self, depthwise: bool) -> None:
            super().__init__()
            self.fc1 = nn.Linear(3, 6)
            self.dwconv = nn.Conv2d(6, 6, 3, padding=1, groups=6) if depthwise else nn.Identity()
            self.act = nn.GELU()
            self.fc2 = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            b, _n, _ = x.shape
            x = self.fc1(x)
            x = x.transpose(1, 2).view(b, 6, 4, 4)
            x = self.dwconv(x)
            x = x.flatten(2).transpose(1, 2)
            return self.fc2(self.act(x))

    check(MixFFN(True), images(2, 16, 3), [("dwconv", 0, "gelu", range(6))])
    check(MixFFN(False), images(2, 16, 3), [("fc1", 0, "gelu", range(6))])


def along(road: Any, sigma: Any) -> Any:
    """Six filters on the last axis, which go along a road to σ."""

    class Road(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            return sigma(road(self.fc(x)))

    return Road()


@pytest.mark.parametrize(
    "road",
    [
        lambda x: x.permute(0, 3, 1, 2),
        lambda x: x.permute(dims=(0, 3, 1, 2)),
        lambda x: torch.permute(x, (0, 3, 1, 2)),
        lambda x: x.movedim(-1, 1),
        lambda x: torch.moveaxis(x, 3, 1),
        lambda x: x.transpose(-1, 0),
        lambda x: torch.transpose(x, dim0=1, dim1=3),
        lambda x: x.swapaxes(1, 3),
        lambda x: x.mT,
        lambda x: x.view(2, 2, 2, 2, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6),  # Swin
        lambda x: torch.roll(x, (1, 1), (1, 2)),
        lambda x: x.roll(shifts=(1, 1), dims=(1, 2)),
        lambda x: x.flip(1),
        lambda x: x[:, 1:],
        lambda x: x[:, None],
        lambda x: x[..., None, :],
        lambda x: x[0],
        lambda x: x[:, 0],
        lambda x: x[:, [0, 2]],
        lambda x: x[torch.tensor([True, False])],
        lambda x: x.unsqueeze(0),
        lambda x: x.unsqueeze(-1),
        lambda x: x.flatten(0, 2),
        lambda x: x.reshape(-1, 6),
        lambda x: x.view(2, -1, 6),
        lambda x: x.unflatten(1, (2, 2)),
        lambda x: x.contiguous().clone(),
        lambda x: x.double(),
        lambda x: x.to(torch.float64),
        lambda x: x.expand(2, 2, 4, 4, 6),
        lambda x: x.repeat(1, 1, 1, 1),
        lambda x: x.mean(1),
        lambda x: x.mean((1, 2)),
        lambda x: x.mean(dim=[1, 2], keepdim=True),
        lambda x: x.sum(1),
        lambda x: x.amax(1),
        lambda x: x.max(1)[0],
        lambda x: x.max(dim=1).values,
        lambda x: x.narrow(1, 0, 2),
        lambda x: x.select(1, 0),
        lambda x: x.split(2, 1)[0],
        lambda x: x.unbind(1)[0],
        lambda x: x * 0.5 + 1.0,
        lambda x: 1 - x,
        lambda x: x / 2,
        lambda x: x - x.mean(-1, keepdim=True),
        lambda x: x * torch.ones(6),
        lambda x: torch.einsum("bhwc->bchw", x),
        lambda x: F.layer_norm(x, (6,)),
        lambda x: F.normalize(x, dim=-1),
        lambda x: F.pad(x, (0, 0, 1, 1)),
        lambda x: x.index_select(1, torch.tensor([0, 1])),
        lambda x: torch.stack([x, x]),
        lambda x: torch.cat([x, x], 1),
        lambda x: x.type(torch.float64),
        lambda x: x.to(torch.float64, memory_format=torch.preserve_format),
        lambda x: x.masked_fill(x > 1, 0.0),
        lambda x: torch.where(x > 1, x, torch.zeros_like(x)),
        lambda x: x.clamp(-1, 1),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.squeeze(0),
        lambda x: x.requires_grad_() if x.is_leaf else x,
    ],
)
def test_reshapes_and_permutes_keep_the_filters(road: Any) -> None:
    # A linear layer on (2, 4, 4, 3): 6 filters on the last axis; wherever the road takes it, each
    # filter of the map must be that filter of the same road from the linear's output. A road that
    # cannot be followed may say so (no layer, no filters), but never a wrong number.
    model = along(road, torch.tanh)
    known = road(torch.zeros(2, 4, 4, 6)).dim() and "einsum" not in str(road.__code__.co_names)
    check(model, images(2, 4, 4, 3), [("fc", 0, "tanh", range(6))] if known else None)
    with capture(model) as maps:
        for (x,) in images(2, 4, 4, 3):
            model(x)
            for fm in maps:
                if fm.layer == "fc" and fm.kind == "activation" and fm.filters is not None:
                    assert fm.shape[fm.filter_dim] == 6


@pytest.mark.parametrize(
    ("road", "filters"),
    [
        (lambda x: x[..., :2], range(2)),
        (lambda x: x[..., 2:], range(2, 6)),
        (lambda x: x[..., ::2], range(0, 6, 2)),
        (lambda x: x[..., -2:], range(4, 6)),
        (lambda x: x[:, :, :, 1:3], range(1, 3)),
        (lambda x: x.chunk(2, -1)[1], range(3, 6)),
        (lambda x: torch.chunk(x, 2, dim=3)[0], range(3)),
        (lambda x: x.split([1, 2, 3], dim=-1)[2], range(3, 6)),
        (lambda x: torch.split(x, 2, -1)[1], range(2, 4)),
        (lambda x: x.tensor_split(3, -1)[2], range(4, 6)),
        (lambda x: x.narrow(-1, 4, 2), range(4, 6)),
        (lambda x: x.unflatten(-1, (2, 3))[..., 1, :], range(3, 6)),
        (lambda x: x.unflatten(-1, (2, 3)).select(-2, 1), range(3, 6)),
        (lambda x: x.unflatten(-1, (2, 3)).unbind(-2)[1], range(3, 6)),
        (lambda x: x.view(2, 4, 4, 3, 2)[..., 1], range(1, 6, 2)),
        (lambda x: x.chunk(2, -1)[1].chunk(3, -1)[2], range(5, 6)),
        (lambda x: x.permute(3, 0, 1, 2)[1:3], range(1, 3)),
        (lambda x: x.permute(3, 0, 1, 2).flatten(1)[2:4].t(), range(2, 4)),
    ],
)
def test_parts_of_the_filters_are_numbered_as_in_the_layer(road: Any, filters: range) -> None:
    model = along(road, F.silu)
    check(model, images(2, 4, 4, 3), [("fc", 0, "silu", filters)])
    # Independently: filter k alone, set to 100 by the bias, is the one that is large.
    for k in filters:
        with torch.no_grad():
            model.fc.bias.zero_()
            model.fc.bias[k] = 100.0
        with capture(model) as maps:
            for (x,) in images(2, 4, 4, 3, n=2):
                model(x)
                for fm in maps["fc"]:
                    assert bool((fm.tensor > 50).all()) == (fm.filter == k)


@pytest.mark.parametrize(
    "road",
    [
        lambda x: x.flip(-1),
        lambda x: x.roll(1, -1),
        lambda x: x[..., [1, 0, 2, 3, 4, 5]],
        lambda x: x[..., torch.tensor([1, 0, 2, 3, 4, 5])],
        lambda x: x.index_select(-1, torch.tensor([1, 0, 2, 3, 4, 5])),
        lambda x: x.flatten(2),
        lambda x: x.reshape(2, 96),
        lambda x: x.reshape(2, 6, 16),
        lambda x: x.transpose(1, 3).flatten(1).reshape(2, 16, 6),
        lambda x: x.sum(-1),
        lambda x: x.mean(-1, keepdim=True),
        lambda x: x.cumsum(-1),
        lambda x: x.cummax(-1)[0],
        lambda x: F.pad(x, (1, -1)),
        lambda x: F.max_pool2d(x, 3, 1, 1),
        lambda x: F.adaptive_max_pool1d(x.flatten(1, 2), 6),
        lambda x: x.roll(1),
        lambda x: x.T.reshape(2, 4, 4, 6),
        lambda x: x.sort(-1)[0],
        lambda x: x.topk(6, -1)[0],
        lambda x: x @ torch.randn(6, 6),
        lambda x: x.repeat(1, 1, 1, 2),
        lambda x: x.repeat_interleave(2, -1),
        lambda x: torch.cat([x, x], -1),
        lambda x: torch.cat([x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1),
        lambda x: F.pad(x, (1, 1)),
        lambda x: F.avg_pool1d(x.flatten(1, 2), 2),
        lambda x: F.max_pool1d(x.flatten(1, 2), 3, 1, 1),
        lambda x: F.interpolate(x.flatten(1, 2), scale_factor=2),
        lambda x: F.pixel_shuffle(x.permute(0, 3, 1, 2)[:, :4], 2),
        lambda x: F.fold(x.flatten(1, 2).mT[:, :4], (5, 5), 2),
        lambda x: F.unfold(x.permute(0, 3, 1, 2), 2),
        lambda x: torch.fft.rfft(x).real,
        lambda x: torch.gather(x, -1, torch.zeros(2, 4, 4, 6, dtype=torch.long)),
        lambda x: torch.take_along_dim(x, x.argsort(-1), -1),
        lambda x: x.as_strided((2, 4, 4, 6), (96, 24, 1, 4)),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.diff(dim=-1),
        lambda x: x.unfold(-1, 3, 1),
        lambda x: torch.rot90(x, 1, (2, 3)),
        lambda x: x.outer(x) if x.dim() == 1 else torch.kron(x, torch.ones(2)),
        lambda x: torch.stack([x[..., 0], x[..., 1]], -1),
    ],
)
def test_mixed_or_reordered_filters_are_never_called_by_number(road: Any) -> None:
    # Filter k of the layer, made large by its bias, must be what the map calls filter k, or else
    # the map must not number filters at all.
    model = along(road, torch.tanh)
    torch.manual_seed(0)
    check(model, images(2, 4, 4, 3, n=3), train=False)
    with torch.no_grad():
        model.fc.bias.copy_(torch.arange(6.0))
        model.fc.weight.zero_()  # the output is the filter's number everywhere
    with capture(model, kinds="preactivation") as maps:
        for (x,) in images(2, 4, 4, 3):
            model(x)
            (z,) = [fm for fm in maps if fm.nonlinearity]
            if z.filters is not None and z.layer == "fc":
                for fm in z:
                    assert bool((fm.tensor == fm.filter).all()), (fm, z.filters, z.filter_dim)


# -- attention -----------------------------------------------------------------------------------


def test_multihead_attention_projections_have_their_names() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.fc(self.attn(x, x, x)[0]))

    model = Block()
    check(model, images(2, 5, 8), [("fc", 0, "gelu", range(16))])
    with capture(model, kinds=("response", "activation")) as maps:
        for (x,) in images(2, 5, 8):
            out = model(x)
            assert maps.layers == ["attn.in_proj", "attn.out_proj", "fc"]
            # q, k and v in one product: the weight has 24 rows.
            assert maps["attn.in_proj", "response"].filters == range(24)
            assert maps["attn.out_proj", "response"].filters == range(8)
            want = F.linear(x, model.attn.in_proj_weight, model.attn.in_proj_bias)
            torch.testing.assert_close(
                maps["attn.in_proj", "response"].tensor.reshape(-1, 24).sort(0)[0],
                want.reshape(-1, 24).sort(0)[0],
            )
    assert out.shape == (2, 5, 16)


def test_multihead_attention_with_other_sizes_of_k_and_v() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.relu(self.attn(q, k, v, need_weights=False)[0])

    model = Block()
    passes = [(torch.randn(2, 5, 8), torch.randn(2, 3, 6), torch.randn(2, 3, 4)) for _ in range(3)]
    check(model, passes, [("attn.out_proj", 0, "relu", range(8))])
    with capture(model, kinds="response") as maps:
        for p in passes:
            model(*p)
            assert maps.layers == ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"]


def test_cross_attention_slices_in_proj() -> None:
    # q from one input, k and v from another: F._in_projection_packed splits the weight in two
    # products; both are calls of in_proj.
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, q: Tensor, kv: Tensor) -> Tensor:
            return torch.relu(self.attn(q, kv, kv, need_weights=False)[0])

    model = Block()
    passes = [(torch.randn(2, 5, 8), torch.randn(2, 3, 8)) for _ in range(3)]
    check(model, passes, [("attn.out_proj", 0, "relu", range(8))])
    with capture(model, kinds="response") as maps:
        for q, kv in passes:
            model(q, kv)
            found = maps.select(layer="attn.in_proj")
            assert [(fm.call, fm.shape[-1]) for fm in found] == [(0, 8), (1, 16)]
            # Filters of in_proj are its 24 rows: the second product holds 8 to 23.
            for fm in found:
                assert fm.filters is None or fm.filters == (range(8), range(8, 24))[fm.call]


def test_fused_qkv_and_a_relu_on_q() -> None:
    # One linear of 3 * heads * size = 24 filters; (B, N, 3, H, D) permuted to (3, B, H, N, D); q is
    # the first 8 filters, k the next, split over two axes (heads, size): no single filter axis, but
    # still qkv's.
    class Linear(nn.Module):
        def __init__(self, merge: bool) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.proj = nn.Linear(8, 8)
            self.merge = merge

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0) if self.merge else (qkv[0], qkv[1], qkv[2])
            q, k = torch.relu(q), F.relu(k)
            out = q @ (k.transpose(-2, -1) @ v)
            return F.gelu(self.proj(out.transpose(1, 2).reshape(b, n, 8)))

    for merge in (False, True):
        check(
            Linear(merge),
            images(2, 5, 8),
            [("qkv", 0, "relu", None), ("qkv", 0, "relu", None), ("proj", 0, "gelu", range(8))],
        )


def test_fused_qkv_merged_again_has_filter_numbers() -> None:
    # relu on k only, in the layout (B, N, heads * size): filters 8 to 15.
    class K(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            k = self.qkv(x).view(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)[1]
            return torch.relu(k.transpose(1, 2).reshape(b, n, 8))

    check(K(), images(2, 5, 8), [("qkv", 0, "relu", range(8, 16))])


# -- gates ---------------------------------------------------------------------------------------


def test_swiglu_with_separate_and_with_fused_projections() -> None:
    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(4, 6), nn.Linear(4, 6)
            self.down_proj = nn.Linear(6, 4)
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    class Fused(nn.Module):
        def __init__(self, gate: int) -> None:
            super().__init__()
            self.w12, self.w3, self.gate = nn.Linear(4, 12), nn.Linear(6, 4), gate

        def forward(self, x: Tensor) -> Tensor:
            x1, x2 = self.w12(x).chunk(2, dim=-1)
            if self.gate == 0:
                return self.w3(F.silu(x1) * x2)
            return self.w3(x1 * F.silu(x2))

    check(Separate(), images(2, 5, 4), [("gate_proj", 0, "silu", range(6))])
    check(Fused(0), images(2, 5, 4), [("w12", 0, "silu", range(6))])
    # The gate is the second half: filters 6 to 11 of w12.
    check(Fused(1), images(2, 5, 4), [("w12", 0, "silu", range(6, 12))])


def test_geglu_as_diffusers_writes_it() -> None:
    # hidden, gate = proj(x).chunk(2, -1); hidden * gelu(gate): filters 6 to 11.
    class GEGLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 12)

        def gelu(self, gate: Tensor) -> Tensor:
            return F.gelu(gate)

        def forward(self, x: Tensor) -> Tensor:
            hidden, gate = self.proj(x).chunk(2, dim=-1)
            return hidden * self.gelu(gate)

    check(nn.Sequential(GEGLU()), images(2, 4), [("0.proj", 0, "gelu", range(6, 12))])


@pytest.mark.parametrize("functional", [False, True])
def test_glu_keeps_the_first_half(functional: bool) -> None:
    # glu(z) = z1 * sigmoid(z2): z has all 12 filters; entry i of a goes by filter i.
    class Glu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.glu = nn.Linear(4, 12), nn.GLU()

        def forward(self, x: Tensor) -> Tensor:
            return F.glu(self.fc(x), dim=-1) if functional else self.glu(self.fc(x))

    model = Glu()
    check(model, images(2, 4), [("fc", 0, "glu", range(6))])
    with capture(model) as maps:
        for (x,) in images(2, 4):
            model(x)
            assert maps["fc", "preactivation"].filters == range(12)


def test_gated_recurrence_by_hand() -> None:
    # A hand-written LSTM cell: four chunks of one linear's 4 * 3 filters, one step per time; `call`
    # counts the calls of the linear, the steps of time. Then tanh(c), which comes
    # from a sum whose first operand is f * c: sigmoid's output, no layer's.
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 12)

        def forward(self, x: Tensor) -> Tensor:
            h = c = x.new_zeros(x.shape[0], 3)
            for t in range(2):
                i, f, g, o = self.fc(torch.cat([x[:, t], h], 1)).chunk(4, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            return h

    expected = []
    for t in range(2):
        expected += [
            ("fc", t, "sigmoid", range(3, 6)),
            ("fc", t, "sigmoid", range(3)),
            ("fc", t, "tanh", range(6, 9)),
            ("fc", t, "sigmoid", range(9, 12)),
            (":tanh", t, "tanh", None),
        ]
    check(Cell(), images(2, 2, 2))
    model = Cell()
    with capture(model) as maps:
        for (x,) in images(2, 2, 2):
            model(x)
            assert [t[:3] for t in tags(maps)] == [t[:3] for t in expected]
            for got, want in zip(tags(maps), expected, strict=True):
                # Of what has no layer, entries are numbered from 0 or not at all.
                assert got[3] == want[3] or (want[3] is None and got[3] == range(3))


# -- calls ---------------------------------------------------------------------------------------


def test_calls_of_a_layer_are_numbered() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.act(self.fc(x))
            return x

    check(Loop(), images(2, 4), [("fc", n, "relu", range(4)) for n in range(3)])


def test_siamese() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
            self.head = nn.Linear(2, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            left, right = self.net(a).mean((2, 3)), self.net(b).mean((2, 3))
            return torch.sigmoid(self.head((left - right).abs()))

    passes = [(torch.randn(*IMAGE), torch.randn(*IMAGE)) for _ in range(3)]
    check(
        Siamese(),
        passes,
        [
            ("net.0", 0, "relu", range(4)),
            ("net.0", 1, "relu", range(4)),
            ("head", 0, "sigmoid", range(1)),
        ],
    )


def test_one_relu_for_all_layers() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 7)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.c(self.relu(self.b(self.relu(self.a(x))))))

    check(
        Shared(),
        images(2, 4),
        [(n, 0, "relu", range(k)) for n, k in (("a", 5), ("b", 6), ("c", 7))],
    )


def test_two_nonlinearities_on_one_response() -> None:
    # Both receive fc's filters, in the same call of fc.
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.fc(x)
            return torch.tanh(z) + torch.sigmoid(z)

    check(Two(), images(2, 4), [("fc", 0, "tanh", range(4)), ("fc", 0, "sigmoid", range(4))])


def test_a_nonlinearity_of_a_nonlinearity_has_no_layer() -> None:
    # σ2(σ1(z)): what σ2 receives is no filter's response, but the activation: "act2" by itself.
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh())
    with capture(model) as maps:
        first = []
        for (x,) in images(2, 4):
            model(x)
            first.append(tags(maps))
    assert first[0] == first[1] == first[2]
    assert first[0][0] == ("0", 0, "relu", range(4))
    assert first[0][1][:3] == ("2", 0, "tanh")


def test_wrapped_submodules_are_called_by_their_first_name() -> None:
    # named_modules() gives a shared module one name: its first.
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU())
    check(model, images(2, 4), [("0", 0, "relu", range(4)), ("0", 1, "relu", range(4))])


# -- weights used functionally -------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        shape = {"conv": (6, 3, 3, 3), "linear": (6, 4), "transposed": (3, 6, 2, 2)}.get(
            how, (4, 6)
        )
        if how == "einsum heads":
            shape = (4, 2, 3)
        self.kernel = nn.Parameter(torch.randn(*shape))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        w = self.kernel
        match self.how:
            case "conv":
                x = F.conv2d(x, w, self.bias)
            case "transposed":
                x = F.conv_transpose2d(x, w)
            case "linear":
                x = F.linear(x, w, bias=self.bias)
            case "matmul":
                x = x @ w + self.bias
            case "torch.matmul":
                x = torch.matmul(x, w)
            case "addmm":
                x = torch.addmm(self.bias, x.view(-1, 4), w).view(*x.shape[:-1], 6)
            case "mm":
                x = torch.mm(x.flatten(0, 1), w)
            case "einsum":
                x = torch.einsum("bnd,df->bnf", x, w)
            case "einsum heads":
                x = torch.einsum("bnd,dhf->bnhf", x, w).flatten(-2)
            case "tensordot":
                x = torch.tensordot(x, w, dims=([2], [0]))
            case "detached":
                x = x @ w.detach()
            case "cast":
                x = x.double() @ w.double()
            case "normalized":
                x = x @ F.normalize(w, dim=0)
            case "masked":
                x = x @ (w * (w.abs() > 0.1))
            case "transposed view":
                x = F.linear(x, w.t())
        return F.relu(x)


@pytest.mark.parametrize(
    "how",
    [
        *("conv", "transposed", "linear", "matmul", "torch.matmul", "addmm", "mm", "einsum"),
        *("tensordot", "detached", "cast", "normalized", "masked", "transposed view"),
    ],
)
def test_functional_weights_go_by_their_owner(how: str) -> None:
    # The parameter is its owner's only weight of two dimensions or more: the owner's name. At the
    # top that name is "", in a Sequential "0".
    shape = IMAGE if how in ("conv", "transposed") else (2, 5, 4)
    for train in (True, False) if how != "detached" else (False,):
        check(Functional(how), images(*shape), [("", 0, "relu", range(6))], train=train)
        nested = nn.Sequential(Functional(how))
        check(nested, images(*shape), [("0", 0, "relu", range(6))], train=train)


def test_an_einsum_over_two_weight_axes_never_misnumbers() -> None:
    model = Functional("einsum heads")
    with capture(model) as maps:
        for (x,) in images(2, 5, 4):
            model(x)
            (tag,) = tags(maps)
            assert tag[3] in (None, range(6))


def test_several_weights_of_one_owner_are_told_apart() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(4, 6))
            self.w2 = nn.Parameter(torch.randn(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(F.gelu(x @ self.w1) @ self.w2)

    check(Mlp(), images(2, 4), [("w1", 0, "gelu", range(6)), ("w2", 0, "tanh", range(5))])
    check(
        nn.ModuleDict({"mlp": Mlp()})["mlp"],
        images(2, 4),
        [("w1", 0, "gelu", range(6)), ("w2", 0, "tanh", range(5))],
    )


def test_gpt2_conv1d() -> None:
    pytest.importorskip("transformers")
    from transformers.activations import NewGELUActivation
    from transformers.pytorch_utils import Conv1D

    # addmm(bias, x.view(-1, nx), weight).view(...): the weight is (in, out).
    model = nn.Sequential(Conv1D(6, 4), NewGELUActivation(), Conv1D(4, 6))
    check(model, images(2, 5, 4), [("0", 0, "NewGELUActivation", range(6))])


def test_tied_weights_go_by_the_running_layer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc, self.dec = nn.Linear(4, 4), nn.Linear(4, 4)
            self.dec.weight = self.enc.weight

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.enc(x))
            x = torch.tanh(self.dec(x))
            return torch.sigmoid(F.linear(x, self.enc.weight.t()))

    # The functional use belongs to the parameter's (first) owner: enc's second call.
    check(
        Tied(),
        images(2, 4),
        [
            ("enc", 0, "relu", range(4)),
            ("dec", 0, "tanh", range(4)),
            ("enc", 1, "sigmoid", range(4)),
        ],
    )


def test_weight_norms_and_parametrizations() -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * torch.tanh(w)  # pointwise, but on a weight: no site of the model's maps

    plain = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 6)),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.Linear(6, 5)),
        nn.ReLU(),
        parametrizations.orthogonal(nn.Linear(5, 5)),
        nn.ReLU(),
    )
    for training in (True, False):
        plain.train(training)
        with capture(plain) as maps:
            for (x,) in images(2, 4):
                with Witness(plain) as witness:
                    plain(x)
                assert_captured_exactly_once(maps, witness.runs)
                assert tags(maps) == [
                    ("0", 0, "relu", range(6)),
                    ("2", 0, "relu", range(5)),
                    ("4", 0, "relu", range(5)),
                ]
    with pytest.warns(FutureWarning):
        old = nn.Sequential(old_weight_norm(nn.Conv2d(3, 4, 1)), nn.ReLU(inplace=True))
    with capture(old) as maps:  # its weight is no leaf: the old form cannot be deep-copied
        for (x,) in images(*IMAGE):
            old(x)
            assert tags(maps) == [("0", 0, "relu", range(4))]
    custom = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    parametrize.register_parametrization(custom[0], "weight", Double())
    with capture(custom) as maps:
        seen = []
        for (x,) in images(2, 4):
            custom(x)
            seen.append(tags(maps))
            assert ("0", 0, "relu", range(6)) in seen[-1]
        assert seen[0] == seen[1] == seen[2]


def test_weight_standardised_convolution() -> None:
    class WSConv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
            return F.conv2d(x, w, self.bias, self.stride, self.padding)

    class StdConv(nn.Conv2d):  # timm's: through batch_norm of the reshaped weight
        def forward(self, x: Tensor) -> Tensor:
            w = F.batch_norm(
                self.weight.reshape(1, self.out_channels, -1), None, None, training=True
            ).reshape_as(self.weight)
            return F.conv2d(x, w, self.bias)

    for kind in (WSConv, StdConv):
        model = nn.Sequential(kind(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(inplace=True))
        check(model, images(*IMAGE), [("0", 0, "relu", range(6))])


def test_lora_goes_by_the_first_operand() -> None:
    # base(x) + b(a(x)) * scale: the sum's first operand is base.
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 6)
            self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.base(x) + self.b(self.a(x)) * 0.5)

    check(Lora(), images(2, 4), [("base", 0, "relu", range(6))])


def test_a_scale_in_front_does_not_own_the_sum() -> None:
    # layer scale, gamma first: gamma * x; bias first: b + x. Parameters have no filters.
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 6)
            self.gamma, self.beta = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.beta + self.gamma * self.fc(x))

    check(Scale(), images(2, 4), [("fc", 0, "relu", range(6))])


def test_an_embedding_is_no_filter_layer() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.norm = nn.Embedding(10, 6), nn.LayerNorm(6)
            self.act = nn.GELU()

        def forward(self, i: Tensor) -> Tensor:
            return self.act(self.norm(self.emb(i)))

    passes = [(torch.randint(0, 10, (2, 5)),) for _ in range(3)]
    check(Text(), passes, [("norm", 0, "gelu", range(6))])


def test_no_layer_no_norm_the_caller_and_the_function() -> None:
    # Two inputs, so Mlp is no σ as a whole; the sum of two inputs has no layer. By the caller.
    class Mlp(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.gelu(x + y) * torch.tanh(y)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": Mlp()}) for _ in range(2)])
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = x
            for block in self.blocks:
                y = block["mlp"](x, y)
            return self.head(y)

    labels = ["blocks.0.mlp:gelu", "blocks.0.mlp:tanh", "blocks.1.mlp:gelu", "blocks.1.mlp:tanh"]
    model = Net()
    with capture(model) as maps:
        for (x,) in images(2, 4):
            model(x)
            assert [t[0] for t in tags(maps)] == labels
            assert maps["blocks.0.mlp:gelu"].nonlinearity == "gelu"
    check(model, images(2, 4))


# -- every nonlinearity --------------------------------------------------------------------------


def _modules() -> list[Any]:
    found = []
    for kind, inplace in [
        *((nn.ReLU, True), (nn.ReLU6, True), (nn.ELU, True), (nn.CELU, True), (nn.SELU, True)),
        *((nn.LeakyReLU, True), (nn.RReLU, True), (nn.SiLU, True), (nn.Mish, True)),
        *((nn.Hardswish, True), (nn.Hardsigmoid, True), (nn.Hardtanh, True)),
        *((nn.Sigmoid, False), (nn.Tanh, False), (nn.GELU, False), (nn.LogSigmoid, False)),
        *((nn.Softplus, False), (nn.Softsign, False), (nn.Tanhshrink, False)),
        *((nn.Hardshrink, False), (nn.Softshrink, False), (nn.PReLU, False), (nn.GLU, False)),
    ]:
        found.append(kind())
        if inplace:
            found.append(kind(inplace=True))
    return [
        *found,
        nn.Threshold(0.1, 0.2),
        nn.Threshold(0.1, 0.2, inplace=True),
        nn.GELU(approximate="tanh"),
        nn.PReLU(6),
        nn.Hardtanh(-2, 2),
    ]


def _name(m: nn.Module) -> str:
    special = {
        "LeakyReLU": "leaky_relu",
        "LogSigmoid": "logsigmoid",
    }
    return special.get(type(m).__name__, type(m).__name__.lower())


def test_no_activation_module_of_torch_is_forgotten() -> None:
    ours = {type(m) for m in _modules()}
    theirs = {
        getattr(nn.modules.activation, name)
        for name in nn.modules.activation.__all__
        if "Softmax" not in name and name not in ("Softmin", "MultiheadAttention")
    }
    assert theirs == ours


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("module", _modules(), ids=repr)
def test_modules_of_torch(module: nn.Module, training: bool, grad: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), module).train(training)
    count = 3 if isinstance(module, nn.GLU) else 6
    check(model, images(2, 4), [("0", 0, _name(module), range(count))], train=grad)


FUNCTIONS = {
    "relu": [
        *(F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_, F.relu_),
        *(lambda x: F.relu(x, inplace=True), lambda x: F.relu(x, True), torch.ops.aten.relu),
        *(torch.ops.aten.relu.default, lambda x: F.relu(input=x), torch.ops.aten.relu_),
    ],
    "relu6": [F.relu6, lambda x: F.relu6(x, inplace=True)],
    "hardtanh": [F.hardtanh, F.hardtanh_, lambda x: F.hardtanh(x, -2, 2, True)],
    "sigmoid": [
        *(torch.sigmoid, F.sigmoid, Tensor.sigmoid, Tensor.sigmoid_, torch.sigmoid_),
        *(torch.special.expit,),
    ],
    "tanh": [torch.tanh, F.tanh, Tensor.tanh, Tensor.tanh_, torch.tanh_],
    "elu": [F.elu, F.elu_, lambda x: F.elu(x, 0.5, inplace=True)],
    "celu": [F.celu, torch.celu, torch.celu_, lambda x: F.celu(x, inplace=True)],
    "selu": [F.selu, torch.selu, torch.selu_],
    "leaky_relu": [F.leaky_relu, F.leaky_relu_, lambda x: F.leaky_relu(x, 0.2, True)],
    "silu": [F.silu, lambda x: F.silu(x, inplace=True)],
    "gelu": [F.gelu, lambda x: F.gelu(x, approximate="tanh")],
    "mish": [F.mish, lambda x: F.mish(x, inplace=True)],
    "hardswish": [F.hardswish, lambda x: F.hardswish(x, inplace=True)],
    "hardsigmoid": [F.hardsigmoid, lambda x: F.hardsigmoid(x, inplace=True)],
    "softplus": [F.softplus, lambda x: F.softplus(x, beta=2, threshold=3)],
    "softsign": [F.softsign],
    "softshrink": [F.softshrink],
    "hardshrink": [F.hardshrink, torch.hardshrink, Tensor.hardshrink],
    "tanhshrink": [F.tanhshrink],
    "logsigmoid": [F.logsigmoid],
    "threshold": [lambda x: F.threshold(x, 0.1, 0.2), lambda x: F.threshold_(x, 0.1, 0.2)],
    "rrelu": [F.rrelu, lambda x: F.rrelu(x, training=True), torch.rrelu_],
    "glu": [lambda x: F.glu(torch.cat([x, x], 0), 0)],
}


@pytest.mark.parametrize(
    ("name", "function"), [(name, f) for name, fs in FUNCTIONS.items() for f in fs]
)
@pytest.mark.parametrize("grad", [True, False])
def test_functions_of_torch(name: str, function: Any, grad: bool) -> None:
    # F.softsign and F.tanhshrink are made of other functions: one site all the same.
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.fc(x)) * 1.0

    if name in ("softsign", "tanhshrink"):
        model = Net()
        with capture(model) as maps:
            for (x,) in images(2, 4):
                model(x)
                assert tags(maps) == [("fc", 0, name, range(6))]
                assert torch.equal(function(maps["fc", "preactivation"].tensor), maps["fc"].tensor)
        return
    check(Net(), images(2, 4), [("fc", 0, name, range(6))], train=grad)


# -- written out by hand -------------------------------------------------------------------------


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class SwishMethod(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid().mul_(x)


class SwishInPlace(nn.Module):
    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(x.sigmoid()) if self.inplace else x.mul(x.sigmoid())


class SwishWithModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x)


class BetaSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class HSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.relu6(x + 3.0) / 6.0


class HSwishModule(nn.Module):
    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.relu6 = nn.ReLU6(inplace)

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.relu6(x + 3) / 6)


class HSigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3.0, inplace=True) / 6.0


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.square(F.relu(x))


class Snake(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.alpha * x) ** 2 / (self.alpha + 1e-9)


class Gelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class TanhGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class MishByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(F.softplus(x))


class Sine(nn.Module):
    def __init__(self, w0: float = 30.0) -> None:
        super().__init__()
        self.w0 = w0

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w0 * x)


class Gaussian(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-(x**2))


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, -1, 1)


class WhereAct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.1 * x)


class MaxAct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, 0.1 * x)


class StarReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.relu(x) ** 2 + self.bias


class FReLUish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.weight) + 0.0


class Probing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.sigmoid(x)  # looked at, and not used
        return torch.relu(x)


BY_HAND = [
    *(Swish, SwishInPlace, SwishWithModule, BetaSwish, HSwish, HSwishModule),
    *(HSigmoid, Square, SquaredReLU, Snake, Gelu, TanhGelu, MishByHand, Sine, Gaussian, Clamp),
    *(WhereAct, MaxAct, StarReLU, FReLUish, Probing),
]


def test_an_activation_that_writes_into_its_own_sigmoid() -> None:
    # x.sigmoid().mul_(x): works without gradients only; one σ all the same.
    model = nn.Sequential(nn.Linear(4, 6), SwishMethod(), nn.Linear(6, 2))
    check(model, images(2, 4), [("0", 0, "SwishMethod", range(6))], train=False)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", BY_HAND)
def test_activation_modules_by_hand_are_one_sigma(kind: type[nn.Module], grad: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), kind(), nn.Linear(6, 2))
    check(model, images(2, 4), [("0", 0, kind.__name__, range(6))], train=grad)


def test_the_gelus_of_transformers_are_one_sigma_each() -> None:
    activations = pytest.importorskip("transformers.activations")
    for name in sorted(activations.ACT2FN):
        module = activations.ACT2FN[name]
        if name == "xielu":  # has a CUDA kernel of its own
            continue
        model = nn.Sequential(nn.Linear(4, 6), module, nn.Linear(6, 2))
        model.eval()
        with capture(model) as maps:
            seen = []
            for (x,) in images(2, 4):
                model(x)
                seen.append(tags(maps))
                if name == "linear":
                    assert seen[-1] == []
                    continue
                assert [t[0] for t in seen[-1]] == ["0"], name
                assert seen[-1][0][3] == range(6), name
            assert seen[0] == seen[1] == seen[2], name
        if name != "linear":
            check(model, images(2, 4))


@pytest.mark.parametrize(
    "module",
    [
        *(nn.Softmax(-1), nn.LogSoftmax(-1), nn.Softmin(-1), nn.Dropout(0.5), nn.Identity()),
        *(nn.LayerNorm(6), nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.RMSNorm(6)),
        *(nn.Flatten(), nn.Unflatten(1, (2, 3)), nn.MaxPool1d(2), nn.CosineSimilarity()),
        nn.AlphaDropout(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_what_is_no_nonlinearity(module: nn.Module) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.other = nn.Linear(4, 6), module

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            if isinstance(self.other, nn.CosineSimilarity):
                return self.other(x, x)
            return self.other(x)

    check(Net(), images(2, 4), [])
    check(Net().eval(), images(2, 4), [])


def test_modules_by_hand_that_are_no_nonlinearity() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma + 1

    class RMS(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    class DropPath(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x
            mask = x.new_empty(x.shape[0], 1).bernoulli_(0.5)
            return x.div(0.5) * mask

    class FloorDropPath(nn.Module):  # transformers' and old timm's
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x
            random = 0.5 + torch.rand((x.shape[0], 1), dtype=x.dtype, device=x.device)
            random.floor_()
            return x.div(0.5) * random

    class Neg(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x / 2 + x

    class SoftmaxByHand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            e = torch.exp(x - x.max(-1, keepdim=True)[0])
            return e / e.sum(-1, keepdim=True)

    for kind in (Scale, RMS, DropPath, FloorDropPath, Neg, SoftmaxByHand):
        for training in (True, False):
            model = nn.Sequential(nn.Linear(4, 6), kind(), nn.ReLU()).train(training)
            check(model, images(4, 4), [("0", 0, "relu", range(6))])


def test_blocks_without_weights_that_hold_others_are_no_sigma() -> None:
    # Sequential and a module around two activations on two inputs: each inner one is a site.
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(x) + torch.tanh(y)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.two = nn.Linear(4, 6), nn.Linear(4, 6), Two()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.a(x), self.b(x))

    check(Net(), images(2, 4), [("a", 0, "relu", range(6)), ("b", 0, "tanh", range(6))])


def test_a_gate_module_of_two_inputs_is_not_one_sigma() -> None:
    # xformers' and flash-attention's SwiGLU: forward(x, gate). A second input, by place, keyword or
    # attribute, and a is no function of z alone.
    class Gate(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.how = how
            self.other: Any = None

        def forward(self, x: Tensor, gate: Any = None) -> Tensor:
            if self.how == "tuple":
                gate = gate[0]
            if self.how == "attribute":
                gate, self.other = self.other, None
            return F.silu(x) * gate

    class Net(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.a, self.b, self.gate = nn.Linear(4, 6), nn.Linear(4, 6), Gate(how)
            self.how = how

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            if self.how == "attribute":
                self.gate.other = b
                return self.gate(a)
            if self.how == "keyword":
                return self.gate(a, gate=b)
            return self.gate(a, (b,) if self.how == "tuple" else b)

    for how in ("place", "keyword", "tuple", "attribute"):
        model = Net(how)
        with capture(model) as maps:
            for (x,) in images(2, 4):
                model(x)
                assert tags(maps) == [("a", 0, "silu", range(6))], how
                z, a = maps["a", "preactivation"].tensor, maps["a"].tensor
                assert torch.equal(F.silu(z), a), how


def test_slices_of_a_weight_are_numbered_as_in_the_weight() -> None:
    # One parameter of 12 rows, used in two products.
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(12, 4))

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.w[:5], self.w.split([5, 7])[1]
            return F.relu(F.linear(x, first)).sum() + torch.tanh(x @ second.t())

    model = Sliced()
    check(model, images(2, 4))
    with capture(model) as maps:
        for (x,) in images(2, 4):
            model(x)
            (relu, tanh) = tags(maps)
            assert relu[:3] == ("", 0, "relu")
            assert relu[3] in (range(5), None)
            assert tanh[:3] == ("", 1, "tanh")
            assert tanh[3] in (range(5, 12), None)


def test_register_nonlinearity_and_register_layer() -> None:
    class Maxout(nn.Module):  # halves the units: not found by itself
        def forward(self, x: Tensor) -> Tensor:
            return x.unflatten(-1, (3, 2)).amax(-1)

    class Kernel(nn.Module):  # its weighting is nothing that torch shows
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return (torch.sigmoid(x)[..., None] * self.table).sum(-2)

    model = nn.Sequential(Kernel(), nn.ReLU(), nn.Linear(6, 6), Maxout())
    register_nonlinearity(Maxout, "maxout")
    register_layer(Kernel, -1)
    with capture(model) as maps:
        for (x,) in images(2, 4):
            model(x)
            assert [t[:3] for t in tags(maps)] == [("0", 0, "relu"), ("2", 0, "maxout")]
            assert maps["0"].filters == range(6)
            z, a = maps["2", "preactivation"].tensor, maps["2"].tensor
            assert torch.equal(Maxout()(z), a)


class Halve(nn.Module):
    """Of what it is given, the first half of the rows."""

    def forward(self, w: Tensor) -> Tensor:
        return w[: len(w) // 2]


class WeightsOfChildren(nn.Module):
    """Unproven, and what it weights with comes from proven children: rows of tables, a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.near = nn.Linear(4, 4), nn.Embedding(5, 4)
        self.w1, self.w2 = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(10, 3))
        self.halve = Halve()

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        n = torch.arange(x.shape[1])
        q = self.q(x)
        near = torch.einsum("bld,lrd->blr", q, self.near((n[:, None] - n).abs())).relu()
        first = torch.tanh(q @ self.halve(self.w1).t())
        return near.sum() + torch.tanh(first @ self.halve(self.w2).t()[:3])


def test_a_weight_that_a_child_returns_is_one_in_every_pass() -> None:
    # Rows of a table, looked up, stand for no filters: their map goes by the table's owner.
    torch.manual_seed(0)
    model = WeightsOfChildren().eval()
    with torch.no_grad(), capture(model) as maps:
        for (x,) in images(2, 3, 4, n=4):
            model(x)
            layers = [t[0] for t in tags(maps)]
            assert layers == ["near", "w1", "w2"]


def test_sigma_of_a_parameter_is_a_weight() -> None:
    # softplus(rho) of a Bayesian layer; x @ w has its filters along w's last axis.
    class Positive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rho = nn.Parameter(torch.randn(4, 6))
            self.act, self.sigma = nn.ReLU(), nn.Softplus()
            self.tau = nn.Parameter(torch.randn(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(x @ F.softplus(self.rho))
            return torch.tanh(x @ self.sigma(self.tau))

    torch.manual_seed(0)
    model = Positive()
    check(model, images(3, 4))
    with capture(model) as maps:
        for (x,) in images(3, 4):
            model(x)
            assert ("rho", 0, "relu", range(6)) in tags(maps)
            assert ("tau", 0, "tanh", range(5)) in tags(maps)


class IBN(nn.Module):
    """IBN-Net: one half of a layer's filters through an instance norm, the other through a batch
    norm, and together again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)
        self.instance, self.batch = nn.InstanceNorm2d(2, affine=True), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        one, two = torch.split(self.a(x), [2, 4], 1)
        x = F.relu(torch.cat([self.instance(one.contiguous()), self.batch(two)], 1))
        y = self.b(x)
        swapped = torch.tanh(torch.cat([y[:, 3:], y[:, :3]], 1))  # no order to count filters by
        return swapped + torch.sigmoid(torch.cat([y, y], 1)[:, :6])


def test_filters_that_were_split_and_joined_again_are_their_layers() -> None:
    torch.manual_seed(0)
    expected = [("a", 0, "relu", range(6)), (":tanh", 0, "tanh", None)]
    check(IBN(), images(*IMAGE), [*expected, (":sigmoid", 0, "sigmoid", None)])


class Fourier(nn.Module):
    """A Fourier layer: its filters are the last index of a complex weight."""

    def __init__(self, along: str) -> None:
        super().__init__()
        self.stem, self.skip = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
        self.w = nn.Parameter(torch.randn(4, 5, 3, 3, dtype=torch.cfloat))
        self.along = along

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.along == "positions":
            seen = torch.fft.rfft2(x)
            low = torch.einsum("nixy,ioxy->noxy", seen[:, :, :3, :3], self.w)
            full = seen.new_zeros(len(x), 5, *seen.shape[2:])
            full[:, :, :3, :3] = low
            return F.gelu(torch.fft.irfft2(full, s=x.shape[-2:]) + self.skip(x))
        if self.along == "filters":
            return F.gelu(torch.fft.fft(x, dim=1).real)
        if self.along == "all":
            return F.gelu(torch.fft.fftn(x).real)
        return F.gelu(torch.fft.irfft(torch.fft.rfft(x, 9)[..., :4], n=8))


@pytest.mark.parametrize(
    ("along", "tag"),
    [
        ("positions", ("", range(5))),  # the model itself owns the one weight
        ("last", ("stem", range(4))),
        ("filters", (":gelu", None)),
        ("all", (":gelu", None)),
    ],
)
def test_a_fourier_transform_keeps_the_filters_it_does_not_mix(along: str, tag: Any) -> None:
    torch.manual_seed(0)
    check(Fourier(along), images(*IMAGE), [(tag[0], 0, "gelu", tag[1])])


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has it from 2.10 on")
def test_a_grouped_product_is_a_layer() -> None:
    # Rows 0-3 by expert 0, rows 4-7 by expert 1: along the last axis, filters of both lie together.
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (
                nn.Parameter(torch.randn(2, 16, 8)),
                nn.Parameter(torch.randn(2, 8, 8)),
            )

        def forward(self, x: Tensor) -> Tensor:
            ends = torch.tensor([4, 8], dtype=torch.int32)
            gate, up = F.grouped_mm(x, self.up.transpose(-2, -1), offs=ends).chunk(2, -1)
            return torch.tanh(F.grouped_mm(F.silu(gate) * up, self.down, offs=ends))

    torch.manual_seed(0)
    expected = [("up", 0, "silu", None), ("down", 0, "tanh", None)]
    check(Experts(), images(8, 8), expected)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
@pytest.mark.parametrize("normed", [False, True])
def test_what_enters_a_convolution_that_pads_by_itself(mode: str, normed: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
    if normed:
        conv = parametrizations.weight_norm(conv)
    bare = copy.deepcopy(conv)
    model = nn.Sequential(conv, nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    check(model, images(*IMAGE), [("0", 0, "relu", range(4))])
    with torch.no_grad(), capture(model, kinds=("input", "response")) as maps:
        for (x,) in images(*IMAGE):
            model(x)
            assert torch.equal(maps["0", "input"].tensor, x)
            assert torch.equal(maps["0", "response"].tensor, bare(x))


def test_of_two_summands_the_one_that_is_not_broadcast_names_the_sum() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(self.a(x) + self.b(y))

    model = Sum().eval()
    rows = [(4, 1), (4, 1), (1, 4), (5, 1), (1, 7), (1, 4)]
    passes = [(torch.randn(n, 3), torch.randn(m, 3)) for n, m in rows]
    expected = [[("a" if n > m else "b", 0, "relu", range(4))] for n, m in rows]
    check(model, passes, expected, train=False)


class Indexed(nn.Module):
    """Keeps an index of NumPy's, or Python's, and picks places of a layer's output by it."""

    def __init__(self, index: Any) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)
        self.kept = (index,)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)[self.kept[0]])


@pytest.mark.parametrize(
    ("index", "same"),
    [
        (np.array([1, 0]), torch.tensor([1, 0])),
        (np.array([True, False]), torch.tensor([True, False])),
        (np.array(1), 1),
        (np.array([[0, 1], [1, 0]]), torch.tensor([[0, 1], [1, 0]])),
        (range(2), [0, 1]),
        ((slice(None), np.array([1, 0])), (slice(None), [1, 0])),
        ((slice(None), slice(None), (1, 2)), (slice(None), slice(None), [1, 2])),
    ],
)
def test_an_index_of_numpys_is_that_of_torch(index: Any, same: Any) -> None:
    found = []
    for each in (index, same):
        model = Indexed(each)
        with capture(model) as maps:
            model(torch.ones(2, 3, 5))
        found.append([(m.layer, m.kind, m.filter_dim, m.filters) for m in maps])
        assert not [m for m in maps.missed if "failed" in m.reason]
    assert found[0] == found[1]
