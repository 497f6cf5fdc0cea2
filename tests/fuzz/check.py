"""Runs a program twice, told and bare, plain and captured, and compares each pass."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import itertools
import linecache
import os
import random
import re
import sys
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from fmapkit import EditError, MapOverwrittenError, capture, edits
from fmapkit.errors import FmapkitError
from fmapkit.missed import Reason
from fmapkit.session import resting
from tests.fuzz.edited import Ways, judged
from tests.fuzz.failures import Failure, OverwrittenFailure
from tests.fuzz.programs import PassPlan, Program
from tests.fuzz.told import LOOSE, STRICT, VAGUE, Edit, Response, Site, Told
from tests.truth import fingerprint, same_bits, seed, tensors_of

__all__ = ["Report", "check", "input_of"]


class InvalidError(Exception):
    """The program itself fails when it runs bare."""


@dataclass
class Report:
    """What came of one program.

    Attributes:
        passes: that ran and were compared.
        sites: (z, a) pairs of these.
        named: of these, how many had no maps, and `maps.missed` named where.
        vague: how many may go by several labels; their values only were compared.
        named_later: named ones of passes after the first.
        departing: passes that did not run the same sites as the one before.
        failure: the first one.
        invalid: why the program itself cannot run; it counts for nothing.
    """

    passes: int = 0
    sites: int = 0
    named: int = 0
    named_later: int = 0
    vague: int = 0
    departing: int = 0
    failure: Failure | None = None
    invalid: str = ""


def check(program: Program) -> Report:
    """Run and compare a program; without gradients where it cannot be run with them."""
    report = Report()
    for version in (program, program.without_grad()):
        report = Report()
        try:
            _run(version, report)
        except InvalidError as error:
            report.invalid = str(error)
            continue
        except Failure as failure:
            if failure.kind in _OUTSIDE and _differs_bare(version):
                report.invalid = "another result each time it runs"
                break
            failure.traced = _fails_when_traced(version, failure)
            report.failure = failure
        break
    return report


# Failures of what one sees of a pass without its maps.
_OUTSIDE = ("outputs", "grads", "buffers", "random state", "raised")


def _differs_bare(program: Program) -> bool:
    """Whether the two texts give different results without any capture.

    So they do where torch reads memory that nobody wrote to (`rrelu` in a checkpoint), or where a
    variable is another one outside of a lambda.
    """
    try:
        _run(program, Report(), begin=len(program.passes))
    except Exception:
        return True
    return False


def _fails_when_traced(program: Program, failure: Failure) -> bool:
    if failure.at is None:
        return False
    if failure.at == 0:
        return True
    try:
        _run(program, Report(), begin=failure.at, end=failure.at + 1)
    except Failure as other:
        return other.kind == failure.kind
    except InvalidError:
        pass
    return False


# -- running --------------------------------------------------------------------------------------

_serial = itertools.count()


@contextlib.contextmanager
def _imported(text: str, told: Told | None) -> Iterator[types.ModuleType]:
    """The program as a module, from a file."""
    name = f"fuzzed_program_{os.getpid()}_{next(_serial)}"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{name}.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        if told is not None:
            module.T = told  # type: ignore[attr-defined]
        sys.modules[name] = module
        dont_write, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            spec.loader.exec_module(module)
            yield module
        finally:
            sys.dont_write_bytecode = dont_write
            del sys.modules[name]
            linecache.cache.pop(path, None)


@dataclass
class _Ran:
    """What one pass gave, as one sees it from outside.

    Attributes:
        raised: what of the program's own ended it.
        refused: by an edit.
        way: that it took through the program's code, if that was asked for.
    """

    outputs: list[Tensor]
    grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    random: tuple[Any, ...]
    raised: str = ""
    refused: EditError | None = None
    way: tuple[int, ...] = ()

    def ended(self) -> _Ran:
        """The same, if its end raised."""
        return dataclasses.replace(self, outputs=[])


def _pass(space: types.ModuleType, model: nn.Module, plan: PassPlan, x: Tensor, told: Any) -> _Ran:
    space.prepare(model, plan.k)
    model.train(plan.train)
    model.zero_grad(set_to_none=True)
    seed(plan.seed)
    kwargs = {} if plan.flag is None else {"flag": plan.flag}
    mode = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }[plan.grad]()
    with mode:
        x = x.clone()
        if told is not None:
            told.begin(model)
            told.enter(x)
        output, raised, refused = None, "", None
        ways = Ways(space.__file__, told is not None)
        try:
            with ways:
                output = model(x, **kwargs)
        except space.Odd as error:
            raised = repr(error)
        except EditError as error:
            refused = error
        finally:
            if told is not None:
                told.end()
        outputs = [t.detach().clone() for t in tensors_of(output)]
        if plan.grad == "grad" and output is not None and output.requires_grad:
            output.square().mean().backward()
    grads = {
        n: None if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters()
    }
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    drawn = (torch.rand(4).tolist(), np.random.rand(2).tolist(), random.random())
    return _Ran(outputs, grads, buffers, drawn, raised, refused, ways.taken)


def input_of(family: str, plan: PassPlan) -> Tensor:
    """What the model is given in a pass."""
    generator = torch.Generator().manual_seed(plan.seed)
    shape = {
        "vec": (plan.batch, 6),
        "seq": (plan.batch, plan.length, 6),
        "img": (plan.batch, 6, plan.length, plan.length),
    }[family]
    return torch.randn(shape, generator=generator) * (1 + plan.seed % 3)


def _run(program: Program, report: Report, begin: int = 0, end: int | None = None) -> None:
    """Run the passes in one block, or in several: after one that an edit breaks off, in another."""
    at: int | None = begin
    while at is not None:
        at = _run_from(program, report, at, end)


def _run_from(program: Program, report: Report, begin: int, end: int | None) -> int | None:
    """Run them from one on; which one a fresh block is to begin with, if it broke off."""
    told = Told()
    told_text, plain_text = program.texts()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            told_space = stack.enter_context(_imported(told_text, told))
            seed(0)
            bare = told_space.build()
            told.edit = _edit(program) if "edit" in program.options else None
            plain_space = stack.enter_context(_imported(plain_text, None))
            seed(0)
            model = plain_space.build()
        except Exception as error:
            raise InvalidError(f"{type(error).__name__}: {error}") from error
        plans = program.passes[:end]
        for plan in plans[:begin]:
            expected = _told_pass(told_space, bare, program, plan, told)
            _compare(
                expected, _pass(plain_space, model, plan, input_of(program.family, plan), None)
            )
        left_at = _block(
            program, report, plans[begin:], begin, (told_space, bare, told), (plain_space, model)
        )
        if left_at is not None:  # the two have not run the same
            return left_at if left_at < len(plans) else None
        changed = _left(bare, model)
        if changed:
            gc.collect()  # a map that waits for its gradient holds a hook; the maps are gone now
            changed = _left(bare, model)
        if changed:
            raise Failure("left behind", f"at {changed}")
    return None


def _edit(program: Program) -> Edit:
    """The edit of a program, of a layer all of whose sites are certain."""
    index, kind, factor = program.options["edit"]
    told = Told()
    sites: list[Site] = []
    with _imported(program.texts()[0], told) as space:
        seed(0)
        model = space.build()
        for plan in program.passes:
            _told_pass(space, model, program, plan, told)
            sites += told.sites
    names = sorted({s.tag.owner.name for s in sites if s.tag.owner is not None})
    if not names or any(s.tag.trust != STRICT for s in sites):
        raise InvalidError("an edit, and no layer that is certain to have it")
    layer = names[index % len(names)]
    shadows = [
        shadow
        for s in sites
        if s.tag.owner is not None and s.tag.owner.name == layer
        for shadow in (s.tag.shadow, s.a_shadow)
    ]
    if factor or any(s is None or _axis_of(s) is None for s in shadows):
        return Edit(layer, kind, factor, None)
    # One that all of its maps hold: an edit of a filter that is not there is an error.
    held = set.intersection(*[set(s.flatten().tolist()) for s in shadows if s is not None])
    return Edit(layer, kind, factor, sorted(held)[index % len(held)] if held else None)


def _left(bare: nn.Module, model: nn.Module) -> list[str]:
    """Where the two differ from outside; classes, which are of two modules, go by their names."""
    marks = [fingerprint(m) for m in (bare, model)]
    for mark in marks:
        for name, value in mark.items():
            if isinstance(value, tuple) and len(value) > 1 and isinstance(value[1], tuple):
                bases = tuple(getattr(b, "__qualname__", b) for b in value[1])
                mark[name] = (value[0], bases, *value[2:])
    names = marks[0].keys() | marks[1].keys()
    return sorted(name for name in names if marks[0].get(name) != marks[1].get(name))


def _told_pass(
    space: types.ModuleType, bare: nn.Module, program: Program, plan: PassPlan, told: Told
) -> _Ran:
    try:
        return _pass(space, bare, plan, input_of(program.family, plan), told)
    except Exception as error:
        raise InvalidError(f"{type(error).__name__}: {error}") from error


def _block(
    program: Program,
    report: Report,
    plans: Sequence[PassPlan],
    first: int,
    true: tuple[types.ModuleType, nn.Module, Told],
    captured: tuple[types.ModuleType, nn.Module],
) -> int | None:
    told_space, bare, told = true
    plain_space, model = captured
    truths: list[tuple[list[Site], list[Response]]] = []
    asked = {k: v for k, v in program.options.items() if k != "edit"}
    edit = told.edit
    if edit is not None:
        key = (
            (edit.layer, edit.kind) if edit.filter is None else (edit.layer, edit.kind, edit.filter)
        )
        asked["edit"] = {key: edits.scale(edit.factor) if edit.filter is None else edits.zero()}
    ways: Counter[Any] = Counter()
    known: dict[Any, list[int]] = {}
    # Numbers that it draws are a part of its way.
    chance = re.search(r"random\.|initial_seed", program.texts()[1]) is not None
    soon = mock.patch.object(resting, "_ALIKE", 1)  # blocks go on with a path that two have taken
    with soon, contextlib.ExitStack() as block, contextlib.ExitStack() as inner_stack:
        maps = block.enter_context(capture(model, **asked))
        inner: Any = None
        raised, every = False, program.options.get("every", 1)
        for n, plan in enumerate(plans, first):
            try:
                expected = _told_pass(told_space, bare, program, plan, told)
                truths.append((told.sites, told.responses))
                if plan.inner and inner is None and edit is None:
                    inner = inner_stack.enter_context(capture(model))
                elif not plan.inner and inner is not None:
                    inner_stack.close()
                    inner = None
                if program.blocks and n > first:
                    inner_stack.close()
                    inner = None
                    block.close()
                    maps = block.enter_context(capture(model, **asked))
                try:
                    got = _pass(plain_space, model, plan, input_of(program.family, plan), None)
                except Exception as error:
                    raise Failure("raised", f"{type(error).__name__}: {error}") from error
                form = dataclasses.replace(plan, seed=plan.seed if chance else 0, inner=False)
                way = form, expected.way, _road(told.sites, told.responses)
                if edit is not None:
                    # The first is traced; functions that a lesson has told of record in the next.
                    new = n > first and ways[way] < 2
                    ways[way] += 1
                    halts = not issubclass(plain_space.Odd, Exception)
                    goes = judged(edit, told.places, expected.raised, got.refused, new, halts)
                    if goes in ("again", "past it"):
                        return n + (goes == "past it")
                    try:
                        _compare(expected if goes == "compared" else expected.ended(), got)
                    except Failure:
                        if any(_excused(site, maps.missed) for site in told.places):
                            return n + 1  # what it is not applied to is named
                        raise
                    report.passes += 1
                    continue
                _compare(expected, got)
                raised = raised or bool(expected.raised)
                shown = truths[(n - first) // every * every]  # of the pass that is captured
                if expected.raised:  # what was held of a pass that failed is not promised
                    continue
                for each in [maps] if inner is None else [maps, inner]:
                    of_pass = shown if each is maps else truths[-1]
                    options = program.options if each is maps else {}
                    try:
                        named = _compare_maps(each, *of_pass, options=options)
                    except OverwrittenFailure:
                        if of_pass is truths[-1]:
                            raise
                        named = 0  # by this pass, which is not captured: said so when read
                    except (FmapkitError, RuntimeError) as error:
                        raise Failure(
                            f"reading raises {type(error).__name__}", f"{error}"
                        ) from error
                    if each is maps:
                        report.named += named
                        report.named_later += named if n > first else 0
                        if (n - first) % every:
                            continue  # not captured: its way is not known by that
                        known.setdefault(way, []).append(named)
                        # Sites alone do not tell a way: a counter may pick its number, or its
                        # branch, for the first time now.
                        late = [lost for lost in known[way][3:] if lost > min(known[way])]
                        if len(late) > 1:
                            raise Failure("lost on a known way", f"{list(maps.missed)}")
                report.passes += 1
                report.departing += n > first and _road(*truths[-2]) != _road(*truths[-1])
                report.sites += len(told.sites)
                report.vague += sum(s.tag.trust == VAGUE for s in told.sites)
            except Failure as failure:
                failure.at = n
                raise
        if edit is not None:
            return None
        kept = 1 if raised or every > 1 else program.options.get("keep", 1)
        if program.blocks:
            return None
        for step in range(0 if kept == "all" else max(0, len(plans) - kept), len(plans) - 1):
            try:
                _compare_maps(maps, *truths[step], step=step)
            except OverwrittenFailure:
                pass  # by a later pass
            except Failure as failure:
                raise Failure(f"of an earlier pass, {failure.kind}", failure.detail) from failure
    return None


def _road(sites: Sequence[Site], responses: Sequence[Response]) -> Any:
    """What a pass ran: by which layers and sites."""
    ran = [(s.sigma, s.own, s.tag.owner and (s.tag.owner.name, s.tag.owner.call)) for s in sites]
    return tuple(ran), tuple((r.owner.name, r.owner.call) for r in responses)


# -- comparing ------------------------------------------------------------------------------------


def _compare(expected: _Ran, got: _Ran) -> None:
    if expected.raised != got.raised:
        raise Failure("raised", f"{expected.raised or 'nothing'} bare, {got.raised or 'nothing'}")
    if len(expected.outputs) != len(got.outputs):
        raise Failure("outputs", "another number of them")
    for left, right in zip(expected.outputs, got.outputs, strict=True):
        if not same_bits(left, right):
            raise Failure("outputs", f"{_difference(left, right)}")
    for kind in ("grads", "buffers"):
        left, right = getattr(expected, kind), getattr(got, kind)
        if left.keys() != right.keys():
            raise Failure(kind, f"{sorted(left.keys() ^ right.keys())} are there only once")
        for name, one in left.items():
            other = right[name]
            if (one is None) != (other is None):
                raise Failure(kind, f"{name} is there only once")
            if one is not None and not same_bits(one, other):
                raise Failure(kind, f"{name}: {_difference(one, other)}")
    if expected.random != got.random:
        raise Failure("random state")


def _difference(left: Tensor, right: Tensor) -> str:
    if left.shape != right.shape or left.dtype != right.dtype:
        return f"{tuple(left.shape)} {left.dtype}, {tuple(right.shape)} {right.dtype}"
    return f"differ by up to {(left.double() - right.double()).abs().max().item():.3g}"


@dataclass(frozen=True)
class _Pair:
    """A captured (z, a)."""

    z: Any
    a: Any

    def __str__(self) -> str:
        fm = self.a
        filters = None if fm.filters is None else list(fm.filters)
        return (
            f"{fm.nonlinearity} of {fm.layer!r} call {fm.call} {tuple(fm.shape)}, "
            f"filters {filters} along {fm.filter_dim}"
        )


def _compare_maps(
    maps: Any,
    sites: Sequence[Site],
    responses: Sequence[Response],
    *,
    options: Mapping[str, Any] = MappingProxyType({}),
    step: int = -1,
) -> int:
    """Compare the maps of a pass with what it told; how many sites are named instead."""
    missed = list(maps.missed)
    try:
        pairs, silent = _captured(maps, step)
    except MapOverwrittenError as error:
        raise OverwrittenFailure("overwritten", str(error)) from error
    aligned = _aligned(sites, pairs, missed, _fault)
    if aligned is None:
        raise _diagnosis(sites, pairs, missed)
    named = [site for site, pair in zip(sites, aligned, strict=True) if pair is None]
    unsure = {id(s.tag.owner) for s in named if s.tag.owner is not None}
    _compare_silent(silent, responses, unsure, missed)
    if options.get("gradients"):
        for site, pair in zip(sites, aligned, strict=True):
            if pair is not None:
                _compare_gradients(site, pair, missed)
    if "response" in options.get("kinds", ()):
        _compare_responses(maps, responses, missed)
    return len(named)


def _compare_gradients(site: Site, pair: _Pair, missed: list[Any]) -> None:
    of_views = {m.layer for m in missed if m.why is Reason.GRADIENT_OF_VIEW}
    for fm, truth in ((pair.z, site.z_grad), (pair.a, site.a_grad)):
        if truth is None or (fm.grad is None and fm.layer in of_views):
            continue
        found = fm.grad
        what = f"of the {fm.kind}, {_text(site)}"
        if (found is None) != (not truth):
            there = "there" if truth else "not there"
            raise Failure("gradient of a map", f"{what}: truly it is {there}")
        if found is not None and not same_bits(found, truth[-1]):
            raise Failure("gradient of a map", f"{what}: {_difference(truth[-1], found)}")


def _captured(maps: Any, step: int) -> tuple[list[_Pair], list[Any]]:
    """Pairs in the order of their activations, and preactivations without a nonlinearity."""
    waiting: dict[tuple[Any, ...], list[Any]] = {}
    silent, pairs = [], []
    for fm in maps.select(kind="preactivation", step=step):
        if fm.nonlinearity is None:
            silent.append(fm)
        else:
            waiting.setdefault((fm.layer, fm.call, fm.nonlinearity), []).append(fm)
    for fm in maps.select(kind="activation", step=step):
        queue = waiting.get((fm.layer, fm.call, fm.nonlinearity))
        if not queue:
            raise Failure("half a pair", f"no preactivation of {fm}")
        pairs.append(_Pair(queue.pop(0), fm))
    if any(waiting.values()):
        raise Failure("half a pair", f"no activations of {[v for v in waiting.values() if v]}")
    return pairs, silent


def _named(inside: Sequence[str], layer: str | None, missed: Sequence[Any]) -> bool:
    """Whether `maps.missed` says that something is missing there."""
    return any(m.layer.partition(":")[0] in inside or m.layer == layer for m in missed)


def _excused(site: Site, missed: Sequence[Any]) -> bool:
    return _named(site.inside, site.tag.owner.name if site.tag.owner else None, missed)


def _values_fault(site: Site, pair: _Pair) -> str | None:
    if not same_bits(site.z, pair.z.tensor):
        return f"z {_difference(site.z, pair.z.tensor)}"
    if not same_bits(site.a, pair.a.tensor):
        return f"a {_difference(site.a, pair.a.tensor)}"
    return None


def _fault(site: Site, pair: _Pair) -> str | None:
    """What is wrong with a pair that is to be a site; None if it is right."""
    return _values_fault(site, pair) or _label_fault(site, pair)


def _label_fault(site: Site, pair: _Pair) -> str | None:
    z, a, tag = pair.z, pair.a, site.tag
    if z.nonlinearity != site.sigma:
        return f"σ is {site.sigma}, not {z.nonlinearity}"
    if tag.trust == VAGUE:
        return None
    own = z.layer in site.own
    if tag.owner is None or (tag.trust == LOOSE and own):
        if not own and _NAMELESS not in site.own:
            return f"label is {' or '.join(map(repr, site.own))}, not {z.layer!r}"
        if site.own_call is not None and z.call != site.own_call:
            return f"call is {site.own_call}, not {z.call}"
        return None
    if z.layer != tag.owner.name:
        return f"label is {tag.owner.name!r}, not {z.layer!r}"
    if tag.owner.call is not None and z.call != tag.owner.call:
        return f"call is {tag.owner.call}, not {z.call}"
    strict = tag.trust == STRICT
    return _filters_fault(z, tag.shadow, strict) or _filters_fault(a, site.a_shadow, strict)


_NAMELESS = "<made in the forward>"


def _filters_fault(fm: Any, shadow: Tensor | None, strict: bool) -> str | None:
    if shadow is None:
        return None
    if fm.filter_dim is None:
        known = _axis_of(shadow)
        if strict and known is not None:
            return f"filters are along {known}, and {fm.kind} says nothing"
        return None
    claimed = list(fm.filters)
    dim = fm.filter_dim
    if not 0 <= dim < shadow.dim() or len(claimed) != shadow.shape[dim]:
        return f"filters of {fm.kind} are {claimed} along {dim} of {tuple(shadow.shape)}"
    shape = [1] * shadow.dim()
    shape[dim] = len(claimed)
    if not torch.equal(torch.tensor(claimed).view(shape).expand(shadow.shape), shadow):
        return f"filters of {fm.kind} are not {claimed} along {dim}, but {_axis_text(shadow)}"
    return None


def _axis_of(shadow: Tensor) -> int | None:
    """The axis along which the filters lie, one to an index; None if there is no such axis."""
    for dim, size in enumerate(shadow.shape):
        if size > 1:
            line = shadow.movedim(dim, -1).reshape(-1, size)
            if torch.equal(line, line[:1].expand_as(line)) and line[0].unique().numel() == size:
                return dim
    return None


def _axis_text(shadow: Tensor) -> str:
    dim = _axis_of(shadow)
    if dim is None:
        return "along no one axis"
    return f"{shadow.movedim(dim, -1).reshape(-1, shadow.shape[dim])[0].tolist()} along {dim}"


def _aligned(
    sites: Sequence[Site], pairs: Sequence[_Pair], missed: Sequence[Any], fault: Any
) -> list[_Pair | None] | None:
    """Each site's pair, in order; None for one that is named instead. None: it cannot be done."""
    dead: set[tuple[int, int]] = set()
    right: dict[tuple[int, int], bool] = {}
    result: list[_Pair | None] = []

    def step(i: int, j: int) -> bool:
        if i == len(sites):
            return j == len(pairs)
        if (i, j) in dead:
            return False
        if j < len(pairs):
            if (i, j) not in right:
                right[i, j] = fault(sites[i], pairs[j]) is None
            if right[i, j]:
                result.append(pairs[j])
                if step(i + 1, j + 1):
                    return True
                result.pop()
        if _excused(sites[i], missed):
            result.append(None)
            if step(i + 1, j):
                return True
            result.pop()
        dead.add((i, j))
        return False

    return result if step(0, 0) else None


