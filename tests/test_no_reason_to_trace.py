"""What a module may do, and later passes of it are read by taps all the same."""

from __future__ import annotations

import io
import logging
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, rnn

from fmapkit import capture
from tests.raising import Checked
from tests.test_paths import Turn, hold, turns

LOGGER = logging.getLogger(__name__)

pytestmark = pytest.mark.filterwarnings(
    "ignore::fmapkit.CaptureWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


_BY = ["assert", "with words", "if", "if not", "distribution"]


class Packed(nn.Module):
    """torch's own code reads how large the batch is, to compare it with that of the state."""

    def __init__(self, kind: type[nn.RNNBase], given: bool) -> None:
        super().__init__()
        self.fc, self.given = nn.Linear(4, 4), given
        self.rnn: Any = kind(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = torch.relu(self.fc(x))
        h: Any = x.new_zeros(1, x.shape[0], 5) if self.given else None
        h = (h, h) if self.given and isinstance(self.rnn, nn.LSTM) else h
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = rnn.pad_packed_sequence(self.rnn(packed, h)[0], batch_first=True)
        return torch.tanh(self.head(y))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="bytecode does not tell what is handled")
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_packed_sequences(kind: type[nn.RNNBase], given: bool, traced: list[None]) -> None:
    def passes() -> list[Turn]:
        given = turns(*[(2 + n % 3, 6, 4) for n in range(9)])
        for n, turn in enumerate(given):
            lengths = [6, *[1 + (n + i) % 6 for i in range(1 + n % 3)]]
            turn.args = (*turn.args, torch.tensor(lengths))
        return given

    seen = hold(Packed(kind, given), passes(), train=True)
    assert {layer for layer, _ in seen.missed} == {"rnn"}
    model = Packed(kind, given)
    with torch.no_grad(), capture(model) as maps:
        for n, turn in enumerate(passes()):
            if n == 3:
                del traced[:]
            model(*turn.args)
            assert maps.layers == ["fc", "head"]
    assert not traced


@pytest.mark.skipif(sys.version_info < (3, 11), reason="bytecode does not tell what is handled")
@pytest.mark.parametrize("by", _BY)
def test_a_check_that_only_raises(by: str, traced: list[None]) -> None:
    assert not hold(Checked(by), turns(*[(2, 3, 5)] * 4)).missed
    model = Checked(by)
    with torch.no_grad(), capture(model) as maps:
        for n in range(6):
            if n == 3:
                del traced[:]
            model(torch.randn(2, 3, 5))
        assert not traced
        with pytest.raises((AssertionError, ValueError)):
            model(torch.full((2, 3, 5), torch.nan))
        x = torch.randn(2, 3, 5)
        out = model(x)
        assert torch.equal(maps["b"].tensor, out)
        assert len(maps) == 4


class Guarded(nn.Module):
    """It handles what its part raises."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.other = Checked("if"), nn.Conv1d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.part(x)
        except ValueError:
            return torch.relu(self.other(torch.ones_like(x)))


def test_a_check_whose_exception_the_model_handles() -> None:
    passes = turns(*[(2, 3, 5)] * 14)
    for n in (4, 5, 8, 11, 12):
        passes[n].args[0][0, 0, 0] = torch.nan
    assert not [m for m in hold(Guarded(), passes).missed if "took a way" in m[1]]


class Listed(nn.Module):
    """Its weights are in a list, and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList([torch.randn(4, 3), torch.randn(4, 4)])
        self.named = nn.ParameterDict({"bias": nn.Parameter(torch.randn(4))})
        self.conv = nn.Conv1d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x)).transpose(1, 2)
        h = torch.relu(nn.functional.linear(h, self.rows[0], self.named["bias"]))
        return torch.relu(nn.functional.linear(h, self.rows[1]))


def _normed(how: Callable[..., Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 4, 1), nn.ReLU())
        for place in (0, 2):
            how(model[place])
        return model

    return make


class Masked(nn.Module):
    """An index that is the same in each pass picks from its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return torch.relu(h[:, :, ~torch.eye(h.shape[-1], dtype=torch.bool)[0]])


class Logging(nn.Module):
    """Numbers of each pass go to a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.seen, self.names = nn.Conv1d(3, 4, 1), [0.0], {"a"}

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(random.random())
        self.names.add(f"pass {len(self.seen)}")
        return torch.relu(self.conv(x))


