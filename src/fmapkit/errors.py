"""What can go wrong, as one tree.

FmapkitError
├── ArgumentError (ValueError)            an argument that cannot be meant
│   ├── NotAModuleError (TypeError)       `capture` was given something that is no `nn.Module`
│   └── UnknownLayerError (KeyError)      no layer of that name; also raised by look-ups
├── MapLookupError (KeyError)             the question has no single answer
│   ├── UnknownLayerError
│   ├── NoActivationError                 no nonlinearity follows that layer
│   ├── KindNotCapturedError              that kind was not asked for, or the layer has none
│   ├── AmbiguousMapError                 several maps answer; the message lists them
│   ├── FilterRangeError (IndexError)     the map has no such filter, or does not hold it
│   └── NoPassError                       nothing has been captured yet
├── MapStateError (RuntimeError)          the map was there, and no longer is what it was
│   ├── MapOverwrittenError               its memory has been written to since
│   └── MapReleasedError                  it was let go (`clear()`)
├── DistributedError (RuntimeError)       ranks have nothing to put together, or do not agree
├── BudgetError (RuntimeError)            a pass holds more than `capture(max_bytes=...)` allows
├── NonFiniteError (ArithmeticError)      a map, or its gradient, has a NaN or an infinite value
├── StoreError (RuntimeError)             features of a data set cannot be written, or read
│   └── StoreMismatchError (ValueError)   the place holds features of another call
├── EditError (ValueError)                an edit found no place, or gave what cannot go on there
└── CaptureStateError (RuntimeError)      a capture used out of turn: entered twice, beside an edit

CaptureWarning (UserWarning)              something could not be captured; named in `maps.missed`

Each carries what its message says as data, too: `layer`, `kind`, `filter`, `call`, `step`, `bytes`
and `candidates`, None or empty where it is not about one.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import nn
from typing_extensions import Self

from fmapkit.kinds import KINDS, Kind
from fmapkit.nonfinite import NonFinite

__all__ = [
    "AmbiguousMapError",
    "ArgumentError",
    "BudgetError",
    "CaptureStateError",
    "CaptureWarning",
    "DistributedError",
    "EditError",
    "FilterRangeError",
    "FmapkitError",
    "KindNotCapturedError",
    "MapLookupError",
    "MapOverwrittenError",
    "MapReleasedError",
    "MapStateError",
    "NoActivationError",
    "NoPassError",
    "NonFiniteError",
    "NotAModuleError",
    "StoreError",
    "StoreMismatchError",
    "UnknownLayerError",
]


class FmapkitError(Exception):
    """Base of every error that fmapkit raises.

    Attributes:
        layer: the layer that it is about, by the name that was given or that the map has.
        kind: of the map.
        filter: that was asked for, or that has the value.
        call: which call of the layer.
        step: which pass.
        candidates: what could be meant instead: names of layers, kinds, filters; of a look-up with
            several answers, the arguments of `maps.select` for each of them.
        bytes: how many the maps take.
    """

    def __init__(
        self,
        *args: object,
        layer: str | None = None,
        kind: str | None = None,
        filter: int | None = None,
        call: int | None = None,
        step: int | None = None,
        candidates: Iterable[Any] = (),
        bytes: int | None = None,
    ) -> None:
        super().__init__(*args)
        self.layer = layer
        self.kind = kind
        self.filter = filter
        self.call = call
        self.step = step
        self.candidates: tuple[Any, ...] = tuple(candidates)
        self.bytes = bytes

    def about(self, **data: Any) -> Self:
        """The same error; what it does not say yet of these, it says now."""
        for name, value in data.items():
            if getattr(self, name) in (None, ()):
                setattr(self, name, tuple(value) if name == "candidates" else value)
        return self

    def __str__(self) -> str:
        # KeyError would print the repr of the message, quotes and all.
        return str(self.args[0]) if self.args else ""


class ArgumentError(FmapkitError, ValueError):
    """An argument is outside what is allowed; the message says what is."""


class NotAModuleError(ArgumentError, TypeError):
    """`capture` was given something that is not a `torch.nn.Module`."""


class MapLookupError(FmapkitError, KeyError):
    """A look-up in `FeatureMaps` has no single answer."""


class UnknownLayerError(ArgumentError, MapLookupError):
    """No layer of that name; the message suggests near ones."""


class NoActivationError(MapLookupError):
    """No nonlinearity follows the layer, so it has no activation."""


class KindNotCapturedError(MapLookupError):
    """The layer is known, but no map of that kind is held of it."""


class AmbiguousMapError(MapLookupError):
    """Several maps answer the look-up; the message names them."""


class FilterRangeError(MapLookupError, IndexError):
    """The filter index is outside the layer's filters, or outside those held."""


