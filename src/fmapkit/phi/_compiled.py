"""φ in code that torch.compile compiles: its model is compiled in the same way, and read so.

What modules return is read by forward hooks of torch's, which dynamo traces, and the way out of the
model is an exception, which it traces too: the graph that it compiles ends with the last map, and
the hooks are there during a call only. Other maps are read as `capture` reads them of compiled
code, which runs the model to its end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from fmapkit.torchlib.call_override import not_compiled

F = TypeVar("F", bound=Callable[..., Any])


def opaque(function: F) -> F:
    """dynamo calls a function as it is, and traces nothing of it; what `compiler.disable` does.

    Without importing dynamo, which takes a second.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return not_compiled(function)


class _AllThereError(BaseException):
    """Every map is there. Not an `Exception`: a forward that catches those lets it pass."""


class _Found(threading.local):
    """What the call that is under way in this thread has found; None outside of one.

    Attributes:
        outputs: by place among what is wanted.
        calls: of each module so far, by its number.
    """

    outputs: dict[int, Tensor] | None = None
    calls: dict[int, int] | None = None


class _Ending(nn.Module):
    """Runs a model as far as the last output that is wanted; dynamo traces this."""

    def __init__(self, model: nn.Module, found: _Found) -> None:
        super().__init__()
        self.model = model
        self.found = found

    def forward(self, *args: Any, **kwargs: Any) -> dict[int, Tensor]:
        outputs: dict[int, Tensor] = {}
        self.found.outputs, self.found.calls = outputs, {}
        try:  # noqa: SIM105  (dynamo traces this)
            self.model(*args, **kwargs)
        except _AllThereError:
            pass
        self.found.outputs = self.found.calls = None
        return outputs


class CompiledOutputs:
    """The outputs of some modules, by compiled code that ends with the last of them.

    Calls from several threads take turns.

    Args:
        wanted: the modules, each with the call whose output is wanted.
    """

    def __init__(
        self, model: nn.Module, context: Any, wanted: Sequence[tuple[nn.Module, int]]
    ) -> None:
        self._found = _Found()
        self._run = context(_Ending(model, self._found))
        self._count = len(wanted)
        self._lock = threading.Lock()
        by_module: dict[nn.Module, dict[int, list[int]]] = {}
        for place, (module, call) in enumerate(wanted):
            by_module.setdefault(module, {}).setdefault(call, []).append(place)
        self._hooks = [
            (module, self._hook(number, calls))
            for number, (module, calls) in enumerate(by_module.items())
        ]

    def _hook(self, number: int, wanted: dict[int, list[int]]) -> Callable[..., None]:
        found, count = self._found, self._count

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs, calls = found.outputs, found.calls
            if outputs is None or calls is None:  # another thread runs the model
                return
            call = calls.get(number, 0)
            calls[number] = call + 1
            for place in wanted.get(call, ()):
                last = len(outputs) + 1 == count
                # What comes after may write to it.
                outputs[place] = output if last else output.clone()
            if len(outputs) == count:
                raise _AllThereError

        return hook

    def __call__(self, args: Any, kwargs: Any) -> list[Tensor] | None:
        """The outputs, in the order in which they were wanted; None if some are not there."""
        with self._lock:
            handles = [module.register_forward_hook(hook) for module, hook in self._hooks]
            try:
                outputs = self._run(*args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
                self._found.outputs = self._found.calls = None
        if len(outputs) < self._count:
            return None
        return [outputs[place] for place in range(self._count)]
