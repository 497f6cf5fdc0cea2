"""Depart: tell the tracer what it would have seen, where it takes over in the middle of a pass.

What the steps of the road meant is told once more, in order: what each tensor carries, how often
layers were called, whose filters have reached a nonlinearity, and which maps are held of what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fmapkit._events import Event
from fmapkit._frames import Frame
from fmapkit._origin import NOWHERE, Flow, Origin
from fmapkit._script import Step
from fmapkit._seen import Seen
from fmapkit._store import Entry

if TYPE_CHECKING:
    from fmapkit._trace import Tracer

__all__ = ["tell"]


def tell(
    tracer: Tracer,
    path: Sequence[Step],
    seen: Seen,
    entries: Sequence[Entry],
    running: Sequence[Frame],
    suspects: Sequence[Frame],
) -> None:
    """Tell the tracer.

    Args:
        tracer: of the pass.
        path: the steps that the pass has done.
        seen: its tensors, and what they carry.
        entries: its maps.
        running: the modules that are running, outermost first.
        suspects: those of them that may be one nonlinearity; the tracer's events are those since
            the outermost one began.
    """
    for reference, tag in zip(seen.refs, seen.carry, strict=True):
        tensor = reference()
        if tensor is not None:
            tracer.set_tag(tensor, tag)
    _unclaim(path)
    since = list(tracer.events)
    tracer.events.clear()
    starts = _tell_steps(tracer, path, entries)
    outer = running.index(suspects[0]) if suspects else len(running)
    for frame, start in zip(running[:outer], starts, strict=False):
        frame.start = start
    if not suspects:
        return
    offset = starts[outer]
    layers = [e for e in tracer.events[offset:] if e.kind in ("layer", "output")]
    tracer.events[offset:] = [*layers, *since]
    for frame in running[outer:]:
        frame.start += offset + (len(layers) if frame.start else 0)


def _tell_steps(tracer: Tracer, path: Sequence[Step], entries: Sequence[Entry]) -> list[int]:
    """Tell it of each step; how many events there were as each running module began."""
    left, starts = iter(entries), []
    for step in path:
        tracer.counts.update(step.counted)
        for origin in step.claimed:
            origin.claimed = True
        if step.kind == "begin":
            starts.append(len(tracer.events))
        elif step.kind == "end":
            starts.pop()
        if step.kind == "unit":
            for pending in step.pending:
                entry = next(left)
                if pending and entry.held is not None:
                    tracer.pending.setdefault(id(entry.origin), []).append(entry)
            continue
        events: dict[int, Event] = {}
        for making in step.makings:
            entry = next(left)
            if id(making.origin) not in events:
                kind = "sigma" if making.sigma is not None else "layer"
                kind = "output" if making.kind == "output" else kind
                event = events[id(making.origin)] = Event(kind, tracer.names.model)
                event.origin = making.origin
                tracer.events.append(event)
            if entry.held is not None:
                slot = "x" if making.source >= 0 else "y"
                events[id(making.origin)].entries.append((slot, entry))
    return starts


def _unclaim(path: Sequence[Step]) -> None:
    """Take back what the pass that was noted came to know of its origins later."""
    origins: list[Origin] = [m.origin for s in path for m in s.makings]
    origins += [t.origin for s in path for t in s.results if isinstance(t, Flow)]
    for origin in origins:
        if origin is not NOWHERE:
            origin.claimed = False
    for step in path:
        for ref, origin in (step.origins or {}).items():
            origin.claimed = ref.claimed
