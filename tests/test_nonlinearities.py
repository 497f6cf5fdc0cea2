"""What counts as a nonlinearity: functions in some of their calls, modules by hand, registered."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import (
    ArgumentError,
    CaptureWarning,
    EditError,
    capture,
    nonlinearities,
    register_nonlinearity,
)

Function = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """A function between two layers; with a branch on data, no pass of it can be foretold."""

    def __init__(self, function: Function, branches: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 2)
        self.function, self.branches = function, branches

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        if self.branches and float(x.abs().sum()) > 1e9:
            return z
        return self.last(self.function(z))


def on_a_copy(function: Callable[[Tensor], Any]) -> Function:
    """An in-place function, on memory of its own that is z."""

    def run(z: Tensor) -> Tensor:
        z = z * 1
        out = function(z)
        return z if out is None else out

    return run


def out_of_itself(z: Tensor) -> Tensor:
    return torch.clamp(z, min=0, out=z)


# σ(z) of each, and what it goes by.
COUNTS: dict[str, tuple[str, Function]] = {
    "clamp": ("clamp", lambda z: z.clamp(min=0)),
    "clamp, by place": ("clamp", lambda z: torch.clamp(z, 0.0)),
    "clamp to 6": ("clamp", lambda z: torch.clamp(z, 0, 6)),
    "clamp, from above": ("clamp", lambda z: z.clamp(max=0)),
    "clamp by a tensor": ("clamp", lambda z: torch.clamp(z, min=torch.zeros(()))),
    "clip": ("clip", lambda z: z.clip(0)),
    "clamp_min": ("clamp_min", lambda z: torch.clamp_min(z, 0)),
    "clamp_": ("clamp", on_a_copy(lambda z: z.clamp_(min=0))),
    "clip_": ("clip", on_a_copy(lambda z: torch.clip_(z, 0))),
    "clamp_min_": ("clamp_min", on_a_copy(lambda z: z.clamp_min_(0))),
    "clamp into": ("clamp", lambda z: torch.clamp(z, min=0, out=torch.empty_like(z))),
    "clamp into itself": ("clamp", on_a_copy(out_of_itself)),
    "aten": ("clamp", lambda z: torch.ops.aten.clamp.default(z, 0)),
    "maximum": ("maximum", lambda z: torch.maximum(z, torch.tensor(0.0))),
    "maximum, method": ("maximum", lambda z: z.maximum(torch.zeros_like(z))),
    "fmax": ("fmax", lambda z: torch.fmax(torch.zeros(4), z)),
    "max of two": ("max", lambda z: torch.max(z, torch.zeros_like(z))),
    "leaky maximum": ("maximum", lambda z: torch.maximum(0.1 * z, z)),
    "where": ("where", lambda z: torch.where(z > 0, z, 0.0)),
    "where, method": ("where", lambda z: z.where(z.ge(0), torch.zeros_like(z))),
    "leaky where": ("where", lambda z: torch.where(z <= 0, 0.1 * z, z)),
    "elu": ("where", lambda z: torch.where(z > 0, z, z.exp() - 1)),
    "two comparisons": (
        "where",
        lambda z: torch.where((z > -1) & ~(z > torch.zeros(1)), z, torch.tanh(z) * 2),
    ),
    "mask": ("mul", lambda z: z * (z > 0)),
    "mask first": ("mul", lambda z: z.gt(0) * z),
    "mask of numbers": ("mul", lambda z: z.mul((z > 0).to(z.dtype))),
    "mask of its type": ("mul", lambda z: (z > 0).type_as(z) * z),
    "mask to another": ("mul", lambda z: (z > 0).to(z) * z),
    "mul_": ("mul", on_a_copy(lambda z: z.mul_(z > 0))),
    "masked_fill": ("masked_fill", lambda z: z.masked_fill(z < 0, 0.0)),
    "masked_fill_": ("masked_fill", on_a_copy(lambda z: z.masked_fill_(torch.lt(z, 0), 0.0))),
    "erf": ("erf", lambda z: torch.special.erf(z)),
    "gelu_": ("gelu", on_a_copy(lambda z: torch._C._nn.gelu_(z))),
}


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_a_function_that_is_a_nonlinearity_here(name: str, branches: bool) -> None:
    torch.manual_seed(0)
    sigma, function = COUNTS[name]
    model = Net(function, branches)
    bare = copy.deepcopy(model)
    with capture(model) as maps, torch.no_grad():
        for _ in range(3):
            x = torch.randn(3, 5)
            z = bare.first(x)
            a = function(z.clone())
            assert torch.equal(model(x), bare.last(a))
            found = {(fm.layer, fm.kind): fm for fm in maps}
            assert list(found) == [
                ("first", "preactivation"),
                ("first", "activation"),
                ("last", "preactivation"),
            ]
            assert torch.equal(found["first", "preactivation"].tensor, z)
            got = found["first", "activation"]
            assert torch.equal(got.tensor, a)
            assert (got.nonlinearity, got.filter_dim) == (sigma, 1)
    assert maps.missed == []


def test_gradients_and_training_are_those_of_the_bare_model() -> None:
    for name in ("clamp_", "mul_", "masked_fill_", "leaky where", "mask"):
        model = Net(COUNTS[name][1])
        bare, x = copy.deepcopy(model), torch.randn(3, 5)
        with capture(model):
            for _ in range(2):
                model(x).sum().backward()
                bare(x).sum().backward()
        for p, q in zip(model.parameters(), bare.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]


# Neither compares z with itself nor bounds it by zero.
DOES_NOT_COUNT: dict[str, Function] = {
    "guard": lambda z: z.clamp(min=1e-6),
    "range of a byte": lambda z: z.clamp(-128, 127),
    "outliers": lambda z: z.masked_fill(z > 1, 0.0),
    "a running maximum": lambda z: torch.maximum(z, torch.full((4,), -1e38)),
    "waves": lambda z: torch.sin(z) + z.cos(),
    "maximum with a guard": lambda z: torch.maximum(z, torch.tensor(1e-6)),
    "dropout": lambda z: z * (torch.rand_like(z) > 0.5),
    "another tensor's mask": lambda z: torch.where(z.sum(-1, keepdim=True) > 0, z, 0.0),
    "a constant mask": lambda z: z.masked_fill(torch.ones(4) > 2, 0.0),
    "missing values": lambda z: torch.where(z.isnan(), 0.0, z),
    "the largest ones": lambda z: z.masked_fill(z < z.topk(2, -1).values[:, 1:], 0.0),
    "two layers": lambda z: torch.maximum(z, z.roll(1, -1)),
    "places": lambda z: z.index_fill(0, torch.where(z[:, 0] > 9)[0], 0.0),
    "places of itself": lambda z: z.index_put(torch.where(z > 9), torch.zeros(())),
    "one axis": lambda z: z.max(-1, keepdim=True).values + z,
    "an old mask": lambda z: (z.add(0), z > 0)[1] * z.mul(2).roll(1, 0),
}


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("name", DOES_NOT_COUNT)
def test_a_function_that_is_none_here(name: str, branches: bool) -> None:
    model = Net(DOES_NOT_COUNT[name], branches)
    with capture(model) as maps, torch.no_grad():
        for _ in range(3):
            model(torch.randn(3, 5))
            assert {fm.kind for fm in maps} == {"preactivation"}


def test_a_mask_of_what_was_there_before_a_write_is_none_of_z() -> None:
    def function(z: Tensor) -> Tensor:
        z = z * 1
        mask = z > 0
        z.view(-1).sub_(1)
        return z * mask

    model = Net(function)
    with capture(model) as maps, torch.no_grad():
        model(torch.randn(3, 5))
        assert {fm.kind for fm in maps} == {"preactivation"}


def test_calls_that_count_and_calls_that_do_not_in_one_forward() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            scale = x.abs().sum(-1, keepdim=True).clamp(min=1e-6)
            x = (self.a(x) / scale).mul(2).clamp(min=0)
            x = self.b(x * 3).clamp(min=-100).mul(1.0)
            return x * (x > 0)

    torch.manual_seed(0)
    model = Mixed()
    bare = copy.deepcopy(model)
    with capture(model) as maps, torch.no_grad():
        for _ in range(3):
            x = torch.randn(3, 4)
            first = (bare.a(x) / x.abs().sum(-1, keepdim=True).clamp(min=1e-6)).mul(2)
            second = bare.b(first.clamp(min=0) * 3).clamp(min=-100).mul(1.0)
            model(x)
            assert [(fm.layer, fm.nonlinearity) for fm in maps.select(kind="activation")] == [
                ("a", "clamp"),
                ("b", "mul"),
            ]
            assert torch.equal(maps["a", "preactivation"].tensor, first)
            assert torch.equal(maps["a"].tensor, first.clamp(min=0))
            assert torch.equal(maps["b"].tensor, second * (second > 0))


def test_a_choice_can_be_edited_behind_and_not_before() -> None:
    model, x = Net(lambda z: z * (z > 0)), torch.randn(3, 5)
    z = F.linear(x, model.first.weight, model.first.bias).detach()
    with torch.no_grad():
        expected = model.last(z * (z > 0) + 1)
        with capture(model, edit={"first": lambda fm: fm.tensor + 1}):
            for _ in range(2):
                assert torch.equal(model(x), expected)
        said = pytest.raises(EditError, match="is compared before")
        edit = {("first", "preactivation"): lambda fm: fm.tensor + 1}
        with capture(model, edit=edit), said:
            model(x)


# -- registered ----------------------------------------------------------------------------------


@pytest.fixture
def _registry() -> Iterator[None]:
    kept = [dict(n) for n in (nonlinearities.FUNCTIONS, nonlinearities._BY_NAME)]
    yield
    for now, before in zip((nonlinearities.FUNCTIONS, nonlinearities._BY_NAME), kept, strict=True):
        now.clear()
        now.update(before)
    nonlinearities.version += 1


@pytest.mark.parametrize(
    ("registered", "called"),
    [
        (torch.exp, lambda z: z.exp()),
        (Tensor.exp, torch.exp),
        (torch.exp, on_a_copy(lambda z: z.exp_())),
        (Tensor.exp_, torch.exp),
        (torch.special.gammaln, lambda z: z.lgamma()),
        (Tensor.lgamma, torch.special.gammaln),
        (torch.special.psi, on_a_copy(lambda z: z.digamma_())),
        (torch.digamma, torch.special.psi),
        (torch.special.entr, torch.special.entr),
        (torch.abs, abs),
        (torch.abs, torch.absolute),
        (torch.pow, lambda z: z**2),
        (Tensor.__pow__, lambda z: torch.pow(z, 2)),
        (torch.clamp, lambda z: z.clip(1e-6)),
        (Tensor.clip_, lambda z: torch.clamp(z, min=1e-6)),
        (torch.arctan, lambda z: z.atan()),
        (torch.ops.aten.exp.default, lambda z: z.exp()),
        (torch.exp, torch.ops.aten.exp),
        (torch.special.gammaln, torch.ops.aten.lgamma.default),
        (F.softmax, lambda z: z.softmax(-1)),
        (torch.special.softmax, lambda z: F.softmax(z, -1)),
    ],
)
@pytest.mark.usefixtures("_registry")
def test_a_registered_function_counts_under_all_its_names(
    registered: Any, called: Function
) -> None:
    model = Net(called)
    bare = copy.deepcopy(model)
    register_nonlinearity(registered, "mine")
    with capture(model) as maps, torch.no_grad():
        for _ in range(2):
            x = torch.randn(3, 5)
            model(x)
            z = bare.first(x)
            assert torch.equal(maps["first", "preactivation"].tensor, z)
            assert torch.equal(maps["first"].tensor.nan_to_num(), called(z).nan_to_num())
            assert maps["first"].nonlinearity == "mine"


@pytest.mark.usefixtures("_registry")
def test_a_builtin_that_a_tensor_answers_is_read_in_every_pass() -> None:
    class Folds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return abs(self.fc(x))

    register_nonlinearity(torch.abs)
    model = Folds()
    with capture(model) as maps, torch.no_grad():
        for _ in range(4):
            out = model(torch.randn(2, 4))
            assert torch.equal(maps["fc"].tensor, out)
            assert maps["fc"].nonlinearity == "abs"
    assert list(maps.missed) == []


@pytest.mark.usefixtures("_registry")
def test_names_of_registered_functions() -> None:
    for function, name in (
        (torch.special.gammaln, "lgamma"),
        (Tensor.exp_, "exp"),
        (torch.ops.aten.square, "square"),
    ):
        register_nonlinearity(function)
        assert nonlinearities.function_sigma(function) == name
    for wrong in (lambda z: z, 3, [torch.exp], nn.ReLU()):
        with pytest.raises(ArgumentError, match="or a torch function"):
            register_nonlinearity(wrong)  # type: ignore[arg-type]


# -- written by hand -----------------------------------------------------------------------------


class Soft(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs())


class OfModules(nn.Module):
    """Activations and arithmetic alone."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.soft = nn.ReLU(), Soft()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x) * 2 - self.soft(x)


