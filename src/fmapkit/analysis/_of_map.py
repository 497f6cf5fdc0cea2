"""Mean, variance, extremes and counts of one map in a CPU's memory, filter by filter.

Values are summed up shifted by a pilot p of each filter, S1 = Σ(x - p) and S2 = Σ(x - p)². Then
mean = p + S1/n and M2 = Σ(x - mean)² = S2 - S1²/n. (Chan, Golub, LeVeque, "Algorithms for computing
the sample variance: analysis and recommendations", The American Statistician 37, 1983.) The
subtraction loses as many digits as S2 has more than M2. Most maps need no pilot: their mean is not
far from 0 beside their spread. Of others, the maps before tell the mean. Where too many digits were
lost all the same, the sums are taken again, around the mean that is known then.

The sums are `_fused.py`'s where numba is installed, else `_blocks.py`'s.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fmapkit._warnings import warn
from fmapkit.analysis import _blocks
from fmapkit.analysis._blocks import HIGH, LOW, S1, S2, SATURATED, ZEROS, Array
from fmapkit.analysis._saturation import Bounds

_DIGITS_LOST = 1e3  # of 15, three at most
_TINY = 1e-280  # below it, squares lose digits to underflow
_NO_BETTER = 2.0**-48  # a pilot this near to the mean, beside itself, is as good as there is
_TRIES = 3


def of_map(values: Tensor, bounds: Bounds | None, pilot: Array | None) -> tuple[Tensor, ...]:
    """Shift, offset, m2, minimum, maximum and counts, as `Moments` has them.

    Args:
        values: (outer, filters, inner), real, integer or bool, at least one of each filter.
        pilot: (filters,) what the means may be near; 0 or None for no guess.
    """
    outer, filters, inner = values.shape
    shift = np.zeros(filters) if pilot is None else pilot
    with np.errstate(all="ignore"):  # NaN, infinities and overflow are told in the result
        found = _sums(values, shift, bounds)
        low, high, s2 = found[LOW], found[HIGH], found[S2]
        counts = np.zeros((3, filters), np.int64)
        counts[0], counts[2] = found[ZEROS], found[SATURATED]
        odd = np.flatnonzero(~np.isfinite(s2))
        if len(odd):
            counts[1, odd] = _blocks.nonfinite(values[:, torch.from_numpy(odd)])
            low[np.isnan(s2)] = high[np.isnan(s2)] = np.nan
        for attempt in range(_TRIES):
            offset = found[S1] / (outer * inner)
            m2 = np.maximum(found[S2] - found[S1] * offset, 0)
            lost = _lost(found[S2], m2, offset, shift)
            lost &= (counts[1] == 0) & ((low != 0) | (high != 0))
            if attempt == _TRIES - 1 or not lost.any():
                break
            shift = np.where(lost, np.nan_to_num(shift + offset), shift)
            found = _sums(values, shift, None)
    return tuple(map(torch.from_numpy, (shift, offset, m2, low, high, counts)))


def _lost(s2: Array, m2: Array, offset: Array, shift: Array) -> Array:
    """Of which filters the sums have lost digits, and another pilot would gain some."""
    exact = (s2 <= m2 * _DIGITS_LOST) & (s2 < np.inf) & ((s2 >= _TINY) | (shift != 0))
    lost: Array = ~(exact | (np.abs(offset) <= _NO_BETTER * np.abs(shift)))
    return lost


def _sums(values: Tensor, pilot: Array, bounds: Bounds | None) -> Array:
    """By `_fused.py`, where numba is and works, else by `_blocks.py`."""
    fused = _fused()
    if fused is not None:
        try:
            found: Array = fused.sums(values, pilot, bounds)
            return found
        except Exception as error:  # of whatever compiler there is
            _give_up(error)
    return _blocks.sums(values, pilot, bounds)


_given_up: list[str] = []


def _give_up(error: Exception) -> None:
    reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    _given_up.append(reason)
    _fused.cache_clear()
    warn(
        "numba is installed but does not work here, so Statistics go on without it, several times "
        f"as slow ({reason})"
    )


@cache
def _fused() -> ModuleType | None:
    """The module; None without numba. The import of numba takes half a second."""
    if _given_up or importlib.util.find_spec("numba") is None:
        return None
    try:
        return importlib.import_module("fmapkit.analysis._fused")
    except Exception as error:  # numba may not know this NumPy, or find no folder for its cache
        _give_up(error)
        return None
