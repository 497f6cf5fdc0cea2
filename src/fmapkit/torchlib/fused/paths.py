"""torch's fused inference paths: what they would have returned.

In eval mode without gradients, `nn.TransformerEncoderLayer`, `nn.TransformerEncoder` (with nested
tensors) and `nn.MultiheadAttention` run one kernel for the layer, unless somebody watches: a hook
or a function mode sends them down the ordinary path, whose results differ in the last bits (and,
for nested tensors, at padded positions). A captured model must not tell the difference. So the
output is the fused path's, and so are the maps, where its kernel shows them.

Whether it would be taken is torch's own decision: its forward is run up to that point, with the
checks for watchers answering no, and the fused call and the ordinary path replaced by signals.
What the fused kernel computes inside is told in `torchlib/fused/kernels.py`.

Code of the model's may run these forwards past the module's call, as a subclass's forward does. So
where such a call is written, it is a matter of whoever captures (`paths/rewriting/torch_calls.py`);
and what torch's own forwards ask is answered as if our modes were not there, or, while they run for
their maps, with no.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from itertools import chain
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from fmapkit.torchlib.fused.kernels import FusedKernel, kernel_runners
from fmapkit.torchlib.modes import all_ours, mode_count, without_modes
from fmapkit.torchlib.nested import modules_in

_TYPES = (nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.MultiheadAttention)
# Their own forwards, with the code that these have while nothing is captured.
_FORWARDS: dict[Any, types.CodeType] = {k.forward: k.forward.__code__ for k in _TYPES}
# The functions inside of these layers, and of others, that call layers and nonlinearities.
_LAYERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_INSIDE: dict[types.FunctionType, types.CodeType] = {
    function: function.__code__
    for function in (
        *(getattr(F, name, None) for name in ("_in_projection", "_in_projection_packed")),
        *(getattr(kind, "_ff_block", None) for kind in _LAYERS[1:]),
        F.multi_head_attention_forward,
    )
    if isinstance(function, types.FunctionType)  # private, so another torch may have others
}
# By their last names: those forwards, and the functions that they call to find out whether to fuse,
# or to do it.
FUSING_CALLS = frozenset(
    {"forward", "has_torch_function", "get_fastpath_enabled", "_transformer_encoder_layer_fwd"}
)
# By thread: what runs one of the forwards where the model's own code calls it; and the threads in
# which a module runs by the ordinary path, beside its fused one.
runners: dict[int, Callable[..., Any]] = {}
beside: set[int] = set()


class _FusedSignal(Exception):  # noqa: N818  (a signal, not an error)
    """The fused path would be taken, by this call."""

    def __init__(self, function: Any, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.call = function, args, kwargs


class _OrdinarySignal(Exception):  # noqa: N818
    """The ordinary path would be taken."""


def instead_of(function: Any) -> Any:
    """What is to be called in the place of one of `FUSING_CALLS`; any other function as it is."""
    inner = getattr(function, "__func__", function)
    if type(inner) is types.FunctionType and inner in _FORWARDS:
        run = runners.get(get_ident())
        return function if run is None else partial(run, function)
    if function is torch.overrides.has_torch_function:
        return partial(_without_ours, function)
    if function is torch.backends.mha.get_fastpath_enabled and get_ident() in beside:
        return bool
    if function is torch._transformer_encoder_layer_fwd and get_ident() in kernel_runners:
        return partial(kernel_runners[get_ident()], function)
    return function


def _without_ours(function: Callable[..., bool], *args: Any) -> bool:
    if not mode_count() or not all_ours():
        return function(*args)
    with without_modes():
        return function(*args)


def functions_inside(kind: type[nn.Module]) -> list[types.FunctionType]:
    """Of a class of modules: the forwards that may fuse, and what calls layers inside."""
    own = zip(_TYPES, _FORWARDS, strict=True)
    forwards = [forward for home, forward in own if issubclass(kind, home)]
    return forwards + [f for f in _INSIDE if issubclass(kind, _LAYERS)]


def is_torchs(code: types.CodeType) -> bool:
    """Whether code is that of one of these."""
    return any(code is own for own in (*_FORWARDS.values(), *_INSIDE.values()))


def fuses(module: nn.Module) -> bool:
    """Whether it is one of torch's modules with a fused path, with torch's own forward."""
    if not isinstance(module, _TYPES) or "forward" in module.__dict__:
        return False
    return type(module).forward in _FORWARDS


def fusing_of(module: nn.Module) -> Callable[[Iterable[Tensor]], Any] | None:
    """What tells by what torch decides whether to fuse that no argument's form tells.

    It is given the tensors that a call of the module is given. None if nothing in it may fuse.
    """
    fusing = [m for m in modules_in(module) if isinstance(m, _TYPES)]

    def told(tensors: Iterable[Tensor]) -> Any:
        graph = torch.is_grad_enabled()
        if graph:
            used = chain(tensors, *(m.parameters() for m in fusing))
            graph = any(t.requires_grad for t in used)
        return torch.backends.mha.get_fastpath_enabled(), graph

    return told if fusing else None


def code_inside(module: nn.Module) -> list[nn.Module]:
    """The modules in a layer that its ordinary path calls, and that have code of somebody else's.

    Those by which a weight is computed run for either path.
    """
    parts = [part for part in modules_in(module) if part is not module]
    lists = [part for part in parts if isinstance(part, ParametrizationList)]
    computing = {part for each in lists for part in modules_in(each)}
    return [
        part
        for part in parts
        if part not in computing
        and (not str(type(part).__module__).startswith("torch.") or "forward" in part.__dict__)
    ]


def may_fuse(module: nn.Module) -> bool:
    """Whether torch asks at all, as one of the forwards runs, whether to fuse.

    Somebody else's function mode sends it down the ordinary path.
    """
    if module.training or not all_ours():
        return False
    return bool(torch.backends.mha.get_fastpath_enabled())


def fused_kernel(forward: Any, module: nn.Module, args: Any, kwargs: Any) -> FusedKernel | None:
    """The call of a fused kernel that torch would make; None where it would not.

    An encoder's own one makes a nested tensor; it goes on to call its layers, which fuse in turn.
    The forward is one of torch's, and the module `may_fuse`.
    """
    try:
        _probe(forward)(_Probe(module), *args, **kwargs)
    except _FusedSignal as signal:
        own = isinstance(module, nn.TransformerEncoder)
        whole = partial(forward, module, *args, **kwargs) if own else None
        return FusedKernel(module, *signal.call, whole)
    except _OrdinarySignal:
        pass
    return None


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
            raise _FusedSignal(function, args, kwargs)

        return signal

    def ordinary(*args: Any, **kwargs: Any) -> Any:
        raise _OrdinarySignal

    names = (
        *("_transformer_encoder_layer_fwd", "_native_multi_head_attention"),
        "_nested_tensor_from_mask",
    )
    ask = partial(_without_ours, torch.overrides.has_torch_function)
    unwatched = _Namespace(torch.overrides, has_torch_function=ask)
    inside = dict(
        forward.__globals__,
        torch=_Namespace(
            torch, overrides=unwatched, **{n: fused(getattr(torch, n)) for n in names}
        ),
        F=_Namespace(nn.functional, multi_head_attention_forward=ordinary),
    )
    opened = types.FunctionType(
        _FORWARDS[forward], inside, forward.__name__, forward.__defaults__, forward.__closure__
    )
    opened.__kwdefaults__ = forward.__kwdefaults__
    return opened
