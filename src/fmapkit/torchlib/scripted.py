"""Which scripted functions are called while a block is open.

torch runs what is scripted without Python, and a `TorchFunctionMode` is not told of it. A model
reaches such a function in any way Python has: by name, in a helper, from a table. So whether it is
called is not read off the code but asked at the call itself, which is where its type says so:
torch has no hook there. While a block is open, the `__call__` of these types is a function of ours
that tells the open sessions and goes on to torch's own. With the last block that is put back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_Told = Callable[[str], None]

# A function, and a method of a scripted module.
_TYPES: tuple[Any, ...] = (torch.jit.ScriptFunction, torch._C.ScriptMethod)
_calls = {kind: kind.__call__ for kind in _TYPES}
_told: tuple[_Told, ...] = ()
_lock = threading.Lock()


def _telling(kind: Any) -> Callable[..., Any]:
    torchs_own = _calls[kind]

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        for told in _told:
            told(_name(function))
        return torchs_own(function, *args, **kwargs)

    return call


def _name(function: Any) -> str:
    owner = getattr(function, "owner", None)  # of a method
    return function.name if owner is None else f"{owner._type().name()}.{function.name}"


def tell(told: _Told) -> None:
    """Have a function called with the name of each scripted function as it is called."""
    global _told
    with _lock:
        if not _told:
            for kind in _TYPES:
                kind.__call__ = _telling(kind)
        _told = (*_told, told)


def tell_no_more(told: _Told) -> None:
    """Undo `tell`; the last one to go leaves torch's own calls."""
    global _told
    with _lock:
        left = tuple(t for t in _told if t != told)
        if _told and not left:
            for kind in _TYPES:
                kind.__call__ = _calls[kind]
        _told = left
