"""A module with a fused path: the path is taken, and its kernel shows the maps inside of it.

Which modules these are, and when torch fuses, is a matter of `torchlib/fused/paths.py`; what a
kernel shows, of `torchlib/fused/kernels.py`. Where it does not show all that is asked for, and in
passes that are traced, the ordinary path runs as well (docs/how-it-works.md, "Fused paths").
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fmapkit.instrumentation import Hooks, Returned
from fmapkit.missed import RAISED, Reason
from fmapkit.provenance import STOP, describe
from fmapkit.replay import KernelSteps
from fmapkit.session.state import PassState
from fmapkit.torchlib.fused.kernels import FusedKernel, KernelMaps
from fmapkit.torchlib.fused.looks import FusedLooks
from fmapkit.torchlib.fused.ordinary import OrdinaryPath
from fmapkit.torchlib.fused.paths import beside, code_inside, may_fuse, runners
from fmapkit.torchlib.modes import leave_mode, push_mode
from fmapkit.torchlib.nested import leaves, tensors_in
from fmapkit.tracing import FusedCall, PassTrace


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that torch fuses."""

    module: nn.Module  # nothing in it runs twice
    output: Any  # of the fused path
    edits: int  # how many there had been
    # Those whose maps the kernel has shown, where the ordinary path does not run.
    steps: KernelSteps | None = None
    maps: KernelMaps | None = None  # these
    ordinary: OrdinaryPath | None = None  # gives its layers what the kernel has computed
    before: tuple[int, int] = (0, 0)  # how many hook points there had been, and decisions
    alone: bool = False  # nobody else has to see the ordinary path
    # Puts the random numbers back to where the fused path had ended, since the ordinary one may
    # draw some; None where others do that, too.
    drawn: ExitStack | None = None
    # The modules inside with code of the user's, which the fused path leaves out; so the ordinary
    # one does not run.
    own: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether nothing more is to run."""
        return self.steps is not None or bool(self.own)


def _as_drawn(output: Any) -> ExitStack:
    """What puts random numbers back to where they are, on the CPU and on an output's devices."""
    drawn = ExitStack()
    cuda = {t.device.index for t in tensors_in(output) if t.is_cuda}
    drawn.enter_context(torch.random.fork_rng(devices=cuda))
    return drawn


def _opened(function: Any) -> Any:
    return describe(function).opened


