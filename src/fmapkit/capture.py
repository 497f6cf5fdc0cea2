"""`capture`: the one door in. Checks what was asked, then opens a session for the block."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fmapkit import edits as edits_module
from fmapkit._warnings import warn
from fmapkit.checking import COMPILED, Check, FiniteCheck, checked
from fmapkit.editing import RequestedEdits
from fmapkit.errors import (
    ArgumentError,
    CaptureStateError,
    check_device,
    check_flags,
    check_module,
    check_positive,
    is_int,
)
from fmapkit.instrumentation import methods_of
from fmapkit.kinds import Kind
from fmapkit.maps import FeatureMap, FeatureMaps
from fmapkit.model import Names, unwrap
from fmapkit.selection import EarlyStop, Selection
from fmapkit.session import (
    Analyses,
    Analysis,
    CaptureConfig,
    Session,
    request_of,
    resting_session,
)
from fmapkit.storage import StorageConversion, given_budget
from fmapkit.torchlib.compiled_modules import compiled_roots, plain

__all__ = ["capture"]

# An edit, analyses, a check, an early stop, …: what blocks are opened anew for.
_NOTHING_SPECIAL = request_of((None, (), None, False, 1, "forward", None, None, None, "error"))

ENDED = (
    "with stop=True the model's call returns None once the wanted maps are there, which code that "
    "uses its output (a loss, generate()) cannot take: call the model alone, or leave stop=True out"
)


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
            these; None for all. A module that is no filter layer means what it returns, a
            container that is never called (`nn.ModuleList`) the modules that it holds.
        kinds: which of "input", "response", "preactivation", "activation", "output", "attention".
            Attention is the probabilities: what a softmax gave that weighs values, or a second
            computation of it beside fused attention; by head, under the module in which it ran.
        filters: hold only these filters (copied out, so that the rest can be freed): an int,
            several, or a dict of layer -> these.
        keep: how many passes stay readable: an int, or "all". 0 goes with `analyses`: they see
            each map, and it is let go; and with `check`.
        detach: False keeps the maps in the autograd graph, for losses on them. The graph lives as
            long as its maps do.
        every: capture each n-th pass (the first one included); the others run bare.
        edit: change maps while they are made: a dict of where -> a function that gets the map,
            still part of the graph, and returns a tensor of its shape that goes on in its place.
            Where is a layer, (layer, kind), (layer, kind, filters) or (layer, kind, path), of any
            of the five kinds, or an `edits.Where`, which also tells positions, calls and steps.
            `fm.tensor` is then what was, `fm.edited` what went on. `fmapkit.edits` has the usual
            functions. Whatever a function raises is raised by the model's call, and so is, at the
            end of a pass, an `EditError` of an edit that found no place in it.
        stop: once a pass has shown which maps there are, end the forward as soon as they are
            there: from the second pass on, as a rule; a pass that has to be traced as a whole goes
            to its end. The model's call then returns None. For the maps of early layers only.
        analyses: running analyses, each an object with `update(fm)`, which is called with each map
            of each captured pass, without gradients, in execution order: as the map is made where
            the pass takes a path that is known, else when the pass ends. `fmapkit.analysis` has
            some. What `update` raises is raised by the model's call.
        dtype: store floating-point maps in this dtype: a copy, in buffers that are used again.
            Values out of its range (of float16: beyond 65,504) are infinite in it.
        device: store maps there. From a GPU to "cpu", copies travel beside the model's work, and
            reading a map waits for its own. Where a map is there already, nothing is copied.
        max_bytes: how many bytes the maps may take, looked at as each pass ends.
        when_full: "error" makes the model's call raise `BudgetError` after a pass that went over
            `max_bytes`, and lets go of that pass's maps; "oldest" lets older kept passes go first.
        method: other methods of the model whose calls are passes, beside its own call: "encode", or
            several. One that another pass calls is a part of that pass.
        check: "finite" raises `NonFiniteError` at the end of the first pass that has a NaN or an
            infinite value in any kind of map of these layers, what modules return included, and at
            the end of a backward that has one in their gradients; "finite-forward" leaves gradients
            out. The device is waited for once, as the pass ends: the forward goes on to its end.
        gradients: True makes `fm.grad` the gradient of each map after backward, without keeping
            the graph alive.
        weights: True holds the weights of each pass for `fm.weight`: also those that are computed
            in the pass (weight norm, a low-rank sum), for which the modules that compute them are
            traced in every pass. Without it, `fm.weight` reads parameters as they are by then.

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
        kinds: Kind | Iterable[Kind] = ("preactivation", "activation"),
        filters: int | Iterable[int] | Mapping[str, int | Iterable[int]] | None = None,
        keep: int | Literal["all"] = 1,
        every: int = 1,
        edit: Mapping[Any, Callable[[FeatureMap], Tensor]] | None = None,
        stop: bool = False,
        detach: bool = True,
        gradients: bool = False,
        weights: bool = False,
        analyses: Analysis | Iterable[Analysis] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        max_bytes: int | None = None,
        when_full: Literal["error", "oldest"] = "error",
        method: str | Iterable[str] = "forward",
        check: Check | None = None,
    ) -> None:
        check_module("capture", model)
        # Made, entered, left: a capture goes through these once, in this order.
        self._state: Literal["made", "entered", "left"] = "made"
        special = edit, analyses, check, stop, every, method, dtype, device, max_bytes, when_full
        usual = layers, kinds, filters, keep, detach, gradients, weights
        self._request = request_of(usual) if request_of(special) == _NOTHING_SPECIAL else None
        # The session of an earlier block that this one goes on with, if the model is as it was.
        resting = resting_session(model, self._request)
        self._resting = resting if resting is not None and resting.session.same() else None
        if self._resting is not None:
            self._session = self._resting.session
            return
        seen_by = Analyses(analyses)
        _check_keep(keep, every, bool(seen_by) or check is not None, max_bytes)
        _check_passes(layers, edit, stop, every)
        check_flags(detach=detach, gradients=gradients, weights=weights)
        conversion = StorageConversion(_dtype(dtype), _device(device))
        if conversion and not detach:
            raise ArgumentError(
                "dtype= and device= store copies outside of the graph, and detach=False keeps maps "
                "in it; convert them in the loss instead"
            )
        budget = given_budget(max_bytes, when_full)
        given, model = model, plain(model)
        names = Names(model)
        if edit or stop or gradients:
            asked = "edit" if edit else "stop" if stop else "gradients"
            _check_eager(f"{asked}=", given, names)
        if stop and names.collective():
            raise ArgumentError(
                "stop=True ends a forward in the middle, where other ranks would wait for this "
                f"one: {names.collective()!r} exchanges data with them while it runs"
            )
        finite = _finite(check, stop, filters, conversion, compiled=bool(compiled_roots(given)))
        wants = Selection(
            names, layers, kinds, filters, detach, gradients, conversion, weights, finite
        )
        if wants.kind("attention") and finite is None:
            _check_eager("kinds='attention'", given, names)
        _check_made(edit)
        edits = RequestedEdits(names, edit)
        passes = None if keep == "all" else int(keep)
        model = unwrap(model)  # a pass is the plain model's, whoever called it
        methods = methods_of(model, method)
        ending = EarlyStop() if stop else None
        wanted = CaptureConfig(model, names, wants, edits, seen_by, ending, methods, finite)
        self._session = Session(wanted, given, passes, every, budget)

    def __enter__(self) -> FeatureMaps:
        if self._state != "made":
            state = "is entered already" if self._state == "entered" else "has been used"
            raise CaptureStateError(
                f"this capture {state}; call capture(model) again for another block"
            )
        if self._resting is None:
            self._session.open()
        else:
            self._session.go_on(self._resting)
        self._state = "entered"
        self._maps = FeatureMaps(self._session)
        self._session.asked.analyses.view = self._maps._shown
        return self._maps

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._state = "left"
        check, stop = self._session.asked.check, self._session.asked.stop
        if check is not None:
            check.close()
            if check.gradients_unseen:
                self._session.parts.misses.add("", COMPILED)
        self._maps._end(self._session.end_block(self._request, failed=kind is not None))
        if check is not None and isinstance(error, Exception):
            check.raise_found(cause=error)
        if stop is not None and stop.ended and isinstance(error, (AttributeError, TypeError)):
            if "NoneType" in str(error):
                _note(error, ENDED)


def _check_keep(keep: Any, every: Any, looked_at: bool, max_bytes: Any) -> None:
    """Whether these go together; `looked_at`: somebody sees each map before it is let go."""
    fleeting = is_int(keep) and keep == 0
    if fleeting and not looked_at:
        raise ArgumentError(
            "keep=0 lets go of each map at once, which takes analyses=... to see it before; "
            "keep must be a positive int or 'all' otherwise"
        )
    if fleeting and max_bytes is not None:
        raise ArgumentError(
            "keep=0 lets go of each map at once, so there is nothing for max_bytes= to limit: "
            "give one of them"
        )
    if keep != "all" and not (is_int(keep) and keep >= 0):
        raise ArgumentError(f"keep must be a positive int or 'all', not {keep!r}")
    check_positive(every=every)


def _check_passes(layers: Any, edit: Any, stop: bool, every: int) -> None:
    """Whether what is to become of passes goes together."""
    if stop and layers is None:
        raise ArgumentError("stop=True ends a pass at the last wanted map: say layers=...")
    if edit and every != 1:
        raise ArgumentError("edit changes every pass, so it goes with every=1 only")


def _finite(
    check: Any, stop: bool, filters: Any, conversion: StorageConversion, compiled: bool
) -> FiniteCheck | None:
    """What `check=` asks for.

    Raises:
        ArgumentError: there is no such check, or it does not go with another argument.
    """
    which = checked(check)
    if which is None:
        return None
    if stop:
        raise ArgumentError("check= looks at whole passes, and stop=True ends them: give one")
    if conversion or filters is not None:
        given = "filters=" if filters is not None else "dtype= or device="
        raise ArgumentError(
            f"check= looks at maps as the model makes them, and {given} holds others: put the "
            "check into a capture of its own, `with capture(model, check=...), capture(model, ...)`"
        )
    return FiniteCheck(backward=which == "finite", compiled=compiled)


def _note(error: Exception, text: str) -> None:
    """Add to what an error of the user's code says; before Python 3.11 by a warning."""
    if sys.version_info >= (3, 11):
        error.add_note(f"fmapkit: {text}")
    else:
        warn(text)


