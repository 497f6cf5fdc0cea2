"""Drops what a failing program does not need in order to fail."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import replace

from tests.fuzz.check import Report, check
from tests.fuzz.programs import Program
from tests.fuzz.source import units

__all__ = ["shrink"]


def shrink(program: Program, report: Report, seconds: float = 20.0) -> tuple[Program, Report]:
    """The smallest program found in a time that fails in the same way, and its report."""
    failure = report.failure
    assert failure is not None
    until = time.monotonic() + seconds

    def try_(smaller: Program) -> Report | None:
        if time.monotonic() > until:
            return None
        found = check(smaller)
        other = found.failure
        same = other is not None and (other.kind, other.traced) == (failure.kind, failure.traced)
        return found if same else None

    def better(smaller: Program) -> bool:
        nonlocal program, report
        found = try_(smaller)
        if found is not None:
            program, report = smaller, found
        return found is not None

    better(replace(program, options={}))
    better(replace(program, passes=[replace(p, inner=False) for p in program.passes]))
    at = report.failure.at if report.failure is not None else None
    if at is not None:
        better(replace(program, passes=program.passes[: at + 1]))
    changed = True
    while changed:
        changed = False
        unused = _unused(program)
        if unused:
            better(replace(program, dropped=program.dropped | unused))
        for n in reversed(range(len(program.passes) - 1)):
            changed |= better(replace(program, passes=program.passes[:n] + program.passes[n + 1 :]))
        for unit in units(program.code):
            if unit.id not in program.dropped:
                inside = {u.id for u in units(unit.code)}
                changed |= better(replace(program, dropped={*program.dropped, unit.id, *inside}))
    return program, report


def _unused(program: Program) -> set[int]:
    """Definitions, attributes and settings of names that occur but once."""
    words = Counter(re.findall(r"\w+", program.texts()[1]))
    found = set()
    for unit in units(program.code):
        first = unit.code[0] if unit.code else ""
        if unit.id not in program.dropped and isinstance(first, str):
            name = re.match(r"(?:self\.|def |class )(\w+)", first)
            if name is not None and words[name[1]] == 1:
                found.add(unit.id)
    return found