def test_the_captured_model_is_never_one_nonlinearity() -> None:
    model, x = OfModules(), torch.randn(3, 4)
    with capture(model) as maps, torch.no_grad():
        for _ in range(3):
            model(x)
            assert [(fm.layer, fm.nonlinearity) for fm in maps.select(kind="activation")] == [
                ("relu", "relu"),
                ("soft", "Soft"),
            ]
            assert torch.equal(maps["relu"].tensor, x.relu())
            assert torch.equal(maps["soft"].tensor, x / (1 + x.abs()))


@pytest.mark.parametrize("asked", ["act.soft", "act.*", None])
@pytest.mark.parametrize("branches", [False, True])
def test_what_runs_inside_one_written_by_hand_can_be_asked_for(
    asked: str | None, branches: bool
) -> None:
    class Whole(Net):
        def __init__(self) -> None:
            super().__init__(lambda z: self.act(z), branches)
            self.act = OfModules()

    torch.manual_seed(0)
    model = Whole()
    weight, bias = model.first.weight, model.first.bias
    kinds = ("preactivation", "activation", "output")
    with capture(model, layers=asked, kinds=kinds) as maps, torch.no_grad():
        for _ in range(3):
            x = torch.randn(3, 5)
            model(x)
            z = F.linear(x, weight, bias)
            found = {(fm.layer, fm.kind): fm.tensor for fm in maps}
            assert torch.equal(found["act.soft", "output"], z / (1 + z.abs()))
            if asked != "act.soft":
                assert torch.equal(found["act.relu", "output"], z.relu())
            if asked is None:
                assert maps["first"].nonlinearity == "OfModules"
                a = z.relu() * 2 - z / (1 + z.abs())
                assert torch.equal(found["first", "activation"], a)


