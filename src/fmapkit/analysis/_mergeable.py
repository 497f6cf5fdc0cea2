"""Analyses by layer that are put together: of several runs in one process, or of all ranks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from typing_extensions import Self

from fmapkit.analysis._by_layer import ByLayer, S
from fmapkit.analysis._keys import Filters, Name
from fmapkit.analysis._ranks import agree, exchange
from fmapkit.errors import ArgumentError


@dataclass(slots=True)
class Held:
    """What is known of one set of filters, to which others can be put."""

    sums: Any  # they have a device, `on` another one, `merge`, and `tensors` by name
    local: bool  # other ranks have other filters under the same numbers

    def clash(self, name: Name, other: Self) -> str:
        """Why others, of the same name, do not go with them; empty where they do."""
        return ""

    def merge(self, other: Self) -> None:
        """Put others to them."""
        self.sums = self.sums.merge(other.sums.on(self.sums.device))
        self.local |= other.local

    def state(self) -> dict[str, Any]:
        """As `Sums` has it."""
        return {"local": self.local, "tensors": self.sums.tensors()}


M = TypeVar("M", bound=Held)


class Mergeable(ByLayer[M, S]):
    """Takes in what another one has seen."""

    def merge(self, other: Self) -> None:
        """Take in what another one has seen, on this process; `other` stays as it is.

        Raises:
            ArgumentError: it was made with other arguments, or a layer has other filters there.
        """
        mine = type(self).__name__
        if not isinstance(other, type(self)):
            raise ArgumentError(f"merge takes {mine}, not {type(other).__name__}")
        self._check_options(other._options(), "merge")
        for name, filters, group in other._groups:  # all, before the first is taken in
            known = self._groups.names.get(name, {}).get(filters)
            why = self._groups.clash(name, filters) if known is None else known.clash(name, group)
            if why:
                raise ArgumentError(why)
        for name, filters, group in other._groups:
            self._add(name, filters, group)
        for key, reason in other._groups.missed.items():
            self._groups.missed.setdefault(key, reason)

    def _add(self, name: Name, filters: Filters, new: M) -> None:
        groups = self._groups.names.setdefault(name, {})
        if filters not in groups:
            groups[filters] = copy.copy(new)
            return
        with torch.no_grad():
            groups[filters].merge(new)

    def reduce(self, group: Any = None) -> Self:
        """What all ranks have seen, put together: the same bits on every rank.

        A collective that every rank of the group has to call: one `all_gather_object`. This one
        stays as it is.

        Args:
            group: process group; None for the default one.

        Raises:
            DistributedError: torch.distributed is not initialised, ranks have seen different
                layers or have other arguments, or a map was one rank's part (tensor parallel).
                Every rank raises.
        """
        local = list(dict.fromkeys(str(name) for name, _, g in self._groups if g.local))
        ranks = exchange("reduce()", {**self.state_dict(), "local": local}, group)
        self._check_ranks(ranks)
        result = copy.copy(self)
        result.reset()
        result._groups.missed.update(self._groups.missed)
        for entry in [entry for state in ranks for entry in state["groups"]]:
            result._add(*result._kept(entry))
        for name, filters, one in result._groups:
            one.sums = one.sums.on(self._groups.names[name][filters].sums.device)
        return result

    def _check_ranks(self, said: list[dict[str, Any]]) -> None:
        """Whether what the ranks have goes together; every rank comes to the same verdict.

        Raises:
            DistributedError: it does not.
        """
        agree(said)
