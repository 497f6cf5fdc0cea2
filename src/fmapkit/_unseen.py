"""What runs where no hook of a pass sees it, and the words it is named with.

That is code without Python (scripted, or recorded into a CUDA graph), and modules that somebody
calls outside of the captured model's forward.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from fmapkit._asked import Asked
from fmapkit._missed import Misses

__all__ = ["RECORDED", "Unseen", "recording"]

RECORDED = (
    "it was recorded into a CUDA graph: nothing has run yet, and replays of the graph run without "
    "Python"
)


def recording() -> bool:
    """Whether a CUDA graph is being recorded."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(started and torch.cuda.is_current_stream_capturing())


class Unseen:
    """Names what runs unseen.

    Args:
        asked: by the capture.
        misses: of the capture.
    """

    def __init__(self, asked: Asked, misses: Misses) -> None:
        self._model = asked.model
        self._names = asked.names
        self._misses = misses

    def stray(self, module: nn.Module) -> None:
        """A module runs outside of a pass: name the outermost one of the model that is running."""
        if torch._C._current_graph_task_id() != -1:
            return
        at: Any = sys._getframe(1)
        while at is not None:
            if at.f_code is nn.Module._call_impl.__code__:
                running = at.f_locals["self"]
                module = running if running in self._names.by_module else module
            at = at.f_back
        if isinstance(module, ParametrizationList):  # somebody has read a weight
            return
        if module is self._model:  # a pass of its own that is not captured, and says why
            return
        name = self._names.of(module)
        hint = f": capture(model.{name})" if name else ""
        self._misses.add(
            name,
            f"it was called outside {type(self._model).__name__}.forward, "
            "and only what runs inside a forward pass of the captured model is captured; "
            f"for its own passes, capture that module{hint}",
        )

    def scripted(self) -> None:
        """Name scripted modules, and scripted functions that a forward calls by name."""
        names, miss = self._names, self._misses.add
        by_kind: dict[type[nn.Module], list[torch.jit.ScriptFunction[Any, Any]]] = {}
        for module, name in names.by_module.items():
            if isinstance(module, torch.jit.ScriptModule):
                outer = names.by_name.get(name.rpartition(".")[0]) if "." in name else None
                if not isinstance(outer, torch.jit.ScriptModule):
                    miss(name, "it is scripted: torch runs it without Python, unseen by hooks")
            elif not type(module).__module__.startswith("torch.nn.modules."):
                kind = type(module)
                if kind not in by_kind:
                    by_kind[kind] = _scripted(_known_by_name(kind))
                for function in _scripted(module.__dict__.values()) + by_kind[kind]:
                    miss(name, f"it calls {function.name}, which is scripted: unseen by Python")


def _scripted(values: Collection[Any]) -> list[torch.jit.ScriptFunction[Any, Any]]:
    if torch.jit.ScriptFunction not in set(map(type, values)):
        return []
    return [value for value in values if type(value) is torch.jit.ScriptFunction]


def _known_by_name(kind: type[nn.Module]) -> list[Any]:
    """What the forward of a class knows by name."""
    forward = getattr(kind, "forward", None)
    code = getattr(forward, "__code__", None)
    if forward is None or code is None:
        return []
    values = [forward.__globals__.get(name) for name in code.co_names]
    return values + [cell.cell_contents for cell in forward.__closure__ or ()]
