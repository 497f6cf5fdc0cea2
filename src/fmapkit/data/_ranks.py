"""Who takes part in an extraction: one process, or the ranks of torch.distributed.

Ranks speak at the start, to agree on what is done, and at the end, to wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fmapkit.errors import DistributedError

# Ranks end at different times. One that dies closes its connection, which all others notice.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that take part."""

    rank: int
    size: int
    group: Any  # of gloo; None where there is one process

    def first(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, on all ranks; where it fails there, all fail.

        Raises:
            DistributedError: rank 0 failed; on rank 0, what it failed with.
        """
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        failed: BaseException | None = None
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:
                failed = error
                box[1] = f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.group, 0), group=self.group)
        if failed is not None:
            raise failed
        if box[1] is not None:
            raise DistributedError(f"rank 0 could not begin: {box[1]}")
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What each rank has, on all ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started, or that a process group has; else one process.

    A process group is made for the time being where torchrun has started several processes, and
    nobody has made one yet.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ
    if not dist.is_available() or not (dist.is_initialized() or launched):
        yield Ranks(0, 1, None)
        return
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(group), dist.get_world_size(group), group)
    finally:
        dist.destroy_process_group(None if own else group)
