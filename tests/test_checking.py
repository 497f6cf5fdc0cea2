"""`capture(check=...)`, `maps.first_nonfinite()`: the first NaN, against hooks written by hand."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from fmapkit import ArgumentError, CaptureWarning, NonFiniteError, capture, edits
from tests.checks import needs_compiled
from tests.truth import assert_nothing_left, assert_same_pass, fingerprint, run_pass, seed

NAN, INF = math.nan, math.inf


class Net(nn.Module):
    """conv1 - norm - relu (in place) - conv2 - relu - fc."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = norm(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv1(x)))
        return self.fc(self.relu(self.conv2(x)).mean((2, 3)))


def image(step: int = 0) -> Tensor:
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))


def found(
    model: nn.Module,
    spoil: Callable[[], object],
    at: int,
    backward: bool = False,
    make: Callable[[int], Tensor] = image,
    **options: Any,
) -> NonFiniteError:
    """What is raised, in pass `at`, when the model was spoilt before it; earlier ones are fine."""
    options = {"check": "finite", **options}
    with capture(model, **options) as maps:
        for step in range(at):
            out = model(make(step))
            if out.requires_grad:
                out.sum().backward()
        spoil()
        if backward:
            out = model(make(at))
            with pytest.raises(NonFiniteError) as caught:
                out.sum().backward()
        else:
            with pytest.raises(NonFiniteError) as caught:
                model(make(at))
        if maps.layers:
            assert maps[maps.layers[0], "preactivation"].step == at  # the pass can be read
    return caught.value


def place(error: NonFiniteError) -> tuple[Any, ...]:
    return error.layer, error.kind, error.filter, error.call, error.step


PASSES = (0, 1, 3)  # learned, read by taps for the first time, and later on


# -- who is named ---------------------------------------------------------------------------------


@pytest.mark.parametrize("at", PASSES)
@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("conv1.weight", ("conv1", "response", 2)),
        ("norm.weight", ("norm", "output", 2)),  # and not conv1, whose z is the first held
        ("conv2.bias", ("conv2", "response", 2)),
        ("fc.bias", ("fc", "response", 1)),
    ],
)
def test_the_guilty_one(part: str, named: tuple[str, str, int], at: int) -> None:
    seed(0)
    model = Net().eval()
    weight = model.get_parameter(part)

    def spoil() -> None:
        with torch.no_grad():
            weight[named[2]] = NAN

    assert place(found(model, spoil, at)) == (*named, 0, at)


@pytest.mark.parametrize("at", PASSES)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d, lambda n: nn.GroupNorm(2, n)])
@pytest.mark.parametrize("training", [True, False])
def test_norms(norm: Any, training: bool, at: int) -> None:
    seed(0)
    options = {"affine": True} if norm is nn.InstanceNorm2d else {}
    model = Net(lambda n: norm(n, **options)).train(training)

    def spoil() -> None:
        with torch.no_grad():
            model.norm.weight[3] = INF

    error = found(model, spoil, at)
    assert place(error) == ("norm", "output", 3, 0, at)


@pytest.mark.parametrize("at", PASSES)
def test_a_norm_that_is_a_function(at: int) -> None:
    """No module has made the value: the map is named, and that the response was finite."""

    class Functional(Net):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(F.layer_norm(self.conv1(x), (5, 5)) * self.scale)
            return self.fc(F.relu(self.conv2(x)).mean((2, 3)))

    seed(0)
    model = Functional()
    error = found(model, lambda: setattr(model, "scale", INF), at)
    assert place(error) == ("conv1", "preactivation", 0, 0, at)
    assert error.found is not None
    assert error.found.response_finite
    assert "the response of that layer is finite, so what stands between" in str(error)


