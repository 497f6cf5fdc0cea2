"""Long runs: a block around a whole training script, in which everything may change.

Each test runs a bare twin beside the captured model, under the witness of `tests/truth.py`, through
the same changes: outputs, gradients, buffers and every (z, a) must be the same bits, pass by pass.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fmapkit import ArgumentError, capture
from fmapkit.lookup.records import every
from tests import truth
from tests.checks import tags


class Cnn(nn.Module):
    """Proven as a whole: in-place ReLU, residual sum in place, a nonlinearity as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv1(x)))
        y = self.conv2(x)
        y += x
        x = self.drop(self.relu(y)).mean((2, 3))
        return self.head(torch.tanh(self.fc(x)))


class Branching(Cnn):
    """Unproven at the top: the road depends on the data. Units below."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0, 0, 0] > 0:
            x = self.block(x)
        return super().forward(x)


NETS = [Cnn, Branching]


def image(step: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, 3, 6, 6, generator=generator).to(device, dtype)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    truth.seed(0)


class Twins:
    """The captured model and a bare one that goes through the same."""

    def __init__(self, model: nn.Module, maps: Any = None) -> None:
        self.model, self.bare = model, copy.deepcopy(model)
        self.maps = maps
        self.steps = 0
        self.runs: dict[int, list[truth.Run]] = {}

    def both(self, change: Callable[[nn.Module], Any]) -> None:
        """Change both in the same way."""
        for model in (self.bare, self.model):
            truth.seed(self.steps)
            change(model)

    def run(self, x: Tensor, *, train: bool = True, captured: bool = True) -> None:
        """A pass of each, with everything compared; backward if `train`."""
        true = truth.run_pass(self.bare, (x,), train=train, seed_=self.steps, witness=True)
        seen = truth.run_pass(self.model, (x,), train=train, seed_=self.steps)
        truth.assert_same_pass(true, seen)
        if captured:
            self.runs[self.steps] = true.truth
            truth.assert_captured_exactly_once(self.maps, true.truth)
            assert self.maps.missed == []
        self.steps += 1

    def assert_nothing_left(self) -> None:
        """The block is over."""
        truth.assert_nothing_left(truth.fingerprint(self.bare), self.model)


def pairs(maps: Any, step: int) -> list[tuple[Tensor, Tensor]]:
    """The (z, a) of one kept pass. A layer's maps come as z, a; one without a has no σ."""
    found = [fm for fm in maps.select(step=step) if fm.nonlinearity is not None]
    zs = [fm.tensor for fm in found if fm.kind == "preactivation"]
    return list(zip(zs, [fm.tensor for fm in found if fm.kind == "activation"], strict=True))


def assert_held(maps: Any, twins: Twins, steps: list[int]) -> None:
    """Exactly these passes are readable, and each still has the bits that truly ran."""
    assert sorted({fm.step for fm in maps.select()}) == steps
    for step in steps:
        true = twins.runs[step]
        got = pairs(maps, step)
        assert len(got) == len(true) > 0
        for run, (z, a) in zip(true, got, strict=True):
            assert truth.same_bits(run.z, z)
            assert truth.same_bits(run.a, a)


# -- every, keep, phases --------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("keep", "every", "held"),
    [
        (1, 1, [10]),
        (3, 1, [8, 9, 10]),
        (1, 5, [10]),
        (3, 4, [0, 4, 8]),  # of 0, 4, 8
        (2, 3, [6, 9]),  # of 0, 3, 6, 9
        ("all", 3, [0, 3, 6, 9]),
    ],
)
def test_which_passes_are_held_and_that_they_stay_as_they_were(
    net: type[nn.Module], keep: Any, every: int, held: list[int]
) -> None:
    twins = Twins(net())
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (twins.bare, twins.model)]
    with capture(twins.model, keep=keep, every=every) as maps:
        twins.maps = maps
        for step in range(11):
            twins.run(image(step), captured=step % every == 0)
            for optimizer in optimizers:
                optimizer.step()
        assert_held(maps, twins, held)
    assert_held(maps, twins, held)
    twins.assert_nothing_left()


