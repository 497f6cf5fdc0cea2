"""FSDP, new (`fully_shard`) and old (`FullyShardedDataParallel`): right under the plain names."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from fmapkit import ArgumentError, capture
from tests import truth
from tests.distributed.models import (
    Block,
    Mlp,
    Net,
    PreActivation,
    assert_same_grads,
    assert_same_maps,
    batch,
    lines,
    plain_maps,
    seeded,
)

CPU = torch.device("cpu")


def any_shell(model: nn.Module) -> bool:
    return any(isinstance(module, Shell) for module in model.modules())


def sharded(make: Callable[[], nn.Module] = Net, **options: Any) -> nn.Module:
    """New FSDP on each part and on the whole; parameters of a part are freed when it has run."""
    model = seeded(make)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = (Block, PreActivation, Shell) if any_shell(model) else (Block, PreActivation, Mlp)
    for module in list(model.modules()):
        if isinstance(module, parts):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def wrapped(make: Callable[[], nn.Module] = Net, **options: Any) -> nn.Module:
    """Old FSDP on each part and on the whole."""
    policy = ModuleWrapPolicy({Block, PreActivation, Mlp})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(
            seeded(make), auto_wrap_policy=policy, device_id=CPU, **options
        )


def _check(make: Callable[[], nn.Module], **options: Any) -> None:
    """Maps, truth, gradients and what is left behind, with gradients and without."""
    model, bare, plain = make(), make(), seeded(Net)
    bare(batch(9)), model(batch(9))  # FSDP sets up the rest of itself in the first pass
    plain(batch(9))
    before = truth.fingerprint(bare)
    for train in (True, False):
        with capture(model, **options) as maps, torch.set_grad_enabled(train):
            for step in range(3):
                x = batch(step)
                expected, _ = plain_maps(plain, x, **options)
                other, runs = truth.run_with_truth(bare, x)
                output = model(x)
                assert truth.same_bits(output.detach(), other.detach())
                assert_same_maps(maps, expected)
                truth.assert_captured_exactly_once(maps, runs)
                if train:
                    truth.loss_of(output).backward()
                    truth.loss_of(other).backward()
                    assert_same_grads(model, bare)
                    assert_same_maps(maps, expected)  # still there when parameters are freed
        assert not maps.missed, maps.missed
        assert {"stem", "layer1.1.conv2", "mlp.w1"} <= set(maps.layers)
    truth.assert_nothing_left(before, model)


def fully_shard_is_right_under_plain_names() -> None:
    _check(sharded)


def fully_shard_and_every_kind() -> None:
    model, plain, x = sharded(), seeded(Net), batch(0)
    for kinds in ("input", "response", "output"):
        with capture(model, kinds=kinds) as maps:
            model(x)
        assert_same_maps(maps, plain_maps(plain, x, kinds=kinds)[0])
    with capture(model, filters=[1, 0], layers="layer1.*") as maps:
        model(x)
    assert_same_maps(maps, plain_maps(plain, x, filters=[1, 0], layers="layer1.*")[0])


def fully_shard_and_selectors() -> None:
    model, plain, x = sharded(), seeded(Net), batch(0)
    for layers in ("layer1.*", nn.Conv2d, Block, "mlp.w1", "mlp:sigmoid"):
        with capture(model, layers=layers) as maps:
            model(x)
        assert lines(maps), layers
        assert_same_maps(maps, plain_maps(plain, x, layers=layers)[0])
    with capture(model, layers=model.layer1[0]) as maps:
        model(x)
    assert_same_maps(maps, plain_maps(plain, x, layers=plain.layer1[0])[0])


class Shell(nn.Module):
    """FSDP is around it; what it holds is plain, and read by taps from the second pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Wide(nn.Module):
    """Nothing but weights, used functionally."""

    def __init__(self, block: type[nn.Module] = Mlp) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def fully_shard_in_bfloat16() -> None:
    """Inputs and parameters are cast on the way in: the maps are what really ran."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    model, bare = sharded(Wide, mp_policy=policy), sharded(Wide, mp_policy=policy)
    inputs = [torch.randn(2, 4) for _ in range(3)]
    plain = lines(plain_maps(seeded(Wide), inputs[0])[0])
    with capture(model) as maps:
        for x in inputs:
            other, runs = truth.run_with_truth(bare, x)
            output = model(x)
            assert truth.same_bits(output.detach(), other.detach())
            truth.assert_captured_exactly_once(maps, runs)
            truth.loss_of(output).backward()
            truth.loss_of(other).backward()
            assert_same_grads(model, bare)
            assert lines(maps) == plain
    assert maps["blocks.0.w1"].dtype == torch.bfloat16


def fully_shard_and_checkpointing() -> None:
    def make() -> nn.Module:
        model = seeded(Net)
        model.layer1[1] = checkpoint_wrapper(model.layer1[1])
        model.layer2 = checkpoint_wrapper(model.layer2)
        return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    model, bare, plain = make(), make(), seeded(Net)
    with capture(model) as maps:
        for step in range(2):
            x = batch(step)
            truth.loss_of(model(x)).backward()
            truth.loss_of(bare(x)).backward()
            assert_same_maps(maps, plain_maps(plain, x)[0])  # not those of the recomputation
            assert_same_grads(model, bare)
    assert not maps.missed, maps.missed


def one_rank_captures_and_the_other_does_not() -> None:
    model, bare = sharded(), sharded()
    for step in range(3):
        x = batch(step)
        if dist.get_rank() == step % 2:
            with capture(model, kinds=("input", "response", "preactivation", "activation")) as maps:
                truth.loss_of(model(x)).backward()
            str(maps)
            _ = (maps.nbytes, maps["mlp.w1"].numpy(), maps["mlp.w1"].full().tensor.sum())
        else:
            truth.loss_of(model(x)).backward()
        truth.loss_of(bare(x)).backward()
        assert_same_grads(model, bare)


def nothing_keeps_parameters_or_a_graph_alive() -> None:
    for block in (Mlp, Shell):
        model, plain = sharded(lambda block=block: Wide(block)), seeded(lambda b=block: Wide(b))
        x = torch.randn(2, 4)
        seen: list[Any] = []

        def look(module: nn.Module, *_: Any, seen: list[Any] = seen) -> None:
            seen.append(module.w1.untyped_storage())

        inner = [m for m in model.modules() if isinstance(m, Mlp)]
        handles = [m.register_forward_pre_hook(look) for m in inner if block is Mlp]
        sizes = set()
        with capture(model, kinds=("input", "response", "preactivation", "activation")) as maps:
            for _ in range(3):
                output = model(x)
                # The unsharded weights have no memory any more, and that is all of them.
                assert [s.nbytes() for s in seen[-3:]] == [0] * len(handles)
                alive = truth.graph_of(output)
                truth.loss_of(output).backward()
                model.zero_grad()
                del output
                gc.collect()
                assert alive() is None, "the graph lives on"
                sizes.add(maps.nbytes)
                # The gates are parameters: copied, since their memory goes.
                for fm in maps:
                    assert fm.tensor.untyped_storage().nbytes() >= fm.nbytes
                kinds = ("input", "response", "preactivation", "activation")
                assert_same_maps(maps, plain_maps(plain, x, kinds=kinds)[0])
        assert len(sizes) == 1
        assert len(maps.select(kind="preactivation", nonlinearity="sigmoid", step=-1)) == 3
        for handle in handles:
            handle.remove()


def gather_under_fully_shard() -> None:
    model, plain = sharded(), seeded(Net)
    with capture(model) as maps, torch.no_grad():
        model(batch(0, n=2 + dist.get_rank()))
    got = maps.gather("mlp.w1")
    assert got is not None
    assert got.shape == (5, 6)
    mine = got.tensor[:2] if dist.get_rank() == 0 else got.tensor[2:]
    with torch.no_grad():
        expected, _ = plain_maps(plain, batch(0, n=2 + dist.get_rank()))
    assert truth.same_bits(mine, expected["mlp.w1"].tensor)


def old_fsdp_is_right_under_plain_names() -> None:
    _check(lambda: wrapped(use_orig_params=True))


def old_fsdp_with_flat_parameters() -> None:
    _check(lambda: wrapped(use_orig_params=False))


def old_fsdp_by_its_inner_module_and_selectors() -> None:
    model, plain, x = wrapped(), seeded(Net), batch(0)
    inner = model._fsdp_wrapped_module
    for target in (model, inner):
        with capture(target, layers=["layer1.*", "mlp.w1"]) as maps:
            model(x)
        assert_same_maps(maps, plain_maps(plain, x, layers=["layer1.*", "mlp.w1"])[0])
    with capture(model, layers=inner.layer2) as maps:
        model(x)
    assert_same_maps(maps, plain_maps(plain, x, layers=plain.layer2)[0])
    with capture(model, kinds="output") as maps:
        model(x)
    assert_same_maps(maps, plain_maps(plain, x, kinds="output")[0])


def old_fsdp_around_one_module_only() -> None:
    """No wrapper inside: whose the parameters are, only the outermost one knows."""
    for flat in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = FullyShardedDataParallel(
                seeded(Wide),
                device_id=CPU,
                use_orig_params=not flat,
                sharding_strategy=ShardingStrategy.FULL_SHARD,
            )
        plain, x = seeded(Wide), torch.randn(2, 4)
        for target in (model, model.module):
            for mode in (torch.enable_grad(), torch.no_grad()):
                with mode, capture(target) as maps:
                    for _ in range(2):
                        model(x)
                    assert_same_maps(maps, plain_maps(plain, x)[0])


def no_early_stop() -> None:
    """It would end the forward here, and leave the other rank waiting."""
    for model in (sharded(), wrapped()):
        with pytest.raises(ArgumentError, match="exchanges data with them"):
            capture(model, layers="stem", stop=True)


CASES = [
    no_early_stop,
    fully_shard_is_right_under_plain_names,
    fully_shard_and_every_kind,
    fully_shard_and_selectors,
    fully_shard_in_bfloat16,
    fully_shard_and_checkpointing,
    one_rank_captures_and_the_other_does_not,
    nothing_keeps_parameters_or_a_graph_alive,
    gather_under_fully_shard,
    old_fsdp_is_right_under_plain_names,
    old_fsdp_with_flat_parameters,
    old_fsdp_by_its_inner_module_and_selectors,
    old_fsdp_around_one_module_only,
]
