"""Gradients of maps: dL/dz and dL/da, those of a model written by hand, bit for bit.

Each model here has a twin by hand that computes the same out of place and keeps every tensor of
interest; `retain_grad` on those is the truth. Every comparison runs over several passes of one
block, so that both the learning pass and its replays are compared.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fmapkit import ArgumentError, MapOverwrittenError, capture
from tests import truth
from tests.checks import Residual
from tests.strategies import Model, models
from tests.truth import assert_same_gradients, graph_of, same_bits

PASSES = 3
Z, A, R, X, O = "preactivation", "activation", "response", "input", "output"  # noqa: E741
Key = tuple[str, str, int]  # layer, kind, call
Hand = Callable[[Any, Tensor], tuple[Tensor, dict[Key, Tensor]]]


def image(step: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 6, 6)), generator=torch.Generator().manual_seed(step))


def pair(maps: dict[Key, Tensor], layer: str, z: Tensor, a: Tensor, call: int = 0) -> Tensor:
    maps[layer, Z, call], maps[layer, A, call] = z, a
    return a


class Plain(Residual):
    """Modules, one of them in place; the residual sum overwrites; a functional σ."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.conv2(x)
        y += x
        y = F.gelu(y)
        return self.fc(y.mean((2, 3)))

    def by_hand(self, x: Tensor) -> tuple[Tensor, dict[Key, Tensor]]:
        maps: dict[Key, Tensor] = {}
        maps["conv1", X, 0] = x
        maps["conv1", R, 0] = r1 = self.conv1(x)
        z = self.bn1(r1)
        a = pair(maps, "conv1", z, torch.relu(z))
        maps["conv2", X, 0] = a
        maps["conv2", R, 0] = r = self.conv2(a)
        z2 = r + a
        a2 = pair(maps, "conv2", z2, F.gelu(z2))
        maps["fc", X, 0] = m = a2.mean((2, 3))
        maps["fc", R, 0] = maps["fc", Z, 0] = out = self.fc(m)
        return out, maps


class Scope(nn.Module):
    """A branch on data: watched in every pass. Functional, in place, and written to afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.isnan().any():
            return x
        x = F.hardtanh_(x)
        x += 1
        x = self.block(x)
        y = self.last(torch.sigmoid(x))
        y.mul_(2)
        return torch.relu_(y)

    def by_hand(self, x: Tensor) -> tuple[Tensor, dict[Key, Tensor]]:
        maps: dict[Key, Tensor] = {}
        z = self.conv(x)
        a = pair(maps, "conv", z, F.hardtanh(z))
        z = self.block[0](a + 1)
        a = pair(maps, "block.0", z, torch.relu(z))
        y = pair(maps, ":sigmoid", a, torch.sigmoid(a))
        z = self.last(y) * 2
        return pair(maps, "last", z, torch.relu(z)), maps


class TrulyInPlace(nn.Module):
    """ELU and leaky ReLU in place: their gradient comes from a, so they cannot run out of place."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ELU(inplace=True))
        self.two = nn.Sequential(nn.Conv2d(4, 4, 1), nn.LeakyReLU(0.1, inplace=True))
        self.three = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x))
        return F.elu_(self.three(x))

    def by_hand(self, x: Tensor) -> tuple[Tensor, dict[Key, Tensor]]:
        maps: dict[Key, Tensor] = {}
        z = self.one[0](x)  # the formula of the in-place form, on a copy
        a = pair(maps, "one.0", z, F.elu_(z.clone()))
        z = self.two[0](a)
        a = pair(maps, "two.0", z, F.leaky_relu_(z.clone(), 0.1))
        z = self.three(a)
        return pair(maps, "three", z, F.elu_(z.clone())), maps