Complex = Callable[[Tensor, Tensor], Tensor]
QUARTER = 3.141592653589793 / 2


def mod_relu(z: Tensor, b: Tensor) -> Tensor:
    return F.relu(z.abs() + b) * z / (z.abs() + 1e-6)


def mod_relu_polar(z: Tensor, b: Tensor) -> Tensor:
    return torch.polar(F.relu(z.abs() + b), z.angle())


def mod_relu_where(z: Tensor, b: Tensor) -> Tensor:
    size = z.abs()
    return torch.where(size + b > 0, (size + b) * z / size, torch.zeros_like(z))


def z_relu(z: Tensor, b: Tensor) -> Tensor:
    return z * ((z.angle() >= 0) & (z.angle() <= QUARTER))


def z_relu_where(z: Tensor, b: Tensor) -> Tensor:
    return torch.where((z.real > 0) & (z.imag > 0), z, torch.zeros_like(z))


def z_relu_product(z: Tensor, b: Tensor) -> Tensor:
    return z * ((z.real > 0) * (z.imag > 0)).to(z.dtype)


def cardioid(z: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (1 + torch.cos(z.angle())) * z


def cardioid_real(z: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (1 + z.real / (z.abs() + 1e-6)) * z


def c_relu(z: Tensor, b: Tensor) -> Tensor:
    return torch.complex(F.relu(z.real), F.relu(z.imag))


def c_relu_stacked(z: Tensor, b: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack([F.relu(z.real), F.relu(z.imag)], -1))


def c_relu_pairs(z: Tensor, b: Tensor) -> Tensor:
    return torch.view_as_complex(F.relu(torch.view_as_real(z)))


# As a function in a forward: what is captured of it, by name; or that it is named.
COMPLEX: dict[Complex, list[str]] = {
    mod_relu: ["relu"],
    mod_relu_polar: ["relu"],
    mod_relu_where: [],
    z_relu: ["mul"],
    z_relu_where: ["where"],
    z_relu_product: ["mul"],
    c_relu: ["relu", "relu"],
    c_relu_stacked: ["relu", "relu"],
    c_relu_pairs: ["relu"],
}


class OfComplex(nn.Module):
    def __init__(self, function: Complex) -> None:
        super().__init__()
        self.function, self.bias = function, nn.Parameter(torch.tensor([-0.2, 0.1, 0.0, -0.1]))

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z, self.bias)


@pytest.mark.parametrize("function", [*COMPLEX, cardioid, cardioid_real])
def test_complex_modules_written_by_hand(function: Complex) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, dtype=torch.cfloat), OfComplex(function))
    bare = copy.deepcopy(model)
    with capture(model) as maps, torch.no_grad():
        for _ in range(3):
            x = torch.randn(5, 3, dtype=torch.cfloat)
            model(x)
            assert [(fm.layer, fm.nonlinearity) for fm in maps] == [("0", "OfComplex")] * 2
            assert torch.equal(maps["0", "preactivation"].tensor, bare[0](x))
            assert torch.equal(maps["0"].tensor, bare(x))
    assert maps.missed == []


