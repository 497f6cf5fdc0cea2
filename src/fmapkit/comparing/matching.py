"""Which map of one capture belongs to which of the other: by name, by order, by a mapping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fmapkit.errors import ArgumentError, did_you_mean, listed, near

if TYPE_CHECKING:
    from fmapkit.map import FeatureMap

Match = Literal["name", "order"] | Mapping[str, str] | Callable[[str], str]
_Key = tuple[str, str, int, str, int]
# Maps that belong together, in the execution order of the first capture; then those that only the
# first has, and only the second.
_Matched = tuple[list[tuple["FeatureMap", "FeatureMap"]], list["FeatureMap"], list["FeatureMap"]]


def matched(a: Sequence[FeatureMap], b: Sequence[FeatureMap], match: Match) -> _Matched:
    """Bring the maps of two captures together.

    Args:
        match: "name" by layer, kind, call and path; "order" by their order, where kinds and shapes
            have to agree; a mapping of names or of a module's name to the other's, or a function.
    """
    if isinstance(match, str) and match == "order":
        return _by_order(a, b)
    if isinstance(match, str) and match == "name":
        return _by_name(a, b, str)
    if isinstance(match, Mapping):
        return _by_name(a, b, _renamed(dict(match), a, b))
    if callable(match):
        return _by_name(a, b, match)
    raise ArgumentError(
        "match must be 'name', 'order', a dict of the first's names -> the second's, or a function "
        f"of the first's names, not {match!r}"
    )


def _by_order(a: Sequence[FeatureMap], b: Sequence[FeatureMap]) -> _Matched:
    for at, (x, y) in enumerate(zip(a, b, strict=False)):
        if (x.kind, x.shape) != (y.kind, y.shape):
            raise ArgumentError(
                f"match='order': map {at} is {_said(x)} in the first and {_said(y)} in the second; "
                "compare some of the layers with layers=, or give a dict of names as match=",
                layer=x.layer,
                kind=x.kind,
            )
    if len(a) != len(b):
        longer, extra = ("first", a[len(b)]) if len(a) > len(b) else ("second", b[len(a)])
        raise ArgumentError(
            f"match='order': there are {len(a)} maps in the first and {len(b)} in the second; the "
            f"{longer} goes on with {_said(extra)}; compare some of the layers with layers=, or "
            "give a dict of names as match=",
            layer=extra.layer,
            kind=extra.kind,
        )
    return list(zip(a, b, strict=True)), [], []


def _said(fm: FeatureMap) -> str:
    shape = "×".join(map(str, fm.shape)) or "scalar"
    return f"the {fm.kind} of {fm.layer + fm.path!r} ({shape})"


def _by_name(
    a: Sequence[FeatureMap], b: Sequence[FeatureMap], name: Callable[[str], str]
) -> _Matched:
    by_a = dict(zip(_keys(a, name), a, strict=True))
    by_b = dict(zip(_keys(b, str), b, strict=True))
    pairs = [(fm, by_b[key]) for key, fm in by_a.items() if key in by_b]
    if not pairs and (a or b):
        ours, theirs = (list(dict.fromkeys(fm.layer for fm in maps)) for maps in (a, b))
        raise ArgumentError(
            f"no map of the first ({listed(ours, 4)}) goes by the name of one of the second "
            f"({listed(theirs, 4)}): match='order' goes by order and shape, match={{...}} by a "
            "dict of names",
            candidates=theirs,
        )
    only_a = [fm for key, fm in by_a.items() if key not in by_b]
    return pairs, only_a, [fm for key, fm in by_b.items() if key not in by_a]


def _keys(maps: Sequence[FeatureMap], name: Callable[[str], str]) -> list[_Key]:
    """By what each map is known; of two σ behind one layer, by which comes first."""
    seen: Counter[Any] = Counter()
    keys: list[_Key] = []
    for fm in maps:
        tags = (name(fm.layer), fm.kind, fm.call, fm.path)
        keys.append((*tags, seen[tags]))
        seen[tags] += 1
    return keys


def _renamed(
    names: dict[str, str], a: Sequence[FeatureMap], b: Sequence[FeatureMap]
) -> Callable[[str], str]:
    """The second's name for a layer of the first: by the longest key that fits."""
    ours, theirs = ({fm.layer: None for fm in maps} for maps in (a, b))
    for key, value in names.items():
        for side, there, given in (("first", ours, key), ("second", theirs, value)):
            if any(_rest(name, given) is not None for name in there):
                continue
            raise ArgumentError(
                f"match={{{key!r}: {value!r}}}: the {side} has no map of {given!r}"
                f"{did_you_mean(given, there)} (its layers: {listed(there)})",
                layer=given,
                candidates=near(given, there) or there,
            )
    made: dict[str, list[str]] = {}  # the second's names -> the first's
    for name in ours:
        if (other := _translated(name, names)) is not None:
            made.setdefault(other, []).append(name)
    for other, both in made.items():
        if len(both) > 1:
            raise ArgumentError(
                f"match gives {other!r} for {' and for '.join(map(repr, both))}",
                layer=other,
                candidates=both,
            )

    def rename(name: str) -> str:
        other = _translated(name, names)
        if other is not None:
            return other
        return f"\0{name}" if name in made else name  # it stays, unless it is a counterpart

    return rename


def _translated(name: str, names: Mapping[str, str]) -> str | None:
    """What a layer is called by the longest key that fits; None if none does."""
    fitting = [(key, rest) for key in names if (rest := _rest(name, key)) is not None]
    if not fitting:
        return None
    key, rest = max(fitting, key=lambda found: len(found[0]))
    other = names[key]
    if not key and name and other:
        return f"{other}.{rest}"
    return other + rest if other else rest.removeprefix(".")


def _rest(name: str, key: str) -> str | None:
    """What follows a module's name in that of a layer in it; None if it is none."""
    if not name.startswith(key):
        return None
    rest = name[len(key) :]
    return rest if not key or not rest or rest[0] in ".:[" else None