@pytest.mark.parametrize("at", PASSES)
def test_the_data(at: int) -> None:
    seed(0)
    model = Net()

    def make(step: int) -> Tensor:
        x = image(step)
        if step == at:
            x[1, 2, 0, 0] = NAN
        return x

    error = found(model, lambda: None, at, make=make)
    assert place(error) == ("conv1", "input", 2, 0, at)
    assert str(error) == (
        f"the input of layer 'conv1' (step {at}, call 0) has a NaN in filter 2, the first of the "
        "pass; nothing came before it"
    )


class Poison(nn.Module):
    """Gives back what it is given, but for one filter in one of its calls; on one path."""

    calls: Tensor

    def __init__(self, filter: int, call: int, value: float) -> None:
        super().__init__()
        self.filter, self.call, self.value = filter, call, value
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        poisoned = torch.zeros_like(x)
        poisoned[-1, self.filter] = self.value
        return x + torch.where(self.calls == self.call, poisoned, torch.zeros_like(x))


def first_by_hooks(model: nn.Module, x: Tensor) -> tuple[str, int, int] | None:
    """Module, filter and call of the first output that is not finite, by hand-written hooks."""
    seen: list[tuple[str, int, Tensor]] = []
    calls: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():

        def hook(_m: nn.Module, _a: Any, out: Tensor, name: str = name) -> None:
            calls[name] = calls.get(name, -1) + 1
            seen.append((name, calls[name], out.detach().clone()))

        handles.append(module.register_forward_hook(hook))
    model(x)
    for handle in handles:
        handle.remove()
    for name, call, out in seen:
        wrong = ~out.isfinite()
        if wrong.any():
            axes = [d for d in range(out.dim()) if d != 1]
            return name, int(wrong.any(axes).nonzero()[0]), call
    return None


@settings(deadline=None, max_examples=12)
@given(
    place_=st.integers(1, 5),
    filter=st.integers(0, 3),
    call=st.integers(1, 7),
    value=st.sampled_from([NAN, INF, -INF]),
    training=st.booleans(),
)
def test_against_hooks_by_hand(
    place_: int, filter: int, call: int, value: float, training: bool
) -> None:
    """A poisoned module somewhere in a net with shared parts, in one of its calls."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            seed(1)
            poison = Poison(filter, call, value)
            parts = [
                nn.Conv2d(4, 4, 1),
                nn.BatchNorm2d(4),
                nn.ReLU(inplace=True),
                nn.Conv2d(4, 4, 3, padding=1),
                nn.Hardtanh(),
            ]
            parts.insert(place_, poison)
            self.body = nn.Sequential(*parts)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.body(x).sin() * 2)

    def inputs(step: int) -> Tensor:
        return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(step))

    model, by_hand = Shared().train(training), Shared().train(training)
    with capture(model, check="finite") as maps:
        for step in range(3):
            expected = first_by_hooks(by_hand, inputs(step))
            try:
                model(inputs(step))
                got = None
            except NonFiniteError as error:
                got = error
            if expected is None:
                assert got is None
                continue
            assert got is not None
            name, which, at = expected
            assert (got.filter, got.call, got.step) == (which, at, step)
            assert got.layer == name  # conv, norm, poison: what it returns is seen first
            assert got.found is not None
            assert math.isnan(got.found.value) == math.isnan(value) or name != f"body.{place_}"
        assert not maps.missed


def test_path_of_a_nested_output() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.spoilt = False

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.fc(x)
            return {"good": y, "bad": [y / (0 if self.spoilt else 1)]}

    seed(0)
    model = Pair()
    with capture(model, check="finite"):
        model(torch.ones(2, 3))
        model.spoilt = True
        with pytest.raises(NonFiniteError) as caught:
            model(torch.ones(2, 3))
    assert caught.value.found is not None
    assert caught.value.found.path == "['bad'][0]"
    assert str(caught.value).startswith("the output['bad'][0] of the model (step 1, call 0) has ")


@pytest.mark.parametrize("at", PASSES)
def test_the_largest_finite_value_before_it(at: int) -> None:
    """2e19² is 4e38, beyond float32: the activation before it has 2e19, by hand."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        for lin in (model[0], model[2]):
            lin.weight.copy_(torch.eye(2))
            lin.bias.zero_()

    def spoil() -> None:
        with torch.no_grad():
            model[0].weight[0, 0] = -2e19
            model[0].weight[1, 1] = 2e19
            model[2].weight[1, 1] = 2e19

    error = found(model, spoil, at, make=lambda _: torch.ones(3, 2))
    assert place(error) == ("2", "response", 1, 0, at)
    assert error.found is not None
    assert error.found.value == INF
    assert error.found.largest == torch.tensor(2e19).item()
    assert error.found.largest_in == "the response of layer '0'"
    assert str(error) == (
        f"the response of layer '2' (step {at}, call 0) has +inf in filter 1, the first of the "
        "pass; the largest finite value before it is 2e+19, in the response of layer '0'"
    )


