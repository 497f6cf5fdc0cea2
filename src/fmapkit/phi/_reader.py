"""Runs a model, and reads of the pass what was asked for; says what is not there, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fmapkit import layers
from fmapkit._warnings import warn
from fmapkit.capture import capture
from fmapkit.errors import (
    AmbiguousMapError,
    ArgumentError,
    FmapkitError,
    KindNotCapturedError,
    MapStateError,
    NoActivationError,
    UnknownLayerError,
    listed,
)
from fmapkit.map import FeatureMap
from fmapkit.model import never_called
from fmapkit.phi._compiled import CompiledOutputs
from fmapkit.phi._recurring import Recurring, can_stop
from fmapkit.phi._request import Item, Request
from fmapkit.readable import tags
from fmapkit.reasons import Reason
from fmapkit.selection import LayerSelection, check_in_range
from fmapkit.torchlib.nested import tensors_in

Found = list[tuple[str, FeatureMap]]


class Reader:
    """Runs a model, and reads some of its maps.

    Args:
        stop: the pass ends with the last of them, where it can.

    Attributes:
        recurring: the capture of its calls.
        keys: of the maps, in order; empty before a first pass where that shows which there are.
        tags: what the first pass has found, with empty tensors of as many axes.
    """

    def __init__(self, model: nn.Module, asked: Request, stop: bool) -> None:
        self.model = model
        self.stop = stop
        self._asked = asked
        made = capture(
            model,
            asked.layers,
            kinds=asked.kinds,
            stop=stop and can_stop(model),
            detach=False,
        )
        self.recurring = Recurring(made)
        self._wanted = [_Wanted(item, self.recurring) for item in asked.items]
        labels = [w.label for w in self._wanted] if asked.form == "tuple" else []
        for wanted in self._wanted:  # the kind beside a name that is asked for more than once
            if labels.count(wanted.label) > 1 and wanted.item.kind not in (None, "activation"):
                wanted.key = f"{wanted.label} {wanted.item.kind}"
        self._warned = all(item.exact for item in asked.items)
        self._captured = False  # the latest call was a pass that could be captured
        self._check_filters()
        self.keys = [w.key for w in self._wanted] if self._warned else []
        self.tags: Found = []

    @property
    def may_be_outputs(self) -> bool:
        """Whether some map may be what a module returns."""
        return any("output" in wanted.kinds for wanted in self._wanted)

    def outputs(self, context: Any) -> CompiledOutputs | None:
        """What reads the same maps by compiled code; None where they are not all whole outputs."""
        by_name = self.recurring.names.by_name
        wanted = [
            (by_name[fm.layer], fm.call)
            for _, fm in self.tags
            if fm.kind == "output" and not fm.path and fm.layer in by_name
        ]
        if len(wanted) < len(self.tags) or not can_stop(self.model):
            return None
        return CompiledOutputs(self.model, context, wanted)

    def _check_filters(self) -> None:
        """Whether filters were given of layers that have them, as far as can be known now."""
        given = self._asked.filters
        for layer in given if isinstance(given, Mapping) else ():
            if not any(w.is_of(layer) for w in self._wanted):
                raise ArgumentError(
                    f"filters names layer {layer!r}, and the layers asked for are {self._asked}",
                    layer=layer,
                    candidates=[w.label for w in self._wanted],
                )
        for wanted in self._wanted:
            if wanted.count is not None:
                filters = self._asked.filters_of(wanted.label) or ()
                check_in_range(filters, wanted.count, wanted.label)

    def __call__(self, args: Any, kwargs: Any) -> Found | None:
        """Run the model, and read its maps; None if nothing is held of the pass."""
        with self.recurring as maps:
            try:
                self.model(*args, **kwargs)
                every = self.recurring.found()
            finally:
                self._captured = self.recurring.captured
                maps.clear()
        if not every:
            return None
        if not self._warned:
            self._warn()
        asked = self._asked
        fitting = [
            fm for fm in every if asked.call in (None, fm.call) and asked.path in (None, fm.path)
        ]
        found: Found = []
        for wanted in self._wanted:
            if wanted.item.exact:
                found.append((wanted.key, self._one(wanted, fitting, every)))
            else:
                found += self._several(wanted, fitting)
        if asked.form == "dict":
            found = self._each_once(found)
        if not found:
            raise self.nothing()
        if torch.is_grad_enabled():
            self._check_graph(found, args, kwargs)
        self.keys = [key for key, _ in found]
        if not self.tags:
            self.tags = [
                (key, replace(fm, tensor=torch.empty([0] * fm.tensor.dim()))) for key, fm in found
            ]
        return found

    def _each_once(self, found: Found) -> Found:
        """Without what two selectors have both found."""
        by_key: dict[str, FeatureMap] = {}
        for key, fm in found:
            other = by_key.setdefault(key, fm)
            if (other.kind, other.call, other.path) != (fm.kind, fm.call, fm.path):
                raise ArgumentError(
                    f"feature_map({self._asked}): two maps of layer {key!r} are asked for, and a "
                    "dict by layer has one: give a dict with a key for each",
                    **tags(fm),
                )
        return list(by_key.items())

    def _check_graph(self, found: Found, args: Any, kwargs: Any) -> None:
        """Whether each map is in the graph: not if it was made in reentrant checkpointing, say."""
        if not any(missed.why is Reason.NO_GRAPH for missed in self.recurring.missed):
            return
        given = (*self.model.parameters(), *tensors_in(*args, kwargs))
        for _, fm in found:
            inside = fm.tensor.requires_grad or not fm.tensor.is_floating_point()
            if not inside and any(t.requires_grad for t in given):
                raise MapStateError(
                    f"feature_map: the {fm.kind} of layer {fm.layer!r} is not part of the autograd "
                    f"graph: {Reason.NO_GRAPH.text()}",
                    **tags(fm),
                )

    def _one(
        self, wanted: _Wanted, fitting: Sequence[FeatureMap], every: Sequence[FeatureMap]
    ) -> FeatureMap:
        there = [fm for fm in fitting if fm.kind in wanted.kinds and fm.layer == wanted.label]
        if not there:  # a nonlinearity of its own goes by the module and the function
            own = f"{wanted.label}:"
            there = [fm for fm in fitting if fm.kind in wanted.kinds and fm.layer.startswith(own)]
        if not there:
            raise self._absent(wanted, [fm for fm in every if fm.layer == wanted.label])
        return self._first(wanted, wanted.label, there)

    def _several(self, wanted: _Wanted, fitting: Sequence[FeatureMap]) -> Found:
        by_layer: dict[str, list[FeatureMap]] = {}
        for fm in fitting:
            if fm.kind in wanted.kinds and wanted.is_of(fm.layer):
                by_layer.setdefault(fm.layer, []).append(fm)
        return [(layer, self._first(wanted, layer, of)) for layer, of in by_layer.items()]

    def _first(self, wanted: _Wanted, layer: str, there: Sequence[FeatureMap]) -> FeatureMap:
        """The one map of a layer that is meant, if there is one alone of its kind."""
        for kind in wanted.kinds_of(self.recurring.names.by_name.get(layer)):
            found = [fm for fm in there if fm.kind == kind]
            if len(found) > 1:
                self._ambiguous(found)
            if found:
                return found[0]
        raise self._absent(wanted, there)

    def nothing(self) -> Exception:
        """The error of a pass without maps."""
        wanted = self._wanted[0]
        if self._captured and wanted.item.exact:
            return self._absent(wanted, [])
        if self._captured:
            return UnknownLayerError(
                f"feature_map({self._asked}): no layer has such a map in this pass{self.why('')}"
            )
        return MapStateError(
            f"feature_map({self._asked}): this call could not be captured{self.why('')}"
        )

    # -- what is said of what is not there ------------------------------------------------------

    def why(self, label: str) -> str:
        """What is known of what was not captured of a layer; empty if nothing is."""
        reasons = [m.reason for m in self.recurring.missed if m.layer in ("", label)]
        return f": {reasons[-1]}" if reasons else ""

    def _absent(self, wanted: _Wanted, there: Sequence[FeatureMap]) -> FmapkitError:
        kinds = list(dict.fromkeys(fm.kind for fm in there))
        error = self._why_absent(wanted, there, kinds)
        return error.about(
            layer=wanted.label, kind=wanted.item.kind, call=self._asked.call, candidates=kinds
        )

    def _why_absent(
        self, wanted: _Wanted, there: Sequence[FeatureMap], kinds: Sequence[str]
    ) -> FmapkitError:
        label = wanted.label
        module = self.recurring.names.by_name.get(label)
        if module is not None and never_called(module):
            return UnknownLayerError(
                f"feature_map: {label!r} is a {type(module).__name__}, which is never called; ask "
                f"for what it holds: '{label}.*'",
                layer=label,
            )
        said = f"feature_map: layer {label!r} has no "
        which = {"call": self._asked.call, "path": self._asked.path}
        given = " and ".join(f"{k}={v!r}" for k, v in which.items() if v is not None)
        if wanted.kinds[0] in kinds and given:
            have = listed(f"call={fm.call}, path={fm.path!r}" for fm in there)
            return UnknownLayerError(f"{said}map with {given} in this pass; it has {have}")
        if wanted.kinds == ("activation",):
            return NoActivationError(
                f"{said}activation in this pass: no nonlinearity follows it, or it did not run; "
                f"ask for kind='preactivation' or kind='output'{self.why(label)}"
            )
        if wanted.item.kind is None:
            return UnknownLayerError(
                f"{said}map in this pass: it did not run, or it returned no tensor{self.why(label)}"
            )
        return KindNotCapturedError(
            f"{said}{wanted.item.kind} in this pass: it has none, or it did not run"
            f"{self.why(label)}"
        )

    def _ambiguous(self, found: Sequence[FeatureMap]) -> None:
        first = found[0]
        have = [(f"call={fm.call}", f"path={fm.path!r}", f"σ={fm.nonlinearity}") for fm in found]
        differ = [at for at in range(3) if len({h[at] for h in have}) > 1]
        choices = listed(", ".join(h[at] for at in differ) for h in have)
        raise AmbiguousMapError(
            f"feature_map: layer {first.layer!r} has {len(found)} maps of kind {first.kind!r} in a "
            f"pass ({choices}); choose one with call=… or path=…",
            layer=first.layer,
            kind=first.kind,
            candidates=[{"call": fm.call, "path": fm.path} for fm in found],
        )

    def _warn(self) -> None:
        """Of layers that nobody named, it may not be noticed that one is not there."""
        self._warned = True
        missed = [
            m
            for m in self.recurring.missed
            if not m.layer or any(w.is_of(m.layer) for w in self._wanted)
        ]
        if missed:
            more = f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""
            warn(
                f"feature_map({self._asked}): not captured: {missed[0].layer or 'the model'}: "
                f"{missed[0].reason}{more}"
            )


class _Wanted:
    """One item of what was asked, by the names of the model.

    Attributes:
        label: of the layer, as its maps have it; of several, empty.
        key: under which it is returned.
        kinds: the map is of the first of these that is there.
        count: of filters, where torch's own attributes tell it.
    """

    def __init__(self, item: Item, recurring: Recurring) -> None:
        self.item = item
        names = recurring.names
        self.is_of = LayerSelection(names, item.layer, "layers").layer
        self.label = recurring.label_of(item.layer) if item.exact else ""
        self.key = item.key if item.key is not None else self.label
        module = names.by_name.get(self.label) if item.exact else None
        self.kinds = self.kinds_of(module)
        is_layer = module is not None and layers.layer_axis(module) is not None
        self.count = layers.filter_count(module) if is_layer and module is not None else None

    def kinds_of(self, module: nn.Module | None) -> tuple[str, ...]:
        """The kinds that the map of a layer may be of, the first one that is there."""
        if self.item.kind is not None:
            return (self.item.kind,)
        # As in `maps[layer]`: filters of a module of another type may be found in a pass, too.
        is_layer = module is not None and layers.layer_axis(module) is not None
        return ("activation",) if is_layer else ("activation", "output")
