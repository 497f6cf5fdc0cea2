"""Attributes that need no look where code reads them, and those that need one where it sets them.

In `self.conv(x)`, what is called need not be recorded where `conv` is a child of every module that
the method may belong to: the model's structure is compared before each pass. The same holds for
functions of a module's class, which mark where they begin.

What torch's own code reads is compared before each call (`replay/attribute_guard.py`). What is
assigned to it later in a pass is recorded.
"""

from __future__ import annotations

import types
from collections.abc import Iterable

from torch import nn

from fmapkit.paths.rewriting import qualified_name
from fmapkit.torchlib.caching import remembered


class FixedAttributes:
    """Tells them, for the methods of one model's modules.

    Args:
        modules: those of the model.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._of_class: dict[str, frozenset[str]] = {}
        for module in modules:
            names, functions = _of_own_code(type(module))
            if not names:
                continue
            children = {name for name, child in module._modules.items() if child is not None}
            own = (functions | children).difference(module.__dict__)
            for name in names:
                known = self._of_class.get(name)
                self._of_class[name] = own if known is None else known & own

    def __call__(self, code: types.CodeType) -> frozenset[str]:
        """Those of the first argument of a method, told by its qualified name."""
        owner = qualified_name(code).partition(".<locals>")[0].rpartition(".")[0]
        return self._of_class.get(owner, frozenset())


@remembered
def _of_own_code(kind: type) -> tuple[tuple[str, ...], frozenset[str]]:
    """The classes of a module that are not torch's, by name, and the functions of all of them."""
    found: dict[str, object] = {}
    for base in reversed(kind.__mro__):
        found.update(vars(base))
    functions = frozenset(n for n, v in found.items() if type(v) is types.FunctionType)
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return tuple(b.__qualname__ for b in bases if not b.__module__.startswith("torch.")), functions
