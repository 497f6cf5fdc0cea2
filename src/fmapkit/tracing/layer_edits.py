"""Where an edit belongs in a traced pass: around a nonlinearity, or after a layer.

Three cases differ. A function's operands and result can be exchanged on the spot. A module that is
one nonlinearity gets another argument, and another result. And where σ works in place, the model
reads the result from the memory of z: σ then runs on a stand-in, and what is to go on is written
into z afterwards, as σ itself would have done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fmapkit.editing import RequestedEdits
from fmapkit.nonlinearities import module_sigma
from fmapkit.provenance import STOP, ChannelLabel, ChannelLayout, Label, channels_of, out_of_place
from fmapkit.storage import StoredTensor
from fmapkit.torchlib.memory import version_of
from fmapkit.torchlib.nested import tensors_in
from fmapkit.tracing.candidates import name_by_hand
from fmapkit.tracing.frames import EditSite, Frame, SigmaCall
from fmapkit.tracing.module_edits import ModuleEdits
from fmapkit.tracing.pass_trace import HIDDEN, PassTrace

COMPARED = (
    "its preactivation is compared before the nonlinearity ({}) runs that chooses by that, and "
    "another one cannot be put in its place; its activation may be edited"
)
HOOKED = (
    "a hook on {!r} changes what its nonlinearity has given, before another activation could be "
    "put in the place of that; edit what the hook makes of it, the output of {!r}"
)


class LayerEdits:
    """Carries out the edits of one pass."""

    def __init__(
        self, trace: PassTrace, edits: RequestedEdits, tried: Callable[[Frame], tuple[bool, bool]]
    ) -> None:
        self.trace = trace
        self.edits = edits
        self._tried = tried  # whether a module by hand is one σ, and works in place
        self.modules = ModuleEdits(trace, edits)

    def _site(self, own: str, sigma: str, z: Tensor) -> EditSite | None:
        """The nonlinearity that is about to run, if there is something to edit."""
        trace = self.trace
        label = trace.labels.of(z)
        channels = label if isinstance(label, ChannelLabel) else STOP
        none = channels.origin.kind == "none"
        name = own if none else channels.origin.name
        if not any(self.edits.of(name, kind) for kind in ("preactivation", "activation")):
            return None
        trace.edited = True
        call = trace.record.counts[own] if none else channels.origin.call
        return EditSite(name, call, sigma, channels.axes, z)

    def _apply(
        self, site: EditSite, kind: str, tensor: Tensor, axes: ChannelLayout | None
    ) -> Tensor | None:
        at = self.trace.record.current
        labels: dict[str, Any] = {"call": site.call, "nonlinearity": site.sigma}
        return self.edits.apply(kind, tensor, axes, site.name, at, **labels)

    # -- functions ----------------------------------------------------------------------------

    def before(self, call: SigmaCall, own: str, in_place: bool) -> None:
        """A function is about to run; it may get another z."""
        if any(f.site is not None for f in self.trace.frames):
            return  # a part of a module that is one σ
        if in_place and call.args[0] is not call.z:
            return  # it writes to what its operand is compared by
        site = self._site(own, call.sigma, call.z)
        if site is None:
            return
        call.site = site
        channel_labels = [
            t for t in tensors_in(*call.args, call.kwargs) if channels_of(self.trace.labels.of, t)
        ]
        if len(channel_labels) > 1 and self.edits.of(site.name, "preactivation"):
            self._refuse(site.name, "preactivation", COMPARED.format(call.sigma), site.call)
        stand_in = call.z
        call.kwargs = dict(call.kwargs)
        if "out" in call.kwargs:
            site.base = call.kwargs.pop("out")
        elif in_place:
            site.base = call.z
        if site.base is call.z:  # which will be overwritten: an edit may have to keep what it got
            stand_in = call.z.clone()
        alone = len(channel_labels) == 1
        new = self._apply(site, "preactivation", stand_in, site.axes) if alone else None
        if new is not None:
            self._follow(new, call.z)
            site.z_edited = self.trace.record.aliases.reference(new)
            stand_in = new.clone() if in_place else new
        if in_place:
            other = out_of_place(call.function, call.args, call.kwargs)
            if other is not None:
                call.function, call.args, call.kwargs = other
        call.args, call.kwargs = exchanged(call.args, call.kwargs, call.z, stand_in)

    def after(self, site: EditSite, a: Tensor, axes: ChannelLayout | None) -> Tensor:
        """The function has run; what it is to return."""
        new = self._apply(site, "activation", a, axes)
        if new is not None:
            site.a_edited = self.trace.record.aliases.reference(new)
        return self._put(site, a if new is None else new)

    def refuse_hidden(self, label: Label, module: nn.Module) -> None:
        """Filters of a layer have reached a module of which it is not told what it is as a whole.

        Raises:
            EditError: an edit is for them.
        """
        if not isinstance(label, ChannelLabel):
            return
        origin, why = label.origin, HIDDEN.format(self.trace.names.of(module))
        for kind in ("preactivation", "activation"):
            self._refuse(origin.name, kind, why, origin.call)

    def _put(self, site: EditSite, result: Tensor) -> Tensor:
        if site.base is None:
            return result
        self.trace.record.aliases.before_write(site.base)
        return site.base.copy_(result)

    def _follow(self, new: Tensor, old: Tensor) -> None:
        self.trace.labels.put(new, self.trace.labels.of(old))

    def refuse_hooked(self, frame: Frame) -> None:
        """A hook of the user's has run on what the nonlinearity of a module gave.

        Raises:
            EditError: an edit is for that.
        """
        assert frame.site is not None
        name = self.trace.names.of(frame.module)
        self._refuse(frame.site.name, "activation", HOOKED.format(name, name), frame.site.call)

    def _refuse(self, name: str, kind: str, why: str, call: int) -> None:
        self.edits.refuse(name, kind, why, call, self.trace.record.current.step)

    # -- modules that are one nonlinearity ----------------------------------------------------

    def enter(self, frame: Frame) -> None:
        """A module is about to run; it may get another z."""
        x = frame.x
        outer = [f for f in self.trace.frames if f is not frame]
        if x is None or any(f.site is not None or f.kind == "sigma" for f in outer):
            return
        own = self.trace.names.of(frame.module)
        sigma = module_sigma(frame.module) or name_by_hand(frame.module)
        known = self.trace.edited
        site = self._site(own, sigma, x)
        if site is None:
            return
        in_place = bool(frame.module.__dict__.get("inplace"))
        if frame.kind == "candidate":
            paused, self.trace.paused = self.trace.paused, True
            try:
                sigma_at_all, in_place = self._tried(frame)
            finally:
                self.trace.paused = paused
            if not sigma_at_all:
                self.trace.edited = known  # its functions are looked at one by one
                return
        frame.site = site
        stand_in = x.clone() if in_place else x
        new = self._apply(site, "preactivation", stand_in, site.axes)
        if new is not None:
            held = StoredTensor.copy if in_place else StoredTensor.reference
            site.z_edited = held(new, self.trace.wants.detach)
            stand_in = new
        if stand_in is not x:
            self._follow(stand_in, x)
            frame.replaced = exchanged(frame.args, frame.kwargs, x, stand_in)
            frame.take(stand_in)
        site.version = version_of(stand_in)

    def leave(self, frame: Frame, a: Tensor, axes: ChannelLayout | None) -> tuple[Tensor, Tensor]:
        """The module has run: what σ gave, and what the module is to return."""
        site, x = frame.site, frame.x
        assert site is not None and x is not None
        overwritten = frame.in_place or version_of(x) != site.version
        new = self._apply(site, "activation", a.clone() if overwritten else a, axes)
        if new is not None:
            site.a_edited = self.trace.record.aliases.reference(new)
        if overwritten:  # the model may read the result from the memory of z
            site.base = site.z if x is not site.z or new is not None else None
            a = a.clone() if a is site.base else a
        return a, self._put(site, a if new is None else new)

    # -- layers -------------------------------------------------------------------------------

    def response(
        self, name: str, call: int, out: Tensor, axes: ChannelLayout | None
    ) -> tuple[Tensor, StoredTensor] | None:
        """A layer has run; what it is to return, if that is to be changed."""
        if not self.edits.of(name, "response"):
            return None
        self.trace.edited = True
        new = self.edits.apply("response", out, axes, name, self.trace.record.current, call=call)
        if new is None:
            return None
        self._follow(new, out)
        return new, self.trace.record.aliases.reference(new)


def exchanged(args: Any, kwargs: Any, old: Tensor, new: Tensor) -> tuple[Any, Any]:
    """The same arguments with one tensor in another's place."""
    return (
        tuple([new if a is old else a for a in args]),
        {k: new if v is old else v for k, v in kwargs.items()},
    )
