"""Which map of one capture belongs to which of the other: by name, by order, by a mapping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fmapkit.errors import ArgumentError, did_you_mean, listed, near

if TYPE_CHECKING:
    from fmapkit.map import FeatureMap

Match = Literal["name", "order"] | Mapping[str, str] | Callable[[str], str]
_Key = tuple[str, str, int, str, int]


@dataclass(frozen=True, slots=True)
class Matched:
    """Maps that belong together, and those that belong to none of the other capture.

    Attributes:
        pairs: in the execution order of the first capture.
    """

    pairs: list[tuple[FeatureMap, FeatureMap]]
    only_a: list[FeatureMap]
    only_b: list[FeatureMap]


def matched(a: Sequence[FeatureMap], b: Sequence[FeatureMap], match: Match) -> Matched:
    """Bring the maps of two captures together.

    Args:
        match: "name" by layer, kind, call and path; "order" by their order, where kinds and shapes
            have to agree; a mapping of names or of a module's name to the other's, or a function.

    Raises:
        ArgumentError: `match` is none of these, names nothing, or leaves nothing to compare.
    """
    if isinstance(match, str) and match == "order":
        return _by_order(a, b)
    if isinstance(match, str) and match == "name":
        return _by_name(a, b, lambda name: name)
    if isinstance(match, Mapping):
        return _by_name(a, b, _Renamed(match, a, b))
    if callable(match):
        return _by_name(a, b, match)
    raise ArgumentError(
        "match must be 'name', 'order', a dict of the first's names -> the second's, or a function "
        f"of the first's names, not {match!r}"
    )


def _by_order(a: Sequence[FeatureMap], b: Sequence[FeatureMap]) -> Matched:
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
    return Matched(list(zip(a, b, strict=True)), [], [])


def _said(fm: FeatureMap) -> str:
    shape = "×".join(map(str, fm.shape)) or "scalar"
    return f"the {fm.kind} of {fm.layer + fm.path!r} ({shape})"


def _by_name(
    a: Sequence[FeatureMap], b: Sequence[FeatureMap], name: Callable[[str], str]
) -> Matched:
    known = dict(zip(_keys(b, lambda n: n), b, strict=True))
    pairs, only_a = [], []
    for key, fm in zip(_keys(a, name), a, strict=True):
        other = known.pop(key, None)
        if other is None:
            only_a.append(fm)
        else:
            pairs.append((fm, other))
    if not pairs and (a or b):
        ours, theirs = (list(dict.fromkeys(fm.layer for fm in maps)) for maps in (a, b))
        raise ArgumentError(
            f"no map of the first ({listed(ours, 4)}) goes by the name of one of the second "
            f"({listed(theirs, 4)}): match='order' goes by order and shape, match={{...}} by a "
            "dict of names",
            candidates=theirs,
        )
    return Matched(pairs, only_a, list(known.values()))


def _keys(maps: Sequence[FeatureMap], name: Callable[[str], str]) -> list[_Key]:
    """By what each map is known; of two σ behind one layer, by which comes first."""
    seen: Counter[Any] = Counter()
    keys: list[_Key] = []
    for fm in maps:
        tags = (name(fm.layer), fm.kind, fm.call, fm.path)
        keys.append((*tags, seen[tags]))
        seen[tags] += 1
    return keys


class _Renamed:
    """The second's name for a layer of the first: by the longest key that names it, or its module.

    Args:
        names: the first's names -> the second's.

    Raises:
        ArgumentError: a key means no layer of the first, a value none of the second.
    """

    def __init__(
        self, names: Mapping[str, str], a: Sequence[FeatureMap], b: Sequence[FeatureMap]
    ) -> None:
        self._names = dict(names)
        ours, theirs = ({fm.layer: None for fm in maps} for maps in (a, b))
        for key, value in self._names.items():
            for side, there, given in (("first", ours, key), ("second", theirs, value)):
                if any(_rest(name, given) is not None for name in there):
                    continue
                raise ArgumentError(
                    f"match={{{key!r}: {value!r}}}: the {side} has no map of {given!r}"
                    f"{did_you_mean(given, there)} (its layers: {listed(there)})",
                    layer=given,
                    candidates=near(given, there) or there,
                )
        mapped = [name for name in ours if self._fitting(name)]
        made = Counter(map(self, mapped))
        self._taken = set(made)
        twice = [name for name, count in made.items() if count > 1]
        if twice:
            both = [name for name in mapped if self(name) == twice[0]]
            raise ArgumentError(
                f"match gives {twice[0]!r} for {' and for '.join(map(repr, both))}",
                layer=twice[0],
                candidates=both,
            )

    def _fitting(self, name: str) -> list[str]:
        return [key for key in self._names if _rest(name, key) is not None]

    def __call__(self, name: str) -> str:
        fitting = self._fitting(name)
        if not fitting:
            return name if name not in self._taken else f"\0{name}"  # another one's counterpart
        key = max(fitting, key=len)
        rest, other = _rest(name, key), self._names[key]
        assert rest is not None
        if not key and name and other:
            return f"{other}.{rest}"
        return rest.removeprefix(".") if not other else other + rest


def _rest(name: str, key: str) -> str | None:
    """What follows a module's name in that of a layer in it; None if it is none."""
    if not name.startswith(key):
        return None
    rest = name[len(key) :]
    return rest if not key or not rest or rest[0] in ".:[" else None
