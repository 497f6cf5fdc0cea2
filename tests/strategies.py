"""Hypothesis strategies that write models as people do, traps included.

A drawn model is Python source, compiled and kept in `linecache`: what reads a model's source sees
it, and a failing example prints it. Every tensor keeps its shape, so any statement may follow any
other; `x` is the current tensor and `y` one kept from before, often the same memory.
"""

from __future__ import annotations

import itertools
import linecache
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.truth import seed
from tests.zoo import ErfGELU, HandHardSwish, Swish

CHANNELS = 4
SIDE = 5

_INLINE_SIGMAS = (
    "F.relu({})",
    "F.relu({}, inplace=True)",
    "{}.relu()",
    "{}.relu_()",
    "torch.relu({})",
    "torch.tanh({})",
    "{}.tanh_()",
    "torch.sigmoid({})",
    "{}.sigmoid_()",
    "F.gelu({})",
    "F.silu({}, inplace=True)",
    "F.leaky_relu({}, 0.1, inplace=True)",
    "F.elu({}, inplace=True)",
    "F.softplus({})",
    "F.hardswish({})",
    "F.relu6({}, inplace=True)",
    "F.mish({})",
    "F.celu({})",
)
_SIGMA_MODULES = (
    "nn.ReLU()",
    "nn.ReLU(inplace=True)",
    "nn.SiLU(inplace=True)",
    "nn.LeakyReLU(0.1, inplace=True)",
    "nn.ELU(inplace=True)",
    "nn.GELU()",
    "nn.Hardtanh(-0.4, 0.4, inplace=True)",
    "nn.PReLU()",
    "nn.RReLU(inplace=True)",
    "nn.Softsign()",
    "nn.Tanhshrink()",
    "Swish()",
    "HandHardSwish()",
    "ErfGELU()",
    "nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.2))",
)
_LAYERS = {
    "image": (
        "nn.Conv2d(4, 4, 3, padding=1)",
        "nn.Conv2d(4, 4, 1, bias=False)",
        "nn.Conv2d(4, 4, 3, padding=1, groups=2)",
        "nn.ConvTranspose2d(4, 4, 3, padding=1)",
        "nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))",
    ),
    "vector": ("nn.Linear(4, 4)", "nn.Linear(4, 4, bias=False)"),
}
_NORMS = {
    "image": ("nn.BatchNorm2d(4)", "nn.GroupNorm(2, 4)", "nn.InstanceNorm2d(4, affine=True)"),
    "vector": ("nn.LayerNorm(4)",),
}
_QUIET = (  # no nonlinearity: what stands between a layer and its σ, or writes into held memory
    "y = x",
    "y = x.clone()",
    "x = x + y",
    "x = y + x",
    "x += y",
    "y += x; x = y",
    "x = x * 0.9",
    "x.mul_(0.9)",
    "x.add_(0.1)",
    "y.mul_(0.5)",
    "y.zero_()",
    "x = F.dropout(x, 0.3, self.training)",
    "x = x.transpose(-1, -1).contiguous()",
    "x = x.reshape(x.shape)",
    "x = x.view(x.shape)",
    "x[:, :2] = y[:, 2:]",
    "x = torch.stack([x, y]).mean(0)",
    "x = x.detach() if x.shape[0] < 0 else x",
    "x, y = y, x",
    "x = x.flip(0)",
    "x = x.to(x.dtype)",
)


@dataclass
class _Source:
    """The text of one module class while it is drawn."""

    family: str
    parts: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def part(self, constructor: str) -> str:
        name = f"m{len(self.parts)}"
        self.parts[name] = constructor
        return f"self.{name}"

    def text(self, name: str) -> str:
        init = [f"        self.{n} = {c}" for n, c in self.parts.items()]
        body = [f"        {line}" for line in self.lines]
        head = [f"class {name}(nn.Module):", "    def __init__(self):"]
        head += ["        super().__init__()", *init, "    def forward(self, x):", "        y = x"]
        return "\n".join([*head, *body, "        return x", ""])


@dataclass(frozen=True)
class Model:
    """A drawn model: its source, and how to make it and its inputs."""

    source: str
    family: str
    dtype: torch.dtype
    batch: tuple[int, ...]

    def __repr__(self) -> str:
        return f"{self.family} {self.dtype} batch {self.batch}:\n{self.source}"

    def build(self) -> nn.Module:
        """The model, seeded, on its dtype."""
        space: dict[str, Any] = {"nn": nn, "torch": torch, "F": F, "Swish": Swish}
        space |= {"HandHardSwish": HandHardSwish, "ErfGELU": ErfGELU}
        filename = f"<drawn model {next(_serial)}>"
        lines = self.source.splitlines(keepends=True)
        linecache.cache[filename] = (len(self.source), None, lines, filename)
        exec(compile(self.source, filename, "exec"), space)
        seed(0)
        model: nn.Module = space["Net"]()
        return model.to(self.dtype)

    def inputs(self, step: int) -> Tensor:
        """Inputs of pass `step`: other values, so that roads that depend on data change."""
        generator = torch.Generator().manual_seed(step)
        shape = (CHANNELS, SIDE, SIDE) if self.family == "image" else (CHANNELS,)
        x = torch.randn(*self.batch, *shape, generator=generator)
        return (x * (1 + step % 3) + (step % 2) * 0.5).to(self.dtype)


_serial = itertools.count()


