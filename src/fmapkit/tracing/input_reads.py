"""Truths and whole numbers that a model reads of what it is given, or has: `if mask.all()`.

Most branches on data, in models that people use, ask whether a mask has padding, whether a buffer
was initialized, or how long the longest text is. Such a value is a few functions away from the
inputs of a call and from the model's own tensors. So it can be read before the call, by the same
functions, and the call's path is known beforehand. Here the functions are noted as they run.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmapkit.provenance import Function, FunctionCall, words
from fmapkit.storage import Aliases
from fmapkit.torchlib.memory import storage_of
from fmapkit.torchlib.nested import tensors_in
from fmapkit.torchlib.operators import tree_leaves
from fmapkit.tracing.frames import Frame

# Are the same of the same tensors, write to none, never warn, and cost little beside a layer.
_CHEAP = words(
    """all any sum mean amax amin max min prod count_nonzero argmax argmin norm
    eq ne lt le gt ge isclose isnan isinf isfinite logical_not logical_and
    logical_or logical_xor bitwise_not bitwise_and bitwise_or bitwise_xor invert and or xor
    abs neg sign add radd sub rsub mul rmul div truediv rtruediv floordiv floor_divide mod
    remainder pow square sqrt exp log clamp clip floor ceil round minimum maximum diff cumsum
    to type bool int long float double half bfloat16 type_as detach cpu
    getitem select narrow squeeze unsqueeze view reshape flatten expand expand_as permute
    transpose t diagonal pad tril triu
    arange ones zeros full ones_like zeros_like full_like new_ones new_zeros new_full"""
)


@cache
def is_cheap(name: str) -> bool:
    """Whether a function, told by its name, may be run once more to know what it gives."""
    return name.strip("_") in _CHEAP


# Give a truth to Python; and the same of a tensor that is one.
_TRUTHS = {"__bool__", "__contains__", "is_nonzero", "equal", "allclose"}
_NUMBERS = {"item", "__int__", "__index__", "__float__"}
# Give whole numbers to Python, of tensors of these dtypes.
_WHOLE = {"item", "tolist", "__int__", "__index__"}
_WHOLE_DTYPES = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
# Give tensors whose sizes are data: of all their arguments, of masks, of how often to repeat what.
_SIZES = {"nonzero", "argwhere", "where", "unique", "unique_consecutive", "bincount"}
_BY_MASKS = {"__getitem__", "masked_select"}
_BY_TIMES = {"repeat_interleave"}
_MASKS = {torch.bool, torch.uint8}
_PLAIN = frozenset(
    {bool, float, str, type(None), type(...), torch.dtype, torch.device, torch.layout}
) | {torch.memory_format}
_SEVERAL: dict[type, type] = {tuple: tuple, list: list, torch.Size: tuple}
_TENSORS = frozenset({Tensor, nn.Parameter})
_MOST_FUNCTIONS = 12
_INDICES = {int, type(None), type(...)}
_BOUNDS = {int, type(None)}


class _Input(NamedTuple):
    """A tensor that the call is given, or that its module has, by its place among all of them."""

    place: int


class _FunctionOf(NamedTuple):
    """A function of torch's, and what it is given."""

    function: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


class _Several(NamedTuple):
    """A tuple, a list or a slice of such things."""

    kind: Any
    items: tuple[Any, ...]


_NUMBER = object()  # a whole number, which may follow the sizes of the inputs


@dataclass(frozen=True, slots=True)
class InputRead:
    """A truth, or whole numbers, as a function of what a call is given, and of what it has."""

    form: Any  # the functions, without their whole numbers
    numbers: tuple[int, ...]  # these, in order
    whole: bool  # it gives whole numbers

    def is_like(self, other: InputRead) -> bool:
        """Whether it is the same but for whole numbers."""
        alike = len(self.numbers) == len(other.numbers) and self.whole is other.whole
        return alike and bool(self.form == other.form)

    def told(self, value: Any) -> tuple[Any, tuple[int, ...]]:
        """What a value that was read says: a truth, or of what form it is; and its numbers."""
        if not self.whole:
            return bool(value), ()
        return _form_of(value), tuple(tree_leaves(value))


