"""The only place that registers hooks.

Each hook is a method of the session wrapped in a small object that says whose it is, does not travel
with a copy of the model (a deep copy or pickle gets a hook that does nothing), and lets go of the
session once removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Hook", "Hooks"]


class Hook:
    """A callable that belongs to one session."""

    __slots__ = ("call", "owner")

    def __init__(self, call: Callable[..., Any], owner: object) -> None:
        self.call = call
        self.owner = owner

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def __deepcopy__(self, memo: Any) -> Any:
        return nothing

    def __reduce__(self) -> Any:
        return "nothing"


def nothing(*args: Any) -> None:
    """What a hook of ours becomes in a copy of the model: nothing."""


class Hooks:
    """The hooks of one session, by role and module."""

    def __init__(self, owner: object) -> None:
        self._owner = owner
        self._handles: dict[tuple[str, nn.Module], list[RemovableHandle]] = {}

    def is_ours(self, hook: Any) -> bool:
        """Whether this session registered it."""
        return isinstance(hook, Hook) and hook.owner is self._owner

    def around(self, modules: Iterable[nn.Module], pre: Any, post: Any) -> None:
        """A pre and a post hook; the post hook also runs when forward raises an `Exception`."""
        for module in modules:
            key = ("around", module)
            if key not in self._handles:
                for handle in self._handles.pop(("after", module), ()):
                    handle.remove()
                self._handles[key] = [
                    module.register_forward_pre_hook(Hook(pre, self._owner), with_kwargs=True),
                    module.register_forward_hook(
                        Hook(post, self._owner), with_kwargs=True, always_call=True
                    ),
                ]

    def after(self, modules: Iterable[nn.Module], post: Any) -> None:
        """A plain post hook: the cheapest there is."""
        for module in modules:
            key = ("after", module)
            if key not in self._handles and ("around", module) not in self._handles:
                self._handles[key] = [module.register_forward_hook(Hook(post, self._owner))]

    def has(self, role: str, module: nn.Module) -> bool:
        """Whether the module has hooks of that role."""
        return (role, module) in self._handles

    @contextmanager
    def suspended(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """The modules without our hooks for a while, as bare code would see them."""
        kept: list[tuple[dict[int, Any], dict[int, Any]]] = []
        for module in modules:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                if any(map(self.is_ours, hooks.values())):
                    kept.append((hooks, dict(hooks)))
                    for key in [k for k, h in hooks.items() if self.is_ours(h)]:
                        del hooks[key]
        try:
            yield
        finally:
            for hooks, before in kept:  # in their old order
                hooks.clear()
                hooks.update(before)

    def drop(
        self,
        role: str | None = None,
        keep: Iterable[nn.Module] = (),
        only: Iterable[nn.Module] | None = None,
    ) -> None:
        """Remove the hooks of a role (or all): of all modules but some, or of some only."""
        kept = set(keep)
        if only is not None:
            keys = [(role, m) for m in only if role is not None and (role, m) in self._handles]
        else:
            keys = [k for k in self._handles if role is None or k[0] == role]
        for key in keys:
            if key[1] not in kept:
                for handle in self._handles.pop(key):
                    handle.remove()
