"""`compare`, and the `Comparison` that it gives."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmapkit.comparing.difference import Difference, difference
from fmapkit.comparing.matching import Match, matched
from fmapkit.errors import (
    AmbiguousMapError,
    ArgumentError,
    NoPassError,
    UnknownLayerError,
    did_you_mean,
    listed,
    near,
)
from fmapkit.kinds import KINDS
from fmapkit.plot import axes_of
from fmapkit.tables import Shown, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fmapkit.kinds import Kind
    from fmapkit.map import FeatureMap
    from fmapkit.maps import FeatureMaps

HEADS = ("layer", "kind", "shape", "dtype", "absolute", "relative", "cosine", "filter", "")
_LEFT = 4
_MARKS = dict(zip(KINDS, ("v", "s", "o", "^", "D", "P"), strict=True))
_NAMES = 40  # of layers that are written below the axis


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Comparison(Shown):
    """Two captures, map by map, in the execution order of the first.

    Iteration gives each `Difference`. `c[layer]` is that of its activation, or of its only map;
    `c[layer, kind]` that of a kind.

    Attributes:
        differences: of the maps that both have.
        only_a: maps of the first that the second has not, as (layer, kind).
        only_b: maps of the second that the first has not.
        gradients: gradients were compared.
    """

    differences: tuple[Difference, ...]
    only_a: tuple[tuple[str, Kind], ...]
    only_b: tuple[tuple[str, Kind], ...]
    gradients: bool = False

    @property
    def first(self) -> Difference | None:
        """The first map, in execution order, whose relative error is beyond the tolerance."""
        return next((d for d in self.differences if d.departs), None)

    @property
    def first_unequal(self) -> Difference | None:
        """The first map of which a value is another one at all."""
        return next((d for d in self.differences if not d.equal), None)

    @property
    def equal(self) -> bool:
        """Whether both have the same maps, and all values are the same."""
        return not (self.only_a or self.only_b) and self.first_unequal is None

    def __len__(self) -> int:
        """How many maps were compared."""
        return len(self.differences)

    def __bool__(self) -> bool:
        """A comparison is there, also of no map."""
        return True

    def __iter__(self) -> Iterator[Difference]:
        return iter(self.differences)

    def __getitem__(self, key: str | tuple[str, Kind]) -> Difference:
        """One difference: of a layer's activation (or its only map), or (layer, kind).

        Raises:
            UnknownLayerError: no such map was compared.
            AmbiguousMapError: several were.
        """
        layer, kind = key if isinstance(key, tuple) else (key, None)
        found = [d for d in self if d.layer == layer and kind in (None, d.kind)]
        if kind is None and len(found) > 1:
            found = [d for d in found if d.kind == "activation"] or found
        if len(found) == 1:
            return found[0]
        known = list(dict.fromkeys(d.layer for d in self))
        if found:
            choices = [(d.kind, d.call, d.path) for d in found]
            raise AmbiguousMapError(
                f"comparison[{key!r}] could mean {len(found)}, as (kind, call, path): "
                f"{', '.join(map(str, choices[:8]))}; go through the comparison to choose",
                layer=layer,
                kind=kind,
                candidates=choices,
            )
        raise UnknownLayerError(
            f"no {kind or 'map'} of layer {layer!r} was compared{did_you_mean(layer, known)} "
            f"(compared: {listed(known)})",
            layer=layer,
            kind=kind,
            candidates=near(layer, known) or known,
        )

    # -- to look at ----------------------------------------------------------------------------

    def _summary(self) -> str:
        what = "gradients" if self.gradients else "maps"
        said = [f"Comparison: {len(self)} {what}"]
        first, unequal = self.first, self.first_unequal
        if unequal is None:
            said.append("every value is the same")
        elif first is None:
            said.append(f"all within the tolerance; the first that differs is {_named(unequal)}")
        else:
            said.append(
                f"the first beyond the tolerance is {_named(first)}: relative error "
                f"{first.relative:.2g}, tolerance {first.tolerance:.2g}"
            )
        for which, alone in (("first", self.only_a), ("second", self.only_b)):
            if alone:
                shown = ", ".join(f"{layer} {kind}" for layer, kind in alone[:4])
                more = f", … ({len(alone)} in all)" if len(alone) > 4 else ""
                said.append(f"only in the {which}: {shown}{more}")
        return "; ".join(said)

    def _table(self) -> Table:
        """The last column is there where something is beyond the tolerance."""
        first = self.first
        rows = [_row(d, "first" if d is first else "beyond" if d.departs else "") for d in self]
        heads: tuple[str, ...] = HEADS
        if first is None:
            heads, rows = HEADS[:-1], [row[:-1] for row in rows]
        return Table(heads, rows, range(_LEFT, len(HEADS)), self._summary())

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as a page of its own, one file.

        Args:
            path: of the file; what is there is written over.

        Returns:
            The path.
        """
        page = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison</title>'
            f"<style>{_STYLE}</style><body>{self._repr_html_()}</body></html>\n"
        )
        path = Path(path)
        path.write_text(page, encoding="utf-8")
        return path

    def plot(self, ax: Axes | None = None, *, title: str | None = None) -> Figure:
        """Draw the relative error of each map, in execution order (extra: `plot`).

        Args:
            ax: axes to draw into; None makes a figure.
            title: stands above.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is not installed.
            ArgumentError: no map was compared.
        """
        rows, first = self.differences, self.first
        if not rows:
            raise ArgumentError("nothing to plot: no map was compared")
        figure, ax = axes_of(ax, 10, 4.2)
        shown = [d.relative for d in rows if 0 < d.relative < math.inf]
        tolerances = [d.tolerance for d in rows if d.tolerance > 0]
        # A map that is equal lies on the floor, one that is not finite on the ceiling.
        floor = min([*shown, *tolerances, 1e-7]) / 10
        ceiling = max([*shown, *tolerances, 1e-6]) * 10
        heights = [min(max(d.relative, floor), ceiling) for d in rows]
        ax.set_yscale("log")
        _points(ax, rows, heights)
        ax.plot(heights, color="0.75", linewidth=0.8, zorder=1)
        ax.step(
            range(len(rows)),
            [max(d.tolerance, floor) for d in rows],
            where="mid",
            color="tab:red",
            linewidth=1,
            linestyle="--",
            label="tolerance",
        )
        if first is not None:
            place = rows.index(first)
            ax.axvline(place, color="tab:red", linewidth=0.8, alpha=0.5)
            ax.annotate(
                f"first beyond: {_name(first)}, {first.kind}",
                (place, heights[place]),
                xytext=(6, 8),
                textcoords="offset points",
                fontsize="small",
            )
        _label(ax, [_name(d) for d in rows])
        ax.set_ylim(floor / 2, ceiling * 2)
        ax.set_ylabel("‖a − b‖ / ‖a‖" + (" of gradients" if self.gradients else ""))
        if any(d.equal for d in rows):
            ax.plot([], [], "o", color="0.4", markerfacecolor="white", markersize=5, label="equal")
        ax.legend(fontsize="small", loc="best")
        ax.spines[["top", "right"]].set_visible(False)
        if title:
            ax.set_title(title)
        return figure