class Shared(nn.Module):
    """A layer and a σ called twice; a map with several readers; the old z is read after σ_."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.act = nn.SiLU(inplace=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.fc(x))
        z = self.fc(a * 0.5)
        b = self.act(z)
        return self.head(torch.tanh(z + a) * b.sum() + a)

    def by_hand(self, x: Tensor) -> tuple[Tensor, dict[Key, Tensor]]:
        maps: dict[Key, Tensor] = {}
        z = self.fc(x)
        a = pair(maps, "fc", z, F.silu(z))
        z = self.fc(a * 0.5)
        b = pair(maps, "fc", z, F.silu(z), 1)
        t = b + a  # the forward's z is b by then
        out = self.head(pair(maps, ":tanh", t, torch.tanh(t)) * b.sum() + a)
        maps["head", Z, 0] = out
        return out, maps


class Views(nn.Module):
    """Maps that are views, split and written through their base."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        left, right = h.chunk(2, dim=-1)
        gate = torch.sigmoid(right)
        value = torch.tanh(left[:, :])
        y = gate * value
        y[:, 0] = 0
        return self.out(y.view(-1, 4))

    def by_hand(self, x: Tensor) -> tuple[Tensor, dict[Key, Tensor]]:
        maps: dict[Key, Tensor] = {}
        maps["fc", R, 0] = h = self.fc(x)
        left, right = h.chunk(2, dim=-1)
        left = left[:, :]
        gate = pair(maps, "fc", right, torch.sigmoid(right))
        value = torch.tanh(left)
        y = gate * value
        mask = torch.ones_like(y)
        mask[:, 0] = 0
        return self.out(torch.where(mask.bool(), y, torch.zeros(()))), maps


def compare(
    model: nn.Module,
    inputs: Callable[[int], Tensor],
    *,
    missed: bool = False,
    hand: Hand | None = None,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    loss: Callable[[Tensor], Tensor] = lambda out: out.square().sum(),
    **options: Any,
) -> None:
    """Maps, their gradients and those of the parameters are those of the twin by hand."""
    twin = copy.deepcopy(model)
    by_hand: Hand = hand or (lambda m, x: m.by_hand(x))
    run = wrap(model) if wrap is not None else model
    with capture(run, gradients=True, **options) as maps:
        for step in range(PASSES):
            model.zero_grad()
            twin.zero_grad()
            mine, theirs = inputs(step), inputs(step)
            out = run(mine)
            true_out, true = by_hand(twin, theirs)
            held = {key: _find(maps, key) for key in true}
            for tensor in true.values():
                if tensor.requires_grad:
                    tensor.retain_grad()
            assert all(fm.grad is None for fm in maps)
            loss(out).backward()
            loss(true_out).backward()
            assert same_bits(out, true_out)
            for key, fm in held.items():
                _compare_map(fm, true[key], key, step, detached=options.get("detach", True))
            assert bool(maps.missed) == missed, maps.missed
            for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
                assert _same(p.grad, q.grad), name


def _find(maps: Any, key: Key) -> Any:
    layer, kind, call = key
    found = maps.select(layer=layer, kind=kind, call=call, step=-1)
    assert len(found) == 1, (key, found, list(maps))
    return found[0]


def _compare_map(fm: Any, true: Tensor, key: Key, step: int, detached: bool) -> None:
    assert fm.tensor.requires_grad == (not detached and true.requires_grad), (key, step)
    whole = fm.filters is None or len(fm.filters) == true.shape[fm.filter_dim]
    picked = list(fm.filters or ())
    wanted = true.detach() if whole else true.detach().index_select(fm.filter_dim, _index(picked))
    assert same_bits(fm.tensor.detach(), wanted), (key, step)
    if true.grad is None:
        assert fm.grad is None, (key, step)
        return
    assert fm.grad is not None, (key, step)
    grad = true.grad if whole else true.grad.index_select(fm.filter_dim, _index(picked))
    assert same_bits(fm.grad, grad), (key, step)
    if fm.filters is not None:
        for place, one in enumerate(fm):
            assert torch.equal(one.grad, grad.select(fm.filter_dim, place)), (key, step)
            assert one.grad.untyped_storage()._cdata == fm.grad.untyped_storage()._cdata


def _index(picked: list[int]) -> Tensor:
    return torch.tensor(picked)


EVERY = (X, R, Z, A)


def _of_kinds(kinds: tuple[str, ...]) -> Hand:
    def hand(model: Any, x: Tensor) -> Any:
        out, maps = model.by_hand(x)
        return out, {key: t for key, t in maps.items() if key[1] in kinds}

    return hand


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("kinds", [(Z, A), EVERY])
def test_proven_modules(kinds: tuple[str, ...], detach: bool) -> None:
    hand = _of_kinds(kinds)
    compare(Plain(), image, hand=hand, kinds=kinds, detach=detach)
    compare(Plain().double(), lambda n: image(n).double().requires_grad_(), hand=hand, kinds=kinds)


