"""`capture(edit=...)`: compared with models in which the edit is written out by hand."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import (
    ArgumentError,
    CaptureStateError,
    EditError,
    FeatureMap,
    FilterRangeError,
    UnknownLayerError,
    capture,
    edits,
)
from tests import truth

Change = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    return x


class Net(nn.Module):
    """Two layers; `style` is how σ is written, `z` and `a` what is done there by hand."""

    def __init__(self, style: str, z: Change = same, a: Change = same) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.act: nn.Module = nn.ReLU(inplace=style == "module_")
        if style in ("swish", "swish_"):
            self.act = Swish(style == "swish_")
        self.head = nn.Conv2d(5, 4, 1)
        self.style = style
        self.z = z
        self.a = a

    def sigma(self, x: Tensor) -> Tensor:
        if self.style in ("module", "module_", "swish", "swish_"):
            return self.act(x)
        if self.style == "function":
            return F.relu(x)
        if self.style == "function_":
            return F.relu(x, inplace=True)
        if self.style == "method_":
            return x.relu_()
        assert self.style == "out"
        return torch.sigmoid(x, out=torch.empty_like(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = self.a(self.sigma(self.z(x)))
        return torch.tanh(self.head(x))


class Branching(Net):
    """The same, unproven: traced in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) < 1e9 else x


