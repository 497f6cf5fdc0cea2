"""What a traced call of a unit boils down to: which hooks fire, and what each one holds.

Frozen, and free of torch side effects. A plan speaks of origins by `Ref`, since the same module may
be called at different places of a pass: an origin inside is "the n-th call of layer L from here",
one that came in is "whatever the i-th tensor argument carries".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor, nn

from fmapkit import layers
from fmapkit._axes import Axes
from fmapkit._events import Event, Firing
from fmapkit._frames import Frame
from fmapkit._functions import describe
from fmapkit._names import Names
from fmapkit._nested import leaves
from fmapkit._origin import NOWHERE, Flow, Made, Origin, Tag, Weight, WeightRef
from fmapkit._retain import Place, Retention
from fmapkit._store import Entry, Held
from fmapkit._store import storage_of as _storage
from fmapkit._trace import Tracer
from fmapkit._wants import Wants
from fmapkit.nonlinearities import module_sigma

__all__ = ["Emission", "FlowRef", "Plan", "Ref", "Step", "alike", "make_plan"]


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
class FlowRef:
    """A flow that a planned module returns: whose filters, by place, and how they lie.

    Attributes:
        ref: their origin; None where they are nobody's.
        axes: along which they lie.
    """

    ref: Ref | None
    axes: Axes | None


# What a tensor carries in any call of a plan; in one pass it is a `Tag`.
PlaceTag = FlowRef | WeightRef | None


@dataclass(frozen=True, slots=True)
class Emission:
    """One map that a step holds."""

    slot: str  # "x", "y", or a path into a nested output after "y"
    kind: str
    ref: Ref
    axes: Axes | None
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
    emissions: tuple[Emission, ...]
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
    last: tuple[tuple[int, ...], ...]  # per step: what is read by it for the last time
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
    rewritten: tuple[tuple[int, PlaceTag], ...]  # what some of these carry after the call
    claims: tuple[int, ...]  # which inputs reach a nonlinearity inside
    keeping: frozenset[
        nn.Module
    ]  # in-place nonlinearities that leave z's memory to us, if they can
    keeps: bool  # some in-place nonlinearity does so
    shares: bool  # some z is held as another map, too
    graph: bool  # some map was part of a graph, even if gradients are off around the module
    joins: bool  # or may become part of one: it is made in an `autograd.Function`'s forward


def make_plan(
    tracer: Tracer, frame: Frame, output: Any, inputs: Sequence[Tag], arguments: Sequence[Tensor]
) -> Plan:
    """Boil down what the tracer saw of one call.

    Args:
        tracer: which has just seen the call end.
        frame: of the call.
        output: what it returned.
        inputs: what its tensor arguments carried.
        arguments: its tensor arguments.
    """
    by_origin: dict[int, Ref] = {}
    for index, tag in enumerate(inputs):
        if isinstance(tag, Flow) and tag.origin is not NOWHERE:
            by_origin.setdefault(id(tag.origin), Ref("input", "", index))

    known = dict(by_origin)

    def ref(origin: Origin) -> Ref:
        found = known.get(id(origin))
        if found is None:
            base = frame.counts[f"{origin.name}()" if origin.kind == "output" else origin.name]
            call = origin.call - base
            found = Ref(origin.kind, origin.name, call, origin.claimed, origin.made)
            known[id(origin)] = found
        return found

    returned = [(path, tracer.tag(t)) for path, t in leaves(output)]
    after = [tracer.tag(argument) for argument in arguments[: len(inputs)]]
    rewritten = [(n, t) for n, t in enumerate(after) if t is not inputs[n] and t != inputs[n]]
    escaping = {id(t.origin) for _, t in (*returned, *rewritten) if isinstance(t, Flow)}
    firings = tracer.firings[frame.firing :]
    retention = tracer.wants.retention
    _mark_shared(tracer.events[frame.start :], bool(retention))
    made = _Made(lambda firing: _step(firing, ref, escaping, retention, frame.position))
    read = _Reading(firings, made)
    # Where a function that a scope is tapped for is called by other modules, too.
    tapped_names = {s.function for s in read.at if s is not None and s.module is None}
    called = {
        f.scope for f in firings if f.module is None and f.function and _name(f) in tapped_names
    }

    def by_place(tag: Tag) -> PlaceTag:
        if isinstance(tag, Flow):
            return FlowRef(ref(tag.origin) if tag.origin is not NOWHERE else None, tag.axes)
        return _weight_ref(tag, inputs, tracer.names) if tag is not None else None

    keeping = frozenset(
        module
        for module in read.direct
        if any(s and s.keeps and s.module is module for s in read.at)
    )
    return Plan(
        steps=tuple(read.steps),
        order=read.order,
        at=read.at,
        spare=frozenset(range(len(read.order))).difference(s.at for s in read.steps),
        last=_last(read.steps),
        taps=frozenset(read.tapped),
        direct=read.direct,
        sites=read.sites,
        scopes=frozenset(read.scopes),
        toggles=frozenset(
            f.module
            for f in firings
            if f.module is not None
            and f.parent in read.scopes
            and _to_be_left_alone(f.module, called)
        ),
        before=frozenset(
            s.module
            for s in read.at
            if s and s.module and (s.shared or any(e.before for e in s.emissions))
        )
        - keeping,
        keeping=keeping,
        keeps=any(s.keeps for s in read.steps),
        shares=any(s.shared for s in read.steps),
        calls=tuple(
            (n, c - frame.counts[n]) for n, c in tracer.counts.items() if c > frame.counts[n]
        ),
        outputs=tuple((path, by_place(tag)) for path, tag in returned),
        writes=tuple(i for i, t in enumerate(arguments) if _storage(t) in tracer.aliases.written),
        rewritten=tuple((index, by_place(tag)) for index, tag in rewritten),
        claims=tuple(
            sorted({by_origin[i].offset for i in by_origin if _claimed_inside(tracer, frame, i)})
        ),
        graph=any(e.graph for e in tracer.events[frame.start :]),
        joins=any(e.joins for e in tracer.events[frame.start :]),
    )


def _weight_ref(tag: Weight, inputs: Sequence[Tag], names: Names) -> WeightRef | None:
    for place, given in enumerate(inputs):
        if isinstance(given, Weight) and given.parameter is tag.parameter:
            return WeightRef(given=place)
    owners = names.owners(tag.parameter)
    return WeightRef(-1, *owners[0], tag.axes) if owners else None


def _to_be_left_alone(module: nn.Module, called: set[nn.Module]) -> bool:
    """Whether the light mode must, or had better, be off in a child of a scope.

    A leaf calls one function or two: letting them through costs less than two more hooks.
    """
    if module._modules or module_sigma(module) is not None or layers.is_registered(module):
        return True
    return module in called


def _claimed_inside(tracer: Tracer, frame: Frame, origin: int) -> bool:
    return any(e.kind == "sigma" and id(e.origin) == origin for e in tracer.events[frame.start :])


def _emits(firing: Firing) -> bool:
    return any(e.entries for e in firing.events) or _is_shared(firing)


def _name(firing: Firing) -> str:
    """Of the function that ran; empty for a module."""
    return describe(firing.function).name if firing.module is None else ""


def _step(firing: Firing, ref: Any, escaping: set[int], retention: Retention, start: int) -> Step:
    emissions = []
    for event in firing.events:
        for slot, entry in event.entries:
            held = event.x_held if slot == "x" else event.y_held
            copied = entry.held is not None and entry.held.needs_copy
            if held is not None and slot in ("x", "y"):
                copied = held.needs_copy
            lost = slot == "x" and event.in_place
            emissions.append(
                Emission(
                    slot=slot,
                    kind=entry.kind,
                    ref=ref(entry.origin),
                    axes=entry.axes,
                    sigma=entry.sigma,
                    path=entry.path,
                    copy=copied or lost,
                    before=lost,  # where its memory cannot be kept
                    on_the_way=lost and held is not None and held.on_the_way,
                    picked=entry.picked,
                    place=_place(entry),
                    stored=entry.picked is not None or _is_changed(entry, retention),
                    pending=(
                        entry.kind == "preactivation"
                        and event.kind == "layer"
                        and id(entry.origin) in escaping
                    ),
                )
            )
    event0: Event | None = firing.events[0] if firing.events else None
    keeps = any(e.kept for e in firing.events)
    plain = "xy" if keeps else "".join(sorted({e.slot for e in emissions}))
    if (
        plain not in ("xy", "y")
        or (firing.module is None and (keeps or _is_shared(firing)))
        or any(e.stored or ((e.copy or e.before) and not (keeps and e.before)) for e in emissions)
        or any(e.key is not None for e in firing.events)
        or any(e.kind == "output" for e in emissions)
    ):
        plain = ""
    return Step(
        module=firing.module,
        function=_name(firing),
        place=event0.place if event0 is not None else 0,
        key=event0.key if event0 is not None else None,
        emissions=tuple(emissions),
        plain=plain,
        keeps=keeps,
        shared=_is_shared(firing),
        position=firing.position - start,
    )


def _is_changed(entry: Entry, retention: Retention) -> bool:
    """Whether a map is stored in another form than the model's own."""
    if not retention or entry.held is None or entry.held.tensor is None:
        return bool(retention)
    return retention.changes(entry.held.tensor)


