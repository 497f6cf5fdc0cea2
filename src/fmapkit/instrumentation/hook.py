"""A hook of ours, called after each call of a module, and what stands around such calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fmapkit.torchlib.call_override import (
    CallOverride,
    all_pre_hooks,
    called,
    compiled_as_bare,
    dynamo,
    not_compiled,
    note,
)


class Hook:
    """A callable that belongs to one session."""

    __slots__ = ("call", "owner")

    def __init__(self, call: Callable[..., Any], owner: object) -> None:
        self.call = call
        self.owner = owner

    @not_compiled
    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def is_like(self, other: Hook) -> bool:
        """Whether another hook does the same."""
        return type(other) is type(self)

    def after(self, module: nn.Module) -> CallOverride:
        """Be called after each call of a module: (module, args, output)."""
        return _After(self).stand(module)

    def disarm(self) -> None:
        """Let go of the session; a call that it belongs to may be under way just then."""
        self.call = nothing

    def __reduce__(self) -> Any:
        return Hook, (nothing, None)


def nothing(*args: Any) -> None:
    """What a hook of ours becomes once it is removed."""


@dataclass(slots=True, eq=False)
class Given:
    """What a module is given: that is known when the pre hooks of others have run."""

    owner: object
    module: nn.Module
    args: Any
    kwargs: Any
    begun: bool = False
    _begin: Callable[..., Any] = nothing
    _handle: Any = None
    _thread: int = 0

    def tell(self, begin: Callable[..., Any]) -> None:
        """Have (module, args, kwargs) told, and taken what is returned for these, if anything.

        That happens at once, or by a hook of ours that comes after those of others: it is there
        until it is called, and so not while the module's forward runs.
        """
        if not (self.module._forward_pre_hooks or all_pre_hooks):
            self.begun = True
            given = begin(self.module, self.args, self.kwargs)
            if given is not None:
                self.args, self.kwargs = given
            return
        self._begin = begin
        self._thread = threading.get_ident()
        last = Hook(self._last, self.owner)
        self._handle = self.module.register_forward_pre_hook(last, with_kwargs=True)

    def _last(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.begun or threading.get_ident() != self._thread:
            return None
        self.begun = True
        self.over()
        given = self._begin(module, args, kwargs)
        self.args, self.kwargs = (args, kwargs) if given is None else given
        return given

    def over(self) -> None:
        """The call has ended, or its forward begins."""
        if self._handle is not None:
            self._handle.remove()


class Around(CallOverride):
    """Runs around a module's call; steps aside for torch.compile, and where a copy is called."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = called(self.module)
        if dynamo() is not None:
            note()
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        if module is not self.module:
            return self.of_copy(module, args, kwargs)
        return self.around(module, args, kwargs)

    compiled_as_bare(__call__)

    def around(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Make the call, and tell of it."""
        raise NotImplementedError


class _After(Around):
    """Stands for a forward hook."""

    __slots__ = ("hook",)

    def __init__(self, hook: Hook) -> None:
        self.hook = hook
        self.owner = hook.owner

    def around(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not (module._forward_pre_hooks or all_pre_hooks):
            output = self.inner(*args, **kwargs)
            self.hook(module, args, output)
            return output
        given = Given(self.owner, module, args, kwargs)
        try:
            given.tell(nothing)
            output = self.inner(*args, **kwargs)
        finally:
            given.over()
        self.hook(module, given.args, output)
        return output
