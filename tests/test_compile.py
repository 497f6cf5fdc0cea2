"""torch.compile: the maps of compiled models, what is compiled again and what is not.

The witness cannot look into compiled code. It watches an eager copy of the model; with the backends
`eager` and `aot_eager` compiled code computes the same bits, and so must the maps be.
"""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from fmapkit import CaptureWarning, capture
from fmapkit.torchlib import caching
from tests import truth
from tests.checks import needs_compiled

BACKENDS = ["eager", "aot_eager"]
TORCH = tuple(int(n) for n in torch.__version__.split(".")[:2])
pytestmark = needs_compiled
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No compiled code from another test, and every setting of torch.compile as it was."""
    torch._dynamo.reset()
    before = torch._dynamo.config.get_config_copy()
    yield
    assert torch._dynamo.config.get_config_copy() == before
    torch._dynamo.reset()


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Block(nn.Module):
    """In-place σ, a residual sum in place, an activation by hand, a functional σ."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.bn, self.relu, self.swish = nn.BatchNorm2d(4), nn.ReLU(inplace=True), Swish()
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv1(x)))
        y = self.relu(y - 0.1)
        if self.broken:
            torch._dynamo.graph_break()
        y = self.swish(self.conv2(y))
        y += x
        return F.relu(y)


class Net(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.Sequential(Block(broken), Block(broken))
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.tanh(self.stem(x)))
        return F.leaky_relu_(self.fc(self.drop(x).mean((2, 3))))


def images(*sizes: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, 6, 6, generator=draw) for n in sizes]


def tags(maps: Any) -> list[tuple[Any, ...]]:
    return [(fm.layer, fm.kind, fm.nonlinearity, fm.call, fm.filters) for fm in maps]


