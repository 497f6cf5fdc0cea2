"""The only place that sets anything on modules, or takes a mode off torch's stack.

What is set stands before a module's call (see `_standing.py`), and says whose it is. There are two
kinds. A `Pair` is told when a call begins and when it ends. A `Tap` or another `Hook` is what a
forward hook would be, given what one would be given.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from fmapkit._standing import (
    Standing,
    called,
    compiled_as_bare,
    dynamo,
    free,
    not_compiled,
    note,
    standing_before,
)

__all__ = ["FAILED", "Hook", "Hooks", "hooks_on", "leave_mode", "nothing", "without_modes"]

# What a pair is told that a call returned which an `Exception` has ended.
FAILED = object()


class Hook:
    """A callable that belongs to one session."""

    __slots__ = ("call", "owner")

    def __init__(self, call: Callable[..., Any], owner: object) -> None:
        self.call = call
        self.owner = owner

    @not_compiled
    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def after(self, module: nn.Module) -> Standing:
        """Be called after each call of a module: (module, args, output)."""
        made = _After(self)
        made.stand(module)
        return made

    def before(self, module: nn.Module) -> Standing:
        """Be called before each call of a module: (module, args)."""
        made = _Before(self)
        made.stand(module)
        return made

    def disarm(self) -> None:
        """Let go of the session; a call that it belongs to may be under way just then."""
        self.call = nothing

    def __reduce__(self) -> Any:
        return Hook, (nothing, None)


def nothing(*args: Any) -> None:
    """What a hook of ours becomes once it is removed."""


class _Given:
    """What a module is given: that is known when the pre hooks of others have run.

    Args:
        owner: the session.
        module: about to be called.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    __slots__ = ("_begin", "_handle", "_thread", "args", "begun", "kwargs", "module", "owner")

    def __init__(self, owner: object, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.owner = owner
        self.module = module
        self.args, self.kwargs = args, kwargs
        self.begun = False
        self._begin: Callable[..., Any] = nothing
        self._handle: Any = None
        self._thread = 0

    def tell(self, begin: Callable[..., Any]) -> None:
        """Have (module, args, kwargs) told, and taken what is returned for these, if anything.

        That happens at once, or by a hook of ours that comes after those of others: it is there
        until it is called, and so not while the module's forward runs.
        """
        if not (self.module._forward_pre_hooks or _global_forward_pre_hooks):
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


class Pair(Standing):
    """Is told when a module's call begins, and when it ends, by whatever way.

    Args:
        owner: the session.
        pre: (module, args, kwargs) -> what to give it instead, or None.
        post: (module, args, kwargs, output) -> what to return instead, or None. The output is
            `FAILED` after an `Exception`.
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = called(self.module)
        if dynamo() is not None:
            note()
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        if module is not self.module:
            return self.of_copy(module, args, kwargs)
        return self._around(module, self.inner, args, kwargs)

    compiled_as_bare(__call__)

    def of_copy(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A copy is called: a module that is not in the model, or a replica."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            return Standing.of_copy(self, module, args, kwargs)

        return self._around(module, inner, args, kwargs)

    def _around(self, module: nn.Module, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        given = _Given(self.owner, module, args, kwargs)
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
            returns = self.broken_off(module, error)
            if returns is None and given.begun:
                self.post(module, given.args, given.kwargs, FAILED)
            if not returns:
                raise
            output = None
        replaced = self.post(module, given.args, given.kwargs, output)
        return output if replaced is None else replaced

    def disarm(self) -> None:
        """Let go of the session; a call may be under way just then."""
        self.pre = self.post = self.broken_off = nothing


class _After(Standing):
    """Stands for a forward hook.

    Args:
        hook: (module, args, output) -> None.
    """

    __slots__ = ("hook",)

    def __init__(self, hook: Hook) -> None:
        self.hook = hook
        self.owner = hook.owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = called(self.module)
        if dynamo() is not None:
            note()
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        if module is not self.module:
            return self.of_copy(module, args, kwargs)
        if not (module._forward_pre_hooks or _global_forward_pre_hooks):
            output = self.inner(*args, **kwargs)
            self.hook(module, args, output)
            return output
        given = _Given(self.owner, module, args, kwargs)
        try:
            given.tell(nothing)
            output = self.inner(*args, **kwargs)
        finally:
            given.over()
        self.hook(module, given.args, output)
        return output

    compiled_as_bare(__call__)


class _Before(Standing):
    """Stands for a forward pre hook.

    Args:
        hook: (module, args) -> None.
    """

    __slots__ = ("hook",)

    def __init__(self, hook: Hook) -> None:
        self.hook = hook
        self.owner = hook.owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = called(self.module)
        if dynamo() is not None:
            note()
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        if module is not self.module:
            return self.of_copy(module, args, kwargs)
        given = _Given(self.owner, module, args, kwargs)
        try:
            given.tell(self._begins)
            return self.inner(*args, **kwargs)
        finally:
            given.over()

    compiled_as_bare(__call__)

    def _begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.hook(module, args)


class _Outside(Standing):
    """Is told what the hooks of others on a module are given, before it runs and after.

    Args:
        owner: the session.
        pre: (module, args, kwargs) -> None, before their pre hooks.
        post: (module, args, output) -> None, before their forward hooks.
    """

    __slots__ = ("post", "pre")

    def __init__(self, owner: object, pre: Any, post: Any) -> None:
        self.owner = owner
        self.pre = pre
        self.post = post

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = called(self.module)
        if dynamo() is not None:
            note()
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        if module is not self.module:
            return self.of_copy(module, args, kwargs)
        self.pre(module, args, kwargs)
        first = module.register_forward_hook(Hook(self.post, self.owner), prepend=True)
        try:
            return self.inner(*args, **kwargs)
        finally:
            first.remove()

    compiled_as_bare(__call__)

    def disarm(self) -> None:
        """Let go of the session; a call may be under way just then."""
        self.pre = self.post = nothing


def leave_mode(mode: TorchFunctionMode) -> None:
    """Take a function mode off torch's stack, wherever it lies; those above it stay."""
    above = []
    while torch._C._len_torch_function_stack():
        top = _pop_mode()  # type: ignore[no-untyped-call]
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push_mode(other)  # type: ignore[no-untyped-call]


@contextmanager
def without_modes() -> Iterator[None]:
    """Torch's stack of function modes, empty for a while; what is put on it there works."""
    count = torch._C._len_torch_function_stack()
    modes = [_pop_mode() for _ in range(count)]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)  # type: ignore[no-untyped-call]


