"""`LayerFirings`: what `DeadFilters` knows of one layer, to read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fmapkit.tables import Shown, Table

_ROWS = 16  # filters that a table shows


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LayerFirings(Shown):
    """When the filters of one layer last fired: tensors of shape (filters,) on the maps' device.

    Attributes:
        layer: its qualified name.
        nonlinearity: σ; None where its name is not known.
        path: place in a nested output; else "".
        filters: the filters that the values belong to, in order; None without a filter axis.
        rule: "zeros" or "saturation": what a filter that does not fire gives.
        after: for so many inputs a filter has to be silent to be dead.
        inputs: how many went through the layer, int64.
        last_input: how many had gone through it when the filter last fired, int64; 0: it never has.
        last_step: the map's step at that time, int64; -1: it never fired.
        revivals: how often it fired again after it had been dead, int64.
        history: (spans, filters) bool: whether it fired in each span of inputs.
        span: inputs of one span of `history`; those that have not come yet are False.
    """

    layer: str
    nonlinearity: str | None
    path: str
    filters: tuple[int, ...] | None
    rule: str
    after: int
    inputs: Tensor
    last_input: Tensor
    last_step: Tensor
    revivals: Tensor
    history: Tensor
    span: int = 1

    @property
    def dead(self) -> Tensor:
        """(filters,) bool: silent over the last `after` inputs, or more."""
        return self.inputs - self.last_input >= self.after

    @property
    def never(self) -> Tensor:
        """(filters,) bool: it has not fired since the beginning, be that long ago or not."""
        return self.last_input == 0

    @property
    def dead_filters(self) -> list[int]:
        """Which filters are dead, by the layer's own numbering; waits for the device."""
        numbers = self.filters if self.filters is not None else (0,)
        return [n for n, dead in zip(numbers, self.dead.tolist(), strict=True) if dead]

    def __len__(self) -> int:
        """Number of filters; 1 without a filter axis."""
        return self.inputs.numel()

    def _table(self) -> Table:
        found = [i for i, dead in enumerate(self.dead.tolist()) if dead]
        inputs, steps, revivals = (
            t.tolist() for t in (self.last_input, self.last_step, self.revivals)
        )
        names = self.filters if self.filters is not None else ("all",)
        rows = [
            (
                str(names[i]),
                str(inputs[i]) if inputs[i] else "the start",
                str(steps[i]) if inputs[i] else "–",
                str(revivals[i]),
            )
            for i in found[:_ROWS]
        ]
        heads = ("filter", "since input", "since step", "revivals")
        more = f", {len(found) - _ROWS} more" if len(found) > _ROWS else ""
        last = (
            f"LayerFirings: {self.layer + self.path!r}, {len(found)} of {len(self)} filters dead "
            f"after {int(self.inputs.max())} inputs (by {self.rule}){more}"
        )
        return Table(heads, rows, range(len(heads)), last)


def row(s: LayerFirings) -> tuple[str, ...]:
    """A line of the report: of all filters together; waits for the device."""
    dead = s.dead
    count = int(dead.sum())
    since = step = "–"
    if count:
        first = torch.where(dead, s.last_input, torch.iinfo(torch.int64).max).argmin()
        since = str(int(s.last_input[first])) if s.last_input[first] > 0 else "the start"
        step = str(int(s.last_step[first])) if s.last_input[first] > 0 else "–"
    return (
        s.layer + s.path,
        s.nonlinearity or "",
        s.rule,
        str(int(s.inputs.max())),
        str(len(s)) if s.filters is not None else "–",
        str(count),
        f"{count / len(s):.1%}",
        str(int((dead & s.never).sum())),
        since,
        step,
        str(int(s.revivals.sum())),
    )


HEADS = (
    *("layer", "σ", "by", "inputs", "filters", "dead", "share", "never fired"),
    *("since input", "since step", "revivals"),
)
