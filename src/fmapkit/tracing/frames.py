"""What is running right now: calls of modules, and one nonlinearity, with what may be edited of it.

The tracer fills it in and reads it again when the call ends. Which modules run where no hook of
ours tells, Python's own stack does.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
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


# What is a list of its own is made in `__post_init__`: by `default_factory`, the `__init__` of a
# dataclass has a branch, and is of no file, and a survey of what code runs in a pass
# (`paths/survey.py`) would take it for the model's.
@dataclass(slots=True, eq=False)
class Frame:
    """One running call of a module."""

    module: nn.Module
    args: Any
    kwargs: Any
    start: int  # how many events there were
    hook_point: int  # how many hook points there were
    writes: int  # how many writes to memory there had been
    replaced: tuple[Any, Any] | None = None  # the arguments that it is to get instead
    # The tensors in its arguments as it began, if it might change them.
    nested: list[weakref.ref[Tensor]] | None = None
    kind: str = "plain"  # "sigma", "candidate", "layer" (a registered, opaque one)
    x: Tensor | None = field(init=False)
    key: str | None = field(init=False)
    a: Any = None  # what the σ function inside a registered σ module returned
    x_held: StoredTensor | None = None
    degrees: Linearity | None = None  # of a candidate
    watched: bool = False  # it is in a candidate, or is one
    in_place: bool = False
    kept: bool = False  # it left the memory of x as it was
    label: Label = None  # what x carries
    counts: Counter[str] = field(init=False)  # as it began; of a region that is learned
    position: int = 0  # how many decisions of the pass had been taken
    own: list[Callable[[], Any]] = field(init=False)  # those that its modules have, of a region
    # How often each function was given a weight, by the layer that made that.
    turns: Counter[tuple[str, str | None]] | None = None
    site: EditSite | None = None  # something to edit
    pointwise: Pointwise = field(init=False)  # what is computed in it point by point
    ran: bool = False  # the function inside that a registered σ module is
    inner: tuple[str, Any] | None = None  # another one that got x, and its result
    # Of a candidate: (layer, reason) of what is missed in it, unless it is one σ as a whole.
    unseen: list[tuple[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        args = self.args
        plain = bool(args) and type(args[0]) is Tensor
        self.x, self.key = (args[0], None) if plain else first_tensor(args, self.kwargs)
        self.counts, self.own, self.unseen, self.pointwise = _NONE, [], [], Pointwise()

    def given(self) -> list[Tensor | None]:
        """The tensors in its arguments as it began; None for one that is gone."""
        if self.nested is not None:
            return [one() for one in self.nested]
        return [*tensors_in(*self.args, self.kwargs)]

    def passed(self, x: Any, y: Any) -> dict[str, Any]:
        """What an event is to know that has run in the call: x and y, where x came in."""
        if x is None or x is not self.x:
            return {}
        return {"x": x, "y": y, "key": self.key}

    def take(self, x: Tensor) -> None:
        """Another tensor came in."""
        if self.degrees is not None:
            self.degrees.enter(x)
        self.x = x


@dataclass(slots=True, eq=False)
class SigmaCall:
    """A nonlinearity about to run."""

    function: Any
    args: Any
    kwargs: Any
    sigma: str
    z: Tensor
    label: Label
    place: int = 0  # which of the tensor arguments z is
    original: Any = field(init=False)
    unheld: str | None = None  # why z cannot be held
    held: StoredTensor | None = None
    in_place: bool = False
    kept: bool = False  # σ leaves the memory of z as it was
    site: EditSite | None = None  # something to edit

    def __post_init__(self) -> None:
        self.original = self.function


@dataclass(slots=True, eq=False)
class EditSite:
    """A nonlinearity with something to edit, while it runs."""

    name: str  # the layer's label
    call: int  # which call of it
    sigma: str
    axes: ChannelLayout | None
    z: Tensor  # what came in
    z_edited: StoredTensor | None = None  # what σ got in its place
    a_edited: StoredTensor | None = None  # what goes on in the place of σ's result
    # Memory that the model will read the result from, where that is not the result's own.
    base: Tensor | None = None
    version: int = 0


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


def running_module() -> nn.Module | None:
    """The module whose call is the innermost on Python's own stack."""
    at = sys._getframe(3)  # not at those who ask: each look makes a frame object
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
