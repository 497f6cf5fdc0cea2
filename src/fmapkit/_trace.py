"""Learn: watch one pass, op by op, and know what ran, whose it is, and what gets overwritten.

The tracer is a `TorchFunctionMode`: it sees each torch function before it runs, above autograd and
whatever module it is called in. Module frames, pushed and popped by hooks, tell where. What it
records are `Event`s (a nonlinearity, a layer, a wanted output), each with the maps held of it.

In-place nonlinearities: while a proven module is learned, `relu_(x)` is tried out of place, so that
x stays z. That is the same to the model only if nobody looks at the old x again. So the tracer
keeps x under suspicion: whoever reads it gets the new tensor instead, which is what x would have
become, and from then on that site gets a copy of z and its true in-place run.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fmapkit import _vocabulary as words
from fmapkit import _weighted, layers, nonlinearities
from fmapkit._aside import operators_are_counted
from fmapkit._axes import Axes
from fmapkit._edit import Edits
from fmapkit._editing import Editor, Site
from fmapkit._flow import carried
from fmapkit._functions import RESHAPED_IN_PLACE, Function, describe, out_of_place
from fmapkit._gradients import NO_GRAPH, in_function
from fmapkit._names import Names
from fmapkit._nested import leaves, tensors_in
from fmapkit._origin import NOWHERE, STOP, Flow, Origin, Tag, Weight
from fmapkit._sharded import is_dtensor, local_axes
from fmapkit._stop import Stop
from fmapkit._store import Aliases, Entry, Held, Pass, storage_of, storage_users, version_of
from fmapkit._wants import Wants

__all__ = ["Event", "Firing", "Frame", "SigmaCall", "Tracer"]

_CALL = nn.Module._call_impl.__code__
# Nonlinearities whose in-place form has the same derivative formula, bit for bit. That of the ELU
# and leaky ReLU families is computed from a instead of z (torch, tools/autograd/derivatives.yaml).
SAME_GRADIENT = {
    *("relu", "relu6", "hardtanh", "sigmoid", "tanh", "silu", "hardswish", "mish", "hardsigmoid"),
    "threshold",
}
# How many firings back the operand of a function is looked for.
_NEAR = 32
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# How a tensor depends on a module's input; a tensor that does not depend on it has 0. The last is
# not pointwise, or random.
_LINEAR, _NONLINEAR, _OTHER = 1, 2, 3


class Event:
    """Something that ran and has maps: a nonlinearity, a layer, or a wanted output."""

    __slots__ = (
        *(
            "axes",
            "entries",
            "flip",
            "function",
            "key",
            "kind",
            "module",
            "origin",
            "place",
            "scope",
        ),
        *("sigma", "x", "x_held", "y", "y_held", "in_place", "firing", "graph"),
        *("delta", "sink", "source"),
    )

    def __init__(self, kind: str, scope: nn.Module, function: Any = None) -> None:
        self.kind = kind  # "sigma", "layer" or "output"
        self.scope = scope  # the module in whose own forward it ran
        self.function = function
        self.module: nn.Module | None = None  # the module whose call it is, if it is one
        self.key: str | None = None  # the keyword under which that module got x
        self.place = 0  # which of a function's tensor arguments x is
        self.origin = NOWHERE
        self.sigma: str | None = None
        self.axes: Axes | None = None
        self.x: Any = None  # until the frame ends, to see whether a module's call is this event
        self.y: Any = None
        self.x_held: Held | None = None
        self.y_held: Held | None = None
        self.flip = False  # an in-place σ that may run out of place
        self.in_place = False
        self.graph = False  # its result is part of an autograd graph
        self.firing: Firing | None = None
        # Of a function's x and y: the hooks that would see them, and how often x is written to
        # between the first and the function.
        self.source: Firing | None = None
        self.sink: Firing | None = None
        self.delta = 0
        self.entries: list[tuple[str, Entry]] = []  # ("x" | "y" | path, what is held)

    def drop(self) -> None:
        """The event turned out to be part of another one."""
        if self.firing is not None and self in self.firing.events:
            self.firing.events.remove(self)
        for _, entry in self.entries:
            entry.held = None
        self.entries.clear()


class Firing:
    """A moment at which a tap would fire: a module's call begins or ends, or a function's ends."""

    __slots__ = ("before", "events", "function", "module", "parent", "scope", "tensor", "version")

    def __init__(
        self,
        module: nn.Module | None,
        scope: nn.Module,
        function: Any,
        parent: nn.Module | None,
        tensor: Any = None,
        before: bool = False,
    ) -> None:
        self.module = module
        self.scope = scope
        self.function = function
        self.parent = parent  # the module that called the module
        self.before = before
        self.events: list[Event] = []
        # What the tap would see: the first argument, or the output.
        self.tensor = weakref.ref(tensor) if isinstance(tensor, Tensor) else None
        self.version = version_of(tensor) if isinstance(tensor, Tensor) else 0


class Frame:
    """One running call of a module."""

    __slots__ = (
        *("module", "args", "kwargs", "kind", "start", "x", "key", "x_held", "degrees"),
        *("reduces", "in_place", "flip", "tags", "storages", "a"),
        *("counts", "firing", "replaced", "site"),
    )

    def __init__(self, module: nn.Module, args: Any, kwargs: Any, start: int) -> None:
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.kind = "plain"  # "sigma", "candidate", "layer" (a registered, opaque one)
        self.start = start  # how many events there were
        self.x: Tensor | None = None
        self.a: Any = None  # what the σ function inside a registered σ module returned
        self.key: str | None = None
        self.x_held: Held | None = None
        self.degrees: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.reduces = False
        self.in_place = False
        self.flip = False
        self.tags: list[Tag] = []
        self.storages: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.firing = 0
        self.site: Site | None = None  # something to edit
        self.replaced: tuple[Any, Any] | None = None  # the arguments that it is to get instead

    def take(self, x: Tensor) -> None:
        """Another tensor came in."""
        if self.x is not None and id(self.x) in self.degrees:
            self.degrees[id(x)] = (weakref.ref(x), _LINEAR)
        self.x = x


class Tracer(TorchFunctionMode):
    """Sees one pass; see the module's docstring."""

    def __init__(
        self,
        names: Names,
        wants: Wants,
        edits: Edits,
        stop: Stop | None,
        current: Pass,
        miss: Callable[[str, str], None],
    ) -> None:
        super().__init__()
        self.names = names
        self.wants = wants
        self.current = current
        self.miss = miss
        self.edits = edits
        self.stop = stop
        self.editor = Editor(self, edits, self._probe)
        self.edited = False  # something was, or might have been, edited
        self.events: list[Event] = []
        self.firings: list[Firing] = []
        self.frames: list[Frame] = []
        self.counts: Counter[str] = Counter()
        self.aliases = Aliases(wants.detach, wants.gradients, self._lent)
        self.failed: BaseException | None = None
        self.unhooked: set[nn.Module] = set()  # modules that ran without hooks
        self.pending: dict[int, list[Entry]] = {}  # of replayed units, by origin
        self.paused = False  # while a unit is replayed
        self.trial = 0  # > 0 while a proven module is learned
        self._unpicked: list[tuple[Origin, bool]] = []  # DTensors, whose filters are on all ranks
        self._awaited: dict[int, tuple[weakref.ref[Tensor], int, Event]] = {}
        self._opaque = 0  # how many running modules are registered layers
        self._tags: dict[int, tuple[weakref.ref[Tensor], Tag]] = {}
        self._suspects: dict[int, tuple[weakref.ref[Tensor], Tensor, Any]] = {}

    def _probe(self) -> Tracer:
        """Another tracer, of which nothing is kept."""
        return Tracer(self.names, self.wants, Edits.none(), None, Pass(-1), lambda *_: None)

    # -- what a tensor carries ----------------------------------------------------------------

    def tag(self, value: Any) -> Tag:
        """Flow, weight, or None for a constant."""
        if not isinstance(value, Tensor):
            return None
        found = self._tags.get(id(value))
        if found is not None and found[0]() is value:
            # A piece of a flat parameter is the parameter that it was before.
            if not (isinstance(found[1], Weight) and self.names.in_flat(value)):
                return found[1]
        if self.names.is_parameter(value):
            return Weight(value, Axes.single(0, value.shape[0]) if value.dim() else None)
        return None

    def _lent(self, tensor: Tensor) -> bool:
        """Whether its memory is gone once its module has run: a parameter's, under FSDP."""
        if not isinstance(self.tag(tensor), Weight):
            return False
        return self.names.lent or bool(self.names.in_flat(tensor))

    def moved(self, before: Any, after: Any) -> None:
        """A hook of torch's redistributed tensors: what they carry goes along."""
        for (_, old), (_, new) in zip(leaves(before), leaves(after), strict=False):
            tag = self.tag(old)
            if old is not new and isinstance(tag, Flow):
                axes = local_axes(tag.axes, old, new)
                self.set_tag(new, Flow(tag.origin, axes))

    def set_tag(self, value: Any, tag: Any) -> None:
        """What a result carries; nested like the result."""
        if isinstance(value, Tensor):
            if isinstance(tag, (Flow, Weight)):
                self._tags[id(value)] = (weakref.ref(value), tag)
        elif isinstance(value, (tuple, list)) and isinstance(tag, list):
            for v, t in zip(value, tag, strict=False):
                self.set_tag(v, t)

    def enter_inputs(self, args: Any, kwargs: Any) -> None:
        """The pass begins: whatever comes in depends on the input, and has no layer yet."""
        for tensor in tensors_in(*args, kwargs):
            if self.tag(tensor) is None:
                self.set_tag(tensor, STOP)

    # -- every torch function -----------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = describe(func)
        if known.silent or self.paused or not self.frames or self.failed or _in_backward():
            return func(*args, **kwargs)
        if known.opened is not None:
            with self:
                return known.opened(*args, **kwargs)
        try:
            if self._suspects:
                args, kwargs = self._substitute(args), self._substitute(kwargs)
            if known.sigma is not None:
                call = self._before_sigma(known, func, args, kwargs)
                func, args, kwargs = call.function, call.args, call.kwargs
            else:
                call = None
                for target in known.writes(args, kwargs):
                    self.aliases.before_write(target)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.fail(error)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        try:
            if call is not None:
                out = self._after_sigma(known, call, out)
            else:
                out = self._after(known, func, args, kwargs, out)
        except Exception as error:
            self.fail(error)
        if self.stop is not None and not self.trial:
            self.stop.check()
        return out

    def end(self) -> None:
        """Let go of all that could keep a tensor or a graph alive, without waiting for Python's gc.

        The tracer and its editor know each other, and so do events and firings.
        """
        for origin, unless_claimed in self._unpicked:
            if not (unless_claimed and origin.claimed):
                self.miss(origin.name, "filters= was given, and some may lie on another rank")
        self._unpicked.clear()
        for event in self.events:
            event.x = event.y = event.x_held = event.y_held = event.firing = None
            event.source = event.sink = None
            event.entries.clear()
        self.events.clear()
        self.firings.clear()
        self._awaited.clear()
        self.aliases = Aliases(self.wants.detach)
        self.frames.clear()
        self._suspects.clear()
        self._tags.clear()
        self.pending.clear()

    def fail(self, error: BaseException) -> None:
        """A fault of our own: the rest of the pass is not captured, and `missed` says so."""
        if error is self.edits.raised:
            raise error  # the user's own function
        if self.failed is None:
            self.failed = error
            where = self.names.of(self.frames[-1].module) if self.frames else ""
            self.miss(where, f"fmapkit failed here: {type(error).__name__}: {error}")

    # -- nonlinearities -----------------------------------------------------------------------

    def _before_sigma(self, known: Function, func: Any, args: Any, kwargs: Any) -> SigmaCall:
        frame = self.frames[-1]
        z = tensors_in(*args, kwargs)[0]
        call = SigmaCall(func, args, kwargs, z, self.tag(z))
        in_place = known.in_place or known.asked_in_place(args, kwargs)
        quiet = frame.kind == "sigma" or self._opaque > 0
        if transformed(z):
            quiet = True
            self.miss(self.names.of(frame.module), TRANSFORMED)
        if self.editor and not quiet and known.sigma is not None:
            own = f"{self.names.of(frame.module)}:{known.sigma}"
            self.editor.before(call, own, known.sigma, in_place)
            if call.site is not None:
                call.held = self.aliases.reference(z)
                return call
        if "out" in kwargs:
            for target in tensors_in(kwargs["out"]):
                self.aliases.before_write(target)
            call.in_place = any(target is z for target in tensors_in(kwargs["out"]))
            call.held = (
                None
                if quiet
                else Held.copy(z, self.wants.detach, self.wants.gradients)
                if call.in_place
                else self.aliases.reference(z)
            )
            return call
        if not in_place:
            call.held = None if quiet else self.aliases.reference(z)
            return call
        call.in_place = True
        other = out_of_place(func, args, kwargs) if self._may_try(known, z) else None
        if other is not None:
            call.function, call.args, call.kwargs = other
            call.flip = True
            if not quiet:
                call.held = self.aliases.reference(z)
            return call
        self.aliases.before_write(z)
        if not quiet:
            call.held = Held.copy(z, self.wants.detach, self.wants.gradients)
        return call

    def _may_try(self, known: Function, z: Tensor) -> bool:
        """Whether an in-place σ may run out of place, on probation.

        Only while a proven module is learned; not on memory that came from outside of it, nor on
        memory that another tensor shares (our own aliases excepted): those would see the write.
        """
        if not self.trial or (z.is_leaf and z.requires_grad):
            return False
        if any(f.site is not None for f in self.frames):
            return False
        if torch.is_grad_enabled() and known.sigma not in SAME_GRADIENT:
            return False
        if operators_are_counted():
            return False
        storage = storage_of(z)
        if any(storage in f.storages for f in self.frames):
            return False
        ours = len(self.aliases.of(z)) if self.wants.detach else 0
        return storage_users(z) == 1 + ours

    def _after_sigma(self, known: Function, call: SigmaCall, out: Any) -> Any:
        frame = self.frames[-1]
        z, a = call.z, out
        flow = call.tag if isinstance(call.tag, Flow) else STOP
        self._degrees(known.name, (z,), {}, out, nonlinear=True)
        self.set_tag(out, Flow(NOWHERE, _renumbered(_sigma_axes(flow.axes, z, a))))
        if call.flip:
            frame.flip = frame.flip or z is frame.x
        if call.in_place and z is frame.x:
            frame.in_place = True
        if frame.kind == "sigma" and z is frame.x:
            frame.a = a
        if call.held is None or not isinstance(a, Tensor):
            if call.flip:
                self._suspect(z, a, frame)
            return out
        scope = self._scope()
        event = Event("sigma", scope, call.original)
        event.sigma = known.sigma
        event.flip = call.flip
        event.in_place = call.in_place
        if z is frame.x:
            event.x, event.y, event.key = z, a, frame.key
        if call.flip:
            self._suspect(z, a, event)
        own = f"{self.names.of(scope)}:{known.sigma}"
        if call.site is None:
            self._site(event, flow, call.held, z, a, own)
            if self.trial and not event.in_place and not self.wants.gradients:
                self._between(event, z, a)
            return out
        out = self.editor.after(call.site, a, _sigma_axes(flow.axes, z, a))
        self._site(event, flow, call.held, z, a, own, call.site)
        self.set_tag(out, self.tag(a))
        return out

    def _site(
        self,
        event: Event,
        flow: Flow,
        z_held: Held,
        z: Tensor,
        a: Tensor,
        own: str,
        edited: Site | None = None,
    ) -> None:
        """One nonlinearity has run: name its layer, hold its pair."""
        origin = flow.origin
        if origin.kind == "none":
            origin = Origin("own", own, self._count(own))
        else:
            self.claim(origin)
        event.origin = origin
        event.axes = flow.axes
        event.x_held = z_held
        event.y_held = self.aliases.reference(a)
        event.graph = a.requires_grad
        self.events.append(event)
        self._fire(event)
        if self.wants.layer(origin.name):
            a_axes = _sigma_axes(flow.axes, z, a)
            self._hold(event, "x", "preactivation", origin, z_held, flow.axes, event.sigma)
            self._hold(event, "y", "activation", origin, event.y_held, a_axes, event.sigma)
            if edited is not None:
                for _, entry in event.entries:
                    z_or_a = edited.z_edited if entry.kind == "preactivation" else edited.a_edited
                    entry.edited = self._same_filters(entry, z_or_a)
        self._spare(event)

    def _spare(self, event: Event) -> None:
        """Outside of units, what no map holds is let go at once: it may be a lot in the end."""
        if not self.trial and all(f.kind == "plain" for f in self.frames):
            self.let_go([event])

    def let_go(self, events: list[Event]) -> None:
        """Let go of the tensors that no map holds."""
        for event in events:
            for held in (event.x_held, event.y_held):
                if held is not None and not held.wanted:
                    held.release()

    def claim(self, origin: Origin) -> None:
        """The filters have reached a nonlinearity: what it receives is their preactivation."""
        if origin.claimed:
            return
        origin.claimed = True
        for event in reversed(self.events):
            if event.origin is origin and event.kind == "layer":
                for pair in [p for p in event.entries if p[1].kind == "preactivation"]:
                    pair[1].held = None
                    event.entries.remove(pair)
                return
        for entry in self.pending.pop(id(origin), ()):
            entry.held = None

    def _fire(self, event: Event) -> None:
        """Note when a tap of this event would fire: now, unless a module's end is such a moment."""
        if event.module is None:
            firing = Firing(None, event.scope, event.function, None)
            self.firings.append(firing)
        else:
            firing = self.firings[-1]
        firing.events.append(event)
        event.firing = firing

    def _between(self, event: Event, z: Tensor, a: Tensor) -> None:
        """A function between two modules: hooks on these would see its operand and its result."""
        for firing in reversed(self.firings[-_NEAR:]):
            if firing.tensor is not None and firing.tensor() is z:
                event.source = firing
                event.delta = version_of(z) - firing.version
                self._awaited[id(a)] = (weakref.ref(a), version_of(a), event)
                return

    def _passes(self, firing: Firing, tensor: Any) -> None:
        """A tap would fire; it may be the one that sees the result of a function."""
        self.firings.append(firing)
        found = self._awaited.pop(id(tensor), None) if self._awaited else None
        if found is not None and found[0]() is tensor and firing.version == found[1]:
            found[2].sink = firing

    def _scope(self) -> nn.Module:
        """The module that is running, from Python's own stack.

        Modules inside a unit have no hooks. When a scope calls one of them past the unit, no frame
        tells; its functions are seen all the same, and from the next pass on it has hooks.
        """
        module = self.frames[-1].module
        if self.trial:  # every module is hooked
            return module
        at = sys._getframe(2)
        while at is not None and at.f_code is not _CALL:
            at = at.f_back  # type: ignore[assignment]
        running: nn.Module | None = at.f_locals.get("self") if at is not None else None
        if running is None or running is module or running not in self.names.by_module:
            return module
        self.unhooked.add(running)
        return running

    def _count(self, name: str) -> int:
        self.counts[name] += 1
        return self.counts[name] - 1

    def _hold(
        self,
        event: Event,
        slot: str,
        kind: str,
        origin: Origin,
        held: Held,
        axes: Axes | None,
        sigma: str | None = None,
        path: str = "",
    ) -> None:
        if not self.wants.kind(kind) and kind != "output":
            return
        picked = None
        if self.wants.filters is not None and kind != "output":
            if is_dtensor(held.tensor):
                self._unpicked.append((origin, event.kind == "layer" and kind == "preactivation"))
                return
            picked = self.wants.pick(origin.name, axes)
            if picked is None:
                self.miss(origin.name, self.wants.why_not(origin.name, axes))
                return
            tensor = held.tensor
            assert tensor is not None and axes is not None
            gradient = held.gradient
            if gradient is not None:
                held.wanted = gradient.of_view  # to learn of a write to it
                gradient = gradient.picked(*self.wants.place(axes, picked))
            held = Held(self.wants.take(tensor, axes, picked), 0, True, gradient)
            held.version = version_of(held.tensor) if held.tensor is not None else 0
        held.wanted = True
        if self.wants.graph and self.current.grads and in_function():
            self.miss(origin.name, NO_GRAPH)
        entry = Entry(kind, origin, held, axes, sigma, path, picked)
        event.entries.append((slot, entry))
        self.current.segments.append(entry)
        if self.stop is not None:
            self.stop.saw(entry)

    def _same_filters(self, entry: Entry, held: Held | None) -> Held | None:
        """Of an edit, the filters that are held of the map."""
        if held is None or held.tensor is None or entry.picked is None or entry.axes is None:
            if held is not None:
                held.wanted = True
            return held
        return Held.copy(self.wants.take(held.tensor, entry.axes, entry.picked), False)

    # -- everything else ----------------------------------------------------------------------

    def _after(self, known: Function, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        name = known.name
        frame = self.frames[-1]
        if name in words.OPAQUE:
            self.miss(self.names.of(frame.module), words.OPAQUE[name])
        weight = _weighted.weight_operand(name, args, kwargs, self.tag)
        seen = not self._opaque and not transformed(out)
        if isinstance(weight, Tensor) and isinstance(out, Tensor) and seen:
            out = self._layer(known, func, args, kwargs, weight, out)
        else:
            tag = carried(name, args, kwargs, out, self.tag)
            if known.in_place and name in RESHAPED_IN_PLACE and tag is not None:
                tag = STOP
            if name in words.NORM_AXIS and isinstance(tag, Flow) and isinstance(out, Tensor):
                own = self.names.of(frame.module)
                tag = self._norm_tag(tag, out, words.NORM_AXIS[name], own)
            if tag is not None:
                if name == "__setitem__":
                    self.set_tag(args[0], tag)
                self.set_tag(out, tag)
        self._degrees(name, args, kwargs, out)
        return out

    def _layer(
        self, known: Function, func: Any, args: Any, kwargs: Any, weight: Tensor, out: Tensor
    ) -> Tensor:
        frame = self.frames[-1]
        tag = self.tag(weight)
        owner = tag.parameter if isinstance(tag, Weight) else None
        stack = [f.module for f in self.frames]
        name = self.names.layer_of(owner, stack)
        axes = _weighted.layer_axes(known.name, args, weight, out)
        if isinstance(tag, Weight):
            axes = _weighted.weight_slice(tag, weight, axes)
        place = _weighted.input_place(known.name, args, kwargs, weight)
        operands = tensors_in(*args, kwargs)
        x = operands[place] if place is not None else None
        event = Event("layer", self._scope(), func)
        event.place = place or 0
        if x is not None and x is frame.x:
            event.x, event.y, event.key = x, out, frame.key
        return self._layer_event(event, name, x, out, axes)

    def _layer_event(
        self, event: Event, name: str, x: Tensor | None, out: Tensor, axes: Axes | None
    ) -> Tensor:
        """Hold a layer's maps; what the layer is to return."""
        origin = Origin("layer", name, self._count(name))
        event.origin = origin
        event.axes = axes
        event.graph = out.requires_grad
        self.set_tag(out, Flow(origin, axes))
        self.events.append(event)
        self._fire(event)
        edit = self.editor.response(name, origin.call, out, axes) if self.editor else None
        if not self.wants.layer(name):
            return out if edit is None else edit[0]
        if x is not None and self.wants.kind("input"):
            flow = self.tag(x)
            x_axes = flow.axes if isinstance(flow, Flow) else None
            if x_axes is None and axes is not None and axes.dim is not None:
                place = axes.dim - out.dim()
                if x.dim() >= -place:
                    x_axes = Axes.single(x.dim() + place, x.shape[place])
            event.x_held = self.aliases.reference(x)
            if self.wants.filters is None:
                self._hold(event, "x", "input", origin, event.x_held, x_axes)
        if self.wants.kind("response") or self.wants.kind("preactivation"):
            event.y_held = self.aliases.reference(out)
            self._hold(event, "y", "response", origin, event.y_held, axes)
            self._hold(event, "y", "preactivation", origin, event.y_held, axes)
            for slot, entry in event.entries:
                if edit is not None and slot == "y":
                    entry.edited = self._same_filters(entry, edit[1])
        self._spare(event)
        return out if edit is None else edit[0]

    # -- which modules are one nonlinearity by hand -------------------------------------------

    def _degrees(
        self, name: str, args: Any, kwargs: Any, out: Any, nonlinear: bool = False
    ) -> None:
        """Follow, in a weightless module, what depends on its input: linearly or not."""
        for frame in self.frames:
            if frame.kind == "candidate":
                _candidate_step(frame, self.tag, name, args, kwargs, out, nonlinear)

    # -- frames -------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Frame:
        """A module's forward begins."""
        with torch._C.DisableTorchFunction():  # what we look at ourselves is not the model's doing
            return self._enter(module, args, kwargs)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Frame:
        frame = Frame(module, args, kwargs, len(self.events))
        frame.firing = len(self.firings)
        if self.trial:
            parent = self.frames[-1].module if self.frames else None
            given = args[0] if args else None
            self._passes(Firing(module, module, None, parent, given, before=True), given)
        self.frames.append(frame)
        if self._suspects:  # what the module is given, it will read
            args, kwargs = self._substitute(args), self._substitute(kwargs)
        frame.x, frame.key = _first_tensor(args, kwargs)
        if transformed(frame.x):
            self.miss(self.names.of(module), TRANSFORMED)
        elif layers.is_registered(module):
            frame.kind = "layer"
            self._opaque += 1
        elif nonlinearities.module_sigma(module) is not None:
            frame.kind = "sigma"
        elif frame.x is not None and _may_be_sigma(module, args, kwargs, frame.x):
            frame.kind = "candidate"
            frame.degrees[id(frame.x)] = (weakref.ref(frame.x), _LINEAR)
        if frame.kind in ("sigma", "candidate") and frame.x is not None:
            frame.x_held = self.aliases.reference(frame.x)
            frame.tags = [self.tag(frame.x)]
            if self.editor and not self._opaque:
                self.editor.enter(frame)
        return frame

    def leave(self, module: nn.Module, output: Any) -> Any:
        """A module's forward has ended.

        Returns:
            The output, with a tensor that an in-place σ would have changed replaced by what it
            would have become; None where nothing is to be replaced.
        """
        frame = None
        while self.frames and (frame is None or frame.module is not module):
            frame = self.frames.pop()  # several, where a forward caught an exception of a child
            self._opaque -= frame.kind == "layer"
        if frame is None or frame.module is not module:
            return None
        if self.failed:
            return None
        with torch._C.DisableTorchFunction():
            return self._leave(frame, output)

    def _leave(self, frame: Frame, output: Any) -> Any:
        module = frame.module
        replaced = None
        if self._suspects and any(id(t) in self._suspects for t in tensors_in(output)):
            replaced = output = self._substitute(output)
        parent = self.frames[-1].module if self.frames else None
        self._passes(Firing(module, module, None, parent, output), output)
        edited = self._close(frame, output)
        if edited is not None and edited is not output:
            replaced = output = edited
        if self.wants.output(module):
            self._output(module, output)
        return replaced

    def _close(self, frame: Frame, output: Any) -> Any:
        """Make the module's call an event, if it is one; what it is to return, if edited."""
        own = self.names.of(frame.module)
        mine = [e for e in self.events[frame.start :] if e.scope is frame.module]
        x, a = frame.x, output
        if frame.kind == "layer":
            for event in self.events[frame.start :]:
                event.drop()
            del self.events[frame.start :]
            if isinstance(a, Tensor):
                event = Event("layer", frame.module)
                event.module, event.key = frame.module, frame.key
                dim = (layers.layer_axis(frame.module) or 0) % max(a.dim(), 1)
                axes = Axes.single(dim, a.shape[dim]) if a.dim() else None
                return self._layer_event(event, own, x, a, axes)
            return None
        sigma = self.verdict(frame, output)
        if sigma is not None and x is not None and frame.x_held is not None:
            for event in self.events[frame.start :]:
                event.drop()
            del self.events[frame.start :]
            event = Event("sigma", frame.module)
            event.module, event.key, event.sigma = frame.module, frame.key, sigma
            # Only torch's own modules have a flag that makes the same σ run out of place.
            own_flag = "inplace" in frame.module.__dict__ and _is_torchs(frame.module)
            event.flip = frame.flip and own_flag
            if frame.flip and not own_flag:
                for held in self.aliases.of(x):
                    held.doomed = True
            event.in_place = frame.in_place or frame.x_held.copied
            if frame.flip and id(x) in self._suspects:
                self._suspect(x, a, event)
            flow = frame.tags[0] if isinstance(frame.tags[0], Flow) else STOP
            if frame.site is not None:
                axes = _sigma_axes(flow.axes, x, a)
                a, result = self.editor.leave(frame, a, axes)
                self._site(event, flow, frame.x_held, x, a, own, frame.site)
                self.set_tag(result, Flow(NOWHERE, _renumbered(axes)))
                return result
            if frame.a is not None and frame.a is not a and isinstance(frame.a, Tensor):
                # A user's hook changed what the module returned: a is what σ gave.
                self._site(event, flow, frame.x_held, x, frame.a, own)
                return None
            self._site(event, flow, frame.x_held, x, a, own)
            self.set_tag(a, Flow(NOWHERE, _renumbered(_sigma_axes(flow.axes, x, a))))
        elif frame.reduces and _norm_like(frame, output):
            # A norm written out by hand: it names what no layer stands behind.
            tag = self.tag(a)
            if isinstance(tag, Flow):
                axis = 1 if a.dim() == 4 and _per_channel(frame.module, a.shape[1]) else -1
                self.set_tag(a, self._norm_tag(tag, a, axis, own))
        for event in mine:
            # In place, it has to be seen as the function that it is, to run out of place.
            whole = event.y is not None and event.x is x and event.y is output
            whole = whole and not event.in_place
            if whole and (event.y_held is None or event.y_held is self.aliases.reference(output)):
                event.module = frame.module
                if event.firing is not None:
                    event.firing.events.remove(event)
                self._fire(event)
            event.x = event.y = None
        return None

    def _norm_tag(self, tag: Flow, out: Tensor, axis: int, name: str) -> Flow:
        """A norm keeps the layer; where there is none, it is the nearest thing with filters."""
        if tag.origin.kind == "layer" or out.dim() < 2:
            return tag
        dim = axis % out.dim()
        return Flow(Origin("norm", name, self._count(name)), Axes.single(dim, out.shape[dim]))

    def verdict(self, frame: Frame, output: Any) -> str | None:
        """The name of σ if this call of a module is one nonlinearity."""
        if frame.kind == "sigma":
            return (
                nonlinearities.module_sigma(frame.module)
                if (isinstance(output, Tensor) and frame.x is not None)
                else None
            )
        if frame.kind != "candidate":
            return None
        if not isinstance(output, Tensor) or frame.x is None or output.shape != frame.x.shape:
            return None
        known = frame.degrees.get(id(output))
        if known is None or known[0]() is not output or known[1] != _NONLINEAR:
            return None
        inner = [e for e in self.events[frame.start :] if e.kind == "sigma"]
        if len(inner) == 1:
            event = inner[0]
            # A wrapper around one function or module is no nonlinearity of its own.
            same = event.x_held is frame.x_held or event.x is frame.x
            if same and event.y_held is self.aliases.reference(output):
                return None
        return type(frame.module).__name__

    def _output(self, module: nn.Module, output: Any) -> None:
        name = self.names.of(module)
        event = Event("output", module)
        event.module = module
        event.origin = Origin("output", name, self._count(f"{name}()"))
        for path, tensor in leaves(output):
            flow = self.tag(tensor)
            axes = flow.axes if isinstance(flow, Flow) else None
            held = self.aliases.reference(tensor)
            self._hold(event, path, "output", event.origin, held, axes, path=path)
        self.events.append(event)
        self._fire(event)

    # -- in-place σ on probation --------------------------------------------------------------

    def _suspect(self, z: Tensor, became: Any, culprit: Event | Frame) -> None:
        """From here on, z should not be read any more; it usually dies at once."""
        key, suspects = id(z), self._suspects

        def died(reference: Any) -> None:
            if key in suspects and suspects[key][0] is reference:
                del suspects[key]

        suspects[key] = (weakref.ref(z, died), became, culprit)

    def _substitute(self, value: Any) -> Any:
        """Whoever reads a tensor that an in-place σ would have changed gets the changed one."""
        if isinstance(value, Tensor):
            found = self._suspects.get(id(value))
            if found is None:
                return value
            reference, became, culprit = found
            if reference() is not value:
                return value
            culprit.flip = False
            for held in self.aliases.of(value):
                held.doomed = True  # from the next pass on, the σ runs in place
            return self._substitute(became)  # which may have been overwritten in its turn
        if type(value) in (tuple, list) and tensors_in(value):
            return type(value)([self._substitute(v) for v in value])
        if type(value) is dict and value:
            return {k: self._substitute(v) for k, v in value.items()}
        return value


class SigmaCall:
    """A nonlinearity about to run."""

    __slots__ = (
        *("args", "flip", "function", "held", "in_place", "kwargs", "original", "site", "tag"),
        "z",
    )

    def __init__(self, function: Any, args: Any, kwargs: Any, z: Tensor, tag: Tag) -> None:
        self.function = function
        self.original = function
        self.args = args
        self.kwargs = kwargs
        self.z = z
        self.tag = tag
        self.held: Held | None = None
        self.in_place = False
        self.flip = False
        self.site: Site | None = None  # something to edit


TRANSFORMED = (
    "it runs under a torch.func transform (vmap, grad, …): its tensors live only inside the "
    "transform, and cannot be held"
)


def transformed(value: Any) -> bool:
    """Whether it is a tensor of a torch.func transform, which must not be kept."""
    functorch = torch._C._functorch
    return isinstance(value, Tensor) and bool(functorch.is_functorch_wrapped_tensor(value))


def _in_backward() -> bool:
    """Inside a backward pass: activation checkpointing runs the forward again there."""
    return torch._C._current_graph_task_id() != -1


def _sigma_axes(axes: Axes | None, z: Tensor, a: Any) -> Axes | None:
    """σ keeps the filters; `glu` halves them."""
    if axes is None or not isinstance(a, Tensor) or a.dim() != z.dim():
        return None
    for part in axes.parts:
        if a.shape[part.dim] != part.size:
            axes = axes.slice(part.dim, 0, a.shape[part.dim])
    return axes


def _renumbered(axes: Axes | None) -> Axes | None:
    """Past a nonlinearity the filters are no layer's any more: count them from 0."""
    if axes is None or axes.dim is None:
        return None
    return Axes.single(axes.dim, axes.parts[0].size)


def _first_tensor(args: Any, kwargs: Any) -> tuple[Tensor | None, str | None]:
    """The first argument if it is a tensor, by place or by keyword."""
    if args:
        return (args[0], None) if isinstance(args[0], Tensor) else (None, None)
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            return value, key
    return None, None


# -- weightless modules ----------------------------------------------------------------------


def _may_be_sigma(module: nn.Module, args: Any, kwargs: Any, x: Tensor) -> bool:
    """One tensor goes in; no weights of its own, or only per-channel ones; no mere container."""
    if isinstance(module, _CONTAINERS) or _is_torchs(module):
        return False
    if not x.is_floating_point() or len(tensors_in(*args, kwargs)) != 1:
        return False
    counts = {1, *(x.shape[1:2]), *(x.shape[-1:])}
    return all(p.numel() in counts for p in module.parameters())


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")


def _per_channel(module: nn.Module, channels: int) -> bool:
    return any(p.numel() == channels for p in module.parameters())


def _norm_like(frame: Frame, output: Any) -> bool:
    same = isinstance(output, Tensor) and frame.x is not None and output.shape == frame.x.shape
    return frame.kind == "candidate" and same


def _candidate_step(
    frame: Frame,
    tag: Callable[[Any], Tag],
    name: str,
    args: Any,
    kwargs: Any,
    out: Any,
    nonlinear: bool,
) -> None:
    """One function inside a module that may be a nonlinearity written out by hand.

    Judged by tensor, not by module: what the user's own hooks compute on the side does not matter.
    """

    def degree(tensor: Tensor) -> int:
        found = frame.degrees.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        # Depends on the model's input, but did not come in through the module's argument.
        return _OTHER if isinstance(tag(tensor), Flow) else 0

    degrees = [degree(t) for t in tensors_in(*args, kwargs)]
    highest = max(degrees, default=0)
    if name in words.DROPOUTS:
        result = _OTHER
    elif highest == 0 or name in words.FRESH:
        return
    elif nonlinear or name in words.NONLINEAR_POINTWISE:
        result = max(highest, _NONLINEAR)
    elif name in words.PRODUCTS:
        dividing = name in ("div", "divide", "true_divide") and len(degrees) > 1
        by_input = sum(d > 0 for d in degrees) > 1 or (dividing and degrees[-1] > 0)
        curved = by_input or name.startswith("__r")
        result = max(highest, _NONLINEAR) if curved else highest
    elif name in words.LINEAR_BINARY or name in words.LINEAR_KEEPERS or name == "copy":
        result = highest
    else:
        frame.reduces = frame.reduces or name in words.REDUCTIONS or name in words.NORM_AXIS
        result = _OTHER
    for tensor in tensors_in(out, args[:1] if name == "__setitem__" else ()):
        frame.degrees[id(tensor)] = (weakref.ref(tensor), result)
