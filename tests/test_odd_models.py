"""Research code as a stranger writes it: odd control flow, odd aliasing, odd ways to call.

Of each: outputs, gradients and random draws the same bits as of a bare copy, every map right
(against the witness) or named in `missed`, and nothing left behind.
"""

from __future__ import annotations

import copy
import functools
import gc
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmapkit import CaptureWarning, MapOverwrittenError, capture
from tests import truth
from tests.checks import check, images, strayed, strays, tags


def data(n: int = 6) -> list[tuple[Tensor]]:
    """Inputs (4, 4), whose mean is positive in some and negative in others."""
    return [(x + (1.0 if i % 3 == 1 else -1.0),) for i, (x,) in enumerate(images(4, 4, n=n))]


class Two(nn.Module):
    """Two linear layers and what the odd models below do with them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.relu, self.tanh = nn.ReLU(inplace=True), nn.Tanh()


# -- control flow --------------------------------------------------------------------------------


class Branch(Two):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.relu(self.a(x))
        return self.relu(self.b(x))


class BranchOnItem(Two):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.a if x.mean().item() > 0 else self.b
        return torch.tanh(layer(x))


class PickFromList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layers[int(x.argmax()) % 3](x))


class Alternate(Two):
    """A counter in the module: each pass another road."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return self.relu(self.a(x)) if self.n % 2 else self.tanh(self.b(x))


class Closure(Two):
    """The road depends on a global that no attribute shows."""

    state = {"flip": False}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        Closure.state["flip"] = not Closure.state["flip"]
        return self.relu(self.a(x)) if Closure.state["flip"] else self.relu(self.b(x))


class EarlyExit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(inplace=True)) for _ in range(4)
        )
        self.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x)
            out = head(x)
            if out.softmax(-1).max() > 0.7:
                break
        return out


class StochasticDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.training and torch.rand(()) < 0.5:
                continue
            x = x + F.gelu(block(x))
        return x


class WhileLoop(Two):
    """Adaptive computation: as many steps as the data asks for."""

    def forward(self, x: Tensor) -> Tensor:
        n = 0
        while n < 5 and x.abs().max() > 0.3:
            x = self.relu(self.a(x)) * 0.5
            n += 1
        return self.tanh(self.b(x))


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ELU(inplace=True)

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        return x if depth == 0 else self.forward(self.act(self.fc(x)), depth - 1)


class CallsItself(nn.Module):
    """Recursion through __call__: hooks fire at each level."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        return x if depth == 0 else self(self.act(self.fc(x)), depth - 1)


class MoE(nn.Module):
    """Mixtral's: tokens are routed, experts may get none, index_add puts the results together."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.SiLU(inplace=True), nn.Linear(8, 4)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(1, -1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen[:, 0] == k)
            if rows.numel() == 0:
                continue
            out.index_add_(0, rows, expert(x[rows]) * weights[rows])
        return torch.relu(out)


class CatchesErrors(Two):
    """An exception inside a child, caught by the parent."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu_(self.fc(x))
            if x.sum() > 3:
                raise ValueError("too much")
            return torch.sigmoid(x)

    def __init__(self) -> None:
        super().__init__()
        self.picky = self.Picky()

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.picky(x)
        except ValueError:
            return self.relu(self.a(x))


class Generator(Two):
    """A generator inside forward: modules are called between its steps."""

    def steps(self, x: Tensor) -> Iterator[Tensor]:
        for layer in (self.a, self.b):
            x = F.relu(layer(x), inplace=True)
            yield x.clone()

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.tanh(s) for s in self.steps(x))  # type: ignore[return-value]


class ClosedGenerator(Generator):
    def forward(self, x: Tensor) -> Tensor:
        steps = self.steps(x)
        first = next(steps)
        steps.close()
        return self.tanh(first)


class Comprehension(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([f(g(x)) for f, g in ((self.relu, self.a), (self.tanh, self.b))]).sum(0)


class TrainEvalInside(Two):
    """A module that switches a child's mode inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.drop.eval()
            y = self.drop(self.relu(self.a(x)))
            self.drop.train()
        return self.drop(self.tanh(self.b(x))) + y


class Attribute(Two):
    """Passes what it computes by an attribute, not by argument."""

    def forward(self, x: Tensor) -> Tensor:
        self.cache = self.relu(self.a(x))
        out = self.read()
        del self.cache
        return out

    def read(self) -> Tensor:
        return self.tanh(self.b(self.cache))


class Match(Two):
    def forward(self, x: Tensor) -> Tensor:
        match bool(x.sum() > 0):
            case True:
                return self.relu(self.a(x))
            case _:
                return self.tanh(self.a(x))


class BySubmodule(Two):
    """A proven child whose input tells which of the parent's layers it is behind."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.a, self.b) if x.mean() > 0 else (self.b, self.a)
        return self.tanh(second(self.relu(first(x))))


class Shapes(Two):
    """A branch on the shape."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 2:
            return self.relu(self.a(x))
        return self.tanh(self.b(x))


class Swapping(Two):
    """forward replaces its own child."""

    def __init__(self) -> None:
        super().__init__()
        self.act: nn.Module = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.a(x))
        self.act = nn.Tanh() if isinstance(self.act, nn.ReLU) else nn.ReLU()
        return out


class Shuffled(nn.Module):
    """The order of two children changes: taps fire in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for i in torch.randperm(3):
            x = self.act(self.fcs[i](x))
        return x


class SetOrder(nn.Module):
    """A dict of callables, looked up by what the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.table = {0: torch.relu, 1: torch.tanh}

    def forward(self, x: Tensor) -> Tensor:
        return self.table[int(x.sum() > 0)](self.fc(x))


class GetattrByName(Two):
    def forward(self, x: Tensor) -> Tensor:
        return getattr(torch, "relu" if x.sum() > 0 else "sigmoid")(getattr(self, "ab"[0])(x))


