"""`capture`: the one door in. Checks what was asked, then opens a session for the block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn

from fmapkit._edit import Edits
from fmapkit._names import Names
from fmapkit._optimized import compiled_roots, plain
from fmapkit._session import Session
from fmapkit._wants import Wants
from fmapkit._wrappers import unwrap
from fmapkit.errors import ArgumentError, CaptureStateError, NotAModuleError
from fmapkit.maps import FeatureMap, FeatureMaps

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
        model: any `nn.Module`. Nothing is set on it before the block is entered. A wrapper such as
            `DistributedDataParallel` stands for what it carries, under the plain model's names.
        layers: which layers: a name, glob, regex, module, module type or callable, or several of
            these; None for all. A module that is no filter layer means what it returns.
        kinds: which of "input", "response", "preactivation", "activation", "output".
        filters: hold only these filters (copied out, so that the rest can be freed): an int,
            several, or a dict of layer -> these.
        keep: how many passes stay readable: an int, or "all".
        detach: False keeps the maps in the autograd graph, for losses on them. The graph lives as
            long as its maps do.
        every: capture each n-th pass (the first one included); the others run bare.
        edit: change maps while they are made: a dict of layer, (layer, kind) or
            (layer, kind, filters) -> a function that gets the map, still part of the graph, and
            returns a tensor of its shape that goes on in its place. The kind is "response",
            "preactivation" or "activation" (the default). `fm.tensor` is then what was, `fm.edited`
            what went on. `fmapkit.edits` has the usual functions. Whatever a function raises is
            raised by the model's call.
        stop: from the second pass on, end the forward as soon as every map is there that the first
            one had; the model's call then returns None. For the maps of early layers only.
        gradients: True makes `fm.grad` the gradient of each map after backward, without keeping
            the graph alive.

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
        edit: Mapping[Any, Callable[[FeatureMap], Tensor]] | None = None,
        stop: bool = False,
        detach: bool = True,
        gradients: bool = False,
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
        if stop and layers is None:
            raise ArgumentError("stop=True ends a pass at the last wanted map: say layers=...")
        if not isinstance(detach, bool):
            raise ArgumentError(f"detach must be True or False, not {detach!r}")
        if edit and every != 1:
            raise ArgumentError("edit changes every pass, so it goes with every=1 only")
        if not isinstance(gradients, bool):
            raise ArgumentError(f"gradients must be True or False, not {gradients!r}")
        given, model = model, plain(model)
        names = Names(model)
        if (edit or stop or gradients) and (roots := compiled_roots(given)):
            asked = "edit" if edit else "stop" if stop else "gradients"
            raise ArgumentError(
                f"{asked}= needs a model that runs eagerly, and "
                f"{names.of(plain(roots[0])) or type(plain(roots[0])).__name__!r} is compiled"
            )
        if stop and names.collective():
            raise ArgumentError(
                "stop=True ends a forward in the middle, where other ranks would wait for this "
                f"one: {names.collective()!r} exchanges data with them while it runs"
            )
        wants = Wants(names, layers, kinds, filters, detach, gradients)
        edits = Edits(names, edit, FeatureMap)
        passes = None if keep == "all" else int(keep)
        model = unwrap(model)  # a pass is the plain model's, whoever called it
        self._session = Session(model, names, wants, edits, passes, every, stop, given)
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
