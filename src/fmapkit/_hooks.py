"""The only place that registers hooks, or takes a mode off torch's stack.

Each hook is a method of the session wrapped in a small object that says whose it is, does not go
with a copy of the model (a deep copy or pickle gets a hook that does nothing), and lets go of the
session once removed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

__all__ = [
    *("Handle", "Hook", "Hooks", "Inert", "hooks_on", "leave_mode", "traced_as_nothing"),
    *("when_traced", "without_modes"),
]


# Called when torch.compile traces code in which a hook of ours is set: each open session's own.
when_traced: list[Callable[[], None]] = []


def _note(context: Any) -> None:
    for call in tuple(when_traced):
        call()


def _traced(hook: Hook, *args: Any) -> None:
    """What dynamo traces in place of a hook: nothing, so that the compiled code is the user's.

    The import and the call are run while it traces, and leave nothing in what it makes.
    """
    from torch._dynamo.comptime import comptime

    comptime(_note)


def traced_as_nothing(call: Callable[..., Any]) -> None:
    """torch.compile leaves a hook's `__call__` out of what it compiles.

    `torch.compile(module)` runs the module's own hooks outside of its graph, and would try to
    compile them by themselves. Older versions of torch cannot be told; there it costs time.
    """
    call._torchdynamo_inline = _traced  # type: ignore[attr-defined]
    dynamo = torch._C._dynamo.eval_frame
    if hasattr(dynamo, "_FrameExecStrategy") and hasattr(dynamo, "set_code_exec_strategy"):
        skip = dynamo._FrameAction.SKIP
        dynamo.set_code_exec_strategy(call.__code__, dynamo._FrameExecStrategy(skip, skip))


class Handle(Protocol):
    """What undoes a registration."""

    def remove(self) -> None:
        """Undo it."""


class Hook:
    """A callable that belongs to one session."""

    __slots__ = ("call", "owner")

    def __init__(self, call: Callable[..., Any], owner: object) -> None:
        self.call = call
        self.owner = owner

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    traced_as_nothing(__call__)

    def after(self, module: nn.Module) -> Handle:
        """Be called after each call of a module."""
        return module.register_forward_hook(self)

    def disarm(self) -> None:
        """Let go of the session; torch may be going through the module's hooks just then."""
        self.call = nothing

    def __deepcopy__(self, memo: Any) -> Inert:
        return Inert()

    def __reduce__(self) -> Any:
        return Inert, ()


class Inert:
    """What a hook of ours is in a copy of the model: nothing, gone after the copy's first run."""

    def __call__(self, module: nn.Module, *args: Any) -> None:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, h in hooks.items() if isinstance(h, Inert)]:
                del hooks[key]
                for flags in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    flags.pop(key, None)


def nothing(*args: Any) -> None:
    """What a hook of ours becomes once it is removed."""


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
    """All hooks on a module, of whoever set them."""
    return (
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    )


class Off:
    """The hooks that were taken off a module for a while.

    Args:
        module: whose they are.
        wanted: tells them from the others.
    """

    __slots__ = ("_kept",)

    def __init__(self, module: nn.Module, wanted: Callable[[Any], bool]) -> None:
        self._kept: list[tuple[OrderedDict[int, Any], tuple[int, ...], dict[int, Any]]] = []
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            ours = {k: h for k, h in hooks.items() if wanted(h)} if hooks else None
            if ours:
                self._kept.append((cast("OrderedDict[int, Any]", hooks), tuple(hooks), ours))
                for key in ours:
                    del hooks[key]

    def put_back(self) -> None:
        """In their old order, one by one: other threads set hooks meanwhile, and run them."""
        for hooks, order, ours in self._kept:
            others = tuple(hooks)
            hooks.update(ours)
            if others:
                new = [key for key in others if key not in order]
                for key in (*order, *new):
                    if key in hooks:
                        hooks.move_to_end(key)


class Pair:
    """A pre and a post hook, the same on all modules that have them; the latter runs always.

    It sets what `register_forward_pre_hook` and `register_forward_hook` set, under one key for
    each: to make two handles for every module takes longer than a small module's call.
    """

    __slots__ = ("_post", "_pre")

    def __init__(self, keys: tuple[int, int], pre: Hook, post: Hook) -> None:
        self._pre = keys[0], pre
        self._post = keys[1], post

    def set_on(self, modules: Iterable[nn.Module]) -> None:
        """Both come last among a module's hooks."""
        (before, pre), (after, post) = self._pre, self._post
        for module in modules:
            module._forward_pre_hooks[before] = pre
            module._forward_pre_hooks_with_kwargs[before] = True
            module._forward_hooks[after] = post
            module._forward_hooks_with_kwargs[after] = True
            module._forward_hooks_always_called[after] = True

    def remove_from(self, modules: Iterable[nn.Module]) -> None:
        """Take them off."""
        before, after = self._pre[0], self._post[0]
        for module in modules:
            for key, there in (
                (before, module._forward_pre_hooks),
                (before, module._forward_pre_hooks_with_kwargs),
                (after, module._forward_hooks),
                (after, module._forward_hooks_with_kwargs),
                (after, module._forward_hooks_always_called),
            ):
                if key in there:
                    del there[key]

    def disarm(self) -> None:
        """No module has them any more."""
        self._pre[1].disarm()
        self._post[1].disarm()


