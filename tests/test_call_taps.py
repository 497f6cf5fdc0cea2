"""Taps that stand before a module's call: what they are spared, and who else must not notice."""

from __future__ import annotations

import copy
import io
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture
from fmapkit.instrumentation.hook_registry import Hooks
from fmapkit.replay.call_taps import CallTap
from fmapkit.torchlib.call_override import standing_before, there
from tests import truth
from tests.checks import needs_compiled


class Net(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.relu, self.prelu = nn.ReLU(inplace), nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.prelu(self.b(self.relu(self.a(x)))))


def _right(net: Net, maps: Any, x: Tensor) -> None:
    """By hand: z = a(x), a = max(z, 0); and the same for b with its own slope."""
    z = F.linear(x, net.a.weight, net.a.bias)
    assert torch.equal(maps["a", "preactivation"].tensor, z)
    assert torch.equal(maps["a"].tensor, z.clamp(min=0))
    z = F.linear(z.clamp(min=0), net.b.weight, net.b.bias)
    assert torch.equal(maps["b", "preactivation"].tensor, z)
    assert torch.equal(maps["b"].tensor, torch.where(z > 0, z, z * net.prelu.weight))
    assert maps.missed == []


@pytest.mark.parametrize("inplace", [False, True])
def test_no_hook_where_none_is_needed(inplace: bool) -> None:
    net, x = Net(inplace), torch.randn(3, 4)
    bare = truth.fingerprint(net)
    # In training, what an in-place ReLU overwrites is copied, by a hook.
    with torch.set_grad_enabled(not inplace), capture(net) as maps:
        net(x), net(x)
        assert isinstance(there(net.relu), CallTap)
        assert not net.relu._forward_hooks
        assert not isinstance(there(net.prelu), CallTap)  # a replica's weights are not ours to use
        assert not net.prelu._forward_hooks
        _right(net, maps, x)
    truth.assert_nothing_left(bare, net)
    assert there(net.relu) is None


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("hook", ["pre", "post", "global pre", "global post"])
def test_hooks_of_others_have_their_say(when: str, hook: str) -> None:
    """z is what σ received and a is what went on: after the pre hook, after the post hook."""
    net, x = Net(), torch.randn(3, 4)
    seen: list[Tensor] = []

    def register() -> Any:
        def pre(module: nn.Module, args: Any) -> Any:
            return (args[0] + 1,) if module is net.relu else None

        def post(module: nn.Module, args: Any, output: Tensor) -> Any:
            return output * 2 if module is net.relu else None

        every = nn.modules.module
        return {
            "pre": lambda: net.relu.register_forward_pre_hook(pre),
            "post": lambda: net.relu.register_forward_hook(post),
            "global pre": lambda: every.register_module_forward_pre_hook(pre),
            "global post": lambda: every.register_module_forward_hook(post),
        }[hook]()

    net.b.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    handle = register() if when == "before" else None
    try:
        with capture(net, kinds=("preactivation", "activation")) as maps:
            net(x), net(x)
            if handle is None:
                handle = register()
            for _ in range(3):
                net(x)
                z = F.linear(x, net.a.weight, net.a.bias)
                # What the pre hook returned is what σ got; a plain sum is no layer's filters less.
                z = z + 1 if "pre" in hook else z
                [got] = maps.select(kind="preactivation", layer="a", step=-1)
                assert torch.equal(got.tensor, z)
                a = z.clamp(min=0)
                if "post" not in hook:
                    assert torch.equal(maps["a"].tensor, a)
                assert torch.equal(seen[-1], a * 2 if "post" in hook else a)
    finally:
        if handle is not None:
            handle.remove()


def test_another_thread_and_a_direct_call_of_forward() -> None:
    net, x, other = Net(), torch.randn(3, 4), torch.randn(3, 4)
    expected = net(other)
    with capture(net) as maps:
        net(x), net(x)
        got: list[Tensor] = []
        thread = threading.Thread(target=lambda: got.append(net(other)))
        thread.start()
        thread.join()
        assert torch.equal(got[0], expected)
        net.relu.forward(torch.zeros(1))  # as no hook would see it
        _right(net, maps, x)


