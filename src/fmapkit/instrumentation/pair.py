"""A pair of callables around a module's call: told when it begins and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fmapkit.instrumentation.hook import Around, Given, Hook, nothing
from fmapkit.torchlib.call_override import CallOverride, all_pre_hooks

# What a pair is told that a call returned which an `Exception` has ended.
FAILED = object()


@dataclass(slots=True, eq=False)
class Returned:
    """What a call returns that has been made already, where no hook of torch's is to see it."""

    output: Any


class Pair(Around):
    """Is told when a module's call begins, and when it ends, by whatever way.

    Args:
        pre: (module, args, kwargs) -> what to give it instead, or what it has `Returned`, or None.
        post: (module, args, kwargs, output) -> what to return instead, or None. The output is
            `FAILED` after an `Exception`, which is raised unless something is `Returned`.
        broken_off: (module, error) -> whether the call returns None then. Called in place of
            `post` where what ended the call is no `Exception`; if it gives None, `post` is called
            as after one.
    """

    __slots__ = ("broken_off", "post", "pre")

    def __init__(self, owner: object, pre: Any, post: Any, broken_off: Any) -> None:
        self.owner = owner
        self.pre = pre
        self.post = post
        self.broken_off = broken_off

    def around(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module._forward_pre_hooks or all_pre_hooks:
            return self._around(module, self.inner, args, kwargs)
        try:
            given = self.pre(module, args, kwargs)
            if type(given) is Returned:
                output = given.output
            else:
                if given is not None:
                    args, kwargs = given
                output = self.inner(*args, **kwargs)
        except Exception:
            instead = self.post(module, args, kwargs, FAILED)
            if type(instead) is Returned:
                return instead.output
            raise
        except BaseException as error:
            if not self._returns(module, args, kwargs, error, begun=True):
                raise
            output = None
        replaced = self.post(module, args, kwargs, output)
        return output if replaced is None else replaced

    def of_copy(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A copy is called: a module that is not in the model, or a replica."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            return CallOverride.of_copy(self, module, args, kwargs)

        return self._around(module, inner, args, kwargs)

    def _around(self, module: nn.Module, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        given = Given(self.owner, module, args, kwargs)
        try:
            given.tell(self.pre)
            if given.begun:
                output = inner(*given.args, **given.kwargs)
            else:
                output = inner(*args, **kwargs)
        except Exception:
            given.over()
            if given.begun:
                self.post(module, given.args, given.kwargs, FAILED)
            raise
        except BaseException as error:
            given.over()
            if not self._returns(module, given.args, given.kwargs, error, given.begun):
                raise
            output = None
        replaced = self.post(module, given.args, given.kwargs, output)
        return output if replaced is None else replaced

    def _returns(
        self, module: nn.Module, args: Any, kwargs: Any, error: BaseException, begun: bool
    ) -> bool:
        """What is no `Exception` has ended a call: whether it returns None, and does not raise."""
        returns = self.broken_off(module, error)
        if returns is None and begun:
            self.post(module, args, kwargs, FAILED)
        return bool(returns)

    def disarm(self) -> None:
        """Let go of the session; a call may be under way just then."""
        self.pre = self.post = self.broken_off = nothing


class Outside(Around):
    """Is told what the hooks of others on a module are given, before it runs and after.

    Args:
        pre: (module, args, kwargs) -> None, before their pre hooks.
        post: (module, args, output) -> None, before their forward hooks.
    """

    __slots__ = ("post", "pre")

    def __init__(self, owner: object, pre: Any, post: Any) -> None:
        self.owner = owner
        self.pre = pre
        self.post = post

    def around(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.pre(module, args, kwargs)
        first = module.register_forward_hook(Hook(self.post, self.owner), prepend=True)
        try:
            return self.inner(*args, **kwargs)
        finally:
            first.remove()

    def disarm(self) -> None:
        """Let go of the session; a call may be under way just then."""
        self.pre = self.post = nothing
