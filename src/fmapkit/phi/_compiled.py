"""φ in code that torch.compile compiles: its model is compiled in the same way, and captured so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from fmapkit._optimized import compiled_by, compiled_roots, ever_compiled
from fmapkit._standing import not_compiled

__all__ = ["by_itself", "compiled_alike", "opaque"]

F = TypeVar("F", bound=Callable[..., Any])

# Where a context of torch's keeps the models that were compiled by it for a φ, by id.
_KEPT = "_fmapkit_models"


def opaque(function: F) -> F:
    """dynamo calls a function as it is, and traces nothing of it; what `compiler.disable` does.

    Without importing dynamo, which takes a second.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return not_compiled(function)


def compiled_alike(model: nn.Module) -> nn.Module | None:
    """The model, compiled as the code that called us is; itself if it is compiled already.

    Returns:
        None if no compiled code called us.
    """
    context = compiled_by() if ever_compiled() else None
    if context is None:
        return None
    if compiled_roots(model):
        return model
    known: dict[int, tuple[nn.Module, nn.Module]] = context.__dict__.setdefault(_KEPT, {})
    found = known.get(id(model))
    if found is None or found[0] is not model:
        found = known[id(model)] = (model, context(model))
    return found[1]


def by_itself(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function outside of what dynamo compiles around it."""
    alone: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return alone(*args)