def test_copies_are_not_captured() -> None:
    net, x = Net(), torch.randn(3, 4)
    with capture(net) as maps:
        net(x), net(x)
        twin = copy.deepcopy(net)
        shallow = copy.copy(net.relu)
        stream = io.BytesIO()
        torch.save(net, stream)
        stream.seek(0)
        loaded = torch.load(stream, weights_only=False)
        for model in (twin, loaded):
            assert there(model.relu) is None
            model(torch.randn(3, 4))
        assert torch.equal(shallow(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))
        _right(net, maps, x)


def test_what_copies_the_attributes_of_a_module_gets_its_own_call() -> None:
    """`nn.parallel.replicate` makes modules with our attributes: the call is theirs."""

    class Counting(nn.ReLU):
        count = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x)

    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with capture(net) as maps:
        net(torch.randn(3, 4)), net(torch.randn(3, 4))
        replica = net[1]._replicate_for_data_parallel()
        assert there(replica) is there(net[1])
        replica.__class__ = Counting
        assert torch.equal(replica(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
        assert replica.count == 1
        assert maps.missed == []


def test_two_captures_take_turns() -> None:
    net, x = Net(), torch.randn(3, 4)
    with capture(net) as outer:
        net(x), net(x)
        with capture(net, kinds="activation") as inner:
            for _ in range(3):
                net(x)
            _right(net, outer, x)
            assert torch.equal(inner["a"].tensor, outer["a"].tensor)
        net(x)
        _right(net, outer, x)
    assert there(net.relu) is None
    assert not net.relu._forward_hooks


@needs_compiled
def test_compiled_inside_of_the_block() -> None:
    net, x = (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)),
        torch.ones(3, 4),
    )
    expected = net(x)
    with capture(net) as maps:
        net(x), net(x)
        net[1].compile(backend="eager")
        assert torch.equal(net(x), expected)
        net(x)
        z, a = maps["0", "preactivation"].tensor, maps["0"].tensor
        assert torch.equal(z, F.linear(x, net[0].weight, net[0].bias))
        assert torch.equal(a, z.clamp(min=0))
    assert there(net[1]) is not None  # the user's compiled call stays


def test_a_block_that_another_thread_opens_in_the_middle_of_a_pass() -> None:
    """Its hooks come onto the same modules, and do nothing here."""
    net, x = Net(), torch.randn(3, 4)
    opened, over = threading.Event(), threading.Event()

    def other() -> None:
        with capture(net):
            opened.set()
            over.wait(60)
            net(x)

    def profile(frame: Any, event: str, arg: Any) -> None:
        if frame.f_code is nn.Linear.forward.__code__ and frame.f_locals["self"] is net.a:
            sys.setprofile(None)
            thread.start()
            opened.wait(60)

    thread = threading.Thread(target=other)
    with capture(net) as maps:
        net(x), net(x)
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            net(x)
        finally:
            sys.setprofile(before)
        assert isinstance(there(net.relu), CallTap)
        assert len(standing_before(net.relu)) == 2  # the other's, too
        _right(net, maps, x)
        assert maps["a"].step == 2
        over.set()
        thread.join()
        net(x)
        _right(net, maps, x)


def test_what_others_set_while_ours_steps_aside_stays() -> None:
    """See `Hooks.suspended`: another session comes meanwhile, and a third one goes."""
    relu, calls = nn.ReLU(), []

    def session(name: str) -> Hooks:
        hooks = Hooks(object(), lambda *args: None)
        hooks.around([relu], lambda *args: calls.append(name), lambda *args: None)
        return hooks

    first, second, third = map(session, "abc")
    relu(torch.ones(1))
    assert "".join(calls) == "abc"
    calls.clear()
    with second.suspended([relu]):
        first.drop()
        session("d")
        relu(torch.ones(1))
        assert "".join(calls) == "cd"
    calls.clear()
    relu(torch.ones(1))
    assert "".join(calls) == "bcd"
    second.drop()
    third.drop()
    assert [s.owner for s in standing_before(relu)] not in ([], [second.owner])