class FunctionalByFlag(Two):
    """Attributes of the module that change between passes."""

    slope = 0.1

    def forward(self, x: Tensor) -> Tensor:
        type(self).slope += 0.1
        return F.leaky_relu(self.a(x), self.slope)


class ShortCircuit(Two):
    def forward(self, x: Tensor) -> Tensor:
        flag = (x.mean() > 0) and True
        return self.relu(self.a(x)) if flag else self.tanh(self.a(x))


class ZeroTimes(nn.Module):
    """Loops over a list that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.rounds: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for _ in self.rounds:
            x = torch.relu(self.fc(x))
        self.rounds.append(1)
        return torch.tanh(self.fc(x))


class IsinstanceBranch(Two):
    """A structural test that both goes and does not go through a σ."""

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, tuple):
            return self.relu(self.a(x[0]))
        return self.tanh(self.a(x))


class DefaultArgument(nn.Module):
    """A branch on an argument the parent computes from data."""

    class Inner(Two):
        def forward(self, x: Tensor, flag: bool) -> Tensor:
            return self.relu(self.a(x)) if flag else self.tanh(self.b(x))

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, bool(x.mean() > 0))


class IntArgument(nn.Module):
    """range(n) of an argument; the same kinds of argument in each call."""

    class Inner(Two):
        def forward(self, x: Tensor, n: int) -> Tensor:
            for _ in range(n):
                x = self.relu(self.a(x))
            return x

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, int(x.mean() > 0) + 1)


class Unhooked(Two):
    """Calls forward of a child directly: no hook of the child fires."""

    def forward(self, x: Tensor) -> Tensor:
        return self.tanh.forward(self.b(self.relu.forward(self.a.forward(x))))


class AsArgument(nn.Module):
    """A function, its name, and a number of inputs, chosen by the parent."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, *inputs: Tensor, how: Any) -> Any:
            if isinstance(how, str):
                how = getattr(F, how)
            return sum(how(self.fc(x)) for x in inputs)

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Any:
        if x.mean() > 0:
            return self.inner(*x.split(2), how=torch.tanh)
        return self.inner(x, how="gelu" if x[0, 0] > -1 else "silu")


class ByConfig(nn.Module):
    """A plain object and a dict, changed by forward itself."""

    class Config:
        rounds = 1

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.config, self.table = nn.Linear(4, 4), self.Config(), {"act": "relu"}

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.config.rounds):
            x = torch.relu(self.fc(x)) if self.table["act"] == "relu" else F.gelu(self.fc(x))
        self.config.rounds = self.config.rounds % 3 + 1
        self.table["act"] = "gelu" if self.table["act"] == "relu" else "relu"
        return x


CONTROL = [
    *(Branch, BranchOnItem, PickFromList, Alternate, Closure, EarlyExit, StochasticDepth),
    *(WhileLoop, Recursive, CallsItself, MoE, CatchesErrors, Generator, ClosedGenerator),
    *(Comprehension, TrainEvalInside, Attribute, Match, BySubmodule, Swapping, Shuffled),
    *(SetOrder, GetattrByName, FunctionalByFlag, ShortCircuit, ZeroTimes, IsinstanceBranch),
    *(DefaultArgument, IntArgument, Unhooked, Shapes, AsArgument, ByConfig),
]


# These decide by what no attribute shows before the pass: one that is new to us may be lost.
HIDDEN = {Closure, FunctionalByFlag, ZeroTimes, ByConfig}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", CONTROL)
def test_control_flow(kind: type[nn.Module], nested: bool, grad: bool) -> None:
    torch.manual_seed(0)
    model = kind()
    if nested:
        model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(inplace=True), model, nn.Linear(4, 4))
    if kind in (
        Closure,
        FunctionalByFlag,
    ):  # state outside the model: bare and watched would differ
        with capture(model) as maps:
            for (x,) in data():
                before = copy.deepcopy((Closure.state, FunctionalByFlag.slope))
                with truth.Witness(model) as witness:
                    model(x)
                truth.assert_captured_exactly_once(maps, witness.runs)
                del before
        return
    if kind in HIDDEN:
        strays(model, [args for _ in range(3) for args in data()], train=grad)
    else:
        check(model, data(), train=grad)


def test_labels_follow_the_road() -> None:
    model = Branch()
    with capture(model) as maps:
        for (x,) in [*data(), *data()[::-1]]:
            model(x)
            assert tags(maps) == [("a" if x.mean() > 0 else "b", 0, "relu", range(4))]
    model = nn.ModuleDict({"m": BySubmodule()})["m"]
    with capture(model) as maps:
        for (x,) in [*data(), *data()[::-1]]:
            model(x)
            first, second = "ab" if x.mean() > 0 else "ba"
            wanted = [(first, 0, "relu", range(4)), (second, 0, "tanh", range(4))]
            assert tags(maps) == wanted


def test_shapes_that_change_each_pass() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    passes = [(torch.randn(n, 3, 4 + n, 5 + n),) for n in (1, 2, 3, 1, 4)]
    check(conv, passes, [("0", 0, "relu", range(4))])
    mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU())
    passes = [(torch.randn(*[2] * n, 4),) for n in (0, 1, 2, 3, 0, 2)]
    check(mlp, passes, [("0", 0, "gelu", range(6))])
    check(Shapes(), [(torch.randn(n, 4),) for n in (1, 3, 2, 4, 1)])
    check(mlp, [(torch.randn(n, 4),) for n in (0, 3, 0)], train=False)  # an empty batch


# -- aliasing ------------------------------------------------------------------------------------


