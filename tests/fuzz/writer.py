"""A program while it is written: its classes, its helpers, and what it decides by in each pass."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tests.fuzz.source import Code, separate

__all__ = ["ClassWriter", "ProgramWriter"]

_T = TypeVar("_T")

_CONSTRUCTORS = {
    "layer": {
        "vec": ("nn.Linear(6, 6)", "nn.Linear(6, 6, bias=False)"),
        "seq": ("nn.Linear(6, 6)", "nn.Linear(6, 6, bias=False)"),
        "img": (
            "nn.Conv2d(6, 6, 1)",
            "nn.Conv2d(6, 6, 3, padding=1)",
            "nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)",
            "nn.ConvTranspose2d(6, 6, 3, padding=1)",
        ),
    },
    "norm": {
        "vec": ("nn.LayerNorm(6)", "nn.BatchNorm1d(6)", "RootMeanSquare()"),
        "seq": ("nn.LayerNorm(6)", "RootMeanSquare()"),
        "img": ("nn.BatchNorm2d(6)", "nn.GroupNorm(2, 6)", "nn.InstanceNorm2d(6, affine=True)"),
    },
}


class ProgramWriter:
    """The program.

    Args:
        rng: that draws.
        family: "vec" (N, C), "seq" (N, T, C) or "img" (N, C, H, W).
        in_place: whether statements may write to tensors in place.

    Attributes:
        top: code of the module, before the classes.
        prepare: code that sets what a pass decides by, from its numbers `k`.
        slots: how many numbers there are.
        drawn: how often each kind of decision and construct was drawn.
    """

    def __init__(self, rng: random.Random, family: str, in_place: bool) -> None:
        self.rng = rng
        self.family = family
        self.in_place = in_place
        self.top: Code = []
        self.prepare: Code = []
        self.slots = 0
        self.drawn: Counter[str] = Counter()
        self._fresh = 0

    @property
    def axis(self) -> int:
        """The axis of the filters."""
        return {"vec": 1, "seq": 2, "img": 1}[self.family]

    def fresh(self) -> int:
        """A number that no name has yet."""
        self._fresh += 1
        return self._fresh

    def slot(self) -> int:
        """One more number that each pass brings."""
        self.slots += 1
        return self.slots - 1

    def pick(self, values: Sequence[_T]) -> _T:
        return self.rng.choice(values)

    def chance(self, p: float) -> bool:
        return self.rng.random() < p


@dataclass
class ClassWriter:
    """One class of the program."""

    program: ProgramWriter
    name: str
    blocks: list[str] = field(default_factory=list)  # classes that it may have parts of
    fields: Code = field(default_factory=list)  # of the class
    init: Code = field(default_factory=list)
    methods: Code = field(default_factory=list)
    body: Code = field(default_factory=list)
    known: dict[str, list[str]] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)  # by which constructor each part was
    arguments: bool = False  # whether forward takes `flag`

    def part(self, constructor: str) -> str:
        """A submodule of its own, as an expression."""
        name = f"m{self.program.fresh()}"
        self.init.append(f"self.{name} = {constructor}")
        self.made[f"self.{name}"] = constructor
        return f"self.{name}"

    def layer(self, new: bool = False) -> str:
        """A layer that keeps the shape; perhaps one that there is."""
        return self._some("layer", new)

    def norm(self) -> str:
        """A norm; perhaps one that there is."""
        return self._some("norm", False)

    def parameter(self) -> str:
        """A number for each filter."""
        line = "self.g = nn.Parameter(torch.ones(6))"
        if line not in self.init:
            self.init.append(line)
        return "self.g"

    def constructor(self, kind: str) -> str:
        return self.program.pick(_CONSTRUCTORS[kind][self.program.family])

    def _some(self, kind: str, new: bool) -> str:
        known = self.known.setdefault(kind, [])
        if known and not new and self.program.chance(0.3):
            return self.program.pick(known)
        known.append(self.part(self.constructor(kind)))
        return known[-1]

    def code(self) -> Code:
        """The class."""
        flag = ", flag=0" if self.arguments else ""
        return [
            f"class {self.name}(nn.Module):",
            [
                *separate(self.fields),
                "def __init__(self):",
                ["super().__init__()", *separate(self.init)],
                *separate(self.methods),
                f"def forward(self, x{flag}):",
                ["y = x", *self.body, "return x"],
            ],
        ]
