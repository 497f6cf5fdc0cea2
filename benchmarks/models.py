"""The models measured, in plain torch, laid out as their well-known originals are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    *("GPT", "BranchingGPT", "BranchingResNet", "ConvNet", "ResNet", "deep_mlp", "small_cnn"),
]


class BasicBlock(nn.Module):
    """torchvision's block: one in-place ReLU used twice, the sum written into bn2's output."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, functional: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = F.relu if functional else nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """torchvision's deeper block: one in-place ReLU used three times."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int, functional: bool) -> None:
        super().__init__()
        wide = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.relu = F.relu if functional else nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != wide:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet-18, or ResNet-50 with `deep`.

    With `functional`, every ReLU is a call of `F.relu` that no module hook sees.
    """

    basic = BasicBlock

    def __init__(self, *, functional: bool = False, deep: bool = False) -> None:
        super().__init__()
        block = Bottleneck if deep else self.basic
        counts = (3, 4, 6, 3) if deep else (2, 2, 2, 2)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = F.relu if functional else nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        inplanes, stages = 64, []
        for n, count in enumerate(counts):
            planes, blocks = 64 * 2**n, []
            for k in range(count):
                stride = 2 if n and not k else 1
                blocks.append(block(inplanes, planes, stride, functional))
                inplanes = planes * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inplanes, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


class BranchingBasicBlock(BasicBlock):
    """The same, behind a branch on what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.isnan(x[0, 0, 0, 0]):
            x = torch.zeros_like(x)
        return super().forward(x)


class BranchingResNet(ResNet):
    """ResNet-18 with a branch on its data in each block."""

    basic = BranchingBasicBlock


class Attention(nn.Module):
    """Causal self-attention with a fused qkv projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(n, t, width))
        return out


class Block(nn.Module):
    """A transformer block, norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT(nn.Module):
    """GPT-2's layout, small."""

    def __init__(
        self, *, layers: int = 6, width: int = 256, heads: int = 4, vocabulary: int = 1024
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(256, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        logits: Tensor = self.lm_head(self.ln_f(x))
        return logits


class BranchingAttention(Attention):
    """The same, behind a branch on what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.isnan(x[0, 0, 0]):
            x = torch.zeros_like(x)
        return super().forward(x)


class BranchingBlock(Block):
    """The same, behind a branch on what it is given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.attn = BranchingAttention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        if torch.isnan(x[0, 0, 0]):
            x = torch.zeros_like(x)
        return super().forward(x)


class BranchingGPT(GPT):
    """GPT with a branch on its data in each block and attention; `transformers` has such code."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(BranchingBlock(256, 4) for _ in range(6))


class ConvNet(nn.Module):
    """No nonlinearity is a module: functions, a method, one in place, one behind a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv5 = nn.Conv2d(64, 128, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x)), inplace=True), 2)
        x = F.gelu(self.conv3(x))
        x = torch.tanh(self.conv4(x) + x)
        x = self.conv5(x).relu_()
        x = F.silu(self.fc1(x.mean((2, 3))))
        logits: Tensor = self.fc2(x)
        return logits


def deep_mlp(layers: int = 200, width: int = 16) -> nn.Module:
    """So many tiny linear layers, each with a ReLU of its own: nothing but dispatch."""
    parts = (part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU()))
    return nn.Sequential(*parts)


def small_cnn() -> nn.Module:
    """Six convolutions with norms and in-place ReLUs."""
    layers: list[nn.Module] = []
    width = 3
    for wider in (16, 16, 32, 32, 64, 64):
        layers += [nn.Conv2d(width, wider, 3, padding=1, stride=1 + (wider > width > 3))]
        layers += [nn.BatchNorm2d(wider), nn.ReLU(inplace=True)]
        width = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
