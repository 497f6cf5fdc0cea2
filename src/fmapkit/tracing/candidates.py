"""Weightless modules: which may be one nonlinearity written out by hand, and which are.

Pure: asked when a module's call begins, and answered when it ends.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch import Tensor, nn

from fmapkit import layers, nonlinearities
from fmapkit.nonlinearities import (
    class_sigma,
    is_torchs,
    is_torchs_forward,
    module_sigma,
    patched_name,
    runs_torchs_forward,
)
from fmapkit.provenance import describe
from fmapkit.torchlib.caching import remembered
from fmapkit.torchlib.nested import tensors_in
from fmapkit.tracing.frames import Frame
from fmapkit.tracing.record import Record

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_TORCHS = "torch.nn.modules."


def role_of(module: nn.Module) -> str:
    """What a module's class tells of its calls, and whether it runs as torch has written it.

    Returns:
        "layer" if it is registered as one; "sigma"; "plain": neither, as torch's own modules and
        mere containers are; "open": that depends on the call, see `may_be_sigma`.
    """
    kind: Any = type(module)
    registered = layers.version + nonlinearities.version
    if "forward" in module.__dict__ or type(kind.forward) is not FunctionType:
        return _role(kind, runs_torchs_forward(module), registered)
    return _role_with(kind, kind.forward, registered)


@remembered
def _role_with(kind: type[nn.Module], forward: Any, registered: int) -> str:
    """The same of a class, with the forward that it has now."""
    return _role(kind, is_torchs_forward(forward), registered)


@remembered
def _role(kind: type[nn.Module], as_torch_has_it: bool, registered: int) -> str:
    if not layers.REGISTERED.keys().isdisjoint(kind.__mro__):
        return "layer"
    if class_sigma(kind, as_torch_has_it) is not None:
        return "sigma"
    torchs = kind.__module__.startswith(_TORCHS) and as_torch_has_it
    if torchs or issubclass(kind, _CONTAINERS):
        return "plain"
    return "open"


def may_be_sigma(module: nn.Module, args: Any, kwargs: Any, x: Tensor) -> bool:
    """Of an "open" one: one tensor goes in, and it has no weights or only per-channel ones."""
    if not (x.is_floating_point() or x.is_complex()) or len(tensors_in(*args, kwargs)) != 1:
        return False
    return _has_only(module, {1, *x.shape[1:2], *x.shape[-1:]})


def _has_only(module: nn.Module, counts: set[int]) -> bool:
    """Whether each parameter has one of these numbers of elements; `parameters()` may be theirs."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.numel() not in counts:
            return False
    for child in module._modules.values():
        if child is not None and not _has_only(child, counts):
            return False
    return True


def is_whole(module: nn.Module) -> bool:
    """Whether a module may go by itself alone: registered, or a nonlinearity written by hand."""
    if is_torchs(module) or isinstance(module, _CONTAINERS):
        return False
    if layers.is_registered(module) or module_sigma(module) is not None:
        return True
    return not module._modules and all(p.dim() <= 1 for p in module.parameters())


def verdict(frame: Frame, output: Any, record: Record) -> str | None:
    """The name of σ if a call of a module is one nonlinearity, given what the pass has shown."""
    if not isinstance(output, Tensor) or frame.x is None:
        return None
    if frame.kind == "sigma":
        if frame.ran:
            return module_sigma(frame.module)
        whole = frame.inner is not None and frame.inner[1] is output
        return frame.inner[0] if frame.inner and whole else patched_name(frame.module)
    if frame.degrees is None or output.shape != frame.x.shape:
        return None
    if not frame.degrees.is_nonlinear(output):
        return None
    inner = [e for e in record.events[frame.start :] if e.kind == "sigma"]
    # A function that is a nonlinearity in some of its calls has no σ of its own: it is a part.
    if len(inner) == 1 and (inner[0].function is None or describe(inner[0].function).sigma):
        event = inner[0]
        # A wrapper around one function or module is no nonlinearity of its own.
        same = event.x_held is frame.x_held or event.x is frame.x
        if same and event.y_held is record.aliases.reference(output):
            return None
    return name_by_hand(frame.module)


def name_by_hand(module: nn.Module) -> str:
    """What a nonlinearity written by hand goes by: its class, or the forward put into another."""
    kind = type(module).__name__
    if not type(module).__module__.startswith(_TORCHS):
        return kind
    name = getattr(module.forward, "__name__", "forward")
    return kind if name == "forward" else str(name)


def is_norm(frame: Frame, output: Any) -> bool:
    """Whether a call may be a norm written out by hand."""
    if frame.degrees is None or not frame.degrees.reduces or frame.x is None:
        return False
    return isinstance(output, Tensor) and output.shape == frame.x.shape


def norm_axis(module: nn.Module, output: Tensor) -> int:
    """The filter axis of such a norm."""
    channels = output.shape[1] if output.dim() == 4 else None
    return 1 if any(p.numel() == channels for p in module.parameters()) else -1
