"""Truths and whole numbers that a model reads of its own buffers, and of what it is given.

What is read is known before the call, so that nothing of it is traced; whatever was read, the maps
are those of a pass that was captured alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture
from tests.test_paths import Turn, hold, random

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


class Scaled(nn.Module):
    """Its first pass sets what later ones scale by, as ActNorm's does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)
        self.scale = nn.Parameter(torch.ones(1, 3, 1))
        self.register_buffer("ready", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.ready.item() == 0:
            with torch.no_grad():
                self.scale.copy_(1 / y.std(dim=(0, 2), keepdim=True))
                self.ready.fill_(1)
        return F.relu(y * self.scale)


class Codes(nn.Module):
    """A codebook that is made of the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)
        self.register_buffer("codes", torch.zeros(4, 3))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        if not self.ready:
            self.codes.copy_(y.detach().movedim(1, 2).reshape(-1, 3)[:4])
            self.ready.copy_(torch.tensor(True))
        at = torch.cdist(y.movedim(1, 2), self.codes).argmin(-1)
        return torch.tanh(y + self.codes[at].movedim(1, 2))


class Queue(nn.Module):
    """Keys of earlier batches, at a place that goes round: MoCo's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)
        self.register_buffer("queue", torch.randn(4, 12))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x)).mean(2)
        out = torch.sigmoid(y @ self.queue.clone())
        at = int(self.place)
        self.queue[:, at : at + y.shape[0]] = y.detach().T
        self.place[0] = (at + y.shape[0]) % 12
        return out


class Switching(nn.Module):
    """Takes another layer from its fourth pass on, which a buffer counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 4, 1), nn.Conv1d(3, 4, 1)
        self.register_buffer("step", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        late = bool(self.step >= 3)
        self.step += 1
        return F.relu(self.b(x) if late else self.a(x))


class Counting(Switching):
    """The same, by what it has counted in this pass."""

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return F.relu(self.b(x) if int(self.step) > 3 else self.a(x))


class Rebinding(Switching):
    """The same of a buffer that is another tensor in each pass."""

    def forward(self, x: Tensor) -> Tensor:
        self.step = self.step + 1
        return F.relu(self.b(x) if self.step > 3 else self.a(x))


class Swapping(nn.Module):
    """Two buffers change places in each pass, before one is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 4, 1), nn.Conv1d(3, 4, 1)
        self.register_buffer("one", torch.tensor(True))
        self.register_buffer("two", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        self.one, self.two = self.two, self.one
        return F.relu(self.a(x) if self.one else self.b(x))


class Kept(nn.Module):
    """Asks for a tensor of its last pass, which is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 4, 1), nn.Conv1d(3, 4, 1)
        self.last = torch.tensor(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) if self.last > 0 else self.b(x)
        self.last = x.detach().mean()
        return F.relu(y)


def steps(*shapes: tuple[int, ...]) -> list[Turn]:
    return [Turn((random(*shape, n=n),)) for n, shape in enumerate(shapes)]


OF_ONE: list[Callable[[], nn.Module]] = [
    *(Scaled, Codes, Queue, Switching, Counting, Rebinding, Swapping, Kept)
]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", OF_ONE)
def test_what_a_model_has_is_read_before_the_pass(
    kind: Callable[[], nn.Module], train: bool
) -> None:
    torch.manual_seed(0)
    hold(kind(), steps(*[(2, 3, 5)] * 9), train=train, most=2)
    hold(kind(), steps(*[(2, 3, 5), (3, 3, 5), (2, 3, 7)] * 3), train=train, most=3)


@pytest.mark.parametrize("kind", [Scaled, Codes, Queue, Switching])
def test_it_is_no_reason_to_trace(kind: Callable[[], nn.Module], traced: list[None]) -> None:
    model = kind()
    with torch.no_grad(), capture(model) as maps:
        for n in range(12):
            if n == 7:
                del traced[:]
            model(random(2, 3, 5, n=n))
        assert not maps.missed
    assert not traced


# -- of what is given ----------------------------------------------------------------------------


class Graphs(nn.Module):
    """Nodes of several graphs are summed up: how many there are, the last one tells."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        h = F.relu(self.one(x))
        count = int(graph.max()) + 1
        pooled = h.new_zeros(count, 4).index_add_(0, graph, h)
        return torch.sigmoid(self.two(pooled))


class Packed(nn.Module):
    """Texts of several lengths, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        parts = x.split(lengths.tolist())
        h = torch.cat([F.relu(self.one(part)) for part in parts])
        return torch.tanh(self.two(h))


class Expert(nn.Module):
    """One of its layers runs, which an index says that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4) for _ in range(3)])

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return F.relu(self.layers[int(at)](x))


class Picked(nn.Module):
    """The same of their results, and of two tensors that no layer made."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return self.last(F.relu([x * 1, x * 2, self.layer(x)][at.item()]))


class Padded(nn.Module):
    """Filters are added, as many as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return F.relu(F.pad(self.layer(x), (0, int(at.sum()))))


def _index(n: int) -> Tensor:
    return torch.tensor((0, 1, 0, 2, 1, 0, 2, 2, 1, 0)[n % 10])


def _graph(n: int) -> Tensor:
    return torch.arange(6 + n % 4) // (1 + n % 3)