def _check_made(edit: Any) -> None:
    """Notice `edits.zero` in the place of `edits.zero()`."""
    for key, function in edit.items() if isinstance(edit, Mapping) else ():
        if not inspect.isfunction(function):
            continue
        name = function.__name__
        if getattr(edits_module, name, None) is function:
            made: Any = function
            raise ArgumentError(
                f"edit[{key!r}] is edits.{name} itself, which makes an edit: write "
                f"edits.{name}{inspect.signature(made)}".partition(" -> ")[0]
            )


def _check_eager(asked: str, given: nn.Module, names: Names) -> None:
    roots = compiled_roots(given)
    if roots:
        raise ArgumentError(
            f"{asked} needs a model that runs eagerly, and "
            f"{names.of(plain(roots[0])) or type(plain(roots[0])).__name__!r} is compiled"
        )


def _dtype(value: Any) -> torch.dtype | None:
    if value is None or (isinstance(value, torch.dtype) and value.is_floating_point):
        return value
    raise ArgumentError(
        f"dtype must be a floating-point torch.dtype such as torch.bfloat16, not {value!r}; "
        "maps of other types are stored as they are"
    )


def _device(value: Any) -> torch.device | None:
    if value is None:
        return None
    found = check_device(value)
    if found.type == "meta":
        raise ArgumentError("device='meta' has no memory: nothing would be held of any map")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device={value!r}: torch sees no CUDA device here")
    return found
