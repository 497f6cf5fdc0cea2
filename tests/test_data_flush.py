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
from fmapkit.data import Features, _objects, extract

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
    seen: list[tuple[str, set[str], set[str]]] = []  # and the records and states there by then

    def flush(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}").removeprefix(f"{to}/")
        records = {file.name for file in to.glob("commits/*")}
        seen.append(
            (name, records, {file.parent.name for file in to.glob("analyses/*/*/zarr.json")})
        )

    monkeypatch.setattr(_objects.os, "fsync", flush)
    features, rows = made(to, ragged)
    assert torch.equal(features[""].tensor(), rows)
    flushed = [name for name, _, _ in seen]
    # Text lies in shards, which have an object of the same name.
    places = ["layers/%model/output", "fields/label", "fields/text"]
    for unit in range(10):
        name = f"{unit:010d}"
        files = [f"{p}/{name}/c.0" if ragged else f"{p}/c.{unit}" for p in places]
        files[0] += ".0"  # rows of one axis
        for file in [
            *files,
            next(f for f in flushed if f.startswith("analyses/") and f"/{name}/" in f),
        ]:
            assert name not in seen[flushed.index(file)][1]
        # The state before goes once the disk has the record that names the next one.
        if unit:
            at = flushed.index(f"commits/{name}")
            assert {f"{unit - 1:010d}", name} <= seen[at][2]
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
        if name.endswith("layers/%model/output/c.4.0"):
            raise OSError(errno.ENOSPC, "No space left on device")
        kept(handle)

    with monkeypatch.context() as patched:
        patched.setattr(_objects.os, "fsync", fail)
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

    monkeypatch.setattr(_objects.os, "fsync", unknown)
    features, rows = made(tmp_path / "f")
    assert features.complete
    assert torch.equal(features[""].tensor(), rows)


@pytest.mark.parametrize("content", [b"", bytes(300), b'{"unit": 3'])
def test_a_record_that_a_power_cut_took_away_is_a_unit_that_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    """A disk may have a file's name, and not what is in it, where nobody has waited for that."""
    to = tmp_path / "f"
    torch.manual_seed(0)
    model = nn.Linear(3, 5).eval()

    def run(last: int) -> Features:
        def call(model: nn.Module, x: Tensor) -> Tensor:
            if len(asked) == last:
                raise RuntimeError("no more")
            asked.append(x)
            return model(x)  # type: ignore[no-any-return]

        asked: list[Tensor] = []
        loader = DataLoader(X, batch_size=4)
        return extract(
            model,
            loader,
            "",
            to,
            kinds="output",
            call=call,
            batches_per_commit=1,
            progress=False,
        )

    with pytest.raises(RuntimeError, match="no more"):
        run(6)
    assert Features(to).samples.tolist() == list(range(24))
    (to / "commits" / f"{3:010d}").write_bytes(content)
    assert Features(to).samples.tolist() == [*range(12), *range(16, 24)]
    features = run(-1)
    assert features.complete
    with torch.no_grad():
        assert torch.equal(features[""].tensor(), model(X))
