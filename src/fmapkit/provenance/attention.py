"""Attention: its probabilities beside a fused kernel, and whose filters its heads are.

The fused kernels never write the probabilities to memory. Here they are computed a second time, by
the formula of torch's documentation: softmax(q·k / sqrt(E) + mask), before dropout. Scores are
summed in float32 where the model works in half precision, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fmapkit.provenance.labels import ChannelLabel, Label
from fmapkit.provenance.layout import ChannelAxis, ChannelLayout

# A query that sees no key gets nothing; before torch 2.5, the NaN that softmax gives.
_SAFE = torch.__version__ >= "2.5"
_ORDER = (*("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),)


# -- heads -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Projection:
    """What makes the queries, keys or values of attention.

    Attributes:
        layer: the layer whose filters they are, as it returns them: before what is done to them
            on the way, such as a rotation by their position.
        filters: for each head, which of its filters.
    """

    layer: str
    filters: tuple[range, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """Where the queries, keys and values of attention come from; None where no data tells.

    ```python
    query = maps["h.0.attn", "attention"].heads.query
    edit = {edits.Where(query.layer, "response", query.filters[3]): edits.zero()}
    ```

    Of grouped queries, there are fewer heads of keys and values: head i has the keys of head
    i · (heads of keys) // (heads of queries).
    """

    query: Projection | None = None
    key: Projection | None = None
    value: Projection | None = None


def projection(label: Label, shape: Sequence[int]) -> Projection | None:
    """Whose filters a tensor of queries, keys or values has, head by head.

    Args:
        shape: its own. The last two axes are positions and what is in a head, in any order; the one
            before them counts heads.
    """
    if not isinstance(label, ChannelLabel) or label.axes is None or label.origin.kind != "layer":
        return None
    found = _by_head(label.axes, len(shape), len(shape) > 2 and shape[-3] == 1)
    return Projection(label.origin.name, found) if found is not None else None


@lru_cache(maxsize=1024)
def _by_head(axes: ChannelLayout, rank: int, single: bool) -> tuple[range, ...] | None:
    """Once for all layers of a model, which are alike."""
    parts = sorted(axes.parts, key=lambda part: part.dim)
    if len(parts) == 1 and single:
        parts = [ChannelAxis(rank - 3, 1), *parts]
    if len(parts) != 2:
        return None
    head, inner = parts
    if head.dim >= rank - 2 or inner.dim < rank - 2:
        return None
    starts = [axes.offset + i * head.stride for i in range(head.size)]
    span = inner.size * inner.stride
    return tuple(range(start, start + span, inner.stride) for start in starts)


# -- probabilities ---------------------------------------------------------------------------------


def given(args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call, by name; what was not given is not there."""
    return {**dict(zip(_ORDER, args, strict=False)), **kwargs}


def probabilities(call: dict[str, Any], graph: bool) -> Tensor:
    """The probabilities of one call, of shape (..., heads, queries, keys).

    Nothing of this is seen by function modes or dispatch modes of others, and no random numbers are
    drawn. With `graph`, they are a part of the autograd graph.
    """
    query, key = call["query"], call["key"]
    grads = torch.set_grad_enabled(graph and torch.is_grad_enabled())
    with torch._C.DisableTorchFunction(), _disable_current_modes(), grads:
        kind = query.device.type
        if not torch.is_autocast_enabled(kind):
            return _computed(query, key, call)
        dtype = torch.get_autocast_dtype(kind)  # to which torch casts what the kernel gets
        with torch.autocast(kind, enabled=False):
            return _computed(query.to(dtype), key.to(dtype), call)


def _computed(query: Tensor, key: Tensor, call: dict[str, Any]) -> Tensor:
    scale, mask = call.get("scale"), call.get("attn_mask")
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key = query.float(), key.float()
    if call.get("enable_gqa"):
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if call.get("is_causal"):
        rows, columns = scores.shape[-2:]
        seen = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    found = torch.softmax(scores, -1)
    if mask is not None and _SAFE:
        found = found.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    return found.to(dtype)
