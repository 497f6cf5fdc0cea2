"""Branches on data that the inputs of a call alone decide: `if mask.all()`.

What such a call will read is read before it, so that it is replayed and nothing of it is traced.
Whatever was read, its maps are those of a pass that was captured alone, bit for bit.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fmapkit import capture
from fmapkit.session.recording import Recorder
from tests.checks import strayed
from tests.test_paths import Turn, hold, put

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


def _all(x: Tensor, mask: Tensor) -> bool:
    return bool(mask.all())


def _as_sum(x: Tensor, mask: Tensor) -> bool:
    return bool(mask.sum() == mask.numel())


def _cast(x: Tensor, mask: Tensor) -> bool:
    return bool((~mask.to(device=x.device, dtype=torch.bool)).logical_not().all().item())


def _part(x: Tensor, mask: Tensor) -> bool:
    return bool(mask[:, : x.shape[1] - 1].all()) and not bool((~mask[:, -1:].bool()).any())


def _features(x: Tensor, mask: Tensor) -> bool:
    return not torch.isnan(x[0, 0, 0]) and bool((x * mask.unsqueeze(-1)).abs().mean() < 10)


def _equal(x: Tensor, mask: Tensor) -> bool:
    return torch.equal(mask, torch.ones_like(mask))


def _positions(x: Tensor, mask: Tensor) -> bool:
    return bool((torch.arange(x.shape[1]) < mask.sum(1, keepdim=True)).all())


def _loop(x: Tensor, mask: Tensor) -> bool:
    while mask.shape[1] > 1 and not mask.bool().all():
        mask = mask[:, 1:]
    return mask.shape[1] == x.shape[1]


READS = [_all, _as_sum, _cast, _part, _features, _equal, _positions, _loop]


class Masked(nn.Module):
    """Which of its layers run depends on a mask that it is given."""

    def __init__(self, read: Callable[[Tensor, Tensor], bool]) -> None:
        super().__init__()
        self.read = read
        self.one, self.two, self.act = nn.Linear(3, 4), nn.Linear(3, 5), nn.ReLU(inplace=True)
        self.last = nn.Linear(4, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.read(x, mask):
            return torch.tanh(self.last(self.act(self.one(x))))
        return self.act(self.two(x * mask.unsqueeze(-1)))


def _given(size: tuple[int, int], padded: bool, n: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(*size, 3, generator=torch.Generator().manual_seed(n))
    mask = torch.ones(size, dtype=torch.long)
    if padded:
        mask[0, : max(1, size[1] // 2)] = 0
        x = x * 100
    return x, mask


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with each call of a region that is recorded."""
    found: list[None] = []
    enter = Recorder.enter
    monkeypatch.setattr(Recorder, "enter", lambda *a: found.append(None) or enter(*a))
    return found


@pytest.mark.parametrize("read", READS)
def test_what_inputs_decide_is_captured_as_alone(read: Callable[..., bool]) -> None:
    passes = [
        Turn(_given((2, length), padded, n))
        for n, (length, padded) in enumerate(
            [(4, False)] * 3 + [(4, True)] * 2 + [(6, False), (6, True), (9, True), (9, False)] * 2
        )
    ]
    for train in (False, True):
        hold(Masked(read), passes, train=train)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_pass_that_reads_what_is_known_is_not_traced(
    read: Callable[..., bool], inference: bool, traced: list[None]
) -> None:
    model = Masked(read).eval()
    with capture(model) as maps, torch.inference_mode(inference):
        for n in range(3):
            for padded in (False, True):
                model(*_given((2, 4), padded, n))
        learned = len(traced)
        for n in range(6):
            model(*_given((2, 4), n % 3 == 0, n))
            assert len(maps) == (2 if n % 3 == 0 else 4)
        assert len(traced) == learned
    assert not maps.missed


