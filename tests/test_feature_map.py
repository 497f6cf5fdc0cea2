"""`feature_map`: φ gives what hand-written code gives, and leaves nothing on the model."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmapkit import (
    AmbiguousMapError,
    ArgumentError,
    CaptureStateError,
    FilterRangeError,
    KindNotCapturedError,
    MapStateError,
    NoActivationError,
    NotAModuleError,
    UnknownLayerError,
    capture,
    edits,
    feature_map,
)
from tests import truth
from tests.checks import needs_compiled


class Net(nn.Module):
    """In-place σ, a residual sum in place, a functional σ, and a tail that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.conv3 = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.tail = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))
        self.ran: list[int] = []

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x * scale)))
        y = self.block(x)
        y += x
        x = F.relu(self.conv3(self.relu(y)))
        self.ran.append(1)
        return self.tail(x)


def stages(net: Net, x: Tensor) -> dict[tuple[str, str], Tensor]:
    """Each map, written out by hand and out of place."""
    r1 = net.conv1(x)
    z1 = net.bn1(r1)
    a1 = z1.relu()
    out = net.block(a1)
    z2 = out + a1
    a2 = z2.relu()
    z3 = net.conv3(a2)
    return {
        ("conv1", "input"): x,
        ("conv1", "response"): r1,
        ("conv1", "preactivation"): z1,
        ("conv1", "activation"): a1,
        ("block", "output"): out,
        ("block.0", "preactivation"): z2,
        ("block.0", "activation"): a2,
        ("conv3", "preactivation"): z3,
        ("conv3", "activation"): z3.relu(),
    }


MAPS = list(stages(Net(), torch.zeros(1, 2, 8, 8)))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("layer", "kind"), MAPS)
def test_equals_code_by_hand_bit_for_bit_gradients_too(layer: str, kind: str, train: bool) -> None:
    torch.manual_seed(0)
    net = Net().train(train)
    bare = copy.deepcopy(net)
    before = truth.fingerprint(net)
    phi = feature_map(net, layer, kind=kind)
    for n in range(4):
        x = torch.randn(3, 2, 8, 8, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        found, expected = phi(x), stages(bare, y)[layer, kind]
        assert torch.equal(found, expected)
        assert len(net.ran) == 1, "every call but the first one ends early"
        truth.assert_nothing_left(before, net)
        weight = torch.randn_like(found)
        (found * weight).sum().backward()
        (expected * weight).sum().backward()
        assert torch.equal(x.grad, y.grad)
        for ours, theirs in zip(net.parameters(), bare.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad), n


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_mode_of_torch_and_batches_of_any_size(mode: Any) -> None:
    net = Net().eval()
    phi = feature_map(net, "block")
    for size in (1, 3, 0, 2, 3, 7):
        x = torch.randn(size, 2, 8, 8)
        with mode():
            found = phi(x)
        assert torch.equal(found, stages(net, x)["block", "output"])
        assert found.requires_grad == (mode is torch.enable_grad)
        assert found.is_inference() == (mode is torch.inference_mode)


def test_autocast_is_the_models_own() -> None:
    net = Net().eval()
    phi, x = feature_map(net, "conv1", kind="response"), torch.randn(2, 2, 8, 8)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            found, expected = phi(x), net.conv1(x)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
    assert phi(x).dtype == torch.float32


def test_what_is_returned_has_the_form_of_what_was_asked() -> None:
    net, x = Net().eval(), torch.randn(2, 2, 8, 8)
    by_hand = stages(net, x)
    first, second = by_hand["conv1", "activation"], by_hand["block", "output"]
    for layers in (["conv1", "block"], ("conv1", net.block)):
        found = feature_map(net, layers)(x)
        assert type(found) is tuple
        assert torch.equal(found[0], first)
        assert torch.equal(found[1], second)
    named = feature_map(net, {"z": ("conv1", "preactivation"), "out": "block"})
    for _ in range(3):
        found = named(x)
        assert list(found) == named.layers == ["z", "out"]
        assert torch.equal(found["z"], by_hand["conv1", "preactivation"])
        assert torch.equal(found["out"], second)
    every = feature_map(net, nn.Conv2d)
    assert every.layers == []  # the first call shows which there are
    for _ in range(3):
        found = every(x)
        assert list(found) == every.layers == ["conv1", "block.0", "conv3"]
        for layer, tensor in found.items():
            assert torch.equal(tensor, by_hand[layer, "activation"])
    both = feature_map(net, [("conv1", "preactivation"), ("conv1", "activation")])(x)
    assert torch.equal(both[0].relu(), both[1])


def test_the_arguments_are_the_models() -> None:
    net, x = Net().eval(), torch.randn(2, 2, 8, 8)
    phi = feature_map(net, "conv1")
    for _ in range(2):
        expected = stages(net, x * 2)["conv1", "activation"]
        assert torch.equal(phi(x, 2.0), expected)
        assert torch.equal(phi(x=x, scale=2.0), expected)


@pytest.mark.parametrize(
    ("pool", "by_hand"),
    [
        ("mean", lambda t: t.mean((2, 3))),
        ("max", lambda t: t.amax((2, 3))),
        ("flatten", lambda t: t.flatten(1)),
        (lambda t: t[:, :, 0, 0], lambda t: t[:, :, 0, 0]),
    ],
)
def test_pools(pool: Any, by_hand: Callable[[Tensor], Tensor]) -> None:
    net, x = Net().eval(), torch.randn(2, 2, 8, 8)
    expected = by_hand(stages(net, x)["conv1", "activation"])
    assert torch.equal(feature_map(net, "conv1", pool=pool)(x), expected)


def test_pools_of_tokens_and_of_what_has_no_other_axes() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU())
    tokens, rows = torch.randn(3, 5, 4), torch.randn(3, 4)
    a = net(tokens)
    assert torch.equal(feature_map(net, "0", pool="token")(tokens), a[:, 0])
    assert torch.equal(feature_map(net, "0", pool="mean")(tokens), a.mean(1))
    for pool in ("mean", "max", "flatten"):
        assert torch.equal(feature_map(net, "0", pool=pool)(rows), net(rows))
    with pytest.raises(ArgumentError, match=re.escape("has shape (3, 6) with its filters along ")):
        feature_map(net, "0", pool="token")(rows)


