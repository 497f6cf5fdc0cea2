"""What bytecode says of a branch that is about to be taken."""

from __future__ import annotations

import dis
import types

__all__ = ["only_raises"]

# Between the function whose result is asked for and the jump.
_BEFORE_A_JUMP = {"UNARY_NOT", "TO_BOOL", "NOP", "CACHE", "EXTENDED_ARG"}
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
    """Whether the way on from an instruction, if it jumps, jumps over what ends in a `raise`."""
    steps = list(dis.get_instructions(code))
    now = next((n for n, step in enumerate(steps) if step.offset == at), len(steps))
    if now < len(steps) and not steps[now].opname.startswith("POP_JUMP"):
        now += 1
        while now < len(steps) and steps[now].opname in _BEFORE_A_JUMP:
            now += 1
    if now >= len(steps) or not steps[now].opname.startswith("POP_JUMP"):
        return False
    end = steps[now].argval
    inside = [s for s in steps[now + 1 :] if s.offset < end and s.opname not in ("CACHE", "NOP")]
    if end <= at or not inside or inside[-1].opname != "RAISE_VARARGS":
        return False
    jumps = [s for s in inside if "JUMP" in s.opname or s.opname == "FOR_ITER"]
    stays = all(at < s.argval < end for s in jumps)
    return stays and not any(s.opname.startswith(("RETURN", "YIELD")) for s in inside)
