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
    firings, retention = record.firings[frame.firing :], trace.wants.retention
    _mark_shared(events, bool(retention))
    fused = [call for call in trace.fused if call.start >= frame.firing]
    read = Reading(firings, relations, retention, frame.position, fused, frame.firing)
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
        toggles=read.toggles(firings),
        before=read.before() - keeping,
        keeping=keeping,
        fusing=read.fusing(firings),
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
    )


class Reading:
    """Which hook points are tapped, and what is read at each, as a `Plan` has it.

    Args:
        firings: all of the call's.
        start: how many decisions had been taken when the call began.
        fused: the calls in it whose maps are their fused kernels'.
        first: which hook point of the pass is the first of these.
    """

    def __init__(
        self,
        firings: Sequence[HookPoint],
        relations: Relations,
        retention: StorageConversion,
        start: int,
        fused: Sequence[FusedCall],
        first: int,
    ) -> None:
        inside = {id(f): c for c in fused for f in firings[c.start - first : c.end - first]}
        emitting = [f for f in firings if f.events and _emits(f) and id(f) not in inside]
        functions = [f for f in emitting if f.module is None]
        self.tapped = {f.module for f in emitting if f.module is not None}
        self._calling = {f.scope for f in functions}
        names: dict[str, set[str]] = {}
        for firing in functions:
            if firing.site is not None:
                names.setdefault(firing.site, set()).add(_name_of(firing))
        self.sites: dict[str, frozenset[str]] = {s: frozenset(n) for s, n in names.items()}
        self.scopes: set[nn.Module] = set()
        if any(f.site is None for f in functions):
            self.sites = {}
            self.scopes = self._calling
        others = [f for f in firings if id(f) not in inside]
        self._called = {_name_of(f) for f in others if f.events and self._in_scope(f)}
        fired = [f for f in firings if (_emits(f) if id(f) in inside else self._fires(f))]
        self.order: list[Any] = [f.site if self._at_site(f) else f.module for f in fired]
        self.at: list[Step | None] = [
            _step(firing, relations, retention, start, at) for at, firing in enumerate(fired)
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
        overwriting = (s for s in self.steps if s.shared or any(e.before for e in s.emissions))
        return frozenset(s.module for s in overwriting if s.module is not None)

    def toggles(self, firings: Sequence[HookPoint]) -> frozenset[nn.Module]:
        """Children of scopes in which the light mode must, or had better, be off.

        A leaf calls one function or two: letting them through costs less than two more hooks, but
        where a function that a scope is tapped for is called by others, too.
        """
        if not self.scopes:
            return frozenset()
        tapped = {s.function for s in self.steps if s.module is None}
        called = {f.scope for f in firings if f.function and _name_of(f) in tapped}
        inside = {f.module for f in firings if f.module is not None and f.parent in self.scopes}
        return frozenset(m for m in inside if m in called or _opens_on_others(m))

    def fusing(self, firings: Sequence[HookPoint]) -> frozenset[nn.Module]:
        """Modules with a fused path inside of which something is read."""
        found = {f.module for f in firings if f.module is not None and fuses(f.module)}
        read = self.tapped | self._calling
        inside = {m: set(m.modules()) - {m} for m in found}
        shown = {kernel.module for kernel in self.kernels.values()}
        return frozenset(m for m in found if m in self._calling or inside[m] & read) | shown

    def _kernel(
        self, call: FusedCall, firings: Sequence[HookPoint], places: Sequence[int]
    ) -> KernelSteps:
        """Have what fires in a module be handed over by its kernel; which of its maps that are."""
        names = []
        for at, firing in zip(places, firings, strict=True):
            held = [event.held(slot) for event in firing.events for slot, _ in event.entries]
            names.append(tuple(call.names[id(one)] for one in held))
            self.order[at] = IN_KERNEL
            step = self.at[at]
            assert step is not None
            # Nobody else has what the kernel shows, so nobody writes to it.
            alone = [replace(e, copy=False, before=False, on_the_way=False) for e in step.emissions]
            self.at[at] = replace(
                step, module=None, function="", plain="", emissions=tuple(alone), shared=False
            )
        return KernelSteps(call.module, tuple(names), frozenset(n for each in names for n in each))

    def _fires(self, firing: HookPoint) -> bool:
        if firing.module is not None:
            return firing.module in self.tapped
        if self.sites:
            return self._at_site(firing)
        # The light mode knows functions by name: it sees a product that is no layer, too.
        return self._in_scope(firing) and _name_of(firing) in self._called

    def _at_site(self, firing: HookPoint) -> bool:
        if firing.module is not None or firing.site is None:
            return False
        return _name_of(firing) in self.sites.get(firing.site, ())

    def _in_scope(self, firing: HookPoint) -> bool:
        return firing.module is None and firing.scope in self.scopes


def _step(
    firing: HookPoint, relations: Relations, retention: StorageConversion, start: int, at: int
) -> Step:
    emissions = tuple(
        _spec(event, slot, entry, relations, retention)
        for event in firing.events
        for slot, entry in event.entries
    )
    first: Event | None = firing.events[0] if firing.events else None
    keeps = any(e.kept for e in firing.events)
    return Step(
        module=firing.module,
        function=_name_of(firing),
        place=first.place if first is not None else 0,
        key=first.key if first is not None else None,
        emissions=emissions,
        plain=_plain(firing, emissions, keeps),
        keeps=keeps,
        shared=_is_shared(firing),
        position=firing.position - start,
        at=at,
    )


def _spec(
    event: Event,
    slot: str,
    entry: MapRecord,
    relations: Relations,
    retention: StorageConversion,
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
        stored=entry.picked is not None or _is_changed(entry, retention),
        pending=relations.pending(entry, event),
    )


def _plain(firing: HookPoint, emissions: Sequence[MapSpec], keeps: bool) -> str:
    """Which of x and y a tap notes as they are; empty where there is more to do."""
    plain = "xy" if keeps else "".join(sorted({e.slot for e in emissions}))
    if (
        plain not in ("xy", "y")
        or (firing.module is None and _is_shared(firing))
        or any(e.stored or ((e.copy or e.before) and not (keeps and e.before)) for e in emissions)
        or any(e.key is not None for e in firing.events)
        or any(e.kind == "output" for e in emissions)
    ):
        return ""
    return plain


def _is_changed(entry: MapRecord, retention: StorageConversion) -> bool:
    """Whether a map is stored in another form than the model's own."""
    if not retention or entry.held is None or entry.held.tensor is None:
        return bool(retention)
    return retention.changes(entry.held.tensor)


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
    if not (step.emissions or step.shared or step.keeps):
        return "nothing"
    if step.plain == "y" and not step.keeps:
        return "y"
    usual = step.plain if not step.place and step.key is None else ""
    return "kept" if usual and step.keeps else usual


def _opens_on_others(module: nn.Module) -> bool:
    """Whether more runs in a module than a function or two that are of no matter."""
    return bool(module._modules) or module_sigma(module) is not None or layers.is_registered(module)


def _emits(firing: HookPoint) -> bool:
    for event in firing.events:  # noqa: SIM110  (a generator costs more than the question)
        if event.entries or event.shared:
            return True
    return False


def _is_shared(firing: HookPoint) -> bool:
    for event in firing.events:  # noqa: SIM110
        if event.shared:
            return True
    return False


def _name_of(firing: HookPoint) -> str:
    """Of the function that ran; empty for a module."""
    return describe(firing.function).name if firing.module is None else ""


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
