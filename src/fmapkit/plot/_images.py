"""What is drawn of an image: one rule for the shades of any, and two for those out of range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmapkit.errors import ArgumentError
from fmapkit.views import unnormalised

Array = np.ndarray[Any, Any]
# The mean or the standard deviation of an image's channels.
Numbers = float | Sequence[float] | None


def pixels(
    image: Any,
    mean: Numbers = None,
    std: Numbers = None,
    what: str = "image",
    sample: int = 0,
) -> Array:
    """An image as matplotlib takes it: (H, W), or (H, W, 3) within [0, 1].

    Args:
        image: a tensor or array, (H, W), (1, H, W) or (3, H, W), or a batch of these. Whole
            numbers are from 0 to 255, others from 0 to 1.
        mean: of its channels, where it was normalised by it.
        std: of its channels.
        what: to call it in an error.
        sample: which one of a batch.
    """
    values = _shades(image, mean, std, what, sample)
    return values if values.ndim == 2 else np.clip(values, 0, 1)


def spread_pixels(
    image: Any, mean: Numbers = None, std: Numbers = None, sample: int = 0
) -> tuple[Array, str]:
    """An image in any range, within [0, 1]; and what to say if it was spread over that range."""
    values = _shades(image, mean, std, "image", sample)
    finite = np.nan_to_num(values)
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if low >= 0 and high <= 1:
        return finite, ""
    said = f"Values from {low:.3g} to {high:.3g} were spread over black to white."
    return stretched(finite), said


def stretched(values: Array) -> Array:
    """Values from their lowest to their highest, on a scale from 0 to 1."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    result: Array = (values - low) / (high - low if high > low else 1)
    return result


def _shades(image: Any, mean: Numbers, std: Numbers, what: str, sample: int) -> Array:
    """(H, W) or (H, W, 3), from 0 to 1 as far as the image is: whole numbers are up to 255."""
    if (mean is None) != (std is None):
        raise ArgumentError("mean= and std= go together: the image was (x - mean) / std")
    tensor = torch.as_tensor(np.asarray(image)) if not isinstance(image, Tensor) else image
    shape = tuple(tensor.shape)
    if len(shape) == 4:
        if not -len(tensor) <= sample < len(tensor):
            raise ArgumentError(
                f"sample {sample} is out of range: {what} has shape {shape}, so {len(tensor)} "
                "samples"
            )
        tensor = tensor[sample]
    if tensor.dim() not in (2, 3) or (tensor.dim() == 3 and tensor.shape[0] not in (1, 3)):
        raise ArgumentError(
            f"{what} must have shape (H, W), (1, H, W) or (3, H, W), or be a batch of these, not "
            f"{shape}"
        )
    if not (tensor.is_floating_point() or tensor.dtype is torch.bool):
        tensor = tensor.clamp(0, 255) / 255
    if mean is not None and std is not None:
        tensor = unnormalised(tensor, mean, std)
    values = array_of(tensor)
    if values.ndim == 3:
        values = values[0] if len(values) == 1 else values.transpose(1, 2, 0)
    return values


def array_of(tensor: Tensor) -> Array:
    tensor = tensor.detach()
    found: Array = (tensor.abs() if tensor.is_complex() else tensor).double().cpu().numpy()
    return found
