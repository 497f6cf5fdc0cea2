"""Is every map right, on real architectures? Writes the table in docs/zoo.md.

For each model of tests/zoo.py, in eval mode (no gradients) and in train mode (with a backward
pass), three passes run in one `with capture(model)`, each with other inputs. A bare copy of the
model does the same beside it, under a witness below autograd that shares no code with fmapkit
(tests/truth.py). Counted is what both agree on, bit for bit.

Which way a site was read is no part of the public interface: this file alone looks into the
session, for statistics.
"""

from __future__ import annotations

import gc
import importlib
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment, package
from fmapkit import CaptureWarning, capture

__all__ = ["run"]

PASSES = 3
HEADS = (
    *("model", "runs", "captured", "right", "named in missed"),
    *("one hook", "light mode", "tracer", "copied", "untouched"),
)


@dataclass
class Row:
    """What one model gave in one mode; runs and pairs summed over all passes.

    Attributes:
        model: its name in tests/zoo.py.
        train: train mode with a backward pass, or eval mode without gradients.
        runs: how often a nonlinearity truly ran.
        captured: pairs (z, a) that were captured.
        right: pairs of which both tensors are those of one true run, bit for bit.
        missed: runs that have no pair, in a module that `maps.missed` names.
        ways: sites of the last pass, by the way they were read.
        copied: bytes that the last pass copied.
        changed: what differs from the bare copy; empty if nothing does.
        error: why there is no more to say; empty if there is.
        reasons: of `maps.missed`.
    """

    model: str
    train: bool
    runs: int = 0
    captured: int = 0
    right: int = 0
    missed: int = 0
    ways: dict[str, int] = field(default_factory=lambda: {"hook": 0, "light": 0, "tracer": 0})
    copied: int = 0
    changed: str = ""
    error: str = ""
    reasons: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether each run has its one right pair or is named, and nothing else changed."""
        complete = self.captured == self.right == self.runs - self.missed
        return complete and not self.changed and not self.error


def run(out: Path | None, only: str, threads: int) -> None:
    """Watch every model, print a line for each, and write the table.

    Args:
        out: the page to write; None for nowhere.
        only: take only models whose name contains this.
        threads: of torch.

    Raises:
        SystemExit: some model is not right, or could not be built; after the page is written.
    """
    torch.set_num_threads(threads)
    zoo: Any = importlib.import_module("tests.zoo")
    entries = [e for e in zoo.ZOO if only in e.name]
    if not entries:
        raise SystemExit(f"no model has {only!r} in its name")
    fast = torch.backends.mha.get_fastpath_enabled()
    # The fused inference path has no nonlinearity that the witness could see.
    torch.backends.mha.set_fastpath_enabled(False)
    rows: list[Row] = []
    began = time.perf_counter()
    try:
        for entry in entries:
            for train in (False, True):
                row = _watch(entry, train)
                rows.append(row)
                print(_line(row), flush=True)
                gc.collect()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    print("\n" + "\n".join(_summary(rows)))
    print(f"{time.perf_counter() - began:.0f} s")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_page(rows))
        print(f"written to {out}")
    bad = [f"{r.model} ({'train' if r.train else 'eval'})" for r in rows if not r.good]
    if bad:
        raise SystemExit(f"not right, or not to be had: {', '.join(bad)}")


def _watch(entry: Any, train: bool) -> Row:
    """Three passes of one model, beside its bare copy."""
    truth: Any = importlib.import_module("tests.truth")
    zoo: Any = importlib.import_module("tests.zoo")
    row = Row(entry.name, train)
    try:
        model, args, kwargs = entry.build()
        model.train(train)
        bare = truth.bare_copy(model)
        truth.run_pass(truth.bare_copy(model), args, kwargs, train=train)
    except Exception as error:
        row.error = f"cannot be built or run: {type(error).__name__}: {error}"
        return row
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CaptureWarning)
            with capture(model) as maps:
                read = _count_ways(maps)
                for step in range(PASSES):
                    read.clear()
                    given, named = zoo.vary(args, kwargs, step)
                    common = {"train": train, "seed_": step}
                    expected = truth.run_pass(bare, given, named, witness=True, **common)
                    watched = truth.run_pass(model, given, named, **common)
                    _compare(row, truth, maps, expected, watched)
                row.copied = maps.bytes_copied
                sites = len(maps.select(kind="activation", step=-1))
                row.ways["hook"] = read.count("hook")
                row.ways["light"] = read.count("light")
                row.ways["tracer"] = sites - len(read)
                row.reasons = [f"`{m.layer or '(model)'}`: {m.reason}" for m in maps.missed]
        if not row.changed:
            truth.assert_nothing_left(truth.fingerprint(bare), model)
            assert truth.modes() == (0, 0), "a mode is left on torch's stack"
    except AssertionError as error:
        row.changed = row.changed or str(error).splitlines()[0]
    except Exception as error:
        row.error = f"{type(error).__name__}: {error}"
    return row


def _compare(row: Row, truth: Any, maps: Any, expected: Any, watched: Any) -> None:
    """Count what is right in the latest pass."""
    try:
        truth.assert_same_pass(expected, watched)
    except AssertionError as error:
        row.changed = row.changed or str(error)
    pairs = truth.captured_pairs(maps)
    row.runs += len(expected.truth)
    row.captured += len(pairs)
    for one in expected.truth:
        same = truth.same_bits
        found = next((p for p in pairs if same(one.z, p.z) and same(one.a, p.a)), None)
        if found is not None:
            pairs.remove(found)
            row.right += 1
        elif truth.excused(one, maps):
            row.missed += 1


def _count_ways(maps: Any) -> list[str]:
    """A list that gets "hook" or "light" for each site read from a plan; the rest is traced."""
    session = maps._session
    calls = session.parts.region_calls
    leave = calls.leave
    read: list[str] = []

    def counted(*args: Any) -> None:
        steps = session.parts.live.run.plan.steps
        leave(*args)
        for step in steps:
            way = "light" if step.module is None else "hook"
            read.extend(way for e in step.map_specs if e.kind == "activation")

    calls.leave = counted
    return read


def _size(count: int) -> str:
    if not count:
        return "–"
    return f"{count / 1024:.0f} KiB" if count >= 1024 else f"{count} B"


def _cells(row: Row) -> tuple[str, ...]:
    if row.error:
        return (row.model, "–", "–", "–", "–", "–", "–", "–", "–", row.error)
    numbers = (row.runs, row.captured, row.right, row.missed, *row.ways.values())
    mark = "yes" if not row.changed else f"no: {row.changed}"
    return (row.model, *map(str, numbers), _size(row.copied), mark)


def _line(row: Row) -> str:
    mode = "train" if row.train else "eval"
    return f"{'ok ' if row.good else 'BAD'} {mode:5} " + "  ".join(_cells(row))


def _summary(rows: list[Row]) -> list[str]:
    lines = []
    for train in (False, True):
        mine = [r for r in rows if r.train is train and not r.error]
        total = sum(sum(r.ways.values()) for r in mine) or 1
        share = {w: sum(r.ways[w] for r in mine) / total for w in ("hook", "light", "tracer")}
        lines.append(
            f"{'Train' if train else 'Eval'} mode: {len(mine)} models, "
            f"{sum(r.runs for r in mine):,} runs of a nonlinearity, "
            f"{sum(r.captured for r in mine):,} captured, {sum(r.right for r in mine):,} right, "
            f"{sum(r.missed for r in mine):,} named in `missed`; "
            f"{sum(not r.changed for r in mine)} models untouched. In the last pass "
            f"{share['hook']:.1%} of the sites were read by one hook, {share['light']:.1%} by the "
            f"light mode, {share['tracer']:.1%} by the tracer."
        )
    return lines


def _page(rows: list[Row]) -> str:
    about = environment()
    about.pop("machine"), about.pop("threads")
    about |= {name: package(name) for name in ("pytorchcv", "transformers")}
    versions = ", ".join(f"{key} {value}" for key, value in about.items())
    lines = [
        "# Real architectures",
        "",
        "<!-- Generated by the command below. Do not edit by hand. -->",
        "",
        "    python -m benchmarks zoo --out docs/zoo.md",
        "",
        versions,
        "",
        f"Each model runs {PASSES} passes in one `with capture(model)`, each with other inputs, "
        "beside a bare copy under an independent witness (`tests/truth.py`). Weights are random, "
        "inputs small; `tests/zoo.py` has them.",
        "",
        *(f"- {line}" for line in _summary(rows)),
        "",
        f"**runs**: how often a nonlinearity truly ran, in all {PASSES} passes. **captured**: "
        "pairs (z, a). **right**: pairs that equal one true run, both tensors, bit for bit, each "
        "run counted once. **named in missed**: runs that could not be captured and that "
        "`maps.missed` names. **one hook, light mode, tracer**: how the sites of the last pass "
        "were read (see [how it works](how-it-works.md)). **copied**: what the last pass had to "
        "copy because the model overwrites it. **untouched**: outputs, gradients, buffers, random "
        "state, hooks, flags and modes are those of the bare copy, bit for bit.",
    ]
    for train in (False, True):
        mine = [r for r in rows if r.train is train]
        lines += ["", "## Train mode, with backward" if train else "## Eval mode, no gradients", ""]
        lines += _table(map(_cells, mine))
    named = {r.model: r.reasons for r in rows if r.reasons}
    if named:
        lines += ["", "## What is named in `missed`", ""]
        lines += [f"- {model}: {'; '.join(reasons)}" for model, reasons in named.items()]
    return "\n".join(lines) + "\n"


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    align = ["---", *["--:"] * (len(HEADS) - 2), "---"]
    return ["| " + " | ".join(cells) + " |" for cells in (HEADS, align, *rows)]
