"""A dispatch mode that sees the operators inside of a fused kernel."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fmapkit.torchlib.fused.layers import activation_of
from fmapkit.torchlib.fused.steps import Shown
from fmapkit.torchlib.memory import storage_of

_aten = torch.ops.aten
_KERNELS = frozenset(
    {
        _aten._transformer_encoder_layer_fwd.default,
        _aten._native_multi_head_attention.default,
        _aten._addmm_activation.default,
    }
)
# Products with a layer's weight: which argument that is, and which one the bias, if there is any.
_PRODUCTS = {
    _aten.mm.default: (1, None),
    _aten.addmm.default: (2, 0),
    _aten.linear.default: (1, 2),
}
_SIGMAS = frozenset({_aten.relu_.default, _aten.gelu_.default})


class Inside(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operators inside of a kernel.

    Args:
        entries: by which the kernel is called; of nested tensors.
        weights: of the layers, with their biases, by name.
        wanted: the names of the maps that are asked for; None for all.

    Attributes:
        found: the maps.
    """

    def __init__(
        self, entries: tuple[Any, Any], weights: Mapping[str, Any], wanted: Collection[str] | None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Shown = {}
        self._entries = entries
        self._weights = weights
        self._places = {_place(weight): name for name, (weight, _) in weights.items()}
        self._wanted = wanted
        self._product: str | None = None  # whose σ comes next, in the same call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KERNELS:
            if func is _aten._addmm_activation.default:
                self._product = self._places.get(_place(args[2]))
            with self:
                return func._op_dk(self._entries[args[0].is_nested], *args, **kwargs)
        if func in _SIGMAS and self._product is not None:
            return self._activation(func, args, kwargs)
        if func._schema.is_mutable:
            self._before_write(func, args, kwargs)
        output = func(*args, **kwargs)
        product = _PRODUCTS.get(func)
        if product is not None:
            weight, bias = product
            name = self._places.get(_place(args[weight]))
            if name is not None and self._asks(name):
                biased = bias is not None and len(args) > bias and args[bias] is not None
                self.found[name] = output, None if biased else self._weights[name][1]
        return output

    def _activation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """σ runs in place of a layer's z."""
        name, self._product = self._product, None
        assert name is not None
        if self._asks(name):
            self.found[name] = args[0].clone(), None
        output = func(*args, **kwargs)
        self.found[activation_of(name)] = args[0], None
        return output

    def _asks(self, name: str) -> bool:
        return self._wanted is None or name in self._wanted

    def _before_write(self, func: Any, args: Any, kwargs: Any) -> None:
        """An operator is about to write: a map that lies there is copied."""
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            target = args[at] if at < len(args) else kwargs.get(argument.name)
            if not isinstance(target, Tensor):
                continue
            memory = storage_of(target)
            for name, (tensor, bias) in self.found.items():
                if storage_of(tensor) == memory:
                    self.found[name] = tensor.clone(), bias


def _place(weight: Tensor) -> tuple[int, int]:
    """Tells a weight from others, turned over or not."""
    return weight.data_ptr(), weight.numel()
