"""A map projected down to the input: what of the input did it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fmapkit.errors import ArgumentError, EditError, check_choice
from fmapkit.explain._axes import input_axes
from fmapkit.explain._locations import At, chosen
from fmapkit.explain._passes import WantedMap, eager, exchanged, first_tensor, kept_state, run
from fmapkit.kinds import Kind
from fmapkit.map import FeatureMap
from fmapkit.readable import tags

_UNSEEN = (
    "method={!r} has to see what each nonlinearity receives, and here it cannot: {}; "
    "use method='gradient'"
)


def project(
    model: nn.Module,
    inputs: Any,
    layer: Any,
    filter: int | None = None,
    *,
    method: Literal["deconvnet", "guided", "gradient"] = "deconvnet",
    at: At = None,
    start: Literal["ones", "map"] = "ones",
    kind: Kind | None = None,
    call: int | None = None,
    path: str | None = None,
    axes: int | tuple[int, ...] | None = None,
) -> Tensor:
    """Project a map, one filter of it, or one location down to the input.

    All other elements of the map are set to zero, and what is left goes back through the layers:
    convolutions transposed, pooling by the switches of the forward pass. At each ReLU

    - "gradient" (Simonyan, Vedaldi & Zisserman 2014) passes on what comes where the unit was
      active;
    - "deconvnet" (Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", 2014)
      passes on what is positive of what comes;
    - "guided" (Springenberg et al., "Striving for Simplicity", 2015) does both.

    A ReLU is known by what it did, z in and max(z, 0) out, be it a module, a function, a method, in
    place, or a clamp; so is ReLU6. Other nonlinearities pass on their gradient, as all else does.

    Args:
        model: any `nn.Module`, run as it is, in its own mode. Nothing is left on it: no gradients
            of parameters, and buffers and the random state are put back.
        inputs: the model's argument, a tuple of its arguments, or a dict of those by name. The
            projection is to the first tensor in it, of a floating-point type.
        layer: whose map: a name, module, or whatever else `maps.select(layer=)` takes that means
            one.
        filter: one filter; None for all.
        method: what a ReLU passes on.
        at: a location of the map, such as (row, column); a list with one for each sample;
            "strongest" for the largest of each sample; None for all.
        start: what goes back at first: 1 at each element that is left ("ones"), which makes it a
            gradient of their sum, or their values ("map"), as in a deconvnet. Of one location, that
            is a factor.
        kind: of the map; by default the activation, or the preactivation where no nonlinearity
            follows, or what a module returns that is no layer with filters.
        call: which call of the layer, where it has several.
        path: place in a nested output.
        axes: which axes of the input are its locations (see `receptive_field`).

    Returns:
        The projection: a tensor of the input's shape, dtype and device.

    Raises:
        NotAModuleError: `model` is no module.
        ArgumentError: an argument cannot be meant; the input is not differentiable (tokens), or the
            map is not on a differentiable path from it; there is no ReLU for `method` to act on; or
            a nonlinearity cannot be told.
        MapLookupError: there is no such map, or there are several.
        FilterRangeError: there is no such filter.
    """
    model = eager(model, "project")
    check_choice(("deconvnet", "guided", "gradient"), method=method)
    check_choice(("ones", "map"), start=start)
    tensor = differentiable(inputs, "project")
    along = input_axes(tensor, axes) if at is not None or axes is not None else ()
    rectifiers = _Rectifiers(method)
    wanted = WantedMap(layer, kind, call, path)
    with kept_state(model), torch.inference_mode(False), torch.enable_grad():
        x = tensor.detach().clone().requires_grad_()
        given = exchanged(inputs, tensor, x)
        try:
            with wanted.capture(model, detach=False, edit=rectifiers.edits()) as maps:
                run(model, given)
                fm = wanted.among(maps)
                head = fm.tensor if fm.edited is None else fm.edited
                mask = chosen(fm, tensor, along, filter, at)
                signal = mask.to(head.dtype) if start == "ones" else head.detach() * mask
                found = gradient_of(fm, head, x, signal)
        except EditError as error:
            raise ArgumentError(_UNSEEN.format(method, error)) from error
    rectifiers.check(fm)
    return found


def differentiable(inputs: Any, what: str) -> Tensor:
    """The input, if gradients can get to it.

    Raises:
        ArgumentError: there is none, or it is of integers.
    """
    tensor = first_tensor(inputs, what)
    if not tensor.is_floating_point():
        raise ArgumentError(
            f"{what} differentiates by the model's input, and this one is of {tensor.dtype}: give "
            "the model its embeddings instead, or use occlusion"
        )
    return tensor


def gradient_of(fm: FeatureMap, head: Tensor, x: Tensor, signal: Tensor) -> Tensor:
    """What comes back at the input.

    Raises:
        ArgumentError: no differentiable path leads from the input to the map.
    """
    found = None
    if head.requires_grad:
        (found,) = torch.autograd.grad(head, x, signal, allow_unused=True)
    if found is None:
        raise ArgumentError(
            f"no differentiable path leads from the input to the {fm.kind} of layer {fm.layer!r}: "
            "the model detaches it, or runs there without gradients",
            **tags(fm),
        )
    return found


class _Rectifiers:
    """What becomes of gradients at each ReLU, by edits that change no value."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.passed = 0
        self.unknown: list[str] = []
        self._received: dict[tuple[str, int], Tensor] = {}

    def edits(self) -> dict[Any, Any] | None:
        """For `capture(edit=...)`."""
        if self.method == "gradient":
            return None
        return {("*", "preactivation"): self._before, ("*", "activation"): self._after}

    def _before(self, fm: FeatureMap) -> Tensor:
        # A copy, in the graph: what works in place is about to write to this very tensor.
        self._received[fm.layer, fm.call] = fm.tensor.clone()
        return fm.tensor

    def _after(self, fm: FeatureMap) -> Tensor:
        z, a = self._received.pop((fm.layer, fm.call), None), fm.tensor
        if not a.requires_grad:
            return a
        if z is None or z.shape != a.shape:
            # It compares z before it runs, or is a gate: what it did cannot be told.
            about = f"{fm.nonlinearity!r} of layer {fm.layer!r}"
            if z is None:
                a = a.clone()
                a.register_hook(lambda gradient: self.unknown.append(about))  # type: ignore[no-untyped-call]
            return a
        if not _rectified(fm, z.detach(), a.detach()):
            return a
        # Past the ReLU, or to what it gave, from where its own gradient goes on.
        to = z if self.method == "deconvnet" else a
        passed: Tensor = _Rectified.apply(to, a.detach(), self)  # type: ignore[no-untyped-call]
        return passed

    def check(self, fm: FeatureMap) -> None:
        """Raise unless the projection is what was asked for."""
        if self.method == "gradient":
            return
        if self.unknown:
            raise ArgumentError(
                _UNSEEN.format(
                    self.method, f"{self.unknown[0]} chooses by a comparison of what it receives"
                )
            )
        if not self.passed:
            raise ArgumentError(
                f"method={self.method!r} says what ReLUs pass on, and there is none between the "
                f"input and the {fm.kind} of layer {fm.layer!r}: use method='gradient'",
                **tags(fm),
            )


def _rectified(fm: FeatureMap, z: Tensor, a: Tensor) -> bool:
    """Whether σ was max(z, 0), or ReLU6's min(max(z, 0), 6)."""
    named = (fm.nonlinearity or "").lower() in ("relu", "relu6")
    if not named and not bool((z < 0).any()):
        return False  # the values do not tell it from any other that leaves these as they are
    positive = z.clamp(min=0)
    return torch.equal(a, positive) or torch.equal(a, positive.clamp(max=6))


class _Rectified(torch.autograd.Function):
    """The values of a; backward, the positive part of what comes goes to a tensor."""

    @staticmethod
    def forward(ctx: Any, to: Tensor, a: Tensor, rectifiers: _Rectifiers) -> Tensor:
        ctx.rectifiers = rectifiers
        return a.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.rectifiers.passed += 1
        return gradients[0].clamp(min=0), None, None
