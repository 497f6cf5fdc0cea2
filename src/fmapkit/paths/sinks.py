"""Where the decisions of a pass go, while it is recorded in this thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor, nn

ident: Callable[[], int] = threading.get_ident


@dataclass(slots=True, eq=False)
class DecisionSink:
    """Where one thread's items go while it records."""

    # Names the place of a parameter in the model; None for any other tensor.
    place_of: Callable[[Tensor], str | None]
    modules: Container[nn.Module]
    met: Callable[[type], None]  # called with the classes of others that are about to run
    items: list[Any]  # the decisions taken so far
    users: int = 0  # how many captures record


# By thread: the `append` of its list of items, and what it belongs to.
_appends: dict[int, Callable[[Any], None]] = {}
append_of: Any = _appends.get
sinks: dict[int, DecisionSink] = {}
# Called with its frame when a function that records begins, or goes on, where nothing is recorded;
# with None when another capture comes.
when_unrecorded: list[Callable[[FrameType | None], None]] = []


def is_registered(module: nn.Module) -> bool:
    """Whether a module is one of the model's whose pass is recorded in this thread."""
    sink = sinks.get(ident())
    return sink is not None and module in sink.modules


def start(
    place_of: Callable[[Tensor], str | None],
    modules: Container[nn.Module],
    met: Callable[[type], None],
) -> DecisionSink:
    """Record in this thread; where that is done already, go on with it."""
    thread = ident()
    sink = sinks.get(thread)
    if sink is None:
        sink = sinks[thread] = DecisionSink(place_of, modules, met, [])
        _appends[thread] = sink.items.append
    sink.users += 1
    return sink


def stop() -> None:
    """Record no more in this thread, unless somebody else does."""
    thread = ident()
    sink = sinks.get(thread)
    if sink is not None:
        sink.users -= 1
        if not sink.users:
            del _appends[thread], sinks[thread]


def tell_unrecorded(frame: FrameType) -> None:
    """A function has begun, or goes on, in a thread that does not record."""
    for tell in tuple(when_unrecorded):
        tell(frame)


@contextmanager
def unrecorded() -> Iterator[None]:
    """What runs here in this thread is no part of the pass that is under way."""
    thread = ident()
    sink, append = sinks.pop(thread, None), _appends.pop(thread, None)
    try:
        yield
    finally:
        if sink is not None and append is not None:
            sinks[thread], _appends[thread] = sink, append