class Swish(nn.Module):
    """Written out by hand; in place, it overwrites what it was given."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(x.sigmoid()) if self.inplace else x * x.sigmoid()


STYLES = ["module", "module_", "swish", "swish_", "function", "function_", "method_", "out"]


def pair(kind: type[Net], style: str, z: Change = same, a: Change = same) -> tuple[Net, Net]:
    torch.manual_seed(0)
    net = kind(style)
    hand = copy.deepcopy(net)
    hand.z, hand.a = z, a
    return net, hand


def compare(net: nn.Module, hand: nn.Module, maps: Any, train: bool, passes: int = 3) -> None:
    for n in range(passes):
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(n))
        with torch.set_grad_enabled(train):
            expected, got = hand(x), net(x)
        assert torch.equal(got, expected), n
        if train:
            net.zero_grad()
            hand.zero_grad()
            expected.square().sum().backward()
            got.square().sum().backward()
            for p, q in zip(net.parameters(), hand.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad), n
        for p, q in zip(net.buffers(), hand.buffers(), strict=True):
            assert torch.equal(p, q)
        assert maps.missed == []


def double(fm: FeatureMap) -> Tensor:
    return fm.tensor * 2 + 1


@pytest.mark.parametrize("kind", [Net, Branching])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("where", ["z", "a", "za"])
@pytest.mark.parametrize("train", [False, True])
def test_edits_do_what_one_would_write_by_hand(
    kind: type[Net], style: str, where: str, train: bool
) -> None:
    if style == "out" and train:
        pytest.skip("torch: out= has no gradient")
    by_hand = {"z": same, "a": same} | {c: (lambda x: x * 2 + 1) for c in where}
    net, hand = pair(kind, style, **by_hand)
    net.train(train)
    hand.train(train)
    names = {"z": "preactivation", "a": "activation"}
    with capture(net, edit={("conv", names[c]): double for c in where}) as maps:
        compare(net, hand, maps, train)
        z, a = maps["conv", "preactivation"], maps["conv", "activation"]
        assert (z.edited is not None, a.edited is not None) == ("z" in where, "a" in where)
        sigma = {"swish": lambda x: x * x.sigmoid(), "swish_": lambda x: x * x.sigmoid()}
        sigma["out"] = torch.sigmoid
        went_in = z.tensor if z.edited is None else z.edited
        assert torch.equal(sigma.get(style, torch.relu)(went_in), a.tensor)
        if z.edited is not None:
            assert torch.equal(z.edited, z.tensor * 2 + 1)
        if a.edited is not None:
            assert torch.equal(a.edited, a.tensor * 2 + 1)
        assert not z.tensor.requires_grad
        assert not a.tensor.requires_grad
    truth.assert_nothing_left(truth.fingerprint(hand), net)


@pytest.mark.parametrize("kind", [Net, Branching])
def test_a_pass_is_edited_from_the_first_one_on_and_parts_are_replayed(kind: type[Net]) -> None:
    net, hand = pair(kind, "module_", a=lambda x: x * 0)
    with torch.no_grad(), capture(net, edit={"conv": edits.zero()}) as maps:
        compare(net, hand, maps, train=False, passes=5)
        assert maps.layers == ["conv", "head"]


@pytest.mark.parametrize("style", STYLES)
def test_filters(style: str) -> None:
    def by_hand(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, [1, 4]] = x[:, [1, 4]] * 3
        return x

    seen = []

    def triple(fm: FeatureMap) -> Tensor:
        seen.append((fm.filter, fm.filters, tuple(fm.shape)))
        return fm.tensor * 3

    one, several = ("conv", "activation", 1), ("conv", "activation", (4,))
    for edit in ({("conv", "activation", (1, -1)): triple}, {one: triple, several: triple}):
        net, hand = pair(Net, style, a=by_hand)
        with torch.no_grad(), capture(net, edit=edit) as maps:
            compare(net, hand, maps, train=False)
            fm = maps["conv"]
            assert torch.equal(fm[1].edited, fm[1].tensor * 3)
            assert torch.equal(fm[0].edited, fm[0].tensor)
    # One filter's map has no axis of filters; a map of several has.
    assert set(seen) == {
        (None, (1, 4), (2, 2, 4, 4)),
        (1, None, (2, 4, 4)),
        (None, (4,), (2, 1, 4, 4)),
    }


def test_the_usual_edits() -> None:
    def only(x: Tensor) -> Tensor:
        kept = torch.zeros_like(x)
        kept[:, 2] = x[:, 2]
        return kept

    cases: list[tuple[Any, Change]] = [
        (edits.zero(), lambda x: x * 0),
        (edits.scale(0.5), lambda x: x * 0.5),
        (edits.clamp(0.1, 0.2), lambda x: x.clamp(0.1, 0.2)),
        (edits.set(1.5), lambda x: torch.full_like(x, 1.5)),
        (
            edits.set(torch.arange(5.0)[:, None, None]),
            lambda x: x * 0 + torch.arange(5.0)[:, None, None],
        ),
        (edits.only(2), only),
    ]
    for edit, by_hand in cases:
        net, hand = pair(Net, "module_", a=by_hand)
        with torch.no_grad(), capture(net, edit={"conv": edit}) as maps:
            compare(net, hand, maps, train=False)


def test_what_is_held_is_the_picked_filters() -> None:
    net, _ = pair(Net, "module_")
    with torch.no_grad(), capture(net, "conv", filters=[0, 3], edit={"conv": double}) as maps:
        net(torch.randn(2, 3, 6, 6))
        fm = maps["conv"]
        assert fm.shape[1] == 2
        assert torch.equal(fm.edited, fm.tensor * 2 + 1)


def test_response_of_a_layer_with_and_without_a_nonlinearity() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    x = torch.randn(2, 4)
    expected = net[2](F.relu(net[0](x) * 2 + 1)) * 2 + 1
    edit = {("*", "response"): double}
    with capture(net, kinds=("response", "preactivation"), edit=edit) as maps:
        for _ in range(3):
            assert torch.equal(net(x), expected)
        r, z = maps["0", "response"], maps["0", "preactivation"]
        assert torch.equal(r.edited, r.tensor * 2 + 1)
        assert torch.equal(z.tensor, r.edited)
        assert torch.equal(maps["2", "response"].edited, expected)


def test_z_is_edited_for_the_nonlinearity_alone() -> None:
    class PreAct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            return z + self.b(F.relu(z))

    net, x = PreAct(), torch.randn(2, 4)
    z = net.a(x)
    expected = z + net.b(F.relu(z * 2 + 1))
    with capture(net, edit={("a", "preactivation"): double}):
        for _ in range(3):
            assert torch.equal(net(x), expected)


def test_calls_are_told_apart_and_layers_picked_by_glob() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.fc(self.act(self.fc(x))))

    net, x = Twice(), torch.randn(2, 4)
    expected = F.relu(net.fc(F.relu(net.fc(x)))) * 0
    with capture(net, edit={"f*": lambda fm: fm.tensor * (fm.call == 0)}) as maps:
        for _ in range(3):
            assert torch.equal(net(x), expected)
        first, second = maps.select(kind="activation")
        assert torch.equal(first.edited, first.tensor)
        assert not second.edited.any()


def test_a_functional_nonlinearity_of_its_own() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) * 3

    net, x = nn.Sequential(Own()), torch.randn(2, 4)
    with capture(net, edit={"0:relu": edits.zero()}) as maps:
        for _ in range(3):
            assert not net(x).any()
            assert maps.missed == []


def test_the_fused_encoder_layer_runs_unfused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    bare = copy.deepcopy(layer)
    bare.activation, bare.activation_relu_or_gelu = lambda z: F.relu(z) * 0, 0  # never fused
    with torch.no_grad():
        expected = bare(x)
        with capture(layer, edit={"linear1": edits.zero()}) as maps:
            for _ in range(3):
                assert torch.allclose(layer(x), expected, atol=1e-6)
            assert not maps["linear1"].edited.any()


@pytest.mark.parametrize("kind", [Net, Branching])
def test_an_edit_without_a_place_is_an_error_at_the_end_of_the_pass(kind: type[Net]) -> None:
    net, hand = pair(kind, "module")
    x = torch.randn(1, 3, 6, 6)
    text = (
        "edit[('norm', 'activation')] changed nothing in this pass (step 0): the layer did not "
        "run, or has no activation; what it returns is its 'output'. Where that may be, "
        "edits.Where(..., optional=True) says so"
    )
    before = truth.fingerprint(net)
    with (
        capture(net, edit={("norm", "activation"): double}) as maps,
        pytest.raises(EditError, match=f"^{re.escape(text)}$"),
    ):
        net(x)
    assert maps.missed == []
    truth.assert_nothing_left(before, net)
    hand(x)
    optional = edits.Where("norm", "activation", optional=True)
    with capture(net, edit={optional: double}) as maps:
        assert torch.equal(net(x), hand(x))
        assert maps.missed == []


@pytest.mark.parametrize("kind", [Net, Branching])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("at", ["preactivation", "activation", "response"])
def test_what_an_edit_raises_is_raised_as_it_is(kind: type[Net], style: str, at: str) -> None:
    net, hand = pair(kind, style)
    before = truth.fingerprint(net)
    bad: list[tuple[Any, type[Exception], str]] = [
        (lambda fm: 1 / 0, ZeroDivisionError, "division"),
        (lambda fm: fm.tensor[:1], EditError, r"must keep the shape: \(2, 5, 4, 4\) went in"),
        (lambda fm: fm.tensor.double(), EditError, "must keep the dtype: torch.float32 went in"),
        (lambda fm: None, EditError, "must return a tensor, not NoneType"),
        (lambda fm: fm.tensor.mul_(2), EditError, "wrote to the map in place"),
        (edits.only(9), FilterRangeError, "filter 9 is out of range"),
    ]
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        for function, error, text in bad:
            with capture(net, edit={("conv", at): function}) as maps:
                for _ in range(2):
                    with pytest.raises(error, match=text):
                        net(x)
            assert maps.missed == []
            truth.assert_nothing_left(before, net)
        assert torch.equal(net(x), hand(x))


def test_an_edit_and_another_capture_do_not_go_together() -> None:
    """Where one would fall among the other's looks depends on how σ is written."""
    net, hand = pair(Net, "module_", a=lambda x: x * 2 + 1)
    whole = nn.Sequential(net)
    before = truth.fingerprint(whole)
    change = {("conv", "activation"): double}
    text = (
        "a capture with edit= of Net cannot be entered while one of Sequential is open: an edit "
        "changes what the other one would see. Put all edits into one edit="
    )
    with capture(whole), pytest.raises(CaptureStateError, match=re.escape(text)):
        capture(net, edit=change).__enter__()
    waiting = capture(net)
    with capture(net, edit=change) as maps:
        with pytest.raises(CaptureStateError, match="while one with edit= of Net is open"):
            waiting.__enter__()
        with pytest.raises(CaptureStateError, match="with edit= of Net cannot be entered while"):
            capture(net, edit=change).__enter__()
        compare(net, hand, maps, train=False)  # as if nobody had tried
        with capture(hand) as other:  # another model
            hand(torch.ones(1, 3, 6, 6))
            assert "conv" in other
    with waiting as maps:  # it can be entered still
        net(torch.ones(1, 3, 6, 6))
        assert "conv" in maps
    truth.assert_nothing_left(before, whole)


