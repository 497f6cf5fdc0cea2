"""Which Python functions run in a pass: all of them have to record, but for trusted ones."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Callable, Container
from typing import Any

from fmapkit.paths.trusted import is_trusted
from fmapkit.paths.twins import is_twin

__all__ = ["Survey"]


def _is_aside(frame: types.FrameType | None) -> bool:
    """Whether code runs at a moment that is not the model's choice.

    That is since a module is imported for the first time, or Python's garbage collector has begun.
    """
    collecting = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib"):
            return True
        if code.co_name == "__del__" or code in collecting:
            return True
        frame = frame.f_back
    return False


class Survey:
    """Notes, for a while, which code runs in this thread that does not record and is not trusted.

    Args:
        where: tells who runs it.
        aside: code that need not record.

    Attributes:
        found: that code, told by its identity; the globals it ran with, and who ran it.
        complete: nothing can have gone unseen.
    """

    def __init__(self, where: Callable[[], Any], aside: Container[types.CodeType]) -> None:
        self.found: dict[int, tuple[types.CodeType, dict[str, Any], list[Any]]] = {}
        self.complete = False
        self._where = where
        self._aside = aside
        self._on = False

    def start(self) -> None:
        """Look from here on; not where somebody else has a profiler."""
        if sys.getprofile() is None:
            self._on = self.complete = True
            sys.setprofile(self._see)

    def stop(self) -> None:
        """Look no more."""
        if self._on:
            self._on = False
            if sys.getprofile() == self._see:
                sys.setprofile(None)
            else:
                self.complete = False

    def _see(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if is_trusted(code) or is_twin(code) or code in self._aside:
            return
        if _is_aside(frame):
            return
        who = self._where()
        runners = self.found.setdefault(id(code), (code, frame.f_globals, []))[2]
        if who not in runners:
            runners.append(who)
