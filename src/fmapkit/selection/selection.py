"""What was asked for: which layers, kinds and filters; checked before any hook is set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fmapkit import layers
from fmapkit.checking import FiniteCheck
from fmapkit.errors import (
    ArgumentError,
    UnknownLayerError,
    did_you_mean,
    listed,
    near,
)
from fmapkit.kinds import KINDS
from fmapkit.model import Names, never_called
from fmapkit.provenance import ChannelLayout
from fmapkit.reasons import Reason
from fmapkit.selection.arguments import check_in_range, given_filters, given_kinds
from fmapkit.selectors import Selector, name_longer_numbers, selectors
from fmapkit.storage import Place, StorageConversion, StoredTensor


class LayerSelection:
    """Some layers of a model, by selectors.

    A module that is registered at several places may be meant by any of its names. A container
    that is never called (`nn.ModuleList`) stands for the modules that it holds, each as if it had
    been named, and for the layers whose weights it holds itself.

    Args:
        given: one selector or several.
        argument: what to call them in an error; empty where what is not there is no error.

    Raises:
        ArgumentError: a selector is of no allowed form, or there is none.
        UnknownLayerError: a selector matches no module of the model.
    """

    def __init__(self, names: Names, given: Any, argument: str = "") -> None:
        self._names = names
        self._selectors = selectors(given)
        self._by_part = bool(argument)
        self._cache: dict[str, bool] = {}
        self._containers: set[str] = set()
        self._held: set[str] = set()
        self.matched: dict[Selector, list[nn.Module]] = {}
        # What the selectors match, in groups: each is of layers with filters, or is not.
        self.groups: list[list[nn.Module]] = []
        if not self._selectors and argument:
            raise ArgumentError(f"{argument}=[] selects nothing; None, the default, means all")
        self.refresh()
        for selector, matched in self.matched.items():
            if not matched and argument:
                self._only_in_a_pass(selector, argument)
            name_longer_numbers(selector, argument or "layers", names.by_name)

    def refresh(self) -> None:
        """Match the modules that the model has by now."""
        for known in (self._cache, self._containers, self._held, self.matched, self.groups):
            known.clear()
        for selector in self._selectors:
            matched = [m for n, m in self._names.by_name.items() if selector.matches(n, m)]
            held = [m for one in matched if never_called(one) for m in self._open(one)]
            called = [m for m in matched if not never_called(m)]
            self.groups += [[*called, *held]] if called else [[m] for m in held]
            self.matched[selector] = matched

    def __str__(self) -> str:
        return ", ".join(str(s.given) for s in self._selectors)

    def layer(self, name: str) -> bool:
        """Whether the layer of this label is among them."""
        found = self._cache.get(name)
        if found is None:
            found = self._cache[name] = self.fits(name, self._selectors)
        return found

    def fits(self, name: str, some: Sequence[Selector]) -> bool:
        """Whether some of the selectors mean the layer of this label."""
        names = self._names
        module, canonical = names.module_of(name), names.canonical(name)
        if names.head(canonical) in self._containers or canonical.partition(":")[0] in self._held:
            return True
        for label in (name, *names.other_names(name)):
            plain = label.partition(":")[0] if self._by_part else label
            for s in some:
                if s.matches(label, module) or (s.exact and s.matches(plain, module)):
                    return True
        return False

    def _open(self, container: nn.Module) -> list[nn.Module]:
        """The modules in a container, and in those in it."""
        name = self._names.of(container)
        if name in self._containers:
            return []
        self._containers.add(name)
        found: list[nn.Module] = []
        for child in self._names.children(container):
            if never_called(child):
                found += self._open(child)
            else:
                found.append(child)
                self._held.add(self._names.of(child))
        return found

    def _only_in_a_pass(self, selector: Selector, argument: str) -> None:
        """A label that only a pass can tell: `blocks.3.mlp:gelu`, `attn.in_proj`."""
        given, names = selector.given, self._names
        if isinstance(given, str) and only_a_pass_can_tell(names, given):
            return
        beside = names.elsewhere.paths()
        if any(selector.matches(path, module) for path, module in beside.items()):
            return
        known = [n for n in dict.fromkeys((*names.by_name, *beside)) if n]
        hint = did_you_mean(given, known)
        model = type(names.by_name[""]).__name__
        raise UnknownLayerError(
            f"{argument}={selector!r} matches no module of {model}{hint} "
            f"(its modules: {listed(known)})",
            layer=given if isinstance(given, str) else None,
            candidates=near(given, known) or known,
        )


class Selection:
    """The selection of one capture; arguments and errors are those of `capture`."""

    def __init__(
        self,
        names: Names,
        layers_given: Any,
        kinds: Any,
        filters: Any,
        detach: bool = True,
        gradients: bool = False,
        conversion: StorageConversion | None = None,
        weights: bool = False,
        check: FiniteCheck | None = None,
    ) -> None:
        self._names = names
        self.weights = weights
        self.conversion = conversion or StorageConversion(None, None)
        self.detach = detach
        self.asked_gradients = gradients
        self.gradients = gradients or (check is not None and check.backward)
        self.graph = self.gradients or not detach  # what the model's graph is needed for
        self.asked_kinds = given_kinds(kinds)
        chosen = None if layers_given is None else LayerSelection(names, layers_given, "layers")
        self._selection = chosen
        # What is held while a pass runs: more than was asked for, where all of it is looked at.
        self.kinds, self.checks, self._check = self.asked_kinds, check is not None, check
        if check is not None and not check.compiled:
            self.kinds = frozenset(KINDS) - {"attention"} | self.asked_kinds
        elif check is not None:  # what modules return does not exist outside of the graph
            self.kinds = frozenset(KINDS) - {"output", "attention"}
        self._choose_outputs()
        self.filters = given_filters(filters)
        if isinstance(self.filters, Mapping):
            self.filters = {names.canonical(name): of for name, of in self.filters.items()}
        # Layers that filters were given for, until the first pass has shown which have maps.
        self._to_be_picked = set(self.filters) if isinstance(self.filters, Mapping) else set()
        self._check_filters(names)
        # The same for two captures that ask for the same; a selector object is like no other.
        given = layers_given if isinstance(layers_given, (str, type(None))) else id(self)
        self.signature = (given, self.kinds, repr(self.filters), detach)

    def _choose_outputs(self) -> None:
        """Of which modules to hold what they return, of those that the model has by now."""
        self.asked_outputs = self.outputs = self._outputs(self.asked_kinds)
        if self._check is not None and not self._check.compiled:
            self.outputs = self._outputs(self.kinds)
        elif self._check is not None:
            whole = {self._names.model} if self._selection is None else set()
            self.outputs = self.asked_outputs | whole

    def refresh(self) -> None:
        """The model has other modules than it had."""
        if self._selection is not None:
            self._selection.refresh()
        self._choose_outputs()

    @property
    def some(self) -> bool:
        """Whether layers were asked for by name, and not just all of them."""
        return self._selection is not None

    def kind(self, kind: str) -> bool:
        """Whether maps of this kind were asked for."""
        return kind in self.kinds

    def layer(self, name: str) -> bool:
        """Whether maps of the layer of this label were asked for."""
        return self._selection is None or self._selection.layer(name)

    def any_in(self, module: nn.Module) -> bool:
        """Whether anything in a module was asked for, itself included."""
        return bool(self._among(module))

    def any_inside(self, module: nn.Module) -> bool:
        """Whether maps of layers in a module were: not only what it is given and returns."""
        if self.kinds <= {"input", "output"}:
            return False
        returned = self.outputs if "output" not in self.kinds else ()
        return any(part not in returned for part in self._among(module))

    def _among(self, module: nn.Module) -> set[nn.Module]:
        """The modules of those in a module that were selected; all, where only a pass can tell."""
        parts, chosen = set(module.modules()), self._selection
        if chosen is None or not all(chosen.matched.values()):
            return parts
        return parts.intersection(m for group in chosen.groups for m in group)

    def of(self, name: str) -> Any:
        """What was asked for of a layer: None, or its filters (empty for all of them)."""
        return (self._chosen(name) or ()) if self.layer(name) else None

    def asked(self, kind: str, layer: str) -> bool:
        """Whether such a map was asked for, and is not held to be looked at alone."""
        if not self.checks:
            return True
        if kind == "output":
            return self._names.by_name.get(layer) in self.asked_outputs
        return kind in self.asked_kinds

    def _outputs(self, kinds: frozenset[str]) -> set[nn.Module]:
        """The modules whose output is wanted.

        Where a selector matches no filter layer, what is meant is what the modules return.
        """
        asked = "output" in kinds
        if self._selection is None:
            return set(self._names.by_module) - self._names.wrappers if asked else set()
        named = "attention" not in kinds  # else the modules are named for that
        return {
            module
            for group in self._selection.groups
            if asked or (named and all(layers.layer_axis(m) is None for m in group))
            for module in group
        }

    # -- filters ------------------------------------------------------------------------------

    def _check_filters(self, names: Names) -> None:
        if self.filters is None:
            return
        if self.asked_kinds == {"output"}:
            raise ArgumentError(
                "filters= picks from the maps of a layer, and what a module returns is held whole: "
                "kinds='output' leaves nothing to pick from"
            )
        explicit = self._selection is not None or isinstance(self.filters, Mapping)
        for name, module in names.by_name.items() if explicit else ():
            count = layers.filter_count(module)
            if layers.layer_axis(module) is not None and count is not None and self.layer(name):
                check_in_range(self._chosen(name) or (), count, name)
        if isinstance(self.filters, Mapping):
            for name in self.filters:
                there = name in names.by_name or only_a_pass_can_tell(names, name)
                if not there and name not in names.elsewhere.paths():
                    raise UnknownLayerError(
                        f"filters names layer {name!r}, which the model does not have"
                        f"{did_you_mean(name, names.by_name)}",
                        layer=name,
                        candidates=near(name, names.by_name) or filter(None, names.by_name),
                    )
                if not self.layer(name):
                    raise ArgumentError(
                        f"filters names layer {name!r}, which layers= does not ask for "
                        f"(it asks for {self._selection})",
                        layer=name,
                    )

    def without_attention(self, seen: set[str]) -> list[str]:
        """The modules, of those selected, that no attention was seen in; all, as "", by default."""
        if self._selection is None:
            return [] if seen else [""]
        groups = [[self._names.of(module) for module in g] for g in self._selection.groups]
        return [
            group[0] if len(group) == 1 else str(self._selection)
            for group in groups
            if seen.isdisjoint(group)
        ]

    def without_maps(self, layers_seen: set[str]) -> list[str]:
        """The layers that filters were given for in vain; asked for after a complete pass, once."""
        found = sorted(self._to_be_picked - layers_seen)
        self._to_be_picked.clear()
        return found

    @property
    def picks(self) -> bool:
        """Whether `without_maps` is still to be asked."""
        return bool(self._to_be_picked)

    def _chosen(self, name: str) -> tuple[int, ...] | None:
        given: Any = self.filters
        chosen: tuple[int, ...] | None = given.get(name) if isinstance(given, Mapping) else given
        return chosen

    def pick(self, name: str, axes: ChannelLayout | None) -> tuple[int, ...] | None:
        """The filters to hold of a layer, counted from 0; None if they cannot be told apart."""
        chosen = self._chosen(name)
        if axes is None or axes.filters is None:
            return None
        there = axes.filters
        if chosen is None:
            return tuple(there)
        total = len(there)
        picked = tuple(dict.fromkeys(f + total if f < 0 else f for f in chosen))
        return picked if all(f in there for f in picked) else None

    def why_not(self, name: str, axes: ChannelLayout | None) -> str:
        """Why `pick` gave None."""
        if axes is None or axes.filters is None:
            return Reason.FILTERS_NOT_ON_ONE_AXIS.text()
        return Reason.FILTERS_OUT_OF_RANGE.text(filters=self._chosen(name), there=axes.filters)

    def take(
        self, tensor: Tensor, axes: ChannelLayout, picked: tuple[int, ...], doomed: bool = False
    ) -> Tensor:
        """A copy of the picked filters alone, as it is to be stored."""
        return self.take_at(tensor, self.place(axes, picked), doomed)

    def take_at(self, tensor: Tensor, place: Place, doomed: bool = False) -> Tensor:
        """The same, where their place is known."""
        return self.conversion.keep(tensor, place, detach=self.detach, doomed=doomed)

    def store(self, tensor: Tensor, doomed: bool = False) -> Tensor:
        """What is to be stored of a tensor: often itself."""
        return self.conversion.keep(tensor, detach=self.detach, doomed=doomed)

    def put_away(self, held: StoredTensor) -> None:
        """Hold what is to be stored of a map in its place; not if it was written to since."""
        held.check()
        if held.tensor is not None and not held.lost:
            stored = self.store(held.tensor)
            held.stored(stored, self.conversion.arrival(stored))

    @staticmethod
    def place(axes: ChannelLayout, picked: tuple[int, ...]) -> Place:
        """The filters' axis, and where on it the picked ones lie."""
        there, dim = axes.filters, axes.dim
        assert there is not None and dim is not None
        return dim, tuple(there.index(f) for f in picked)


def only_a_pass_can_tell(names: Names, label: str) -> bool:
    """`blocks.3.mlp:gelu`, `attn.in_proj`: labels of a module that the model has."""
    module, colon, _ = label.partition(":")
    if colon:
        return module in names.by_name or "*" in module
    weight, stacked, _ = label.partition("[")
    owner, _, part = weight.rpartition(".")
    if owner not in names.by_name:
        return False
    if stacked:
        return part in names.parameters_of(names.by_name[owner])
    return label in names.labels_in(owner) - {owner}
