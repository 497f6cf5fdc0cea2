"""What an operator of which nothing is known does: exchange values, and see which results change.

All values that may vary are drawn anew, and then, nested set by nested set, those of the elements
that see the first location, the first two, and so on: to other values of the same size, to much
larger and to much lower ones, which win wherever something is selected. A result depends on a set
if any of that changes it. That is done operator by operator, so nothing is attenuated on the way
through a deep net, and no unit is dead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmapkit.explain._fields import NONE, Call, compact, tensors_of, varies, written
from fmapkit.torchlib.operators import tree_map

_DRAWS = 2
_SHIFTS = (0.0, 8.0, -8.0)  # in units of the usual size
_SEED = 20140905


def probe(call: Call) -> list[Tensor | None]:
    """The fields of the results of any operator."""
    operands = [t for t in call.operands if call.of(t) is not None]
    integral = [t for t in operands if not (t.is_floating_point() or t.is_complex())]
    if integral or not operands:
        return _everything(call)
    try:
        return _Probing(call, operands).fields()
    except (RuntimeError, ValueError, IndexError):
        # It does not take just any values: a factorisation, say.
        return _everything(call)


def _everything(call: Call) -> list[Tensor | None]:
    """Every result is taken to depend on all of every operand."""
    call.assumed(call.name)
    rows = [f.flatten(1).amin(1) for t in call.operands if (f := call.of(t)) is not None]
    if not rows:
        return [None] * len(call.results)
    lowest = torch.stack(rows).amin(0)
    return [lowest.reshape(-1, *[1] * r.dim()).expand(-1, *r.shape) for r in call.results]


class _Probing:
    """One operator, run with other values."""

    def __init__(self, call: Call, operands: list[Tensor]) -> None:
        self.call = call
        self.fields_of = {id(t): f for t in operands if (f := call.of(t)) is not None}
        self.generator = torch.Generator(device="cpu").manual_seed(_SEED)
        self.base = [self._drawn() for _ in range(_DRAWS)]
        self.usual = [self._run(values) for values in self.base]

    def _drawn(self) -> dict[int, Tensor]:
        """Values of the operands: others where they may vary."""
        return {
            id(t): torch.where(varies(f, t), self._noise(t), t)
            for t in self.call.operands
            if (f := self.fields_of.get(id(t))) is not None
        }

    def _noise(self, tensor: Tensor, shift: float = 0.0) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=self.generator, dtype=torch.float64)
        if shift:
            drawn = drawn.abs() * math.copysign(1.0, shift) + shift
        known = tensor.detach()[torch.isfinite(tensor)]
        scale = known.abs().double().mean().item() if known.numel() else 1.0
        return (drawn * (scale or 1.0)).to(tensor.device, tensor.dtype)

    def _run(self, values: dict[int, Tensor]) -> list[Tensor]:
        call = self.call
        copied: dict[int, Tensor] = {}

        def exchanged(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in copied:
                copied[id(value)] = values.get(id(value), value).clone()
            return copied[id(value)]

        given = tree_map(exchanged, call.given)
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            out = call.run(given)
        return tensors_of(written(call.function, given), out)

    def _changed(self, row: int, limit: int) -> list[Tensor]:
        """Which results change with the elements whose number in a row is at most a limit."""
        found = []
        for values, usual in zip(self.base, self.usual, strict=True):
            for shift in _SHIFTS:
                others = {
                    key: self._shifted(key, held, row, limit, shift) for key, held in values.items()
                }
                found.append([_differ(*two) for two in zip(self._run(others), usual, strict=True)])
        return [torch.stack(each).any(0) for each in zip(*found, strict=True)]

    def _shifted(self, key: int, held: Tensor, row: int, limit: int, shift: float) -> Tensor:
        """The values of one operand, with others where its field reaches so far."""
        field = self.fields_of[key]
        among = compact(field[row : row + 1])[0] <= limit
        return torch.where(among, self._noise(held, shift), held) if bool(among.any()) else held

    def fields(self) -> list[Tensor | None]:
        count = len(next(iter(self.fields_of.values())))
        results = [
            torch.full((count, *r.shape), NONE, dtype=torch.int32, device=r.device)
            for r in self.usual[0]
        ]
        for row in range(count):
            fields = list(self.fields_of.values())
            limits = torch.unique(torch.cat([compact(f[row : row + 1]).flatten() for f in fields]))
            limits = limits[limits < NONE].tolist()
            if not limits:
                continue
            ever = self._changed(row, limits[-1])
            for limit in limits:
                changed = self._changed(row, limit)
                for result, now, whole in zip(results, changed, ever, strict=True):
                    one = result[row]
                    one.masked_fill_(now & whole & (one == NONE), limit)
                if all(bool((r[row] < NONE)[w].all()) for r, w in zip(results, ever, strict=True)):
                    break
        return list(results)


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Where two results differ by more than the order of sums can make them."""
    if not (one.is_floating_point() or one.is_complex()):
        return one != other
    both = torch.isnan(one) & torch.isnan(other)
    size = other.abs().double().nan_to_num(0, 0, 0).amax() if other.numel() else 0.0
    rounding = 64 * torch.finfo(one.dtype).eps * size
    return ((one - other).abs().double() > rounding) & ~both | (
        torch.isnan(one) != torch.isnan(other)
    )
