"""What torch's fused kernels compute inside, seen while they compute it.

To whoever looks at operators, such a kernel is one. Its own code calls others in its turn. Called
by its device's entry of the dispatcher, with a mode on the stack, it runs as it always does, to the
bit, and the mode sees each operator inside: the products with the weights of layers, and σ.

An encoder that is given padding goes by nested tensors: its layers' kernels see the tokens alone,
one after the other. What they show is put where it belongs, and is 0 at padding, of which nothing
was computed.

The ordinary path of the same module gives these maps other shapes here and there. What is told is
in its shapes, since that path runs where torch does not fuse: while a model is trained, for one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fmapkit.torchlib.fused.steps import Shown, in_steps, proven, telling
from fmapkit.torchlib.memory import storage_of
from fmapkit.torchlib.modes import dispatch_mode_count
from fmapkit.torchlib.tensor_spec import casts
from fmapkit.torchlib.transforms import transforming

_Key = torch._C.DispatchKey
# Where a kernel's own entry is in the dispatcher, by the type of device; that of nested tensors.
_ENTRIES = {
    "cpu": (_Key.CPU, _Key.NestedTensorCPU),
    "cuda": (_Key.CUDA, _Key.NestedTensorCUDA),
}
_TYPES = frozenset({Tensor, nn.Parameter})
# By thread: what runs the kernel of an encoder's layer while the encoder runs by its fused path.
kernel_runners: dict[int, Callable[..., Any]] = {}
# Names of maps. Of attention, its two projections; of an encoder layer, these and its own; of all
# an encoder's layers, the same after a number: "0.linear1".
_ATTENTION = ("in_proj", "out_proj")
_LAYERS = ("linear1", "linear2")
_OF_LAYER = (*_ATTENTION, *_LAYERS, "activation")
SIGMAS = frozenset({"relu", "gelu"})

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


def weights_of(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The weights and biases that a module's kernel is given, by the names of its maps."""
    if isinstance(module, nn.MultiheadAttention):
        return {
            "in_proj": (module.in_proj_weight, module.in_proj_bias),
            "out_proj": (module.out_proj.weight, module.out_proj.bias),
        }
    if isinstance(module, nn.TransformerEncoder):
        each = [
            (f"{n}.", layer)
            for n, layer in enumerate(module.layers)
            if isinstance(layer, nn.TransformerEncoderLayer)
        ]
        return {at + name: w for at, layer in each for name, w in weights_of(layer).items()}
    layers = {name: getattr(module, name) for name in _LAYERS}
    own = {name: (layer.weight, layer.bias) for name, layer in layers.items()}
    attention: Any = module.self_attn
    return weights_of(attention) | own


def activation_of(linear: str) -> str:
    """The map of σ after a layer."""
    return linear.removesuffix("linear1") + "activation"


