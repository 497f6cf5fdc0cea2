"""The traps of shared/PEERS.md that eager mode has, row by row, through the public API only.

In each, what is right is computed by hand from the model's parts, not taken from a library. Every
model runs at least three passes in one block: learned once, then read by taps.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fmapkit import (
    AmbiguousMapError,
    CaptureWarning,
    NoActivationError,
    capture,
)
from tests.truth import (
    NO_MODES,
    assert_nothing_left,
    fingerprint,
    graph_of,
    loss_of,
    modes,
    same_bits,
    seed,
)

PASSES = 3


def image(step: int = 0, channels: int = 3, size: int = 6) -> Tensor:
    """The input of pass `step`."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, channels, size, size, generator=generator)


class ConvReLU(nn.Module):
    """Convolution, norm, in-place ReLU: the commonest trap there is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.bn(self.conv(x))).mean((2, 3)))


class Residual(nn.Module):
    """`out += identity` overwrites what bn2 gave, and the ReLU overwrites the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    seed(0)


# -- 1, 1b: a convolution before an in-place ReLU -------------------------------------------------


@torch.no_grad()
def test_1_the_response_is_still_what_the_convolution_gave() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)).eval()
    with capture(model, kinds=("response", "preactivation", "activation")) as maps:
        for step in range(PASSES):
            model(image(step))
            z = model[0](image(step))  # a pass of a part: it must not pass for one of the model
            assert same_bits(maps["0", "response"].tensor, z)
            assert same_bits(maps["0", "preactivation"].tensor, z)
            assert same_bits(maps["0"].tensor, z.relu())
            assert bool((z < 0).any())


@torch.no_grad()
def test_1_nothing_is_cloned_for_it_from_the_second_pass_on() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)).eval()
    with capture(model) as maps:
        for step in range(PASSES):
            model(image(step))
    assert maps.bytes_copied == 0


@torch.no_grad()
def test_1b_the_input_of_an_inplace_relu_is_z() -> None:
    model = ConvReLU().eval()
    with capture(model) as maps:
        for step in range(PASSES):
            model(image(step))
            z = model.bn(model.conv(image(step)))
            assert same_bits(maps["conv", "preactivation"].tensor, z)
            assert same_bits(maps["conv"].tensor, z.relu())
            assert maps["conv"].nonlinearity == "relu"
    assert model.relu.inplace is True


@torch.no_grad()
def test_1_response_and_preactivation_are_held_once_where_nothing_stands_between() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)).eval()
    with capture(model, kinds=("response", "preactivation")) as maps:
        model(image())
    response, z = maps["0", "response"].tensor, maps["0", "preactivation"].tensor
    assert response.untyped_storage()._cdata == z.untyped_storage()._cdata


# -- 2, 2c: the residual sum ----------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_2_and_2c_norm_output_and_residual_sum(train: bool) -> None:
    model = Residual().train(train)
    reference = copy.deepcopy(model)
    kinds = ("response", "preactivation", "activation", "output")
    with capture(model, kinds=kinds) as maps:
        for step in range(PASSES):
            x = image(step)
            model(x)
            h = reference.bn1(reference.conv1(x)).relu()
            response = reference.conv2(h)
            normed = reference.bn2(response)
            assert same_bits(maps["conv2", "response"].tensor, response.detach())
            assert same_bits(maps["bn2", "output"].tensor, normed.detach())
            # 2c: the block's z is the sum, and belongs to the block's last convolution.
            assert same_bits(maps["conv2", "preactivation"].tensor, (normed + x).detach())
            assert same_bits(maps["conv2"].tensor, (normed + x).relu().detach())


# -- 3, 6: shared modules, siamese nets, recursion ------------------------------------------------


@torch.no_grad()
def test_3_one_relu_used_twice_gives_two_owners() -> None:
    model = Residual().eval()
    with capture(model) as maps:
        for step in range(PASSES):
            model(image(step))
            assert maps.layers == ["conv1", "conv2"]
            assert [fm.layer for fm in maps.select(kind="activation")] == ["conv1", "conv2"]
            assert {fm.call for fm in maps} == {0}