class Hooks:
    """The hooks of one session, by role and module.

    Attributes:
        owner: the session.
        excluded: modules in compiled code, where no hook runs.
    """

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self._handles: dict[tuple[str, nn.Module], list[tuple[Hook, Handle]]] = {}
        # Torch counts what it hands out, for all modules together: these are nobody else's.
        self._keys = RemovableHandle(OrderedDict()).id, RemovableHandle(OrderedDict()).id
        self._pair: Pair | None = None  # under these keys, around
        self._around: dict[nn.Module, None] = {}  # these modules
        self.excluded: set[nn.Module] = set()

    def is_ours(self, hook: Any) -> bool:
        """Whether this session registered it."""
        return isinstance(hook, Hook) and hook.owner is self.owner

    def around(self, modules: Iterable[nn.Module], pre: Any, post: Any) -> None:
        """A pre and a post hook; the post hook also runs when forward raises an `Exception`.

        They are the same on all modules, and each time.
        """
        pair = self._pair
        if pair is None:
            pair = Pair(self._keys, Hook(pre, self.owner), Hook(post, self.owner))
            self._pair = pair
        new = [m for m in modules if m not in self._around and not self._unhookable(m)]
        if self._handles:
            for module in new:
                self._remove(("after", module))
                self._remove(("before", module))
        self._around.update(dict.fromkeys(new))
        pair.set_on(new)

    def outside(self, modules: Iterable[nn.Module], pre: Any, post: Any) -> None:
        """A pair that comes before the pre and the post hooks of others: what they were given."""
        for module in modules:
            first, last = Hook(pre, self.owner), Hook(post, self.owner)
            self._handles["outside", module] = [
                (first, module.register_forward_pre_hook(first, prepend=True, with_kwargs=True)),
                (last, module.register_forward_hook(last, prepend=True)),
            ]

    def after(self, module: nn.Module, hook: Hook) -> bool:
        """A plain post hook, the cheapest kind there is, unless others of ours serve.

        Returns:
            Whether it took the place of a hook of another type.
        """
        return self._plain("after", module, hook)

    def before(self, module: nn.Module, hook: Hook) -> bool:
        """A plain pre hook, with the same reserve."""
        replaced = self._plain("before", module, hook)
        # What stands before the call takes a pre hook for somebody else's, which may change z.
        for tap, handle in self._handles.get(("after", module), ()):
            if not isinstance(handle, RemovableHandle):
                handle.remove()
                self._handles["after", module] = [(tap, module.register_forward_hook(tap))]
        return replaced

    def _plain(self, role: str, module: nn.Module, hook: Hook) -> bool:
        if module in self._around or self._unhookable(module):
            return False
        before = self._handles.get((role, module))
        if before is not None and type(before[0][0]) is type(hook):
            return False
        self._remove((role, module))
        handle = hook.after(module) if role == "after" else module.register_forward_pre_hook(hook)
        self._handles[role, module] = [(hook, handle)]
        return before is not None

    def has(self, module: nn.Module, kind: type[Hook]) -> bool:
        """Whether a plain post hook of ours on a module is of a type."""
        return any(type(hook) is kind for hook, _ in self._handles.get(("after", module), ()))

    def clear(self, module: nn.Module) -> bool:
        """Take our plain hooks off a module; whether there was one."""
        roles = [role for role in ("after", "before") if (role, module) in self._handles]
        for role in roles:
            self._remove((role, module))
        return bool(roles)

    def modules(self) -> set[nn.Module]:
        """The modules with any hook of ours."""
        return {*self._around, *(module for _, module in self._handles)}

    def is_around(self, module: nn.Module) -> bool:
        """Whether a module has a pair of ours."""
        return module in self._around

    def alone_on(self, module: nn.Module) -> bool:
        """Whether nobody else has hooks on a module, or on all of them."""
        if _global_forward_hooks or _global_forward_pre_hooks:
            return False
        return all(map(self.is_ours, hooks_on(module))) and not self._unhookable(module)

    def _unhookable(self, module: nn.Module) -> bool:
        return isinstance(module, torch.jit.ScriptModule) or module in self.excluded

    def _remove(self, key: tuple[str, nn.Module]) -> None:
        for hook, handle in self._handles.pop(key, ()):
            hook.disarm()
            handle.remove()

    @contextmanager
    def suspended(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """The modules without our hooks for a while, as bare code would see them."""
        kept = [self.take_off(module) for module in modules]
        try:
            yield
        finally:
            for off in kept:
                off.put_back()

    def take_off(self, module: nn.Module) -> Off:
        """Take our hooks off a module, to be put back soon."""
        return Off(module, self.is_ours)

    def drop(
        self,
        role: str | None = None,
        keep: Iterable[nn.Module] = (),
        only: Iterable[nn.Module] | None = None,
    ) -> None:
        """Remove the hooks of a role (or all): of all modules but some, or of some only."""
        kept = set(keep)
        if role in (None, "around"):
            self._drop_around(kept, only)
        if role != "around":
            modules = None if only is None else set(only)
            for key in list(self._handles):
                if role in (None, key[0]) and key[1] not in kept:
                    if modules is None or key[1] in modules:
                        self._remove(key)

    def _drop_around(self, kept: set[nn.Module], only: Iterable[nn.Module] | None) -> None:
        pair = self._pair
        if pair is None:
            return
        around = self._around
        gone = [m for m in (around if only is None else only) if m in around and m not in kept]
        for module in gone:
            around.pop(module, None)
        pair.remove_from(gone)
        if not self._around:
            pair.disarm()
            self._pair = None
