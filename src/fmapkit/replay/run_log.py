"""What a run has noted of its sites, and the maps that this stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fmapkit.missed import NotSupportedError
from fmapkit.provenance import Label, Origin
from fmapkit.replay.effects import PassPiece, Ref
from fmapkit.replay.plan import MapSpec, Plan, Step
from fmapkit.selection import Selection
from fmapkit.storage import Gradient, MapRecord, StoredTensor, in_function, watch
from fmapkit.torchlib.memory import storage_of, version_of
from fmapkit.torchlib.nested import leaves
from fmapkit.torchlib.side_ops import clone, goes_on_from

_grads: Callable[[], bool] = torch.is_grad_enabled
_inference: Callable[[], bool] = torch.is_inference_mode_enabled

# A tensor, its version, where its gradient will arrive, and whether it is a copy.
Item = tuple[Tensor, int, Gradient | None, bool]
# By slot, and whether some filters were picked.
Slots = dict[tuple[str, bool], Item]


class RunLog(PassPiece):
    """The log of one call of a region."""

    __slots__ = (
        *("_let_go", "_origins", "_seen", "base", "edited", "how", "inputs", "log", "lost", "plan"),
        *("uncounted", "until", "wants"),
    )

    def __init__(
        self, plan: Plan, wants: Selection, inputs: list[Label], base: dict[str, int] | None
    ) -> None:
        self.plan = plan
        self.wants = wants  # which maps are held, and how
        self.inputs = inputs  # what came in carries; empty where nothing around it is known
        self.base = base  # how many calls of each layer there were before; None for none
        self.log: list[Any] = []  # per step: its module, or its site, then what was read there
        # What went on in the place of outputs, by path, for each entry of the log.
        self.edited: dict[int, dict[str, StoredTensor]] = {}
        self.lost = ""  # why the call left its plan, if it did
        # Of a call that has broken off: what was read before so many decisions is kept.
        self.until: int | None = None
        # Tensors are to be read, see `CurrentRun`.
        self.how = int(wants.detach and (plan.graph or _grads()))
        if _inference():
            # With 4, no version would tell that a tensor of the model's was given other memory.
            self.how = 4 if wants.detach and plan.keeps else 2
        elif wants.detach and (plan.joins or in_function()):
            self.how = 3
        # Some tensor may have no version counter.
        self.uncounted = self.how in (2, 4) or wants.gradients
        self._seen = 0  # how many steps the analyses were shown
        self._let_go = False  # of what they have seen
        self._origins: dict[Ref, Origin] = {}

    def stray(self, what: str) -> None:
        """The run does not follow its plan: what is held so far stays, the rest is not labelled."""
        if not self.lost:
            self.lost = what
            self.off()

    def off(self) -> None:
        """No tap writes to this run any more."""

    # -- what is noted of a site --------------------------------------------------------------

    def copied(self, x: Tensor) -> Tensor:
        """A copy of what an in-place σ is about to overwrite; other maps of it are copied, too."""
        if self.plan.shares:
            self.exchange(x, clone)
        return clone(self.own(x))

    def exchange(self, x: Tensor, make: Callable[[Tensor], Tensor]) -> None:
        """Have the log hold something else of what it has in the memory of x."""
        memory = storage_of(x)

        def exchanged(piece: Any) -> Any:
            found = list(piece)
            for at, t in enumerate(piece):
                if isinstance(t, Tensor) and storage_of(t) == memory:
                    found[at] = make(t)
                    found[at + 1] = version_of(found[at])
            same = all(a is b for a, b in zip(found, piece, strict=True))
            return piece if same else tuple(found)

        for index, record in enumerate(self.log):
            if len(record) > 1 and type(record[1]) is list:
                read = [item if item is None else exchanged(item) for item in record[1]]
                self.log[index] = (record[0], read)
            else:
                self.log[index] = exchanged(record)

    def held(self, tensor: Tensor) -> StoredTensor:
        """What is held of a tensor that an edit has made."""
        return StoredTensor.reference(tensor, self.wants.detach, self.wants.gradients)

    def kept(self, step: Step, z: Tensor) -> Slots:
        """What is stored of z, whose memory nobody else has any more."""
        map_specs = [replace(map_spec, copy=False) for map_spec in step.map_specs]
        return self._of_x(map_specs, z, None)

    def read_before(self, step: Step, x: Tensor) -> Slots:
        """What is stored of x, which the call is about to overwrite."""
        if step.shared:
            self.exchange(x, clone)
        return self._of_x(step.map_specs, x, self.watched(x))

    def _of_x(self, map_specs: Iterable[MapSpec], x: Tensor, grad: Gradient | None) -> Slots:
        found: Slots = {}
        for map_spec in map_specs:
            slot = _slot(map_spec)
            if map_spec.slot == "x" and slot not in found:
                found[slot] = self._stored(map_spec, x, grad)
        return found

    def read(
        self, step: Step, x: Any, output: Any, x_grad: Gradient | None, before: Slots | None
    ) -> list[Item | None]:
        read: list[Item | None] = []
        known = {e.path for e in step.map_specs if e.kind == "output"}
        pieces = dict(leaves(output)) if known else {}
        if new := pieces.keys() - known:
            self.stray(f"it returned a tensor at {min(new)}, which was not there before")
        shared = before or {}
        for map_spec in step.map_specs:
            slot = _slot(map_spec)
            if slot not in shared:
                if map_spec.kind == "output":
                    value = pieces.get(map_spec.path)
                else:
                    value = x if map_spec.slot == "x" else output
                if not isinstance(value, Tensor):
                    read.append(None)
                    continue
                grad = x_grad if map_spec.slot == "x" else self.watched(value)
                try:
                    shared[slot] = self._stored(map_spec, value, grad)
                except NotSupportedError:  # which was named in the pass that was learned
                    read.append(None)
                    continue
            read.append(shared[slot])
        return read

    def read_each(self, step: Step, values: Iterable[Tensor]) -> list[Item]:
        """The same where each map of a step is a tensor of its own, which nobody writes to."""
        pairs = zip(step.map_specs, values, strict=True)
        return [self._stored(map_spec, value, None) for map_spec, value in pairs]

    def read_plainly(self, step: Step, x: Any, output: Any) -> list[Item | None]:
        """What is held of a function that returned something else than a plain tensor."""
        slots: dict[str, Item | None] = {"x": None, "y": None}
        for slot, value in ("x", x), ("y", output):
            if isinstance(value, Tensor):
                slots[slot] = self.own(value), self.version(value), None, False
        return [slots[map_spec.slot] for map_spec in step.map_specs]

    def _stored(self, map_spec: MapSpec, value: Tensor, grad: Gradient | None) -> Item:
        """What is stored of a tensor."""
        if map_spec.copy and grad is not None:
            grad.overwritten()
        doomed = map_spec.copy
        if map_spec.place is not None:
            if grad is not None:
                grad = grad.picked(*map_spec.place)
            stored, copied = self.wants.take_at(value, map_spec.place, doomed), True
        else:
            stored = self.wants.store(value, doomed) if map_spec.stored else value
            copied = map_spec.copy or stored is not value
            if stored is value:
                stored = self.own(value)
                if doomed:
                    stored = clone(stored)
                    if map_spec.on_the_way:
                        goes_on_from(value, stored)
        return stored, self.version(stored), grad, copied

    def version(self, tensor: Tensor) -> int:
        version = version_of(tensor)
        self.uncounted = self.uncounted or version < 0
        return version

    def watched(self, tensor: Any) -> Gradient | None:
        """Where the tensor's gradient will arrive, if that was asked for."""
        if self.wants.gradients and isinstance(tensor, Tensor):
            return watch(tensor)
        return None

    def used(self, gradient: Gradient | None, result: Any) -> None:
        """A call has made `result` of the tensor whose gradient that is."""
        if gradient is not None and result is not None and self.wants.detach:
            gradient.used_by(result)

    def own(self, tensor: Tensor) -> Tensor:
        """Outside the graph, unless asked otherwise."""
        joins = tensor.requires_grad or self.how > 2
        return tensor.detach() if self.wants.detach and joins else tensor

    def fits(self) -> bool:
        """Whether each map has its filters where the plan says: no more, no fewer."""
        return all(
            item is None
            or spec.axes is None
            or spec.picked is not None  # which has looked for them
            or spec.axes.fit(item[0].shape)
            for step in self.plan.steps
            for item, spec in zip(self._items(step), step.map_specs, strict=True)
        )

    # -- when it is read ----------------------------------------------------------------------

    def label_outputs(
        self,
        output: Any,
        kept: Iterable[tuple[str, Tensor]],
        set_label: Callable[[Tensor, Label], None],
    ) -> None:
        """Label what it has returned, or kept; a tensor at a new place keeps its own label."""
        labels: dict[str, Label] = {}
        for path, label in self.plan.effects.outputs:
            labels[path] = self.label(label)
        for path, tensor in (*leaves(output), *kept):
            if labels.get(path) is not None:
                set_label(tensor, labels[path])

    def entries(self) -> list[MapRecord]:
        """The maps of this run, in execution order."""
        return [entry for entry, _ in self.emitted()]

    def emitted(self) -> list[tuple[MapRecord, MapSpec]]:
        """The same, each with what the plan says of it."""
        steps = self.plan.steps[self._seen :] if self._let_go else self.plan.steps
        found = [pair for step in steps if self._there(step) for pair in self._entries_of(step)]
        if self.until is None:
            return found
        # Whether a nonlinearity would have followed is not known.
        return [(e, m) for e, m in found if e.kind != "preactivation" or e.sigma is not None]

    def fresh(self, let_go: bool) -> Iterator[MapRecord]:
        """The maps that have come since the last time, in order; `let_go` of each once seen."""
        self._let_go = let_go
        steps, log = self.plan.steps, self.log
        if let_go and len(log) - 1 in self.plan.spare:
            log[-1] = log[-1][:1]
        while self._seen < len(steps) and self._there(steps[self._seen]):
            step = steps[self._seen]
            self._seen += 1
            for entry, _ in self._entries_of(step):
                yield entry
            if let_go:
                log[step.at] = log[step.at][:1]
                self.wants.conversion.forget()

    def _there(self, step: Step) -> bool:
        if self.until is not None and step.position >= self.until:
            return False
        return step.at < len(self.log)

    def _entries_of(self, step: Step) -> list[tuple[MapRecord, MapSpec]]:
        found: list[tuple[MapRecord, MapSpec]] = []
        shared: dict[int, StoredTensor] = {}
        for item, map_spec in zip(self._items(step), step.map_specs, strict=True):
            if item is None:
                continue
            tensor, version, gradient, copied = item
            held = shared.get(id(tensor))
            if held is None:
                held = shared[id(tensor)] = StoredTensor(tensor, version, copied, gradient)
                held.arrival = self.wants.conversion.arrival(tensor)
            entry = MapRecord(
                map_spec.kind,
                self.origin(map_spec.ref),
                held,
                map_spec.axes,
                map_spec.sigma,
                map_spec.path,
                map_spec.picked,
            )
            if self.edited and map_spec.kind == "output":
                entry.edited = self.edited.get(step.at, {}).get(map_spec.path)
            found.append((entry, map_spec))
        return found

    def _items(self, step: Step) -> list[Item | None]:
        """What was read for each map of a step."""
        if not step.map_specs:
            return []
        record = self.log[step.at]
        if not step.plain or type(record[1]) is list:
            read: list[Item | None] = record[1]
            return read
        slots: dict[str, Item] = {}
        y_grad, x_grad = record[-2:] if self.wants.gradients else (None, None)
        slots["y"] = (self.own(record[1]), record[2], y_grad, False)
        if step.plain == "xy":
            copied = len(record) == 6 and record[5] is True
            slots["x"] = (self.own(record[3]), record[4], x_grad, copied)
        return [slots[e.slot] for e in step.map_specs]

    def release(self) -> list[Any]:
        """Let go of every tensor; what holds them still."""
        log, self.log, self.edited = self.log, [], {}
        return log


def _slot(map_spec: MapSpec) -> tuple[str, bool]:
    return map_spec.slot, map_spec.picked is not None