def test_an_unbatched_input_has_no_axis_of_samples_to_spare() -> None:
    net, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()), torch.randn(2, 5, 5)
    assert torch.equal(feature_map(net, "0", pool="mean")(x), net(x).mean((1, 2)))


def test_a_pool_that_is_a_module_is_a_part_of_phi() -> None:
    phi = feature_map(Net(), "conv1", pool=nn.Conv2d(6, 1, 8))
    assert phi(torch.randn(3, 2, 8, 8)).shape == (3, 1, 1, 1)
    assert "pool.weight" in phi.state_dict()


def test_filters_are_picked_in_the_order_given_and_stay_in_the_graph() -> None:
    net, x = Net().eval(), torch.randn(2, 2, 8, 8, requires_grad=True)
    a = stages(net, x)["conv1", "activation"]
    assert torch.equal(feature_map(net, "conv1", filters=3)(x), a[:, 3:4])
    phi = feature_map(net, ["conv1", "block"], filters={"conv1": [5, 0, -1]})
    for _ in range(2):
        found, whole = phi(x)
        assert torch.equal(found, a[:, [5, 0, 5]])
        assert torch.equal(whole, stages(net, x)["block", "output"])
    ours = torch.autograd.grad(found.square().sum(), x)[0]
    assert torch.equal(ours, torch.autograd.grad(a[:, [5, 0, 5]].square().sum(), x)[0])


# -- as a module ------------------------------------------------------------------------------


