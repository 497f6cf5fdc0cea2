"""Where an edit is: `Where`, one small selector of maps, and the keys that say it in short."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fmapkit.errors import ArgumentError, did_you_mean, is_int, listed
from fmapkit.kinds import KINDS
from fmapkit.selection import indices

EDITABLE = tuple(kind for kind in KINDS if kind != "attention")

Numbers = int | Collection[int] | Callable[[int], bool]


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Where:
    """Which maps of a pass an edit is for, and which part of each.

    ```python
    where = Where("transformer.h.6", "output", at=-1, step=0)
    with capture(model, edit={where: edits.add(direction)}):
        model.generate(tokens)  # the last token of the prompt, in the prompt's pass alone
    ```

    Args:
        layer: as in `capture(layers=...)`: a name, glob, regex, module, module type, callable, or
            several of these.
        kind: "input" and "output" of any module; "response", "preactivation" and "activation" of
            a layer. By default the activation of a filter layer, and the output of another module.
        filter: an int: that filter's map alone, without the axis of filters. Several ints, or a
            range: a map of these filters, which keeps the axis.
        at: which positions, along the axes that count neither samples nor filters. An int, a slice
            or a list of ints for the tokens of (N, T, C); a tuple with one of these for each axis
            for pixels, (y, x); as indexing does, several lists pick points. A tensor of ints is for
            each sample its own: (N,), or (N, k) for k positions. A tensor of bools is a mask of
            positions, (T,) or (N, T). Or a function that gets the `FeatureMap` and returns these.
        path: which tensor of a nested input or output: "[0]", "['w']", ".logits". Of an input,
            arguments are "[0]", "[1]", and those given by keyword "['mask']"; by default the first.
        call: which calls of the layer in a pass: an int, several, or a function of the number.
        step: which passes of the block, in the same way: 0 is the prompt's pass of one
            `generate()`, 2 the third step of a diffusion model.
        filter_axis: the axis of filters (hidden units), where the data does not tell.
        batch_axis: the axis of samples; None where there is none.
        optional: a pass in which nothing was there to edit is none to complain of.

    Raises:
        ArgumentError: an argument is of no allowed form.
    """

    layer: Any
    kind: str | None = None
    filter: int | Iterable[int] | None = None
    _: KW_ONLY
    at: Any = None
    path: str | None = None
    call: Numbers | None = None
    step: Numbers | None = None
    filter_axis: int | None = None
    batch_axis: int | None = 0
    optional: bool = False

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in EDITABLE:
            hint = did_you_mean(self.kind, EDITABLE) if isinstance(self.kind, str) else ""
            raise ArgumentError(
                f"{self!r}: the kind must be one of {listed(EDITABLE)}{hint}", candidates=EDITABLE
            )
        if self.filter is not None and not is_int(self.filter):
            object.__setattr__(self, "filter", indices(self.filter, f"the filters of {self!r}"))
        if self.path is not None and not isinstance(self.path, str):
            raise ArgumentError(f"{self!r}: a path is text such as '[0]' or '.logits'")
        if self.path is not None and self.kind not in ("input", "output"):
            raise ArgumentError(
                f"{self!r}: only an 'input' or an 'output' has paths, and the kind says neither"
            )
        for name in ("call", "step"):
            _check_numbers(self, name)
        for name in ("filter_axis", "batch_axis"):
            axis = getattr(self, name)
            if axis is not None and not is_int(axis):
                raise ArgumentError(f"{self!r}: {name} must be an int, or None")
        if not isinstance(self.optional, bool):
            raise ArgumentError(f"{self!r}: optional must be True or False")
        _check_positions(self, self.at)

    def __repr__(self) -> str:
        layer = self.layer
        plain = isinstance(layer, (str, list, tuple))
        name = getattr(layer, "__qualname__", None) or type(layer).__name__
        said = [repr(layer) if plain else name]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is not field.default and value != field.default:
                shown = f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                said.append(f"{field.name}={shown}")
        return f"Where({', '.join(said)})"

    @staticmethod
    def of(key: Any) -> Where:
        """What a key of `edit={...}` means.

        Raises:
            ArgumentError: it is of no allowed form.
        """
        if isinstance(key, Where):
            return key
        parts = key if isinstance(key, tuple) else (key,)
        if not 1 <= len(parts) <= 3:
            raise ArgumentError(
                f"edit[{key!r}]: a key is a layer, (layer, kind), (layer, kind, filters) or "
                "(layer, kind, path); edits.Where(...) says more: at=, call=, step="
            )
        if len(parts) == 3 and isinstance(parts[2], str):
            return Where(parts[0], parts[1], path=parts[2])
        return Where(*parts)

    def has_call(self, call: int) -> bool:
        """Whether that call of the layer is meant."""
        return _has(self.call, call)

    def has_step(self, step: int) -> bool:
        """Whether that pass is meant."""
        return _has(self.step, step)


def _has(wanted: Numbers | None, number: int) -> bool:
    if wanted is None:
        return True
    if isinstance(wanted, int):
        return wanted == number
    return number in wanted if isinstance(wanted, Collection) else bool(wanted(number))


def _check_numbers(where: Where, name: str) -> None:
    value = getattr(where, name)
    if value is None or (callable(value) and not isinstance(value, (type, Collection))):
        return
    several = isinstance(value, Collection) and not isinstance(value, (str, bytes, Tensor))
    numbers = list(value) if several else [value]
    if not numbers or any(not is_int(n) or n < 0 for n in numbers):
        raise ArgumentError(
            f"{where!r}: {name} must be a number from 0, several, or a function of the number"
        )


def _check_positions(where: Where, at: Any) -> None:
    """Of the forms that `at` may have, without the map."""
    if at is None or (callable(at) and not isinstance(at, (type, Tensor))):
        return
    for part in at if isinstance(at, tuple) else (at,):
        known = is_int(part) or isinstance(part, slice)
        if isinstance(part, Tensor):
            whole = not part.is_floating_point() and not part.is_complex()
            known = whole and part.dtype is not torch.uint8
        elif isinstance(part, (list, range)):
            known = len(part) > 0 and all(map(is_int, part))
        if known:
            continue
        raise ArgumentError(
            f"{where!r}: at must be an int, a slice, a list of ints, a tensor of ints (one for "
            "each sample) or of bools (a mask), or a tuple of these, one for each axis of positions"
        )
