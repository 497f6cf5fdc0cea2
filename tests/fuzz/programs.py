"""A whole program: its classes, and the passes that it is to run."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import tests.fuzz.elsewhere
import tests.fuzz.picked  # noqa: F401
from tests.fuzz.constructs import construct, statements
from tests.fuzz.header import HEADER
from tests.fuzz.operations import layer, nonlinearity
from tests.fuzz.source import Code, Unit, plain, separate, text
from tests.fuzz.writer import ClassWriter, ProgramWriter

__all__ = ["PassPlan", "Program", "write"]


@dataclass(frozen=True)
class PassPlan:
    """One pass of a block.

    Attributes:
        train: the model's mode.
        grad: "grad" (with a backward pass), "no_grad" or "inference".
        seed: of the data and of every random number.
        batch: its size.
        length: of a sequence, or of an image's side.
        k: the numbers that `prepare` sets.
        flag: an argument of the model's forward; None: not given.
        inner: whether a second capture is open around it.
    """

    train: bool
    grad: str
    seed: int
    batch: int
    length: int
    k: tuple[int, ...]
    flag: int | None = None
    inner: bool = False


@dataclass
class Program:
    """A program, and how it is to be captured.

    Attributes:
        blocks: each pass has a block of its own.
    """

    seed: int
    family: str
    code: Code
    passes: list[PassPlan]
    options: dict[str, Any]
    drawn: Counter[str] = field(default_factory=Counter)
    dropped: set[int] = field(default_factory=set)
    blocks: bool = False

    def in_blocks(self) -> Program:
        """The same twice over, each pass in a block; as it is if several are kept, or edited."""
        several = {"edit", "every", "keep"}.intersection(self.options)
        return self if several else replace(self, blocks=True, passes=self.passes * 2)

    def texts(self) -> tuple[str, str]:
        """The told text and the plain one."""
        told = text(self.code, self.dropped)
        return told, plain(told)

    def without_grad(self) -> Program:
        """The same in passes without gradients."""
        options = {k: v for k, v in self.options.items() if k not in ("detach", "gradients")}
        passes = [replace(p, grad="no_grad" if p.grad == "grad" else p.grad) for p in self.passes]
        return replace(self, passes=passes, options=options)


def write(seed: int) -> Program:
    """The program of a seed."""
    rng = random.Random(seed)
    family = rng.choice(("vec", "seq", "img"))
    program = ProgramWriter(rng, family, in_place=rng.random() < 0.3)
    classes: Code = []
    names: list[str] = []
    lone = rng.random() < 0.3  # one decision alone, with nothing to hide behind
    for n in range(0 if lone else rng.randint(0, 2)):
        block = ClassWriter(program, f"Block{n}", blocks=list(names))
        block.body += [Unit([f"x = {layer(block)}", f"x = {nonlinearity(block)}"])]
        block.body += statements(block, 1)
        names.append(block.name)
        classes += block.code()
    net = ClassWriter(program, "Net", blocks=names, arguments=rng.random() < 0.4)
    net.init.append("self.flag = 0")
    # It starts with a layer: nobody's first statement writes into the user's input.
    net.body += [f"x = {layer(net)}", "y = x"]
    net.body += ["self.flag = flag"] if net.arguments else []
    net.body += [construct(net, 1 if lone else 0) for _ in range(1 if lone else rng.randint(1, 3))]
    net.body += [Unit([f"x = T.call({net.part(f'{name}()')}, x)"]) for name in names]
    if not lone:
        net.body += statements(net, 0, most=3)
        net.body += [Unit([f"x = {layer(net)}", f"x = {nonlinearity(net)}"])]
    classes += net.code()
    prepare: Code = ["def prepare(model, k):", separate(program.prepare)]
    header = HEADER
    if rng.random() < 0.15:  # what a forward catches need not be an `Exception`
        header = header.replace("class Odd(Exception)", "class Odd(BaseException)")
    code: Code = [header, *program.top, *classes, *prepare, "def build():", ["return Net()"]]
    passes = _passes(rng, program.slots, net.arguments)
    found = Program(seed, family, code, passes, _options(rng), program.drawn)
    return found.without_grad() if "edit" in found.options else found


def _options(rng: random.Random) -> dict[str, Any]:
    return rng.choice(
        (
            {},
            {},
            {},
            {},
            {"keep": "all"},
            {"keep": 2},
            {"every": 2},
            {"detach": False},
            {"gradients": True},
            {"edit": (rng.randrange(100), rng.choice(("preactivation", "activation")), 0.5)},
            {"edit": (rng.randrange(100), rng.choice(("preactivation", "activation")), 0.0)},
            {"kinds": ("response", "preactivation", "activation")},
            {"kinds": ("input", "preactivation", "activation", "output")},
        )
    )


_MODES = (
    ((True, "grad"),),
    ((True, "grad"), (False, "grad")),
    ((True, "grad"), (False, "no_grad")),
    ((False, "no_grad"),),
    ((False, "no_grad"), (False, "inference")),
    ((True, "no_grad"), (False, "no_grad")),
)


def _passes(rng: random.Random, slots: int, flag: bool) -> list[PassPlan]:
    """Passes that leave the path of the one before in one decision, in some, in all or in none."""
    modes = rng.choice(_MODES)
    sizes = [(rng.randint(2, 4), rng.randint(4, 6)) for _ in range(2)]
    if rng.random() < 0.5:
        sizes = sizes[:1]

    def draw() -> PassPlan:
        k = tuple(rng.choice((0, 1, 1, 2)) if rng.random() < 0.5 else 0 for _ in range(slots))
        given = rng.choice((None, 0, 1, 2)) if flag else None
        train, grad = modes[0]
        return PassPlan(train, grad, rng.randrange(1 << 30), *sizes[0], k, given)

    first = draw()
    pattern = rng.choice(("flip", "flip", "alternate", "random", "data", "same"))
    passes = [first]
    if pattern == "alternate":
        other = draw()
        passes = [first, other] * 3
    elif pattern == "random":
        passes += [draw() for _ in range(5)]
    elif pattern in ("data", "same"):
        passes += [first] * 3
    else:
        for _ in range(5):
            k = list(passes[-1].k)
            for _ in range(rng.choice((1, 1, 2))):
                if k:
                    at = rng.randrange(len(k))
                    k[at] = rng.choice([v for v in (0, 1, 2) if v != k[at]])
            passes.append(replace(first, k=tuple(k)))
    inner = range(0)
    if rng.random() < 0.15:
        begin = rng.randrange(len(passes))
        inner = range(begin, rng.randint(begin, len(passes)) + 1)
    result = []
    for n, p in enumerate(passes):
        train, grad = modes[n % len(modes)] if rng.random() < 0.7 else modes[0]
        batch, length = rng.choice(sizes) if n else sizes[0]
        seed = p.seed if pattern == "same" or rng.random() < 0.2 else rng.randrange(1 << 30)
        result.append(
            replace(
                p, train=train, grad=grad, batch=batch, length=length, seed=seed, inner=n in inner
            )
        )
    return result
