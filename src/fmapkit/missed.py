"""What ran and was not captured: `maps.missed`, and the warning that names the first of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fmapkit._warnings import warn
from fmapkit.errors import BudgetError, CaptureWarning, NonFiniteError
from fmapkit.reasons import Reason

__all__ = ["RAISED", "Missed", "MissedLog", "NotSupportedError", "Reason", "reason"]

# What the user has asked for, by `max_bytes=` and `check=`: it is raised in the run, and not named.
RAISED = (BudgetError, NonFiniteError)


class NotSupportedError(Exception):
    """Something cannot be captured; the message is what `maps.missed` says of it."""


def reason(error: BaseException) -> str:
    """What `maps.missed` says of an error that came up in our own code."""
    if isinstance(error, NotSupportedError):
        return str(error)
    return Reason.FAILED.text(error=f"{type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True)
class Missed:
    """Something that ran and was not captured.

    Attributes:
        layer: the module it ran in, by name.
        reason: why it could not be captured, in full.
    """

    layer: str
    reason: str

    @property
    def why(self) -> Reason:
        """Which reason it is: a member to compare with; docs/missed.md says what each means."""
        return Reason.of(self.reason)


class MissedLog:
    """What one capture has missed so far."""

    def __init__(self, model: nn.Module) -> None:
        self.entries: list[Missed] = []  # each once, in the order in which they were noticed
        self.warned = False  # the user was told, and nothing has come since
        self._quiet = False
        self._model = type(model).__name__

    def add(self, layer: str, reason: str) -> None:
        """Name something that was not captured; each once."""
        entry = Missed(layer, reason)
        if entry not in self.entries:
            self.entries.append(entry)
            self.warned = False

    def take(self) -> list[Missed]:
        """What was missed so far; what comes is another block's."""
        taken, self.entries, self.warned = self.entries, [], False
        return taken

    def quiet(self) -> None:
        """Warn of nothing: whoever reads the maps says what is not there."""
        self._quiet = True

    def warn(self) -> None:
        """Tell the user, if there is anything new."""
        if self.warned or self._quiet or not self.entries:
            return
        self.warned = True
        first = self.entries[0]
        more = f" (and {len(self.entries) - 1} more)" if len(self.entries) > 1 else ""
        warn(f"not captured: {first.layer or self._model}: {first.reason}{more}; see maps.missed")

    def warn_in_forward(self) -> None:
        """The same as a pass ends; where warnings are errors, they wait until the block ends."""
        try:
            self.warn()
        except CaptureWarning:
            self.warned = False