def test_parameters_mode_and_type_are_those_of_the_model() -> None:
    net = Net()
    phi = feature_map(net, "block")
    assert phi.model is net
    assert [id(p) for p in phi.parameters()] == [id(p) for p in net.parameters()]
    assert list(phi.state_dict()) == [f"model.{k}" for k in net.state_dict()]
    phi.eval()
    assert not net.block.training
    phi.double()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    for _ in range(2):
        assert torch.equal(phi(x), stages(net, x)["block", "output"])
    phi.requires_grad_(False)
    assert not phi(x).requires_grad
    other = Net().double()
    phi.load_state_dict({f"model.{k}": v for k, v in other.state_dict().items()})
    assert torch.equal(phi(x), stages(other.eval(), x)["block", "output"])


def test_a_head_trains_alone_or_with_the_model() -> None:
    for both in (False, True):
        torch.manual_seed(1)
        net = Net().eval()
        bare = copy.deepcopy(net)
        head, twin = nn.Linear(6, 3), nn.Linear(6, 3)
        twin.load_state_dict(head.state_dict())
        model = nn.Sequential(feature_map(net, "conv1", pool="mean"), head)
        ours = torch.optim.SGD((model if both else head).parameters(), 0.1)
        theirs = torch.optim.SGD([*(bare.parameters() if both else ()), *twin.parameters()], 0.1)
        for _ in range(3):
            x, y = torch.randn(8, 2, 8, 8), torch.randint(3, (8,))
            for optimiser, output in (
                (ours, model(x)),
                (theirs, twin(stages(bare, x)["conv1", "activation"].mean((2, 3)))),
            ):
                optimiser.zero_grad()
                F.cross_entropy(output, y).backward()
                optimiser.step()
        for a, b in ((net, bare), (head, twin)):
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                assert torch.equal(p, q)


def test_copies_and_pickles_have_a_model_of_their_own() -> None:
    net, x = Net().eval(), torch.randn(2, 2, 8, 8)
    phi = feature_map(net, ["conv1", net.block], pool="mean")
    for used in (False, True):
        for twin in (copy.deepcopy(phi), pickle.loads(pickle.dumps(phi))):
            assert twin.model is not net
            twin.model.conv1.weight.data.zero_()
            for _ in range(2):
                assert torch.equal(twin(x)[1], _pooled(twin.model, x))
        assert torch.equal(phi(x)[1], _pooled(net, x)), used


def _pooled(net: Net, x: Tensor) -> Tensor:
    return stages(net, x)["block", "output"].mean((2, 3))


def test_another_model_in_its_place_is_read() -> None:
    phi, x = feature_map(Net().eval(), "block"), torch.randn(2, 2, 8, 8)
    phi(x)
    phi.model = Net().eval()
    for _ in range(2):
        assert torch.equal(phi(x), stages(phi.model, x)["block", "output"])


def test_a_changed_model_is_read_anew() -> None:
    net, x = Net().eval(), torch.randn(2, 2, 8, 8)
    phi = feature_map(net, "conv1")
    phi(x), phi(x)
    net.bn1 = nn.Identity()
    for _ in range(2):
        assert torch.equal(phi(x), net.conv1(x).relu())
    handle = net.conv1.register_forward_hook(lambda m, a, out: out + 1)
    for _ in range(2):
        assert torch.equal(phi(x), (net.conv1(x)).relu())
    handle.remove()
    for _ in range(2):
        assert torch.equal(phi(x), net.conv1(x).relu())


def test_nothing_is_kept_alive_by_a_call() -> None:
    net = Net().eval()
    phi = feature_map(net, ["conv1", "block"])
    for _ in range(3):
        found = phi(torch.randn(2, 2, 8, 8))
        graph = truth.graph_of(found[1])
        memory = weakref.ref(found[0])
        del found
        gc.collect()
        assert graph() is None
        assert memory() is None
    gone = weakref.ref(net)
    del net, phi
    gc.collect()
    assert gone() is None


def test_errors_of_the_model_come_out_and_leave_nothing() -> None:
    net, x = Net().eval(), torch.randn(2, 2, 8, 8)
    phi = feature_map(net, "block")
    before = truth.fingerprint(net)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="to have 2 channels"):
            phi(torch.randn(2, 3, 8, 8))
        truth.assert_nothing_left(before, net)
        assert torch.equal(phi(x), stages(net, x)["block", "output"])
    handle = net.block[0].register_forward_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        phi(x)
    handle.remove()
    truth.assert_nothing_left(before, net)
    assert torch.equal(phi(x), stages(net, x)["block", "output"])


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


