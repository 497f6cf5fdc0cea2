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
from fmapkit._fused import may_fuse
from fmapkit._live import MODES, Live
from fmapkit._nested import tensors_in
from fmapkit._noting import Noter
from fmapkit._optimized import is_compiled
from fmapkit._placing import Placing
from fmapkit._script import Script
from fmapkit._seen import Seen
from fmapkit._stop import has_own_forward
from fmapkit._units import Units, shape_of
from fmapkit._weighted import pads_first

__all__ = ["Scripts"]

_MOST_KINDS = 32

# One call of one torch function, whose weight tells whose it is.
_WEIGHTED = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.RMSNorm),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.GroupNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)
# The same, and no map or label comes of it.
_WEIGHTLESS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)


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
        self._through: frozenset[nn.Module] | None = None
        self._form = weights_of(asked.model)

    def clear(self) -> None:
        """The model has other modules than it had, or the block has ended."""
        self._known.clear()
        self._script = self._through = None
        self._form = weights_of(self._asked.model)

    # -- a pass -------------------------------------------------------------------------------

    def begin(self, args: Any, kwargs: Any) -> None:
        """A pass begins that is to be watched."""
        tracer = self._live.new_tracer()
        script = self._of(args, kwargs)
        if script is None:
            self._placing.look_at_all()
            tracer.enter_inputs(args, kwargs)
            return
        tracer.see_through = self._seen_through()
        given = tensors_in(*args, kwargs)
        if script.start.then is not None:
            self._placing.look_through(tracer.see_through)
            self._script = script
            tracer.follower = Follower(tracer, script, given, self._placing.look_at_all)
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
            self._script.ended(strayed=tracer.follower is None)
        self._script = None

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

    def _of(self, args: Any, kwargs: Any) -> Script | None:
        """The script of such a pass; None where it cannot be compared, or is not worth it."""
        asked = self._asked
        if asked.edits or asked.stop is not None or asked.names.lent or self._placing.moving:
            return None
        key = (
            asked.model.training,
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

    def _seen_through(self) -> frozenset[nn.Module]:
        """The modules of one function each that only scopes call."""
        if self._through is None:
            inside: set[nn.Module] = set()
            for module in self._asked.model.modules():
                if self._units.proven(module):
                    inside.update(m for m in module.modules() if m is not module)
            self._through = frozenset(
                m for m in self._asked.model.modules() if m not in inside and self._is_call(m)
            )
        return self._through

    def _is_call(self, module: nn.Module) -> bool:
        """Whether its call is that of one torch function, and no more."""
        names, wants = self._asked.names, self._asked.wants
        if type(module) not in _WEIGHTED and type(module) not in _WEIGHTLESS:
            return False
        if has_own_forward(module) or is_compiled(module) or not self._units.proven(module):
            return False
        if wants.output(module) or layers.is_registered(module) or pads_first(module):
            return False
        if type(module) in _WEIGHTLESS:
            return True
        if getattr(module, "max_norm", None) is not None:
            return False
        own = [p for p in module._parameters.values() if p is not None]
        return module._parameters.get("weight") is not None and all(
            len(names.owners(p)) == 1 for p in own
        )
