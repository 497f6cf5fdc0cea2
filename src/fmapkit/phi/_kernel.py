"""The kernel of φ: inner products of features, and what is made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fmapkit.errors import ArgumentError, check_choice

KERNELS = ("linear", "cosine", "rbf")


def kernel(x: Tensor, y: Tensor | None, kind: str, centred: bool, gamma: float | None) -> Tensor:
    """The kernel of two feature matrices, as `FeatureFunction.kernel` says.

    Raises:
        ArgumentError: an argument is outside what is allowed.
    """
    check_choice(KERNELS, kind=kind)
    if gamma is not None and (kind != "rbf" or not gamma > 0):
        raise ArgumentError(f"gamma must be a positive number, and goes with kind='rbf': {gamma!r}")
    if kind == "linear" and centred:  # at the mean of the features: fewer digits are lost
        mean = x.mean(0)
        return (x - mean) @ (x - mean if y is None else y - mean).T
    gram = _gram(x, x if y is None else y, kind, gamma)
    if not centred:
        return gram
    own = gram if y is None else _gram(x, x, kind, gamma)
    return gram - gram.mean(0) - own.mean(1, keepdim=True) + own.mean()


def _gram(x: Tensor, y: Tensor, kind: str, gamma: float | None) -> Tensor:
    if kind == "rbf":
        # By differences: |x|² + |y|² - 2xy would lose what is near.
        distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return (-(1 / x.shape[1] if gamma is None else gamma) * distances.square()).exp()
    if kind == "cosine":
        x, y = torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)
    return x @ y.T
