"""Whether the model is still the one that was learned: asked before every pass, so cheaply.

What it costs is memory: after a pass, nothing of the modules is in the processor's caches. So it
looks at as little of each as will do: at its class, and whether its dicts were written to. Only if
they were does it look what is in them.
"""

from __future__ import annotations

import weakref
from itertools import chain, repeat
from operator import attrgetter, is_not, itemgetter, methodcaller
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fmapkit import layers, nonlinearities
from fmapkit.instrumentation import Hook, Hooks
from fmapkit.torchlib import call_override
from fmapkit.torchlib.caching import DictWatch, remembered
from fmapkit.torchlib.call_override import all_hooks, all_pre_hooks, standing_before
from fmapkit.torchlib.compiled_modules import compiled_call, ever_compiled
from fmapkit.torchlib.nested import modules_in

_FORWARD = repeat("forward")
_MODULES = itemgetter("_modules")
_forward, _call = attrgetter("forward"), attrgetter("__call__")
_forward_hooks, _forward_pre_hooks = attrgetter("_forward_hooks"), attrgetter("_forward_pre_hooks")
_attributes = attrgetter("__dict__")


class ModelGuard:
    """What every plan rests on, as it was when the watch was set.

    That is: which modules there are, under which names, in which order; their classes, and the
    forward of each; that theirs is their class's; that no hooks of others were added; and what is
    registered.
    """

    def __init__(self, model: nn.Module, hooks: Hooks) -> None:
        modules = [m for m in modules_in(model) if not isinstance(m, torch.jit.ScriptModule)]
        self._hooks = hooks
        self._registered = (layers.version, nonlinearities.version)
        parents = [m for m in modules if m._modules or not _leaf(type(m))]
        self._homes = [m.__dict__ for m in parents]
        self._parents = [m._modules for m in parents]
        self._counts = list(map(len, self._parents))
        self._keys = list(chain.from_iterable(self._parents))
        plain = set(map(type, self._parents)) == {dict}  # some are an OrderedDict
        self._values: Any = dict.values if plain else methodcaller("values")
        self._children = list(chain.from_iterable(map(self._values, self._parents)))
        self._watched = [m for m in modules if "forward" not in m.__dict__]
        self._types = list(map(type, self._watched))
        self._classes = list(set(self._types))
        self._forwards = list(map(_forward, self._classes))
        self._class_calls = list(map(_call, self._classes))
        self._attributes = [m.__dict__ for m in self._watched]
        self._forward_hooks = list(map(_forward_hooks, self._watched))
        self._forward_pre_hooks = list(map(_forward_pre_hooks, self._watched))
        self._dicts = DictWatch([*self._homes, *self._parents, *self._attributes])
        # What stood before each module's call, when last looked; none is to be kept alive by that.
        self._there: list[weakref.ref[Any] | None] = []
        self._calls: list[object] = []  # and what of that is torch.compile's
        self._compiled = self._compiled_calls()
        self._foreigners = self._foreign()
        # There is anything of others'.
        self.theirs = bool(self._foreigners[0]) or any(self._foreigners[1])
        self._last = self.counted()

    def counted(self) -> tuple[int, int]:
        """Goes up with every hook of anybody's, and with whatever of ours stands before a call."""
        return RemovableHandle.next_id, call_override.changes

    def settled(self) -> bool:
        """Whether nobody has set anything since it last looked."""
        return self.counted() == self._last

    def count_from_here(self) -> None:
        """What was set since it last looked is known to be what was there then."""
        self._last = self.counted()

    def _foreign(self) -> tuple[set[int], list[tuple[int, ...]]]:
        """Which other sessions there are, and which hooks of others each module has."""
        sessions: set[int] = set()
        found: list[tuple[int, ...]] = [(*all_pre_hooks, *all_hooks)]
        for module in self._watched:
            if call_override.there(module) is not None:
                for standing in standing_before(module):
                    if not self._hooks.is_ours(standing):
                        sessions.add(id(standing.owner))
            theirs: tuple[int, ...] = ()
            if module._forward_pre_hooks or module._forward_hooks:
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    theirs += tuple([n for n, h in hooks.items() if not isinstance(h, Hook)])
            found.append(theirs)
        return sessions, found

    def _compiled_calls(self) -> list[object]:
        """What `module.compile()` has set; nothing where torch.compile was never used."""
        if not ever_compiled():
            return []
        if self._exchanged():
            # Ours, perhaps, which come and go.
            calls_there = (there.get("_compiled_call_impl") for there in self._attributes)
            self._there = [None if call is None else weakref.ref(call) for call in calls_there]
            calls = list(map(compiled_call, self._attributes))
            # None at all is what it was before torch.compile was there.
            self._calls = calls if any(c is not None for c in calls) else []
        return self._calls

    def _exchanged(self) -> bool:
        """Whether something else stands before some module's call than when last looked."""
        if not self._there:
            return True
        for attributes, there in zip(self._attributes, self._there, strict=True):
            if attributes.get("_compiled_call_impl") is not (None if there is None else there()):
                return True
        return False

    def changed(self) -> bool:
        """Whether anything is not as it was."""
        # In C as far as can be: there are hundreds of modules to look at.
        written = self._dicts.written()
        return (
            list(map(type, self._watched)) != self._types
            or any(map(is_not, map(_attributes, self._watched), self._attributes))
            or any(map(is_not, map(_forward, self._classes), self._forwards))
            or any(map(is_not, map(_call, self._classes), self._class_calls))
            or (written and self._rearranged())
            or self._registered != (layers.version, nonlinearities.version)
            or (written and ever_compiled() and self._compiled != self._compiled_calls())
            or (self.counted() != self._last and self._hooked())
        )

    def _rearranged(self) -> bool:
        """Whether modules came, went, or got a forward or a dict of hooks of their own."""
        parents = self._parents
        return (
            any(map(is_not, map(_MODULES, self._homes), parents))
            or list(map(len, parents)) != self._counts
            or list(chain.from_iterable(parents)) != self._keys
            or list(chain.from_iterable(map(self._values, parents))) != self._children
            or any(map(dict.__contains__, self._attributes, _FORWARD))
            or any(map(is_not, map(_forward_hooks, self._watched), self._forward_hooks))
            or any(map(is_not, map(_forward_pre_hooks, self._watched), self._forward_pre_hooks))
        )

    def rid(self) -> bool:
        """Whether hooks of others are gone: nothing counts that."""
        return self._foreign() != self._foreigners

    def _hooked(self) -> bool:
        """Whether it is others who have set any, another session included."""
        self._last = self.counted()
        return self._foreign() != self._foreigners


@remembered
def _leaf(kind: type) -> bool:
    """torch's own modules without children: their forward would not run one that came later."""
    home = kind.__module__
    return home.startswith("torch.nn.modules.") and not home.endswith(".container")
