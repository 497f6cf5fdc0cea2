"""Gram matrices of a batch, and the unbiased HSIC of all pairs of them.

Song et al., "Feature Selection via Dependence Maximization" (2012), equation 5: of Gram matrices K
and L of n samples, with their diagonals set to 0,

    HSIC₁ = [tr(KL) + 1ᵀK1·1ᵀL1 / ((n-1)(n-2)) - 2/(n-2)·1ᵀKL1] / (n(n-3))

The mean of it over minibatches is an unbiased estimate, too (Nguyen, Raghu and Kornblith, "Do Wide
and Deep Networks Learn the Same Things?", 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 4  # samples: below that, HSIC₁ is not defined
_CHUNK = 2**22  # values of a map that are converted to float64 at once


@dataclass(frozen=True, slots=True)
class Gram:
    """What is held of one map of a batch.

    Attributes:
        linear: (n, n) inner products of the samples, the diagonal 0.
        apart: (pairs,) 1 - the correlation of two samples' values; None where not asked for.
    """

    linear: Tensor
    apart: Tensor | None

    @classmethod
    def of(cls, values: Tensor, rsa: bool) -> Gram:
        """That of (n, d) values; in float64, where the device has it."""
        count = len(values)
        kind = torch.float32 if values.device.type == "mps" else torch.float64
        linear = torch.zeros(count, count, dtype=kind, device=values.device)
        plain = torch.zeros_like(linear) if rsa else None
        means = _means(values, kind) if rsa else None
        for part in torch.split(values, max(1, _CHUNK // max(count, 1)), 1):
            wide = part.to(kind)
            # A shift of all samples changes nothing, and what is near 0 has more digits.
            centred = wide - wide.mean(0)
            linear += centred @ centred.T
            if plain is not None and means is not None:
                wide = wide - means[:, None]
                plain += wide @ wide.T
        return cls(linear.fill_diagonal_(0), None if plain is None else dissimilarities(plain))


def _means(values: Tensor, kind: torch.dtype) -> Tensor:
    """Of each sample's values."""
    total = torch.zeros(len(values), dtype=kind, device=values.device)
    for part in torch.split(values, max(1, _CHUNK // max(len(values), 1)), 1):
        total += part.to(kind).sum(1)
    return total / values.shape[1]


def dissimilarities(covariances: Tensor) -> Tensor:
    """1 - correlation, above the diagonal, of samples with these (unnormalised) covariances."""
    scale = covariances.diagonal().sqrt()
    count = len(covariances)
    rows, columns = torch.triu_indices(count, count, 1, device=covariances.device)
    return 1 - covariances[rows, columns] / (scale[rows] * scale[columns])


def hsic(first: Tensor, second: Tensor) -> Tensor:
    """(first, second): HSIC₁ of each of some Gram matrices (…, n, n) with each of others."""
    count = first.shape[1]
    rows_a, rows_b = first.sum(2), second.sum(2)
    totals = torch.outer(rows_a.sum(1), rows_b.sum(1)) / ((count - 1) * (count - 2))
    found = first.flatten(1) @ second.flatten(1).T + totals
    return (found - 2 / (count - 2) * (rows_a @ rows_b.T)) / (count * (count - 3))
