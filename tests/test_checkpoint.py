"""Activation checkpointing: the maps are the forward's, once; the recomputation is not seen.

Truth: a bare copy of the model, run beside with the same seeds, under the witness of
tests/truth.py while its forward runs (its backward recomputes unwatched).
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    set_checkpoint_early_stop,
)

from benchmarks.memory import unnoticed
from fmapkit import CaptureWarning, MapOverwrittenError, capture
from tests import truth
from tests.truth import graph_of, same_bits

create_selective_checkpoint_contexts: Any = getattr(
    torch.utils.checkpoint, "create_selective_checkpoint_contexts", None
)

PASSES = 3
Run = Callable[[Any, Tensor], Tensor]


def rows(step: int) -> Tensor:
    data = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    return data.requires_grad_()  # a reentrant checkpoint needs one


class Block(nn.Module):
    """Proven: dropout, σ in place as a module and as a function, a sum that overwrites."""

    def __init__(self, σ: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.drop = nn.Dropout(0.4)
        self.act = σ(inplace=True)
        self.two = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.drop(self.norm(self.one(x))))
        y = self.two(y)
        y += x
        return F.silu(y, inplace=True)


class Unproven(Block):
    """The same with a branch on data: no unit as a whole, so its own σ is seen as a function."""

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            return x
        return torch.tanh(super().forward(x))


class Regions(nn.Module):
    """Blocks, each run by `how`, between plain layers."""

    def __init__(self, how: Callable[..., Tensor], block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 6), nn.ELU(inplace=True))
        self.first, self.second = block(), block()
        self.head = nn.Linear(6, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.how(self.first, x)
        x = self.how(lambda y: torch.sigmoid(self.second(y)), x)
        return self.head(x)


def reentrant(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=True)


def modern(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


def to_the_end(function: Any, *args: Any) -> Any:
    if "early_stop" not in inspect.signature(checkpoint).parameters:
        pytest.skip("this torch's checkpoint takes no early_stop")
    return checkpoint(function, *args, use_reentrant=False, early_stop=False)


def never_early(function: Any, *args: Any) -> Any:
    with set_checkpoint_early_stop(False):
        return checkpoint(function, *args, use_reentrant=False)


def nested(function: Any, *args: Any) -> Any:
    return modern(lambda *inner: modern(function, *inner), *args)


def nested_reentrant(function: Any, *args: Any) -> Any:
    return reentrant(lambda *inner: reentrant(function, *inner), *args)


def mixed(function: Any, *args: Any) -> Any:
    return modern(lambda *inner: modern(lambda *i: function(*i) * 1.0, *inner), *args)


def _no_selective(*_: Any, **__: Any) -> Any:
    pytest.skip("torch has selective checkpointing from 2.5 on")


def selective(*ops: Any) -> Callable[..., Any]:
    if create_selective_checkpoint_contexts is None:
        return _no_selective

    def how(function: Any, *args: Any) -> Any:
        # The blocks write to what is saved here: torch lets them, and so goes on with other values.
        context = functools.partial(
            create_selective_checkpoint_contexts, list(ops), allow_cache_entry_mutation=True
        )
        return checkpoint(function, *args, use_reentrant=False, context_fn=context)

    return how


HOWS = {
    "reentrant": reentrant,
    "modern": modern,
    "to the end": to_the_end,
    "never early": never_early,
    "nested": nested,
    "nested reentrant": nested_reentrant,
    "mixed": mixed,
    "selective norm": selective(torch.ops.aten.native_layer_norm.default),
    "selective σ": selective(torch.ops.aten.silu_.default, torch.ops.aten.relu_.default),
    "selective clone": selective(torch.ops.aten.clone.default, torch.ops.aten.index_select.default),
}


def check(model: nn.Module, **options: Any) -> None:
    """Outputs, gradients, RNG and buffers as of a bare copy; the maps as of its forward."""
    bare = copy.deepcopy(model)
    with capture(model, **options) as maps:
        for step in range(PASSES):
            seen: list[Any] = []
            truth.seed(step)
            bare.zero_grad()
            x = rows(step)
            with truth.Witness(bare) as witness:
                true = bare(x)
            truth.loss_of(true).backward()

            truth.seed(step)
            model.zero_grad()
            mine = rows(step)
            out = model(mine)
            seen = [(fm.layer, fm.kind, fm.call, fm.tensor.detach().clone()) for fm in maps]
            truth.loss_of(out).backward()
            after = [(fm.layer, fm.kind, fm.call, fm.tensor) for fm in maps]

            assert not maps.missed
            assert same_bits(out, true)
            assert same_bits(mine.grad, x.grad)
            for p, q in zip(model.parameters(), bare.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                assert p.grad is None or same_bits(p.grad, q.grad)
            for b, c in zip(model.buffers(), bare.buffers(), strict=True):
                assert same_bits(b, c)
            assert torch.equal(truth.torch.get_rng_state(), torch.get_rng_state())
            assert [s[:3] for s in seen] == [a[:3] for a in after]
            assert all(same_bits(s[3], a[3]) for s, a in zip(seen, after, strict=True))
            if "filters" not in options:
                truth.assert_captured_exactly_once(maps, witness.runs)
    truth.assert_nothing_left(truth.fingerprint(bare), model)


@pytest.mark.parametrize(
    "block", [Block, Unproven, lambda: Block(nn.Hardtanh), lambda: Block(nn.ELU)]
)
@pytest.mark.parametrize("how", HOWS)
def test_the_forward_once_and_nothing_changed(how: str, block: Any) -> None:
    check(Regions(HOWS[how], block))


@pytest.mark.parametrize("how", HOWS)
def test_copies_of_ours_shift_nothing(how: str) -> None:
    # Checkpointing matches what is saved, and which operators run, by their order.
    class Cloning(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x).clone()
            y = y.index_select(1, torch.arange(5, -1, -1))
            return F.silu(F.elu(y), inplace=True).clone()

    check(Regions(HOWS[how], Cloning), kinds=("input", "response", "preactivation", "activation"))
    check(Regions(HOWS[how], Cloning), filters=[0, 3], layers=["*.one", "*.two"])
    if "reentrant" not in how:
        check(Regions(HOWS[how], Cloning), detach=False)
        check(Regions(HOWS[how], Cloning), filters=[0, 3], layers=["*.one", "*.two"], detach=False)


def test_a_recomputation_that_writes_to_a_map_is_noticed() -> None:
    # The linear layer's output is kept for backward, and written to there once more. Only the
    # maps whose memory that is can tell; they must not hand out what it left there.
    model = Regions(selective(torch.ops.aten.addmm.default))
    with capture(model) as maps:
        for step in range(PASSES):
            out = model(rows(step))
            before = {(fm.layer, fm.kind): fm.tensor.clone() for fm in maps}
            truth.loss_of(out).backward()
            raised = 0
            for key, value in before.items():
                try:
                    assert same_bits(maps[key].tensor, value)
                except MapOverwrittenError:
                    raised += 1
            assert 0 < raised < len(before)


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("segments", [1, 2])
def test_checkpoint_sequential(segments: int, use_reentrant: bool, seen: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            act = nn.ReLU(inplace=True)  # shared
            self.layers = nn.Sequential(
                *(nn.Linear(6, 6), nn.Dropout(0.3), act, nn.Linear(6, 6), act, nn.Linear(6, 6)),
                *(nn.LeakyReLU(inplace=True), Block()),
            )

        def forward(self, x: Tensor) -> Tensor:
            if seen and x.isnan().any():
                return x
            return checkpoint_sequential(self.layers, segments, x, use_reentrant=use_reentrant)

    check(Net())


def test_every_pass_once_when_steps_are_interleaved() -> None:
    # Two forwards, then both backwards: the recomputations come while no pass runs.
    model = Regions(modern)
    bare = copy.deepcopy(model)
    with capture(model, keep="all") as maps:
        for step in range(PASSES):
            truth.seed(step)
            outs = [model(rows(2 * step)), model(rows(2 * step + 1))]
            truth.seed(step)
            true = [bare(rows(2 * step)), bare(rows(2 * step + 1))]
            for out, other in zip(outs, true, strict=True):
                assert same_bits(out, other)
                truth.loss_of(out).backward()
                truth.loss_of(other).backward()
            assert len({fm.step for fm in maps.select()}) == 2 * step + 2
            per_pass = [len(maps.select(step=n)) for n in range(2 * step + 2)]
            assert len(set(per_pass)) == 1
        for p, q in zip(model.parameters(), bare.parameters(), strict=True):
            assert same_bits(p.grad, q.grad)


class Inner(nn.Module):
    """Calls backward in its forward, over a region that was checkpointed before."""

    def __init__(self, how: Callable[..., Tensor], by: str) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Tanh())
        self.late = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))
        self.how = how
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = self.how(self.block, x)
        if self.by == "method":
            y.sum().backward(retain_graph=True)
            force = x.grad
        elif self.by == "grad":
            (force,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        else:
            torch.autograd.backward([y.sum()], retain_graph=True)
            force = x.grad
        return self.block(self.late(y + force))


class Straight(Inner):
    """The same without a branch, so that nothing but the backward call is unproven."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = self.how(self.block, x)
        y.sum().backward(retain_graph=True)
        return self.block(self.late(y + x.grad))


