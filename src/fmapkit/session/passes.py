"""When a pass begins and ends, whether it is captured, and what of it stays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.compiled import CompiledEntries
from fmapkit.provenance import versions
from fmapkit.reasons import Reason
from fmapkit.replay import ModelGuard
from fmapkit.selection import Selection, StoppedError
from fmapkit.session.concurrent import others
from fmapkit.session.parts import SessionParts
from fmapkit.session.unseen import recorded
from fmapkit.storage import Pass
from fmapkit.torchlib.autograd import in_backward
from fmapkit.torchlib.compiled_modules import compiled_by, ever_compiled
from fmapkit.torchlib.fused.paths import fuses
from fmapkit.torchlib.modes import nothing_between
from fmapkit.torchlib.nested import tensors_in
from fmapkit.torchlib.transforms import transforming, under_transform
from fmapkit.tracing import call_frame, on_stack


def _goes_gradually(model: nn.Module, wants: Selection) -> bool:
    """Whether the oldest pass goes map by map, as the new ones come.

    Copies have memory that is made once, and graphs are to go as soon as they can. The CPU's
    allocator alone gives memory back to the system.
    """
    if wants.graph or wants.conversion or wants.filters is not None:
        return False
    first = next(model.parameters(), None)
    return first is None or first.is_cpu


def _is_of_others(given: Tensor, inputs: list[Tensor]) -> bool:
    """Whether something that was given for each sample is of another batch than the inputs."""
    return bool(inputs) and not any(len(given) in t.shape for t in inputs)


class Passes:
    """Begins and ends the passes of one capture."""

    def __init__(self, parts: SessionParts, every: int, compiled: CompiledEntries) -> None:
        self.asked = asked = parts.asked
        self.steps = 0  # how many passes have begun, captured or not
        # By the user, of the next pass's inputs: their numbers, and which positions are no padding.
        self.told: tuple[Tensor | None, Tensor | None] = None, None
        self.watch = ModelGuard(asked.model, parts.hooks)  # is it that of which `names` are?
        self._parts = parts
        self._live = parts.live
        self._every = every
        self._compiled = compiled
        self._edits, self._stop = asked.edits or None, asked.stop
        self._gradually = _goes_gradually(asked.model, asked.wants)
        if asked.stop is not None:
            asked.stop.awaited = lambda: any(o.waits for o in others(self))

    # -- begin --------------------------------------------------------------------------------

    def begin(self, args: Any, kwargs: Any, compiled: bool = False) -> bool:
        """A call of the model begins, of `compiled` code or not: whether it is to be captured."""
        live, parts, step = self._live, self._parts, self.steps
        (ids, mask), self.told = self.told, (None, None)
        self.steps += 1
        live.idle = bool(step % self._every) or self._refused(args, kwargs, compiled)
        if live.idle:
            # torch.export sees to it that the model has the same attributes before and after.
            if not torch.compiler.is_compiling():
                parts.installer.only_on_model()
            parts.installer.listen_no_more()
            if self.asked.methods:  # which may call the model, as a part of this pass
                live.frame = call_frame()
            return False
        if ids is not None or mask is not None:
            inputs = tensors_in(*args, *kwargs.values())
            if ids is not None and _is_of_others(ids, inputs):
                parts.misses.add("", Reason.NUMBERS_OF_OTHERS.text(count=len(ids)))
                ids = None
            if mask is not None and _is_of_others(mask, inputs):
                parts.misses.add("", Reason.MASK_OF_OTHERS.text(count=len(mask)))
                mask = None
        live.frame = call_frame()  # on Python's stack as long as the pass runs
        parts.hooks.begin_pass()
        if self.watch.changed():
            self._rebuild()
        elif self.watch.theirs and self._stop is None and self.watch.rid():
            self._learn_anew()  # which a pass that is to end early does not
        self._open(step, ids, mask, compiled)
        if parts.regions.turn(self.asked.model.training):
            parts.installer.only_on_model()
        if compiled:
            parts.installer.only_on_model()
            live.enter_compiled(args, kwargs)
            return True
        parts.paths.begin()
        if not parts.regions.static(self.asked.model):
            parts.installer.on_scopes()
            live.new_tracer().trace.labels.enter(args, kwargs)
            live.trace_on()
        return True

    def _open(self, step: int, ids: Tensor | None, mask: Tensor | None, compiled: bool) -> None:
        """A pass is under way from here on."""
        model = self.asked.model
        gradually = self._gradually and not compiled
        current = self._live.current = self._parts.store.begin(step, model.training, gradually)
        current.ids, current.mask = ids, mask
        self._parts.fused.begin()
        if self.asked.wants.weights:
            current.weights = {}
        if self._edits:
            self._edits.begin(current.grads)
        if self._stop is not None:
            self._stop.begin()

    def _refused(self, args: Any, kwargs: Any, compiled: bool) -> bool:
        """Whether the pass cannot be captured as a whole; if so, it is named."""
        self._live.idle = False
        miss = self._parts.misses.add
        if not compiled and ever_compiled() and compiled_by() is not None:
            self._compiled.noticed()
            why = "it runs in code that torch.compile has compiled"
        elif nothing_between():
            return False
        elif transforming() and under_transform(self.asked.model, (args, kwargs)):
            miss("", why := Reason.TRANSFORMED.text())
        elif why := recorded():
            miss("", why)
        else:
            return False
        if self._edits:
            raise self._edits.refused(why)
        return True

    def _rebuild(self) -> None:
        """The model has other modules than it had: learn it anew."""
        parts = self._parts
        self.asked.names.refresh()
        self.asked.wants.refresh()
        self.asked.edits.refresh()
        parts.paths.refresh()
        self._compiled.refresh()
        if self._stop is not None:
            self._stop.forget()
        self._learn_anew()
        parts.unseen.scripted(bool(self._compiled))

    def _learn_anew(self) -> None:
        """What may be replayed is another thing than it was."""
        parts = self._parts
        parts.regions.clear()
        parts.installer.only_on_model()
        self.watch = ModelGuard(self.asked.model, parts.hooks)
        self.open_always()

    def open_always(self) -> None:
        """Trace in every pass where inputs or outputs are edited, and methods are called."""
        if self._edits and not self._edits_are_placed():
            self._parts.regions.open(*self._edits.modules())
        if self.asked.methods:
            self._parts.regions.open(self.asked.model)

    def _edits_are_placed(self) -> bool:
        """Whether a plan may tell of all edits; what it cannot tell of shows as it is made."""
        asked = self.asked
        if asked.stop is not None or any(map(fuses, asked.names.by_module)):
            return False
        wants = asked.wants
        # Whoever is shown maps as they come, or stores them otherwise, has what went on, too.
        shown = wants.outputs if asked.analyses or wants.conversion else set()
        return asked.edits.placed(wants.kind("input"), shown)

    def next_block(self) -> int:
        """What comes is another block's; how many passes there were in this one."""
        steps, self.steps, self.told = self.steps, 0, (None, None)
        return steps

    # -- under way ----------------------------------------------------------------------------

    @property
    def thread(self) -> int:
        """The one whose passes are captured."""
        return self._live.thread

    def running(self) -> bool:
        """Whether a pass is under way; one that ended without its post hook is cleared away."""
        if self._live.frame is None:
            return False
        if on_stack(self._live.frame):
            return True
        self.abandon()
        return False

    def inside(self) -> bool:
        """Whether a call of one of the model's methods is no pass of its own."""
        live = self._live
        other = threading.get_ident() != live.thread
        return other or live.idle or in_backward() or self.running()

    @property
    def waits(self) -> bool:
        """Whether this capture is to end the pass that is under way, and wants more of it yet."""
        live, stop = self._live, self._stop
        if stop is None or live.current is None or stop.complete:
            return False
        return live.tracer is not None or live.run is None or not live.run.complete

    # -- end ----------------------------------------------------------------------------------

    def end(self, failed: bool) -> None:
        """The pass has ended."""
        live, stop, parts, wants = self._live, self._stop, self._parts, self.asked.wants
        current, misses = live.current, parts.misses
        lost = live.tracer is not None and live.tracer.lost
        parts.paths.end()
        if live.tracer is not None:
            parts.recorder.finish(live.tracer, failed)
        if current is not None and not failed:
            if wants.picks and not parts.store.fleeting:
                there = {e.origin.name for e in current.entries()}
                self._name_absent(there, wants.without_maps, Reason.FILTERS_WITHOUT_MAP)
            if wants.kind("attention") and not (stop is not None and stop.ended):
                there = {e.origin.name for e in current.entries() if e.kind == "attention"}
                self._name_absent(there, wants.without_attention, Reason.NO_ATTENTION)
            if stop is not None:
                stop.learn(current)
        live.clear()
        parts.fused.end()
        parts.store.end()
        if current is not None:
            if wants.gradients:
                parts.kept_maps.name_spoiled(current)
            self._close(current, failed)
        if misses.entries and not misses.warned:
            misses.warn_in_forward()
        if self._edits and current is not None and not failed:
            if not (stop is not None and stop.ended):
                self._edits.check_done(current.step, lost)

    def _close(self, current: Pass, failed: bool) -> None:
        """No map comes to a pass any more: keep those that it has."""
        current.closed = True
        if current.weights is not None:
            current.weights.update(versions(self.asked.names.by_module))
        self._parts.kept_maps.keep(current, failed)

    def _name_absent(
        self, there: set[str], absent: Callable[[set[str]], Iterable[str]], reason: Reason
    ) -> None:
        misses = self._parts.misses
        for layer in absent(there | {entry.layer for entry in misses.entries}):
            misses.add(layer, reason.text())

    def abandon(self, failed: bool = True) -> None:
        """The pass ended without its post hook: leave no mode, flag or learning hook behind."""
        live, parts = self._live, self._parts
        if live.run is not None:
            live.run.finish()
            if live.current is not None:  # what was captured so far stays readable
                live.current.segments.append(live.run)
        parts.paths.end()
        parts.recorder.drop()
        current = live.current
        live.clear()
        parts.store.end()
        if current is not None:
            self._close(current, failed)
        parts.fused.end()
        self.idle_no_more()

    def idle_no_more(self) -> None:
        """A pass that is not captured has ended, if there was one."""
        self._live.idle = False
        self._parts.installer.listen()

    # -- broken off ---------------------------------------------------------------------------

    def broken_off(self, module: nn.Module, error: BaseException) -> bool | None:
        """A call has ended, by what is no `Exception`: an interrupt, or an early stop.

        The user's code may catch an interrupt inside the block, to save the model for instance: our
        modes and flags must be off before it does. So may the model's own code, and go on.

        Returns:
            Whether the call returns None in place of raising that; None if it is a part of the pass
            that ended as by any exception.
        """
        live, inside = self._live, module is not self.asked.model
        if threading.get_ident() != live.thread:
            return False
        if inside and self._edits and not isinstance(error, StoppedError):
            self._edits.broken_off = True
        if inside or live.depth:  # what called it may go on
            if not isinstance(error, StoppedError):
                return None
            if not inside:
                live.leave_model()
            return False
        if isinstance(error, StoppedError):
            if error.stop is self._stop:
                for other in others(self):  # it has ended for whoever captures it, too
                    other.cut()
                return True
            self.cut()
        elif live.current is not None:
            self.abandon()
        self.idle_no_more()
        return False

    def cut(self) -> None:
        """Another capture has ended this pass, or a part of it: nothing more is captured of it."""
        live, misses = self._live, self._parts.misses
        if live.current is None:
            return
        if self._stop is None or self.waits:
            misses.add("", Reason.STOPPED_BY_OTHER_CAPTURE.text())
        around = on_stack(live.frame)  # our model goes on, or its post hook is to come
        self.abandon(failed=False)
        live.idle = around
        if not misses.warned:
            misses.warn_in_forward()