@pytest.mark.parametrize("detach", [True, False])
def test_a_scope_that_is_watched_in_every_pass(detach: bool) -> None:
    compare(Scope(), image, detach=detach)


@pytest.mark.parametrize("detach", [True, False])
def test_nonlinearities_that_stay_in_place(detach: bool) -> None:
    # The map is a copy here, and still has the gradient of the model's own tensor.
    compare(TrulyInPlace(), image, detach=detach)


@pytest.mark.parametrize("detach", [True, False])
def test_layers_called_twice_and_old_values_read_again(detach: bool) -> None:
    compare(Shared(), lambda n: image(n, 4, 6), detach=detach)


def test_views_and_writes_through_them() -> None:
    compare(Views(), lambda n: image(n, 4, 6), layers="fc", kinds=(R, Z, A), hand=_of_views)


def _of_views(model: Views, x: Tensor) -> Any:
    # Two sites share the layer: the sigmoid's pair is told by its σ below.
    out, maps = model.by_hand(x)
    return out, {("fc", R, 0): maps["fc", R, 0]}


def test_each_pair_of_two_branches_has_its_own_gradient() -> None:
    model = Views()
    twin = copy.deepcopy(model)
    with capture(model, gradients=True) as maps:
        for step in range(PASSES):
            out = model(image(step, 4, 6))
            true_out, true = twin.by_hand(image(step, 4, 6))
            for t in true.values():
                t.retain_grad()
            out.square().sum().backward()
            true_out.square().sum().backward()
            for kind in (Z, A):
                (fm,) = maps.select(layer="fc", kind=kind, nonlinearity="sigmoid")
                assert same_bits(fm.grad, true["fc", kind, 0].grad)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("filters", [2, [3, 0]])
def test_picked_filters_have_their_part_of_the_gradient(filters: Any, detach: bool) -> None:
    chosen = {"conv1", "conv2"}

    def hand(model: Plain, x: Tensor) -> Any:
        out, maps = model.by_hand(x)
        return out, {k: t for k, t in maps.items() if k[0] in chosen and k[1] in (Z, A)}

    compare(Plain(), image, hand=hand, layers="conv*", filters=filters, detach=detach)


def test_picked_filters_in_inference_mode_first_and_in_training_after() -> None:
    model = Plain()
    with capture(model, layers="conv*", filters=[1, 3], detach=False, gradients=True) as maps:
        with torch.inference_mode():
            model(image(0))
        for step in range(PASSES):
            loss = model(image(step)).sum() + maps["conv1"].tensor.sum()
            loss.backward()
            assert maps["conv1"].grad is not None
            assert not maps.missed


# -- leaves, and what has no gradient --------------------------------------------------------------


