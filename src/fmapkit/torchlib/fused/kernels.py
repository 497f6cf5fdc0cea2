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

from collections.abc import Callable, Collection, Iterator, Mapping
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fmapkit.torchlib.fused.steps import Shown, in_steps, same, telling
from fmapkit.torchlib.memory import storage_of, version_of
from fmapkit.torchlib.modes import ObserverMode, dispatch_mode_count
from fmapkit.torchlib.tensor_spec import casts
from fmapkit.torchlib.transforms import transforming

__all__ = ["FusedKernel", "KernelMaps", "OrdinaryPath"]

_aten = torch.ops.aten
_Key = torch._C.DispatchKey
# Where a kernel's own entry is in the dispatcher, by the type of device; that of nested tensors.
_ENTRIES = {
    "cpu": (_Key.CPU, _Key.NestedTensorCPU),
    "cuda": (_Key.CUDA, _Key.NestedTensorCUDA),
}
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
_SIGMA_NAMES = frozenset({"relu", "gelu"})
# The maps of a kernel: of attention, its two projections; of an encoder layer, these and its own.
_ATTENTION = ("in_proj", "out_proj")
_LAYERS = ("linear1", "linear2")
_OF_LAYER = (*_ATTENTION, *_LAYERS, "activation")

# By thread: what runs the kernel of an encoder's layer while the encoder runs by its fused path.
kernel_runners: dict[int, Callable[..., Any]] = {}
# By the form of a kernel's call: whether it was seen to return the same to the bit with a mode.
_proven: dict[Any, bool] = {}
_MOST = 4096


class FusedKernel:
    """A call of a fused kernel, which torch would make for a module.

    Args:
        module: of torch's.
        function: that calls the kernel; of an encoder, that leaves the padding out.
        args: its positional arguments; the first is what the module was given.
        kwargs: its keyword arguments.
        whole: the module's forward, if its layers' kernels are what is meant.
    """

    def __init__(
        self,
        module: nn.Module,
        function: Any,
        args: Any,
        kwargs: Any,
        whole: Callable[[], Any] | None = None,
    ) -> None:
        self.module = module
        self._function = function
        self._args = args
        self._kwargs = kwargs
        self._whole = whole

    def __call__(self) -> Any:
        """Run it; what it returns."""
        if self._whole is not None:
            return self._whole()
        return self._function(*self._args, **self._kwargs)

    def run(self, wanted: Collection[str] | None = None) -> tuple[Any, KernelMaps]:
        """Run it, and see what it computes inside.

        Args:
            wanted: the names of the maps; None for all.

        Returns:
            What it returns; and the maps, none where they cannot be seen.
        """
        given = self._args[0]
        plain = (type(a) in (Tensor, nn.Parameter) and not a.is_nested for a in self._tensors())
        known = given.device.type in _ENTRIES and given.dim() == 3 and given.numel()
        watched = dispatch_mode_count() or transforming() is not None
        if not known or watched or not all(plain):
            return self(), KernelMaps({}, ())
        keep, found = None, None
        if self._whole is not None:
            keep = self._args[1]
        if casts() is None and given.is_cpu:
            found = self._layer_by_layer() if self._whole is not None else self._in_steps()
        output, shown = self._watched(wanted) if found is None else found
        return output, KernelMaps(shown, given.shape[:2], keep)

    def _in_steps(self) -> tuple[Any, Shown] | None:
        return None if self._kwargs else in_steps(self._function, self._args)

    def _layer_by_layer(self) -> tuple[Any, Shown] | None:
        """Run an encoder, and the kernels of its layers in steps; None if that cannot be."""
        shown: Shown = {}
        layers: Any = self.module.layers
        places = {id(layer.linear1.weight): n for n, layer in enumerate(layers)}
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
        every = len(ran) == len(places) and len(shown) == len(ran) * len(_OF_LAYER)
        return (output, shown) if every else None

    def _watched(self, wanted: Collection[str] | None) -> tuple[Any, Shown]:
        """Run it with a mode on the stack."""
        entries, weights = _ENTRIES[self._args[0].device.type], _weights(self.module)
        form = self._form()
        if form not in _proven:
            if len(_proven) >= _MOST:
                _proven.clear()
            bare = self if self._whole is not None else self._telling()
            with _Inside(entries, weights, ()):
                output = bare()
            _proven[form] = same(output, bare())
        if not _proven[form]:
            return self(), {}
        with _Inside(entries, weights, wanted) as inside:
            output = self()
        return output, inside.found

    def _telling(self) -> FusedKernel:
        """The same call of another input."""
        return FusedKernel(self.module, self._function, telling(self._args), self._kwargs)

    def _form(self) -> Any:
        """What may make the mode's kernel another one than torch's own."""
        given = self._args[0]
        usual = given.stride() == torch.empty(given.shape, device="meta").stride()
        graph = tuple(t.requires_grad for t in self._tensors())
        told = self._function, given.device.type, given.dtype, casts(), graph
        strides = None if usual else (given.shape, given.stride())
        return *told, torch.is_inference_mode_enabled(), strides

    def _tensors(self) -> list[Tensor]:
        return [a for a in (*self._args, *self._kwargs.values()) if isinstance(a, Tensor)]


