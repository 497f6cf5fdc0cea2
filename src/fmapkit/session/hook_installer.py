"""Which hooks of ours stand where.

- On the model, always: every pass goes through them.
- Before the first pass, on all its modules, to name what is called outside of one.
- While scopes are watched, on every module that is not inside a region.
- While a region is recorded, on every module in it; once there is a plan, on its taps only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Protocol

from torch import nn

from fmapkit.instrumentation import Hook, Hooks
from fmapkit.model import doors
from fmapkit.paths import tells_of_calls, when_unrecorded
from fmapkit.replay import (
    CurrentRun,
    PlainSite,
    Plan,
    ReplayRegions,
    can_stand,
    tap_of,
)
from fmapkit.session.state import PassState
from fmapkit.torchlib.nested import modules_in
from fmapkit.torchlib.sharded import moves_data


class HookCallbacks(Protocol):
    """What the hooks call: a `HookDispatcher`."""

    def pre(self, module: nn.Module, args: Any, kwargs: Any) -> Any: ...

    def post(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any: ...

    def tap(self, module: nn.Module, args: Any, output: Any) -> None: ...

    def fault(self, module: nn.Module, error: Exception) -> None: ...

    def overwritten(self) -> None: ...


class HookInstaller:
    """Sets and removes the hooks of one capture."""

    def __init__(
        self,
        live: PassState,
        hooks: Hooks,
        regions: ReplayRegions,
        callbacks: Callable[[], HookCallbacks],
    ) -> None:
        asked = live.asked
        self.tapped: dict[nn.Module, Plan] = {}  # the plan that each region's taps are set for
        # Where each region's functions are read plainly.
        self.sites: dict[nn.Module, dict[str, PlainSite]] = {}
        self.line = CurrentRun()  # what the taps write to
        self._model = asked.model
        self._hooks = hooks
        self._regions = regions
        self._live = live  # is told what hooks of others are given that only move data
        self._callbacks = callbacks  # what the hooks call; asked for as they are set
        self._stops = asked.stop is not None
        self._shown = bool(asked.analyses)
        self._gradients = asked.wants.gradients
        # There are hooks on all scopes, as of a version of the regions; None if there are none.
        self._scopes: int | None = None
        self._beyond = False  # there are some that neither scopes nor plans ask for
        self._all_doors = False  # there are taps at doors, whether or not methods tell of calls

    def on_model(self) -> None:
        """Those that every pass goes through."""
        calls = self._callbacks()
        self._hooks.watched_around(self._model, calls.pre, calls.post, calls.overwritten)

    def on_all_in(self, module: nn.Module) -> None:
        """On all of the model, before its first pass; on a region, until there is a plan for it."""
        self._around(modules_in(module))
        self._beyond = True

    def _around(self, modules: Iterable[nn.Module]) -> None:
        calls = self._callbacks()
        self._hooks.around(modules, calls.pre, calls.post)

    def only_on_model(self) -> None:
        """Remove all but those that every pass goes through."""
        if self.tapped or self._scopes is not None or self._beyond:
            self._beyond = False
            self._hooks.drop("after")
            self._hooks.drop("outside")
            self._hooks.drop("around", keep=[self._model])
            self.tapped.clear()
            self._scopes = None

    # -- scopes -------------------------------------------------------------------------------

    def on_scopes(self) -> None:
        """On every module, but for those inside regions that scopes have called as a whole."""
        regions = self._regions
        if self._scopes == regions.version:
            return
        self._scopes = regions.version
        inside: set[nn.Module] = set()
        for region in filter(regions.static, regions.direct):  # a part of it may be opened
            inside.update(m for m in modules_in(region) if m is not region)
        every = modules_in(self._model)
        wanted = [m for m in every if m not in inside or m in regions.direct]
        self._around(wanted)
        moving = []
        for module in wanted:
            hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
            theirs = [hook for hook in hooks if not isinstance(hook, Hook)]
            if theirs and any(map(moves_data, theirs)):
                moving.append(module)
        self._hooks.outside(moving, self._live.moves_given, self._live.moves_output)

    # -- regions ------------------------------------------------------------------------------

    def no_taps(self) -> None:
        """A region is about to be learned."""
        self._hooks.drop("after")
        self.tapped.clear()

    def taps(self, region: nn.Module, plan: Plan) -> None:
        """The taps of a plan, each of the cheapest kind that will do."""
        hooks, calls = self._hooks, self._callbacks()
        around = plan.toggles | plan.scopes | plan.before | plan.fusing | plan.edited
        # Taps whose input comes by keyword need the costlier hook.
        around |= {s.module for s in plan.steps if s.key is not None and s.module is not None}
        kept = around.union(self._regions.direct)
        if hooks.drop("around", keep=kept, only=modules_in(region)):
            self.tapped.clear()  # by another plan, or by a recording that left none
        keeping = set()
        if not self._stops and not self._shown:
            keeping = {m for m in plan.keeping if can_stand(m)}
        before = plan.before | (plan.keeping - keeping)
        around |= before
        hooks.around(around - {region}, calls.pre, calls.post)
        to = self.line, calls.tap, calls.fault, hooks.owner
        last = plan.order[-1] if plan.order and self._stops else None
        replaced = False
        for tapped in plan.taps - {region}:
            how = plan.direct.get(tapped) if tapped is not last and not self._shown else None
            if tapped in keeping:
                replaced |= hooks.after(tapped, tap_of("kept", *to))
            elif how is None or tapped in before:
                # All there is to do at once: the pass may end with it, or be shown.
                replaced |= hooks.after(tapped, Hook(calls.tap, hooks.owner))
            else:
                replaced |= hooks.after(tapped, tap_of(how, *to, self._gradients))
        if replaced:  # other plans, of this region or one that shares a module, set theirs again
            self.tapped.clear()
        self._doors(region)
        self.tapped[region] = plan
        self.sites[region] = {}
        if not (self._stops or self._shown or self._gradients):
            for site, how in plan.plain_sites.items():
                (name,) = plan.sites[site]
                self.sites[region][site] = PlainSite(site, name, how, self.line)

    # -- calls outside of a pass --------------------------------------------------------------

    def listen(self) -> None:
        """Methods that record tell of calls outside of a pass, but not of those in another's."""
        if self._all_doors or self._unrecorded in when_unrecorded:
            return
        when_unrecorded.append(self._unrecorded)
        if len(when_unrecorded) > 1:
            for tell in tuple(when_unrecorded):
                tell(None)

    def listen_no_more(self) -> None:
        """The block has ended, or a pass begins that is not captured."""
        if self._unrecorded in when_unrecorded:
            when_unrecorded.remove(self._unrecorded)

    def _unrecorded(self, frame: FrameType | None) -> None:
        """A method, of a frame, begins where nothing is recorded; None: others record, too."""
        if self._all_doors or threading.get_ident() != self._live.thread:
            return
        if frame is not None and not self._is_ours(frame):
            return
        self._all_doors = True
        self.listen_no_more()
        for region in self.tapped:
            self._doors(region)

    def _is_ours(self, frame: FrameType) -> bool:
        """Whether a function that begins, outside of a pass, is a method of one of the modules."""
        live = self._live
        if live.current is not None or not frame.f_code.co_argcount:
            return False
        owner: Any = frame.f_locals.get(frame.f_code.co_varnames[0])
        kind: Any = type(owner)
        ours = live.asked.names.by_module
        if kind.__hash__ is not object.__hash__:  # its own code would tell of its call, too
            return any(owner is module for module in ours)
        return issubclass(kind, nn.Module) and owner in ours

    def _doors(self, region: nn.Module) -> None:
        """Taps that are in no plan: they tell of calls outside of a pass."""
        calls = self._callbacks()
        telling = tells_of_calls if not self._all_doors else lambda method: False
        to = self.line, calls.tap, calls.fault, self._hooks.owner
        for door in doors(region, self._hooks.modules(), telling):
            self._hooks.after(door, tap_of("y", *to))
