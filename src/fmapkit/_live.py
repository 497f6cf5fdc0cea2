"""What is under way in a capture: a pass, and in it what is traced, replayed or learned.

The stages above share it, and each changes what is its own. The tracer's place on torch's stack of
modes is kept here: it is there only while it has something to see.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fmapkit._asked import Asked
from fmapkit._frames import Frame
from fmapkit._hooks import leave_mode
from fmapkit._missed import Misses
from fmapkit._origin import Tag
from fmapkit._replay import LightMode, Run
from fmapkit._store import Pass
from fmapkit._tags import Tags
from fmapkit._trace import Tracer
from fmapkit.paths import ControlPaths, Sizes

__all__ = ["MODES", "Lesson", "Live", "someone_watches"]

# A mode's `with` does no more than this, several calls deeper.
_push: Callable[[Any], None] = torch._C._push_on_torch_function_stack
_pop: Callable[[], Any] = torch._C._pop_torch_function_stack
_depth: Callable[[], int] = torch._C._len_torch_function_stack
_dispatch_depth: Callable[[], int] = torch._C._len_torch_dispatch_stack

MODES = (Tracer, LightMode)  # ours, among torch's function modes


def someone_watches() -> bool:
    """Whether a mode of the user's sees every function, or every operator."""
    if not _depth() and not _dispatch_depth():
        return False
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]  # type: ignore[no-untyped-call]
    return not all(
        isinstance(mode, MODES) or type(mode).__module__.startswith("torch.") for mode in modes
    )


@dataclass(slots=True)
class Lesson:
    """A call of a unit that is being learned.

    Attributes:
        module: the unit.
        frame: of the call.
        key: which kind of call it is; None if it can be replayed never.
        state: that the unit is in.
        sizes: of its inputs.
        inputs: what its tensors carry.
        seen: what all tensors of the pass carry; empty where nothing around it is traced.
    """

    module: nn.Module
    frame: Frame
    key: Any
    state: int
    sizes: Sizes
    inputs: list[Tag]
    seen: dict[int, Any]


class Live:
    """What is under way.

    Args:
        asked: by the capture.
        misses: of the capture.
        paths: of its passes.

    Attributes:
        thread: the one that is captured.
        current: the pass; None outside of one.
        idle: the model runs a pass that is not captured.
        frame: of the stack: the call of the model that is the pass.
        depth: how often the model is calling itself.
        tracer: of the pass; None where nothing of it is traced.
        run: the unit that is being replayed.
        lesson: the unit that is being learned.
        inner: how often that unit, replayed or learned, is calling itself.
        tags: of a pass of compiled code, which needs a tracer only where it does not do as before.
    """

    def __init__(self, asked: Asked, misses: Misses, paths: ControlPaths) -> None:
        self.thread = threading.get_ident()
        self.current: Pass | None = None
        self.idle = False
        self.frame: Any = None
        self.depth = 0
        self.tracer: Tracer | None = None
        self.run: Run | None = None
        self.lesson: Lesson | None = None
        self.inner = 0
        self.tags: Tags | None = None
        self._asked = asked
        self._misses = misses
        self._paths = paths
        self._stacked = False  # the tracer is on torch's stack of modes

    def clear(self) -> None:
        """Nothing is under way any more."""
        self.tracer = self.current = self.frame = self.run = self.lesson = self.tags = None
        self.depth = self.inner = 0

    def unit(self) -> nn.Module | None:
        """The unit that is being replayed or learned."""
        call = self.run if self.run is not None else self.lesson
        return None if call is None else call.module

    def new_tracer(self) -> Tracer:
        """A tracer for the rest of the pass."""
        asked, tags, paths = self._asked, self.tags, self._paths
        assert self.current is not None
        if tags is None:
            asked.names.update()
        self.tracer = Tracer(
            asked.names, asked.wants, asked.edits, asked.stop, self.current, self._misses.add, tags
        )
        self.tracer.firings.clock = lambda: paths.position
        return self.tracer

    def enter_compiled(self, args: Any, kwargs: Any) -> None:
        """A pass of compiled code begins: note what it is given."""
        self._asked.names.update()
        self.tags = Tags(self._asked.names)
        self.tags.enter(args, kwargs)

    def traced(self) -> Tracer | None:
        """The tracer, made now if compiled code has none yet; None where nothing is traced."""
        if self.tracer is None and self.tags is not None:
            return self.new_tracer()
        return self.tracer

    def trace_on(self) -> None:
        """From here on the tracer, if there is one, sees what runs."""
        if self.tracer is not None:
            self.tracer.paused = False
            if not self._stacked:
                _push(self.tracer)
                self._stacked = True

    def trace_off(self) -> bool:
        """Pause the tracer; it leaves the stack, unless another mode lies on top of it.

        Returns:
            Whether it was on.
        """
        if self.tracer is None or self.tracer.paused:
            return False
        self.tracer.paused = True
        if self._stacked and _depth():
            top = _pop()
            self._stacked = top is not self.tracer
            if self._stacked:
                _push(top)
        return True

    def trace_out(self) -> None:
        """The tracer leaves the stack for good."""
        if self._stacked and self.tracer is not None:
            leave_mode(self.tracer)
        self._stacked = False
