"""Compiled modules in a capture: a door at each, and behind it a variant that returns its maps.

The variant is the same module compiled once more, by the user's own backend, mode and options, from
graphs that return the maps beside their outputs. It has code of its own: dynamo's cache for the
user's code stays as it is, and is back in use when the block ends. Variants are kept with the
user's compiled function, so that the next capture that asks for the same compiles nothing.
"""

from __future__ import annotations

import inspect
import sys
import threading
import types
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_module_registration_hook

from fmapkit._compiled_run import CompiledGraph, Sink, running
from fmapkit._graph import add_outputs
from fmapkit._hooks import when_traced
from fmapkit._optimized import around, compiled_roots, holds, in_compiled_code, is_optimized, plain

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
    "no call of it was seen; if it was called, then by code that torch.compile had compiled around "
    "it, where no hook runs: compile the captured model itself, or capture what is compiled"
)
UNLABELLED = "fmapkit cannot read its compiled graph: {why}"


# Where the user's compiled function keeps the variants made of it.
_KEPT = "_fmapkit_variants"


class _UnknownError(Exception):
    """The compiled function is of no known kind; the message says why."""


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


def _fresh(function: Any) -> types.FunctionType:
    """The same function with a code object of its own, which dynamo caches for."""
    made = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made


class Variant:
    """A compiled module compiled once more, with graphs that return their maps.

    Args:
        root: the compiled module.
        original: what runs its compiled code.

    Raises:
        _UnknownError: `original` is no function that torch.compile made.
    """

    def __init__(self, root: nn.Module, original: Any) -> None:
        self.sessions: list[Any] = []  # whose maps
        self.graphs: list[CompiledGraph] = []
        self._module = plain(root)
        context, inner = _context(original)
        backend = torch._dynamo.eval_frame.innermost_backend(context.callback)
        compiler = _Compiler(self, backend)
        compile_again = _optimize(context, compiler)
        forward = inspect.getattr_static(type(self._module), "forward", None)
        # torch.compile(module) runs the module's own hooks outside of compiled code, and compiles
        # its forward, but where the forward is torch's own. module.compile() compiles it all.
        self._bound: Any = None
        if (
            isinstance(inner, types.MethodType)
            and inner.__name__ == "_wrapped_call_impl"
            and isinstance(forward, types.FunctionType)
            and "forward" not in self._module.__dict__
        ):
            self._bound = types.MethodType(_fresh(forward), self._module)
            self.code = self._bound.__code__
            self._run = compile_again(self._module._wrapped_call_impl)
        else:
            function = _fresh(_forward)
            self.code = function.__code__
            self._run = compile_again(function)

    def rest(self) -> None:
        """The block has ended; what it compiled is kept."""
        self.sessions.clear()
        for graph in self.graphs:
            graph.forget()

    def __call__(self, sinks: Sequence[Sink], args: Any, kwargs: Any) -> Any:
        """Run it; its graphs bring their maps to the sinks."""
        before = running.sinks, running.stop, running.root
        running.sinks, running.stop = sinks, Variant.__call__.__code__
        running.root = self._module
        try:
            if self._bound is None:
                return self._run(self._module, *args, **kwargs)
            own = self._module.__dict__
            was = own.get("forward")
            own["forward"] = self._bound
            try:
                return self._run(*args, **kwargs)
            finally:
                if was is None:
                    del own["forward"]
                else:
                    own["forward"] = was
        finally:
            running.sinks, running.stop, running.root = before


