"""How many bytes the maps of a capture may take, and what happens when they take more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fmapkit.errors import ArgumentError, BudgetError, is_int
from fmapkit.storage.passes import PassStore


@dataclass(frozen=True)
class Budget:
    """A limit, looked at as each pass ends."""

    max_bytes: int
    oldest_first: bool  # let the oldest passes go; else the pass that went over it is refused

    def check(self, store: PassStore) -> None:
        """Let passes go until the rest fits.

        Raises:
            BudgetError: the newest pass alone does not fit, or no pass is to be let go. Its maps
                are let go; those of older passes stay.
        """
        held = store.count()
        while held > self.max_bytes and self.oldest_first and len(store.passes) > 1:
            store.let_go()
            held = store.count()
        if held <= self.max_bytes:
            return
        newest = store.let_go(newest=True)[0]
        older = f", with {len(store.passes)} older ones" if store.passes else ""
        raise BudgetError(
            f"the maps of step {newest.step}{older} take {held:,} bytes, more than "
            f"max_bytes={self.max_bytes:,}; capture fewer layers, kinds or filters, a narrower "
            "dtype=, or use when_full='oldest' to let older passes go first",
            step=newest.step,
            bytes=held,
        )


def given_budget(max_bytes: Any, when_full: Any) -> Budget | None:
    """`max_bytes=` and `when_full=`, checked; None for no limit."""
    if when_full not in ("error", "oldest"):
        raise ArgumentError(f"when_full must be 'error' or 'oldest', not {when_full!r}")
    if max_bytes is None:
        if when_full == "oldest":
            raise ArgumentError(
                f"when_full={when_full!r} says what goes when max_bytes= is reached: give both"
            )
        return None
    if not is_int(max_bytes) or max_bytes < 1:
        raise ArgumentError(f"max_bytes must be a positive int (bytes), not {max_bytes!r}")
    return Budget(max_bytes, when_full == "oldest")