class Siamese(nn.Module):
    """One branch for two images."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.branch(left).mean() - self.branch(right).mean()


@torch.no_grad()
def test_6_siamese_calls_are_numbered_and_a_bare_lookup_is_ambiguous() -> None:
    model = Siamese().eval()
    with capture(model) as maps:
        for step in range(PASSES):
            left, right = image(step), image(step + 10)
            model(left, right)
            for call, x in enumerate((left, right)):
                (a,) = maps.select(layer="branch.0", kind="activation", call=call)
                assert a.call == call
                assert same_bits(a.tensor, model.branch[0](x).relu())
            with pytest.raises(AmbiguousMapError, match="call"):
                maps["branch.0"]


class Recursive(nn.Module):
    """Calls one linear layer as often as its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        return x if depth == 0 else self(torch.tanh(self.cell(x)), depth - 1)


@torch.no_grad()
@pytest.mark.parametrize("depths", [(3, 3, 3), (1, 4, 2, 4), (4, 1, 1, 3)])
def test_6_recursion_of_changing_depth(depths: tuple[int, ...]) -> None:
    model = Recursive().eval()
    with capture(model) as maps:
        for step, depth in enumerate(depths):
            x = image(step)[0, 0, :4, :4]
            model(x, depth)
            found = maps.select(layer="cell", kind="activation", step=-1)
            assert [fm.call for fm in found] == list(range(depth))
            for fm in found:
                x = torch.tanh(model.cell(x))
                assert same_bits(fm.tensor, x)
                assert fm.step == step


# -- 4: functional nonlinearities -----------------------------------------------------------------


class Functional(nn.Module):
    """σ as a function, as a method, in place, and one with no layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.conv3 = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = self.conv2(x).tanh()
        x = self.conv3(x)
        return F.gelu(x, approximate="tanh")


@torch.no_grad()
def test_4_functional_nonlinearities_have_their_layers() -> None:
    model = Functional().eval()
    with capture(model) as maps:
        for step in range(PASSES):
            x = image(step)
            model(x)
            a1 = F.relu(model.conv1(x))
            a2 = model.conv2(a1).tanh()
            z3 = model.conv3(a2)
            assert same_bits(maps["conv1"].tensor, a1)
            assert same_bits(maps["conv2"].tensor, a2)
            assert same_bits(maps["conv3", "preactivation"].tensor, z3)
            assert same_bits(maps["conv3"].tensor, F.gelu(z3, approximate="tanh"))
            sigmas = [fm.nonlinearity for fm in maps.select(kind="activation")]
            assert sigmas == ["relu", "tanh", "gelu"]


class _Mlp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        # Not one hand-written activation (the shape changes), and no layer is behind it.
        return F.gelu(x).flatten(1)


@torch.no_grad()
def test_4_no_layer_behind_names_the_calling_module_and_the_function() -> None:
    model = nn.ModuleDict({"mlp": _Mlp(), "head": nn.Linear(108, 2)})
    model.forward = lambda x: model["head"](model["mlp"](x))  # type: ignore[method-assign]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([model["mlp"]])
            self.head = model["head"]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[0](x))

    net = Net().eval()
    with capture(net) as maps:
        for step in range(PASSES):
            net(image(step))
            assert same_bits(maps["blocks.0:gelu"].tensor, F.gelu(image(step)))


@torch.no_grad()
def test_4_layers_without_nonlinearity_have_a_response_and_no_activation() -> None:
    model = ConvReLU().eval()
    with capture(model) as maps:
        logits = model(image())
    assert same_bits(maps["head", "preactivation"].tensor, logits)
    assert maps["head", "preactivation"].nonlinearity is None
    with pytest.raises(NoActivationError, match="head"):
        maps["head"]


# -- 5: modules that return more than a tensor ----------------------------------------------------


@dataclass
class Result:
    """A user's own output class."""

    logits: Tensor
    hidden: Tensor


class ReturnsDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.fc(x)
        return {"w": h, "v": h.relu()}


class ReturnsDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Result:
        h = torch.tanh(self.fc(x))
        return Result(logits=h.sum(-1), hidden=h)