def _diagnosis(sites: Sequence[Site], pairs: Sequence[_Pair], missed: Sequence[Any]) -> Failure:
    """What is wrong, in the first words that fit."""
    table = "\n".join(
        [
            f"{len(sites)} true sites, {len(pairs)} captured pairs",
            *(f"  site {_text(site)}" for site in sites),
            *(f"  pair {pair}" for pair in pairs),
            *(f"  missed {m.layer!r}: {m.reason}" for m in missed),
        ]
    )
    by_value = _aligned(sites, pairs, missed, _values_fault)
    if by_value is not None:
        for site, pair in zip(sites, by_value, strict=True):
            fault = _label_fault(site, pair) if pair is not None else None
            if fault is not None:
                return Failure(fault.split()[0], f"{fault}; of {_text(site)}\n{table}")
    free = list(pairs)
    for site in sites:
        found = next((p for p in free if _values_fault(site, p) is None), None)
        if found is not None:
            free.remove(found)
        elif not _excused(site, missed):
            same = next((p for p in free if _label_fault(site, p) is None), None)
            if same is not None and site.tag.trust == STRICT:
                return Failure("values", f"{_values_fault(site, same)}; of {_text(site)}\n{table}")
            return Failure("missing", f"{_text(site)}\n{table}")
    if free:
        return Failure("surplus", f"{free[0]}\n{table}")
    return Failure("order", table)


