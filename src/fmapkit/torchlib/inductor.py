"""inductor: how it lays out what a graph returns beside its outputs; whether it runs CUDA graphs.

inductor gives all that a graph returns the strides of eager mode. Where it has convolutions run
channels-last, a map would be copied over into another layout, channel by channel, only to be
returned: that takes longer than all else that a capture does. Nobody but the capture gets the maps,
so they need no strides. inductor has a place for passes over its graphs. Ours takes the maps out of
the list of outputs that a user sees, and leaves the graph as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch._inductor.config as config
from torch import fx
from torch._guards import TracingContext

if TYPE_CHECKING:
    from torch._inductor.custom_graph_pass import CustomGraphPass
else:
    try:
        from torch._inductor.custom_graph_pass import CustomGraphPass
    except ImportError:  # an old torch, which would not cache a graph that went through a pass
        CustomGraphPass = None

_VISIBLE = "user_visible_output_idxs"


@contextmanager
def free_layouts(own: int, count: int) -> Iterator[None]:
    """While a graph is compiled: its outputs from `own` on, of `count`, need no strides.

    Where somebody else has set a pass at this place, it stays there, and the strides as they are.
    """
    if CustomGraphPass is None or config.post_grad_custom_post_pass is not None or own == count:
        yield
        return
    with config.patch(post_grad_custom_post_pass=_Pass(own, count)):
        yield


if CustomGraphPass is not None:

    class _Pass(CustomGraphPass):
        def __init__(self, own: int, count: int) -> None:
            self._own = own
            self._count = count

        def __call__(self, graph: fx.Graph) -> None:
            # What a backward returns are gradients, and not what was counted.
            names = (n.name for n in graph.nodes if n.op == "placeholder")
            last = next(n for n in reversed(graph.nodes) if n.op == "output")
            visible = last.meta.get(_VISIBLE)
            if visible and not any(name.startswith("tangents") for name in names):
                free = self._free()
                last.meta[_VISIBLE] = [place for place in visible if place not in free]

        def uuid(self) -> Any:
            """For the keys of inductor's caches: the same graph may have other places to free."""
            return "fmapkit", sorted(self._free())

        def _free(self) -> set[int]:
            """The places of those maps of which nothing is made by their strides.

            Of two outputs that share memory, autograd makes one from the other, by the strides that
            it would have.
            """
            context: Any = TracingContext.try_get()
            known = getattr(context, "fw_metadata", None)
            outputs = getattr(known, "output_info", ())
            # What a graph writes to may be returned first, which shifts all places.
            shift: Any = getattr(known, "num_mutated_inp_runtime_indices", None)
            if len(outputs) != self._count or shift != 0:
                return set()
            return {
                place
                for place in range(self._own, self._count)
                if outputs[place].output_type.name == "non_alias"
                and not outputs[place].requires_grad
            }


def is_volatile(backend: Any) -> bool:
    """Whether it runs CUDA graphs, whose outputs the next run overwrites."""
    asked = getattr(backend, "config", {})
    found = asked.get("triton.cudagraphs") if isinstance(asked, dict) else None
    name = getattr(backend, "compiler_name", "")
    return bool(config.triton.cudagraphs if found is None else found) or name == "cudagraphs"
