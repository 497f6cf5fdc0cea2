"""One map by its key: `maps[layer, kind, filter]`, or the error that says why there is none.

Reads what a session holds and changes nothing. Every error names what was asked, and what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from fmapkit._names import never_called
from fmapkit._store import Entry, Pass
from fmapkit._wants import KINDS
from fmapkit.errors import (
    AmbiguousMapError,
    KindNotCapturedError,
    MapLookupError,
    MapReleasedError,
    NoActivationError,
    NoPassError,
    UnknownLayerError,
    did_you_mean,
    listed,
)
from fmapkit.layers import layer_axis

if TYPE_CHECKING:
    from fmapkit._session import Session

__all__ = ["Found", "find", "parse"]

Found = tuple[Pass, Entry]


def parse(key: Any) -> tuple[str, str | None, int | None]:
    """The layer, the kind and the filter that a key means.

    Raises:
        MapLookupError: the key is of no allowed form.
        KindNotCapturedError: there is no such kind.
    """
    parts = key if isinstance(key, tuple) else (key,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], str):
        raise MapLookupError(
            f"maps[{key!r}]: the key is a layer's name, (layer, kind) or (layer, kind, filter)"
        )
    kind = parts[1] if len(parts) > 1 else None
    if kind is not None and kind not in KINDS:
        hint = did_you_mean(kind, KINDS) if isinstance(kind, str) else ""
        raise KindNotCapturedError(f"unknown kind {kind!r}{hint}; the kinds are {listed(KINDS)}")
    return parts[0], kind, parts[2] if len(parts) > 2 else None


def find(session: Session, layer: str, kind: str | None, entries: Sequence[Found]) -> Found:
    """The one entry that is meant.

    Args:
        session: whose entries they are.
        layer: as in `maps[layer]`.
        kind: None for the activation, or of a module that is no filter layer, its output.
        entries: to choose from.

    Raises:
        MapLookupError: none answers, or several do.
        MapReleasedError: no map is kept.
    """
    if not entries and session.store.latest() is None:
        _nothing_held(session, layer)
    if session.store.fleeting:
        raise MapReleasedError(
            f"maps[{layer!r}] was let go: keep=0 leaves each map to the analyses alone; "
            "capture(..., keep=1) keeps the latest pass"
        )
    layer = session.names.canonical(layer)
    of_layer = [(p, e) for p, e in entries if e.origin.name == layer]
    if not of_layer:
        of_layer = _owned(session, layer, entries)
    found = [(p, e) for p, e in of_layer if e.kind == kind]
    if kind is None:
        found = [(p, e) for p, e in of_layer if e.kind == "activation"]
        if not found and not _is_layer(session, layer):
            found = [(p, e) for p, e in of_layer if e.kind == "output"]
    if not found:
        _no_such_kind(session, layer, kind, [e for _, e in of_layer])
    if len(found) > 1:
        raise AmbiguousMapError(_ambiguous(layer, kind, [e for _, e in found]))
    return found[0]


def _is_layer(session: Session, name: str) -> bool:
    module = session.names.by_name.get(name)
    return module is not None and layer_axis(module) is not None


def _owned(session: Session, layer: str, entries: Sequence[Found]) -> list[Found]:
    """Layers inside a module go by the module's name where that means one: `attn.in_proj`."""
    module = session.names.by_name.get(layer)
    if module is not None:
        mine = {
            f"{layer}.{name}".lstrip(".")
            for k in session.names.parameters_of(module)
            for name in (k, k.removesuffix("_weight"))
        }
        found = [
            (p, e)
            for p, e in entries
            if e.origin.name.partition("[")[0] in mine or e.origin.name.startswith(f"{layer}:")
        ]
        if found:
            return found
    known = list(dict.fromkeys(e.origin.name for _, e in entries))
    hint = did_you_mean(layer, known)
    if module is None:
        raise UnknownLayerError(f"no layer {layer!r}{hint} (captured: {listed(known)})")
    if never_called(module):
        held = [session.names.by_module[m] for m in session.names.children(module)]
        raise UnknownLayerError(
            f"{layer!r} is a {type(module).__name__}, which is never called and has no map of its "
            f"own; ask for what it holds: {listed(held)}{hint} (captured: {listed(known)})"
        )
    if not session.wants.layer(layer):
        raise UnknownLayerError(
            f"layer {layer!r} was not selected in capture(layers=...); captured: {listed(known)}"
        )
    if _is_layer(session, layer) and session.wants.kinds == {"activation"}:
        raise NoActivationError(
            f"layer {layer!r} has no activation in the latest pass: no nonlinearity "
            "follows it, or it did not run; capture(kinds=...) asked for nothing else"
        )
    raise UnknownLayerError(
        f"no map of {layer!r} in the latest pass: either it did not run, or no filter of "
        f"its own reached a nonlinearity; for what it returns, capture(model, "
        f"layers={layer!r}, kinds='output'){hint} (captured: {listed(known)})"
    )


def _nothing_held(session: Session, layer: str) -> NoReturn:
    missed = [f"{m.layer or 'the model'}: {m.reason}" for m in session.missed]
    why = f"; missed: {listed(missed)}" if missed else ""
    if not session.steps:
        raise NoPassError(
            f"no map of {layer!r} yet: no forward pass has run inside the capture block; "
            f"call the model inside `with capture(model) as maps:` first{why}"
        )
    raise NoPassError(f"no maps are held{why} (clear() was called, or nothing was captured)")


def _no_such_kind(session: Session, layer: str, kind: str | None, there: list[Entry]) -> NoReturn:
    kinds = list(dict.fromkeys(e.kind for e in there))
    asked = session.wants.kinds
    if kind in (None, "activation") and "activation" in asked:
        raise NoActivationError(
            f"layer {layer!r} has no activation: no nonlinearity follows it; "
            f"ask for maps[{layer!r}, {kinds[0]!r}]"
        )
    if kind is None:
        raise KindNotCapturedError(
            f"the activation of {layer!r} was not asked for in capture(kinds=...); "
            f"held of it: {listed(kinds)}"
        )
    if kind not in asked and kind != "output":
        raise KindNotCapturedError(
            f"kind {kind!r} was not asked for in capture(kinds=...); "
            f"held of {layer!r}: {listed(kinds)}"
        )
    raise KindNotCapturedError(
        f"layer {layer!r} has no {kind} in the latest pass; held of it: {listed(kinds)}"
    )


def _ambiguous(layer: str, kind: str | None, entries: list[Entry]) -> str:
    choices = []
    for e in entries:
        says = [f"kind={e.kind!r}", f"call={e.origin.call}"]
        if e.sigma is not None:
            says.append(f"nonlinearity={e.sigma!r}")
        if e.path:
            says.append(f"path={e.path!r}")
        if e.origin.name != layer:
            says.append(f"layer={e.origin.name!r}")
        choices.append("(" + ", ".join(says) + ")")
    asked = f"maps[{layer!r}]" if kind is None else f"maps[{layer!r}, {kind!r}]"
    return (
        f"{asked} could mean {len(entries)} maps: {', '.join(choices[:8])}"
        f"{', …' if len(choices) > 8 else ''}; choose with maps.select(layer={layer!r}, call=…)"
    )
