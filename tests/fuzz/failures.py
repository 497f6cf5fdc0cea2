"""What is wrong with a program's captured passes."""

from __future__ import annotations

__all__ = ["Failure", "OverwrittenFailure"]


class Failure(AssertionError):  # noqa: N818
    """What is wrong.

    Args:
        kind: in a word or two, by which failures are counted.
        detail: the rest.

    Attributes:
        at: the pass; None after the last.
        traced: whether a fresh capture of that very pass fails as well.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail
        self.at: int | None = None
        self.traced = False

    def __str__(self) -> str:
        when = "after the last pass" if self.at is None else f"in pass {self.at}"
        how = "traced" if self.traced else "not where it is traced"
        return f"{self.kind} {when} ({how}): {self.detail}"


class OverwrittenFailure(Failure):
    """A map says that it was written to since."""
