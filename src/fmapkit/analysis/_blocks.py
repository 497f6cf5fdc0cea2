"""Sums, extremes and counts of many values, filter by filter, a block at a time.

A block is read from memory once. While it is in the cache, it is read again for each sum, which is
as often as torch's reductions need, and no more: what can be told from another result is not
counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["along", "block_size", "blockwise"]

_vecdot: Any = getattr(np, "vecdot", None)  # since NumPy 2.0

# Values that are worked on at a time. On a CPU a block and its float64 copy have to stay in the
# cache, and be worth the microsecond that a call of torch takes; elsewhere it bounds the memory
# that the copy takes.
_BLOCK = {"cpu": 2**18}
_BLOCK_ELSEWHERE = 2**24  # a sum of so many ones is still exact in float32
_LONG = 128  # rows of so many values are summed up along themselves, shorter ones across them
_TALL = 64  # rows to be summed up across, at least
_DOT = 1024  # rows of so many values are worth a dot product each
_LANE = 255  # ones that a byte can count


def blockwise(
    values: Tensor, pilot: Tensor | None, kind: torch.dtype, bounds: tuple[float, float] | None
) -> tuple[Tensor, ...]:
    """Σ(x - p), Σ(x - p)², minimum, maximum, zeros, values that are not finite, and saturated ones.

    Args:
        values: (outer, filters, inner), real, integer or bool.
        pilot: (filters,) the p of each; None for 0. Then values that are not finite are taken to be
            none: that they are there shows in the sums.
        kind: the type to sum up in.
        bounds: at or below the first and at or above the second a value is saturated; None: the
            last count is left out.
    """
    outer, filters, inner = values.shape
    size = block_size(values.device)
    # What is summed up across has to be tall, or the sums are as many as the values.
    rows = 1 if inner >= _LONG else min(outer, _TALL)
    step = min(filters, max(size // (inner * rows), -(-_LONG // inner)))
    step -= step % 8 if step > 8 else 0  # flags are counted by words of eight
    largest = min(values.numel(), max(size, step * min(inner, size)))
    work = _Work(largest, values, kind)
    strips = []
    for c in range(0, filters, step):
        shift = None if pilot is None else pilot[c : c + step, None]
        blocks = _blocks(values[:, c : c + step], size)
        strips.append(_together([work.block(block, shift, bounds) for block in blocks]))
    if len(strips) == 1:
        return strips[0]
    return tuple(torch.cat(column) for column in zip(*strips, strict=True))


def block_size(device: torch.device) -> int:
    """How many values to work on at a time."""
    size = _BLOCK.get(device.type)
    # Each thread works on its share of a block, in a cache of its own.
    return _BLOCK_ELSEWHERE if size is None else size * min(torch.get_num_threads(), 16)


def _together(blocks: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The sums over several blocks of the same filters."""
    if len(blocks) == 1:
        return blocks[0]
    s1, s2, low, high, *counted = (torch.stack(column) for column in zip(*blocks, strict=True))
    return (
        *(s1.sum(0), s2.sum(0), low.amin(0), high.amax(0)),
        *(c.sum(0, dtype=torch.int64) for c in counted),
    )


