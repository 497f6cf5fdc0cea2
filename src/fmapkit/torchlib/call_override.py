"""The place before a module's own call, where torch looks before it takes `_call_impl`.

That is `_compiled_call_impl`, among an instance's attributes. All that we set on a module stands
there, and nothing among its hooks: torch keeps this place out of copies and pickles, and whoever
scripts, exports or fuses a module looks through its hooks. What stands there sees the whole call,
hooks of others included, and torch's fast path for modules without hooks stays open.

Several may stand there, one behind the other: each calls the next, and the last one the module.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.jit import _recursive as _scripting
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from typing_extensions import Self

F = TypeVar("F", bound=Callable[..., Any])

_PLACE = "_compiled_call_impl"
_CALL = nn.Module._wrapped_call_impl.__code__

# What dynamo has in C. Whether it can be told to leave alone all that a function of ours calls.
_frames: Any = torch._C._dynamo.eval_frame
_TOLD = hasattr(_frames, "_FrameExecStrategy") and hasattr(_frames, "set_code_exec_strategy")

# Hooks that somebody has set for every module: before its forward, and after.
all_pre_hooks = _global_forward_pre_hooks
all_hooks = _global_forward_hooks

# To be held around whoever looks at the place and then acts on it.
lock = threading.RLock()

# Goes up whenever somebody comes.
changes = 0

# Called when torch.compile traces a call that we stand before: each open session's own.
when_traced: list[Callable[[], None]] = []


def _strategy(function: Callable[..., Any], inside: bool) -> None:
    if _TOLD:
        action = _frames._FrameAction
        then = action.DEFAULT if inside else action.SKIP
        strategy = _frames._FrameExecStrategy(action.SKIP, then)
        _frames.set_code_exec_strategy(function.__code__, strategy)
    else:
        _frames.skip_code(function.__code__)  # but not what it calls


def not_compiled(function: F) -> F:
    """torch.compile leaves a function of ours alone, and all that it calls.

    Older versions of torch cannot be told the latter.
    """
    _strategy(function, inside=False)
    return function


def passed_over(function: F) -> F:
    """torch.compile leaves a function of ours alone, but not what it calls."""
    _strategy(function, inside=True)
    return function


def compiled_as_bare(call: Callable[..., Any]) -> None:
    """torch.compile takes a `__call__` of what stands there for the module's own call.

    Where dynamo comes by it with no code around it that it compiles, it goes on with what is
    inside.
    """
    call._torchdynamo_inline = _bare_call  # type: ignore[attr-defined]
    _strategy(call, inside=True)


def _bare_call(standing: Any, *args: Any, **kwargs: Any) -> Any:
    """The note is made while dynamo traces, and leaves nothing in what it makes."""
    from torch._dynamo.comptime import comptime

    comptime(note)
    return standing.module._call_impl(*args, **kwargs)


@not_compiled
def note(context: Any = None) -> None:
    """torch.compile compiles what we stand before, or runs what it has compiled."""
    callback = None if _TOLD else _frames.set_eval_frame(None)
    try:
        for call in tuple(when_traced):
            call()
    finally:
        if callback is not None:
            _frames.set_eval_frame(callback)


def _eval_frame_callback() -> Any:
    """In a torch that has no function for it, the only way to read it is to set it."""
    callback = _frames.set_eval_frame(None)
    _frames.set_eval_frame(callback)
    return callback


# None where torch.compile has nothing to do with what runs in this frame. Where it has, what stands
# there notes that and steps aside.
dynamo: Callable[[], Any] = getattr(
    _frames, "get_eval_frame_callback", not_compiled(_eval_frame_callback)
)


class CallOverride:
    """Whoever of ours stands before a module's call."""

    __slots__ = ("__weakref__", "inner", "module", "owner")

    module: nn.Module
    owner: object  # the session
    inner: Any  # what to call in its turn: the next that stands here, or the module's own call

    def stand(self, module: nn.Module, first: bool = False) -> Self:
        """Take the place, behind whoever of ours is there, or before them; it has to be `free`.

        Behind them, it takes part in a call that one of them has begun and not passed on.
        """
        global changes
        with lock:
            changes += 1
            self.module = module
            if module.__dict__.get(_PLACE) is None:
                self.inner = module._call_impl
                module.__dict__[_PLACE] = self
                return self
            there = standing_before(module)
            self.inner = there[0] if first and there else module._call_impl
            if first or not there:
                module.__dict__[_PLACE] = self
            else:
                there[-1].inner = self
        return self

    def leave(self) -> None:
        """Give the place back; the others stay. A call that is under way goes on."""
        with lock:
            attributes = self.module.__dict__
            if attributes.get(_PLACE) is self and not isinstance(self.inner, CallOverride):
                del attributes[_PLACE]
                return
            there = standing_before(self.module)
            if self not in there:
                return
            place = there.index(self)
            if place:
                there[place - 1].inner = self.inner
            elif len(there) > 1:
                self.module.__dict__[_PLACE] = there[1]
            else:
                del self.module.__dict__[_PLACE]

    def of_copy(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A module is called that has our attribute of another one: the call is its own."""
        if isinstance(self.inner, CallOverride):
            return self.inner.of_copy(module, args, kwargs)
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> None:
        """A copy by other means than torch's is as if nobody stood here."""

    def __reduce__(self) -> Any:
        return type(None), ()


def standing_before(module: nn.Module) -> list[CallOverride]:
    """All of ours that stand before a module's call, outermost first; not those of its original."""
    found: list[CallOverride] = []
    if _PLACE not in module.__dict__:  # as after a block, of most modules
        return found
    with lock:
        at = module.__dict__.get(_PLACE)
        while isinstance(at, CallOverride) and at.module is module:
            found.append(at)
            at = at.inner
    return found


def there(module: nn.Module) -> Any:
    """Who stands before a module's call, outermost; None if nobody does."""
    return module.__dict__.get(_PLACE)


def free(module: nn.Module) -> bool:
    """Whether nobody but us stands there, and torch would look there."""
    taken = getattr(module, _PLACE, None)
    return (
        (taken is None or isinstance(taken, CallOverride))
        and type(module)._wrapped_call_impl is nn.Module._wrapped_call_impl
        and not isinstance(module, torch.jit.ScriptModule)
    )


def is_bare(module: nn.Module) -> bool:
    """Whether a module's call is its forward and no more, but for those of ours who stand there."""
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    if _global_forward_hooks or all_pre_hooks:
        return False
    if _global_backward_hooks or _global_backward_pre_hooks:
        return False
    first = there(module)
    return first is None or isinstance(first, CallOverride)


@not_compiled
def called(module: nn.Module, depth: int = 2) -> nn.Module:
    """The module that is being called, so many frames up.

    Whoever copies a module's `__dict__` (DataParallel does) has us for a module that is not ours.
    """
    caller = sys._getframe(depth)
    found: nn.Module = caller.f_locals["self"] if caller.f_code is _CALL else module
    return found


# torch.jit.script looks at every attribute of a module but those that torch itself sets. Its list
# of these lacks this one, so that it fails for whatever stands there.
_ignored: list[str] = _scripting.ignored_attributes
_hidden = 0


def hide_from_scripting() -> None:
    """Have torch.jit.script take the place for torch's own, until it is shown as often."""
    global _hidden
    with lock:
        _hidden += 1
        if _hidden == 1:
            _ignored.append(_PLACE)


def show_to_scripting() -> None:
    """Undo `hide_from_scripting`."""
    global _hidden
    with lock:
        _hidden -= 1
        if not _hidden:
            _ignored.remove(_PLACE)
