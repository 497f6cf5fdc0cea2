"""Make a plan of one traced call of a region: what is read at each hook point, in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fmapkit import layers
from fmapkit.nonlinearities import module_sigma
from fmapkit.provenance import Label, buffers_of, describe, is_same
from fmapkit.replay.effects import Relations
from fmapkit.replay.plan import IN_KERNEL, KernelSteps, MapSpec, Plan, Step
from fmapkit.selection import Selection
from fmapkit.storage import MapRecord, Place, StorageConversion, StoredTensor
from fmapkit.torchlib.fused.paths import fuses
from fmapkit.torchlib.memory import storage_of
from fmapkit.torchlib.nested import leaves
from fmapkit.tracing import Event, Frame, FusedCall, HookPoint, Tracer


def make_plan(
    tracer: Tracer,
    frame: Frame,
    output: Any,
    inputs: Sequence[Label],
    arguments: Sequence[Tensor],
    kept: Sequence[tuple[str, Tensor]],
) -> Plan:
    """Boil down what the tracer saw of one call.

    Args:
        inputs: what its tensor arguments carried.
        arguments: its tensor arguments.
        kept: what it has left in attributes of modules, where the rest of the pass may read it.
    """
    trace, record = tracer.trace, tracer.trace.record
    events = record.events[frame.start :]
    returned = [(path, trace.labels.of(t)) for path, t in (*leaves(output), *kept)]
    after = [trace.labels.of(argument) for argument in arguments[: len(inputs)]]
    rewritten = [(n, t) for n, t in enumerate(after) if not is_same(t, inputs[n])]
    relations = Relations(trace.names, inputs, returned, frame.counts, rewritten)
    hook_points, conversion = record.hook_points[frame.hook_point :], trace.wants.conversion
    _mark_shared(events, bool(conversion))
    fused = [call for call in trace.fused if call.start >= frame.hook_point]
    read = Reading(hook_points, relations, conversion, frame.position, fused, frame.hook_point)
    keeping = read.keeping()
    return Plan(
        steps=tuple(read.steps),
        order=read.order,
        at=read.at,
        spare=frozenset(range(len(read.order))).difference(s.at for s in read.steps),
        taps=frozenset(read.tapped),
        direct=read.direct,
        sites=read.sites,
        plain_sites=read.plain_sites,
        scopes=frozenset(read.scopes),
        toggles=read.toggles(hook_points),
        before=read.before() - keeping,
        keeping=keeping,
        fusing=read.fusing(hook_points),
        kernels=read.kernels,
        edited=frozenset(trace.names.by_name[name] for name, *_ in trace.placed),
        placed={
            place: (axes, changed, position - frame.position)
            for place, (axes, changed, position) in trace.placed.items()
        },
        keeps=any(s.keeps for s in read.steps),
        shares=any(s.shared for s in read.steps),
        effects=relations.effects(record, events, arguments, frame.writes),
        graph=any(e.graph for e in events),
        buffers=buffers_of(relations.made()),
        joins=any(e.joins for e in events),
        mixed=tuple(trace.mixed),
        copies_written=record.aliases.copies_written,
    )


class Reading:
    """Which hook points are tapped, and what is read at each, as a `Plan` has it.

    Args:
        hook_points: all of the call's.
        start: how many decisions had been taken when the call began.
        fused: the calls in it whose maps are their fused kernels'.
        first: which hook point of the pass is the first of these.
    """

    def __init__(
        self,
        hook_points: Sequence[HookPoint],
        relations: Relations,
        conversion: StorageConversion,
        start: int,
        fused: Sequence[FusedCall],
        first: int,
    ) -> None:
        inside = {id(f): c for c in fused for f in hook_points[c.start - first : c.end - first]}
        emitting = [f for f in hook_points if f.events and _emits(f) and id(f) not in inside]
        functions = [f for f in emitting if f.module is None]
        self.tapped = {f.module for f in emitting if f.module is not None}
        self._calling = {f.scope for f in functions}
        names: dict[str, set[str]] = {}
        for hook_point in functions:
            if hook_point.site is not None:
                names.setdefault(hook_point.site, set()).add(_name_of(hook_point))
        self.sites: dict[str, frozenset[str]] = {s: frozenset(n) for s, n in names.items()}
        self.scopes: set[nn.Module] = set()
        if any(f.site is None for f in functions):
            self.sites = {}
            self.scopes = self._calling
        others = [f for f in hook_points if id(f) not in inside]
        self._called = {_name_of(f) for f in others if f.events and self._in_scope(f)}
        fired = [f for f in hook_points if (_emits(f) if id(f) in inside else self._fires(f))]
        self.order: list[Any] = [f.site if self._at_site(f) else f.module for f in fired]
        self.at: list[Step | None] = [
            _step(hook_point, relations, conversion, start, at)
            for at, hook_point in enumerate(fired)
        ]
        self.kernels: dict[int, KernelSteps] = {}
        for call in fused:
            own = [at for at, f in enumerate(fired) if inside.get(id(f)) is call]
            if own:
                self.kernels[own[0]] = self._kernel(call, [fired[at] for at in own], own)
        self.steps = [step for step in self.at if step is not None]
        self.direct = _direct(self.steps)
        self.plain_sites = _plain_sites(self.sites, zip(self.order, self.at, strict=True))

    def keeping(self) -> frozenset[nn.Module]:
        """In-place nonlinearities that leave z's memory to us, if they can."""
        keeps = {s.module for s in self.steps if s.keeps}
        return frozenset(module for module in self.direct if module in keeps)

    def before(self) -> frozenset[nn.Module]:
        """Modules that need a look before their call, which overwrites what is held."""
        overwriting = (s for s in self.steps if s.shared or any(e.before for e in s.map_specs))
        return frozenset(s.module for s in overwriting if s.module is not None)

    def toggles(self, hook_points: Sequence[HookPoint]) -> frozenset[nn.Module]:
        """Children of scopes in which the light mode must, or had better, be off.

        A leaf calls one function or two: letting them through costs less than two more hooks, but
        where a function that a scope is tapped for is called by others, too.
        """
        if not self.scopes:
            return frozenset()
        tapped = {s.function for s in self.steps if s.module is None}
        called = {f.scope for f in hook_points if f.function and _name_of(f) in tapped}
        inside = {f.module for f in hook_points if f.module is not None and f.parent in self.scopes}
        return frozenset(m for m in inside if m in called or _opens_on_others(m))

    def fusing(self, hook_points: Sequence[HookPoint]) -> frozenset[nn.Module]:
        """Modules with a fused path inside of which something is read."""
        found = {f.module for f in hook_points if f.module is not None and fuses(f.module)}
        read = self.tapped | self._calling
        inside = {m: set(m.modules()) - {m} for m in found}
        shown = {kernel.module for kernel in self.kernels.values()}
        return frozenset(m for m in found if m in self._calling or inside[m] & read) | shown

    def _kernel(
        self, call: FusedCall, hook_points: Sequence[HookPoint], places: Sequence[int]
    ) -> KernelSteps:
        """Have what fires in a module be handed over by its kernel; which of its maps that are."""
        names = []
        for at, hook_point in zip(places, hook_points, strict=True):
            held = [event.held(slot) for event in hook_point.events for slot, _ in event.entries]
            names.append(tuple(call.names[id(one)] for one in held))
            self.order[at] = IN_KERNEL
            step = self.at[at]
            assert step is not None
            # Nobody else has what the kernel shows, so nobody writes to it.
            alone = [replace(e, copy=False, before=False, on_the_way=False) for e in step.map_specs]
            self.at[at] = replace(
                step, module=None, function="", plain="", map_specs=tuple(alone), shared=False
            )
        return KernelSteps(call.module, tuple(names), frozenset(n for each in names for n in each))

    def _fires(self, hook_point: HookPoint) -> bool:
        if hook_point.module is not None:
            return hook_point.module in self.tapped
        if self.sites:
            return self._at_site(hook_point)
        # The light mode knows functions by name: it sees a product that is no layer, too.
        return self._in_scope(hook_point) and _name_of(hook_point) in self._called

    def _at_site(self, hook_point: HookPoint) -> bool:
        if hook_point.module is not None or hook_point.site is None:
            return False
        return _name_of(hook_point) in self.sites.get(hook_point.site, ())

    def _in_scope(self, hook_point: HookPoint) -> bool:
        return hook_point.module is None and hook_point.scope in self.scopes


