"""Edits: what `capture(edit=...)` asked for, checked at the call, and one edit carried out.

Where in the pass an edit belongs is the tracer's business; here a tensor goes in, and what the user
wants in its place comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from fmapkit import layers
from fmapkit.editing.positions import part_of
from fmapkit.editing.where import Where
from fmapkit.errors import ArgumentError, EditError, listed
from fmapkit.kinds import Kind
from fmapkit.map import FeatureMap
from fmapkit.model import Names
from fmapkit.nonlinearities import is_torchs
from fmapkit.paths import unrecorded
from fmapkit.provenance import ChannelLayout
from fmapkit.readable import tags as tags_of
from fmapkit.selection import LayerSelection
from fmapkit.storage import Pass, in_function
from fmapkit.torchlib.autograd import in_checkpoint

_OF_MODULES = ("input", "output")
BROKEN_OFF = (
    "a call inside the model was broken off (KeyboardInterrupt, say), the model caught that and "
    "went on, and edits after that may not have been made"
)
ENDED = (
    "an exception ended the call of a part of the model, as in no pass before, and the model went "
    "on; edits after that may not have been made. The next pass is traced"
)
AGAIN = (
    "{where} is inside activation checkpointing, which runs that part again in backward, without "
    "the edit: gradients would be those of another model. Edit outside of it, or turn it off"
)


class _Edit:
    """One entry of `edit={...}`, and what a pass has had for it so far."""

    def __init__(self, key: Any, function: Any, names: Names) -> None:
        if not callable(function) or isinstance(function, (type, Tensor)):
            raise ArgumentError(
                f"edit[{key!r}] must be a function FeatureMap -> Tensor, not {function!r}; "
                "fmapkit.edits has the usual ones: zero(), add(v), scale(2.0), clamp(0, 6), set(t)"
            )
        self.given = key
        self.where = Where.of(key)
        self.selection = LayerSelection(names, self.where.layer, "edit")
        self.function = function
        # Whether it is for maps that go by what the pass tells of its tensors.
        self.by_label = self.where.kind not in (None, *_OF_MODULES)
        self._outputs: set[str] = set()
        if self.where.kind is None:
            self._outputs = self._meant_as_outputs(names)
        self.begin()

    def _meant_as_outputs(self, names: Names) -> set[str]:
        """Of a key without a kind, the modules that are no filter layers: what they return."""
        found: set[str] = set()
        for group in self.selection.groups:
            if any(layers.layer_axis(module) is not None for module in group):
                self.by_label = True
                continue
            for module in group:
                if module._parameters and not is_torchs(module):
                    raise ArgumentError(
                        f"edit[{self.given!r}]: whether {names.of(module)!r}, which has weights of "
                        "its own, is a filter layer is known only when it runs; say the kind, "
                        "'activation' or 'output'"
                    )
                found.add(names.of(module))
        self.by_label = self.by_label or not found
        return found

    def begin(self) -> None:
        self.done = False  # something was edited
        self.empty = False  # of some map, it was for no value
        self.calls: set[int] = set()  # that there were of what it is for
        self.paths: dict[str, None] = {}  # of the tensors that there were

    def finds(self, part: FeatureMap, whole: Tensor) -> bool:
        """Note whether there is anything of a map that it is for."""
        there = bool(part.tensor.numel()) or not whole.numel()
        self.done = self.done or there
        self.empty = self.empty or not there
        return there

    def kind(self, name: str) -> str:
        """Which kind of map of a layer is meant."""
        if self.where.kind is not None:
            return self.where.kind
        return "output" if name.partition(":")[0] in self._outputs else "activation"

    def is_of(self, name: str, kind: str | None) -> bool:
        """Whether it is for maps of a layer: of a kind, or of any."""
        return kind in (None, self.kind(name)) and self.selection.layer(name)

    def modules(self, names: Names) -> list[nn.Module]:
        """The modules whose inputs or outputs are meant."""
        return [
            module
            for module, name in names.by_module.items()
            if self.selection.layer(name) and self.kind(name) in _OF_MODULES
        ]

    def why_not(self, kinds: str) -> str:
        """Why a pass that has ended had no place for it."""
        where = self.where
        if not self.calls:
            text = f"the layer did not run, or has no {kinds}"
            if kinds == "activation":
                text += "; what it returns is its 'output'"
            return text
        if not any(map(where.has_call, self.calls)):
            there = ", ".join(map(str, sorted(self.calls)))
            return f"call={where.call!r} is none of those that there were ({there})"
        if self.empty:
            return "at= is no position of any map that there was"
        return f"path={where.path!r} is none of the tensors that there were ({listed(self.paths)})"


class RequestedEdits:
    """All edits of one capture.

    Args:
        given: a `Where`, or (layer, kind, filters) as far as it is to be said -> a function.


    Raises:
        ArgumentError: a key or a function is of no allowed form.
        UnknownLayerError: a key's layer matches nothing in the model.
    """

    def __init__(self, names: Names, given: Any) -> None:
        if given is not None and not isinstance(given, Mapping):
            raise ArgumentError(f"edit must be a dict of layer -> function, not {given!r}")
        self._names = names
        self._all = [_Edit(key, function, names) for key, function in (given or {}).items()]
        self.raised: BaseException | None = None  # by an edit; no fault of ours
        self.runs = 0  # how often a map was given to an edit
        # A function of the user's runs; the modules that it calls are none of the pass.
        self.running = False
        # A call in the pass was, by what is no `Exception`, and the pass went on.
        self.broken_off = False
        self._grads = False

    def __bool__(self) -> bool:
        return bool(self._all)

    def of(self, name: str, kind: str | None = None) -> list[_Edit]:
        """The edits of a layer, by its label."""
        return [e for e in self._all if e.is_of(name, kind)]

    def modules(self) -> set[nn.Module]:
        """The modules that are traced in every pass, since inputs or outputs in them are edited.

        What they are themselves given and return is edited around them, but for layers, whose
        maps tell of it, and the model.
        """
        edited = {m for edit in self._all for m in edit.modules(self._names)}
        found = {m for m in edited if m is self._names.model or layers.layer_axis(m) is not None}
        for module in self._names.by_module:
            if any(m in edited and m is not module for m in module.modules()):
                found.add(module)
        return found

    def placed(self, wants_inputs: bool, outputs: set[nn.Module]) -> bool:
        """Whether all are of what modules are given and return.

        A plan tells of such modules all that an edit asks for, where these are no layers.

        Args:
            wants_inputs: inputs of layers are held.
            outputs: modules whose outputs are to be traced.
        """
        if wants_inputs or any(edit.by_label for edit in self._all):
            return False
        return not any(
            m is self._names.model or m in outputs or layers.layer_axis(m) is not None
            for edit in self._all
            for m in edit.modules(self._names)
        )

    def refresh(self) -> None:
        """The model has other modules than it had."""
        for edit in self._all:
            edit.selection.refresh()

    def active(self, step: int) -> tuple[bool, ...]:
        """Which of them are for a pass."""
        return tuple([edit.where.has_step(step) for edit in self._all])

    def begin(self, grads: bool) -> None:
        """A pass begins, of which gradients are recorded or not."""
        self.raised = None
        self.broken_off = False
        self._grads = grads
        for edit in self._all:
            edit.begin()

    def by_label(self, step: int) -> bool:
        """Whether a pass has edits of maps that go by what is told of its tensors."""
        return any(edit.by_label and edit.where.has_step(step) for edit in self._all)

    def refused(self, why: str) -> EditError:
        """What to raise where a pass runs that nothing can be edited in."""
        return self._error(f"edit= cannot be carried out in this call: {why}")

    def _error(self, text: str, **data: Any) -> EditError:
        self.raised = EditError(text, **data)
        return self.raised

    def refuse(self, layer: str, kind: str, why: str, call: int, step: int) -> None:
        """A map is there that nothing can be put in the place of.

        Raises:
            EditError: an edit is for it.
        """
        for edit in self.of(layer, kind):
            edit.calls.add(call)
            if edit.where.has_call(call) and edit.where.has_step(step):
                text = f"edit[{edit.given!r}] of layer {layer!r}: {why}"
                raise self._error(text, layer=layer, kind=kind, call=call, step=step)

    def refuse_outside(self, name: str) -> None:
        """A module has been called outside of a pass, where nothing is edited.

        Raises:
            EditError: an edit is for it.
        """
        for edit in self.of(name):
            raise self._error(
                f"edit[{edit.given!r}] changed nothing: {name!r} was called outside of a pass; "
                "capture(..., method=...) makes a pass of another method than forward",
                layer=name,
            )

    def check_done(self, step: int, lost: bool) -> None:
        """A pass has ended as a whole.

        Args:
            lost: what its tensors carried was not known to the end.

        Raises:
            EditError: an edit of that pass found no place in it, or perhaps not all of its places.
        """
        if self.broken_off:
            raise self.refused(BROKEN_OFF)
        if lost and self.by_label(step):
            raise self.refused(ENDED)
        for edit in self._all:
            where = edit.where
            if edit.done or where.optional or not where.has_step(step):
                continue
            if self.raised is not None:  # the reason, which the model's own code has handled
                raise self.raised
            kind = where.kind or ("output" if edit._outputs else "activation")
            raise self._error(
                f"edit[{edit.given!r}] changed nothing in this pass (step {step}): "
                f"{edit.why_not(kind)}. Where that may be, edits.Where(..., optional=True) says so",
                layer=where.layer if isinstance(where.layer, str) else None,
                kind=kind,
                step=step,
            )

    def check_one(self, layer: str, kind: str, paths: Sequence[str], call: int, step: int) -> None:
        """A module has several tensors, of which none is the usual one.

        Raises:
            EditError: an edit does not say which it is for.
        """
        for edit in self.of(layer, kind):
            where = edit.where
            if where.path is None and where.has_call(call) and where.has_step(step):
                raise self._error(
                    f"edit[{edit.given!r}] could mean {len(paths)} tensors of the {kind} of "
                    f"{layer!r}: {listed(paths)}; say which: ({layer!r}, {kind!r}, {paths[0]!r})",
                    layer=layer,
                    kind=kind,
                    call=call,
                    step=step,
                    candidates=paths,
                )

    def apply(
        self,
        kind: str,
        tensor: Tensor,
        axes: ChannelLayout | None,
        layer: str,
        at: Pass,
        usual: bool = True,
        others: Sequence[str] = (),
        **tags: Any,
    ) -> Tensor | None:
        """What goes on in the tensor's place; None if nothing changes it.

        Args:
            axes: where its filters lie.
            usual: it is what an edit without a path means.
            others: paths of all tensors that the module has there.

        Raises:
            EditError: a function returned something that cannot stand there.
            FilterRangeError: the map has no such filter.
            Exception: whatever else a function raises.
        """
        result = tensor
        try:
            for edit in self.of(layer, kind):
                where = edit.where
                edit.calls.add(tags["call"])
                edit.paths.update(dict.fromkeys(others))
                if not (where.has_step(at.step) and where.has_call(tags["call"])):
                    continue
                if not (usual if where.path is None else where.path == tags.get("path")):
                    continue
                if self._grads and in_checkpoint(in_function()):
                    it = f"the {kind} of layer {layer!r}"
                    raise EditError(AGAIN.format(where=it), layer=layer, kind=kind)
                if kind == "input" and usual:  # as `capture` tags it
                    tags = {**tags, "path": ""}
                fm = FeatureMap(
                    tensor=result,
                    kind=cast("Kind", kind),
                    layer=layer,
                    step=at.step,
                    training=at.training,
                    filter_dim=axes.dim if axes is not None else None,
                    filters=axes.filters if axes is not None else None,
                    **tags,
                )
                part, put = part_of(fm, where)
                if not edit.finds(part, result):
                    continue
                self.runs += 1
                self.running = True
                try:
                    new = _run(edit, part)
                finally:
                    self.running = False
                result = new if new is part.tensor and part.tensor is result else put(new)
        except Exception as error:
            self.raised = error
            if isinstance(error, EditError):
                error.layer, error.kind = layer, kind
            raise
        return None if result is tensor else result


def _run(edit: _Edit, fm: Any) -> Tensor:
    before = fm.tensor
    version = None if before.is_inference() else before._version
    where = f"edit[{edit.given!r}] of the {fm.kind} of layer {fm.layer!r}"
    with unrecorded():  # it may call functions of the model's
        after = edit.function(fm)
    if not isinstance(after, Tensor):
        raise EditError(f"{where} must return a tensor, not {type(after).__name__}", **tags_of(fm))
    if version is not None and before._version != version:
        raise EditError(
            f"{where} wrote to the map in place; return a new tensor instead", **tags_of(fm)
        )
    for what in ("shape", "dtype", "device"):
        was, now = getattr(before, what), getattr(after, what)
        if was != now:
            was, now = (tuple(was), tuple(now)) if what == "shape" else (was, now)
            raise EditError(
                f"{where} must keep the {what}: {was} went in, {now} came out", **tags_of(fm)
            )
    return after
