"""Between which bounds an activation still responds: what counts as saturated, by σ.

A value is saturated where it is at a bound that σ reaches, or within 1% of the range of σ next to
one that it only approaches. For a sigmoid that is a <= 0.01 or a >= 0.99, for tanh |a| >= 0.98; as
tanh is a sigmoid stretched, both mean the same: the slope there is under 4% of the largest one.
That units of these kinds get stuck next to their asymptotes, and how to see it in the statistics of
activations, is the subject of Glorot and Bengio, "Understanding the difficulty of training deep
feedforward neural networks", AISTATS 2010. They give no limit; the 1% is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fmapkit.errors import ArgumentError

if TYPE_CHECKING:
    from fmapkit.maps import FeatureMap

# At or below the first, at or above the second.
Bounds = tuple[float, float]

# `hardtanh` has its bounds from its caller, and a map does not tell them: none by default.
_BOUNDS: dict[str, Bounds] = {
    "hardsigmoid": (0.0, 1.0),
    "relu6": (0.0, 6.0),
    "sigmoid": (0.01, 0.99),
    "softsign": (-0.98, 0.98),
    "tanh": (-0.98, 0.98),
}


def checked(given: Mapping[str, Bounds] | None) -> dict[str, Bounds]:
    """The bounds by σ, the user's before ours; an error where one of the user's is no pair."""
    bounds = dict(_BOUNDS)
    for sigma, pair in (given or {}).items():
        fine = (
            isinstance(sigma, str)
            and isinstance(pair, (tuple, list))
            and len(pair) == 2
            and all(isinstance(b, (int, float)) and not isinstance(b, bool) for b in pair)
            and not any(math.isnan(b) for b in pair)
            and pair[0] < pair[1]
        )
        if not fine:
            raise ArgumentError(
                "saturation takes a dict of σ -> (low, high) with low < high, such as "
                f"{{'hardtanh': (-1.0, 1.0)}}, not {sigma!r}: {pair!r}"
            )
        bounds[sigma] = (float(pair[0]), float(pair[1]))
    return bounds


def bounds_of(fm: FeatureMap, bounds: Mapping[str, Bounds]) -> Bounds | None:
    """The bounds of a map's values, or None where saturation is not defined."""
    if fm.kind != "activation" or fm.nonlinearity is None:
        return None
    return bounds.get(fm.nonlinearity)
