"""What the disk has when: a unit's rows before its record, and all of it before "complete"."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fmapkit import StoreError

pytest.importorskip("zarr", minversion="3.1.4")

from fmapkit.analysis import Statistics
from fmapkit.data import Features, _flush, extract

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which file it is")

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def made(to: Path, tokens: bool = False) -> tuple[Features, Tensor]:
    """A store of ten units, and its rows by hand."""
    torch.manual_seed(0)
    model = nn.Linear(3, 5).eval()
    loader: Any = DataLoader(TensorDataset(X, torch.arange(40)), batch_size=4)
    features = extract(
        model,
        list(loader) if tokens else loader,
        "",
        to,
        kinds="output",
        keep={"label": 1, "text": lambda batch: [str(int(n)) for n in batch[1]]},
        analyses=Statistics(),
        batches_per_commit=1,
        progress=False,
    )
    with torch.no_grad():
        return features, model(X)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_unit_is_committed_once_the_disk_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ragged: bool
) -> None:
    to = tmp_path / "f"
    flushed: list[str] = []
    records: list[set[str]] = []  # that were there at that time

    def flush(handle: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{handle}").removeprefix(f"{to}/"))
        records.append(set(os.listdir(to / "commits")) if (to / "commits").exists() else set())

    monkeypatch.setattr(_flush.os, "fsync", flush)
    features, rows = made(to, ragged)
    assert torch.equal(features[""].tensor(), rows)
    # Text lies in shards, which have an object of the same name.
    places = ["layers/%model/output", "fields/label", "fields/text"]
    for unit in range(10):
        name = f"{unit:010d}"
        files = [f"{p}/{name}/c/0" if ragged else f"{p}/c/{unit}" for p in places]
        files[0] += "/0"  # rows of one axis
        for file in files:
            at = flushed.index(file)
            assert name not in records[at]
            assert at < flushed.index(f"commits/{name}/zarr.json")
    # Nothing that is there was left to the disk's own time.
    there = [str(p.relative_to(to)) for p in to.rglob("*") if p.is_file()]
    assert set(there) <= set(flushed)
    assert flushed.index("index/zarr.json") < len(flushed) - flushed[::-1].index("zarr.json")


def test_a_disk_that_fails_later_commits_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network disks take what they have no room for, and say so when they are asked to keep it."""
    kept = os.fsync

    def fail(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if name.endswith("layers/%model/output/c/4/0"):
            raise OSError(errno.ENOSPC, "No space left on device")
        kept(handle)

    with monkeypatch.context() as patched:
        patched.setattr(_flush.os, "fsync", fail)
        with pytest.raises(StoreError, match="No space left on device"):
            made(tmp_path / "f")
    part = Features(tmp_path / "f")
    assert part.samples.tolist() == list(range(16))
    features, rows = made(tmp_path / "f")
    assert features.complete
    assert torch.equal(features[""].tensor(), rows)


def test_a_file_system_that_cannot_flush_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(handle: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(_flush.os, "fsync", unknown)
    features, rows = made(tmp_path / "f")
    assert features.complete
    assert torch.equal(features[""].tensor(), rows)
