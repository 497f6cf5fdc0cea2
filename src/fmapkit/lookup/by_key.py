"""One map by its key: `maps[layer, kind, filter]`, or the error that says why there is none.

Reads what a session holds and changes nothing. Every error names what was asked, and what is there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from torch import nn

from fmapkit.errors import (
    AmbiguousMapError,
    KindNotCapturedError,
    MapLookupError,
    MapReleasedError,
    NoActivationError,
    NoPassError,
    UnknownLayerError,
    check_kind,
    did_you_mean,
    is_int,
    listed,
    near,
    no_layer,
)
from fmapkit.kinds import Kind
from fmapkit.layers import layer_axis
from fmapkit.lookup.records import Found
from fmapkit.model import never_called
from fmapkit.reasons import Reason
from fmapkit.saving import MapSource
from fmapkit.selection import LayerSelection
from fmapkit.selectors import is_glob
from fmapkit.storage import MapRecord


def parse(key: Any) -> tuple[str, Kind | None, int | None]:
    """The layer, the kind and the filter that a key means, if it is of an allowed form."""
    parts = key if isinstance(key, tuple) else (key,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], str):
        what = ""
        if parts and isinstance(parts[0], (nn.Module, type, re.Pattern, list)):
            what = "; by modules, types, patterns or several names: maps.select(layers=…)"
        raise MapLookupError(
            f"maps[{key!r}]: the key is a layer's name, (layer, kind) or (layer, kind, filter)"
            f"{what}"
        )
    layer, kind = parts[0], parts[1] if len(parts) > 1 else None
    if is_int(kind):
        raise MapLookupError(
            f"maps[{layer!r}, {kind}]: a filter is the third item, after the kind: "
            f"maps[{layer!r}, 'activation', {kind}], or maps[{layer!r}][{kind}]",
            layer=layer,
            filter=kind,
        )
    known = None if kind is None else check_kind(kind, KindNotCapturedError, layer)
    return layer, known, parts[2] if len(parts) > 2 else None


def find(session: MapSource, layer: str, kind: str | None, entries: Sequence[Found]) -> Found:
    """The one entry that is meant, or the error that says why there is none."""
    if not entries and session.store.latest() is None:
        _nothing_held(session, layer)
    if session.store.fleeting:
        raise MapReleasedError(
            f"maps[{layer!r}] was let go: keep=0 leaves each map to the analyses alone; "
            "capture(..., keep=1) keeps the latest pass",
            layer=layer,
            kind=kind,
        )
    layer = session.names.canonical(layer)
    of_layer = [(p, e) for p, e in entries if e.origin.name == layer]
    if not of_layer:
        of_layer = _owned(session, layer, entries)
    if not of_layer:
        _no_such_layer(session, layer, list(dict.fromkeys(e.origin.name for _, e in entries)))
    found = [(p, e) for p, e in of_layer if e.kind == kind]
    if kind is None:
        found = [(p, e) for p, e in of_layer if e.kind == "activation"]
        if not found and not _is_layer(session, layer):
            found = [(p, e) for p, e in of_layer if e.kind == "output"]
    if not found:
        _no_such_kind(session, layer, kind, [e for _, e in of_layer])
    if len(found) > 1:
        raise _ambiguous(layer, kind, found)
    return found[0]


def _is_layer(session: MapSource, name: str) -> bool:
    module = session.names.by_name.get(name)
    return module is not None and layer_axis(module) is not None


def _owned(session: MapSource, layer: str, entries: Sequence[Found]) -> list[Found]:
    """Layers inside a module go by the module's name where that means one: `attn.in_proj`."""
    module = session.names.by_name.get(layer)
    if module is None:
        return []
    mine = {
        f"{layer}.{name}".lstrip(".")
        for k in session.names.parameters_of(module)
        for name in (k, k.removesuffix("_weight"))
    }
    return [
        (p, e)
        for p, e in entries
        if e.origin.name.partition("[")[0] in mine or e.origin.name.startswith(f"{layer}:")
    ]


