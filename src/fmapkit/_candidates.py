"""Weightless modules: which may be one nonlinearity written out by hand, and which are.

Pure: asked when a module's call begins, and answered when it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fmapkit import layers, nonlinearities
from fmapkit._events import Event
from fmapkit._frames import Frame
from fmapkit._nested import tensors_in
from fmapkit._remembered import remembered
from fmapkit._store import Aliases
from fmapkit.nonlinearities import module_sigma

__all__ = ["is_norm", "is_torchs", "may_be_sigma", "norm_axis", "role_of", "verdict"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_TORCHS = "torch.nn.modules."


def role_of(module: nn.Module) -> str:
    """What a module's class tells of its calls.

    Returns:
        "layer" if it is registered as one; "sigma"; "plain": neither, as torch's own modules and
        mere containers are; "open": that depends on the call, see `may_be_sigma`.
    """
    return _role(type(module), layers.version + nonlinearities.version)


@remembered
def _role(kind: type, registered: int) -> str:
    if not layers.REGISTERED.keys().isdisjoint(kind.__mro__):
        return "layer"
    if not nonlinearities.MODULES.keys().isdisjoint(kind.__mro__):
        return "sigma"
    if issubclass(kind, _CONTAINERS) or kind.__module__.startswith(_TORCHS):
        return "plain"
    return "open"


def may_be_sigma(module: nn.Module, args: Any, kwargs: Any, x: Tensor) -> bool:
    """Of an "open" one: one tensor goes in, and it has no weights or only per-channel ones."""
    if not x.is_floating_point() or len(tensors_in(*args, kwargs)) != 1:
        return False
    shape = x.shape
    return _has_only(module, {1, *shape[1:2], *shape[-1:]})


def _has_only(module: nn.Module, counts: set[int]) -> bool:
    """Whether each parameter in a module has one of these numbers of elements."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.numel() not in counts:
            return False
    for child in module._modules.values():
        if child is not None and not _has_only(child, counts):
            return False
    return True


def is_torchs(module: nn.Module) -> bool:
    """Whether it is one of torch's own modules."""
    return type(module).__module__.startswith(_TORCHS)


def verdict(frame: Frame, output: Any, events: Sequence[Event], aliases: Aliases) -> str | None:
    """The name of σ if a call of a module is one nonlinearity.

    Args:
        frame: the call.
        output: what it returned.
        events: of the pass.
        aliases: what is held of its tensors.
    """
    if not isinstance(output, Tensor) or frame.x is None:
        return None
    if frame.kind == "sigma":
        return module_sigma(frame.module)
    if frame.degrees is None or output.shape != frame.x.shape:
        return None
    if not frame.degrees.is_nonlinear(output):
        return None
    inner = [e for e in events[frame.start :] if e.kind == "sigma"]
    if len(inner) == 1:
        event = inner[0]
        # A wrapper around one function or module is no nonlinearity of its own.
        same = event.x_held is frame.x_held or event.x is frame.x
        if same and event.y_held is aliases.reference(output):
            return None
    return type(frame.module).__name__


def is_norm(frame: Frame, output: Any) -> bool:
    """Whether a call may be a norm written out by hand."""
    if frame.degrees is None or not frame.degrees.reduces or frame.x is None:
        return False
    return isinstance(output, Tensor) and output.shape == frame.x.shape


def norm_axis(module: nn.Module, output: Tensor) -> int:
    """The filter axis of such a norm."""
    channels = output.shape[1] if output.dim() == 4 else None
    return 1 if any(p.numel() == channels for p in module.parameters()) else -1