def test_an_edit_in_one_thread_and_a_capture_in_another_go_together() -> None:
    net, hand = pair(Net, "module_")
    x = torch.randn(2, 3, 6, 6)
    net.eval()
    hand.eval()
    found: list[Tensor] = []

    def look() -> None:
        with torch.no_grad(), capture(net) as maps:
            net(x)
            found.append(maps["conv"].tensor.clone())

    with torch.no_grad(), capture(net, edit={"conv": edits.zero()}) as edited:
        net(x)
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        net(x)
        assert not edited["conv"].edited.any()
    with torch.no_grad():
        assert torch.equal(found[0], torch.relu(hand.norm(hand.conv(x))))


def test_bad_arguments() -> None:
    net, _ = pair(Net, "module")
    with pytest.raises(ArgumentError, match="edit must be a dict"):
        capture(net, edit=edits.zero())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="must be a function FeatureMap -> Tensor"):
        capture(net, edit={"conv": 0.0})  # type: ignore[dict-item]
    with pytest.raises(ArgumentError, match="must be a function FeatureMap -> Tensor"):
        capture(net, edit={"conv": edits.zero and Tensor})  # type: ignore[dict-item]
    with pytest.raises(UnknownLayerError, match="did you mean 'conv'"):
        capture(net, edit={"convv": double})
    with pytest.raises(ArgumentError, match="the kind must be one of"):
        capture(net, edit={("conv", "weight"): double})
    with pytest.raises(ArgumentError, match="did you mean 'activation'"):
        capture(net, edit={("conv", "activations"): double})
    with pytest.raises(ArgumentError, match="a key is a layer"):
        capture(net, edit={("conv", "activation", 1, 2): double})
    with pytest.raises(ArgumentError, match="only an 'input' or an 'output' has paths"):
        capture(net, edit={("conv", "activation", "x"): double})
    with pytest.raises(ArgumentError, match="the filters of Where"):
        capture(net, edit={("conv", "activation", 1.5): double})
    with pytest.raises(ArgumentError, match="goes with every=1 only"):
        capture(net, every=2, edit={"conv": double})
    with pytest.raises(ArgumentError, match="clamp needs"):
        edits.clamp()
    with pytest.raises(ArgumentError, match="at least one filter"):
        edits.only()
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


