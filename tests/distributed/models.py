"""Models for every suite, and what their passes are compared by."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture
from tests import truth


class Block(nn.Module):
    """Overwrites the output of its last norm, and the input of each ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


class PreActivation(nn.Module):
    """Its first nonlinearity belongs to a layer outside of it; `out + x`, not in place."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(self.bn(x)))


class Mlp(nn.Module):
    """Weights used functionally, and a nonlinearity of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(6, 4))
        self.w2 = nn.Parameter(torch.randn(4, 6))
        self.gate = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, self.w1)), self.w2) * torch.sigmoid(self.gate)


class Net(nn.Module):
    """Convolutions, a residual sum, functional σ, and a branch on data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer2 = PreActivation()
        self.mlp = Mlp()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        if x.abs().sum() > 1e9:
            x = -x
        return self.fc(torch.tanh(self.mlp(F.relu(x).mean((2, 3)))))


def seeded(make: Any, seed: int = 0) -> Any:
    """The same weights on every rank."""
    torch.manual_seed(seed)
    return make()


def batch(step: int, n: int = 2) -> Tensor:
    """This rank's own images for a step."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(n, 3, 8, 8, generator=generator)


Line = tuple[str, str, int, str | None, Any, str]


def lines(maps: Any) -> list[Line]:
    """What the maps of the latest pass are, all but their values."""
    return [(m.layer, m.kind, m.call, m.nonlinearity, m.filters, m.path) for m in maps]


def assert_same_maps(maps: Any, expected: Any) -> None:
    """The same maps under the same names, with the same bits."""
    assert lines(maps) == lines(expected), f"{lines(maps)} is not {lines(expected)}"
    for mine, other in zip(maps, expected, strict=True):
        assert truth.same_bits(mine.tensor, other.tensor), f"{mine!r} differs"


def plain_maps(model: nn.Module, *args: Tensor, **options: Any) -> tuple[Any, list[truth.Run]]:
    """The maps of the model as it is, unwrapped, and the truth about the pass."""
    rng = torch.get_rng_state()
    _, runs = truth.run_with_truth(model, *args)
    torch.set_rng_state(rng)
    with capture(model, **options) as maps:
        model(*args)
    return maps, runs


def grads(model: nn.Module) -> list[Tensor | None]:
    """Copies of the gradients; of a sharded parameter, of this rank's part."""
    found = []
    for p in model.parameters():
        grad = p.grad
        if grad is not None and hasattr(grad, "to_local"):
            grad = grad.to_local()
        found.append(None if grad is None else grad.detach().clone())
    return found


def assert_same_grads(model: nn.Module, other: nn.Module) -> None:
    """The same gradients, bit for bit, and some at all."""
    mine, theirs = grads(model), grads(other)
    assert any(g is not None for g in mine)
    for n, (left, right) in enumerate(zip(mine, theirs, strict=True)):
        assert (left is None) == (right is None), f"gradient {n}"
        assert left is None or right is None or truth.same_bits(left, right), f"gradient {n}"
