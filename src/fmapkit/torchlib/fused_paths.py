"""torch's fused inference paths: what they would have returned.

In eval mode without gradients, `nn.TransformerEncoderLayer`, `nn.TransformerEncoder` (with nested
tensors) and `nn.MultiheadAttention` run one kernel for the layer, unless somebody watches: a hook
or a function mode sends them down the ordinary path, whose results differ in the last bits (and,
for nested tensors, at padded positions). A captured model must not tell the difference. So the maps
come from the ordinary path, which has a nonlinearity to see, and the output is the fused path's.

Whether it would be taken is torch's own decision: its forward is run up to that point, with the
checks for watchers answering no, and the fused call and the ordinary path replaced by signals.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn

__all__ = ["fused_output", "fuses", "may_fuse", "overrides_fused"]

_TYPES = (nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.MultiheadAttention)


class _FusedSignal(Exception):  # noqa: N818  (a signal, not an error)
    """The fused path would be taken; `call` takes it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__()
        self.call = call


class _OrdinarySignal(Exception):  # noqa: N818
    """The ordinary path would be taken."""


def fuses(module: nn.Module) -> bool:
    """Whether it is one of torch's modules with a fused path, which its own forward takes."""
    return isinstance(module, _TYPES) and type(module).forward is _home(module).forward


def overrides_fused(module: nn.Module) -> bool:
    """Whether its forward is another one, which may call that of torch's module."""
    return isinstance(module, _TYPES) and not fuses(module)


def _home(module: nn.Module) -> Any:
    return next(t for t in _TYPES if isinstance(module, t))


def may_fuse(module: nn.Module, ours: tuple[type, ...]) -> bool:
    """Whether it is one of torch's modules with a fused path, in eval mode.

    Args:
        module: about to run.
        ours: the function modes that are not there without capture.
    """
    if not isinstance(module, _TYPES) or module.training or not fuses(module):
        return False
    stack = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    if not all(isinstance(mode, ours) for mode in stack):
        return False  # somebody else's mode watches: torch takes the ordinary path
    return bool(torch.backends.mha.get_fastpath_enabled())


def fused_output(
    module: nn.Module, args: Any, kwargs: Any, bare: Callable[[], Any]
) -> tuple[bool, Any]:
    """Run the fused path, if torch would.

    Args:
        module: one that `may_fuse`.
        args: positional arguments of its forward.
        kwargs: keyword arguments of its forward.
        bare: runs the module's forward unwatched, for the path that calls other modules.

    Returns:
        Whether it would, and what it returns.
    """
    try:
        _probe(type(module).forward)(_Probe(module), *args, **kwargs)
    except _OrdinarySignal:
        return False, None
    except _FusedSignal as signal:
        if isinstance(module, nn.TransformerEncoder):
            return True, bare()
        return True, signal.call()
    return False, None


class _Probe:
    """Stands for the module while its forward decides: attributes are real, the work is not."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name in ("_sa_block", "_ff_block"):
            raise _OrdinarySignal
        found = getattr(self._module, name)
        return _Layers(found) if name == "layers" else found


class _Layers:
    """The first layer decides; calling them in turn is the ordinary path."""

    def __init__(self, layers: Any) -> None:
        self._layers = layers

    def __getitem__(self, index: int) -> Any:
        return self._layers[index]

    def __iter__(self) -> Any:
        raise _OrdinarySignal


class _Namespace:
    """A module of functions with some of them replaced."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


@lru_cache(maxsize=8)
def _probe(forward: Any) -> Any:
    """The module's own forward, with the signals in place."""

    def fused(function: Any) -> Any:
        def signal(*args: Any, **kwargs: Any) -> Any:
            raise _FusedSignal(lambda: function(*args, **kwargs))

        return signal

    def ordinary(*args: Any, **kwargs: Any) -> Any:
        raise _OrdinarySignal

    names = (
        *("_transformer_encoder_layer_fwd", "_native_multi_head_attention"),
        "_nested_tensor_from_mask",
    )
    unwatched = _Namespace(torch.overrides, has_torch_function=lambda *_: False)
    inside = dict(
        forward.__globals__,
        torch=_Namespace(
            torch, overrides=unwatched, **{n: fused(getattr(torch, n)) for n in names}
        ),
        F=_Namespace(nn.functional, multi_head_attention_forward=ordinary),
    )
    opened = types.FunctionType(
        forward.__code__, inside, forward.__name__, forward.__defaults__, forward.__closure__
    )
    opened.__kwdefaults__ = forward.__kwdefaults__
    return opened
