"""What a model is given: one argument, several in a tuple or list, or a dict of those by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fmapkit.torchlib.operators import tree_leaves, tree_map


def run(model: nn.Module, inputs: Any) -> Any:
    """Call a model with them."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def tensors_in(inputs: Any) -> list[Tensor]:
    """All tensors in them, in order."""
    given = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return [value for value in tree_leaves(given) if isinstance(value, Tensor)]


def changed(inputs: Any, change: Callable[[Any], Any]) -> Any:
    """The same inputs with each tensor, or constant, made into another one."""
    return tree_map(change, dict(inputs) if isinstance(inputs, Mapping) else inputs)
