"""What a traced call of a region boils down to: which hooks fire, and what each one holds.

How it is made is a matter of `replay/planning.py`; what it means to the pass around it is told in
`replay/effects.py`. Frozen, and free of torch side effects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from fmapkit.provenance import BufferPlace
from fmapkit.replay.effects import Effects, SiteMap
from fmapkit.storage import Place as FilterPlace
from fmapkit.tracing import Place, Placed

# What stands in the order of what fires for each map of a fused kernel.
IN_KERNEL = "in a fused kernel"


@dataclass(frozen=True, slots=True)
class MapSpec(SiteMap):
    """One map that a step holds."""

    slot: str  # "x", "y", or a path into a nested output after "y"
    copy: bool
    before: bool  # copied before the call, since the call itself overwrites it
    on_the_way: bool  # the model's tensor goes on from the copy
    place: FilterPlace | None  # of the picked filters: their axis, and where they lie along it
    stored: bool  # in another form than the model's own tensor


@dataclass(frozen=True, slots=True)
class Step:
    """What one tap reads: a module's call, or a function that a module calls itself."""

    module: nn.Module | None
    function: str
    place: int  # which of the function's tensor arguments is x
    key: str | None
    map_specs: tuple[MapSpec, ...]
    plain: str  # "xy" or "y": it holds references to these, from their usual places, and no more
    keeps: bool  # an in-place σ that leaves the memory of x to us, where it can
    shared: bool  # what x was is held by an earlier step, too
    # How many decisions had been taken when it fired, since the region began.
    position: int = field(compare=False)
    at: int = 0  # which entry of the log it reads


@dataclass(frozen=True, slots=True)
class KernelSteps:
    """The steps of a module's call whose maps its fused kernel shows: its forward does not run."""

    module: nn.Module  # of torch's
    # Of the kernel's maps, for each step, in the order of its map specs.
    names: tuple[tuple[str, ...], ...]
    wanted: frozenset[str]  # all of these


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How to read a region's later calls."""

    steps: tuple[Step, ...]
    order: list[Any]  # what fires: modules, sites; None for what the light mode sees
    at: list[Step | None]  # what is read there
    spare: frozenset[int]  # what no step reads: another call of a module that is tapped
    taps: frozenset[nn.Module]
    direct: dict[nn.Module, str]  # taps all of whose steps are plain, in the same way
    # Of calls of functions that are tapped where they are written: the names of the functions.
    sites: Mapping[str, frozenset[str]]
    plain_sites: Mapping[str, str]  # those that are read plainly, in the same way each time
    scopes: frozenset[nn.Module]  # run under the light mode: they call a σ themselves
    toggles: frozenset[nn.Module]  # children of these, in which the light mode is off
    before: frozenset[nn.Module]  # need a look before their call
    effects: Effects  # what the call means to the pass around it
    # In-place nonlinearities that leave z's memory to us, if they can.
    keeping: frozenset[nn.Module]
    fusing: frozenset[nn.Module]  # may run by torch's fused paths: seen from their calls on
    kernels: Mapping[int, KernelSteps]  # of these, by the entry of the log that is its first
    edited: frozenset[nn.Module]  # whose inputs or outputs are edited
    placed: Mapping[Place, Placed]  # what is known of these
    keeps: bool  # some in-place nonlinearity does so
    shares: bool  # some z is held as another map, too
    graph: bool  # some map was part of a graph, even if gradients are off around the module
    buffers: tuple[BufferPlace, ...] = field(compare=False)  # that are weights of layers
    joins: bool  # or may become part of one: it is made in an `autograd.Function`'s forward
    # The sizes by which reshapes have kept filters, or not (see `ChannelLayout.at_stake`).
    mixed: tuple[int, ...] = field(compare=False)
    # It wrote to a copy, where inputs of other sizes may need none: then it writes to the original.
    copies_written: bool


_COMPARED = [f.name for f in fields(Plan) if f.compare]


def held_by(plan: Plan) -> tuple[int, ...] | None:
    """The numbers by which a plan holds, beside those of its path; None: for no other sizes."""
    return None if plan.copies_written else plan.mixed


def alike(a: Plan, b: Plan) -> bool:
    """Whether two plans, made on inputs of other sizes, say the same."""
    return all(getattr(a, name) == getattr(b, name) for name in _COMPARED)
