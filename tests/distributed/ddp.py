"""DistributedDataParallel: plain names, each rank's own maps, and gather."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fmapkit import DistributedError, FmapkitError, UnknownLayerError, capture
from tests import truth
from tests.distributed.models import (
    Net,
    assert_same_grads,
    assert_same_maps,
    batch,
    lines,
    plain_maps,
    seeded,
)


def pair(**options: Any) -> tuple[DistributedDataParallel, DistributedDataParallel, nn.Module]:
    """Two wrapped models and a plain one, with the same weights."""
    model = seeded(Net)
    wrapped = [DistributedDataParallel(copy.deepcopy(model), **options) for _ in range(2)]
    return wrapped[0], wrapped[1], model


def each_rank_has_its_own_maps_under_plain_names() -> None:
    for inner in (False, True):
        model, bare, plain = pair()
        before = truth.fingerprint(bare)
        with capture(model.module if inner else model) as maps:
            for step in range(3):
                x = batch(step)
                expected, runs = plain_maps(plain, x)
                output, other = model(x), bare(x)
                assert truth.same_bits(output.detach(), other.detach())
                assert_same_maps(maps, expected)
                truth.assert_captured_exactly_once(maps, runs)
                truth.loss_of(output).backward()
                truth.loss_of(other).backward()
                assert_same_grads(model, bare)
        assert not maps.missed, maps.missed
        assert not any("module." in layer for layer in maps.layers)
        assert "layer1.0.conv1" in maps
        truth.assert_nothing_left(before, model)


def selectors_mean_plain_names() -> None:
    model, _, plain = pair()
    x = batch(0)
    for layers, other in (
        ("layer1.*", "layer1.*"),
        (model.module.layer1, plain.layer1),
        (nn.Conv2d, nn.Conv2d),
        (model, plain),
        ([lambda name: name.startswith("mlp")], [lambda name: name.startswith("mlp")]),
    ):
        with capture(model, layers=layers) as maps:
            model(x)
        expected, _ = plain_maps(plain, x, layers=other)
        assert lines(maps), layers
        assert_same_maps(maps, expected)
    with capture(model, kinds=("output", "response", "input")) as maps:
        model(x)
    assert_same_maps(maps, plain_maps(plain, x, kinds=("output", "response", "input"))[0])
    assert [m.layer for m in maps].count("") == 1  # one output of the model, not one each level
    for wrong in ("module.layer1.0.conv1", "modul"):
        try:
            capture(model, layers=wrong)
        except UnknownLayerError:
            continue
        raise AssertionError(wrong)


def both_ways_of_calling_are_passes() -> None:
    model, _, plain = pair()
    x = batch(0)
    with capture(model, keep="all") as maps, torch.no_grad():
        model(x)
        model.module(x)  # as evaluation code does
    assert len(maps.select(layer="fc", kind="preactivation")) == 2
    assert not maps.missed
    with torch.no_grad():
        assert_same_maps(maps, plain_maps(plain, x)[0])


def no_sync_and_accumulated_gradients() -> None:
    model, bare, plain = pair()
    with capture(model) as maps:
        for step in range(4):
            x = batch(step)
            for m in (model, bare):
                if step % 2:
                    truth.loss_of(m(x)).backward()
                else:
                    with m.no_sync():
                        truth.loss_of(m(x)).backward()
            assert_same_maps(maps, plain_maps(plain, x)[0])
            assert_same_grads(model, bare)


def one_rank_captures_and_the_other_does_not() -> None:
    model, bare, plain = pair()
    for step in range(3):
        x = batch(step)
        if dist.get_rank() == step % 2:
            with capture(model, kinds=("input", "response", "preactivation", "activation")) as maps:
                output = model(x)
                truth.loss_of(output).backward()
            str(maps)
            _ = (
                maps.nbytes,
                maps["layer1.0.conv1"].numpy(),
                maps["layer1.0.conv1"][1].tensor.sum(),
            )
            assert "layer1.0.conv1" in plain_maps(plain, x)[0]
        else:
            truth.loss_of(model(x)).backward()
        truth.loss_of(bare(x)).backward()
        assert_same_grads(model, bare)


def uneven_inputs_under_join() -> None:
    model, bare, plain = pair()
    count = 4 if dist.get_rank() == 0 else 2
    with capture(model, keep="all") as maps, model.join():
        for step in range(count):
            truth.loss_of(model(batch(step))).backward()
            # Not after the block: `join` ends with a broadcast, which writes to the parameters,
            # and one of them is a map.
            assert_same_maps(maps, plain_maps(plain, batch(step))[0])
    with bare.join():
        for step in range(count):
            truth.loss_of(bare(batch(step))).backward()
    assert len(maps.select(layer="fc", kind="preactivation")) == count
    assert_same_grads(model, bare)


class Holder(nn.Module):
    """A wrapper inside: what it returns goes on into a σ of the holder's own."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.backbone = wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)))
        self.spare = nn.Linear(3, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.backbone(x)).mean((2, 3)))


