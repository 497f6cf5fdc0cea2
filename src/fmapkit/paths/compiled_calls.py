"""Calls of what torch.compile has compiled, which run without us.

With a mode of ours on torch's stack, dynamo would compile our code into them.
"""

from __future__ import annotations

import types
from functools import partial
from typing import Any

from fmapkit.paths.sinks import is_registered
from fmapkit.torchlib.compiled_modules import is_compiled_function, is_optimized_type
from fmapkit.torchlib.modes import run_unseen

_FUNCTIONS = frozenset({types.FunctionType, types.MethodType})


def unseen(function: Any, kind: type) -> Any:
    """What to call in the place of a callable, of a type; itself where it is not compiled.

    Compiled modules of the model are called by an entry (see `compiled/entries.py`).
    """
    if kind in _FUNCTIONS:
        compiled = is_compiled_function(function)
    else:
        compiled = is_optimized_type(kind) and not is_registered(function)
    return partial(run_unseen, function) if compiled else function