def compare(
    a: FeatureMaps,
    b: FeatureMaps,
    *,
    match: Match = "name",
    layers: Any = None,
    kind: Kind | None = None,
    step: int = -1,
    tolerance: float | None = None,
    gradients: bool = False,
) -> Comparison:
    """Compare two captures, layer by layer: where do two runs part?

    ```python
    with capture(model) as a:
        model(x)
    with capture(copy.deepcopy(model).bfloat16()) as b:
        b_model(x.bfloat16())
    print(compare(a, b))
    ```

    Both have to have been given the same input. They may be of other types and on other devices.

    Args:
        a: the one that is taken for right; errors are relative to its maps.
        b: the other.
        match: how maps are brought together. "name": by layer, kind, call and path. "order": the
            n-th with the n-th, whatever they are called; kinds and shapes have to agree. A dict of
            a's names -> b's, of layers or of modules whose layers are meant with them; other names
            stay as they are. Or a function of a's names.
        layers: compare these alone: anything that `maps.select(layers=...)` takes; of `b`, only
            maps that belong to them are looked for, and with "order" it selects in both.
        kind: compare maps of this kind alone.
        step: which pass of each; -1 is the latest.
        tolerance: of the relative error ‖a - b‖ / ‖a‖. None takes 16 roundings of the coarser of
            the two types: 9.5e-07 for float32, 0.0078 for float16, 0.0625 for bfloat16 and for
            quantized maps of 8 bits.
        gradients: compare the gradients of the maps (`capture(gradients=True)`).

    Returns:
        The comparison: a table to print, `first`, the picture.

    Raises:
        NoPassError: one of them has no maps of that pass.
        ArgumentError: they do not fit together, and what would.
        MapStateError: a map cannot be read any more.
    """
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and tolerance >= 0):
        raise ArgumentError(f"tolerance must be a number of at least 0, or None, not {tolerance!r}")
    ours = _of_step(a, "first", step, kind, layers)
    theirs = _of_step(b, "second", step, kind, layers if match == "order" else None)
    pairs, only_a, only_b = matched(ours, theirs, match)
    return Comparison(
        tuple(difference(x, y, tolerance, gradients) for x, y in pairs),
        tuple((fm.layer, fm.kind) for fm in only_a),
        tuple((fm.layer, fm.kind) for fm in only_b) if layers is None else (),
        gradients,
    )