def _text(site: Site) -> str:
    tag = site.tag
    name = repr(tag.owner.name) if tag.owner else f"{site.own} (own)"
    call = tag.owner.call if tag.owner else site.own_call
    where = _axis_text(tag.shadow) if tag.shadow is not None else "unknown"
    return (
        f"{site.sigma} of {name} call {call} {tuple(site.z.shape)} ({tag.trust}), filters {where}"
    )


def _compare_silent(
    silent: Sequence[Any], responses: Sequence[Response], unsure: set[int], missed: Sequence[Any]
) -> None:
    """Preactivations that no nonlinearity has received: the responses."""
    found = {(fm.layer, fm.call): fm for fm in silent}
    if len(found) != len(silent):
        raise Failure("surplus response", f"{silent}")
    for response in responses:
        owner = response.owner
        fm = found.pop((owner.name, owner.call), None)
        if fm is None:
            sure = not owner.claimed and not owner.maybe and id(owner) not in unsure
            if sure and not _named(response.inside, owner.name, missed):
                raise Failure("missing response", f"of {owner.name!r} call {owner.call}")
            continue
        if owner.claimed and not owner.maybe and id(owner) not in unsure:
            raise Failure("claimed response", f"of {owner.name!r} call {owner.call}")
        _check_response(fm, response)
    if found:
        raise Failure("surplus response", f"{list(found)}")


def _check_response(fm: Any, response: Response) -> None:
    what = f"of {fm.layer!r} call {fm.call}"
    if not same_bits(fm.tensor, response.tensor):
        raise Failure("response", f"{what}: {_difference(response.tensor, fm.tensor)}")
    fault = _filters_fault(fm, response.shadow, True)
    if fault is not None:
        raise Failure("filters", f"{fault}, {what}")


def _compare_responses(maps: Any, responses: Sequence[Response], missed: Sequence[Any]) -> None:
    """Maps of kind "response", where they were asked for."""
    found = {(fm.layer, fm.call): fm for fm in maps.select(kind="response", step=-1)}
    for response in responses:
        owner = response.owner
        fm = found.get((owner.name, owner.call))
        if fm is not None:
            _check_response(fm, response)
        elif not _named(response.inside, owner.name, missed):
            raise Failure("missing response", f"of kind response, {owner.name!r} call {owner.call}")