def _direct(steps: list[Step]) -> dict[nn.Module, str]:
    found: dict[nn.Module, str] = {}
    for step in steps:
        if step.module is not None:
            found[step.module] = (
                step.plain if found.get(step.module, step.plain) == step.plain else ""
            )
    return {module: how for module, how in found.items() if how}


class _Made(dict[Firing, Step]):
    """The steps of firings, each made when it is asked for: most modules are not tapped.

    Args:
        make: a firing's step.
    """

    def __init__(self, make: Callable[[Firing], Step]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, firing: Firing) -> Step:
        step = self[firing] = self._make(firing)
        return step


class _Reading:
    """Which firings are tapped, and what is read at each.

    Args:
        firings: all of the unit's.
        made: the step of each.

    Attributes:
        tapped: modules whose end is tapped.
        direct: those whose taps note tensors as they are, and which ones.
        sites: of calls of functions that are tapped where they are written.
        scopes: modules in which such a place is not to be had, watched by the light mode.
        order: what fires, in order.
        at: the step of each.
        steps: all steps, in order of execution.
    """

    def __init__(self, firings: Sequence[Firing], made: _Made) -> None:
        functions = [f for f in firings if f.module is None and _emits(f)]
        self.tapped = {f.module for f in firings if f.module is not None and _emits(f)}
        self.direct = _direct([made[f] for f in firings if f.module in self.tapped])
        names: dict[str, set[str]] = {}
        for firing in functions:
            if firing.site is not None:
                names.setdefault(firing.site, set()).add(_name(firing))
        self.sites: dict[str, frozenset[str]] = {s: frozenset(n) for s, n in names.items()}
        self.scopes: set[nn.Module] = set()
        if any(f.site is None for f in functions):
            self.sites = {}
            self.scopes = {f.scope for f in functions}
        self._called = {_name(f) for f in firings if f.events and self._in_scope(f)}
        self.order: list[Any] = []
        self.at: list[Step | None] = []
        for firing in firings:
            if self._fires(firing):
                self.at.append(replace(made[firing], at=len(self.order)))
                self.order.append(firing.site if self._at_site(firing) else firing.module)
        self.steps = [step for step in self.at if step is not None]

    def _fires(self, firing: Firing) -> bool:
        if firing.module is not None:
            return firing.module in self.tapped
        if self.sites:
            return self._at_site(firing)
        # The light mode knows functions by name: it sees a product that is no layer, too.
        return self._in_scope(firing) and _name(firing) in self._called

    def _at_site(self, firing: Firing) -> bool:
        if firing.module is not None or firing.site is None:
            return False
        return _name(firing) in self.sites.get(firing.site, ())

    def _in_scope(self, firing: Firing) -> bool:
        return firing.module is None and firing.scope in self.scopes


