"""The life of one `with capture(model)` block.

What a capture consists of is told in `session/parts.py`, what is under way, in `session/state.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from copy import copy
from dataclasses import dataclass

from torch import Tensor, nn

from fmapkit.compiled import CompiledEntries
from fmapkit.instrumentation import Hooks, Methods, Off
from fmapkit.missed import Missed, Reason
from fmapkit.paths import Resting
from fmapkit.session.compiled_calls import CompiledCalls
from fmapkit.session.concurrent import entered, left, others
from fmapkit.session.config import CaptureConfig
from fmapkit.session.dispatch import HookDispatcher
from fmapkit.session.parts import SessionParts
from fmapkit.session.passes import Passes
from fmapkit.session.resting import EndedBlock, RestingSession, is_wayward
from fmapkit.storage import Budget
from fmapkit.torchlib.apart import look_on, look_on_no_more
from fmapkit.torchlib.call_override import hide_from_scripting, show_to_scripting
from fmapkit.torchlib.scripted import tell, tell_no_more


@dataclass(frozen=True, slots=True)
class Rest:
    """What a session that rests has taken away."""

    off: list[Off]  # from modules
    functions: list[Resting]  # whose code records decisions
    settled: tuple[int, int] | None  # what was counted of the model, if it had settled


class Session:
    """The life of one `with capture(model)` block.

    Args:
        given: the model as it was given; what `torch.compile` returned, or a plain one.
        keep: how many passes stay readable; None for all of them.
        every: capture each n-th pass.
        budget: how many bytes the maps may take; None for any.
    """

    def __init__(
        self,
        asked: CaptureConfig,
        given: nn.Module,
        keep: int | None,
        every: int,
        budget: Budget | None,
    ) -> None:
        self.asked = asked
        self.names = asked.names
        self.wants = asked.wants
        self.hooks = Hooks(self, lambda *call: self.passes.broken_off(*call))
        self._rest: Rest | None = None  # what `go_on` puts back
        self._before: RestingSession[Session] | None = None  # as it rested before this block
        self.parts = SessionParts(asked, self.hooks, keep, budget, lambda: self.calls)
        self.store = self.parts.store  # where passes are kept
        self.compiled = CompiledEntries(asked.model, given)  # the entries at compiled modules
        self.passes = Passes(self.parts, every, self.compiled)  # begins and ends them
        self.calls = calls = HookDispatcher(self.parts, self.passes, self.compiled)
        self._methods = Methods(
            asked.model,
            asked.methods,
            (self.passes.inside, calls.pre, calls.post, self.passes.broken_off),
        )

    # -- life cycle ---------------------------------------------------------------------------

    def open(self) -> None:
        """Set the one hook pair that every pass goes through.

        Until the first pass, there are hooks on all modules, to name what is called outside of one.

        Raises:
            CaptureStateError: another capture is open, and one of the two edits.
        """
        self.parts.live.thread = threading.get_ident()
        entered(self.passes)
        self.passes.open_always()
        watch = self.passes.watch
        quiet = watch.settled()
        tell(self.calls.scripted)
        look_on(self.parts.apart)
        self.parts.installer.on_model()
        self.parts.installer.listen()
        self._methods.stand()
        hide_from_scripting()
        self.compiled.open(CompiledCalls(self.parts, self.passes))
        self.parts.unseen.scripted(bool(self.compiled))
        if not self.compiled:  # dynamo compares what stands before a call
            self.parts.installer.on_all_in(self.asked.model)
            if quiet:
                watch.count_from_here()

    def close(self, failed: bool = False) -> None:
        """Remove everything, however the block ended; a warning never replaces its exception."""
        left(self.passes)
        self._methods.leave()
        tell_no_more(self.calls.scripted)
        look_on_no_more(self.parts.apart)
        self.passes.abandon()
        self.parts.installer.listen_no_more()
        self.compiled.close()
        if not self.steps:
            self.parts.unseen.no_pass()
        self.hooks.drop()
        show_to_scripting()
        self.parts.regions.clear()
        self.parts.paths.clear()
        self.wants.conversion.close()
        self.asked.analyses.view = None
        if not failed:
            self.parts.misses.warn()

    def end_block(self, request: Hashable | None, failed: bool = False) -> EndedBlock:
        """The block has ended: rest, if another one may ask for the same `request`, or close."""
        before, parts, model = self._before, self.parts, self.asked.model
        # That a path is fused, each pass names anew.
        lost = any(missed.why is not Reason.FUSED_PATH for missed in self.missed)
        strayed = before is not None and before.reliable and lost
        paths = parts.regions.paths()
        fit = self.steps and paths and parts.live.current is None and not self.compiled
        if is_wayward(model, strayed) or request is None or failed or lost or not fit:
            self.close(failed)
            return self._ended()
        self.asked.analyses.view = None
        self._rest = self.rest()
        return self._ended(RestingSession(self, model, request, paths, before))

    def _ended(self, resting: RestingSession[Session] | None = None) -> EndedBlock:
        """What the block has captured; what comes is another block's."""
        store, missed, steps = self.store.take(), self.parts.misses.take(), self.passes.next_block()
        return EndedBlock(copy(self.names), self.wants, store, missed, steps, resting)

    def go_on(self, resting: RestingSession[Session]) -> None:
        """Another block begins, which asks for the same (see `wake`)."""
        assert self._rest is not None
        self._before = resting
        self.wake(self._rest)
        if not resting.reliable:
            self.parts.regions.doubt()

    def rest(self) -> Rest:
        """Between two blocks, or calls of a capture that goes on, nothing is set until `wake`."""
        self.passes.abandon()  # of a pass that ended as usual, nothing is left
        left(self.passes)
        self.parts.installer.listen_no_more()
        tell_no_more(self.calls.scripted)
        look_on_no_more(self.parts.apart)
        show_to_scripting()
        self.compiled.rest()
        functions = self.parts.paths.twins.rest()
        watch = self.passes.watch
        settled = watch.counted() if watch.settled() else None
        off = [self.hooks.take_off(module) for module in self.hooks.modules()]
        return Rest(off, functions, settled)

    def wake(self, rest: Rest) -> None:
        """Set again what was set before.

        Raises:
            CaptureStateError: another capture with an edit is open.
        """
        self.parts.live.thread = threading.get_ident()
        entered(self.passes)
        watch = self.passes.watch
        quiet = rest.settled is not None and watch.counted() == rest.settled
        for off in rest.off:
            off.put_back()
        self.parts.installer.listen()
        self.parts.paths.twins.wake(rest.functions)
        hide_from_scripting()
        tell(self.calls.scripted)
        look_on(self.parts.apart)
        self.compiled.wake()
        if quiet:
            watch.count_from_here()

    def same(self) -> bool:
        """Whether the model has the modules that it had, under the same names, and their hooks."""
        return not self.passes.watch.changed()

    def alone(self) -> bool:
        """Whether no other capture is open in this thread that would see its passes."""
        self.parts.live.thread = threading.get_ident()
        return not any(others(self.passes))

    # -- what others ask ----------------------------------------------------------------------

    @property
    def missed(self) -> list[Missed]:
        """What ran and was not captured."""
        return self.parts.misses.entries

    @property
    def steps(self) -> int:
        """How many passes have begun, captured or not."""
        return self.passes.steps

    def tell(self, ids: Tensor | None, mask: Tensor | None) -> None:
        """Note the numbers of the next pass's inputs, and which positions are no padding."""
        self.passes.told = ids, mask
