"""Edits of what a module is given and returns, in a traced pass.

They stand where a forward pre hook and a forward hook would that was registered last.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit import layers
from fmapkit.editing import RequestedEdits
from fmapkit.provenance import ChannelLayout, flow_of
from fmapkit.storage import MapRecord, StoredTensor
from fmapkit.torchlib.nested import leaves
from fmapkit.torchlib.rebuilt import rebuilt
from fmapkit.tracing.frames import first_tensor
from fmapkit.tracing.pass_trace import PassTrace


class ModuleEdits:
    """Carries out the edits of inputs and outputs of one pass."""

    def __init__(self, trace: PassTrace, edits: RequestedEdits) -> None:
        self._trace = trace
        self._edits = edits
        self._calls: Counter[tuple[str, str]] = Counter()
        self._was: dict[int, tuple[Tensor, Tensor]] = {}  # by id of what went in: it, and its past
        self._unit: nn.Module | None = None  # whose inputs were edited before it began

    def end(self) -> None:
        """Let go of all tensors."""
        self._was.clear()

    def _name(self, module: nn.Module) -> str | None:
        """Of a module of the model; None of others, and of wrappers: what they carry has it."""
        names = self._trace.names
        return None if module in names.wrappers else names.by_module.get(module)

    # -- around regions, which are replayed as a whole, or learned ------------------------------

    def enter_unit(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """A region is about to run: the arguments that it is to get instead; None for its own."""
        name = self._name(module)
        if name is None or not (self._edits.of(name, "input") or self._edits.of(name, "output")):
            return None
        self._unit = None  # of a call that was broken off, it may be this one
        with torch._C.DisableTorchFunction():
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
        with torch._C.DisableTorchFunction():
            new, held = self.output(module, output)
        if held and module in self._trace.wants.outputs:
            self._tell(self._trace.names.of(module), held)
        return new if held else None

    # -- where nothing else is told of the pass any more ---------------------------------------

    def enter_lost(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """A module is about to run: the arguments that it is to get instead; None for its own."""
        with torch._C.DisableTorchFunction():
            return self.input(module, args, kwargs)

    def leave_lost(self, module: nn.Module, output: Any) -> Any:
        """A module has run: what it is to return instead; None for its own."""
        with torch._C.DisableTorchFunction():
            new, held = self.output(module, output)
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
        """A module is about to run: the arguments that it is to get instead; None for its own."""
        if module is self._unit:
            return None
        name = self._name(module)
        if name is None or not self._edits.of(name, "input"):
            return None
        given = {"args": args, "kwargs": kwargs}
        found = {f"['args']{path}": tensor for path, tensor in leaves(args)}
        found |= {f"['kwargs']{path}": tensor for path, tensor in leaves(kwargs)}
        first, key = first_tensor(args, kwargs)
        usual = next(iter(found)) if len(found) == 1 else None
        if first is not None:
            usual = "['args'][0]" if key is None else f"['kwargs'][{key!r}]"
        axis = layers.layer_axis(module)
        changed = self._changed(name, "input", found, usual, axis)
        for path, new in changed.items():
            self._was[id(new)] = new, found[path]
            given = rebuilt(given, path, new)
        return (given["args"], given["kwargs"]) if changed else None

    def was(self, x: Tensor) -> Tensor | None:
        """What an edited input was before; None where it was not edited."""
        known = self._was.get(id(x))
        return known[1] if known is not None and known[0] is x else None

    def output(self, module: nn.Module, output: Any) -> tuple[Any, dict[str, StoredTensor]]:
        """A module has run.

        Returns:
            What it is to return, and what went on in the place of tensors, by their paths.
        """
        if module is self._unit:
            return output, {}
        name = self._name(module)
        if name is None or not self._edits.of(name, "output"):
            return output, {}
        found = dict(leaves(output))
        usual = next(iter(found)) if len(found) == 1 else None
        changed = self._changed(name, "output", found, usual, None)
        held: dict[str, StoredTensor] = {}
        for path, new in changed.items():
            output = rebuilt(output, path, new)
            held[path] = self._trace.record.aliases.reference(new)
            held[path].wanted = True
        return output, held

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
            name: of the module.
            kind: "input" or "output".
            found: its tensors, by path.
            usual: the one that an edit without a path means, if that is clear.
            axis: of filters, where what a tensor carries does not tell.
        """
        trace = self._trace
        trace.edited = True
        call = self._calls[name, kind]
        self._calls[name, kind] += 1
        changed = {}
        step, shown = trace.record.current.step, [_shown(path) for path in found]
        if usual is None and len(found) > 1:
            self._edits.check_one(name, kind, shown, call, step)
        for path, tensor in found.items():
            flow = flow_of(trace.labels.of, tensor)
            axes = flow.axes if flow is not None else None
            if axes is None and axis is not None and tensor.dim():
                axes = ChannelLayout.single(axis % tensor.dim(), tensor.shape[axis])
            new = self._edits.apply(
                kind,
                tensor,
                axes,
                name,
                trace.record.current,
                usual=path == usual,
                others=shown,
                call=call,
                path=_shown(path),
            )
            if new is not None:
                trace.labels.put(new, trace.labels.of(tensor))
                changed[path] = new
        return changed


def _shown(path: str) -> str:
    """The path as users give it: arguments by place are `[0]`, those by keyword `['mask']`."""
    return path.removeprefix("['args']").removeprefix("['kwargs']")