# -- backward -------------------------------------------------------------------------------------


class BadBackward(torch.autograd.Function):
    """Identity, to whose gradient a value is added in filter 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        ctx.value = value.clone()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.clone()
        grad[:, 1] += ctx.value
        return grad, None


class Bad(Net):
    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv1(x)))
        x = BadBackward.apply(x, self.value)
        return self.fc(self.relu(self.conv2(x)).mean((2, 3)))


@pytest.mark.parametrize("at", PASSES)
def test_backward(at: int) -> None:
    seed(0)
    model = Bad()
    error = found(model, lambda: model.value.fill_(INF), at, backward=True)
    assert place(error) == ("conv1", "activation", 1, 0, at)
    assert error.found is not None
    assert error.found.gradient
    assert str(error).startswith(
        f"the gradient of the activation of layer 'conv1' (step {at}, call 0) has +inf in filter "
        "1, the first in backward; the largest finite value before it is 1, in the gradient of the "
    )


def test_backward_of_sqrt_at_zero() -> None:
    """The commonest one: the forward is finite, d√x/dx at 0 is not; and 0·inf is NaN."""

    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(x)).square().sum(1).sqrt()

    model = Norms()
    with torch.no_grad():
        model.fc.weight.fill_(-1)  # a = 0 everywhere
    with capture(model, check="finite"):
        out = model(torch.ones(2, 2))
        with pytest.raises(NonFiniteError) as caught:
            out.sum().backward()
    assert (caught.value.layer, caught.value.kind) == ("fc", "activation")
    assert caught.value.found is not None
    assert caught.value.found.gradient
    with capture(model, check="finite-forward"):
        model(torch.ones(2, 2)).sum().backward()


def test_gradients_after_the_block_are_nobodys_business() -> None:
    seed(0)
    model = Bad()
    model.value.fill_(INF)
    with capture(model, check="finite"):
        out = model(image())
    out.sum().backward()
    model.zero_grad()
    with capture(model, check="finite"):
        model(image())
        with torch.no_grad():
            model(image())
    assert all(p.grad is None for p in model.parameters())


def test_several_backwards_and_double_backward() -> None:
    seed(0)
    model = Bad()
    with capture(model, check="finite"):
        one, two = model(image(0)), model(image(1))
        (one.sum() + two.sum()).backward(retain_graph=True)
        one.sum().backward()
        x = image(2).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        grad.square().sum().backward()
        model.value.fill_(INF)
        out = model(image(3))
        for _ in range(2):
            with pytest.raises(NonFiniteError) as caught:
                out.sum().backward(retain_graph=True)
            assert caught.value.step == 3


def test_checkpointing() -> None:
    class Checked(Bad):
        def forward(self, x: Tensor) -> Tensor:
            run = super().forward
            return checkpoint(run, x, use_reentrant=False)

    seed(0)
    model = Checked()
    error = found(model, lambda: model.value.fill_(INF), 2, backward=True)
    assert (error.layer, error.kind, error.filter) == ("conv1", "activation", 1)


# -- the model cannot tell ------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_and_state_are_the_same(training: bool) -> None:
    seed(0)
    bare, watched = Net().train(training), Net().train(training)
    watched.load_state_dict(bare.state_dict())
    before = fingerprint(watched)
    expected = [run_pass(bare, [image(step)], train=training) for step in range(3)]
    with capture(watched, check="finite"):
        for step, one in enumerate(expected):
            assert_same_pass(one, run_pass(watched, [image(step)], train=training))
    assert_nothing_left(before, watched)


def test_nothing_stays_after_an_error() -> None:
    seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.norm.bias[0] = NAN
    before = fingerprint(model)
    for _ in range(2):
        with pytest.raises(NonFiniteError), capture(model, check="finite"):
            model(image())
        assert_nothing_left(before, model)
    out = model(image())
    assert not out.isfinite().all()
    pickle.dumps(model)
    copy.deepcopy(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("at", PASSES)
def test_without_gradients(mode: Any, at: int) -> None:
    seed(0)
    model = Net().eval()

    def spoil() -> None:
        model.norm.bias.data[1] = -INF

    with mode():
        error = found(model, spoil, at)
    assert place(error) == ("norm", "output", 1, 0, at)


def test_one_flag_is_read_a_pass_and_one_a_backward() -> None:
    """What would make a GPU wait: values that become Python's, counted by torch's profiler."""
    seed(0)
    model = Net()
    with capture(model, check="finite"):
        for step in range(3):
            model(image(step)).sum().backward()
        with profile(activities=[ProfilerActivity.CPU]) as forward:
            out = model(image(3))
        with profile(activities=[ProfilerActivity.CPU]) as backward:
            out.sum().backward()
    for seen in (forward, backward):
        counts = {event.key: event.count for event in seen.key_averages()}
        reads = {
            key: n
            for key, n in counts.items()
            if key in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        }
        assert reads == {"aten::_local_scalar_dense": 1}


def test_memory_that_is_used_again_is_looked_at_again() -> None:
    """Without gradients, one map's memory is the next one's: it is no map seen already."""
    seed(0)
    parts: list[nn.Module] = []
    for _ in range(6):
        parts += [nn.Linear(64, 64), nn.Tanh()]
    model = nn.Sequential(*parts)
    for at in range(6):
        spoilt = copy.deepcopy(model)
        with torch.no_grad():
            spoilt[2 * at].bias[at] = NAN
            with pytest.raises(NonFiniteError) as caught, capture(spoilt, check="finite"):  # noqa: PT012
                for _ in range(3):
                    spoilt(torch.zeros(32, 64))
        assert (caught.value.layer, caught.value.filter) == (str(2 * at), at)


# -- what else there may be -----------------------------------------------------------------------


def test_what_the_model_fails_of_is_named() -> None:
    class Samples(Net):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            torch.multinomial(logits.softmax(-1), 1)
            return logits

    seed(0)
    model = Samples()
    with torch.no_grad():
        model.conv2.weight[4] = NAN
    for before in (0, 2):
        good = copy.deepcopy(model.conv2.weight.data)
        model.conv2.weight.data = torch.zeros_like(good)
        with pytest.raises(NonFiniteError) as caught, capture(model, check="finite"):  # noqa: PT012
            for step in range(before):
                model(image(step))
            model.conv2.weight.data = good
            model(image())
        assert place(caught.value) == ("conv2", "response", 4, 0, before)
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_other_errors_are_the_users_own() -> None:
    seed(0)
    model = Net()
    with pytest.raises(ZeroDivisionError), capture(model, check="finite"):  # noqa: PT012
        model(image())
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="channels"), capture(model, check="finite"):
        model(torch.zeros(1, 7, 5, 5))
    with torch.no_grad():
        model.norm.bias[0] = NAN
    with pytest.raises(ZeroDivisionError), capture(model, check="finite"):  # noqa: PT012
        with pytest.raises(NonFiniteError):
            model(image())
        raise ZeroDivisionError  # it was told already
    with pytest.raises(KeyboardInterrupt), capture(model, check="finite"):
        raise KeyboardInterrupt


def test_only_some_layers_and_every_nth_pass() -> None:
    seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.norm.bias[0] = NAN
    with capture(model, "fc", check="finite"), pytest.raises(NonFiniteError) as caught:
        model(image())
    assert (caught.value.layer, caught.value.kind) == ("fc", "input")
    with capture(model, every=2, check="finite"):
        for step in range(4):
            if step % 2:
                model(image(step))
                continue
            with pytest.raises(NonFiniteError) as caught:
                model(image(step))
            assert caught.value.step == step


def test_other_options_go_with_it() -> None:
    """What is held is what was asked for: not a map more, nor another form."""
    seed(0)
    model = Net()
    options: list[dict[str, Any]] = [
        {"kinds": "activation"},
        {"layers": "conv1"},
        {"layers": "norm", "keep": 2},
        {"keep": "all", "gradients": True},
        {"detach": False},
        {"max_bytes": 10**6},
    ]
    for given_ in options:
        with capture(model, **given_) as bare:
            model(image())
        with capture(model, **given_, check="finite") as maps:
            for step in range(3):
                model(image(step)).sum().backward()
                assert maps.layers == bare.layers
                assert maps.nbytes == bare.nbytes * min(step + 1, _kept(given_))
        assert [(fm.layer, fm.kind, fm.filters) for fm in bare] == [
            (fm.layer, fm.kind, fm.filters) for fm in maps
        ]
        asked = bool(given_.get("gradients"))
        assert any(fm.grad is not None for fm in maps) == asked or not given_.get("detach", True)
        assert not maps.missed


def _kept(options: dict[str, Any]) -> int:
    keep = options.get("keep", 1)
    return 99 if keep == "all" else int(keep)


def test_analyses_see_what_was_asked_for_alone() -> None:
    class Sees:
        def __init__(self) -> None:
            self.seen: list[tuple[int, str, str]] = []

        def update(self, fm: Any) -> None:
            self.seen.append((fm.step, fm.layer, fm.kind))

    seed(0)
    model = Net().eval()
    for options in ({"keep": 0}, {"keep": 1}):
        with_, without = Sees(), Sees()
        for analysis, check in ((without, None), (with_, "finite")):
            with capture(model, analyses=analysis, check=check, **options):  # type: ignore[arg-type]
                for step in range(3):
                    model(image(step))
        assert with_.seen == without.seen
        assert len(with_.seen) == 15
    model.norm.bias.data[1] = NAN
    with capture(model, analyses=Sees(), keep=0, check="finite") as maps:
        for step in range(3):
            with pytest.raises(NonFiniteError) as caught:
                model(image(step))
            assert place(caught.value) == ("norm", "output", 1, 0, step)
    assert maps.nbytes == 0
    with capture(model, keep=0, check="finite") as maps:  # and nobody else looks at them
        with pytest.raises(NonFiniteError):
            model(image())
        assert len(maps) == 0


def test_outputs_of_a_module_that_is_gone_stay() -> None:
    """Without a check, what is held is what was asked for, whatever the model is now."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with capture(model, kinds="output", keep="all") as maps:
        model(torch.ones(1, 2))
        del model[1]
        model(torch.ones(1, 2))
    assert [(fm.layer, fm.step) for fm in maps.select("1")] == [("1", 0)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"filters": [1]}, "filters="),
        ({"dtype": torch.float16}, "dtype= or device="),
        ({"device": "cpu"}, "dtype= or device="),
    ],
)
def test_maps_of_another_form_take_a_capture_of_their_own(
    options: dict[str, Any], named: str
) -> None:
    seed(0)
    model = Net().eval()
    with pytest.raises(ArgumentError) as caught:
        capture(model, check="finite", **options)
    assert str(caught.value) == (
        f"check= looks at maps as the model makes them, and {named} holds others: put the check "
        "into a capture of its own, `with capture(model, check=...), capture(model, ...)`"
    )
    with capture(model, check="finite"), capture(model, **options) as maps:
        model(image())
        model.norm.bias.data[1] = NAN
        with pytest.raises(NonFiniteError) as found_:
            model(image())
    assert place(found_.value) == ("norm", "output", 1, 0, 1)
    assert "conv1" in maps


