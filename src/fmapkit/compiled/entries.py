"""Compiled modules in a capture: a door at each, and behind it a variant that returns its maps.

A door stands where the compiled code of a module is called. It lets calls of threads that do not
capture pass to the user's own code. Variants are kept with the user's compiled function, so that
the next capture that asks for the same compiles nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from fmapkit import layers, nonlinearities
from fmapkit.compiled.run import GraphMapSink, UnknownError, running
from fmapkit.torchlib.call_override import when_traced
from fmapkit.torchlib.compiled_modules import around, compiled_roots, holds, is_optimized, plain

if TYPE_CHECKING:
    from fmapkit.compiled.variant import InstrumentedCompile
    from fmapkit.session import Session

__all__ = ["Compiled"]

UNSEEN = (
    "it is compiled by torch.compile in a way that fmapkit cannot look into ({why}): hooks never "
    "run in code that is compiled already"
)
AROUND = (
    "it was called by code that torch.compile has compiled around it, where no hook runs; compile "
    "the captured model itself, or capture what is compiled"
)
NOTHING_RAN = (
    "no call of it was seen: no pass ran inside the block, or it ran in code that torch.compile "
    "had compiled around it, where no hook runs: compile the captured model itself, or capture "
    "what is compiled"
)
# Where the user's compiled function keeps the variants made of it.
_KEPT = "_fmapkit_variants"


def _place(root: nn.Module) -> str:
    """Where a compiled module has its compiled function."""
    return "forward" if is_optimized(root) else "_compiled_call_impl"


class _CompiledEntry:
    """Stands where the compiled code of a module is called; opens on the sessions of its thread."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.module = plain(root)
        self.place = _place(root)
        self.original = root.__dict__[self.place]
        self.sessions: list[Session] = []
        self._latest: tuple[Any, InstrumentedCompile] | None = (
            None  # what the latest one was chosen by
        )
        root.__dict__[self.place] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        thread = threading.get_ident()
        here = [s for s in self.sessions if s.live.thread == thread]
        if not here or running.sinks:
            return self.original(*args, **kwargs)
        # torch.compile(module) runs the module's own hooks, and ours are for its eager calls.
        off = [session.hooks.take_off(self.module) for session in here]
        try:
            return self._capture(here, args, kwargs)
        finally:
            for hooks in reversed(off):
                hooks.put_back()

    def close(self, session: Session) -> None:
        """The session ends; with the last one goes the door."""
        self.sessions.remove(session)
        self._latest = None
        for _, variant in getattr(self.original, "__dict__", {}).get(_KEPT, ()):
            if session in variant.sessions:
                variant.rest()
        if not self.sessions and self.root.__dict__.get(self.place) is self:
            self.root.__dict__[self.place] = self.original

    def _variant(self, sessions: Sequence[Session]) -> InstrumentedCompile:
        """The variant for what these sessions ask; compiled in an earlier block, if there was one.

        Raises:
            UnknownError: torch.compile has made it in a way that is not known.
        """
        # A session's names change with its watch.
        state = [(s, s.watch, layers.version, nonlinearities.version) for s in sessions]
        latest = self._latest
        if latest is not None and latest[0] == state:
            return latest[1]
        variant = self._known(sessions)
        if variant is None:
            # Here, for torch's tracing tools take a quarter of a second to import.
            from fmapkit.compiled.variant import InstrumentedCompile

            variant = InstrumentedCompile(self.root, self.original)
            asked = self._asked(sessions)
            self.original.__dict__.setdefault(_KEPT, []).append((asked, variant))
        variant.sessions = list(sessions)
        self._latest = (state, variant)
        return variant

    def _known(self, sessions: Sequence[Session]) -> InstrumentedCompile | None:
        asked = self._asked(sessions)
        kept = getattr(self.original, "__dict__", {}).get(_KEPT, ())
        return next((variant for signature, variant in kept if signature == asked), None)

    def _asked(self, sessions: Sequence[Session]) -> list[Any]:
        """What the graphs' outputs depend on; a selection by name on the root's own name, too."""
        registered = (layers.version, nonlinearities.version)
        return [(s.wants.signature, s.names.of(self.module), registered) for s in sessions]

    def _capture(self, sessions: Sequence[Session], args: Any, kwargs: Any) -> Any:
        """One call: a pass of its own, or a part of one."""
        if torch._C._current_graph_task_id() != -1:
            # Activation checkpointing runs it once more, and expects what the forward saved.
            again = self._known(sessions)
            if again is None or any(s.live.idle for s in sessions):
                return self.original(*args, **kwargs)
            return again((), args, kwargs)
        sinks: list[GraphMapSink] = []
        for session in sessions:
            sink = session.compiled.enter(self.root, self.module, args, kwargs)
            if sink is not None:
                sinks.append(sink)
        if not sinks:
            for session in sessions:
                session.compiled.skip(self.root)
            return self.original(*args, **kwargs)
        try:
            variant = self._variant([s.session for s in sinks])
        except UnknownError as error:
            for sink in sinks:
                sink.session.compiled.unseen(self.root, str(error))
            output = self.original(*args, **kwargs)
        else:
            try:
                output = variant(sinks, args, kwargs)
            except BaseException:
                for sink in sinks:
                    sink.session.compiled.fail(sink)
                raise
            for sink in sinks:
                sink.finish(output)
        for sink in sinks:
            sink.session.compiled.leave(sink, output)
        return output


