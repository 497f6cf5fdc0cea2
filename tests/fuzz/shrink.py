"""Drops what a failing program does not need in order to fail."""

from __future__ import annotations

import time
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
        for n in reversed(range(len(program.passes) - 1)):
            changed |= better(replace(program, passes=program.passes[:n] + program.passes[n + 1 :]))
        for unit in units(program.code):
            if unit.id not in program.dropped:
                inside = {u.id for u in units(unit.code)}
                changed |= better(replace(program, dropped={*program.dropped, unit.id, *inside}))
    return program, report
