"""Statistics over ranks: one collective, the same result everywhere, no rank left waiting."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor as tensors
from torch import Tensor, nn

from fmapkit import CaptureWarning, DistributedError, FeatureMap, capture
from fmapkit.analysis import LayerStatistics, Statistics, TopInputs


def fmap(tensor: Tensor, layer: str = "fc", **tags: Any) -> FeatureMap:
    known = {"filter_dim": 1, "filters": range(tensor.shape[1]), **tags}
    return FeatureMap(tensor, "activation", layer, **known)


def batches(filters: int) -> list[list[Tensor]]:
    """Of each rank its batches, known to all; of other sizes, scales and offsets."""
    generator = torch.Generator().manual_seed(filters)
    return [
        [torch.randn(n, filters, 4, generator=generator) * 10.0**rank + 5 * rank for n in sizes]
        for rank, sizes in enumerate(((3, 2), (7,)))
    ]


def _watched(seen: list[str], name: str, run: Any, *args: Any, **options: Any) -> Any:
    seen.append(name)
    return run(*args, **options)


@contextmanager
def collectives() -> Iterator[list[str]]:
    """Names of the collectives that run."""
    seen: list[str] = []
    names = ["all_gather", "all_reduce", "broadcast", "barrier", "gather", "all_to_all"]
    names += ["all_gather_object", "all_gather_into_tensor", "broadcast_object_list"]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            run = getattr(dist, name)
            patch.setattr(dist, name, partial(_watched, seen, name, run))
        yield seen


def assert_right(s: LayerStatistics, parts: list[Tensor]) -> None:
    x = torch.cat(parts).double().transpose(0, 1).flatten(1).numpy()
    assert s.count.tolist() == [x.shape[1]] * len(x)
    np.testing.assert_allclose(s.mean.numpy(), x.mean(1), rtol=1e-12)
    np.testing.assert_allclose(s.variance.numpy(), x.var(1), rtol=1e-9)
    np.testing.assert_array_equal(s.minimum.numpy(), x.min(1))
    np.testing.assert_array_equal(s.maximum.numpy(), x.max(1))
    np.testing.assert_array_equal(s.zero_fraction.numpy(), (x == 0).mean(1))


def one_collective_and_the_same_everywhere() -> None:
    rank, data = dist.get_rank(), batches(5)
    stats = Statistics(bins="log2")
    for x in data[rank]:
        stats.update(fmap(x.relu(), nonlinearity="relu"))
        stats.update(fmap(x.tanh(), "other", nonlinearity="tanh"))
    own = stats["fc"].count.tolist()
    with collectives() as seen:
        whole = stats.reduce()
    assert seen == ["all_gather_object"]
    assert stats["fc"].count.tolist() == own
    everything = [x for part in data for x in part]
    assert_right(whole["fc"], [x.relu() for x in everything])
    assert_right(whole["other"], [x.tanh() for x in everything])
    tanh = torch.cat(everything).tanh().double()
    share = ((tanh <= -0.98) | (tanh >= 0.98)).double().mean((0, 2))
    assert torch.equal(whole["other"].saturated_fraction, share)
    histogram = whole["fc"].histogram
    assert histogram is not None
    assert histogram.sum(1).tolist() == whole["fc"].count.tolist()
    # Ranks hold the same bits.
    for s in whole:
        for tensor in (s.mean, s.variance):
            theirs = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(theirs, tensor.contiguous())
            assert torch.equal(theirs[0], theirs[1])
    # And it goes on from there.
    whole.update(fmap(torch.ones(1, 5, 4), nonlinearity="relu"))
    assert_right(whole["fc"], [x.relu() for x in everything] + [torch.ones(1, 5, 4)])


def ranks_may_have_more_and_less() -> None:
    rank, filters = dist.get_rank(), 40_000
    stats = Statistics()
    parts = [torch.full((2, filters), 1.0 + r) for r in range(2)]
    stats.update(fmap(parts[rank]))
    assert_right(stats.reduce()["fc"], [p[:, :, None] for p in parts])
    stats = Statistics()
    for n in range(1 if rank else 200):
        stats.update(fmap(torch.ones(1, 2), f"layer {n}"))
    raises(stats.reduce, "ranks have seen different maps: 'layer 1 activation'")


def different_layers_are_named_on_every_rank() -> None:
    rank, x = dist.get_rank(), torch.ones(2, 3)
    stats = Statistics()
    assert len(stats.reduce()) == 0
    stats.update(fmap(x))
    if rank == 1:
        stats.update(fmap(x, "head"))
    raises(stats.reduce, "'head activation' on rank 1 of the group, and not, or of other filters")
    stats = Statistics()
    stats.update(fmap(x[:, : 2 + rank]))
    raises(stats.reduce, "ranks have seen different maps: 'fc activation'")
    stats = Statistics(bins=[0.0, 1.0 + rank])
    raises(stats.reduce, "bins or saturation on rank 1 of the group are not those on rank 0")
    stats = Statistics()
    if rank == 0:
        stats.update(fmap(x))
    raises(stats.reduce, "'fc activation' on rank 0 of the group")
    assert len(Statistics().reduce()) == 0  # nobody is out of step


def one_ranks_part_of_a_layer_is_refused() -> None:
    from fmapkit.torchlib.sharded import Parts

    stats = Statistics()
    stats.update(fmap(torch.ones(2, 3), parts=Parts(unknown=True) if dist.get_rank() else None))
    raises(stats.reduce, "the activation of layer 'fc' is one rank's part of it on rank 1")


def of_dtensors_whole_ones_only() -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    x = torch.arange(12.0).reshape(4, 3)
    stats = Statistics()
    stats.update(fmap(tensors.distribute_tensor(x, mesh, [tensors.Replicate()])))
    assert_right(stats["fc"], [x[:, :, None]])
    for n, placement in enumerate((tensors.Shard(0), tensors.Shard(1))):
        part = tensors.distribute_tensor(x, mesh, [placement])
        with pytest.warns(CaptureWarning, match="it is a DTensor, of which this rank has a part"):
            stats.update(fmap(part, f"part {n}"))
    assert stats.layers == ["fc"]
    assert list(stats.missed) == [("part 0", "activation"), ("part 1", "activation")]


def in_a_group() -> None:
    rank = dist.get_rank()
    alone = [dist.new_group([r]) for r in range(2)]
    stats = Statistics()
    stats.update(fmap(torch.full((2, 3), float(rank))))
    assert stats.reduce(alone[rank])["fc"].mean.tolist() == [rank] * 3
    assert stats.reduce()["fc"].mean.tolist() == [0.5] * 3
    raises(lambda: stats.reduce(alone[1 - rank]), "is not in the group it was given")


def of_a_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    images = torch.randn(6, 1, 6, 6)
    stats, alone = Statistics(), Statistics()
    for into, mine in ((stats, images.chunk(2)[dist.get_rank()]), (alone, images)):
        with capture(model) as maps, torch.no_grad():
            model(mine)
            for fm in maps:
                into.update(fm)
    for s, t in zip(stats.reduce(), alone, strict=True):
        assert (s.layer, s.kind, s.filters) == (t.layer, t.kind, t.filters)
        assert torch.allclose(s.mean, t.mean, rtol=1e-5)
        assert torch.allclose(s.variance, t.variance, rtol=1e-5)


def the_strongest_inputs() -> None:
    rank, (mine, other) = dist.get_rank(), batches(5)
    both = torch.cat([*mine, *other]).round()
    ids = torch.randperm(len(both), generator=torch.Generator().manual_seed(0))
    cut = sum(map(len, mine))
    of_rank = (slice(0, cut), slice(cut, None))[rank]
    top, alone = TopInputs(3), TopInputs(3)
    top.update(fmap(both[of_rank], ids=ids[of_rank]))
    alone.update(fmap(both, ids=ids))
    whole = top.reduce()
    for name in ("scores", "inputs", "at"):
        assert torch.equal(getattr(whole["fc"], name), getattr(alone["fc"], name)), name
    assert whole["fc"].seen == len(both)
    counted = TopInputs(3)
    counted.update(fmap(both[of_rank], ids=ids[of_rank] if rank else None))
    raises(counted.reduce, "rank 0 of the group has counted its inputs itself, from 0")
    raises(
        TopInputs(3 + rank).reduce, "k, by or kinds on rank 1 of the group are not those on rank 0"
    )


def raises(run: Callable[[], Any], says: str) -> None:
    with pytest.raises(DistributedError, match=re.escape(says)):
        run()


CASES = [
    one_collective_and_the_same_everywhere,
    ranks_may_have_more_and_less,
    different_layers_are_named_on_every_rank,
    one_ranks_part_of_a_layer_is_refused,
    *([of_dtensors_whole_ones_only] if hasattr(tensors, "Shard") else []),
    in_a_group,
    of_a_model,
    the_strongest_inputs,
]