# -- what else is going on ----------------------------------------------------------------------


def in_threads(jobs: list[tuple[Callable[[Tensor], Tensor], Tensor, Tensor]]) -> None:
    """Call each function with its input ten times, all at once: it gives what is expected."""
    failures: list[BaseException] = []

    def work(function: Callable[[Tensor], Tensor], x: Tensor, expected: Tensor) -> None:
        try:
            assert all(torch.equal(function(x), expected) for _ in range(10))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_do_not_disturb_each_other() -> None:
    net = Net().eval()
    phi = feature_map(net, "block")
    inputs = [torch.randn(n, 2, 8, 8) for n in (1, 2, 3)]
    in_threads([(phi, x, stages(net, x)["block", "output"]) for x in inputs])


def test_inside_of_a_capture_both_see_everything() -> None:
    net, x = Net().eval(), torch.randn(2, 2, 8, 8)
    phi = feature_map(net, "conv1")
    phi(x)
    with capture(net) as maps:
        for _ in range(3):
            found = phi(x)
            assert torch.equal(found, maps["conv1"].tensor)
            assert maps.layers == ["conv1", "block.0", "conv3", "tail.2"]
    assert not maps.missed
    net.ran.clear()
    phi(x)
    assert not net.ran, "alone again, it ends early"


def test_a_model_with_phi_inside_is_captured_like_any_other() -> None:
    net, x = Net().eval(), torch.randn(2, 2, 8, 8)
    model = nn.Sequential(feature_map(net, "conv1", pool="mean"), nn.Linear(6, 3), nn.ReLU())
    with capture(model) as maps:
        for _ in range(3):
            output = model(x)
            assert torch.equal(maps["1"].tensor, output)
    assert not maps.missed
    expected = stages(net, x)["conv1", "activation"]
    assert torch.equal(maps["0.model.conv1"].tensor, expected)


def test_phi_of_phi() -> None:
    net, x = Net().eval(), torch.randn(2, 2, 8, 8)
    model = nn.Sequential(feature_map(net, "conv1", pool="mean"), nn.Linear(6, 3), nn.ReLU())
    outer = feature_map(model, "1", kind="preactivation")
    expected = model[1](stages(net, x)["conv1", "activation"].mean((2, 3)))
    for _ in range(3):
        assert torch.equal(outer(x), expected)


def test_a_hook_of_the_model_that_calls_phi_again_makes_a_layer_run_twice() -> None:
    net, x, y = Net().eval(), torch.randn(2, 2, 8, 8), torch.randn(3, 2, 8, 8)
    phi, other = feature_map(net, "block"), feature_map(net, "block", call=1)
    inner: list[Tensor] = []

    def again(module: nn.Module, args: Any, output: Tensor) -> None:
        if len(args[0]) == 2:
            inner.append(phi(y))

    before, expected = truth.fingerprint(net), stages(net, x)["block", "output"]
    handle = net.conv1.register_forward_hook(again)
    for _ in range(3):
        with pytest.raises(AmbiguousMapError):
            phi(x)
        assert torch.equal(other(x), expected)
    handle.remove()
    assert all(torch.equal(found, stages(net, y)["block", "output"]) for found in inner)
    assert len(inner) == 6
    truth.assert_nothing_left(before, net)
    assert torch.equal(phi(x), expected)


def test_an_edit_around_it_is_refused_by_name() -> None:
    net = Net().eval()
    phi, x = feature_map(net, "block"), torch.randn(2, 2, 8, 8)
    with capture(net, edit={"conv1": edits.zero()}):
        net(x)
        with pytest.raises(
            CaptureStateError, match="cannot be entered while one with edit= of Net"
        ):
            phi(x)
    assert torch.equal(phi(x), stages(net, x)["block", "output"])