@pytest.mark.parametrize("net", NETS)
def test_training_and_evaluation_in_one_block(net: type[nn.Module]) -> None:
    twins = Twins(net())
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in (twins.bare, twins.model)]
    modes = []
    with capture(twins.model, keep="all") as maps:
        twins.maps = maps
        for _ in range(3):
            twins.both(lambda m: m.train())
            for _ in range(2):
                twins.run(image(twins.steps))
                modes.append(True)
                for optimizer in optimizers:
                    optimizer.step()
            twins.both(lambda m: m.eval())
            for _ in range(2):
                twins.run(image(twins.steps), train=False)
                modes.append(False)
        assert all(fm.training == modes[fm.step] for fm in maps.select())
        for wanted in (True, False):
            chosen = maps.select("conv2", "activation", training=wanted)
            assert [fm.step for fm in chosen] == [n for n, m in enumerate(modes) if m == wanted]
        assert maps["conv2"].training is False
        assert maps["conv2"][1].training is False  # one filter of it
    assert_held(maps, twins, list(range(12)))
    twins.assert_nothing_left()


def test_the_mode_is_that_in_which_the_pass_began() -> None:
    class Switching(Cnn):
        def forward(self, x: Tensor) -> Tensor:
            self.train(not self.training)
            return super().forward(x)

    model = Switching().train()
    with capture(model, keep="all") as maps, torch.no_grad():
        for step in range(4):
            model(image(step))
    seen = {fm.step: fm.training for fm in maps.select()}
    assert seen == {0: True, 1: False, 2: True, 3: False}


def test_an_edit_sees_the_mode() -> None:
    seen: list[tuple[int, bool]] = []

    def look(fm: Any) -> Tensor:
        seen.append((fm.step, fm.training))
        return fm.tensor

    model = Cnn()
    with capture(model, edit={"conv2": look, ("conv1", "response"): look}), torch.no_grad():
        for step in range(4):
            model.train(step % 2 == 1)
            model(image(step))
    assert sorted(set(seen)) == [(0, False), (1, True), (2, False), (3, True)]


# -- optimizers -----------------------------------------------------------------------------------


def grads_of(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("net", NETS)
def test_gradient_accumulation(net: type[nn.Module]) -> None:
    model = net()
    bare = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (bare, model)]
    with capture(model, keep=4) as maps:
        for step in range(3):
            true: list[truth.Run] = []
            for micro in range(4):
                for m in (bare, model):
                    truth.seed(micro)
                    witness = truth.Witness(m) if m is bare else None
                    if witness is not None:
                        with witness:
                            loss = m(image(4 * step + micro)).square().mean() / 4
                        true += witness.runs
                    else:
                        loss = m(image(4 * step + micro)).square().mean() / 4
                    loss.backward()
            for left, right in zip(grads_of(bare), grads_of(model), strict=True):
                assert (left is None) == (right is None)
                assert left is None or truth.same_bits(left, right)
            # All four micro-batches of this step are kept, with the bits of their own passes.
            got = [pair for n in range(4 * step, 4 * step + 4) for pair in pairs(maps, n)]
            assert len(got) == len(true)
            for run, (z, a) in zip(true, got, strict=True):
                assert truth.same_bits(run.z, z)
                assert truth.same_bits(run.a, a)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert maps.missed == []
    truth.assert_nothing_left(truth.fingerprint(bare), model)


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 8)
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.out = nn.Linear(8, 4)

    def forward(self, noise: Tensor) -> Tensor:
        return torch.tanh(self.out(self.act(self.fc(noise))))


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 8)
        self.act = nn.ReLU(inplace=True)
        self.out = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.fc(x)))


