"""The captures that are open in the same thread, as far as they concern each other.

Two that only read go together. One that edits changes what runs: where its edit falls among the
looks of another one, before it, after it or in between, would depend on how a nonlinearity is
written, and the other one's z and a would be no pair. One that ends a pass ends it for all.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Protocol

from fmapkit.errors import CaptureStateError
from fmapkit.session.config import CaptureConfig
from fmapkit.torchlib.compiled_modules import holds


class OpenCapture(Protocol):
    """What `Passes` is to other captures' ones."""

    asked: CaptureConfig

    @property
    def thread(self) -> int: ...

    @property
    def waits(self) -> bool: ...

    def cut(self) -> None: ...


_open: weakref.WeakSet[OpenCapture] = weakref.WeakSet()
_lock = threading.Lock()  # other threads enter and leave blocks of their own


def entered(session: OpenCapture) -> None:
    """A block begins.

    Raises:
        CaptureStateError: an edit, its own or another one's, bars it.
    """
    for other in others(session):
        if session.asked.edits or other.asked.edits:
            mine = "with edit= " if session.asked.edits else ""
            theirs = "with edit= " if other.asked.edits else ""
            raise CaptureStateError(
                f"a capture {mine}of {_name(session)} cannot be entered while one {theirs}of "
                f"{_name(other)} is open: an edit changes what the other one would see. Put all "
                "edits into one edit={...}; fm.tensor is what was, fm.edited what went on"
            )
    with _lock:
        _open.add(session)


def left(session: OpenCapture) -> None:
    """It has ended."""
    with _lock:
        _open.discard(session)


def others(session: OpenCapture) -> Iterator[OpenCapture]:
    """The other captures that are open in its thread on its model, a part of it, or around it."""
    mine = session.asked.model
    with _lock:
        every = tuple(_open)
    for other in every:
        if other is not session and other.thread == session.thread:
            if holds(other.asked.model, mine) or holds(mine, other.asked.model):
                yield other


def _name(session: OpenCapture) -> str:
    return type(session.asked.model).__name__
