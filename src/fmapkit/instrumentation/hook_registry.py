"""What one session has set before the calls of modules, by role.

What is set stands before a module's call (see `torchlib/call_override.py`), and says whose it is.
There are two kinds. A `Pair` is told when a call begins and when it ends. A `Tap` or another `Hook`
is what a forward hook would be, given what one would be given.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.hooks import RemovableHandle

from fmapkit.instrumentation.hook import Hook
from fmapkit.instrumentation.pair import Outside, Pair
from fmapkit.torchlib.call_override import (
    CallOverride,
    all_hooks,
    all_pre_hooks,
    free,
    standing_before,
    there,
)

_NOT_THEIRS = ("torch.", f"{__name__.partition('.')[0]}.")
_ROLES = ("around", "outside", "after")
# Hooks of torch's by which a module computes its weight before it runs, the same in each pass.
_COMPUTE = {kind.__call__ for kind in (BasePruningMethod, SpectralNorm, WeightNorm)}


def _is_plain(hook: Any) -> bool:
    """Whether a hook is code in Python, and no part of torch, or of ours."""
    kind = type(hook)
    if kind is MethodType:
        hook = hook.__func__
    elif kind is not FunctionType:
        hook = getattr(kind, "__call__", None)  # noqa: B004  (what it is, and not whether it is)
    return type(hook) is FunctionType and not str(hook.__module__).startswith(_NOT_THEIRS)


def computes_weights(hook: Any) -> bool:
    """Whether a hook is one of these, whatever it computes."""
    return type(hook).__call__ in _COMPUTE


class Off:
    """What of ours stands before a module's call, if it is `wanted`, taken away for a while."""

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
    """What one session has set, by role and module."""

    def __init__(self, owner: object, broken_off: Callable[..., Any]) -> None:
        self.owner = owner  # the session
        self._broken_off = broken_off  # of a call that no `Exception` has ended (see `Pair`)
        self._set: dict[str, dict[nn.Module, tuple[Any, CallOverride]]] = {r: {} for r in _ROLES}
        self._watched: weakref.ref[Pair] | None = None
        self.begin_pass()
        # Modules in compiled code, where nothing of ours runs.
        self.excluded: set[nn.Module] = set()

    def begin_pass(self) -> None:
        """A pass begins: what others have set so far was there before it."""
        self._newest = RemovableHandle.next_id

    def is_ours(self, hook: Any) -> bool:
        """Whether this session has set it."""
        return isinstance(hook, (Hook, CallOverride)) and hook.owner is self.owner

    def any_on(self, module: nn.Module) -> bool:
        """Whether hooks of torch's run as a module is called, whoever has set them."""
        own = module._forward_hooks or module._forward_pre_hooks
        return bool(own or all_hooks or all_pre_hooks)

    def others_on(self, module: nn.Module) -> bool:
        """Whether others have hooks on a module, or stand before its call.

        Hooks by which a module computes its weights do not count.
        """
        forward, backward = module._forward_hooks, module._backward_hooks
        dicts = forward, module._forward_pre_hooks, backward, module._backward_pre_hooks
        if not any(dicts) and self._stands(module):
            return False
        hooks = chain(standing_before(module), *(each.values() for each in dicts))
        return not all(self.is_ours(hook) or computes_weights(hook) for hook in hooks)

    def unrecorded_on(self, module: nn.Module) -> bool:
        """Whether others have hooks on a module that a path would not tell of.

        What forward hooks in Python decide is recorded, as what the module's own code does.
        """
        if not self.others_on(module):
            return False
        if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
        if any(number >= self._newest for number in module._forward_hooks):
            return True  # it has come in this very pass
        hooks = module._forward_hooks.values()
        return not self._stands(module) or not all(
            self.is_ours(hook) or computes_weights(hook) or _is_plain(hook) for hook in hooks
        )

    def _stands(self, module: nn.Module) -> bool:
        """Whether nobody stands before a module's call, or this session alone, and that once."""
        first = there(module)
        if not isinstance(first, CallOverride):
            return first is None
        return first.owner is self.owner and not isinstance(first.inner, CallOverride)

    def around(self, modules: Iterable[nn.Module], pre: Any, post: Any) -> None:
        """A pair, which serves for whatever else of ours was there."""
        there, model = self._set["around"], self._model()
        for module in modules:
            if module in there or module is model or not self._may_stand(module):
                continue
            self._remove("after", module)
            pair = Pair(self.owner, pre, post, self._broken_off)
            there[module] = pair, pair.stand(module)

    def watched_around(
        self, module: nn.Module, pre: Any, post: Any, overwritten: Callable[[], None]
    ) -> None:
        """A pair around the captured model, kept until all is dropped.

        `overwritten` is called as soon as `module.compile()` takes the place.
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
            if module not in self._set["outside"] and self._may_stand(module):
                made = Outside(self.owner, pre, post)
                self._set["outside"][module] = made, made.stand(module, first=True)

    def after(self, module: nn.Module, hook: Hook) -> bool:
        """Have a hook called after a module's calls, unless a pair of ours serves.

        Returns whether it took the place of a hook of another type.
        """
        around = module in self._set["around"] or self._model() is module
        if around or not self._may_stand(module):
            return False
        before = self._set["after"].get(module)
        if before is not None and before[0].is_like(hook):
            return False
        self._remove("after", module)
        self._set["after"][module] = hook, hook.after(module)
        return before is not None

    def modules(self) -> set[nn.Module]:
        """The modules with anything of ours."""
        model = self._model()
        return {*({model} if model is not None else ()), *chain.from_iterable(self._set.values())}

    def _model(self) -> nn.Module | None:
        pair = self._watched() if self._watched is not None else None
        return pair.module if pair is not None else None

    def _may_stand(self, module: nn.Module) -> bool:
        return module not in self.excluded and free(module)

    def _remove(self, role: str, module: nn.Module) -> None:
        found = self._set[role].pop(module, None)
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
    ) -> bool:
        """Remove what has a role, or all, of all modules but some, or of some only.

        Returns whether there was any.
        """
        pair = self._watched() if self._watched is not None else None
        if role is None and pair is not None:
            self._watched = None
            pair.disarm()
            pair.leave()
        kept, some = set(keep), None if only is None else set(only)
        removed = False
        for one in _ROLES if role is None else (role,):
            there = self._set[one]
            for module in [*there] if some is None else some.intersection(there):
                if module not in kept:
                    self._remove(one, module)
                    removed = True
        return removed
