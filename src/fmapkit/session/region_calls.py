"""A call of a region, from its first hook to its last: read by its plan, or else learned.

By which plan is a matter of `plan_choice.py`, how a run is read, of `replay/run.py`; here it is
fitted into the pass around it, which may be traced.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fmapkit.missed import Reason, reason
from fmapkit.provenance import Label, buffers_at
from fmapkit.replay import (
    ReplayRegion,
    ReplayRegions,
    ReplayRun,
)
from fmapkit.session.hook_installer import HookInstaller
from fmapkit.session.kept_maps import KeptMaps
from fmapkit.session.placed_edits import ReplayedEdits
from fmapkit.session.plan_choice import PlanChoice, PlannedCall
from fmapkit.session.recording import Recorder
from fmapkit.session.state import PassState
from fmapkit.storage import in_function
from fmapkit.torchlib.nested import modules_in, tensors_in

UNEDITED = (
    "a part of the model took a way through its code that no earlier pass had taken, in which an "
    "edit may have had a place; the next pass is traced"
)


class RegionCalls:
    """Replays regions."""

    def __init__(
        self,
        live: PassState,
        regions: ReplayRegions,
        installer: HookInstaller,
        recorder: Recorder,
        kept_maps: KeptMaps,
    ) -> None:
        asked = live.asked
        self._names = asked.names
        self._wants = asked.wants
        self._edits = asked.edits or None
        self._stop = asked.stop
        self._stream = kept_maps.stream if asked.analyses else None
        self._live = live
        self._misses = live.misses
        self._regions = regions
        self._installer = installer
        self._recorder = recorder
        self._paths = live.paths
        self._choice = PlanChoice(live)
        self._planned: PlannedCall | None = None  # the call that is under way
        self._region: ReplayRegion | None = None  # whose run it is
        self._placed: ReplayedEdits | None = None  # its edits

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A call of a region begins; the arguments that it is to get instead, None for its own."""
        tracer, choice = self._live.tracer, self._choice
        if tracer is not None:
            self._live.trace_off()  # first of all: it would see what we look at
        region = self._region = self._regions.of(module)
        modes = choice.modes(region, args, kwargs)
        state = region.attributes.state()
        latest: PlannedCall | None = region.take_latest()
        if latest is not None and latest.modes == modes and latest.state == state:
            inputs = choice.inputs_of_twin(region, latest, args, kwargs)
            if inputs is not None:
                self._start(module, latest, args, kwargs, inputs)
                return None
        given = None
        if tracer is not None and tracer.editor:
            given = tracer.editor.modules.enter_unit(module, args, kwargs)
            args, kwargs = (args, kwargs) if given is None else given
        call = choice.look(region, modes, state, args, kwargs)
        if call.planned is not None:
            self._start(module, call.planned, args, kwargs, call.inputs)
            return given
        asked = call.form, call.state, call.sizes, args, kwargs, call.inputs
        return self._recorder.enter(module, *asked) or given

    def _start(
        self,
        module: nn.Module,
        planned: PlannedCall,
        args: Any,
        kwargs: Any,
        inputs: list[Label],
    ) -> None:
        """A region is replayed by its plan."""
        live, wants, tracer = self._live, self._wants, self._live.tracer
        self._planned, plan = planned, planned.plan
        expected = self._paths.expect(planned.items)
        if self._installer.tapped.get(module) is not plan:
            self._installer.taps(module, plan)
        stop = analyses = base = None
        if tracer is None:
            stop = self._stop
            analyses = self._stream
        else:
            if plan.effects.writes:
                plan.effects.before(tracer.trace.record, tensors_in(*args, kwargs))
            base = plan.effects.base(tracer.trace.record)
        assert live.current is not None
        drop = live.current.drop
        line, sites = self._installer.line, self._installer.sites[module]
        run = ReplayRun(
            module, plan, wants, line, expected, stop, inputs, base, drop, sites, analyses
        )
        live.run = run
        if plan.placed and self._edits:
            told = self._names, self._edits, live.current, run, self._on_path
            self._placed = ReplayedEdits(*told)
        if wants.graph and live.current.grads and in_function():
            self._misses.add(self._names.of(module), Reason.NO_GRAPH.text())
        if module in plan.before or module in plan.keeping:  # its own call is under way already
            run.pre(module, args, kwargs)
        run.start()

    def _on_path(self, position: int) -> bool:
        """Whether the run has taken so many decisions, and those of its plan's path."""
        run, planned = self._live.run, self._planned
        if run is None or planned is None:
            return False
        if planned.items is not None:
            return run.expected.at(position)
        items = run.expected.taken()
        return len(items) == position and planned.known.begun(items, planned.sizes)

    def before(self, run: ReplayRun, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A module inside the region is about to run; its arguments, if it is to get others."""
        plan, given = run.plan, None
        if module in plan.edited and self._placed is not None:
            given = self._placed.input(module, args, kwargs)
            args, kwargs = (args, kwargs) if given is None else given
        if module in plan.before or module in plan.keeping:  # no tap stands before this call
            run.pre(module, args, kwargs)
        if plan.scopes:
            if module in plan.toggles:
                run.marks.append(run.light().pause())
            if module in plan.scopes:
                run.light().resume()
        return given

    def after(
        self, run: ReplayRun, module: nn.Module, args: Any, kwargs: Any, output: Any, failed: bool
    ) -> Any:
        """A module inside the region has run; its output, if another is to be returned."""
        plan = run.plan
        if plan.scopes:
            if module in plan.scopes:
                run.light().pause()
            if module in plan.toggles:
                if run.marks and run.marks.pop():
                    run.light().resume()
        noted = len(run.log)
        if not failed and module in plan.taps:
            run.tap(module, args, kwargs, output)
        if failed or module not in plan.edited or self._placed is None:
            return None
        new, changed = self._placed.output(module, output)
        if changed and len(run.log) > noted:
            run.edited[noted] = {path: run.held(tensor) for path, tensor in changed.items()}
        return new if changed else None

    def leave(self, args: Any, kwargs: Any, output: Any, failed: bool) -> None:
        """The call has ended: its maps become a part of the pass."""
        live = self._live
        run, current, tracer = live.run, live.current, live.tracer
        assert run is not None and current is not None and self._region is not None
        live.run = self._placed = None
        if run.module in run.plan.taps and not failed:
            run.tap(run.module, args, kwargs, output)
        run.finish()
        if not failed and not run.lost and len(run.log) != len(run.plan.order):
            run.lost = "fewer taps fired than were learned"
        if failed:
            self._check_beginning(run)
        elif not run.ended:
            self._check_path(run)
        if run.lost and not failed and self._edits and self._edits.by_label(current.step):
            raise self._edits.refused(UNEDITED)
        if run.plan.buffers:
            current.buffers.update(buffers_at(run.plan.buffers))
        if tracer is None:
            current.segments.append(run)
            return
        if run.lost or failed:  # which calls it has made is not known, nor whose maps come next
            tracer.give_up(run.module if failed else None)
            return
        # The pass around the region is traced: tell the tracer what it would have seen.
        run.plan.effects.apply(tracer.trace.record, run.emitted(), run.inputs)
        self._wants.conversion.fence()
        if run.plan.effects.rewritten:
            arguments = tensors_in(*args, kwargs)
            for index, label in run.plan.effects.rewritten:
                tracer.trace.labels.put(arguments[index], run.label(label))
        kept = self._region.kept.leaves()
        run.label_outputs(output, kept, tracer.trace.labels.put)
        live.trace_on()

    def _check_beginning(self, run: ReplayRun) -> None:
        """Of a call that has broken off, keep what was read on its path for sure."""
        run.until, whole = run.expected.until()
        if not whole or run.lost:
            # Writes that no version tells of may have come since.
            self._strayed(run, keeps=not run.uncounted)

    def _check_path(self, run: ReplayRun) -> None:
        """Compare the path that a region's call took with that of its plan."""
        assert self._planned is not None and self._region is not None
        known, sizes = self._planned.known, self._planned.sizes
        items = run.expected.taken()
        cut = self._stop is not None and self._stop.ended
        if cut and not run.lost and known.leaves_at(items, sizes)[0] == len(items):
            return  # as far as it went
        new = known.items(sizes) is None
        taken = known.taken(items, sizes)
        if new and taken and not run.lost and not run.fits():
            run.lost = "a map has other filters than on inputs of other sizes"
            known.doubt(of_others=False)
        if taken and not run.lost:
            if self._planned.spec is not None and self._planned.items is not None:
                self._region.took(self._planned)
            return
        if taken and run.failure is not None:
            module, error = run.failure
            self._misses.add(self._names.of(module), reason(error))
        # The code of an unknown way may have written to what is held, so that no version tells.
        self._strayed(run, keeps=False)

    def _strayed(self, run: ReplayRun, keeps: bool) -> None:
        """A region's call has taken a way that is not its plan's; `keeps` what was read before."""
        assert self._planned is not None and self._region is not None
        known, sizes = self._planned.known, self._planned.sizes
        items = run.expected.taken()
        run.stray(run.lost or "it decided otherwise")
        self._region.doubt(of_others=False)
        if self._live.tracer is not None:  # what has changed, other parts may decide by, too
            self._regions.doubt()
        if not keeps:
            if self._live.current is not None:
                self._live.current.discard()
            run.release()
        _, deciding = known.leaves_at(items, sizes)
        again = self._regions.probation.trusts(modules_in(run.module))
        if known.strayed(items, sizes) or again:  # what decides here is traced from now on
            self._regions.strayed(run.module, deciding)
        self._misses.add(self._names.of(run.module), Reason.NEW_PATH.text())
