"""Gram matrices of a batch, and sums over passes of what they say of each pair of layers.

Song et al., "Feature Selection via Dependence Maximization" (2012), equation 5: of Gram matrices K
and L of n samples, with their diagonals set to 0,

    HSIC₁ = [tr(KL) + 1ᵀK1·1ᵀL1 / ((n-1)(n-2)) - 2/(n-2)·1ᵀKL1] / (n(n-3))

The mean of it over minibatches is an unbiased estimate, too (Nguyen, Raghu and Kornblith, "Do Wide
and Deep Networks Learn the Same Things?", 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fmapkit.analysis._moments import accumulator

if TYPE_CHECKING:
    from fmapkit.maps import FeatureMap

LEAST = 4  # samples: below that, HSIC₁ is not defined
_CHUNK = 2**22  # values of a map that are converted to float64 at once

# Each is (first, second): HSIC₁ of the two, of the first, of the second, and their weight; then of
# dissimilarities x and y: how many, and the sums of x, y, x², y² and x·y.
_HSIC = ("both", "first", "second", "weight")
_RSA = ("pairs", "x", "y", "xx", "yy", "xy")


@dataclass(frozen=True, slots=True)
class MapTag:
    """What tells a map from all others of its pass."""

    layer: str
    path: str
    kind: str
    call: int
    nonlinearity: str
    filters: tuple[int, ...]  # the first, the last and the number of them; empty without an axis

    @classmethod
    def of(cls, fm: FeatureMap) -> MapTag:
        there = fm.filters
        filters = (there[0], there[-1], len(there)) if there else ()
        return cls(fm.layer, fm.path, fm.kind, fm.call, fm.nonlinearity or "", filters)

    @property
    def place(self) -> str:
        """The layer, and where in its output."""
        return (self.layer or "(model)") + self.path

    @property
    def label(self) -> str:
        """What it is called where nothing is known of other maps."""
        plain = self.kind in ("activation", "output")
        return self.place + ("" if plain else f" {self.kind}") + f" #{self.call}" * bool(self.call)


def labels(tags: Sequence[MapTag]) -> list[str]:
    """A label for each, all different: of an activation the layer, of an output where that is free.

    More is said only where it is needed: the call from the second one on, σ, the filters.
    """
    activations = {tag.place for tag in tags if tag.kind == "activation"}
    found: list[str] = []
    for tag in tags:
        label = tag.label
        if tag.kind == "output" and tag.place in activations:
            label = f"{tag.place} output" + f" #{tag.call}" * bool(tag.call)
        part = f"{tag.filters[0]} to {tag.filters[1]}" if tag.filters else "the whole"
        choices = [label, f"{label} ({tag.nonlinearity})", f"{label} ({part})"]
        choices += [f"{label} ({tag.nonlinearity}, {part}, {n})" for n in range(len(tags))]
        found.append(next(choice for choice in choices if choice not in found))
    return found


@dataclass(frozen=True, slots=True)
class Gram:
    """What is held of one map of a batch.

    Attributes:
        linear: (n, n) inner products of the samples, the diagonal 0.
        apart: (2, pairs): 1 - the correlation of two samples' values, and 1; both 0 where a sample
            has the same value throughout, and so no correlation. None where not asked for.
    """

    linear: Tensor
    apart: Tensor | None

    @classmethod
    def of(cls, values: Tensor, rsa: bool) -> Gram:
        """That of (n, d) values; in float64, where the device has it."""
        count = len(values)
        kind = accumulator(values.device)
        linear = torch.zeros(count, count, dtype=kind, device=values.device)
        plain = torch.zeros_like(linear)
        parts = torch.split(values, max(1, _CHUNK // max(count, 1)), 1)
        if rsa:
            means = torch.stack([part.to(kind).sum(1) for part in parts]).sum(0) / values.shape[1]
            differ = torch.stack([(part != values[:, :1]).any(1) for part in parts]).any(0)
        for part in parts:
            wide = part.to(kind)
            # A shift of all samples changes nothing, and what is near 0 has more digits. Of what is
            # the same throughout, nothing is left: a mean is not exact.
            centred = torch.where((part != part[:1]).any(0), wide - wide.mean(0), 0)
            linear += centred @ centred.T
            if rsa:
                wide = torch.where(differ[:, None], wide - means[:, None], 0)
                plain += wide @ wide.T
        return cls(linear.fill_diagonal_(0), _dissimilarities(plain) if rsa else None)


class Pairs:
    """The sums.

    Attributes:
        first: the maps of the first model, in the order in which they were seen.
        second: those of the second one.
    """

    def __init__(self, rsa: bool) -> None:
        self.first: list[MapTag] = []
        self.second: list[MapTag] = []
        self._sums: dict[str, Tensor] = {}
        self._keys = (*_HSIC, *_RSA) if rsa else _HSIC

    def add(self, first: Mapping[MapTag, Gram], second: Mapping[MapTag, Gram]) -> None:
        self._grow(first, second)
        device = self._sums["both"].device
        rows = torch.tensor([self.first.index(tag) for tag in first], device=device)
        columns = torch.tensor([self.second.index(tag) for tag in second], device=device)
        a, b = (torch.stack([g.linear.to(device) for g in of.values()]) for of in (first, second))
        weight = a.shape[1]
        new = {
            "both": _hsic(a, b) * weight,
            "first": _hsic(a, a).diagonal()[:, None] * weight,
            "second": _hsic(b, b).diagonal()[None] * weight,
            "weight": torch.full((1, 1), float(weight), dtype=a.dtype, device=device),
        }
        if "xy" in self._keys:
            (x, of_x), (y, of_y) = (
                torch.stack([g.apart.to(device) for g in of.values() if g.apart is not None], 1)
                for of in (first, second)
            )
            new |= {  # over the pairs of samples that have a correlation in both layers
                "pairs": of_x @ of_y.T,
                "x": x @ of_y.T,
                "y": of_x @ y.T,
                "xx": x.square() @ of_y.T,
                "yy": of_x @ y.square().T,
                "xy": x @ y.T,
            }
        for key, value in new.items():
            self._sums[key][rows[:, None], columns[None]] += value

    def _grow(self, first: Mapping[MapTag, Gram], second: Mapping[MapTag, Gram]) -> None:
        """Room for the layers of a pass."""
        more = []  # columns and rows
        for known, grams in ((self.second, second), (self.first, first)):
            new = [tag for tag in grams if tag not in known]
            known += new
            more += [0, len(new)]
        if any(more):
            none = next(iter(first.values())).linear.new_zeros(0, 0)
            self._sums = {key: F.pad(self._sums.get(key, none), more) for key in self._keys}

    def cka(self) -> Tensor:
        """(first, second) on the CPU; NaN of two layers that no pass had both of."""
        s = {key: self._sums[key].cpu() for key in _HSIC}
        found = s["both"] / (s["first"] * s["second"]).sqrt()
        return torch.where(s["weight"] > 0, found, torch.nan)

    def rsa(self) -> Tensor:
        """(first, second) on the CPU; the same."""
        n, x, y, xx, yy, xy = (self._sums[key].cpu() for key in _RSA)
        spread = ((xx - x * x / n) * (yy - y * y / n)).sqrt()
        return (xy - x * y / n) / spread

    def state(self) -> dict[str, object]:
        first, second = ([astuple(tag) for tag in of] for of in (self.first, self.second))
        return {"first": first, "second": second, "sums": dict(self._sums)}

    def load(self, state: Mapping[str, object]) -> None:
        first, second, sums = state["first"], state["second"], state["sums"]
        assert isinstance(first, list) and isinstance(second, list) and isinstance(sums, dict)
        self.first, self.second = ([MapTag(*tag) for tag in of] for of in (first, second))
        self._sums = {key: sums[key].clone() for key in self._keys if key in sums}


def _dissimilarities(covariances: Tensor) -> Tensor:
    """1 - correlation, above the diagonal, of samples with these (unnormalised) covariances.

    Returns:
        (2, pairs), as `Gram.apart`.
    """
    scale = covariances.diagonal().sqrt()
    count = len(covariances)
    rows, columns = torch.triu_indices(count, count, 1, device=covariances.device)
    scales = scale[rows] * scale[columns]
    there = scales != 0  # a NaN stays one
    apart = torch.where(there, 1 - covariances[rows, columns] / scales, 0)
    return torch.stack([apart, there.to(apart.dtype)])


def _hsic(first: Tensor, second: Tensor) -> Tensor:
    """(first, second): HSIC₁ of each of some Gram matrices (…, n, n) with each of others."""
    count = first.shape[1]
    rows_a, rows_b = first.sum(2), second.sum(2)
    totals = torch.outer(rows_a.sum(1), rows_b.sum(1)) / ((count - 1) * (count - 2))
    found = first.flatten(1) @ second.flatten(1).T + totals
    return (found - 2 / (count - 2) * (rows_a @ rows_b.T)) / (count * (count - 3))