def test_in_a_backward_it_is_refused_by_name_and_checkpoints_go_inside() -> None:
    net = Net().eval()
    phi = feature_map(net, "block")
    x = torch.randn(2, 2, 8, 8, requires_grad=True)
    with pytest.raises(CaptureStateError) as caught:
        checkpoint(phi, x, use_reentrant=False).sum().backward()
    assert str(caught.value) == (
        "a feature_map was called while a backward pass runs, as activation checkpointing does to "
        "compute it once more; put the checkpoint inside of the model"
    )

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor, reentrant: bool) -> Tensor:
            return self.last(checkpoint(self.net, x, use_reentrant=reentrant).tanh())

    model, x = Inside(), torch.randn(3, 4, requires_grad=True)
    phi = feature_map(model, "net.2", kind="response")
    for _ in range(3):
        ours = torch.autograd.grad(phi(x, False).square().sum(), x)[0]
        assert torch.equal(ours, torch.autograd.grad(model.net(x).square().sum(), x)[0])
    inner = feature_map(model, "net.0", kind="response")
    for _ in range(3):
        with pytest.raises(MapStateError) as state:
            inner(x, True)
        assert str(state.value).startswith(
            "feature_map: the response of layer 'net.0' is not part of the autograd graph: it ran "
        )
        with torch.no_grad():
            assert torch.equal(inner(x, True), model.net[0](x))


def test_transforms_of_torch_func() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    for layer, kind in (("block", "output"), ("conv1", "preactivation"), ("conv3", "activation")):
        phi = feature_map(net, layer, kind=kind)

        def by_hand(x: Tensor, place: Any = (layer, kind)) -> Tensor:
            return stages(net, x)[place]

        x, v = torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
        for _ in range(3):
            for ours, theirs in zip(
                torch.func.jvp(phi, (x,), (v,)), torch.func.jvp(by_hand, (x,), (v,)), strict=True
            ):
                assert torch.equal(ours, theirs)
            assert torch.equal(
                torch.func.vmap(phi)(x[:, None]), torch.func.vmap(by_hand)(x[:, None])
            )
            ours = torch.func.grad(lambda x, f=phi: f(x).square().sum())(x)
            assert torch.equal(ours, torch.func.grad(lambda x: by_hand(x).square().sum())(x))
            assert torch.equal(phi(x), by_hand(x))


def test_functional_call_takes_other_weights() -> None:
    net, other = Net().eval(), Net().eval()
    phi, x = feature_map(net, "block"), torch.randn(2, 2, 8, 8)
    state = {f"model.{k}": v for k, v in other.state_dict().items()}
    for _ in range(2):
        found = torch.func.functional_call(phi, state, (x,))
        assert torch.equal(found, stages(other, x)["block", "output"])
        assert torch.equal(phi(x), stages(net, x)["block", "output"])


@needs_compiled
def test_compiled_from_outside_and_of_a_compiled_model() -> None:
    net = nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        *(nn.Conv2d(6, 4, 3), nn.Tanh()),
    ).eval()
    runs: list[int] = []

    def backend(gm: Any, inputs: Any) -> Any:
        runs.append(1)
        return gm.forward

    x = torch.randn(2, 2, 8, 8, requires_grad=True)
    expected = net[:3](x).mean((2, 3))
    gradient = torch.autograd.grad(expected.square().sum(), x)[0]
    phi = feature_map(net, "0", pool="mean")
    of_compiled = feature_map(torch.compile(net, backend=backend), "0", pool="mean")
    for compiled in (torch.compile(phi, backend=backend), of_compiled):
        runs.clear()
        for _ in range(3):
            found = compiled(x)
            assert torch.equal(found, expected)
            assert torch.equal(torch.autograd.grad(found.square().sum(), x)[0], gradient)
            assert len(runs) == 1, "compiled once, by the backend that was asked for"
    assert torch.equal(phi(x), expected)
    head = nn.Linear(6, 2)
    whole = torch.compile(nn.Sequential(phi, head), backend=backend)
    for _ in range(2):
        assert torch.equal(whole(x), head(expected))
    assert torch.equal(torch.compile(phi, backend="eager", fullgraph=True)(x), expected)


