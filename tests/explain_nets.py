"""Small nets of all sorts for explanations, and what their locations see, found by brute force."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

CHANNELS = 4


class Masked(nn.Conv2d):
    """A convolution that sees what is above and to the left, as in PixelCNN."""

    def __init__(self) -> None:
        super().__init__(CHANNELS, CHANNELS, 3, padding=1)
        mask = torch.ones(1, 1, 3, 3)
        mask[:, :, 1, 2:] = 0
        mask[:, :, 2] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)


class Before(nn.Module):
    """A layer and a ReLU, with something before them."""

    def __init__(self, function: Callable[[Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(self.function(x)))


class Functional(nn.Module):
    """A step written as a function."""

    def __init__(self, name: str, *modules: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.inner = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x)

    def relu_in_place(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=True)

    def residual_in_place(self, x: Tensor) -> Tensor:
        y = self.inner[0](x)
        y += x
        return y

    def beside(self, x: Tensor) -> Tensor:
        # By itself, the norm of values that are tied to each other is a constant.
        if isinstance(self.inner[0], nn.LayerNorm):
            return x + self.inner[0](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.inner[0](x)

    def branches(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, 1)
        return torch.cat([self.inner[0](one), other], 1)

    def pad_before(self, x: Tensor) -> Tensor:
        return F.pad(x, (2, 0, 1, 0))

    def reflect(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 1, 1, 1), mode="reflect")

    def every_other(self, x: Tensor) -> Tensor:
        return x[:, :, ::2, 1:] if x.shape[2] > 2 and x.shape[3] > 2 else x

    def written(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :, 1:] = x[:, :, :-1]
        return y

    def rolled(self, x: Tensor) -> Tensor:
        return x.roll(1, 3)

    def squeeze_excite(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))

    def over_rows(self, x: Tensor) -> Tensor:
        return x * x.softmax(3)

    def running(self, x: Tensor) -> Tensor:
        return x.cumsum(2)

    def flattened(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        scores = tokens @ tokens.transpose(1, 2)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) @ tokens).transpose(1, 2).reshape(x.shape)

    def fused(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)  # attention within each row
        return F.scaled_dot_product_attention(tokens, tokens, tokens, is_causal=True).permute(
            0, 3, 1, 2
        )

    def channels_last(self, x: Tensor) -> Tensor:
        return self.inner[0](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def shuffled(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2)

    def fixed(self, x: Tensor) -> Tensor:
        keep = (torch.arange(x.shape[3]) % 3 > 0).to(x.dtype)
        return x * keep

    def chosen(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.1 * x)

    def largest(self, x: Tensor) -> Tensor:
        return x.sort(2).values

    def sampled(self, x: Tensor) -> Tensor:
        return x.index_select(3, torch.arange(x.shape[3] - 1, -1, -1))

    def outer(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,ncgw->nchg", x, x)

    def unfolded(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, 3, padding=1)
        return columns.reshape(x.shape[0], x.shape[1], 9, *x.shape[2:]).sum(2)

    def spectrum(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x, dim=3).abs()


def _conv(kernel: int, stride: int, padding: int, dilation: int, groups: int) -> nn.Module:
    return nn.Conv2d(
        CHANNELS, CHANNELS, kernel, stride, padding, dilation, groups, padding_mode="zeros"
    )


_small = st.integers(1, 3)
STEPS: st.SearchStrategy[nn.Module] = st.one_of(
    st.builds(
        _conv, _small, _small, st.integers(0, 3), st.integers(1, 2), st.sampled_from([1, 2, 4])
    ),
    st.builds(
        lambda k, s, p: nn.ConvTranspose2d(CHANNELS, CHANNELS, k, s, min(p, k - 1), groups=2),
        _small,
        _small,
        st.integers(0, 1),
    ),
    st.builds(
        lambda k, s, ceil: nn.MaxPool2d(k, s, padding=k // 2, ceil_mode=ceil),
        _small,
        _small,
        st.booleans(),
    ),
    st.builds(
        lambda k, s, ceil: nn.AvgPool2d(k, s, padding=k // 2, ceil_mode=ceil),
        _small,
        _small,
        st.booleans(),
    ),
    st.sampled_from([3, 4]).map(nn.AdaptiveAvgPool2d),
    st.sampled_from([3, 4]).map(nn.AdaptiveMaxPool2d),
    st.sampled_from(
        [
            lambda: Masked(),
            lambda: nn.Upsample(scale_factor=2),
            lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
            lambda: nn.Upsample(scale_factor=1.5, mode="bilinear", align_corners=True),
            lambda: Functional("beside", nn.GroupNorm(2, CHANNELS)),
            lambda: nn.BatchNorm2d(CHANNELS),
            lambda: Functional("beside", nn.InstanceNorm2d(CHANNELS, affine=True)),
            lambda: nn.Conv2d(CHANNELS, CHANNELS, (3, 1), padding=(1, 0), padding_mode="circular"),
            lambda: Functional("residual_in_place", nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)),
            lambda: Functional("branches", nn.Conv2d(2, 2, 5, padding=2)),
            lambda: Functional("channels_last", nn.Linear(CHANNELS, CHANNELS)),
            lambda: Functional("beside", nn.LayerNorm(CHANNELS)),
        ]
    ).map(lambda make: make()),
    st.sampled_from(
        [
            "relu_in_place",
            "pad_before",
            "reflect",
            "every_other",
            "written",
            "rolled",
            "squeeze_excite",
            "over_rows",
            "running",
            "flattened",
            "fused",
            "shuffled",
            "fixed",
            "chosen",
            "largest",
            "sampled",
            "outer",
            "unfolded",
            "spectrum",
        ]
    ).map(Functional),
)


def fitting(steps: list[nn.Module], image: Tensor) -> nn.Sequential:
    """As many of the steps as the image is large enough for, and a convolution at the end."""
    kept: list[nn.Module] = [nn.Conv2d(image.shape[1], CHANNELS, 1)]
    for step in steps:
        trial = nn.Sequential(*kept, step)
        try:
            with torch.no_grad():
                out = trial(image)
        except (RuntimeError, ValueError):
            continue
        if out.numel() == 0 or out.shape[2] * out.shape[3] > 400:
            continue
        kept.append(step)
    return nn.Sequential(*kept, nn.Conv2d(CHANNELS, 3, 1))


def seen(model: nn.Module, image: Tensor) -> Iterator[Tensor]:
    """Which pixels change which location, (H', W', H, W), by changing each pixel in turn.

    In float64, of more and more draws of the weights and of the image: a unit that is dead in one
    is not in all of them.
    """
    height, width = image.shape[2:]
    generator = torch.Generator().manual_seed(0)
    net = copy.deepcopy(model).double()
    found: Tensor | None = None
    while True:
        for parameter in net.parameters():
            parameter.data.normal_(generator=generator)
        base = torch.randn(image.shape, generator=generator, dtype=torch.float64)
        many = base.repeat(height * width, 1, 1, 1)
        for place in range(height * width):
            many[place, :, place // width, place % width] = 8 * torch.randn(
                image.shape[1], generator=generator, dtype=torch.float64
            )
        with torch.no_grad():
            usual, others = net(base), net(many)
        changed = ((others - usual).abs() > 1e-12 * usual.abs().amax()).any(1)
        changed = changed.movedim(0, -1).reshape(*changed.shape[1:], height, width)
        found = changed if found is None else found | changed
        yield found
