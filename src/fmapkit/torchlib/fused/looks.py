"""Whether torch fuses a layer, as it was found before, where nothing is there to change that.

To run a layer's forward up to its decision takes as long as a small kernel itself. It decides by
what it is given, by the modes, by attributes of the layer and of the modules in it, and by their
parameters. Where all of these are as they were, so is the kernel, with other inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.torchlib.caching import DictWatch, writes_are_counted
from fmapkit.torchlib.fused.kernels import FusedKernel
from fmapkit.torchlib.fused.paths import fused_kernel
from fmapkit.torchlib.modes import dispatch_mode_count
from fmapkit.torchlib.nested import modules_in
from fmapkit.torchlib.tensor_spec import autocasting

# An encoder decides by its data, and a subclass by whatever its code says.
_LAYERS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
_PLAIN = frozenset({type(None), bool, int, float})
_TORCHS = "torch.nn.modules."
_type = operator.attrgetter("dtype", "device", "__class__")


class FusedLooks:
    """What the layers of one capture were found to do."""

    def __init__(self) -> None:
        self._known: dict[nn.Module, _Look] = {}

    def kernel(self, forward: Any, module: nn.Module, args: Any, kwargs: Any) -> FusedKernel | None:
        """The same as `fused_kernel`."""
        given = (*args, *kwargs.values())
        form = _form(given, kwargs) if writes_are_counted and type(module) in _LAYERS else None
        known = self._known.pop(module, None) if form is not None else None
        if known is not None and known.holds(form):
            self._known[module] = known
            if known.lasts:
                return known.kernel(module, given)
        kernel = fused_kernel(forward, module, args, kwargs)
        if form is not None and kernel is not None and module not in self._known:
            self._known[module] = _Look(kernel, form, given)
        return kernel


def _form(given: Sequence[Any], names: Any) -> Any:
    """All that torch decides by of what a layer is given, and of the modes; None: of more."""
    if torch.is_grad_enabled() or autocasting() or dispatch_mode_count():
        return None  # then parameters may decide, by what nothing tells of, or who looks on
    found: list[Any] = [*names]
    places: dict[int, int] = {}
    for value in given:
        if type(value) is Tensor:
            first = places.setdefault(id(value), len(places))
            found += first, value.dim(), value.dtype, value.device, value.is_nested
        elif type(value) in _PLAIN:
            found += type(value), value
        else:
            return None
    return found


class _Look:
    """What a layer was found to do, in a call of a form (see `_form`)."""

    def __init__(self, kernel: FusedKernel, form: Any, given: Sequence[Any]) -> None:
        inside = list(modules_in(kernel.module))
        self._form = form
        self._hooks = [h for m in inside for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._dicts = DictWatch(
            d for m in inside for d in (m.__dict__, m._parameters, m._modules, m._buffers)
        )
        self._dicts.written()
        self._function = kernel.function
        # Which of its arguments are the layer's; the others are its own.
        places = {id(value): at for at, value in enumerate(given) if isinstance(value, Tensor)}
        self._places = [(at, places[id(a)]) for at, a in enumerate(kernel.args) if id(a) in places]
        inputs = {at for at, _ in self._places}
        self._args = [None if at in inputs else a for at, a in enumerate(kernel.args)]
        own = {id(p) for m in inside for p in m._parameters.values()}
        torchs = all(str(type(m).__module__).startswith(_TORCHS) for m in inside)
        self._weights = [a for a in self._args if isinstance(a, Tensor)]
        self._types = list(map(_type, self._weights))
        # It would call the same kernel again. What it has made of its arguments, as one mask of
        # two, it makes anew each time; and code of others may give it other attributes.
        self.lasts = torchs and not kernel.kwargs and all(id(w) in own for w in self._weights)

    def holds(self, form: Any) -> bool:
        """Whether a call of a form would do the same."""
        if self._dicts.written() or form != self._form:
            return False
        return not any(self._hooks) and list(map(_type, self._weights)) == self._types

    def kernel(self, module: nn.Module, given: Sequence[Any]) -> FusedKernel:
        """The kernel that it calls, for other arguments of that form."""
        args = self._args.copy()
        for at, place in self._places:
            args[at] = given[place]
        return FusedKernel(module, self._function, args, {})