class KernelMaps(Mapping[str, Tensor]):
    """The maps of one call of a kernel, in the shapes of the ordinary path.

    Args:
        shown: what was seen of each.
        size: samples, and tokens of each.
        keep: which tokens are no padding, of which nothing was seen; None if all are.
    """

    def __init__(self, shown: Shown, size: tuple[int, ...], keep: Tensor | None = None) -> None:
        self._shown = shown
        self._size = size
        self._keep = keep
        self._made: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._shown)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shown)

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
        most = float(ordinary.abs().amax().nan_to_num(0.0, 0.0)) if ordinary.numel() else 0.0
        return torch.allclose(found, ordinary, rtol=0.1, atol=0.1 * most, equal_nan=True)


def _turned(name: str, tensor: Tensor) -> Tensor:
    """(samples, tokens, ...) as the ordinary path has the map of a name."""
    kind = name.rpartition(".")[2]
    if kind not in _ATTENTION:
        return tensor
    turned = tensor.transpose(0, 1)  # attention has its tokens first
    return turned if kind == "in_proj" else turned.reshape(-1, tensor.shape[-1])


class _Inside(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
        self.found[_activation(name)] = args[0], None
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


class OrdinaryPath(ObserverMode):
    """The ordinary path of a module runs, whose layers give what they gave in the fused kernel.

    It lies below the tracer on torch's stack, which so sees what the kernel computed.

    Args:
        module: of torch's.
        maps: of its kernel's call.
        opened: a function of torch's that hides from modes what it calls, as they see it; or None.

    Attributes:
        given: those that were given so far, by name.
    """

    def __init__(self, module: nn.Module, maps: KernelMaps, opened: Callable[[Any], Any]) -> None:
        super().__init__()
        self.given: dict[str, Tensor] = {}
        self._maps = maps
        self._opened = opened
        weights = _weights(module)
        names = {id(weight): name for name, (weight, _) in weights.items()}
        self._names = names if len(names) == len(weights) else {}  # two layers may have one weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        opened = self._opened(func)
        if opened is not None:
            with self:
                return opened(*args, **(kwargs or {}))
        version = version_of(args[0]) if args and isinstance(args[0], Tensor) else 0
        output = func(*args, **(kwargs or {}))
        if args and output is args[0]:
            if version_of(output) != version or (version < 0 and _in_place(func, kwargs)):
                self._written(func, output)
            return output
        name = None
        if func is F.linear:
            name = self._names.get(id(args[1])) if len(args) > 1 else None
        elif getattr(func, "__name__", "") in _SIGMA_NAMES and args:
            name = next((_activation(n) for n, z in self.given.items() if z is args[0]), None)
        if name is None or name not in self._maps or name in self.given:
            return output
        if not self._maps.fits(name, output):
            return output
        self.given[name] = self._maps[name]
        return self.given[name]

    def _written(self, func: Any, tensor: Tensor) -> None:
        """A function has worked in place: what lies there is the map no more that was given."""
        name = next((name for name, given in self.given.items() if given is tensor), None)
        if name is None:
            return
        del self.given[name]
        if name.endswith("linear1") and getattr(func, "__name__", "").rstrip("_") in _SIGMA_NAMES:
            self.given[_activation(name)] = tensor


def _in_place(func: Any, kwargs: Any) -> bool:
    """Whether a function works in place that has returned what it was given."""
    return func.__name__.endswith("_") or bool(kwargs and kwargs.get("inplace"))


def _weights(module: nn.Module) -> dict[str, tuple[Any, Any]]:
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
        return {at + name: w for at, layer in each for name, w in _weights(layer).items()}
    layers = {name: getattr(module, name) for name in _LAYERS}
    own = {name: (layer.weight, layer.bias) for name, layer in layers.items()}
    attention: Any = module.self_attn
    return _weights(attention) | own


def _activation(linear: str) -> str:
    """The map of σ after a layer."""
    return linear.removesuffix("linear1") + "activation"


def _place(weight: Tensor) -> tuple[int, int]:
    """Tells a weight from others, turned over or not."""
    return weight.data_ptr(), weight.numel()
