"""What is running right now: calls of modules, and one nonlinearity, with what may be edited of it.

The tracer fills it in and reads it again when the call ends. Which modules run where no hook of
ours tells, Python's own stack does.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fmapkit.instrumentation import method_called
from fmapkit.provenance import ChannelLayout, Label, Linearity, Pointwise
from fmapkit.storage import StoredTensor

__all__ = [
    *("Frame", "SigmaCall", "EditSite", "call_frame", "first_tensor", "on_stack", "running_module"),
    "running_modules",
]

_CALL = nn.Module._call_impl.__code__
_ABOUT = nn.Module._wrapped_call_impl.__code__
_METHOD = method_called.__code__
_NONE: Counter[str] = Counter()


@dataclass(slots=True, eq=False, repr=False)
class Frame:
    """One running call of a module."""

    module: nn.Module
    args: Any
    kwargs: Any
    start: int  # how many events there were
    firing: int  # how many hook points there were
    replaced: tuple[Any, Any] | None  # the arguments that it is to get instead
    kind: str = "plain"  # "sigma", "candidate", "layer" (a registered, opaque one)
    x: Tensor | None = field(init=False)
    key: str | None = field(init=False)
    a: Any = None  # what the σ function inside a registered σ module returned
    x_held: StoredTensor | None = None
    degrees: Linearity | None = None  # of a candidate
    watched: bool = False  # it is in a candidate, or is one
    in_place: bool = False
    kept: bool = False  # it left the memory of x as it was
    tag: Label = None  # what x carries
    # As it began; of a region that is learned.
    counts: Counter[str] = field(default_factory=lambda: _NONE)
    position: int = 0  # how many decisions of the pass had been taken
    # How often each function was given a weight, by the layer that made that.
    turns: Counter[tuple[str, str | None]] | None = None
    site: EditSite | None = None  # something to edit
    pointwise: Pointwise = field(default_factory=Pointwise)
    ran: bool = False  # the function inside that a registered σ module is
    inner: tuple[str, Any] | None = None  # another one that got x, and its result

    def __post_init__(self) -> None:
        self.x, self.key = first_tensor(self.args, self.kwargs)

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


@dataclass(slots=True, eq=False, repr=False)
class SigmaCall:
    """A nonlinearity about to run."""

    function: Any
    args: Any
    kwargs: Any
    sigma: str
    z: Tensor
    tag: Label
    original: Any = field(init=False)
    place: int = 0  # which of the tensor arguments z is
    unheld: str | None = None  # why z cannot be held
    held: StoredTensor | None = None
    in_place: bool = False
    kept: bool = False  # σ leaves the memory of z as it was
    site: EditSite | None = None  # something to edit

    def __post_init__(self) -> None:
        self.original = self.function


@dataclass(slots=True, eq=False, repr=False)
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

    name: str
    call: int
    sigma: str
    axes: ChannelLayout | None
    z: Tensor
    z_edited: StoredTensor | None = None
    a_edited: StoredTensor | None = None
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