class Wrap(nn.Module):
    """Puts a module under a name, and passes its output on untouched."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        (self._only,) = children

    def forward(self, *args: Any) -> Any:
        return self.get_submodule(self._only)(*args)


def _sequence(step: int = 0) -> Tensor:
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(step))


def _outputs(model: nn.Module, name: str, x: tuple[Any, ...]) -> dict[str, Tensor]:
    with torch.no_grad(), capture(model, layers=name, kinds=("output",)) as maps:
        for _ in range(PASSES):
            result = model(*x)
            found = {fm.path: fm.tensor for fm in maps if fm.layer == name}
    assert all(fm.kind == "output" for fm in maps)
    found["result"] = result
    return found


@pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")
def test_5_lstm_output_has_paths() -> None:
    model = Wrap(lstm=nn.LSTM(4, 3, batch_first=True)).eval()
    found = _outputs(model, "lstm", (_sequence(),))
    sequence, (h, c) = found.pop("result")
    assert set(found) == {"[0]", "[1][0]", "[1][1]"}
    assert same_bits(found["[0]"], sequence)
    assert same_bits(found["[1][0]"], h)
    assert same_bits(found["[1][1]"], c)


def test_5_attention_output_has_paths() -> None:
    model = Wrap(attn=nn.MultiheadAttention(4, 2, batch_first=True)).eval()
    x = _sequence()
    found = _outputs(model, "attn", (x, x, x))
    out, weights = found.pop("result")
    assert same_bits(found["[0]"], out)
    assert same_bits(found["[1]"], weights)


def test_5_dict_output_has_paths() -> None:
    found = _outputs(Wrap(part=ReturnsDict()).eval(), "part", (_sequence(),))
    result = found.pop("result")
    assert set(found) == {"['w']", "['v']"}
    assert same_bits(found["['w']"], result["w"])
    assert same_bits(found["['v']"], result["v"])


def test_5_dataclass_output_has_paths() -> None:
    found = _outputs(Wrap(part=ReturnsDataclass()).eval(), "part", (_sequence(),))
    result = found.pop("result")
    assert set(found) == {".logits", ".hidden"}
    assert same_bits(found[".logits"], result.logits)


def test_5_model_output_has_paths() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = Wrap(gpt=transformers.GPT2LMHeadModel(config)).eval()
    found = _outputs(model, "gpt", (torch.arange(8)[None],))
    result = found.pop("result")
    assert ".logits" in found
    assert same_bits(found[".logits"], result.logits)


# -- 7: nothing is left behind, however the block ends --------------------------------------------


class _Bomb(nn.Module):
    """Raises when armed."""

    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return x


def _bombed() -> tuple[nn.Module, _Bomb]:
    bomb = _Bomb()
    return nn.Sequential(Residual(), bomb, nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1)).eval(), bomb


def test_7_after_return() -> None:
    model, _ = _bombed()
    before = fingerprint(model)

    def use() -> Tensor:
        with capture(model) as maps:
            model(image())
            return maps["3", "preactivation"].tensor

    assert use().shape == (2, 2, 6, 6)
    assert_nothing_left(before, model)


@pytest.mark.parametrize("passes", [0, 1, 2], ids=lambda n: f"after {n} passes")
@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt(), SystemExit(3)])
def test_7_after_an_error_in_forward(error: BaseException, passes: int) -> None:
    model, bomb = _bombed()
    before = fingerprint(model)
    try:
        with torch.no_grad(), capture(model) as maps:
            for step in range(passes):
                model(image(step))
            bomb.error = error
            model(image())
    except type(error):
        pass  # as it must; `pytest.raises` would not do, it takes SystemExit for its own
    del bomb.error
    assert_nothing_left(before, model)
    assert modes() == NO_MODES
    if passes:  # what was captured before stays readable
        assert maps.layers


def test_7_a_caught_error_in_forward_does_not_spoil_later_passes() -> None:
    model, bomb = _bombed()
    with torch.no_grad(), capture(model) as maps:
        for step in range(2 * PASSES):
            if step % 2:
                bomb.error = ValueError("boom")
                with pytest.raises(ValueError, match="boom"):
                    model(image(step))
                bomb.error = None
            else:
                model(image(step))
                x = image(step)
                block = model[0]
                z = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())) + x
                (a,) = maps.select(layer="0.conv2", kind="activation", step=-1, call=0)[:1]
                assert same_bits(a.tensor, z.relu())


def test_7_after_an_error_in_the_block() -> None:
    model, _ = _bombed()
    before = fingerprint(model)
    with contextlib.suppress(ZeroDivisionError), capture(model):
        model(image())
        1 / 0  # noqa: B018
    assert_nothing_left(before, model)


def test_7_after_a_generator_is_closed() -> None:
    model, _ = _bombed()
    before = fingerprint(model)

    def passes() -> Iterator[Tensor]:
        with capture(model) as maps:
            while True:
                model(image())
                yield maps["0.conv1"].tensor

    generator = passes()
    next(generator)
    next(generator)
    generator.close()
    assert_nothing_left(before, model)


class Sorts(nn.Module):
    """Leaves a generator behind, whose code runs on after the block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.row = nn.Linear(4, 4), [3, 1, 2]

    def rows(self) -> Iterator[list[int]]:
        yield self.row
        yield sorted(self.row)

    def forward(self, x: Tensor) -> Tensor:
        self.left = self.rows()
        next(self.left)
        return torch.relu(self.fc(x))


