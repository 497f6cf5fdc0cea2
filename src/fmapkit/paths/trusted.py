"""Code that need not record: torch, Python's own library, NumPy, fmapkit, plain data of others.

It decides nothing by itself that is not known otherwise. What it is given, and what it gives back,
is recorded where it is used.
"""

from __future__ import annotations

import dis
import os
import sysconfig
import types

import numpy as np
import torch

from fmapkit.paths.syntax import known_as
from fmapkit.torchlib.class_cache import remembered

__all__ = ["is_installed", "is_trusted", "runs_own_code", "trust"]

_SEPARATOR = os.sep
_STDLIB = {sysconfig.get_paths()[k] + _SEPARATOR for k in ("stdlib", "platstdlib")}
_SITE = {sysconfig.get_paths()[k] + _SEPARATOR for k in ("purelib", "platlib")}
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
    found = _verdicts.get(known_as(code))
    if found is None:
        found = _verdicts[known_as(code)] = _is_trusted(code)
    return found


def trust(code: types.CodeType) -> None:
    """Have code that only looks on, as a profiler's, not recorded."""
    _verdicts[known_as(code)] = True


def is_installed(code: types.CodeType) -> bool:
    """Whether code is of a package that was installed."""
    return code.co_filename.startswith(tuple(_SITE))


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
    if any(map(file.startswith, _SITE)):
        place = file.replace(_SEPARATOR, "/")
        return any(
            home in place and place.endswith(end) and _qualified(code).startswith(name)
            for home, end, name in _PLAIN_DATA
        )
    if any(map(file.startswith, _STDLIB)):
        return True
    if file.startswith("<") and code.co_name in _GENERATED:
        if code.co_name == "__eq__":  # of a dataclass: whether the other is of its class
            return True
    if file.startswith("<") and code.co_names == ("_tuple_new",):  # `__new__` of a named tuple
        return True
    if file.startswith("<") and code.co_name in _GENERATED:
        return not any(i.opcode in _JUMPS for i in dis.get_instructions(code))
    return False


def _qualified(code: types.CodeType) -> str:
    """The qualified name of code; its plain name in Python 3.10, which keeps no other."""
    found: str = getattr(code, "co_qualname", code.co_name)
    return found
