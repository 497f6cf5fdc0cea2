"""How many bytes the maps of a capture may take, and what happens when they take more."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

from fmapkit.errors import ArgumentError, BudgetError, is_int
from fmapkit.storage.passes import PassStore

Policy = Literal["error", "oldest"]


class Budget:
    """A limit, looked at as each pass ends.

    Args:
        max_bytes: how many.
        when_full: "error" to refuse the pass that went over it, "oldest" to let the oldest go.
    """

    def __init__(self, max_bytes: Any, when_full: Policy = "error") -> None:
        if not is_int(max_bytes) or max_bytes < 1:
            raise ArgumentError(f"max_bytes must be a positive int (bytes), not {max_bytes!r}")
        self._max = max_bytes
        self._policy = when_full

    def check(self, store: PassStore) -> None:
        """Let passes go until the rest fits.

        Raises:
            BudgetError: the newest pass alone does not fit, or no pass is to be let go. Its maps
                are let go; those of older passes stay.
        """
        held = store.count()
        while held > self._max and self._policy == "oldest" and len(store.passes) > 1:
            store.let_go()
            held = store.count()
        if held <= self._max:
            return
        newest = store.let_go(newest=True)[0]
        older = f", with {len(store.passes)} older ones" if store.passes else ""
        raise BudgetError(
            f"the maps of step {newest.step}{older} take {held:,} bytes, more than "
            f"max_bytes={self._max:,}; capture fewer layers, kinds or filters, a narrower dtype=, "
            "or use when_full='oldest' to let older passes go first",
            step=newest.step,
            bytes=held,
        )


def policy(when_full: Any) -> Policy:
    """A policy as it was given; an error where it is neither."""
    if when_full in get_args(Policy):
        return cast("Policy", when_full)
    raise ArgumentError(f"when_full must be 'error' or 'oldest', not {when_full!r}")
