"""What a tensor carries: filters of an `Origin`, as a `ChannelLabel`, or a parameter's values.

Data only. `provenance/propagate.py` says what each torch function makes of it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fmapkit.provenance.layout import ChannelLayout

# The tensors that are asked for: by module, and by who asks.
_kept: weakref.WeakKeyDictionary[nn.Module, dict[int, Tensor]] = weakref.WeakKeyDictionary()


class OfModule:
    """A parameter or buffer that a module has or had, for as long as the module is there.

    It takes the place of a weak reference: `torch.utils.swap_tensors`, by which `Module.to` and
    `load_state_dict` may work, refuses tensors that have one.
    """

    __slots__ = ("__weakref__", "_owner", "_which", "exchanged")

    def __init__(self, owner: nn.Module, tensor: Tensor) -> None:
        self._owner = weakref.ref(owner)
        self._which = id(owner), id(tensor)
        self.exchanged = False  # another one had taken its place when the pass ended
        _kept.setdefault(owner, {})[id(self)] = tensor

    def __call__(self) -> Tensor | None:
        """The tensor; None once the module is gone."""
        owner = self._owner()
        return None if owner is None else _kept[owner][id(self)]

    def compare(self, key: str) -> None:
        """A pass has ended in which it was used: note whether its module still has it as `key`."""
        owner = self._owner()
        if owner is not None:
            there = owner._parameters.get(key)
            self.exchanged = (owner._buffers.get(key) if there is None else there) is not self()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OfModule) and self._which == other._which and self() is other()

    def __hash__(self) -> int:
        return hash(self._which)

    def __del__(self, kept: Any = _kept) -> None:
        if not hasattr(self, "_which"):  # an interrupt has come as it was made
            return
        owner = self._owner()
        if owner is not None:
            kept[owner].pop(id(self), None)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a layer got its weight, or its bias."""

    # The module that has the parameter or buffer; None where it was computed in the pass.
    owner: Callable[[], nn.Module | None] | None = None
    key: str = ""  # what it is called there
    # Which tensor that was, while its module is there. No map keeps a module alive.
    ref: Callable[[], Tensor | None] | None = None
    # The part that was used: its shape, strides and offset, then the shape and strides of the
    # parameter; None for all of it.
    view: tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, ...], tuple[int, ...]] | None = (
        None
    )


@dataclass(frozen=True, slots=True)
class Made:
    """What a call of a layer made its filters of."""

    weight: Source = Source()  # where it got its weight
    bias: Source | None = None  # the same of its bias; None if it has none
    # Axes of the result that count filters, and which axes of the weight they are.
    places: tuple[tuple[int, int], ...] = ()
    # Where the filters lie in the result; None where that is not known.
    axes: ChannelLayout | None = None
    why: str = ""  # there is no weight that could be read; empty if there is

    @property
    def most(self) -> float:
        """How many filters the layer can have: as many as before, or as its weight has rows now."""
        owner = self.weight.owner() if self.weight.owner is not None else None
        if owner is None or self.axes is None or self.weight.view is not None:
            return math.inf
        now = owner._parameters.get(self.weight.key)
        before = math.prod(part.size for part in self.axes.parts)
        return max(before, *now.shape) if now is not None else math.inf


@dataclass(slots=True, eq=False, repr=False)
class Origin:
    """Where filters come from: one call of a layer, of a norm, or nothing that has filters.

    Compared by identity: two calls are two origins.
    """

    kind: str  # "layer", "norm" or "none"
    name: str = ""
    call: int = 0
    made: Made | None = None  # of a layer: what of
    claimed: bool = False  # a nonlinearity has received these filters
    used: dict[str, Any] | None = None  # what is held of weights that were computed

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}#{self.call}>"


NOWHERE = Origin("none")


@dataclass(frozen=True, slots=True)
class ChannelLabel:
    """What a tensor carries: filters of `origin`, lying along `axes`.

    `gathered`: they were written into memory that had none. What is written there next, of another
    layer, is no summand of theirs: the tensor then has parts of several layers.
    """

    origin: Origin
    axes: ChannelLayout | None = None
    gathered: bool = False


STOP = ChannelLabel(NOWHERE)


@dataclass(frozen=True, slots=True)
class ParamLabel:
    """A parameter, or a tensor computed from parameters only.

    `axes` follows each axis of the parameter, one after the other: which of its indices the tensor
    has, and where. Of an axis that an index was picked from, no part is left, and the offset is
    that index. None where they are not known. `values` follows all of them as one, by the place of
    each value in the parameter: through a reshape, say, that puts two axes together. `by_value`: a
    tensor's value has picked the index, so the next pass may pick another one.
    """

    parameter: Tensor
    axes: tuple[ChannelLayout | None, ...] = ()
    values: ChannelLayout | None = None
    by_value: bool = False

    @staticmethod
    def whole(parameter: Tensor) -> ParamLabel:
        """A parameter as it is."""
        return ParamLabel(parameter, *ChannelLayout.of_each(tuple(parameter.shape)))


@dataclass(frozen=True, slots=True)
class ParamLabelRef:
    """A weight that a planned module returns: of what it is given, or of a parameter's place."""

    given: int = -1  # which tensor argument; -1 if it is none
    owner: nn.Module | None = None  # the module that has the parameter
    key: str = ""  # what it is called there
    # As of a `ParamLabel`; unknown of what is given, which may be another slice each time.
    axes: tuple[ChannelLayout | None, ...] = ()

    def weight(self, inputs: Sequence[Label]) -> ParamLabel | None:
        """The weight in a call that is given tensors which carry `inputs`."""
        if self.owner is not None:
            parameter = self.owner._parameters.get(self.key)
            return ParamLabel(parameter, self.axes) if parameter is not None else None
        found = inputs[self.given] if self.given < len(inputs) else None
        return ParamLabel(found.parameter) if isinstance(found, ParamLabel) else None


# What one tensor of this pass carries. What a plan says of tensors that are yet to come is told by
# places (`PlaceTag` in `replay/plan.py`): another type, so that neither is taken for the other.
Label = ChannelLabel | ParamLabel | None
# Of a nested result: lists of labels, nested alike.
Carried = ChannelLabel | ParamLabel | list[Any] | None
Lookup = Callable[[Any], Label]


def is_same(one: Label, other: Label) -> bool:
    """Whether two tensors carry the same; parameters are told by identity, not by their values."""
    return one is other or (isinstance(one, ChannelLabel) and one == other)


def channels_of(label: Lookup, value: Any) -> ChannelLabel | None:
    """What a value carries, if that is a channel label."""
    found = label(value)
    return found if isinstance(found, ChannelLabel) else None
