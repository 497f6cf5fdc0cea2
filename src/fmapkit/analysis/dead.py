"""`DeadFilters`: which filters have not fired over many inputs, and since when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fmapkit.analysis._bins import placed
from fmapkit.analysis._blocks import along, at_hand
from fmapkit.analysis._by_layer import Tabular
from fmapkit.analysis._keys import Filters, Name
from fmapkit.analysis._moments import by_filter
from fmapkit.analysis._saturation import Bounds, bounds_of, checked
from fmapkit.analysis.summary import LayerFirings
from fmapkit.errors import ArgumentError, MapLookupError, NoPassError, check_positive, listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fmapkit.maps import FeatureMap
    from fmapkit.page import Section

SPANS = 128  # of the history; when they are full, every two become one
# Of those with bounds, what is zero at one of them as a ReLU is.
_BY_ZEROS = {"relu6"}
# Values to look at first, and at a time.
_FIRST, _BLOCK = 2**15, 2**20


@dataclass(slots=True)
class _FilterFirings:
    """Of one set of filters: when each last fired."""

    rule: str
    last_input: Tensor
    last_step: Tensor
    revivals: Tensor
    history: Tensor
    inputs: int = 0
    span: int = 1

    @staticmethod
    def none(filters: int, device: torch.device, rule: str) -> _FilterFirings:
        """Of no input."""
        zeros = torch.zeros(filters, dtype=torch.int64, device=device)
        history = torch.zeros(SPANS, filters, dtype=torch.bool, device=device)
        return _FilterFirings(rule, zeros, zeros - 1, zeros, history)

    def tensors(self) -> dict[str, Tensor]:
        names = ("last_input", "last_step", "revivals", "history")
        return {name: getattr(self, name) for name in names}

    def state(self) -> dict[str, Any]:
        """All of it; the history is a copy, as `see` writes to it."""
        tensors = {**self.tensors(), "history": self.history.clone()}
        return {"rule": self.rule, "inputs": self.inputs, "span": self.span, "tensors": tensors}

    def see(self, fired: Tensor, inputs: int, step: int, after: int) -> None:
        """Take in which filters fired over so many inputs; waits for nothing."""
        if self.history.device != fired.device:
            for name, tensor in self.tensors().items():
                setattr(self, name, placed(tensor, fired.device))
        before, self.inputs = self.inputs, self.inputs + inputs
        self.revivals = self.revivals + (fired & (before - self.last_input >= after))
        self.last_input = torch.where(fired, self.inputs, self.last_input)
        self.last_step = torch.where(fired, step, self.last_step)
        while (self.inputs - 1) // self.span >= SPANS:
            self.history, self.span = _halved(self.history), 2 * self.span
        self.history[before // self.span : (self.inputs - 1) // self.span + 1] |= fired


class DeadFilters(Tabular[_FilterFirings, LayerFirings]):
    """Which filters never fired over the last inputs, since when, by layer; an `Analysis`.

    ```python
    dead = DeadFilters(after=10_000)
    with capture(model, analyses=[dead]):
        train(model)
    print(dead)                            # a table
    dead["layer1.0.conv1"].dead_filters    # [3, 17]
    ```

    An activation map "all zero for many different inputs [...] can indicate dead filters" (Stanford
    CS231n, "Visualizing what ConvNets learn"). A filter *fires* on a map where any of its values
    is not zero (further from 0 than `threshold`). It is *dead* when it has not over `after` inputs.
    Only activations count; maps of other kinds are passed over.

    σ that cannot give zeros have another way to die: a sigmoid or tanh that is always at its
    bounds passes no gradient either. So where σ has bounds, by the rule of `Statistics`, a filter
    fires where any of its values is not saturated. That is for sigmoid, tanh, softsign,
    hardsigmoid, and what `saturation` names. relu6 goes by zeros. A σ with neither (GELU, ELU,
    leaky ReLU) goes by zeros too, which it gives only if its filter is switched off; with a
    `threshold`, of a few values close to zero. A NaN is not silence: it counts as firing.

    An input is one entry of the map's first axis, or one map where that is the filter axis
    (unbatched). Of a layer that is called several times, every call's inputs count. Each rank
    counts its own. `last_step` is the step that the map had: in another block it begins at 0.

    Memory is fixed: a few numbers and 128 bits of history for each filter. `update` never waits
    for the device; reading does.

    Args:
        after: for so many inputs a filter has to be silent to be dead.
        threshold: values up to it, on both sides of 0, count as zeros.
        saturation: bounds by σ, as in `Statistics`.

    Raises:
        ArgumentError: an argument is outside what is allowed.
    """

    _kinds = ("activation",)
    _heads = (
        *("layer", "σ", "by", "inputs", "filters", "dead", "share", "never fired"),
        *("since input", "since step", "revivals"),
    )
    _nothing = "no activation seen yet"

    def __init__(
        self,
        after: int = 1000,
        *,
        threshold: float = 0.0,
        saturation: Mapping[str, Bounds] | None = None,
    ) -> None:
        check_positive(after=after)
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not number or not threshold >= 0:
            raise ArgumentError(f"threshold must be a number of at least 0, not {threshold!r}")
        self.after = after
        self.threshold = float(threshold)
        self._bounds = {k: b for k, b in checked(saturation).items() if k not in _BY_ZEROS}
        super().__init__("dead")

    # -- taking in -----------------------------------------------------------------------------

    def _take_in(self, fm: FeatureMap, tensor: Tensor, name: Name, filters: Filters) -> str:
        dim = fm.filter_dim if filters is not None else None
        values = by_filter(tensor, dim)
        bounds = bounds_of(fm, self._bounds)
        groups = self._groups.names.setdefault(name, {})
        if filters not in groups:
            rule = "zeros" if bounds is None else "saturation"
            groups[filters] = _FilterFirings.none(values.shape[1], values.device, rule)
        if values.numel():
            fired = _fired(values, self.threshold, bounds)
            groups[filters].see(fired, _inputs(tensor, dim), fm.step, self.after)
        return ""

    # -- reading -------------------------------------------------------------------------------

    def _read(self, name: Name) -> LayerFirings:
        filters, parts = self._groups.parts(name)
        # Parts of one layer see the same inputs, unless a branch leaves one out.
        span = max(watch.span for watch in parts)
        return LayerFirings(
            layer=name.layer,
            nonlinearity=name.nonlinearity,
            path=name.path,
            filters=filters,
            rule=parts[0].rule,
            after=self.after,
            inputs=torch.cat([torch.full_like(w.last_input, w.inputs) for w in parts]),
            last_input=torch.cat([w.last_input for w in parts]),
            last_step=torch.cat([w.last_step for w in parts]),
            revivals=torch.cat([w.revivals for w in parts]),
            history=torch.cat([_folded(w, span) for w in parts], 1),
            span=span,
        )

    def report(self) -> str:
        """A table: a line for each layer.

        "since" is when the filter last fired that has been dead for longest; "never fired" counts
        those of the dead that have not fired since the beginning.
        """
        return self._table().text()

    def _row(self, s: LayerFirings) -> tuple[str, ...]:
        dead = s.dead
        count = int(dead.sum())
        since = step = "–"
        if count:
            first = torch.where(dead, s.last_input, torch.iinfo(torch.int64).max).argmin()
            since = str(int(s.last_input[first])) if s.last_input[first] > 0 else "the start"
            step = str(int(s.last_step[first])) if s.last_input[first] > 0 else "–"
        return (
            *(s.layer + s.path, s.nonlinearity or "", s.rule, str(int(s.inputs.max()))),
            *(str(len(s)) if s.filters is not None else "–", str(count), f"{count / len(s):.1%}"),
            *(str(int((dead & s.never).sum())), since, step, str(int(s.revivals.sum()))),
        )

    def _summary(self, rows: list[tuple[str, ...]]) -> str:
        dead, filters = (sum(int(r[i]) for r in rows if r[i] != "–") for i in (5, 4))
        return f"{dead} of {filters} filters silent over {self.after} inputs"

    def _page_sections(self) -> list[Section]:
        """What a page draws below the table: when each filter fired."""
        from fmapkit.analysis.drawn import firings_section

        return [firings_section(s) for s in self]

    def plot(
        self,
        layers: Any = None,
        *,
        max_filters: int = 64,
        max_layers: int = 16,
        title: str | None = None,
    ) -> Figure:
        """Draw a strip for each layer: a row for each filter, inputs from left to right.

        Those that have been silent for longest stand on top, so that of a layer with many filters
        the dead ones are seen.

        Args:
            layers: which layers: names, globs or regexes; None for all.
            max_filters: how many rows a strip has at most; its title says how many filters there
                are.
            max_layers: how many layers are drawn at most; the figure says if there are more.
            title: stands above the figure.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is not installed (extra: `plot`).
            NoPassError: no activation has been seen yet.
            MapLookupError: `layers` selects none of those seen.
            ArgumentError: a number is not positive.
        """
        from fmapkit.analysis.drawn import plot_firings

        check_positive(max_filters=max_filters, max_layers=max_layers)
        if not len(self):
            raise NoPassError("nothing to plot: no activation has been seen yet")
        found = self.select(layers)
        if not found:
            raise MapLookupError(
                f"nothing to plot: {layers!r} is none of {listed(self.layers)}",
                candidates=self.layers,
            )
        shown = found[:max_layers]
        return plot_firings(shown, max_filters, title, more=len(found) - len(shown))

    # -- keeping -------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        bounds = {k: list(v) for k, v in self._bounds.items()}
        return {"after": self.after, "threshold": self.threshold, "saturation": bounds}

    def _sums(self, entry: Mapping[str, Any]) -> _FilterFirings:
        tensors = {name: tensor.clone() for name, tensor in entry["tensors"].items()}
        return _FilterFirings(entry["rule"], **tensors, inputs=entry["inputs"], span=entry["span"])


def _fired(values: Tensor, threshold: float, bounds: Bounds | None) -> Tensor:
    """(C,) bool: whether any value is no zero, or is not saturated. A NaN is neither.

    Most filters fire on one of the first inputs. On a CPU, where to know it waits for nothing, the
    others are looked at further, and only these: a map is seldom read to its end.
    """
    if not at_hand(values.device):
        return ~_quiet(values, threshold, bounds)
    outer, filters, _ = values.shape
    axis = 0 if outer > 1 else 2
    each = values.numel() // values.shape[axis]
    at, step, most = 0, max(1, _FIRST // each), max(1, _BLOCK // each)
    quiet = np.ones(filters, np.bool_)
    while at < values.shape[axis] and (left := np.count_nonzero(quiet)):
        some = values.narrow(axis, at, min(step, values.shape[axis] - at))
        if left > filters // 2:  # to pick them out would copy more than it saves
            quiet &= _quiet(some, threshold, bounds).numpy()
        else:
            index = np.flatnonzero(quiet)
            quiet[index] = _quiet(some[:, torch.from_numpy(index)], threshold, bounds).numpy()
        at, step = at + step, min(4 * step, most)
    return torch.from_numpy(~quiet)


def _quiet(values: Tensor, threshold: float, bounds: Bounds | None) -> Tensor:
    """(C,) bool: whether all values are zeros, or are saturated."""
    if bounds is not None:
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()  # in which the bounds are nearer to what was written
        return along(torch.all, (values <= bounds[0]) | (values >= bounds[1]))
    if values.device.type == "cuda" and values.is_floating_point():
        size: Tensor = torch.linalg.vector_norm(values, torch.inf, (0, 2))  # one read, not two
        return size <= threshold
    return (along(torch.amin, values) >= -threshold) & (along(torch.amax, values) <= threshold)


def _inputs(tensor: Tensor, dim: int | None) -> int:
    """How many inputs a map is of."""
    unbatched = not tensor.dim() or (dim is not None and dim % tensor.dim() == 0)
    return 1 if unbatched else tensor.shape[0]


def _folded(watch: _FilterFirings, span: int) -> Tensor:
    """The history in longer spans."""
    history, own = watch.history, watch.span
    while own < span:
        history, own = _halved(history), 2 * own
    return history


def _halved(history: Tensor) -> Tensor:
    """A history in spans twice as long, with room for as many again."""
    pairs = history.view(SPANS // 2, 2, -1).any(1)
    return torch.cat([pairs, torch.zeros_like(pairs)])
