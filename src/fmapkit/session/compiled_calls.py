"""Calls of compiled code in a capture: each is a pass, or a part of one, or none."""

from __future__ import annotations

from typing import Any

from torch import nn

from fmapkit.compiled import GraphMapSink
from fmapkit.instrumentation import Off
from fmapkit.reasons import Reason
from fmapkit.session.parts import SessionParts
from fmapkit.session.passes import Passes
from fmapkit.torchlib.compiled_modules import holds, plain


class CompiledCalls:
    """Answers calls of compiled code."""

    def __init__(self, parts: SessionParts, passes: Passes) -> None:
        asked = parts.asked
        self.model, self.names, self.wants = asked.model, asked.names, asked.wants
        self.miss = parts.misses.add
        self._live = parts.live
        self._hooks = parts.hooks
        self._unseen = parts.unseen
        self._passes = passes

    @property
    def thread(self) -> int:
        """The one whose passes are captured."""
        return self._live.thread

    @property
    def idle(self) -> bool:
        """Whether the model runs a pass that is not captured."""
        return self._live.idle

    @property
    def structure(self) -> object:
        """Another object once the model has other modules than it had."""
        return self._passes.watch

    def leave_alone(self, root: nn.Module) -> None:
        """An entry is set at a compiled module: no hook of ours may be inside."""
        if not self._passes.steps:
            self._hooks.drop("around", keep=[self.model])
        if not holds(root, self.model):
            self._hooks.excluded.update(root.modules())

    def without_hooks(self, module: nn.Module) -> Off:
        """Take the capture's hooks off a module until they are put back.

        torch.compile(module) runs the module's own hooks, and ours are for its eager calls.
        """
        return self._hooks.take_off(module)

    def begin_call(
        self, root: nn.Module, module: nn.Module, args: Any, kwargs: Any
    ) -> GraphMapSink | None:
        """A call of compiled code begins, of a plain module; None if it is not captured."""
        live = self._live
        if live.current is None:
            if module is self.model:
                begun = self._passes.begin(args, kwargs, compiled=True)
                return GraphMapSink(self, live, alone=True) if begun else None
            if holds(module, self.model):
                self.miss("", Reason.CALLED_FROM_COMPILED_CODE.text())
            elif not live.idle:
                self._unseen.stray(root)
            return None
        if live.run is not None or live.traced() is None:
            self.unread(root, "inside a replayed module")
            return None
        live.trace_off()
        return GraphMapSink(self, live, alone=False)

    def skip(self, root: nn.Module) -> None:
        """The call is captured by nobody."""
        if plain(root) is self.model:
            self._passes.idle_no_more()

    def unread(self, root: nn.Module, why: str) -> None:
        """The call runs as the user compiled it, and nobody can look into it."""
        self.miss(self.names.of(root), Reason.COMPILED_UNREADABLY.text(why=why))

    def fail(self, sink: GraphMapSink) -> None:
        """It raised; the model around it may catch that and go on."""
        if sink.alone:
            self._passes.abandon()
        else:
            self._live.trace_on()

    def end_call(self, sink: GraphMapSink, output: Any) -> None:
        """A call of compiled code has ended."""
        if sink.alone:
            if self.model in self.wants.outputs:
                sink.hold_output(self.model, output)
            self._passes.end(failed=False)
        else:
            self.wants.conversion.fence()
            self._live.trace_on()
