"""Note: what a traced pass does becomes a road of its script.

The tracer tells of each call of a torch function by a scope, of each scope that begins or ends, and
of each unit that was replayed. What cannot be compared later ends the road there; passes that come
so far are traced from then on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fmapkit._events import Doings
from fmapkit._frames import Frame
from fmapkit._functions import RESHAPED_IN_PLACE, Function
from fmapkit._nested import leaves, tensors_in
from fmapkit._operands import FREE, Operands, Source
from fmapkit._origin import Tag, Weight, WeightRef
from fmapkit._script import Making, Script, Step
from fmapkit._seen import Seen
from fmapkit._sharded import is_wrapped
from fmapkit._sizes import Ones, Sizes, makes_sizes, rests_on
from fmapkit._store import Entry, Held
from fmapkit._transforms import unheld
from fmapkit._vocabulary import DROPOUTS, FRESH, METADATA, NORM_AXIS, OPAQUE
from fmapkit._weighted import may_weigh

if TYPE_CHECKING:
    from fmapkit._replay import Run
    from fmapkit._trace import Tracer

__all__ = ["Noter", "alike", "beside_the_point", "results_of", "returned", "same_shape"]


def beside_the_point(known: Function, args: Any, kwargs: Any, source: Source) -> bool:
    """Whether no map and no label can depend on a call: nothing that it is given carries any."""
    name = known.name
    if name in METADATA or (name in FRESH and name not in DROPOUTS):
        return True
    if known.sigma is not None or may_weigh(name) or name in OPAQUE:
        return False
    return all(source(t) == FREE for t in tensors_in(*args, kwargs))


def results_of(known: Function, args: Any, out: Any) -> list[Tensor]:
    """The tensors that may carry something else after a call."""
    return tensors_in(args[0] if known.name == "__setitem__" else out)


def sizes(module: nn.Module) -> frozenset[int] | None:
    """How long an input's channels, first or last, have to be for a module to be taken for a σ.

    None where no input would do.
    """
    counts = frozenset(p.numel() for p in module.parameters()) - {1}
    return counts if len(counts) <= 2 else None


def returned(operands: list[Tensor], results: list[Tensor]) -> bool:
    """Whether a call returned something that it was given."""
    return any(result is operand for result in results for operand in operands)


def same_shape(x: Tensor | None, output: Any) -> bool:
    """Whether a module returned a tensor of its input's shape."""
    return x is not None and isinstance(output, Tensor) and output.shape == x.shape


def alike(one: Tag, other: Tag) -> bool:
    """Whether two tags say the same."""
    if isinstance(one, Weight) and isinstance(other, Weight):
        return one.parameter is other.parameter and one.axes == other.axes
    return type(one) is type(other) and one == other


