"""Calls past a region: a traced module calls what hooks of ours would tell of as its part only.

From the next pass on, such modules have hooks. In this one, Python's stack tells that they run, and
what they call is seen; but not when they began, nor so what they are as a whole.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from fmapkit.instrumentation import Pair
from fmapkit.tracing.candidates import may_be_sigma, role_of
from fmapkit.tracing.frames import first_tensor

__all__ = ["HIDDEN", "bare_calls", "is_hidden"]

HIDDEN = (
    "it reached {!r}, which may be one nonlinearity or layer itself: it was called on its own, so "
    "far only as a part of another module, and is seen as a whole from the next pass on"
)
_CALL = nn.Module._call_impl.__code__
_AROUND = Pair._around.__code__

Call = tuple[nn.Module, Any, Any]


def bare_calls(hooked: nn.Module) -> list[Call]:
    """The calls that are under way inside the innermost one that hooks tell of, innermost first.

    Args:
        hooked: the module whose call that is.

    Returns:
        The module of each, and its arguments.
    """
    found: list[Call] = []
    at = sys._getframe(2)
    while at is not None:
        if at.f_code is _CALL:
            if at.f_back is not None and at.f_back.f_code is _AROUND:
                break
            here = at.f_locals
            if here["self"] is hooked:
                break
            found.append((here["self"], here["args"], here["kwargs"]))
        at = at.f_back  # type: ignore[assignment]
    return found


def is_hidden(call: Call) -> bool:
    """Whether a call is one whose functions may be a part of one nonlinearity, or of a layer."""
    module, args, kwargs = call
    role = role_of(module)
    if role != "open":
        return role == "layer"
    x, _ = first_tensor(args, kwargs)
    return x is not None and may_be_sigma(module, args, kwargs, x)
