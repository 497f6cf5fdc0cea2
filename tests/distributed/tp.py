"""Tensor parallel: each rank's part under the plain names, the whole on request only."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from fmapkit import ArgumentError, DistributedError, capture
from tests import truth
from tests.distributed.models import assert_same_grads, lines, plain_maps, seeded

WIDTH = 6


class Mlp(nn.Module):
    """Two layers and a σ between, and one behind."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(4, WIDTH)
        self.w2 = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.w2(F.gelu(self.w1(x))))


class Net(nn.Module):
    """A plain layer, two parallel blocks, a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.Sequential(Mlp(), Mlp())
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.stem(x))))


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def parallel(make: Callable[[], nn.Module] = Net) -> nn.Module:
    """The usual plan: one split by columns, the next by rows."""
    model = seeded(make)
    plan = {"w1": ColwiseParallel(), "w2": RowwiseParallel()}
    for module in model.modules():
        if isinstance(module, Mlp):
            parallelize_module(module, mesh(), plan)
    return model


def same_input() -> Tensor:
    """Tensor parallel ranks all run the same batch."""
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(7))


def mine() -> range:
    """Which filters of the columns this rank has."""
    half = -(-WIDTH // 2)
    return (range(half), range(half, WIDTH))[dist.get_rank()]


def plain_names_and_this_ranks_filters() -> None:
    model, bare, plain, x = parallel(), parallel(), seeded(Net), same_input()
    before = truth.fingerprint(bare)
    for train in (True, False):
        with capture(model) as maps, torch.set_grad_enabled(train):
            for _ in range(3):
                other, runs = truth.run_with_truth(bare, x)
                output = model(x)
                assert truth.same_bits(output.detach(), other.detach())
                truth.assert_captured_exactly_once(maps, runs)
                if train:
                    truth.loss_of(output).backward()
                    truth.loss_of(other).backward()
                    assert_same_grads(model, bare)
        assert not maps.missed, maps.missed
        expected, _ = plain_maps(plain, x)
        keys = [(m.layer, m.kind, m.call, m.nonlinearity) for m in maps]
        assert keys == [(m.layer, m.kind, m.call, m.nonlinearity) for m in expected], keys
        for block in ("blocks.0", "blocks.1"):
            for kind in ("preactivation", "activation"):
                part = maps[f"{block}.w1", kind]
                assert part.filters == mine()
                assert part.shape == (5, len(mine()))
                assert torch.equal(part[mine()[1]].tensor, part.tensor[:, 1])
                assert maps[f"{block}.w2", kind].filters == range(4)
    truth.assert_nothing_left(before, model)


def full_is_the_whole() -> None:
    model, plain, x = parallel(), seeded(Net), same_input()
    with capture(model, kinds=("response", "preactivation", "activation")) as maps:
        model(x)
    expected, _ = plain_maps(plain, x, kinds=("response", "preactivation", "activation"))
    for block in ("blocks.0", "blocks.1"):
        for kind in ("preactivation", "activation"):
            part = maps[f"{block}.w1", kind]
            kept = part.tensor.clone()
            whole = part.full()
            assert whole.filters == range(WIDTH)
            assert torch.equal(whole.tensor[:, mine().start : mine().stop], part.tensor)
            parts: list[Any] = [None, None]
            dist.all_gather_object(parts, part.tensor)
            assert truth.same_bits(whole.tensor, torch.cat(parts, 1))
            torch.testing.assert_close(whole.tensor, expected[f"{block}.w1", kind].tensor)
            assert torch.equal(part.tensor, kept)
            assert whole.full() is whole
        # As they leave the layer, before torch sums up what each rank has.
        for layer in ("w1", "w2"):
            response = maps[f"{block}.{layer}", "response"]
            assert isinstance(response.tensor, DTensor)
            whole = response.full()
            assert type(whole.tensor) is Tensor
            torch.testing.assert_close(
                whole.tensor, expected[f"{block}.{layer}", "response"].tensor
            )
            assert response.nbytes < whole.nbytes or layer == "w2"
        # Plain tensors behind a weight that is spread by rows: nobody knows.
        for fm in (maps[f"{block}.w2"], maps[f"{block}.w2"][1]):
            with pytest.raises(DistributedError, match="known to the model alone"):
                fm.full()
    assert maps["stem"].full() is not None
    assert truth.same_bits(maps["stem"].full().tensor, maps["stem"].tensor)


def the_whole_has_no_gradient_of_a_part() -> None:
    model = parallel()
    with capture(model, gradients=True) as maps:
        truth.loss_of(model(same_input())).backward()
    part = maps["blocks.0.w1"]
    assert part.grad is not None
    assert part.grad.shape == part.shape
    assert part.full().grad is None


class Uneven(nn.Module):
    """Seven filters on two ranks: four and three."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.w1(x))


