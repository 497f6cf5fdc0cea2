"""How far a location of a map sees: its receptive field, in locations of the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fmapkit.errors import ArgumentError, MapLookupError, check_choice
from fmapkit.explain._fields import NONE, Fields
from fmapkit.explain._follow import Follow, Leaving
from fmapkit.explain._locations import checked_location, input_axes, map_axes
from fmapkit.explain._passes import (
    WantedMap,
    eager,
    exchanged,
    first_tensor,
    kept_state,
    step_by_step,
)
from fmapkit.explain._regular import Regular, regular
from fmapkit.explain.pictures import extent, overlay, side_by_side
from fmapkit.kinds import Kind
from fmapkit.map import FeatureMap
from fmapkit.model import run
from fmapkit.plot import spread_pixels
from fmapkit.torchlib.side_ops import copies

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Step = int | Fraction

# How long an axis of the input is made, where the fields are larger than the example; of tokens,
# how many times as long: their attention costs the square.
_LENGTHS = (512, 2048)
_TIMES = 4
_NARROW = 64  # the other axes meanwhile, where the model takes that


class Box(NamedTuple):
    """A part of an image, in pixels: rows from `top`, columns from `left`; half open."""

    top: int
    left: int
    bottom: int
    right: int


class Span(NamedTuple):
    """A part of a sequence: positions `start` to `stop`, half open."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """What of the input each location of a map sees.

    Attributes:
        layer: whose map it is.
        kind: of the map.
        call: which call of the layer.
        shape: locations of the map: rows and columns, or positions.
        input_shape: locations of the input along the axes that were followed.
        starts: the first location that each field has, (*shape, axes of the input), int64.
        stops: the one after its last; equal to the start where a field is empty.
        decided: Python code of the model, or the shape of a tensor, depended on values of the
            input: the fields are those of the path which this input took.
        assumed: operators of which all results were taken to depend on all of an operand, since
            they could not be looked into. Empty: the fields are exact.
    """

    layer: str
    kind: str
    call: int
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    starts: Tensor = field(repr=False)
    stops: Tensor = field(repr=False)
    decided: bool = False
    assumed: tuple[str, ...] = ()
    _longer: Callable[[int, int], tuple[Tensor, Tensor] | None] | None = field(
        default=None, repr=False
    )
    _lengths: tuple[int, ...] = field(default=(), repr=False)

    def box(self, *location: int) -> Any:
        """The smallest box that holds all that a location sees, cut at the border of the input.

        Args:
            location: row and column in the map, or position; negative ones count from the end.

        Returns:
            Of an image a `Box` (top, left, bottom, right), of a sequence a `Span` (start, stop), of
            a volume a tuple of `Span`s: half open, in locations of the input. Empty (all zeros)
            where a location sees nothing of the input.

        Raises:
            ArgumentError: the map has no such location.
        """
        said = f"box{location!r}"
        at = checked_location(location, self.shape, said, layer=self.layer, kind=self.kind)
        start, stop = self.starts[at].tolist(), self.stops[at].tolist()
        if len(start) == 2:
            return Box(start[0], start[1], stop[0], stop[1])
        spans = tuple(Span(a, b) for a, b in zip(start, stop, strict=True))
        return spans[0] if len(spans) == 1 else spans

    @property
    def whole(self) -> bool:
        """Whether every location sees from one end of the input to the other, along every axis."""
        ends = torch.tensor(self.input_shape)
        return bool((self.starts == 0).all() and (self.stops == ends).all())

    @property
    def size(self) -> tuple[int | None, ...]:
        """Locations of a field along each axis, where no border cuts it.

        Where the example is too small to tell, the model is run on a longer one, axis by axis. None
        where there is no such number: the map sees the whole input whatever its size, the fields do
        not lie regularly (as those of a map of a fixed size), or the model takes no other size.
        """
        return tuple(None if r is None else r.size for r in self._regular)

    @property
    def stride(self) -> tuple[Step | None, ...]:
        """Locations of the input from one field to the next; a fraction after upsampling."""
        return tuple(None if r is None else _plain(r.stride) for r in self._regular)

    @property
    def offset(self) -> tuple[int | None, ...]:
        """Where the field of location 0 begins: negative in the padding."""
        return tuple(None if r is None else r.offset for r in self._regular)

    @property
    def padding(self) -> tuple[int | None, ...]:
        """How much of the field of location 0 is padding (Araujo et al. 2019): -offset."""
        return tuple(None if o is None else -o for o in self.offset)

    @cached_property
    def _regular(self) -> list[Regular | None]:
        return [self._find(axis) for axis in range(len(self.input_shape))]

    def _find(self, axis: int) -> Regular | None:
        if len(self.shape) != len(self.input_shape):
            return None  # no axis of the map is that axis of the input
        own = _ends_along(self.starts, self.stops, axis, self.input_shape[axis])
        found = regular(*own)
        if found is not None or self._longer is None:
            return found
        for length in self._lengths:
            if length <= self.input_shape[axis]:
                continue
            larger = self._longer(axis, length)
            if larger is None:
                return None
            found = regular(*_ends_along(*larger, axis, length))
            if found is not None:  # a map of a fixed size has another stride there
                return found if found.holds(*own) else None
        return None

    def plot(self, *location: int, image: Any = None, effective: Tensor | None = None) -> Figure:
        """Draw the field of a location on the image (extra: `plot`); see `plot_field`."""
        return plot_field(self, location, image=image, effective=effective)


def plot_field(
    field: ReceptiveField,
    location: tuple[int, ...],
    *,
    image: Any = None,
    effective: Tensor | None = None,
) -> Figure:
    """Draw the field of a location as a box on the image; with `effective`, the heat map in it too.

    Args:
        field: of a map over an image.
        location: row and column in the map, or position; empty for the middle.
        image: a tensor or array (H, W), (1, H, W) or (3, H, W), in any range.
        effective: what `effective_field` gives for the same location.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ArgumentError: the input is no image, or there is no such location.
    """
    if len(field.input_shape) != 2:
        raise ArgumentError(
            f"a field is drawn on an image, and this input has locations {field.input_shape}"
        )
    location = location or tuple(n // 2 for n in field.shape)
    box = field.box(*location)
    figure, panes = side_by_side(1 if effective is None else 2, 4.4)
    from matplotlib.patches import Rectangle

    shown = np.zeros(field.input_shape) if image is None else spread_pixels(image)[0]
    for pane in panes:
        pane.imshow(shown, cmap="gray", extent=extent(field.input_shape), interpolation="nearest")
        corner, size = (box.left, box.top), (box.right - box.left, box.bottom - box.top)
        pane.add_patch(Rectangle(corner, *size, fill=False, edgecolor="#e4572e", linewidth=1.8))
    name = field.layer or "(model)"
    panes[0].set_title(
        f"{name} {location}: rows {box.top}–{box.bottom}, columns {box.left}–{box.right}",
        fontsize="medium",
    )
    if effective is not None:
        overlay(panes[1], effective, field.input_shape, signed=False)
        panes[1].set_title("effective field", fontsize="medium")
    return figure


def receptive_field(
    model: nn.Module,
    layer: Any,
    inputs: Any,
    *,
    kind: Kind | None = None,
    call: int | None = None,
    path: str | None = None,
    axes: int | Sequence[int] | None = None,
    weights: Literal["any", "own"] = "any",
) -> ReceptiveField:
    """What of the input each location of a map sees: size, stride, offset, and the box of each.

    One pass over an example tells it for any architecture: beside each tensor go, element by
    element, the first and last location that it depends on, through every operator that torch runs.
    Nothing is told from layers, so branches, dilation, functional layers, attention and its masks
    are as any other. A location depends on what *can* change it: dead units and other values of the
    weights make no difference, constant zeros (a mask on a kernel, a causal mask) do.

    For a stack of convolutions it is the closed form of Araujo, Norris & Sim, "Computing Receptive
    Fields of Convolutional Neural Networks" (Distill 2019).

    Args:
        model: any `nn.Module`. It is run as it is, in its own mode; its buffers and the random
            state are put back.
        layer: whose map: a name, module, or whatever else `maps.select(layer=)` takes that means
            one.
        inputs: an example of what the model is given: its argument, a tuple of its arguments, or a
            dict of those by name. What is followed is the first tensor in it.
        kind: of the map; by default the activation, or the preactivation where no nonlinearity
            follows, or what a module returns that is no layer with filters.
        call: which call of the layer, where it has several.
        path: place in a nested output.
        axes: which axes of the input are its locations; by default those after samples and channels
            of an image (4 axes) or a volume (5), and the last one of token numbers.
        weights: "any": a weight that happens to be 0 (before training, say) counts; "own": it does
            not. Masks that are buffers cut in either case.

    Returns:
        The fields of all locations.

    Raises:
        NotAModuleError: `model` is no module.
        ArgumentError: there is no input to follow, or its axes have to be said.
        MapLookupError: there is no such map, or there are several.
    """
    model = eager(model, "receptive_field")
    check_choice(("any", "own"), weights=weights)
    tensor = first_tensor(inputs, "receptive_field")
    along = input_axes(tensor, axes)
    asked = _WantedField(model, WantedMap(layer, kind, call, path), along, weights)
    fm, shape, starts, stops, follow = asked.fields(inputs)
    return ReceptiveField(
        fm.layer,
        fm.kind,
        fm.call,
        shape,
        tuple(tensor.shape[a] for a in along),
        starts,
        stops,
        follow.decided,
        tuple(follow.assumed),
        lambda axis, length: asked.longer(inputs, axis, length),
        _LENGTHS if tensor.is_floating_point() else (_TIMES * tensor.shape[along[0]],),
    )


@dataclass(frozen=True)
class _WantedField:
    """Whose fields are wanted."""

    model: nn.Module
    map: WantedMap
    axes: tuple[int, ...]
    weights: str

    def fields(
        self, inputs: Any, partly: bool = False
    ) -> tuple[FeatureMap, tuple[int, ...], Tensor, Tensor, Follow]:
        """Run the model, which may fail `partly` once the map is there, and read its fields."""
        given = first_tensor(inputs, "receptive_field")
        tensor = given.detach().clone()  # in memory of its own: it may be a part of a data set
        inputs = exchanged(inputs, given, tensor)
        fields = Fields(len(self.axes), self.model.parameters() if self.weights == "any" else ())
        fields.put(tensor, _own(tensor, self.axes))
        follow = Follow(fields)
        with (
            kept_state(self.model),
            torch.no_grad(),
            step_by_step(),
            self.map.capture(self.model) as maps,
            follow,
            Leaving(follow),
            copies(lambda tensor, copy: fields.put(copy, fields.of(tensor))),
        ):
            try:
                run(self.model, inputs)
            except Exception:
                if not partly:
                    raise
        fm = self.map.among(maps)
        where = map_axes(fm, tensor, self.axes)
        shape = tuple(fm.shape[a] for a in where)
        found = fields.of(fm.tensor)
        if found is None and fm.kind == "attention":
            raise ArgumentError(
                f"receptive_field follows what the model computes, and torch fuses the attention "
                f"of layer {fm.layer!r}, which was computed beside it; ask for its output",
                layer=fm.layer,
            )
        starts, stops = _read(found, fm.tensor, where, len(self.axes))
        return fm, shape, starts, stops, follow

    def longer(self, inputs: Any, axis: int, length: int) -> tuple[Tensor, Tensor] | None:
        """The fields where the input has another length along an axis; None if it must not."""
        tensor = first_tensor(inputs, "receptive_field")
        wide = {self.axes[axis]: length}
        others = [a for i, a in enumerate(self.axes) if i != axis and tensor.shape[a] > _NARROW]
        trials = [wide | dict.fromkeys(others, _NARROW)] if others else []
        for sizes in (*trials, wide):
            try:
                longer = exchanged(inputs, tensor, _tiled(tensor, sizes))
                return self.fields(longer, partly=True)[2:4]
            except (MapLookupError, RuntimeError, ValueError, AssertionError, IndexError):
                continue  # the model takes no input of that size
        return None


def _own(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The field of the input itself: of each element, its own location."""
    rows = torch.full((2 * len(axes) + 1, *tensor.shape), NONE, dtype=torch.int32)
    for i, axis in enumerate(axes):
        shape = [1] * tensor.dim()
        shape[axis] = -1
        places = torch.arange(tensor.shape[axis], dtype=torch.int32).reshape(shape)
        rows[2 * i], rows[2 * i + 1] = places, -places
    return rows.to(tensor.device)


