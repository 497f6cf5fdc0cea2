"""What a torch function is given in one call, and whether another call is given the same.

The same tensors of the pass, by their slots; the parameters at the same places of the model;
tensors that carry nothing where such were, with as many axes; and, of all else, equal plain values.
What else differs may not matter: the call has *varied*.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit._nested import tensors_in

__all__ = ["FREE", "NO", "OWN", "SAME", "VARIED", "Home", "Operands", "Source"]

NO, SAME, VARIED = 0, 1, 2

# Where a tensor is from: its slot in the pass, or one of these.
OWN, FREE = -1, -2  # a parameter of the model; something that carries nothing
Source = Callable[[Tensor], int]
Home = Callable[[Tensor], "tuple[nn.Module, str] | None"]
_Refs = Sequence["weakref.ref[Tensor]"]

_PLAIN = (
    *(type(None), bool, int, float, complex, str, type(Ellipsis)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


class Operands:
    """The arguments of one call.

    Args:
        args: by place.
        kwargs: by keyword.
        source: tells where a tensor is from.
        home: tells where in the model a parameter is.
    """

    __slots__ = (
        *("_alien", "_free", "_nested", "_odd", "_own", "_plain", "_slots", "count", "names"),
    )

    def __init__(self, args: Any, kwargs: dict[str, Any], source: Source, home: Home) -> None:
        values = (*args, *kwargs.values())
        self.count = len(values)
        self.names = tuple(kwargs)
        slots, alien, free, plain, nested = [], [], [], [], []
        own: list[Any] = []
        self._odd = False  # something that cannot be compared
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                found = source(value)
                if found >= 0:
                    slots.append((place, found))
                elif found == OWN and (at := home(value)) is not None:
                    own.append((place, at[0]._parameters, at[1], value.dim()))
                elif found == OWN:  # nobody's that we know of
                    alien.append((place, weakref.ref(value), value.dim()))
                else:
                    free.append((place, value.dim(), value.dtype is torch.bool))
            elif _is_plain(value):
                plain.append((place, _as_it_is(value)))
            elif type(value) in (tuple, list, dict):
                nested.append((place, type(value), Operands(*_inside(value), source, home)))
            else:
                self._odd = True
        self._slots, self._own, self._free = tuple(slots), tuple(own), tuple(free)
        self._alien = tuple(alien)
        self._plain, self._nested = tuple(plain), tuple(nested)

    def match(self, args: Any, kwargs: dict[str, Any], refs: _Refs, source: Source) -> int:
        """NO, SAME or VARIED.

        Args:
            args: of the other call, by place.
            kwargs: by keyword.
            refs: the tensor in each slot of the other pass.
            source: tells where a tensor of it is from.
        """
        if kwargs:
            if tuple(kwargs) != self.names:
                return NO
            args = (*args, *kwargs.values())
        elif self.names:
            return NO
        if len(args) != self.count:
            return NO
        for place, slot in self._slots:
            if refs[slot]() is not args[place]:
                return NO
        for place, held, key, dims in self._own:
            value = args[place]
            if not isinstance(value, Tensor) or held.get(key) is not value or value.dim() != dims:
                return NO
        for place, parameter, dims in self._alien:
            value = args[place]
            if not isinstance(value, Tensor) or parameter() is not value or value.dim() != dims:
                return NO
        for place, dims, mask in self._free:
            value = args[place]
            if not isinstance(value, Tensor) or source(value) != FREE:
                return NO
            if value.dim() != dims or (value.dtype is torch.bool) is not mask:
                return NO
        found = SAME
        for place, plain in self._plain:
            value = args[place]
            if value is not plain and (type(value) is not type(plain) or value != plain):
                if isinstance(value, Tensor) or tensors_in(value):
                    return NO
                found = VARIED
        for place, kind, inside in self._nested:
            value = args[place]
            if type(value) is not kind:
                return NO
            inner = inside.match(*_inside(value), refs, source)
            if inner == NO:
                return NO
            found = max(found, inner)
        return VARIED if self._odd else found


def _inside(value: Any) -> tuple[Any, dict[Any, Any]]:
    return ((), value) if type(value) is dict else (value, {})


def _as_it_is(value: Any) -> Any:
    """The same value, which nobody can change."""
    if type(value) in (tuple, list):
        return type(value)(map(_as_it_is, value))
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if type(value) is slice:
        return all(type(v) in (int, type(None)) for v in (value.start, value.stop, value.step))
    if type(value) in (tuple, list, torch.Size):
        return all(map(_is_plain, value))
    return False