class FusedPaths:
    """The modules of a capture that run by their fused paths."""

    def __init__(
        self,
        live: PassState,
        hooks: Hooks,
        fault: Callable[[nn.Module, Exception], None],
    ) -> None:
        asked = live.asked
        self.module: nn.Module | None = None  # whose call is under way
        self._call: _Call | None = None
        self._looks = FusedLooks()
        self._broken: Exception | None = None  # what the ordinary path has raised, and it alone
        self._running = False  # a fused path is: what it calls does not run twice
        self._outer: Any = None
        self._edits = asked.edits
        self._analyses = asked.analyses
        self._names = asked.names
        self._attention = asked.wants.kind("attention")
        self._live = live
        self._hooks = hooks
        self._misses = live.misses
        self._paths = live.paths
        self._fault = fault  # is told of an error in a look of ours, and raises what is not

    def begin(self) -> None:
        """A pass begins: where the model's own code calls a forward that may fuse, `run` does."""
        self._outer = runners.get(self._live.thread)  # another capture's
        runners[self._live.thread] = self.run

    def end(self) -> None:
        """The pass has ended, by whatever way."""
        self._clear()
        if runners.get(self._live.thread) == self.run:
            del runners[self._live.thread]
            if self._outer is not None:
                runners[self._live.thread] = self._outer
        self._outer = None

    def run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own code calls one of the forwards, past the module's call or inside it."""
        forward = getattr(function, "__func__", function)
        module, given = getattr(function, "__self__", None), args
        if module is None and args:
            module, given = args[0], args[1:]
        if self._outer is not None:
            function = partial(self._outer, function)
        if module is None or self._edits.running:
            return function(*args, **kwargs)
        try:
            call = self._begin(forward, module, given, kwargs, self._outer is None)
        except Exception as error:  # in a look at its maps
            call = self._call
            self._clear()
            self._fault(module, error)
            self._call = call
        if call is None:
            return function(*args, **kwargs)
        output = call.output
        if not call.whole:
            try:
                output = function(*args, **kwargs)
            except BaseException as error:
                if not self.outlives(error):
                    self._clear()
                    raise
                output = None
        return self.leave(output)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Returned | None:
        """A module that has a fused path is about to run: run that first, if torch would.

        Returns what the call returns, where nothing more is to run.
        """
        run = self._live.run
        if run is not None and module not in run.plan.fusing:
            return None
        alone = not (self._hooks.any_on(module) or self._hooks.others_on(module))
        call = self._begin(type(module).forward, module, args, kwargs, alone)
        return Returned(call.output) if call is not None and call.whole else None

    def _begin(
        self, forward: Any, module: nn.Module, args: Any, kwargs: Any, may_skip: bool
    ) -> _Call | None:
        """Run the fused path, if torch would."""
        live, run = self._live, self._live.run
        if self._call is not None or self._running or not may_fuse(module):
            return None
        if live.tracer is not None and live.tracer.lost:
            return None
        self._running = True
        paused = live.trace_off()
        lit = run is not None and run.mode is not None and run.mode.pause()
        call = None
        try:
            with suppress(Exception):  # the user's: as the model runs now, it comes up again
                kernel = self._looks.kernel(forward, module, args, kwargs)
                if kernel is not None and isinstance(module, nn.TransformerEncoder):
                    with self._hooks.suspended(module.modules()):
                        call = self._fused(kernel, may_skip)
                elif kernel is not None:
                    call = self._fused(kernel, may_skip)
            self._call = call
            if call is not None:
                self.module = module
                if not call.own:
                    beside.add(live.thread)
            if call is not None and call.ordinary is not None:
                push_mode(call.ordinary)  # the tracer goes on top of it
            elif call is not None and call.steps and call.maps is not None and run is not None:
                run.shown(call.steps, call.maps)
        finally:
            self._running = False
            if paused:
                live.trace_on()
            if run is not None and lit:
                run.light().resume()
        return call

    def _fused(self, kernel: FusedKernel, may_skip: bool) -> _Call:
        """Run the fused path; `may_skip`: nobody else has to see the ordinary one."""
        live, module, edits = self._live, kernel.module, self._edits
        maps = None
        if edits or self._attention:
            output = kernel()
        else:
            steps = live.run.next_kernel(module) if live.run is not None and may_skip else None
            try:
                output, maps = kernel.run(None if steps is None else steps.wanted)
            except Exception as error:
                output = kernel()  # raises it again, if it is the user's
                self._fault(module, error)
            if maps is not None and steps is not None and steps.wanted <= maps.names:
                return _Call(module, output, edits.runs, steps, maps)
        own = () if edits else tuple(map(self._names.of, code_inside(module)))
        if own:
            return _Call(module, output, edits.runs, own=own)
        drawn, ordinary = _as_drawn(output) if may_skip and not edits else None, None
        if maps is not None and maps.names and live.thread not in beside:
            # Else another capture's lies on the stack.
            ordinary = OrdinaryPath(module, maps, _opened)
        hook_points = live.tracer.trace.record.hook_points if live.tracer is not None else ()
        told = len(hook_points), self._paths.position
        return _Call(module, output, edits.runs, None, None, ordinary, told, may_skip, drawn)

    def outlives(self, error: BaseException | None) -> bool:
        """Whether the fused path's output is there, and its ordinary one alone has raised."""
        call = self._call
        assert call is not None
        if self._edits or not call.alone or not isinstance(error, Exception):
            return False
        if isinstance(error, RAISED) or error is self._analyses.raised:
            return False
        self._broken = error
        return True

    def leave(self, output: Any, failed: bool = False) -> Any:
        """The module's call has ended, or what ran in place of its forward.

        Returns:
            What goes on in its place: the fused output, which carries what the ordinary path's
            does; that one's own, where something was edited in it.
        """
        call, broken = self._call, self._broken
        assert call is not None
        self._clear()
        if broken is not None:
            error = f"{type(broken).__name__}: {broken}"
            self._misses.add(self._names.of(call.module), Reason.FUSED_PATH_ALONE.text(error=error))
            return call.output
        trace = self._live.tracer.trace if self._live.tracer and not self._live.run else None
        if call.own:
            reason = Reason.FUSED_PATH_OWN_CODE.text(names=", ".join(call.own))
            self._misses.add(self._names.of(call.module), reason)
            if trace is not None:
                for _, theirs in leaves(call.output):
                    trace.labels.put(theirs, STOP)
        if call.whole:
            return call.output
        edited = self._edits.runs != call.edits
        if trace is not None and not edited and not failed:
            for (_, ours), (_, theirs) in zip(leaves(output), leaves(call.output), strict=False):
                trace.labels.put(theirs, trace.labels.of(ours))
            if self._is_shown(call, trace):
                return call.output
        why = Reason.FUSED_PATH_EDITED if edited else Reason.FUSED_PATH
        self._misses.add(self._names.of(call.module), why.text())
        return output if edited or failed else call.output

    def _is_shown(self, call: _Call, trace: PassTrace) -> bool:
        """Whether the kernel has shown all maps of a call; later ones can do without the rest."""
        if call.ordinary is None:
            return False
        reference = trace.record.aliases.reference
        names = {id(reference(tensor)): name for name, tensor in call.ordinary.given.items()}
        hook_points, (first, position) = trace.record.hook_points, call.before
        held = [
            event.held(slot)
            for hook_point in hook_points[first:]
            for event in hook_point.events
            for slot, _ in event.entries
        ]
        if not all(id(one) in names for one in held):
            return False
        alone = call.alone and not any(map(self._hooks.others_on, call.module.modules()))
        if alone and position == self._paths.position:
            trace.fused.append(FusedCall(call.module, first, len(hook_points), names))
        return True

    def _clear(self) -> None:
        """Nothing runs by a fused path any more."""
        beside.discard(self._live.thread)
        call, self._call, self._broken, self.module = self._call, None, None, None
        if call is not None and call.ordinary is not None:
            leave_mode(call.ordinary)
        if call is not None and call.drawn is not None:
            call.drawn.close()
