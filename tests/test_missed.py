"""The reasons in `maps.missed`: told apart, kept with the maps, and each on the page about them."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import CaptureWarning, FeatureMaps, capture
from fmapkit.missed import Missed, Reason

PAGE = Path(__file__).parents[1] / "docs" / "missed.md"
_BRACES = re.compile(r"\{(\w+)\}")

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


def _rows() -> list[list[str]]:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_the_page_has_each_reason_with_its_meaning_and_what_to_do() -> None:
    rows = _rows()
    assert [name for name, *_ in rows] == [f"`{reason.name}`" for reason in Reason]
    assert all(len(row) == 3 and all(row) for row in rows)


@pytest.mark.parametrize("value", ["x", "", "a: b (c), d", "two\nlines", "{braces}"])
@pytest.mark.parametrize("reason", Reason)
def test_a_text_tells_its_reason(reason: Reason, value: str) -> None:
    text = reason.text(**dict.fromkeys(_BRACES.findall(reason.value), value))
    assert Reason.of(text) is reason


def test_no_two_reasons_have_the_same_text() -> None:
    texts = [_BRACES.sub("", reason.value) for reason in Reason]
    assert len({*texts}) == len(texts)


def test_what_is_known_of_an_older_version_is_its_text() -> None:
    missed = Missed("fc", "it was left out, as it was in the old days")
    assert missed.why is Reason.OF_ANOTHER_VERSION
    assert missed.reason == "it was left out, as it was in the old days"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head.forward(self.rnn(x)[0])


def test_the_reason_comes_with_what_was_missed_and_is_kept_with_the_maps(tmp_path: Any) -> None:
    model = Net()
    with capture(model, ["rnn", "head"], kinds=("output", "response")) as maps:
        model(torch.randn(3, 1, 4))
    expected = [
        ("rnn", "torch.rnn_tanh runs its nonlinearity inside one fused call"),
        (
            "head",
            "its forward was called directly, which runs no hooks: what it returns is not seen",
        ),
    ]
    reasons = [Reason.FUSED_RECURRENT, Reason.PAST_HOOKS_OUTPUT]
    maps.save(tmp_path / "kept.safetensors")
    for missed in (
        maps.missed,
        FeatureMaps.load(tmp_path / "kept.safetensors").missed,
        pickle.loads(pickle.dumps(maps)).missed,
        pickle.loads(pickle.dumps(maps.missed)),
    ):
        assert [(m.layer, m.reason) for m in missed] == expected
        assert [m.why for m in missed] == reasons
        assert missed == [Missed(*pair) for pair in expected]


def test_a_failure_of_our_own_is_one_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from fmapkit.tracing.record import Record

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a fault of our own")

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    monkeypatch.setattr(Record, "sigma", broken)
    with capture(model) as maps:
        model(torch.randn(2, 4))
    [missed] = maps.missed
    assert missed.reason == "fmapkit failed here: KeyError: 'a fault of our own'"
    assert missed.why is Reason.FAILED


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.lstm(x)[0].tanh())


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({}, ["lstm", "head"]),
        ({"kinds": "output"}, ["head"]),
        ({"kinds": ("activation", "output")}, ["lstm", "head"]),
        ({"layers": "lstm"}, []),  # what it returns
        ({"layers": "lstm", "kinds": "activation"}, []),
        ({"layers": "lstm", "kinds": ("activation", "output")}, ["lstm"]),
        ({"layers": "head"}, ["head"]),
    ],
)
def test_what_nobody_asked_for_is_not_named(asked: dict[str, Any], named: list[str]) -> None:
    model, x = Recurrent(), torch.randn(3, 2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model, **asked) as maps, torch.no_grad():
            model(x)
            model.head(torch.zeros(2, 5))  # outside of a pass
    assert [m.layer for m in maps.missed] == named


class Encoder(nn.Module):
    """Its forward calls methods that others may call, too; one of them is never a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)

    def encode(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.relu(self.stem(x))))

    @torch.no_grad()
    def wrapped(self, x: Tensor) -> Tensor:
        return self.encode(x)

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        yield F.relu(self.stem(x))

    def score(self, x: Tensor) -> Tensor:
        return F.relu(self.head(x))

    def forward(self, x: Tensor) -> Tensor:
        return next(self.stages(x)).mean() + self.head(self.encode(x))


class Caller(nn.Module):
    """A model of its own that uses a part of another one."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encode = encoder.encode

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


@pytest.mark.parametrize("passes", [0, 1, 3, 5])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    ("run", "named"),
    [
        (lambda m, x: m.encode(x), ["stem", "conv"]),
        (lambda m, x: m.wrapped(x), ["stem", "conv"]),
        (lambda m, x: list(m.stages(x)), ["stem"]),
        (lambda m, x: m.score(torch.zeros(1, 4, 5, 5)), ["head"]),
        (lambda m, x: Encoder()(x), []),  # another one of the class
    ],
)
def test_methods_that_are_called_outside_of_a_pass(
    run: Callable[[Encoder, Tensor], object], named: list[str], every: int, passes: int
) -> None:
    """Which of the methods run in passes, too, is nothing to that."""
    model, x = Encoder().eval(), torch.randn(1, 3, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model, every=every) as maps, torch.no_grad():
            for _ in range(passes):
                model(x)
            assert not maps.missed
            run(model, x)
            model(x)
            model(x)
            assert len(maps) == 7
    assert [m.layer for m in maps.missed] == named
    assert {m.why for m in maps.missed} <= {Reason.OUTSIDE_OF_FORWARD}


def test_a_method_that_is_called_in_the_pass_of_another_model() -> None:
    """Its decisions are recorded there: nobody is told that it runs."""
    model, x = Encoder().eval(), torch.randn(1, 3, 9, 9)
    other = Caller(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with torch.no_grad(), capture(model) as maps:
            for _ in range(4):
                model(x)
            with capture(other):
                for _ in range(3):
                    other(x)
    assert [m.layer for m in maps.missed] == ["stem", "conv"]
