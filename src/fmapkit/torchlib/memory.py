"""Memory of tensors: which block one lies in, and whether it was written to since.

Two tensors share memory if `storage_of` gives the same number for both. torch counts writes in a
version counter that all aliases of a tensor share.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fmapkit.torchlib.sharded import ends_of, is_wrapped
from fmapkit.torchlib.transforms import inner, transforming


def version_of(tensor: Tensor) -> int:
    """The version counter; -1 for inference tensors, which have none."""
    if tensor.is_inference():
        return -1
    if type(tensor) is not Tensor and is_wrapped(tensor):
        return sum(0 if t.is_inference() else t._version for t in ends_of(tensor))
    return tensor._version


def as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor's values on the host; bfloat16 and float8, which NumPy lacks, as float32."""
    tensor = tensor.detach().cpu()
    lacking = tensor.dtype is torch.bfloat16 or tensor.element_size() == 1
    return (tensor.float() if tensor.is_floating_point() and lacking else tensor).numpy()


def versions_of(tensors: list[Tensor]) -> list[int]:
    """The same of many."""
    try:
        return [t._version if type(t) is Tensor else version_of(t) for t in tensors]
    except RuntimeError:  # there is an inference tensor among them
        return list(map(version_of, tensors))


def storage_of(tensor: Tensor) -> int:
    """What tells one block of memory from another."""
    if transforming() is not None:
        tensor = inner(tensor)
    if type(tensor) is not Tensor:
        if is_wrapped(tensor):
            tensor = ends_of(tensor)[-1]
        if is_traceable_wrapper_subclass(tensor):
            return storage_of(parts_of(tensor)[0])
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, and other tensors without one storage
        return id(tensor)


def lifetime_of(tensor: Tensor) -> weakref.ref[Any] | None:
    """What tells as long as a tensor's block of memory is there; None if torch shows none."""
    try:
        return weakref.ref(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None


def storage_users(tensor: Tensor) -> int:
    """How many tensors, of Python or of autograd, share the storage; 0 if torch cannot tell."""
    count: Any = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return 0
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return 0
    return int(count(storage._cdata)) - 1  # less the handle made here


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that have the memory: itself, as a rule; of a sparse one, those it is made of."""
    tensor = ends_of(tensor)[-1]
    if is_traceable_wrapper_subclass(tensor):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [part for t in inner for part in parts_of(t)]
    with torch._C.DisableTorchFunction():
        tensor = tensor.detach()
        if tensor.layout is torch.sparse_coo:
            return [tensor._indices(), tensor._values()]
        if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def block_of(tensor: Tensor) -> tuple[int, int]:
    """A tensor's block of memory, and its bytes; if torch shows none, that of its values alone."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return id(tensor), tensor.numel() * tensor.element_size()
    return storage._cdata, storage.nbytes()