def read(form: Any, tensors: Sequence[Tensor], numbers: Iterator[int]) -> Any:
    """What the form of an `InputRead` gives, of a call's tensors and its whole numbers in order."""
    kind = type(form)
    if kind is _Input:
        return tensors[form.place]
    if kind is _FunctionOf:
        args = [read(value, tensors, numbers) for value in form.args]
        return form.function(*args, **{k: read(v, tensors, numbers) for k, v in form.kwargs})
    if kind is _Several:
        items = [read(value, tensors, numbers) for value in form.items]
        return slice(*items) if form.kind is slice else form.kind(items)
    return next(numbers) if form is _NUMBER else form


def _form_of(value: Any) -> Any:
    """How many numbers there are, in a list, or in lists in it."""
    return (list, *map(_form_of, value)) if type(value) is list else None


# How a tensor was made: it, the function, what that was given by place and by keyword, and how
# many writes there had been.
_MadeTensor = tuple[weakref.ref[Tensor], Any, tuple[Any, ...], tuple[tuple[str, Any], ...], int]
# A tensor that a function was given: it, how that was made, if that is known, and when it had been
# written to the last time. None is kept alive by that, and its memory counts its users. (Plain
# tuples: they are made for each function of a pass, and nearly all of them for nothing.)
_TensorGiven = tuple[weakref.ref[Tensor], "_MadeTensor | None", int]


class _NotOfInputsError(Exception):
    """A value is no function of the inputs that is known here."""


class MadeTensors:
    """The tensors of a pass that were made by cheap functions."""

    def __init__(self, aliases: Aliases) -> None:
        self._aliases = aliases
        self._made: dict[int, _MadeTensor] = {}
        self._given: set[int] = set()  # the tensors that calls were given so far, by their ids

    def enter(self, given: Iterable[Tensor]) -> None:
        """A module's call begins, which is given some tensors."""
        self._given.update(map(id, given))

    def add(self, known: Function, call: FunctionCall) -> None:
        """A function has run that `is_cheap`."""
        if type(call.out) is not Tensor or not known.never_writes or "out" in call.kwargs:
            return
        operands = set(map(id, call.operands))
        if operands and operands.isdisjoint(self._given) and operands.isdisjoint(self._made):
            return  # it is a function of nothing that any call was given
        try:
            rows, named = self._arguments(call.args, call.kwargs)
        except _NotOfInputsError:
            return
        out = weakref.ref(call.out)
        self._made[id(call.out)] = out, call.function, rows, named, self._aliases.writes

    def of_inputs(
        self, known: Function, function: Any, args: Any, kwargs: Any, frame: Frame
    ) -> InputRead | None:
        """What a function is about to read, as one of what a running call was given, and has.

        None if it is neither truth nor whole, or comes from elsewhere, too, or from far away.
        """
        whole = True
        if sizes_are_data(known.name):
            counting = _sizes_by(known.name, function, args, kwargs)
            if counting is None:
                return None
            function, args, kwargs = counting
        elif known.name in _TRUTHS:
            whole = False
        elif known.name not in _WHOLE and known.name not in _NUMBERS:
            return None
        else:
            dtype = args[0].dtype
            whole = known.name in _WHOLE and dtype in _WHOLE_DTYPES
            if not whole and (known.name not in _NUMBERS or dtype is not torch.bool):
                return None
        writer = _FormWriter(frame, self._aliases.written_since(frame.writes))
        try:
            form = writer.call(function, *self._arguments(args, kwargs))
        except _NotOfInputsError:
            return None
        return InputRead(form, tuple(writer.numbers), whole)

    def _arguments(
        self, args: Any, kwargs: Any
    ) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
        """What a function is given, without the tensors themselves."""
        rows = tuple(map(self._part, args))
        return rows, tuple([(k, self._part(v)) for k, v in kwargs.items()]) if kwargs else ()

    def _part(self, value: Any) -> Any:
        kind = type(value)
        if kind in _TENSORS:
            writes = self._aliases.written
            written = writes.get(storage_of(value), -1) if writes else -1
            made = self._made.get(id(value))
            if made is not None and (made[0]() is not value or written >= made[-1]):
                made = None
            return weakref.ref(value), made, written
        if kind is int or kind in _PLAIN:
            return value
        if kind in _SEVERAL:
            return _Several(_SEVERAL[kind], tuple(map(self._part, value)))
        if kind is slice:
            return _Several(slice, tuple(map(self._part, (value.start, value.stop, value.step))))
        raise _NotOfInputsError