GIVEN: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "graphs": (Graphs, _graph),
    "packed": (Packed, lambda n: torch.tensor([2 + n % 3, 3, 4 - n % 2])),
    "more or fewer": (Packed, lambda n: torch.tensor([2] * (2 + n % 3))),
    "an expert": (Expert, _index),
    "a result": (Picked, _index),
    "filters": (Padded, _index),
}


def _given(n: int, told: Tensor) -> tuple[Tensor, ...]:
    rows = (
        int(told.sum()) if told.dim() and told.min() > 0 else max(len(told) if told.dim() else 4, 1)
    )
    return random(rows, 3, n=n), told


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", GIVEN)
def test_numbers_that_are_given_are_read_before_the_pass(name: str, train: bool) -> None:
    kind, told = GIVEN[name]
    hold(kind(), [Turn(_given(n, told(n))) for n in range(10)], train=train, most=3)


@pytest.mark.parametrize("name", ["graphs", "packed", "an expert", "a result"])
def test_they_are_no_reason_to_trace(name: str, traced: list[None]) -> None:
    kind, told = GIVEN[name]
    model = kind()
    passes: list[Any] = [_given(n, told(n)) for n in range(12)]
    with torch.no_grad(), capture(model) as maps:
        for turn in [*passes, *passes]:
            model(*turn)
        del traced[:]
        for turn in passes:
            model(*turn)
        assert not maps.missed
    assert not traced


# -- with an attribute that counts ---------------------------------------------------------------


class Counted(Queue):
    """The same, while an attribute is another one in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)


@pytest.mark.parametrize("sizes", ["same", "growing"])
def test_a_counter_beside_numbers_that_change(sizes: str, traced: list[None]) -> None:
    model = Counted()
    shapes = [(2, 3, 5 + n * (sizes == "growing")) for n in range(14)]
    hold(Counted(), steps(*shapes), most=2)
    with torch.no_grad(), capture(model) as maps:
        for n, shape in enumerate(shapes):
            if n == 8:
                del traced[:]
            model(random(*shape, n=n))
        assert not maps.missed
    assert len(traced) <= 1  # where the place begins anew


# -- sizes that are data -------------------------------------------------------------------------


class Sized(nn.Module):
    """As many rows go on as what it is given, or has, says."""

    def __init__(self, way: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("rows", torch.tensor([True, False, True, True, False, True]))
        self.way = way

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return torch.tanh(self.two(self.way(self, F.relu(self.one(x)), told)))


def _unpadded(model: Any, h: Tensor, told: Tensor) -> Tensor:
    at = torch.nonzero(told != 0, as_tuple=False).flatten()
    return F.relu(model.two(h[at]))[: at.shape[0]]


def _by_two(model: Any, h: Tensor, told: Tensor) -> Tensor:
    return h[told > 0, 1:][:, :3].new_ones(int((told > 0).sum()), 4) * h[told > 0]


def _by_filters(model: Any, h: Tensor, told: Tensor) -> Tensor:
    kept = h[:, told[:4] > 0]  # the layer's filters: which of them, no label tells
    return torch.cat([F.relu(kept), h], 1)[:, :4]


def _between(model: Any, h: Tensor, told: Tensor) -> Tensor:
    start = told.clamp(min=0)[0]
    return F.pad(F.relu(h[:, start : start + 2]), (0, 2))


def _by_results(model: Any, h: Tensor, told: Tensor) -> Tensor:
    return h[h.sum(1) > 0.5]


def sized() -> dict[str, Callable[[Any, Tensor, Tensor], Tensor]]:
    return {
        "mask": lambda model, h, told: h[told > 0],
        "mask of all": lambda model, h, told: h[(told > 0).unsqueeze(1).expand(6, 4)].view(-1, 4),
        "mask and None": lambda model, h, told: h[None, told > 0][0],
        "masked_select": lambda model, h, told: torch.masked_select(h, told[:, None] > 0).view(
            -1, 4
        ),
        "buffer": lambda model, h, told: h[model.rows],
        "nonzero": _unpadded,
        "where": lambda model, h, told: h[torch.where(told > 0)[0]],
        "unique": lambda model, h, told: h[: told.unique().shape[0]],
        "bincount": lambda model, h, told: h[: torch.bincount(told.abs()).shape[0]],
        "repeat_interleave": lambda model, h, told: h.repeat_interleave(told.abs(), dim=0),
        "two masks": _by_two,
        "filters": _by_filters,
        "bounds": _between,
        "results": _by_results,
    }


REPLAYED = [n for n in sized() if n not in ("bounds", "results", "filters")]


def _told(n: int) -> tuple[Tensor, Tensor]:
    told = torch.randint(-1, 3, (6,), generator=torch.Generator().manual_seed(n))
    told[0] = 1
    return random(6, 4, n=n), told


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", sized())
def test_sizes_that_are_data_are_known_before_the_pass(name: str, train: bool) -> None:
    hold(Sized(sized()[name]), [Turn(_told(n)) for n in range(10)], train=train, most=3)


@pytest.mark.parametrize("name", REPLAYED)
def test_sizes_that_are_data_are_no_reason_to_trace(name: str, traced: list[None]) -> None:
    model = Sized(sized()[name])
    with torch.no_grad(), capture(model) as maps:
        for n in range(40):
            if n == 30:
                del traced[:]
            model(*_told(n))
        assert not maps.missed
    assert len(traced) < 4