def test_7_a_generator_goes_on_after_the_block() -> None:
    model = Sorts()
    with torch.no_grad(), capture(model):
        for _ in range(3):
            model(torch.randn(2, 4))
    assert next(model.left) == [1, 2, 3]


# -- 8: activation checkpointing ------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.block = Residual()
        self.block.bn1.momentum = self.block.bn2.momentum = 0.0  # recomputation updates it twice
        self.drop = nn.Dropout(0.5)
        self.reentrant = reentrant

    def _inner(self, x: Tensor) -> Tensor:
        return self.drop(self.block(x))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._inner, self.stem(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_8_the_forward_is_kept_and_the_recomputation_ignored(reentrant: bool) -> None:
    model = Checkpointed(reentrant).train()
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for step in range(PASSES):
            seed(step)
            model.zero_grad()
            out = model(image(step))
            kept = [(fm.layer, fm.kind, fm.call, fm.tensor.clone()) for fm in maps]
            out.square().mean().backward()
            after = [(fm.layer, fm.kind, fm.call, fm.tensor) for fm in maps]
            assert [k[:3] for k in kept] == [a[:3] for a in after]
            assert all(same_bits(k[3], a[3]) for k, a in zip(kept, after, strict=True))
            assert [fm.layer for fm in maps.select(kind="activation")] == [
                "block.conv1",
                "block.conv2",
            ]
            assert {fm.step for fm in maps} == {step}

            seed(step)
            bare.zero_grad()
            expected = bare(image(step))
            expected.square().mean().backward()
            assert same_bits(out.detach(), expected.detach())
            for p, q in zip(model.parameters(), bare.parameters(), strict=True):
                assert p.grad is not None
                assert q.grad is not None
                assert same_bits(p.grad, q.grad)


# -- 10: no graph by default ----------------------------------------------------------------------


def test_10_the_graph_is_freed_by_default() -> None:
    model = ConvReLU().train()
    with capture(model) as maps:
        for step in range(PASSES):
            out = model(image(step))
            graph = graph_of(out)
            del out
            gc.collect()
            assert graph() is None
            assert not any(fm.tensor.requires_grad for fm in maps)
            assert all(fm.grad is None for fm in maps)


def test_10_maps_survive_backward_and_an_optimiser_step() -> None:
    model = ConvReLU().train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with capture(model) as maps:
        for step in range(PASSES):
            loss = model(image(step)).square().mean()
            held = [fm.tensor.clone() for fm in maps]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            assert all(same_bits(h, fm.tensor) for h, fm in zip(held, maps, strict=True))


# -- 11: a hundred steps in one block -------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_11_a_hundred_steps_stay_flat(train: bool) -> None:
    model = ConvReLU().train(train)
    sizes, alive = [], []
    with torch.set_grad_enabled(train), capture(model) as maps:
        for step in range(100):
            out = model(image(step))
            if train:
                loss_of(out).backward()
            del out
            sizes.append((maps.nbytes, len(maps)))
            if step in (5, 99):
                gc.collect()
                alive.append(sum(isinstance(o, Tensor) for o in gc.get_objects()))
    assert len(set(sizes[1:])) == 1
    assert alive[0] == alive[1]


# -- 14: roads that depend on the data ------------------------------------------------------------


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.left(x)) if x.sum() > 0 else self.relu(self.right(x))
        return self.head(x)


@torch.no_grad()
@pytest.mark.parametrize("signs", ["+-+-", "++--", "---+", "-+++-"])
def test_14_a_branch_is_labelled_by_the_road_it_took(signs: str) -> None:
    model = Branch().eval()
    with capture(model) as maps:
        for step, sign in enumerate(signs):
            x = _sequence(step).abs() * (1 if sign == "+" else -1)
            model(x)
            name = "left" if sign == "+" else "right"
            layer = model.get_submodule(name)
            assert maps.layers == [name, "head"]
            assert same_bits(maps[name, "preactivation"].tensor, layer(x))
            assert same_bits(maps[name].tensor, layer(x).relu())