class Leaves(nn.Module):
    """σ of the input itself, and of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, 6))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(torch.relu(x) * F.softplus(self.scale) + x))

    def by_hand(self, x: Tensor) -> tuple[Tensor, dict[Key, Tensor]]:
        maps: dict[Key, Tensor] = {}
        a = pair(maps, ":relu", x, torch.relu(x))
        z = self.fc(a * F.softplus(self.scale) + x)
        return pair(maps, "fc", z, torch.tanh(z)), maps


@pytest.mark.parametrize("requires_grad", [True, False])
def test_leaves(requires_grad: bool) -> None:
    compare(Leaves(), lambda n: image(n, 4, 6).requires_grad_(requires_grad))


def test_nothing_stays_on_leaves() -> None:
    model, x = Leaves(), image(0, 4, 6).requires_grad_()

    def hooks() -> list[int]:
        return [len(t._backward_hooks or ()) for t in (x, model.scale)]

    with capture(model, gradients=True) as maps:
        for _ in range(5):
            model(x).sum().backward()
            assert max(hooks()) <= 2
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.save(x, buffer)  # with our hook on it
            pickle.dumps(model)
            copy.deepcopy(x)
            copy.deepcopy(model)
    assert maps.select(kind=Z)
    maps.clear()
    gc.collect()
    assert hooks() == [0, 0]


def test_frozen_layers_have_none_and_others_keep_theirs() -> None:
    model = Plain()
    model.conv1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    compare(model, image, hand=_of_kinds((Z, A)))


def test_layers_that_the_loss_does_not_reach_have_none() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.b = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    model = Two()
    with capture(model, gradients=True) as maps:
        for step in range(PASSES):
            left, _ = model(image(step, 2, 4))
            left.sum().backward()
            assert torch.equal(maps["a.0"].grad, torch.ones(2, 4))
            assert maps["b.0"].grad is None
            assert maps["b.0"][1].grad is None


def test_without_gradients_there_are_none_and_no_error() -> None:
    model = Plain().eval()
    with capture(model, gradients=True) as maps:
        for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
            with mode():
                model(image(0))
            assert all(fm.grad is None for fm in maps)
            assert maps["conv1"][0].grad is None
    assert not maps.missed


class Stale(nn.Module):
    """σ of a view whose base is written to between, so that the view does not know its own node."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        z = h.view(-1)
        z_sum = torch.tanh(z).sum()
        h[:1].mul_(3)
        return torch.tanh(z) * z_sum

    def by_hand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.fc(x)
        z_sum = torch.tanh(h.view(-1)).sum()
        z = torch.cat([h[:1] * 3, h[1:]]).view(-1)
        z.retain_grad()
        return torch.tanh(z) * z_sum, z


