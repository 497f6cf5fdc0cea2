"""Trap 10: the graph is let go by default; the gradient of a map is to be had on request."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture
from tests.checks import Residual
from tests.truth import assert_same_gradients


class Net(Residual):
    """conv → norm → in-place ReLU, a residual sum, a functional σ."""

    def __init__(self) -> None:
        super().__init__(channels=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = F.gelu(self.conv2(x) + x)
        return self.fc(y.mean((2, 3)))


def _by_hand(model: Net, x: Tensor) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
    z1 = model.bn1(model.conv1(x))
    a1 = torch.relu(z1)
    z2 = model.conv2(a1) + a1
    a2 = F.gelu(z2)
    kinds = ("preactivation", "activation")
    maps = {("conv1", kinds[0]): z1, ("conv1", kinds[1]): a1}
    maps |= {("conv2", kinds[0]): z2, ("conv2", kinds[1]): a2}
    return model.fc(a2.mean((2, 3))), maps


def test_the_gradient_of_each_map_is_that_of_a_model_written_by_hand() -> None:
    model = Net()
    hand = copy.deepcopy(model)
    with capture(model, detach=False) as maps:
        for step in range(3):
            x = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().sum()
            true_out, true = _by_hand(hand, x)
            for tensor in true.values():
                tensor.retain_grad()
            held = {key: maps[key] for key in true}
            for fm in held.values():
                fm.tensor.retain_grad()
            loss.backward()
            true_out.square().sum().backward()
            for key, fm in held.items():
                assert torch.equal(fm.tensor, true[key])
                assert fm.grad is not None
                assert torch.equal(fm.grad, true[key].grad), key
    for mine, theirs in zip(model.parameters(), hand.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_a_loss_on_maps_trains_as_one_written_by_hand() -> None:
    model = Net()
    hand = copy.deepcopy(model)
    with capture(model, detach=False) as maps:
        for step in range(3):
            x = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(step))
            model(x)
            maps["conv2"].tensor.abs().mean().backward()
            _, true = _by_hand(hand, x)
            true["conv2", "activation"].abs().mean().backward()
            assert_same_gradients(model, hand)


def test_by_default_no_map_is_part_of_a_graph() -> None:
    model = Net()
    with capture(model) as maps:
        for _ in range(3):
            model(torch.randn(2, 1, 6, 6))
            assert not any(fm.tensor.requires_grad for fm in maps)
            assert all(fm.grad is None for fm in maps)


KINDS = ("response", "preactivation", "activation")


class Overwriting(nn.Module):
    """Writes over its own maps, in several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(4, 4), nn.Linear(4, 2), how
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        if self.how == "module":
            a = self.relu(z)
        elif self.how == "function":
            a = F.leaky_relu_(z, 0.1)
        elif self.how == "method":
            a = z.tanh_()
        elif self.how == "sum":
            z += x
            a = self.relu(z)
        else:
            a = z.view(-1, 2, 2).relu_().view(-1, 4)
            a.mul_(3)
        return self.last(a)

    def by_hand(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The same out of place, and its maps."""
        response = self.first(x)
        z = response + x if self.how == "sum" else response
        z = z.view(-1, 2, 2) if self.how == "scaled" else z
        sigma = {"function": lambda t: F.leaky_relu(t, 0.1), "method": torch.tanh}
        a = sigma.get(self.how, torch.relu)(z)
        goes_on = a.view(-1, 4)
        out = self.last(goes_on * 3 if self.how == "scaled" else goes_on)
        return out, dict(zip(KINDS, (response, z, a), strict=True))


@pytest.mark.parametrize("kinds", [KINDS, KINDS[1:]])
@pytest.mark.parametrize("how", ["module", "function", "method", "sum"])
def test_what_an_in_place_nonlinearity_overwrites_has_its_gradient(
    how: str, kinds: tuple[str, ...]
) -> None:
    model = Overwriting(how)
    hand = copy.deepcopy(model)
    with capture(model, detach=False, kinds=kinds) as maps:
        for step in range(4):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().sum()
            true_out, true = hand.by_hand(x)
            found = [maps["first", kind].tensor for kind in kinds]
            for got, kind in zip(found, kinds, strict=True):
                assert torch.equal(got, true[kind]), kind
            left = torch.autograd.grad(loss, [*model.parameters(), *found[-2:]])
            wanted = [true[kind] for kind in KINDS[1:]]
            right = torch.autograd.grad(true_out.square().sum(), [*hand.parameters(), *wanted])
            assert all(map(torch.equal, left, right))
    assert list(maps.missed) == []


@pytest.mark.parametrize("how", ["module", "function", "sum"])
def test_another_capture_does_not_notice_that_a_copy_leads_on(how: str) -> None:
    model = Overwriting(how)
    with capture(model, detach=False, kinds=KINDS) as outer:
        for step in range(4):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
            with capture(model, kinds=KINDS) as inner:
                model(x)
                for kind in KINDS:
                    assert torch.equal(outer["first", kind].tensor, inner["first", kind].tensor)


def test_of_a_view_that_a_nonlinearity_overwrites_the_weights_have_their_gradients() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            z = self.fc(x)
            z[:, :3].relu_()
            return torch.tanh(z)

    model = Part()
    bare = copy.deepcopy(model)
    with capture(model, detach=False):
        for step in range(3):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
            for each in (model, bare):
                each.zero_grad()
                each(x).square().sum().backward()
            assert torch.equal(model.fc.weight.grad, bare.fc.weight.grad)


@pytest.mark.parametrize("detach", [True, False])
def test_what_autograd_forbids_it_forbids_as_without_us(detach: bool) -> None:
    model = Overwriting("scaled")
    with capture(model, detach=detach):
        for _ in range(3):
            out = model(torch.randn(2, 4)).sum()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.backward()  # relu keeps its result for backward, and it is written to
