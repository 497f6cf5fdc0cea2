"""What a module's call turns out to have been, when it ends in a traced pass.

A registered layer, one nonlinearity, a norm written out by hand, or the only function in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fmapkit import layers
from fmapkit.provenance import (
    REGISTERED,
    STOP,
    ChannelLabel,
    ChannelLayout,
    Made,
    past_sigma,
    sigma_axes,
)
from fmapkit.tracing.candidates import is_norm, norm_axis
from fmapkit.tracing.events import Event
from fmapkit.tracing.frames import Frame

if TYPE_CHECKING:
    from fmapkit.tracing.tracer import Tracer

__all__ = ["close"]


def close(tracer: Tracer, frame: Frame, output: Any) -> Any:
    """Make the module's call an event, if it is one; what it is to return, if edited."""
    if frame.kind == "layer":
        tracer.record.drop_since(frame.start)
        return _close_layer(tracer, frame, output) if isinstance(output, Tensor) else None
    if frame.kind != "plain":
        sigma = tracer.verdict(frame, output)
        if sigma is not None:
            tracer.record.drop_since(frame.start)
            return _close_sigma(tracer, frame, output, sigma)
        flow = tracer.flow(output) if is_norm(frame, output) else None
        if flow is not None and flow.origin.kind != "layer":  # it names what no layer stands behind
            axis, own = norm_axis(frame.module, output), tracer.names.of(frame.module)
            tracer.set_tag(output, tracer.record.norm(flow, output, axis, own))
    if len(tracer.events) == frame.start:
        return None
    for event in tracer.events[frame.start :]:
        if event.scope is not frame.module:
            continue
        # In place, it has to be seen as the function that it is, to run out of place.
        whole = event.y is not None and event.x is frame.x and event.y is output
        whole = whole and not event.in_place
        if whole and (event.y_held is None or event.y_held is tracer.aliases.reference(output)):
            event.module = frame.module
            tracer.firings.refire(event)
        event.x = event.y = None
    return None


def _close_layer(tracer: Tracer, frame: Frame, out: Tensor) -> Tensor:
    """A registered layer has run."""
    event = Event("layer", frame.module)
    event.module, event.key = frame.module, frame.key
    dim = (layers.layer_axis(frame.module) or 0) % max(out.dim(), 1)
    axes = ChannelLayout.single(dim, out.shape[dim]) if out.dim() else None
    made = Made(why=REGISTERED)
    return tracer.layer_event(event, tracer.names.of(frame.module), frame.x, out, axes, (made, {}))


def _close_sigma(tracer: Tracer, frame: Frame, a: Tensor, sigma: str) -> Tensor | None:
    """A module that is one nonlinearity has run."""
    module, x = frame.module, frame.x
    assert x is not None and frame.x_held is not None
    event = Event("sigma", module)
    event.module, event.key, event.sigma = module, frame.key, sigma
    event.in_place = frame.in_place or frame.x_held.copied
    event.kept = frame.kept
    flow = frame.tag if isinstance(frame.tag, ChannelLabel) else STOP
    axes, result = sigma_axes(flow.axes, x, a), a
    if frame.site is not None and tracer.editor is not None:
        a, result = tracer.editor.leave(frame, a, axes)
    elif isinstance(frame.a, Tensor):
        a = frame.a  # what σ gave, where a user's hook changed what the module returned
    tracer.record.sigma(event, flow, frame.x_held, x, a, tracer.names.of(module), frame.site)
    tracer.spare(event)
    if result is a or frame.site is not None:
        tracer.set_tag(result, past_sigma(frame.tag, x, a))
    return result if frame.site is not None else None
