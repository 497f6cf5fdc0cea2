"""`extract` and `Features`, against features worked out by hand: hooks, slices, means."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from fmapkit import (
    AmbiguousMapError,
    ArgumentError,
    CaptureWarning,
    FeatureMap,
    FmapkitError,
    KindNotCapturedError,
    NotAModuleError,
    StoreError,
    StoreMismatchError,
    UnknownLayerError,
)
from fmapkit.analysis import Statistics

zarr = pytest.importorskip("zarr", minversion="3.1.4")

from fmapkit.data import Features, extract, stream  # noqa: E402
from tests.checks import Residual  # noqa: E402
from tests.truth import assert_nothing_left, fingerprint  # noqa: E402


class Net(Residual):
    """In-place, functional and residual: a hook's reference would be wrong."""

    def __init__(self) -> None:
        super().__init__(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.conv2(x)
        y += x
        return self.fc(torch.relu_(y).mean((2, 3)))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


IMAGES = torch.randn(50, 3, 5, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(50) % 7


def loader(batch: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=batch, **options)


def by_hand(model: Net, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        z1 = model.bn1(model.conv1(x))
        a1 = z1.relu()
        z2 = model.conv2(a1) + a1
        return {"z1": z1, "a1": a1, "z2": z2, "a2": z2.relu(), "fc": model(x)}


def truth(model: Net, batch: int = 8) -> dict[str, Tensor]:
    """Batch by batch: convolutions of other batch sizes may round otherwise."""
    parts = [by_hand(model, x) for x in IMAGES.split(batch)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def quiet(*arguments: Any, **options: Any) -> Features:
    return extract(*arguments, progress=False, **options)


def test_every_row_is_the_models_own(model: Net, tmp_path: Path) -> None:
    kinds = ("preactivation", "activation")
    given = (model, loader(), ["conv1", "conv2", "fc"], tmp_path / "f")
    features = quiet(*given, kinds=kinds, keep={"label": 1}, batches_per_commit=3)
    expected = truth(model)
    assert features.complete
    assert len(features) == 50
    assert features.layers == ["conv1", "conv2", "fc"]
    assert [(a.layer, a.kind, a.nonlinearity) for a in features] == [
        ("conv1", "preactivation", "relu"),
        ("conv1", "activation", "relu"),
        ("conv2", "preactivation", "relu"),
        ("conv2", "activation", "relu"),
        ("fc", "preactivation", None),
    ]
    assert torch.equal(features["conv1", "preactivation"].tensor(), expected["z1"])
    assert torch.equal(features["conv1"].tensor(), expected["a1"])
    assert torch.equal(features["conv2", "preactivation"].tensor(), expected["z2"])
    assert torch.equal(features["conv2"].tensor(), expected["a2"])
    assert torch.equal(features["fc"].tensor(), expected["fc"])
    assert torch.equal(features.fields["label"].tensor(), LABELS)
    assert torch.equal(features.samples, torch.arange(50))


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_one_zarr_array_a_layer_and_kind(model: Net, tmp_path: Path, compress: str | None) -> None:
    """Anybody's Zarr reads it: an object a unit of whole batches, with the tags."""
    given = (model, loader(), ["conv1", "conv2"], tmp_path / "f")
    quiet(*given, batches_per_commit=3, compress=compress)
    root = zarr.open_group(tmp_path / "f", mode="r")
    array = root["layers/conv2/activation"]
    assert array.shape == (50, 6, 5, 5)
    assert (array.shards or array.chunks) == (24, 6, 5, 5)
    assert bool(array.shards) == (compress is not None)
    assert array.metadata.dimension_names == ("samples", "filters", "axis2", "axis3")
    assert array.attrs["layer"] == "conv2"
    assert array.attrs["nonlinearity"] == "relu"
    assert np.array_equal(array[:], truth(model)["a2"].numpy())
    about = root.attrs["fmapkit"]
    assert about["complete"]
    assert about["samples"] == 50
    assert set(about["versions"]) == {"fmapkit", "torch", "zarr", "python"}
    assert sorted(root.group_keys()) == ["layers"]  # no commits, no analyses are left
    assert sorted(root.array_keys()) == ["index"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(model: Net, tmp_path: Path, dtype: torch.dtype) -> None:
    features = quiet(model, loader(), "conv2", tmp_path / "f", dtype=dtype)
    assert features["conv2"].dtype == dtype
    assert torch.equal(features["conv2"].tensor(), truth(model)["a2"].to(dtype))
    numpy_dtype = np.float32 if dtype == torch.bfloat16 else np.dtype(str(dtype)[6:])
    assert np.asarray(features["conv2"]).dtype == numpy_dtype


def test_pools(model: Net, tmp_path: Path) -> None:
    a2 = truth(model)["a2"]
    mean = quiet(model, loader(), "conv2", tmp_path / "mean", pool="mean")["conv2"]
    assert mean.filter_axis == 1
    assert torch.equal(mean.tensor(), a2.mean((2, 3)))
    top = quiet(model, loader(), "conv2", tmp_path / "max", pool="max")["conv2"]
    assert torch.equal(top.tensor(), a2.amax((2, 3)))

    def corner(fm: FeatureMap) -> Tensor:
        return fm.tensor[:, :, 0, 0]

    own = quiet(model, loader(), "conv2", tmp_path / "own", pool=corner)["conv2"]
    assert torch.equal(own.tensor(), a2[:, :, 0, 0])


def test_filters(model: Net, tmp_path: Path) -> None:
    features = quiet(model, loader(), "conv2", tmp_path / "f", filters=(1, 4))
    assert features["conv2"].filters == (1, 4)
    assert torch.equal(features["conv2"].tensor(), truth(model)["a2"][:, [1, 4]])


def test_elsewhere_than_in_a_folder(model: Net) -> None:
    pytest.importorskip("fsspec")
    for to in ("memory://fmapkit-test/f.zarr", zarr.storage.MemoryStore()):
        features = quiet(model, loader(), "conv2", to, batches_per_commit=2, keep={"y": 1})
        again = quiet(model, loader(), "conv2", to, batches_per_commit=2, keep={"y": 1})
        for one in (features, again):
            assert torch.equal(one["conv2"].tensor(), truth(model)["a2"])
            assert torch.equal(one["conv2"][40:10:-3], truth(model)["a2"][list(range(40, 10, -3))])


def test_stop_gives_the_same(model: Net, tmp_path: Path) -> None:
    ran = []
    model.fc.register_forward_hook(lambda *_: ran.append(1))
    features = quiet(model, loader(), "conv1", tmp_path / "f", stop=True)
    assert len(ran) == 1  # of seven batches: the first shows which maps there are
    assert torch.equal(features["conv1"].tensor(), truth(model)["a1"])


class Uneven:
    """Batches of any size, without an index: dicts, with text."""

    sizes = (5, 1, 7, 3, 9, 2)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start = 0
        for size in self.sizes:
            x = IMAGES[start : start + size]
            yield {"x": x, "name": [f"näme {start + n}" for n in range(size)]}
            start += size


def test_any_loader(model: Net, tmp_path: Path) -> None:
    features = quiet(model, Uneven(), "conv2", tmp_path / "f", keep="name", batches_per_commit=2)
    rows = torch.cat([by_hand(model, batch["x"])["a2"] for batch in Uneven()])
    assert torch.equal(features["conv2"].tensor(), rows)
    assert torch.equal(features["conv2"][[26, 0, 13]], rows[[26, 0, 13]])
    assert features.fields["name"][:].tolist() == [f"näme {n}" for n in range(27)]
    assert torch.equal(torch.stack(list(features["conv2"])), rows)


def test_a_sampler_without_a_length(model: Net, tmp_path: Path) -> None:
    class Backwards(torch.utils.data.Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(49, -1, -1))

    data = loader(sampler=Backwards(), collate_fn=None)
    features = quiet(model, data, "conv2", tmp_path / "f", keep={"y": 1}, batches_per_commit=2)
    assert torch.equal(features.fields["y"][:], LABELS.flip(0))
    rows = torch.cat([by_hand(model, x)["a2"] for x in IMAGES.flip(0).split(8)])
    assert torch.equal(features["conv2"].tensor(), rows)


def test_workers(model: Net, tmp_path: Path) -> None:
    features = quiet(model, loader(num_workers=2), "conv2", tmp_path / "f", batches_per_commit=2)
    assert torch.equal(features["conv2"].tensor(), truth(model)["a2"])


def test_call(model: Net, tmp_path: Path) -> None:
    data = [{"nested": {"image": x}} for x in IMAGES.split(8)]
    features = quiet(
        model, data, "conv2", tmp_path / "f", call=lambda m, batch: m(batch["nested"]["image"])
    )
    assert torch.equal(features["conv2"].tensor(), truth(model)["a2"])


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("times", [0, 2, 3])
def test_a_call_that_is_not_of_one_pass_is_refused(
    model: Net, tmp_path: Path, at: int, times: int
) -> None:
    """Of several passes the last one alone would be kept; of none, that of the batch before."""

    def call(model: nn.Module, batch: Tensor) -> None:
        for _ in range(times if torch.equal(batch, batches[at]) else 1):
            model(batch)

    batches = list(IMAGES.split(8))
    says = f"call= ran the model {times} times for batch {at}, and the rows of a sample are of one"
    if not times:
        says = "gave no map|no map came|is missing in a batch|no activation"
    with pytest.raises(FmapkitError, match=says):
        quiet(model, batches, "conv2", tmp_path / "f", call=call)
    with pytest.raises(FmapkitError, match=says):
        list(stream(model, batches, "conv2", 8, call=call))


def test_values_beyond_the_range_of_the_dtype_are_warned_of(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1e5]]))
    data = list(torch.ones(12, 2).split(4))
    with pytest.warns(CaptureWarning) as warned:
        features = quiet(model, data, "0", tmp_path / "f", dtype=torch.float16)
    assert [str(w.message) for w in warned] == [
        "the activation of layer '0' has a NaN or an infinite value in float16, which holds values "
        "up to 65504: dtype=torch.bfloat16 has the range of float32"
    ]
    assert features["0"].tensor().isinf().sum() == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(model, data, "0", tmp_path / "g", dtype=torch.bfloat16)
        quiet(model, [x / 10 for x in data], "0", tmp_path / "h", dtype=torch.float16)
        quiet(model, [x / 0 for x in data], "0", tmp_path / "i")


# -- sequences ----------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Tokens, and something of the whole sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU())
        self.pooler = nn.Linear(12, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.mlp(self.embed(ids))
        return torch.tanh(self.pooler((h * mask[..., None]).sum(1)))


def sequences() -> list[dict[str, Any]]:
    drawn = torch.Generator().manual_seed(2)
    batches = []
    for number, size in enumerate((4, 3, 5, 4)):
        length = 6 - number
        mask = (torch.rand((size, length), generator=drawn) < 0.6).long()
        ids = torch.randint(0, 20, (size, length), generator=drawn)
        batches.append({"ids": ids, "mask": mask, "label": torch.arange(size)})
    return batches


def test_rows_are_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Encoder().eval(), sequences()
    features = quiet(
        *(model, data, ["mlp.0", "pooler"], tmp_path / "f"),
        mask="mask",
        keep=["ids", "label"],
        batches_per_commit=3,
    )
    tokens, pooled, samples, positions, ids = [], [], [], [], []
    start = 0
    with torch.no_grad():
        for batch in data:
            h = model.mlp(model.embed(batch["ids"]))
            pooled.append(model(batch["ids"], batch["mask"]))
            for sample in range(len(h)):
                for position in range(h.shape[1]):
                    if batch["mask"][sample, position]:
                        tokens.append(h[sample, position])
                        samples.append(start + sample)
                        positions.append(position)
                        ids.append(int(batch["ids"][sample, position]))
            start += len(h)
    assert torch.equal(features["mlp.0"].tensor(), torch.stack(tokens))
    assert features["mlp.0"].per == "token"
    assert features["mlp.0"].filter_axis == 1
    assert torch.equal(features["pooler"].tensor(), torch.cat(pooled))
    assert features["pooler"].per == "sample"
    assert features.fields["sample"][:].tolist() == samples
    assert features.fields["position"][:].tolist() == positions
    assert features.fields["ids"][:].tolist() == ids
    assert features.fields["label"][:].tolist() == [*range(4), *range(3), *range(5), *range(4)]


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_pools_leave_padding_out(tmp_path: Path, pool: str) -> None:
    torch.manual_seed(0)
    model, data = Encoder().eval(), sequences()
    for batch in data:
        batch["mask"][:, 0] = 1  # of no token there is no mean
    features = quiet(model, data, "mlp.0", tmp_path / "f", mask="mask", pool=pool)
    rows = []
    with torch.no_grad():
        for batch in data:
            h = model.mlp(model.embed(batch["ids"]))
            for one, mask in zip(h, batch["mask"], strict=True):
                kept = one[mask.bool()]
                rows.append(kept.mean(0) if pool == "mean" else kept.amax(0))
    torch.testing.assert_close(features["mlp.0"].tensor(), torch.stack(rows))


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_a_sample_of_padding_alone_has_no_pool(tmp_path: Path, pool: str) -> None:
    data = sequences()
    for batch in data:
        batch["mask"][:, 0] = 1
    data[1]["mask"][2] = 0
    with pytest.raises(ArgumentError, match=f"no position of sample 2 of a batch.* no {pool};"):
        quiet(Encoder().eval(), data, "mlp.0", tmp_path / "f", mask="mask", pool=pool)


def test_analyses_ride_along_and_see_no_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, stats = Encoder().eval(), Statistics()
    features = quiet(model, sequences(), "mlp.0", tmp_path / "f", mask="mask", analyses=stats)
    rows = features["mlp.0"].tensor().double()
    assert stats["mlp.0"].count.tolist() == [len(rows)] * 12
    torch.testing.assert_close(stats["mlp.0"].mean, rows.mean(0))
    torch.testing.assert_close(stats["mlp.0"].maximum.double(), rows.amax(0))


class ConvEncoder(Encoder):
    """Its tokens lie (samples, filters, positions)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 12, 3, padding=1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return F.gelu(self.conv(self.embed(ids).transpose(1, 2))).mean(2)


@pytest.mark.parametrize("pool", [None, "mean", "max"])
def test_tokens_of_a_convolution_are_those_of_the_mask(tmp_path: Path, pool: str | None) -> None:
    torch.manual_seed(0)
    model, data, stats = ConvEncoder().eval(), sequences(), Statistics()
    for batch in data:
        batch["mask"][:, 0] = 1
    asked = {"mask": "mask", "pool": pool, "analyses": stats}
    features = quiet(model, data, "conv", tmp_path / "f", **asked)
    tokens, pooled = [], []
    with torch.no_grad():
        for batch in data:
            h = F.gelu(model.conv(model.embed(batch["ids"]).transpose(1, 2))).transpose(1, 2)
            for one, mask in zip(h, batch["mask"], strict=True):
                tokens.append(one[mask.bool()])
                pooled.append(tokens[-1].mean(0) if pool == "mean" else tokens[-1].amax(0))
    expected = torch.cat(tokens) if pool is None else torch.stack(pooled)
    torch.testing.assert_close(features["conv"].tensor(), expected)
    assert features["conv"].filter_axis == 1
    torch.testing.assert_close(stats["conv"].mean, torch.cat(tokens).double().mean(0))


def test_sequences_of_different_lengths_need_a_mask(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        quiet(Encoder().eval(), sequences(), "mlp.0", tmp_path / "f")
    assert str(caught.value) == (
        "the activation of layer 'mlp.0' has rows of shape (6, 12) and type float32 in the first "
        "batch, and (5, 12) and float32 in a later one; where inputs differ in size, pool=... "
        "makes rows of one shape, and of sequences mask=... makes a row of each token"
    )


# -- going on -------------------------------------------------------------------------------------


class Counted(Dataset[Any]):
    """Counts what is read, and fails where it is told to."""

    def __init__(self, fail_at: int | None = None, error: type[BaseException] = OSError) -> None:
        self.read: list[int] = []
        self.fail_at = fail_at
        self.error = error

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.fail_at:
            raise self.error("the disk of the images is gone")
        self.read.append(index)
        return IMAGES[index], LABELS[index]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_loader_that_fails_loses_nothing(
    model: Net, tmp_path: Path, error: type[BaseException]
) -> None:
    to = tmp_path / "f"
    given: dict[str, Any] = {"batches_per_commit": 2, "keep": {"label": 1}}
    before = fingerprint(model)
    with pytest.raises(error, match="the disk of the images is gone"):
        quiet(model, DataLoader(Counted(45, error), batch_size=8), "conv2", to, **given)
    assert_nothing_left(before, model)
    part = Features(to)
    assert not part.complete
    assert torch.equal(part.samples, torch.arange(32))
    assert torch.equal(part["conv2"].tensor(), truth(model)["a2"][:32])
    assert repr(part).endswith("Features: 32 samples of 50, incomplete, beside 'label'")
    rest = Counted()
    features = quiet(model, DataLoader(rest, batch_size=8), "conv2", to, **given)
    # The first batch is compared with what it was; nothing else is read again.
    assert rest.read == [*range(8), *range(32, 50)]
    assert torch.equal(features["conv2"].tensor(), truth(model)["a2"])
    assert torch.equal(features.fields["label"].tensor(), LABELS)
    done = Counted()
    quiet(model, DataLoader(done, batch_size=8), "conv2", to, **given)
    assert done.read == [*range(8)]


class Small(zarr.storage.LocalStore):
    """A disk that is full after so many bytes."""

    room = 0

    async def set(self, key: str, value: Any) -> None:
        if len(value) > Small.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        Small.room -= len(value)
        await super().set(key, value)


def test_a_disk_that_fills_up_loses_nothing(model: Net, tmp_path: Path) -> None:
    units = []
    for _ in range(20):
        Small.room = 15_000
        try:
            quiet(model, loader(), "conv2", Small(tmp_path / "f"), batches_per_commit=1)
            break
        except StoreError as error:
            failed = error
        assert "No space left on device" in str(failed)
        assert isinstance(failed.__cause__, OSError)
        # The first time there is room for a beginning, and for some units.
        part = Features(tmp_path / "f")
        assert torch.equal(part["conv2"].tensor(), truth(model)["a2"][: len(part)])
        assert len(part) % 8 == 0
        units.append(len(part) // 8)
    assert units == sorted(units)
    assert 0 < units[0] < 7
    assert torch.equal(Features(tmp_path / "f")["conv2"].tensor(), truth(model)["a2"])


class Cut(zarr.storage.LocalStore):
    """Nothing is written, or removed, after so many objects: as if the process had been killed."""

    left = 0

    @staticmethod
    def count() -> None:
        Cut.left -= 1
        if Cut.left < 0:
            raise OSError("cut")

    async def set(self, key: str, value: Any) -> None:
        Cut.count()
        await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        Cut.count()
        await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        Cut.count()
        await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        Cut.count()
        await super().delete_dir(prefix)


@pytest.mark.parametrize("regular", [True, False])
def test_cut_off_after_any_object_nothing_is_lost(
    model: Net, tmp_path: Path, regular: bool
) -> None:
    """Each step of the order of writing in turn, from the first object to the last."""
    data = loader(16) if regular else IMAGES.split(16)
    expected = truth(model, 16)["a2"]

    def run(store: Any) -> tuple[Features, Statistics]:
        stats = Statistics()
        features = quiet(model, data, "conv2", store, analyses=stats, batches_per_commit=1)
        return features, stats

    steps = 0
    while True:
        Cut.left = steps
        to = tmp_path / str(steps)
        try:
            run(Cut(to))
            break  # there was nothing more to write
        except (StoreError, OSError):
            steps += 1
        features, stats = run(to)
        assert features.complete
        assert torch.equal(features["conv2"].tensor(), expected)
        assert stats["conv2"].count.tolist() == [50 * 25] * 6
        assert sorted(p.name for p in to.iterdir() if p.is_dir()) == [
            *("analyses", "index", "layers"),
        ]
    assert steps > 20


def test_analyses_go_on_where_they_were(model: Net, tmp_path: Path) -> None:
    def run(fail_at: int | None, to: str) -> Statistics:
        stats = Statistics()
        data = DataLoader(Counted(fail_at), batch_size=8)
        quiet(model, data, "conv2", tmp_path / to, analyses=stats, batches_per_commit=2)
        return stats

    for fail_at in (20, 45):
        with pytest.raises(OSError, match="gone"):
            run(fail_at, "f")
    stats, plain = run(None, "f"), run(None, "g")
    again = run(None, "f")
    for name in ("count", "mean", "variance", "minimum", "maximum"):
        assert torch.equal(getattr(stats["conv2"], name), getattr(plain["conv2"], name))
        assert torch.equal(getattr(again["conv2"], name), getattr(plain["conv2"], name))


# -- what is refused ----------------------------------------------------------------------------


class AtPlace:
    """A pool that has an attribute."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __call__(self, fm: FeatureMap) -> Tensor:
        return fm.tensor[:, :, self.place, 0]


def _pools(place: int) -> dict[str, Any]:
    """Functions that differ in nothing but what they hold."""

    def of(fm: FeatureMap) -> Tensor:
        return fm.tensor[:, :, place, 0]

    def around(fm: FeatureMap) -> Tensor:
        return of(fm)

    weights = torch.zeros(5).index_fill(0, torch.tensor(place), 1.0)
    return {
        "closure": of,
        "nested": around,
        "default": lambda fm, place=place: fm.tensor[:, :, place, 0],
        "object": AtPlace(place),
        "tensor": lambda fm: (fm.tensor[..., 0] * weights).sum(2),
    }


@pytest.mark.parametrize("how", _pools(0))
def test_a_function_that_holds_another_value_is_another_one(
    model: Net, tmp_path: Path, how: str
) -> None:
    first = quiet(model, loader(), "conv2", tmp_path, pool=_pools(0)[how])
    again = quiet(model, loader(), "conv2", tmp_path, pool=_pools(0)[how])
    assert torch.equal(first["conv2"].tensor(), again["conv2"].tensor())
    with pytest.raises(StoreMismatchError, match=r"pool: .* then, .* now"):
        quiet(model, loader(), "conv2", tmp_path, pool=_pools(1)[how])


def test_a_function_is_the_same_one_in_every_process() -> None:
    code = (
        "from fmapkit.data._fingerprint import describe\n"
        "print(describe(lambda batch: batch in {'a', 'b', 'c', 'd', 'e'}))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1


def test_another_call_at_the_same_place_is_refused_by_name(model: Net, tmp_path: Path) -> None:
    to = tmp_path / "f"
    quiet(model, loader(), "conv2", to)

    def refused(*arguments: Any, **options: Any) -> str:
        with pytest.raises(StoreMismatchError) as caught:
            quiet(*arguments, **options)
        assert isinstance(caught.value, ValueError)
        text = str(caught.value)
        start = f"{to} holds features of another call: "
        end = ". Give another place, or the same model and arguments"
        assert text.startswith(start)
        assert text.endswith(end)
        return text[len(start) : -len(end)]

    assert refused(model, loader(), ["conv1", "conv2"], to) == (
        "layers: ['conv2'] then, ['conv1', 'conv2'] now"
    )
    assert refused(model, loader(), "conv2", to, pool="mean", dtype=torch.float16) == (
        "pool: None then, 'mean' now; dtype: None then, 'torch.float16' now"
    )
    assert refused(model, loader(16), "conv2", to) == "loader batch_size: 8 then, 16 now"
    with torch.no_grad():
        model.fc.bias[2] += 1e-6
    words = refused(model, loader(), "conv2", to)
    assert re.fullmatch(r"weights: '[0-9a-f]{16}' then, '[0-9a-f]{16}' now", words)
    assert refused(nn.Sequential(nn.ReLU()).eval(), loader(), "0", to).startswith(
        "model: 'tests.test_data_extract.Net' then, 'torch.nn.modules.container.Sequential' now"
    )


def test_other_data_at_the_same_place_is_refused(model: Net, tmp_path: Path) -> None:
    to = tmp_path / "f"
    data = IMAGES.split(8)
    quiet(model, data, "conv2", to, batches_per_commit=2)
    with pytest.raises(StoreMismatchError, match="batch 0 of the loader is not the one"):
        quiet(model, [-x for x in data], "conv2", to)
    quiet(model, [-x for x in data], "conv2", to, check=False)  # all is there


def test_a_stream_that_gives_other_batches_is_refused(model: Net, tmp_path: Path) -> None:
    class Some:
        def __init__(self, batches: list[Tensor]) -> None:
            self.batches = batches

        def __iter__(self) -> Iterator[Tensor]:
            for batch in self.batches:
                if not len(batch):
                    raise OSError("gone")
                yield batch

    data, to = list(IMAGES.split(8)), tmp_path / "f"
    with pytest.raises(OSError, match="gone"):
        quiet(model, Some([*data[:4], data[0][:0]]), "conv2", to, batches_per_commit=2)
    other = [*data[:2], -data[2], *data[3:]]
    with pytest.raises(
        StoreMismatchError, match=r"batch 2 of the loader is not the one that .* was"
    ):
        quiet(model, Some(other), "conv2", to, batches_per_commit=2)
    with pytest.raises(StoreError, match="came to its end after 3 batches"):
        quiet(model, Some(data[:3]), "conv2", to, batches_per_commit=2)
    features = quiet(model, Some(data), "conv2", to, batches_per_commit=2)
    assert torch.equal(features["conv2"].tensor(), truth(model)["a2"])


class Stateless:
    """An analysis that could not go on."""

    def __init__(self) -> None:
        self.seen = 0

    def update(self, fm: FeatureMap) -> None:
        self.seen += len(fm.tensor)


def test_an_analysis_without_a_state_rides_where_nothing_is_resumed(
    model: Net, tmp_path: Path
) -> None:
    stateless = Stateless()
    quiet(model, loader(), "conv2", tmp_path / "f", analyses=stateless, resume=False)
    assert stateless.seen == 50


def test_arguments_are_refused_before_anything_is_written(model: Net, tmp_path: Path) -> None:
    to = tmp_path / "f"
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (Net(), {}, "the model is in training mode"),
        (model, {"loader": IMAGES}, "loader must give batches, and is a Tensor: wrap it"),
        (model, {"loader": iter([])}, "can be read once only"),
        (model, {"loader": []}, "the loader is empty"),
        (model, {"loader": 5}, "loader must be an iterable of batches"),
        (model, {"loader": loader(shuffle=True)}, r"the loader shuffles \(RandomSampler\)"),
        (
            model,
            {"loader": loader(sampler=DistributedSampler(range(50), 2, 0))},
            "the loader has a DistributedSampler",
        ),
        (model, {"layers": "conv3"}, "did you mean 'conv"),
        (model, {"layers": "fc"}, "no map of kinds='activation' came from 'fc'"),
        (model, {"kinds": "activations"}, "unknown kind"),
        (model, {"pool": "median"}, "pool must be one of"),
        (model, {"mask": "mask"}, "has no 'mask'"),
        (model, {"keep": "label"}, "name an entry by its index"),
        (model, {"keep": {"label": 2}}, "the batch has 2 entries, and none is at 2"),
        (model, {"keep": {"label": lambda b: b[1][:3]}}, "the batch has 8 samples: one for each"),
        (model, {"compress": "rar"}, "compress must be None, 'zstd'"),
        (model, {"batches_per_commit": 0}, "batches_per_commit must be a positive int"),
        (model, {"device": "nowhere"}, "device must name a torch device"),
        (model, {"analyses": [1]}, "objects with update"),
        (model, {"analyses": Stateless()}, "Stateless has no state_dict and load_state_dict"),
        (model, {"pool": lambda fm: fm.tensor[:3]}, "the batch has 8 samples"),
    ]
    for given_model, options, says in cases:
        data = options.pop("loader", loader())
        layers = options.pop("layers", "conv2")
        with pytest.raises(ArgumentError, match=says):
            quiet(given_model, data, layers, to, **options)
        assert not to.exists(), says
    with pytest.raises(NotAModuleError, match=r"extract takes a torch\.nn\.Module, not int"):
        quiet(3, loader(), "conv2", to)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("zarr", r"features on disk need zarr: pip install fmapkit\[data\]"),
        ("tqdm.auto", r"progress=True needs tqdm: pip install fmapkit\[data\]"),
    ],
)
def test_an_extra_that_is_missing_is_named(
    model: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, says: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=says):
        extract(model, loader(), "conv2", tmp_path / "f")


def test_places_that_hold_something_else_are_left_alone(model: Net, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreMismatchError) as caught:
        quiet(model, loader(), "conv2", tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds something else already ('thesis.tex'); give a folder that is empty, or "
        "not there yet"
    )
    with pytest.raises(StoreMismatchError, match="is a file"):
        quiet(model, loader(), "conv2", tmp_path / "thesis.tex")
    zarr.create_group(tmp_path / "other")
    with pytest.raises(StoreMismatchError, match="is a Zarr group that fmapkit did not make"):
        quiet(model, loader(), "conv2", tmp_path / "other")
    with pytest.raises(StoreError, match="there are no features at"):
        Features(tmp_path / "nothing")
    quiet(model, loader(), "conv2", tmp_path / "f")
    with pytest.raises(StoreMismatchError, match="resume=False begins anew"):
        quiet(model, loader(), "conv2", tmp_path / "f", resume=False)


def test_a_collate_function_that_drops_samples_is_named(model: Net, tmp_path: Path) -> None:
    def some(items: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([x for x, label in items if int(label) != 3])

    with pytest.raises(StoreError, match="batch 0 has 7 samples, and the loader says 8"):
        quiet(model, loader(collate_fn=some), "conv2", tmp_path / "f")


def test_a_layer_that_runs_on_some_data_only_is_named(tmp_path: Path) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            return self.b(x).relu() if len(x) > 2 else x

    data = [torch.ones(3, 2), torch.ones(2, 2)]
    with pytest.raises(StoreError, match="the activation of layer 'b' is missing in a batch"):
        quiet(Gated().eval(), data, ["a", "b"], tmp_path / "f")


def test_a_model_that_branches_on_its_data_is_captured_in_every_batch(tmp_path: Path) -> None:
    """A pass on a new way is not kept by capture: the batch is run again, not left out."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return torch.tanh(self.a(x))
            return torch.tanh(self.a(-x))

    model, stats = Branches().eval(), Statistics()
    data = [x * (-1) ** (n // 2) for n, x in enumerate(torch.rand(9, 4, 2))]
    features = quiet(model, data, "a", tmp_path / "f", analyses=stats)
    with torch.no_grad():
        rows = torch.cat([model(x) for x in data])
    assert torch.equal(features["a"].tensor(), rows)
    assert stats["a"].count.tolist() == [36] * 3


# -- reading ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Tensor]]:
    """One array in each way in which it can lie: mapped, compressed, in pieces."""
    torch.manual_seed(0)
    model, folder = Net().eval(), tmp_path_factory.mktemp("stores")
    whole = truth(model)["a2"]
    made = {
        "mapped": quiet(model, loader(), "conv2", folder / "a", batches_per_commit=2),
        "zstd": quiet(
            model, loader(), "conv2", folder / "b", batches_per_commit=2, compress="zstd"
        ),
        "pieces": quiet(model, IMAGES.split(8), "conv2", folder / "c", batches_per_commit=2),
    }
    return {name: (features["conv2"], whole) for name, features in made.items()}


_rows = st.one_of(
    st.integers(-50, 49),
    st.slices(50),
    st.lists(st.integers(-50, 49), max_size=8),
    st.lists(st.booleans(), min_size=50, max_size=50).map(np.array),
)
_others = st.sampled_from([(), (2,), (slice(1, 4),), (slice(None), 0), (3, slice(None), -1)])


@pytest.mark.parametrize("name", ["mapped", "zstd", "pieces"])
@settings(max_examples=40)
@given(rows=_rows, others=_others)
def test_indexing_is_numpys(
    stores: dict[str, tuple[Any, Tensor]], name: str, rows: Any, others: tuple[Any, ...]
) -> None:
    array, whole = stores[name]
    if isinstance(rows, list):
        rows = np.array(rows, dtype=np.int64)
    # Rows first, then the other axes: NumPy would pair lists of two axes.
    expected = whole.numpy()[rows][
        others if np.ndim(rows) == 0 and not isinstance(rows, slice) else (slice(None), *others)
    ]
    found = array[(rows, *others)]
    assert isinstance(found, Tensor)
    assert np.array_equal(found.numpy(), expected)


def test_what_is_read_is_a_copy(stores: dict[str, tuple[Any, Tensor]]) -> None:
    for array, whole in stores.values():
        array[:8].zero_()
        array[3].zero_()
        assert torch.equal(array[:8], whole[:8])


def test_wrong_rows_are_refused(stores: dict[str, tuple[Any, Tensor]]) -> None:
    for array, _ in stores.values():
        with pytest.raises(IndexError, match="row 50 is out of range"):
            array[50]
        with pytest.raises(IndexError, match="row -51 is out of range"):
            array[[0, -51]]
        with pytest.raises(IndexError, match="a mask of shape"):
            array[np.ones(3, bool)]
        with pytest.raises(ArgumentError, match="rows are given by"):
            array["conv2"]
        with pytest.raises(ArgumentError, match=r"and \.\.\. is none"):
            array[..., 0]


def test_out_to_files(model: Net, tmp_path: Path) -> None:
    load = pytest.importorskip("safetensors.torch").load_file
    features = quiet(
        model, loader(), ["conv1", "conv2"], tmp_path / "f", keep={"y": 1}, dtype=torch.bfloat16
    )
    expected = truth(model)
    assert np.array_equal(
        np.load(features["conv2"].to_npy(tmp_path / "one.npy")),
        expected["a2"].bfloat16().float().numpy(),
    )
    paths = features.to_npy(tmp_path / "npy")
    names = ["conv1-activation.npy", "conv2-activation.npy", "y.npy"]
    assert [path.name for path in paths] == names
    assert np.array_equal(np.load(paths[2]), LABELS.numpy())
    found = load(features.to_safetensors(tmp_path / "all.safetensors"))
    assert torch.equal(found["conv1/activation"], expected["a1"].bfloat16())
    assert torch.equal(found["fields/y"], LABELS)
    one = load(features["conv1"].to_safetensors(tmp_path / "one.safetensors"))
    assert torch.equal(one["conv1/activation"], expected["a1"].bfloat16())


def test_look_ups(model: Net, tmp_path: Path) -> None:
    features = quiet(model, loader(), ["conv1", "fc"], tmp_path / "f", kinds=("response", "input"))
    with pytest.raises(UnknownLayerError, match=r"no features of layer 'conv3' here; did you mean"):
        features["conv3"]
    with pytest.raises(KindNotCapturedError) as missing:
        features["fc", "activation"]
    assert str(missing.value) == ("no activation of layer 'fc' here; there is 'input', 'response'")
    with pytest.raises(AmbiguousMapError, match=r"features\['fc'\] could mean 2 arrays"):
        features["fc"]
    assert "fc" in features
    assert "conv2" not in features
    assert len(features.select(layer="fc")) == 2


def test_names_of_layers_are_names_of_folders(tmp_path: Path) -> None:
    """A model by itself, a layer that has two maps, names that a file system dislikes."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("a/b %", nn.Linear(2, 2))
            self.add_module("__x", nn.Linear(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            first = self.get_submodule("a/b %")
            x = torch.relu(first(x)) + torch.relu(first(x))
            return torch.tanh(self.get_submodule("__x")(x))

    model, x = Odd().eval(), torch.randn(4, 2)
    features = quiet(model, [x], ["a/b %", "__x", ""], tmp_path / "f")
    first = model.get_submodule("a/b %")
    with torch.no_grad():
        assert torch.equal(features["__x"].tensor(), model(x))
        assert torch.equal(features[""].tensor(), model(x))
        calls = features.select(layer="a/b %")
        assert [array.call for array in calls] == [0, 1]
        assert torch.equal(calls[1].tensor(), torch.relu(first(x)))
    assert [p.name for p in sorted((tmp_path / "f" / "layers").iterdir()) if p.is_dir()] == [
        "%5F_x",
        "%model",
        "a%2Fb%20%25",
    ]
