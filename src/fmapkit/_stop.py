"""Early stop: the forward ends once every wanted map of the first, complete pass is there.

The way out is an exception, raised by our hooks and caught by a forward of ours around the model's
own; the model's call then returns None.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from fmapkit._store import Entry, Pass

__all__ = ["CUT", "Stop", "StopForward", "StoppedError", "has_own_forward"]


CUT = (
    "another capture, with stop=True, ended the pass at the last map that it wants: what comes "
    "after that does not run, so it is not captured here either"
)


class StoppedError(BaseException):
    """All wanted maps are there. Not an `Exception`: a forward that catches those lets it pass."""

    def __init__(self, stop: Stop) -> None:
        super().__init__("fmapkit: every wanted map is there")
        self.stop = stop


def _tag(entry: Entry) -> Any:
    return entry.origin.name, entry.origin.call, entry.kind, entry.path, entry.sigma


class Stop:
    """Knows what is still wanted in a pass.

    Attributes:
        awaited: whether another capture that ends passes still wants something of this one.
    """

    def __init__(self) -> None:
        self.awaited: Callable[[], bool] = bool
        self._wanted: frozenset[Any] | None = None  # by the first complete pass
        self._missing: set[Any] = set()
        self._ended = False

    def begin(self) -> None:
        """A pass begins."""
        self._missing = set(self._wanted or ())
        self._ended = False

    def saw(self, entry: Entry) -> None:
        """A map is there."""
        self._missing.discard(_tag(entry))

    @property
    def ended(self) -> bool:
        """Whether this pass was ended."""
        return self._ended

    @property
    def complete(self) -> bool:
        """Whether all that the first one had is there."""
        return bool(self._wanted) and not self._missing

    def learn(self, whole: Pass) -> None:
        """A pass went through to its end; the first one's maps are what is wanted."""
        if self._wanted is None:
            self._wanted = frozenset(map(_tag, whole.entries()))

    def forget(self) -> None:
        """The model has changed: the next pass is a complete one."""
        self._wanted = None
        self._missing.clear()

    def check(self) -> None:
        """End the pass if all that the first one had is there.

        Raises:
            StoppedError: it is, and no other capture that ends passes waits for more.
        """
        if self.complete:
            self.end()

    def end(self) -> None:
        """End the pass.

        Raises:
            StoppedError: no other capture that ends passes waits for more; if one does, it will end
                this one.
        """
        if self.awaited():
            return
        self._ended = True
        raise StoppedError(self)


class StopForward:
    """The model's forward, until it is stopped.

    Args:
        model: whose forward it is.
        stop: ends it.
        tell: called when that has happened.
    """

    def __init__(self, model: nn.Module, stop: Stop, tell: Callable[[], None]) -> None:
        self.model = model
        self.stop: Stop | None = stop
        self._tell: Callable[[], None] | None = tell
        self.theirs = False  # whether the instance has a forward of its own
        self.forward: Any = None

    def install(self) -> None:
        """Stand before the model's own forward, or that of another capture."""
        self.theirs = "forward" in self.model.__dict__
        self.forward = self.model.forward
        self.model.__dict__["forward"] = self

    def remove(self) -> None:
        """Put back what was there; if another stands before us, be transparent."""
        self.stop = self._tell = None
        if self.model.__dict__.get("forward") is self:
            del self.model.__dict__["forward"]
            below = self
            while isinstance(below.forward, StopForward) and below.forward.stop is None:
                below = below.forward  # of a capture that has ended before us
            if below.theirs:
                self.model.__dict__["forward"] = below.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.forward(*args, **kwargs)
        except StoppedError as stopped:
            if stopped.stop is not self.stop:
                raise
            if self._tell is not None:
                self._tell()
            return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model runs to its end."""
        if self.theirs:
            return copy.deepcopy(self.forward, memo)
        return MethodType(type(self.model).forward, memo.get(id(self.model), self.model))

    def __reduce__(self) -> Any:
        if self.theirs:
            return _itself, (self.forward,)
        return _method, (type(self.model).forward, self.model)


def _itself(value: Any) -> Any:
    return value


def _method(function: Any, model: Any) -> Any:
    return MethodType(function, model)


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own, other than ours."""
    own = module.__dict__.get("forward")
    return own is not None and not (isinstance(own, StopForward) and not own.theirs)
