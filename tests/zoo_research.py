"""Research code for the zoo: what papers publish, each written as its authors write it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class _Modulated(nn.Module):
    """StyleGAN2's convolution: its weight is another one for each image of the batch."""

    def __init__(self, inside: int, outside: int, style: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outside, inside, 3, 3))
        self.affine, self.bias = nn.Linear(style, inside), nn.Parameter(torch.zeros(outside))
        self.noise = nn.Parameter(torch.ones([]))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        n, c, h, _ = x.shape
        weight = self.weight[None] * (self.affine(w) + 1)[:, None, :, None, None]
        weight = weight * (weight.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
        x = F.conv2d(x.reshape(1, n * c, h, h), weight.flatten(0, 1), padding=1, groups=n)
        x = x.reshape(n, -1, h, h)
        x = x + torch.randn(n, 1, h, h) * self.noise
        return F.leaky_relu(x + self.bias[:, None, None], 0.2) * math.sqrt(2)


class StyleGAN(nn.Module):
    """A mapping network, a learned constant, two modulated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8), nn.SELU())
        self.constant = nn.Parameter(torch.randn(1, 4, 4, 4))
        self.first, self.second = _Modulated(4, 6, 8), _Modulated(6, 3, 8)

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())
        x = self.first(self.constant.expand(len(z), -1, -1, -1), w)
        return self.second(F.interpolate(x, scale_factor=2, mode="bilinear"), w)


class Discriminator(nn.Module):
    """Spectral norm on every layer, one in-place activation for all."""

    def __init__(self) -> None:
        super().__init__()
        norm = parametrizations.spectral_norm
        self.a, self.b = norm(nn.Conv2d(3, 8, 3, 1, 1)), norm(nn.Conv2d(8, 8, 4, 2, 1))
        self.out, self.act = norm(nn.Linear(8, 1)), nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.b(self.act(self.a(x)))).sum((2, 3)))


class _Coupling(nn.Module):
    def __init__(self, size: int, flip: bool) -> None:
        super().__init__()
        half = size // 2
        self.scale = nn.Sequential(nn.Linear(half, 8), nn.Tanh(), nn.Linear(8, half), nn.Tanh())
        self.shift = nn.Sequential(nn.Linear(half, 8), nn.ReLU(), nn.Linear(8, half))
        self.flip = flip

    def forward(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)[:: -1 if self.flip else 1]
        s, t = self.scale(a), self.shift(a)
        b = (b - t) * (-s).exp() if inverse else b * s.exp() + t
        return torch.cat([b, a] if self.flip else [a, b], 1), s.sum(1)


class RealNVP(nn.Module):
    """A normalizing flow, run forth and back: every layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(_Coupling(6, bool(i % 2)) for i in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z, total = x, x.new_zeros(len(x))
        for step in self.steps:
            z, log_det = step(z, inverse=False)
            total = total + log_det
        back = z
        for step in reversed(self.steps):
            back, _ = step(back, inverse=True)
        return {"z": z, "log_det": total, "back": back}


class NeuralODE(nn.Module):
    """Runge-Kutta: one small network called sixteen times."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4))

    def forward(self, y: Tensor) -> Tensor:
        def f(t: float, y: Tensor) -> Tensor:
            return self.field(torch.cat([y, y.new_full((len(y), 1), t)], 1))

        h = 0.25
        for t in (0.0, 0.25, 0.5, 0.75):
            a = f(t, y)
            b = f(t + h / 2, y + h / 2 * a)
            c = f(t + h / 2, y + h / 2 * b)
            y = y + h / 6 * (a + 2 * b + 2 * c + f(t + h, y + h * c))
        return y


class GraphAttention(nn.Module):
    """Messages by `index_add` and `scatter_add`, weights as raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.zeros(8))
        self.score = nn.Linear(16, 1)
        self.register_buffer("source", torch.tensor([0, 1, 2, 3, 4, 0]))
        self.register_buffer("target", torch.tensor([1, 2, 3, 4, 0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight
        x = F.elu(torch.zeros_like(x).index_add(0, self.target, x[self.source]) + self.bias)
        pairs = torch.cat([x[self.source], x[self.target]], 1)
        e = F.leaky_relu(self.score(pairs), 0.2).exp()
        total = x.new_zeros(len(x), 1).index_add_(0, self.target, e)
        out = x.new_zeros(x.shape)
        where = self.target[:, None].expand(-1, x.shape[1])
        out.scatter_add_(0, where, e / total[self.target] * x[self.source])
        return torch.sigmoid(out)


class Fourier(nn.Module):
    """A Fourier neural operator: complex weights on low frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.skip, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 1, 1)
        self.modes = nn.Parameter(torch.randn(6, 6, 4, 3, dtype=torch.cfloat) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for _ in range(2):
            waves = torch.fft.rfft2(x)
            low = torch.zeros_like(waves)
            low[:, :, :4, :3] = torch.einsum("nixy,ioxy->noxy", waves[:, :, :4, :3], self.modes)
            x = F.gelu(torch.fft.irfft2(low, s=x.shape[-2:]) + self.skip(x))
        return self.out(x)


class Shifted(nn.Module):
    """Attention in shifted windows, and patch merging, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.merge = nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        for shift in (0, 2):
            y = torch.roll(self.norm(x), (-shift, -shift), (1, 2)).view(n, 2, 4, 2, 4, 8)
            y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 8)
            q, k, v = self.qkv(y).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 16, 8)
            y = self.out(y).view(n, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(n, 8, 8, 8)
            x = x + torch.roll(y, (shift, shift), (1, 2))
            x = x + self.mlp(x)
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return F.gelu(self.merge(torch.cat(corners, -1)))


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return grad / (1 + 10 * v.abs()) ** 2


class Spiking(nn.Module):
    """Leaky integrate-and-fire over time; the surrogate gradient is a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.leak = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        v = w = x.new_zeros(1)
        total = x.new_zeros(1)
        for step in x.unbind(0):
            v = torch.sigmoid(self.leak) * v + self.a(step)
            spikes = _Spike.apply(v - 1)
            v = v - spikes.detach()
            w = torch.tanh(self.b(spikes)) + w
            total = total + w
        return total


class LinearAttention(nn.Module):
    """Performer-like features: the same einsum and matmul with weights and without."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.v, self.out = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k = F.elu(x @ self.q) + 1, F.elu(torch.einsum("nld,de->nle", x, self.k)) + 1
        values = torch.einsum("nld,nle->nde", k, x @ self.v)
        scale = 1 / (q @ k.sum(1)[..., None])
        return torch.relu(((q @ values) * scale) @ self.out)


class Bayes(nn.Module):
    """Weights drawn anew in each call, their spread by softplus."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.rho = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(6, 4) - 3)
        self.mix = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mean + F.softplus(self.rho) * torch.randn_like(self.mean)
        return torch.tanh(F.relu(F.linear(x, weight)) @ F.softplus(self.mix))


class Equilibrium(nn.Module):
    """A deep equilibrium model: a fixed point found without gradients, one step with them."""

    def __init__(self) -> None:
        super().__init__()
        self.inject, self.step, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        u = self.inject(x)
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(12):
                z, last = torch.tanh(0.3 * self.step(z) + u), z
                if (z - last).norm() < 1e-2:
                    break
        return self.out(torch.tanh(0.3 * self.step(z) + u))


class _HalfNorm(nn.Module):
    """IBN: one half of the channels by instance, the other by batch, and together again."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.half = channels // 2
        self.one, self.two = nn.InstanceNorm2d(self.half, affine=True), nn.BatchNorm2d(self.half)

    def forward(self, x: Tensor) -> Tensor:
        one, two = torch.split(x, self.half, 1)
        return torch.cat([self.one(one.contiguous()), self.two(two.contiguous())], 1)


def _ibn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), _HalfNorm(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3), _HalfNorm(8), nn.ReLU(inplace=True),
    )  # fmt: skip


RESEARCH: dict[str, Callable[[], Built]] = {
    "stylegan": lambda: (StyleGAN(), (torch.randn(2, 8),), {}),
    "spectral_discriminator": lambda: (Discriminator(), (torch.randn(2, 3, 8, 8),), {}),
    "real_nvp": lambda: (RealNVP(), (torch.randn(4, 6),), {}),
    "neural_ode": lambda: (NeuralODE(), (torch.randn(3, 4),), {}),
    "graph_attention": lambda: (GraphAttention(), (torch.randn(5, 6),), {}),
    "fourier_operator": lambda: (Fourier(), (torch.randn(2, 3, 8, 8),), {}),
    "shifted_windows": lambda: (Shifted(), (torch.randn(2, 8, 8, 8),), {}),
    "spiking": lambda: (Spiking(), (torch.randn(4, 3, 6),), {}),
    "linear_attention": lambda: (LinearAttention(), (torch.randn(2, 5, 8),), {}),
    "bayes": lambda: (Bayes(), (torch.randn(3, 4),), {}),
    "equilibrium": lambda: (Equilibrium(), (torch.randn(3, 6),), {}),
    "ibn": lambda: (_ibn(), (torch.randn(2, 3, 8, 8),), {}),
}