def _last(steps: Sequence[Step]) -> tuple[tuple[int, ...], ...]:
    by_place = {s.at: n for n, s in enumerate(steps)}
    found: list[list[int]] = [[] for _ in steps]
    for place, n in by_place.items():
        found[n].append(place)
    return tuple(map(tuple, found))


def _place(entry: Entry) -> Place | None:
    if entry.axes is None or entry.picked is None:
        return None
    return Wants.place(entry.axes, entry.picked)


def _mark_shared(events: Sequence[Event], stored: bool) -> None:
    """Note of each σ that leaves memory to us whether other maps lie in it, too.

    What is stored in another form may still be read from there by then.
    """
    holders: dict[int, dict[int, list[Held]]] = {}
    for number, event in enumerate(events):
        for _, entry in event.entries:
            if entry.held is not None and entry.held.tensor is not None:
                there = holders.setdefault(_storage(entry.held.tensor), {})
                there.setdefault(number, []).append(entry.held)
    for number, event in enumerate(events):
        z = event.x_held.tensor if event.kept and event.x_held is not None else None
        others = {} if z is None else holders.get(_storage(z), {})
        event.shared = any(n != number for n in others)
        if event.shared and stored:
            for held in [h for each in others.values() for h in each]:
                held.doomed = True


def _is_shared(firing: Firing) -> bool:
    return any(e.shared for e in firing.events)


_COMPARED = [f.name for f in fields(Plan)]


def alike(a: Plan, b: Plan) -> bool:
    """Whether two plans, made on inputs of other sizes, say the same."""
    return all(getattr(a, name) == getattr(b, name) for name in _COMPARED)
