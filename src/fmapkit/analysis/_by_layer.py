"""Analyses that sum up the maps of each layer: what those here have in common, but for the sums.

update(fm)      -> _take_in     one map, as it is made
analysis[key]   -> _read        what is known of a layer
state_dict()    -> Sums.state   what is kept; load_state_dict() -> _sums
merge, reduce   -> Held.merge   of several runs in one process, or of all ranks (`Mergeable`)
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from fmapkit._lazy import LazyMethod
from fmapkit._warnings import warn
from fmapkit.analysis._keys import Filters, Groups, Name
from fmapkit.errors import ArgumentError, DistributedError, listed
from fmapkit.kinds import KINDS
from fmapkit.readable import plain_values
from fmapkit.tables import Shown, Table
from fmapkit.torchlib.operators import tree_map

if TYPE_CHECKING:
    from fmapkit import page
    from fmapkit.maps import FeatureMap


class Sums(Protocol):
    """What is known of one set of filters."""

    def state(self) -> dict[str, Any]:
        """All of it: "tensors", a dict of them, and values of built-in types."""


G = TypeVar("G", bound=Sums)
S = TypeVar("S")  # how that is read


class ByLayer(Shown, Generic[G, S]):
    """Takes maps in, and reads what is known, layer by layer.

    Args:
        what: how messages call it, such as "stats".
    """

    _kinds: Collection[str] = KINDS  # of the maps that are looked at
    _heads: tuple[str, ...]  # of the table; from the fourth on, there are numbers below
    _nothing = "no map seen yet"

    def __init__(self, what: str) -> None:
        self._groups: Groups[G] = Groups(what)

    @abstractmethod
    def _take_in(self, fm: FeatureMap, tensor: Tensor, name: Name, filters: Filters) -> str:
        """Take the values of a map in; returns why they cannot be, empty if they are."""

    @abstractmethod
    def _read(self, name: Name) -> S:
        """What is known of the maps of one name."""

    @abstractmethod
    def _row(self, s: S) -> tuple[str, ...]:
        """The line of the table for what is known of one name; waits for the device."""

    @abstractmethod
    def _summary(self, rows: list[tuple[str, ...]]) -> str:
        """What stands below the table."""

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """The arguments that a state has to agree in, of built-in types."""

    @abstractmethod
    def _sums(self, entry: Mapping[str, Any]) -> G:
        """Of what `Sums.state` gave."""

    # -- taking in -----------------------------------------------------------------------------

    def update(self, fm: FeatureMap) -> None:
        """Take one map in; what cannot be taken in is named in `missed`."""
        if fm.kind not in self._kinds:
            return
        # State made in inference mode could not be used out of it.
        with torch.inference_mode(False), torch.no_grad():
            tensor, reason = plain_values(fm)
            name, filters = self._groups.place(fm)
            reason = reason or self._groups.clash(name, filters)
            if tensor is not None and not reason:
                reason = self._take_in(fm, tensor.detach(), name, filters)
        if reason and (fm.layer, fm.kind) not in self._groups.missed:
            self._groups.missed[fm.layer, fm.kind] = reason
            said = f"the {fm.kind} of layer {fm.layer!r}"
            warn(f"{type(self).__name__} leaves out {said}: {reason}")

    def reset(self) -> None:
        """Forget all that was seen."""
        self._groups = Groups(self._groups.what)

    # -- reading -------------------------------------------------------------------------------

    @property
    def layers(self) -> list[str]:
        """The layers seen, in the order in which they first were."""
        return self._groups.layers

    @property
    def missed(self) -> dict[tuple[str, str], str]:
        """What was left out: the reason by (layer, kind)."""
        return dict(self._groups.missed)

    def __getitem__(self, key: str | tuple[str, ...]) -> S:
        """What is known of one layer's maps of one kind.

        Args:
            key: a layer (its activation; of a module of which only outputs were seen, its output),
                (layer, kind), or (layer, kind, path) for nested outputs.

        Raises:
            NoPassError: no map has been seen yet.
            UnknownLayerError: none of such a layer.
            NoActivationError: no activation of it.
            KindNotCapturedError: none of that kind.
            AmbiguousMapError: several answer; choose with `select`.
        """
        return self._read(self._groups.find(key))

    def select(
        self,
        layer: Any = None,
        kind: str | None = None,
        *,
        nonlinearity: str | None = None,
        path: str | None = None,
    ) -> list[S]:
        """All that fit, in the order in which they were first seen.

        Args:
            layer: a name, glob or regex, or several.
            kind: one of the five kinds.
            nonlinearity: only maps of this σ.
            path: only this place in a nested output.

        Raises:
            ArgumentError: an argument is of no allowed form.
        """
        return [self._read(n) for n in self._groups.select(layer, kind, nonlinearity, path)]

    def __contains__(self, layer: object) -> bool:
        return any(name.layer == layer for name in self._groups.names)

    def __iter__(self) -> Iterator[S]:
        """All that is known, in the order in which it was first seen."""
        return iter([self._read(name) for name in self._groups.names])

    def __len__(self) -> int:
        """How many that is."""
        return len(self._groups.names)

    def __bool__(self) -> bool:
        """It is there, also when nothing has been seen."""
        return True

    def _table(self) -> Table:
        name, rows = type(self).__name__, [self._row(s) for s in self]
        missed = f", {len(self.missed)} missed (see {self._groups.what}.missed)"
        last = f"{self._summary(rows)}{missed * bool(self.missed)}" if rows else self._nothing
        return Table(self._heads, rows, range(3, len(self._heads)), f"{name}: {last}")

    # -- keeping -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is known, as tensors and built-in types: `torch.save` it with the model.

        Loads with `weights_only=True`. `update` does not change the tensors that are in it.
        """
        groups = [
            {
                **asdict(name),
                "filters": None if filters is None else list(filters),
                **group.state(),
            }
            for name, filters, group in self._groups
        ]
        return {"version": 1, "options": self._options(), "groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict()`; what was known before is forgotten.

        Raises:
            ArgumentError: it is of another kind or version, or was made with other arguments.
        """
        if not isinstance(state, Mapping) or state.get("version") != 1 or "groups" not in state:
            raise ArgumentError(
                f"load_state_dict takes what {type(self).__name__}.state_dict() gave, of version 1"
            )
        self._check_options(state["options"], "load_state_dict")
        self.reset()
        for name, filters, group in map(self._kept, state["groups"]):
            self._groups.names.setdefault(name, {})[filters] = group

    def _kept(self, entry: Mapping[str, Any]) -> tuple[Name, Filters, G]:
        name = Name(*(entry[field.name] for field in fields(Name)))
        filters = None if entry["filters"] is None else tuple(entry["filters"])
        return name, filters, self._sums(entry)

    def _check_options(self, theirs: Mapping[str, Any], doing: str) -> None:
        for key, mine in self._options().items():
            if theirs.get(key) != mine:
                raise ArgumentError(
                    f"{doing}: the other one was made with {key}={_short(theirs.get(key))}, this "
                    f"has {_short(mine)}"
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "…"


class Tabular(ByLayer[G, S]):
    """Shows itself as a page, too, and can be read window by window."""

    if TYPE_CHECKING:
        to_html = page.write_analysis
        """Write what is known as a page to share, one HTML file: `fmapkit.page.write_analysis`."""
    else:
        to_html = LazyMethod("fmapkit.page", "write_analysis")

    def take(self) -> Self:
        """What was seen since the last time, as an analysis of its own; this one begins anew.

        So that the course of a training can be read, epoch by epoch. `Statistics.merge` puts them
        together again, and gives what would have been seen without. `DeadFilters` count steps and
        inputs from there, and forget that a filter had been silent before.
        """
        taken = copy.copy(self)
        self.reset()
        return taken


# -- put together ----------------------------------------------------------------------------------


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
        """Raise unless what the ranks have goes together; every rank comes to the same verdict."""
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
    """What every rank has, tensors on the CPU and values of built-in types, in order of ranks."""
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
