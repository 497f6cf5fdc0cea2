"""What runs where no hook of a pass sees it, and the words it is named with.

That is code without Python (scripted, or recorded into a CUDA graph), and modules that somebody
calls outside of the captured model's forward.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from fmapkit._asked import Asked
from fmapkit._missed import Misses

__all__ = ["Unseen", "recorded"]

_CUDA_GRAPH = (
    "it was recorded into a CUDA graph: nothing has run yet, and replays of the graph run without "
    "Python"
)
_EXPORTED = (
    "it was recorded by {what} here, which would record what fmapkit does, too: such a call is "
    "left alone, and is not captured"
)


def recorded() -> str:
    """Why a call is not captured that somebody records, to run it again without Python.

    Returns:
        The reason; empty where nobody does.
    """
    if torch._C._get_tracing_state():
        return _EXPORTED.format(what="torch.jit.trace")
    if torch.compiler.is_compiling():
        return _EXPORTED.format(what="torch.export")
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if proxies is not None and proxies.get_proxy_mode() is not None:
        return _EXPORTED.format(what="make_fx")
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if started and torch.cuda.is_current_stream_capturing():
        return _CUDA_GRAPH
    return ""


def _fx_is_tracing() -> bool:
    """Whether torch.fx traces: it calls modules with what stands for tensors."""
    return bool(fx._symbolic_trace._is_fx_tracing_flag)


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
        if torch._C._current_graph_task_id() != -1 or recorded() or _fx_is_tracing():
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
        for module, name in names.by_module.items():
            if isinstance(module, torch.jit.ScriptModule):
                outer = names.by_name.get(name.rpartition(".")[0]) if "." in name else None
                if not isinstance(outer, torch.jit.ScriptModule):
                    miss(name, "it is scripted: torch runs it without Python, unseen by hooks")
            elif not type(module).__module__.startswith("torch.nn.modules."):
                for function in _functions(module):
                    miss(name, f"it calls {function.name}, which is scripted: unseen by Python")


def _functions(module: nn.Module) -> list[torch.jit.ScriptFunction[Any, Any]]:
    """The scripted functions that a module's forward knows by name, or its attributes hold."""
    forward = getattr(type(module), "forward", None)
    code = getattr(forward, "__code__", None)
    values = list(module.__dict__.values())
    if forward is not None and code is not None:
        values += [forward.__globals__.get(name) for name in code.co_names]
        values += [cell.cell_contents for cell in forward.__closure__ or ()]
    return [value for value in values if isinstance(value, torch.jit.ScriptFunction)]
