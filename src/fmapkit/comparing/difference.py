"""How far two maps are apart: absolute and relative error, cosine; in double precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmapkit.errors import ArgumentError, DistributedError
from fmapkit.readable import tags
from fmapkit.torchlib.sharded import is_dtensor

if TYPE_CHECKING:
    from fmapkit.kinds import Kind
    from fmapkit.map import FeatureMap

# How many roundings of the coarser type, of half a unit in the last place each, are no difference.
ROUNDINGS = 16


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a map b is from a map a.

    Attributes:
        layer: of a.
        other: the layer of b; the same, where the two go by the same names.
        kind: of both.
        call: which call of the layer.
        path: place in a nested output; else "".
        nonlinearity: σ of a.
        shape: of both.
        dtypes: of a and of b.
        absolute: the greatest |a - b|; infinite where one of them has a NaN or an infinite value
            that the other has not.
        relative: ‖a - b‖ / ‖a‖, in the Euclidean norm over the whole map (Higham, "Accuracy and
            Stability of Numerical Algorithms", 2002, section 6.2); infinite as `absolute`, and
            where a is zero and b is not.
        cosine: of the angle between a and b as vectors: 1 where they are equal; 0 where one is zero
            and the other is not; NaN where `absolute` is infinite.
        filter: the filter in which |a - b| is greatest; None where they are equal, or have no
            filter axis.
        tolerance: the relative error up to which the two are taken for the same.
        equal: all values are the same, NaN at the same places included.
    """

    layer: str
    other: str
    kind: Kind
    call: int
    path: str
    nonlinearity: str | None
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    absolute: float
    relative: float
    cosine: float
    filter: int | None
    tolerance: float
    equal: bool

    @property
    def departs(self) -> bool:
        """Whether the relative error is beyond the tolerance."""
        return not self.relative <= self.tolerance


def difference(
    a: FeatureMap, b: FeatureMap, tolerance: float | None, gradients: bool = False
) -> Difference:
    """Compare two maps, or their gradients.

    Args:
        a: the one that is taken for right.
        b: the other; it may be of another type, and on another device.
        tolerance: of the relative error; None for 16 roundings of the coarser type.
        gradients: compare `grad` in place of the values.

    Raises:
        ArgumentError: they have other shapes or filters, are of inputs of other numbers, or have no
            gradient.
        DistributedError: one is a `DTensor`.
    """
    _check_alike(a, b)
    x, y = (_values(fm, gradients) for fm in (a, b))
    if tolerance is None:
        tolerance = ROUNDINGS / 2 * max(_eps(x.dtype), _eps(y.dtype))
    dim = a.filter_dim
    dtypes = (x.dtype, y.dtype)
    home = x.device if x.device.type != "mps" else torch.device("cpu")  # which has no doubles
    with torch.inference_mode(False), torch.no_grad():
        absolute, relative, cosine, place = _measured(_double(x, home), _double(y, home), dim)
    there = a.filters
    return Difference(
        *(a.layer, b.layer, a.kind, a.call, a.path, a.nonlinearity, tuple(a.shape), dtypes),
        *(absolute, relative, cosine),
        there[place] if place is not None and there is not None else None,
        tolerance,
        equal=absolute == 0,
    )


_SMALL, _LARGE = 1e-100, 1e100


def _measured(x: Tensor, y: Tensor, dim: int | None) -> tuple[float, float, float, int | None]:
    """Absolute and relative error, cosine, and where along an axis the first is greatest."""
    if not x.numel():
        return 0.0, 0.0, 1.0, None
    top = float(torch.maximum(x.abs().max(), y.abs().max()))
    if _SMALL < top < _LARGE:  # finite numbers, whose squares are numbers, too
        u, v, apart = x, y, x - y
        error = apart = apart.abs()
    else:
        error, apart, u, v = _with_care(x, y)
    worst = (
        error.amax([d for d in range(error.dim()) if d != dim % error.dim()]).argmax()
        if dim is not None and error.dim() > 1
        else error.argmax()
    )
    numbers = torch.stack((*(error.max(), _dot(apart, apart), _dot(u, u), _dot(v, v), _dot(u, v)),))
    absolute, dd, xx, yy, xy = numbers.tolist()
    place = int(worst) if dim is not None else None
    if absolute == 0:
        return 0.0, 0.0, 1.0, None
    if math.isinf(absolute):
        return absolute, math.inf, math.nan, place
    relative = math.sqrt(dd / xx) if xx else math.inf
    cosine = xy / math.sqrt(xx * yy) if xx and yy else 0.0
    return absolute, relative, max(-1.0, min(1.0, cosine)), place


