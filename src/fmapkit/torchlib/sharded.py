"""Tensors that are one rank's part of a larger one: `DTensor`, and collectives still under way.

Both are wrappers around a plain tensor. A write may go through the wrapper, which torch counts on
the wrapper, or to the plain tensor inside, which it counts there; so both have to be looked at.
None of the functions here communicates with other ranks, but for `whole`.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class Parts:
    """Who has the rest of a plain tensor that is a part of a map."""

    mesh: DeviceMesh | None = None  # the ranks whose parts, along the filter axis, make the whole
    total: int = 0  # how many filters that is
    unknown: bool = False  # there may be other parts, and nothing tells


_PLAIN = (Tensor, nn.Parameter)
_HOME = "torch.distributed.tensor"


def is_dtensor(value: Any) -> bool:
    """Whether it is a `DTensor`; where nobody has imported them, nothing is."""
    if type(value) in _PLAIN:
        return False
    kind = getattr(sys.modules.get(_HOME), "DTensor", None)
    return kind is not None and isinstance(value, kind)


def _is_async(value: Any) -> bool:
    home = sys.modules.get("torch.distributed._functional_collectives")
    kind = getattr(home, "AsyncCollectiveTensor", None)
    return kind is not None and isinstance(value, kind)


def _inside(value: Any) -> str | None:
    """Under which attribute a wrapper has the tensor that it wraps."""
    if type(value) in _PLAIN:
        return None
    if is_dtensor(value):
        return "_local_tensor"
    return "elem" if _is_async(value) else None


def is_wrapped(value: Any) -> bool:
    """Whether it is a wrapper around the tensor that has the memory."""
    return _inside(value) is not None


def ends_of(tensor: Tensor) -> list[Tensor]:
    """The wrappers from the outside in, and last the tensor that has the memory."""
    found = [tensor]
    while (key := _inside(found[-1])) is not None:
        found.append(getattr(found[-1], key))
    return found


def alias_of(tensor: Tensor) -> Tensor:
    """`detach()`; what is inside shares its version counter with what is inside the original."""
    alias = tensor.detach()
    if type(tensor) in _PLAIN:
        return alias
    key = _inside(tensor)
    if key is not None and _inside(alias) == key:
        # `detach` on a wrapper makes the inner alias below autograd, where no counter is shared.
        setattr(alias, key, alias_of(getattr(tensor, key)))
    return alias


def settled(tensor: Tensor) -> Tensor:
    """The result of a collective of the model's own, waited for if it is still under way."""
    if _is_async(tensor):
        inner: Tensor = tensor.trigger_wait()  # type: ignore[attr-defined]
        return inner
    return tensor


def moves_data(hook: Any) -> bool:
    """Whether a hook is one of torch's tensor parallel styles, which only redistribute a tensor.

    Told by where the hook, and each function that it closes over, is defined.
    """
    if not str(getattr(hook, "__module__", "")).startswith(_HOME):
        return False
    cells = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]
    for value in cells:
        while isinstance(value, functools.partial):
            value = value.func
        home = getattr(value, "__module__", None) or type(value).__module__
        if callable(value) and not home.startswith(_HOME):
            return False
    return True


def splits(parameter: Any) -> DeviceMesh | None:
    """The mesh over whose ranks the rows of a weight are spread; None if each has them all."""
    if not is_dtensor(parameter) or parameter.device_mesh.ndim != 1:
        return None
    return parameter.device_mesh if parameter.placements[0].is_shard(0) else None


def whole(tensor: Tensor, mesh: DeviceMesh | None, dim: int | None, total: int) -> Tensor:
    """The whole of a sharded tensor: a collective that each rank of its mesh has to call.

    Args:
        tensor: a `DTensor`, or one rank's part of a tensor.
        mesh: of a part, the ranks that have the others.
        dim: of a part, the axis that is cut.
        total: how long that axis is as a whole.
    """
    tensor = tensor.detach()
    if is_dtensor(tensor):
        full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        return settled(full)
    from torch.distributed.tensor import DTensor, Shard

    assert mesh is not None and dim is not None
    shape = list(tensor.shape)
    shape[dim] = total
    stride = torch.empty(shape, device="meta").stride()
    parts = DTensor.from_local(
        tensor.contiguous(), mesh, [Shard(dim)], shape=torch.Size(shape), stride=stride
    )
    return settled(parts.full_tensor())