class Unhidden(nn.Module):
    """A region of the outer model, recomputed while an inner model's forward is under way."""

    def __init__(self, how: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))
        self.inner = Reader(self.stem)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return self.inner(x, self.how(self.stem, x))


class Reader(nn.Module):
    """Its only questionable call is `.backward()`; it runs the region's own layers, too."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = self.stem(y)
        y.sum().backward(retain_graph=True)
        return self.stem(a * 2 + x.grad)


@pytest.mark.parametrize("how", [modern, to_the_end, reentrant, lambda f, x: f(x)])
@pytest.mark.parametrize(
    "net",
    [
        *(functools.partial(Inner, by=by) for by in ("method", "grad", "function")),
        functools.partial(Straight, by=""),
        Unhidden,
    ],
)
def test_a_recomputation_inside_a_pass_is_not_mixed_in(net: Any, how: Any) -> None:
    if how is reentrant and getattr(net, "keywords", {}).get("by") == "grad":
        pytest.skip("torch does not allow it")
    model = net(how)
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for step in range(PASSES + 1):
            with _ForwardWitness(bare) as witness:
                true = bare(rows(step))
            out = model(rows(step))
            assert same_bits(out, true)
            truth.assert_captured_exactly_once(maps, witness.runs)
            assert not maps.missed


class _ForwardWitness(truth.Witness):
    """The witness, blind during backward: it must not take the recomputation for the forward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._current_graph_task_id() != -1:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch._C._current_graph_task_id() == -1:
            super()._before(module, args)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            super()._after(module, args, output)


