"""Compiled modules in a capture: an entry at each, and behind it a variant that returns its maps.

An entry lies where the compiled code of a module is called. It lets calls of threads that do not
capture pass to the user's own code. Variants are kept with the user's compiled function, so that
the next capture that asks for the same compiles nothing.

    a compiled module's call -> _CompiledEntry -> CompiledCapture.begin_call   is it captured?
                                               -> InstrumentedCompile          it runs
                                               -> CompiledCapture.end_call
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fmapkit import layers, nonlinearities
from fmapkit.compiled.run import CompiledCapture, GraphMapSink, running
from fmapkit.reasons import Reason
from fmapkit.torchlib.autograd import in_backward
from fmapkit.torchlib.call_override import when_traced
from fmapkit.torchlib.compiled_modules import (
    around,
    compiled_roots,
    holds,
    is_optimized,
    plain,
    tell_no_more,
    tell_of_new,
)
from fmapkit.torchlib.dynamo import UnknownError

if TYPE_CHECKING:
    from fmapkit.compiled.variant import InstrumentedCompile

# Where the user's compiled function keeps the variants made of it.
_KEPT = "_fmapkit_variants"


def _place(root: nn.Module) -> str:
    """Where a compiled module has its compiled function."""
    return "forward" if is_optimized(root) else "_compiled_call_impl"


class _CompiledEntry:
    """Lies where the compiled code of a module is called, for the captures of its thread."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.module = plain(root)
        self.place = _place(root)
        self.original = root.__dict__[self.place]
        self.handlers: list[CompiledCapture] = []
        root.__dict__[self.place] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        thread = threading.get_ident()
        here = [h for h in self.handlers if h.thread == thread]
        if not here or running.sinks:
            return self.original(*args, **kwargs)
        return self._capture(here, args, kwargs)

    def close(self, handler: CompiledCapture) -> None:
        """A capture ends; with the last one goes the entry."""
        self.handlers.remove(handler)
        for _, variant in getattr(self.original, "__dict__", {}).get(_KEPT, ()):
            if handler in variant.captures:
                variant.rest()
        if not self.handlers and self.root.__dict__.get(self.place) is self:
            self.root.__dict__[self.place] = self.original

    def _variant(self, captures: Sequence[CompiledCapture]) -> InstrumentedCompile:
        """The variant for what these captures ask, perhaps compiled in an earlier block."""
        variant = self._known(captures)
        if variant is None:
            # Here, for torch's tracing tools take a quarter of a second to import.
            from fmapkit.compiled.variant import InstrumentedCompile

            variant = InstrumentedCompile(self.root, self.original)
            asked = self._asked(captures)
            self.original.__dict__.setdefault(_KEPT, []).append((asked, variant))
        variant.captures = list(captures)
        return variant

    def _known(self, captures: Sequence[CompiledCapture]) -> InstrumentedCompile | None:
        asked = self._asked(captures)
        kept = getattr(self.original, "__dict__", {}).get(_KEPT, ())
        return next((variant for signature, variant in kept if signature == asked), None)

    def _asked(self, captures: Sequence[CompiledCapture]) -> list[Any]:
        """What the graphs' outputs depend on; a selection by name on the root's own name, too."""
        # The code that is compiled once more is that of its class, but where it has its own.
        forward = self.module.__dict__.get("forward", type(self.module).forward)
        asked = (layers.version, nonlinearities.version, forward)
        return [(c.wants.signature, c.names.of(self.module), asked) for c in captures]

    def _capture(self, handlers: Sequence[CompiledCapture], args: Any, kwargs: Any) -> Any:
        """One call: a pass of its own, or a part of one."""
        if in_backward():
            # Activation checkpointing runs it once more, and expects what the forward saved.
            again = self._known(handlers)
            if again is None or any(h.idle for h in handlers):
                return self._bare(handlers, self.original, *args, **kwargs)
            return self._variants(handlers, again, (), args, kwargs)
        begun = [(h, h.begin_call(self.root, self.module, args, kwargs)) for h in handlers]
        calls = [(h, sink) for h, sink in begun if sink is not None]
        if not calls:
            for handler in handlers:
                handler.skip(self.root)
            return self._bare(handlers, self.original, *args, **kwargs)
        try:
            variant = self._variant([handler for handler, _ in calls])
        except UnknownError as error:
            for handler, _ in calls:
                handler.unread(self.root, str(error))
            output = self._bare(handlers, self.original, *args, **kwargs)
        else:
            try:
                sinks = [sink for _, sink in calls]
                output = self._variants(handlers, variant, sinks, args, kwargs)
            except BaseException:
                for handler, sink in calls:
                    handler.fail(sink)
                raise
            for _, sink in calls:
                sink.finish(output)
        for handler, sink in calls:
            handler.end_call(sink, output)
        return output

    def _variants(
        self,
        handlers: Sequence[CompiledCapture],
        variant: InstrumentedCompile,
        sinks: Sequence[GraphMapSink],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """What a variant gives."""
        hooked = variant.runs_hooks
        if hooked:
            return self._bare(handlers, variant, sinks, args, kwargs, hooked=hooked)
        return variant(sinks, args, kwargs, hooked)

    def _bare(
        self, handlers: Sequence[CompiledCapture], call: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """What a call gives that runs the module's own hooks: ours are for its eager calls."""
        off = [handler.without_hooks(self.module) for handler in handlers]
        try:
            return call(*args, **kwargs)
        finally:
            for hooks in reversed(off):
                hooks.put_back()


class _DeferredEntry:
    """Holds the place of an entry at a module that torch.compile is just making."""

    def __init__(self, root: nn.Module, entries: CompiledEntries) -> None:
        self._root = root
        self._entries: CompiledEntries | None = entries
        root.__dict__["_compiled_call_impl"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        entries = self._entries
        self.close()
        if entries is not None:
            entries.add(self._root)
        return self._root(*args, **kwargs)

    def close(self) -> None:
        self._entries = None
        if self._root.__dict__.get("_compiled_call_impl") is self:
            del self._root.__dict__["_compiled_call_impl"]


class CompiledEntries:
    """The entries at the compiled modules of one capture."""

    _handler: CompiledCapture  # while the block is open

    def __init__(self, model: nn.Module, given: nn.Module) -> None:
        self._model = model
        # The model as it was given; what `torch.compile` returned, or a plain one.
        self._given = given
        self._entries: list[_CompiledEntry] = []
        self._deferred: list[_DeferredEntry] = []
        self._resting: list[nn.Module] = []
        self._watching = False

    def __bool__(self) -> bool:
        """Whether anything compiled is known that runs the model or is a part of it."""
        return bool(self._entries)

    def open(self, handler: CompiledCapture) -> None:
        """Set an entry at each compiled module in the model, or around it."""
        self._handler, model = handler, self._model
        roots = [*compiled_roots(self._given), *around(model)]
        if self._given is not model:
            roots += compiled_roots(model)
        for root in roots:
            self.add(root)
        self._watch()

    def add(self, root: nn.Module) -> None:
        """Set an entry at a compiled module."""
        handler = self._handler
        handler.leave_alone(root)
        there = root.__dict__.get(_place(root))
        entry = there if isinstance(there, _CompiledEntry) else _CompiledEntry(root)
        if handler not in entry.handlers:
            entry.handlers.append(handler)
            self._entries.append(entry)

    def refresh(self) -> None:
        """The model has other modules than it had: some may be compiled."""
        for root in compiled_roots(self._model):
            if plain(root) is not self._model:
                self.add(root)

    def add_new(self) -> list[nn.Module]:
        """Set entries at the compiled modules that have none yet; returns these."""
        known = {entry.root for entry in self._entries}
        new = [root for root in compiled_roots(self._model) if root not in known]
        for root in new:
            self.add(root)
        return new

    def rest(self) -> None:
        """Between two calls of a capture that goes on, nothing is set."""
        if self._watching:
            self._resting = [entry.root for entry in self._entries]
            self.close()

    def wake(self) -> None:
        """Set again what `rest` has removed."""
        for root in self._resting:
            if _place(root) in root.__dict__:
                self.add(root)
        self._resting = []
        self._watch()

    def close(self) -> None:
        """Remove what `open` set; the variants stay with the user's compiled functions."""
        if not self._watching:
            return
        self._watching = False
        tell_no_more(self._made)
        when_traced.remove(self._traced)
        for deferred in self._deferred:
            deferred.close()
        self._deferred.clear()
        for entry in self._entries:
            entry.close(self._handler)
        self._entries.clear()

    def _watch(self) -> None:
        self._watching = True
        tell_of_new(self._made)
        when_traced.append(self._traced)

    def _made(self, module: nn.Module, inner: nn.Module) -> None:
        handler = self._handler
        if threading.get_ident() == handler.thread and holds(inner, self._model):
            self._deferred.append(_DeferredEntry(module, self))

    def _traced(self) -> None:
        """torch.compile traces code with a hook of ours in it: code that nobody had announced."""
        handler = self._handler
        if threading.get_ident() == handler.thread and not running.sinks and not handler.idle:
            self.noticed()

    def noticed(self) -> None:
        """Compiled code without an entry calls the model, or will: set one if it is known."""
        handler = self._handler
        new = self.add_new()
        for root in new:
            handler.miss(handler.names.of(root), Reason.COMPILED_IN_THE_BLOCK.text())
        if not new:
            handler.miss("", Reason.CALLED_FROM_COMPILED_CODE.text())
