"""A pass that ends by what is no `Exception`: a KeyboardInterrupt, a SystemExit.

torch runs a module's post hooks after an `Exception`, but not after these. Where the user's code
catches one inside the block, to save the model for instance, our modes and flags must be off before
it does. torch looks for `_compiled_call_impl` on an instance before it takes `_call_impl`; there, a
call of ours stands around the captured model's own. torch keeps it out of copies and pickles.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["Ending"]

_PLACE = "_compiled_call_impl"
_CALL = nn.Module._wrapped_call_impl.__code__
_lock = threading.Lock()


def _call(ending: Ending, *args: Any, **kwargs: Any) -> Any:
    return ending.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


class Ending:
    """Stands around the calls of one module, for all the sessions that capture it."""

    __slots__ = ("interrupted", "module")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.interrupted: tuple[Callable[[], None], ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Who copies a module's `__dict__` (DataParallel does) has us for a module that is not ours.
        caller = sys._getframe(1)
        module = caller.f_locals["self"] if caller.f_code is _CALL else self.module
        del caller
        try:
            return module._call_impl(*args, **kwargs)
        except Exception:
            raise  # the post hooks have run
        except BaseException:
            for notify in self.interrupted:
                notify()
            raise

    # What dynamo compiles in its place, where code around the module is compiled in the block.
    __call__._torchdynamo_inline = _call  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: Any) -> None:
        """A copy by other means than torch's is as if nobody stood here."""

    def __reduce__(self) -> Any:
        return _nobody, ()

    @classmethod
    def install(cls, module: nn.Module, interrupted: Callable[[], None]) -> None:
        """Have a function called when a call of the module ends by no `Exception`.

        A module that `torch.compile` has a call for is left alone, and so is a scripted one.
        """
        with _lock:
            there = module.__dict__.get(_PLACE)
            if there is None and not isinstance(module, torch.jit.ScriptModule):
                there = module.__dict__[_PLACE] = cls(module)
            if not isinstance(there, cls):
                return
            there.interrupted = (*there.interrupted, interrupted)

    @classmethod
    def remove(cls, module: nn.Module, interrupted: Callable[[], None]) -> None:
        """Undo `install`; the last one to go leaves nothing."""
        with _lock:
            there = module.__dict__.get(_PLACE)
            if isinstance(there, cls):
                there.interrupted = tuple(f for f in there.interrupted if f != interrupted)
                if not there.interrupted:
                    del module.__dict__[_PLACE]


def _nobody() -> None:
    return None