def _blocks(values: Tensor, size: int) -> Iterator[Tensor]:
    outer, filters, inner = values.shape
    if inner > size:  # one filter: the others were set apart before
        for o in range(outer):
            for i in range(0, inner, size):
                yield values[o : o + 1, :, i : i + size]
        return
    step = max(1, size // (filters * inner))
    for o in range(0, outer, step):
        yield values[o : o + step]


class _Work:
    """Room for one block after the other.

    Args:
        largest: values of a block.
        values: of which they are blocks.
        kind: the type to sum up in.
    """

    def __init__(self, largest: int, values: Tensor, kind: torch.dtype) -> None:
        device = values.device
        self.wide = torch.empty(largest, dtype=kind, device=device)
        # Arithmetic on these is fast as they are; half precision is worked on in float32, integers
        # in the wide copy.
        native = values.dtype in (torch.float32, torch.float64)
        half = values.dtype in (torch.float16, torch.bfloat16)
        self.single = torch.empty(largest, device=device, dtype=torch.float32) if half else None
        raw = values.dtype if native else torch.float32 if half else kind
        self.native = native
        self.bytes: Tensor | None = None
        self.flags: Tensor | None = None
        self._largest, self._raw, self._device = largest, raw, device

    def block(
        self, block: Tensor, shift: Tensor | None, bounds: tuple[float, float] | None
    ) -> tuple[Tensor, ...]:
        """What `blockwise` gives, of one block."""
        wide = self.wide[: block.numel()].view(block.shape)
        raw = block
        if self.single is not None:
            raw = self.single[: block.numel()].view(block.shape)
            raw.copy_(block)
        wide.copy_(raw)
        raw = raw if self.native or self.single is not None else wide
        low, high = along(torch.amin, raw), along(torch.amax, raw)
        counted = [self._zeros(raw), self._nonfinite(raw) if shift is not None else None]
        if bounds is not None:
            counted.append(self._saturated(raw, bounds))
        if shift is not None:
            wide.sub_(shift)
        s1, s2 = _total(wide), _squares(wide)
        none = torch.zeros_like(low, dtype=torch.int64)
        return s1, s2, low, high, *(none if c is None else c for c in counted)

    def _mask(self, raw: Tensor) -> Tensor:
        """Room for a flag for each value, in the values' own type."""
        if self.flags is None:
            self.flags = torch.empty(self._largest, dtype=self._raw, device=self._device)
        return self.flags[: raw.numel()].view(raw.shape)

    def _zeros(self, raw: Tensor) -> Tensor:
        return self._counted(raw, "equal", 0)

    def _counted(self, raw: Tensor, how: str, value: float) -> Tensor:
        """Of how many values a comparison is true.

        Args:
            raw: the block.
            how: "equal", "less_equal" or "greater_equal", as NumPy and torch call it.
            value: to compare with.
        """
        if raw.device.type != "cpu":
            compare = {"equal": torch.eq}.get(how) or getattr(torch, how)
            return along(torch.sum, compare(raw, value, out=self._mask(raw)))
        if self.bytes is None:
            self.bytes = torch.empty(self._largest, dtype=torch.uint8)
        flags = self.bytes[: raw.numel()].view(raw.shape)
        # NumPy writes the flags as bytes at the speed of the cache; torch as slowly as numbers.
        getattr(np, how)(raw.numpy(), value, out=flags.numpy().view(np.bool_))
        return _count(flags)

    def _nonfinite(self, raw: Tensor) -> Tensor:
        return along(torch.sum, torch.mul(raw, 0, out=self._mask(raw)).ne_(0))

    def _saturated(self, raw: Tensor, bounds: tuple[float, float]) -> Tensor:
        least, most = _rounded(*bounds) if raw.dtype == torch.float32 else bounds
        below = self._counted(raw, "less_equal", least)
        return below + self._counted(raw, "greater_equal", most)


def _count(flags: Tensor) -> Tensor:
    """How many are 1, filter by filter: eight at a time, each byte of a word a count of its own.

    Args:
        flags: (outer, filters, inner) uint8, contiguous.
    """
    outer, filters, inner = flags.shape
    if inner >= _LONG or outer == 1:
        words, rows = inner // 8, _divisor(inner // 8)
        if inner % 8 or rows > _LANE:
            return flags.sum((0, 2), dtype=torch.int64)
        of_words = flags.view(torch.int64).view(outer, filters, words // rows, rows).sum(-1)
        return of_words.view(torch.uint8).view(outer, filters, -1).sum((0, 2), dtype=torch.int64)
    rows = _divisor(outer)
    if (filters * inner) % 8 or rows > _LANE:
        return flags.sum((0, 2), dtype=torch.int64)
    of_words = flags.view(outer // rows, rows, filters * inner).view(torch.int64).sum(1)
    return of_words.view(torch.uint8).view(-1, filters, inner).sum((0, 2), dtype=torch.int64)


def _total(wide: Tensor) -> Tensor:
    """Σx, filter by filter."""
    if wide.shape[2] == 1 and wide.device.type == "cpu":  # BLAS goes through rows in their order
        rows = wide.squeeze(2)
        return torch.mv(rows.t(), rows.new_ones(len(rows)))
    return along(torch.sum, wide)


def _squares(wide: Tensor) -> Tensor:
    """Σx², filter by filter; what is in the tensor is lost."""
    if wide.shape[2] >= _DOT and wide.device.type == "cpu" and _vecdot is not None:
        values = wide.numpy()
        return torch.from_numpy(_vecdot(values, values)).sum(0)
    return _total(wide.square_())


@cache
def _divisor(words: int) -> int:
    """The largest divisor of a number that a byte can count to; the number itself if none is."""
    return next((d for d in range(min(words, _LANE), 7, -1) if words % d == 0), words)


@cache
def _rounded(low: float, high: float) -> tuple[float, float]:
    """The float32 numbers that a float32 is at or below, or above, just when it is the given."""
    least, most = np.float32(low), np.float32(high)
    if float(least) > low:
        least = np.nextafter(least, np.float32(-np.inf))
    if float(most) < high:
        most = np.nextafter(most, np.float32(np.inf))
    return float(least), float(most)


def along(op: Any, block: Tensor) -> Tensor:
    """A reduction to (C,), in the order of axes that keeps the inner loop long."""
    first, last = (2, 0) if block.shape[2] >= _LONG or block.shape[0] == 1 else (0, 1)
    reduced: Tensor = op(block, first)
    if reduced.shape[last] == 1:
        return reduced.squeeze(last)
    whole: Tensor = op(reduced, last)
    return whole