class UsedAfterInPlace(Two):
    """z is overwritten by relu, and the caller uses z afterwards: it must see the change."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        a = self.relu(z)
        return a + z * 2


class ViewBeforeInPlace(Two):
    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        view = z[:, :2]
        self.relu(z)
        return view.sum() + self.tanh(self.b(z)).sum()


class ChunkThenInPlace(Two):
    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x) * 1
        u, v = z.clone().split(2, -1)
        u, v = u.clone(), v.clone()
        u.relu_()
        v.mul_(u)
        return torch.tanh(v).sum() + z.sum()


class SliceInPlace(Two):
    """relu_ on a slice of z, the rest of z used later."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x) * 1
        z[:, :2].relu_()
        return self.tanh(z)


class SetItem(Two):
    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x) * 1
        z[:, 0] = torch.relu(z[:, 0].clone())
        z[z < 0] = 0
        return self.tanh(z)


class Chain(Two):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x)).add_(1).relu_()
        return (x * 2).add_(x).clamp_(max=9).mul(1).tanh_()


class InPlaceLater(Two):
    """a is overwritten after it was captured, by `+=`, by dropout, by `zero_`."""

    def forward(self, x: Tensor) -> Tensor:
        a = F.hardtanh(self.a(x))
        b = a * 2
        a += 1
        c = F.dropout(self.tanh(self.b(b)) * 1, 0.5, self.training, inplace=True)
        d = self.b(c) * 1
        return d.add_(1).add_(a)


class InPlaceOnInput(nn.Module):
    """The σ writes over the pass's own input, which the caller keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(self.relu(x)))


class ReturnsInput(nn.Module):
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.same, self.relu = nn.Linear(4, 4), self.Same(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.same(self.fc(x))
        return self.same(self.relu(self.same(z)))


class ReturnsNothing(Two):
    """A block that works in place and returns None."""

    class Block(nn.Module):
        def forward(self, x: Tensor) -> None:
            x.relu_()

    def __init__(self) -> None:
        super().__init__()
        self.block, self.act = self.Block(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x) * 1
        self.block(z)
        y = self.b(z) * 1
        self.act(y)  # the result is not taken: y itself was changed
        return y + z


class TwoNames(Two):
    """The same tensor under two Python objects: an alias by view_as."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x) * 1
        alias = z.view_as(z)
        self.relu(alias)
        return self.tanh(z)


class ListOfMaps(Two):
    """Keeps every z in a list and reads the list at the end."""

    def forward(self, x: Tensor) -> list[Tensor]:
        kept = []
        for layer in (self.a, self.b):
            x = layer(x) * 1
            kept.append(x)
            x = self.relu(x)
        return kept


class Detached(Two):
    """detach() shares memory: the in-place σ changes the detached one too."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x) * 1
        d = z.detach()
        a = self.relu(z)
        return a + d


class Numpy(Two):
    """NumPy shares memory with z."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x) * 1
        array = z.detach().numpy()
        a = self.relu(z)
        return a + torch.from_numpy(array.copy())


class Out(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            buffer = torch.empty(4, 4)
            torch.tanh(self.a(x), out=buffer)
            result = buffer.clone()
            torch.sigmoid(buffer, out=buffer)
        return result + buffer + self.b(x)


class DataWrite(Two):
    """`.data` writes that no version counter sees."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x) * 1
        a = self.tanh(z)
        with torch.no_grad():
            b = torch.relu(z.data)
            z.data.fill_(7)
        return a.detach() + b + self.b(x)


class ReusedBuffer(Two):
    """A buffer of the module that each pass writes its activation into."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.memory.copy_(self.a(x)).relu_()
        return self.tanh(self.b(self.memory))


class ReusedTensor(ReusedBuffer):
    """The same with a tensor that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        del self.memory
        self.memory = torch.zeros(4, 4)


class HookOnTensor(Two):
    """register_hook on z, retain_grad on a."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        if z.requires_grad:
            z.register_hook(lambda g: g * 2)
        a = self.relu(z)
        if a.requires_grad:
            a.register_hook(lambda g: g + 1)
        return self.tanh(self.b(a))


class Kwargs(Two):
    def forward(self, *, x: Tensor) -> Tensor:
        return self.tanh(input=self.b(input=self.relu(input=self.a(input=x))))


class KwargsOuter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Kwargs()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x=x)


class Empty(Two):
    """`x.set_()`, `resize_` and swapped data."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.a(x)
            z = torch.relu(z)
            y = torch.zeros(0)
            y.set_(z)
            y.tanh_()
        return self.b(z + y)


class InPlaceTransposed(Two):
    def forward(self, x: Tensor) -> Tensor:
        z = (self.a(x) * 1).t_()
        return self.tanh(self.b(F.relu_(z).t()))


class ExpandedZ(Two):
    """z overlaps itself: only an out-of-place σ can take it."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x).mean(0).expand(4, 4)
        return self.tanh(z) + torch.relu(z)