class _DeferredEntry:
    """Holds the place of a door at a module that torch.compile is just making."""

    def __init__(self, root: nn.Module, compiled: Compiled) -> None:
        self._root = root
        self._compiled: Compiled | None = compiled
        root.__dict__["_compiled_call_impl"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiled = self._compiled
        self.close()
        if compiled is not None:
            compiled.add(self._root)
        return self._root(*args, **kwargs)

    def close(self) -> None:
        """Leave nothing."""
        self._compiled = None
        if self._root.__dict__.get("_compiled_call_impl") is self:
            del self._root.__dict__["_compiled_call_impl"]


class Compiled:
    """The compiled modules of one session.

    Args:
        session: that captures.
        given: the model as it was given; what `torch.compile` returned, or a plain one.
    """

    def __init__(self, session: Session, given: nn.Module) -> None:
        self._session = session
        self._given = given
        self._doors: list[_CompiledEntry] = []
        self._late: list[_DeferredEntry] = []
        self._resting: list[nn.Module] = []
        self._watching: Any = None

    def __bool__(self) -> bool:
        """Whether anything compiled is known that runs the model or is a part of it."""
        return bool(self._doors)

    def open(self) -> None:
        """Set a door at each compiled module in the model, or around it."""
        model = self._session.model
        roots = [*compiled_roots(self._given), *around(model)]
        if self._given is not model:
            roots += compiled_roots(model)
        for root in roots:
            self.add(root)
        # torch.compile(module) makes a module around it, which is when torch calls this.
        self._watching = register_module_module_registration_hook(self._registered)
        when_traced.append(self._traced)

    def add(self, root: nn.Module) -> None:
        """Set a door at a compiled module."""
        self._session.uncover()
        there = root.__dict__.get(_place(root))
        door = there if isinstance(there, _CompiledEntry) else _CompiledEntry(root)
        if self._session not in door.sessions:
            door.sessions.append(self._session)
            self._doors.append(door)
        if not holds(root, self._session.model):
            self._session.hooks.excluded.update(root.modules())

    def refresh(self) -> None:
        """The model has other modules than it had: some may be compiled."""
        for root in compiled_roots(self._session.model):
            if plain(root) is not self._session.model:
                self.add(root)

    def compiled_inside(self) -> None:
        """The model has been compiled in place, inside of the block."""
        doors = {door.root for door in self._doors}
        for root in compiled_roots(self._session.model):
            if root not in doors:
                self.add(root)

    def rest(self) -> None:
        """Between two calls of a capture that goes on, nothing is set."""
        if self._watching is None:
            return
        self._watching.remove()
        self._watching = None
        when_traced.remove(self._traced)
        for late in self._late:
            late.close()
        self._late.clear()
        self._resting = [door.root for door in self._doors]
        for door in self._doors:
            door.close(self._session)
        self._doors.clear()

    def wake(self) -> None:
        """Set again what `rest` has removed."""
        for root in self._resting:
            if _place(root) in root.__dict__:
                self.add(root)
        self._resting = []
        self._watching = register_module_module_registration_hook(self._registered)
        when_traced.append(self._traced)

    def close(self) -> None:
        """Remove what `open` set; the variants stay with the user's compiled functions."""
        if self._watching is None:
            return
        self._watching.remove()
        when_traced.remove(self._traced)
        for late in self._late:
            late.close()
        for door in self._doors:
            door.close(self._session)
        self._doors.clear()
        session = self._session
        if (
            not session.steps
            and not session.missed
            and "torch._dynamo.convert_frame" in sys.modules
        ):
            session.miss("", NOTHING_RAN)

    def _registered(self, module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if name != "_orig_mod" or not is_optimized(module) or submodule is None:
            return
        if threading.get_ident() == self._session.live.thread and holds(
            submodule, self._session.model
        ):
            self._late.append(_DeferredEntry(module, self))

    def _traced(self) -> None:
        """torch.compile traces code with a hook of ours in it: code that nobody had announced."""
        if threading.get_ident() == self._session.live.thread and not running.sinks:
            if not self._session.live.idle:
                self.noticed()

    def noticed(self) -> None:
        """Compiled code without a door calls the model, or will: give it one if it is known."""
        session = self._session
        doors = {door.root for door in self._doors}
        new = [r for r in compiled_roots(session.model) if r not in doors]
        for root in new:
            self.add(root)
            session.miss(
                session.names.of(root),
                "it was compiled inside the block: its first call, which compiles it, is not "
                "captured, and the later ones are",
            )
        if not new:
            session.miss("", AROUND)

    def enter(
        self, root: nn.Module, model: nn.Module, args: Any, kwargs: Any
    ) -> GraphMapSink | None:
        """A call of compiled code begins, of a plain module; None if it is not captured."""
        session = self._session
        if session.live.current is None:
            if model is session.model:
                if not session.begin(args, kwargs, compiled=True):
                    return None
                return GraphMapSink(session, alone=True)
            if holds(model, session.model):
                session.miss("", AROUND)
            elif not session.live.idle:
                session.unseen.stray(root)
            return None
        if session.live.run is not None or session.live.traced() is None:
            session.miss(session.names.of(root), UNSEEN.format(why="inside a replayed module"))
            return None
        session.live.trace_off()
        return GraphMapSink(session, alone=False)

    def skip(self, root: nn.Module) -> None:
        """The call is not captured."""
        if plain(root) is self._session.model:
            self._session.live.idle = False

    def unseen(self, root: nn.Module, why: str) -> None:
        """The call ran as the user compiled it, and nobody could look into it."""
        self._session.miss(self._session.names.of(root), UNSEEN.format(why=why))

    def fail(self, sink: GraphMapSink) -> None:
        """It raised; the model around it may catch that and go on."""
        if sink.alone:
            self._session.abandon()
        else:
            self._session.live.trace_on()

    def leave(self, sink: GraphMapSink, output: Any) -> None:
        """A call of compiled code has ended."""
        session = self._session
        if sink.alone:
            if session.model in session.wants.outputs:
                sink.hold_output(session.model, output)
            session.end(failed=False)
        else:
            session.wants.retention.fence()
            session.live.trace_on()
