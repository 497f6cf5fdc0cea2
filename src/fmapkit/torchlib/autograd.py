"""Whether a backward pass is what runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["graph_task", "in_backward"]

# The number of the backward pass that this thread runs; -1 outside of one. What is asked at every
# call of a module asks this itself: a function around it would double its cost.
graph_task: Callable[[], int] = torch._C._current_graph_task_id


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return graph_task() != -1
