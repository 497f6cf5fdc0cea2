"""Gradients of a map at the input: a projection, and the effective receptive field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fmapkit.errors import ArgumentError, EditError, check_choice
from fmapkit.explain._locations import (
    At,
    chosen,
    has_samples,
    input_axes,
    map_axes,
    no_locations,
)
from fmapkit.explain._passes import WantedMap, differentiating, eager, first_tensor
from fmapkit.kinds import Kind
from fmapkit.map import FeatureMap
from fmapkit.model import run
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
    tensor = _differentiable(inputs, "project")
    along = input_axes(tensor, axes) if at is not None or axes is not None else ()
    rectifiers = None if method == "gradient" else _Rectifiers(method)

    def signal(fm: FeatureMap, head: Tensor) -> Tensor:
        mask = chosen(fm, tensor, along, filter, at)
        return mask.to(head.dtype) if start == "ones" else head.detach() * mask

    wanted = WantedMap(layer, kind, call, path)
    try:
        edits = None if rectifiers is None else rectifiers.edits()
        fm, found = _sent_back(model, inputs, tensor, wanted, signal, edits)
    except EditError as error:
        raise ArgumentError(_UNSEEN.format(method, error)) from error
    if rectifiers is not None:
        rectifiers.check(fm)
    return found


def effective_field(
    model: nn.Module,
    layer: Any,
    inputs: Any,
    *,
    at: At = None,
    filter: int | None = None,
    kind: Kind | None = None,
    call: int | None = None,
    path: str | None = None,
    axes: int | tuple[int, ...] | None = None,
) -> Tensor:
    """How much each location of the input matters to a location of a map, in the mean over inputs.

    Luo, Li, Urtasun & Zemel, "Understanding the Effective Receptive Field in Deep Convolutional
    Neural Networks" (2016): the gradient of the location, its absolute value, in the mean over
    samples, summed over the channels of the input. The theoretical field (`receptive_field`) says
    where it can be other than zero.

    Args:
        model: any `nn.Module`, run as it is. Nothing is left on it.
        layer: whose map: a name, module, or whatever else `maps.select(layer=)` takes that means
            one.
        inputs: what the model is given, as in `receptive_field`: many samples, drawn from data or
            at random, since the gradient of one is noise.
        at: the location; by default the middle of the map.
        filter: one filter; by default the sum of all.
        kind: of the map, as in `receptive_field`.
        call: which call of the layer, where it has several.
        path: place in a nested output.
        axes: which axes of the input are its locations.

    Returns:
        (H, W), or along whatever axes of locations the input has.

    Raises:
        NotAModuleError: `model` is no module.
        ArgumentError: the input is not differentiable (tokens), or an argument cannot be meant.
        MapLookupError: there is no such map, or there are several.
    """
    model = eager(model, "effective_field")
    tensor = _differentiable(inputs, "effective_field")
    along = input_axes(tensor, axes)

    def signal(fm: FeatureMap, head: Tensor) -> Tensor:
        place = at
        if place is None:
            where = map_axes(fm, tensor, along)
            if not where:
                raise no_locations(fm)
            place = tuple(fm.shape[a] // 2 for a in where)
        return chosen(fm, tensor, along, filter, place).to(head.dtype)

    fm, found = _sent_back(model, inputs, tensor, WantedMap(layer, kind, call, path), signal)
    found = found.abs()
    if has_samples(fm, along):
        found = found.mean(0, keepdim=True)
    others = [a for a in range(found.dim()) if a not in along]
    return found.sum(others) if others else found


def _differentiable(inputs: Any, what: str) -> Tensor:
    """The input, if gradients can get to it."""
    tensor = first_tensor(inputs, what)
    if not tensor.is_floating_point():
        raise ArgumentError(
            f"{what} differentiates by the model's input, and this one is of {tensor.dtype}: give "
            "the model its embeddings instead, or use occlusion"
        )
    return tensor


def _sent_back(
    model: nn.Module,
    inputs: Any,
    tensor: Tensor,
    wanted: WantedMap,
    signal: Callable[[FeatureMap, Tensor], Tensor],
    edit: dict[Any, Any] | None = None,
) -> tuple[FeatureMap, Tensor]:
    """Run the model, and send something from a map back to its input: the map, and what arrives.

    Args:
        signal: of the map, and of what went on in its place, what is sent back.
    """
    with (
        differentiating(model, inputs, tensor) as (x, given),
        wanted.capture(model, detach=False, edit=edit) as maps,
    ):
        run(model, given)
        fm = wanted.among(maps)
        head = fm.tensor if fm.edited is None else fm.edited
        found, back = None, signal(fm, head)
        if head.requires_grad:
            (found,) = torch.autograd.grad(head, x, back, allow_unused=True)
    if found is None:
        raise ArgumentError(
            f"no differentiable path leads from the input to the {fm.kind} of layer {fm.layer!r}: "
            "the model detaches it, or runs there without gradients",
            **tags(fm),
        )
    return fm, found


class _Rectifiers:
    """What becomes of gradients at each ReLU, by edits that change no value."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.passed = 0
        self.unknown: list[str] = []
        self._received: dict[tuple[str, int], Tensor] = {}

    def edits(self) -> dict[Any, Any]:
        """For `capture(edit=...)`."""
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
    exactly: dict[str, Any] = {"rtol": 0, "atol": 0, "equal_nan": True}
    return any(torch.allclose(a, b, **exactly) for b in (positive, positive.clamp(max=6)))


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
