"""A progress bar, where tqdm is installed and somebody is looking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, TypeVar

_T = TypeVar("_T")


def with_bar(steps: Sequence[_T], what: str, shown: bool) -> Iterator[_T]:
    """The same steps, with a bar; silent without tqdm, and where the output is no terminal."""
    bar: Any = None
    if shown:
        with suppress(ImportError):
            bar = import_module("tqdm.auto").tqdm
    if bar is None:
        yield from steps
    else:
        yield from bar(steps, desc=what, disable=None, leave=False)