def _of_step(
    maps: FeatureMaps, which: str, step: int, kind: Kind | None, layers: Any
) -> list[FeatureMap]:
    found = maps.select(layers, kind, step=step)
    if not found:
        what = "" if step == -1 else f" of step {step}"
        kinds = "" if kind is None else f" of kind {kind!r}"
        raise NoPassError(
            f"the {which} of the two has no maps{kinds}{what} to compare", kind=kind, step=step
        )
    return found


def _named(d: Difference) -> str:
    call = f", call {d.call}" if d.call else ""
    return f"the {d.kind} of {_name(d)!r}{call}"


def _name(d: Difference) -> str:
    return (d.layer + d.path) or "(model)"


def _row(d: Difference, mark: str) -> tuple[str, ...]:
    renamed = f" → {d.other or '(model)'}" if d.other != d.layer else ""
    types = [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(d.dtypes)]
    return (
        _name(d) + renamed + (f" #{d.call}" if d.call else ""),
        d.kind,
        "×".join(map(str, d.shape)) or "scalar",
        "/".join(types),
        _number(d.absolute),
        _number(d.relative),
        "–" if math.isnan(d.cosine) else f"{d.cosine:.6f}",
        "" if d.filter is None else str(d.filter),
        mark,
    )


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em}table{border-collapse:collapse}"
    "th,td{padding:.2em .8em;border-bottom:1px solid #ddd}caption{text-align:left;padding:.5em}"
)


# -- the picture -----------------------------------------------------------------------------------


def _points(ax: Axes, rows: Sequence[Difference], heights: Sequence[float]) -> None:
    """A mark for each map, by kind; hollow where every value is the same: this scale has no 0."""
    for kind in dict.fromkeys(d.kind for d in rows):
        mine = [i for i, d in enumerate(rows) if d.kind == kind]
        equal = [i for i in mine if rows[i].equal]
        marks: dict[str, Any] = {"markersize": 5, "label": kind, "zorder": 3}
        hollow: dict[str, Any] = {"markersize": 3.5, "color": "white", "zorder": 4}
        for at, style in ((mine, marks), (equal, hollow)):
            ax.plot(at, [heights[i] for i in at], _MARKS[kind], **style)


def _label(ax: Axes, names: list[str]) -> None:
    """Write each layer's name once, below its first map; every n-th one where there are many."""
    at = [i for i, name in enumerate(names) if not i or names[i - 1] != name]
    at = at[:: max(1, -(-len(at) // _NAMES))]
    ax.set_xticks(at, [names[i] for i in at], rotation=60, ha="right", fontsize="x-small")
    ax.set_xlim(-0.8, len(names) - 0.2)