@needs_compiled
def test_compiled_outputs_of_modules_end_the_graph_and_leave_nothing() -> None:
    net = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)), nn.ReLU(inplace=True)),
        *(nn.Sequential(nn.Conv2d(6, 4, 3), nn.Tanh()), nn.Conv2d(4, 3, 1)),
    ).eval()
    before = truth.fingerprint(net)
    sizes: list[int] = []

    def backend(gm: Any, inputs: Any) -> Any:
        sizes.append(sum(n.target in (torch.conv2d, torch.tanh) for n in gm.graph.nodes))
        return gm.forward

    x = torch.randn(2, 2, 8, 8, requires_grad=True)
    first = net[0](x)
    second = net[2](first.relu())
    # The first one's memory is overwritten by the ReLU, before the second one is there.
    for layers, expected, convolutions in ((["0", "2"], (first, second), 3), ("0", (first,), 1)):
        phi = feature_map(net, layers)
        sizes.clear()
        compiled = torch.compile(phi, backend=backend, fullgraph=True)
        for _ in range(4):
            found = compiled(x)
            several = _tuple(found)
            assert all(map(torch.equal, several, expected))
            loss, by_hand = (sum(f.square().sum() for f in fs) for fs in (several, expected))
            ours = torch.autograd.grad(loss, x)[0]
            theirs = torch.autograd.grad(by_hand, x, retain_graph=True)[0]
            assert torch.allclose(ours, theirs, rtol=1e-6)
            truth.assert_nothing_left(before, net)
        assert sizes == [convolutions], "one graph, which ends with the last map"
        assert all(map(torch.equal, _tuple(phi(x)), expected))
    conv = feature_map(nn.Sequential(nn.Sequential(nn.Conv2d(2, 6, 3))), "0", pool="mean")
    pooled = torch.compile(conv, backend="eager")
    for y in (x, x, x[0], x):  # what has no batch axis has its filters elsewhere
        assert torch.equal(pooled(y), conv.model(y).mean((-1, -2)))
    mixed = feature_map(net, ["0", "2.0"])
    compiled = torch.compile(mixed, backend=backend)
    for _ in range(3):
        assert all(map(torch.equal, compiled(x), mixed(x)))


def _tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


@needs_compiled
def test_compiled_in_several_threads_and_beside_a_bare_call() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Linear(4, 2)).eval()
    compiled = torch.compile(feature_map(net, "0"), backend="eager")
    x = torch.randn(3, 4)
    for _ in range(3):
        compiled(x)
    in_threads([(compiled, x, net[0](x)), (compiled, x, net[0](x)), (net, x, net(x))])


# -- control flow -----------------------------------------------------------------------------


