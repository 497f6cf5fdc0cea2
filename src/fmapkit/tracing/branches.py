"""What bytecode says of a branch that is about to be taken."""

from __future__ import annotations

import dis
import types

# Between the function whose result is asked for and the jump.
_BEFORE_A_JUMP = {"UNARY_NOT", "TO_BOOL", "EXTENDED_ARG"}
_MOST = 400  # instructions that are looked at
_known: dict[tuple[int, int], tuple[types.CodeType, bool]] = {}


def only_raises(frame: types.FrameType) -> bool:
    """Whether a truth that is asked for decides whether an exception is raised, and nothing else.

    So it is of `assert t.all()` and of `if t.any(): raise …`. As long as nothing is raised the code
    goes one way.

    Args:
        frame: that asks, by an instruction that is under way.
    """
    code, at = frame.f_code, frame.f_lasti
    found = _known.get((id(code), at))
    if found is None or found[0] is not code:
        if len(_known) > 4096:
            _known.clear()
        found = _known[id(code), at] = code, _raises(code, at)
    return found[1]


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


def _only_ends_in_raise(steps: list[dis.Instruction], places: dict[int, int], start: int) -> bool:
    """Whether all ways from an instruction on end in a `raise`, and in no return."""
    todo, seen = [start], set[int]()
    while todo:
        now = todo.pop()
        if now in seen:
            continue
        if now >= len(steps) or len(seen) > _MOST:
            return False
        seen.add(now)
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