@pytest.mark.parametrize("twice", [True, False])
def test_views_that_were_written_to_through_their_base(twice: bool) -> None:
    # torch 2.13 crashes, or loses the hook, where it is set without asking for the node first.
    class Once(Stale):
        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            z = h.view(-1)
            h[:1].mul_(3)
            return torch.tanh(z) * 2

        def by_hand(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.fc(x)
            z = torch.cat([h[:1] * 3, h[1:]]).view(-1)
            z.retain_grad()
            return torch.tanh(z) * 2, z

    model = Stale() if twice else Once()
    twin = copy.deepcopy(model)
    warnings.simplefilter("ignore")
    with capture(model, gradients=True) as maps:
        for step in range(PASSES):
            model(image(step, 2, 4)).square().sum().backward()
            out, z = twin.by_hand(image(step, 2, 4))
            out.square().sum().backward()
            fm = maps.select(kind=Z, nonlinearity="tanh")[-1]
            assert same_bits(fm.tensor, z.detach())
            assert same_bits(fm.grad, z.grad)


@pytest.mark.parametrize("filters", [None, [0, 2]])
@pytest.mark.parametrize("by", ["σ", "sum"])
def test_a_view_that_is_written_to_itself_is_named(by: str, filters: Any) -> None:
    # The hook on what it was would miss the part that goes through the write.
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.fc(x)[:2]
            if by == "σ":
                return F.elu_(z)
            a = torch.sigmoid(z)
            z += 1
            return a + z

    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with capture(model, gradients=True, filters=filters) as maps:
            for step in range(PASSES):
                model(image(step, 3, 4)).square().sum().backward()
                assert maps["fc", Z].grad is None
                assert maps["fc"].grad is not None or by == "σ"
                assert [m.layer for m in maps.missed] == ["fc"]
                assert "view" in maps.missed[0].reason


# -- several backward passes -----------------------------------------------------------------------


def test_several_backward_passes_add_up_as_in_grad() -> None:
    model = Plain()
    twin = copy.deepcopy(model)
    with capture(model, gradients=True) as maps:
        for step in range(PASSES):
            out = model(image(step))
            true_out, true = twin.by_hand(image(step))
            for t in true.values():
                if t.requires_grad:
                    t.retain_grad()
            for weight in (1.0, 0.3, -7.0):
                (out.square().sum() * weight).backward(retain_graph=True)
                (true_out.square().sum() * weight).backward(retain_graph=True)
                for layer in ("conv1", "conv2"):
                    for kind in (Z, A):
                        assert same_bits(maps[layer, kind].grad, true[layer, kind, 0].grad)


def test_autograd_grad_is_a_backward_pass_too() -> None:
    model = Plain()
    with capture(model, gradients=True) as maps:
        out = model(image(0)).sum()
        torch.autograd.grad(out, list(model.parameters()), retain_graph=True)
        once = maps["conv1"].grad.clone()
        out.backward()
        assert torch.equal(maps["conv1"].grad, once + once)


def test_a_gradient_of_gradients() -> None:
    # A penalty on dL/da: fm.grad is part of the second graph.
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    twin = copy.deepcopy(model)
    with capture(model, gradients=True) as maps:
        for step in range(PASSES):
            x = image(step, 3, 4)
            model.zero_grad()
            twin.zero_grad()
            loss = model(x).square().sum()
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            maps["0"].grad.square().sum().backward()

            a = twin[1](twin[0](x))
            true = twin[2](a).square().sum()
            (grad,) = torch.autograd.grad(true, a, create_graph=True)
            grad.square().sum().backward()
            assert_same_gradients(model, twin)


def test_passes_that_are_kept_have_their_own_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    with capture(model, gradients=True, keep=3) as maps:
        losses = [model(image(n, 2, 4)).sum() * (n + 1) for n in range(3)]
        sum(losses).backward()
        found = [fm.grad for fm in maps.select(layer="0", kind=A)]
        weight = model[2].weight.sum(0).detach().expand(2, 4)
        for n, grad in enumerate(found):
            assert torch.allclose(grad, weight * (n + 1))


# -- what is held ----------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [Plain, Scope, TrulyInPlace])
def test_no_graph_is_kept_alive(net: type[nn.Module], collected: None) -> None:
    model = net()
    with capture(model, gradients=True) as maps:
        for step in range(PASSES):
            out = model(image(step))
            held = list(maps)
            out.square().sum().backward()
            graph = graph_of(out)
            del out
            assert graph() is None  # at once: no cycle to be collected
            assert any(fm.grad is not None for fm in held)
            assert not any(fm.tensor.requires_grad for fm in held)


def test_a_graph_of_gradients_is_no_cycle(collected: None) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    with capture(model, gradients=True) as maps:
        for step in range(PASSES):
            loss = model(image(step, 3, 4)).square().sum()
            grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            graph = graph_of(loss)
            assert maps["0"].grad.requires_grad
            del loss, grads
            maps.clear()
            assert graph() is None


def test_gradients_go_with_their_pass(collected: None) -> None:
    model = Plain()
    with capture(model, gradients=True) as maps:
        kept = None
        for step in range(PASSES):
            model(image(step)).sum().backward()
            if kept is not None:
                assert kept() is None
            kept = weakref.ref(maps["conv1"].grad)
            assert kept() is not None
        held = maps["conv2"]
        maps.clear()
        assert kept() is None
        assert held.grad is not None  # read before: it keeps its own


def test_it_is_the_tensor_that_backward_made() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    seen: list[Tensor] = []
    with capture(model, gradients=True) as maps:
        for step in range(PASSES):
            out = model(image(step, 2, 4))
            sent = torch.ones_like(out)
            out.backward(sent)
            seen.append(maps["2", Z].grad)
            assert seen[-1].data_ptr() == sent.data_ptr()


def test_a_gradient_that_was_written_to_raises() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.weight.view(2, 3)).sum() * x.sum()

    model = Net()
    with capture(model, gradients=True) as maps:
        for step in range(PASSES):
            model.zero_grad()
            model(image(step)).backward()
            fm = maps.select(kind=Z)[0]
            assert fm.grad.data_ptr() == model.weight.grad.data_ptr(), "the case of this test"
            model.weight.grad.mul_(2)  # as clipping does
            with pytest.raises(MapOverwrittenError, match="gradient of the preactivation"):
                _ = fm.grad


def test_off_means_off() -> None:
    model = Plain()
    with capture(model) as maps:
        for step in range(PASSES):
            x = image(step).requires_grad_()
            out = model(x)
            assert out._backward_hooks is None
            assert x._backward_hooks is None
            out.sum().backward()
            assert all(fm.grad is None for fm in maps)
            assert maps["conv1"][0].grad is None


def test_a_look_before_backward_warns_of_nothing() -> None:
    model = Plain()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for detach in (True, False):
            for gradients in (True, False):
                with capture(model, detach=detach, gradients=gradients) as maps:
                    model(image(0))
                    assert all(fm.grad is None for fm in maps)