def _no_such_layer(session: MapSource, layer: str, known: list[str]) -> NoReturn:
    """No map is held of a layer, or of what a module has of its own: say why, and what there is."""
    module = session.names.by_name.get(layer)
    hint = did_you_mean(layer, known)
    if module is None and is_glob(layer):
        _no_globs(session, layer, known)
    if module is None:
        raise no_layer(layer, known)
    if never_called(module):
        held = [session.names.by_module[m] for m in session.names.children(module)]
        raise UnknownLayerError(
            f"{layer!r} is a {type(module).__name__}, which is never called and has no map of its "
            f"own; ask for what it holds: {listed(held)} (captured: {listed(known)})",
            layer=layer,
            candidates=held,
        )
    if not session.wants.layer(layer):
        raise UnknownLayerError(
            f"layer {layer!r} was not selected in capture(layers=...); captured: {listed(known)}",
            layer=layer,
            candidates=known,
        )
    if _is_layer(session, layer) and session.wants.asked_kinds == {"activation"}:
        raise NoActivationError(
            f"layer {layer!r} has no activation in the latest pass: no nonlinearity "
            "follows it, or it did not run; capture(kinds=...) asked for nothing else",
            layer=layer,
            kind="activation",
        )
    inside = [name for name in known if name.startswith(f"{layer}.")] if layer else []
    if inside:
        hint = f"; for the layers in it, maps.select(layers={layer + '.*'!r})"
    raise UnknownLayerError(
        f"no map of {layer!r} in the latest pass: either it did not run, or no filter of "
        f"its own reached a nonlinearity; for what it returns, capture(model, "
        f"layers={layer!r}, kinds='output'){hint} (captured: {listed(known)})",
        layer=layer,
        candidates=inside or near(layer, known),
    )


def _no_globs(session: MapSource, layer: str, known: Sequence[str]) -> NoReturn:
    """A look-up gives one map, and a glob was asked for."""
    fitting = LayerSelection(session.names, layer)
    found = [name for name in known if fitting.layer(name)]
    what = f"{len(found)} of those captured fit" if found else "none of those captured fits"
    raise MapLookupError(
        f"maps[{layer!r}] is one map, and a glob may mean several: "
        f"maps.select(layers={layer!r}) gives them all ({what}: {listed(found or known)})",
        layer=layer,
        candidates=found,
    )


def _nothing_held(session: MapSource, layer: str) -> NoReturn:
    known = (m for m in session.missed if m.why is not Reason.NO_CALL_SEEN)  # said here, too
    missed = [f"{m.layer or 'the model'}: {m.reason}" for m in known]
    why = f"; missed: {listed(missed)}" if missed else ""
    if not session.steps:
        names = session.names
        unknown = names.head(layer) in (None, "") and layer != "" and not is_glob(layer)
        also = f"; and no module is called that{did_you_mean(layer, names.by_name)}"
        raise NoPassError(
            f"no map of {layer!r} yet: no forward pass has run inside the capture block; "
            f"call the model inside `with capture(model) as maps:` first{also * unknown}{why}",
            layer=layer,
            candidates=near(layer, names.by_name) if unknown else (),
        )
    raise NoPassError(
        f"no maps are held{why} (clear() was called, or nothing was captured)", layer=layer
    )


def _no_such_kind(
    session: MapSource, layer: str, kind: str | None, there: list[MapRecord]
) -> NoReturn:
    kinds = list(dict.fromkeys(e.kind for e in there))
    asked = session.wants.asked_kinds
    data: dict[str, Any] = {
        "layer": layer,
        "kind": kind or "activation",
        "candidates": kinds,
    }
    if kind in (None, "activation") and "activation" in asked:
        raise NoActivationError(
            f"layer {layer!r} has no activation: no nonlinearity follows it; "
            f"ask for maps[{layer!r}, {kinds[0]!r}]",
            **data,
        )
    why = f"layer {layer!r} has no {kind} in the latest pass; held of it"
    if kind is None:
        why = f"the activation of {layer!r} was not asked for in capture(kinds=...); held of it"
    elif kind not in asked and kind != "output":
        why = f"kind {kind!r} was not asked for in capture(kinds=...); held of {layer!r}"
    raise KindNotCapturedError(f"{why}: {listed(kinds)}", **data)


def _ambiguous(layer: str, kind: str | None, found: Sequence[Found]) -> AmbiguousMapError:
    """Several maps answer; `candidates` are what `maps.select` takes to mean each of them."""
    choices, candidates = [], []
    for at, e in found:
        means = {"kind": e.kind, "call": e.origin.call}
        means |= {} if e.sigma is None else {"nonlinearity": e.sigma}
        other = {} if e.origin.name == layer else {"layer": e.origin.name}
        says = means | ({"path": e.path} if e.path else {}) | other
        choices.append("(" + ", ".join(f"{name}={value!r}" for name, value in says.items()) + ")")
        candidates.append({"layers": e.origin.name, "step": at.step, "path": e.path, **means})
    asked = f"maps[{layer!r}]" if kind is None else f"maps[{layer!r}, {kind!r}]"
    tags = ("call", "path", "nonlinearity", "kind")
    by = next((k for k in tags if len({c.get(k) for c in candidates}) > 1), "call")
    return AmbiguousMapError(
        f"{asked} could mean {len(found)} maps: {', '.join(choices[:8])}"
        f"{', …' if len(choices) > 8 else ''}; choose with maps.select(layers={layer!r}, {by}=…)",
        layer=layer,
        kind=kind,
        candidates=candidates,
    )
