"""What is under way in a capture: a pass, and in it what is traced, replayed or learned.

The stages above share it, and each changes what is its own. The tracer's place on torch's stack of
modes is kept here: it is there only while it has something to see.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from torch import nn

from fmapkit.missed import MissedLog
from fmapkit.paths import ControlPaths, Sizes
from fmapkit.provenance import Label
from fmapkit.replay import Fill, ReplayRun
from fmapkit.session.config import CaptureConfig
from fmapkit.storage import Pass
from fmapkit.torchlib.modes import leave_mode, mode_count, pop_mode, push_mode
from fmapkit.tracing import Frame, LabelTable, Tracer

__all__ = ["PassState", "Recording"]


@dataclass(slots=True)
class Recording:
    """A call of a region that is being learned.

    Attributes:
        module: the region.
        frame: of the call.
        form: of the call; None if it can be replayed never.
        state: that the region is in.
        sizes: of its inputs.
        inputs: what its tensors carry.
        seen: what all tensors of the pass carry; empty where nothing around it is traced.
        alone: nothing around it is traced.
        fill: how much was in what its code may read.
    """

    module: nn.Module
    frame: Frame
    form: Any
    state: int
    sizes: Sizes
    inputs: list[Label]
    seen: dict[int, Any]
    alone: bool
    fill: Fill


class PassState:
    """What is under way.

    Attributes:
        thread: the one that is captured.
        current: the pass; None outside of one.
        idle: the model runs a pass that is not captured.
        frame: of the stack: the call of the model that is the pass.
        depth: how often the model is calling itself.
        tracer: of the pass; None where nothing of it is traced.
        run: the region that is being replayed.
        recording: the region that is being learned.
        inner: how often that region, replayed or learned, is calling itself.
        tags: of a pass of compiled code, which needs a tracer only where it does not do as before.
    """

    def __init__(self, asked: CaptureConfig, misses: MissedLog, paths: ControlPaths) -> None:
        self.thread = threading.get_ident()
        self.current: Pass | None = None
        self.idle = False
        self.frame: Any = None
        self.depth = 0
        self.tracer: Tracer | None = None
        self.run: ReplayRun | None = None
        self.recording: Recording | None = None
        self.inner = 0
        self.tags: LabelTable | None = None
        self._asked = asked
        self._misses = misses
        self._paths = paths
        self._stacked = False  # the tracer is on torch's stack of modes

    def clear(self) -> None:
        """Nothing is under way any more."""
        self.tracer = self.current = self.frame = self.run = self.recording = self.tags = None
        self.depth = self.inner = 0

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
        asked, tags, paths = self._asked, self.tags, self._paths
        assert self.current is not None
        if tags is None:
            asked.names.update()
        self.tracer = Tracer.of_pass(
            asked.names, asked.wants, asked.edits, asked.stop, self.current, self._misses.add, tags
        )
        self.tracer.trace.record.firings.clock = paths.clock()
        return self.tracer

    def enter_compiled(self, args: Any, kwargs: Any) -> None:
        """A pass of compiled code begins: note what it is given."""
        self._asked.names.update()
        self.tags = LabelTable(self._asked.names)
        self.tags.enter(args, kwargs)

    def traced(self) -> Tracer | None:
        """The tracer, made now if compiled code has none yet; None where nothing is traced."""
        if self.tracer is None and self.tags is not None:
            return self.new_tracer()
        return self.tracer

    def trace_on(self) -> None:
        """From here on the tracer, if there is one, sees what runs."""
        if self.tracer is not None:
            self.tracer.trace.paused = False
            if not self._stacked:
                push_mode(self.tracer)
                self._stacked = True

    def trace_off(self) -> bool:
        """Pause the tracer; it leaves the stack, unless another mode lies on top of it.

        Returns:
            Whether it was on.
        """
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
