"""Keep what a traced pass shows: its events, whose filters they have, and the maps held of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fmapkit.missed import NotSupportedError
from fmapkit.provenance import ChannelLabel, ChannelLayout, Origin, sigma_axes
from fmapkit.reasons import Reason
from fmapkit.selection import EarlyStop, Selection
from fmapkit.storage import Aliases, MapRecord, Pass, StoredTensor, in_function, unheld
from fmapkit.torchlib.memory import version_of
from fmapkit.torchlib.nested import closed_parts, leaves
from fmapkit.torchlib.sharded import is_dtensor
from fmapkit.torchlib.side_ops import goes_on_from
from fmapkit.tracing.events import Event, HookPoints
from fmapkit.tracing.frames import EditSite
from fmapkit.tracing.label_table import LabelTable


class Record:
    """The events of one pass."""

    def __init__(
        self,
        wants: Selection,
        current: Pass,
        labels: LabelTable,
        aliases: Aliases,
        stop: EarlyStop | None,
        miss: Callable[[str, str], None],
    ) -> None:
        self.wants = wants
        self.current = current
        self.labels = labels
        self.aliases = aliases
        self.stop = stop
        self.miss = miss
        self.graph = wants.graph and current.grads  # its maps are to be part of the autograd graph
        self.events: list[Event] = []
        self.hook_points = HookPoints()
        # How many calls there were of each layer, by its label.
        self.counts: Counter[str] = Counter()
        # Preactivations of replayed regions that a nonlinearity may still claim, by origin.
        self.pending: dict[int, list[MapRecord]] = {}
        self._unpicked: list[tuple[Origin, bool]] = []  # DTensors, whose filters are on all ranks

    def end(self) -> None:
        """Let go of all that could keep a tensor or a graph alive.

        Without waiting for Python's gc: events and hook points know each other.
        """
        for origin, unless_claimed in self._unpicked:
            if not (unless_claimed and origin.claimed):
                self.miss(origin.name, Reason.FILTERS_ON_ANOTHER_RANK.text())
        self._unpicked.clear()
        for event in self.events:
            event.end()
        self.events.clear()
        self.hook_points.clear()
        self.pending.clear()
        self.aliases.end()

    # -- what ran -----------------------------------------------------------------------------

    def sigma(
        self,
        event: Event,
        channels: ChannelLabel,
        z_held: StoredTensor,
        z: Tensor,
        a: Tensor,
        own: str,
        edited: EditSite | None = None,
    ) -> None:
        """One nonlinearity has run: name its layer, hold its pair.

        Args:
            channels: what z carries.
            z: what came in, which may have been overwritten.
            own: its own name, where no layer stands behind it.
        """
        origin = channels.origin
        if origin.kind == "none":
            origin = self.next_call("own", own)
        else:
            self.claim(origin)
        event.axes = channels.axes
        event.x_held = z_held
        event.y_held = self.aliases.reference(a)
        self._used(z_held, a)
        self._add(event, origin, a)
        if self.wants.layer(origin.name):
            a_axes = sigma_axes(channels.axes, z, a)
            new_z, new_a = (None, None) if edited is None else (edited.z_edited, edited.a_edited)
            self.hold(event, "x", "preactivation", z_held, channels.axes, edited=new_z)
            self.hold(event, "y", "activation", event.y_held, a_axes, edited=new_a)

    def layer(self, event: Event, name: str, out: Tensor, axes: ChannelLayout | None) -> Origin:
        """A layer has run: where the filters of what it returned come from."""
        origin = self.next_call("layer", name)
        event.axes = axes
        self.labels.put(out, ChannelLabel(origin, axes))
        self._add(event, origin, out)
        return origin

    def layer_maps(
        self,
        event: Event,
        x: Tensor | None,
        out: Tensor,
        edited: StoredTensor | None = None,
        was: Tensor | None = None,
    ) -> None:
        """Hold a layer's maps.

        Args:
            edited: what goes on in the place of what it returned.
            was: its input before it was edited; None where it was not.
        """
        origin, axes, kinds = event.origin, event.axes, self.wants.kinds
        if x is not None and "input" in kinds:
            event.x_held = self.aliases.reference(x if was is None else was)
            self._used(event.x_held, out)
            if self.wants.filters is None:
                its = self._input_axes(x, out, axes)
                new = None if was is None else self.aliases.reference(x)
                self.hold(event, "x", "input", event.x_held, its, edited=new)
            else:
                self.miss(origin.name, Reason.FILTERS_OF_INPUT.text())
        if "response" in kinds or "preactivation" in kinds:
            event.y_held = self.aliases.reference(out)
            for kind in ("response", "preactivation"):
                if kind in kinds:
                    self.hold(event, "y", kind, event.y_held, axes, edited=edited)

    def _used(self, held: StoredTensor, result: Tensor) -> None:
        """What is held was given to a call; a map in the graph may be used by others, too."""
        if held.gradient is not None and self.wants.detach:
            held.gradient.used_by(result)

    def _input_axes(
        self, x: Tensor, out: Tensor, axes: ChannelLayout | None
    ) -> ChannelLayout | None:
        """Where the filters of a layer's input lie; unknown, they lie as those of its output."""
        channels = self.labels.of(x)
        if isinstance(channels, ChannelLabel) and channels.axes is not None:
            return channels.axes
        if axes is None or axes.dim is None:
            return None
        place = axes.dim - out.dim()
        return ChannelLayout.single(x.dim() + place, x.shape[place]) if x.dim() >= -place else None

    def output(self, module: nn.Module, name: str, output: Any) -> Event | None:
        """A module has returned what is wanted as its output: an event; None if it has none."""
        if self.wants.filters is not None and not self.wants.kind("output"):
            self.miss(name, Reason.FILTERS_OF_OUTPUT.text())
        origin = self.next_call("output", name, f"{name}()")
        event = Event("output", module, module=module, origin=origin)
        found = leaves(output)
        closed = closed_parts(output)
        for path, part in closed:
            place = f" at {path}" if path else ""
            self.miss(name, Reason.CLOSED_OUTPUT.text(kind=part, place=place))
        if not found and not closed and self.wants.some and module in self.wants.asked_outputs:
            self.miss(name, Reason.NO_TENSOR.text(kind=type(output).__name__))
        for path, tensor in found:
            why = unheld(tensor)
            if why is not None:
                self.miss(name, why)
                continue
            channels = self.labels.of(tensor)
            axes = channels.axes if isinstance(channels, ChannelLabel) else None
            self.hold(event, path, "output", self.aliases.reference(tensor), axes, path)
        self.events.append(event)
        self.hook_points.fire(event)
        return event

    def norm(self, label: ChannelLabel, out: Tensor, axis: int, name: str) -> ChannelLabel:
        """A norm keeps the layer; where there is none, it is the nearest thing with filters."""
        if label.origin.kind == "layer" or out.dim() < 2:
            return label
        dim = axis % out.dim()
        return ChannelLabel(self.next_call("norm", name), ChannelLayout.single(dim, out.shape[dim]))

    def _add(self, event: Event, origin: Origin, result: Tensor) -> None:
        event.origin = origin
        event.graph = result.requires_grad
        event.joins = in_function()
        self.events.append(event)
        self.hook_points.fire(event)

    def next_call(self, kind: str, name: str, counted: str = "") -> Origin:
        """The next call of what goes by the name, or is counted by another one."""
        call = self.counts.get(counted or name, 0)
        self.counts[counted or name] = call + 1
        return Origin(kind, name, call)

    # -- what turns out later -----------------------------------------------------------------

    def claim(self, origin: Origin) -> None:
        """The filters have reached a nonlinearity: what it receives is their preactivation."""
        if origin.claimed:
            return
        origin.claimed = True
        dropped = self.pending.pop(id(origin), [])
        for event in reversed(self.events):
            if event.origin is origin and event.kind == "layer":
                pairs = [p for p in event.entries if p[1].kind == "preactivation"]
                for pair in pairs:
                    event.entries.remove(pair)
                dropped = [entry for _, entry in pairs]
                break
        for entry in dropped:
            entry.held = None

    def drop_since(self, start: int) -> None:
        """All events from there on, but outputs asked for, were parts of one that is to come."""
        parts = [event for event in self.events[start:] if event.kind != "output"]
        for event in parts:
            event.drop()
        self.events[start:] = [event for event in self.events[start:] if event.kind == "output"]

    def let_go(self, events: list[Event]) -> None:
        """Let go of the tensors that no map holds."""
        for event in events:
            for held in (event.x_held, event.y_held):
                if held is not None and not held.wanted:
                    held.release()

    def copy(self, tensor: Tensor) -> StoredTensor:
        """Hold the values as they are now, before a write that makes an event itself."""
        held = StoredTensor.copy(tensor, self.wants.detach, self.wants.gradients)
        if not self.wants.detach and held.tensor is not None and type(tensor) is Tensor:
            held.on_the_way = goes_on_from(tensor, held.tensor)
        return held

    # -- maps ---------------------------------------------------------------------------------

    def hold(
        self,
        event: Event,
        slot: str,
        kind: str,
        held: StoredTensor,
        axes: ChannelLayout | None,
        path: str = "",
        edited: StoredTensor | None = None,
    ) -> None:
        """Hold one map of an event, if it is wanted, and what went on in its place."""
        if kind not in self.wants.kinds and kind != "output":
            return
        origin, picked = event.origin, None
        if self.wants.filters is not None and kind != "output":
            if is_dtensor(held.tensor):
                self._unpicked.append((origin, event.kind == "layer" and kind == "preactivation"))
                return
            picked = self.wants.pick(origin.name, axes)
            if picked is None:
                self.miss(origin.name, self.wants.why_not(origin.name, axes))
                return
            try:
                held = self.taken(held, axes, picked)
            except NotSupportedError as error:
                self.miss(origin.name, str(error))
                return
        held.wanted = True
        if self.graph and in_function():
            self.miss(origin.name, Reason.NO_GRAPH.text())
        entry = MapRecord(kind, origin, held, axes, event.sigma, path, picked)
        if edited is not None:
            entry.edited = self._same_filters(entry, edited)
        event.entries.append((slot, entry))
        self.current.drop(None)
        self.current.segments.append(entry)
        if self.stop is not None:
            self.stop.saw(entry)

    def taken(
        self, held: StoredTensor, axes: ChannelLayout | None, picked: tuple[int, ...]
    ) -> StoredTensor:
        """A copy of some filters."""
        tensor, gradient = held.tensor, held.gradient
        assert tensor is not None and axes is not None
        if gradient is not None:
            held.wanted = held.wanted or gradient.of_view  # to learn of a write to it
            gradient = gradient.picked(*self.wants.place(axes, picked))
        taken = StoredTensor(self.wants.take(tensor, axes, picked), 0, True, gradient)
        taken.version = version_of(taken.tensor) if taken.tensor is not None else 0
        return taken

    def _same_filters(self, entry: MapRecord, held: StoredTensor) -> StoredTensor:
        """Of an edit, the filters that are held of the map."""
        if held.tensor is None or entry.picked is None or entry.axes is None:
            held.wanted = True
            return held
        return StoredTensor.copy(self.wants.take(held.tensor, entry.axes, entry.picked), False)