@pytest.mark.parametrize("read", [_all, _as_sum, _part, _positions])
def test_inputs_of_other_sizes_need_no_trace(read: Callable[..., bool], traced: list[None]) -> None:
    """Dynamic padding: whole numbers in what is read follow the sizes."""
    model = Masked(read).eval()
    with capture(model) as maps, torch.no_grad():
        for length in (4, 6, 9, 4, 6):
            for padded in (False, True):
                model(*_given((2, length), padded, length))
        learned = len(traced)
        for length in (5, 12, 7, 33):
            for padded in (True, False):
                model(*_given((2, length), padded, length))
                assert len(maps) == (2 if padded else 4)
        assert len(traced) == learned
    assert not maps.missed


def test_a_part_that_reads_its_own_input_is_replayed(traced: list[None]) -> None:
    """The model around it is traced: what it computes is not known before the pass."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.blocks = nn.ModuleList(Masked(_features) for _ in range(3))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = self.first(x)
            return torch.stack([block(x, mask).sum() for block in self.blocks])

    model = Blocks().eval()
    with capture(model) as maps, torch.no_grad():
        for n in range(6):
            model(*_given((2, 4), n % 2 == 1, n))
        regions = maps._session.parts.regions
        assert regions.static(model.blocks[0])
    assert not maps.missed
    hold(Blocks(), [Turn(_given((2, 4), n % 2 == 1, n)) for n in range(8)])


def test_inputs_that_are_written_to_before_they_are_read() -> None:
    class Written(Masked):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            mask = mask.clone() if self.training else mask
            mask[:, 0] = 1
            view = mask[:, :2]
            view.mul_(1)
            if view.all():
                mask.zero_()
                return torch.relu(self.one(x))
            return torch.tanh(self.two(x)) if mask.any() else torch.sigmoid(self.two(x))

    def turns() -> list[Turn]:
        found = []
        for n in range(10):
            x, mask = _given((2, 4), False, n)
            mask[0, n % 2 : 2] = 0
            found.append(Turn((x, mask)))
        return found

    for train in (True, False):
        hold(Written(_all), [Turn((t.args[0], t.args[1].clone())) for t in turns()], train=train)


def test_a_threshold_that_nobody_announces() -> None:
    """It is another function of the inputs then: at most two passes are cut short, and named."""

    class Threshold(Masked):
        def __init__(self) -> None:
            super().__init__(_all)
            self.hidden = {"least": 0.0}

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            if x.abs().mean() > self.hidden["least"]:
                return torch.relu(self.one(x))
            return torch.tanh(self.two(x))

    def least(value: float) -> Callable[[Any], None]:
        return lambda model: model.hidden.update(least=value)

    values = [0.0, 0.0, 0.0, 1e6, 1e6, 0.0, 5e5, 0.0, 1e6, 0.0]
    passes = [Turn(_given((2, 4), False, n), least(v)) for n, v in enumerate(values)]
    hold(Threshold(), passes, most=2)


def test_many_ways_are_not_traced_one_by_one(traced: list[None]) -> None:
    """Of 2^6 ways, eight are traced as a whole; then the model is traced, and its parts are not."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(6)
            )

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            for n, expert in enumerate(self.experts):
                if (ids == n).any():
                    x = x + expert(x)
            return x

    def passes() -> list[Turn]:
        drawn = torch.Generator().manual_seed(0)
        return [
            Turn((torch.randn(2, 3), torch.randint(6, (3,), generator=drawn))) for _ in range(25)
        ]

    hold(Experts(), passes())
    model = Experts().eval()
    with capture(model) as maps, torch.no_grad():
        for turn in passes():
            model(*turn.args)
            assert len({m.layer for m in maps}) == len(turn.args[1].unique())
        assert not maps._session.parts.regions.static(model)
    assert not maps.missed


def test_a_mode_of_the_users_sees_what_the_model_reads_alone() -> None:
    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    def names(model: nn.Module) -> list[str]:
        with Seen() as seen, torch.no_grad():
            model(*_given((2, 4), True, 0))
        return seen.names

    model = Masked(_as_sum).eval()
    bare = names(model)
    with capture(model):
        for n in range(4):
            model(*_given((2, 4), n % 2 == 0, n))
        assert [n for n in names(model) if "sum" in n] == [n for n in bare if "sum" in n]


