"""What a user may say to mean some layers; pure, and the same in `capture` and in `select`.

| given | means |
| --- | --- |
| `"layer1.0.conv1"` | that name |
| `"layer3.*"` | a glob over names; `"experts.up[3]"` and `"experts.up[*]"` mean these labels, too |
| `re.compile(...)` | names in which the pattern is found |
| `model.layer3` | that module |
| `nn.Conv2d` | modules of that type |
| a callable | `callable(name, module)`, or `callable(name)`, true |
| several of these | any of them |

A module that is registered at several places goes by the first of its names, and is found by any.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fmapkit._wrappers import unwrap
from fmapkit.errors import ArgumentError

__all__ = ["Selector", "selectors"]

Predicate = Callable[[str, "nn.Module | None"], bool]


class Selector:
    """One of the forms above, as given and as a predicate over (name, module)."""

    __slots__ = ("exact", "given", "matches")

    def __init__(self, given: Any) -> None:
        self.given = given
        self.exact = isinstance(given, nn.Module) or (
            isinstance(given, str) and not _is_glob(given)
        )
        self.matches: Predicate = _predicate(given)

    def __repr__(self) -> str:
        if isinstance(self.given, nn.Module):
            return f"the module {type(self.given).__name__}"
        return repr(self.given)


def selectors(given: Any) -> list[Selector]:
    """The selectors in what was given: one, or several in a list, tuple or set.

    Raises:
        ArgumentError: something in it is of none of the forms.
    """
    if isinstance(given, (list, tuple, set, frozenset)):
        return [Selector(g) for g in given]
    return [Selector(given)]


def _is_glob(text: str) -> bool:
    return any(c in text for c in "*?[")


def _predicate(given: Any) -> Predicate:
    if isinstance(given, str):
        if _is_glob(given):
            # A bracket may be a glob's, or that of a label: `experts.up[3]`.
            patterns = [
                re.compile(fnmatch.translate(text)) for text in (given, given.replace("[", "[[]"))
            ]
            return lambda name, _: any(p.match(name) is not None for p in patterns)
        return lambda name, _: name == given
    if isinstance(given, re.Pattern):
        return lambda name, _: given.search(name) is not None
    if isinstance(given, nn.Module):
        meant = unwrap(given)
        return lambda name, module: module is meant
    if isinstance(given, type) and issubclass(given, nn.Module):
        return lambda name, module: isinstance(module, given)
    if callable(given) and not isinstance(given, type):
        if _arity(given) == 1:
            return lambda name, _: bool(given(name))
        return lambda name, module: bool(given(name, module))
    raise ArgumentError(
        f"a layer is given by a name, glob, regex, module, module type or callable, not {given!r}"
    )


def _arity(function: Callable[..., Any]) -> int:
    try:
        parameters: Iterable[inspect.Parameter] = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in plain and p.default is p.empty for p in parameters) or 2