class NoPassError(MapLookupError):
    """A look-up before any forward pass was captured."""


class MapStateError(FmapkitError, RuntimeError):
    """The map cannot be read any more."""


class MapOverwrittenError(MapStateError):
    """The map's memory was written to after it was captured."""


class MapReleasedError(MapStateError):
    """The map was let go before it was read."""


class DistributedError(FmapkitError, RuntimeError):
    """What several ranks hold cannot be put together, or is needed and has not been."""


class BudgetError(FmapkitError, RuntimeError):
    """The maps of a capture take more memory than it was allowed."""


class NonFiniteError(FmapkitError, ArithmeticError):
    """`capture(check=...)` saw a NaN or an infinite value; `found` says where.

    Attributes:
        found: the first map that has one.
    """

    def __init__(self, *args: object, found: NonFinite | None = None, **data: Any) -> None:
        super().__init__(*args, **data)
        self.found = found


class StoreError(FmapkitError, RuntimeError):
    """Features of a data set cannot be written, or read; what is there already is kept."""


class StoreMismatchError(StoreError, ArgumentError):
    """The place holds features of another model, of other data, or of other arguments."""


class EditError(FmapkitError, ValueError):
    """An edit found no place in a pass, or gave something that cannot stand in for the map."""


class CaptureStateError(FmapkitError, RuntimeError):
    """A capture was used out of turn."""


class CaptureWarning(UserWarning):
    """Something that ran could not be captured; `maps.missed` names it."""


def is_int(value: object) -> TypeGuard[int]:
    """Whether something is a whole number, and no truth."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_positive(**numbers: Any) -> None:
    """Whether arguments are positive whole numbers.

    Raises:
        ArgumentError: one is not.
    """
    for name, value in numbers.items():
        if not is_int(value) or value < 1:
            raise ArgumentError(f"{name} must be a positive int, not {value!r}")


def check_choice(known: Sequence[str], **given: Any) -> None:
    """Whether arguments are among what there is to choose from.

    Raises:
        ArgumentError: one is not.
    """
    for name, value in given.items():
        if value not in known:
            *others, last = map(repr, known)
            raise ArgumentError(
                f"{name} must be {', '.join(others)} or {last}, not {value!r}"
                f"{did_you_mean(value, known)}",
                candidates=near(value, known) or known,
            )


def check_flags(**flags: Any) -> None:
    """Whether arguments are True or False.

    Raises:
        ArgumentError: one is not.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ArgumentError(f"{name} must be True or False, not {value!r}")


def check_device(given: Any) -> torch.device:
    """The device that an argument `device=` names.

    Raises:
        ArgumentError: it names none.
    """
    try:
        return torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device must name a torch device, not {given!r}: {error}") from None


def check_module(what: str, model: Any) -> None:
    """Whether something is a module.

    Raises:
        NotAModuleError: it is none.
    """
    if not isinstance(model, nn.Module):
        hint = " (a model class: make an instance first)" if isinstance(model, type) else ""
        raise NotAModuleError(f"{what} takes a torch.nn.Module, not {type(model).__name__}{hint}")


def check_kind(
    kind: Any, error: type[FmapkitError] = ArgumentError, layer: str | None = None
) -> Kind:
    """The kind of map, if there is such a one.

    Raises:
        FmapkitError: there is not; of the type given.
    """
    if kind not in KINDS:
        raise error(
            f"unknown kind {kind!r}{did_you_mean(kind, KINDS)}; the kinds are {listed(KINDS)}",
            layer=layer,
            kind=kind if isinstance(kind, str) else None,
            candidates=near(kind, KINDS) or KINDS,
        )
    found: Kind = kind
    return found


def no_layer(
    layer: str, known: Collection[str], there: str = "captured", more: str = ""
) -> UnknownLayerError:
    """What to raise where there is no such layer among those known."""
    return UnknownLayerError(
        f"no layer {layer!r}{did_you_mean(layer, known)} ({there}: {listed(known)}){more}",
        layer=layer,
        candidates=near(layer, known) or known,
    )


def near(given: object, known: Iterable[str]) -> tuple[str, ...]:
    """Up to three names that are like the one given, the nearest first."""
    if not isinstance(given, str):
        return ()
    return tuple(difflib.get_close_matches(given, list(known), n=3, cutoff=0.5))


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """`"; did you mean 'conv1' or 'conv2'?"`, or an empty string where nothing is near."""
    found = near(given, known)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def listed(names: Iterable[str], limit: int = 8) -> str:
    """The first `limit` names, quoted, and how many more there are."""
    names = list(names)
    shown = ", ".join(map(repr, names[:limit]))
    return shown + (f", … ({len(names)} in all)" if len(names) > limit else "")
