"""Attention probabilities from what `scaled_dot_product_attention` was given, beside its kernel.

The fused kernels never write the probabilities to memory. Here they are computed a second time, by
the formula of torch's documentation: softmax(q·k / sqrt(E) + mask), before dropout. Scores are
summed in float32 where the model works in half precision, as the kernels do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# A query that sees no key gets nothing; before torch 2.5, the NaN that softmax gives.
_SAFE = torch.__version__ >= "2.5"
_ORDER = (*("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),)


def given(args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call, by name; what was not given is not there."""
    return {**dict(zip(_ORDER, args, strict=False)), **kwargs}


def probabilities(call: dict[str, Any], graph: bool) -> Tensor:
    """The probabilities of one call, of shape (..., heads, queries, keys).

    Nothing of this is seen by function modes or dispatch modes of others, and no random numbers are
    drawn.

    Args:
        graph: make them a part of the autograd graph.
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
