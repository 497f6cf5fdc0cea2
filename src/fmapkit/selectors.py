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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from fmapkit._warnings import warn
from fmapkit.errors import ArgumentError, listed
from fmapkit.model import unwrap

__all__ = ["Selector", "by_name", "is_glob", "name_longer_numbers", "selectors"]

Predicate = Callable[[str, "nn.Module | None"], bool]


class Selector:
    """One of the forms above, as given and as a predicate over (name, module)."""

    __slots__ = ("exact", "given", "matches")

    def __init__(self, given: Any) -> None:
        self.given = given
        self.exact = isinstance(given, nn.Module) or (isinstance(given, str) and not is_glob(given))
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


def by_name(given: Any) -> bool:
    """Whether a selector is a callable that looks at names alone."""
    if isinstance(given, (type, nn.Module)) or not callable(given):
        return False
    return _arity(given) == 1


def name_longer_numbers(selector: Selector, argument: str, names: Mapping[str, nn.Module]) -> None:
    """Warn of modules that `?`, one character, leaves out for the length of their number."""
    glob = selector.given
    if not isinstance(glob, str) or "?" not in glob:
        return
    regex = _numbered(glob)
    longer = [(name, module) for name, module in names.items() if re.match(regex, name)]
    left_out = [name for name, module in longer if not selector.matches(name, module)]
    if left_out:
        warn(
            f"{argument}={selector!r} leaves out {listed(left_out, 3)}: ? stands for one "
            f"character; re.compile(r'{regex}') takes numbers of any length"
        )


def _numbered(glob: str) -> str:
    """A regex for what a glob would match if each `?` stood for a number of any length."""
    one = "\ue000"  # in the place of `?`; fnmatch leaves it as it is
    inner = fnmatch.translate(glob.replace("?", one))
    inner = inner.removeprefix("(?s:").removesuffix(r"\z").removesuffix(r"\Z").removesuffix(")")
    return f"^{inner}$".replace(one, r"\d+")


def is_glob(text: str) -> bool:
    """Whether a text is a glob, and not one name."""
    return any(c in text for c in "*?[")


def _predicate(given: Any) -> Predicate:
    if isinstance(given, str):
        if is_glob(given):
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
