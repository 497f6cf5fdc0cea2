"""Which Python functions run in a pass: all of them have to record, but for trusted ones.

Trusted is what decides nothing by itself that is not known otherwise: torch, Python's own library,
NumPy and fmapkit. What they are given, and what they give back, is recorded where it is used.
"""

from __future__ import annotations

import dis
import gc
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fmapkit.paths.rewriting import known_as, qualified_name
from fmapkit.paths.twins import is_twin
from fmapkit.torchlib.caching import remembered
from fmapkit.torchlib.call_override import not_compiled

_SEPARATOR = os.sep
_STDLIB = tuple(sysconfig.get_paths()[k] + _SEPARATOR for k in ("stdlib", "platstdlib"))
_SITE = tuple(sysconfig.get_paths()[k] + _SEPARATOR for k in ("purelib", "platlib"))
_HOMES = tuple(
    os.path.dirname(os.path.abspath(file)) + _SEPARATOR
    for file in (torch.__file__, np.__file__, os.path.dirname(__file__))
    if file is not None
)
_JUMPS = frozenset(dis.hasjrel) | frozenset(dis.hasjabs)
# Plain data of libraries, which call nothing of a model's: attributes of a configuration, and the
# containers that hold a model's results.
_PLAIN_DATA = (
    ("/transformers/", "configuration_utils.py", ""),
    ("/transformers/", "/utils/generic.py", "ModelOutput."),
)
# What dataclasses, named tuples and enumerations write by themselves.
_GENERATED = {"__init__", "__new__", "__eq__", "__hash__", "__repr__", "__setattr__", "_make"}
_verdicts: dict[tuple[types.CodeType, str], bool] = {}


def is_trusted(code: types.CodeType) -> bool:
    """Whether code need not record, by where it comes from."""
    try:
        found = _verdicts.get(known_as(code))
    except TypeError:  # dynamo has made it, of constants that have no hash
        return True
    if found is None:
        found = _verdicts[known_as(code)] = _is_trusted(code)
    return found


def trust(code: types.CodeType) -> None:
    """Have code that only looks on, as a profiler's, not recorded."""
    _verdicts[known_as(code)] = True


def is_installed(code: types.CodeType) -> bool:
    """Whether code is of a package that was installed."""
    return code.co_filename.startswith(_SITE)


@remembered
def runs_own_code(kind: type) -> bool:
    """Whether torch hands its functions to code of the model's own where a class is among them.

    Whoever looks at such a tensor runs that code, too: what it decides is nothing to go by.
    """
    function = getattr(getattr(kind, "__torch_function__", None), "__func__", None)
    code = getattr(function, "__code__", None)
    return code is not None and not is_trusted(code)


def _is_trusted(code: types.CodeType) -> bool:
    file = code.co_filename
    if file.startswith(_HOMES) or file.startswith("<frozen "):
        return True
    if file.startswith(_SITE):
        place = file.replace(_SEPARATOR, "/")
        return any(
            home in place and place.endswith(end) and qualified_name(code).startswith(name)
            for home, end, name in _PLAIN_DATA
        )
    if not file.startswith("<"):
        return file.startswith(_STDLIB)
    # `__new__` of a named tuple; of a dataclass, whether the other is of its class.
    if code.co_names == ("_tuple_new",) or code.co_name == "__eq__":
        return True
    if code.co_name not in _GENERATED:
        return False
    return not any(i.opcode in _JUMPS for i in dis.get_instructions(code))


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
    """Notes, for a while, which code runs in this thread that neither records nor is trusted."""

    def __init__(self, where: Callable[[], Any], aside: Container[types.CodeType]) -> None:
        # That code, told by its identity; the globals it ran with, and who ran it.
        self.found: dict[int, tuple[types.CodeType, dict[str, Any], list[Any]]] = {}
        self.complete = False  # nothing can have gone unseen
        self._where = where  # tells who runs it
        self._aside = aside  # code that need not record
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

    @contextmanager
    def away(self) -> Iterator[None]:
        """Look away for a while."""
        on = self._on and sys.getprofile() == self._see
        if on:
            sys.setprofile(None)
        try:
            yield
        finally:
            if on:
                sys.setprofile(self._see)

    @not_compiled
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