class Noter:
    """Notes a pass, from its start or from where it left the known roads.

    Args:
        tracer: of the pass.
        script: to add to.
        at: the step that was the last to be known.
        seen: the pass's tensors.
        entries: its maps so far.
    """

    def __init__(
        self, tracer: Tracer, script: Script, at: Step, seen: Seen, entries: list[Entry]
    ) -> None:
        self._tracer = tracer
        self._script = script
        self._at = at
        self._seen = seen
        self._places = {id(entry): place for place, entry in enumerate(entries)}
        self._entries = entries  # kept, so that no other entry gets the same id
        self._unit: Step | None = None
        self._given: list[Tensor] = []  # to the unit that is running
        self._leaf: Step | None = None  # the module that is running, and not looked into
        self._new_sizes = False  # something in it has
        self._doings = tracer.record.doings = Doings()

    def start(self, given: list[Tensor]) -> None:
        """The first pass of its kind begins: what came in carries what it was found to carry."""
        tags = tuple(map(self._tracer.tag, given))
        self._script.start.results = self._kept(tags)
        self._seen.put(given, tags)
        if any(map(_homeless, self._script.start.results)):
            self.stop()

    def stop(self) -> None:
        """What comes now cannot be compared later."""
        self._tracer.noter = self._tracer.record.doings = None
        self._seen.clear()
        self._given = []

    # -- what the pass does -------------------------------------------------------------------

    def call(self, known: Function, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """A scope has called a torch function."""
        tracer, seen = self._tracer, self._seen
        if self._leaf is not None:
            if any(seen.source(t) != FREE for t in known.writes(args, kwargs)):
                self._no_leaf()
            else:
                self._in_leaf(known, args, kwargs, out)
            return
        results = results_of(known, args, out)
        tags = tuple(map(tracer.tag, results))
        if beside_the_point(known, args, kwargs, seen.source):
            if self._doings.any() or any(
                tag is not None and not alike(tag, seen.tag(t))
                for t, tag in zip(results, tags, strict=True)
            ):
                self.stop()
            return
        operands = tensors_in(*args, kwargs)
        if any(unheld(t) or is_wrapped(t) for t in (*operands, *results)):
            self.stop()
            return
        step = Step("call", self._at)
        step.known, step.function = known, func
        step.operands = Operands(args, kwargs, seen.source, self._home)
        step.loose = not (
            self._doings.any()
            or known.sigma is not None
            or may_weigh(known.name)
            or known.name in NORM_AXIS
            or (known.in_place and known.name in RESHAPED_IN_PLACE)
        )
        makings = []
        for slot, entry, held in self._doings.made:
            source = self._source(slot, held, operands, results)
            if source is None:
                self.stop()
                return
            makings.append(_making(entry, *source))
        step.makings = tuple(makings)
        step.results = self._kept(tags)
        if any(making.origin.kind == "own" for making in makings):
            step.caller = tracer.caller(tracer.frames[-1].module)
        if isinstance(out, Tensor) and known.name != "__setitem__" and tags[0] is not None:
            step.dims = out.dim()
        step.ranks = tuple(t.dim() for t in results)
        step.itself = returned(operands, results)
        step.rests = rests_on(known, operands, results, tags, seen.tag, seen.source)
        step.writes = not known.never_writes or "out" in kwargs
        step.simple = (
            step.dims >= 0
            and bool(args)
            and step.itself == (out is args[0])
            and not (step.writes or step.makings or self._doings.dropped)
            and (step.rests is None or (not kwargs and all(isinstance(a, Tensor) for a in args)))
        )
        self._add(step)
        seen.put(results, tags)

    def _source(
        self, slot: str, held: Held, operands: list[Tensor], results: list[Tensor]
    ) -> tuple[int, bool] | None:
        """Which tensor of a call is held, and whether it was copied before; None if none is."""
        aliases = self._tracer.aliases
        if slot == "y":
            places = [-1 - i for i, t in enumerate(results) if aliases.holds(t, held)]
        else:
            places = [i for i, t in enumerate(operands) if aliases.holds(t, held)]
            if not places and held.copied:  # an in-place σ's, which is its first
                return 0, True
        return (places[0], False) if places else None

    def enter(self, frame: Frame) -> None:
        """A module begins, and is traced."""
        given = self._doings.any() or unheld(frame.x) is not None
        if frame.kind == "layer" or given or self._leaf is not None:
            self.stop()
            return
        if frame.module in self._tracer.leaves:
            step = self._leaf = Step("leaf", self._at)
            step.module = frame.module
            self._new_sizes = False
            step.operands = Operands(frame.args, frame.kwargs, self._seen.source, self._home)
            return
        step = Step("begin", self._at)
        step.module, step.scope = frame.module, frame.kind
        step.sizes = sizes(frame.module)
        if frame.kind != "plain":
            step.operands = Operands((frame.x,), {}, self._seen.source, self._home)
        self._add(step)

    def leave(self, frame: Frame, output: Any, failed: bool) -> None:
        """A traced module has ended."""
        tracer, seen = self._tracer, self._seen
        module, results = frame.module, tensors_in(output)
        tags = tuple(map(tracer.tag, results))
        if self._leaf is not None:
            self._leaf_left(frame, output, tags, failed)
            return
        changed = not all(map(alike, tags, map(seen.tag, results)))
        step = Step("end", self._at)
        step.module, step.scope, step.whole = module, frame.kind, self._doings.whole
        makings = []
        for slot, entry, held in self._doings.made:
            if slot == "x" and held is frame.x_held and entry.kind != "output":
                makings.append(_making(entry, 0, False))
            else:
                makings.append(_making(entry, -1, False))
                failed |= not any(tracer.aliases.holds(t, held) for t in results)
        if failed:
            self.stop()
            return
        step.makings = tuple(makings)
        if frame.kind == "plain" and makings:
            step.paths = tuple(path for path, _ in leaves(output))
            step.operands = Operands([t for _, t in leaves(output)], {}, seen.source, self._home)
        elif frame.kind != "plain":
            step.operands = Operands((output,), {}, seen.source, self._home)
            step.kept = same_shape(frame.x, output)
        if changed:
            step.results = self._kept(tags)
            step.ranks = tuple(t.dim() for t in results)
        self._add(step)
        if changed:
            seen.put(results, tags)

    def _in_leaf(self, known: Function, args: Any, kwargs: Any, out: Any) -> None:
        """A module that is not looked into has called a torch function."""
        assert self._leaf is not None
        tag, operands = self._tracer.tag, tensors_in(*args, kwargs)
        results = results_of(known, args, out)
        tags = list(map(tag, results))
        rests = rests_on(known, operands, results, tags, tag, self._seen.source)
        self._new_sizes = self._new_sizes or makes_sizes(known, rests)
        self._leaf.rests = self._leaf.rests or rests

    def _leaf_left(self, frame: Frame, output: Any, tags: tuple[Tag, ...], failed: bool) -> None:
        """A module has ended that is not looked into."""
        results = tensors_in(output)
        step, self._leaf = self._leaf, None
        assert step is not None
        self._forget_what_came_and_went()
        operands = tensors_in(*frame.args, frame.kwargs)
        makings = []
        for slot, entry, held in self._doings.made:
            if slot == "x" and held is frame.x_held and frame.x is not None:
                source = next(i for i, t in enumerate(operands) if t is frame.x), False
            else:
                source = self._source(slot, held, operands, results) or (0, True)
            if source[1]:  # something inside, or of memory that it writes to
                self._no_leaf(step)
                return
            makings.append(_making(entry, *source))
        if failed or any(unheld(t) or is_wrapped(t) for t in (*operands, *results)):
            self.stop()
            return
        step.makings, step.results = tuple(makings), self._kept(tags)
        step.ranks = tuple(t.dim() for t in results)
        step.itself = returned(operands, results)
        if step.rests is not None:
            step.rests = (Sizes if self._new_sizes else Ones)(operands)
        if isinstance(output, Tensor) and tags[0] is not None:
            step.dims = results[0].dim()
        step.unit = self._tracer.leaf_unit(frame.module)
        step.state = step.unit.state() if step.unit.depends else None
        self._add(step)
        self._seen.put(results, tags)

    def _forget_what_came_and_went(self) -> None:
        """Maps that were made and dropped inside: parts of what turned out to be one thing."""
        doings = self._doings
        gone = {id(entry) for entry in doings.dropped}
        inside = {id(entry) for _, entry, _ in doings.made} & gone
        doings.made = [made for made in doings.made if id(made[1]) not in inside]
        doings.dropped = [entry for entry in doings.dropped if id(entry) not in inside]

    def _no_leaf(self, step: Step | None = None) -> None:
        """It has to be looked into; from the next pass on, it is."""
        step = step or self._leaf
        assert step is not None and step.module is not None
        self._tracer.no_leaf(step.module)
        self.stop()

    # -- units --------------------------------------------------------------------------------

    def unit(self, run: Run, carried: Any, args: Any, kwargs: Any) -> None:
        """A unit is about to be replayed."""
        step = self._unit = Step("unit", self._at)
        step.module, step.plan = run.module, run.plan
        step.operands = Operands(args, kwargs, self._seen.source, self._home)
        self._given = tensors_in(*args, kwargs)
        step.inputs = list(self._kept(tuple(run.inputs)))
        step.carried, step.base = carried, run.base or {}

    def unit_left(self, run: Run, entries: list[tuple[Entry, bool]], output: Any) -> None:
        """It was, and the tracer was told.

        Args:
            run: of the unit.
            entries: its maps, and whether each may yet turn out to be something else.
            output: what it returned.
        """
        step, self._unit = self._unit, None
        if step is None or run.lost or self._doings.made:
            self.stop()
            return
        step.pending = tuple(pending for _, pending in entries)
        step.origins = run.origins
        step.counted = tuple(name for name, count in run.plan.calls for _ in range(count))
        results = [t for _, t in leaves(output)]
        step.paths = tuple(path for path, _ in leaves(output))
        tags = tuple(map(self._tracer.tag, results))
        step.results = self._kept(tags)
        step.ranks = tuple(t.dim() for t in results)
        step.itself = returned(self._given, results)
        self._given = []
        self._add(step, [entry for entry, _ in entries])
        self._seen.put(results, tags)

    # -- parameters: by their place in the model, since others may take it --------------------

    def _home(self, parameter: Tensor) -> tuple[nn.Module, str] | None:
        owners = self._tracer.names.owners(parameter)
        return owners[0] if owners else None

    def _kept(self, tags: tuple[Tag, ...]) -> tuple[Any, ...]:
        """What tensors carry, as it can be kept from pass to pass."""
        return tuple([self._placed(t) if isinstance(t, Weight) else t for t in tags])

    def _placed(self, weight: Weight) -> WeightRef:
        home = self._home(weight.parameter)
        return WeightRef(-1, *home, weight.axes) if home is not None else WeightRef()

    # -- the road -----------------------------------------------------------------------------

    def _add(self, step: Step, entries: list[Entry] | None = None) -> None:
        doings = self._doings
        made = [entry for _, entry, _ in doings.made] if entries is None else entries
        for entry in made:
            self._places[id(entry)] = len(self._entries)
            self._entries.append(entry)
        unknown = any(id(entry) not in self._places for entry in doings.dropped)
        if unknown or any(map(_homeless, (*step.results, *step.inputs))):
            self.stop()
            return
        step.dropped = tuple(self._places[id(entry)] for entry in doings.dropped)
        step.claimed = tuple(doings.claimed)
        step.counted += tuple(doings.counted)
        doings.clear()
        self._script.add(step)
        self._at = step


def _homeless(tag: Any) -> bool:
    """Whether it is of a parameter that is nowhere in the model."""
    return isinstance(tag, WeightRef) and tag.owner is None


def _making(entry: Entry, source: int, before: bool) -> Making:
    return Making(
        source,
        before,
        entry.kind,
        entry.origin,
        entry.axes,
        entry.sigma,
        entry.path,
        entry.picked,
    )
