"""A pass that ends by what is no `Exception`: a KeyboardInterrupt, a SystemExit.

torch runs a module's post hooks after an `Exception`, but not after these. Where the user's code
catches one inside the block, to save the model for instance, our modes and flags must be off before
it does. So a call of ours stands around the captured model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fmapkit._standing import Standing, bare_call, called, free, lock, there

__all__ = ["Ending"]


class Ending(Standing):
    """Stands around the calls of one module, for all the sessions that capture it."""

    __slots__ = ("interrupted",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.interrupted: tuple[Callable[[], None], ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = called(self.module)
        try:
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        except Exception:
            raise  # the post hooks have run
        except BaseException:
            for notify in self.interrupted:
                notify()
            raise

    __call__._torchdynamo_inline = bare_call  # type: ignore[attr-defined]

    @classmethod
    def install(cls, module: nn.Module, interrupted: Callable[[], None]) -> None:
        """Have a function called when a call of the module ends by no `Exception`.

        A module that `torch.compile` has a call for is left alone, and so is a scripted one.
        """
        with lock:
            if free(module):
                cls(module).stand(module)
            ending = there(module)
            if isinstance(ending, cls):
                ending.interrupted = (*ending.interrupted, interrupted)

    @classmethod
    def remove(cls, module: nn.Module, interrupted: Callable[[], None]) -> None:
        """Undo `install`; the last one to go leaves nothing."""
        with lock:
            ending = there(module)
            if isinstance(ending, cls):
                ending.interrupted = tuple(f for f in ending.interrupted if f != interrupted)
                if not ending.interrupted:
                    ending.leave(module)
