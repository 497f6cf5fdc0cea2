"""What bytecode says of a branch that is about to be taken, and of an exception."""

from __future__ import annotations

import dis
import types
from collections.abc import Callable
from typing import Any

# Between the function whose result is asked for and the jump.
_BEFORE_A_JUMP = {"UNARY_NOT", "TO_BOOL", "EXTENDED_ARG"}
_MOST = 400  # instructions that are looked at
_Ask = Callable[[types.CodeType, int], bool]
_known: dict[tuple[_Ask, int, int], tuple[types.CodeType, bool]] = {}


def only_raises(frame: types.FrameType) -> bool:
    """Whether a truth that is asked for decides whether an exception is raised, and nothing else.

    So it is of `assert t.all()` and of `if t.any(): raise …`. As long as nothing is raised the code
    goes one way.
    """
    return _asked(_raises, frame)


def handles(frame: types.FrameType) -> bool:
    """Whether code that is under way may go on where an exception is raised in what it calls.

    So it may with an `except`, and a `with`; but not by a `finally`, which raises it once more.
    """
    return _asked(_may_go_on, frame)


def _asked(ask: _Ask, frame: types.FrameType) -> bool:
    """What is known of the instruction that is under way."""
    code, at = frame.f_code, frame.f_lasti
    found = _known.get((ask, id(code), at))
    if found is None or found[0] is not code:
        if len(_known) > 4096:
            _known.clear()
        found = _known[ask, id(code), at] = code, ask(code, at)
    return found[1]


def _may_go_on(code: types.CodeType, at: int) -> bool:
    """Whether a handler around an instruction has a way that does not end in a `raise`."""
    whole: Any = dis.Bytecode(code)
    steps = [s for s in whole if s.opname not in ("CACHE", "NOP")]
    places = {step.offset: n for n, step in enumerate(steps)}

    def handlers(at: int) -> list[int]:
        return [places[e.target] for e in whole.exception_entries if e.start <= at < e.end]

    # What a handler raises, another one around it may handle.
    return not all(_only_ends_in_raise(steps, places, start, handlers) for start in handlers(at))


def _raises(code: types.CodeType, at: int) -> bool:
    """Whether one of the two ways on from an instruction, if it jumps, does nothing but raise."""
    steps = [s for s in dis.get_instructions(code) if s.opname not in ("CACHE", "NOP")]
    places = {step.offset: n for n, step in enumerate(steps)}
    now = places.get(at, len(steps))
    if now < len(steps) and not steps[now].opname.startswith("POP_JUMP"):
        now += 1
        while now < len(steps) and steps[now].opname in _BEFORE_A_JUMP:
            now += 1
    if now >= len(steps) or not steps[now].opname.startswith("POP_JUMP"):
        return False
    ways = now + 1, places.get(steps[now].argval, len(steps))
    return any(_only_ends_in_raise(steps, places, way) for way in ways)


def _only_ends_in_raise(
    steps: list[dis.Instruction],
    places: dict[int, int],
    start: int,
    handlers: Callable[[int], list[int]] = lambda at: [],
) -> bool:
    """Whether all ways from a step on, and their `handlers`, end in a `raise`, not a return."""
    todo, seen = [start], set[int]()
    while todo:
        now = todo.pop()
        if now in seen:
            continue
        if now >= len(steps) or len(seen) > _MOST:
            return False
        seen.add(now)
        todo += handlers(steps[now].offset)
        name = steps[now].opname
        if name.startswith(("RETURN", "YIELD")):
            return False
        if name in ("RAISE_VARARGS", "RERAISE"):
            continue
        if "JUMP" in name or name == "FOR_ITER":
            todo.append(places.get(steps[now].argval, len(steps)))
        if not name.startswith("JUMP"):
            todo.append(now + 1)
    return True
