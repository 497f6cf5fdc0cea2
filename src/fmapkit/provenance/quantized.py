"""torch's quantised operators: which of them is a layer, and which has a nonlinearity inside.

Their weights are packed into objects that are no tensors, so a layer goes by the module that runs,
or by the place where that module keeps the object.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.layers import layer_axis
from fmapkit.provenance.layout import ChannelLayout

_SPACES = ("quantized", "_quantized", "onednn", "sparse")
_WEIGHTED = re.compile(r"(q?linear|conv(_transpose)?(?P<axes>[123])d)(_dynamic)?(_fp16)?")
_WITH_SIGMA = re.compile(r".*_(relu|leaky_relu|tanh)(_dynamic)?(_fp16)?(_out|_output_fp32)?")


def _name(function: Any) -> str | None:
    packet = getattr(function, "overloadpacket", function)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None
    space, _, name = packet._qualified_op_name.partition("::")
    return name if space in _SPACES else None


def is_weighted(function: Any) -> bool:
    """Whether a torch function is a quantised layer, and nothing else."""
    name = _name(function)
    return name is not None and _WEIGHTED.fullmatch(name) is not None


def is_fused(function: Any) -> bool:
    """Whether a torch function is a quantised one with a nonlinearity inside."""
    name = _name(function)
    return name is not None and "_cell_" not in name and _WITH_SIGMA.fullmatch(name) is not None


def packed_axes(function: Any, out: Tensor) -> ChannelLayout | None:
    """The filter axis of what a quantised layer returns."""
    found = _WEIGHTED.fullmatch(_name(function) or "")
    spatial = int(found.group("axes") or 0) if found is not None else 0
    dim = out.dim() - 1 - spatial
    return ChannelLayout.single(dim, out.shape[dim]) if dim >= 0 else None


def packed_key(module: nn.Module, weight: Any) -> str | None:
    """Where the running module keeps a packed weight; "" if it is that layer; None if nowhere."""
    if layer_axis(module) is not None:
        return ""
    return next((key for key, value in vars(module).items() if value is weight), None)