def _as_it_is(module: nn.Module) -> nn.Module:
    return module


def a_wrapper_inside_a_module() -> None:
    x = batch(0)
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        plain = seeded(lambda: Holder(_as_it_is))

        def wrap(module: nn.Module, options: Any = options) -> nn.Module:
            return DistributedDataParallel(module, **options)

        model = seeded(lambda wrap=wrap: Holder(wrap))
        for kinds in (("preactivation", "activation"), ("output",)):
            with capture(model, kinds=kinds) as maps:
                for _ in range(2):
                    truth.loss_of(model(x)).backward()
                    assert_same_maps(maps, plain_maps(plain, x, kinds=kinds)[0])
            assert not maps.missed, maps.missed
        with capture(model, layers="backbone.*") as maps:
            model(x)
        assert maps.layers == ["backbone.0", "backbone.2"]
        with capture(model, layers=model.backbone) as maps:
            model(x)
        assert [(m.layer, m.kind) for m in maps] == [("backbone", "output")]


class Louder(DistributedDataParallel):
    """A wrapper that does more than to carry."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.tanh(super().forward(*args, **kwargs))


def a_subclass_that_computes_is_not_left_out() -> None:
    model, x = Louder(seeded(Net)), batch(0)
    _, runs = truth.run_with_truth(model, x)
    with capture(model) as maps:
        model(x)
    truth.assert_captured_exactly_once(maps, runs)
    assert maps["fc"].nonlinearity == "tanh"


def an_early_stop_and_edits() -> None:
    model, bare, plain = pair()
    x = batch(0)
    with capture(model, layers="stem", kinds="response", stop=True) as maps, torch.no_grad():
        assert model(x) is not None
        if dist.get_rank() == 0:  # without the other rank
            assert model.module(x) is None
            assert_same_maps(maps, plain_maps(plain, x, layers="stem", kinds="response")[0])
    with capture(model, edit={"layer1.0.conv1": lambda fm: fm.tensor * 0}) as maps:
        output = model(x)
        expected = maps["layer1.0.conv1"]
        assert expected.edited is not None
        assert not expected.edited.any()
        with capture(bare, edit={"layer1.0.conv1": lambda fm: fm.tensor * 0}):
            other = bare.module(x)
        assert truth.same_bits(output.detach(), other.detach())
        whole = maps.gather("layer1.0.conv1")
        assert whole is not None
        assert whole.edited is None


def no_graph_and_no_memory_are_kept() -> None:
    model, _, _ = pair()
    sizes = set()
    with capture(model) as maps:
        for step in range(4):
            output = model(batch(step))
            alive = truth.graph_of(output)
            truth.loss_of(output).backward()
            model.zero_grad()
            del output
            gc.collect()
            assert alive() is None, "the graph lives on"
            sizes.add(maps.nbytes)
        assert len(sizes) == 1
        z = maps["stem", "preactivation"].tensor
        maps.clear()
        assert maps.nbytes == 0
    assert not z.requires_grad


def an_exception_leaves_nothing_behind() -> None:
    model, bare, _ = pair()
    before = truth.fingerprint(bare)
    # On one rank only: the pass has no collective of its own, as its buffers are not broadcast.
    model.require_forward_param_sync = False

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    if dist.get_rank() == 0:
        handle = model.module.layer2.register_forward_hook(stop)
        try:
            with capture(model), torch.no_grad():
                model(batch(0))
        except KeyboardInterrupt:
            handle.remove()
        else:
            raise AssertionError("nothing was raised")
        truth.assert_nothing_left(before, model)


# -- gather ------------------------------------------------------------------------------------


def gather_puts_the_batch_back_together() -> None:
    model, _, plain = pair()
    for dtype, every in (
        (torch.float32, ((2, 2), (1, 3), (2, 0))),
        (torch.bfloat16, ((3, 1),)),
        (torch.float64, ((1, 2),)),
    ):
        for sizes in every:
            parts = [torch.randn(n, 3, 8, 8, dtype=dtype) for n in sizes]
            dist.broadcast_object_list(parts, src=0)
            model.to(dtype)
            # In eval mode each image's maps are its own; what a rank holds is still its own batch.
            model.eval(), plain.to(dtype).eval()
            mine = parts[dist.get_rank()]
            with capture(model) as maps, torch.no_grad():
                model.module(mine)
            held = [(m.tensor, m.tensor.clone(), m.tensor._version) for m in maps]
            theirs = []
            for part in parts:
                with capture(plain) as other, torch.no_grad():
                    plain(part)
                theirs.append(other)
            for layer, kind in (("stem", "preactivation"), ("layer1.0.conv2", "activation")):
                got = maps.gather(layer, kind)
                assert got is not None
                expected = torch.cat([o[layer, kind].tensor for o in theirs])
                assert truth.same_bits(got.tensor, expected)
                assert (got.layer, got.kind, got.filters) == (layer, kind, range(4))
                assert got.nonlinearity == maps[layer, kind].nonlinearity
                one = maps.gather(layer, kind, 3)
                assert one is not None
                assert one.filter == 3
                assert truth.same_bits(one.tensor, expected[:, 3])
                for dst in (0, 1):
                    there = maps.gather(layer, kind=kind, dst=dst)
                    assert (there is not None) == (dist.get_rank() == dst)
                    assert there is None or truth.same_bits(there.tensor, expected)
            for tensor, copied, version in held:
                assert tensor._version == version
                assert truth.same_bits(tensor, copied)


class Sequence(nn.Module):
    """Its batch is axis 1, and its layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(x).relu()).relu()