def test_a_pass_that_takes_another_way_is_not_looked_at_and_named() -> None:
    """Its maps are nobody's: `maps.missed` says so, and the next pass is looked at again."""

    ways: list[int] = []

    class Branches(Net):
        def forward(self, x: Tensor) -> Tensor:
            if ways:
                x = x * NAN
            return super().forward(x)

    seed(0)
    model = Branches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model, check="finite") as maps:
            model(image(0))
            model(image(1))
            ways.append(1)
            model(image(2))
            assert [m.layer for m in maps.missed] == [""]
            assert "it took a way through its code" in maps.missed[0].reason
            with pytest.raises(NonFiniteError):
                model(image(3))


def test_an_edit_that_makes_one() -> None:
    seed(0)
    model = Net()
    model.relu = nn.ReLU()
    for kind in ("preactivation", "activation"):
        edit: Any = {("conv2", kind): edits.scale(INF)}
        with capture(model, edit=edit, check="finite"):
            for step in range(2):
                with pytest.raises(NonFiniteError) as caught:
                    model(image(step))
                assert (caught.value.layer, caught.value.step) in (("conv2", step), ("relu", step))


def test_masks_of_attention_are_no_maps() -> None:
    seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    assert mask.isinf().any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model, check="finite"):
            for _ in range(3):
                model(torch.randn(2, 5, 8), mask=mask).sum().backward()


