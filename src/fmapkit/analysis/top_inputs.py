"""`TopInputs`: which inputs excite each filter most, and where in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fmapkit._warnings import warn
from fmapkit.analysis._bins import placed
from fmapkit.analysis._by_layer import Held, Mergeable
from fmapkit.analysis._keys import Filters, Name
from fmapkit.analysis._strongest import Scores, Strongest, by_sample, padded, scores_of
from fmapkit.analysis.layer_tops import LayerTops
from fmapkit.errors import ArgumentError, DistributedError, check_positive, did_you_mean, listed
from fmapkit.map import PassTag

if TYPE_CHECKING:
    from fmapkit.maps import FeatureMap

_KINDS = ("response", "preactivation", "activation", "output")


@dataclass(slots=True)
class _TopGroup(Held):
    sums: Strongest
    seen: int  # inputs

    def clash(self, name: Name, other: _TopGroup) -> str:
        here, there = self.sums.axes, other.sums.axes
        if here == there:
            return ""
        return f"merge: {name} has {here} axes of locations here, and {there} there"

    def merge(self, other: _TopGroup) -> None:
        Held.merge(self, other)
        self.seen += other.seen

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen, **Held.state(self)}


class _Counter:
    """Numbers the inputs of each pass, as they come.

    Args:
        last: the latest pass; None if the first one may be any of its block.
    """

    def __init__(self, last: PassTag | None) -> None:
        self.next = 0
        self.last = last
        self._gap = False  # was warned of
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
        this = PassTag.of(fm)
        since = 1 if self.last is None else this.since(self.last)
        if since or tags in self.maps:  # another pass; of another block, perhaps
            self._look_for_gap(since or fm.step + 1, fm.step)
            self.last, self.first, self.size = this, self.next, samples
            self.next += samples
            self.maps.clear()
        self.maps.add(tags)
        if samples != self.size:
            return (
                f"its first axis has {samples} entries, and the first map of the pass "
                f"{self.size}: inputs are counted along it; maps.batch(ids) says how many there are"
            )
        return torch.arange(self.first, self.first + samples, device=fm.tensor.device)

    def _look_for_gap(self, since: int, step: int) -> None:
        """Warn, once, where inputs have gone by that nobody could count."""
        if self._gap or since == 1:
            return
        self._gap = True
        warn(
            f"TopInputs has seen no map of step {step - since + 1}, so the numbers of inputs from "
            f"step {step} on are not their places in a data set: every= leaves passes out, a layer "
            "may not run in each, or maps.missed says why; number inputs with maps.batch(ids)"
        )


class TopInputs(Mergeable[_TopGroup, LayerTops]):
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
    once, in order. Where a pass was left out, it no longer is, and a warning says so. An input that
    comes again under the same number, or several times in a pass (a layer that is called twice),
    counts once, at its strongest. Of two that are equally strong the lower number comes first. NaN
    never is among them.

    Memory is bounded: three numbers, and one for each axis of locations, for each of k inputs of
    each filter. `update` never waits for a GPU; reading does.

    Inputs of several runs or ranks go by their numbers, too: give them with `maps.batch(ids)`
    before `merge` or `reduce`.

    Maps without one filter axis, with another number of inputs than the rest of the pass, or of a
    layer that has other filters than before are left out: a warning names the first of each layer,
    `missed` all of them.

    Args:
        k: how many inputs to keep of each filter.
        by: what makes an input strong: "max", its strongest location; "mean", over all locations;
            or a function from values (samples, filters, *locations) to scores (samples, filters);
            `update` raises an `ArgumentError` where it gives something else.
            Where the map is strongest is noted with either.
        kinds: of the maps to look at, one or several; others are passed over.

    Raises:
        ArgumentError: an argument is outside what is allowed.
    """

    _heads = ("layer", "kind", "σ", "filters", "inputs", "strongest", "of filter", "input")

    def __init__(
        self,
        k: int = 9,
        *,
        by: Literal["max", "mean"] | Scores = "max",
        kinds: str | Iterable[str] = "activation",
    ) -> None:
        check_positive(k=k)
        if not callable(by) and by not in ("max", "mean"):
            raise ArgumentError(f"by must be 'max', 'mean' or a function, not {by!r}")
        self.k = k
        self.by = by
        self.kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        for kind in self.kinds:
            if kind not in _KINDS:
                hint = did_you_mean(kind, _KINDS)
                raise ArgumentError(
                    f"kinds takes some of {listed(_KINDS)}, not {kind!r}{hint}", candidates=_KINDS
                )
        self._kinds = self.kinds
        super().__init__("top")
        self._counter = _Counter(PassTag(-1))

    # -- taking in -----------------------------------------------------------------------------

    def _take_in(self, fm: FeatureMap, tensor: Tensor, name: Name, filters: Filters) -> str:
        if filters is None or fm.filter_dim is None:
            return "its filters do not lie along one axis"
        dim = fm.filter_dim
        if fm.mask is not None:
            (tensor, ids), dim = padded(tensor, fm.mask, fm.ids), dim + 1
            fm = replace(fm, ids=ids)
        values = by_sample(tensor, dim)
        samples, count, axes = values.shape[0], values.shape[1], values.dim() - 2
        numbers = self._counter.ids(fm, samples)
        if isinstance(numbers, str):
            return numbers
        groups = self._groups.names.setdefault(name, {})
        if filters not in groups:
            top = Strongest.none(count, self.k, axes, values.device)
            groups[filters] = _TopGroup(top, fm.parts is not None, 0)
        group = groups[filters]
        group.local |= fm.parts is not None
        if group.sums.axes != axes:
            return f"it had {group.sums.axes} axes of locations before, and has {axes} now"
        if values.numel():
            scores = scores_of(values, self.by, fm.mask)
            top = group.sums.on(values.device)
            group.sums = top.after(values, scores, placed(numbers, values.device))
            group.seen += samples
        return ""

    def reset(self) -> None:
        """Forget all that was seen; inputs are counted from 0 again."""
        super().reset()
        self._counter = _Counter(None)

    # -- reading -------------------------------------------------------------------------------

    def _read(self, name: Name) -> LayerTops:
        filters, groups = self._groups.parts(name)
        tops = [group.sums.on(groups[0].sums.device) for group in groups]
        return LayerTops(
            **asdict(name),
            filters=filters or (),
            seen=max(group.seen for group in groups),
            scores=torch.cat([t.scores for t in tops]),
            inputs=torch.cat([t.inputs for t in tops]),
            at=torch.cat([t.at for t in tops]),
        )

    def _row(self, s: LayerTops) -> tuple[str, ...]:
        best = int(s.scores[:, 0].argmax())
        return (
            *(s.layer + s.path, s.kind, s.nonlinearity or "", str(len(s)), str(s.seen)),
            *(f"{float(s.scores[best, 0]):.4g}", str(s.filters[best])),
            str(int(s.inputs[best, 0])),
        )

    def _summary(self, rows: list[tuple[str, ...]]) -> str:
        by = self.by if isinstance(self.by, str) else "a function"
        return f"{self.k} inputs of each filter, by {by}"

    # -- keeping and putting together ------------------------------------------------------------

    def _check_ranks(self, said: list[dict[str, Any]]) -> None:
        super()._check_ranks(said)
        counted = [rank for rank, text in enumerate(said) if text["counts"]["counted"]]
        if counted and len(said) > 1:
            raise DistributedError(
                f"reduce(): rank {counted[0]} of the group has counted its inputs itself, from 0, "
                "as other ranks do theirs: number them with maps.batch(ids) before each pass, by "
                "their places in the data set"
            )

    def _options(self) -> dict[str, Any]:
        by = self.by if isinstance(self.by, str) else getattr(self.by, "__qualname__", "function")
        return {"k": self.k, "by": by, "kinds": sorted(self.kinds)}

    def state_dict(self) -> dict[str, Any]:
        """All that is known, as tensors and built-in types: `torch.save` it with the model.

        Loads with `weights_only=True`. `update` does not change the tensors that are in it. A
        function `by` goes by its name.
        """
        counts = {"next": self._counter.next, "counted": self._counter.counted}
        return {**super().state_dict(), "counts": counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict()`; what was known before is forgotten.

        Raises:
            ArgumentError: it is of another kind or version, or was made with other arguments.
        """
        super().load_state_dict(state)
        self._counter.next = state["counts"]["next"]
        self._counter.counted = state["counts"]["counted"]

    def _sums(self, entry: Mapping[str, Any]) -> _TopGroup:
        return _TopGroup(Strongest(**entry["tensors"]), entry["local"], entry["seen"])
