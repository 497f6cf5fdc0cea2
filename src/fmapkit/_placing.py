"""Which hooks of ours stand where.

- On the model, always: every pass goes through them.
- Before the first pass, on all its modules, to name what is called outside of one.
- While scopes are watched, on every module that is not inside a unit.
- While a unit is learned, on every module in it; from then on, on its taps only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fmapkit._asked import Asked
from fmapkit._doors import doors
from fmapkit._gradient_taps import GradientOutputTap, GradientTap
from fmapkit._hooks import Hook, Hooks
from fmapkit._moves import Moves
from fmapkit._plan import Plan
from fmapkit._sharded import moves_data
from fmapkit._standing import free, lock
from fmapkit._stands import Leaf, Scope, Way
from fmapkit._taps import InputTap, Line, OutputTap, Tap
from fmapkit._units import Units

__all__ = ["Calls", "Placing"]


@dataclass(frozen=True, slots=True)
class Calls:
    """What the hooks call.

    Attributes:
        pre: as a module's forward begins: (module, args, kwargs).
        post: as it ends: (module, args, kwargs, output).
        tap: a module that carries a site has run: (module, args, output).
        tap_before: a module whose first argument is a site's is about to run: (module, args).
        fault: a tap has failed: (module, error).
        overwritten: `module.compile()` has taken the place before the model's own call: ().
        outside: a module that we stand before is called while nobody follows: (module).
        replay: a unit that we stand before is to be replayed: (module, args, kwargs).
    """

    pre: Callable[..., Any]
    post: Callable[..., Any]
    tap: Callable[..., Any]
    tap_before: Callable[..., Any]
    fault: Callable[..., Any]
    overwritten: Callable[[], None]
    outside: Callable[..., Any]
    replay: Callable[..., bool]


class Placing:
    """Sets and removes the hooks of one capture.

    Args:
        asked: by the capture.
        hooks: of the capture.
        units: of the model.
        moves: is told what hooks of others are given that only move data.
        calls: what the hooks call.

    Attributes:
        tapped: the plan that each unit's taps are set for.
        line: what the taps write to.
        moving: hooks of others on scopes move data.
        standing: we stand before the calls that we were told to; not after a bare pass.
        way: by which what stands before calls finds who follows.
    """

    def __init__(
        self, asked: Asked, hooks: Hooks, units: Units, moves: Moves, calls: Calls
    ) -> None:
        self.tapped: dict[nn.Module, Plan] = {}
        self.line = Line()
        self._model = asked.model
        self._hooks = hooks
        self._units = units
        self._moves = moves
        self._calls = calls
        self._stops = asked.stop is not None
        self._shown = bool(asked.analyses)
        gradients = asked.wants.gradients
        self._kinds: dict[str, type[Tap]] = {
            "xy": GradientTap if gradients else Tap,
            "y": GradientOutputTap if gradients else OutputTap,
        }
        self._scopes = False  # there are hooks on all scopes
        self._stands: dict[nn.Module, Leaf | Scope] = {}
        self.standing = False
        self._bare: list[nn.Module] = []  # scopes without hooks, for now
        self.moving = False
        self.way = Way()
        self._early = False  # hooks on all modules, before the first pass

    def on_model(self) -> None:
        """Those that every pass goes through."""
        calls = self._calls
        self._hooks.watched_around(self._model, calls.pre, calls.post, calls.overwritten)

    def early(self) -> None:
        """Those on all modules."""
        self._hooks.around(self._model.modules(), self._calls.pre, self._calls.post)
        self._early = True

    def only_on_model(self) -> None:
        """Remove all but those that every pass goes through."""
        if self.tapped or self._scopes or self._early:
            self._early = False
            self._hooks.drop("after")
            self._hooks.drop("outside")
            self._hooks.drop("before")
            self._hooks.drop("around", keep=[self._model])
            self.tapped.clear()
            self.no_stands()
            self._scopes = False

    # -- scopes -------------------------------------------------------------------------------

    def on_scopes(self) -> None:
        """On every module, but for those inside units that scopes have called as a whole."""
        if self._scopes:
            return
        self._scopes = True
        self._bare.clear()
        inside: set[nn.Module] = set()
        for unit in self._units.direct:
            inside.update(m for m in unit.modules() if m is not unit)
        wanted = [m for m in self._model.modules() if m not in inside or m in self._units.direct]
        self._hooks.around(wanted, self._calls.pre, self._calls.post)
        moving = [
            m
            for m in wanted
            if any(map(moves_data, (*m._forward_pre_hooks.values(), *m._forward_hooks.values())))
        ]
        self.moving = bool(moving)
        self._hooks.outside(moving, self._moves.before, self._moves.after)

    def stand(self, leaves: Iterable[nn.Module], scopes: Iterable[nn.Module]) -> set[nn.Module]:
        """Stand before the calls of modules, so that they need no hooks while passes are followed.

        Returns:
            Those of them that somebody else stands before, or has hooks on.
        """
        calls = self._calls
        self.standing = True
        left: set[nn.Module] = set()
        for kind, modules in ((Leaf, leaves), (Scope, scopes)):
            for module in modules:
                if module in self._stands:
                    continue
                with lock:
                    if not self._hooks.alone_on(module) or not free(module):
                        left.add(module)
                        continue
                    made = self._stands[module] = kind(module, self.way, calls, self._hooks.owner)
                    made.stand(module)
        return left

    def stand_aside(self, module: nn.Module) -> None:
        """Stand before this one no more."""
        stand = self._stands.pop(module, None)
        if stand is not None:
            stand.leave()

    def only_stands(self) -> None:
        """No hooks where we stand before the call."""
        if not self._bare:
            self._bare = [m for m in self._stands if self._hooks.is_around(m)]
            self._hooks.drop("around", only=self._bare)

    def look_at_all(self) -> None:
        """Hooks there, too."""
        self._hooks.around(self._bare, self._calls.pre, self._calls.post)
        self._bare = []

    def no_stands(self) -> None:
        """Stand before no call any more."""
        for stand in self._stands.values():
            stand.leave()
        self._stands.clear()
        self._bare.clear()
        self.standing = False

    def scopes_changed(self) -> None:
        """Units have become scopes, or are called by others: the next pass sets hooks again."""
        self._scopes = False

    # -- units --------------------------------------------------------------------------------

    def no_taps(self) -> None:
        """A unit is about to be learned."""
        self._hooks.drop("after")
        self._hooks.drop("before")
        self.tapped.clear()

    def in_lesson(self, unit: nn.Module) -> None:
        """On every module in a unit, while it is learned."""
        self._hooks.around(unit.modules(), self._calls.pre, self._calls.post)

    def after_lesson(self, unit: nn.Module) -> None:
        """Inside the unit, no hooks but taps from here on."""
        self._hooks.drop("around", only=[m for m in unit.modules() if m not in self._units.direct])

    def taps(self, unit: nn.Module, plan: Plan) -> None:
        """The taps of a plan, each of the cheapest kind that will do."""
        hooks, calls = self._hooks, self._calls
        around = plan.toggles | plan.scopes | plan.before | _keyed(plan)
        hooks.around(around - {unit}, calls.pre, calls.post)
        last = plan.order[-1] if plan.order and self._stops else None
        replaced = False
        for tapped in plan.taps - {unit}:
            how = plan.direct.get(tapped) if tapped is not last and not self._shown else None
            if how is None:
                replaced |= hooks.after(tapped, self._slow(calls.tap))
            else:
                tap = self._kinds[how](self.line, calls.tap, calls.fault, hooks.owner)
                replaced |= hooks.after(tapped, tap)
        for noted, key in plan.inputs.items():
            if key is last or self._shown:
                replaced |= hooks.before(noted, self._slow(calls.tap_before))
            else:
                noting = InputTap(key, self.line, calls.tap_before, calls.fault, hooks.owner)
                replaced |= hooks.before(noted, noting)
        if replaced:  # other plans, of this unit or of one that shares a module, set theirs again
            self.tapped.clear()
        for door in doors(unit, hooks.modules()):
            hooks.after(door, self._slow(calls.tap))
        self.tapped[unit] = plan

    def _slow(self, call: Callable[..., Any]) -> Hook:
        """A tap that does all there is to do at once: the pass may end with it, or be shown."""
        return Hook(call, self._hooks.owner)


def _keyed(plan: Plan) -> frozenset[nn.Module]:
    """Taps whose input comes by keyword need the costlier hook."""
    return frozenset(s.module for s in plan.steps if s.key is not None and s.module is not None)