class _Wave(nn.Module):
    """One nonlinearity, written out by hand around others."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.7 * x) + 0.1 * torch.sin(x)


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), _Wave())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


@pytest.mark.parametrize("kind", ["preactivation", "activation"])
def test_a_hand_written_nonlinearity_that_runs_twice_in_each_pass(kind: str) -> None:
    model, wave = _Twice(), _Wave().forward
    first: Any = model.block[0]

    def once(x: Tensor) -> Tensor:
        z = F.linear(x, first.weight, first.bias)
        return wave(z * 3) if kind == "preactivation" else wave(z) * 3

    with capture(model, edit={("block.0", kind): lambda fm: fm.tensor * 3}) as maps:
        for _ in range(4):
            x = torch.randn(2, 4)
            assert torch.equal(model(x), once(once(x)))
            calls = [(fm.nonlinearity, fm.call) for fm in maps.select(kind="activation")]
            assert calls == [("_Wave", 0), ("_Wave", 1)]
    assert maps.missed == []


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fused(x))


@pytest.mark.parametrize("edited", ["head.0", "fused.linear1"])
@pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")
@torch.no_grad()
def test_an_edit_elsewhere_leaves_the_fused_path(edited: str) -> None:
    torch.manual_seed(0)
    model, x = _Encoder().eval(), torch.randn(2, 5, 16)
    bare = model(x)
    with capture(model, edit={edited: lambda fm: fm.tensor * 1}) as maps:
        for _ in range(3):
            out = model(x)
            assert torch.allclose(out, bare, atol=1e-6)
            if edited == "head.0":  # torch's own output, bit for bit
                assert torch.equal(out, bare)
            assert maps[edited].edited is not None
    [missed] = maps.missed
    assert missed.layer == "fused"
    assert ("nothing can be edited" in missed.reason) == (edited != "head.0")


# -- hooks of the user's on a nonlinearity -------------------------------------------------------


def _hooked(inplace: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace), nn.Linear(4, 2))
    model[1].register_forward_hook(lambda module, args, out: out * 2)
    return model


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_that_a_hook_has_seen_already_is_not_edited(inplace: bool) -> None:
    text = (
        "edit[('0', 'activation')] of layer '0': a hook on '1' changes what its nonlinearity has "
        "given, before another activation could be put in the place of that; edit what the hook "
        "makes of it, the output of '1'"
    )
    model = _hooked(inplace)
    refused = pytest.raises(EditError, match=f"^{re.escape(text)}$")
    with capture(model, edit={("0", "activation"): edits.zero()}), refused:
        model(torch.randn(2, 3))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("grads", [False, True])
def test_other_edits_beside_such_a_hook(inplace: bool, grads: bool) -> None:
    model, bare = _hooked(inplace), _hooked(inplace)
    change = {("0", "preactivation"): edits.add(1.0), ("1", "output"): edits.scale(3.0)}
    kinds = ("preactivation", "activation", "output")
    with torch.set_grad_enabled(grads), capture(model, kinds=kinds, edit=change) as maps:
        for _ in range(3):
            x = torch.randn(2, 3)
            z = bare[0](x)
            a = (z + 1.0).relu()
            assert torch.equal(model(x), bare[2](a * 2 * 3.0))
            assert torch.equal(maps["0", "preactivation"].tensor, z)
            assert torch.equal(maps["0"].tensor, a)
            assert torch.equal(maps["1", "output"].tensor, a * 2)


@pytest.mark.parametrize("edit", [edits.add(0.5), edits.set(torch.tensor(2.7))])
def test_fractions_are_not_cut_to_the_whole_numbers_of_a_map(edit: Any) -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    ids = torch.tensor([[1, 2, 3]])
    with (
        pytest.raises(
            EditError, match=r"would be cut to the torch.int64 of the input of layer '0'"
        ),
        capture(model, edit={("0", "input"): edit}),
    ):
        model(ids)
    with capture(model, edit={("0", "input"): edits.add(1)}), torch.no_grad():
        moved = model(ids)
    assert torch.equal(moved, model[1](model[0](ids + 1)))
