"""Calls of what torch.compile has compiled, or compiles: these run without us."""

from __future__ import annotations

import types
from functools import partial
from typing import Any

from fmapkit.paths.sinks import is_registered
from fmapkit.torchlib import apart
from fmapkit.torchlib.compiled_modules import is_compiled_function, is_optimized_type


def instead_of(function: Any, kind: type) -> Any:
    """What to call in the place of a callable, of a type; itself where nothing is compiled.

    Compiled modules of the model are called by an entry (see `compiled/entries.py`).
    """
    if kind is types.FunctionType or kind is types.MethodType:
        if is_compiled_function(function):
            return partial(apart.run_compiled, function)
        return apart.instead_of(function) if function.__name__ in apart.FACES else function
    if is_optimized_type(kind):
        return function if is_registered(function) else partial(apart.run_compiled, function)
    return apart.instead_of(function)
