"""Learn: the first call of a kind that a region gets runs under the tracer, and leaves a plan.

What the tracer sees is a matter of `tracing/tracer.py`, what a plan is, of `replay/plan.py`. The
end of a pass that was traced, or a part of it, is here, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.missed import Reason
from fmapkit.nonlinearities import is_torchs
from fmapkit.paths import Sizes
from fmapkit.provenance import Label, note_exchanged
from fmapkit.replay import (
    EscapedTensors,
    Plan,
    ReplayRegions,
    fill_of,
    has_more,
    make_plan,
)
from fmapkit.session.hook_installer import HookInstaller
from fmapkit.session.state import PassState, Recording
from fmapkit.storage import StoredTensor, check_all
from fmapkit.torchlib.memory import storage_of, storage_users
from fmapkit.torchlib.nested import modules_in, tensors_in
from fmapkit.torchlib.sharded import is_wrapped
from fmapkit.tracing import Event, Frame, Tracer


class Recorder:
    """Records regions."""

    def __init__(self, live: PassState, regions: ReplayRegions, installer: HookInstaller) -> None:
        self._model = live.asked.model
        self._names = live.asked.names
        self._edits = live.asked.edits
        self._live = live
        self._misses = live.misses
        self._regions = regions
        self._installer = installer
        self._paths = live.paths
        self._ended: list[nn.Module] = []  # in this pass, by an exception
        self._checked = False  # the latest region was all there was of the pass

    def enter(
        self,
        module: nn.Module,
        form: Any,
        state: int,
        sizes: Sizes,
        args: Any,
        kwargs: Any,
        inputs: list[Label],
    ) -> Any:
        """A call of a region begins that there is no plan for (see `Recording`)."""
        self._installer.no_taps()
        tracer = self._live.tracer
        seen, alone = {}, tracer is None
        if tracer is None:
            tracer = self._live.new_tracer()
            tracer.trace.labels.enter(args, kwargs)
        else:
            seen = tracer.trace.labels.seen()
        record = tracer.trace.record
        self._installer.on_all_in(module)
        tracer.trace.begin_region()
        position = record.hook_points.clock()
        frame = tracer.modules.enter(module, args, kwargs)
        frame.position = position
        frame.counts = Counter(record.counts)
        frame.own = self._regions.of(module).own.noted()
        tracer.reads.made.enter([tensor for one in frame.own if (tensor := one()) is not None])
        fill = fill_of(module, self._paths.twins.functions())
        self._live.recording = Recording(
            module, frame, form, state, sizes, inputs, seen, alone, fill
        )
        self._paths.begin_lesson(module)
        record.hook_points.site_of = self._paths.site_of
        self._live.trace_on()
        return frame.replaced

    def leave(self, module: nn.Module, output: Any, failed: bool) -> Any:
        """The call has ended; the output that is to be returned instead, None for its own."""
        tracer, recording = self._live.tracer, self._live.recording
        assert recording is not None and tracer is not None
        frame, trace, record = recording.frame, tracer.trace, tracer.trace.record
        replaced = tracer.leave(module, None if failed else output)
        paused = self._live.trace_off()  # it would see what we look at
        trace.end_region()
        record.hook_points.site_of = None
        self._live.recording = None
        items = self._paths.since(frame.position)
        complete, hopeless = self._paths.end_lesson(items, module)
        if hopeless:
            self._regions.open(*hopeless)
        if failed:
            self._ended.append(module)
        if trace.edited or (trace.placed and not recording.alone):
            # From the next pass on, only the parts below that need it are traced.
            self._regions.open(module, *self._edits.modules())
        elif not failed and tracer.failed is None:
            events = record.events[frame.start :]
            _check_held(events)
            self._checked = module is self._model
            useful = complete and recording.form is not None and not hopeless
            decides = self._decides(module, tracer) or self._remembers(recording, tracer)
            decides = decides or self._reaches_out(recording, tracer, output)
            # Of what is written to a wrapper, a tap would see one half.
            held = (entry.held for event in events for _, entry in event.entries)
            useful = useful and not any(one is not None and is_wrapped(one.tensor) for one in held)
            if not decides and useful and not self._has_filled(recording):
                self._keep(recording, output if replaced is None else replaced, tracer, items)
            record.let_go(events)
        if paused:
            self._live.trace_on()
        return replaced

    def _decides(self, module: nn.Module, tracer: Tracer) -> bool:
        """Whether parts of the region are to be traced in every pass, since they decide by data."""
        deciding = tracer.trace.deciding
        if deciding:
            deciding = deciding.intersection(module.modules())
        if deciding:
            self._regions.open_by_data(deciding)
        return bool(deciding)

    def _reaches_out(self, recording: Recording, tracer: Tracer, output: Any) -> bool:
        """Whether the region wrote to tensors that it was not given, as through a view of them."""
        frame = recording.frame
        known = {id(t) for t in tensors_in(*frame.args, frame.kwargs, output)}
        found = tracer.trace.labels.others_changed(recording.seen, known)
        if found:
            self._regions.open(recording.module)
        return found

    def _remembers(self, recording: Recording, tracer: Tracer) -> bool:
        """Whether tensors of the pass are kept where a later pass may read them."""
        frame, region = recording.frame, recording.module
        passed = {id(t) for t in tensors_in(*frame.args, frame.kwargs)}

        def is_of_pass(tensor: Tensor) -> bool:
            return tracer.trace.labels.channels(tensor) is not None

        def is_new(tensor: Tensor) -> bool:
            return id(tensor) not in passed and is_of_pass(tensor)

        twins = self._paths.twins
        read = twins.names_read()
        remembering = EscapedTensors(is_of_pass, read)
        kept = remembering.attributes(region)
        given = EscapedTensors(is_new, read).arguments(frame.args, frame.kwargs)
        found = [module for module, _ in kept] + [region] * bool(given)
        if remembering.functions(twins.functions()):
            found += [m for m in modules_in(region) if m._modules or not is_torchs(m)]
        elif found and recording.form is not None and (recording.alone or not given):
            return not self._regions.of(region).keeps(kept, given)
        if found:
            self._regions.open(*found)
        return bool(found)

    def _has_filled(self, recording: Recording) -> bool:
        """Whether the region has filled a cache: the next such call is traced, too."""
        if not has_more(recording.fill):
            return False
        return self._regions.of(recording.module).waits(recording.form, recording.sizes)

    def _keep(self, recording: Recording, output: Any, tracer: Tracer, items: list[Any]) -> None:
        """Keep the plan of a call, for others that take its path."""
        module, frame = recording.module, recording.frame
        arguments = tensors_in(*frame.args, frame.kwargs)
        _copy_what_is_used_again(tracer, frame, [*arguments, *tensors_in(output)])
        region = self._regions.of(module)
        kept = () if recording.alone else region.kept.leaves()
        plan = make_plan(tracer, frame, output, recording.inputs, arguments, kept)
        asked = tracer.trace.asked
        kind, sizes = region.kind(recording.form, recording.state, asked, recording.sizes)
        if kind is None:
            self._regions.open_by_data([module])
            return
        hooked = [m for m in plan.taps if m._forward_hooks and self._regions.has_others(m)]
        if hooked:  # whose maps are those before, or after, what the hooks make of them
            self._regions.open(*hooked)
            return
        if plan.edited and not _told(plan, tracer.trace.record.events[frame.start :]):
            self._regions.open(module, *self._edits.modules())
            return
        state = region.state_of(items, kind, recording.state, sizes)
        if state is None:
            self._regions.strayed(module, region.differing(items, kind, sizes))
            return
        known = region.paths(kind, state)
        # Where the number of the state has changed.
        region.kind(recording.form, state, asked, recording.sizes)
        if known.wavers(items, sizes) or known.turned(items, sizes):
            self._regions.strayed(module, known.leaves_at(items, sizes)[1])
            return
        self._paths.twins.tap(plan.sites)
        moments = [(at - frame.position, m) for at, m in tracer.trace.moments]
        plan = known.learn(items, sizes, plan, moments)
        if known.never_repeats:  # to learn costs more than to watch; its parts may be learned
            self._regions.open(module)
            return
        self._installer.taps(module, plan)

    def finish(self, tracer: Tracer, failed: bool) -> None:
        """The traced pass has ended."""
        self._live.trace_out()
        if self._ended and not failed:  # the model handles that: no plan tells what comes then
            self._regions.open(*self._ended)
        self._ended.clear()
        if tracer.lost and not failed:
            broken = tracer.broken
            if broken is not None:  # somebody handles its exceptions
                self._regions.open(broken)
            reason = Reason.NEW_PATH_INSIDE if broken is None else Reason.BROKEN_OFF
            self._misses.add(self._names.of(self._model), reason.text())
        if not self._checked:
            _check_held(tracer.trace.record.events)
        self._checked = False
        note_exchanged(tracer.trace.sources)
        for module in tracer.trace.unhooked:
            self._misses.add(self._names.of(module), Reason.CALLED_ON_ITS_OWN.text())
            self._regions.all_called(self._model.modules())
        self._regions.end_pass(not failed and not tracer.lost and tracer.failed is None)
        tracer.end()

    def drop(self) -> None:
        """The pass has broken off, perhaps in the middle of a recording."""
        live = self._live
        live.recording = None
        self._ended.clear()
        self._regions.end_pass(whole=False)
        self._checked = False
        live.trace_out()
        if live.tracer is not None:
            live.tracer.end()


def _check_held(events: list[Event]) -> None:
    """Notice writes, to what is held of what ran, that nobody announced."""
    check_all([h for e in events for h in (e.x_held, e.y_held) if h is not None])


def _told(plan: Plan, events: Sequence[Event]) -> bool:
    """Whether a plan tells of all edits: of maps, there are only outputs, that stay as they are."""
    maps = (m for s in plan.steps if s.module in plan.edited for m in s.map_specs)
    if plan.edited & plan.scopes or any(one.kind != "output" for one in maps):
        return False
    held = (entry.edited for event in events for _, entry in event.entries)
    return not any(one is not None and one.needs_copy for one in held)


def _copy_what_is_used_again(tracer: Tracer, frame: Frame, passed: list[Tensor]) -> None:
    """Copy maps, now and in later calls, that lie in memory which a region writes to, and keeps.

    Its next call, in the same pass perhaps, overwrites them. Of tensors that were passed to it, or
    that it returned, others know.
    """
    record = tracer.trace.record
    written = record.aliases.written_since(frame.writes)
    written.difference_update(map(storage_of, passed))
    if not written:
        return
    events = record.events[frame.start :]
    held = {id(h) for e in events for h in (e.x_held, e.y_held) if h is not None}
    ours = {at: [h for h in record.aliases.at(at) if id(h) in held] for at in written}
    for alike in ours.values():
        tensor = alike[0].tensor if alike else None
        if tensor is not None and not _saved(alike) and storage_users(tensor) > len(alike):
            for one in alike:
                one.snapshot()


def _saved(held: list[StoredTensor]) -> bool:
    """Whether autograd may have a part in the memory: there a write is noticed by its version."""
    return torch.is_grad_enabled() and not any(
        h.tensor is not None and h.tensor.is_inference() for h in held
    )
