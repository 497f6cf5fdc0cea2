"""One module's call in a traced pass: it begins, and what it turns out to have been when it ends.

A registered layer, one nonlinearity, a norm written out by hand, or the only function in it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from fmapkit import layers, nonlinearities
from fmapkit.provenance import (
    REGISTERED,
    STOP,
    ChannelLabel,
    ChannelLayout,
    Linearity,
    Made,
    past_sigma,
    sigma_axes,
)
from fmapkit.storage import unheld
from fmapkit.torchlib.nested import tensors_in
from fmapkit.torchlib.operators import without_torch_function
from fmapkit.torchlib.side_ops import looking
from fmapkit.torchlib.transforms import unholdable
from fmapkit.tracing.candidates import is_norm, may_be_sigma, norm_axis, role_of, verdict
from fmapkit.tracing.data_reads import DataReads
from fmapkit.tracing.events import Event, HookPoint
from fmapkit.tracing.frames import Frame
from fmapkit.tracing.layer_calls import LayerCalls
from fmapkit.tracing.layer_edits import LayerEdits
from fmapkit.tracing.pass_trace import PassTrace

# Arguments of these classes alone are the same tensors as long as the call is under way.
_FLAT = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, str})


class ModuleCalls:
    """The modules of one pass."""

    def __init__(
        self, trace: PassTrace, editor: LayerEdits | None, layers: LayerCalls, reads: DataReads
    ) -> None:
        self._trace = trace
        self._editor = editor
        self._reads = reads
        self._layers = layers
        self._looking: Callable[[], AbstractContextManager[Any]] = (
            looking if editor is None else without_torch_function
        )

    # -- a call begins ------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Frame:
        """A module's forward begins."""
        trace, editor = self._trace, self._editor
        with self._looking():  # what we look at ourselves is not the model's doing
            frames, record = trace.frames, trace.record
            if frames:
                trace.past_hooks(sys._getframe(1), module)
            replaced = editor.modules.input(module, args, kwargs) if editor else None
            if replaced is not None:
                args, kwargs = replaced
            counts = len(record.events), len(record.hook_points), record.aliases.writes
            nested = None
            if trace.learning:
                trace.moments.append((record.hook_points.clock(), module))
                given = tensors_in(*args, kwargs)
                self._reads.made.enter(given)
                if not _FLAT.issuperset({*map(type, args), *map(type, kwargs.values())}):
                    nested = list(map(weakref.ref, given))
            frame = Frame(module, args, kwargs, *counts, replaced, nested)
            frame.watched = bool(frames) and frames[-1].watched
            frames.append(frame)
            x, role = frame.x, role_of(module)
            why = unheld(x) if x is not None and unholdable(x) else None
            if why is not None:
                trace.miss_here(why)
            elif role != "plain":
                self._sort(frame, role, args, kwargs)
            return frame

    def _sort(self, frame: Frame, role: str, args: Any, kwargs: Any) -> None:
        """What kind of call it may be."""
        trace, x = self._trace, frame.x
        if role == "layer":
            frame.kind = role
            trace.opaque += 1
        elif role == "sigma":
            frame.kind = role
            frame.ran = nonlinearities.runs_as(frame.module) is None
        # What is captured is never one nonlinearity itself.
        elif x is None or not trace.names.of(frame.module):
            return
        elif may_be_sigma(frame.module, args, kwargs, x):
            frame.kind = "candidate"
            frame.degrees = Linearity(x)
            frame.watched = True
        if x is not None and frame.kind in ("sigma", "candidate"):
            frame.x_held = trace.record.aliases.reference(x)
            frame.label = trace.labels.of(x)
            if self._editor and not trace.opaque:
                self._editor.enter(frame)

    # -- a call ends --------------------------------------------------------------------------

    def leave(self, frame: Frame, output: Any) -> Any:
        """A forward has ended: what it is to return if something was edited; None for its own."""
        trace, module, replaced = self._trace, frame.module, None
        with self._looking():
            parent = trace.frames[-1].module if trace.frames else None
            hook_point = HookPoint(module, module, None, parent)
            trace.record.hook_points.append(hook_point)
            if trace.learning:
                trace.moments.append((hook_point.position, None))
            edited = self.close(frame, output)
            if edited is not None and edited is not output:
                replaced = output = edited
            event = None
            if module in trace.wants.outputs:
                event = trace.record.output(module, trace.names.of(module), output)
            if self._editor:
                new, held = self._editor.modules.held_output(module, output)
                replaced = new if held else replaced
                for path, entry in event.entries if event is not None else ():
                    entry.edited = held.get(path)
        return replaced

    def close(self, frame: Frame, output: Any) -> Any:
        """Make the module's call an event, if it is one; what it is to return, if edited."""
        record, labels = self._trace.record, self._trace.labels
        if frame.kind == "layer":
            record.drop_since(frame.start)
            return self._close_layer(frame, output) if isinstance(output, Tensor) else None
        if frame.kind != "plain":
            sigma = verdict(frame, output, record)
            if sigma is not None:
                record.drop_since(frame.start)
                return self._close_sigma(frame, output, sigma)
            for missed in frame.unseen:
                self._trace.miss_of_part(*missed)
            channels = labels.channels(output) if is_norm(frame, output) else None
            if (
                channels is not None and channels.origin.kind != "layer"
            ):  # no layer stands behind it
                axis, own = norm_axis(frame.module, output), self._trace.names.of(frame.module)
                labels.put(output, record.norm(channels, output, axis, own))
        events = record.events
        for event in events[frame.start :] if len(events) > frame.start else ():
            if event.scope is not frame.module:
                continue
            # In place, it has to be seen as the function that it is, to run out of place.
            whole = event.y is not None and event.x is frame.x and event.y is output
            whole = whole and not event.in_place
            if whole and (event.y_held is None or event.y_held is record.aliases.reference(output)):
                event.module = frame.module
                record.hook_points.refire(event)
            event.forget()
        return None

    def _close_layer(self, frame: Frame, out: Tensor) -> Tensor:
        """A registered layer has run."""
        event = Event("layer", frame.module, module=frame.module, key=frame.key)
        dim = (layers.layer_axis(frame.module) or 0) % max(out.dim(), 1)
        axes = ChannelLayout.single(dim, out.shape[dim]) if out.dim() else None
        name = self._trace.names.of(frame.module)
        return self._layers.ran(event, name, frame.x, out, axes, Made(why=REGISTERED))

    def _close_sigma(self, frame: Frame, a: Tensor, sigma: str) -> Tensor | None:
        """A module that is one nonlinearity has run."""
        trace, module, x = self._trace, frame.module, frame.x
        assert x is not None and frame.x_held is not None
        event = Event(
            "sigma",
            module,
            module=module,
            key=frame.key,
            sigma=sigma,
            in_place=frame.in_place or frame.x_held.copied,
            kept=frame.kept,
        )
        channels = frame.label if isinstance(frame.label, ChannelLabel) else STOP
        axes, result = sigma_axes(channels.axes, x, a), a
        given = frame.a if isinstance(frame.a, Tensor) else a  # what a user's hook may have changed
        hooked = given is not a
        if frame.site is not None and self._editor is not None:
            if hooked:
                self._editor.refuse_hooked(frame)
            a, result = self._editor.leave(frame, a, axes)
        if hooked:
            a = given
        own = trace.names.of(module)
        trace.record.sigma(event, channels, frame.x_held, x, a, own, frame.site)
        trace.spare(event)
        if result is a or frame.site is not None:
            trace.labels.put(result, past_sigma(frame.label, x, a))
        return result if frame.site is not None else None