def _gan(generator: nn.Module, critic: nn.Module, after: Callable[[str], None]) -> list[Tensor]:
    """Three rounds: the critic on real and on generated samples, then both for the generator."""
    first = torch.optim.Adam(generator.parameters(), 0.01)
    second = torch.optim.SGD(critic.parameters(), 0.1)
    losses = []
    for round_ in range(3):
        truth.seed(round_)
        real, noise = torch.randn(5, 4), torch.randn(5, 3)
        second.zero_grad()
        loss = F.softplus(-critic(real)).mean()
        after("critic")
        fake = generator(noise).detach()
        after("generator")
        loss = loss + F.softplus(critic(fake)).mean()
        after("critic")
        loss.backward()
        second.step()
        first.zero_grad()
        critic.requires_grad_(False)  # frozen while the other one learns
        samples = generator(noise)
        after("generator")
        loss = F.softplus(-critic(samples)).mean()
        after("critic")
        loss.backward()
        first.step()
        critic.requires_grad_(True)
        losses.append(loss.detach())
    return losses


def test_two_models_with_an_optimizer_each_that_feed_each_other() -> None:
    models: dict[str, nn.Module] = {"generator": Generator(), "critic": Critic()}
    bare = copy.deepcopy(models)
    runs: list[tuple[str, list[truth.Run]]] = []

    witness = truth.Witness(nn.ModuleDict(bare))
    taken = 0

    def note(name: str) -> None:
        nonlocal taken
        mine = [r for r in witness.runs[taken:] if r.inside]  # those outside belong to the loss
        taken = len(witness.runs)
        runs.append((name, mine))

    with witness:
        expected = _gan(bare["generator"], bare["critic"], note)

    at = iter(runs)
    with capture(models["generator"]) as of_g, capture(models["critic"]) as of_c:

        def compare(name: str) -> None:
            which, true = next(at)
            assert which == name
            assert len(true) == (2 if name == "generator" else 1)
            truth.assert_captured_exactly_once({"generator": of_g, "critic": of_c}[name], true)

        got = _gan(models["generator"], models["critic"], compare)
    assert next(at, None) is None
    assert of_g.missed == of_c.missed == []
    assert all(truth.same_bits(x, y) for x, y in zip(expected, got, strict=True))
    for name, model in models.items():
        for left, right in zip(bare[name].parameters(), model.parameters(), strict=True):
            assert truth.same_bits(left, right)
        truth.assert_nothing_left(truth.fingerprint(bare[name]), model)


# -- a model that changes in the middle -----------------------------------------------------------


def _swap(m: Any) -> None:
    m.conv2 = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1))


def _freeze(m: Any) -> None:
    m.conv1.requires_grad_(False)
    m.bn.eval()


def _freeze_all(m: Any) -> None:
    m.requires_grad_(False)
    m.head.weight.requires_grad_(True)


def _new_parameter(m: Any) -> None:
    m.fc.weight = nn.Parameter(torch.randn(5, 4))
    m.fc.bias = None


def _reset(m: Any) -> None:
    for module in m.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def _load(m: Any) -> None:
    m.load_state_dict({k: torch.randn_like(v, dtype=torch.float) for k, v in _float(m)}, False)


def _load_assign(m: Any) -> None:
    state = {k: nn.Parameter(torch.randn_like(v)) for k, v in m.named_parameters()}
    m.load_state_dict(state, strict=False, assign=True)


def _float(m: Any) -> list[tuple[str, Tensor]]:
    return [(k, v) for k, v in m.state_dict().items() if v.is_floating_point()]


def _data(m: Any) -> None:
    m.conv1.weight.data = torch.randn(4, 3, 3, 3)
    with torch.no_grad():
        m.conv2.weight.mul_(2)


class _Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w + w.transpose(-1, -2)


def _parametrize(m: Any) -> None:
    parametrize.register_parametrization(m.conv2, "weight", _Symmetric())


def _parametrize_with_sigma(m: Any) -> None:
    parametrize.register_parametrization(m.fc, "weight", nn.Softplus())


def _spectral(m: Any) -> None:
    parametrizations.spectral_norm(m.conv2)
    parametrizations.spectral_norm(m.fc)


