"""Operators of torch's that compile what they are given: `torch.cond`, `flex_attention`, ….

torch runs them by torch.compile even in a plain model. Each model is made twice: one runs bare, the
other is captured, and outputs and gradients must be equal, bit for bit. What runs inside of such an
operator has no maps and is named; what is around it has maps, whose values are worked out by hand.
"""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch._higher_order_ops as higher
import torch.nn.functional as F
from torch import Tensor, cond, nn
from torch.utils.checkpoint import checkpoint

from fmapkit import capture, edits
from fmapkit.errors import CaptureWarning, EditError, MapOverwrittenError
from fmapkit.missed import Reason

flex = pytest.importorskip("torch.nn.attention.flex_attention")

pytestmark = [
    pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
]


class Around(nn.Module):
    """A layer, an operator in the middle, and a layer with σ after it."""

    name = ""  # of the operator

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.last(self.middle(torch.tanh(self.first(x)))))

    def middle(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class Cond(Around):
    name = "torch.cond"

    def middle(self, h: Tensor) -> Tensor:
        return torch.cond(h.sum() > 0, lambda t: t.relu(), lambda t: F.gelu(t), (h,))


class ByItsName(Around):
    name = "torch.cond"

    def middle(self, h: Tensor) -> Tensor:
        branch = cond
        return branch(h.sum() > 0, torch.sigmoid, torch.exp, (h,))


class Partial(Around):
    name = "torch.cond"

    def middle(self, h: Tensor) -> Tensor:
        choose = functools.partial(torch.cond, true_fn=torch.sigmoid, false_fn=torch.exp)
        return choose(h.sum() > 0, operands=(h,))


class Modules(Around):
    """The branches call modules of the model."""

    name = "torch.cond"

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.right = nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def middle(self, h: Tensor) -> Tensor:
        return torch.cond(h.sum() > 0, lambda t: self.left(t), lambda t: self.right(t), (h,))


class While(Around):
    name = "torch.while_loop"

    def middle(self, h: Tensor) -> Tensor:
        start = torch.tensor(0)
        step: Callable[..., Any] = lambda i, t: (i + 1, torch.sin(t))  # noqa: E731
        return torch.while_loop(lambda i, t: i < 3, step, (start, h))[1]


class Scan(Around):
    name = "scan"

    def middle(self, h: Tensor) -> Tensor:
        return _scan(lambda c, t: (c + t, torch.sigmoid(c * t)), torch.zeros_like(h[0]), h)[1]


class Associative(Around):
    name = "associative_scan"

    def middle(self, h: Tensor) -> Tensor:
        add: Callable[..., Any] = lambda a, b: torch.sigmoid(a) + b  # noqa: E731
        return higher.associative_scan(add, h, 0, combine_mode="generic")


class Map(Around):
    name = "map"

    def middle(self, h: Tensor) -> Tensor:
        return _map(lambda t: torch.sigmoid(t), h)


class Flex(Around):
    name = "flex_attention"

    def middle(self, h: Tensor) -> Tensor:
        q = h.view(1, 2, -1, 4)
        out = flex.flex_attention(q, q, q, score_mod=lambda s, b, i, j, k: torch.tanh(s) + j)
        return out.reshape(h.shape)


class ByItsOperator(Around):
    """The operator itself, past its public face: no compiler is run."""

    name = "torch.cond"

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Sigmoid(), nn.GELU()

    def middle(self, h: Tensor) -> Tensor:
        ops = torch.ops.higher_order
        return ops.cond(h.sum() > 0, self.left, self.right, (h,))


def _helper(h: Tensor) -> Tensor:
    return torch.cond(h.sum() > 0, torch.sigmoid, torch.exp, (h,))


HELPERS = {"of a table": _helper}


class Helper(Around):
    """A function runs it that the first pass knows nothing of."""

    name = "torch.cond"

    def middle(self, h: Tensor) -> Tensor:
        return HELPERS["of a table"](h)


_SOURCELESS: dict[str, Any] = {"torch": torch}
exec("def run(h): return torch.cond(h.sum() > 0, torch.sigmoid, torch.exp, (h,))", _SOURCELESS)


class Sourceless(Around):
    """The code that calls it cannot have a twin, so it is traced in every pass."""

    name = "torch.cond"

    def middle(self, h: Tensor) -> Tensor:
        return _SOURCELESS["run"](h)


class FromC(Around):
    """Code in C calls it, in a module that is traced in every pass."""

    name = "torch.cond"

    def middle(self, h: Tensor) -> Tensor:
        if h.sum() > 100:
            return h
        given = [h.sum() > 0], [torch.sigmoid], [torch.exp], [(h,)]
        return next(map(torch.cond, *given))


def _scan(*args: Any) -> Any:
    return higher.scan(*args)


def _map(*args: Any) -> Any:
    return higher.map(*args)


TRAINED = [Cond, ByItsName, Partial, Modules, Scan, Associative, Map, Helper, Sourceless, FromC]
ALL = [*TRAINED, While, Flex, ByItsOperator]  # which torch cannot differentiate on a CPU


def _inputs() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 4) + shift for shift in (2, -2, 0, 1, -1)]