def jagged(*parts: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(parts), layout=torch.jagged)


def test_maps_that_are_no_floats_or_have_no_values() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.fc(x)
            return {
                "whole": y.argmax(1),
                "bool": y > 0,
                "empty": y[:0],
                "scalar": y.sum(),
                "complex": torch.complex(y, y),
                "sparse": torch.eye(3).to_sparse(),
                "csr": torch.eye(3).to_sparse_csr(),
                "float8": y.detach().to(torch.float8_e4m3fn),
                "meta": torch.empty(3, device="meta"),
                "nested": jagged(torch.ones(2), torch.ones(3)),
                "quantized": torch.quantize_per_tensor(y.detach(), 0.1, 0, torch.qint8),
            }

    model = Odd()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with capture(model, check="finite"):
            for _ in range(3):
                model(torch.ones(2, 3))
    for path, bad in (
        ("complex", torch.tensor([1 + 1j, complex(0, INF)])),
        ("sparse", torch.tensor([NAN, 1.0]).to_sparse()),
        ("csr", torch.tensor([[NAN, 1.0]]).to_sparse_csr()),
        ("float8", torch.tensor([NAN, 1.0]).to(torch.float8_e4m3fn)),
        ("nested", jagged(torch.ones(2), torch.tensor([NAN]))),
        ("half", torch.tensor([1.0, INF]).half()),
    ):
        same = nn.Identity()
        with pytest.raises(NonFiniteError) as caught, capture(same, check="finite"):
            same(bad)
        assert caught.value.kind == "output", path


