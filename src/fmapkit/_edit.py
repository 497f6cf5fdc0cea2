"""Edits: what `capture(edit=...)` asked for, checked at the call, and one edit carried out.

Where in the pass an edit belongs is the tracer's business; here a tensor goes in, and what the user
wants in its place comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fmapkit._axes import Axes
from fmapkit._names import Names
from fmapkit._wants import Selection, indices
from fmapkit.errors import ArgumentError, EditError, did_you_mean, listed

__all__ = ["EDITABLE", "Edits"]

EDITABLE = ("response", "preactivation", "activation")


class _Edit:
    """One entry of `edit={...}`."""

    __slots__ = ("applied", "filters", "function", "given", "kind", "selection")

    def __init__(self, key: Any, function: Any, names: Names) -> None:
        layer, kind, filters = _parsed(key)
        if not callable(function) or isinstance(function, (type, Tensor)):
            raise ArgumentError(
                f"edit[{key!r}] must be a function FeatureMap -> Tensor, not {function!r}; "
                "fmapkit.edits has the usual ones: zero(), scale(2.0), clamp(0, 6), replace(t)"
            )
        self.given = key
        self.selection = Selection(names, layer, "edit")
        self.kind = kind
        self.filters = filters
        self.function = function
        self.applied = False


class Edits:
    """All edits of one capture.

    Args:
        names: of the model.
        given: layer, (layer, kind) or (layer, kind, filters) -> a function.
        view: makes the `FeatureMap` that a function gets, from keyword arguments.

    Raises:
        ArgumentError: a key or a function is of no allowed form.
        UnknownLayerError: a key's layer matches nothing in the model.
    """

    def __init__(self, names: Names, given: Any, view: Callable[..., Any]) -> None:
        if given is not None and not isinstance(given, Mapping):
            raise ArgumentError(f"edit must be a dict of layer -> function, not {given!r}")
        self._all = [_Edit(key, function, names) for key, function in (given or {}).items()]
        self._view = view
        self.raised: BaseException | None = None  # by an edit; no fault of ours
        self.runs = 0  # how often a map was given to an edit

    @classmethod
    def none(cls) -> Edits:
        """No edits at all."""
        made = cls.__new__(cls)
        made._all, made.raised, made.runs = [], None, 0
        return made

    def __bool__(self) -> bool:
        return bool(self._all)

    def of(self, name: str, kind: str | None = None) -> list[_Edit]:
        """The edits of a layer, by its label."""
        return [e for e in self._all if kind in (None, e.kind) and e.selection.layer(name)]

    def begin(self) -> None:
        """A pass begins."""
        self.raised = None
        for edit in self._all:
            edit.applied = False

    def unapplied(self) -> list[tuple[str, str]]:
        """The edits that the pass had no place for: (layer, what to say)."""
        return [
            (
                str(edit.selection),
                f"its edit found no {edit.kind} in this pass: the layer did not run, or has none "
                f"(edits may be of {listed(EDITABLE)})",
            )
            for edit in self._all
            if not edit.applied
        ]

    def apply(
        self, kind: str, tensor: Tensor, axes: Axes | None, layer: str, **tags: Any
    ) -> Tensor | None:
        """What goes on in the tensor's place; None if nothing changes it.

        Raises:
            EditError: a function returned something that cannot stand there.
            FilterRangeError: the map has no such filter.
            Exception: whatever else a function raises.
        """
        try:
            return self._apply(kind, tensor, axes, layer, tags)
        except Exception as error:
            self.raised = error
            if isinstance(error, EditError):
                error.layer, error.kind = layer, kind
            raise

    def _apply(
        self, kind: str, tensor: Tensor, axes: Axes | None, layer: str, tags: dict[str, Any]
    ) -> Tensor | None:
        result = tensor
        for edit in self.of(layer, kind):
            edit.applied = True
            self.runs += 1
            fm = self._view(
                tensor=result,
                kind=kind,
                layer=layer,
                filter_dim=axes.dim if axes is not None else None,
                filters=axes.filters if axes is not None and axes.dim is not None else None,
                **tags,
            )
            if edit.filters is None:
                result = _run(edit, fm)
                continue
            pieces = [fm[k] for k in edit.filters]
            result = result.clone()
            for piece in pieces:
                place = list(fm.filters).index(piece.filter)
                result.select(fm.filter_dim, place).copy_(_run(edit, piece))
        return None if result is tensor else result


def _run(edit: _Edit, fm: Any) -> Tensor:
    before = fm.tensor
    version = None if before.is_inference() else before._version
    where = f"edit[{edit.given!r}] of the {fm.kind} of layer {fm.layer!r}"
    after = edit.function(fm)
    if not isinstance(after, Tensor):
        raise EditError(f"{where} must return a tensor, not {type(after).__name__}")
    if version is not None and before._version != version:
        raise EditError(f"{where} wrote to the map in place; return a new tensor instead")
    for what in ("shape", "dtype", "device"):
        was, now = getattr(before, what), getattr(after, what)
        if was != now:
            was, now = (tuple(was), tuple(now)) if what == "shape" else (was, now)
            raise EditError(f"{where} must keep the {what}: {was} went in, {now} came out")
    return after


def _parsed(key: Any) -> tuple[Any, str, tuple[int, ...] | None]:
    """A key's layer, kind and filters; `("conv1", "activation", (1, 2))`."""
    parts = key if isinstance(key, tuple) else (key,)
    if not 1 <= len(parts) <= 3:
        raise ArgumentError(
            f"edit[{key!r}]: a key is a layer, (layer, kind) or (layer, kind, filters)"
        )
    kind = parts[1] if len(parts) > 1 else "activation"
    if kind not in EDITABLE:
        hint = did_you_mean(kind, EDITABLE) if isinstance(kind, str) else ""
        raise ArgumentError(f"edit[{key!r}]: the kind must be one of {listed(EDITABLE)}{hint}")
    if len(parts) < 3:
        return parts[0], kind, None
    return parts[0], kind, indices(parts[2], f"the filters of edit[{key!r}]")
