"""What a watched pass was seen to do, step by step: what later passes are compared with.

A pass of a model that is not proven may take any road. But mostly it takes one that was seen
before. So each traced pass leaves a script: the torch functions that its scopes called, on which
tensors of the pass; the modules that began and ended; the units that were replayed; and, with each
of these, what it meant: which maps were held then, under which labels, and what the results carry.
A later pass follows the script as long as it does the same, which costs a comparison where tracing
would work all of it out anew. Where it departs, the tracer goes on, and its steps become another
branch.

Data only: `_following.py` compares, `_noting.py` writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fmapkit._axes import Axes
from fmapkit._operands import Operands
from fmapkit._origin import Origin

__all__ = ["Making", "Script", "Step"]

# How many passes in a row may leave the known roads before nobody follows them any more, and how
# many may do so before no more roads are noted.
_PATIENCE = 12
_MOST_ROADS = 32
# A pass that leaves them early costs more than one that nobody follows, about as much as one that
# keeps to them saves: how many more of the former than of the latter there may be.
_MOST_EARLY = 48


@dataclass(frozen=True, slots=True)
class Making:
    """One map that is held at a step.

    Attributes:
        source: which of the call's tensors it is, counted over its arguments; from -1 down, which
            of its results. Of a module, 0 is its first argument.
        before: it is copied before the call, which overwrites it.
        path: into a module's nested output.
    """

    source: int
    before: bool
    kind: str
    origin: Origin
    axes: Axes | None
    sigma: str | None
    path: str
    picked: tuple[int, ...] | None


class Step:
    """Something that a pass did.

    Attributes:
        kind: "call" of a torch function, "begin" or "end" of a module, "leaf" (a module that is not
            looked into), "unit", or "start".
        known: what the function is.
        function: it.
        module: the module, or the unit.
        scope: what kind of frame the module's is, as it begins.
        sizes: of a module that begins, those of an input that would make it another kind.
        whole: the module that ends is one nonlinearity.
        operands: what the function, the unit, or a module that may be one nonlinearity was given;
            what such a module returned.
        loose: where it is given other numbers than then, what its results carry tells whether it is
            the same step; else it is another one.
        writes: it may write to what it is given.
        simple: one tensor comes of it, and that is all.
        results: per tensor of its result, what that carries, a weight by its place in the model
            (`given` tells of it in another pass); None for nothing.
        paths: where in a unit's output these are; where a module's output has tensors.
        caller: the module whose name is a part of a map's label; None where none is.
        dims: of its result, if that is one tensor that carries something; else -1.
        ranks: how many axes each tensor of its result had.
        itself: it returned what it was given: a cast that casts nothing.
        rests: the sizes that what its results carry rests on; None where none has a say.
        kept: the module that ends returned a tensor of its input's shape.
        makings: the maps held.
        dropped: maps, counted from the start of the pass, that turned out not to be what they
            were taken for.
        pending: of each map of a unit, whether it may yet turn out so.
        claimed: origins that a nonlinearity has received.
        counted: layers of which this was another call.
        plan: of the unit.
        unit: tells what a leaf's road depends on.
        state: what that was; None where it depends on nothing.
        inputs: what the unit's tensors carried, in the same way.
        carried: the same, as a part of what tells the unit's calls apart.
        base: how many calls of each of its layers there had been.
        origins: of the unit's maps, by the plan's own names for them.
        then: the step after it that was seen first.
        instead: another one in this one's place.
        before: the step before it.
    """

    __slots__ = (
        *("base", "before", "caller", "carried", "claimed", "counted", "dims", "dropped"),
        "function",
        *("inputs", "instead", "itself", "kept", "kind", "known", "loose", "makings", "module"),
        *("operands", "ranks", "rests", "scope", "simple", "sizes", "state", "unit", "whole"),
        "writes",
        *("origins", "paths", "pending", "plan", "results", "then"),
    )

    def __init__(self, kind: str, before: Step | None) -> None:
        self.kind = kind
        self.before = before
        self.then: Step | None = None
        self.instead: Step | None = None
        self.known: Any = None
        self.function: Any = None
        self.module: nn.Module | None = None
        self.caller: nn.Module | None = None
        self.operands: Operands | None = None
        self.loose = self.writes = self.simple = False
        self.scope = "plain"
        self.sizes: frozenset[int] | None = None
        self.whole = False
        self.results: tuple[Any, ...] = ()
        self.paths: tuple[str, ...] = ()
        self.dims = -1
        self.ranks: tuple[int, ...] = ()
        self.itself = False
        self.rests: Any = None
        self.kept = False
        self.makings: tuple[Making, ...] = ()
        self.dropped: tuple[int, ...] = ()
        self.pending: tuple[bool, ...] = ()
        self.claimed: tuple[Origin, ...] = ()
        self.counted: tuple[str, ...] = ()
        self.plan: Any = None
        self.unit: Any = None
        self.state: Any = None
        self.inputs: list[Any] = []
        self.carried: Any = None
        self.base: dict[str, int] = {}
        self.origins: Any = None

    def path(self) -> list[Step]:
        """From the start to here."""
        found: list[Step] = [self]
        while found[-1].before is not None:
            found.append(found[-1].before)
        return found[::-1]


class Script:
    """The known roads of the passes of one kind.

    Attributes:
        start: where all of them begin; its results are what comes into the pass.
        left_at: how far the latest pass had come when it left them.
    """

    def __init__(self) -> None:
        self.start = Step("start", None)
        self.left_at = 0
        self._longest = 0
        self._early = 0
        self._in_a_row = 0
        self._strayed = 0

    @property
    def worth_it(self) -> bool:
        """Whether passes mostly do what an earlier one did."""
        return self._in_a_row < _PATIENCE and self._early < _MOST_EARLY

    @property
    def open(self) -> bool:
        """Whether more roads are to be noted."""
        return self._strayed < _MOST_ROADS

    def add(self, step: Step) -> None:
        """A step that was not seen there before."""
        assert step.before is not None
        if step.before.then is None:
            step.before.then = step
            return
        other = step.before.then
        while other.instead is not None:
            other = other.instead
        other.instead = step

    def ended(self, come: int | None) -> None:
        """A pass has ended.

        Args:
            come: how far it had come on the known roads; None if it has left them.
        """
        strayed = come is None
        self._strayed += strayed
        if come is not None:
            self._longest = come
            self._early = max(self._early - 1, 0)
        elif 2 * self.left_at < self._longest:
            self._early += 1
        self._in_a_row = self._in_a_row + 1 if strayed else 0
