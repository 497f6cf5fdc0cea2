"""What every rank has, exchanged by one collective.

A collective takes tensors of one size from all ranks, and they do not know each other's sizes. So
each sends its first MiB, with its size in front, padded where it is shorter. By then all ranks know
all sizes, and if one is larger, all send the rest by a second collective. No rank can be left
waiting, whatever the others have seen.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmapkit.errors import DistributedError, listed
from fmapkit.lookup import _device

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["agree", "exchange"]

FIRST = 2**20  # bytes: the statistics of some 16,000 filters
_HEAD = 16  # bytes: the size of the text, and of everything


def exchange(
    what: str, text: Any, tensors: Sequence[Tensor], group: Any
) -> list[tuple[Any, list[Tensor]]]:
    """Every rank's text and tensors, in the order of ranks; the tensors on the CPU.

    Args:
        what: was called, for messages.
        text: of built-in types, as JSON has them.
        tensors: of this rank; their shapes and types may differ from those of other ranks.
        group: process group; None for the default one.

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
    mine = _pack(text, tensors)
    device = _device(tensors[0] if tensors else torch.empty(0, device="cpu"), group)
    parts = _gathered(mine, FIRST, device, group)
    sizes = [_numbers(part)[1] for part in parts]
    if max(sizes) > FIRST:
        rest = _gathered(mine[FIRST:], max(sizes) - FIRST, device, group)
        parts = [torch.cat(pair) for pair in zip(parts, rest, strict=True)]
    return [_unpack(part) for part in parts]


def _gathered(mine: Tensor, size: int, device: torch.device, group: Any) -> list[Tensor]:
    import torch.distributed as dist

    padded = torch.zeros(size, dtype=torch.uint8, device="cpu")
    padded[: mine.numel()] = mine[:size]
    padded = padded.to(device)
    received = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, padded, group=group)
    return [part.cpu() for part in received]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _numbers(part: Tensor) -> list[int]:
    return part[:_HEAD].clone().view(torch.int64).tolist()


def _pack(text: Any, tensors: Sequence[Tensor]) -> Tensor:
    forms = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in tensors]
    letters = json.dumps([text, forms]).encode()
    written = torch.frombuffer(bytearray(letters), dtype=torch.uint8)
    body = torch.cat([written, *map(_bytes, tensors)])
    head = torch.tensor([len(letters), _HEAD + body.numel()], device="cpu")
    return torch.cat([_bytes(head), body])


def _unpack(part: Tensor) -> tuple[Any, list[Tensor]]:
    at = _HEAD + _numbers(part)[0]
    text, forms = json.loads(bytes(part[_HEAD:at].tolist()))
    tensors = []
    for name, shape in forms:
        dtype = getattr(torch, name)
        size = torch.Size(shape).numel() * dtype.itemsize
        tensors.append(part[at : at + size].clone().view(dtype).reshape(shape))
        at += size
    return text, tensors


def agree(ranks: list[dict[str, Any]]) -> None:
    """Whether what the ranks have goes together; every rank comes to the same verdict.

    Args:
        ranks: what each of them said.

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