@torch.no_grad()
def test_14_a_swapped_module_is_noticed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)).eval()
    with capture(model) as maps:
        for step in range(PASSES):
            model(image(step))
        model[1] = nn.Tanh()
        for step in range(PASSES):
            model(image(step))
            z = model[0](image(step))
            assert maps["0"].nonlinearity == "tanh"
            assert same_bits(maps["0"].tensor, z.tanh())
            assert same_bits(maps["0", "preactivation"].tensor, z)


@torch.no_grad()
def test_14_new_shapes_and_dtypes() -> None:
    model = ConvReLU().eval()
    with capture(model) as maps:
        for size in (6, 6, 9, 5, 6):
            x = image(size, size=size)
            model(x)
            assert same_bits(maps["conv"].tensor, model.bn(model.conv(x)).relu())
        model.double()
        model(image().double())
        assert maps["conv"].dtype == torch.float64


# -- 15: the model cannot tell --------------------------------------------------------------------


class Everything(nn.Module):
    """Dropout, batch norm, in-place flags, a user's hook: all that could be disturbed."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual()
        self.drop = nn.Dropout(0.5)
        self.relu = nn.RReLU(inplace=True)
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.drop(self.block(x)) * 1.5))


@pytest.mark.parametrize("train", [False, True])
def test_15_outputs_rng_buffers_and_flags_are_untouched(train: bool) -> None:
    model = Everything().train(train)
    model.block.eval()  # a flag of its own, as when fine-tuning
    seen: list[int] = []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    bare = copy.deepcopy(model)
    before = fingerprint(model)
    with capture(model):
        for step in range(PASSES):
            seed(step)
            out = model(image(step))
            state = torch.get_rng_state()
            seed(step)
            assert same_bits(out.detach(), bare(image(step)).detach())
            assert torch.equal(state, torch.get_rng_state())
    assert_nothing_left(before, model)
    state_dict = bare.state_dict()
    for name, value in model.state_dict().items():
        assert same_bits(value, state_dict[name]), name
    assert len(seen) == 2 * PASSES  # the user's hook ran for both, once a pass


# -- 16: threads ----------------------------------------------------------------------------------


def _in_thread(work: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


@torch.no_grad()
def test_16b_another_thread_runs_the_model_plainly() -> None:
    model = ConvReLU().eval()
    others: list[Tensor] = []

    def other() -> None:
        with torch.no_grad():
            others.append(model(image(77)))

    with capture(model) as maps:
        for step in range(PASSES):
            model(image(step))
            _in_thread(other)
            assert same_bits(maps["conv"].tensor, model.bn(model.conv(image(step))).relu())
            assert {fm.step for fm in maps} == {step}
    assert all(same_bits(o, model(image(77))) for o in others)


@torch.no_grad()
def test_16b_another_thread_runs_it_in_the_middle_of_a_pass() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), _Callback()).eval()
    plain = nn.Sequential(*model[:2])

    def other() -> None:
        with torch.no_grad():
            plain(image(77))

    with capture(model) as maps:
        for step in range(PASSES):
            model[2].work = lambda: _in_thread(other)
            model(image(step))
            assert len(maps.select(kind="activation")) == 1
            assert same_bits(maps["0"].tensor, model[0](image(step)).relu())


class _Callback(nn.Module):
    work: Callable[[], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.work is not None:
            self.work()
        return x


def test_16c_two_threads_capture_one_model() -> None:
    model = Residual().eval()
    before = fingerprint(model)
    barrier = threading.Barrier(2)
    errors: list[BaseException] = []

    def work(n: int) -> None:
        try:
            with torch.no_grad(), capture(model) as maps:
                for step in range(10):
                    barrier.wait(30)
                    x = image(100 * n + step)
                    model(x)
                    h = model.bn1(model.conv1(x)).relu()
                    z = model.bn2(model.conv2(h)) + x
                    assert same_bits(maps["conv1"].tensor, h)
                    assert same_bits(maps["conv2", "preactivation"].tensor, z)
                    assert same_bits(maps["conv2"].tensor, z.relu())
                    assert len(maps.select(kind="activation")) == 2
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    assert_nothing_left(before, model)


# -- 17: copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@torch.no_grad()
def test_17_copies_made_while_captured_work_and_are_not_captured(how: str) -> None:
    model = Residual().eval()
    with capture(model) as maps:
        for step in range(PASSES):
            model(image(step))
            held = [fm.tensor.clone() for fm in maps]
            if how == "deepcopy":
                twin = copy.deepcopy(model)
            elif how == "pickle":
                twin = pickle.loads(pickle.dumps(model))
            else:
                file = io.BytesIO()
                torch.save(model, file)
                file.seek(0)
                twin = torch.load(file, weights_only=False)
            # What rode along is inert, and gone after the copy's first run.
            assert same_bits(twin(image(9)), Residual.forward(twin, image(9)))
            assert {fm.step for fm in maps} == {step}
            assert all(same_bits(h, fm.tensor) for h, fm in zip(held, maps, strict=True))
    plain = copy.deepcopy(model)
    assert_nothing_left(fingerprint(plain), model)
    assert_nothing_left(fingerprint(plain), twin)  # and nothing rode along on the copy


# -- 18: attention and the fused encoder ----------------------------------------------------------


@torch.no_grad()
def test_18a_out_proj_by_name() -> None:
    model = Wrap(attn=nn.MultiheadAttention(4, 2, batch_first=True)).eval()
    x = _sequence()
    with capture(model) as maps:
        for _ in range(PASSES):
            out, _ = model(x, x, x)
            # torch projects tokens first and batch second, flattened: (T * N, E).
            z = maps["attn.out_proj", "preactivation"].tensor
            assert same_bits(z.reshape(5, 2, 4).transpose(0, 1), out)
            assert "attn.in_proj" in maps.layers
            with pytest.raises(NoActivationError):
                maps["attn.out_proj"]


@pytest.mark.parametrize("fast", [True, False])
@torch.no_grad()
def test_18b_transformer_encoder_layer(fast: bool) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    model = nn.Sequential(layer)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        bare = copy.deepcopy(model)
        with capture(model) as maps:
            for step in range(PASSES):
                x = _sequence(step)
                out = model(x)
                assert same_bits(out, bare(x))  # promise 2 holds for the fused kernel too
                a = maps["0.linear1"]
                assert a.nonlinearity == "relu"
                z = maps["0.linear1", "preactivation"].tensor
                assert same_bits(a.tensor, z.relu())
                normed = layer.norm1(x + layer.self_attn(x, x, x)[0])
                torch.testing.assert_close(z.view(2, 5, 8), layer.linear1(normed))
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


HEEDS_HOOKS = "_forward_hooks" in inspect.getsource(nn.TransformerEncoderLayer.forward)


class _Nothing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("watcher", ["hook", "mode"])
def test_18b_somebody_else_watches(watcher: str) -> None:
    # Then torch itself takes the ordinary path, and so does the captured model; torch 2.4 heeds no
    # hook, and takes the fused one.
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)).eval()
    fused = copy.deepcopy(model)
    if watcher == "hook":
        model[0].linear1.register_forward_hook(lambda *_: None)
    bare = copy.deepcopy(model)
    differs = False
    for step in range(PASSES):
        x = torch.randn(4, 33, 64, generator=torch.Generator().manual_seed(step))
        expected = fused(x)
        with _Nothing() if watcher == "mode" else contextlib.nullcontext(), capture(model) as maps:
            assert torch.equal(model(x), bare(x))
            fuses = watcher == "hook" and not HEEDS_HOOKS
            assert ("0" in {m.layer for m in maps.missed}) == fuses
            differs = differs or not torch.equal(bare(x), expected)
    assert differs or watcher == "hook" or NO_MODES[0]  # so it does matter which path is taken


# -- what cannot be captured is named --------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_fused_recurrent_kernels_are_named_with_the_reason_and_one_warning(
    kind: type[nn.RNNBase],
) -> None:
    model = nn.Sequential(Wrap(rnn=kind(4, 3)), _First(), nn.Linear(3, 2), nn.ReLU()).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with capture(model) as maps:
            for step in range(PASSES):
                model(_sequence(step))
    assert "0.rnn" in {m.layer for m in maps.missed}
    assert all(m.reason for m in maps.missed)
    assert sum(issubclass(w.category, CaptureWarning) for w in caught) == 1
    assert maps["2"].nonlinearity == "relu"


class _First(nn.Module):
    def forward(self, x: tuple[Tensor, Any]) -> Tensor:
        return x[0]