class Deciding(nn.Module):
    """Decides by its data, and by what no plain attribute tells."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.options = {"twice": False}

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = self.b(x) if x.sum() > 0 else self.c(x)
        if self.options["twice"]:
            x = torch.sigmoid(self.a(x))
        return F.relu(x)


@given(st.lists(st.booleans(), min_size=1, max_size=6))
@settings(max_examples=12)
def test_what_the_data_decide(ways: list[bool]) -> None:
    torch.manual_seed(0)
    net = Deciding()
    one, other = feature_map(net, "a"), feature_map(net, "b")
    with torch.no_grad():
        net.a.bias.zero_()
    for way in ways:
        x = torch.linalg.solve(net.a.weight, torch.full((4, 3), 1.0 if way else -1.0)).T.detach()
        hidden = torch.tanh(net.a(x))
        assert torch.equal(one(x), hidden)
        if way:
            assert torch.equal(other(x), F.relu(net.b(hidden)))
        else:
            with pytest.raises(NoActivationError, match="or it did not run"):
                other(x)


def test_a_way_that_nobody_announced_is_run_again_not_mislabelled() -> None:
    net, x = Deciding().eval(), torch.randn(3, 4)
    last = feature_map(net, "a", call=0)
    for twice in (False, False, True, True, False, True):
        net.options["twice"] = twice
        assert torch.equal(last(x), torch.tanh(net.a(x)))
    every = feature_map(net, "a")
    with pytest.raises(AmbiguousMapError) as caught:
        every(x)
    assert str(caught.value) == (
        "feature_map: layer 'a' has 2 maps of kind 'activation' in a pass ('call=0, σ=tanh', "
        "'call=1, σ=sigmoid'); choose one with call=… or path=…"
    )


def test_calls_and_paths_of_several() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.rnn = nn.Linear(4, 4), nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.rnn(torch.relu(self.fc(torch.relu(self.fc(x)))))

    net, x = Twice(), torch.randn(2, 5, 4)
    first = torch.relu(net.fc(x))
    second = torch.relu(net.fc(first))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what φ does not return is nobody's concern
        for _ in range(3):
            assert torch.equal(feature_map(net, "fc", call=0)(x), first)
            assert torch.equal(feature_map(net, "fc", call=1)(x), second)
            hidden = feature_map(net, "rnn", path="[1][0]")(x)
            assert torch.equal(hidden, net.rnn(second)[1][0])
    with pytest.raises(AmbiguousMapError) as caught:
        feature_map(net, "rnn")(x)
    assert str(caught.value) == (
        "feature_map: layer 'rnn' has 3 maps of kind 'output' in a pass (\"path='[0]'\", "
        "\"path='[1][0]'\", \"path='[1][1]'\"); choose one with call=… or path=…"
    )
    with pytest.raises(UnknownLayerError) as unknown:
        feature_map(net, "fc", call=2)(x)
    assert str(unknown.value) == (
        "feature_map: layer 'fc' has no map with call=2 in this pass; it has "
        "\"call=0, path=''\", \"call=1, path=''\""
    )


def test_without_a_kind_it_is_what_the_maps_have_by_the_layers_name() -> None:
    class Dense(nn.Module):
        """The concatenation has no one layer, so that activations go by the norm's name."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(4, 3), nn.Linear(4, 3), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1)), inplace=True)

    net, x = Dense().eval(), torch.randn(5, 4)
    z = net.norm(torch.cat([net.a(x), net.b(x)], 1))
    with capture(net, kinds=("activation", "output")) as maps:
        net(x)
    for _ in range(2):
        for layers in ("norm", nn.BatchNorm1d):
            found = feature_map(net, layers)(x)
            found = found["norm"] if isinstance(found, dict) else found
            assert torch.equal(found, maps["norm"].tensor)
            assert torch.equal(found, z.relu())
        assert torch.equal(feature_map(net, "norm", kind="output")(x), z)
    for layer in ("norm", ""):
        assert torch.equal(feature_map(net, layer)(x), maps[layer].tensor)


# -- bad arguments ------------------------------------------------------------------------------