@pytest.mark.parametrize("function", COMPLEX)
def test_complex_functions_in_a_forward(function: Complex) -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4, dtype=torch.cfloat)
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return function(self.fc(x), self.bias)

    model, expected = Inline(), COMPLEX[function]
    with warnings.catch_warnings(), capture(model) as maps, torch.no_grad():
        warnings.simplefilter("ignore", CaptureWarning)
        for _ in range(3):
            model(torch.randn(5, 3, dtype=torch.cfloat))
            found = maps.select(kind="activation")
            assert [(fm.layer, fm.nonlinearity) for fm in found] == [("fc", n) for n in expected]
            assert all(fm.filter_dim == 1 for fm in found)
        assert [m.layer for m in maps.missed] == ([] if expected else ["fc"])


@pytest.mark.parametrize("channels", [2, 3])
def test_pairs_of_numbers_do_not_move_the_filters(channels: int) -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, channels, 1, dtype=torch.cfloat)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(torch.view_as_real(self.conv(x)))

    model = Pairs()
    with capture(model) as maps, torch.no_grad():
        model(torch.randn(1, 2, channels, channels, dtype=torch.cfloat))  # as many rows
        assert maps["conv"].filter_dim == 1


# -- patched, or subclassed ----------------------------------------------------------------------


class OtherForward(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class AnotherFunction(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class MoreThanTorchs(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class TorchsOwn(nn.ReLU):
    pass


def with_forward(forward: Function) -> nn.Module:
    act = nn.ReLU()
    act.forward = forward  # type: ignore[method-assign]
    return act


def squash(z: Tensor) -> Tensor:
    return z / (1 + z.abs())


@pytest.mark.parametrize(
    ("act", "sigma"),
    [
        (TorchsOwn(), "relu"),
        (nn.ReLU6(), "relu6"),
        (OtherForward(), "OtherForward"),
        (OtherForward(inplace=True), "OtherForward"),
        (AnotherFunction(), "tanh"),
        (MoreThanTorchs(), "MoreThanTorchs"),
        (with_forward(torch.tanh), "tanh"),
        (with_forward(squash), "squash"),
        (with_forward(nn.GELU().forward), "gelu"),
    ],
)
def test_what_ran_gives_the_name_and_not_the_class(act: nn.Module, sigma: str) -> None:
    model = nn.Sequential(nn.Linear(5, 4), act)
    with capture(model) as maps, torch.no_grad():
        for _ in range(3):
            x = torch.randn(3, 5)
            out = model(x)
            assert maps["0"].nonlinearity == sigma
            assert torch.equal(maps["0"].tensor, out)


def test_torch_s_own_function_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    def relu(input: Tensor, inplace: bool = False) -> Tensor:
        return torch.tanh(input)

    def hidden(input: Tensor, inplace: bool = False) -> Tensor:
        return input / (1 + input.abs())

    for patch, sigma in ((relu, "tanh"), (hidden, "hidden")):
        monkeypatch.setattr(F, "relu", patch)
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
        with capture(model) as maps, torch.no_grad():
            for _ in range(2):
                out = model(torch.randn(3, 5))
                assert maps["0"].nonlinearity == sigma
                assert torch.equal(maps["0"].tensor, out)