def graphs() -> int:
    """How many graphs torch.compile has compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def whole(model: nn.Module, **options: Any) -> nn.Module:
    return torch.compile(model, **options)  # type: ignore[return-value]


def in_place(model: nn.Module, **options: Any) -> nn.Module:
    model.compile(**options)
    return model


def one_part(model: nn.Module, **options: Any) -> nn.Module:
    model.blocks = torch.compile(model.blocks, **options)  # type: ignore[assignment]
    return model


def two_parts(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(**options)
    return model


def check(make: Any, compile_: Any, inputs: list[Tensor], train: bool, warm: bool) -> Any:
    """Passes in a block, beside a bare compiled copy and an eager one under the witness."""
    torch.manual_seed(0)
    model = make()
    bare, eager, plain = (copy.deepcopy(model) for _ in range(3))
    compiled, bare = compile_(model), compile_(bare)
    mark = truth.fingerprint(model)
    if warm:
        for each in (compiled, bare, eager):
            truth.run_pass(each, (inputs[0],), train=train)
    plain.load_state_dict(eager.state_dict())
    expected, got = [], []
    with capture(plain) as maps:
        for n, x in enumerate(inputs):
            truth.run_pass(plain, (x,), train=train, seed_=n)
            expected.append(tags(maps))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        with capture(compiled) as maps:
            for n, x in enumerate(inputs):
                true = truth.run_pass(eager, (x,), train=train, seed_=n, witness=True)
                alone = truth.run_pass(bare, (x,), train=train, seed_=n)
                seen = truth.run_pass(compiled, (x,), train=train, seed_=n)
                truth.assert_same_pass(alone, seen)
                truth.assert_captured_exactly_once(maps, true.truth)
                got.append(tags(maps))
    assert got == expected  # the plain model's names, no `_orig_mod`
    assert maps.missed == []
    truth.assert_nothing_left(mark, model)
    return maps


# -- right, whatever was compiled and however ----------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compile_", [whole, in_place, one_part, two_parts])
def test_warm_compiled_models_in_training(compile_: Any, backend: str) -> None:
    check(Net, lambda m: compile_(m, backend=backend, fullgraph=True), images(2, 2, 2), True, True)


@pytest.mark.parametrize("compile_", [whole, one_part])
def test_warm_compiled_models_without_gradients(compile_: Any) -> None:
    check(Net, lambda m: compile_(m, backend="aot_eager"), images(2, 2), False, True)


@pytest.mark.parametrize("compile_", [whole, in_place])
def test_cold_compiled_models(compile_: Any) -> None:
    check(Net, lambda m: compile_(m, backend="eager"), images(2, 2), True, False)


@pytest.mark.parametrize("dynamic", [True, None])
def test_changing_shapes(dynamic: bool | None) -> None:
    check(
        Net,
        lambda m: whole(m, backend="aot_eager", dynamic=dynamic),
        images(2, 3),
        dynamic is None,
        True,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_breaks_of_the_models_own(backend: str) -> None:
    # The code after the break is compiled once, and runs for both blocks.
    check(lambda: Net(True), lambda m: whole(m, backend=backend), images(2, 2), True, True)


def test_torchs_own_module_types() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ReLU(True), nn.Conv2d(4, 2, 1), nn.Hardswish(True)
        )

    check(make, lambda m: whole(m, backend="aot_eager", fullgraph=True), images(2, 2), True, True)


@pytest.mark.parametrize("train", [True, False])
def test_attention_that_dynamo_keeps_as_one_call(train: bool) -> None:
    def make() -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")

    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 5, 8, generator=draw) for _ in range(2)]
    maps = check(make, lambda m: whole(m, backend="aot_eager"), inputs, train, True)
    assert {"self_attn.in_proj", "self_attn.out_proj"} <= set(maps.layers)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) if x.sum() > 0 else self.b(x)
        torch._dynamo.graph_break()
        return torch.relu(y)  # one compiled graph for either


@pytest.mark.parametrize("train", [True, False])
def test_labels_of_a_graph_are_those_of_the_pass(train: bool) -> None:
    ones = torch.ones(2, 3, 4, 4)
    inputs = [ones, -ones, ones, -ones]
    maps = check(Branch, lambda m: whole(m, backend="aot_eager"), inputs, train, True)
    assert maps.layers == ["b"]


class Views(nn.Module):
    """In-place σ on memory that has another name, that is an input's, and that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        x = x + 0
        torch.relu_(x[:, :1])
        y = self.fc(x)
        view = y[:, :2]
        torch.relu_(y)
        z = self.fc(y)
        z.sigmoid_()
        return view * 2, z, x


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_with_other_names(backend: str) -> None:
    inputs = [torch.randn(2, 4, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    check(Views, lambda m: whole(m, backend=backend, fullgraph=True), inputs, False, True)


IN_PLACE = {
    "function": (0, lambda m, x: m.b(F.relu(m.a(x), inplace=True))),
    "method": (0, lambda m, x: m.b(m.a(x).relu_())),
    "two": (0, lambda m, x: F.silu(m.b(F.silu(m.a(x), True)), True)),
    "returned": (0, lambda m, x: F.leaky_relu_(m.a(x), 0.2)),
    "view before": (1, lambda m, x: _with_view(m, m.a(x))),
    "read later": (1, lambda m, x: (lambda y: m.b(F.relu(y, True)) + y)(m.a(x))),
    "of a part": (1, lambda m, x: (lambda y: m.b(torch.cat([y[:, :2].relu_(), y], 1)))(m.c(x))),
    "of a view": (1, lambda m, x: F.relu_(m.a(x).t())),
    "after a write": (1, lambda m, x: F.relu_(m.a(x).add_(x))),
}


def _with_view(m: Any, y: Tensor) -> Tensor:
    view = y.view(-1, 4)
    result: Tensor = m.b(y.relu_()) + view
    return result


class InPlace(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return IN_PLACE[self.how][1](self, x)


@pytest.mark.parametrize("how", IN_PLACE)
def test_z_is_copied_in_a_graph_only_where_its_memory_is_not_its_own(how: str) -> None:
    clones = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        clones.append(sum(node.target == "clone" for node in gm.graph.nodes))
        return gm.forward

    inputs = [torch.randn(4, 4, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    check(lambda: InPlace(how), lambda m: whole(m, backend=backend), inputs, False, False)
    assert clones[-1] == IN_PLACE[how][0]


def test_an_input_written_to_in_place() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 4)
    given = x.clone()
    with capture(compiled) as maps, torch.no_grad():
        compiled(given)
    assert torch.equal(given, x.relu())  # as without capture
    assert torch.equal(maps["0", "preactivation"].tensor, x)


# -- what is compiled, and when -------------------------------------------------------------------


@pytest.mark.parametrize("compile_", [whole, in_place])
def test_one_compilation_for_a_block_and_none_after_it(compile_: Any) -> None:
    compiled = compile_(Net(), backend="eager")
    (x,) = images(2)
    compiled(x)
    before = graphs()
    with capture(compiled):
        for _ in range(3):
            compiled(x)
    assert graphs() == before + 1
    compiled(x)
    assert graphs() == before + 1  # the user's code is back in use
    for _ in range(2):
        with capture(compiled) as maps:
            compiled(x)
        assert len(maps) == len(set(tags(maps))) > 0
    assert graphs() == before + 1  # kept with the compiled function
    with capture(compiled, kinds="response") as maps:
        compiled(x)
    assert graphs() == before + 2  # another graph, since it returns something else
    assert {fm.kind for fm in maps} == {"response"}


def test_many_blocks_do_not_use_up_the_recompile_limit() -> None:
    compiled = whole(Net(), backend="eager", fullgraph=True)
    (x,) = images(2)
    compiled(x)
    for n in range(torch._dynamo.config.recompile_limit + 2):
        with capture(compiled, layers="blocks.*", filters=[n % 4], keep=n + 1):
            compiled(x)
    with torch.no_grad():
        compiled(x)  # would fall back to eager, and fail with fullgraph


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize("blocks", [1, 3])
def test_labels_follow_weights_that_are_swapped(blocks: int) -> None:
    torch.manual_seed(0)
    model, x = Two(), torch.randn(2, 4)
    compiled = torch.compile(model, backend="eager")

    def exchange() -> None:
        model.a, model.b = model.b, model.a

    def renew() -> None:
        model.a.weight = nn.Parameter(torch.randn(4, 4))

    changes = [lambda: None, exchange, renew]
    for n in range(blocks):
        with torch.no_grad(), capture(compiled, keep="all") as maps:
            for change in changes[n : n + 1] if blocks > 1 else changes:
                change()
                for _ in range(2):
                    compiled(x)
                    z = F.linear(x, model.a.weight, model.a.bias)
                    last = F.linear(z.relu(), model.b.weight, model.b.bias)
                    assert torch.equal(maps["a", "preactivation"].tensor, z)
                    assert torch.equal(maps["b", "preactivation"].tensor, last)
                    assert maps["b"].nonlinearity == "tanh"


class Listed(Two):
    """Runs what is in a list, by which dynamo does not tell one module of a type from another."""

    def __init__(self) -> None:
        super().__init__()
        self.running = [self.a]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.running[0](x))


@pytest.mark.parametrize("blocks", [1, 2])
def test_labels_of_one_graph_that_runs_another_module(blocks: int) -> None:
    model, x = Listed(), torch.randn(2, 4)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    seen = []
    for _ in range(blocks):
        with capture(compiled) as maps:
            for module in (model.a, model.b) if blocks == 1 else (model.running[0],):
                model.running[0] = module
                compiled(x)
                seen += maps.layers
        if blocks == 2:
            model.running[0] = model.b
    assert seen == ["a", "b"]


def test_labels_of_a_module_that_has_another_name_in_the_next_block() -> None:
    model, x = Listed(), torch.randn(2, 4)
    compiled = torch.compile(model, backend="eager")
    with capture(compiled) as maps:
        compiled(x)
    assert maps.layers == ["a"]
    model.c = model.a
    del model.a
    before = graphs()
    with capture(compiled) as maps:
        compiled(x)
    assert maps.layers == ["c"]
    assert graphs() == before


def test_what_is_known_of_a_graph_keeps_no_weights() -> None:
    model = Two()
    compiled = torch.compile(model, backend="eager")
    with capture(compiled):
        for _ in range(2):
            compiled(torch.randn(2, 4))
    weight = weakref.ref(model.a.weight)
    model.a.weight = nn.Parameter(torch.randn(4, 4))
    gc.collect()
    assert weight() is None


def test_what_is_missed_is_named_in_each_block() -> None:
    compiled = torch.compile(Two(), backend="eager")
    reasons = []
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CaptureWarning)
            with capture(compiled, kinds=("output", "activation")) as maps:
                compiled(torch.randn(2, 4))
        assert [fm.layer for fm in maps.select(kind="activation")] == ["a", "b"]
        reasons.append([(m.layer, m.reason) for m in maps.missed])
    assert {layer for layer, _ in reasons[0]} == {"a", "b"}
    assert reasons[0] == reasons[1] == reasons[2]


def test_every_runs_the_users_code_in_between() -> None:
    ran: list[int] = []

    def backend(gm: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            out = gm(*args)
            ran.append(len(out))
            return out

        return run

    compiled = whole(Net(), backend=backend)
    (x,) = images(2)
    with capture(compiled, every=2) as maps:
        steps = [(compiled(x), maps["fc"].step)[1] for _ in range(4)]
    assert steps == [0, 0, 2, 2]
    assert ran[1::2] == [1, 1]
    assert min(ran[0::2]) > 1
    assert maps.missed == []


# -- compiled inside the block --------------------------------------------------------------------


def test_compiled_inside_the_block() -> None:
    model = Net().eval()
    x, y = images(2, 2)
    with capture(model) as maps:
        model(x)
        eager = tags(maps)
        compiled = whole(model, backend="eager", fullgraph=True)
        out = compiled(y)
        assert (tags(maps), maps["fc"].step) == (eager, 1)
        model(x)
        assert (tags(maps), maps["fc"].step) == (eager, 2)
    assert maps.missed == []
    assert torch.equal(out, compiled(y))
    assert "_compiled_call_impl" not in compiled.__dict__
    assert type(compiled.__dict__["forward"]).__name__ == "function"


def test_compiled_before_and_captured_by_the_plain_model() -> None:
    model = Net()
    compiled = whole(model, backend="eager")
    (x,) = images(2)
    compiled(x)
    with capture(model) as maps:
        compiled(x)
        assert maps["fc"].step == 0
        model(x)
        assert maps["fc"].step == 1
    assert maps.missed == []


def test_parts_compiled_inside_the_block() -> None:
    model = Net().eval()
    (x,) = images(2)
    with capture(model) as maps:
        model(x)
        expected = tags(maps)
        model.blocks[0].compile(backend="eager")
        model(x)
        assert tags(maps) == expected
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")  # type: ignore[assignment]
        model(x)
        assert tags(maps) == expected
    assert maps.missed == []
    assert type(model.blocks[0]._compiled_call_impl).__name__ == "function"


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("whole", [True, False])
def test_model_compile_inside_the_block_is_captured_from_its_first_call(
    whole: bool, passes: int
) -> None:
    """`module.compile()` overwrites what stands before the model's call, and tells nobody."""
    model = Net().eval() if whole else nn.Sequential(nn.Linear(8, 8))
    x = images(2)[0] if whole else torch.randn(3, 8)
    expected = model(x)
    layer = "fc" if whole else "0"
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        with capture(model, kinds="response") as maps:
            for _ in range(passes):
                model(x)
            model.compile(backend="eager", fullgraph=True)
            for step in range(passes, passes + 2):
                assert torch.equal(model(x), expected)
                assert maps[layer, "response"].step == step
    assert maps.missed == []


# -- never silent ---------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("what", ["function", "model around", "model.compile around"])
def test_code_compiled_around_the_model_is_named(what: str, warm: bool) -> None:
    model = Net().eval()
    (x,) = images(2)
    if what == "function":
        run = torch.compile(lambda x: model(x) * 2, backend="eager", fullgraph=True)
        part: nn.Module = model
    else:
        run = (whole if what == "model around" else in_place)(model, backend="eager")
        part = model.blocks
    if warm:
        run(x)
    with pytest.warns(CaptureWarning, match="compiled"), capture(part) as maps:
        run(x)
    assert [m.layer for m in maps.missed] == [""]
    assert "compiled" in maps.missed[0].reason
    run(x)
    before = graphs()
    run(x)
    assert graphs() == before


def test_eager_code_between_graphs_is_named() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        @torch.compiler.disable
        def hidden(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.b(self.hidden(self.a(x))))

    compiled = whole(Hidden(), backend="eager")
    with pytest.warns(CaptureWarning, match="between the graphs"), capture(compiled) as maps:
        compiled(*images(2))
    assert maps["b"].nonlinearity == "relu"
    assert [m.layer for m in maps.missed] == [""]


def test_a_frame_that_dynamo_gives_up_is_named() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for conv in self.convs:
                x = torch.relu(conv(x))
                torch._dynamo.graph_break()  # in a loop: the whole frame runs eagerly
            return x

    compiled = whole(Loop(), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(compiled) as maps:
            compiled(*images(2))
    true = truth.run_with_truth(Loop(), *images(2))[1]
    assert len(maps.select(kind="activation")) == len(true) or maps.missed


PLAIN = """
import sys, torch
before = set(sys.modules)
from fmapkit import capture
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
with capture(model) as maps:
    for _ in range(2):
        model(torch.ones(1, 3))
assert len(maps) == 2
print(*sorted(set(sys.modules) - before))
"""


def test_a_model_that_is_not_compiled_needs_no_tracing_tools_of_torch() -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "fmapkit.session.session" in imported
    assert not imported & {
        "fmapkit.compiled.graph",
        "sympy",
        "torch.fx.experimental.symbolic_shapes",
    }


def test_a_graph_that_cannot_be_labelled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from fmapkit.compiled import variant

    def fail(*args: Any) -> Any:
        raise RuntimeError("no")

    model = Net().eval()
    (x,) = images(2)
    expected = model(x)
    monkeypatch.setattr(variant, "add_outputs", fail)
    compiled = whole(model, backend="eager")
    with pytest.warns(CaptureWarning, match="RuntimeError: no"), capture(compiled) as maps:
        assert torch.equal(compiled(x), expected)
    assert len(maps.missed) == 1


# -- promises -------------------------------------------------------------------------------------


def test_two_captures_at_once() -> None:
    compiled = whole(Net().eval(), backend="eager")
    (x,) = images(2)
    with capture(compiled) as outer:
        with capture(compiled, layers="fc", kinds="activation") as inner:
            compiled(x)
        compiled(x)
    assert len(inner) == 1
    assert len(outer) > 2
    assert outer["fc"].step == 1
    assert torch.equal(inner["fc"].tensor, outer["fc"].tensor)


def test_other_threads_run_the_users_code() -> None:
    compiled = whole(Net().eval(), backend="eager")
    x, y = images(2, 2)
    with capture(compiled) as maps:
        compiled(x)
        kept = maps["fc"].tensor.clone()
        other = threading.Thread(target=lambda: compiled(y))
        other.start()
        other.join()
        assert torch.equal(maps["fc"].tensor, kept)
    assert maps["fc"].step == 0
    assert maps.missed == []


@pytest.mark.parametrize("compile_", [whole, in_place])
def test_nothing_left_after_an_exception(compile_: Any) -> None:
    model = Net()
    compiled = compile_(model, backend="eager")
    mark = truth.fingerprint(model)
    with pytest.raises(Exception, match="channels"), capture(compiled):
        compiled(torch.randn(2, 5, 6, 6))
    truth.assert_nothing_left(mark, model)
    with capture(compiled) as maps:
        compiled(*images(2))
    assert len(maps) > 0


def test_copies_made_inside_are_not_captured() -> None:
    compiled = whole(Net().eval(), backend="eager")
    (x,) = images(2)
    with capture(compiled) as maps:
        out = compiled(x)
        twin = copy.deepcopy(compiled)
        assert torch.equal(twin(x), out)
        pickle.loads(pickle.dumps(compiled._orig_mod))
        assert maps["fc"].step == 0


def test_memory_is_flat_and_no_graph_is_kept() -> None:
    compiled = whole(Net(), backend="aot_eager")
    (x,) = images(2)
    with capture(compiled) as maps:
        for _ in range(3):
            out = compiled(x)
            held = maps.nbytes
            assert all(not fm.tensor.requires_grad for fm in maps)
        probe = truth.graph_of(out)
        del out
        assert probe() is None
        compiled(x)
        assert maps.nbytes == held


def test_a_loss_on_a_map_trains() -> None:
    model = Net()
    compiled = whole(model, backend="aot_eager")
    with capture(compiled, detach=False) as maps:
        compiled(*images(2))
        maps["blocks.0.conv1"].tensor.square().sum().backward()
    assert model.stem.weight.grad is not None
    assert model.fc.weight.grad is None or not model.fc.weight.grad.any()


def test_kinds_filters_and_outputs() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    compiled = whole(model, backend="eager")
    (x,) = images(2)
    with capture(model, kinds=("input", "response"), layers="stem") as plain:
        model(x)
    with capture(compiled, kinds=("input", "response"), layers="stem") as maps:
        compiled(x)
    assert tags(maps) == tags(plain)
    assert torch.equal(maps["stem", "response"].tensor, model.stem(x))
    with capture(compiled, layers="stem", filters=[3, 1]) as maps:
        compiled(x)
    assert maps["stem"].filters == (3, 1)
    assert torch.equal(maps["stem"].tensor, torch.tanh(model.stem(x))[:, [3, 1]])
    with capture(compiled, layers="", kinds="output") as maps:
        out = compiled(x)
    assert torch.equal(maps[""].tensor, out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointed_around_compiled_code(backend: str) -> None:
    model = Block()
    compiled = whole(model, backend=backend)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with capture(compiled) as maps:
        checkpoint(compiled, x, use_reentrant=False).sum().backward()
        assert maps["conv1"].step == 0
    assert maps.missed == []


# -- inductor -------------------------------------------------------------------------------------


@needs_compiler
def test_inductor() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2), nn.GELU())
    eager = copy.deepcopy(model)
    compiled = torch.compile(model)
    x = torch.randn(3, 4)
    with capture(compiled) as maps:
        seen = truth.run_pass(compiled, (x,), train=True)
    true = truth.run_pass(eager, (x,), train=True, witness=True)
    pairs = truth.captured_pairs(maps)
    assert [(p.layer, p.sigma) for p in pairs] == [("0", "relu"), ("2", "gelu")]
    for pair, run in zip(pairs, true.truth, strict=True):  # inductor rounds its own way
        torch.testing.assert_close(pair.z, run.z)
        torch.testing.assert_close(pair.a, run.a)
    assert torch.equal(F.relu(pairs[0].z), pairs[0].a)  # exact, however it is computed
    for seen_grad, grad in zip(seen.grads.values(), true.grads.values(), strict=True):
        torch.testing.assert_close(seen_grad, grad)
    assert maps.missed == []


@needs_compiler
@pytest.mark.parametrize("train", [False, True])
def test_inductor_leaves_maps_in_the_layout_that_it_has_chosen(train: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
        *(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
    )
    eager = copy.deepcopy(model)
    compiled = torch.compile(model)
    x = torch.randn(2, 3, 16, 16)
    with capture(compiled) as maps:
        seen = truth.run_pass(compiled, (x,), train=train)
    true = truth.run_pass(eager, (x,), train=train, witness=True)
    assert seen.outputs[0].stride() == true.outputs[0].stride()  # the model's own are as they were
    for pair, run in zip(truth.captured_pairs(maps), true.truth, strict=True):
        torch.testing.assert_close(pair.z, run.z)
        torch.testing.assert_close(pair.a, run.a)
        assert torch.equal(F.relu(pair.z), pair.a)
    for seen_grad, grad in zip(seen.grads.values(), true.grads.values(), strict=True):
        torch.testing.assert_close(seen_grad, grad, rtol=1e-4, atol=1e-4)
    # Convolutions run channels-last, where oneDNN is there; nothing is copied into another layout.
    if torch.backends.mkldnn.is_available() and TORCH >= (2, 7):
        z = maps["0", "preactivation"].tensor
        assert z.is_contiguous(memory_format=torch.channels_last)


class Sharing(nn.Module):
    """What it returns shares memory with a map."""

    def __init__(self, view: str) -> None:
        super().__init__()
        self.fc, self.last, self.view = nn.Linear(4, 6), nn.Linear(6, 8), view

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(F.relu(self.fc(x)))
        return {"t": y.t, "flat": y.flatten, "part": lambda: y[:, 2:], "same": lambda: y}[
            self.view
        ]()


@needs_compiler
@pytest.mark.parametrize("view", ["t", "flat", "part", "same"])
def test_inductor_and_an_output_that_shares_memory_with_a_map(view: str) -> None:
    torch.manual_seed(0)
    model, x = Sharing(view), torch.randn(3, 4)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model)
    with capture(compiled) as maps:
        output = compiled(x)
        output.square().sum().backward()
    eager(x).square().sum().backward()
    for parameter, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)
    held = maps["last", "preactivation"].tensor
    assert not held.requires_grad
    torch.testing.assert_close(held, eager.last(F.relu(eager.fc(x))).detach())


@needs_cuda
def test_cuda_graphs() -> None:
    model = Net().cuda().eval()
    compiled = torch.compile(model, mode="reduce-overhead")
    x, y = (i.cuda() for i in images(2, 2))
    with torch.no_grad(), capture(compiled, keep="all") as maps:
        for each in (x, y, x, y):
            compiled(each)
        first = maps.select(layer="stem", kind="activation")
    for fm, each in zip(first, (x, y, x, y), strict=True):
        torch.testing.assert_close(fm.tensor, torch.tanh(model.stem(each)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("act", "sigma"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.PReLU(4), "prelu"),
        (Swish(), "Swish"),
        (nn.Sequential(nn.GELU()), "gelu"),
    ],
)
def test_a_compiled_module_that_is_one_nonlinearity(
    act: nn.Module, sigma: str, backend: str
) -> None:
    """The graph is all of σ, so no module call inside of it says which layer's it is."""
    net, x = nn.Sequential(nn.Linear(4, 4), copy.deepcopy(act), nn.Linear(4, 2)), torch.randn(3, 4)
    z = net[0](x)
    a, expected = act(z.clone()), net(x)
    net[1].compile(backend=backend)
    with capture(net) as maps:
        for _ in range(3):
            assert torch.equal(net(x), expected)
            assert [(fm.layer, fm.kind, fm.nonlinearity) for fm in maps] == [
                ("0", "preactivation", sigma),
                ("0", "activation", sigma),
                ("2", "preactivation", None),
            ]
            assert torch.equal(maps["0", "preactivation"].tensor, z)
            assert torch.equal(maps["0"].tensor, a)
            assert maps.missed == []


@pytest.mark.parametrize(
    "how",
    [
        "torch.compile(model, backend='eager')",
        "torch.compile(model)",
        "torch.compile(model, backend=lambda graph, inputs: graph.forward)",
        "model.compile(backend='eager')",
    ],
)
def test_what_tells_that_something_was_compiled(how: str) -> None:
    """A block looks for compiled modules around its model only where torch.compile was called."""
    code = f"""
import sys, torch, torch._dynamo
from fmapkit import capture
from fmapkit.torchlib.compiled_modules import ever_compiled, around
model = torch.nn.Linear(2, 2)
with capture(model):
    model(torch.ones(1, 2))
assert not ever_compiled()
made = {how}
assert ever_compiled()
assert any(m is made or m is model for m in around(model))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("given", ["plain", "disabled"])
def test_what_runs_eagerly_by_request(given: str) -> None:
    """`torch.compiler.disable(module)` is of the class of a compiled module, and is none."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), torch.randn(2, 4)
    disabled = torch.compiler.disable(model)
    torch.compile(nn.Linear(1, 1), backend="eager")
    with capture(model if given == "plain" else disabled) as maps:
        for _ in range(3):
            disabled(x)
            z = F.linear(x, model[0].weight, model[0].bias)
            assert torch.equal(maps["0", "preactivation"].tensor, z)
            assert torch.equal(maps["0"].tensor, z.clamp(min=0))
        assert maps.missed == []


class Sliced(nn.Module):
    """Registers modules as it runs: `layers[:2]` makes a list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = torch.relu(layer(x))
        return x


def test_a_block_has_nothing_compiled_anew_that_registers_modules() -> None:
    """dynamo compares the global hooks for that; Llama, Mistral and Qwen register some."""
    model, other, x = Sliced().eval(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        y = compiled(x)
        with capture(compiled) as maps:
            compiled(x)
        made = graphs()
        for _ in range(3):
            with capture(other):
                assert torch.equal(compiled(x), y)
            with capture(compiled) as maps:
                assert torch.equal(compiled(x), y)
                assert torch.equal(maps["layers.1"].tensor, y)
            assert torch.equal(compiled(x), y)
    assert graphs() == made
    assert not maps.missed


FIRST = """
import sys, torch
from torch import nn
{imported}
from fmapkit import capture
assert {there} == ("torch._dynamo.eval_frame" in sys.modules)
model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval(), torch.ones(1, 3)
with torch.no_grad(), capture(model) as outer, capture(model) as maps:
    for _ in range(2):
        y = model(x)
        assert torch.equal(maps["0"].tensor, y)
    for _ in range(2):
        compiled = torch.compile(model, backend="eager")
        for _ in range(3):
            assert torch.equal(compiled(x), y)
            assert torch.equal(maps["0"].tensor, y), maps.missed
            assert torch.equal(outer["0"].tensor, y)
    assert not maps.missed, maps.missed
assert not hasattr(torch._dynamo.eval_frame.OptimizedModule.__init__, "__wrapped__")
assert not nn.modules.module._global_module_registration_hooks
"""


@pytest.mark.parametrize("imported", ["", "import torch._dynamo"])
def test_a_model_that_is_compiled_in_the_block_for_the_first_time(imported: str) -> None:
    code = FIRST.format(imported=imported, there=bool(imported))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class _Own(Two):
    """Has another forward by and by: its own, or its class's."""


@pytest.mark.parametrize("place", ["instance", "class"])
def test_a_compiled_model_runs_the_forward_that_it_has(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _Own().eval(), torch.randn(2, 4)
    compiled = torch.compile(model, backend="eager")

    def other(self: Any, x: Tensor) -> Tensor:
        return torch.sigmoid(self.a(x))

    with torch.no_grad(), capture(compiled) as maps:
        for _ in range(2):
            assert torch.equal(compiled(x), model(x))
            there = maps.layers
            with monkeypatch.context() as patch:
                if place == "class":
                    patch.setattr(_Own, "forward", other, raising=False)
                else:
                    patch.setattr(model, "forward", other.__get__(model), raising=False)
                assert torch.equal(compiled(x), torch.sigmoid(model.a(x)))
                assert maps.layers == ["a"]
                assert maps["a"].nonlinearity == "sigmoid"
        assert torch.equal(compiled(x), model(x))
        assert maps.layers == there
    assert not maps.missed


@pytest.mark.skipif(caching._version is None, reason="torch has no count of writes")
def test_a_captured_pass_of_compiled_code_writes_nothing_to_the_model() -> None:
    """dynamo's guards ask about that first, and else look at all of the model."""
    model, x = Net().eval(), images(2)[0]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), capture(compiled) as maps:
        for _ in range(3):
            compiled(x)
        watch = caching.DictWatch([m.__dict__ for m in model.modules()])
        assert watch.written()
        compiled(x)
        assert not watch.written()
        assert len(list(maps)) > 2


def test_hooks_of_others_on_a_compiled_model_run_as_they_come_and_go() -> None:
    model, x = Two().eval(), torch.randn(2, 4)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), capture(compiled) as maps:
        y = compiled(x)
        for _ in range(2):
            pairs = [(fm.layer, fm.kind, fm.tensor) for fm in maps]
            hook = model.register_forward_hook(lambda module, args, output: output + 1)
            assert torch.equal(compiled(x), y + 1)
            for layer, kind, tensor in pairs:
                assert torch.equal(maps[layer, kind].tensor, tensor)
            hook.remove()
            assert torch.equal(compiled(x), y)
            for layer, kind, tensor in pairs:
                assert torch.equal(maps[layer, kind].tensor, tensor)
    assert not maps.missed


def test_other_threads_can_make_tuples_meanwhile() -> None:
    """Whoever has a tuple that is yet to be filled, as `gc.get_objects` has, breaks that."""
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    torch.compile(model, backend="eager")(torch.ones(1, 2))
    stop, wrong = threading.Event(), []

    def make() -> None:
        while not stop.is_set():
            try:
                tuple(n for n in range(50))
            except SystemError as error:
                wrong.append(error)

    threads = [threading.Thread(target=make) for _ in range(2)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for _ in range(10):
            with capture(model) as maps:
                model(torch.ones(1, 2))
            assert len(maps) == 2
    finally:
        sys.setswitchinterval(before)
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
