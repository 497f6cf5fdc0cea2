"""What is known of a pass while it is traced: the parts of the tracer share it, and only it.

Who watches functions, modules, attention or edits is given a `PassTrace`, reads in it where the
pass is, and writes to its record and its labels. None of them knows the tracer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn

from fmapkit import nonlinearities
from fmapkit.model import HOW, Names
from fmapkit.provenance import FOLLOWED, STOP, Function, FunctionCall, Source
from fmapkit.reasons import Reason
from fmapkit.torchlib.nested import tensors_in
from fmapkit.tracing.candidates import is_whole, may_be_sigma, role_of
from fmapkit.tracing.events import Event, FusedCall
from fmapkit.tracing.frames import Frame, Place, Placed, first_tensor, running_module
from fmapkit.tracing.input_reads import InputRead
from fmapkit.tracing.record import Record

HIDDEN = (
    "it reached {!r}, which may be one nonlinearity or layer itself: it was called on its own, so "
    "far only as a part of another module, and is seen as a whole from the next pass on"
)
_CALL = nn.Module._call_impl.__code__

Call = tuple[nn.Module, Any, Any]


class PassTrace:
    """Where a traced pass is, and what was noted of it."""

    def __init__(self, names: Names, record: Record) -> None:
        self.names = names
        self.record = record
        self.wants = record.wants
        self.labels = record.labels
        self.frames: list[Frame] = []  # the modules that are running, outermost first
        self.learning = 0  # > 0 while a region is recorded: then every module has hooks
        self.opaque = 0  # how many running modules are registered layers
        # Truths that were read of what it was given, in order, and what they were.
        self.asked: list[tuple[InputRead, Any]] = []
        self._outside = 0  # how many calls are around the region that is recorded
        self.paused = False  # nothing is to be seen: a region is replayed, or a module is tried
        # Something was, or might have been, edited, as only a traced pass can be.
        self.edited = False
        # Inputs and outputs of modules that edits were asked for, as a plan may tell of them.
        self.placed: dict[Place, Placed] = {}
        # Modules that were seen to turn data into numbers of Python's, or to let it decide what
        # runs, or whose weight is used.
        self.deciding: set[nn.Module] = set()
        self.unhooked: set[nn.Module] = set()  # modules that ran without hooks
        # After how many decisions modules began; None where one ended.
        self.moments: list[tuple[int, nn.Module | None]] = []
        # The sizes by which reshapes have kept filters, or not (see `ChannelLayout.at_stake`).
        self.mixed: list[int] = []
        self.sources: list[Source] = []  # where layers have got their weights
        self.fused: list[FusedCall] = []  # calls whose maps are their fused kernels'

    def end(self) -> None:
        """Let go of all that could keep a tensor or a graph alive."""
        self.record.end()
        self.frames.clear()
        self.labels.end()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Nothing is to be seen for a while."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    # -- where the pass is --------------------------------------------------------------------

    def begin_region(self) -> None:
        """The next call is that of a region that is to be recorded."""
        self.learning += 1
        self._outside = len(self.frames)
        self.edited = False
        self.placed.clear()
        self.moments.clear()
        self.asked.clear()
        self.mixed.clear()
        self.record.aliases.begin_region()

    def end_region(self) -> None:
        """It has ended."""
        self.learning -= 1

    @property
    def region(self) -> Frame | None:
        """The call of the region that is recorded."""
        inside = self.learning and len(self.frames) > self._outside
        return self.frames[self._outside] if inside else None

    def scope(self) -> nn.Module:
        """The module in whose forward a function runs.

        Modules inside a region have no hooks. When a module that is traced calls one of them past
        the region, no frame tells; its functions are seen all the same, and from the next pass on
        it has hooks.
        """
        module = self.frames[-1].module
        if self.learning:  # every module is hooked
            return module
        running = running_module()
        if running is None or running is module or running not in self.names.by_module:
            return module
        if any(f.module is running for f in self.frames):
            # Calls inside of it were broken off by what runs no hooks, and it caught that.
            while self.frames[-1].module is not running:
                self.pop()
            return running
        self.unhooked.add(running)
        return running

    def hidden(self) -> nn.Module | None:
        """The module without hooks inside of which a function runs, if it may be one σ or layer."""
        if self.learning:
            return None
        found = None
        for call in _bare_calls({frame.module for frame in self.frames}):
            if call[0] in self.names.by_module and _is_hidden(call):
                found = call[0]
                self.unhooked.add(found)
        return found

    def running(self) -> nn.Module:
        """The innermost module that runs, registered or not."""
        return running_module() or self.frames[-1].module

    def pop(self) -> Frame:
        """The innermost call of a module has ended."""
        frame = self.frames.pop()
        self.opaque -= frame.kind == "layer"
        return frame

    def own_name(self, scope: nn.Module, sigma: str | None) -> str:
        """What a nonlinearity goes by that no layer stands before: its module, and itself."""
        running = self.running()
        if running not in self.names.by_module:
            place = self.names.place(running, again=False)
            if place is not None:
                return place if nonlinearities.module_sigma(running) else f"{place}:{sigma}"
        return f"{self.names.of(scope)}:{sigma}"

    # -- what is noted of it ------------------------------------------------------------------

    def miss_here(self, reason: str) -> None:
        """Something in the innermost module cannot be captured."""
        self.record.miss(self.names.of(self.frames[-1].module), reason)

    def miss_of_part(self, layer: str, reason: str) -> None:
        """Something cannot be captured, unless what runs here turns out to be one σ as a whole."""
        for frame in reversed(self.frames):
            if frame.degrees is not None:
                frame.unseen.append((layer, reason))
                return
        self.record.miss(layer, reason)

    def decides(
        self, by_inputs: Callable[[Frame], InputRead | None] | None = None
    ) -> InputRead | None:
        """What runs here decides by data: the calls around it are to be traced in every pass.

        But not those whose inputs tell what is decided, nor what runs inside of them.

        Args:
            by_inputs: tells what is decided as a function of the inputs of a call; None if none is.

        Returns:
            The same of the region that is recorded.
        """
        region, inside = self.region, False
        for frame in self.frames:
            inside = inside or frame is region
            read = by_inputs(frame) if inside and by_inputs is not None else None
            if read is not None:
                return read if frame is region else None
            self.deciding.add(frame.module)
        return None

    def past_hooks(self, at: FrameType | None, entered: nn.Module | None = None) -> None:
        """Name the modules that run without their hooks, where that keeps something from us.

        They are looked for from a frame on, or around a module whose call has just begun.
        """
        for module, method in self.names.past_hooks.running(at, entered):
            name = self.names.by_module.get(module)
            if name is None:
                continue
            if module in self.wants.outputs:
                self.record.miss(name, Reason.PAST_HOOKS_OUTPUT.text(how=HOW[method]))
            elif is_whole(module):
                self.record.miss(name, Reason.PAST_HOOKS_WHOLE.text(how=HOW[method]))

    def before_writes(self, known: Function, args: Any, kwargs: Any) -> None:
        """A function that is no nonlinearity is about to write to what it is given.

        Of an operator with a name of its own, nobody knows which filters are there then.
        """
        labels, stops = self.labels, False
        if known.mutates:
            stops = any(labels.channels(t) is not None for t in tensors_in(*args, kwargs))
        for target in known.writes(args, kwargs):
            self.record.aliases.before_write(target)
            if stops:
                before = labels.of(target)
                labels.put(target, STOP)
                labels.written(target, before)

    def spare(self, event: Event) -> None:
        """Outside of regions, what no map holds is let go at once: it may be a lot in the end."""
        if self.learning:
            return
        for frame in self.frames:
            if frame.kind != "plain":
                return
        self.record.let_go([event])

    def follow(self, call: FunctionCall, nonlinear: bool = False) -> None:
        """Follow what is computed point by point, in a weightless module from its input alone."""
        frame, channels = self.frames[-1], self.labels.channels
        # Inside a registered nonlinearity, nobody asks for what is computed from what.
        if frame.kind != "sigma" and (nonlinear or call.name in FOLLOWED):
            frame.pointwise.step(call, channels, nonlinear)
        if not frame.watched:
            return
        for frame in self.frames:
            if frame.degrees is not None:
                frame.degrees.step(call, channels, nonlinear)


def _bare_calls(hooked: set[nn.Module]) -> list[Call]:
    """The calls that are under way inside the innermost one that hooks tell of, innermost first.

    Past a region: a traced module calls what hooks of ours would tell of as its part only. From the
    next pass on, such modules have hooks. In this one, Python's stack tells that they run, and what
    they call is seen; but not when they began, nor so what they are as a whole. The hooks of
    another capture tell that capture alone.
    """
    found: list[Call] = []
    at = sys._getframe(2)
    while at is not None:
        if at.f_code is _CALL:
            here = at.f_locals
            if here["self"] in hooked:
                break
            found.append((here["self"], here["args"], here["kwargs"]))
        at = at.f_back  # type: ignore[assignment]
    return found


def _is_hidden(call: Call) -> bool:
    """Whether a call is one whose functions may be a part of one nonlinearity, or of a layer."""
    module, args, kwargs = call
    role = role_of(module)
    if role != "open":
        return role == "layer"
    x, _ = first_tensor(args, kwargs)
    return x is not None and may_be_sigma(module, args, kwargs, x)