def test_wrong_arguments() -> None:
    with pytest.raises(ArgumentError, match="gradients must be True or False, not 'all'"):
        capture(Plain(), gradients="all")  # type: ignore[arg-type]


# -- maps in the graph: losses on them -------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("with_output", [True, False])
@pytest.mark.parametrize(
    ("net", "kinds"),
    [(Plain, (Z, A)), (Plain, EVERY), (Scope, (Z, A)), (TrulyInPlace, (Z, A)), (Shared, (Z, A))],
)
def test_a_loss_on_each_map_trains_as_by_hand(
    net: type[nn.Module], kinds: tuple[str, ...], with_output: bool, gradients: bool
) -> None:
    """Penalties on activations, perceptual losses and the like, one map at a time."""
    model = net()
    twin = copy.deepcopy(model)
    shape = (4, 6) if net is Shared else (2, 3, 6, 6)
    with capture(model, detach=False, kinds=kinds, gradients=gradients) as maps:
        keys = list(_of_kinds(kinds)(twin, image(0, *shape))[1])
        for step, key in enumerate(keys * 2):
            x = image(step, *shape)
            model.zero_grad()
            twin.zero_grad()
            out = model(x)
            true_out, true = _of_kinds(kinds)(twin, x)
            mine, theirs = _find(maps, key).tensor, true[key]
            assert mine.requires_grad == theirs.requires_grad
            if not mine.requires_grad and not with_output:
                continue
            loss, other = mine.abs().sum(), theirs.abs().sum()
            if with_output:
                loss, other = loss + out.square().sum(), other + true_out.square().sum()
            loss.backward()
            other.backward()
            for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
                assert _same(p.grad, q.grad), (key, name)


def test_distillation_from_a_teacher() -> None:
    teacher, student = Plain().eval(), Plain()
    twin = copy.deepcopy(student)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (student, twin)]
    with capture(teacher) as taught, capture(student, detach=False) as learned:
        for step in range(PASSES):
            x = image(step)
            with torch.no_grad():
                teacher(x)
                _, right = teacher.by_hand(x)
            _, true = twin.by_hand(x)
            student(x)
            losses = []
            for pairs in (
                [(learned[k[0], k[1]].tensor, taught[k[0], k[1]].tensor) for k in CONVS],
                [(true[k], right[k]) for k in CONVS],
            ):
                losses.append(torch.stack([F.mse_loss(s, t) for s, t in pairs]).sum())
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            assert same_bits(*losses)
            for p, q in zip(student.parameters(), twin.parameters(), strict=True):
                assert same_bits(p, q)


CONVS = [("conv1", Z, 0), ("conv1", A, 0), ("conv2", Z, 0), ("conv2", A, 0)]


def test_features_of_two_passes_in_one_loss() -> None:
    # A perceptual loss: both images go through the same frozen net, and one of them is trained.
    model = Plain().eval().requires_grad_(False)
    with capture(model, detach=False, keep=2, layers="conv*", gradients=True) as maps:
        for step in range(PASSES):
            x, target = image(step).requires_grad_(), image(step + 10)
            y = x.detach().clone().requires_grad_()
            model(target)
            model(x)
            pairs = zip(
                *(maps.select(kind=A, step=2 * step + n) for n in (0, 1)),
                strict=True,
            )
            loss = sum(F.mse_loss(a.tensor, b.tensor) for a, b in pairs)
            loss.backward()
            _, wanted = model.by_hand(target)
            _, true = model.by_hand(y)
            other = sum(F.mse_loss(wanted[k], true[k]) for k in CONVS if k[1] == A)
            other.backward()
            assert same_bits(x.grad, y.grad)


def test_a_map_of_the_graph_that_was_copied_is_right_where_gradients_are_off() -> None:
    # The copy is made under no_grad, and still has to be a part of the graph.
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            a = torch.sigmoid(self.fc(x))
            b = a * 1.0
            with torch.no_grad():
                a.zero_()
            return b.detach()

    model = Scaled()
    with capture(model, detach=False) as maps:
        for step in range(PASSES):
            model.zero_grad()
            model(image(step, 2, 4))
            a = maps["fc"].tensor
            assert same_bits(a.detach(), torch.sigmoid(model.fc(image(step, 2, 4))).detach())
            assert a.requires_grad


