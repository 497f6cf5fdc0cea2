"""Mixed precision, other dtypes and layouts, inference mode: maps as they are, the model untouched.

Truth: a bare copy beside, under the witness of tests/truth.py.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmapkit import CaptureWarning, MapOverwrittenError, capture
from tests import truth
from tests.strategies import Model, models
from tests.truth import same_bits

PASSES = 3
Mode = Callable[[], AbstractContextManager[Any]]


def cast(dtype: torch.dtype, enabled: bool = True) -> Mode:
    return lambda: torch.autocast("cpu", dtype, enabled=enabled)


def both(*modes: Mode) -> Mode:
    @contextlib.contextmanager
    def entered() -> Any:
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode())
            yield

    return entered


MODES: dict[str, Mode] = {
    "plain": contextlib.nullcontext,
    "bf16": cast(torch.bfloat16),
    "fp16": cast(torch.float16),
    "inference": torch.inference_mode,
    "inference bf16": both(torch.inference_mode, cast(torch.bfloat16)),
    "no grad fp16": both(torch.no_grad, cast(torch.float16)),
    "bf16, off inside": both(cast(torch.bfloat16), cast(torch.bfloat16, enabled=False)),
}


class ConvNet(nn.Module):
    """In place where it can be; a norm that autocast runs in float32; a change of dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv1(x)))
        y = self.conv2(x)
        y += x
        y = F.silu(y, inplace=True).mean((2, 3))
        return torch.sigmoid(self.fc(y).float())


def image(step: int) -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))


def run(
    model: nn.Module, x: Tensor, mode: Mode, step: int, train: bool, witness: bool = False
) -> truth.Pass:
    with mode():
        train = train and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return truth.run_pass(model, (x,), train=train, seed_=step, witness=witness)


def assert_layout(maps: Any, runs: list[truth.Run]) -> None:
    """Each map of a pair has the strides that the model's own tensor had."""
    for pair, true in zip(truth.captured_pairs(maps), runs, strict=True):
        for mine, theirs in ((pair.z, true.z), (pair.a, true.a)):
            assert mine.dtype == theirs.dtype
            assert mine.stride() == theirs.stride()


# -- a model by hand, in every mode ----------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_modes_take_turns(dtype: torch.dtype, train: bool, layout: Any) -> None:
    model = ConvNet().train(train).to(dtype).to(memory_format=layout)
    bare = copy.deepcopy(model)
    names = list(MODES) if dtype == torch.float32 else ["plain", "inference"]
    with capture(model) as maps:
        for step, name in enumerate(names * 2 + names[::-1]):
            x = image(step).to(dtype).to(memory_format=layout)
            true = run(bare, x, MODES[name], step, train, witness=True)
            seen = run(model, x, MODES[name], step, train)
            truth.assert_same_pass(true, seen)
            truth.assert_captured_exactly_once(maps, true.truth)
            assert_layout(maps, true.truth)
            assert maps["conv2"].tensor.is_contiguous(memory_format=layout)
            assert not maps.missed
    truth.assert_nothing_left(truth.fingerprint(bare), model)


def test_the_dtype_is_the_one_it_was() -> None:
    model = ConvNet()
    with capture(model, kinds=("input", "response", "preactivation", "activation")) as maps:
        for step in range(PASSES):
            with torch.autocast("cpu", torch.bfloat16):
                model(image(step))
            assert maps["conv1", "input"].dtype == torch.float32
            assert maps["conv1", "response"].dtype == torch.bfloat16
            assert maps["conv2"].dtype == torch.bfloat16
            assert maps["fc", "response"].dtype == torch.bfloat16
            assert maps["fc", "preactivation"].dtype == torch.float32  # after .float()
            assert maps["fc"].dtype == torch.float32


def test_picked_filters_keep_the_layout() -> None:
    model = ConvNet().to(memory_format=torch.channels_last)
    with capture(model, layers="conv*", filters=[1, 5, 2]) as maps:
        for step in range(PASSES):
            model(image(step).to(memory_format=torch.channels_last))
            for fm in maps:
                assert fm.tensor.is_contiguous(memory_format=torch.channels_last)