def gather_by_call_step_and_axis() -> None:
    model = DistributedDataParallel(seeded(Sequence))
    rank = dist.get_rank()
    inputs = [torch.full((3, 1 + rank, 4), 1.0 + s + rank) for s in range(2)]
    with capture(model, keep="all") as maps, torch.no_grad():
        for x in inputs:
            model(x)
    for step in (0, 1, -1):
        for call in (0, 1):
            got = maps.gather("fc", "activation", call=call, step=step, dim=1)
            assert got is not None
            assert (got.call, got.step) == (call, step % 2)
            expected = []
            for other in range(2):
                x = torch.full((3, 1 + other, 4), 1.0 + step % 2 + other)
                for _ in range(call + 1):
                    x = model.module.fc(x).relu()
                expected.append(x)
            assert truth.same_bits(got.tensor, torch.cat(expected, 1))
            assert truth.same_bits(
                maps.gather("fc", call=call, step=step, dim=-2).tensor, got.tensor
            )
    _raises(lambda: maps.gather("fc"), FmapkitError, "could mean 2 maps")


def gather_never_leaves_a_rank_waiting() -> None:
    """A mistake on one rank is an error on every rank, and the next gather works."""
    model, _, _ = pair()
    rank = dist.get_rank()
    with capture(model, keep="all") as maps, torch.no_grad():
        model(batch(0))
        if rank == 0:  # one pass more on one rank
            model.module(batch(1))
    ours, theirs = (FmapkitError, "no layer 'nope'"), (DistributedError, "no map on rank 1")
    name = "layer1.0.conv1" if rank == 0 else "nope"
    _raises(lambda: maps.gather(name), *(theirs if rank == 0 else ours))
    _raises(lambda: maps.gather("layer1.0.conv1"), DistributedError, "do not agree on the pass")
    _raises(
        lambda: maps.gather("layer1.0.conv1", step=0, dst=rank),
        DistributedError,
        "agree on dim and dst",
    )
    kind = ("preactivation", "activation")[rank]
    _raises(
        lambda: maps.gather("layer1.0.conv1", kind, step=0), DistributedError, "agree on which map"
    )
    _raises(
        lambda: maps.gather("layer1.0.conv1", step=0, dim=1), FmapkitError, "axis of the filters"
    )
    _raises(lambda: maps.gather("layer1.0.conv1", step=0, dim=7), FmapkitError, "no axis")
    _raises(
        lambda: maps.gather("layer1.0.conv1", step=0, dst=2), FmapkitError, "dst must be a rank"
    )
    assert maps.gather("layer1.0.conv1", step=0) is not None
    with capture(model) as maps, torch.no_grad():
        model.module(torch.randn(2, 3, 8, 8 + 2 * rank))
    _raises(lambda: maps.gather("layer1.0.conv1"), DistributedError, "the shape beside the batch")
    with capture(model) as maps:
        pass
    _raises(lambda: maps.gather("layer1.0.conv1"), FmapkitError, "no forward pass")