NET = Net().eval()


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (
            lambda: feature_map(3, "conv1"),
            NotAModuleError,
            "feature_map takes a torch.nn.Module, not int",
        ),
        (
            lambda: feature_map(Net, "conv1"),
            NotAModuleError,
            "feature_map takes a torch.nn.Module, not type (a model class: make an instance first)",
        ),
        (
            lambda: feature_map(NET, None),
            ArgumentError,
            "a layer is given by a name, glob, regex, module, module type or callable, not None",
        ),
        (lambda: feature_map(NET, []), ArgumentError, "layers=[] asks for no map"),
        (lambda: feature_map(NET, {}), ArgumentError, "layers={} asks for no map"),
        (
            lambda: feature_map(NET, {1: "conv1"}),
            ArgumentError,
            "a dict of layers has a name for each, not 1",
        ),
        (
            lambda: feature_map(NET, {"a": "conv*"}),
            ArgumentError,
            "layers['a'] may match several layers, and a dict has one for each key",
        ),
        (
            lambda: feature_map(NET, [("conv1", "activation", 3)]),
            ArgumentError,
            "in a list or dict, a layer is one, or (layer, kind), not ('conv1', 'activation', 3)",
        ),
        (
            lambda: feature_map(NET, "conv1", kind="activations"),
            ArgumentError,
            "unknown kind 'activations'; did you mean 'activation' or 'preactivation' or "
            "'attention'?; the kinds are 'input', 'response', 'preactivation', 'activation', "
            "'output', 'attention'",
        ),
        (
            lambda: feature_map(NET, "conv1", pool="men"),
            ArgumentError,
            "pool must be one of 'mean', 'max', 'flatten', 'token', a function or None, not 'men'; "
            "did you mean 'mean' or 'token'?",
        ),
        (
            lambda: feature_map(NET, "conv1", call=-1),
            ArgumentError,
            "call must be a call's number, from 0, or None, not -1",
        ),
        (
            lambda: feature_map(NET, "conv1", path=0),
            ArgumentError,
            "path must be a place such as '[0]' or '.logits', not 0",
        ),
        (
            lambda: feature_map(NET, "conv1", filters=6),
            FilterRangeError,
            "filters=6 is out of range for layer 'conv1', which has 6 filters (0 to 5)",
        ),
        (
            lambda: feature_map(NET, "conv1", filters={"conv3": 1}),
            ArgumentError,
            "filters names layer 'conv3', and the layers asked for are 'conv1'",
        ),
        (
            lambda: feature_map(NET, "block", filters=6)(torch.randn(2, 2, 8, 8)),
            FilterRangeError,
            "filters=6 is out of range for the output of layer 'block', which has 6 filters "
            "(0 to 5)",
        ),
        (
            lambda: feature_map(NET, "tail.2")(torch.randn(2, 2, 8, 8)),
            NoActivationError,
            "feature_map: layer 'tail.2' has no activation in this pass: no nonlinearity follows "
            "it, or it did not run; ask for kind='preactivation' or kind='output'",
        ),
        (
            lambda: feature_map(NET, "relu", kind="response")(torch.randn(2, 2, 8, 8)),
            KindNotCapturedError,
            "feature_map: layer 'relu' has no response in this pass: it has none, or it did not "
            "run",
        ),
        (
            lambda: torch.jit.trace(feature_map(NET, "conv1"), torch.randn(2, 2, 8, 8)),
            MapStateError,
            "feature_map('conv1'): this call could not be captured: it was recorded by "
            "torch.jit.trace here, which would record what fmapkit does, too: such a call is left "
            "alone, and is not captured",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_errors_say_what_and_what_next(make: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert str(caught.value) == text


def test_selectors_that_overlap_and_containers() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x

    net, x = Held(), torch.randn(3, 4)
    for _ in range(2):
        found = feature_map(net, ["layers.0", "layers.*", nn.Linear])(x)
        assert list(found) == ["layers.0", "layers.1"]
        assert torch.equal(found["layers.1"], net(x))
    with pytest.raises(UnknownLayerError) as caught:
        feature_map(net, "layers")(x)
    assert str(caught.value) == (
        "feature_map: 'layers' is a ModuleList, which is never called; ask for what it holds: "
        "'layers.*'"
    )
    with pytest.raises(ArgumentError) as twice:
        feature_map(net, [("layers.*", "preactivation"), "layers.0"])(x)
    assert str(twice.value) == (
        "feature_map('layers.*', 'layers.0'): two maps of layer 'layers.0' are asked for, and a "
        "dict by layer has one: give a dict with a key for each"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_refused_by_name() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(MapStateError) as caught:
        feature_map(scripted, "0")(torch.randn(2, 4))
    assert str(caught.value) == (
        "feature_map('0'): this call could not be captured: it is scripted: torch runs it without "
        "Python, unseen by hooks"
    )


def test_an_unknown_layer_is_an_error_before_the_first_call() -> None:
    with pytest.raises(UnknownLayerError, match="did you mean 'conv3' or 'conv1'"):
        feature_map(Net(), "conv2")
    with pytest.raises(UnknownLayerError, match="'activation' matches no module"):
        feature_map(Net(), ("conv1", "activation"))
