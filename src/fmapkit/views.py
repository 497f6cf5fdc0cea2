"""Other ways to look at a map: what a figure is made of, as tensors to go on with.

Each takes a `FeatureMap` and leaves it as it is. Those that give a map give a copy of its values,
under the same tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fmapkit.errors import ArgumentError, check_choice, check_positive, is_int
from fmapkit.readable import AnyMap, ReadableMap, tags

__all__ = [
    "as_grid",
    "contrast_normalised",
    "sparsity",
    "strongest",
    "unnormalised",
    "upsampled",
]


def contrast_normalised(fm: AnyMap, size: int = 9, sigma: float | None = None) -> AnyMap:
    """The maps of a layer after local contrast normalisation across them.

    From each value the weighted mean around it is taken, over all maps of the layer; the rest is
    divided by its weighted deviation there, or by the mean of those where that is larger:
    v = x - Σ w·x, y = v / max(c, √(Σ w·v²)), with a Gaussian window w. (Jarrett, Kavukcuoglu,
    Ranzato & LeCun, "What is the Best Multi-Stage Architecture for Object Recognition?", ICCV 2009,
    section 2; a step of the layers that Zeiler & Fergus, ECCV 2014, section 2, look into.)

    At the border, the window is what is left of it within the map.

    Args:
        fm: a map with rows and columns.
        size: of the window, odd.
        sigma: of the Gaussian, in locations; None for a quarter of the window.

    Returns:
        (samples, filters, rows, columns), or (filters, rows, columns) unbatched.

    Raises:
        ArgumentError: the window is of no odd size, or the map has no rows and columns.
        FilterRangeError: its filters do not lie along one axis.
    """
    if not is_int(size) or size < 1 or size % 2 == 0:
        raise ArgumentError(f"size must be a positive odd number of locations, not {size!r}")
    width = size / 4 if sigma is None else float(sigma)
    if not width > 0:
        raise ArgumentError(f"sigma must be a positive number of locations, not {sigma!r}")
    values = _by_filter(fm, 2).detach()
    values = values if values.dtype == torch.float64 else values.float()
    place = torch.arange(size, device=values.device, dtype=values.dtype) - size // 2
    line = torch.exp(-place.square() / (2 * width**2))
    window = (line[:, None] * line[None, :])[None, None]

    def blurred(x: Tensor) -> Tensor:
        """Weighted mean around each location, over all maps."""
        there = torch.ones_like(x[:1, :1])
        summed = F.conv2d(x.mean(1, keepdim=True), window, padding=size // 2)
        found: Tensor = summed / F.conv2d(there, window, padding=size // 2)
        return found

    centred = values - blurred(values)
    deviation = blurred(centred.square()).sqrt()
    limit = deviation.mean((2, 3), keepdim=True)
    return _as(fm, centred / torch.maximum(deviation, limit).clamp_min(1e-12))


def sparsity(
    fm: ReadableMap, measure: Literal["zeros", "hoyer", "treves-rolls"] = "zeros"
) -> Tensor:
    """How sparse each filter's map is, over all samples and locations; 1 is the sparsest.

    Args:
        fm: the map.
        measure: "zeros": the share of values that are 0. "hoyer": (√n - Σ|x| / √Σx²) / (√n - 1)
            (Hoyer, "Non-negative Matrix Factorization with Sparseness Constraints", JMLR 2004).
            "treves-rolls": (1 - (Σ|x|/n)² / (Σx²/n)) / (1 - 1/n) (Vinje & Gallant, "Sparse Coding
            and Decorrelation in Primary Visual Cortex During Natural Vision", Science 2000).

    Returns:
        (filters,) float64. Of a map that is 0 throughout, NaN by the latter two.

    Raises:
        ArgumentError: there is no such measure.
        FilterRangeError: its filters do not lie along one axis.
    """
    check_choice(("zeros", "hoyer", "treves-rolls"), measure=measure)
    values = _by_filter(fm).detach().movedim(1, 0).flatten(1).double()
    if measure == "zeros":
        return (values == 0).double().mean(1)
    count = values.shape[1]
    size, square = values.abs().sum(1), values.square().sum(1)
    if measure == "hoyer":
        return torch.div(count**0.5 - size / square.sqrt(), count**0.5 - 1)
    return (1 - size.square() / (count * square)) / (1 - 1 / count)


def strongest(
    fm: ReadableMap,
    count: int | None = None,
    *,
    sample: int | None = None,
    by: Literal["max", "mean"] = "max",
) -> list[int]:
    """The filters of the map with the strongest response, the strongest first.

    Args:
        fm: the map.
        count: how many; None for all.
        sample: of this sample alone; None for the whole batch.
        by: the strongest value, or the mean of all.

    Returns:
        Their numbers; of equals the lower one first. Filters with a NaN come last.

    Raises:
        ArgumentError: an argument is outside what is allowed.
        FilterRangeError: its filters do not lie along one axis.
    """
    check_choice(("max", "mean"), by=by)
    values = _by_filter(fm).detach()
    if sample is not None:
        if not -len(values) <= sample < len(values):
            raise ArgumentError(f"sample {sample} is out of range: the map has {len(values)}")
        values = values[sample].unsqueeze(0)
    rows = values.movedim(1, 0).flatten(1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    scores = rows.amax(1) if by == "max" else rows.mean(1)
    order = scores.nan_to_num(nan=-torch.inf).argsort(dim=0, descending=True, stable=True).tolist()
    assert fm.filters is not None
    return [fm.filters[i] for i in order[:count]]


def upsampled(fm: AnyMap, size: int | Sequence[int], mode: str = "bilinear") -> AnyMap:
    """The map, brought to the size of what the model was given, to be laid over it.

    It is stretched as `torch.nn.functional.interpolate` does, so that the corners of both lie on
    each other. That is not where its locations look, if the model does not pad: see
    `fmapkit.explain.receptive_field`.

    Args:
        fm: a map with rows and columns.
        size: rows and columns to have; one number for both.
        mode: "nearest", "bilinear" or "bicubic".

    Returns:
        (samples, filters, rows, columns), or (filters, rows, columns) unbatched.

    Raises:
        ArgumentError: the map has no rows and columns, or an argument is outside what is allowed.
        FilterRangeError: its filters do not lie along one axis.
    """
    check_choice(("nearest", "bilinear", "bicubic"), mode=mode)
    wanted = [size, size] if isinstance(size, int) else [int(n) for n in size]
    if len(wanted) != 2 or min(wanted) < 1:
        raise ArgumentError(f"size must be rows and columns, not {size!r}")
    values = _by_filter(fm, 2).detach()
    values = values if values.dtype == torch.float64 else values.float()
    corners = None if mode == "nearest" else False
    return _as(fm, F.interpolate(values, size=wanted, mode=mode, align_corners=corners))


def as_grid(fm: AnyMap, rows: int, columns: int) -> AnyMap:
    """The tokens of a vision transformer as the image that they were cut from.

    Args:
        fm: a map with positions: (samples, tokens, filters), say.
        rows: patches from top to bottom.
        columns: patches from left to right. Tokens before the last rows × columns, such as the
            class token and registers, are left out.

    Returns:
        (samples, filters, rows, columns), or (filters, rows, columns) unbatched; a view.

    Raises:
        ArgumentError: there are not as many tokens, or the map has no positions.
        FilterRangeError: its filters do not lie along one axis.
    """
    check_positive(rows=rows, columns=columns)
    values = _by_filter(fm, 1).detach()
    tokens = values.shape[2]
    if tokens < rows * columns:
        raise ArgumentError(
            f"a grid of {rows}×{columns} takes {rows * columns} tokens, and the {fm.kind} of layer "
            f"{fm.layer!r} has {tokens}",
            **tags(fm),
        )
    values = values[:, :, tokens - rows * columns :]
    return _as(fm, values.view(*values.shape[:2], rows, columns))


def unnormalised(
    images: Tensor, mean: float | Sequence[float], std: float | Sequence[float]
) -> Tensor:
    """Images as they were before (x - mean) / std, for pictures.

    Args:
        images: (..., channels, rows, columns).
        mean: of each channel.
        std: of each channel.

    Returns:
        Of the same shape.

    Raises:
        ArgumentError: there is not one number for each channel.
    """
    found = []
    channels = images.shape[-3] if images.dim() > 2 else 1
    for name, given in (("mean", mean), ("std", std)):
        numbers = torch.as_tensor(given, dtype=torch.float32).flatten()
        if numbers.numel() not in (1, channels):
            raise ArgumentError(
                f"{name} has {numbers.numel()} numbers, and the images {channels} channels"
            )
        found.append(numbers.reshape(-1, 1, 1).to(images.device))
    result = images.float() * found[1] + found[0]
    return result if images.dim() > 2 else result.squeeze(0)


def _by_filter(fm: ReadableMap, locations: int | None = None) -> Tensor:
    """(samples, filters, *locations), a view; an error where these are not so many axes."""
    len(fm)  # which refuses a map without that axis
    assert fm.filter_dim is not None
    tensor = fm.tensor
    dim = fm.filter_dim % tensor.dim()
    found = tensor.unsqueeze(0) if dim == 0 else tensor.movedim(dim, 1)
    if locations is not None and found.dim() - 2 != locations:
        what = {1: "positions", 2: "rows and columns"}[locations]
        raise ArgumentError(
            f"the {fm.kind} of layer {fm.layer!r} has no {what}: its shape is "
            f"{tuple(tensor.shape)}, with the filters along axis {dim}",
            **tags(fm),
        )
    return found


def _as(fm: AnyMap, values: Tensor) -> AnyMap:
    """The same map with other values, (samples, filters, *locations)."""
    unbatched = fm.filter_dim is not None and fm.filter_dim % fm.tensor.dim() == 0
    return fm.with_values(values.squeeze(0), 0) if unbatched else fm.with_values(values, 1)
