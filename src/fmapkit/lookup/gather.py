"""Put a batch that is spread over ranks back together. Nothing here runs unless asked for.

Ranks may disagree: one has no such map, or one of another shape. Were each to find that out by
itself, some would raise and the others wait forever. So what each rank has is exchanged first, by a
collective that every rank reaches whatever it found, and then all go on or all raise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fmapkit.errors import ArgumentError, DistributedError
from fmapkit.map import FeatureMap
from fmapkit.readable import tags
from fmapkit.torchlib.sharded import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class _RankPart:
    """What one rank says of its map: no tensor, only what the others need to know."""

    rank: int
    error: str = ""
    shape: tuple[int, ...] = ()
    agreed: Mapping[str, Any] = field(default_factory=dict)  # what has to be the same on all ranks


def gather(
    find: Callable[[], FeatureMap], dim: int, dst: int | None, group: Any, asked: str
) -> FeatureMap | None:
    """See `FeatureMaps.gather`; `find` looks this rank's map up, `asked` says it in messages."""
    if not (dist.is_available() and dist.is_initialized()):
        raise DistributedError(
            f"gather({asked}) puts the maps of several ranks together, and torch.distributed is "
            "not initialised: call torch.distributed.init_process_group first, or read the map "
            f"of this process, maps[{asked}]"
        )
    rank, count = dist.get_rank(), dist.get_world_size(group)
    if dist.get_rank(group) < 0:
        raise DistributedError(f"gather({asked}): rank {rank} is not in the group it was given")
    found: FeatureMap | None = None
    failure: Exception | None = None
    try:
        found = find()
        _check(found, dim, dst, group)
        part = _part(rank, found, dim, dst)
    except Exception as error:  # raised below, when the other ranks know
        failure = error
        part = _RankPart(rank, error=str(error))
    parts: list[_RankPart] = [part] * count
    dist.all_gather_object(parts, part, group=group)
    if failure is not None:
        raise failure
    _agree(parts, asked)
    assert found is not None
    pieces = _exchange(found.tensor.detach(), parts, dst, group)
    if pieces is None:
        return None
    return replace(found, tensor=torch.cat(pieces, dim), edited=None, _gradient=None, _whole=None)


def _check(found: FeatureMap, dim: int, dst: int | None, group: Any) -> None:
    """What can be wrong with the question, or with this rank's map."""
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    if dst is not None and (isinstance(dst, bool) or dst not in members):
        raise ArgumentError(f"dst must be a rank of the group ({members}), or None, not {dst!r}")
    if is_dtensor(found.tensor):
        raise DistributedError(
            f"the {found.kind} of layer {found.layer!r} is a DTensor, one tensor over several "
            "ranks: full() puts it together",
            **tags(found),
        )
    if not -found.tensor.dim() <= dim < found.tensor.dim():
        raise ArgumentError(f"dim={dim} is no axis of a map of shape {tuple(found.shape)}")
    if found.filter_dim is not None and dim % found.tensor.dim() == found.filter_dim:
        raise ArgumentError(
            f"dim={dim} is the axis of the filters of layer {found.layer!r}, not that of the batch",
            **tags(found),
        )


def _part(rank: int, found: FeatureMap, dim: int, dst: int | None) -> _RankPart:
    filters = None if found.filters is None else tuple(found.filters)
    shape, dim = tuple(found.shape), dim % found.tensor.dim()
    agreed = {
        "which map": (found.layer, found.kind, found.filter, found.call, found.path, filters),
        "the pass (choose one with step=)": found.step,
        "dim and dst": (dim, dst),
        "the dtype": found.dtype,
        "the shape beside the batch": (*shape[:dim], *shape[dim + 1 :]),
    }
    return _RankPart(rank, shape=shape, agreed=agreed)


def _agree(parts: list[_RankPart], asked: str) -> None:
    """Whether the ranks' maps are parts of one batch; every rank comes to the same verdict."""
    failed = [p for p in parts if p.error]
    if failed:
        raise DistributedError(
            f"gather({asked}): no map on rank {failed[0].rank} ({failed[0].error}); it takes one "
            "on every rank of the group"
        )
    first = parts[0]
    for what, said in first.agreed.items():
        for part in parts[1:]:
            if part.agreed[what] != said:
                raise DistributedError(
                    f"gather({asked}): the ranks do not agree on {what}: {said} on rank "
                    f"{first.rank}, {part.agreed[what]} on rank {part.rank}"
                )


def _exchange(
    tensor: Tensor, parts: list[_RankPart], dst: int | None, group: Any
) -> list[Tensor] | None:
    """Every rank's tensor, in rank order, bit for bit; None on ranks that do not get them.

    Bytes travel, so that it works for every dtype, padded to the longest part: not every backend
    gathers tensors of different sizes.
    """
    sizes = [torch.Size(p.shape).numel() * tensor.element_size() for p in parts]
    if not max(sizes):
        return [tensor.new_empty(p.shape) for p in parts]
    device = _device(tensor, group)
    mine = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    flat = tensor.contiguous().reshape(-1)
    if flat.numel():
        mine[: flat.numel() * tensor.element_size()] = flat.view(torch.uint8).to(device)
    getting = dst is None or dist.get_rank() == dst
    received = [torch.empty_like(mine) for _ in parts] if getting else None
    if dst is None:
        dist.all_gather(received, mine, group=group)
    else:
        dist.gather(mine, received, dst=dst, group=group)
    if received is None:
        return None
    return [
        r[:size].to(tensor.device).view(tensor.dtype).reshape(p.shape)
        for r, size, p in zip(received, sizes, parts, strict=True)
    ]


def _device(tensor: Tensor, group: Any) -> torch.device:
    """Where the group's backend can take it from."""
    backends = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
    able = [pair.partition(":")[0] for pair in backends.split(",")]
    if tensor.device.type in able or "cuda" not in able:
        return tensor.device
    return torch.device("cuda", torch.cuda.current_device())
