"""`Similarity`: how alike two layers are, over all pairs: linear CKA, and RSA.

A batch is held as its Gram matrix until its pass has ended, then added to sums for each pair of
layers (`_pairs.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmapkit._warnings import warn
from fmapkit.analysis._pairs import LEAST, Gram, MapTag, Pairs, labels
from fmapkit.errors import (
    ArgumentError,
    NoPassError,
    UnknownLayerError,
    check_choice,
    check_flags,
    listed,
    no_layer,
)
from fmapkit.map import PassTag
from fmapkit.readable import plain_values
from fmapkit.tables import Shown, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fmapkit.maps import FeatureMap

_AHEAD = 64  # passes that one of two models may be ahead of the other
_SHOWN = 8  # columns of a table


@dataclass(frozen=True, slots=True)
class _Batch:
    """What one model has made of a batch.

    Attributes:
        place: in the order of the model's passes, with those that were not seen.
        count: samples.
        ids: their numbers, where the user gave them and to read them waits for nothing; else None.
    """

    place: int
    count: int
    ids: Tensor | None
    grams: dict[MapTag, Gram]

    def of_others(self, other: _Batch) -> str:
        """Why it is no batch of the same samples; empty where nothing says so."""
        if self.count != other.count:
            return f"{self.count} samples in a pass, and the second one {other.count}"
        if self.ids is None or other.ids is None or torch.equal(self.ids, other.ids):
            return ""
        place = int((self.ids != other.ids).nonzero()[0])
        ours, theirs = int(self.ids[place]), int(other.ids[place])
        return f"input {ours} as number {place} of a pass, and the second one input {theirs}"


class _Side:
    """What one model has shown; an analysis. It holds matrices of passes that nobody has used yet.

    Args:
        name: "first", "second" or "only".
    """

    def __init__(self, owner: Similarity, name: str) -> None:
        self._owner = owner
        self._name = name
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._place = -1  # of the pass under way, or the last one
        self._last: PassTag | None = None  # of it; None before the first one, which may be any
        self._count: int | None = None  # samples of the pass under way
        self._ids: Tensor | None = None
        self._first: MapTag | None = None  # map of it, be it left out
        self._current: dict[MapTag, Gram] = {}
        self.passes: deque[_Batch] = deque()

    def update(self, fm: FeatureMap) -> None:
        """Take one map in.

        Raises:
            ArgumentError: this model is too far ahead of the other one, or the two were given
                other batches.
        """
        self._owner._used(self._name)
        tag = MapTag.of(fm)
        this = PassTag.of(fm)
        since = 1 if self._last is None else this.since(self._last)
        # A block for each pass begins at step 0; one that nobody knows, with the same map.
        if since or tag == self._first:
            self.close()
        if self._first is None:  # a pass has begun; steps in between were of others, not seen
            self._place += since or fm.step + 1
            self._first, self._last = tag, this
        # State made in inference mode could not be used out of it.
        with torch.inference_mode(False), torch.no_grad():
            tensor, reason = plain_values(fm)
            if tensor is not None and not reason:
                reason = self._why_not(fm, tensor)
            if not reason and tag in self._current:
                reason = "it comes twice in a pass: the first one is taken"
            if tensor is None or reason:
                self._owner.missed.setdefault(tag.label, reason)
                return
            if fm.ids is not None and len(fm.ids) == len(tensor) and fm.ids.device.type == "cpu":
                self._ids = fm.ids
            values = tensor.detach().reshape(len(tensor), -1)
            self._current[tag] = Gram.of(values, self._owner._rsa)

    def _why_not(self, fm: FeatureMap, tensor: Tensor) -> str:
        if tensor.dim() < 2 or fm.filter_dim == 0:
            return "it has no axis of samples"
        count = len(tensor)
        if self._count is None:
            self._count = count
        if count != self._count:
            return f"it has {count} samples, and the first map of the pass {self._count}"
        if count < LEAST:
            return f"a pass of {count} samples: the estimate takes {LEAST} or more"
        return "" if tensor.numel() else "it has no values"

    def close(self) -> None:
        """The pass has ended, as far as is known."""
        if self._current and self._count is not None:
            self.passes.append(_Batch(self._place, self._count, self._ids, self._current))
        self._first, self._current, self._count, self._ids = None, {}, None, None
        self._owner._take_in()
        if len(self.passes) > _AHEAD:
            raise ArgumentError(
                f"Similarity: the {self._name} model is {_AHEAD} passes ahead of the other one: "
                "give both each batch in turn"
            )

    def __repr__(self) -> str:
        return f"the {self._name} model of a Similarity"


class Similarity(Shown):
    """Linear CKA of all pairs of layers, over all passes; an `Analysis`.

    ```python
    alike = Similarity()
    with capture(model, kinds="activation", analyses=alike, keep=0), torch.no_grad():
        for images in loader:
            model(images)
    alike.cka  # (layers, layers)
    alike["conv1", "conv2"]
    alike.plot()
    ```

    Of two models that are given the same batches, or two trainings of one, `alike.first` and
    `alike.second` are the analyses; rows are then layers of the first one, columns of the second.
    Passes are paired in their order. One that was not captured of one model is left out of both;
    what one model was given more often is warned of. Whether passes are of the same inputs is told
    by their numbers, where `maps.batch(ids)` gave them to both.

    CKA (Kornblith et al. 2019) is HSIC(K, L) / √(HSIC(K, K)·HSIC(L, L)) of the Gram matrices of two
    layers: 1 where they are the same up to rotation and scale. Each HSIC is the mean over passes of
    its unbiased estimate within a pass (Nguyen, Raghu and Kornblith 2021), weighted by the number
    of samples, so that batches may be small. An estimate may lie a little outside of [0, 1]. RSA
    (Kriegeskorte et al. 2008) is the correlation, over all pairs of samples within a pass, of how
    dissimilar they are in two layers: by 1 - the correlation of their values. A sample that has the
    same value throughout in one of the two (0, of a ReLU) has no correlation, and is left out.

    Axis 0 of a map counts samples, and all its other values are features. Sums are in float64
    (float32 on MPS). What is held is (samples, samples) by layer of the pass under way, and
    (layers, layers). Figures are of the passes that have ended: read them between passes.

    Rows and columns go by their layers; kinds, calls, σ and paths are told apart by what is added.
    Left out, and named in `missed`, are maps of another number of samples than the first one of
    their pass, passes of fewer than 4 samples, and maps without values to speak of (complex,
    sparse, …).

    Args:
        rsa: work out RSA, too.

    Raises:
        ArgumentError: an argument is outside what is allowed.
    """

    def __init__(self, *, rsa: bool = False) -> None:
        check_flags(rsa=rsa)
        self._rsa = rsa
        self.first, self.second = _Side(self, "first"), _Side(self, "second")
        self._only = _Side(self, "only")
        self.reset()

    def reset(self) -> None:
        """Forget every pass, and go on with the captures that are open."""
        for side in (self.first, self.second, self._only):
            side.forget()
        self.missed: dict[str, str] = {}
        self._pairs = Pairs(self._rsa)
        self._two: bool | None = None  # whether there are two models
        self._warned = 0  # of how many passes without their like

    # -- taking in -----------------------------------------------------------------------------

    def update(self, fm: FeatureMap) -> None:
        """Take one map in, where there is one model."""
        self._only.update(fm)

    def _used(self, side: str) -> None:
        two = side != "only"
        if self._two not in (None, two):
            raise ArgumentError(
                "a Similarity is of one model, as an analysis itself, or of two, by first and "
                "second; not both"
            )
        self._two = two

    def _take_in(self) -> None:
        """Use all passes that can be used."""
        with torch.inference_mode(False), torch.no_grad():
            while self._only.passes:
                grams = self._only.passes.popleft().grams
                self._pairs.add(grams, grams)
            while self.first.passes and self.second.passes:
                a, b = self.first.passes[0], self.second.passes[0]
                if a.place <= b.place:
                    self.first.passes.popleft()
                if b.place <= a.place:
                    self.second.passes.popleft()
                if a.place != b.place:  # the other model has lost that pass, or left it out
                    continue
                if differs := a.of_others(b):
                    raise ArgumentError(
                        f"Similarity: the first model was given {differs}: give both the same "
                        "batches"
                    )
                self._pairs.add(a.grams, b.grams)

    def _read(self) -> Pairs:
        for side in (self._only, self.first, self.second):
            side.close()
        if not self._pairs.first:
            why = f"; left out: {listed(f'{k}: {v}' for k, v in self.missed.items())}"
            raise NoPassError("Similarity: no pass has been seen" + (why if self.missed else ""))
        if self._ahead() not in (0, self._warned):
            self._warned = self._ahead()
            warn(f"Similarity: {self._unpaired()}")
        return self._pairs

    def _ahead(self) -> int:
        """How many passes of one model wait for the like of the other one."""
        return max(len(self.first.passes), len(self.second.passes))

    def _unpaired(self) -> str:
        one, other = ("first", "second") if self.first.passes else ("second", "first")
        return (
            f"the {one} model was given {self._ahead()} passes more than the {other} one. Passes "
            "are paired in their order: if one of them came before others (to warm up, say), all "
            "pairs since then are of different batches"
        )

    # -- reading -------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[list[str], list[str]]:
        """What the rows and the columns are: the layers of the first and of the second model.

        Raises:
            NoPassError: no pass has been seen yet.
        """
        pairs = self._read()
        return labels(pairs.first), labels(pairs.second)

    @property
    def cka(self) -> Tensor:
        """Linear CKA, (rows, columns), float64 on the CPU.

        NaN where a layer has no variance, or has had a NaN or an infinite value.

        Raises:
            NoPassError: no pass has been seen yet.
        """
        return self._read().cka()

    @property
    def rsa(self) -> Tensor:
        """Correlation of dissimilarities, (rows, columns), float64 on the CPU.

        NaN where no two of them differ, or a layer has had a NaN or an infinite value.

        Raises:
            NoPassError: no pass has been seen yet.
            ArgumentError: it was not asked for.
        """
        if not self._rsa:
            raise ArgumentError("RSA was not asked for: Similarity(rsa=True)")
        return self._read().rsa()

    def __getitem__(self, key: tuple[str, str]) -> float:
        """The CKA of two layers: (row, column).

        Raises:
            NoPassError: no pass has been seen yet.
            UnknownLayerError: none of such a layer.
        """
        if not isinstance(key, tuple) or len(key) != 2:
            raise UnknownLayerError(f"similarity[{key!r}]: the key is two layers' names")
        places = []
        for name, known in zip(key, self.layers, strict=True):
            if name not in known:
                why = f": {self.missed[name]}" if name in self.missed else ""
                raise no_layer(name, known, "seen", why)
            places.append(known.index(name))
        return float(self.cka[places[0], places[1]])

    def _table(self) -> Table:
        try:
            rows, columns = self.layers
        except NoPassError:
            return Table(("CKA",), [], (), "Similarity: no pass seen yet")
        found = self.cka
        body = [
            (name, *(f"{v:.3f}" for v in found[i, :_SHOWN].tolist())) for i, name in enumerate(rows)
        ]
        heads = ("CKA", *columns[:_SHOWN])
        more = f"; {len(columns) - _SHOWN} columns more" if len(columns) > _SHOWN else ""
        missed = f", {len(self.missed)} missed (see .missed)" if self.missed else ""
        wait = f"; {self._unpaired()}" if self._ahead() else ""
        last = f"Similarity: {len(rows)} × {len(columns)} layers{more}{missed}{wait}"
        return Table(heads, body, range(1, len(heads)), last)

    def plot(
        self, ax: Axes | None = None, *, measure: str = "cka", title: str | None = None
    ) -> Figure:
        """Draw the matrix as a heat map (extra: `plot`).

        Args:
            ax: axes to draw into; None makes a figure.
            measure: "cka" or "rsa".
            title: stands above it.

        Raises:
            ImportError: matplotlib is not installed.
            NoPassError: no pass has been seen yet.
            ArgumentError: there is no such measure.
        """
        from fmapkit.analysis.drawn import plot_similarity

        check_choice(("cka", "rsa"), measure=measure)
        values = (self.cka if measure == "cka" else self.rsa).numpy()
        return plot_similarity(values, self.layers, ax, measure=measure, title=title)

    # -- keeping -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is known of passes that have ended, as tensors and built-in types.

        Loads with `weights_only=True`.
        """
        for side in (self._only, self.first, self.second):
            side.close()
        return {"version": 1, "rsa": self._rsa, "two": self._two, **self._pairs.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict()`; what was known before is forgotten.

        Raises:
            ArgumentError: it is of another kind, or of other measures.
        """
        if state.get("version") != 1 or "sums" not in state:
            raise ArgumentError("load_state_dict: this is no state of a Similarity")
        if state["rsa"] != self._rsa:
            raise ArgumentError(
                f"load_state_dict: the state is of rsa={state['rsa']}, not rsa={self._rsa}"
            )
        self.reset()
        self._two = state["two"]
        self._pairs.load(state)
