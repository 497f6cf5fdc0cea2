"""Learn: watch one pass, op by op, and know what ran, whose it is, and what gets overwritten.

The tracer is a `TorchFunctionMode`: it sees each torch function before it runs, above autograd and
whatever module it is called in. Module frames, pushed and popped by hooks, tell where. What ran is
kept in a `Record`; what its tensors carry, in `Tags`; in-place nonlinearities that are tried out of
place, in `Suspects`. A nonlinearity that is called as a function is a matter of `_sigma_calls.py`,
what a module's call turns out to have been, of `_closing.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

from fmapkit import _vocabulary as words
from fmapkit import _weighted, layers, nonlinearities
from fmapkit._axes import Axes
from fmapkit._candidates import may_be_sigma, verdict
from fmapkit._closing import close
from fmapkit._degrees import Degrees
from fmapkit._edit import Edits
from fmapkit._editing import Editor
from fmapkit._events import Event, Firing
from fmapkit._flow import carried
from fmapkit._frames import Frame, SigmaCall, first_tensor, running_module
from fmapkit._functions import RESHAPED_IN_PLACE, Function, describe
from fmapkit._names import Names
from fmapkit._nested import tensors_in
from fmapkit._origin import STOP, Flow, Weight
from fmapkit._probation import Born, Suspects, may_try
from fmapkit._record import Record
from fmapkit._sigma_calls import after_sigma, before_sigma
from fmapkit._stop import Stop
from fmapkit._store import Aliases, Pass
from fmapkit._tags import Tags
from fmapkit._transforms import TRANSFORMED, transformed
from fmapkit._wants import Wants

if TYPE_CHECKING:
    from fmapkit._following import Follower
    from fmapkit._noting import Noter

__all__ = ["Tracer"]


def _is_lazy(kind: type) -> bool:
    """Whether tensors of a type have no shape yet: a lazy module is just making its weights."""
    return issubclass(kind, (UninitializedParameter, UninitializedBuffer))


def _nothing(module: nn.Module) -> None:
    return None


class Tracer(TorchFunctionMode):
    """Sees one pass; see the module's docstring.

    Attributes:
        frames: the modules that are running, outermost first.
        unhooked: modules that ran without hooks.
        edited: something was, or might have been, edited.
        failed: a fault of our own, after which nothing is captured.
        paused: while a unit is replayed.
        trial: > 0 while a proven module is learned.
        opaque: how many running modules are registered layers.
        follower: does the work as long as the pass does what an earlier one did.
        noter: is told what is traced; None where nothing is to be compared with it.
        leaves: modules that need not be looked into; as scopes, while they are noted.
        leaf_unit: what the road of one of them depends on.
        no_leaf: is told of one that has to be looked into.
    """

    # As each pass begins.
    edited = paused = False
    failed: BaseException | None = None
    trial = opaque = 0
    follower: Follower | None = None
    noter: Noter | None = None
    leaves: frozenset[nn.Module] = frozenset()
    leaf_unit: Callable[[nn.Module], Any] = staticmethod(_nothing)
    no_leaf: Callable[[nn.Module], None] = staticmethod(_nothing)

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
        self.tag, self.set_tag = tags.of, tags.put
        self.enter_inputs, self.moved = tags.enter, tags.moved
        record = self.record = self._new_record()
        self.aliases = record.aliases
        self.events, self.firings, self.counts = record.events, record.firings, record.counts
        self.pending, self.claim, self.let_go = record.pending, record.claim, record.let_go
        # They know each other: where there is nothing to edit, no cycle is left to Python's gc.
        self.editor = Editor(self, edits, self._probe) if edits else None
        self.frames: list[Frame] = []
        self.unhooked: set[nn.Module] = set()
        self.suspects = Suspects()
        self.born = Born()

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
        self.follower = self.noter = None
        self.record.end()
        self.frames.clear()
        self.suspects.known.clear()
        self.tags.end()

    def fail(self, error: BaseException) -> None:
        """A fault of our own: the rest of the pass is not captured, and `missed` says so."""
        if error is self.edits.raised:
            raise error  # the user's own function
        self.follower = None
        if self.failed is None:
            self.failed = error
            where = self.names.of(self.frames[-1].module) if self.frames else ""
            self.miss(where, f"fmapkit failed here: {type(error).__name__}: {error}")

    # -- every torch function -----------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.follower is not None and not self.paused:
            return self.follower.call(func, args, kwargs)
        known = describe(func)
        if known.silent or self.paused or self.failed or _in_backward():
            return func(*args, **kwargs)
        if known.opened is not None:
            with self:
                return known.opened(*args, **kwargs)
        if not self.frames or (types and any(map(_is_lazy, types))):
            return func(*args, **kwargs)
        try:
            if self.suspects.known:
                args = self.suspects.exchange(args, self.aliases)
                kwargs = self.suspects.exchange(kwargs, self.aliases)
            if known.sigma is not None:
                call = before_sigma(self, known, func, args, kwargs)
                func, args, kwargs = call.function, call.args, call.kwargs
            else:
                call = None
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
            if self.trial:
                self.born.made(known, args, kwargs, out)
            if call is not None:
                out = after_sigma(self, known, call, out)
            else:
                out = self._after(known, func, args, kwargs, out)
            if self.noter is not None:
                self.noter.call(known, func, args, kwargs, out)
        except Exception as error:
            self.fail(error)
        if self.stop is not None and not self.trial:
            self.stop.check()
        return out

    # -- functions ----------------------------------------------------------------------------

    def _after(self, known: Function, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        name = known.name
        frame = self.frames[-1]
        if name in words.OPAQUE:
            self.miss(self.names.of(frame.module), words.OPAQUE[name])
        weight = _weighted.weight_operand(name, args, kwargs, self.tag)
        seen = not self.opaque and not transformed(out)
        if isinstance(weight, Tensor) and isinstance(out, Tensor) and seen:
            out = self._layer(known, func, args, kwargs, weight, out)
        else:
            if self.trial and not self.opaque and _weighted.may_weigh(name):
                # No layer this time; but who waits for layers by this name will see it, too.
                self.firings.append(Firing(None, self.scope(), func, None))
            tag = carried(name, args, kwargs, out, self.tag)
            if known.in_place and name in RESHAPED_IN_PLACE and tag is not None:
                tag = STOP
            if name in words.NORM_AXIS and isinstance(tag, Flow) and isinstance(out, Tensor):
                own = self.names.of(frame.module)
                tag = self.record.norm(tag, out, words.NORM_AXIS[name], own)
            if tag is not None:
                if name == "__setitem__":
                    self.set_tag(args[0], tag)
                self.set_tag(out, tag)
        self.follow(name, args, kwargs, out)
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
        if frame.x is not None and _weighted.pads_first(frame.module):
            x = frame.x
        event = Event("layer", self.scope(), func)
        event.place = place or 0
        if x is not None and x is frame.x:
            event.x, event.y, event.key = x, out, frame.key
        return self.layer_event(event, name, x, out, axes)

    def layer_event(
        self, event: Event, name: str, x: Tensor | None, out: Tensor, axes: Axes | None
    ) -> Tensor:
        """Hold a layer's maps; what the layer is to return."""
        origin = self.record.layer(event, name, out, axes)
        edit = self.editor.response(name, origin.call, out, axes) if self.editor else None
        if self.wants.layer(name):
            self.record.layer_maps(event, x, out, None if edit is None else edit[1])
            self.spare(event)
        return out if edit is None else edit[0]

    def follow(self, name: str, args: Any, kwargs: Any, out: Any, nonlinear: bool = False) -> None:
        """Follow, in a weightless module, what depends on its input: linearly or not."""
        for frame in self.frames:
            frame.step(name, args, kwargs, out, self.tag, nonlinear)

    # -- as a function is seen ----------------------------------------------------------------

    def may_try(self, known: Function, z: Tensor) -> bool:
        """Whether an in-place σ may run out of place, on probation."""
        return bool(self.trial) and may_try(known.sigma, z, self.frames, self.aliases, self.born)

    def scope(self) -> nn.Module:
        """The module in whose forward a function runs.

        Modules inside a unit have no hooks. When a scope calls one of them past the unit, no frame
        tells; its functions are seen all the same, and from the next pass on it has hooks.
        """
        module = self.frames[-1].module
        if self.trial:  # every module is hooked
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

    def caller(self, hooked: nn.Module) -> nn.Module:
        """The module of the model whose call is the innermost, which need not have hooks.

        Args:
            hooked: the innermost that has.
        """
        running = running_module(2)
        return running if running is not None and running in self.names.by_module else hooked

    def spare(self, event: Event) -> None:
        """Outside of units, what no map holds is let go at once: it may be a lot in the end."""
        if not self.trial and all(f.kind == "plain" for f in self.frames):
            self.let_go([event])

    # -- modules ------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Frame:
        """A module's forward begins."""
        with torch._C.DisableTorchFunction():  # what we look at ourselves is not the model's doing
            frame = self._enter(module, args, kwargs)
            if self.noter is not None:
                self.noter.enter(frame)
            return frame

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Frame:
        frame = Frame(module, args, kwargs, len(self.events))
        frame.firing = len(self.firings)
        if self.trial:
            parent = self.frames[-1].module if self.frames else None
            given = args[0] if args else None
            self.firings.passes(Firing(module, module, None, parent, given, before=True), given)
        self.frames.append(frame)
        if self.suspects.known:  # what the module is given, it will read
            args = self.suspects.exchange(args, self.aliases)
            kwargs = self.suspects.exchange(kwargs, self.aliases)
        frame.x, frame.key = first_tensor(args, kwargs)
        if transformed(frame.x):
            self.miss(self.names.of(module), TRANSFORMED)
        elif layers.is_registered(module):
            frame.kind = "layer"
            self.opaque += 1
        elif nonlinearities.module_sigma(module) is not None:
            frame.kind = "sigma"
        elif frame.x is not None and may_be_sigma(module, args, kwargs, frame.x):
            frame.kind = "candidate"
            frame.degrees = Degrees(frame.x)
        if frame.kind in ("sigma", "candidate") and frame.x is not None:
            frame.x_held = self.aliases.reference(frame.x)
            frame.tag = self.tag(frame.x)
            if self.editor and not self.opaque:
                self.editor.enter(frame)
        return frame

    def leave(self, module: nn.Module, output: Any, failed: bool = False) -> Any:
        """A module's forward has ended.

        Args:
            module: the module.
            output: what it returns.
            failed: by an exception, and returns nothing.

        Returns:
            The output, with a tensor that an in-place σ would have changed replaced by what it
            would have become; None where nothing is to be replaced.
        """
        frame = None
        while self.frames and (frame is None or frame.module is not module):
            frame = self.frames.pop()  # several, where a forward caught an exception of a child
            self.opaque -= frame.kind == "layer"
        if frame is None or frame.module is not module:
            return None
        if self.failed:
            return None
        with torch._C.DisableTorchFunction():
            replaced = self._leave(frame, output)
            if self.noter is not None:
                self.noter.leave(frame, output, failed)
            return replaced

    def _leave(self, frame: Frame, output: Any) -> Any:
        module, known = frame.module, self.suspects.known
        replaced = None
        if known and any(id(t) in known for t in tensors_in(output)):
            replaced = output = self.suspects.exchange(output, self.aliases)
        parent = self.frames[-1].module if self.frames else None
        self.firings.passes(Firing(module, module, None, parent, output), output)
        edited = close(self, frame, output)
        if edited is not None and edited is not output:
            replaced = output = edited
        if self.wants.output(module):
            self._output(module, output)
        return replaced

    def _output(self, module: nn.Module, output: Any) -> None:
        self.record.output(module, self.names.of(module), output)

    def verdict(self, frame: Frame, output: Any) -> str | None:
        """The name of σ if this call of a module is one nonlinearity."""
        return verdict(frame, output, self.events, self.aliases)


def _in_backward() -> bool:
    """Inside a backward pass: activation checkpointing runs the forward again there."""
    return torch._C._current_graph_task_id() != -1
