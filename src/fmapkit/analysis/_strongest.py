"""The k strongest of many scores, filter by filter, each with its input and its place.

Pure functions of tensors. On a CPU only what may enter is looked at; on other devices nothing
depends on a value, so nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fmapkit.analysis._bins import placed
from fmapkit.analysis._moments import accumulator
from fmapkit.errors import ArgumentError

NONE = -1  # in the place of an input that has not come

# (samples, filters, *locations) -> (samples, filters)
Scores = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Strongest:
    """What is known of C filters.

    Attributes:
        scores: (C, k), falling; -inf of none. float64 where the device has it.
        inputs: (C, k) int64; -1 of none.
        at: (C, k, axes) int64: the location of the strongest value, -1 of none.
    """

    scores: Tensor
    inputs: Tensor
    at: Tensor

    @staticmethod
    def none(filters: int, k: int, axes: int, device: torch.device) -> Strongest:
        """Of no input."""
        scores = torch.full((filters, k), -torch.inf, dtype=accumulator(device), device=device)
        inputs = torch.full((filters, k), NONE, dtype=torch.int64, device=device)
        at = torch.full((filters, k, axes), NONE, dtype=torch.int64, device=device)
        return Strongest(scores, inputs, at)

    @property
    def k(self) -> int:
        """How many are kept of each filter."""
        return self.scores.shape[1]

    @property
    def device(self) -> torch.device:
        return self.scores.device

    @property
    def axes(self) -> int:
        """How many axes of locations the maps have."""
        return self.at.shape[2]

    def tensors(self) -> dict[str, Tensor]:
        return {"scores": self.scores, "inputs": self.inputs, "at": self.at}

    def on(self, device: torch.device) -> Strongest:
        if self.device == device:
            return self
        return Strongest(*(placed(t, device) for t in self.tensors().values()))

    def merge(self, other: Strongest) -> Strongest:
        """Of both, neither of which is changed; an input that both have counts once."""
        scores = torch.cat([self.scores, other.scores], 1)
        inputs = torch.cat([self.inputs, other.inputs], 1)
        scores, inputs, order = _first(scores, inputs, self.k)
        at = torch.cat([self.at, other.at], 1)
        at = at.gather(1, order.unsqueeze(2).expand(-1, -1, self.axes))
        return Strongest(scores, inputs, at.masked_fill((inputs == NONE).unsqueeze(2), NONE))

    def after(self, values: Tensor, scores: Tensor, ids: Tensor) -> Strongest:
        """With one more map.

        Args:
            values: (samples, filters, *locations).
            scores: (samples, filters), of the same type as the scores here; NaN never enters.
            ids: (samples,) int64, which inputs these are.
        """
        scores = torch.nan_to_num(scores.T, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if values.device.type != "cpu":
            return self.merge(_of_map(values, scores, ids, self.k))
        last = self.scores[:, -1:]
        enters = (scores > last) | ((scores == last) & (ids < self.inputs[:, -1:]))
        enters &= scores > -torch.inf
        chosen = enters.any(1).nonzero().squeeze(1)
        if not len(chosen):
            return self
        some = Strongest(*(t[chosen] for t in self.tensors().values()))
        some = some.merge(_of_map(values[:, chosen], scores[chosen], ids, self.k))
        pairs = zip(self.tensors().values(), some.tensors().values(), strict=True)
        return Strongest(*(old.index_copy(0, chosen, new) for old, new in pairs))


def _of_map(values: Tensor, scores: Tensor, ids: Tensor, k: int) -> Strongest:
    """The k strongest of one map, or all; scores are (filters, samples)."""
    scores, inputs, samples = _first(scores, ids.expand(len(scores), -1), k)
    filters = torch.arange(len(scores), device=values.device).unsqueeze(1).expand_as(samples)
    rows = values.unsqueeze(-1)[samples, filters].flatten(2)  # one location where there is none
    rows = rows.byte() if rows.dtype == torch.bool else rows.nan_to_num(nan=-torch.inf)
    flat = rows.argmax(2)
    found: list[Tensor] = []
    for size in reversed(values.shape[2:]):  # torch.unravel_index would send the sizes along
        found.append(flat % size)
        flat = flat // size
    at = torch.stack(found[::-1], -1) if found else inputs.new_empty(*inputs.shape, 0)
    return Strongest(scores, inputs, at)


def _first(scores: Tensor, inputs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k strongest of each row, and where they were: an input once, of equals the lower one."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, inputs.gather(1, order).argsort(dim=1, stable=True))
    scores, inputs = scores.gather(1, order), inputs.gather(1, order)
    again = torch.zeros_like(inputs, dtype=torch.bool)
    again[:, 1:] = inputs[:, 1:] == inputs[:, :-1]
    scores = scores.masked_fill(again, -torch.inf)
    first = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    scores, inputs, order = (t.gather(1, first) for t in (scores, inputs, order))
    return scores, inputs.masked_fill(scores == -torch.inf, NONE), order


def by_sample(tensor: Tensor, dim: int) -> Tensor:
    """(samples, filters, *locations), a view; one sample where the filters lie along axis 0."""
    dim %= tensor.dim()
    return tensor.unsqueeze(0).movedim(dim + 1, 1) if dim == 0 else tensor.movedim(dim, 1)


def padded(rows: Tensor, mask: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A map without its padding, as (samples, positions, ...), and the numbers of its samples.

    Padding is -inf, which is never the strongest; a sample of nothing else never enters.

    Args:
        rows: (positions that are kept, ...).
        mask: (samples, positions), true where they were.
        ids: of each row.
    """
    at = mask.reshape(-1).nonzero().squeeze(1)
    if ids is not None:
        of_sample = placed(at // mask.shape[1], ids.device)
        ids = ids.new_zeros(len(mask)).index_copy(0, of_sample, ids)
    rows = rows if rows.is_floating_point() else rows.to(accumulator(rows.device))
    whole = rows.new_full((mask.numel(), *rows.shape[1:]), -torch.inf)
    whole.index_copy_(0, placed(at, rows.device), rows)
    return whole.reshape(*mask.shape, *rows.shape[1:]), ids


def scores_of(values: Tensor, by: str | Scores, mask: Tensor | None = None) -> Tensor:
    """(samples, filters): how strongly each filter responds to each sample.

    Args:
        values: (samples, filters, *locations).
        by: what makes a sample strong.
        mask: (samples, locations along the first of their axes), true where there is no padding.
    """
    if mask is not None and callable(by):  # each sample has locations of its own
        found = values.new_full(values.shape[:2], -torch.inf, dtype=accumulator(values.device))
        for n, keep in enumerate(mask):
            if len(at := keep.nonzero().squeeze(1)):
                one = values[n : n + 1].index_select(2, placed(at, values.device))
                found[n] = scores_of(one, by)[0]
        return found
    if callable(by):
        given = by(values)
        if not isinstance(given, Tensor) or given.shape != values.shape[:2]:
            said = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ArgumentError(
                f"by= takes a function of values (samples, filters, *locations) = "
                f"{tuple(values.shape)} to scores (samples, filters) = {tuple(values.shape[:2])}; "
                f"it gave {said}"
            )
        scores = given
    elif values.dim() == 2:
        scores = values
    else:
        over = tuple(range(2, values.dim()))
        if by == "mean" and mask is not None:
            keep = placed(mask, values.device).reshape(len(mask), 1, -1, *[1] * (len(over) - 1))
            count = keep.sum(over) * values.shape[3:].numel()
            total = values.masked_fill(~keep, 0).sum(over, dtype=accumulator(values.device))
            scores = total / count
        elif by == "mean":
            scores = values.mean(over, dtype=accumulator(values.device))
        else:
            scores = values.amax(over)
    return scores.to(accumulator(values.device))