def a_gathered_map_has_no_gradient_of_one_rank() -> None:
    model, _, _ = pair()
    with capture(model, gradients=True) as maps:
        truth.loss_of(model(batch(0))).backward()
    for filter_ in (None, 1):
        mine = maps["mlp.w1"] if filter_ is None else maps["mlp.w1", "activation", filter_]
        assert mine.grad is not None
        whole = maps.gather("mlp.w1", "activation", filter_)
        assert whole is not None
        assert whole.shape[0] == 2 * mine.shape[0]
        assert whole.grad is None


def gather_in_a_group() -> None:
    model, _, _ = pair()
    alone = [dist.new_group([rank]) for rank in range(2)]
    both = dist.new_group([0, 1])
    with capture(model) as maps, torch.no_grad():
        model(batch(0))
    rank = dist.get_rank()
    mine = maps.gather("layer1.0.conv1", group=alone[rank])
    assert mine is not None
    assert truth.same_bits(mine.tensor, maps["layer1.0.conv1"].tensor)
    got, same = maps.gather("layer1.0.conv1", group=both), maps.gather("layer1.0.conv1")
    assert got is not None
    assert same is not None
    assert truth.same_bits(got.tensor, same.tensor)
    _raises(
        lambda: maps.gather("layer1.0.conv1", group=alone[1 - rank]),
        DistributedError,
        "not in the group",
    )


def _raises(run: Callable[[], Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=re.escape(says)):
        run()


CASES = [
    each_rank_has_its_own_maps_under_plain_names,
    selectors_mean_plain_names,
    both_ways_of_calling_are_passes,
    no_sync_and_accumulated_gradients,
    one_rank_captures_and_the_other_does_not,
    uneven_inputs_under_join,
    a_wrapper_inside_a_module,
    a_subclass_that_computes_is_not_left_out,
    an_early_stop_and_edits,
    no_graph_and_no_memory_are_kept,
    an_exception_leaves_nothing_behind,
    gather_puts_the_batch_back_together,
    gather_by_call_step_and_axis,
    gather_never_leaves_a_rank_waiting,
    a_gathered_map_has_no_gradient_of_one_rank,
    gather_in_a_group,
]