def full_of_parts_that_differ_in_size() -> None:
    model = parallelize_module(seeded(Uneven), mesh(), {"w1": ColwiseParallel()})
    plain, x = seeded(Uneven), same_input()
    with capture(model) as maps:
        model(x)
    part = maps["w1"]
    assert part.filters == (range(4), range(4, 7))[dist.get_rank()]
    whole = part.full()
    assert whole.filters == range(7)
    torch.testing.assert_close(whole.tensor, plain_maps(plain, x)[0]["w1"].tensor)
    with capture(model, filters=[5]) as maps:
        model(x)
    assert ("w1" in maps) == (dist.get_rank() == 1)
    if dist.get_rank() == 1:
        assert torch.equal(maps["w1", "activation", 5].tensor, part[5].tensor)
    else:
        assert "asks for filters outside" in maps.missed[0].reason


def reading_never_communicates() -> None:
    """One rank captures and reads all there is; the other does nothing of the kind."""
    model, bare, x = parallel(), parallel(), same_input()
    kinds = ("input", "response", "preactivation", "activation", "output")
    with CommDebugMode() as without:
        bare(x)
    with CommDebugMode() as counted:
        if dist.get_rank() == 0:
            with capture(model, kinds=kinds, filters=[1]) as maps:
                model(x)
        else:
            model(x)
    assert counted.get_comm_counts() == without.get_comm_counts()
    if dist.get_rank() == 0:
        assert any("another rank" in m.reason for m in maps.missed)
    with CommDebugMode() as counted:
        if dist.get_rank() == 0:
            with capture(model, kinds=kinds, keep=2) as maps:
                model(x)
        else:
            model(x)
    assert counted.get_comm_counts() == without.get_comm_counts()
    if dist.get_rank() == 0:
        with CommDebugMode() as counted:
            _ = (repr(maps), maps._repr_html_(), maps.nbytes, maps.bytes_copied, len(maps))
            for fm in maps:
                _ = (repr(fm), fm.shape, fm.nbytes, fm.dtype, fm.device, fm.grad, fm.filters)
                if isinstance(fm.tensor, DTensor):
                    with pytest.raises(DistributedError, match=re.escape("full()")):
                        fm.numpy()
                    if fm.filters is not None:
                        with pytest.raises(DistributedError, match=re.escape("full()")):
                            fm[0]
                else:
                    fm.numpy()
        assert not counted.get_total_counts()
    dist.barrier()


def gather_is_not_for_dtensors() -> None:
    model, x = parallel(), same_input()
    with capture(model, kinds="response") as maps:
        model(x)
    with pytest.raises(DistributedError, match="one tensor over several ranks"):
        maps.gather("blocks.0.w1", "response")
    with capture(model) as maps:
        model(x)
    with pytest.raises(DistributedError, match="agree on which map"):
        maps.gather("blocks.0.w1")  # other filters on each rank: no parts of one batch
    with pytest.raises(ArgumentError, match="axis of the filters"):
        maps.gather("blocks.0.w1", dim=1)


