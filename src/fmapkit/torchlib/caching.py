"""What need not be worked out again: answers about classes, and about dicts not written to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

# Since Python 3.12 torch is told of writes, but of no attribute's that lies in the object itself.
_guards: Any = getattr(torch._C._dynamo, "guards", None) if sys.version_info < (3, 12) else None
_version: Callable[[Any], int] | None = getattr(_guards, "dict_version", None)

# Whether a write to a dict of a module's can be told without a look into it. Older versions of
# torch have an OrderedDict there.
_EACH = nn.Module()
writes_are_counted = (
    _version is not None and type(_EACH._modules) is type(_EACH._parameters) is dict
)

P = ParamSpec("P")
T = TypeVar("T")


def remembered(ask: Callable[P, T]) -> Callable[P, T]:
    """Remember what a function of a class, and of numbers, has answered; the latest 4096 times."""
    kept: Any = lru_cache(maxsize=4096)(ask)
    found: Callable[P, T] = kept
    return found


class DictWatch:
    """Looks for writes to some dicts since it last looked; the first look finds that there were.

    Python up to 3.11 counts the writes, and torch's own guards (of `torch.compile`) go by that. To
    ask touches the head of a dict alone, and neither its keys nor what is in it: after a pass of a
    model, these are in none of the processor's caches. Where they are not counted, each look finds
    that something may have been written. Of those of other classes, as `OrderedDict`, nothing is
    counted: their order may change without a write.
    """

    def __init__(self, dicts: Iterable[dict[str, Any]]) -> None:
        self._dicts = list({id(each): each for each in dicts}.values())
        if _version is None or not set(map(type, self._dicts)) <= {dict}:
            self._dicts = []
        self._versions = -1

    def written(self) -> bool:
        """Whether any may have been written to."""
        if not self._dicts:
            return True
        assert _version is not None
        # Each write gives a dict the next number that there is: so the sum tells of any.
        now = sum(map(_version, self._dicts))
        if now == self._versions:
            return False
        self._versions = now
        return True
