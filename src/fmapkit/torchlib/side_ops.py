"""Operators of our own, run beside the model's: nobody is to take them for the model's.

Modes of the user's see each function, or operator, and may change what it returns. And activation
checkpointing counts. It matches the tensors that a region saves for backward with
those of its recomputation by their order, and selective checkpointing matches every operator so. A
copy of ours, made in the forward only, would shift all that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as unchanged
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode

from fmapkit.torchlib.modes import dispatch_mode_count, is_torchs, mode_count
from fmapkit.torchlib.operators import without_torch_function
from fmapkit.torchlib.transforms import forward_derivatives, transforming

# Selective checkpointing, while the forward runs.
_COUNTING: Any = getattr(torch.utils.checkpoint, "_CachingTorchDispatchMode", ())


def operators_are_counted() -> bool:
    """Whether the model has to run the very operators that it runs without us."""
    if not dispatch_mode_count():
        return False
    return any(isinstance(m, _COUNTING) for m in _get_current_dispatch_mode_stack())


def clone(tensor: Tensor) -> Tensor:
    """A copy; of a tensor of the graph, one in the graph, even where the model turned that off."""
    if not (dispatch_mode_count() or mode_count() or _told):
        if torch.is_grad_enabled() or not tensor.requires_grad:
            return tensor.clone()
    with torch.set_grad_enabled(tensor.requires_grad or torch.is_grad_enabled()), looking():
        copy = tensor.clone()
        for tell in _told:
            tell(tensor, copy)
        return copy


_told: list[Callable[[Tensor, Tensor], None]] = []


@contextmanager
def copies(tell: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Be told of each copy, which no mode sees: of a tensor, and the copy."""
    _told.append(tell)
    try:
        yield
    finally:
        _told.remove(tell)


class _GoesOn(torch.autograd.Function):
    """Has a tensor follow from another one that holds the same, in place of what it came from."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, copied: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def goes_on_from(tensor: Tensor, copied: Tensor) -> bool:
    """Have a tensor that is about to be written to go on from a copy of what it holds.

    What backward brings to the tensor from there on is then the gradient of the copy, too. Not so
    of a view: a write to it is one to its base, whose gradient would be put together another way;
    and not where there are derivatives of another kind, which do not go through a function of ours.
    Returns whether autograd has a part in that.
    """
    if not torch.is_grad_enabled() or not copied.requires_grad:
        return False
    if tensor.is_leaf or tensor._is_view():
        return False
    if transforming() is not None or forward_derivatives():
        return False
    with unseen(), unchanged(tensor):  # σ, which writes to it next, is what counts
        _GoesOn.apply(tensor, copied)  # type: ignore[no-untyped-call]
    return True


def select(tensor: Tensor, dim: int, places: tuple[int, ...]) -> Tensor:
    """A copy of some indices of an axis, with the same care.

    By slices: an index tensor would have to be sent to the device, which waits for it.
    """
    if not tensor.requires_grad:
        with looking():
            return _taken(tensor, dim, places)
    with torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t), looking():
        return _taken(tensor, dim, places)


@lru_cache(maxsize=1024)
def runs(places: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(first, length) of what lies side by side."""
    side_by_side = groupby(enumerate(places), lambda pair: pair[1] - pair[0])
    found = [[place for _, place in group] for _, group in side_by_side]
    return tuple([(run[0], len(run)) for run in found])


def _taken(tensor: Tensor, dim: int, places: tuple[int, ...]) -> Tensor:
    pieces = [tensor.narrow(dim, first, length) for first, length in runs(places)]
    taken = pieces[0].clone() if len(pieces) == 1 else torch.cat(pieces, dim)
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dims and not tensor.is_contiguous():
            if tensor.is_contiguous(memory_format=layout):
                return taken.contiguous(memory_format=layout)
    return taken


def looking() -> AbstractContextManager[Any]:
    """What runs here is ours: no mode of others sees it, and no code that a tensor has itself."""
    return _apart() if dispatch_mode_count() else without_torch_function()


@contextmanager
def _apart() -> Iterator[None]:
    with without_torch_function(), unseen():
        yield


@contextmanager
def unseen() -> Iterator[None]:
    """What runs here is not counted as the model's, and no mode of the user's sees it."""
    if not operators_are_counted() and all(map(is_torchs, _get_current_dispatch_mode_stack())):
        yield
        return
    modes = [_pop_mode() for _ in range(dispatch_mode_count())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)
