"""Learn: watch one pass, op by op, and know what ran, whose it is, and what gets overwritten.

The tracer is a `TorchFunctionMode`: it sees each torch function before it runs, above autograd and
whatever module it is called in. Module frames, pushed and popped by hooks, tell where. What ran is
kept in a `Record`; what its tensors carry, in `Tags`. A nonlinearity that is called as a function
is a matter of `_sigma_calls.py`, what a module's call turns out to have been, of `_closing.py`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

from fmapkit import _vocabulary as words
from fmapkit import _weighted, layers, nonlinearities
from fmapkit._attention import AttentionWatch
from fmapkit._axes import Axes
from fmapkit._bare import bare_calls, is_hidden
from fmapkit._candidates import is_whole, may_be_sigma, role_of, verdict
from fmapkit._closing import close
from fmapkit._constants import Constants
from fmapkit._degrees import Degrees
from fmapkit._edit import Edits
from fmapkit._editing import Editor
from fmapkit._events import Event, Firing
from fmapkit._flow import carried
from fmapkit._frames import Frame, SigmaCall, first_tensor, running_module
from fmapkit._functions import RESHAPED_IN_PLACE, Function, describe, described
from fmapkit._missed import reason
from fmapkit._names import Names, Use
from fmapkit._nested import tensors_in
from fmapkit._origin import STOP, Flow, Made, Source, Tag, Weight
from fmapkit._past_hooks import HOW
from fmapkit._quantized import FUSED, packed_axes, packed_key
from fmapkit._record import Record
from fmapkit._sigma_calls import after_sigma, before_sigma, sigma_call
from fmapkit._sometimes import FOLLOWED, SOMETIMES
from fmapkit._stop import Stop
from fmapkit._store import Aliases, Pass, storage_of
from fmapkit._tags import Tags
from fmapkit._transforms import NESTED, is_shapeless, some_shapeless, unheld, wrapped
from fmapkit._wants import Wants
from fmapkit._weights import PACKED, StandIns, source_of

__all__ = ["Tracer"]


# The backward pass that is running, or -1: activation checkpointing runs the forward again there.
_backward: Callable[[], int] = torch._C._current_graph_task_id


# They write elements of one tensor into another, and add none.
_COPIES = words.WRITES - words.ADDING_WRITES | {"copy"}


def _is_lazy(kind: type) -> bool:
    """Whether tensors of a type have no shape yet: a lazy module is just making its weights."""
    return issubclass(kind, (UninitializedParameter, UninitializedBuffer))


class Tracer(TorchFunctionMode):
    """Sees one pass; see the module's docstring.

    Attributes:
        frames: the modules that are running, outermost first.
        unhooked: modules that ran without hooks.
        broken: the unit after whose exception no more was captured.
        edited: something was, or might have been, edited.
        failed: a fault of our own, after which nothing is captured.
        paused: while a unit is replayed.
        lost: the pass has left the known paths.
        learning: > 0 while a unit is learned.
        opaque: how many running modules are registered layers.
        deciding: modules that were seen to turn data into numbers of Python's, or to let it decide
            what runs, or whose weight is used.
        moments: after how many decisions modules began; None where one ended.
        stand_ins: where a graph is traced: what stands for its inputs, and these.
    """

    # As each pass begins.
    edited = paused = lost = False
    failed: BaseException | None = None
    learning = opaque = 0

    def __init__(
        self,
        names: Names,
        wants: Wants,
        edits: Edits,
        stop: Stop | None,
        current: Pass,
        miss: Callable[[str, str], None],
        tags: Tags | None = None,
    ) -> None:
        super().__init__()
        self.names = names
        self.wants = wants
        self.current = current
        self.miss = miss
        self.edits = edits
        self.stop = stop
        # What is asked for at each turn is here at first hand.
        tags = self.tags = Tags(names) if tags is None else tags
        self.tag, self.flow, self.set_tag = tags.of, tags.flow, tags.put
        self.enter_inputs, self.moved = tags.enter, tags.moved
        record = self.record = self._new_record()
        self.aliases = record.aliases
        self.events, self.firings, self.counts = record.events, record.firings, record.counts
        self.pending, self.claim, self.let_go = record.pending, record.claim, record.let_go
        # They know each other: where there is nothing to edit, no cycle is left to Python's gc.
        self.editor = Editor(self, edits, self._probe) if edits else None
        self.attention = AttentionWatch(self) if wants.kind("attention") else None
        self.frames: list[Frame] = []
        self.described = described()
        self.unhooked: set[nn.Module] = set()
        self.broken: nn.Module | None = None
        self.deciding: set[nn.Module] = set()
        self.constants = Constants()
        self.moments: list[tuple[int, nn.Module | None]] = []
        self.stand_ins: StandIns = {}
        self.made: set[int] = set()  # memory of tensors that were made from nothing in this pass

    def _new_record(self) -> Record:
        wants = self.wants
        aliases = Aliases(wants.detach, wants.gradients, self.tags.lent)
        return Record(wants, self.current, self.tags, aliases, self.stop, self.miss)

    def _probe(self) -> Tracer:
        """Another tracer, of which nothing is kept."""
        return Tracer(self.names, self.wants, Edits.none(), None, Pass(-1), lambda *_: None)

    def end(self) -> None:
        """Let go of all that could keep a tensor or a graph alive, without waiting for Python's gc.

        The tracer and its editor, if there is one, know each other.
        """
        self.record.end()
        self.frames.clear()
        self.tags.end()
        if self.editor:
            self.editor.modules.end()
        if self.attention is not None:
            self.attention.end()

    def fail(self, error: BaseException) -> None:
        """A fault of our own: the rest of the pass is not captured, and `missed` says so."""
        if error is self.edits.raised:
            raise error  # the user's own function
        if self.failed is None:
            self.failed = error
            where = self.names.of(self.frames[-1].module) if self.frames else ""
            self.miss(where, reason(error))

    def give_up(self, broken: nn.Module | None = None) -> None:
        """What the tensors of the pass carry is not known any more: no more of it is captured.

        Args:
            broken: a unit whose call an exception has ended; its caller may handle that.
        """
        self.lost = True
        self.broken = broken

    # -- every torch function -----------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self.described.get(func) or describe(func)
        if known.reads and not self.paused and known.reads(args, kwargs):
            if not self.constants.hold(tensors_in(*args, kwargs)):
                self.deciding.update([f.module for f in self.frames])
        if known.silent or self.paused or self.failed or _backward() != -1:
            return func(*args, **kwargs)
        if known.opened is not None:
            with self, self.attention.inside(args, kwargs) if self.attention else nullcontext():
                return known.opened(*args, **kwargs)
        if not self.frames or (types and any(map(_is_lazy, types))):
            return func(*args, **kwargs)
        try:
            call = None
            if known.sigma is not None or known.name in SOMETIMES:
                call = sigma_call(self, known, func, args, kwargs)
            if call is not None:
                before_sigma(self, known, call)
                func, args, kwargs = call.function, call.args, call.kwargs
            else:
                if not known.never_writes or "out" in kwargs:
                    for target in known.writes(args, kwargs):
                        self.aliases.before_write(target)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.fail(error)
            return func(*args, **kwargs)
        return self.traced(known, func, args, kwargs, func(*args, **kwargs), call)

    def traced(
        self,
        known: Function,
        func: Any,
        args: Any,
        kwargs: Any,
        out: Any,
        call: SigmaCall | None = None,
    ) -> Any:
        """A function has run.

        Args:
            known: what it is.
            func: it.
            args: its positional arguments.
            kwargs: its keyword arguments.
            out: what it returned.
            call: what was held before, if it is a nonlinearity.

        Returns:
            What it is to return.
        """
        try:
            self.past_hooks()
            if not self.learning and known.name in FOLLOWED:
                self.hidden()
            if call is not None:
                out = after_sigma(self, known, call, out)
            else:
                out = self._after(known, func, args, kwargs, out)
        except Exception as error:
            self.fail(error)
        if self.stop is not None and not self.learning:
            self.stop.check()
        return out

    def past_hooks(self, entered: nn.Module | None = None) -> None:
        """Name the modules that run without their hooks, where that keeps something from us.

        Args:
            entered: a module whose call has just begun.
        """
        for module, method in self.names.past_hooks.running(entered):
            name = self.names.by_module.get(module)
            if name is None:
                continue
            if self.wants.output(module):
                self.miss(name, f"{HOW[method]}: what it returns is not seen")
            elif is_whole(module):
                self.miss(name, f"{HOW[method]}: what it is as a whole is not seen")

    # -- functions ----------------------------------------------------------------------------

    def _after(self, known: Function, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        name = known.name
        frame = self.frames[-1]
        if name in words.OPAQUE:
            self.miss(self.names.of(frame.module), words.OPAQUE[name])
        if known.fused and not self.opaque:
            self.miss(self.names.of(frame.module), FUSED.format(func))
        if name in words.FRESH and isinstance(out, Tensor):
            self.made.add(storage_of(out))
        operands = tensors_in(*args, kwargs)
        self.constants.made(name, operands, out)
        if not operands:
            self.follow(name, operands, args, kwargs, out)
            return out
        if self.attention is not None and not self.opaque:
            self.attention.step(name, func, operands, args, kwargs, out)
        weight = None
        if _weighted.weighs(name):
            weight = _weighted.weight_operand(name, operands, args, kwargs, self.tag)
        one = isinstance(out, Tensor)
        if some_shapeless(operands) or (one and is_shapeless(out)):
            self._not_held(name, weight, out)
            return out
        seen = one and not self.opaque and not wrapped(out)
        if seen and isinstance(weight, Tensor) and self.hidden() is None:
            out = self._layer(known, func, operands, args, kwargs, weight, out)
        elif seen and known.packed:
            out = self._packed_layer(func, args, out)
        else:
            if self.learning and not self.opaque and (_weighted.weighs(name) or name in SOMETIMES):
                # Nothing this time; but who waits for what goes by this name will see it, too.
                self.firings.append(Firing(None, self.scope(), func))
            tag = carried(name, operands, args, kwargs, out, self.tag)
            if known.in_place and name in RESHAPED_IN_PLACE and tag is not None:
                tag = STOP
            if (
                name in words.NORM_AXIS
                and isinstance(tag, Flow)
                and tag.origin.kind != "layer"
                and isinstance(out, Tensor)
            ):
                own = self.names.place(self.running()) or self.names.of(frame.module)
                tag = self.record.norm(tag, out, words.NORM_AXIS[name], own)
            if tag is not None:
                target = self._target(name, args, kwargs)
                before = self.tag(target) if target is not None else None
                if name == "__setitem__":
                    self.set_tag(args[0], tag)
                self.set_tag(out, tag)
                if target is not None:
                    self.tags.written(target, before)
        self.follow(name, operands, args, kwargs, out)
        return out

    @staticmethod
    def _target(name: str, args: Any, kwargs: Any) -> Tensor | None:
        """What a function writes elements of another tensor to, if it does."""
        out = kwargs.get("out")
        if isinstance(out, Tensor):
            return out
        if name not in _COPIES or not args:
            return None
        return args[0] if isinstance(args[0], Tensor) else None

    def _not_held(self, function: str, weight: Any, out: Any) -> None:
        """A function has run on tensors that have no shape: whose filters they are is not told."""
        if isinstance(weight, Tensor) and not self.opaque:
            use = self._use(function, weight, self.tag(weight), self.scope())
            self.miss(self.names.layer_of(use)[0], NESTED)
        elif any(map(is_shapeless, tensors_in(out))):
            self.miss(self.names.of(self.frames[-1].module), NESTED)
        for tensor in tensors_in(out):
            self.set_tag(tensor, STOP)

    def _layer(
        self,
        known: Function,
        func: Any,
        operands: list[Tensor],
        args: Any,
        kwargs: Any,
        weight: Tensor,
        out: Tensor,
    ) -> Tensor:
        scope = self.scope()
        frame = self.frames[-1]
        tag = self.tag(weight)
        name = self.names.of_its_own(weight, frame.module)
        if name is not None:
            whole, same_rows = True, True
        else:
            use = self._use(known.name, weight, tag, scope)
            name, same_rows = self.names.layer_of(use)
            whole = use.is_module and weight.numel() == use.weight.numel()
        axes = _weighted.layer_axes(known.name, operands, args, kwargs, weight, out, tag)
        if axes is None and whole:
            axes = _weighted.layer_axes(known.name, operands, args, kwargs, weight, out, None)
        if not same_rows:
            axes = None  # data may make, or pick, another weight each time
        if isinstance(tag, Weight) and tag.by_value:
            self.deciding.update([f.module for f in self.frames])
        place = _weighted.input_place(known.name, operands, weight)
        x = operands[place] if place is not None else None
        if frame.x is not None and frame.x is not x and _weighted.pads_first(frame.module):
            x = frame.x
        event = Event("layer", scope, func)
        event.place = place or 0
        if x is not None and x is frame.x:
            event.x, event.y, event.key = x, out, frame.key
        made = self._made(known.name, operands, args, kwargs, weight, out, axes)
        return self.layer_event(event, name, x, out, axes, made)

    def _made(
        self,
        function: str,
        operands: list[Tensor],
        args: Any,
        kwargs: Any,
        weight: Tensor,
        out: Tensor,
        axes: Axes | None,
    ) -> tuple[Made, dict[str, Tensor]]:
        """What the layer made its filters of, and what of that is nowhere afterwards."""
        bias = _weighted.bias_operand(function, operands, args, kwargs)
        used = {"weight": weight, **({"bias": bias} if isinstance(bias, Tensor) else {})}
        found = {what: self._source(tensor) for what, tensor in used.items()}
        places = _weighted.filter_places(function, operands, args, kwargs, weight, out)
        made = Made(found["weight"], found.get("bias"), tuple(places), axes)
        return made, {what: used[what] for what, s in found.items() if s.owner is None}

    def _source(self, tensor: Tensor) -> Source:
        """Where a layer got its weight, or its bias: nearly always, it is its module's own."""
        inner = self.frames[-1].module
        for key, parameter in inner._parameters.items():
            if parameter is tensor:
                return Source(weakref.ref(inner), key, weakref.ref(tensor))
        return source_of(tensor, self.tag(tensor), self._owners, self.stand_ins)

    def _owners(self, tensor: Tensor) -> list[tuple[nn.Module, str]]:
        """The modules that have a parameter or buffer; the one that runs need not be registered."""
        found = self.names.owners(tensor)
        if found:
            return found
        running = self.running()
        own = [(running, key) for key, p in running._parameters.items() if p is tensor]
        return own or self.names.owned_by(tensor)

    def _packed_layer(self, func: Any, args: Any, out: Tensor) -> Tensor:
        """A quantised layer has run, whose weight is no tensor."""
        frame, x = self.frames[-1], args[0]
        owner = self.names.of(frame.module)
        key = packed_key(frame.module, args[1])
        if key is None:
            self.miss(owner, f"{func}: its weight belongs to no module, so it has no name")
            self.set_tag(out, STOP)
            return out
        event = Event("layer", self.scope(), func)
        if x is frame.x:
            event.x, event.y, event.key = x, out, frame.key
        name = f"{owner}.{key}".strip(".")
        made = Made(why=PACKED)
        return self.layer_event(event, name, x, out, packed_axes(func, out), (made, {}))

    def _use(self, function: str, weight: Tensor, tag: Tag, scope: nn.Module) -> Use:
        """Whose weight is used here, as far as the pass can tell."""
        frame, running = self.frames[-1], self.running()
        stack = [f.module for f in self.frames]
        if running is not stack[-1]:
            stack.append(running)
        made_of = tag.parameter if isinstance(tag, Weight) else weight
        made = storage_of(made_of) in self.made
        source = tag.origin.name if isinstance(tag, Flow) else None
        turns = frame.turns = Counter() if frame.turns is None else frame.turns
        turn = turns[function, source]
        turns[function, source] += 1
        return Use(
            weight=made_of,
            picked=_weighted.picked(function, tag, weight) if isinstance(tag, Weight) else "",
            stack=stack,
            is_module=layers.layer_axis(running) is not None,
            scope=scope,
            function=function,
            made=made,
            source=source,
            turn=turn,
        )

    def running(self) -> nn.Module:
        """The innermost module that runs, registered or not."""
        return running_module(2) or self.frames[-1].module

    def own_name(self, scope: nn.Module, sigma: str | None) -> str:
        """What a nonlinearity goes by that no layer stands before: its module, and itself."""
        running = self.running()
        if running not in self.names.by_module:
            place = self.names.place(running, again=False)
            if place is not None:
                return place if nonlinearities.module_sigma(running) else f"{place}:{sigma}"
        return f"{self.names.of(scope)}:{sigma}"

    def layer_event(
        self,
        event: Event,
        name: str,
        x: Tensor | None,
        out: Tensor,
        axes: Axes | None,
        made: tuple[Made, dict[str, Tensor]],
    ) -> Tensor:
        """Hold a layer's maps; what the layer is to return."""
        origin = self.record.layer(event, name, out, axes)
        origin.made, computed = made
        if computed and self.wants.weights and self.wants.layer(name):
            origin.used = {what: self.aliases.reference(t) for what, t in computed.items()}
            self.deciding.update([f.module for f in self.frames])  # to be seen in each pass
        edit = self.editor.response(name, origin.call, out, axes) if self.editor else None
        if self.wants.layer(name):
            was = self.editor.modules.was(x) if self.editor and x is not None else None
            self.record.layer_maps(event, x, out, None if edit is None else edit[1], was)
            self.spare(event)
        return out if edit is None else edit[0]

    def follow(
        self,
        name: str,
        operands: list[Tensor],
        args: Any,
        kwargs: Any,
        out: Any,
        nonlinear: bool = False,
    ) -> None:
        """Follow what is computed point by point, in a weightless module from its input alone."""
        frame = self.frames[-1]
        if nonlinear or name in FOLLOWED:
            frame.pointwise.step(name, operands, args, kwargs, out, self.flow, nonlinear)
        if not frame.watched:
            return
        for frame in self.frames:
            if frame.degrees is not None:
                frame.degrees.step(name, operands, args, kwargs, out, self.flow, nonlinear)

    # -- as a function is seen ----------------------------------------------------------------

    def scope(self) -> nn.Module:
        """The module in whose forward a function runs.

        Modules inside a unit have no hooks. When a scope calls one of them past the unit, no frame
        tells; its functions are seen all the same, and from the next pass on it has hooks.
        """
        module = self.frames[-1].module
        if self.learning:  # every module is hooked
            return module
        running = running_module(2)
        if running is None or running is module or running not in self.names.by_module:
            return module
        if any(f.module is running for f in self.frames):
            # Calls inside of it were broken off by what runs no hooks, and it caught that.
            while self.frames[-1].module is not running:
                self.opaque -= self.frames.pop().kind == "layer"
            return running
        self.unhooked.add(running)
        return running

    def hidden(self) -> nn.Module | None:
        """The module without hooks inside of which a function runs, if it may be one σ or layer."""
        if self.learning:
            return None
        found = None
        for call in bare_calls(self.frames[-1].module):
            if call[0] in self.names.by_module and is_hidden(call):
                found = call[0]
                self.unhooked.add(found)
        return found

    def caller(self, hooked: nn.Module) -> nn.Module:
        """The module of the model whose call is the innermost, which need not have hooks.

        Args:
            hooked: the innermost that has.
        """
        running = running_module(2)
        return running if running is not None and running in self.names.by_module else hooked

    def spare(self, event: Event) -> None:
        """Outside of units, what no map holds is let go at once: it may be a lot in the end."""
        if self.learning:
            return
        for frame in self.frames:
            if frame.kind != "plain":
                return
        self.let_go([event])

    # -- modules ------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Frame:
        """A module's forward begins."""
        with torch._C.DisableTorchFunction():  # what we look at ourselves is not the model's doing
            if self.frames:
                self.past_hooks(module)
            replaced = self.editor.modules.input(module, args, kwargs) if self.editor else None
            if replaced is not None:
                args, kwargs = replaced
            frame = Frame(module, args, kwargs, len(self.events))
            frame.replaced = replaced
            frame.firing = len(self.firings)
            parent = self.frames[-1] if self.frames else None
            if self.learning:
                self.moments.append((self.firings.clock(), module))
            self.frames.append(frame)
            frame.x, frame.key = first_tensor(args, kwargs)
            role = role_of(module)
            why = unheld(frame.x) if frame.x is not None else None
            if why is not None:
                self.miss(self.names.of(module), why)
            elif role != "plain":
                self._sort(frame, role, args, kwargs)
            if parent is not None and parent.watched:
                frame.watched = True
            return frame

    def _sort(self, frame: Frame, role: str, args: Any, kwargs: Any) -> None:
        """What kind of call it may be."""
        x = frame.x
        if role == "layer":
            frame.kind = role
            self.opaque += 1
        elif role == "sigma":
            frame.kind = role
            frame.ran = nonlinearities.runs_as(frame.module) is None
        # What is captured is never one nonlinearity itself.
        elif x is None or not self.names.of(frame.module):
            return
        elif may_be_sigma(frame.module, args, kwargs, x):
            frame.kind = "candidate"
            frame.degrees = Degrees(x)
            frame.watched = True
        if x is not None and frame.kind in ("sigma", "candidate"):
            frame.x_held = self.aliases.reference(x)
            frame.tag = self.tag(x)
            if self.editor and not self.opaque:
                self.editor.enter(frame)

    def leave(self, module: nn.Module, output: Any) -> Any:
        """A module's forward has ended.

        Args:
            module: the module.
            output: what it returns.

        Returns:
            What it is to return, if something was edited; None for its own.
        """
        if self.editor and all(f.module is not module for f in self.frames):
            # An edit of its input has failed, and it has not begun; or nothing is told any more.
            return self.editor.modules.leave_lost(module, output) if self.lost else None
        frame = None
        while self.frames and (frame is None or frame.module is not module):
            frame = self.frames.pop()  # several, where a forward caught an exception of a child
            self.opaque -= frame.kind == "layer"
        if frame is None or frame.module is not module or self.failed:
            return None
        replaced = None
        with torch._C.DisableTorchFunction():
            if self.learning:
                self.moments.append((self.firings.clock(), None))
            parent = self.frames[-1].module if self.frames else None
            self.firings.append(Firing(module, module, None, parent))
            edited = close(self, frame, output)
            if edited is not None and edited is not output:
                replaced = output = edited
            event = self._output(module, output) if module in self.wants.outputs else None
            if self.editor:
                new, held = self.editor.modules.output(module, output)
                replaced = new if held else replaced
                for path, entry in event.entries if event is not None else ():
                    entry.edited = held.get(path)
        return replaced

    def _output(self, module: nn.Module, output: Any) -> Event | None:
        return self.record.output(module, self.names.of(module), output)

    def verdict(self, frame: Frame, output: Any) -> str | None:
        """The name of σ if this call of a module is one nonlinearity."""
        return verdict(frame, output, self.events, self.aliases)
