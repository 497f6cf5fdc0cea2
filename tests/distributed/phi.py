"""`feature_map` on several ranks: φ wrapped, and φ of what is wrapped."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fmapkit import feature_map
from tests.distributed.models import Net, assert_same_grads, batch, seeded


class ByHand(nn.Module):
    """What φ of `layer1` with a head is, written out."""

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model.layer1(self.model.stem(x)).mean((2, 3)))


class Probe(ByHand):
    """The same by φ; parameters go by the same names."""

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        super().__init__(model, head)
        # Not a second place for the parameters: DDP counts each once.
        self.phi = [feature_map(model, "layer1", pool="mean")]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.phi[0](x))


def phi_and_a_head_train_as_code_by_hand_does() -> None:
    model, head = seeded(Net), nn.Linear(4, 3)
    twins = copy.deepcopy((model, head))
    # What comes after layer1 gets no gradient, and DDP has to be told that it may be so.
    ours = DistributedDataParallel(Probe(model, head), find_unused_parameters=True)
    theirs = DistributedDataParallel(ByHand(*twins), find_unused_parameters=True)
    optimisers = [torch.optim.SGD(m.parameters(), 0.1) for m in (ours, theirs)]
    for step in range(4):
        x = batch(step)
        for net, optimiser in zip((ours, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            F.cross_entropy(net(x), torch.tensor([0, 2])).backward()
        assert_same_grads(ours, theirs)
        for optimiser in optimisers:
            optimiser.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def phi_itself_is_wrapped() -> None:
    model = seeded(Net)
    twin = copy.deepcopy(model)
    phi = DistributedDataParallel(feature_map(model, "layer1"), find_unused_parameters=True)
    for step in range(3):
        found, expected = phi(batch(step)), twin.layer1(twin.stem(batch(step)))
        assert torch.equal(found, expected)
        found.sum().backward()
    whole = [p.grad for p in model.stem.parameters()]
    assert all(g is not None for g in whole)


def phi_of_what_is_wrapped_runs_to_the_end() -> None:
    model = seeded(Net)
    twin = copy.deepcopy(model).eval()
    wrapped = DistributedDataParallel(model).eval()
    phi = feature_map(wrapped, "layer1")
    ran: list[int] = []
    model.fc.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        for step in range(3):
            assert torch.equal(phi(batch(step)), twin.layer1(twin.stem(batch(step))))
    assert len(ran) == 3


def phi_of_a_sharded_model() -> None:
    from torch.distributed.fsdp import fully_shard

    model = seeded(Net)
    twin = copy.deepcopy(model)
    fully_shard(model.layer1)
    fully_shard(model)
    phi = feature_map(model, "layer1")
    for step in range(3):
        found = phi(batch(step))
        assert torch.equal(found, twin.layer1(twin.stem(batch(step))))


CASES = [
    phi_and_a_head_train_as_code_by_hand_does,
    phi_itself_is_wrapped,
    phi_of_what_is_wrapped_runs_to_the_end,
    phi_of_a_sharded_model,
]
