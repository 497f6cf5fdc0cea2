"""Edits of what a module is given and returns.

They stand where a forward pre hook and a forward hook would that was registered last.

PlacedEdits    carries them out, in any pass; who knows of its tensors tells where filters lie
  ModuleEdits  in a traced pass: their labels tell, and for later passes it is noted what they told
  (in a replayed one, `session/placed_edits.py`: the plan tells)
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from fmapkit import layers
from fmapkit.editing import RequestedEdits
from fmapkit.model import Names
from fmapkit.provenance import ChannelLayout, channels_of
from fmapkit.storage import MapRecord, Pass, StoredTensor
from fmapkit.torchlib.memory import storage_of
from fmapkit.torchlib.nested import leaves, rebuilt
from fmapkit.torchlib.operators import without_torch_function
from fmapkit.tracing.frames import Place, first_tensor
from fmapkit.tracing.pass_trace import PassTrace


class PlacedEdits:
    """Carries out the edits of inputs and outputs of one pass."""

    def __init__(self, names: Names, edits: RequestedEdits, current: Pass) -> None:
        self._names = names
        self._edits = edits
        self._current = current
        self._calls: Counter[tuple[str, str]] = Counter()

    def _axes(self, place: Place, tensor: Tensor) -> ChannelLayout | None:
        """Where the filters of a tensor lie."""
        raise NotImplementedError

    def _goes_on(
        self, place: Place, axes: ChannelLayout | None, tensor: Tensor, new: Tensor | None
    ) -> None:
        """Note what went on in the place of a tensor: None if it did itself."""
        raise NotImplementedError

    def name_of(self, module: nn.Module) -> str | None:
        """Of a module of the model; None of others, and of wrappers: what they carry has it."""
        names = self._names
        return None if module in names.wrappers else names.by_module.get(module)

    def input(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """A module is about to run: the arguments that it is to get instead; None for its own."""
        name = self.name_of(module)
        if name is None or not self._edits.of(name, "input"):
            return None
        given = {"args": args, "kwargs": kwargs}
        found = {f"['args']{path}": tensor for path, tensor in leaves(args)}
        found |= {f"['kwargs']{path}": tensor for path, tensor in leaves(kwargs)}
        first, key = first_tensor(args, kwargs)
        usual = next(iter(found)) if len(found) == 1 else None
        if first is not None:
            usual = "['args'][0]" if key is None else f"['kwargs'][{key!r}]"
        changed = self._changed(name, "input", found, usual, layers.layer_axis(module))
        for path, new in changed.items():
            given = rebuilt(given, path, new)
        return (given["args"], given["kwargs"]) if changed else None

    def output(self, module: nn.Module, output: Any) -> tuple[Any, dict[str, Tensor]]:
        """A module has run: what it is to return, and what went on in it, by path."""
        name = self.name_of(module)
        if name is None or not self._edits.of(name, "output"):
            return output, {}
        found = dict(leaves(output))
        usual = next(iter(found)) if len(found) == 1 else None
        changed = self._changed(name, "output", found, usual, None)
        for path, new in changed.items():
            output = rebuilt(output, path, new)
        return output, changed

    def _changed(
        self,
        name: str,
        kind: str,
        found: dict[str, Tensor],
        usual: str | None,
        axis: int | None,
    ) -> dict[str, Tensor]:
        """What is to go on, by path, where that is another tensor.

        Args:
            kind: "input" or "output".
            usual: the one that an edit without a path means, if that is clear.
            axis: of filters, where what a tensor carries does not tell.
        """
        call = self._calls[name, kind]
        self._calls[name, kind] += 1
        changed = {}
        step, shown = self._current.step, [_shown(path) for path in found]
        if usual is None and len(found) > 1:
            self._edits.check_one(name, kind, shown, call, step)
        for path, tensor in found.items():
            place = name, kind, call, path
            axes = told = self._axes(place, tensor)
            if axes is None and axis is not None and tensor.dim():
                axes = ChannelLayout.single(axis % tensor.dim(), tensor.shape[axis])
            new = self._edits.apply(
                kind,
                tensor,
                axes,
                name,
                self._current,
                usual=path == usual,
                others=shown,
                call=call,
                path=_shown(path),
            )
            self._goes_on(place, told, tensor, new)
            if new is not None:
                changed[path] = new
        return changed


class ModuleEdits(PlacedEdits):
    """The same in a traced pass."""

    def __init__(self, trace: PassTrace, edits: RequestedEdits) -> None:
        super().__init__(trace.names, edits, trace.record.current)
        self._trace = trace
        self._was: dict[int, tuple[Tensor, Tensor]] = {}  # by id of what went in: it, and its past
        self._unit: nn.Module | None = None  # whose inputs were edited before it began

    def end(self) -> None:
        """Let go of all tensors."""
        self._was.clear()

    # -- around regions, which are replayed as a whole, or learned ------------------------------

    def enter_unit(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """A region is about to run: the arguments that it is to get instead; None for its own."""
        name = self.name_of(module)
        if name is None or not (self._edits.of(name, "input") or self._edits.of(name, "output")):
            return None
        self._unit = None  # of a call that was broken off, it may be this one
        given = self.input(module, args, kwargs)
        self._unit = module
        return given

    def leave_unit(self, module: nn.Module, output: Any, failed: bool) -> Any:
        """A region has run: what it is to return instead; None for its own."""
        if module is not self._unit:
            return None
        self._unit = None
        if failed:
            return None
        new, held = self.held_output(module, output)
        if held and module in self._trace.wants.outputs:
            self._tell(self._trace.names.of(module), held)
        return new if held else None

    def leave_lost(self, module: nn.Module, output: Any) -> Any:
        """A module has run, and nothing else is told of the pass any more: the same."""
        new, held = self.held_output(module, output)
        return new if held else None

    def _tell(self, name: str, held: dict[str, StoredTensor]) -> None:
        """Say of the maps of what a region has just returned what went on in their place."""
        call: int | None = None
        for entry in reversed(self._trace.record.current.segments):
            if (
                isinstance(entry, MapRecord)
                and entry.kind == "output"
                and entry.origin.name == name
            ):
                if call not in (None, entry.origin.call):
                    break
                call, entry.edited = entry.origin.call, held.get(entry.path)

    # -- of each module -----------------------------------------------------------------------

    def input(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if module is self._unit:
            return None
        with without_torch_function():
            return super().input(module, args, kwargs)

    def was(self, x: Tensor) -> Tensor | None:
        """What an edited input was before; None where it was not edited."""
        known = self._was.get(id(x))
        return known[1] if known is not None and known[0] is x else None

    def held_output(self, module: nn.Module, output: Any) -> tuple[Any, dict[str, StoredTensor]]:
        """The same as `output`, and what went on is held."""
        if module is self._unit:
            return output, {}
        with without_torch_function():
            output, changed = self.output(module, output)
            held = {p: self._trace.record.aliases.reference(new) for p, new in changed.items()}
        for one in held.values():
            one.wanted = True
        return output, held

    def _axes(self, place: Place, tensor: Tensor) -> ChannelLayout | None:
        channels = channels_of(self._trace.labels.of, tensor)
        return channels.axes if channels is not None else None

    def _goes_on(
        self, place: Place, axes: ChannelLayout | None, tensor: Tensor, new: Tensor | None
    ) -> None:
        trace = self._trace
        # A later pass is told of neither: what its module is as a whole, and a view of itself.
        if any(f.kind != "plain" for f in trace.frames) or goes_on_in(tensor, new):
            trace.edited = True
        trace.placed[place] = axes, new is not None, trace.record.hook_points.clock()
        if new is None:
            return
        trace.labels.put(new, trace.labels.of(tensor))
        if place[1] == "input":
            self._was[id(new)] = new, tensor


def goes_on_in(tensor: Tensor, new: Tensor | None) -> bool:
    """Whether what goes on lies in the memory of what was edited."""
    return new is not None and storage_of(new) == storage_of(tensor)


def _shown(path: str) -> str:
    """The path as users give it: arguments by place are `[0]`, those by keyword `['mask']`."""
    return path.removeprefix("['args']").removeprefix("['kwargs']")
