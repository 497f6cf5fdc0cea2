"""Rows in a shuffled order, from a store and straight from a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fmapkit import ArgumentError

pytest.importorskip("zarr", minversion="3.1.4")

from fmapkit.data import Features, RowLoader, extract, stream

ROWS = 300
X = torch.arange(ROWS * 2, dtype=torch.float32).reshape(ROWS, 2)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Its features tell the row: (2r + 1, 2r + 2), for row r."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.bias.fill_(1.0)
    return nn.Sequential(layer, nn.ReLU()).eval()


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, torch.arange(ROWS)), batch_size=16)


@pytest.fixture(scope="module")
def features(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Features:
    to = tmp_path_factory.mktemp("rows") / "f"
    return extract(model, data(), "0", to, keep={"y": 1}, batches_per_commit=1, progress=False)


Make = Callable[..., RowLoader]


@pytest.fixture(params=["store", "model"])
def make(request: pytest.FixtureRequest, model: nn.Module, features: Features) -> Make:
    """A loader of the same rows from either."""
    if request.param == "store":
        return lambda batch, **options: features.loader("0", batch, **options)
    return lambda batch, **options: stream(model, data(), "0", batch, **options)


def rows_of(batches: list[Tensor]) -> list[int]:
    """Which rows these are."""
    values = torch.cat(batches)
    assert torch.equal(values[:, 1], values[:, 0] + 1)
    return ((values[:, 0] - 1) / 2).long().tolist()


def test_each_row_once_an_epoch_in_an_order_of_the_seed(make: Make) -> None:
    loader = make(32, buffer=96, seed=3)
    first, second = list(loader), list(loader)
    assert [len(batch) for batch in first] == [32] * 9 + [12]
    assert sorted(rows_of(first)) == sorted(rows_of(second)) == list(range(ROWS))
    assert rows_of(first) != list(range(ROWS))
    assert rows_of(first) != rows_of(second)
    again = make(32, buffer=96, seed=3)
    assert rows_of(list(again)) == rows_of(first)
    assert rows_of(list(again)) == rows_of(second)
    assert rows_of(list(make(32, buffer=96, seed=4))) != rows_of(first)


@pytest.mark.parametrize("batches", [1, None])
def test_an_epoch_that_is_broken_off_is_followed_by_another(
    make: Make, batches: int | None
) -> None:
    whole, broken = make(32, buffer=96), make(32, buffer=96)
    first, second = list(whole), list(whole)
    count = batches or len(first)
    part = [rows for _, rows in zip(range(count), broken, strict=False)]
    assert all(torch.equal(a, b) for a, b in zip(part, first, strict=False))
    assert all(torch.equal(a, b) for a, b in zip(broken, second, strict=True))


def test_in_order_without_a_shuffle(make: Make) -> None:
    assert rows_of(list(make(7, shuffle=None))) == list(range(ROWS))


def test_rows_are_mixed_over_the_buffer(make: Make) -> None:
    """Neighbours of the data set are not neighbours of the stream."""
    order = torch.tensor(rows_of(list(make(10, buffer=ROWS))))
    assert int(((order[1:] - order[:-1]).abs() <= 1).sum()) < 10  # 2 are expected of 299


def test_a_buffer_is_no_larger_than_it_says(model: nn.Module) -> None:
    """Rows are drawn from those of the last few batches."""
    seen: list[int] = []

    class Watched:
        def __iter__(self) -> Any:
            for n, x in enumerate(X.split(16)):
                seen.append(n)
                yield x

    given = iter(stream(model, Watched(), "0", 8, buffer=64))
    for count in range(1, 20):
        next(given)
        assert len(seen) * 16 - count * 8 <= 64 + 16


@pytest.mark.parametrize("stop", [0, 1, 5, 9])
@pytest.mark.parametrize("shuffle", ["buffer", None])
def test_a_state_goes_on_where_it_was(make: Make, stop: int, shuffle: str | None) -> None:
    options = {"buffer": 96, "seed": 5, "shuffle": shuffle}
    whole = make(32, **options)
    next_epoch = [list(whole), list(whole)]
    loader = make(32, **options)
    given = iter(loader)
    before = [next(given) for _ in range(stop)]
    state = loader.state_dict()
    rest = list(given)
    restored = make(32, **options)
    restored.load_state_dict(torch_saved(state))
    after = list(restored)
    assert rows_of([*before, *rest]) == rows_of(next_epoch[0])
    assert len(after) == len(rest)
    assert all(torch.equal(a, b) for a, b in zip(after, rest, strict=True))
    assert rows_of(list(restored)) == rows_of(next_epoch[1])


def torch_saved(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, without pickles."""
    import io

    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    loaded: dict[str, Any] = torch.load(content, weights_only=True)
    return loaded


def test_ranks_share_the_rows(make: Make) -> None:
    parts = [rows_of(list(make(16, buffer=64, rank=r, world=3, drop_last=False))) for r in range(3)]
    both = [row for part in parts for row in part]
    assert len(set(both)) == len(both)
    assert set(both) <= set(range(ROWS))
    assert len(both) > ROWS - 3 * 16


def test_ranks_have_as_many_batches_from_a_store(features: Features) -> None:
    for world in (2, 3, 4):
        loaders = [features.loader("0", 16, buffer=64, rank=r, world=world) for r in range(world)]
        lengths = {len(loader) for loader in loaders}
        assert lengths == {len(list(loader)) for loader in loaders}
        assert len(lengths) == 1


