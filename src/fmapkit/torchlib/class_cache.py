"""Answers about classes, each worked out once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def remembered(ask: Callable[P, T]) -> Callable[P, T]:
    """Remember what a function of a class, and of numbers, has answered; the latest 4096 times."""
    kept: Any = lru_cache(maxsize=4096)(ask)
    found: Callable[P, T] = kept
    return found
