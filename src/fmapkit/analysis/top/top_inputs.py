"""`TopInputs`: which inputs excite each filter most, and where in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fmapkit.analysis._bins import placed
from fmapkit.analysis._by_layer import ByLayer
from fmapkit.analysis._keys import Filters, Groups, Name
from fmapkit.analysis._ranks import agree, exchange
from fmapkit.analysis.top.layer_tops import HEADS, LayerTops, row
from fmapkit.analysis.top.strongest import Scores, Strongest, by_sample, scores_of
from fmapkit.errors import ArgumentError, DistributedError, did_you_mean, listed
from fmapkit.readable import plain_values
from fmapkit.tables import text_table

if TYPE_CHECKING:
    from fmapkit.maps import FeatureMap

__all__ = ["TopInputs"]

_KINDS = ("response", "preactivation", "activation", "output")


class _TopGroup:
    """Of one set of filters: the strongest, and who has the rest."""

    __slots__ = ("local", "seen", "top")

    def __init__(self, top: Strongest, local: bool) -> None:
        self.top = top
        self.seen = 0  # inputs
        self.local = local  # other ranks have other filters under the same numbers


class _Counter:
    """Numbers the inputs of each pass, as they come."""

    def __init__(self) -> None:
        self.next = 0
        self.step = -1
        self.first = self.size = 0
        self.counted = False  # some had no numbers of the user's
        self.maps: set[Any] = set()  # of the pass

    def ids(self, fm: FeatureMap, samples: int) -> Tensor | str:
        """Which inputs the samples of a map are; or why that is not known."""
        if fm.ids is not None:
            if len(fm.ids) == samples:
                return fm.ids
            return (
                f"maps.batch gave {len(fm.ids)} numbers, and its first axis has {samples} entries"
            )
        self.counted = True
        tags = (fm.layer, fm.kind, fm.nonlinearity, fm.path, fm.call, fm.filters)
        if fm.step != self.step or tags in self.maps:  # another pass; of another block, perhaps
            self.step, self.first, self.size = fm.step, self.next, samples
            self.next += samples
            self.maps.clear()
        self.maps.add(tags)
        if samples != self.size:
            return (
                f"its first axis has {samples} entries, and the first map of the pass "
                f"{self.size}: inputs are counted along it; maps.batch(ids) says how many there are"
            )
        return torch.arange(self.first, self.first + samples, device=fm.tensor.device)


class TopInputs(ByLayer[_TopGroup, LayerTops]):
    """The k inputs that excite each filter most, by layer, and where; an `Analysis`.

    ```python
    top = TopInputs(k=9)
    with capture(model, "conv3", kinds="activation", analyses=top, keep=0), torch.no_grad():
        for images, _ in loader:               # in the order of the data set
            model(images)
    top["conv3"].inputs                        # (filters, 9): places in the data set
    top["conv3"].plot(dataset, model=model)    # the patches that they saw
    ```

    How Zeiler & Fergus look at a filter ("Visualizing and Understanding Convolutional Networks",
    ECCV 2014, section 4): by the parts of the images that give its nine strongest activations.

    An input is one entry of the map's first axis, or one map where that is the filter axis. It goes
    by the number that `maps.batch(ids)` gave it before the pass. Without, inputs are numbered in
    the order in which they come, from 0: that is their place in the data set if it is gone through
    once, in order. An input that comes again under the same number, or several times in a pass (a
    layer that is called twice), counts once, at its strongest. Of two that are equally strong the
    lower number comes first. NaN never is among them.

    Memory is bounded: three numbers, and one for each axis of locations, for each of k inputs of
    each filter. `update` never waits for a GPU; reading does.

    Maps without one filter axis, with another number of inputs than the rest of the pass, or of a
    layer that has other filters than before are left out: a warning names the first of each layer,
    `missed` all of them.

    Args:
        k: how many inputs to keep of each filter.
        by: what makes an input strong: "max", its strongest location; "mean", over all locations;
            or a function from values (samples, filters, *locations) to scores (samples, filters).
            Where the map is strongest is noted with either.
        kinds: of the maps to look at, one or several; others are passed over.

    Raises:
        ArgumentError: an argument is outside what is allowed.
    """

    def __init__(
        self,
        k: int = 9,
        *,
        by: Literal["max", "mean"] | Scores = "max",
        kinds: str | Iterable[str] = "activation",
    ) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ArgumentError(f"k must be a positive number of inputs, not {k!r}")
        if not callable(by) and by not in ("max", "mean"):
            raise ArgumentError(f"by must be 'max', 'mean' or a function, not {by!r}")
        self.k = k
        self.by = by
        self.kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        for kind in self.kinds:
            if kind not in _KINDS:
                hint = did_you_mean(kind, _KINDS) if isinstance(kind, str) else ""
                raise ArgumentError(
                    f"kinds takes some of {listed(_KINDS)}, not {kind!r}{hint}", candidates=_KINDS
                )
        self._groups: Groups[_TopGroup] = Groups("top")
        self._counter = _Counter()

    # -- taking in -----------------------------------------------------------------------------

    def update(self, fm: FeatureMap) -> None:
        """Take one map in; what cannot be taken in is named in `missed`.

        Raises:
            ArgumentError: the function `by` gave no score for each sample and filter.
        """
        if fm.kind not in self.kinds:
            return
        # State made in inference mode could not be used out of it.
        with torch.inference_mode(False), torch.no_grad():
            tensor, reason = plain_values(fm)
            name, filters = self._groups.place(fm)
            if not reason and (filters is None or fm.filter_dim is None):
                reason = "its filters do not lie along one axis"
            reason = reason or self._groups.clash(name, filters)
            if tensor is not None and not reason:
                assert fm.filter_dim is not None
                reason = self._take_in(fm, name, filters, by_sample(tensor.detach(), fm.filter_dim))
            if reason:
                self._leave_out(fm, f"the {fm.kind} of layer {fm.layer!r}", reason)

    def _take_in(self, fm: FeatureMap, name: Name, filters: Filters, values: Tensor) -> str:
        """Why a map cannot be; empty if it is."""
        samples, count, axes = values.shape[0], values.shape[1], values.dim() - 2
        ids = self._counter.ids(fm, samples)
        if isinstance(ids, str):
            return ids
        groups = self._groups.names.setdefault(name, {})
        group = groups.get(filters)
        if group is None:
            top = Strongest.none(count, self.k, axes, values.device)
            group = groups[filters] = _TopGroup(top, fm.parts is not None)
        group.local |= fm.parts is not None
        if group.top.axes != axes:
            return f"it had {group.top.axes} axes of locations before, and has {axes} now"
        if values.numel():
            scores = scores_of(values, self.by)
            top = group.top.on(values.device)
            group.top = top.after(values, scores, placed(ids, values.device))
            group.seen += samples
        return ""

    def reset(self) -> None:
        """Forget all that was seen; inputs are counted from 0 again."""
        self._groups = Groups("top")
        self._counter = _Counter()

    # -- reading -------------------------------------------------------------------------------

    def __getitem__(self, key: str | tuple[str, ...]) -> LayerTops:
        """The inputs that excite the filters of a layer most.

        Args:
            key: a layer (of its activation), (layer, kind), or (layer, kind, path).

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
    ) -> list[LayerTops]:
        """All that fit, in the order in which they were first seen; as `Statistics.select`.

        Raises:
            ArgumentError: an argument is of no allowed form.
        """
        return [self._read(n) for n in self._groups.select(layer, kind, nonlinearity, path)]

    def _read(self, name: Name) -> LayerTops:
        parts = self._groups.parts(name)
        filters = tuple(f for part, _ in parts for f in part or ())
        device = parts[0][1].top.scores.device
        tops = [group.top.on(device) for _, group in parts]
        return LayerTops(
            layer=name.layer,
            kind=name.kind,
            nonlinearity=name.nonlinearity,
            path=name.path,
            filters=filters,
            seen=max(group.seen for _, group in parts),
            scores=torch.cat([t.scores for t in tops]),
            inputs=torch.cat([t.inputs for t in tops]),
            at=torch.cat([t.at for t in tops]),
        )

    def __repr__(self) -> str:
        rows = [row(s) for s in self]
        if not rows:
            return "TopInputs: no map seen yet"
        missed = f", {len(self.missed)} missed (see top.missed)" if self.missed else ""
        by = self.by if isinstance(self.by, str) else "a function"
        last = f"TopInputs: {self.k} inputs of each filter, by {by}{missed}"
        return "\n".join([*text_table(HEADS, rows, right=range(3, len(HEADS))), last])

    # -- putting together ----------------------------------------------------------------------

    def merge(self, other: TopInputs) -> None:
        """Take in what another one has seen, on this process; `other` stays as it is.

        Inputs go by their numbers: give both of them with `maps.batch(ids)`, unless both have gone
        through the same data set in the same order.

        Raises:
            ArgumentError: its k, kinds or `by` are others, or a layer has other filters there.
        """
        if not isinstance(other, TopInputs):
            raise ArgumentError(f"merge takes TopInputs, not {type(other).__name__}")
        self._check_options(other._options(), "merge")
        groups = [(n, f, g) for n, of in other._groups.names.items() for f, g in of.items()]
        for name, filters, group in groups:  # all, before the first is taken in
            self._groups.check(name, filters)
            mine = self._groups.names.get(name, {}).get(filters)
            if mine is not None and mine.top.axes != group.top.axes:
                raise ArgumentError(
                    f"merge: {name} has {mine.top.axes} axes of locations here, and "
                    f"{group.top.axes} there"
                )
        for name, filters, group in groups:
            self._add(name, filters, group.top, group.seen, group.local)
        for key, reason in other._groups.missed.items():
            self._groups.missed.setdefault(key, reason)

    def _add(self, name: Name, filters: Filters, new: Strongest, seen: int, local: bool) -> None:
        mine = self._groups.names.setdefault(name, {})
        if filters not in mine:
            device = new.scores.device
            empty = Strongest.none(len(new.scores), self.k, new.axes, device)
            mine[filters] = _TopGroup(empty, local)
        group = mine[filters]
        with torch.no_grad():
            group.top = group.top.merge(new.on(group.top.scores.device))
        group.seen += seen
        group.local |= local

    def reduce(self, group: Any = None) -> TopInputs:
        """The strongest inputs over all ranks, the same on every rank.

        A collective that every rank of the group has to call: one `all_gather`, and a second one
        if a rank has more than a MiB. This one stays as it is.

        Args:
            group: process group; None for the default one.

        Raises:
            DistributedError: torch.distributed is not initialised, ranks have seen different
                layers or have other options, or have counted their inputs each for itself, or a
                map was one rank's part (tensor parallel). Every rank raises.
        """
        state = self.state_dict()
        tensors = [t for g in state["groups"] for t in g["tensors"].values()]
        texts = [{**g, "tensors": list(g["tensors"])} for g in state["groups"]]
        local = [
            str(n) for n, of in self._groups.names.items() if any(g.local for g in of.values())
        ]
        said = {
            "groups": texts,
            "options": self._options(),
            "local": local,
            "counted": self._counter.counted,
        }
        ranks = exchange("reduce()", said, tensors, group)
        agree([text for text, _ in ranks], "k, by or kinds")
        counted = [rank for rank, (text, _) in enumerate(ranks) if text["counted"]]
        if counted and len(ranks) > 1:
            raise DistributedError(
                f"reduce(): rank {counted[0]} of the group has counted its inputs itself, from 0, "
                "as other ranks do theirs: number them with maps.batch(ids) before each pass, by "
                "their places in the data set"
            )
        result = TopInputs(self.k, by=self.by, kinds=self.kinds)
        result._groups.missed = dict(self._groups.missed)
        for text, received in ranks:
            left = iter(received)
            for entry in text["groups"]:
                result._load({**entry, "tensors": {key: next(left) for key in entry["tensors"]}})
        for name, of in result._groups.names.items():
            for filters, one in of.items():
                device = self._groups.names[name][filters].top.scores.device
                one.top = one.top.on(device)
        return result

    # -- keeping -------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        by = self.by if isinstance(self.by, str) else getattr(self.by, "__qualname__", "function")
        return {"k": self.k, "by": by, "kinds": sorted(self.kinds)}

    def _check_options(self, theirs: Mapping[str, Any], doing: str) -> None:
        mine = self._options()
        for key in mine:
            if theirs.get(key) != mine[key]:
                raise ArgumentError(
                    f"{doing}: the other one has {key}={theirs.get(key)!r}, this has {mine[key]!r}"
                )

    def state_dict(self) -> dict[str, Any]:
        """All that is known, as tensors and built-in types: `torch.save` it with the model.

        Loads with `weights_only=True`. The tensors are those of this object, not copies; `update`
        makes new ones. A function `by` goes by its name.
        """
        groups = [
            {
                "layer": name.layer,
                "kind": name.kind,
                "nonlinearity": name.nonlinearity,
                "path": name.path,
                "filters": None if filters is None else list(filters),
                "seen": group.seen,
                "local": group.local,
                "tensors": group.top.tensors(),
            }
            for name, of in self._groups.names.items()
            for filters, group in of.items()
        ]
        counts = {"next": self._counter.next, "counted": self._counter.counted}
        return {"version": 1, "options": self._options(), "groups": groups, "counts": counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict()`; what was known before is forgotten.

        Raises:
            ArgumentError: it is of another kind or version, or was made with other arguments.
        """
        self._check_state(state)
        self._check_options(state["options"], "load_state_dict")
        self.reset()
        for entry in state["groups"]:
            self._load(entry)
        self._counter.next = state["counts"]["next"]
        self._counter.counted = state["counts"]["counted"]

    def _load(self, entry: Mapping[str, Any]) -> None:
        name = Name(entry["layer"], entry["kind"], entry["nonlinearity"], entry["path"])
        filters: Sequence[int] | None = entry["filters"]
        held: Filters = None if filters is None else tuple(filters)
        self._groups.check(name, held)
        self._add(name, held, Strongest(**entry["tensors"]), entry["seen"], entry["local"])