@st.composite
def _sigma(draw: st.DrawFn, source: _Source) -> list[str]:
    if draw(st.booleans()):
        code = draw(st.sampled_from(_INLINE_SIGMAS))
        target = draw(st.sampled_from(["x = ", "y = ", "", "x = ", "x = x + "]))
        operand = draw(st.sampled_from(["x", "x", "x", "x", "y", "x[:, :2]", "(x + y)"]))
        if operand == "x[:, :2]":
            return [code.format(operand)]  # a nonlinearity of a view: in place, or for nothing
        return [target + code.format(operand)]
    known = [n for n, c in source.parts.items() if c in _SIGMA_MODULES]
    if known and draw(st.booleans()):  # the same module again, as torchvision's ResNet does
        return [f"x = self.{draw(st.sampled_from(known))}(x)"]
    return [f"x = {source.part(draw(st.sampled_from(_SIGMA_MODULES)))}(x)"]


@st.composite
def _layer(draw: st.DrawFn, source: _Source) -> list[str]:
    layers, norms = _LAYERS[source.family], _NORMS[source.family]
    known = [n for n, c in source.parts.items() if c in layers]
    if known and draw(st.integers(0, 3)) == 0:  # the same layer again
        return [f"x = self.{draw(st.sampled_from(known))}(x)"]
    lines = [f"x = {source.part(draw(st.sampled_from(layers)))}(x)"]
    if draw(st.booleans()):
        lines.append(f"x = {source.part(draw(st.sampled_from(norms)))}(x)")
    return lines


@st.composite
def _dense(draw: st.DrawFn, source: _Source) -> list[str]:
    """DenseNet's way: concatenate, norm, nonlinearity, and a layer that goes back to 4 filters."""
    if source.family == "image":
        norm, mix = source.part("nn.BatchNorm2d(8)"), source.part("nn.Conv2d(8, 4, 1)")
        axis = 1 if draw(st.booleans()) else -3
    else:
        norm, mix = source.part("nn.LayerNorm(8)"), source.part("nn.Linear(8, 4)")
        axis = -1
    return [f"x = {mix}(F.relu({norm}(torch.cat([x, y], {axis})), inplace=True))"]


@st.composite
def _gate(draw: st.DrawFn, source: _Source) -> list[str]:
    """One layer, two nonlinearities, or a gate by another layer."""
    layer = source.part(draw(st.sampled_from(_LAYERS[source.family][:2])))
    other = source.part(draw(st.sampled_from(_LAYERS[source.family][:2])))
    return draw(
        st.sampled_from(
            [
                [f"h = {layer}(x)", "x = torch.tanh(h) * torch.sigmoid(h)"],
                [f"x = F.silu({layer}(x)) * {other}(x)"],
                [f"h = {layer}(x)", "x = h.relu_() + h.tanh()"],
            ]
        )
    )


_STATEMENTS = ("layer", "sigma", "sigma", "quiet", "quiet", "dense", "gate", "block", "road")
_CONDITIONS = ("x.mean() > 0.1", "x.float().abs().max() > 2", "x.sum() < 0", "self.training")


@st.composite
def _statements(draw: st.DrawFn, source: _Source, depth: int, blocks: list[str]) -> list[str]:
    lines: list[str] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(_STATEMENTS))
        if kind == "layer":
            lines += draw(_layer(source)) + draw(_sigma(source))
        elif kind == "sigma":
            lines += draw(_sigma(source))
        elif kind == "quiet":
            lines.append(draw(st.sampled_from(_QUIET)))
        elif kind == "dense":
            lines += draw(_dense(source))
        elif kind == "gate":
            lines += draw(_gate(source))
        elif kind == "block" and blocks:
            lines.append(f"x = {source.part(draw(st.sampled_from(blocks)) + '()')}(x)")
        elif kind == "road" and depth < 1:
            lines += draw(_road(source, depth, blocks))
    return lines or ["pass"]


@st.composite
def _road(draw: st.DrawFn, source: _Source, depth: int, blocks: list[str]) -> list[str]:
    """What depends on the data: a branch, a loop, an early exit."""
    inner = draw(_statements(source, depth + 1, blocks))
    condition = draw(st.sampled_from(_CONDITIONS))
    match draw(st.sampled_from(["if", "else", "loop", "exit"])):
        case "if":
            return [f"if {condition}:", *(f"    {line}" for line in inner)]
        case "else":
            other = draw(_statements(source, depth + 1, blocks))
            body = [f"    {line}" for line in inner]
            return [f"if {condition}:", *body, "else:", *(f"    {line}" for line in other)]
        case "loop":
            count = "int(x.float().abs().sum().nan_to_num(0, 0, 0)) % 3"
            return [f"for _ in range({count}):", *(f"    {line}" for line in inner)]
        case _:
            return [*inner, f"if {condition}:", "    return x"]


@st.composite
def models(draw: st.DrawFn, roads: bool = True) -> Model:
    """Any model; without `roads`, one whose way through does not depend on its data."""
    family = draw(st.sampled_from(["image", "vector"]))
    depth = 0 if roads else 1
    texts, names = [], []
    for n in range(draw(st.integers(0, 2))):
        block = _Source(family)
        # With a layer in it: a module without weights might be one nonlinearity as a whole.
        block.lines = [*draw(_layer(block)), *draw(_statements(block, depth, list(names)))]
        names.append(f"Block{n}")
        texts.append(block.text(names[-1]))
    net = _Source(family)
    # A model starts with a layer: nobody's first statement writes into the user's input.
    first = net.part(draw(st.sampled_from(_LAYERS[family])))
    net.lines = [f"x = {first}(x)", "y = x", *draw(_statements(net, depth, names))]
    net.lines += draw(_layer(net)) + draw(_sigma(net)) + draw(_statements(net, depth, names))
    batch = draw(st.sampled_from([(2,), (1,)] if family == "image" else [(3,), (2, 3), (1,)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
    return Model("\n".join([*texts, net.text("Net")]), family, dtype, batch)