@pytest.mark.parametrize("detach", [True, False])
def test_data_parallel(detach: bool, tmp_path: Any) -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = Plain()
        twin = copy.deepcopy(model)
        wrapped = DistributedDataParallel(model)
        with capture(model, gradients=True, detach=detach) as maps:
            for step in range(PASSES):
                model.zero_grad()
                twin.zero_grad()
                out = wrapped(image(step))
                true_out, true = twin.by_hand(image(step))
                for key in CONVS:
                    true[key].retain_grad()
                out.square().sum().backward()
                true_out.square().sum().backward()
                for key in CONVS:
                    assert same_bits(_find(maps, key).grad, true[key].grad)
                for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                    assert same_bits(p.grad, q.grad)
        with capture(wrapped, gradients=True, detach=detach) as maps:
            for step in range(PASSES):
                out = wrapped(image(step))
                out.square().sum().backward()
                ours = [fm.grad for fm in maps.select(kind=A)]
                assert len(ours) == 2
                assert all(g is not None for g in ours)
    finally:
        distributed.destroy_process_group()


def test_outputs_with_a_path() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 3, batch_first=True)
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y, h = self.rnn(x)
            return self.head(y) + h.sum()

    model = Tagger()
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with capture(model, layers=["rnn", "head"], kinds="output", gradients=True) as maps:
            for step in range(PASSES):
                model(image(step, 2, 5, 4)).square().sum().backward()
                y, h = twin.rnn(image(step, 2, 5, 4))
                out = twin.head(y) + h.sum()
                for t in (y, h):
                    t.retain_grad()
                out.square().sum().backward()
                assert same_bits(maps.select(layer="rnn", path="[0]")[0].grad, y.grad)
                assert same_bits(maps.select(layer="rnn", path="[1]")[0].grad, h.grad)
                assert maps["head", "output"].grad is not None


# -- any model -------------------------------------------------------------------------------------


class Site:
    """One σ as the bare model ran it: z and a, and what backward sends to each."""

    def __init__(self, z: Tensor) -> None:
        self.z, self.grads = z.detach().clone(), {Z: [], A: []}
        self.listen(Z, z)

    def listen(self, kind: str, tensor: Tensor) -> None:
        if tensor.requires_grad:
            _ = tensor.grad_fn  # else torch 2.13 may crash
            tensor.register_hook(lambda g: self.grads[kind].append(g.clone()))

    def returned(self, a: Tensor) -> None:
        self.a = a.detach().clone()
        self.listen(A, a)