def hooks_on(module: nn.Module) -> tuple[Any, ...]:
    """All hooks on a module, and all of ours before its call, of whichever session."""
    return (
        *standing_before(module),
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    )


class Off:
    """What of ours stands before a module's call, taken away for a while.

    Args:
        module: whose call it is.
        wanted: tells it from what stays.
    """

    __slots__ = ("_kept", "_module")

    def __init__(self, module: nn.Module, wanted: Callable[[Any], bool]) -> None:
        self._module = module
        self._kept = [s for s in standing_before(module) if wanted(s)]
        for standing in self._kept:
            standing.leave()

    def put_back(self) -> None:
        """In their old order; not where somebody has taken the place meanwhile."""
        if free(self._module):
            for standing in reversed(self._kept):
                standing.stand(self._module, first=True)


class Hooks:
    """What one session has set, by role and module.

    Args:
        owner: the session.
        broken_off: told of a call that no `Exception` has ended (see `Pair`).

    Attributes:
        owner: the session.
        excluded: modules in compiled code, where nothing of ours runs.
    """

    def __init__(self, owner: object, broken_off: Callable[..., Any]) -> None:
        self.owner = owner
        self._broken_off = broken_off
        self._set: dict[tuple[str, nn.Module], tuple[Any, Standing]] = {}
        self._watched: weakref.ref[Pair] | None = None
        self.excluded: set[nn.Module] = set()

    def is_ours(self, hook: Any) -> bool:
        """Whether this session has set it."""
        return isinstance(hook, (Hook, Standing)) and hook.owner is self.owner

    def around(self, modules: Iterable[nn.Module], pre: Any, post: Any) -> None:
        """A pair, which serves for whatever else of ours was there."""
        for module in modules:
            if self.is_around(module) or not self._may_stand(module):
                continue
            self._remove(("after", module))
            self._remove(("before", module))
            pair = Pair(self.owner, pre, post, self._broken_off)
            pair.stand(module)
            self._set["around", module] = pair, pair

    def watched_around(
        self, module: nn.Module, pre: Any, post: Any, overwritten: Callable[[], None]
    ) -> None:
        """A pair around the captured model, kept until all is dropped.

        Args:
            module: the model.
            pre: see `Pair`.
            post: see `Pair`.
            overwritten: called as soon as `module.compile()` takes the place.
        """
        if not self._may_stand(module):
            return

        def gone(_: Any) -> None:
            if self._watched is not None:
                overwritten()

        pair = Pair(self.owner, pre, post, self._broken_off)
        pair.stand(module, first=True)  # what it raises as a pass ends is nothing to older blocks
        # What was there is held by nobody else, and so goes when something else is put there.
        self._watched = weakref.ref(pair, gone)

    def outside(self, modules: Iterable[nn.Module], pre: Any, post: Any) -> None:
        """Be told what the pre and the post hooks of others on a module are given."""
        for module in modules:
            if ("outside", module) not in self._set and self._may_stand(module):
                made = _Outside(self.owner, pre, post)
                made.stand(module, first=True)
                self._set["outside", module] = made, made

    def after(self, module: nn.Module, hook: Hook) -> bool:
        """Have a hook called after a module's calls, unless a pair of ours serves.

        Returns:
            Whether it took the place of a hook of another type.
        """
        return self._single("after", module, hook)

    def before(self, module: nn.Module, hook: Hook) -> bool:
        """Have it called before them, with the same reserve."""
        return self._single("before", module, hook)

    def _single(self, role: str, module: nn.Module, hook: Hook) -> bool:
        if self.is_around(module) or not self._may_stand(module):
            return False
        before = self._set.get((role, module))
        if before is not None and type(before[0]) is type(hook):
            return False
        self._remove((role, module))
        standing = hook.after(module) if role == "after" else hook.before(module)
        self._set[role, module] = hook, standing
        return before is not None

    def modules(self) -> set[nn.Module]:
        """The modules with anything of ours."""
        model = self._model()
        return {module for _, module in self._set} | ({model} if model is not None else set())

    def is_around(self, module: nn.Module) -> bool:
        """Whether a module has a pair of ours."""
        return ("around", module) in self._set or self._model() is module

    def _model(self) -> nn.Module | None:
        pair = self._watched() if self._watched is not None else None
        return pair.module if pair is not None else None

    def _may_stand(self, module: nn.Module) -> bool:
        return module not in self.excluded and free(module)

    def _remove(self, key: tuple[str, nn.Module]) -> None:
        found = self._set.pop(key, None)
        if found is not None:
            found[0].disarm()
            found[1].leave()

    @contextmanager
    def suspended(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """The modules without what is ours for a while, as bare code would see them."""
        kept = [self.take_off(module) for module in modules]
        try:
            yield
        finally:
            for off in kept:
                off.put_back()

    def take_off(self, module: nn.Module) -> Off:
        """Take what is ours off a module, to be put back soon."""
        return Off(module, self.is_ours)

    def drop(
        self,
        role: str | None = None,
        keep: Iterable[nn.Module] = (),
        only: Iterable[nn.Module] | None = None,
    ) -> None:
        """Remove what has a role: of all modules but some, or of some only; or all there is."""
        pair = self._watched() if self._watched is not None else None
        if role is None and pair is not None:
            self._watched = None
            pair.disarm()
            pair.leave()
        kept = set(keep)
        if only is not None:
            keys = [(role, m) for m in only if role is not None and (role, m) in self._set]
        else:
            keys = [k for k in self._set if role is None or k[0] == role]
        for key in keys:
            if key[1] not in kept:
                self._remove(key)