def _old_spectral(m: Any) -> None:
    nn.utils.spectral_norm(m.conv2)


def _weight_norm(m: Any) -> None:
    parametrizations.weight_norm(m.conv1)


def _orthogonal(m: Any) -> None:
    parametrizations.orthogonal(m.fc)


def _prune(m: Any) -> None:
    prune.l1_unstructured(m.conv1, "weight", amount=0.5)
    prune.random_unstructured(m.fc, "weight", amount=0.3)


def _hook(m: Any) -> None:
    m.conv2.register_forward_hook(lambda module, args, out: out * 2)


def _lora(m: Any) -> None:
    class Lora(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.down = nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    m.fc = Lora(m.fc)


def _flag(m: Any) -> None:
    m.relu.inplace = False


def _other_activation(m: Any) -> None:
    m.relu = nn.ELU(inplace=True)


def _buffers(m: Any) -> None:
    m.bn.reset_running_stats()
    m.bn.track_running_stats = False
    m.bn.running_mean = m.bn.running_var = None


CHANGES = [
    *(_swap, _freeze, _freeze_all, _new_parameter, _reset, _load, _load_assign, _data),
    *(_parametrize, _parametrize_with_sigma, _spectral, _old_spectral, _weight_norm),
    *(_orthogonal, _prune, _hook, _lora, _flag, _other_activation, _buffers),
]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.lstrip("_"))
def test_a_model_that_is_changed_in_the_middle(
    net: type[nn.Module], train: bool, change: Callable[[nn.Module], Any]
) -> None:
    twins = Twins(net().train(train))
    with capture(twins.model, kinds=("response", "preactivation", "activation")) as maps:
        twins.maps = maps
        for step in range(3):
            twins.run(image(step), train=train)
        twins.both(change)
        for step in range(3, 7):
            twins.run(image(step), train=train)
    twins.assert_nothing_left()


def test_labels_after_the_changes_are_those_of_the_model_as_it_is() -> None:
    model: Any = Cnn().eval()
    whole = range(4)
    before = [("conv1", 0, "relu", whole), ("conv2", 0, "relu", whole), ("fc", 0, "tanh", range(5))]
    with capture(model) as maps, torch.no_grad():
        for _ in range(2):
            model(image(0))
            assert tags(maps) == before
        for change in (_prune, _parametrize):  # weights by other means, same layers
            change(model)
            for _ in range(2):
                model(image(0))
                assert tags(maps) == before
        _swap(model)
        for _ in range(2):
            model(image(0))
            # The GELU inside is the first convolution's, the sum after it the second's.
            assert tags(maps) == [
                ("conv1", 0, "relu", whole),
                ("conv2.0", 0, "gelu", whole),
                ("conv2.2", 0, "relu", whole),
                ("fc", 0, "tanh", range(5)),
            ]


def test_parametrizations_and_pruning_that_are_taken_off_again() -> None:
    twins = Twins(Cnn())
    with capture(twins.model) as maps:
        twins.maps = maps
        for change in (_weight_norm, _spectral, _prune):
            twins.both(change)
            for _ in range(2):
                twins.run(image(twins.steps))
            twins.both(_take_off)
            for _ in range(2):
                twins.run(image(twins.steps))
    twins.assert_nothing_left()


def _take_off(m: Any) -> None:
    for module in m.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
        elif prune.is_pruned(module) and hasattr(module, "weight_mask"):
            prune.remove(module, "weight")


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("train", [True, False])
def test_another_dtype_in_the_middle(net: type[nn.Module], train: bool) -> None:
    twins = Twins(net().train(train))
    with capture(twins.model, keep=2) as maps:
        twins.maps = maps
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
            twins.both(lambda m, dtype=dtype: m.to(dtype))
            for _ in range(3):
                twins.run(image(twins.steps, dtype), train=train)
                assert {fm.dtype for fm in maps} == {dtype}
    twins.assert_nothing_left()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("net", NETS)