class InPlace(nn.Module):
    """Overwrites a tensor inside a DTensor, and a DTensor as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(3, WIDTH)
        self.act = nn.ReLU(inplace=True)
        self.w2 = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.w1(x)
        h.mul_(2)
        inside = _local(h)  # sees what is written to h
        out = self.w2(self.act(h))
        seen = inside.clone()
        inside.add_(1)  # and h what is written to it
        return out.sigmoid_(), seen, self.w2(h)


def overwritten_through_the_wrapper_or_inside() -> None:
    x = same_input()
    for local in (True, False):

        def make(local: bool = local) -> nn.Module:
            plan = {
                "w1": ColwiseParallel(use_local_output=local),
                "w2": RowwiseParallel(use_local_output=local),
            }
            return parallelize_module(seeded(InPlace), mesh(), plan)

        model, bare = make(), make()
        responses: list[Tensor] = []

        def note(_: Any, __: Any, out: Any, responses: list[Tensor] = responses) -> None:
            responses.append(_local(out).detach().clone())

        handle = bare.w1.register_forward_hook(note)
        with capture(model, kinds=("response", "preactivation", "activation")) as maps:
            for _ in range(3):
                with torch.no_grad():
                    other, runs = truth.run_with_truth(bare, x)
                    for left, right in zip(model(x), other, strict=True):
                        assert truth.same_bits(_local(left), _local(right))
                pairs = [(_local(p.z), _local(p.a)) for p in truth.captured_pairs(maps)]
                assert len(pairs) == len(runs) == 2
                for (z, a), run in zip(pairs, runs, strict=True):
                    assert truth.same_bits(z, _local(run.z))
                    assert truth.same_bits(a, _local(run.a))
                assert truth.same_bits(_local(maps["w1", "response"].tensor), responses[-1])
        assert maps.layers == ["w1", "w2"]
        handle.remove()


def a_later_write_is_noticed() -> None:
    model, x = parallelize_module(seeded(InPlace), mesh(), {"w1": ColwiseParallel()}), same_input()
    with capture(model.w1, kinds="output") as maps, torch.no_grad():
        out = model.w1(x)
        assert truth.same_bits(maps["", "output"].tensor, out)
        out.add_(1)
    with pytest.raises(RuntimeError, match="written to in place"):
        _ = maps["", "output"]
    spread = distribute_tensor(torch.randn(4, 4), mesh(), [Shard(0)])
    for write in (lambda t: t.add_(1), lambda t: t.to_local().add_(1)):
        module = nn.Sequential(nn.ReLU())
        for train in (True, False):
            with capture(module) as maps, torch.set_grad_enabled(train):
                for _ in range(3):
                    out = module(spread.clone().requires_grad_(train))
                    a = maps["0"].tensor
                    assert truth.same_bits(_local(a), _local(spread).relu())
                with torch.no_grad():
                    write(out)
            with pytest.raises(RuntimeError, match="written to in place"):
                _ = maps["0"]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Views(nn.Module):
    """What it returns shares memory with what it overwrites, which only the parts inside show."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        v = y.t()
        torch.relu_(y)
        return v + 1, y


def views_of_dtensors() -> None:
    model, x = Views(), distribute_tensor(torch.randn(4, 4), mesh(), [Shard(0)])
    with torch.no_grad(), capture(model) as maps:
        for _ in range(3):
            other, runs = truth.run_with_truth(Views(), x)
            for left, right in zip(model(x), other, strict=True):
                assert truth.same_bits(_local(left), _local(right))
            pairs = truth.captured_pairs(maps)
            assert truth.same_bits(_local(pairs[0].z), _local(runs[0].z))
            assert truth.same_bits(_local(pairs[0].a), _local(runs[0].a))


class Sequence(nn.Module):
    """Norm by parts of the sequence, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(torch.relu(self.norm(x)))


def sequence_parallel() -> None:
    def make() -> nn.Module:
        plan = {
            "norm": SequenceParallel(),
            "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
            "mlp.w1": ColwiseParallel(),
            "mlp.w2": RowwiseParallel(output_layouts=Shard(1)),
        }
        return parallelize_module(seeded(Sequence), mesh(), plan)

    model, bare, plain = make(), make(), seeded(Sequence)
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(3))
    part = x.chunk(2, 1)[dist.get_rank()]
    with capture(model) as maps:
        for _ in range(2):
            other, runs = truth.run_with_truth(bare, part)
            output = model(part)
            assert truth.same_bits(output.detach(), other.detach())
            pairs = [(_local(p.z), _local(p.a)) for p in truth.captured_pairs(maps)]
            assert len(pairs) == len(runs) == 3
            for (z, a), run in zip(pairs, runs, strict=True):
                assert truth.same_bits(z, _local(run.z))
                assert truth.same_bits(a, _local(run.a))
            truth.loss_of(output).backward()
            truth.loss_of(other).backward()
            assert_same_grads(model, bare)
    expected, _ = plain_maps(plain, x)
    got = [line[:4] for line in lines(maps)]
    assert got == [line[:4] for line in lines(expected)], got
    torch.testing.assert_close(maps["norm"].full().tensor, expected["norm"].tensor)
    torch.testing.assert_close(maps["mlp.w1"].full().tensor, expected["mlp.w1"].tensor)
    with pytest.raises(DistributedError, match="known to the model alone"):
        maps["mlp.w2"].full()


def no_early_stop() -> None:
    """It would end the forward here, and leave the other rank waiting."""
    for model in (parallel(),):
        with pytest.raises(ArgumentError, match="exchanges data with them"):
            capture(model, layers="stem", stop=True)


CASES = [
    no_early_stop,
    plain_names_and_this_ranks_filters,
    full_is_the_whole,
    the_whole_has_no_gradient_of_a_part,
    full_of_parts_that_differ_in_size,
    reading_never_communicates,
    gather_is_not_for_dtensors,
    overwritten_through_the_wrapper_or_inside,
    a_later_write_is_noticed,
    views_of_dtensors,
    sequence_parallel,
]