class InPlaceOnActivation(Two):
    """An in-place module writes over what another module's σ returned; the road depends on data."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.hard(self.a(x)) if float(x.sum()) > 1e9 else self.hard(self.b(x))
        act = self.hard(self.a(a))
        return self.relu(act)

    def __init__(self) -> None:
        super().__init__()
        self.hard = nn.Hardtanh()


class SigmaOverSigma(Two):
    """relu_ over the activation of another σ, used afterwards: the copy has to be of that too."""

    def __init__(self) -> None:
        super().__init__()
        self.hard = nn.Hardtanh()

    def forward(self, x: Tensor) -> Tensor:
        a = self.hard(self.a(x))
        return self.relu(a) + a * 2


class BlockAddsInPlace(Two):
    """A block that adds to its argument in place, behind a σ, in a parent that branches."""

    class Position(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            x += self.position
            return x

    def __init__(self) -> None:
        super().__init__()
        self.hard, self.block = nn.Hardtanh(), self.Position()

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = x * 2
        return self.tanh(self.b(self.block(self.hard(self.a(x)))))


ALIASING = [
    *(UsedAfterInPlace, ViewBeforeInPlace, ChunkThenInPlace, SliceInPlace, SetItem, Chain),
    *(InPlaceLater, ReturnsInput, ReturnsNothing, TwoNames, ListOfMaps, Detached),
    *(
        Numpy,
        Out,
        DataWrite,
        ReusedBuffer,
        ReusedTensor,
        HookOnTensor,
        KwargsOuter,
        Empty,
        InPlaceTransposed,
    ),
    *(ExpandedZ, InPlaceOnActivation, BlockAddsInPlace, SigmaOverSigma),
]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ALIASING)
def test_aliasing(kind: type[nn.Module], nested: bool, grad: bool) -> None:
    torch.manual_seed(0)
    model = kind()
    if nested:
        model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(inplace=True), model)
    check(model, data(4), train=grad)


def _by_hooks(model: nn.Module, x: Tensor) -> tuple[Any, dict[Any, Any], list[truth.Run]]:
    """The output, each linear layer's (input, response) cloned by a hook, the witness's runs."""
    found: dict[Any, tuple[Tensor, Tensor]] = {}
    calls: dict[str, int] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
            call = calls[name] = calls.get(name, -1) + 1
            found[name, call] = ((args[0] if args else kwargs["input"]).clone(), out.clone())

        return keep

    handles = [
        m.register_forward_hook(hook(n), with_kwargs=True)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    try:
        with truth.Witness(model) as witness:
            out = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return out, found, witness.runs


def _witness_takes_data() -> bool:
    with torch.inference_mode(), truth.Witness(nn.Identity()):
        try:
            return torch.ones(1).data is not None
        except RuntimeError:
            return False


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", [*CONTROL, *ALIASING])
def test_inputs_and_responses(kind: type[nn.Module], nested: bool, mode: Any) -> None:
    # What was there when the layer ran, whatever was written over it afterwards.
    if kind in (Closure, FunctionalByFlag, Unhooked):
        return  # state outside the model; no hook of the linear layers fires
    if kind is DataWrite and mode is torch.inference_mode and not _witness_takes_data():
        pytest.skip("in torch 2.4, .data of an inference tensor fails under a dispatch mode")
    torch.manual_seed(0)
    model = kind()
    if nested:
        model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(inplace=True), model)
    bare = copy.deepcopy(model)
    kinds = ("input", "response", "preactivation", "activation", "output")
    with capture(model, kinds=kinds) as maps, mode():
        for n, (x,) in enumerate(data(4)):
            truth.seed(n)
            want, layers, runs = _by_hooks(bare, x.clone())
            truth.seed(n)
            before = len(maps.missed)
            got = model(x.clone())
            for left, right in zip(truth.tensors_of(want), truth.tensors_of(got), strict=True):
                assert torch.equal(left, right)
            if len(maps.missed) > before and kind in HIDDEN:
                assert strayed(maps)
                continue
            truth.assert_captured_exactly_once(maps, runs)
            for (name, call), values in layers.items():
                for which, value in zip(("input", "response"), values, strict=True):
                    (fm,) = maps.select(name, which, call=call, step=-1)
                    assert torch.equal(fm.tensor, value), (n, name, call, which)
            assert len(maps.select(kind="response", step=-1)) == len(layers)


def test_an_input_that_the_model_overwrites() -> None:
    # The witness clones; the caller's own tensor is overwritten, as without capture.
    model = InPlaceOnInput()
    with capture(model) as maps, torch.no_grad():
        for (x,) in data(3):
            before = x.clone()
            model(x)
            assert torch.equal(x, before.relu())
            assert [t[:3] for t in tags(maps)] == [("relu", 0, "relu"), ("fc", 0, "tanh")]
            assert torch.equal(maps["relu", "preactivation"].tensor, before)
            assert torch.equal(maps["relu"].tensor, x)


def test_a_map_overwritten_after_the_pass_raises() -> None:
    # Outside the model nothing is watched: the version counter tells.
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with capture(model) as maps, torch.no_grad():
        for (x,) in data(3):
            out = model(x)
            assert torch.equal(maps["0"].tensor, out)
            out += 1
            with pytest.raises(MapOverwrittenError):
                maps["0"]
            assert maps["0", "preactivation"].shape == (4, 4)


# -- hooks, patches and wrappers of others -------------------------------------------------------


def test_hooks_of_others_that_change_outputs() -> None:
    # A hook that returns something is part of the model; maps are what the modules were given and
    # gave. Order: theirs was there first, so ours sees what theirs made.
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Tanh())
        model[0].register_forward_hook(lambda m, a, out: out * 2)
        model[1].register_forward_pre_hook(lambda m, a: (a[0] + 1,))
        model[3].register_forward_pre_hook(lambda m, a, k: (a, k), with_kwargs=True)
        return model

    bare, model = build(), build()
    with capture(model) as maps:
        for (x,) in data(4):
            assert torch.equal(bare(x), model(x))
            z = F.linear(x, model[0].weight, model[0].bias) * 2 + 1  # what relu_ is given
            assert torch.equal(maps["0", "preactivation"].tensor, z)
            assert torch.equal(maps["0"].tensor, z.relu())
            z = F.linear(z.relu(), model[2].weight, model[2].bias)
            assert torch.equal(maps["2", "preactivation"].tensor, z)
            assert torch.equal(maps["2"].tensor, z.tanh())


@pytest.mark.parametrize("what", ["changes", "keeps", "keeps list"])
def test_a_hook_added_during_the_block(what: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Tanh())
    bare = copy.deepcopy(model)
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> Any:
        if what == "changes":
            return out + 1
        kept.append(out if what == "keeps" else args[0])
        return None

    with capture(model) as maps:
        for n, (x,) in enumerate(data(6)):
            if n == 3:
                handles = [m[i].register_forward_hook(hook) for m in (bare, model) for i in (0, 1)]
            with truth.Witness(bare) as witness:
                want = bare(x)
            mine = list(kept)
            kept.clear()
            got = model(x)
            assert torch.equal(want, got)
            for left, right in zip(mine, kept, strict=True):  # as overwritten by the relu
                assert torch.equal(left, right), n
            kept.clear()
            if not maps.missed:
                truth.assert_captured_exactly_once(maps, witness.runs)
    assert [len(m[0]._forward_hooks) for m in (bare, model)] == [1, 1]
    for h in handles:
        h.remove()


def test_a_forward_replaced_on_the_instance() -> None:
    torch.manual_seed(0)
    for when in ("before", "during"):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
        other = nn.Linear(4, 4)

        def patched(x: Tensor, fc: nn.Module = model[2], o: nn.Module = other) -> Tensor:
            return torch.sigmoid(F.linear(x, fc.weight, fc.bias)) + o(x)

        if when == "before":
            model[2].forward = patched  # type: ignore[method-assign]
        with capture(model) as maps:
            for n, (x,) in enumerate(data(4)):
                if n == 2 and when == "during":
                    model[2].forward = patched  # type: ignore[method-assign]
                with truth.Witness(model) as witness:
                    model(x)
                truth.assert_captured_exactly_once(maps, witness.runs)
        assert model[2].__dict__["forward"] is patched


def test_an_activation_whose_forward_is_replaced() -> None:
    # nn.ReLU is σ "relu" by its type; here its forward computes something else. Values decide.
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[1].forward = lambda x: F.gelu(x)  # type: ignore[method-assign]
    with capture(model) as maps:
        for (x,) in data(3):
            with truth.Witness(model) as witness:
                model(x)
            truth.assert_captured_exactly_once(maps, witness.runs)


def test_partial_and_lambda_forwards() -> None:
    class Lambda(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)

    model = nn.Sequential(
        Lambda(lambda x: x * 2),
        nn.Linear(4, 4),
        Lambda(lambda x: F.relu(x)),
        nn.Linear(4, 4),
        Lambda(functools.partial(F.leaky_relu, negative_slope=0.3)),
        nn.Linear(4, 4),
        Lambda(torch.tanh_),
        Lambda(lambda x: x.view(2, -1)),
    )
    check(
        model,
        data(3),
        [
            ("1", 0, "relu", range(4)),
            ("3", 0, "leaky_relu", range(4)),
            ("5", 0, "tanh", range(4)),
        ],
    )
    # The function is an attribute: it may be swapped between passes.
    with capture(model) as maps:
        for n, (x,) in enumerate(data(4)):
            model[2].function = (torch.relu, torch.sigmoid)[n % 2]
            model(x)
            assert maps["1"].nonlinearity == ("relu", "sigmoid")[n % 2]


def test_functions_rebound_between_passes() -> None:
    # On the instance, on the class: right, or named in missed; never under the old name.
    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def act(self, x: Tensor) -> Tensor:
            return torch.relu(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.fc(x))

    model = Method()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model) as maps:
            for n, (x,) in enumerate(data(6)):
                if n == 2:
                    model.act = lambda x: torch.tanh(x)  # type: ignore[method-assign]
                if n == 4:
                    del model.act
                    Method.act = lambda self, x: torch.sigmoid(x)  # type: ignore[method-assign]
                with truth.Witness(model) as witness:
                    model(x)
                if not maps.missed or n % 2:  # a pass that was lost is learned anew
                    truth.assert_captured_exactly_once(maps, witness.runs)
                    wanted = ("relu", "relu", "tanh", "tanh", "sigmoid", "sigmoid")[n]
                    assert maps["fc"].nonlinearity == wanted


def test_modules_in_plain_python_containers() -> None:
    # No submodule: no name, no hook reaches it by named_modules. Its owner: the caller.
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)]
            self.head = nn.Linear(4, 4)
            self.table = {"act": nn.Tanh()}

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.table["act"](self.head(x))

    torch.manual_seed(0)
    check(Plain(), data(4))
    model = Plain()
    with capture(model) as maps:
        for n, (x,) in enumerate(data(4)):
            if n == 2:
                model.table["act"] = nn.Sigmoid()
                model.layers.append(nn.GELU())
            with truth.Witness(model) as witness:
                model(x)
            truth.assert_captured_exactly_once(maps, witness.runs)
            assert maps["head"].nonlinearity == ("tanh" if n < 2 else "sigmoid")


def test_submodules_and_weights_replaced_between_passes() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    )
    changes: list[Any] = [
        lambda: None,
        lambda: model.__setitem__(1, nn.GELU()),
        lambda: model[2].__setitem__(1, nn.Sigmoid()),
        lambda: setattr(model[0], "weight", nn.Parameter(torch.randn(4, 4))),
        lambda: setattr(model[0].weight, "data", torch.randn(4, 4)),
        lambda: model.append(nn.ELU(inplace=True)),
        lambda: model[2].insert(0, nn.SiLU()),
        lambda: model.__delitem__(1),
        lambda: model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}),
        lambda: setattr(model[1][2], "__class__", nn.Softplus) or setattr(model[1][2], "beta", 1),
        lambda: model.add_module("z", nn.Sequential(nn.Linear(4, 3), nn.Mish())),
    ]
    with capture(model) as maps, torch.no_grad():
        for change in changes:
            try:
                change()
            except AttributeError:
                continue
            for (x,) in data(2):
                if isinstance(model[1], nn.Sequential) and hasattr(model[1][2], "beta"):
                    model[1][2].threshold = 20
                with truth.Witness(model) as witness:
                    model(x)
                truth.assert_captured_exactly_once(maps, witness.runs)


def test_flags_that_change_between_passes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 4), nn.RReLU()
    )
    bare = copy.deepcopy(model)

    def step(m: nn.Module, n: int) -> None:
        m.train(n % 2 == 0)
        m[2].inplace = n % 3 == 0
        m[5].inplace = n % 4 == 1
        m.double() if n == 5 else None
        m.requires_grad_(n != 7)

    with capture(model) as maps:
        for n in range(10):
            step(model, n)
            step(bare, n)
            x = torch.randn(4, 4, dtype=torch.float64 if n >= 5 else torch.float32)
            train = n not in (2, 7)
            want = truth.run_pass(bare, (x.clone(),), train=train, seed_=n, witness=True)
            got = truth.run_pass(model, (x.clone(),), train=train, seed_=n)
            truth.assert_same_pass(want, got)
            truth.assert_captured_exactly_once(maps, want.truth)
    truth.assert_nothing_left(truth.fingerprint(bare), model)


# -- modes of torch ------------------------------------------------------------------------------


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)),
        nn.Tanh(),
    )


def test_inference_mode() -> None:
    model = _net()
    with capture(model) as maps:
        for n, (x,) in enumerate(data(6)):
            with torch.inference_mode(n % 2 == 0), truth.Witness(model) as witness:
                model(x)
            truth.assert_captured_exactly_once(maps, witness.runs)


def test_autocast() -> None:
    model = _net()
    with capture(model) as maps:
        for n, (x,) in enumerate(data(6)):
            cast = torch.autocast("cpu", torch.bfloat16, enabled=n % 2 == 0)
            with cast, truth.Witness(model) as witness:
                model(x)
            truth.assert_captured_exactly_once(maps, witness.runs)
            assert maps["0"].dtype == (torch.bfloat16 if n % 2 == 0 else torch.float32)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("seen", [True, False])
def test_checkpointing(reentrant: bool, seen: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.ReLU(inplace=True))
            self.b = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.a, x, use_reentrant=reentrant)
            return checkpoint(lambda y: torch.sigmoid(self.b(y)), x, use_reentrant=reentrant)

    torch.manual_seed(0)
    # A reentrant checkpoint needs an input with gradients.
    passes = [(x.requires_grad_(),) for (x,) in data(4)]
    model = Checkpointed()
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for n, (x,) in enumerate(passes):
            want = truth.run_pass(bare, (x,), train=True, seed_=n, witness=True)
            runs = want.truth[:3]  # the recomputation in backward comes after
            got = truth.run_pass(model, (x,), train=True, seed_=n)
            truth.assert_same_pass(want, got)
            truth.assert_captured_exactly_once(maps, runs)
    truth.assert_nothing_left(truth.fingerprint(bare), model)


def test_functional_call() -> None:
    # Other weights for one call: parameters in name, not by identity.
    model = _net()
    with capture(model) as maps:
        for n, (x,) in enumerate(data(4)):
            other = {k: v.detach() + n for k, v in model.named_parameters()}
            with truth.Witness(model) as witness:
                torch.func.functional_call(model, other, (x,))
            truth.assert_captured_exactly_once(maps, witness.runs)
            assert maps.layers[0] == "0"
    functional = nn.Sequential(FunctionalLinear(), nn.ReLU())
    with capture(functional) as maps:
        for n, (x,) in enumerate(data(4)):
            other = {k: v.detach() + n for k, v in functional.named_parameters()}
            torch.func.functional_call(functional, other, (x,))
            assert tags(maps) == [("0", 0, "relu", range(4))], n


class FunctionalLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_functorch_transforms(transform: str) -> None:
    # Tensors inside a transform are wrappers that die with it: right values, or named in missed;
    # the results untouched in any case.
    model = _net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for (x,) in data(3):
            if transform == "vmap":
                run = lambda x=x: torch.vmap(model)(x)  # noqa: E731
            elif transform == "grad":
                run = lambda x=x: torch.func.grad(lambda y: model(y).sum())(x)  # noqa: E731
            else:
                run = lambda x=x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]  # noqa: E731
            want = run()
            with capture(model) as maps:
                for _ in range(3):
                    assert torch.equal(want, run())
                    try:
                        found = list(maps)
                        values = [fm.tensor + 0 for fm in found]
                        assert all(v.shape == fm.shape for v, fm in zip(values, found, strict=True))
                    except Exception:
                        assert maps.missed
    truth.assert_nothing_left(truth.fingerprint(_net()), model)


def test_meta_tensors() -> None:
    with torch.device("meta"):
        model = _net()
    with capture(model) as maps:
        for _ in range(3):
            model(torch.randn(2, 4, device="meta"))
            assert [t[0] for t in tags(maps)] == ["0", "2.0", "2.3"]
            assert maps["0"].device.type == "meta"
            assert maps["0"].shape == (2, 8)
            assert repr(maps)
            assert repr(maps["0"])


def test_complex_tensors() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4, dtype=torch.complex64)

        def forward(self, x: Tensor) -> Tensor:
            z = self.fc(x.to(torch.complex64))
            return torch.tanh(z).real + torch.view_as_real(torch.sigmoid(z)).sum(-1)

    check(Complex(), data(3), [("fc", 0, "tanh", range(4)), ("fc", 0, "sigmoid", range(4))])


def test_sparse_inputs() -> None:
    class Graph(nn.Module):
        """A GCN: a sparse adjacency times the features."""

        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            x = F.relu(torch.sparse.mm(adjacency, self.fc1(x)))
            return torch.tanh(torch.spmm(adjacency, self.fc2(x)))

    passes = [(x, (torch.rand(4, 4) > 0.5).float().to_sparse()) for (x,) in data(3)]
    check(Graph(), passes)


def test_custom_autograd_functions() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.relu(x) ** 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 2 * g * torch.relu(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.other(Square.apply(self.fc(x))))

    torch.manual_seed(0)
    check(Net(), data(3))


def test_custom_sigma_module_with_memory_efficient_backward() -> None:
    # timm's and EfficientNet's SwishMe: a module around an autograd.Function.
    class Jit(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * torch.sigmoid(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            s = torch.sigmoid(x)
            return g * (s * (1 + x * (1 - s)))

    class SwishMe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Jit.apply(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), SwishMe(), nn.Linear(4, 2))
    with capture(model) as maps:
        for (x,) in data(3):
            model(x).sum().backward()
            found = tags(maps)
            assert found == [("0", 0, "SwishMe", range(4))] or maps.missed, found


# -- captures, threads, endings ------------------------------------------------------------------


def test_nested_captures_of_one_model() -> None:
    model = _net()
    bare = copy.deepcopy(model)
    with capture(model) as outer:
        for n, (x,) in enumerate(data(6)):
            with truth.Witness(bare) as witness:
                want = bare(x)
            if n % 2:
                with capture(model, kinds=("activation", "input", "preactivation")) as inner:
                    for _ in range(2):
                        assert torch.equal(model(x), want)
                        truth.assert_captured_exactly_once(inner, witness.runs)
            else:
                assert torch.equal(model(x), want)
            truth.assert_captured_exactly_once(outer, witness.runs)
    truth.assert_nothing_left(truth.fingerprint(bare), model)


def test_captures_that_end_in_another_order() -> None:
    model = _net()
    first, second = capture(model), capture(model[2])
    a = first.__enter__()
    model(data()[0][0])
    b = second.__enter__()
    for (x,) in data(3):
        with truth.Witness(model) as witness:
            model(x)
        truth.assert_captured_exactly_once(a, witness.runs)
        assert [t[0] for t in tags(b)] == ["0"]
    first.__exit__(None, None, None)
    for (x,) in data(3):
        model(x)
        assert [t[0] for t in tags(b)] == ["0"]
    second.__exit__(None, None, None)
    truth.assert_nothing_left(truth.fingerprint(_net()), model)


def test_two_threads() -> None:
    model = _net()
    bare = copy.deepcopy(model)
    failures: list[BaseException] = []
    start = threading.Barrier(3)

    def work(seed: int, watch: bool) -> None:
        try:
            inputs = [x for (x,) in images(4, 4, n=8, offset=seed)]
            wants = []
            for x in inputs:
                wants.append((bare(x), bare[0](x)))
            start.wait()
            if not watch:
                for x, (want, _) in zip(inputs, wants, strict=True):
                    assert torch.equal(model(x), want)
                return
            with capture(model) as maps:
                for x, (want, z) in zip(inputs, wants, strict=True):
                    assert torch.equal(model(x), want)
                    assert torch.equal(maps["0", "preactivation"].tensor, z)
                    assert torch.equal(maps["0"].tensor, z.relu())
                    assert len(maps) == 6, tags(maps)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(100 * i, i < 2)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failures:
        raise failures[0]
    truth.assert_nothing_left(truth.fingerprint(bare), model)


class Bomb(nn.Module):
    """Raises what it is told, at the step it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)
        self.error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc(x))
        if self.error is not None:
            raise self.error("boom")
        return torch.tanh(x)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_exception_caught_inside_the_block(error: type[BaseException], at: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(inplace=True), Bomb(), nn.Linear(4, 4))
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for n, (x,) in enumerate(data(6)):
            if n == at:
                model[2].error = error
                with pytest.raises(error):
                    model(x)
                model[2].error = None
                if error is ValueError:  # torch calls no hook for the others before the next pass
                    assert truth.modes() == truth.NO_MODES
                    for m, b in zip(model.modules(), bare.modules(), strict=True):
                        assert getattr(m, "inplace", None) == getattr(b, "inplace", None)
                continue
            with truth.Witness(bare) as witness:
                want = bare(x)
            assert torch.equal(want, model(x))
            truth.assert_captured_exactly_once(maps, witness.runs)
    truth.assert_nothing_left(truth.fingerprint(bare), model)