def test_another_device_in_the_middle(net: type[nn.Module]) -> None:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        twins = Twins(net())
        with capture(twins.model, keep=2) as maps:
            twins.maps = maps
            for device in ("cpu", "cuda", "cpu", "cuda"):
                twins.both(lambda m, device=device: m.to(device))
                for _ in range(3):
                    twins.run(image(twins.steps, device=device))
                    assert {fm.device.type for fm in maps} == {device}
        twins.assert_nothing_left()
    finally:
        torch.backends.cudnn.deterministic = before


# -- exceptions that the loop catches -------------------------------------------------------------


class Bomb(nn.Module):
    """Raises once it is armed."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return x


class Mined(nn.Module):
    """σ as in-place modules and as functions around the place where it breaks."""

    def __init__(self, branching: bool) -> None:
        super().__init__()
        self.branching = branching
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
        self.bomb = Bomb()
        self.relu = nn.ReLU6(inplace=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body(x))
        if self.branching and float(x.sum()) > 1e9:
            x = -x
        return self.head(self.relu(self.bomb(x) * 2))


ERRORS = [KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("branching", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_the_handler_of_an_interrupt_finds_the_model_as_it_was(
    error: type[BaseException], at: int, branching: bool, every: int
) -> None:
    twins = Twins(Mined(branching))
    clean = pickle.dumps([(n, m.__dict__.get("inplace")) for n, m in twins.bare.named_modules()])
    # Without the keys of hooks: theirs are numbered anew each time.
    with capture(twins.model, every=every) as maps:
        twins.maps = maps
        model: Any = twins.model
        for step in range(at):
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            twins.run(x, captured=step % every == 0)
        held_before = {fm.step for fm in maps.select()}
        model.bomb.error = error()
        try:
            model(torch.randn(3, 4))
            raise AssertionError("the bomb did not go off")
        except error:
            # In the handler itself, which is where one saves the model:
            assert truth.modes() == (0, 0)
            saved = [(n, m.__dict__.get("inplace")) for n, m in model.named_modules()]
            assert pickle.dumps(saved) == clean
            assert pickle.loads(pickle.dumps(model)).relu.inplace
            # What runs now is nobody's pass.
            count = len(maps)
            torch.relu(model.head.weight)
            nn.Sequential(nn.Linear(4, 4), nn.ReLU())(torch.randn(2, 4))
            assert len(maps) == count
            assert {fm.step for fm in maps.select()} <= held_before | {at}
        model.bomb.error = None
        twins.steps = at + 1
        for step in range(at + 1, at + 5):
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            twins.run(x, captured=step % every == 0)
    twins.assert_nothing_left()


def test_an_interrupt_that_the_forward_catches_itself_ends_no_pass() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
            self.mined = Mined(False)
            self.last = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            try:
                x = self.mined(x)
            except KeyboardInterrupt:
                x = x + 1
            return torch.sigmoid(self.last(x))

    twins = Twins(Outer())
    with capture(twins.model) as maps:
        twins.maps = maps
        twins.both(lambda m: setattr(m.mined.bomb, "error", KeyboardInterrupt()))
        for step in range(4):
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            twins.run(x)
            assert maps.layers[-1] == "last"
    twins.assert_nothing_left()


@pytest.mark.parametrize("where", ["loss", "backward", "optimizer"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_between_the_passes(where: str, error: type[BaseException]) -> None:
    twins = Twins(Cnn())
    model = twins.model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def fail(*_: Any) -> None:
        raise error

    handles: list[Any] = []
    with capture(model) as maps:
        twins.maps = maps
        for step in range(6):
            if step in (1, 3):
                truth.seed(step)
                if where == "optimizer":
                    handles.append(optimizer.register_step_pre_hook(fail))
                try:
                    loss = model(image(step)).sum()
                    if where == "loss":
                        fail()
                    if where == "backward":
                        loss.register_hook(fail)
                    loss.backward()
                    optimizer.step()
                except error:
                    pass
                model.zero_grad()
                for handle in handles:
                    handle.remove()
                truth.seed(step)
                twins.bare(image(step))  # so that the buffers of both go the same way
                twins.steps += 1
            else:
                twins.run(image(step))
    twins.assert_nothing_left()


def _interrupt(model: Any, x: Tensor) -> None:
    model.bomb.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.bomb.error = None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_captures_of_one_model_that_end_in_any_order_leave_nothing(order: tuple[int, int]) -> None:
    model = Mined(False)
    expected = truth.fingerprint(model)
    x = torch.randn(3, 4)
    blocks = [capture(model), capture(model, "head")]
    for block in blocks:
        block.__enter__()
    model(x)
    _interrupt(model, x)
    assert model.relu.inplace
    blocks[order[0]].__exit__(None, None, None)
    model(x)
    _interrupt(model, x)
    assert model.relu.inplace
    assert truth.modes() == (0, 0)
    blocks[order[1]].__exit__(None, None, None)
    truth.assert_nothing_left(expected, model)


class OwnState(Mined):
    """Copied and pickled with all that lies in its `__dict__`."""

    def __getstate__(self) -> Any:
        return self.__dict__


def test_copies_made_in_the_block_are_free_of_it_and_replicas_run_their_own_weights() -> None:
    x = torch.randn(3, 4)
    for model in (Mined(False), OwnState(False)):
        with capture(model) as maps, torch.no_grad():
            out = model(x)
            for other in (
                copy.deepcopy(model),
                copy.copy(model),
                pickle.loads(pickle.dumps(model)),
            ):
                assert torch.equal(other(x), out)
            # What DataParallel makes: another module with a copy of the instance's dict.
            replica: Any = model._replicate_for_data_parallel()
            replica.head = nn.Linear(4, 2)
            held = maps["body.0"].tensor
            assert not torch.equal(replica(x), out)
            assert maps["body.0"].tensor is held
            assert maps["body.0"].step == 0


# -- memory ---------------------------------------------------------------------------------------


def _objects() -> Counter[str]:
    gc.collect()
    return Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects())


def _tensors() -> list[Tensor]:
    gc.collect()
    found = []
    for o in gc.get_objects():
        if isinstance(o, Tensor):
            found.append(o)
    return found


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("options", [{}, {"keep": 3}, {"every": 10}], ids=str)
def test_hundreds_of_steps_make_no_object_that_stays(
    net: type[nn.Module], options: dict[str, Any], collected: None
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def steps(count: int) -> None:
        for step in range(count):
            optimizer.zero_grad()
            model(image(step % 7)).square().mean().backward()
            optimizer.step()

    with capture(model, **options) as maps:
        steps(210)
        _objects()  # what counting itself makes once
        before = _objects()
        steps(350)  # ends with the same image, and at the same place of `every`
        after = _objects()
        grown = {name: n - before[name] for name, n in after.items() if n > before[name]}
        # The count itself makes a few dicts and counters; 350 steps would make hundreds of each.
        assert sum(grown.values()) < 20, grown
        assert len(maps) > 0


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("keep", [1, 3])
def test_the_tensors_alive_after_a_pass_are_the_maps_and_no_other(
    net: type[nn.Module], keep: int, collected: None
) -> None:
    model = net().eval()
    with torch.no_grad():
        model(image(1))
        bare = len(_tensors())
        with capture(model, keep=keep) as maps:
            for _ in range(6):
                model(image(1))
            alive = len(_tensors()) - bare
            held = {id(e.held.tensor) for _, e in every(maps._session) if e.held is not None}
            # Each map is one tensor, and shared where two kinds are the same one.
            assert alive == len(held) > 0
            maps.clear()
            assert len(_tensors()) == bare
    assert len(_tensors()) == bare


def test_an_unknown_selection_of_passes_is_an_error() -> None:
    model = Cnn()
    with capture(model) as maps:
        model(image(0))
    with pytest.raises(ArgumentError, match="training"):
        maps.select(training="yes")  # type: ignore[arg-type]
