"""What a map loses where a part of the input is covered."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fmapkit._lazy import with_bar
from fmapkit.errors import ArgumentError, CaptureWarning, check_positive, is_int
from fmapkit.explain._locations import At, chosen, has_samples, input_axes
from fmapkit.explain._passes import WantedMap, eager, first_tensor, kept_state
from fmapkit.explain.pictures import plot_heat
from fmapkit.kinds import Kind
from fmapkit.map import FeatureMap
from fmapkit.model import changed, run
from fmapkit.readable import tags

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Occlusion:
    """What `occlusion` has found.

    Attributes:
        usual: the sum of the chosen elements of the map, of each sample as it is, (N,).
        drops: how much less it is with a window covered, (N, *grid of windows): NaN where that has
            not been tried (see `complete`).
        starts: the first location of each window, by axis.
        window: locations that a window covers along each axis; the last ones are cut at the border.
        input_shape: locations of the input.
        complete: every window was tried; else the run was interrupted, and goes on with
            `occlusion(..., resume=this)`.
    """

    usual: Tensor
    drops: Tensor
    starts: tuple[tuple[int, ...], ...]
    window: tuple[int, ...]
    input_shape: tuple[int, ...]
    complete: bool
    _asked: tuple[Any, ...] = field(default=(), repr=False)

    def heat(self) -> Tensor:
        """For each location of the input, the mean drop of the windows that cover it: (N, *input).

        Windows that were not tried do not count; a location that none covers is 0.
        """
        drops = self.drops.movedim(0, -1)
        total = drops.new_zeros(*self.input_shape, drops.shape[-1])
        count = drops.new_zeros(*self.input_shape, 1)
        for cell in itertools.product(*map(range, drops.shape[:-1])):
            if self.complete or not bool(drops[cell].isnan().any()):
                where = _window(self.starts, self.window, cell)
                total[where] += drops[cell]
                count[where] += 1
        return (total / count.clamp(min=1)).movedim(-1, 0)

    def plot(self, image: Any = None, *, sample: int = 0) -> Figure:
        """Draw the heat map beside or on the image (extra: `plot`)."""
        return plot_heat(self.heat()[sample], image, title="drop of the map where it is covered")


def occlusion(
    model: nn.Module,
    inputs: Any,
    layer: Any,
    filter: int | None = None,
    window: int | Sequence[int] = 8,
    stride: int | Sequence[int] | None = None,
    *,
    at: At = None,
    fill: float | Tensor = 0,
    kind: Kind | None = None,
    call: int | None = None,
    path: str | None = None,
    axes: int | tuple[int, ...] | None = None,
    batch_size: int = 32,
    resume: Occlusion | None = None,
    show_progress: bool = True,
) -> Occlusion:
    """How much a map drops as a window slides over the input, covering what is there.

    Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (2014), section 4.2:
    what is watched is the total of one filter's map, or one location of it. Each pass ends at the
    layer.

    Args:
        model: any `nn.Module`, run as it is. In training mode, windows are tried one by one, since
            samples of a batch may take part in each other's norms.
        inputs: the model's argument, a tuple of its arguments, or a dict of those by name. Covered
            is the first tensor in it, an image or a sequence, token numbers included; of all others
            that have as many samples, each gets its own.
        layer: whose map: a name, module, or whatever else `maps.select(layer=)` takes that means
            one.
        filter: one filter; None for all.
        window: locations that are covered at once, along each axis.
        stride: locations from one window to the next; by default they do not overlap.
        at: a location of the map; a list with one for each sample; "strongest" for the largest of
            each sample as it is; None for all. A total is a sum.
        fill: what is put there: a number, or a tensor that broadcasts to the input: a grey, the
            mean image, the number of a mask token.
        kind: of the map; by default the activation, or the preactivation where no nonlinearity
            follows, or what a module returns that is no layer with filters.
        call: which call of the layer, where it has several.
        path: place in a nested output.
        axes: which axes of the input are its locations (see `receptive_field`).
        batch_size: how many covered inputs are run at once. A pass with nothing covered comes
            first: where samples take part in each other's maps, windows are tried one by one.
        resume: what an interrupted run has given; its windows are not tried again.
        show_progress: with tqdm, where that is installed and the output is a terminal.

    Returns:
        The drops. After Ctrl-C those so far, `complete` being False, with a `CaptureWarning`.

    Raises:
        NotAModuleError: `model` is no module.
        ArgumentError: an argument cannot be meant.
        MapLookupError: there is no such map, or there are several.
        FilterRangeError: there is no such filter.
    """
    model = eager(model, "occlusion")
    tensor = first_tensor(inputs, "occlusion")
    along = input_axes(tensor, axes)
    sizes = tuple(tensor.shape[a] for a in along)
    covered = _each(window, sizes, "window")
    steps = covered if stride is None else _each(stride, sizes, "stride")
    check_positive(batch_size=batch_size)
    starts = tuple(_starts(n, w, s) for n, w, s in zip(sizes, covered, steps, strict=True))
    put = fill.tolist() if isinstance(fill, Tensor) else fill
    asked = (str(layer), filter, kind, call, path, sizes, covered, starts, repr(at), put)
    wanted = WantedMap(layer, kind, call, path)
    with kept_state(model), torch.no_grad(), wanted.capture(model, stop=True) as maps:
        run(model, inputs)
        fm = wanted.among(maps)
        mask = chosen(fm, tensor, along, filter, at)  # where the strongest is of the input as it is
        samples = len(tensor) if has_samples(fm, along) else None
        usual = _totals(fm, mask, samples)
        drops = usual.new_full((len(usual), *map(len, starts)), torch.nan)
        if resume is not None:
            _check_resumed(resume, asked, usual)
            drops.copy_(resume.drops)
        done = ~drops.isnan().any(0)
        left = [c for c in itertools.product(*map(range, drops.shape[1:])) if not done[c]]
        many = 1 if model.training or samples is None else max(1, batch_size // samples)
        if many > 1 and left:  # each has to be what it is alone
            nothing = tuple(slice(0, 0) for _ in along)
            run(model, _covered(inputs, tensor, along, [nothing] * many, fill))
            among = wanted.among(maps)
            many = many if _alike(_totals(among, mask, samples), usual, among.dtype) else 1
        groups = [left[i : i + many] for i in range(0, len(left), many)]
        complete = True
        try:
            for group in with_bar(groups, "occlusion", show_progress):
                windows = [_window(starts, covered, cell) for cell in group]
                run(model, _covered(inputs, tensor, along, windows, fill))
                totals = _totals(wanted.among(maps), mask, samples)
                for cell, total in zip(group, totals.reshape(len(group), -1), strict=True):
                    drops.movedim(0, -1)[cell] = usual - total
        except KeyboardInterrupt:
            complete = False
            warnings.warn(
                "occlusion was interrupted: what is there is returned, and goes on with resume=",
                CaptureWarning,
                stacklevel=2,
            )
    return Occlusion(usual, drops, starts, covered, sizes, complete, asked)


def _check_resumed(resume: Occlusion, asked: tuple[Any, ...], usual: Tensor) -> None:
    """Raise unless it is of the same arguments, and of inputs that make the same of the map."""
    same = resume.usual.shape == usual.shape and bool(
        torch.isclose(resume.usual.to(usual), usual, rtol=1e-3, equal_nan=True).all()
    )
    if resume._asked != asked or not same:
        what = "arguments" if resume._asked != asked else "model and inputs"
        raise ArgumentError(f"resume= is of another occlusion: give the same {what} again")


def _each(value: int | Sequence[int], sizes: tuple[int, ...], what: str) -> tuple[int, ...]:
    values = (value,) * len(sizes) if isinstance(value, int) else tuple(value)
    if len(values) != len(sizes) or not all(is_int(v) and v > 0 for v in values):
        raise ArgumentError(
            f"{what} must be a positive int, or one for each of the {len(sizes)} axes of "
            f"locations, not {value!r}"
        )
    if what == "window" and any(v > n for v, n in zip(values, sizes, strict=True)):
        raise ArgumentError(f"window={value!r} is larger than the input, of {sizes} locations")
    return values


def _starts(size: int, window: int, stride: int) -> tuple[int, ...]:
    """Where windows begin: each location is in one, and the last may be cut."""
    return tuple(range(0, -(-(size - window) // stride) * stride + 1, stride))


def _window(
    starts: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], cell: Sequence[int]
) -> tuple[slice, ...]:
    """The locations of the input in a window, by its number along each axis."""
    return tuple(slice(s[i], s[i] + n) for s, i, n in zip(starts, cell, sizes, strict=True))


def _totals(fm: FeatureMap, mask: Tensor, samples: int | None) -> Tensor:
    """The sum of what is watched, sample by sample.

    Args:
        mask: of the map of the input as it is, what is watched.
        samples: of the input; None of one without an axis of samples.
    """
    values = fm.tensor.double() if fm.tensor.is_floating_point() else fm.tensor
    if samples is None:
        return (values * mask).sum().reshape(1)
    if values.shape[0] % samples or mask.shape[0] != samples:
        raise ArgumentError(
            f"the {fm.kind} of layer {fm.layer!r} has shape {tuple(fm.shape)}: its first axis "
            "is not that of the samples",
            **tags(fm),
        )
    apart = values.reshape(-1, *mask.shape)
    return (apart * mask).flatten(2).sum(2).flatten()


def _alike(totals: Tensor, usual: Tensor, dtype: torch.dtype) -> bool:
    """Whether copies of the inputs in one batch make of the map what one does."""
    close = torch.finfo(dtype).eps ** 0.5 if dtype.is_floating_point else 0.0
    least = close * float(usual.abs().max())
    copies = totals.reshape(-1, *usual.shape)
    return all(torch.allclose(c, usual, rtol=close, atol=least, equal_nan=True) for c in copies)


def _covered(
    inputs: Any,
    tensor: Tensor,
    axes: tuple[int, ...],
    windows: Sequence[tuple[slice, ...]],
    fill: float | Tensor,
) -> Any:
    """The inputs with each of some windows covered, one after the other."""
    pieces = []
    for window in windows:
        place = [slice(None)] * tensor.dim()
        for axis, part in zip(axes, window, strict=True):
            place[axis] = part
        piece = tensor.clone()
        value = torch.as_tensor(fill, dtype=piece.dtype, device=piece.device)
        piece[tuple(place)] = value.broadcast_to(piece.shape)[tuple(place)]
        pieces.append(piece)
    many = torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def alike(value: Any) -> Any:
        if value is tensor:
            return many
        if isinstance(value, Tensor) and value.dim() and len(value) == len(tensor):
            return value.repeat(len(windows), *[1] * (value.dim() - 1))
        return value

    return changed(inputs, alike)
