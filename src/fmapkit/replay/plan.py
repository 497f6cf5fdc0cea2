"""What a traced call of a region boils down to: which hooks fire, and what each one holds.

How it is made is a matter of `replay/planning.py`. Frozen, and free of torch side effects. A plan
speaks of origins by `Ref`, since the same module may be called at different places of a pass: an
origin inside is "the n-th call of layer L from here", one that came in is "whatever the i-th tensor
argument carries".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from fmapkit.provenance import ChannelLayout, Made, ParamLabelRef
from fmapkit.storage import Place

__all__ = ["ChannelLabelRef", "MapSpec", "PlaceTag", "Plan", "Ref", "Step", "alike"]


@dataclass(frozen=True, slots=True)
class Ref:
    """An origin, relative to the call of the planned module.

    Attributes:
        kind: of the origin, or "input".
        name: the layer's label; empty for an input.
        offset: which call of it, counted from the module's start; for an input, which tensor.
        claimed: a nonlinearity inside the module has received it.
        made: what a layer made its filters of.
    """

    kind: str
    name: str = ""
    offset: int = 0
    claimed: bool = True
    made: Made | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ChannelLabelRef:
    """A flow that a planned module returns: whose filters, by place, and how they lie.

    Attributes:
        ref: their origin; None where they are nobody's.
        axes: along which they lie.
    """

    ref: Ref | None
    axes: ChannelLayout | None


# What a tensor carries in any call of a plan; in one pass it is a `Label`.
PlaceTag = ChannelLabelRef | ParamLabelRef | None


@dataclass(frozen=True, slots=True)
class MapSpec:
    """One map that a step holds."""

    slot: str  # "x", "y", or a path into a nested output after "y"
    kind: str
    ref: Ref
    axes: ChannelLayout | None
    sigma: str | None
    path: str
    copy: bool
    before: bool  # copied before the call, since the call itself overwrites it
    on_the_way: bool  # the model's tensor goes on from the copy
    picked: tuple[int, ...] | None
    place: Place | None  # their axis, and where they lie along it
    stored: bool  # in another form than the model's own tensor
    pending: bool  # a preactivation only if no nonlinearity outside claims it


@dataclass(frozen=True, slots=True)
class Step:
    """One firing of a tap: a module's call, or a function called by a scope."""

    module: nn.Module | None
    function: str
    place: int  # which of the function's tensor arguments is x
    key: str | None
    emissions: tuple[MapSpec, ...]
    plain: str  # "xy" or "y": it holds references to these, from their usual places, and no more
    keeps: bool  # an in-place σ that leaves the memory of x to us, where it can
    shared: bool  # what x was is held by an earlier step, too
    # How many decisions had been taken when it fired, since the unit began.
    position: int = field(compare=False)
    at: int = 0  # which entry of the log it reads


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How to read a unit's later calls."""

    steps: tuple[Step, ...]
    order: list[Any]  # what fires: modules, sites; None for what the light mode sees
    at: list[Step | None]  # what is read there
    spare: frozenset[int]  # what no step reads: another call of a module that is tapped
    taps: frozenset[nn.Module]
    direct: dict[nn.Module, str]  # taps all of whose steps are plain, in the same way
    # Of calls of functions that are tapped where they are written: the names of the functions.
    sites: Mapping[str, frozenset[str]]
    scopes: frozenset[nn.Module]  # run under the light mode: they call a σ themselves
    toggles: frozenset[nn.Module]  # children of these, in which the light mode is off
    before: frozenset[nn.Module]  # need a look before their call
    calls: tuple[tuple[str, int], ...]
    outputs: tuple[tuple[str, PlaceTag], ...]  # what each tensor of the output carries, by path
    writes: tuple[int, ...]  # which tensor arguments are written to
    claims: tuple[int, ...]  # which inputs reach a nonlinearity inside
    keeping: frozenset[
        nn.Module
    ]  # in-place nonlinearities that leave z's memory to us, if they can
    keeps: bool  # some in-place nonlinearity does so
    shares: bool  # some z is held as another map, too
    graph: bool  # some map was part of a graph, even if gradients are off around the module
    joins: bool  # or may become part of one: it is made in an `autograd.Function`'s forward


_COMPARED = [f.name for f in fields(Plan)]


def alike(a: Plan, b: Plan) -> bool:
    """Whether two plans, made on inputs of other sizes, say the same."""
    return all(getattr(a, name) == getattr(b, name) for name in _COMPARED)
