"""The same on GPUs, one for each rank, over NCCL."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fmapkit import capture
from tests import truth
from tests.distributed.models import (
    Net,
    assert_same_grads,
    assert_same_maps,
    batch,
    plain_maps,
    seeded,
)


def ddp_and_gather_on_gpus() -> None:
    device = torch.device("cuda", dist.get_rank())
    plain = seeded(Net).to(device)
    model, bare = (
        DistributedDataParallel(copy.deepcopy(plain), device_ids=[device]) for _ in range(2)
    )
    with capture(model) as maps:
        for step in range(3):
            x = batch(step, n=2 + dist.get_rank()).to(device)
            truth.loss_of(model(x)).backward()
            truth.loss_of(bare(x)).backward()
            assert_same_maps(maps, plain_maps(plain, x)[0])
            assert_same_grads(model, bare)
    for dst in (None, 1):
        whole = maps.gather("mlp.w1", dst=dst)
        assert (whole is None) == (dst == 1 and dist.get_rank() == 0)
        if whole is not None:
            assert (whole.device, whole.shape) == (device, (5, 6))
            part = whole.tensor[:2] if dist.get_rank() == 0 else whole.tensor[2:]
            assert truth.same_bits(part, maps["mlp.w1"].tensor)


def fully_shard_on_gpus() -> None:
    device = torch.device("cuda", dist.get_rank())
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    plain, model = seeded(Net).to(device), seeded(Net).to(device)
    for part in (*model.layer1, model.layer2, model.mlp, model):
        fully_shard(part, mesh=mesh)
    with capture(model) as maps:
        for step in range(3):
            x = batch(step).to(device)
            truth.loss_of(model(x)).backward()
            assert_same_maps(maps, plain_maps(plain, x)[0])
    assert not maps.missed, maps.missed


CASES = [ddp_and_gather_on_gpus, fully_shard_on_gpus]