def _read(
    found: Tensor | None, tensor: Tensor, where: tuple[int, ...], axes: int
) -> tuple[Tensor, Tensor]:
    """First and last location by location of the map, over all samples and filters."""
    shape = [tensor.shape[a] for a in where]
    if found is None:
        empty = torch.zeros(*shape, axes, dtype=torch.int64)
        return empty, empty.clone()
    found = found[:-1].cpu().long()
    others = [a + 1 for a in range(tensor.dim()) if a not in where]
    found = found.amin(others) if others else found
    starts, stops = found[0::2].movedim(0, -1), 1 - found[1::2].movedim(0, -1)
    nothing = starts >= NONE
    return starts.masked_fill(nothing, 0), stops.masked_fill(nothing, 0)


def _ends_along(
    starts: Tensor, stops: Tensor, axis: int, length: int
) -> tuple[list[int], list[int], int]:
    """Where fields begin and end along an axis, and the length of that."""
    others = [a for a in range(starts.dim() - 1) if a != axis]
    first, last = starts[..., axis], stops[..., axis]
    if others:  # together, but for those that see nothing
        first = first.masked_fill(last == first, length).amin(others)
        last = last.amax(others)
        first = torch.minimum(first, last)
    return first.tolist(), last.tolist(), length


def _tiled(tensor: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """The example, repeated or cut along some axes."""
    for axis, size in sizes.items():
        places = torch.arange(size, device=tensor.device) % tensor.shape[axis]
        tensor = tensor.index_select(axis, places)
    return tensor


def _plain(value: Fraction) -> Step:
    return value.numerator if value.denominator == 1 else value