class Listening(TorchFunctionMode):
    """Listens at every σ of a bare model, just before it runs and just after."""

    SIGMAS = (
        *("relu", "relu_", "tanh", "tanh_", "sigmoid", "sigmoid_", "gelu", "silu", "leaky_relu"),
        *("elu", "softplus", "hardswish", "relu6", "mish", "celu", "prelu", "rrelu", "hardtanh"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[Site] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in self.SIGMAS:
            return func(*args, **(kwargs or {}))
        site = Site(args[0])
        out = func(*args, **(kwargs or {}))
        site.returned(out)
        self.sites.append(site)
        return out


@settings(max_examples=60)
@given(models(), st.booleans(), st.booleans())
def test_gradients_of_any_model(drawn: Model, detach: bool, every_kind: bool) -> None:
    model = drawn.build().train()
    bare = copy.deepcopy(model)
    kinds = EVERY if every_kind else (Z, A)
    compared = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with capture(model, gradients=True, detach=detach, kinds=kinds) as maps:
            for step in range(4):
                x = drawn.inputs(step)
                truth.seed(step)
                bare.zero_grad()
                listening = Listening()
                with listening:
                    out = bare(x.clone())
                assume(out.requires_grad)
                try:
                    out.float().square().mean().backward()
                except RuntimeError as error:  # the strategies write in place without asking
                    if "inplace" not in str(error):
                        raise
                    assume(False)
                truth.seed(step)
                model.zero_grad()
                model(x.clone()).float().square().mean().backward()
                compared += _compare_sites(maps, listening.sites)
                for p, q in zip(model.parameters(), bare.parameters(), strict=True):
                    assert _same(p.grad, q.grad)
    event("sites compared" if compared else "none")


def _compare_sites(maps: Any, sites: list[Site]) -> int:
    """Every pair that has a site with the same values has its gradients."""
    for kind in (Z, A):
        found = [fm for fm in maps.select(kind=kind, step=-1) if fm.nonlinearity is not None]
        left = list(sites)
        for fm in found:
            values = fm.tensor.detach()
            alike = [s for s in left if same_bits(values, s.z if kind == Z else s.a)]
            if not alike:  # one that is written out by hand, as a module
                continue
            grads = [_sum(s.grads[kind]) for s in alike]
            right = [i for i, g in enumerate(grads) if _same(fm.grad, g)]
            assert right, (fm, fm.grad, grads)
            left.remove(alike[right[0]])
    return len(sites)


def _sum(grads: list[Tensor]) -> Tensor | None:
    return None if not grads else torch.stack(grads).sum(0) if len(grads) > 1 else grads[0]


def _same(mine: Tensor | None, true: Tensor | None) -> bool:
    if mine is None or true is None:
        return mine is None and true is None
    return same_bits(mine, true)


# -- maps that are leaves of the graph -----------------------------------------------------------


class Gated(nn.Module):
    """A nonlinearity of a parameter, as a function or a module; and one of what comes in."""

    def __init__(self, act: nn.Module | None) -> None:
        super().__init__()
        self.gate, self.act = nn.Parameter(torch.randn(4)), act

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate) if self.act is None else self.act(self.gate)
        return gate * torch.tanh(x)


@pytest.mark.parametrize("act", [None, nn.Sigmoid()])
@pytest.mark.parametrize("between", [True, False])
def test_a_leaf_has_the_gradients_of_its_own_pass(act: Any, between: bool) -> None:
    model, x = Gated(act), torch.randn(3, 4, requires_grad=True)
    kinds = ("preactivation", "activation")
    passes = []
    with capture(model, kinds=kinds, gradients=True, keep="all") as maps:
        for step in range(4):
            model.gate.grad = x.grad = None
            loss = model(x).square().sum() * (step + 1)
            if between:
                with torch.no_grad():
                    model(x)  # whose maps have none
            loss.backward()
            if between:
                loss_of_others = model.gate.sum() + x.sum()
                loss_of_others.backward()
                model.gate.grad -= 1  # type: ignore[operator]
                x.grad -= 1  # type: ignore[operator]
            passes.append((model.gate.grad.clone(), x.grad.clone()))  # type: ignore[union-attr]
        ((model(x) + model(x)).sum()).backward()  # each of two passes has all of this backward
    model(x).sum().backward()  # nobody's
    found = maps.select(kind="preactivation")
    steps = range(0, 8, 2) if between else range(4)
    for step, grads in zip(steps, passes, strict=True):
        for fm, grad in zip([fm for fm in found if fm.step == step], grads, strict=True):
            assert fm.grad is not None
            assert torch.allclose(fm.grad, grad, atol=1e-5)
            assert between or torch.equal(fm.grad, grad)
    if between:
        assert all(fm.grad is None for fm in found if fm.step in range(1, 8, 2))
    one, other = (fm.grad for fm in found[-4:] if fm.shape == (4,))
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)


def test_the_input_of_a_layer_has_the_gradients_of_its_own_pass() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    x = torch.randn(2, 3, requires_grad=True)
    passes = []
    with capture(model, layers="0", kinds="input", gradients=True, keep="all") as maps:
        for step in range(4):
            x.grad = None
            loss = model(x).sum() * (step + 1)
            loss.backward(retain_graph=True)
            if step == 2:
                loss.backward()  # once more through the same forward
            assert x.grad is not None
            passes.append(x.grad.clone())
    del loss
    for fm, grad in zip(maps.select(kind="input"), passes, strict=True):
        assert fm.grad is not None
        assert torch.equal(fm.grad, grad)
    assert x._backward_hooks  # as long as there are maps
    maps.clear()
    del fm
    assert not x._backward_hooks
