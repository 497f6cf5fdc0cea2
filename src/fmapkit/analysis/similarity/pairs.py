"""Sums over passes of what is known of each pair of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple

import torch
from torch import Tensor

from fmapkit.analysis.similarity.hsic import Gram, hsic
from fmapkit.analysis.similarity.labels import MapTag

# Each is (first, second): HSIC₁ of the two, of the first, of the second, and their weight; then of
# dissimilarities x and y: how many, and the sums of x, y, x², y² and x·y.
_HSIC = ("both", "first", "second", "weight")
_RSA = ("pairs", "x", "y", "xx", "yy", "xy")


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
            "both": hsic(a, b) * weight,
            "first": hsic(a, a).diagonal()[:, None] * weight,
            "second": hsic(b, b).diagonal()[None] * weight,
            "weight": torch.full((1, 1), float(weight), dtype=a.dtype, device=device),
        }
        if "xy" in self._keys:
            x, y = (
                torch.stack([g.apart.to(device) for g in of.values() if g.apart is not None])
                for of in (first, second)
            )
            new |= {
                "pairs": torch.full((1, 1), float(x.shape[1]), dtype=a.dtype, device=device),
                "x": x.sum(1)[:, None],
                "y": y.sum(1)[None],
                "xx": x.square().sum(1)[:, None],
                "yy": y.square().sum(1)[None],
                "xy": x @ y.T,
            }
        for key, value in new.items():
            self._sums[key][rows[:, None], columns[None]] += value

    def _grow(self, first: Mapping[MapTag, Gram], second: Mapping[MapTag, Gram]) -> None:
        """Room for the layers of a pass."""
        known = len(self.first), len(self.second)
        for known_tags, grams in ((self.first, first), (self.second, second)):
            known_tags += [tag for tag in grams if tag not in known_tags]
        shape = len(self.first), len(self.second)
        if shape == known and self._sums:
            return
        like = next(iter(first.values())).linear
        for key in self._keys:
            before = self._sums.get(key)
            grown = torch.zeros(shape, dtype=like.dtype, device=like.device)
            if before is not None:
                grown = grown.to(before.device)
                grown[: known[0], : known[1]] = before
            self._sums[key] = grown

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
