"""What is left of a session when its maps are copied, pickled or saved: values and tags alone.

`Snapshot` is that as plain data: no model, no hook, no graph, no memory of the model's. A
`KeptSession` stands in for the session, so that `FeatureMaps` reads both in the same way. It has
modules that can do nothing but be called what the model's are, so that names, other names of the
same module, containers and globs mean what they meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fmapkit import layers
from fmapkit.map import FeatureMap, restored
from fmapkit.missed import Missed
from fmapkit.model import Names, never_called
from fmapkit.provenance import Origin
from fmapkit.session import EndedBlock, Session
from fmapkit.storage import (
    MapRecord,
    Pass,
    PassStore,
    StorageConversion,
    StoredTensor,
    ValueCopies,
)
from fmapkit.torchlib.memory import version_of


@dataclass(frozen=True, slots=True)
class KeptModule:
    """What is known of a module of the model."""

    name: str
    first: str  # the first place of the same module
    container: str = ""  # its type, if it has no forward (`ModuleList`); else empty
    layer: bool = False  # it is a layer with filters
    weights: tuple[str, ...] = ()  # its parameters that are layers of their own, by name


@dataclass(frozen=True, slots=True)
class KeptPass:
    """The maps of one pass, in execution order."""

    step: int
    training: bool
    maps: tuple[FeatureMap, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        # These maps are copies already: pickled one by one, each would be copied again.
        return _pass_of, (self.step, self.training, [fm._data() for fm in self.maps])


def _pass_of(step: int, training: bool, maps: Iterable[dict[str, Any]]) -> KeptPass:
    return KeptPass(step, training, tuple(map(restored, maps)))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that is kept of a capture."""

    passes: tuple[KeptPass, ...]  # those that were readable
    steps: int
    kinds: tuple[str, ...]
    fleeting: bool  # it was a capture with `keep=0`
    missed: tuple[tuple[str, str], ...]  # what was not captured, as (layer, reason)
    modules: tuple[KeptModule, ...] = field(repr=False)


class KeptEntry(MapRecord):
    """A map that is no pass's any more."""

    __slots__ = ("map",)

    def __init__(self, fm: FeatureMap) -> None:
        held, edited = (
            None if t is None else StoredTensor(t, version_of(t), copied=True)
            for t in (fm.tensor, fm.edited)
        )
        origin = Origin("layer", fm.layer, fm.call)
        super().__init__(fm.kind, origin, held, sigma=fm.nonlinearity, path=fm.path, edited=edited)
        self.map = fm


class _KeptSelection:
    """What was asked for: the kinds; of layers, whatever there is."""

    def __init__(self, kinds: Iterable[str]) -> None:
        self.asked_kinds = frozenset(kinds)
        self.conversion = StorageConversion(None, None)

    def layer(self, name: str) -> bool:
        """Whether maps of a layer may be there."""
        return True

    def asked(self, kind: str, layer: str) -> bool:
        """Whether such a map was asked for."""
        return True


class KeptSession:
    """Stands in for the session of maps that were kept."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.names = Names(_shells(snapshot.modules))
        self.wants = _KeptSelection(snapshot.kinds)
        self.steps = snapshot.steps
        self.missed = [Missed(layer, reason) for layer, reason in snapshot.missed]
        self.store = PassStore(0 if snapshot.fleeting else None)
        self.store.block.end()
        for kept in snapshot.passes:
            at = Pass(kept.step, kept.training)
            at.segments = [KeptEntry(replace(fm, block=self.store.block)) for fm in kept.maps]
            at.closed = True
            self.store.passes.append(at)


# Where maps come from, as look-ups, tables and copies see it.
MapSource = Session | EndedBlock | KeptSession


class _Shell(nn.Module):
    """A module of which only the name is left."""

    def forward(self) -> None:
        """Nothing to do."""


class _LayerShell(_Shell):
    """The same of a layer with filters."""


layers.MODULES[_LayerShell] = 1


def snapshot_of(
    source: MapSource, read: Callable[[MapSource, Pass, MapRecord], FeatureMap]
) -> Snapshot:
    """All that is kept of a capture, in memory of its own; an error where a map cannot be read."""
    values, asked = ValueCopies(), source.wants.asked
    entries = [(p, [e for e in p.entries() if asked(e.kind, e.origin.name)]) for p in source.store]
    passes = tuple(
        KeptPass(p.step, p.training, tuple(read(source, p, e)._copied(values) for e in those))
        for p, those in entries
    )
    labels = {fm.layer for p in passes for fm in p.maps}
    return Snapshot(
        passes,
        source.steps,
        tuple(sorted(source.wants.asked_kinds)),
        source.store.fleeting,
        tuple((m.layer, m.reason) for m in source.missed),
        source.snapshot.modules
        if isinstance(source, KeptSession)
        else _modules(source.names, labels),
    )


def _modules(names: Names, labels: Iterable[str]) -> tuple[KeptModule, ...]:
    """What is kept of the model's modules, where these layers have maps."""
    held = {label.partition("[")[0] for label in labels}

    def weights(name: str, module: nn.Module) -> tuple[str, ...]:
        return tuple(
            key
            for key in names.parameters_of(module)
            if any(f"{name}.{k}".lstrip(".") in held for k in (key, key.removesuffix("_weight")))
        )

    return tuple(
        KeptModule(
            name,
            names.by_module[module],
            type(module).__name__ if never_called(module) else "",
            layers.layer_axis(module) is not None,
            weights(name, module),
        )
        for name, module in names.by_name.items()
    )


def _shells(modules: Iterable[KeptModule]) -> nn.Module:
    made: dict[str, nn.Module] = {}
    for kept in modules:
        if kept.name != kept.first:
            shell = made[kept.first]
        else:
            shell = _LayerShell() if kept.layer else _Shell()
            if kept.container:
                shell = type(kept.container, (nn.Module,), {})()
            for key in kept.weights:
                empty = torch.empty(0, device="meta")
                shell.register_parameter(key, nn.Parameter(empty, requires_grad=False))
        made[kept.name] = shell
        if kept.name:
            parent, _, key = kept.name.rpartition(".")
            made[parent].add_module(key, shell)
    return made.get("", nn.Module())
