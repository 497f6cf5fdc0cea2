"""torch.compile as dynamo does it: what a function was compiled with, its graphs, and whence these.

Nothing here imports dynamo before it is asked for: a capture of a model that is not compiled needs
none of it.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import fx

# Before, a compiled function does not tell the backend that it was compiled with.
COMPILED_FROM = "2.11"


class UnknownError(Exception):
    """The compiled function is of no known kind; the message says why."""


def context_of(original: Any) -> tuple[Any, Any]:
    """What a compiled function was compiled with, and from."""
    inner = getattr(original, "_torchdynamo_orig_callable", None)
    code = getattr(original, "__code__", None)
    if inner is None or code is None or "self" not in code.co_freevars:
        raise UnknownError("it is no function that torch.compile made")
    context = original.__closure__[code.co_freevars.index("self")].cell_contents
    if not isinstance(context, torch._dynamo.eval_frame.OptimizeContext):
        raise UnknownError(f"by {type(context).__name__}")
    if not hasattr(torch._dynamo.eval_frame, "innermost_backend"):
        raise UnknownError(
            f"that takes torch {COMPILED_FROM} or newer, and this is torch {torch.__version__}; "
            "eager models are captured by this one, too"
        )
    return context, inner


def compile_as(context: Any, backend: Any) -> Any:
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


def backend_of(context: Any) -> Any:
    """The backend that a function was compiled with."""
    return torch._dynamo.eval_frame.innermost_backend(context.callback)


def fresh(function: Any) -> types.FunctionType:
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


def is_whole(code: types.CodeType) -> bool:
    """Whether the graph being compiled is all of a function, told by its code."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    at = InstructionTranslator.current_tx()
    if at.output.root_tx.f_code is not code:
        return False
    reason = at.output.compile_subgraph_reason
    return reason is not None and not reason.graph_break


def may_need_gradients(gm: fx.GraphModule) -> bool:
    """Whether anything in a graph may be in an autograd graph."""
    switch = torch._C._set_grad_enabled
    return torch.is_grad_enabled() or any(n.target is switch for n in gm.graph.nodes)


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph alone, over the same attributes."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for new, old in zip(graph.nodes, gm.graph.nodes, strict=True):
        source = getattr(old, "_dynamo_source", None)
        if source is not None:
            new._dynamo_source = source
        new.meta = dict(old.meta)
    return fx.GraphModule(gm, graph)


def from_module(node: fx.Node) -> bool:
    """Whether an input of a graph is an attribute of a module, or a global, and no datum."""
    from torch._dynamo import source

    at: Any = getattr(node, "_dynamo_source", None)
    while at is not None:
        if isinstance(at, (source.NNModuleSource, source.GlobalSource)):
            return True
        at = getattr(at, "base", None)
    return False
