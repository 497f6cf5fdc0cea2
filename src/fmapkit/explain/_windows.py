"""Pooling: each result from the elements of a window, whichever of them is the largest."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmapkit.explain._call import Call, Rule, named
from fmapkit.explain._probe import probe


def _lowest(call: Call, pool: str, *arguments: Any) -> list[Tensor | None]:
    """The field of windows: the smallest numbers in each are the largest, negated."""
    value = call.get("self", "input")
    field = call.of(value)
    if field is None:
        return [None] * len(call.results)
    axes = int(next(digit for digit in call.name if digit.isdigit()))
    flat = field.reshape(1, -1, *value.shape[value.dim() - axes :])
    found = -getattr(F, f"{pool}{axes}d")(-flat.float(), *arguments)
    found = found.to(torch.int32).reshape(len(field), *call.results[0].shape)
    return [found] * len(call.results)


def _pooled(call: Call) -> list[Tensor | None]:
    if call.results[0].numel() == 0:
        return probe(call)
    return _lowest(
        call,
        "max_pool",
        call.given["kernel_size"],
        call.get("stride") or None,
        call.get("padding", default=0),
        call.get("dilation", default=1),
        call.get("ceil_mode", default=False),
    )


def _adaptively(call: Call) -> list[Tensor | None]:
    return _lowest(call, "adaptive_max_pool", call.given["output_size"])


RULES: dict[str, Rule] = {
    **named(
        _pooled,
        """max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
        max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d mkldnn_max_pool2d""",
    ),
    **named(
        _adaptively,
        """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
        _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d""",
    ),
}
