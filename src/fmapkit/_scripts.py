"""Which watched passes are compared with earlier ones, and what of the model needs no hooks then.

A pass is compared with those that were given arguments of the same form, under the same modes. What
a script is, is said in `_script.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fmapkit import layers
from fmapkit._aside import operators_are_counted
from fmapkit._asked import Asked
from fmapkit._following import Follower
from fmapkit._form import casts, weights_of
from fmapkit._fused import fuses, may_fuse
from fmapkit._live import MODES, Live
from fmapkit._nested import tensors_in
from fmapkit._noting import Noter
from fmapkit._origin import Tag
from fmapkit._placing import Placing
from fmapkit._script import Script
from fmapkit._seen import Seen
from fmapkit._units import Units, shape_of

__all__ = ["Scripts"]

_MOST_KINDS = 32


class Scripts:
    """The scripts of one capture.

    Args:
        asked: by the capture.
        live: what is under way.
        units: of the model.
        placing: of its hooks.
    """

    def __init__(self, asked: Asked, live: Live, units: Units, placing: Placing) -> None:
        self._asked = asked
        self._live = live
        self._units = units
        self._placing = placing
        self._known: dict[Any, Script] = {}
        self._script: Script | None = None  # of this pass, which began by following it
        self._leaves: frozenset[nn.Module] = frozenset()
        self._sorted = False
        self._form = weights_of(asked.model)
        self._looked_into: set[nn.Module] = set()

    def clear(self) -> None:
        """The model has other modules than it had, or the block has ended."""
        self._known.clear()
        self._script = None
        self._leaves = frozenset()
        self._looked_into.clear()
        self._sorted = False
        self._form = weights_of(self._asked.model)

    # -- a pass -------------------------------------------------------------------------------

    def begin(self, args: Any, kwargs: Any) -> None:
        """A pass begins that is to be watched."""
        tracer = self._live.new_tracer()
        given = tensors_in(*args, kwargs)
        script = self._of(args, kwargs, list(map(tracer.tag, given)))
        if script is None:
            self._placing.look_at_all()
            if self._known and not any(known.worth_it for known in self._known.values()):
                self._placing.no_stands()  # nobody would find us by them
            tracer.enter_inputs(args, kwargs)
            return
        if not self._sorted or not self._placing.standing:
            self._sort()
        tracer.leaves, tracer.leaf_unit = self._leaves, self._units.of
        tracer.no_leaf = self._look_into
        placing = self._placing
        if script.start.then is not None:
            placing.only_stands()
            self._script = script
            tracer.follower = placing.way.follower = Follower(
                tracer, script, given, self._live, placing.way, placing.look_at_all
            )
        else:
            self._placing.look_at_all()
            tracer.enter_inputs(args, kwargs)
            tracer.noter = Noter(tracer, script, script.start, Seen(tracer.tags), [])
            tracer.noter.start(given)

    def end(self, failed: bool) -> None:
        """It has ended.

        Args:
            failed: by an exception.
        """
        tracer = self._live.tracer
        if self._script is not None and tracer is not None and not failed:
            follower = tracer.follower
            self._script.ended(None if follower is None else follower.come)
        self._script = self._placing.way.follower = None

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> str | None:
        """A module begins: "begin" or "unit" in a pass that follows its script; else None."""
        tracer = self._live.tracer
        if tracer is None or tracer.follower is None or tracer.failed:
            return None
        if may_fuse(module, MODES):
            self.stop()
            return None
        return tracer.follower.enter(module, args, kwargs) or None

    def leave(self, module: nn.Module, output: Any, failed: bool) -> bool:
        """A module ends; whether the pass follows its script."""
        tracer = self._live.tracer
        if tracer is None or tracer.follower is None or tracer.failed:
            return False
        if failed:
            tracer.follower.depart()
            return False
        return tracer.follower.leave(module, output)

    def stop(self) -> None:
        """Nothing of this pass can be compared with others from here on."""
        tracer = self._live.tracer
        if tracer is not None and tracer.follower is not None:
            tracer.follower.depart()
        if tracer is not None and tracer.noter is not None:
            tracer.noter.stop()

    # -- what is compared ---------------------------------------------------------------------

    def _of(self, args: Any, kwargs: Any, tags: list[Tag]) -> Script | None:
        """The script of such a pass; None where it cannot be compared, or is not worth it."""
        asked = self._asked
        if any(tag is not None for tag in tags):  # somebody gave it a parameter
            return None
        if asked.edits or asked.stop is not None or asked.names.lent or self._placing.moving:
            return None
        key = (
            asked.model.training,
            asked.names.sharing(),
            shape_of(args),
            shape_of(kwargs),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            operators_are_counted(),
            casts(),
            tuple(self._form()),
        )
        found = self._known.get(key)
        if found is None and len(self._known) < _MOST_KINDS:
            found = self._known[key] = Script()
        return found if found is not None and found.worth_it else None

    def _sort(self) -> None:
        """Which modules need not be looked into, and which are scopes."""
        inside: set[nn.Module] = set()
        for module in self._asked.model.modules():
            if self._units.proven(module):
                inside.update(m for m in module.modules() if m is not module)
        outside = [m for m in self._asked.model.modules() if m not in inside]
        self._leaves = frozenset(m for m in outside if self._is_leaf(m))
        scopes = [
            m
            for m in outside
            if m is not self._asked.model and m not in self._leaves and not fuses(m)
        ]
        self._leaves -= self._placing.stand(self._leaves, scopes)
        self._sorted = True

    def _is_leaf(self, module: nn.Module) -> bool:
        """Whether it does the same in each call, to what it is given and nothing else."""
        return (
            self._units.proven(module)
            and module not in self._looked_into
            and not module._modules
            and not module.__dict__.get("inplace")
            and not self._asked.wants.output(module)
            and not layers.is_registered(module)
        )

    def _look_into(self, module: nn.Module) -> None:
        """It has to be looked into, and so do others of its class."""
        alike = {m for m in self._leaves if type(m) is type(module)}
        self._leaves -= alike
        self._looked_into |= alike
        for other in alike:
            self._placing.stand_aside(other)
        self._placing.stand((), alike)
