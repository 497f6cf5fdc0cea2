"""What every rank has, exchanged by one collective, and whether it goes together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fmapkit.errors import DistributedError, listed
from fmapkit.torchlib.operators import tree_map


def exchange(what: str, mine: Any, group: Any) -> list[Any]:
    """What every rank has, in the order of ranks; tensors are on the CPU.

    Args:
        mine: tensors and values of built-in types; ranks may have others than each other.

    Raises:
        DistributedError: torch.distributed is not initialised, or this rank is not in the group.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise DistributedError(
            f"{what} puts together what several ranks have seen, and torch.distributed is not "
            "initialised: call torch.distributed.init_process_group first"
        )
    if dist.get_rank(group) < 0:
        raise DistributedError(f"{what}: rank {dist.get_rank()} is not in the group it was given")
    # A view would be sent with all of the memory that it lies in.
    sent = tree_map(lambda v: v.detach().cpu().clone() if isinstance(v, Tensor) else v, mine)
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, sent, group=group)
    return parts


def agree(ranks: list[dict[str, Any]]) -> None:
    """Whether what the ranks have goes together; every rank comes to the same verdict.

    Raises:
        DistributedError: they do not.
    """
    for rank, text in enumerate(ranks):
        if text["local"]:
            raise DistributedError(
                f"reduce(): {text['local'][0]} is one rank's part of it on rank {rank} of the "
                "group (tensor parallel), so that filters of the same number are different ones"
            )
        if text["options"] != ranks[0]["options"]:
            *others, last = ranks[0]["options"]
            raise DistributedError(
                f"reduce(): {', '.join(others)} or {last} on rank {rank} of the group are not "
                "those on rank 0"
            )
    keys = ("layer", "kind", "nonlinearity", "path", "filters")
    seen = [{str([g[k] for k in keys]): g for g in text["groups"]} for text in ranks]
    for rank, groups in enumerate(seen):
        for other, theirs in enumerate(seen):
            lacking = [g for key, g in theirs.items() if key not in groups]
            if lacking:
                said = listed(f"{g['layer']}{g['path']} {g['kind']}" for g in lacking)
                raise DistributedError(
                    f"reduce(): ranks have seen different maps: {said} on rank {other} of the "
                    f"group, and not, or of other filters, on rank {rank}"
                )