# -- what is held ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [reentrant, modern])
def test_no_graph_is_kept_alive(how: Any, collected: None) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))

        def forward(self, x: Tensor) -> Tensor:
            return how(self.body, x)

    model = Whole()
    with capture(model) as maps:
        for step in range(PASSES):
            out = model(rows(step))  # the region's output is an activation
            graph = graph_of(out)
            del out
            assert graph() is None
            assert not maps["body.0"].tensor.requires_grad


@pytest.mark.parametrize("how", [reentrant, modern])
def test_the_captured_model_itself_is_checkpointed(how: Any, collected: None) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))
    with capture(model) as maps:
        for step in range(PASSES):
            out = how(model, rows(step))
            kept = maps["0"].tensor.clone()
            graph = graph_of(out)
            out.sum().backward()
            del out
            assert graph() is None
            assert {fm.step for fm in maps} == {step}
            assert same_bits(maps["0"].tensor, kept)
        assert len(maps) == 2
        assert not maps.missed


@unnoticed
class _Alive(TorchDispatchMode):
    """How many bytes of what was made inside are alive, at most and now."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {t.untyped_storage()._cdata for t in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in truth.tensors_of(out):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._seen:
                continue
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("block", [Block, Unproven])
@pytest.mark.parametrize("how", [reentrant, modern, nested])
def test_nothing_but_the_maps_is_kept(how: Any, block: Any, collected: None) -> None:
    # Not after the pass, and not while it runs: that is when memory is short.
    model = Regions(how, block)
    one = 4 * 6 * 4  # bytes of one tensor inside

    def alive(x: Tensor) -> tuple[int, int]:
        with _Alive([x, *model.parameters()]) as memory:
            out = model(x)
            now = memory.now
        del out
        return now, memory.peak

    passes = 6
    bare = [alive(rows(step)) for step in range(passes)]
    with capture(model, layers="head") as maps:  # one small map
        watched = [alive(rows(step)) for step in range(passes)]
        assert maps.missed == []
        assert maps.nbytes == 4 * 3 * 4
    assert [now for now, _ in watched] == [now for now, _ in bare]
    # Up to three passes are traced until all code that runs records what it decides.
    for (_, peak), (_, true_peak) in list(zip(watched, bare, strict=True))[3:]:
        # One at a time is copied by the scope, which learns too late that nobody wants it.
        assert peak <= true_peak + (one if block is Unproven else 0)


# -- gradients, and maps in the graph --------------------------------------------------------------


def _twin(model: Regions, x: Tensor) -> tuple[Tensor, dict[Any, Tensor]]:
    """The same without checkpoints, out of place, with every tensor of interest."""
    maps: dict[Any, Tensor] = {}

    def site(layer: str, z: Tensor, a: Tensor, call: int = 0) -> Tensor:
        maps[layer, "preactivation", call], maps[layer, "activation", call] = z, a
        return a

    def block(name: str, b: Block, x: Tensor) -> Tensor:
        z = b.drop(b.norm(b.one(x)))
        y = b.two(site(f"{name}.one", z, torch.relu(z))) + x
        return site(f"{name}.two", y, F.silu(y))

    z = model.stem[0](x)
    x = site("stem.0", z, F.elu_(z.clone()))
    x = block("first", model.first, x)
    y = block("second", model.second, x)
    return model.head(site(":sigmoid", y, torch.sigmoid(y))), maps


MODERN = ["modern", "to the end", "never early", "nested", "mixed", "selective norm"]


@pytest.mark.parametrize("how", MODERN)
def test_gradients_of_maps_in_a_region(how: str) -> None:
    model = Regions(HOWS[how])
    twin = copy.deepcopy(model)
    with capture(model, gradients=True) as maps:
        for step in range(PASSES):
            truth.seed(step)
            out = model(rows(step))
            truth.seed(step)
            true_out, true = _twin(twin, rows(step))
            for t in true.values():
                t.retain_grad()
            assert all(fm.grad is None for fm in maps)
            truth.loss_of(out).backward()
            truth.loss_of(true_out).backward()
            for (layer, kind, call), t in true.items():
                (fm,) = maps.select(layer=layer, kind=kind, call=call)
                assert same_bits(fm.tensor, t.detach()), (layer, kind)
                assert same_bits(fm.grad, t.grad), (layer, kind)
            assert not maps.missed


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("how", MODERN)
def test_a_loss_on_maps_of_a_region(how: str, gradients: bool) -> None:
    model = Regions(HOWS[how])
    twin = copy.deepcopy(model)
    with capture(model, detach=False, gradients=gradients) as maps:
        for step in range(PASSES):
            model.zero_grad()
            twin.zero_grad()
            truth.seed(step)
            out = model(rows(step))
            truth.seed(step)
            true_out, true = _twin(twin, rows(step))
            loss = truth.loss_of(out) + maps["first.one", "preactivation"].tensor.abs().sum()
            loss = loss + maps["second.two"].tensor.square().sum()
            other = truth.loss_of(true_out) + true["first.one", "preactivation", 0].abs().sum()
            other = other + true["second.two", "activation", 0].square().sum()
            assert same_bits(loss, other)
            loss.backward()
            other.backward()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                assert same_bits(p.grad, q.grad)


@pytest.mark.parametrize("asked", [{"gradients": True}, {"detach": False}])
def test_what_a_reentrant_region_cannot_give_is_named(asked: dict[str, bool]) -> None:
    model = Regions(reentrant)
    warnings.simplefilter("ignore", CaptureWarning)
    with capture(model, **asked) as maps:
        for step in range(PASSES):
            truth.loss_of(model(rows(step))).backward()
            assert maps["first.one"].grad is None
            named = {m.layer for m in maps.missed}
            assert any(layer.startswith("first") for layer in named)
            assert any(layer.startswith("second") for layer in named)
            assert not any(layer.startswith(("stem", "head")) for layer in named)
            assert all("use_reentrant=False" in m.reason for m in maps.missed)


@pytest.mark.parametrize("asked", [{"gradients": True}, {"detach": False}])
@pytest.mark.parametrize("how", ["reentrant", "nested reentrant", "modern", "nested"])
@pytest.mark.parametrize("proven", [True, False])
def test_a_model_that_is_run_in_a_region_as_a_whole(
    proven: bool, how: str, asked: dict[str, bool]
) -> None:
    """Its gradients are right, or each map without one is named, by its layer or by the unit."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.fc(x)))

    class Branch(Inner):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if not x.isnan().any() else x

    model = Inner() if proven else Branch()
    twin = copy.deepcopy(model)
    warnings.simplefilter("ignore", CaptureWarning)
    with capture(model, **asked) as maps:
        for step in range(PASSES):
            out = HOWS[how](model, rows(step))
            z = twin.fc(rows(step))
            a = torch.tanh(z)
            y = twin.out(a)
            true = {
                ("fc", "preactivation"): z,
                ("fc", "activation"): a,
                ("out", "preactivation"): y,
            }
            for tensor in true.values():
                tensor.retain_grad()
            out.square().sum().backward()
            y.square().sum().backward()
            assert [(fm.layer, fm.kind) for fm in maps] == list(true)
            for fm in maps:
                assert same_bits(fm.tensor.detach(), true[fm.layer, fm.kind].detach())
            if "reentrant" in how:
                named = {m.layer for m in maps.missed}
                assert "" in named or {"fc", "out"} <= named
                assert all("use_reentrant=False" in m.reason for m in maps.missed)
                assert all(fm.grad is None for fm in maps if fm.layer == "fc")
                continue
            assert not maps.missed
            for fm in maps:
                if asked.get("gradients"):
                    assert torch.equal(fm.grad, true[fm.layer, fm.kind].grad)
                assert fm.tensor.requires_grad == ("detach" in asked)


