"""Regions: which modules are replayed as a whole, and what tells their calls apart.

A region is the outermost module on its branch whose decisions, and those of all modules in it, are
recorded and do not come from data. Two calls of it are of one kind if their arguments have the same
form and carry the same, and nothing has changed that no path tells: attributes of torch's own
modules, dtypes of weights, modes. Each kind has paths of its own, and a plan for each of these. A
module that is no region, nor inside of one, is a *scope*: it is traced in every pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.paths import KnownPaths, Sizes
from fmapkit.replay.attribute_guard import AttributeGuard, calls_torchs, hides_attributes
from fmapkit.replay.input_truths import InputTruths, OwnTensors, Truths
from fmapkit.replay.kept_state import KeptState
from fmapkit.replay.plan import Plan, alike, held_by
from fmapkit.replay.probation import Probation
from fmapkit.torchlib.compiled_modules import is_compiled
from fmapkit.torchlib.fused.paths import fusing_of
from fmapkit.torchlib.nested import modules_in
from fmapkit.torchlib.tensor_spec import weights_of
from fmapkit.torchlib.transforms import under_transform
from fmapkit.tracing import InputRead, Tracer

_OURS = __name__.partition(".")[0]
_MOST_KINDS = 64
_MOST_FORMS = 16  # of what is kept of earlier calls
_MOST_FILLING = 8  # calls of a form and of sizes that may fill caches, each once
_MOST_STATES = 4  # in which a kind of call is known while it is not clear which attributes decide


class ReplayRegion:
    """One region."""

    def __init__(self, module: nn.Module) -> None:
        # By the kind of a call, and the state in which it began: its paths.
        self.by_kind: dict[tuple[Any, int], KnownPaths[Plan]] = {}
        # By its form, and that state: what it reads of its inputs.
        self.by_form: dict[tuple[Any, int], InputTruths] = {}
        self._latest: Any = None
        self.form = weights_of(module)  # tells dtype and layout of its weights
        self.fusing = fusing_of(module)  # tells, of tensors that it is given, what torch fuses by
        self.kept = KeptState(module)  # where its calls keep tensors that later ones may read
        self.own = OwnTensors(module)  # the tensors that its modules have
        self._kept_forms: set[Any] = set()
        self._filling: set[Any] = set()
        self.attributes = AttributeGuard(module)

    def keeps(
        self, attributes: Iterable[tuple[nn.Module, str]], arguments: Iterable[int | str]
    ) -> bool:
        """Note where a call has kept tensors; whether that was known as it began."""
        more = self.kept.with_more(attributes, arguments)
        if more is not None:
            self.kept = more
            self._forget()
        return more is None

    def with_kept(
        self, form: Any, sizes: Sizes, args: Any, kwargs: Any, given: Sequence[Tensor]
    ) -> tuple[Any, Sizes]:
        """The form of a call that is about to begin, and its sizes, with what is kept by then.

        The form is None where what is kept has too many forms: a list that grows in each call.
        """
        kept, more = self.kept.form(args, kwargs, given)
        self._kept_forms.add(kept)
        known = kept is not None and len(self._kept_forms) <= _MOST_FORMS
        return (form, kept) if known else None, (*sizes, *more)

    def waits(self, form: Any, sizes: Sizes) -> bool:
        """Whether the plan of a call that has filled a cache is not worth keeping.

        Its like comes next, as a rule, and finds the cache filled. But what grows in each call says
        nothing, and of what is kept of earlier calls, the form tells.
        """
        known = (form, sizes) in self._filling or len(self._filling) >= _MOST_FILLING
        self._filling.add((form, sizes))
        return not known and not self.kept

    def read(
        self, reads: InputTruths | None, tensors: list[Tensor], sizes: Sizes
    ) -> tuple[Truths | None, Sizes]:
        """What a call is about to read, and the sizes with the numbers that it will.

        The truths are None where nobody knows what it reads.
        """
        if reads is None:
            return None, sizes
        if reads.nothing:
            return (), sizes
        return reads.of(self.own.after(tensors), sizes) or (None, sizes)

    def kind(
        self, form: Any, state: int, asked: Sequence[tuple[InputRead, Any]], sizes: Sizes
    ) -> tuple[Any, Sizes]:
        """The kind of a call that was traced, and the sizes with the numbers that it has read.

        It is of no kind if calls of this form read other things, and nothing tells which.
        """
        known = self.by_form.setdefault((form, state), InputTruths()).learn(asked, sizes)
        return (None, sizes) if known is None else ((form, known[0]), known[1])

    def paths(self, kind: Any, state: int) -> KnownPaths[Plan]:
        """The paths of a kind of call, made if there are none."""
        found = self.by_kind.get((kind, state))
        if found is None:
            if len(self.by_kind) >= _MOST_KINDS:
                self._forget()
            found = self.by_kind[kind, state] = KnownPaths(alike, held_by)
        return found

    def state_of(self, items: list[Any], kind: Any, state: int, sizes: Sizes) -> int | None:
        """The state to which what is known of a call belongs.

        Attributes that change while the path does not are not compared from now on. None if they
        change from call to call, and the path with them: who takes it is to be traced.
        """
        others = {s: p for (k, s), p in self.by_kind.items() if k == kind and s != state}
        if self.kept:  # Python itself may pick by them among what is kept
            return state if len(others) < _MOST_STATES else None
        others = {s: p for s, p in others.items() if self.attributes.knows(s)}
        same = [
            s for s, p in others.items() if self._alike(p.numbers(items, sizes), kind, s, state)
        ]
        annealed = bool(same) and self.attributes.differ_in_floats(same[0], state)
        if len(same) < len(others) and not annealed:
            return state if len(others) < _MOST_STATES else None
        if same and self.attributes.may_look_less(same[0], state) and not calls_torchs(items):
            self._forget()
            return self.attributes.look_less(same[0], state)
        return state

    def _alike(self, numbers: set[Any] | None, kind: Any, one: int, other: int) -> bool:
        """Whether calls of a kind are the same in two states, and none of these tells a number."""
        if numbers is None or self.attributes.tell(numbers, one, other):
            return False
        before, now = (self.by_form.get((kind[0], state)) for state in (one, other))
        return before is not None and now is not None and before.like(now)

    def took(self, call: Any) -> None:
        """A call has taken the path that it was taken to take; the next one may be its twin."""
        self._latest = call

    def take_latest(self) -> Any:
        """The latest call that did, if no other one has begun since; it counts as that no more."""
        latest, self._latest = self._latest, None
        return latest

    def doubt(self, of_others: bool = True) -> None:
        """Have the next call of each kind traced: one `of_others`, or its own, left its path."""
        self._latest = None
        for paths in self.by_kind.values():
            paths.doubt(of_others)

    def _forget(self) -> None:
        self._latest = None
        self.by_kind.clear()
        self.by_form.clear()

    def differing(self, items: list[Any], kind: Any, sizes: Sizes) -> tuple[Any, ...]:
        """The modules that were deciding where a path differs from others."""
        alike = (paths for (other, _), paths in self.by_kind.items() if other == kind)
        return tuple(dict.fromkeys(m for paths in alike for m in paths.leaves_at(items, sizes)[1]))


_Calls = dict[nn.Module, set[nn.Module | None]]


class ReplayRegions:
    """The regions of one model."""

    def __init__(
        self,
        has_others: Callable[[nn.Module], bool],
        has_unrecorded: Callable[[nn.Module], bool],
    ) -> None:
        # Modules that a scope has called itself, with the scopes; None for one not known.
        self.direct: _Calls = {}
        self.probation = Probation()  # of modules that are traced since they have left their path
        self.version = 0  # goes up as other modules become regions, or are called by others
        # Whether a module has hooks of others than this capture (see `Hooks`).
        self.has_others = has_others
        # What decides by data may do so in training alone, and is told, as `direct`, by mode.
        self._training = False
        self._by_data: dict[bool, set[nn.Module]] = {False: set(), True: set()}
        self._other_direct = self.direct  # of the other mode: another one where these differ
        self._has_unrecorded = has_unrecorded  # whether it has such that a path does not tell of
        self._opened: set[nn.Module] = set()
        self._static: dict[nn.Module, bool] = {}
        self._usual: dict[type[nn.Module], bool] = {}
        self._known: dict[nn.Module, ReplayRegion] = {}

    def turn(self, training: bool) -> bool:
        """A pass begins, in training or not: whether other modules are to be traced than before."""
        if training is self._training:
            return False
        self._training = training
        self.direct, self._other_direct = self._other_direct, self.direct
        if self._by_data[False] == self._by_data[True] and self.direct == self._other_direct:
            return False
        self._static.clear()
        return True

    def static(self, module: nn.Module) -> bool:
        """Whether a module may be replayed as a whole: nothing in it has to be traced each time."""
        found = self._static.get(module)
        if found is None:
            self._static[module] = False  # a module inside itself
            found = self._own(module)
            for child in module._modules.values() if found else ():
                if child is not None and not self.static(child):
                    found = False
                    break
            self._static[module] = found
        return found

    def _own(self, module: nn.Module) -> bool:
        """The same of its own code."""
        kind = type(module)
        usual = self._usual.get(kind)
        if usual is None:
            usual = self._usual[kind] = _is_usual(kind)
        if not usual or "forward" in module.__dict__:
            return False
        if module in self._opened or module in self._by_data[self._training]:
            return False
        return not (is_compiled(module) or self._has_unrecorded(module) or hides_attributes(module))

    def stands_alone(self, module: nn.Module, args: Any, tracer: Tracer | None) -> bool:
        """Whether this call is a region: not inside a module that may be one σ or layer itself."""
        if not self.static(module) or under_transform(module, args):
            return False
        return tracer is None or all(f.kind == "plain" for f in tracer.trace.frames)

    def of(self, module: nn.Module) -> ReplayRegion:
        """The region that a module is."""
        found = self._known.get(module)
        if found is None:
            found = self._known[module] = ReplayRegion(module)
        return found

    def called(self, module: nn.Module, caller: nn.Module | None) -> None:
        """A scope calls a module itself."""
        self.direct.setdefault(module, set()).add(caller)

    def all_called(self, modules: Iterable[nn.Module]) -> None:
        """Nobody knows who calls these."""
        self.version += 1
        for module in modules:
            self.called(module, None)

    def open(self, *modules: nn.Module) -> None:
        """From the next pass on, these are traced in every pass; the parts of them are regions."""
        self.probation.drop(modules)
        self._open(modules)

    def open_by_data(self, modules: Iterable[nn.Module]) -> None:
        """The same as long as the model is in this mode: these decide by data in it."""
        if self._other_direct is self.direct:
            self._other_direct = {module: set(callers) for module, callers in self.direct.items()}
        self._by_data[self._training].update(modules)
        self._forget(modules)

    def _open(self, modules: Iterable[nn.Module]) -> None:
        self._opened.update(modules)
        self._forget(modules)

    def _forget(self, modules: Iterable[nn.Module]) -> None:
        self.version += 1
        self._static.clear()
        self._usual.clear()
        for module in modules:
            self._known.pop(module, None)

    def strayed(self, region: nn.Module, deciding: Iterable[nn.Module]) -> None:
        """A region takes several ways, as some in it decide: traced until it takes one for long."""
        if self.probation.trusts(modules_in(region)):
            self._open(self.probation.withdraw())
        new = {region, *deciding}.difference(self._opened)
        self.probation.watch(new)
        self._open(new)

    def doubt(self) -> None:
        """Have the next call of each region traced, of whatever kind: one pass tells of all."""
        for region in self._known.values():
            region.doubt()

    def paths(self) -> list[Any]:
        """What is known of the paths of all regions: each is another object once it is learned."""
        kinds = [known for region in self._known.values() for known in region.by_kind.values()]
        return [path for known in kinds for path in known.paths]

    def end_pass(self, whole: bool) -> None:
        """A traced pass has ended, seen as a `whole` or not: others may be replayed from now on."""
        settled = self.probation.end_pass(whole)
        if not settled:
            return
        self.version += 1
        self._opened.difference_update(settled)
        self._static.clear()
        for module in filter(self.static, settled):
            inside = set(modules_in(module))
            for part in inside.intersection(self.direct).difference([module]):
                if inside.issuperset(self.direct[part]):  # whom nobody else calls
                    del self.direct[part]

    def clear(self) -> None:
        """The model has other modules than it had, or the block has ended."""
        self.direct.clear()
        self._other_direct = self.direct
        self._by_data = {False: set(), True: set()}
        self.probation.clear()
        self._opened.clear()
        self._static.clear()
        self._usual.clear()
        self._known.clear()


def _is_usual(kind: type[nn.Module]) -> bool:
    """Whether modules of a class may be parts of a region, as far as the class tells."""
    if type(kind.__call__) is not FunctionType:  # the model's own are recorded as its methods are
        return False
    if kind.__getattribute__ is not object.__getattribute__:
        return False  # torch's own code runs it, more often where there are hooks
    if issubclass(kind, torch.jit.ScriptModule):
        return False
    return kind.__module__.partition(".")[0] != _OURS  # φ ends passes early