def _step(
    hook_point: HookPoint, relations: Relations, conversion: StorageConversion, start: int, at: int
) -> Step:
    map_specs = tuple(
        _spec(event, slot, entry, relations, conversion)
        for event in hook_point.events
        for slot, entry in event.entries
    )
    first: Event | None = hook_point.events[0] if hook_point.events else None
    keeps = any(e.kept for e in hook_point.events)
    return Step(
        module=hook_point.module,
        function=_name_of(hook_point),
        place=first.place if first is not None else 0,
        key=first.key if first is not None else None,
        map_specs=map_specs,
        plain=_plain(hook_point, map_specs, keeps),
        keeps=keeps,
        shared=_is_shared(hook_point),
        position=hook_point.position - start,
        at=at,
    )


def _spec(
    event: Event,
    slot: str,
    entry: MapRecord,
    relations: Relations,
    conversion: StorageConversion,
) -> MapSpec:
    """A map of an event, as any such call has it."""
    held = event.held(slot)
    copied = entry.held is not None and entry.held.needs_copy
    if held is not None and slot in ("x", "y"):
        copied = held.needs_copy
    lost = slot == "x" and event.in_place
    return MapSpec(
        slot=slot,
        kind=entry.kind,
        ref=relations.ref(entry.origin),
        axes=entry.axes,
        sigma=entry.sigma,
        path=entry.path,
        copy=copied or lost,
        before=lost,  # where its memory cannot be kept
        on_the_way=lost and held is not None and held.on_the_way,
        picked=entry.picked,
        place=_place(entry),
        stored=entry.picked is not None or _is_changed(entry, conversion),
        pending=relations.pending(entry, event),
    )


