"""Hooks of others that only move data: what they make of a tensor carries what that carried.

Tensor parallel sets such hooks (see `torchlib/sharded.py`). Hooks of ours outside of them note what
they are given.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

from fmapkit.session.state import PassState

__all__ = ["RedistributionTracker"]


class RedistributionTracker:
    """Of the hooks of one capture's modules.

    Attributes:
        given: what such hooks were given, and is not come back yet.
    """

    def __init__(self, live: PassState) -> None:
        self._live = live
        self.given: list[tuple[nn.Module, Any]] = []

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Such hooks come next, on what a module is given: a hook of ours."""
        if self._live.tracer is not None and threading.get_ident() == self._live.thread:
            self.given.append((module, (args, kwargs)))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """The same for those on what it returns."""
        if self._live.tracer is not None and threading.get_ident() == self._live.thread:
            self.given.append((module, output))

    def made(self, module: nn.Module, values: Any) -> None:
        """They have run, if there are any, and this is what they have made of it."""
        if self.given:
            owner, given = self.given.pop()
            if owner is module and self._live.tracer is not None:
                self._live.tracer.trace.labels.moved(given, values)

    def clear(self) -> None:
        """The pass has ended."""
        self.given.clear()
