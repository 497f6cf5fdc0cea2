"""What is imported when somebody asks for it: names of a package, methods, extras."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from types import MethodType
from typing import Any, TypeVar

_T = TypeVar("_T")


def lazy(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and the `__dir__` of a package.

    Args:
        homes: by module of the package, the names that it has.
    """
    home_of = {name: module for module, names in homes.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home_of[name]}"), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of})

    return get, names


def needed(module: str, says: str) -> Any:
    """A module of an extra.

    Args:
        says: what needs it, and how it is installed.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import_module(module.partition(".")[0])
        return import_module(module)
    except ImportError as error:
        raise ImportError(says) from error


def with_bar(steps: Sequence[_T], what: str, shown: bool) -> Iterator[_T]:
    """The same steps, with a bar; silent without tqdm, and where the output is no terminal."""
    found: Any = steps
    if shown:
        with suppress(ImportError):
            tqdm = import_module("tqdm.auto").tqdm
            found = tqdm(steps, desc=what, disable=None, leave=False)
    yield from found


class LazyMethod:
    """A function that is imported when it is asked for, as a method."""

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        function = getattr(import_module(self._module), self._name)
        return function if instance is None else MethodType(function, instance)
