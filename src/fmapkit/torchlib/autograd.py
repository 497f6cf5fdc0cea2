"""Whether a backward pass is what runs, or a forward that one will run again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from traceback import walk_stack
from typing import Any

import torch
import torch.utils.checkpoint

_REENTRANT = torch.utils.checkpoint.CheckpointFunction.forward.__code__
_CHECKPOINT = torch.utils.checkpoint.__file__

# The number of the backward pass that this thread runs; -1 outside of one. What is asked at every
# call of a module asks this itself: a function around it would double its cost.
graph_task: Callable[[], int] = torch._C._current_graph_task_id


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return graph_task() != -1


def in_checkpoint(in_function: bool) -> bool:
    """Whether the forward of a checkpointed part runs, which runs again in backward.

    Args:
        in_function: the forward of a `torch.autograd.Function` runs, as of a reentrant checkpoint.
    """
    running = (frame.f_code for frame, _ in walk_stack(sys._getframe(1)))
    top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top_hooks is None:  # torch 2.4 does not say which hooks are on: its frames do
        return any((c.co_name, c.co_filename) == ("checkpoint", _CHECKPOINT) for c in running)
    top = top_hooks(True)
    if top and getattr(top[0], "__qualname__", "").startswith("_checkpoint_hook."):
        return True
    return in_function and any(code is _REENTRANT for code in running)
