"""By which plan a call of a region is read: by that of an earlier call which was given the like.

What is compared is told in docs/how-it-works.md, "Guards". Nothing is set or run here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmapkit.paths import KnownPaths, Sizes
from fmapkit.provenance import ChannelLabel, Label
from fmapkit.replay import (
    InputTruths,
    Plan,
    ReplayRegion,
    Truths,
    form_of_labels,
    shape_of,
    sizes_of,
)
from fmapkit.session.state import PassState
from fmapkit.torchlib.modes import dispatch_mode_count, others_watch
from fmapkit.torchlib.nested import tensors_in
from fmapkit.torchlib.side_ops import operators_are_counted
from fmapkit.torchlib.tensor_spec import casts, plain_spec, sharing

_grads: Callable[[], bool] = torch.is_grad_enabled


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCall:
    """A call that is read by a plan: if the region's next one is given the same, it is its twin."""

    plan: Plan
    state: int  # which the region was in
    modes: Any  # that it ran in
    # What its inputs carried (see `form_of_labels`); None where nothing around it is known.
    origins: Any
    spec: Any  # of what it was given, see `plain_spec`
    given_sizes: Sizes  # of its inputs
    sizes: Sizes  # the same, with the numbers that it has read
    known: KnownPaths[Plan]  # the paths of its kind
    # Of the path that it is taken to take; None if their numbers were not known.
    items: list[Any] | None
    reads: InputTruths | None  # what calls of its form read of their inputs
    truths: Truths | None  # what it has read

    def reads_the_same(self, region: ReplayRegion, tensors: list[Tensor]) -> bool:
        """Whether another call of the region, given the like, will read the same of it."""
        read = region.read(self.reads, tensors, self.given_sizes)
        return read == (self.truths, self.sizes)


@dataclass(frozen=True, slots=True)
class GivenCall:
    """A call that has a plan, or is to be recorded."""

    planned: PlannedCall | None
    form: Any  # None if it can be replayed never
    state: int  # that the region is in
    sizes: Sizes  # of its inputs
    inputs: list[Label]  # what they carry; empty where nothing around it is known


class PlanChoice:
    """Finds the plan of a call."""

    def __init__(self, live: PassState) -> None:
        self._live = live
        self._wants = live.asked.wants
        self._edits = live.asked.edits or None
        self._twins = live.paths.twins

    def modes(self, region: ReplayRegion, args: Any, kwargs: Any) -> Any:
        """What calls differ by that no argument's form tells."""
        fusing = region.fusing and region.fusing(tensors_in(*args, kwargs))
        edits: Any = None
        if self._edits and self._live.current is not None:
            edits = self._edits.active(self._live.current.step)
        counted = bool(dispatch_mode_count()) and operators_are_counted()
        return _grads(), counted, casts(), fusing, self._twins.renamed(), edits, *region.form()

    def inputs_of_twin(
        self, region: ReplayRegion, latest: PlannedCall, args: Any, kwargs: Any
    ) -> list[Label] | None:
        """What the inputs of a call carry, if it is the twin of the latest one; else None."""
        # Others, who would see our looks, are asked for first.
        if self._edits or others_watch() or latest.spec != plain_spec(args, kwargs):
            return None
        tracer = self._live.tracer
        tensors = tensors_in(*args, kwargs) if tracer is not None or latest.truths else []
        inputs: list[Label] = []
        origins = None
        if tracer is not None:
            inputs = [tracer.trace.labels.of(t) for t in tensors]
            origins = form_of_labels(inputs, self._wants.of)
        if latest.origins != origins:
            return None
        if latest.truths and not latest.reads_the_same(region, tensors):
            return None
        return inputs

    def look(
        self, region: ReplayRegion, modes: Any, state: int, args: Any, kwargs: Any
    ) -> GivenCall:
        """Look for a call of the same form."""
        tracer = self._live.tracer
        inputs: list[Label] = []
        origins = None
        tensors = tensors_in(*args, kwargs)
        if tracer is not None:
            inputs = [tracer.trace.labels.of(t) for t in tensors]
            origins = form_of_labels(inputs, self._wants.of)
        quiet = not others_watch()  # who see our looks, of which a traced pass has more
        form: Any = (shape_of(args), shape_of(kwargs), quiet and sharing(tensors), origins, modes)
        given_sizes = sizes_of(tensors, args, kwargs)
        if region.kept:
            form, given_sizes = region.with_kept(form, given_sizes, args, kwargs, tensors)
            of = tracer.trace.labels.channels if tracer is not None else None
            if of is not None and any(of(t) is not None for _, t in region.kept.leaves()):
                form = None  # it is of this pass
        never = GivenCall(None, None, 0, given_sizes, inputs)
        if not quiet:
            return never
        reads = region.by_form.get((form, state))
        truths, sizes = region.read(reads, tensors, given_sizes)
        known = region.by_kind.get(((form, truths), state))
        plan = known.plan(sizes) if known is not None else None
        if known is None or plan is None:
            return GivenCall(None, form, state, given_sizes, inputs)
        if self._edits and self._edited_inside(plan, inputs):
            return never
        planned = PlannedCall(
            plan=plan,
            state=state,
            modes=modes,
            origins=origins,
            spec=None if region.kept else plain_spec(args, kwargs),
            given_sizes=given_sizes,
            sizes=sizes,
            known=known,
            items=known.items(sizes),
            reads=reads,
            truths=truths,
        )
        return GivenCall(planned, form, state, given_sizes, inputs)

    def _edited_inside(self, plan: Plan, inputs: list[Label]) -> bool:
        """Whether filters that an edit is for reach a nonlinearity inside."""
        edits = self._edits
        labels = (inputs[index] for index in plan.effects.claims if index < len(inputs))
        return any(
            edits and isinstance(t, ChannelLabel) and edits.of(t.origin.name) for t in labels
        )