def test_a_generator_that_is_closed_inside_the_block() -> None:
    model = _net()

    def features() -> Iterator[Any]:
        with capture(model) as maps:
            for (x,) in data(6):
                model(x)
                yield maps

    running = features()
    assert len(next(running))
    assert len(next(running))
    running.close()
    truth.assert_nothing_left(truth.fingerprint(_net()), model)
    abandoned = features()
    next(abandoned)
    del abandoned
    gc.collect()
    truth.assert_nothing_left(truth.fingerprint(_net()), model)


def test_the_model_called_inside_a_hook_of_its_own() -> None:
    # A second forward while the first runs, from a user's hook.
    model = _net()
    seen = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        if not seen:
            seen.append(0)
            with torch.no_grad():
                seen.append(model(torch.ones(1, 4)))

    bare = copy.deepcopy(model)
    handle = model[2].register_forward_hook(hook)
    with capture(model):
        for (x,) in data(3):
            seen.clear()
            want, inner = bare(x), bare(torch.ones(1, 4))
            assert torch.equal(model(x), want)
            assert torch.equal(seen[1], inner)
    handle.remove()
    truth.assert_nothing_left(truth.fingerprint(bare), model)


def test_a_submodule_called_alone_inside_the_block() -> None:
    # No pass of the model: not captured, and said so.
    model = _net()
    with pytest.warns(CaptureWarning, match="outside Sequential.forward"), capture(model) as maps:  # noqa: PT031
        for (x,) in data(3):
            model(x)
            first = maps["0"].tensor.clone()
            model[2](torch.randn(2, 8))
            assert torch.equal(maps["0"].tensor, first)
            assert len(maps) == 6
    assert maps.missed


