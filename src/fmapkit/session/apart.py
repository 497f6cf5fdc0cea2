"""Calls in a pass that run apart, as in the bare model (see `torchlib/apart.py`)."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any

import torch

from fmapkit.missed import reason
from fmapkit.session.state import PassState
from fmapkit.session.unseen import UnseenCalls
from fmapkit.torchlib.apart import ApartCall
from fmapkit.torchlib.autograd import graph_task
from fmapkit.torchlib.nested import tensors_in


class ApartCalls:
    """Has one capture look away while such a call runs."""

    def __init__(self, live: PassState, unseen: UnseenCalls) -> None:
        self._live = live
        self._unseen = unseen

    def watches(self) -> bool:
        """Whether a pass is under way in this thread, and is seen."""
        live = self._live
        here = live.current is not None and threading.get_ident() == live.thread
        return here and graph_task() == -1

    def begins(self, call: ApartCall) -> None:
        """A call is about to be made: what it may overwrite is copied."""
        live = self._live
        if live.tracer is not None and live.run is None:
            for tensor in tensors_in(*call.given):
                if tensor.is_inference():  # whose writes nobody counts
                    live.tracer.trace.record.aliases.before_write(tensor)

    def away(self) -> AbstractContextManager[None]:
        """What runs here is none of the pass: no hook, tap or twin notes it."""
        return self._live.away()

    def ran(self, call: ApartCall, output: Any) -> None:
        """A call has ended: what it has returned carries no label that is known."""
        live, name = self._live, call.name
        try:
            if call.inside:
                self._unseen.compiled_call(f"torch.{name}" if hasattr(torch, name) else name)
            if live.tracer is not None and live.run is None:
                live.tracer.ran_apart(name, output)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            if live.tracer is not None:
                live.tracer.fail(error)
            live.misses.add("", reason(error))
