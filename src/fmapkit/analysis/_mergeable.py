"""Analyses by layer that are put together: of several runs in one process, or of all ranks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from fmapkit.analysis._by_layer import ByLayer, S
from fmapkit.analysis._keys import Filters, Name
from fmapkit.errors import ArgumentError, DistributedError, listed
from fmapkit.torchlib.operators import tree_map


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
        ranks = _exchange({**self.state_dict(), "local": local}, group)
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
        for rank, text in enumerate(said):
            if text["local"]:
                raise DistributedError(
                    f"reduce(): {text['local'][0]} is one rank's part of it on rank {rank} of the "
                    "group (tensor parallel), so that filters of the same number are different ones"
                )
            if text["options"] != said[0]["options"]:
                *others, last = said[0]["options"]
                raise DistributedError(
                    f"reduce(): {', '.join(others)} or {last} on rank {rank} of the group are not "
                    "those on rank 0"
                )
        keys = ("layer", "kind", "nonlinearity", "path", "filters")
        seen = [{str([g[k] for k in keys]): g for g in text["groups"]} for text in said]
        for rank, groups in enumerate(seen):
            for other, theirs in enumerate(seen):
                lacking = [g for key, g in theirs.items() if key not in groups]
                if lacking:
                    names = listed(f"{g['layer']}{g['path']} {g['kind']}" for g in lacking)
                    raise DistributedError(
                        f"reduce(): ranks have seen different maps: {names} on rank {other} of the "
                        f"group, and not, or of other filters, on rank {rank}"
                    )


def _exchange(mine: Any, group: Any) -> list[Any]:
    """What every rank has, in the order of ranks; tensors are on the CPU.

    Args:
        mine: tensors and values of built-in types; ranks may have others than each other.

    Raises:
        DistributedError: torch.distributed is not initialised, or this rank is not in the group.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise DistributedError(
            "reduce() puts together what several ranks have seen, and torch.distributed is not "
            "initialised: call torch.distributed.init_process_group first"
        )
    if dist.get_rank(group) < 0:
        raise DistributedError(f"reduce(): rank {dist.get_rank()} is not in the group it was given")
    # A view would be sent with all of the memory that it lies in.
    sent = tree_map(lambda v: v.detach().cpu().clone() if isinstance(v, Tensor) else v, mine)
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, sent, group=group)
    return parts