def test_scripted_and_traced_children_are_named() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        traced = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), scripted, nn.Linear(4, 4), nn.Tanh(), traced)
    with pytest.warns(CaptureWarning), capture(model) as maps:  # noqa: PT031
        for (x,) in data(3):
            model(x)
            assert [t[0] for t in tags(maps)] == ["0", "3"]
    assert {m.layer for m in maps.missed} == {"2", "5"}


def test_a_scripted_function_is_named() -> None:
    # torch.jit.script of a function: runs its σ without Python. It may not go unmentioned.
    @torch.jit.script
    def fused(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(fused(self.fc(x)))

    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with capture(model) as maps:
            for (x,) in data(3):
                model(x)
                assert ("fc", 0, "relu", range(4)) not in tags(maps)
        assert maps.missed


def test_a_torch_function_subclass_as_input() -> None:
    class Named(Tensor):
        pass

    model = _net()
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for (x,) in data(3):
            with truth.Witness(bare) as witness:
                want = bare(x)
            got = model(x.as_subclass(Named))
            assert isinstance(got, Named)
            assert torch.equal(got.as_subclass(Tensor), want)
            truth.assert_captured_exactly_once(maps, witness.runs)


def test_a_function_mode_of_the_user() -> None:
    # The user's own mode around, entered inside, and left inside forward.
    class Count(torch.overrides.TorchFunctionMode):
        n = 0

        def __torch_function__(self, f: Any, t: Any, a: Any = (), k: Any = None) -> Any:
            Count.n += 1
            return f(*a, **(k or {}))

    class Net(Two):
        def forward(self, x: Tensor) -> Tensor:
            with Count():
                x = F.relu(self.a(x))
                if x.sum() > 1:
                    x = x * 2
            return self.tanh(self.b(x))

    torch.manual_seed(0)
    check(Net(), data(4))
    with Count():
        check(_net(), data(4))


def test_rnn_modules_are_named_in_missed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.cell = nn.LSTM(4, 4, batch_first=True), nn.GRUCell(4, 4)
            self.head, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.rnn(x[:, None])
            return self.act(self.head(self.cell(out[:, 0])))

    torch.manual_seed(0)
    model = Net()
    check(model, data(3), [("head", 0, "relu", range(4))], missed=True)
    with pytest.warns(CaptureWarning), capture(model) as maps:
        model(data()[0][0])
    assert {m.layer for m in maps.missed} == {"rnn", "cell"}


class BranchingHardSwish(nn.Module):
    """One σ written out by hand, unproven itself, with a proven σ module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.relu6 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            x = x * 1.0
        return x * self.relu6(x + 3) / 6


def test_an_unproven_sigma_with_a_proven_one_inside_is_one_site_in_every_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 4), BranchingHardSwish())
    with torch.no_grad(), capture(model, kinds="activation") as maps:
        for _ in range(4):
            model(torch.randn(3, 4))
            assert [(fm.layer, fm.nonlinearity) for fm in maps] == [("0", "BranchingHardSwish")]


class ProductsOfBothKinds(nn.Module):
    """The same function is a layer where a parameter weights, and none where data meet data."""

    def __init__(self, product: str) -> None:
        super().__init__()
        self.q, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.product = product

    def weigh(self, x: Tensor, y: Tensor) -> Tensor:
        if self.product == "einsum":
            return torch.einsum("ik,kj->ij", x, y)
        return torch.mm(x, y) if self.product == "mm" else x @ y

    def forward(self, x: Tensor) -> Tensor:
        q = self.weigh(x, self.q)
        mix = self.weigh(q, x.t()).softmax(-1)  # no parameter: no layer
        return F.relu(self.weigh(self.weigh(mix, x), self.v))


@pytest.mark.parametrize("product", ["matmul", "mm", "einsum"])
def test_products_with_and_without_a_parameter_in_one_forward(product: str) -> None:
    torch.manual_seed(0)
    model = ProductsOfBothKinds(product)
    # y_ij = sum_k x_ik w_kj: the filters of q and v are their columns, along the last axis.
    check(model, images(3, 4, n=4), [("v", 0, "relu", range(4))])
    with torch.no_grad(), capture(model, kinds="response") as maps:
        for (x,) in images(3, 4, n=4):
            model(x)
            assert torch.equal(maps["q", "response"].tensor, model.weigh(x, model.q))
            assert maps.layers == ["q", "v"]


class Clipped(nn.Module):
    """A σ by `torch.min` of two tensors (xIELU does so), over another σ of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("limit", torch.tensor(-1e-6))

    def forward(self, x: Tensor) -> Tensor:
        alpha = F.softplus(self.alpha)
        return torch.where(x > 0, alpha * x, torch.expm1(torch.min(x, self.limit)) - x)


def test_min_of_two_tensors_is_pointwise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Clipped())
    check(model, images(3, 4), [("0", 0, "Clipped", range(6))])


class FunctionalAttention(nn.Module):
    """WavLM's: torch's attention function, given the weights of plain linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.out, self.gate = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = F.multi_head_attention_forward(
            *(x, x, x, 4, 2, None),
            torch.cat((self.q.bias, self.k.bias, self.v.bias)),
            *(None, None, False, 0.0, self.out.weight, self.out.bias),
            use_separate_proj_weight=True,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
        )
        return y * torch.sigmoid(self.gate(x))


@pytest.mark.parametrize("after", [False, True])
def test_the_attention_function_in_a_proven_forward(after: bool) -> None:
    """Also where torch's own code has twins from an earlier block, and runs none here."""
    torch.manual_seed(0)
    if after:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        with capture(layer):
            for _ in range(2):
                layer(torch.randn(2, 5, 8))
    model = FunctionalAttention()
    check(model, images(3, 2, 4), [("gate", 0, "sigmoid", range(4))])
    with torch.no_grad(), capture(model, kinds="response") as maps:
        for (x,) in images(3, 2, 4):
            model(x)
            assert maps.layers == ["q", "k", "v", "out", "gate"]
            assert torch.equal(maps["k", "response"].tensor, model.k(x))
