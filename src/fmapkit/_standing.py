"""The place before a module's own call, where torch looks before it takes `_call_impl`.

That is `_compiled_call_impl`, among an instance's attributes. Whoever stands there sees the whole
call, hooks of others included, and torch's fast path for modules without hooks stays open: it costs
a fraction of a hook. torch keeps what stands there out of copies and pickles.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import nn

__all__ = ["Standing", "bare_call", "called", "free", "lock", "there"]

_PLACE = "_compiled_call_impl"
_CALL = nn.Module._wrapped_call_impl.__code__

# To be held around whoever looks at the place and then acts on it.
lock = threading.Lock()


def bare_call(standing: Any, *args: Any, **kwargs: Any) -> Any:
    """What dynamo compiles in its place, where code around the module is compiled in the block."""
    return standing.module._call_impl(*args, **kwargs)


class Standing:
    """Whoever of ours stands before a module's call.

    Attributes:
        module: the module.
    """

    __slots__ = ("module",)

    module: nn.Module

    def stand(self, module: nn.Module) -> None:
        """Take the place, which has to be free."""
        module.__dict__[_PLACE] = self

    def leave(self, module: nn.Module) -> None:
        """Give the place back, if it is still ours."""
        if module.__dict__.get(_PLACE) is self:
            del module.__dict__[_PLACE]

    def __deepcopy__(self, memo: Any) -> None:
        """A copy by other means than torch's is as if nobody stood here."""

    def __reduce__(self) -> Any:
        return _nobody, ()


def _nobody() -> None:
    return None


def there(module: nn.Module) -> Any:
    """Who stands before a module's call; None if nobody does."""
    return module.__dict__.get(_PLACE)


def free(module: nn.Module) -> bool:
    """Whether nobody stands there, and torch would look there."""
    kind = type(module)
    return (
        getattr(module, _PLACE, None) is None
        and kind.__call__ is nn.Module.__call__
        and kind._wrapped_call_impl is nn.Module._wrapped_call_impl
        and not isinstance(module, torch.jit.ScriptModule)
    )


def called(module: nn.Module, depth: int = 2) -> nn.Module:
    """The module that is being called.

    Whoever copies a module's `__dict__` (DataParallel does) has us for a module that is not ours.

    Args:
        module: ours.
        depth: how many frames up the call came from.
    """
    caller = sys._getframe(depth)
    found: nn.Module = caller.f_locals["self"] if caller.f_code is _CALL else module
    return found
