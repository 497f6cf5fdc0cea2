"""What is running right now: calls of modules, and one nonlinearity, with what may be edited of it.

The tracer fills it in and reads it again when the call ends. Which modules run where no hook of
ours tells, Python's own stack does.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fmapkit.instrumentation import method_called
from fmapkit.provenance import ChannelLayout, Label, Linearity, Pointwise
from fmapkit.storage import StoredTensor
from fmapkit.torchlib.nested import tensors_in

# Of a tensor that edits are asked for: the module's name, "input" or "output", which call of it,
# and the path; and where its filters lie, whether another tensor went on in its place, and how many
# decisions had been taken by then.
Place = tuple[str, str, int, str]
Placed = tuple[ChannelLayout | None, bool, int]

_CALL = nn.Module._call_impl.__code__
_ABOUT = nn.Module._wrapped_call_impl.__code__
_METHOD = method_called.__code__
_NONE: Counter[str] = Counter()


# Written out, and no dataclasses: the `__init__` of one is of no file, and a survey of what code
# runs in a pass (`paths/survey.py`) would take it for the model's.
class Frame:
    """One running call of a module."""

    __slots__ = (
        *("module", "args", "kwargs", "kind", "start", "x", "key", "x_held", "degrees"),
        *("in_place", "kept", "tag", "a", "watched", "inner", "_pointwise", "ran", "unseen"),
        *("counts", "firing", "nested", "own", "position", "replaced", "site", "turns", "writes"),
    )

    def __init__(
        self,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        start: int,
        firing: int,
        writes: int,
        replaced: tuple[Any, Any] | None = None,
        nested: list[weakref.ref[Tensor]] | None = None,
    ) -> None:
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.kind = "plain"  # "sigma", "candidate", "layer" (a registered, opaque one)
        self.start = start  # how many events there were
        self.x: Tensor | None
        self.key: str | None
        plain = bool(args) and type(args[0]) is Tensor
        self.x, self.key = (args[0], None) if plain else first_tensor(args, kwargs)
        self.a: Any = None  # what the σ function inside a registered σ module returned
        self.x_held: StoredTensor | None = None
        self.degrees: Linearity | None = None  # of a candidate
        self.watched = False  # it is in a candidate, or is one
        self.in_place = False
        self.kept = False  # it left the memory of x as it was
        self.tag: Label = None  # what x carries
        self.counts = _NONE  # as it began; of a region that is learned
        self.firing = firing  # how many hook points there were
        self.position = 0  # how many decisions of the pass had been taken
        self.writes = writes  # how many writes to memory there had been
        self.nested = nested  # the tensors in its arguments as it began, if it might change them
        self.own: list[Callable[[], Any]] = []  # those that its modules have, of a region
        # How often each function was given a weight, by the layer that made that.
        self.turns: Counter[tuple[str, str | None]] | None = None
        self.site: EditSite | None = None  # something to edit
        self.replaced = replaced  # the arguments that it is to get instead
        self._pointwise: Pointwise | None = None
        self.ran = False  # the function inside that a registered σ module is
        self.inner: tuple[str, Any] | None = None  # another one that got x, and its result
        # Of a candidate: (layer, reason) of what is missed in it, unless it is one σ as a whole.
        self.unseen: list[tuple[str, str]] = []

    @property
    def pointwise(self) -> Pointwise:
        """What is computed in it point by point."""
        found = self._pointwise
        if found is None:
            found = self._pointwise = Pointwise()
        return found

    def given(self) -> list[Tensor | None]:
        """The tensors in its arguments as it began; None for one that is gone."""
        if self.nested is not None:
            return [one() for one in self.nested]
        return [*tensors_in(*self.args, self.kwargs)]

    def passed(self, x: Any, y: Any) -> dict[str, Any]:
        """What an event is to know that has run in the call: x and y, where x came in."""
        if x is None or x is not self.x:
            return {}
        return {"passed": (x, y), "key": self.key}

    def take(self, x: Tensor) -> None:
        """Another tensor came in."""
        if self.degrees is not None:
            self.degrees.enter(x)
        self.x = x


class SigmaCall:
    """A nonlinearity about to run."""

    __slots__ = (
        *("args", "function", "held", "in_place", "kept", "kwargs", "original", "place", "sigma"),
        *("site", "tag", "unheld", "z"),
    )

    def __init__(
        self, function: Any, args: Any, kwargs: Any, sigma: str, z: Tensor, tag: Label
    ) -> None:
        self.sigma = sigma
        self.place = 0  # which of the tensor arguments z is
        self.unheld: str | None = None  # why z cannot be held
        self.function = function
        self.original = function
        self.args = args
        self.kwargs = kwargs
        self.z = z
        self.tag = tag
        self.held: StoredTensor | None = None
        self.in_place = False
        self.kept = False  # σ leaves the memory of z as it was
        self.site: EditSite | None = None  # something to edit


class EditSite:
    """A nonlinearity with something to edit, while it runs.

    Attributes:
        name: the layer's label.
        call: which call of it.
        z: what came in.
        z_edited: what σ got in its place.
        a_edited: what goes on in the place of σ's result.
        base: memory that the model will read the result from, where that is not the result's own.
    """

    __slots__ = ("a_edited", "axes", "base", "call", "name", "sigma", "version", "z", "z_edited")

    def __init__(
        self, name: str, call: int, sigma: str, axes: ChannelLayout | None, z: Tensor
    ) -> None:
        self.name = name
        self.call = call
        self.sigma = sigma
        self.axes = axes
        self.z = z
        self.z_edited: StoredTensor | None = None
        self.a_edited: StoredTensor | None = None
        self.base: Tensor | None = None
        self.version = 0


def first_tensor(args: Any, kwargs: Any) -> tuple[Tensor | None, str | None]:
    """The first argument if it is a tensor, by place or by keyword."""
    if args:
        return (args[0], None) if isinstance(args[0], Tensor) else (None, None)
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            return value, key
    return None, None


def call_frame() -> Any:
    """Python's own frame of the innermost call of a module, running or about to run."""
    at: Any = sys._getframe(1)
    while at is not None and at.f_code is not _CALL and at.f_code is not _ABOUT:
        if at.f_code is _METHOD:
            break
        at = at.f_back
    return at


def on_stack(frame: Any) -> bool:
    """Whether a frame of Python's is still running."""
    at: Any = sys._getframe(1)
    while at is not None and at is not frame:
        at = at.f_back
    return at is not None


def running_module(ours: int) -> nn.Module | None:
    """The module whose call is the innermost on Python's own stack.

    Args:
        ours: so many callers are not looked at: each look makes a frame object.
    """
    at = sys._getframe(ours + 1)
    while at is not None and at.f_code is not _CALL and at.f_code is not _METHOD:
        at = at.f_back  # type: ignore[assignment]
    running: nn.Module | None = at.f_locals.get("self") if at is not None else None
    return running


def running_modules(stop: Any) -> list[nn.Module]:
    """The modules whose calls are on Python's stack up to a frame's code, outermost first."""
    found: list[nn.Module] = []
    at = sys._getframe(1)
    while at is not None and at.f_code is not stop:
        if at.f_code is _CALL:
            found.append(at.f_locals["self"])
        at = at.f_back  # type: ignore[assignment]
    return found[::-1]
