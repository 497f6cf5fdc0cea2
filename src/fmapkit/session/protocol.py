"""`Analysis`: what `capture(model, analyses=[...])` takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from fmapkit.map import FeatureMap

__all__ = ["Analysis"]


@runtime_checkable
class Analysis(Protocol):
    """Sees every captured map and keeps none.

    `update` is called once for each map of each captured pass, in execution order, without
    gradients. The model may overwrite the map's memory as soon as `update` returns: work out what
    is needed, and keep no reference to `fm.tensor`. What `update` raises is raised by the model's
    call. An `update` that reads a value on the host (`.item()`, a branch on a tensor) makes the
    model wait for its device. The model's modes (autocast, inference, function modes) are off in
    it, and its own calls of the captured model are not captured.
    """

    def update(self, fm: FeatureMap) -> None:
        """Take one map in."""