def test_what_a_reentrant_region_returns_has_its_gradient() -> None:
    # Once it has returned, its output is part of the graph.
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(reentrant(lambda y: torch.sigmoid(self.fc(y)), x)))

    model = Net()
    twin = copy.deepcopy(model)
    warnings.simplefilter("ignore", CaptureWarning)
    with capture(model, gradients=True) as maps:
        for step in range(PASSES):
            model(rows(step)).square().sum().backward()
            z = torch.sigmoid(twin.fc(rows(step)))
            z.retain_grad()
            twin.head(torch.tanh(z)).square().sum().backward()
            (fm,) = maps.select(kind="preactivation", nonlinearity="tanh")
            assert same_bits(fm.grad, z.grad)


def test_nothing_is_named_where_gradients_are_off() -> None:
    model = Regions(reentrant)
    with capture(model, gradients=True) as maps, torch.no_grad():
        for step in range(PASSES):
            model(rows(step))
            assert not maps.missed


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_transformers(use_reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16, use_cache=False
    )
    model = transformers.GPT2Model(config).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ids = torch.arange(8).view(2, 4)
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for step in range(PASSES):
            truth.seed(step)
            with truth.Witness(bare) as witness:
                true = bare(ids).last_hidden_state
            rng = torch.get_rng_state()
            true.square().sum().backward()
            truth.seed(step)
            out = model(ids).last_hidden_state
            assert torch.equal(rng, torch.get_rng_state())
            truth.assert_captured_exactly_once(maps, witness.runs)
            out.square().sum().backward()
            truth.assert_captured_exactly_once(maps, witness.runs)
            assert len(maps.select(kind="activation")) == 2
            assert same_bits(out, true)
            for p, q in zip(model.parameters(), bare.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                assert p.grad is None or same_bits(p.grad, q.grad)
    assert not maps.missed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("how", HOWS)
def test_on_a_gpu_the_recomputation_runs_in_another_thread(how: str) -> None:
    model = Regions(HOWS[how]).cuda()
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for step in range(PASSES):
            truth.seed(step)
            true = bare(rows(step).detach().cuda().requires_grad_())
            truth.loss_of(true).backward()
            truth.seed(step)
            out = model(rows(step).detach().cuda().requires_grad_())
            kept = [fm.tensor.clone() for fm in maps]
            truth.loss_of(out).backward()
            assert same_bits(out, true)
            for p, q in zip(model.parameters(), bare.parameters(), strict=True):
                assert same_bits(p.grad, q.grad)
            assert len(kept) == len(list(maps))
            assert all(same_bits(k, fm.tensor) for k, fm in zip(kept, maps, strict=True))
