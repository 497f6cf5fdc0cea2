"""Attributes that need no look where code reads them, and those that need one where it sets them.

In `self.conv(x)`, what is called need not be recorded where `conv` is a child of every module that
the method may belong to: the model's structure is compared before each pass. The same holds for
functions of a module's class, which mark where they begin. Nor need plain values that are handed to
code that records: whatever it decides by them, it records itself.

What torch's own code reads is compared before each call (`replay/attribute_guard.py`). What is
assigned to it later in a pass is recorded.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from fmapkit.paths.trusted import is_trusted

__all__ = ["NONE_FIXED", "OF_TORCHS", "Fixed", "FixedAttributes", "records"]

# Attributes that torch's own modules decide by, as they are compiled: `inplace`, `p`, `dim`, …
OF_TORCHS = frozenset({"training"}).union(
    *(
        getattr(kind, "__constants__", ())
        for kind in vars(nn).values()
        if isinstance(kind, type) and issubclass(kind, nn.Module)
    )
)


class Fixed(NamedTuple):
    """Attributes of a method's first argument that are compared before each pass.

    Attributes:
        names: of children, and of functions of its class.
        recording: those of them that run code that records, with whatever they are given.
    """

    names: frozenset[str]
    recording: frozenset[str]

    def both(self, other: Fixed) -> Fixed:
        """What holds for the one and for the other."""
        return Fixed(self.names & other.names, self.recording & other.recording)


NONE_FIXED = Fixed(frozenset(), frozenset())


class FixedAttributes:
    """Tells them, for the methods of one model's modules.

    Args:
        modules: those of the model.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._of_class: dict[str, Fixed] = {}
        for module in modules:
            own = _fixed(module)
            for base in type(module).__mro__:
                if base is nn.Module:
                    break
                name = base.__qualname__
                known = self._of_class.get(name)
                self._of_class[name] = own if known is None else known.both(own)

    def __call__(self, code: types.CodeType) -> Fixed:
        """Those of the first argument of a method, told by its qualified name."""
        # Python 3.10 keeps no qualified name.
        name: str = getattr(code, "co_qualname", "")
        owner = name.partition(".<locals>")[0].rpartition(".")[0]
        return self._of_class.get(owner, NONE_FIXED)


_functions: dict[type, Fixed] = {}


def _fixed(module: nn.Module) -> Fixed:
    kind = type(module)
    functions = _functions.get(kind)
    if functions is None:
        found: dict[str, object] = {}
        for base in reversed(kind.__mro__):
            found.update(vars(base))
        names = frozenset(n for n, v in found.items() if type(v) is types.FunctionType)
        recording = frozenset(n for n in names if records(found[n]))
        functions = _functions[kind] = Fixed(names, recording)
    children = {n: child for n, child in module._modules.items() if child is not None}
    theirs = frozenset(n for n, child in children.items() if _call_records(type(child)))
    own = module.__dict__.keys()
    names = functions.names.union(children).difference(own)
    return Fixed(names, functions.recording.difference(children).union(theirs).difference(own))


def records(function: Any) -> bool:
    """Whether a function is of the model's code, which records, or else is traced in every pass.

    Not so a lambda: what it was given is recorded by whoever gives it (see `picking.py`).
    """
    if type(function) is not types.FunctionType or function.__code__.co_name == "<lambda>":
        return False
    return not is_trusted(function.__code__)


def _call_records(kind: type[nn.Module]) -> bool:
    """The same of the call of a module: torch's own code only hands on what it is given there."""
    # Of a scripted module, these are attributes in name only.
    call, forward = getattr(kind, "__call__", None), getattr(kind, "forward", None)  # noqa: B004
    return records(forward) and (call is nn.Module.__call__ or records(call))
