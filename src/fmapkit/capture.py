"""`capture`: the one door in. Checks what was asked, then opens a session for the block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Literal

from torch import nn

from fmapkit._names import Names
from fmapkit._optimized import plain
from fmapkit._session import Session
from fmapkit._wants import Wants
from fmapkit.errors import ArgumentError, CaptureStateError, NotAModuleError
from fmapkit.maps import FeatureMaps

__all__ = ["capture"]


class capture:  # noqa: N801  (read as a verb: `with capture(model) as maps`)
    """Capture the feature maps of every forward pass that runs inside the block.

    ```python
    with capture(model) as maps:
        logits = model(images)
    a = maps["layer1.0.conv1"]                    # activation: all filters, latest pass
    z = maps["layer1.0.conv1", "preactivation"]
    ```

    The model, its outputs, gradients, buffers and random state are the same with and without.
    Only passes of the thread that entered the block are captured.

    Args:
        model: any `nn.Module`. Nothing is set on it before the block is entered.
        layers: which layers: a name, glob, regex, module, module type or callable, or several of
            these; None for all. A module that is no filter layer means what it returns.
        kinds: which of "input", "response", "preactivation", "activation", "output".
        filters: hold only these filters (copied out, so that the rest can be freed): an int,
            several, or a dict of layer -> these.
        keep: how many passes stay readable: an int, or "all".
        detach: False keeps the maps in the autograd graph: for losses on them, and for their
            gradients (`fm.tensor.retain_grad()` before backward, then `fm.grad`). The graph lives
            as long as its maps do. A map that had to be copied is a branch off the graph: a loss on
            it trains the layers before it, but it has no gradient of the model's own loss.
        every: capture each n-th pass (the first one included); the others run bare.

    Raises:
        NotAModuleError: `model` is no `nn.Module`.
        ArgumentError: another argument is outside what is allowed.
        UnknownLayerError: a selector matches nothing in the model.
        FilterRangeError: a selected layer has no such filter.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        kinds: str | Iterable[str] = ("preactivation", "activation"),
        filters: int | Iterable[int] | Mapping[str, int | Iterable[int]] | None = None,
        keep: int | Literal["all"] = 1,
        every: int = 1,
        detach: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            hint = " (a model class: make an instance first)" if isinstance(model, type) else ""
            raise NotAModuleError(
                f"capture takes a torch.nn.Module, not {type(model).__name__}{hint}"
            )
        if keep != "all" and not _positive(keep):
            raise ArgumentError(f"keep must be a positive int or 'all', not {keep!r}")
        if not _positive(every):
            raise ArgumentError(f"every must be a positive int, not {every!r}")
        if not isinstance(detach, bool):
            raise ArgumentError(f"detach must be True or False, not {detach!r}")
        given, model = model, plain(model)
        names = Names(model)
        wants = Wants(names, layers, kinds, filters, detach)
        kept = None if keep == "all" else int(keep)
        self._session = Session(model, names, wants, kept, every, given)
        # Made, entered, left: a capture goes through these once, in this order.
        self._state: Literal["made", "entered", "left"] = "made"

    def __enter__(self) -> FeatureMaps:
        if self._state != "made":
            state = "is entered already" if self._state == "entered" else "has been used"
            raise CaptureStateError(
                f"this capture {state}; call capture(model) again for another block"
            )
        self._session.open()
        self._state = "entered"
        return FeatureMaps(self._session)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._state = "left"
        self._session.close(failed=kind is not None)


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