def test_a_gradient_scaler_sees_the_same() -> None:
    model = ConvNet()
    bare = copy.deepcopy(model)

    def trained(net: nn.Module, step: int, state: Any) -> Tensor:
        optimizer, scaler = state
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = net(image(step)).square().mean() * (float("inf") if step == 2 else 1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    def tools(net: nn.Module) -> Any:
        return torch.optim.SGD(net.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=64.0)

    mine, theirs = tools(model), tools(bare)
    with capture(model, gradients=True) as maps:
        for step in range(5):
            assert same_bits(trained(model, step, mine), trained(bare, step, theirs))
            for p, q in zip(model.parameters(), bare.parameters(), strict=True):
                assert same_bits(p, q)
            assert mine[1].get_scale() == theirs[1].get_scale()
            assert maps["conv2"].grad is not None  # of the scaled loss, in the map's dtype
            assert maps["conv2"].grad.dtype == maps["conv2"].dtype == torch.float16
    assert mine[1].get_scale() != 64.0


# -- what depends on dtype and layout --------------------------------------------------------------


class Casts(nn.Module):
    """Each of these is the same memory or a copy of it, as dtype, layout and autocast have it."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Conv2d(4, 2, 1)
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        a = torch.sigmoid(z)
        if self.by == "float":
            z.float().mul_(2)
        elif self.by == "to":
            z.to(torch.bfloat16).mul_(2)
        elif self.by == "contiguous":
            z.contiguous().mul_(2)
        elif self.by == "reshape":
            z.reshape(-1).mul_(2)
        elif self.by == "σ":
            F.relu_(z.flatten(1))
        return self.fc(a) + z.sum()


@pytest.mark.parametrize("by", ["float", "to", "contiguous", "reshape", "σ"])
@pytest.mark.parametrize("how", ["autocast", "input", "weights", "dtype", "no grad"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_cast_that_copies_in_one_pass_and_not_in_the_next(how: str, by: str, first: int) -> None:
    model = Casts(by).requires_grad_(False)
    bare = copy.deepcopy(model)
    with capture(model, kinds=("response", "preactivation", "activation")) as maps:
        for step in range(6):
            odd = step % 2 == first
            x, mode = image(step), contextlib.nullcontext
            for net in (model, bare):
                if how == "weights":
                    net.to(memory_format=torch.channels_last if odd else torch.contiguous_format)
                elif how == "dtype":
                    net.to(torch.bfloat16 if odd else torch.float32)
                    x = x.to(torch.bfloat16 if odd else torch.float32)
                elif how == "input":
                    x = x.to(memory_format=torch.channels_last) if odd else x
            if how == "autocast":
                mode = cast(torch.bfloat16, enabled=odd)
            elif how == "no grad":
                mode = torch.inference_mode if odd else torch.no_grad
            true = run(bare, x, mode, step, train=False, witness=True)
            seen = run(model, x, mode, step, train=False)
            truth.assert_same_pass(true, seen)
            truth.assert_captured_exactly_once(maps, true.truth)
            z = maps.select(layer="conv", kind="response")[0].tensor
            with mode():
                assert same_bits(z, bare.conv(x))


def test_weights_of_another_dtype_below_inputs_of_the_same() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.fc = nn.Linear(4, 4)

        def forward(self, words: Tensor) -> Tensor:
            z = self.fc(self.embed(words))
            a = torch.sigmoid(z)
            z.float().mul_(2)
            return a + z

    model = Words()
    bare = copy.deepcopy(model)
    words = torch.arange(5).view(1, 5)
    with capture(model) as maps:
        for step in range(6):
            for net in (model, bare):
                net.to(torch.float32 if step % 2 else torch.bfloat16)
            true = run(bare, words, torch.no_grad, step, False, True)
            truth.assert_same_pass(true, run(model, words, torch.no_grad, step, False))
            truth.assert_captured_exactly_once(maps, true.truth)


def test_a_shared_activation_that_two_units_tap_differently() -> None:
    class Overwrites(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.act = act

        def forward(self, x: Tensor) -> Tensor:
            a = self.act(self.fc(x))
            a += 1
            return a

    class Leaves(Overwrites):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.fc(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            act = nn.Tanh()
            self.one, self.two = Overwrites(act), Leaves(act)

        def forward(self, x: Tensor) -> Tensor:
            x = self.two(self.one(x))
            return x if x.isnan().any() else x * 2

    model = Net()
    with capture(model) as maps, torch.no_grad():
        for step in range(PASSES + 1):
            with truth.Witness(model) as witness:
                model(torch.randn(2, 4, generator=torch.Generator().manual_seed(step)))
            truth.assert_captured_exactly_once(maps, witness.runs)
            assert not maps.missed


# -- any model, any precision ----------------------------------------------------------------------


@settings(max_examples=30)
@given(models(), st.lists(st.sampled_from(list(MODES)), min_size=2, max_size=5), st.booleans())
def test_any_model_in_any_mode(drawn: Model, names: list[str], train: bool) -> None:
    model = drawn.build().train(train)
    bare = copy.deepcopy(model)
    with _quiet(), capture(model) as maps:
        for step, name in enumerate([*names, names[0]]):
            x = drawn.inputs(step)
            true = _bare(lambda s=step, n=name, i=x: run(bare, i.clone(), MODES[n], s, train, True))
            assume(true is not None)
            seen = run(model, x.clone(), MODES[name], step, train)
            truth.assert_same_pass(true, seen)
            truth.assert_captured_exactly_once(maps, true.truth)
    truth.assert_nothing_left(truth.fingerprint(bare), model)


@settings(max_examples=25)
@given(models(), st.sampled_from([1, 2, 3]), st.sampled_from(["half", "double", "channels_last"]))
def test_a_model_that_is_converted_between_passes(drawn: Model, at: int, how: str) -> None:
    model = drawn.build().eval()
    bare = copy.deepcopy(model)

    def convert(value: Any) -> Any:
        if how == "channels_last":
            four = not isinstance(value, Tensor) or value.dim() == 4
            return value.to(memory_format=torch.channels_last) if four else value
        return value.to(torch.float16 if how == "half" else torch.float64)

    with _quiet(), capture(model) as maps, torch.no_grad():
        for step in range(5):
            x = drawn.inputs(step)
            if step == at:
                convert(model)
                convert(bare)
            x = convert(x) if step >= at else x
            true = _bare(lambda s=step, i=x: run(bare, i.clone(), MODES["plain"], s, False, True))
            assume(true is not None)
            truth.assert_same_pass(true, run(model, x.clone(), MODES["plain"], step, False))
            truth.assert_captured_exactly_once(maps, true.truth)


def _bare(make: Callable[[], truth.Pass]) -> truth.Pass | None:
    """A pass of the bare model; None where torch refuses the drawn model in this mode."""
    try:
        return make()
    except RuntimeError as error:
        for reason in ("inplace", "in-place", "does not require grad", "must have the same dtype"):
            if reason in str(error):
                return None
        for reason in ("can't be cast", "expected scalar type", "not implemented for", "dtype"):
            if reason in str(error):
                return None
        if "expected a non-empty" in str(error) or "Expected more than 1 value" in str(error):
            return None
        raise


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        yield


# -- inference mode: writes that torch does not count ----------------------------------------------


def unharmed(maps: Any, before: list[Any], counted: bool = False) -> None:
    """The maps are what they were; where torch counts writes, they may refuse to be read."""
    for (step, layer, kind, call, sigma), value in before:
        try:
            (fm,) = maps.select(layer=layer, kind=kind, call=call, step=step, nonlinearity=sigma)
        except MapOverwrittenError:
            assert counted
            continue
        assert same_bits(fm.tensor, value), (layer, kind, step)


def remembered(maps: Any, step: int | None = None) -> list[Any]:
    return [
        ((fm.step, fm.layer, fm.kind, fm.call, fm.nonlinearity), fm.tensor.clone())
        for fm in maps.select(step=step)
    ]


def scribble(*values: Any) -> None:
    for tensor in truth.tensors_of(values):
        if tensor.is_floating_point():
            tensor.add_(1).mul_(-3)


class Keeps(nn.Module):
    """Everything that leaves memory of a pass within somebody's reach."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("buffer", torch.zeros(2, 4))
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        a = self.act(x)  # z is the caller's
        b = torch.tanh(self.fc(a))
        self.kept[:] = [b[:, :2]]  # a view, put away
        self.buffer.copy_(self.fc(b))
        c = torch.sigmoid(self.buffer)  # z is the model's, and the next pass writes to it
        return c.view(-1), {"c": c[:1], "b": b * 2}


class Proven(nn.Module):
    """The same as far as a proof allows: one unit from end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("buffer", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.tanh(self.fc(self.act(x)))
        self.buffer.copy_(self.fc(a))
        c = torch.sigmoid(self.buffer)
        return c.view(-1), c[:1]


@pytest.mark.parametrize("options", [{}, {"keep": 2}, {"keep": "all"}, {"every": 2}])
@pytest.mark.parametrize("net", [Keeps, Proven])
def test_inference_maps_survive_every_write(net: type[nn.Module], options: Any) -> None:
    with torch.inference_mode():
        model = net()
    expected: list[Any] = []
    with torch.inference_mode():
        with capture(model, **options) as maps:
            for step in range(5):
                x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
                out = model(x)
                if maps.select(step=step):
                    expected = remembered(maps)
                scribble(x, out, list(model.buffers()), getattr(model, "kept", []))
                unharmed(maps, expected)
        for _ in range(2):  # after the block, too
            model(torch.randn(2, 4))
            unharmed(maps, expected)
    assert not maps.missed


def test_a_pass_that_failed_in_inference_mode() -> None:
    class Fails(Proven):
        def forward(self, x: Tensor) -> Any:
            super().forward(x)
            raise ValueError("the pass fails")

    with torch.inference_mode():
        model = Fails()
    with torch.inference_mode(), capture(model) as maps:
        for _ in range(PASSES):
            x = torch.randn(2, 4)
            with pytest.raises(ValueError, match="the pass fails"):
                model(x)
            expected = remembered(maps)
            assert expected
            scribble(x, list(model.buffers()))
            unharmed(maps, expected)


@pytest.mark.parametrize("quick", [True, False])
def test_inference_mode_inside_a_forward(quick: bool) -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.act = nn.Tanh()
            self.head = nn.Linear(4, 4)
            self.last = nn.Sigmoid()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.inference_mode():
                h = self.encoder(x)
            return h, self.last(self.head(self.act(h).clone()))

    class Functional(Frozen):  # its own forward is looked at in another way
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.inference_mode():
                h = self.encoder(x)
            return h, torch.sigmoid(self.head(self.act(h).clone()))

    model = Frozen() if quick else Functional()
    for gradients in (False, True):
        for mode in (torch.no_grad, torch.enable_grad):
            with mode(), capture(model, gradients=gradients) as maps:
                for _ in range(PASSES):
                    with truth.Witness(model) as witness:
                        h, _ = model(torch.randn(2, 4))
                    truth.assert_captured_exactly_once(maps, witness.runs)
                    expected = remembered(maps)
                    with torch.inference_mode():
                        scribble(h)
                    unharmed(maps, expected)
                    assert not maps.missed


def test_nothing_is_copied_that_nobody_can_reach() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.inference_mode(), capture(model, keep=2) as maps:
        for step in range(PASSES):
            model(torch.randn(2, 4))
            only_the_output = 2 * 4 * 4
            assert maps.bytes_copied <= only_the_output or step == 0


@settings(max_examples=25)
@given(models(), st.sampled_from([torch.inference_mode, torch.no_grad]), st.sampled_from([1, 2]))
def test_any_model_and_writes_to_all_in_reach(drawn: Model, mode: Any, keep: int) -> None:
    model = drawn.build().eval()
    with _quiet(), mode(), capture(model, keep=keep) as maps:
        for step in range(4):
            x = drawn.inputs(step)
            out = model(x)
            expected = remembered(maps, step)
            scribble(x, out, list(model.buffers()))
            unharmed(maps, _told_apart(expected), counted=mode is torch.no_grad)


def _told_apart(expected: list[Any]) -> list[Any]:
    """Maps whose tags are their own: a scope may use one layer's filters twice."""
    tags = [key for key, _ in expected]
    return [(key, value) for key, value in expected if tags.count(key) == 1]


@pytest.mark.parametrize("write", ["foreach", "out", "setitem", "data", "alias", "numpy", "init"])
def test_writes_inside_an_inference_pass(write: str) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.fc(x)
            a = torch.sigmoid(z)
            if write == "foreach":
                torch._foreach_add_([z, a], 1.0)
            elif write == "out":
                torch.add(z, 1.0, out=z)
                torch.mul(a, 2.0, out=a)
            elif write == "setitem":
                z[0] = 5
                a[:, 1:] = 3
            elif write == "data":
                z.data.mul_(2)
                a.data.copy_(z)
            elif write == "alias":
                z.detach().view(-1).neg_()
                a.unbind(0)[0].zero_()
            elif write == "numpy":
                z.numpy()[:] = 3
            elif write == "init":
                nn.init.ones_(z)
            return z + a

    model = Writes()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), capture(model) as maps:
            for step in range(PASSES):
                x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
                model(x)
                z = F.linear(x, model.fc.weight, model.fc.bias)
                assert same_bits(maps["fc", "preactivation"].tensor, z)
                assert same_bits(maps["fc"].tensor, torch.sigmoid(z))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_on_a_gpu(dtype: torch.dtype) -> None:
    model = ConvNet().cuda().to(memory_format=torch.channels_last)
    bare = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cuda")
    with capture(model, gradients=True) as maps:
        for step in range(PASSES):
            x = image(step).cuda().to(memory_format=torch.channels_last)
            with torch.autocast("cuda", dtype), truth.Witness(bare) as witness:
                true = bare(x)
            with torch.autocast("cuda", dtype):
                out = model(x)
            assert same_bits(out, true)
            truth.assert_captured_exactly_once(maps, witness.runs)
            assert maps["conv2"].tensor.is_contiguous(memory_format=torch.channels_last)
            scaler.scale(out.float().square().sum()).backward()
            assert maps["conv2"].grad.dtype == dtype