def _dot(u: Tensor, v: Tensor) -> Tensor:
    found: Tensor = torch.vdot(u.reshape(-1), v.reshape(-1)).real
    return found


def _with_care(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The error, and it, x and y in a unit in which squares neither overflow nor vanish.

    An infinity or NaN that both have is no error; one that one of them has is an infinite one.
    """
    same = (x == y) | (x.isnan() & y.isnan())
    finite = x.isfinite() & y.isfinite()
    x, y = (torch.where(finite, t, 0.0) for t in (x, y))
    error = torch.where(finite, (x - y).abs(), torch.where(same, 0.0, torch.inf))
    scale = torch.maximum(x.abs().max(), y.abs().max())
    unit = torch.where(scale > 0, scale, 1.0)
    return error, torch.where(error.isfinite(), error, 0.0) / unit, x / unit, y / unit


def _values(fm: FeatureMap, gradient: bool) -> Tensor:
    tensor = fm.grad if gradient else fm.tensor
    if tensor is None:
        raise ArgumentError(
            f"the {fm.kind} of layer {fm.layer!r} has no gradient: capture(gradients=True), and "
            "compare after backward",
            **tags(fm),
        )
    if is_dtensor(tensor):
        raise DistributedError(
            f"the {fm.kind} of layer {fm.layer!r} is a DTensor over several ranks: compare what "
            "full() gives, or .tensor.to_local()",
            **tags(fm),
        )
    if tensor.is_nested or tensor.device.type == "meta":
        what = "nested" if tensor.is_nested else "on the meta device, without values"
        raise ArgumentError(
            f"the {fm.kind} of layer {fm.layer!r} is {what}: leave it out with layers=",
            **tags(fm),
        )
    return tensor.detach()


def _double(tensor: Tensor, home: torch.device) -> Tensor:
    tensor = tensor.to(home)
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.to(torch.complex128) if tensor.is_complex() else tensor.double()


_QUANTIZED = frozenset({torch.qint8, torch.quint8, torch.qint32})


def _eps(dtype: torch.dtype) -> float:
    if dtype in _QUANTIZED:  # as many bits, of which one is the sign's
        return float(2.0 ** (1 - torch.iinfo(dtype).bits))
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def _check_alike(a: FeatureMap, b: FeatureMap) -> None:
    name = a.layer if a.layer == b.layer else f"{a.layer}' and '{b.layer}"
    which: dict[str, Any] = {"layer": a.layer, "kind": a.kind, "call": a.call}
    for what, was, now in (
        ("shape", tuple(a.shape), tuple(b.shape)),
        ("filters", _filters(a), _filters(b)),
    ):
        if was != now:
            raise ArgumentError(
                f"the {a.kind} of {name!r} has {what} {was} in the first and {now} in the second: "
                "give both models the same input, and hold the same filters",
                **which,
            )
    if a.ids is not None and b.ids is not None and not torch.equal(a.ids.cpu(), b.ids.cpu()):
        raise ArgumentError(
            f"the {a.kind} of {name!r} is of other inputs in the second, by the numbers that "
            "maps.batch gave: give both models the same input; step= says which pass of each",
            **which,
        )


def _filters(fm: FeatureMap) -> tuple[int, ...] | None:
    return None if fm.filters is None else tuple(fm.filters)
