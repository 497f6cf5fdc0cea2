"""Files that are mapped as one array, and rows that are gathered from it."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("zarr", minversion="3.1.4")

from fmapkit.data import Features, _joined, extract
from fmapkit.data._joined import join

pytestmark = pytest.mark.skipif(
    sys.platform not in ("linux", "darwin"), reason="files are not mapped together elsewhere"
)


def written(
    folder: Path, counts: list[int], shape: tuple[int, ...], dtype: Any = np.float32
) -> tuple[list[tuple[Path, int]], list[np.ndarray[Any, Any]]]:
    """Files of random rows, and the rows."""
    drawn, files, parts = np.random.default_rng(0), [], []
    for number, count in enumerate(counts):
        rows = drawn.integers(0, 255, (count, *shape)).astype(dtype)
        rows.tofile(folder / str(number))
        files.append((folder / str(number), count))
        parts.append(rows)
    return files, parts


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    shape=st.lists(st.integers(1, 40), max_size=2).map(tuple),
    dtype=st.sampled_from([np.uint8, np.int16, np.float32, np.float64, np.complex128]),
)
def test_rows_are_those_of_the_files(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], shape: Any, dtype: Any
) -> None:
    files, parts = written(tmp_path_factory.mktemp("files"), counts, shape, dtype)
    found = join(files, shape, np.dtype(dtype))
    assert found is not None
    for start, part in zip(found.starts.tolist(), parts, strict=True):
        assert np.array_equal(found.rows[start : start + len(part)], part)
    virtual = np.concatenate(
        [start + np.arange(len(p)) for start, p in zip(found.starts, parts, strict=True)]
    )
    drawn = np.random.default_rng(1).permutation(len(virtual))
    assert np.array_equal(found.rows.take(virtual[drawn], 0), np.concatenate(parts)[drawn])


@pytest.mark.parametrize("change", ["longer", "shorter", "gone"])
def test_a_file_of_another_size_is_not_mapped(tmp_path: Path, change: str) -> None:
    """Memory behind the end of a file is a crash: SIGBUS."""
    gc.collect()
    left = _joined._budget._left
    files, _ = written(tmp_path, [100, 100], (5,))
    path = files[1][0]
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b"x" if change == "longer" else b"")
    assert join(files, (5,), np.dtype(np.float32)) is None
    assert _joined._budget._left == left


def test_rows_of_no_bytes_and_no_files_are_not_mapped(tmp_path: Path) -> None:
    assert join([], (5,), np.dtype(np.float32)) is None
    assert join([(tmp_path, 3)], (0,), np.dtype(np.float32)) is None
    assert join([(tmp_path, 3)], (), np.dtype(object)) is None


def test_what_is_written_stays_in_memory(tmp_path: Path) -> None:
    files, parts = written(tmp_path, [100], (5,))
    found = join(files, (5,), np.dtype(np.float32))
    assert found is not None
    found.rows[:100] = -1
    assert np.array_equal(np.fromfile(files[0][0], np.float32).reshape(100, 5), parts[0])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is mapped")
def test_the_memory_lives_as_long_as_what_reads_it(tmp_path: Path) -> None:
    """And no longer: a process may map so many files only."""

    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    gc.collect()
    left = _joined._budget._left
    files, parts = written(tmp_path, [100, 50], (5,))
    found = join(files, (5,), np.dtype(np.float32))
    assert found is not None
    assert maps() == 2
    assert _joined._budget._left == left - 2
    tensor = torch.from_numpy(found.rows)[:100]
    del found
    gc.collect()
    assert maps() == 2
    assert torch.equal(tensor, torch.from_numpy(parts[0]))
    del tensor
    gc.collect()
    assert maps() == 0
    assert _joined._budget._left == left


def test_no_more_files_are_mapped_than_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_joined, "_budget", _joined._Budget(3))
    files, _ = written(tmp_path, [10, 10], (5,))
    first = join(files, (5,), np.dtype(np.float32))
    assert first is not None
    assert join(files, (5,), np.dtype(np.float32)) is None
    del first
    gc.collect()
    assert join(files, (5,), np.dtype(np.float32)) is not None


# -- stores ---------------------------------------------------------------------------------------

ROWS, WIDE = 150, 7  # rows of 28 bytes: no unit ends where a page does
X = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))


def extracted(to: Path, compress: str | None = None, tokens: bool = False) -> tuple[Any, Tensor]:
    """A store and its rows, by hand."""
    torch.manual_seed(0)
    model = nn.Linear(4, WIDE).eval()
    with torch.no_grad():
        rows = model(X)
    data = DataLoader(TensorDataset(X, torch.arange(ROWS)), batch_size=8)
    options: dict[str, Any] = {"keep": {"number": 1}}
    if tokens:
        keep = torch.rand(ROWS // 3, 3, generator=torch.Generator().manual_seed(1)) < 0.7
        data = DataLoader(TensorDataset(X.view(-1, 3, 4), keep), batch_size=4)
        options = {"mask": lambda batch: batch[1]}
        rows = rows[keep.flatten()]
    made = extract(
        model,
        data,
        "",
        to,
        kinds="output",
        compress=compress,
        batches_per_commit=2,
        progress=False,
        **options,
    )
    return made, rows


def unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot map files so."""
    monkeypatch.setattr(_joined, "_libc", lambda: None)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("mapped", [True, False])
def test_rows_of_a_store_are_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: bool, mapped: bool
) -> None:
    if not mapped:
        unmapped(monkeypatch)
    features, rows = extracted(tmp_path / "f", tokens=tokens)
    array = features[""]
    assert array.mapped == mapped
    drawn = torch.randint(len(rows), (400,), generator=torch.Generator().manual_seed(2))
    assert torch.equal(array[drawn], rows[drawn])
    assert torch.equal(array[drawn - len(rows)], rows[drawn])
    assert torch.equal(array[drawn, 2:5], rows[drawn, 2:5])
    assert torch.equal(array[drawn, 3], rows[drawn, 3])
    assert torch.equal(array[::-3], rows[torch.arange(len(rows) - 1, -1, -3)])
    assert array[[]].shape == (0, WIDE)
    for first, last in array.bounds:
        assert torch.equal(array.view(first, last), rows[first:last])


def test_the_order_is_the_same_however_rows_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped, compressed, or where files cannot be mapped: the same batches, bit for bit."""
    plain, _ = extracted(tmp_path / "plain")
    packed, _ = extracted(tmp_path / "packed", compress="zstd")
    options: dict[str, Any] = {"fields": "number", "buffer": 40, "seed": 3}
    first = list(plain.loader([""], 16, **options))
    assert not packed[""].mapped
    assert _same(first, list(packed.loader([""], 16, **options)))
    unmapped(monkeypatch)
    again = Features(tmp_path / "plain")
    assert not again[""].mapped
    assert _same(first, list(again.loader([""], 16, **options)))


def test_a_state_of_one_goes_on_in_the_other(tmp_path: Path) -> None:
    plain, _ = extracted(tmp_path / "plain")
    packed, _ = extracted(tmp_path / "packed", compress="zstd")
    options: dict[str, Any] = {"fields": "number", "buffer": 40, "seed": 3}
    whole = list(plain.loader([""], 16, **options))
    begun, going = plain.loader([""], 16, **options), packed.loader([""], 16, **options)
    given = iter(begun)
    for _ in range(3):
        next(given)
    going.load_state_dict(begun.state_dict())
    assert _same(whole[3:], list(going))


def _same(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in ("", "number"))