def _plain(hook_point: HookPoint, map_specs: Sequence[MapSpec], keeps: bool) -> str:
    """Which of x and y a tap notes as they are; empty where there is more to do."""
    plain = "xy" if keeps else "".join(sorted({e.slot for e in map_specs}))
    if (
        plain not in ("xy", "y")
        or (hook_point.module is None and _is_shared(hook_point))
        or any(e.stored or ((e.copy or e.before) and not (keeps and e.before)) for e in map_specs)
        or any(e.key is not None for e in hook_point.events)
        or any(e.kind == "output" for e in map_specs)
    ):
        return ""
    return plain


def _is_changed(entry: MapRecord, conversion: StorageConversion) -> bool:
    """Whether a map is stored in another form than the model's own."""
    if not conversion or entry.held is None or entry.held.tensor is None:
        return bool(conversion)
    return conversion.changes(entry.held.tensor)


def _place(entry: MapRecord) -> Place | None:
    if entry.axes is None or entry.picked is None:
        return None
    return Selection.place(entry.axes, entry.picked)


def _direct(steps: list[Step]) -> dict[nn.Module, str]:
    found: dict[nn.Module, str] = {}
    for step in steps:
        if step.module is not None:
            found[step.module] = (
                step.plain if found.get(step.module, step.plain) == step.plain else ""
            )
    return {module: how for module, how in found.items() if how}


def _plain_sites(
    sites: Mapping[str, frozenset[str]], fired: Iterable[tuple[Any, Step | None]]
) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for key, step in fired:
        if key in sites and step is not None:
            found.setdefault(key, set()).add(_how(step))
    mixed = {"y", "nothing"}
    plain = {s: "y, if asked" for s, how in found.items() if how == mixed}
    plain |= {s: how.pop() for s, how in found.items() if len(how) == 1}
    return {site: how for site, how in plain.items() if how and len(sites[site]) == 1}


def _how(step: Step) -> str:
    """How a `PlainSite` notes a call; empty where there is more to do than it does."""
    if not (step.map_specs or step.shared or step.keeps):
        return "nothing"
    if step.plain == "y" and not step.keeps:
        return "y"
    usual = step.plain if not step.place and step.key is None else ""
    return "kept" if usual and step.keeps else usual


def _opens_on_others(module: nn.Module) -> bool:
    """Whether more runs in a module than a function or two that are of no matter."""
    return bool(module._modules) or module_sigma(module) is not None or layers.is_registered(module)


def _emits(hook_point: HookPoint) -> bool:
    for event in hook_point.events:  # noqa: SIM110  (a generator costs more than the question)
        if event.entries or event.shared:
            return True
    return False


def _is_shared(hook_point: HookPoint) -> bool:
    for event in hook_point.events:  # noqa: SIM110
        if event.shared:
            return True
    return False


def _name_of(hook_point: HookPoint) -> str:
    """Of the function that ran; empty for a module."""
    return describe(hook_point.function).name if hook_point.module is None else ""


def _mark_shared(events: Sequence[Event], stored: bool) -> None:
    """Note of each σ that leaves memory to us whether other maps lie in it, too.

    What is stored in another form may still be read from there by then.
    """
    if not any(event.kept for event in events):
        return
    holders: dict[int, dict[int, list[StoredTensor]]] = {}
    for number, event in enumerate(events):
        for _, entry in event.entries:
            if entry.held is not None and entry.held.tensor is not None:
                there = holders.setdefault(storage_of(entry.held.tensor), {})
                there.setdefault(number, []).append(entry.held)
    for number, event in enumerate(events):
        z = event.x_held.tensor if event.kept and event.x_held is not None else None
        others = {} if z is None else holders.get(storage_of(z), {})
        event.shared = any(n != number for n in others)
        if event.shared and stored:
            for held in [h for each in others.values() for h in each]:
                held.doomed = True
