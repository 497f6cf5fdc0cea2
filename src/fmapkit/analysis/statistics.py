"""`Statistics`: moments, extremes, zeros, saturation and histogram of every layer's maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fmapkit._warnings import warn
from fmapkit.analysis._bins import Edges
from fmapkit.analysis._by_layer import ByLayer
from fmapkit.analysis._keys import Filters, Groups, Name
from fmapkit.analysis._moments import Moments, absorb, by_filter, fused, merge, moments
from fmapkit.analysis._ranks import agree, exchange
from fmapkit.analysis._saturation import Bounds, bounds_of, checked
from fmapkit.analysis._tables import Table, Tabular
from fmapkit.analysis.summary import _HEADS, LayerStatistics, _columns, summarise
from fmapkit.errors import ArgumentError
from fmapkit.readable import plain_values

if TYPE_CHECKING:
    from fmapkit.maps import FeatureMap
    from fmapkit.page import Section

__all__ = ["Statistics"]


class _Group:
    """Of one set of filters: its moments, whether saturation has a meaning, who has the rest."""

    __slots__ = ("local", "moments", "saturates")

    def __init__(self, moments: Moments, saturates: bool, local: bool) -> None:
        self.moments = moments
        self.saturates = saturates
        self.local = local  # other ranks have other filters under the same numbers


class Statistics(Tabular, ByLayer[_Group, LayerStatistics]):
    """Running statistics of every captured layer, filter by filter; an `Analysis`.

    ```python
    stats = Statistics()
    with capture(model, analyses=[stats]):
        for images in loader:
            model(images)
    stats["layer1.0.conv1"].mean          # of the activation, one value for each filter
    stats["layer1.0.conv1", "preactivation"].std
    ```

    Maps of one layer, kind, σ and path are taken together over all passes and calls. Memory does
    not grow with the passes. `update` never waits for the device; reading a value does.

    Sums are taken in float64, on a device without it (MPS) in float32, whatever the maps' type. In
    float64, over 10^6 values of scale 1e-30 to 1e30 in any batches, they equal NumPy's of the same
    values in float64: count, extremes, fractions and histogram exactly; |mean - NumPy's| <=
    1e-12·(|mean| + std); |variance - NumPy's| <= 1e-9·variance + (1e-15·|mean|)², the last being
    NumPy's own rounding. Integers beyond 2^53 are rounded to float64. In float32, as that type has
    it: variances below 1e-38 or above 1e38 are lost.

    A NaN makes a filter's mean, variance, minimum and maximum NaN, as in NumPy, and is counted in
    `nonfinite`; fractions and histogram go on counting the others. An infinity makes the mean
    infinite and the variance NaN.

    Integers and booleans are taken as numbers. Complex, sparse, quantized and nested maps, and
    `DTensor`s that are one rank's part, are left out: a warning names the first of each layer, and
    `missed` all of them.

    A value is *saturated* at a bound of σ, or within 1% of σ's range next to an asymptote: sigmoid
    (0.01, 0.99), tanh and softsign (-0.98, 0.98), hardsigmoid (0, 1), relu6 (0, 6). Only
    activations are. For every other σ the fraction is NaN, unless `saturation` gives bounds.
    On the threshold, see `fmapkit/analysis/_saturation.py`.

    Args:
        bins: edges of a histogram, increasing. The range of maps is not known before they come, and
            finding it out would wait for the device; so edges are fixed and what is beyond them is
            counted too. "log2": powers of two from 2^-14 to 2^15 on both sides of 0, which fits any
            scale to a factor of two. None, the default: no histogram; it costs more than all the
            rest.
        saturation: bounds by σ, e.g. `{"hardtanh": (-1.0, 1.0)}`: values at or below the first and
            at or above the second count as saturated.
        compile: fuse the passes over a map by `torch.compile`. It takes seconds at the first maps,
            and pays where memory is the limit: on a GPU. Where it fails, a warning says so, and
            statistics go on without.

    Raises:
        ArgumentError: an argument is outside what is allowed.
    """

    def __init__(
        self,
        *,
        bins: Sequence[float] | Literal["log2"] | None = None,
        saturation: Mapping[str, Bounds] | None = None,
        compile: bool = False,
    ) -> None:
        if not isinstance(compile, bool):
            raise ArgumentError(f"compile must be True or False, not {compile!r}")
        self._edges = Edges.of(bins)
        self._bounds = checked(saturation)
        self._compile = compile
        self._groups: Groups[_Group] = Groups("stats")

    # -- taking in -----------------------------------------------------------------------------

    def update(self, fm: FeatureMap) -> None:
        """Take one map in; of a layer that has other filters than before, name it in `missed`."""
        # State made in inference mode could not be used out of it.
        with torch.inference_mode(False), torch.no_grad():
            tensor, reason = plain_values(fm)
            name, filters = self._groups.place(fm)
            reason = reason or self._groups.clash(name, filters)
            if tensor is None or reason:
                self._leave_out(fm, f"the {fm.kind} of layer {fm.layer!r}", reason)
                return
            values = by_filter(tensor.detach(), fm.filter_dim if filters is not None else None)
            bounds = bounds_of(fm, self._bounds)
            group = self._groups.names.setdefault(name, {}).get(filters)
            if group is None:
                first = moments(values, bounds, self._edges)
                group = _Group(first, bounds is not None, fm.parts is not None)
                self._groups.names[name][filters] = group
                return
            group.moments = self._after(group.moments.on(tensor.device), values, bounds)
            group.local |= fm.parts is not None

    def _after(self, before: Moments, values: Tensor, bounds: Bounds | None) -> Moments:
        if self._compile and before.count and values.numel():
            try:
                return fused(before, values, bounds, self._edges, _compiled())
            except Exception as error:  # of whatever backend there is, or is not
                self._compile = False
                warn(
                    "Statistics(compile=True): torch.compile failed, so statistics go on without "
                    f"it ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"
                )
        return merge(before, moments(values, bounds, self._edges, before))

    def reset(self) -> None:
        """Forget every value."""
        self._groups = Groups("stats")

    def take(self) -> Statistics:
        """What was seen since the last time, as statistics of its own; this one begins anew.

        So that the course of a training can be read, epoch by epoch. `merge` puts them together
        again, and gives what would have been seen without.
        """
        taken = Statistics(saturation=self._bounds, compile=self._compile)
        taken._edges, taken._groups = self._edges, self._groups
        self._groups = Groups("stats")
        return taken

    # -- reading -------------------------------------------------------------------------------

    def __getitem__(self, key: str | tuple[str, ...]) -> LayerStatistics:
        """The statistics of one layer's maps of one kind.

        Args:
            key: a layer (its activation; of a module of which only outputs were seen, its output),
                (layer, kind), or (layer, kind, path) for nested outputs.

        Raises:
            NoPassError: no map has been seen yet.
            UnknownLayerError: none of such a layer.
            NoActivationError: no activation of it.
            KindNotCapturedError: none of that kind.
            AmbiguousMapError: several answer; choose with `select`.
        """
        return self._read(self._groups.find(key))

    def select(
        self,
        layer: Any = None,
        kind: str | None = None,
        *,
        nonlinearity: str | None = None,
        path: str | None = None,
    ) -> list[LayerStatistics]:
        """All that fit, in the order in which they were first seen.

        Args:
            layer: a name, glob or regex, or several.
            kind: one of the five kinds.
            nonlinearity: only maps of this σ.
            path: only this place in a nested output.

        Raises:
            ArgumentError: an argument is of no allowed form.
        """
        return [self._read(n) for n in self._groups.select(layer, kind, nonlinearity, path)]

    def _read(self, name: Name) -> LayerStatistics:
        parts = [(f, g.moments, g.saturates) for f, g in self._groups.parts(name)]
        return summarise(name, parts, self._edges.tensor if self._edges is not None else None)

    def _page_sections(self) -> list[Section]:
        """What a page draws below the table: mean, std and histogram of each filter."""
        from fmapkit.analysis.page_sections import statistics_section

        return [statistics_section(s) for s in self]

    def _table(self) -> Table:
        heads = ("layer", "kind", "σ", "filters", *_HEADS)
        rows = []
        for s in self:
            cells = [column[0] for column in _columns(s.overall(), 1)]
            count = str(len(s)) if s.filters is not None else "–"
            rows.append((s.layer + s.path, s.kind, s.nonlinearity or "", count, *cells))
        missed = f", {len(self.missed)} missed (see stats.missed)" if self.missed else ""
        last = f"Statistics: {len(self)} kinds of map of {len(self.layers)} layers{missed}"
        return Table(heads, rows, 3, last if rows else "Statistics: no map seen yet")

    # -- putting together ----------------------------------------------------------------------

    def merge(self, other: Statistics) -> None:
        """Take in what another one has seen, on this process; `other` stays as it is.

        Raises:
            ArgumentError: its bins or bounds are others, or a layer has other filters there.
        """
        if not isinstance(other, Statistics):
            raise ArgumentError(f"merge takes Statistics, not {type(other).__name__}")
        self._check_options(other._options(), "merge")
        groups = [(n, f, g) for n, of in other._groups.names.items() for f, g in of.items()]
        for name, filters, _ in groups:  # all, before the first is taken in
            self._groups.check(name, filters)
        for name, filters, group in groups:
            self._add(name, filters, group.moments, group.saturates, group.local)
        for key, reason in other._groups.missed.items():
            self._groups.missed.setdefault(key, reason)

    def _add(
        self, name: Name, filters: Filters, new: Moments, saturates: bool, local: bool
    ) -> None:
        mine = self._groups.names.setdefault(name, {})
        if filters not in mine:
            mine[filters] = _Group(new, saturates, local)
            return
        group = mine[filters]
        with torch.no_grad():
            group.moments = merge(group.moments, new.on(group.moments.device))
        group.local |= local

    def reduce(self, group: Any = None) -> Statistics:
        """The statistics over the maps of all ranks, the same bits on every rank.

        A collective that every rank of the group has to call: one `all_gather`, and a second one
        if a rank has more than a MiB, which is some 16,000 filters. This one stays as it is.

        Args:
            group: process group; None for the default one.

        Raises:
            DistributedError: torch.distributed is not initialised, ranks have seen different
                layers or have other options, or a map was one rank's part (tensor parallel).
                Every rank raises.
        """
        state = self.state_dict()
        tensors = [t for g in state["groups"] for t in g["tensors"].values()]
        texts = [{**g, "tensors": list(g["tensors"])} for g in state["groups"]]
        local = [
            str(name)
            for name, of in self._groups.names.items()
            if any(g.local for g in of.values())
        ]
        said = {"groups": texts, "options": self._options(), "local": local}
        ranks = exchange("reduce()", said, tensors, group)
        agree([text for text, _ in ranks], "bins or saturation")
        result = Statistics(saturation=self._bounds, compile=self._compile)
        result._edges = self._edges
        result._groups.missed = dict(self._groups.missed)
        for text, received in ranks:
            left = iter(received)
            for entry in text["groups"]:
                found = {key: next(left) for key in entry["tensors"]}
                result._load({**entry, "tensors": found})
        for name, of in result._groups.names.items():
            for filters, one in of.items():
                one.moments = one.moments.on(self._groups.names[name][filters].moments.device)
        return result

    # -- keeping -------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        edges = None if self._edges is None else list(self._edges.edges)
        return {"edges": edges, "saturation": {k: list(v) for k, v in self._bounds.items()}}

    def _check_options(self, theirs: dict[str, Any], doing: str) -> None:
        mine = self._options()
        for key, argument in (("edges", "bins"), ("saturation", "saturation")):
            if mine[key] != theirs[key]:
                raise ArgumentError(
                    f"{doing}: the other statistics have {argument} of their own, "
                    f"{_short(theirs[key])}, not {_short(mine[key])}; counts by different "
                    "limits cannot be added"
                )

    def state_dict(self) -> dict[str, Any]:
        """All that is known, as tensors and built-in types: `torch.save` it with the model.

        Loads with `weights_only=True`. The tensors are those of this object, not copies; `update`
        makes new ones.
        """
        groups = []
        for name, of in self._groups.names.items():
            for filters, group in of.items():
                groups.append(
                    {
                        "layer": name.layer,
                        "kind": name.kind,
                        "nonlinearity": name.nonlinearity,
                        "path": name.path,
                        "filters": None if filters is None else list(filters),
                        "count": group.moments.count,
                        "saturates": group.saturates,
                        "local": group.local,
                        "tensors": group.moments.tensors(),
                    }
                )
        return {"version": 1, "options": self._options(), "groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict()`; what was known before is forgotten.

        Raises:
            ArgumentError: it is of another kind or version, or of other bins or bounds.
        """
        self._check_state(state)
        self._check_options(state["options"], "load_state_dict")
        self.reset()
        for entry in state["groups"]:
            self._load(entry)

    def _load(self, entry: Mapping[str, Any]) -> None:
        name = Name(entry["layer"], entry["kind"], entry["nonlinearity"], entry["path"])
        filters = None if entry["filters"] is None else tuple(entry["filters"])
        self._groups.check(name, filters)
        new = Moments(entry["count"], **entry["tensors"])
        self._add(name, filters, new, entry["saturates"], entry["local"])


@cache
def _compiled() -> Callable[..., Any]:
    # By dynamic shapes: a map of another size should not be compiled again.
    return torch.compile(absorb, dynamic=True)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "…"
