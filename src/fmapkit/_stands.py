"""What stands before the calls of modules while a pass follows its script, in the place of hooks.

A hook takes a module off torch's fast path, and a torch function mode sees each function inside of
it, which costs more. A module that is bound to do the same each time need not be looked into: where
it is given what it was given, it returns what it returned. So before its call stands a `Leaf`. A
`Scope` stands before a module whose inside is followed, and tells only where that begins and ends.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fmapkit._hooks import Hook
from fmapkit._standing import Standing, called, compiled_as_bare

if TYPE_CHECKING:
    from fmapkit._following import Follower
    from fmapkit._placing import Calls

__all__ = ["Leaf", "Scope", "Way"]

_graph_task = torch._C._current_graph_task_id


class Way(threading.local):
    """Who follows in this thread.

    Attributes:
        follower: None where nobody does.
    """

    follower: Follower | None = None


class Stand(Standing):
    """Stands before a module's call.

    Args:
        module: the module.
        way: who follows.
        calls: what the session's hooks call.
        owner: the session.
    """

    __slots__ = ("after", "before", "calls", "way")

    def __init__(self, module: nn.Module, way: Way, calls: Calls, owner: object) -> None:
        self.module = module
        self.owner = owner
        self.before = module._forward_pre_hooks
        self.after = module._forward_hooks
        self.way = way
        self.calls = calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        follower = self.way.follower
        if follower is None or _graph_task() != -1:
            return self.otherwise(args, kwargs)
        module = self.module
        if called(module) is not module or ((self.before or self.after) and self.hooked()):
            return self.departing(follower, args, kwargs)
        return self.followed(follower, module, args, kwargs)

    compiled_as_bare(__call__)

    def followed(self, follower: Follower, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The pass is followed: call the module."""
        raise NotImplementedError

    def otherwise(self, args: Any, kwargs: Any) -> Any:
        """Nobody follows, or torch runs the forward again for a backward pass."""
        module = called(self.module, 3)
        if module is self.module:
            if self.way.follower is None:
                self.calls.outside(module)
            return self.inner(*args, **kwargs)
        return self.of_copy(module, args, kwargs)

    def hooked(self) -> bool:
        """Whether others have set hooks on the module in the middle of the pass."""
        hooks = (*self.before.values(), *self.after.values())
        return not all(isinstance(hook, Hook) for hook in hooks)

    def departing(self, follower: Follower, args: Any, kwargs: Any) -> Any:
        """It is a copy that is called, or hooks may change what the module gets and gives."""
        module = called(self.module, 3)
        follower.depart()
        if module is self.module:
            return self.inner(*args, **kwargs)
        return self.of_copy(module, args, kwargs)


class Leaf(Stand):
    """Before a module that is not looked into."""

    __slots__ = ()

    def followed(self, follower: Follower, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call it; whether it is a known step, the follower knows."""
        return follower.leaf(self, args, kwargs)


class Scope(Stand):
    """Before a module whose inside is followed, or replayed."""

    __slots__ = ()

    def followed(self, follower: Follower, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Tell where it begins and ends, and call it in between."""
        try:
            how = follower.enter(module, args, kwargs)
            if how == "unit" and not self.calls.replay(module, args, kwargs):
                how = ""
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            follower.fail(error)
            how = ""
        if not how:  # the tracer has taken over: it set hooks
            return self.inner(*args, **kwargs)
        try:
            output = self.inner(*args, **kwargs)
        except Exception:
            self.calls.post(module, args, kwargs, None)
            raise
        except BaseException:  # an interrupt, which the forward around it may catch
            follower.broken_off(module)
            raise
        try:
            if how == "begin" and self.way.follower is follower and follower.leave(module, output):
                return output
        except Exception as error:
            follower.fail(error)
            return output
        replaced = self.calls.post(module, args, kwargs, output)
        return output if replaced is None else replaced
