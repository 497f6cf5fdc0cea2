"""Tensors that the modules of a region have: what their code may decide by, as `if self.ready`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fmapkit.replay.escapes import own_names
from fmapkit.torchlib.caching import remembered
from fmapkit.torchlib.nested import modules_in

__all__ = ["OwnTensors"]


class OwnTensors:
    """Buffers, parameters and other attributes, of the modules whose code is not torch's.

    Args:
        module: the region.
    """

    __slots__ = ("_places",)

    def __init__(self, module: nn.Module) -> None:
        self._places: list[tuple[dict[str, Any], str]] = []
        for each in modules_in(module):
            if not _is_torchs(type(each)):
                own = each.__dict__
                for holder in (each._buffers, each._parameters):
                    self._places += [(holder, name) for name in holder]
                names = own_names(tuple(own))
                self._places += [(own, n) for n in names if isinstance(own[n], Tensor)]

    def noted(self) -> list[Callable[[], Any]]:
        """Those that there are now, None in the place of any other value, and none kept alive."""
        return [weakref.ref(t) if isinstance(t, Tensor) else _nothing for t in self._now()]

    def after(self, given: Sequence[Tensor]) -> list[Any]:
        """The same, after the tensors that a call is given."""
        return [*given, *self._now()]

    def _now(self) -> list[Any]:
        return [holder.get(name) for holder, name in self._places]


def _nothing() -> None:
    """In the place of what is no tensor."""


@remembered
def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules.")