def test_it_is_read_with_the_inputs_that_the_call_is_given() -> None:
    """By keyword, in other orders, as views, without gradients of its own."""
    model = Masked(_features).eval()
    with capture(model) as maps:
        for n in range(8):
            x, mask = _given((2, 4), n % 2 == 1, n)
            x.requires_grad_(n % 3 == 0)
            if n % 4 < 2:
                out = model(mask=mask, x=x)
            else:
                out = model(x.expand(2, 4, 3), mask=mask)
            assert len(maps) == (2 if n % 2 else 4)
            if x.requires_grad:
                out.sum().backward()
                assert x.grad is not None
    assert not maps.missed


def test_inputs_that_are_taken_out_of_their_container(traced: list[None]) -> None:
    """Where a tensor was among the inputs is told before the model changes the list or dict."""

    class Popped(Masked):
        def forward(self, inputs: dict[str, Tensor], masks: list[Tensor]) -> Tensor:
            inputs["padding"] = masks[0] == 0
            x = inputs.pop("x")
            masks.pop(0)
            return super().forward(x, masks[0])

    model = Popped(_all).eval()
    with capture(model) as maps, torch.no_grad():
        for n in range(8):
            x, mask = _given((2, 4), n % 2 == 1, n)
            model({"x": x}, [_given((2, 4), n % 3 == 1, n)[1], mask])
            assert len(maps) == (2 if n % 2 else 4)
            if n == 3:
                traced.clear()
        assert not traced
    assert not maps.missed


def test_a_mask_that_is_given_twice() -> None:
    """The next call may be given two: which one is read is not told by the first."""

    class Twice(Masked):
        def forward(self, x: Tensor, one: Tensor, other: Tensor) -> Tensor:
            return super().forward(x, one) + other.sum()

    passes = []
    for n in range(9):
        x, mask = _given((2, 4), n % 2 == 1, n)
        passes.append(Turn((x, mask, mask if n < 3 else 1 - mask)))
    hold(Twice(_all), passes)


def test_a_mask_that_shares_memory_with_one_that_is_written_to() -> None:
    class Emptied(Masked):
        def forward(self, x: Tensor, written: Tensor, mask: Tensor) -> Tensor:
            written.zero_()
            return super().forward(x, mask)

    model = Emptied(_all).eval()
    with capture(model) as maps, torch.no_grad():
        for n in range(8):
            (x, mask), (_, other) = (_given((2, 4), False, n) for _ in range(2))
            out = model(x, mask, other if n < 3 else mask[:])
            assert len(maps) == (4 if n < 3 else 2)
            assert torch.equal(list(maps)[-1].tensor, out)
    assert not maps.missed


@pytest.mark.parametrize("by", ["argument", "attribute", "annealed"])
def test_a_threshold_that_is_announced_costs_no_map(by: str) -> None:
    class Threshold(Masked):
        def __init__(self) -> None:
            super().__init__(_all)
            self.least = 0.0

        def forward(self, x: Tensor, least: float = 0.0) -> Tensor:
            if x.abs().mean() > least + self.least:
                return torch.relu(self.one(x))
            return torch.tanh(self.two(x))

    def at(n: int) -> Turn:
        value = n / 5 if by == "annealed" else [-1.0, -1.0, 1e6, -1.0, 0.7, 0.8][n % 6]
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(n))
        if by == "argument":
            return Turn((x, value))
        return Turn((x,), put(least=value))

    hold(Threshold(), [at(n) for n in range(14)])


def test_a_truth_that_is_never_what_was_read_before(recorded: list[None]) -> None:
    """Past torch, the model writes to the mask in each pass: it is not recorded anew each time."""

    class Emptied(Masked):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            ctypes.memset(mask.data_ptr(), 0, mask.nbytes)
            return super().forward(x, mask)

    model = Emptied(_all).eval()
    with capture(model) as maps, torch.no_grad():
        for n in range(6):
            model(*_given((2, 4), False, n))
            assert len(maps) == 2
            if n == 3:
                recorded.clear()
        assert not recorded