def _check(model: Around, maps: Any, h: Tensor, z: Tensor) -> None:
    """The maps around it: `first` before it, `last` after it, each by its own layer."""
    assert torch.equal(maps["first", "activation"].tensor, h)
    assert torch.equal(maps["last", "preactivation"].tensor, z)
    assert torch.equal(maps["last", "activation"].tensor, z.relu())
    assert maps.layers == ["first", "last"]


def _by_hand(model: Around, x: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the operator, and z of the layer after it."""
    h = torch.tanh(F.linear(x, model.first.weight, model.first.bias))
    with torch.random.fork_rng():
        z = F.linear(model.middle(h), model.last.weight, model.last.bias)
    return h, z


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("how", ["no_grad", "inference"])
def test_outputs_and_maps_are_right(kind: type[Around], how: str) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    bare = copy.deepcopy(model)
    with torch.no_grad() if how == "no_grad" else torch.inference_mode():
        for x in _inputs():  # what torch compiles, it has compiled
            bare(x)
        expected = [(bare(x), *_by_hand(bare, x)) for x in _inputs()]
        with capture(model) as maps:
            for x, (y, h, z) in zip(_inputs(), expected, strict=True):
                assert torch.equal(model(x), y)
                _check(model, maps, h, z)
    [missed] = maps.missed
    assert missed.layer == ""
    assert missed.why is Reason.COMPILED_FUNCTION
    assert f"it calls {kind.name}," in missed.reason


@pytest.mark.parametrize("kind", TRAINED)
def test_gradients_are_right(kind: type[Around]) -> None:
    torch.manual_seed(0)
    model = kind()
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for x in _inputs():
            given, same = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, other = model(given), bare(same)
            assert torch.equal(y, other)
            y.square().sum().backward()
            other.square().sum().backward()
            assert torch.equal(given.grad, same.grad)
            assert maps.layers == ["first", "last"]
    for p, q in zip(model.parameters(), bare.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("kind", [Cond, Modules, While, Flex])
def test_nothing_is_left_behind(kind: type[Around]) -> None:
    model, x = kind().eval(), _inputs()[0]
    with torch.no_grad(), capture(model):
        model(x)
        model(x)
    assert not torch._C._len_torch_function_stack()
    assert not any("_compiled_call_impl" in m.__dict__ for m in model.modules())


def test_a_second_block_names_it_again() -> None:
    model = Cond().eval()
    for _ in range(3):
        with torch.no_grad(), capture(model) as maps:
            model(_inputs()[0])
            model(_inputs()[0])
        assert [m.why for m in maps.missed] == [Reason.COMPILED_FUNCTION]


@pytest.mark.parametrize("kind", [Cond, Modules, While, Flex, Helper, Sourceless, FromC])
def test_two_captures_at_once(kind: type[Around]) -> None:
    model = kind().eval()
    bare = copy.deepcopy(model)
    with torch.no_grad(), capture(model) as outer, capture(model) as inner:
        for x in _inputs():
            assert torch.equal(model(x), bare(x))
            for maps in (outer, inner):
                _check(model, maps, *_by_hand(bare, x))
    for maps in (outer, inner):
        assert [m.why for m in maps.missed] == [Reason.COMPILED_FUNCTION]


@pytest.mark.parametrize("kind", [Cond, Modules, While, Flex, Helper, Sourceless])
def test_with_edits(kind: type[Around]) -> None:
    """z of the last layer is doubled: so is its ReLU, which is what the model returns."""
    model = kind().eval()
    bare = copy.deepcopy(model)
    with torch.no_grad(), capture(model, edit={("last", "preactivation"): edits.scale(2)}) as maps:
        for x in _inputs():
            assert torch.equal(model(x), 2 * bare(x))
            assert torch.equal(maps["first", "activation"].tensor, _by_hand(bare, x)[0])


def test_a_traced_module_around_it() -> None:
    """The module decides by data, so that it is traced in every pass."""

    class Decides(Modules):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            if h.sum() > 0:
                h = h + 1
            return torch.relu(self.last(self.middle(h)))

    model = Decides().eval()
    bare = copy.deepcopy(model)
    with torch.no_grad(), capture(model) as maps:
        for x in _inputs():
            assert torch.equal(model(x), bare(x))
            assert maps.layers == ["first", "last"]


def test_labels_stop() -> None:
    """σ right after the operator goes by its own name, not by the layer before the operator."""

    class After(Cond):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.middle(self.first(x)))

    model = After().eval()
    with torch.no_grad(), capture(model, kinds="activation") as maps:
        for x in _inputs():
            y = model(x)
            assert maps.layers == [":relu"]
            assert torch.equal(maps[":relu"].tensor, y)


def test_a_plain_condition_runs_no_compiler() -> None:
    """Of a number of Python's, the branch is called as any function is: it has maps."""

    class Plain(Around):
        def middle(self, h: Tensor) -> Tensor:
            return torch.cond(h.shape[0] > 2, torch.sigmoid, torch.exp, (h,))

    model = Plain().eval()
    with torch.no_grad(), capture(model, kinds="activation") as maps:
        for x in _inputs():
            model(x)
            assert [fm.nonlinearity for fm in maps] == ["tanh", "sigmoid", "relu"]
    assert not maps.missed


def test_an_exception_inside_is_the_users_own() -> None:
    """The forward raises what it raises bare, the model may be called again, and maps are right."""

    class Raises(Around):
        bad = True

        def middle(self, h: Tensor) -> Tensor:
            wrong = (lambda t: t[0]) if self.bad else torch.exp
            return torch.cond(h.sum() > 0, torch.sigmoid, wrong, (h,))

    model, x = Raises().eval(), _inputs()[0]
    with torch.no_grad():
        with pytest.raises(Exception) as bare:  # noqa: PT011
            model(x)
        with capture(model) as maps:
            for _ in range(2):
                with pytest.raises(type(bare.value)):
                    model(x)
                assert not torch._C._len_torch_function_stack()
            model.bad = False
            for x in _inputs():
                y = model(x)
                assert torch.equal(maps["last", "activation"].tensor, y)


def test_in_a_compiled_model() -> None:
    """There it is one call in the graph, as it was before."""
    model = Cond().eval()
    bare = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), capture(compiled) as maps:
        for x in _inputs():
            assert torch.equal(compiled(x), bare(x))
            assert torch.equal(maps["first", "activation"].tensor, _by_hand(bare, x)[0])