class Reporting(nn.Module):
    """A number is read of its maps, and kept or printed."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.a, self.b, self.by = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 4, 1), by
        self.losses, self.stats, self.mean = [0.0], {"loss": 0.0}, 0.0

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.a(x))
        if self.by == "attribute":
            self.mean = 0.9 * self.mean + 0.1 * float(h.mean())
        elif self.by == "list":
            self.losses.append(h.mean().item())
        elif self.by == "dict":
            self.stats["loss"] = round(h.mean().item(), 3)
        elif self.by == "logger":
            LOGGER.debug("mean %f of %s", h.mean().item(), h.shape)
        elif self.by == "print":
            print(f"mean {h.mean().item():.3f}", file=io.StringIO())
        elif self.by == "output":
            return torch.relu(self.b(h)), {"loss": h.mean().item()}
        return torch.relu(self.b(h))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code has no places yet")
@pytest.mark.parametrize("by", ["attribute", "list", "dict", "logger", "print", "output"])
def test_a_number_that_is_kept_or_printed(by: str, traced: list[None]) -> None:
    assert not hold(Reporting(by), turns(*[(2, 3, 5)] * 8)).missed
    with torch.no_grad(), capture(model := Reporting(by)):
        for n in range(8):
            if n == 4:
                del traced[:]
            model(torch.randn(2, 3, 5))
    assert not traced


class Deciding(nn.Module):
    """A number is kept, and decides in the next pass, or in this one."""

    def __init__(self, now: bool) -> None:
        super().__init__()
        self.a, self.b, self.now = nn.Conv1d(3, 4, 1), nn.Conv1d(3, 4, 1), now
        self.seen = {"mean": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        if self.now:
            self.seen["mean"] = x.mean().item()
        a, b = self.a(x), self.b(x)
        h = {self.seen["mean"] > 0: a, self.seen["mean"] <= 0: b}[True]
        if not self.now:
            self.seen["mean"] = x.mean().item()
        return torch.relu(h)


@pytest.mark.parametrize("now", [False, True])
def test_a_number_that_is_kept_decides(now: bool) -> None:
    passes = turns(*[(2, 3, 5)] * 16)
    assert {float(turn.args[0].mean()) > 0 for turn in passes[3:9]} == {True, False}
    seen = hold(Deciding(now), passes, most=2)
    assert {each[-1][0] for each in seen.labels if each} == {"a", "b"}


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "lists of parameters": Listed,
    "spectral norm": _normed(nn.utils.spectral_norm),
    "weight norm": _normed(nn.utils.weight_norm),
    "pruned": _normed(lambda layer: prune.l1_unstructured(layer, "weight", 0.3)),
    "a constant index": Masked,
    "a log": Logging,
}


@pytest.mark.parametrize("make", _MODELS.values(), ids=_MODELS)
@pytest.mark.parametrize("train", [False, True])
def test_later_passes_are_read_by_taps(
    make: Callable[[], nn.Module], train: bool, traced: list[None]
) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make().train(train))
    model, bare = models
    with capture(model) as maps:
        for n in range(6):
            if n == 3:
                del traced[:]
            x = torch.randn(2, 3, 5)
            torch.manual_seed(n)
            out = model(x)
            torch.manual_seed(n)
            assert torch.equal(out, bare(x))
            assert torch.equal(list(maps)[-1].tensor, out)
            assert len(maps) == 2 * sum(m.kind == "activation" for m in maps)
    assert not traced
    assert not maps.missed


class Stepping(nn.Module):
    """A loop over the length: each length takes a path of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cell = nn.Conv1d(3, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.relu(self.stem(x)).unbind(-1)
        h = torch.zeros_like(rows[0])
        for row in rows:
            h = torch.tanh(self.cell(h) + row)
        return h


def test_lengths_that_never_repeat_are_learned_no_more() -> None:
    """The module is traced then, and its parts are read by taps: that is cheaper than a plan."""
    model = nn.Sequential(Stepping(), nn.Linear(4, 4), nn.ReLU())
    shapes = [(2, 3, n) for n in (*range(3, 16), 4, 4, 7, 20)]
    assert not hold(model, turns(*shapes)).missed


# -- a counter, and ever other sizes ------------------------------------------------------------


class Counting(nn.Module):
    """It counts its passes; each has other sizes than the one before."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.passes, self.most, self.first = 0, 3, first

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        batch, length, _ = x.shape
        x = torch.relu(self.a(x).reshape(batch * length, -1)).view(batch, length, -1)
        return torch.tanh(self.b(x[:, : self.most] if self.first else x))


@pytest.mark.parametrize("first", [False, True])
def test_a_counter_where_each_pass_has_other_sizes(first: bool, traced: list[None]) -> None:
    sizes = [(2 + n % 3, 5 + n % 7, 4) for n in range(20)]
    assert not hold(Counting(first), turns(*sizes)).missed
    model = Counting(first)
    with torch.no_grad(), capture(model):
        for n, size in enumerate(sizes):
            traced.clear()
            model(torch.randn(*size))
            assert not traced or n < 5, n


def test_a_number_that_is_an_attribute_and_changes_with_the_sizes(traced: list[None]) -> None:
    """It is no counter: it is compared before each pass, and no map is lost."""
    model = Counting(True)
    passes = turns(*[(2 + n % 3, 5 + n % 7, 4) for n in range(30)])
    for n, turn in enumerate(passes):
        turn.before = lambda m, n=n: setattr(m, "most", 2 + n % 3 if n < 9 else 2 + (n // 2) % 3)
    assert not hold(model, passes).missed
