"""Pooling: each result from the elements of a window, whichever of them is the largest."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmapkit.explain._call import Call, Rule, named
from fmapkit.explain._probe import probe

__all__ = ["RULES"]

_POOLS: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_ADAPTIVE: dict[int, Any] = {
    1: F.adaptive_max_pool1d,
    2: F.adaptive_max_pool2d,
    3: F.adaptive_max_pool3d,
}


def _axes(call: Call) -> int:
    return int(next(d for d in call.name if d.isdigit()))


def _lowest(call: Call, pool: Any, *arguments: Any, **options: Any) -> list[Tensor | None]:
    """The field of windows: the smallest numbers in each are the largest, negated."""
    value = call.get("self", "input")
    field = call.of(value)
    if field is None:
        return [None] * len(call.results)
    axes = _axes(call)
    flat = field.reshape(1, -1, *value.shape[value.dim() - axes :])
    found = -pool(-flat.float(), *arguments, **options)
    found = found.to(torch.int32).reshape(len(field), *call.results[0].shape)
    return [found] * len(call.results)


def _pooled(call: Call) -> list[Tensor | None]:
    if call.results[0].numel() == 0:
        return probe(call)
    return _lowest(
        call,
        _POOLS[_axes(call)],
        call.given["kernel_size"],
        call.get("stride") or None,
        call.get("padding", default=0),
        call.get("dilation", default=1),
        call.get("ceil_mode", default=False),
    )


def _adaptively(call: Call) -> list[Tensor | None]:
    return _lowest(call, _ADAPTIVE[_axes(call)], call.given["output_size"])


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