def sizes_are_data(name: str) -> bool:
    """Whether a function, told by its name, gives tensors whose sizes are data."""
    return name in _SIZES or name in _BY_MASKS or name in _BY_TIMES


def sizes_given(name: str, function: Any, args: Any, kwargs: Any) -> list[int]:
    """The whole numbers that the sizes follow of what such a function gives."""
    counting = _sizes_by(name, function, args, kwargs)
    assert counting is not None
    function, args, kwargs = counting
    found: list[int] = function(*args, **kwargs)
    return found


def _sizes_by(name: str, function: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any] | None:
    """A function that gives these numbers, with its arguments; None if more than they is data."""
    if name in _SIZES:
        return _sizes_of(function), args, kwargs
    if name in _BY_TIMES:
        times = kwargs.get("repeats", args[1] if len(args) > 1 else None)
        return (_total, (times,), {}) if isinstance(times, Tensor) else None
    if kwargs or len(args) < 2:
        return None
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not all(isinstance(part, Tensor) or _is_plain_index(part) for part in index):
        return None
    return _counts, tuple([p for p in index if isinstance(p, Tensor) and p.dtype in _MASKS]), {}


def _is_plain_index(part: Any) -> bool:
    kinds = (type(part.start), type(part.stop), type(part.step)) if type(part) is slice else ()
    return type(part) in _INDICES or (bool(kinds) and _BOUNDS.issuperset(kinds))


def _counts(*masks: Tensor) -> list[int]:
    return [int(torch.count_nonzero(mask)) for mask in masks]


def _total(times: Tensor) -> list[int]:
    return [int(times.sum())]


@cache
def _sizes_of(function: Any) -> Callable[..., list[int]]:
    """What gives the sizes of all tensors that a function gives."""

    def sizes(*args: Any, **kwargs: Any) -> list[int]:
        return [size for out in tensors_in(function(*args, **kwargs)) for size in out.shape]

    return sizes


class _FormWriter:
    """Writes a value as a function of what a call was given."""

    def __init__(self, frame: Frame, written: set[int]) -> None:
        self._writes = frame.writes
        self._places = _places_of(frame.given(), [one() for one in frame.own], written)
        self._knows_floats = not _has_float((frame.args, frame.kwargs))
        self._left = _MOST_FUNCTIONS
        self.numbers: list[int] = []

    def call(self, function: Any, args: Any, kwargs: Any) -> _FunctionOf:
        """A function, and what it is given."""
        self._left -= 1
        if self._left < 0:
            raise _NotOfInputsError
        rows = tuple([self._value(value) for value in args])
        return _FunctionOf(function, rows, tuple([(k, self._value(v)) for k, v in kwargs]))

    def _value(self, value: Any) -> Any:
        kind = type(value)
        if kind is int:
            self.numbers.append(value)
            return _NUMBER
        if kind is _Several:
            return _Several(value.kind, tuple([self._value(v) for v in value.items]))
        if kind is not tuple:
            if kind is float and not self._knows_floats:  # it may be one that the call is given
                raise _NotOfInputsError
            return value
        ref, made, written = value
        tensor = ref()
        place = self._places.get(id(tensor)) if tensor is not None else None
        if place is not None and written < self._writes:
            return _Input(place)
        if made is None:
            raise _NotOfInputsError
        _, function, args, kwargs, _ = made
        return self.call(function, args, kwargs)


def _places_of(given: list[Tensor | None], own: list[Any], written: set[int]) -> dict[int, int]:
    """Where each tensor is among those that a call is given, or has, by its id.

    One that is given twice has no place: the next call may be given two. Nor has one if another of
    its kind, that is given, was written to: in the next call, the two may share memory.
    """
    tensors = [*given, *own]
    rewritten = [t for t in given if written and t is not None and storage_of(t) in written]
    times = Counter(map(id, tensors))
    found: dict[int, int] = {}
    for place, tensor in enumerate(tensors):
        if tensor is not None and type(tensor) in _TENSORS and times[id(tensor)] == 1:
            if all(t is tensor or t.dtype is not tensor.dtype for t in rewritten):
                found[id(tensor)] = place
    return found


def _has_float(value: Any) -> bool:
    """Whether arguments have a number in them that no form of theirs tells."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return any(map(_has_float, value))
    return isinstance(value, float)
