"""A compiled module compiled once more, from graphs that return their maps beside their outputs.

The variant uses the user's own backend, mode and options. It has code of its own: dynamo's cache
for the user's code stays as it is, and is back in use when the block ends.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from fmapkit.compiled.graph import open_all
from fmapkit.compiled.graph_edit import add_outputs
from fmapkit.compiled.graph_in_use import CompiledGraph
from fmapkit.compiled.run import CompiledCapture, GraphMapSink, Labels, running
from fmapkit.missed import reason
from fmapkit.provenance import Label
from fmapkit.reasons import Reason
from fmapkit.torchlib.call_override import is_bare
from fmapkit.torchlib.compiled_modules import plain
from fmapkit.torchlib.dynamo import (
    backend_of,
    compile_as,
    context_of,
    copy_of,
    fresh,
    is_whole,
    may_need_gradients,
)
from fmapkit.torchlib.inductor import free_layouts, is_volatile


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


class InstrumentedCompile:
    """A compiled module compiled once more, with graphs that return their maps.

    Raises:
        UnknownError: `original`, which runs its compiled code, is none that torch.compile made.
    """

    def __init__(self, root: nn.Module, original: Any) -> None:
        self.captures: list[CompiledCapture] = []  # whose maps
        self.graphs: list[CompiledGraph] = []
        self._module = plain(root)
        context, inner = context_of(original)
        backend = backend_of(context)
        compiler = _Compiler(self, backend)
        compile_again = compile_as(context, compiler)
        forward = inspect.getattr_static(type(self._module), "forward", None)
        # torch.compile(module) runs the module's own hooks outside of compiled code, and compiles
        # its forward, but where the forward is torch's own. module.compile() compiles it all.
        self._bound: Any = None
        self._forward: Any = None
        if (
            isinstance(inner, types.MethodType)
            and inner.__name__ == "_wrapped_call_impl"
            and isinstance(forward, types.FunctionType)
            and "forward" not in self._module.__dict__
        ):
            self._bound = types.MethodType(fresh(forward), self._module)
            self.code = self._bound.__code__
            self._forward = compile_again(self._bound)
            self._run = compile_again(self._module._wrapped_call_impl)
        else:
            function = fresh(_forward)
            self.code = function.__code__
            self._run = compile_again(function)

    @property
    def runs_hooks(self) -> bool:
        """Whether it calls the module itself, as the hooks on that are to run.

        Else nothing is written to the module: dynamo, whose guards ask about that first, would have
        to look at all of it, which takes longer than all that we do.
        """
        return self._bound is not None and not is_bare(self._module)

    def rest(self) -> None:
        """The block has ended; what it compiled is kept."""
        self.captures.clear()
        for graph in self.graphs:
            graph.forget()

    def __call__(self, sinks: Sequence[GraphMapSink], args: Any, kwargs: Any, hooked: bool) -> Any:
        """Run it; its graphs bring their maps to the sinks. `hooked` is what `runs_hooks` told."""
        before = running.sinks, running.stop, running.root
        running.sinks, running.stop = sinks, InstrumentedCompile.__call__.__code__
        running.root = self._module
        try:
            if self._bound is None:
                return self._run(self._module, *args, **kwargs)
            if not hooked:
                return self._forward(*args, **kwargs)
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

    def __init__(self, variant: InstrumentedCompile, backend: Any) -> None:
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
                sink.capture.miss(
                    sink.capture.names.of(self._variant._module),
                    Reason.GRAPH_UNREADABLE.text(why=f"{type(error).__name__}: {error}"),
                )
                sink.unread += 1
            return self._backend(gm, inputs, **options)
        self._variant.graphs.append(graph)
        with free_layouts(graph.own, graph.returned):
            compiled = self._backend(gm, inputs, **options)
        return _runner(graph, compiled)

    def _instrument(
        self, gm: fx.GraphModule, inputs: list[Any], sinks: Sequence[GraphMapSink]
    ) -> CompiledGraph:
        untouched = copy_of(gm)
        names = sinks[0].capture.names
        graph = CompiledGraph(
            gm, inputs, is_whole(self._variant.code), is_volatile(self._backend), names
        )
        (last,) = gm.graph.find_nodes(op="output")
        try:
            open_all(gm, inputs)
            sites = []
            for sink in sinks:
                sink.settle()
                carried = graph.carried(inputs, sink)
                traced = graph.trace(sink.capture, inputs, carried, sink.capture.miss)
                sites += [site for _, site, _ in traced.found]
            graph.gm = copy_of(gm)
            gradients, detach = may_need_gradients(gm), sinks[0].capture.wants.detach
            graph.places = add_outputs(gm, sites, gradients, detach)
            graph.returned = len(last.args[0])
        except Exception:
            gm.graph = untouched.graph
            gm.recompile()
            raise
        return graph


def _runner(graph: CompiledGraph, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What dynamo calls in place of the compiled graph."""
    own = graph.own

    def run(*inputs: Any) -> Any:
        sinks = running.sinks
        if not sinks:
            return compiled(*inputs)[:own]
        known = [_guarded(s, _before, s, graph, place, inputs) for place, s in enumerate(sinks)]
        outputs = compiled(*inputs)
        for sink, ready in zip(sinks, known, strict=True):
            if ready is not None:
                _guarded(sink, sink.after, ready, inputs, outputs, own, graph.volatile)
        return outputs[:own]

    return run


def _before(
    sink: GraphMapSink, graph: CompiledGraph, place: int, inputs: Sequence[Any]
) -> tuple[list[Label], Labels]:
    """A graph is about to run: what its inputs carry, and what its maps will be."""
    sink.expect(graph.whole)
    carried, labels = graph.ready(sink, place, inputs)
    sink.before_writes(labels, inputs)
    return carried, labels


def _guarded(sink: GraphMapSink, function: Callable[..., Any], *args: Any) -> Any:
    """A fault of our own is named in `missed`, and is no failure of the user's forward."""
    try:
        return function(*args)
    except Exception as error:
        name = sink.capture.names.of(running.root) if running.root is not None else ""
        sink.capture.miss(name, reason(error))
        sink.unread += 1
        return None