def test_attention_is_named_where_it_was_asked_for() -> None:
    model = Flex().eval()
    with torch.no_grad(), capture(model, kinds="attention") as maps:
        for x in _inputs():
            model(x)
    assert Reason.FUSED_ATTENTION in {m.why for m in maps.missed}


def test_attention_without_code_of_its_own_is_not_named() -> None:
    """Nothing runs inside that would have a map."""

    class Plain(Around):
        def middle(self, h: Tensor) -> Tensor:
            q = h.view(1, 2, -1, 4)
            return flex.flex_attention(q, q, q).reshape(h.shape)

    model = Plain().eval()
    bare = copy.deepcopy(model)
    with torch.no_grad(), capture(model) as maps:
        for x in _inputs():
            assert torch.equal(model(x), bare(x))
            _check(model, maps, *_by_hand(bare, x))
    assert not maps.missed


def test_a_module_without_weights() -> None:
    """It is no nonlinearity as a whole: only one of its branches has run, on what nobody knows."""

    class Choice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) + torch.cond(x.sum() > 0, torch.sigmoid, torch.exp, (x,))

    model = nn.Sequential(nn.Linear(4, 4), Choice(), nn.Linear(4, 4), nn.ReLU()).eval()
    with torch.no_grad(), capture(model) as maps:
        for x in _inputs():
            y = model(x)
            z = F.linear(x, model[0].weight, model[0].bias)
            assert maps.layers == ["0", "2"]
            assert torch.equal(maps["0", "activation"].tensor, z.relu())
            assert torch.equal(maps["2", "activation"].tensor, y)
    assert [m.layer for m in maps.missed] == ["1"]