class _HooksItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        handle = self.fc.register_forward_hook(lambda module, args, output: output - 1)
        x = self.fc(x)
        handle.remove()
        return F.relu(x)


def test_a_hook_that_the_forward_sets_for_one_call() -> None:
    """The response is what the weights gave, the output what the call of `fc` gave."""
    net = _HooksItself()
    kinds = ("response", "preactivation", "activation", "output")
    with capture(net, kinds=kinds) as maps, torch.no_grad():
        for _ in range(4):
            x = torch.randn(2, 4)
            net(x)
            y = F.linear(x, net.fc.weight, net.fc.bias)
            assert torch.equal(maps["fc", "response"].tensor, y)
            assert torch.equal(maps["fc", "output"].tensor, y - 1)
            assert torch.equal(maps["fc", "preactivation"].tensor, y - 1)
            assert torch.equal(maps["fc"].tensor, (y - 1).relu())
    assert maps.missed == []


class _Caught(nn.Module):
    """A part raises after a nonlinearity; what handles that calls one that returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.strict, self.quiet, self.last = _Strict(), _Quiet(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.strict(x)
        except ValueError:
            self.quiet(x)
            return F.relu(self.last(x))


class _Strict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        F.silu(self.fc(x))
        raise ValueError


class _Quiet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> None:
        F.gelu(self.fc(x))


def test_what_ran_before_a_caught_error_and_while_it_is_handled() -> None:
    net, x = _Caught(), torch.randn(2, 4)
    with capture(net) as maps, torch.no_grad():
        net(x)
        found = [(fm.layer, fm.nonlinearity) for fm in maps.select(kind="activation")]
        assert found == [("strict.fc", "silu"), ("quiet.fc", "gelu"), ("last", "relu")]
        z = F.linear(x, net.strict.fc.weight, net.strict.fc.bias)
        assert torch.equal(maps["strict.fc"].tensor, F.silu(z))
    assert maps.missed == []


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """One place in the source, for all layers."""
    return torch.addmm(layer.bias, x, layer.weight.T)


class Helped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.act, self.last = nn.GELU(), nn.ReLU(inplace=True)
        self.made: list[Any] = []
        self.order = "abcd"

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = _linear(x, getattr(self, name))
            if name == "b":
                self.made.append(weakref.ref(x))
                x = self.act(x) if self.training else x + 1
            x = self.last(x) if name == "d" else x
        return x


@pytest.mark.parametrize("layers", [None, ["a"], ["c", "d"], ["b"]])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_one_place_calls_layers_with_maps_and_without(layers: Any, mode: Any) -> None:
    torch.manual_seed(0)
    net = Helped()
    for train in (False, True):
        net.train(train)
        bare = copy.deepcopy(net)
        with mode(), capture(net, layers=layers) as maps:
            for n in range(4):
                x = torch.randn(3, 4)
                alone = copy.deepcopy(bare)
                with capture(alone, layers=layers) as own:
                    expected = alone(x)
                assert torch.equal(net(x), expected)
                assert maps.layers == own.layers
                for one, other in zip(maps, own, strict=True):
                    assert (one.layer, one.kind) == (other.layer, other.kind), n
                    assert torch.equal(one.tensor, other.tensor), n
        assert maps.missed == []


def test_what_has_no_map_is_not_held() -> None:
    net = Helped().eval()
    with torch.no_grad(), capture(net, layers=["a", "d"]) as maps:
        for _ in range(4):
            net(torch.randn(3, 4))
            assert net.made.pop()() is None
        assert maps.layers == ["a", "d"]


def test_the_layers_at_one_place_come_in_another_order() -> None:
    net = Helped().eval()
    with torch.no_grad(), capture(net) as maps:
        for order in ("abcd", "abcd", "abcd", "cabd", "cabd", "abd", "abcd", "abcdd"):
            net.order = order
            net(torch.randn(3, 4))
            got = [m.layer for m in maps if m.kind == "preactivation"]
            assert got == list(order)