@needs_compiled
def test_a_compiled_model() -> None:
    seed(0)
    model = Net().eval()
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with capture(compiled, check="finite") as maps:
            compiled(image()).sum().backward()
            with torch.no_grad():
                model.norm.bias[2] = NAN
            with pytest.raises(NonFiniteError) as caught:
                compiled(image())
    assert place(caught.value) == ("conv1", "preactivation", 2, 0, 1)
    assert caught.value.found is not None
    assert caught.value.found.response_finite  # the norm itself is inside the graph
    ours = [str(w.message) for w in warned if w.category is CaptureWarning]
    assert ["looks at the forward alone" in text for text in ours] == [True]
    assert [m.reason for m in maps.missed] == [
        "check='finite' looks at the forward alone of a model that torch.compile has compiled: a "
        "gradient inside of compiled code is nobody's to see"
    ]
    with capture(compiled, check="finite-forward") as maps:
        pass
    assert not any("forward alone" in m.reason for m in maps.missed)


@pytest.mark.parametrize("check", ["nan", True, 1, ("finite",)])
def test_checks_that_there_are_not(check: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        capture(Net(), check=check)
    assert str(caught.value) == (
        f"check must be 'finite', 'finite-forward' (gradients left out) or None, not {check!r}"
    )


def test_a_check_and_an_early_stop() -> None:
    with pytest.raises(ArgumentError) as caught:
        capture(Net(), "conv1", stop=True, check="finite")
    assert str(caught.value) == "check= looks at whole passes, and stop=True ends them: give one"


# -- maps that are held ---------------------------------------------------------------------------


def test_first_nonfinite_of_what_is_held() -> None:
    seed(0)
    model = Net().eval()
    kinds = ("response", "preactivation", "activation")
    with capture(model, kinds=kinds, keep="all") as maps:
        assert maps.first_nonfinite() is None
        model(image())
        assert maps.first_nonfinite() is None
        model.norm.bias.data[1] = INF
        model(image())
        model.conv1.bias.data[0] = NAN
        model(image())
    bad = maps.first_nonfinite()
    assert bad is not None
    assert (bad.layer, bad.kind, bad.filter, bad.step) == ("conv1", "preactivation", 1, 1)
    assert bad.filters == (1,)
    assert bad.response_finite
    assert bad.map is not None
    assert bad.map.step == 1
    before = maps.select(step=0) + maps.select(kind="response", step=1)[:1]
    assert bad.largest == max(float(fm.tensor.abs().max()) for fm in before)
    assert str(bad) == (
        "the preactivation of layer 'conv1' (step 1, call 0) has +inf in filter 1, the first of "
        "the pass; the response of that layer is finite, so what stands between it and the "
        "nonlinearity (a norm, a scale, a sum) has made the value; the largest finite value before "
        f"it is {bad.largest:.4g}, in {bad.largest_in}"
    )
    assert copy.deepcopy(maps).first_nonfinite().filter == 1  # type: ignore[union-attr]


def test_first_nonfinite_of_some_filters_goes_by_the_layers_numbers() -> None:
    seed(0)
    model = Net().eval()
    model.norm.bias.data[3] = NAN
    with capture(model, "conv1", filters=[1, 3]) as maps:
        model(image())
    bad = maps.first_nonfinite()
    assert bad is not None
    assert bad.filter == 3
    with capture(model, "conv1", filters=[0, 1]) as maps:
        model(image())
    assert maps.first_nonfinite() is None


def test_the_error_has_the_same_as_data() -> None:
    seed(0)
    model = Net().eval()
    model.norm.bias.data[1:3] = NAN
    with pytest.raises(NonFiniteError) as caught, capture(model, check="finite"):
        model(image())
    error = caught.value
    assert error.candidates == (1, 2)
    assert isinstance(error, ArithmeticError)
    assert re.search("has a NaN in filter 1 and 1 more, the first of the pass", str(error))
    again = pickle.loads(pickle.dumps(error))
    assert (again.layer, again.filter, str(again)) == ("norm", 1, str(error))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_nothing_waits_but_the_flag() -> None:
    seed(0)
    model, x = Net().cuda(), image().cuda()
    with capture(model, check="finite"):
        for _ in range(2):
            model(x).sum().backward()
        for run in (lambda: model(x), lambda: model(x).sum().backward()):
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert len([w for w in seen if "synchronizing" in str(w.message)]) <= 2