def test_a_branch_that_writes_to_what_it_is_given() -> None:
    """A map that it overwrites is no map any more: it raises when it is read."""

    class Writes(Around):
        def middle(self, h: Tensor) -> Tensor:
            return torch.cond(h.sum() > 0, lambda t: t.mul_(2), lambda t: t.mul_(3), (h,))

    model = Writes().eval()
    bare = copy.deepcopy(model)
    with torch.no_grad(), capture(model, kinds="activation") as maps:
        for x in _inputs():
            assert torch.equal(model(x), bare(x))
            h = torch.tanh(F.linear(x, model.first.weight, model.first.bias))
            with suppress(MapOverwrittenError):
                assert torch.equal(maps["first"].tensor, h)


def test_the_compiler_runs_as_often_as_bare() -> None:
    """What is compiled in the first passes is used in the later ones."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, x = Modules().eval(), _inputs()[0]
    with torch.no_grad(), capture(model):
        for _ in range(3):
            model(x)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for _ in range(5):
            model(x)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_a_caller_that_nobody_knows() -> None:
    """Each pass calls another function, and a user's hook has the model traced from the start."""

    class Table(Around):
        def middle(self, h: Tensor) -> Tensor:
            return table.pop()(h)

    source = "def run(h): return torch.while_loop(below, step, (torch.tensor(0), h))[1]"
    names = {"torch": torch, "below": lambda i, t: i < 2, "step": lambda i, t: (i + 1, t.sin())}
    table: list[Any] = []
    for _ in range(12):  # twice for each input
        exec(source, own := dict(names))
        table.append(own["run"])
    model = Table().eval()
    model.register_forward_pre_hook(lambda *_: None)
    bare = copy.deepcopy(model)
    with torch.no_grad(), capture(model, kinds="activation") as maps:
        for x in _inputs():
            assert torch.equal(model(x), bare(x))
            assert maps.layers == ["first", "last"]
    assert [m.why for m in maps.missed] == [Reason.COMPILED_FUNCTION]
    assert sys.getprofile() is None


def test_a_profiler_is_left_alone() -> None:
    """Where a profiler is on, calls that have a recorder run apart all the same."""
    seen = []
    model = Cond().eval()
    bare = copy.deepcopy(model)

    def profiler(frame: Any, event: str, argument: Any) -> None:
        seen.append(event)

    with torch.no_grad(), capture(model) as maps:
        sys.setprofile(profiler)
        try:
            for x in _inputs():
                assert torch.equal(model(x), bare(x))
                assert sys.getprofile() is profiler
        finally:
            sys.setprofile(None)
    assert seen
    assert maps.layers == ["first", "last"]


def test_an_early_end_after_it() -> None:
    model = Modules().eval()
    bare = copy.deepcopy(model)
    with torch.no_grad(), capture(model, "last", kinds="preactivation", stop=True) as maps:
        for x in _inputs():
            model(x)
            assert torch.equal(maps["last", "preactivation"].tensor, _by_hand(bare, x)[1])
    assert not torch._C._len_torch_function_stack()


def test_an_edit_inside_is_refused() -> None:
    """It never finds its place: that is an error, as of any other edit that has none."""
    model = Modules().eval()

    @torch.no_grad()
    def run() -> None:
        with capture(model, edit={("left.0", "activation"): edits.zero()}):
            for x in _inputs():
                model(x)

    with pytest.raises(EditError):
        run()


def test_checkpointed() -> None:
    """Activation checkpointing runs it once more, in the backward."""

    class Checkpointed(Modules):
        def middle(self, h: Tensor) -> Tensor:
            return checkpoint(super().middle, h, use_reentrant=False)

    torch.manual_seed(0)
    model = Checkpointed()
    bare = copy.deepcopy(model)
    with capture(model) as maps:
        for x in _inputs():
            y, other = model(x), bare(x)
            assert torch.equal(y, other)
            y.square().sum().backward()
            other.square().sum().backward()
            assert maps.layers == ["first", "last"]
    for p, q in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_warning_tells() -> None:
    model = Cond().eval()
    with warnings.catch_warnings(record=True) as told, torch.no_grad(), capture(model):
        warnings.simplefilter("always")
        model(_inputs()[0])
    assert any(issubclass(w.category, CaptureWarning) for w in told)