class Inside(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operators inside of a kernel."""

    def __init__(
        self, entries: tuple[Any, Any], weights: Mapping[str, Any], wanted: Collection[str] | None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Shown = {}  # the maps
        self._entries = entries  # by which the kernel is called; of nested tensors
        self._weights = weights  # of the layers, with their biases, by name
        self._places = {_place(weight): name for name, (weight, _) in weights.items()}
        self._wanted = wanted  # the names of the maps that are asked for; None for all
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


class FusedKernel:
    """A call of a fused kernel, which torch would make for a module."""

    def __init__(
        self,
        module: nn.Module,
        function: Any,
        args: Any,
        kwargs: Any,
        whole: Callable[[], Any] | None = None,
    ) -> None:
        self.module = module
        self.function = function  # calls the kernel; of an encoder, leaves the padding out
        self.args = args  # of the function; the first is what the module was given
        self.kwargs = kwargs
        self._whole = whole  # the module's forward, if its layers' kernels are what is meant

    def __call__(self) -> Any:
        """Run it; what it returns."""
        if self._whole is not None:
            return self._whole()
        return self.function(*self.args, **self.kwargs)

    def run(self, wanted: Collection[str] | None = None) -> tuple[Any, KernelMaps]:
        """Run it, and see the `wanted` maps inside of it, by name; None for all.

        Returns:
            What it returns; and the maps, none where they cannot be seen.
        """
        given = self.args[0]
        known = given.device.type in _ENTRIES and given.dim() == 3 and given.numel()
        for tensor in self._tensors():
            known = known and type(tensor) in _TYPES and not tensor.is_nested
        if not known or dispatch_mode_count() or transforming() is not None:
            return self(), KernelMaps({}, ())
        keep = None if self._whole is None else self.args[1]
        found = None
        if casts() is None and given.is_cpu:
            if self._whole is not None:
                found = self._layer_by_layer()
            elif not self.kwargs:
                found = in_steps(self.function, self.args)
        output, shown = self._watched(wanted) if found is None else found
        return output, KernelMaps(shown, given.shape[:2], keep)

    def _layer_by_layer(self) -> tuple[Any, Shown] | None:
        """Run an encoder, and the kernels of its layers in steps; None if that cannot be."""
        shown: Shown = {}
        weights = weights_of(self.module)
        places = {id(w): name.rpartition(".")[0] for name, (w, _) in weights.items()}
        ran = []

        def in_its_steps(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            ran.append(kernel)
            found = in_steps(kernel, args) if not kwargs else None
            at = next((places[id(a)] for a in args if id(a) in places), None)
            if found is None or at is None:
                return kernel(*args, **kwargs)
            shown.update({f"{at}.{name}": of for name, of in found[1].items()})
            return found[0]

        kernel_runners[get_ident()] = in_its_steps
        try:
            output = self()
        finally:
            del kernel_runners[get_ident()]
        every = ran and len(shown) == len(ran) * len(_OF_LAYER)
        return (output, shown) if every else None

    def _watched(self, wanted: Collection[str] | None) -> tuple[Any, Shown]:
        """Run it with a mode on the stack."""
        entries, weights = _ENTRIES[self.args[0].device.type], weights_of(self.module)

        def both() -> tuple[Any, Any]:
            bare: Callable[[], Any] = self
            if self._whole is None:
                bare = partial(self.function, *telling(self.args), **self.kwargs)
            with Inside(entries, weights, ()):
                output = bare()
            return output, bare()

        if not proven(self._form(), both):
            return self(), {}
        with Inside(entries, weights, wanted) as inside:
            output = self()
        return output, inside.found

    def _form(self) -> Any:
        """What may make the mode's kernel another one than torch's own."""
        given = self.args[0]
        usual = given.stride() == torch.empty(given.shape, device="meta").stride()
        graph = tuple(t.requires_grad for t in self._tensors())
        told = Inside, self.function, given.device.type, given.dtype, casts(), graph
        strides = None if usual else (given.shape, given.stride())
        return *told, torch.is_inference_mode_enabled(), strides

    def _tensors(self) -> list[Tensor]:
        return [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor)]


class KernelMaps:
    """The maps of one call of a kernel, in the shapes of the ordinary path."""

    def __init__(self, shown: Shown, size: tuple[int, ...], keep: Tensor | None = None) -> None:
        self.names = shown.keys()
        self._shown = shown
        self._size = size  # samples, and tokens of each
        self._keep = keep  # which tokens are no padding, of which nothing was seen; None if all are
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """One of them, the same object each time."""
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = self._in_shape(name)
        return made

    def _in_shape(self, name: str) -> Tensor:
        tensor, bias = self._shown[name]
        if bias is not None:  # which the kernel adds as it goes on
            tensor = tensor + bias
        width = tensor.shape[-1]
        if self._keep is not None:
            rows, tensor = tensor, tensor.new_zeros(*self._size, width)
            tensor[self._keep] = rows
        tensor = tensor.view(*self._size, width)
        turned = _turned(name, tensor)
        if name != "out_proj" or storage_of(turned) != storage_of(tensor):
            return turned
        # Attention returns what it lies in, and whoever is given that may write to it.
        return turned.clone()

    def fits(self, name: str, ordinary: Tensor) -> bool:
        """Whether one of them is that map of the ordinary path, computed in another way."""
        found = self[name]
        if found.shape != ordinary.shape or found.dtype is not ordinary.dtype:
            return False
        if self._keep is not None:
            at = _turned(name, self._keep[..., None])[..., 0]
            found, ordinary = found[at], ordinary[at]
        most = float(ordinary.abs().nan_to_num(0.0, 0.0).amax()) if ordinary.numel() else 0.0
        return torch.allclose(found, ordinary, rtol=0.1, atol=0.1 * most, equal_nan=True)


def _turned(name: str, tensor: Tensor) -> Tensor:
    """(samples, tokens, ...) as the ordinary path has the map of a name."""
    kind = name.rpartition(".")[2]
    if kind not in _ATTENTION:
        return tensor
    turned = tensor.transpose(0, 1)  # attention has its tokens first
    return turned if kind == "in_proj" else turned.reshape(-1, tensor.shape[-1])