@pytest.mark.parametrize("per", [None, 7, 2, 1])
@pytest.mark.parametrize("shuffle", ["buffer", None])
def test_ranks_of_a_store_of_few_units_miss_few_rows(
    model: nn.Module, tmp_path: Path, per: int | None, shuffle: Any
) -> None:
    """1, 3, 10 and 19 units of 300 rows: of each rank, a batch and a row of each may be missing."""
    options: dict[str, Any] = {"batches_per_commit": per, "progress": False}
    few = extract(model, data(), "0", tmp_path / "f", **options)
    for world in (1, 2, 3, 8):
        loaders = [
            few.loader("0", 10, buffer=20, rank=r, world=world, shuffle=shuffle)
            for r in range(world)
        ]
        seen = [rows_of(list(loader)) for loader in loaders]
        every = [row for rows in seen for row in rows]
        assert len(set(every)) == len(every) >= ROWS - (0 if world == 1 else 10 * world)
        state = loaders[-1].state_dict()
        again = few.loader("0", 10, buffer=20, rank=world - 1, world=world, shuffle=shuffle)
        again.load_state_dict(state)
        assert rows_of(list(again)) == rows_of(list(loaders[-1]))


def test_fewer_rows_than_ranks_are_refused(features: Features) -> None:
    with pytest.raises(
        ArgumentError, match="there are 300 rows for world=301 ranks: some get none"
    ):
        features.loader("0", 16, rank=0, world=301)


@settings(max_examples=25)
@given(
    batch=st.integers(1, 70),
    buffer=st.integers(0, 200),
    seed=st.integers(0, 9),
    drop_last=st.booleans(),
)
def test_any_sizes(features: Features, batch: int, buffer: int, seed: int, drop_last: bool) -> None:
    loader = features.loader("0", batch, buffer=2 * batch + buffer, seed=seed, drop_last=drop_last)
    given = list(loader)
    assert len(given) == len(loader) == (ROWS // batch if drop_last else -(-ROWS // batch))
    rows = rows_of(given) if given else []
    assert len(set(rows)) == len(rows) == (ROWS // batch * batch if drop_last else ROWS)


def test_several_layers_and_fields_go_together(model: nn.Module, features: Features) -> None:
    for loader in (
        features.loader(["0"], 32, fields="y"),
        stream(model, data(), ["0"], 32, keep={"y": 1}),
    ):
        for rows in loader:
            assert torch.equal(rows["0"][:, 0], 2 * rows["y"] + 1)


def test_what_a_batch_holds_is_the_callers(features: Features) -> None:
    for rows in features.loader("0", 16, shuffle=None):
        rows.zero_()
    assert torch.equal(features["0"].tensor(), X + 1)


def test_wrong_arguments(model: nn.Module, features: Features) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch": 0}, "batch must be a positive int, not 0"),
        ({"buffer": 31, "batch": 16}, "buffer=31 is less than two batches of 16 rows"),
        ({"shuffle": "all"}, "shuffle must be 'buffer' or None, not 'all'"),
        ({"seed": "x"}, "seed must be an int"),
        ({"rank": 2, "world": 2}, "rank must be from 0 to 1, not 2"),
        ({"fields": "label"}, "fields='label': nothing of that name was kept; there is 'y'"),
    ]
    for options, says in cases:
        with pytest.raises(ArgumentError, match=says):
            features.loader("0", **{"batch": 16, **options})
    with pytest.raises(ArgumentError, match="seed: 0 then, 1 now"):
        features.loader("0", 16, seed=1).load_state_dict(features.loader("0", 16).state_dict())
    shuffled = DataLoader(TensorDataset(X), batch_size=16, shuffle=True)
    with pytest.raises(ArgumentError, match="the loader shuffles"):
        stream(model, shuffled, "0", 16)
    with pytest.raises(TypeError, match="is not known before it has run"):
        len(stream(model, data(), "0", 16))
    with pytest.raises(ArgumentError, match="one layer was asked for, and gives 2 arrays"):
        next(iter(stream(model, data(), "0", 16, kinds=("response", "activation"))))
    with pytest.raises(ArgumentError, match="no map came of the layers asked for"):
        next(iter(stream(nn.Sequential(nn.Linear(2, 2)).eval(), data(), "0", 16)))


def test_the_sparse_autoencoder_of_the_examples_trains(tmp_path: Path) -> None:
    """On rows of the model, and on those of a store; a state makes no difference."""
    pytest.importorskip("sklearn")
    from examples import sparse_autoencoder as example

    torch.manual_seed(0)
    x, y = example.digits()
    net = example.reader(x, y)
    images = DataLoader(TensorDataset(x), batch_size=64)
    features = extract(net, images, "0", tmp_path / "f", progress=False)

    def trained(loader: RowLoader, steps: int | None) -> float:
        torch.manual_seed(0)
        sae = example.SparseAutoencoder(64, 128, 8)
        assert example.explained(sae, example.rows(net, x)) < 0
        example.train(sae, loader, 8, steps)
        return example.explained(sae, example.rows(net, x))

    assert trained(example.rows(net, x), None) > 0.8
    assert trained(features.loader("0", 128, buffer=1024), None) > 0.8
