"""What is done to the model inside the block by others: copied, saved, exported, initialised."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fmapkit import CaptureWarning, capture
from fmapkit.torchlib.dynamo import COMPILED_FROM, UnknownError, context_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.relu(self.a(x))) + F.gelu(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm = Block(), nn.BatchNorm1d(6)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(x)))


class OwnState(Net):
    """Copies its attributes, all of them, by means of its own."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


class OwnCopy(Net):
    def __deepcopy__(self, memo: Any) -> Any:
        made = type(self).__new__(type(self))
        made.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return made


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    assert b"fmapkit" not in file.getvalue()
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def _pickled(model: nn.Module) -> nn.Module:
    written = pickle.dumps(model)
    assert b"fmapkit" not in written
    loaded: nn.Module = pickle.loads(written)
    return loaded


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "outputs and gradients": {"kinds": ("response", "activation", "output"), "gradients": True},
    "stop": {"layers": "block.a", "stop": True},
    "edit": {"edit": {"block.a": lambda fm: fm.tensor}},
    "every": {"every": 2},
}
X = torch.randn(3, 6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", [Net, OwnState, OwnCopy])
@pytest.mark.parametrize("twin_of", [copy.deepcopy, copy.copy, _pickled, _saved])
def test_a_copy_has_nothing_of_ours(
    twin_of: Callable[[nn.Module], nn.Module], kind: type[nn.Module], options: dict[str, Any]
) -> None:
    if twin_of is copy.copy and kind is OwnState:
        pytest.skip("shares what its original has, as it says")
    model = kind().eval()
    expected = model(X)
    with capture(model, **options):
        for passes in range(3):
            twin = twin_of(model)
            parts = [twin] if twin_of is copy.copy else list(twin.modules())  # which shares its own
            for part in parts:
                assert part._forward_hooks == part._forward_pre_hooks == {}
                assert part._forward_hooks_with_kwargs == part._forward_hooks_always_called == {}
                assert part.__dict__.get("_compiled_call_impl") is None
                assert "forward" not in part.__dict__
            if twin_of is not copy.copy:
                assert torch.equal(twin(X), expected), passes
            model(X)


def test_a_copy_that_the_forward_makes_and_hooks_of_others() -> None:
    """Others' hooks go with the copy, as they would; ours, which then come after them, do not."""

    class Averaged(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.__dict__["twin"] = copy.deepcopy(self.block)
            return super().forward(x)

    model = Averaged().eval()
    model.block.register_forward_pre_hook(_halved)
    model.block.a.register_forward_hook(_doubled)
    with capture(model) as maps:
        for _ in range(3):
            model(X)
            twin = model.__dict__["twin"]
            assert list(twin._forward_pre_hooks.values()) == [_halved]
            assert list(twin.a._forward_hooks.values()) == [_doubled]
            z = 2 * F.linear(X / 2, model.block.a.weight, model.block.a.bias)
            assert torch.equal(maps["block.a", "preactivation"].tensor, z)


def _halved(module: nn.Module, args: Any) -> Any:
    return (args[0] / 2,)


def _doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


EXPORTS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.jit.trace": lambda m: torch.jit.trace(m, X),
    "torch.jit.script": torch.jit.script,
    "torch.export": lambda m: torch.export.export(m, (X,), strict=False).module(),
    "torch.export, strict": lambda m: torch.export.export(m, (X,), strict=True).module(),
    "torch.fx": torch.fx.symbolic_trace,
    "make_fx": lambda m: make_fx(m)(X),
    "torch.compile": lambda m: torch.compile(m, backend="eager", fullgraph=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("part", ["", "block"])
@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
@torch.no_grad()
def test_an_export_is_that_of_the_bare_model(
    export: Callable[[nn.Module], Any], part: str, passes: int
) -> None:
    model = Net().eval()
    plain = export(model.get_submodule(part))
    expected, code = plain(X), getattr(plain, "code", "")
    torch._dynamo.reset()
    try:
        with capture(model) as maps:
            for _ in range(passes):
                model(X)
            exported = export(model.get_submodule(part))
            assert getattr(exported, "code", "") == code
            assert torch.equal(exported(X), expected)
            model(X)
            z = F.linear(X, model.block.a.weight, model.block.a.bias)
            assert torch.equal(maps["block.a"].tensor, z.relu())
        assert torch.equal(exported(X), expected)
    finally:
        torch._dynamo.reset()
    for module in model.modules():
        assert not {"_compiled_call_impl", "forward"} & module.__dict__.keys()


@pytest.mark.parametrize("what", ["torch.jit.trace", "torch.export", "make_fx"])
def test_a_recording_is_named(what: str) -> None:
    model = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with capture(model) as maps, torch.no_grad():
            EXPORTS[what](model)
    assert any(f"recorded by {what}" in m.reason for m in maps.missed if m.layer == "")


def test_scripting_looks_at_all_attributes_again_after_the_block() -> None:
    ignored = torch.jit._recursive.ignored_attributes
    before = list(ignored)
    with capture(Net()), capture(Net()):
        assert ignored != before
    assert ignored == before


# -- lazy modules ---------------------------------------------------------------------------------


def _lazy(image: bool) -> nn.Sequential:
    if not image:
        return nn.Sequential(nn.LazyLinear(4), nn.ReLU(inplace=True), nn.LazyLinear(2))
    norm, last = nn.LazyBatchNorm2d(), nn.LazyLinear(2)
    return nn.Sequential(nn.LazyConv2d(4, 3), norm, nn.SiLU(), nn.Flatten(), last)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kinds": ("response", "preactivation", "activation"), "gradients": True},
        {"filters": 1},
        {"layers": "0", "edit": {"0": lambda fm: fm.tensor * 1}},
    ],
)
def test_lazy_modules_from_their_first_pass_on(options: dict[str, Any], image: bool) -> None:
    x = torch.randn(3, 2, 6, 6) if image else torch.randn(3, 5)
    torch.manual_seed(0)
    bare = _lazy(image)
    expected = [bare(x) for _ in range(3)]  # the norm's running statistics move
    torch.manual_seed(0)
    model = _lazy(image)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        with capture(model, **options) as maps:
            for step in range(3):
                assert torch.equal(model(x), expected[step])
                z, a = maps["0", "preactivation"], maps["0"]
                first, norm, *_ = model
                if image:  # in training: by the batch's own statistics
                    y = F.conv2d(x, first.weight, first.bias)
                    y = F.batch_norm(y, None, None, norm.weight, norm.bias, training=True)
                else:
                    y = F.linear(x, first.weight, first.bias)
                picked = slice(1, 2) if "filters" in options else slice(None)
                assert torch.equal(z.tensor, y[:, picked])
                assert torch.equal(a.tensor, (F.silu(y) if image else y.relu())[:, picked])
                assert a.step == step
    assert [type(m).__name__[:4] for m in model if "Lazy" in type(m).__name__] == []
    assert maps.missed == []


# -- versions -------------------------------------------------------------------------------------


def test_a_torch_without_what_compiled_models_take_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reason goes into `missed`, as any of why compiled code cannot be looked into."""
    compiled: Any = torch.compile(Net(), backend="eager")
    monkeypatch.delattr(torch._dynamo.eval_frame, "innermost_backend", raising=False)
    with pytest.raises(UnknownError, match=r"takes torch 2\.11 or newer, and this is torch 2"):
        context_of(compiled.forward)


@pytest.mark.skipif(torch.__version__ >= COMPILED_FROM, reason="this torch takes compiled models")
@pytest.mark.parametrize("when", ["before", "warm", "inside"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_in_an_older_torch_compiled_models_run_as_ever_and_are_named(
    when: str, backend: str
) -> None:
    model = Net().eval()
    expected = model(X)
    says = (
        f"that takes torch {COMPILED_FROM} or newer, and this is torch {torch.__version__}; "
        "eager models are captured by this one, too"
    )
    compiled: Any = torch.compile(model, backend=backend) if when != "inside" else model
    if when == "warm":
        compiled(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model) as maps:
            if when == "inside":
                compiled = torch.compile(model, backend=backend)
            for _ in range(3):
                assert torch.equal(compiled(X), expected)
            assert len(maps) == 0
            assert any(says in m.reason for m in maps.missed)
            assert torch.equal(model(X), expected)
            z = F.linear(X, model.block.a.weight, model.block.a.bias)
            assert torch.equal(maps["block.a"].tensor, z.relu())
