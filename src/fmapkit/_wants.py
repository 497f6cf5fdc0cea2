"""What was asked for: which layers, kinds and filters; checked before any hook is set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit import layers
from fmapkit._axes import Axes
from fmapkit._names import Names
from fmapkit.errors import ArgumentError, FilterRangeError, UnknownLayerError, did_you_mean, listed
from fmapkit.selectors import Selector, selectors

__all__ = ["KINDS", "Wants"]

KINDS = ("input", "response", "preactivation", "activation", "output")


class Wants:
    """The selection of one capture.

    Raises:
        ArgumentError: a kind, layer or filter is of no allowed form.
        UnknownLayerError: a selector matches no module of the model.
        FilterRangeError: a filter that a selected layer does not have.
    """

    def __init__(
        self, names: Names, layers_given: Any, kinds: Any, filters: Any, detach: bool = True
    ) -> None:
        self._names = names
        self.detach = detach
        self.kinds = _kinds(kinds)
        self._selectors = None if layers_given is None else selectors(layers_given)
        self._cache: dict[str, bool] = {}
        self._index: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self.outputs: set[nn.Module] = set()
        self._selected(names)
        self.filters = _filters(filters)
        self._check_filters(names)
        # The same for two captures that ask for the same; a selector object is like no other.
        chosen = layers_given if isinstance(layers_given, (str, type(None))) else id(self)
        self.signature = (chosen, self.kinds, repr(self.filters), detach)

    def kind(self, kind: str) -> bool:
        """Whether maps of this kind were asked for."""
        return kind in self.kinds

    def layer(self, name: str) -> bool:
        """Whether maps of the layer of this label were asked for."""
        if self._selectors is None:
            return True
        found = self._cache.get(name)
        if found is None:
            module = self._names.module_of(name)
            plain = name.partition(":")[0]
            found = self._cache[name] = any(
                s.matches(name, module) or (s.exact and s.matches(plain, module))
                for s in self._selectors
            )
        return found

    def output(self, module: nn.Module) -> bool:
        """Whether what this module returns was asked for."""
        return module in self.outputs

    def _selected(self, names: Names) -> None:
        asked = "output" in self.kinds
        if self._selectors is None:
            if asked:
                self.outputs.update(names.by_module)
            return
        if not self._selectors:
            raise ArgumentError("layers=[] selects nothing; None, the default, means every layer")
        for selector in self._selectors:
            matched = [m for n, m in names.by_name.items() if selector.matches(n, m)]
            if not matched:
                self._functional(selector, names)
                continue
            plain = [m for m in matched if layers.layer_axis(m) is None]
            if asked:
                self.outputs.update(matched)
            elif len(plain) == len(matched):
                # No filter layer among them: what is meant is what they return.
                self.outputs.update(plain)

    def _functional(self, selector: Selector, names: Names) -> None:
        """A label that only a pass can tell: `blocks.3.mlp:gelu`, `attn.in_proj`."""
        given = selector.given
        if isinstance(given, str) and _only_a_pass_can_tell(names, given):
            return
        known = [n for n in names.by_name if n]
        hint = did_you_mean(given, known) if isinstance(given, str) else ""
        raise UnknownLayerError(
            f"layers={selector!r} matches no module of {type(names.model).__name__}{hint} "
            f"(its modules: {listed(known)})"
        )

    # -- filters ------------------------------------------------------------------------------

    def _check_filters(self, names: Names) -> None:
        if self.filters is None:
            return
        for name, module in names.by_name.items():
            count = layers.filter_count(module)
            if layers.layer_axis(module) is None or count is None or not self.layer(name):
                continue
            chosen = self._chosen(name)
            wrong = [f for f in chosen or () if not -count <= f < count]
            explicit = self._selectors is not None or isinstance(self.filters, Mapping)
            if wrong and explicit:
                raise FilterRangeError(
                    f"filters={wrong[0]} is out of range for layer {name!r}, which has {count} "
                    f"filters (0 to {count - 1})"
                )
        if isinstance(self.filters, Mapping):
            for name in self.filters:
                if name not in names.by_name and not _only_a_pass_can_tell(names, name):
                    raise UnknownLayerError(
                        f"filters names layer {name!r}, which the model does not have"
                        f"{did_you_mean(name, names.by_name)}"
                    )

    def _chosen(self, name: str) -> tuple[int, ...] | None:
        chosen: tuple[int, ...] | None = (
            self.filters.get(name) if isinstance(self.filters, Mapping) else self.filters
        )
        return chosen

    def pick(self, name: str, axes: Axes | None) -> tuple[int, ...] | None:
        """The filters to hold of a layer, counted from 0; None if they cannot be told apart."""
        chosen = self._chosen(name)
        if axes is None or axes.filters is None:
            return None
        there = axes.filters
        if chosen is None:
            return tuple(there)
        total = len(there)
        picked = tuple(f + total if f < 0 else f for f in chosen)
        return picked if all(f in there for f in picked) else None

    def why_not(self, name: str, axes: Axes | None) -> str:
        """Why `pick` gave None."""
        if axes is None or axes.filters is None:
            return "filters= was given, but its filters do not lie along one axis"
        return f"filters={self._chosen(name)} asks for filters outside {axes.filters}"

    def take(self, tensor: Tensor, axes: Axes, picked: tuple[int, ...]) -> Tensor:
        """A copy of the picked filters alone."""
        there, dim = axes.filters, axes.dim
        assert there is not None and dim is not None
        key = (tuple(there.index(f) for f in picked), tensor.device)
        index = self._index.get(key)
        if index is None:
            index = self._index[key] = torch.tensor(key[0], device=tensor.device)
        return (tensor.detach() if self.detach else tensor).index_select(dim, index)


def _only_a_pass_can_tell(names: Names, label: str) -> bool:
    """`blocks.3.mlp:gelu`, `attn.in_proj`: labels of a module that the model has."""
    module, colon, _ = label.partition(":")
    if colon:
        return module in names.by_name or "*" in module
    owner, _, part = label.rpartition(".")
    keys = names.by_name[owner]._parameters if owner in names.by_name else {}
    return any(k in (part, f"{part}_weight") for k in keys)


def _kinds(kinds: Any) -> frozenset[str]:
    given = [kinds] if isinstance(kinds, str) else list(kinds) if _iterable(kinds) else None
    if not given:
        raise ArgumentError(f"kinds must name some of {listed(KINDS)}, not {kinds!r}")
    for kind in given:
        if kind not in KINDS:
            hint = did_you_mean(kind, KINDS) if isinstance(kind, str) else ""
            raise ArgumentError(f"unknown kind {kind!r}{hint}; the kinds are {listed(KINDS)}")
    return frozenset(given)


def _iterable(value: Any) -> bool:
    return isinstance(value, Iterable)


def _filters(filters: Any) -> Any:
    if filters is None:
        return None
    if isinstance(filters, Mapping):
        return {str(k): _indices(v) for k, v in filters.items()}
    return _indices(filters)


def _indices(value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, (Sequence, range, set)) and not isinstance(value, str):
        found = tuple(value)
        if found and all(isinstance(v, int) and not isinstance(v, bool) for v in found):
            return found
    raise ArgumentError(
        f"filters must be an int, several ints, a range, or a dict of layer -> these, not {value!r}"
    )
