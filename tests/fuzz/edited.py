"""What an edit that raises is to have had for it: which passes it may refuse, and which it must.

The told program knows which sites of a pass an edit is for. An edit without one must be refused,
and one with a place made, but for what the docs say: in a pass that takes a new way, where it may
have had a place that no tap stands at; and where z is compared before σ runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Literal

from fmapkit import EditError
from tests.fuzz.failures import Failure
from tests.fuzz.told import Edit, Site

__all__ = ["Goes", "Ways", "judged"]

# What is to come of a pass: its results are compared; all but its outputs, which the error took;
# it did not run as a whole, and a fresh block goes on with the same one, or with the next.
Goes = Literal["compared", "without outputs", "again", "past it"]

_NO_PLACE = "changed nothing in this pass"
_NEW_WAY = "took a way through its code that no earlier pass had taken"
_PAST_A_PART = "so far only as a part of another module"
_ENDED = "an exception ended the call of a part of the model, as in no pass before"
_COMPARED = "is compared before the nonlinearity"
_CAUGHT = "a call inside the model was broken off"

# The functions that choose by a comparison which the program has made itself.
_CHOICES = frozenset({"where", "mul", "masked_fill", "maximum"})


class Ways:
    """While entered, records which way a program's code takes: every instruction that it runs.

    Args:
        file: of the program; code that it has compiled itself has a name such as `<string>`.
        asked: record at all.

    Attributes:
        taken: the instructions, one after the other.
    """

    def __init__(self, file: str | None, asked: bool) -> None:
        self.taken: tuple[int, ...] = ()
        self._file = file
        self._asked = asked
        self._found: list[int] = []
        self._before: Any = None

    def __enter__(self) -> None:
        if self._asked:
            self._before = sys.gettrace()
            sys.settrace(self._called)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._asked:
            sys.settrace(self._before)
            self.taken = tuple(self._found)

    def _called(self, frame: FrameType, event: str, value: Any) -> Any:
        if frame.f_code.co_filename != self._file and frame.f_code.co_filename[:1] != "<":
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self._found.append(frame.f_code.co_firstlineno)
        return self._runs

    def _runs(self, frame: FrameType, event: str, value: Any) -> Any:
        self._found.append(frame.f_lasti)
        return self._runs


def judged(
    edit: Edit,
    places: Sequence[Site],
    raised: str,
    refused: EditError | None,
    new_way: bool,
    halts: bool,
) -> Goes:
    """What is to come of a pass with an edit.

    Args:
        edit: that was asked for.
        places: the sites that truly are the edit's.
        raised: what the program itself has raised in the end, if anything.
        refused: what the captured pass raised instead.
        new_way: the block has not seen this way often enough.
        halts: what the program raises and catches is no `Exception`.

    Raises:
        Failure: the edit was refused, or was not, against what the docs say.
    """
    if refused is None:
        if not places and not raised:
            raise Failure("edit without a place", "and nothing was raised")
        return "compared"
    text = str(refused)
    if _NO_PLACE in text and not places:
        return "without outputs"
    if _CAUGHT in text and halts:
        return "without outputs"
    if new_way and (_NEW_WAY in text or _PAST_A_PART in text or _ENDED in text):
        return "again"
    if _COMPARED in text and edit.kind == "preactivation":
        if any(site.sigma in _CHOICES for site in places):
            return "past it"
    sigmas = [site.sigma for site in places]
    raise Failure("edit refused", f"it has {len(places)} places {sigmas}, and raised {text}")
