"""A function mode for code of torch's own, which cannot be tapped where a function is called."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch.overrides import _get_current_function_mode

from fmapkit.provenance import describe
from fmapkit.torchlib.autograd import graph_task
from fmapkit.torchlib.modes import ObserverMode, leave_mode


class LightMode(ObserverMode):
    """Sees the nonlinearities that a module of torch calls itself, and lets the rest pass.

    Args:
        names: of the functions that are read.
        call: calls one of them: (name, function, args, kwargs).
    """

    def __init__(self, names: Collection[str], call: Callable[..., Any]) -> None:
        super().__init__()
        self.names = names
        self.call = call
        self.on = False
        self._pushed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = describe(func)
        if not self.on or graph_task() != -1:
            return func(*args, **(kwargs or {}))
        if known.opened is not None:  # as the tracer saw its inside
            with self:
                return known.opened(*args, **(kwargs or {}))
        if known.name in self.names:
            return self.call(known.name, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def resume(self) -> None:
        """From here on it sees what runs."""
        self.on = True
        if not self._pushed:
            self._pushed = True
            self.__enter__()  # type: ignore[no-untyped-call]

    def pause(self) -> bool:
        """From here on it sees nothing; whether it did.

        It leaves torch's stack, where it costs time, unless another mode lies on top of it: that
        one expects to be taken off first.
        """
        was, self.on = self.on, False
        if self._pushed and _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self._pushed = False
            self.__exit__(None, None, None)
        return was

    def leave(self) -> None:
        """Leave the stack for good."""
        self.on = False
        if self._pushed:
            self._pushed = False
            leave_mode(self)