class _Compiler:
    """The backend of a variant: adds the maps to a graph's outputs; the user's compiles it."""

    def __init__(self, variant: Variant, backend: Any) -> None:
        self._variant = variant
        self._backend = backend
        self.compiler_name = getattr(backend, "compiler_name", "fmapkit")
        for name in ("get_compiler_config", "backend_ctx_ctor", "reset"):
            if hasattr(backend, name):
                setattr(self, name, getattr(backend, name))

    def __call__(self, gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        sinks = running.sinks
        if not sinks:  # the user's own code found its way here; nobody watches
            return self._backend(gm, inputs, **options)
        try:
            graph = self._instrument(gm, inputs, sinks)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            for sink in sinks:
                sink.session.miss(
                    sink.session.names.of(self._variant._module),
                    UNLABELLED.format(why=f"{type(error).__name__}: {error}"),
                )
                sink.unread += 1
            return self._backend(gm, inputs, **options)
        self._variant.graphs.append(graph)
        return _runner(graph, self._backend(gm, inputs, **options))

    def _instrument(
        self, gm: fx.GraphModule, inputs: list[Any], sinks: Sequence[Sink]
    ) -> CompiledGraph:
        untouched = _copy(gm)
        names = sinks[0].session.names
        graph = CompiledGraph(gm, inputs, self._is_whole(), _is_volatile(self._backend), names)
        last = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
        returned: Any = last.args[0]
        graph.own = len(returned)
        try:
            sites = []
            for sink in sinks:
                sink.settle()
                carried = graph.carried(inputs, sink)
                traced = graph.trace(sink.session, inputs, carried, rewrite=True)
                sites += [site for _, site, _ in traced.found]
            graph.gm = _copy(gm)
            graph.places = add_outputs(gm, sites, sinks[0].session.wants.detach)
        except Exception:
            gm.graph = untouched.graph
            gm.recompile()
            raise
        return graph

    def _is_whole(self) -> bool:
        """Whether the graph being compiled is all of the module's compiled code."""
        from torch._dynamo.symbolic_convert import InstructionTranslator

        at = InstructionTranslator.current_tx()
        if at.output.root_tx.f_code is not self._variant.code:
            return False
        reason = at.output.compile_subgraph_reason
        return reason is not None and not reason.graph_break


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph alone, over the same attributes."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for new, old in zip(graph.nodes, gm.graph.nodes, strict=True):
        source = getattr(old, "_dynamo_source", None)
        if source is not None:
            new._dynamo_source = source
        new.meta = dict(old.meta)
    return fx.GraphModule(gm, graph)


def _runner(graph: CompiledGraph, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What dynamo calls in place of the compiled graph."""
    own = graph.own

    def run(*inputs: Any) -> Any:
        sinks = running.sinks
        if not sinks:
            return compiled(*inputs)[:own]
        known = [_guarded(s, s.before, graph, place, inputs) for place, s in enumerate(sinks)]
        outputs = compiled(*inputs)
        for sink, before in zip(sinks, known, strict=True):
            if before is not None:
                _guarded(sink, sink.after, graph, before, inputs, outputs)
        return outputs[:own]

    return run


def _guarded(sink: Sink, function: Callable[..., Any], *args: Any) -> Any:
    """A fault of our own is named in `missed`, and is no failure of the user's forward."""
    try:
        return function(*args)
    except Exception as error:
        name = sink.session.names.of(running.root) if running.root is not None else ""
        sink.session.miss(name, f"fmapkit failed here: {type(error).__name__}: {error}")
        sink.unread += 1
        return None


def _is_volatile(backend: Any) -> bool:
    """Whether it runs CUDA graphs, whose outputs the next run overwrites."""
    import torch._inductor.config as config

    asked = getattr(backend, "config", {})
    found = asked.get("triton.cudagraphs") if isinstance(asked, dict) else None
    name = getattr(backend, "compiler_name", "")
    return bool(config.triton.cudagraphs if found is None else found) or name == "cudagraphs"


def _context(original: Any) -> tuple[Any, Any]:
    """What a compiled function was compiled with, and from."""
    inner = getattr(original, "_torchdynamo_orig_callable", None)
    code = getattr(original, "__code__", None)
    if inner is None or code is None or "self" not in code.co_freevars:
        raise _UnknownError("it is no function that torch.compile made")
    context = original.__closure__[code.co_freevars.index("self")].cell_contents
    if not isinstance(context, torch._dynamo.eval_frame.OptimizeContext):
        raise _UnknownError(f"by {type(context).__name__}")
    if not hasattr(torch._dynamo.eval_frame, "innermost_backend"):
        raise _UnknownError("this version of torch does not tell its backend")
    return context, inner


def _optimize(context: Any, backend: Any) -> Any:
    """torch.compile as it was called for a compiled function, but for the backend."""
    settings = {
        "nopython": getattr(context, "fullgraph", False),
        "error_on_graph_break": getattr(context, "error_on_graph_break", None),
        "dynamic": getattr(context, "_dynamic", None),
        "shapes_spec": getattr(context, "_shapes_spec", None),
        "recompile_limit": getattr(context.callback, "_recompile_limit", None),
        "guard_filter_fn": getattr(getattr(context, "_hooks", None), "guard_filter_fn", None),
        # Of frames that are compiled by themselves (after a graph break), the cache is shared.
        "isolate_recompiles": True,
    }
    known = inspect.signature(torch._dynamo.eval_frame._optimize).parameters
    given = {k: v for k, v in settings.items() if k in known and v is not None}
    return torch._dynamo.optimize(backend, **given)


def _place(root: nn.Module) -> str:
    """Where a compiled module has its compiled function."""
    return "forward" if is_optimized(root) else "_compiled_call_impl"


class _Door:
    """Stands where the compiled code of a module is called; opens on the sessions of its thread."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.module = plain(root)
        self.place = _place(root)
        self.original = root.__dict__[self.place]
        self.sessions: list[Any] = []
        root.__dict__[self.place] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        thread = threading.get_ident()
        here = [s for s in self.sessions if s.thread == thread]
        if not here or running.sinks:
            return self.original(*args, **kwargs)
        with ExitStack() as stack:
            # torch.compile(module) runs the module's own hooks, and ours are for its eager calls.
            for session in here:
                if self.module in session.hooks.count:
                    stack.enter_context(session.hooks.suspended([self.module]))
            return self._capture(here, args, kwargs)

    def close(self, session: Any) -> None:
        """The session ends; with the last one goes the door."""
        self.sessions.remove(session)
        for _, variant in getattr(self.original, "__dict__", {}).get(_KEPT, ()):
            if session in variant.sessions:
                variant.rest()
        if not self.sessions and self.root.__dict__.get(self.place) is self:
            self.root.__dict__[self.place] = self.original

    def _variant(self, sessions: Sequence[Any]) -> Variant:
        """The variant for what these sessions ask; compiled in an earlier block, if there was one.

        Raises:
            _UnknownError: torch.compile has made it in a way that is not known.
        """
        variant = self._known(sessions)
        if variant is None:
            variant = Variant(self.root, self.original)
            asked = [s.wants.signature for s in sessions]
            self.original.__dict__.setdefault(_KEPT, []).append((asked, variant))
        variant.sessions = list(sessions)
        return variant

    def _known(self, sessions: Sequence[Any]) -> Variant | None:
        asked = [s.wants.signature for s in sessions]
        kept = getattr(self.original, "__dict__", {}).get(_KEPT, ())
        return next((variant for signature, variant in kept if signature == asked), None)

    def _capture(self, sessions: Sequence[Any], args: Any, kwargs: Any) -> Any:
        """One call: a pass of its own, or a part of one."""
        if torch._C._current_graph_task_id() != -1:
            # Activation checkpointing runs it once more, and expects what the forward saved.
            again = self._known(sessions)
            if again is None or any(s._idle for s in sessions):
                return self.original(*args, **kwargs)
            return again((), args, kwargs)
        started: list[Any] = []
        sinks: list[Sink] = []
        for session in sessions:
            sink = session.compiled.enter(self.root, args, kwargs)
            if sink is not None:
                sinks.append(sink)
                if sink.alone:
                    started.append(session)
        if not sinks:
            for session in sessions:
                session.compiled.skip(self.root)
            return self.original(*args, **kwargs)
        try:
            variant = self._variant([s.session for s in sinks])
        except _UnknownError as error:
            for sink in sinks:
                sink.session.compiled.unseen(self.root, str(error))
            output = self.original(*args, **kwargs)
        else:
            try:
                output = variant(sinks, args, kwargs)
            except BaseException:
                for session in started:
                    session._abandon()
                raise
            for sink in sinks:
                sink.finish(output)
        for sink in sinks:
            sink.session.compiled.leave(sink, output)
        return output


class _Late:
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

    def __init__(self, session: Any, given: nn.Module) -> None:
        self._session = session
        self._given = given
        self._doors: list[_Door] = []
        self._late: list[_Late] = []
        self._watching: Any = None

    def open(self) -> None:
        """Set a door at each compiled module in the model, or around it."""
        model = self._session.model
        for root in [*compiled_roots(self._given), *around(model), *compiled_roots(model)]:
            self.add(root)
        # torch.compile(module) makes a module around it, which is when torch calls this.
        self._watching = register_module_module_registration_hook(self._registered)
        when_traced.append(self._traced)

    def add(self, root: nn.Module) -> None:
        """Set a door at a compiled module."""
        there = root.__dict__.get(_place(root))
        door = there if isinstance(there, _Door) else _Door(root)
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
            not session._steps
            and not session.missed
            and "torch._dynamo.convert_frame" in sys.modules
        ):
            session.miss("", NOTHING_RAN)

    def _registered(self, module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if name != "_orig_mod" or not is_optimized(module) or submodule is None:
            return
        if threading.get_ident() == self._session.thread and holds(submodule, self._session.model):
            self._late.append(_Late(module, self))

    def _traced(self) -> None:
        """torch.compile traces code with a hook of ours in it: code that nobody had announced."""
        if threading.get_ident() == self._session.thread and not running.sinks:
            if not self._session._idle:
                self.noticed()

    def unannounced(self) -> bool:
        """Whether the eager call that begins is a part of compiled code that has no door."""
        return "torch._dynamo.eval_frame" in sys.modules and in_compiled_code()

    def noticed(self) -> None:
        """Something compiled calls the model, or will: give it a door if it is known what."""
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

    def enter(self, root: nn.Module, args: Any, kwargs: Any) -> Sink | None:
        """A call of compiled code begins; None if it is not captured."""
        session = self._session
        model = plain(root)
        if session._current is None:
            if model is session.model:
                if not session._begin(args, kwargs, compiled=True):
                    return None
                return Sink(session, session._tracer, alone=True)
            if holds(model, session.model):
                session.miss("", AROUND)
            elif not session._idle:
                session._stray(root)
            return None
        if session._run is not None or session._tracer is None:
            session.miss(session.names.of(root), UNSEEN.format(why="inside a replayed module"))
            return None
        session._trace_off()
        return Sink(session, session._tracer, alone=False)

    def skip(self, root: nn.Module) -> None:
        """The call is not captured."""
        if plain(root) is self._session.model:
            self._session._idle = False

    def unseen(self, root: nn.Module, why: str) -> None:
        """The call ran as the user compiled it, and nobody could look into it."""
        self._session.miss(self._session.names.of(root), UNSEEN.format(why=why))

    def leave(self, sink: Sink, output: Any) -> None:
        """A call of compiled code has ended."""
        session = self._session
        if sink.alone:
            if session.model in session.wants.outputs:
                sink.hold_output(session.model, output)
            session._end(output)
        else:
            session._trace_on()
