"""In-place nonlinearities: how z stays what it was, without a copy where that can be.

Where x alone has its memory, `relu_(x)` writes its result into fresh memory, which becomes x's, and
the old memory keeps z. Elsewhere z is copied, and σ runs as the model has it.
"""

from __future__ import annotations

from collections.abc import Callable
from sys import getrefcount
from typing import Any

import torch
import torch.autograd.forward_ad as _tangents
from torch import Tensor

from fmapkit.torchlib.modes import dispatch_mode_count, mode_count

_users_of: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
_strided = torch.strided
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})

# Exchanges what torch has behind two tensors.
_swap: Callable[[Tensor, Tensor], None] = torch._C._swap_tensor_impl
_FEW = 16  # writes to a tensor before its σ, of which each is counted again
_count: Callable[[Any], None] = torch._C._increment_version
try:
    _count((torch.empty(0),))
    _of_many = True
except (TypeError, RuntimeError):  # older versions of torch count one tensor at a time
    _of_many = False


def is_alone(z: Any, ours: int = 0) -> bool:
    """Whether a tensor may be given other memory without anybody noticing.

    Args:
        z: what an in-place σ is about to overwrite.
        ours: how many aliases of our own making we hold: no tensors that the model may have, too.
    """
    if type(z) is not Tensor or z.requires_grad or z.layout is not _strided:
        return False
    if _users_of is None or someone_sees():
        return False
    if z.is_inference() and not torch.is_inference_mode_enabled():
        return False  # torch refuses to write to it
    if not (z.is_cpu or z.is_cuda or z.is_mps) or z.dtype not in _DTYPES:
        return False
    # Of a part of something that no tensor has as a whole, the strides reach the rest.
    return _has_own_memory(z, ours) and z.untyped_storage().nbytes() == z.nbytes


def someone_sees() -> bool:
    """Whether a mode is on, which would see what runs, or tangents go with the values."""
    return bool(mode_count() or dispatch_mode_count() or _tangents._current_level >= 0)


def sigma_apart(x: Any, sigma: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor | None:
    """Have x hold a = σ(x) in fresh memory; a tensor that has the old memory, and so is z.

    None if that cannot be; nothing has changed then. Of a tensor that was alone in an earlier pass,
    whose path this one takes, no more is asked than can be another: whose memory it has may depend
    on the inputs; and code that has just left the path may be in a mode of its own, or in a
    transform, and may have other tensors.

    Args:
        x: what an in-place σ is about to overwrite.
        sigma: the same σ out of place, called with `args` and `kwargs`.
    """
    # All in one function: it runs at each site of each pass, where a call more is a cost.
    if type(x) is not Tensor or x.requires_grad or x.is_inference():
        return None
    if mode_count() or dispatch_mode_count() or _tangents._current_level >= 0:
        return None
    try:
        storage = x.untyped_storage()
    except RuntimeError:  # sparse, or what stands for another tensor in a transform: it has none
        return None
    writes = x._version + 1
    if (
        _users_of is None
        or _users_of(storage._cdata) != 2
        or not storage.resizable()
        or x._use_count() != 1  # type: ignore[attr-defined]
        or getrefcount(storage) != _OURS_ALONE
        or (storage.is_shared() and not x.is_cuda)
        or writes > _FEW
        or x._grad is not None
    ):
        return None
    a = sigma(*args, **kwargs)
    if a.stride() != x.stride() or a.dtype is not x.dtype:
        return None
    try:
        _swap(x, a)
    except RuntimeError:  # somebody has a weak reference to what torch has behind x
        return None
    # Its version counter is that of a: what was noted of x before is to look written to.
    if _of_many:
        _count((x,) * writes)
    else:
        for _ in range(writes):
            _count(x)
    return a


def _has_own_memory(z: Tensor, ours: int) -> bool:
    try:
        storage = z.untyped_storage()
    except RuntimeError:  # sparse, or what stands for another tensor in a transform: it has none
        return False
    # The handle just made is one of the users. NumPy's memory, say, is not resizable.
    if _users_of is None or _users_of(storage._cdata) != 2 + ours or not storage.resizable():
        return False
    # DLPack holds the tensor itself, and somebody may have the very handle.
    if z._use_count() != 1 or getrefcount(storage) != _OURS_ALONE:  # type: ignore[attr-defined]
        return False
    return not storage.is_shared() or z.is_cuda  # there, torch takes all for shared


def _references(z: Tensor) -> int:
    """How many there are to the handle of a tensor's memory, of which nobody else has one."""
    storage = z.untyped_storage()
    return getrefcount(storage)


_OURS_ALONE = _references(torch.empty(0))


def with_new_memory(z: Tensor, sigma: Callable[[], Tensor]) -> bool:
    """Have a tensor that is alone hold a = σ(z), which `sigma` gives in fresh memory.

    An alias made before still holds z. The version counter counts that, if there is one. Returns
    whether that could be; if not, nothing has changed.
    """
    values = sigma()
    if values.stride() != z.stride() or values.dtype is not z.dtype:
        return False
    z.data = values
    if not z.is_inference():
        # What is public asks `isinstance(..., Tensor)` first, which costs more than the rest.
        _count((z,) if _of_many else z)
    return True