def test_what_is_read_before_a_pass_warns_of_nothing() -> None:
    """`std` of one number does: the warning is the model's, once."""

    class Spread(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.one(x)) if x.std(0).mean() < 1e-4 else torch.tanh(self.two(x))

    model = Spread(_all).eval()
    with capture(model) as maps, torch.no_grad():
        for n in range(4):
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                model(torch.full((1, 3), float(n)))
            assert len(found) == 1
            assert maps.layers == ["two"]


def test_a_truth_by_which_python_picks_a_tensor() -> None:
    """`max` asks for it, and no path tells what it gave: a hidden factor decides that, too."""

    class Picks(Masked):
        def __init__(self) -> None:
            super().__init__(_all)
            self.other = nn.Linear(3, 5)
            self.hidden = {"factor": 1e-6}

        def forward(self, x: Tensor) -> Tensor:
            maps = [
                (x[0].abs().mean() * self.hidden["factor"], self.two(x)),
                (x[1].abs().mean(), self.other(x)),
            ]
            return torch.relu(max(maps, key=lambda pair: pair[0])[1])

    def factor(value: float) -> Callable[[Any], None]:
        return lambda model: model.hidden.update(factor=value)

    values = [1e-6] * 3 + [1e6] * 2 + [1e-6, 1e6]
    hold(Picks(), [Turn((torch.randn(2, 3),), factor(v)) for v in values])


# -- any program ------------------------------------------------------------------------------

_STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "not": lambda t: t == 0,
    "part": lambda t: t[..., 1:] if t.dim() and t.shape[-1] > 1 else t,
    "sum": lambda t: t.sum(-1) if t.dim() else t,
    "plus": lambda t: t + t.numel(),
    "less": lambda t: t < t.numel(),
    "view": lambda t: t.view(-1),
    "cast": lambda t: t.to(torch.float32),
    "ones": lambda t: t * torch.ones_like(t),
    "write": lambda t: t.add_(1) if t.dtype is not torch.bool else t.logical_not_(),
    "copy": lambda t: t.clone(),
    "noise": lambda t: t + torch.randn(()),
    "arange": lambda t: t * torch.arange(t.shape[-1]) if t.dim() else t,
    "inner": lambda t: torch.sigmoid(t.float()),
    "norm": lambda t: t.float().norm(),
}


class Program(nn.Module):
    """Reads truths, each some functions away from what it is given."""

    def __init__(self, reads: list[tuple[bool, list[str]]]) -> None:
        super().__init__()
        self.reads = reads
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in reads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = x
        for (of_mask, steps), layer in zip(self.reads, self.layers, strict=True):
            t = mask if of_mask else x
            for step in steps:
                t = _STEPS[step](t)
            if t.any():
                y = torch.relu(layer(y))
            else:
                y = torch.tanh(y + layer(x))
        return y


_reads = st.lists(
    st.tuples(st.booleans(), st.lists(st.sampled_from(list(_STEPS)), max_size=4)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60)
@given(_reads, st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=3, max_size=7))
def test_any_program_in_any_pass(
    reads: list[tuple[bool, list[str]]], given: list[tuple[int, bool]]
) -> None:
    passes = []
    for n, (length, padded) in enumerate(given):
        x, mask = _given((2, length), padded, n)
        passes.append(Turn((x if not padded else torch.zeros_like(x), mask)))
    hold(Program(reads), [Turn(tuple(a.clone() for a in t.args)) for t in passes])


def _past_torch(array: Any, mask: Tensor) -> None:
    array[0, 0] = 0


def test_a_pass_that_reads_otherwise_than_was_known_is_named() -> None:
    """What was read before the pass changes in it, past torch: no map of that pass is kept."""

    class Changed(Masked):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            self.change(mask)
            return super().forward(x, mask)

        def change(self, mask: Tensor) -> None:
            """Nothing, as yet."""

    model = Changed(_all).eval()
    with capture(model) as maps, torch.no_grad():
        for n in range(6):
            x, mask = _given((2, 4), False, n)
            if n == 4:
                object.__setattr__(model, "change", partial(_past_torch, mask.numpy()))
            model(x, mask)
            if n == 4:
                assert len(maps) in (0, 2)
                assert len(maps) == 2 or strayed(maps)
            if n < 4:
                assert len(maps) == 4
