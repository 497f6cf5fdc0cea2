"""What is under way in a capture: a pass, and in it what is traced, replayed or learned.

The stages above share it, and each changes what is its own. The tracer's place on torch's stack of
modes is kept here: it is there only while it has something to see.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from fmapkit.missed import MissedLog
from fmapkit.paths import ControlPaths, Sizes
from fmapkit.provenance import Label
from fmapkit.replay import Fill, ReplayRun
from fmapkit.session.config import CaptureConfig
from fmapkit.storage import Pass
from fmapkit.torchlib.modes import (
    function_state,
    leave_mode,
    mode_count,
    pop_mode,
    push_mode,
    set_function_state,
)
from fmapkit.tracing import Frame, LabelTable, Tracer


@dataclass(slots=True)
class Recording:
    """A call of a region that is being learned."""

    module: nn.Module  # the region
    frame: Frame  # of the call
    form: Any  # of the call; None if it can be replayed never
    state: int  # that the region is in
    sizes: Sizes  # of its inputs
    inputs: list[Label]  # what its tensors carry
    # What all tensors of the pass carry; empty where nothing around it is traced.
    seen: dict[int, Any]
    alone: bool  # nothing around it is traced
    fill: Fill  # how much was in what its code may read


class PassState:
    """What is under way."""

    def __init__(self, asked: CaptureConfig, misses: MissedLog, paths: ControlPaths) -> None:
        self.asked = asked
        self.misses = misses  # what ran and was not captured
        self.paths = paths  # which decisions passes take
        self.thread = threading.get_ident()  # the one that is captured
        self.current: Pass | None = None  # the pass; None outside of one
        self.idle = False  # the model runs a pass that is not captured
        self.frame: Any = None  # of the stack: the call of the model that is the pass
        self.depth = 0  # how often the model is calling itself
        self.tracer: Tracer | None = None  # of the pass; None where nothing of it is traced
        self.run: ReplayRun | None = None  # the region that is being replayed
        self.recording: Recording | None = None  # the region that is being learned
        self.inner = 0  # how often that region, replayed or learned, is calling itself
        # Of a pass of compiled code, which needs a tracer only where it does not do as before.
        self.labels: LabelTable | None = None
        # What hooks of others were given that only move data, and is not come back yet.
        self.moving: list[tuple[nn.Module, Any]] = []
        self._stacked = False  # the tracer is on torch's stack of modes
        self._functions: Any = None  # torch's state of functions before it was

    def clear(self) -> None:
        """Nothing is under way any more."""
        self.tracer = self.current = self.frame = self.run = self.recording = self.labels = None
        self.depth = self.inner = 0
        self.moving = []

    def enter_model(self) -> None:
        """The model calls itself."""
        self.depth += 1

    def leave_model(self) -> bool:
        """A call of the model has ended: whether it was one inside of another."""
        inside = bool(self.depth)
        self.depth -= inside
        return inside

    def enter_region(self) -> None:
        """The region that is replayed or recorded calls itself."""
        self.inner += 1

    def leave_region(self) -> bool:
        """A call of that region has ended: whether it was one inside of another."""
        inside = bool(self.inner)
        self.inner -= inside
        return inside

    def new_tracer(self) -> Tracer:
        """A tracer for the rest of the pass."""
        asked, labels, paths = self.asked, self.labels, self.paths
        assert self.current is not None
        if labels is None:
            asked.names.update()
        self.tracer = Tracer.of_pass(
            asked.names, asked.wants, asked.edits, asked.stop, self.current, self.misses.add, labels
        )
        self.tracer.trace.record.hook_points.clock = paths.clock()
        return self.tracer

    def enter_compiled(self, args: Any, kwargs: Any) -> None:
        """A pass of compiled code begins: note what it is given."""
        self.asked.names.update()
        self.labels = LabelTable(self.asked.names)
        self.labels.enter(args, kwargs)

    def traced(self) -> Tracer | None:
        """The tracer, made now if compiled code has none yet; None where nothing is traced."""
        if self.tracer is None and self.labels is not None:
            return self.new_tracer()
        return self.tracer

    def trace_on(self) -> None:
        """From here on the tracer, if there is one, sees what runs."""
        if self.tracer is not None:
            self.tracer.trace.paused = False
            if not self._stacked:
                push_mode(self.tracer)
                self._stacked = True
                if self._functions is None:
                    self._functions = function_state()

    def trace_off(self) -> bool:
        """Pause the tracer, off the stack if no other mode lies on top of it; whether it was on."""
        if self.tracer is None or self.tracer.trace.paused:
            return False
        self.tracer.trace.paused = True
        if self._stacked and mode_count():
            top = pop_mode()
            self._stacked = top is not self.tracer
            if self._stacked:
                push_mode(top)
        return True

    def trace_out(self) -> None:
        """The tracer leaves the stack for good."""
        if self._stacked and self.tracer is not None:
            leave_mode(self.tracer)
        self._stacked = False
        # An interrupt may have come just where a look of ours ended, and was to put that back.
        if self._functions is not None and function_state() != self._functions:
            set_function_state(self._functions)
        self._functions = None

    @contextmanager
    def away(self) -> Iterator[None]:
        """What runs here is none of the pass: no hook, tap or twin notes it.

        The modes are a matter of whoever asks for it.
        """
        thread = self.thread
        with ExitStack() as stack:
            if self.tracer is not None:
                stack.enter_context(self.tracer.trace.away())
            stack.enter_context(self.paths.away())
            if self.run is not None:
                stack.enter_context(self.run.paused())
            self.thread = 0  # hooks leave other threads alone
            try:
                yield
            finally:
                self.thread = thread

    # -- hooks of others that only move data, as tensor parallel sets (see `torchlib/sharded.py`) --

    def moves_given(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """They come next, on what a module is given: a hook of ours, outside of them."""
        if self.tracer is not None and threading.get_ident() == self.thread:
            self.moving.append((module, (args, kwargs)))

    def moves_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """The same for those on what it returns."""
        if self.tracer is not None and threading.get_ident() == self.thread:
            self.moving.append((module, output))

    def moved(self, module: nn.Module, values: Any) -> None:
        """They have run: what they have made of a tensor carries what that carried."""
        owner, given = self.moving.pop()
        if owner is module and self.tracer is not None:
            self.tracer.trace.labels.moved(given, values)
