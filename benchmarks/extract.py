"""What it costs to keep the features of a data set, beside the same loop that throws them away.

Pairs of runs, in alternating order: a contender's and the baseline's beside it; the medians of the
pairs' ratios are told, of wall-clock time (throughput), and of the CPU time of all threads.
"""

from __future__ import annotations

import importlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import torchvision_operators
from benchmarks.measure import Taken, environment
from benchmarks.models import ResNet
from fmapkit import capture
from fmapkit.data import Features, extract

__all__ = ["pairs", "run"]

LAYER = "layer4"
_ROWS, _WIDE, _BATCH = 200_000, 512, 256  # of the rows that are read back, in float32


def _taken(work: Callable[[], object]) -> Taken:
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return Taken(time.perf_counter() - start, time.process_time() - cpu)


def pairs(
    work: Callable[[], object],
    base: Callable[[], object],
    count: int,
    between: Callable[[], object] = lambda: None,
) -> list[tuple[Taken, Taken]]:
    """Runs of one and of the other in turn.

    Args:
        work: a contender.
        base: what it is compared with.
        count: how many pairs.
        between: runs before each, and is not timed.
    """
    found = []
    for number in range(count):
        times = {}
        for name in ("work", "base") if number % 2 else ("base", "work"):
            between()
            times[name] = _taken(work if name == "work" else base)
        found.append((times["work"], times["base"]))
    return found


def _say(name: str, found: list[tuple[Taken, Taken]], note: str = "") -> None:
    wall = statistics.median(base.wall / work.wall for work, base in found)
    cpu = statistics.median(base.cpu / work.cpu for work, base in found)
    seconds = statistics.median(work.wall for work, _ in found)
    print(f"  {name:42s} {wall:6.1%} {cpu:8.1%} {seconds:9.2f} s  {note}", flush=True)


class _Folder:
    """Places for stores, each removed before the next one is made."""

    def __init__(self, root: Path) -> None:
        self.path = root / "features"

    def clear(self) -> None:
        """Remove what is there."""
        if self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


# -- pooled ---------------------------------------------------------------------------------------


def _pooled(images: int, size: int, batch: int, count: int, folder: _Folder) -> None:
    model = ResNet().eval()
    data = list(torch.split(torch.randn(images, 3, size, size), batch))
    print(f"pooled features of {LAYER} of a ResNet-18, {images:,} images {size}x{size}")
    print(f"  {'throughput against the loop that':42s} {'wall':>6s} {'CPU':>8s}")

    def thrown_away() -> None:
        with capture(model, LAYER, kinds="activation") as maps, torch.no_grad():
            for x in data:
                model(x)
                maps[LAYER].tensor.mean((2, 3))

    def kept() -> None:
        extract(model, data, LAYER, folder.path, pool="mean", progress=False)

    def bare() -> None:
        with torch.no_grad():
            for x in data:
                model(x)

    def hooked() -> None:
        rows: list[np.ndarray[Any, Any]] = []

        def keep(module: nn.Module, given: Any, output: Tensor) -> None:
            rows.append(output.mean((2, 3)).numpy())

        handle = model.get_submodule(LAYER).register_forward_hook(keep)
        bare()
        handle.remove()
        with folder.path.open("wb") as file:
            np.save(file, np.concatenate(rows))

    contenders: dict[str, tuple[Callable[[], object], str]] = {
        "throws them away: extract": (kept, ""),
        "throws them away: a hook, np.save": (hooked, "all in memory until the end"),
        "throws them away: the model alone": (bare, ""),
    }
    made = _torchvision(model, data, folder)
    if made is not None:
        contenders["throws them away: torchvision's, np.save"] = (made, "all in memory")
    for name in ("torchvision", "thingsvision"):
        if reason := _missing(name):
            print(f"  {name} takes no part: {reason}")
    kept()
    for name, (work, note) in contenders.items():
        _say(name, pairs(work, thrown_away, count, folder.clear), note)
    folder.clear()


def _missing(name: str) -> str:
    try:
        if name == "torchvision":
            torchvision_operators.declare()
        importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _torchvision(
    model: nn.Module, data: list[Tensor], folder: _Folder
) -> Callable[[], None] | None:
    if _missing("torchvision"):
        return None
    module: Any = importlib.import_module("torchvision.models.feature_extraction")
    cut = module.create_feature_extractor(model, [LAYER])

    def work() -> None:
        rows = []
        with torch.no_grad():
            for x in data:
                rows.append(cut(x)[LAYER].mean((2, 3)).numpy())
        with folder.path.open("wb") as file:
            np.save(file, np.concatenate(rows))

    return work


# -- full maps -------------------------------------------------------------------------------------


class _Wide(nn.Module):
    """A layer that costs nothing and gives much: what is measured is the way to the disk."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.block = nn.Identity()
        self.register_buffer("map", torch.randn(batch, 64, 56, 56))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.map[: len(x)])  # type: ignore[no-any-return, index]


def _written(block: np.ndarray[Any, Any], path: Path) -> None:
    with path.open("wb") as file:
        block.tofile(file)
        os.fsync(file)


def _full(total_mb: int, count: int, folder: _Folder) -> None:
    batch = 32
    model = _Wide(batch).eval()
    each = batch * 64 * 56 * 56 * 4
    number = max(2, total_mb * 2**20 // each)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.zeros(number * batch, 1)), batch_size=batch
    )
    block = np.random.default_rng(0).random(each // 4, np.float32)
    print(f"full maps of 64x56x56, {number * each / 1e6:,.0f} MB in {number} files, on the disk")

    def kept() -> None:
        extract(model, loader, "block", folder.path, kinds="output", progress=False)

    def raw() -> None:
        folder.path.mkdir()
        for n in range(number):
            _written(block, folder.path / str(n))

    def raw_of_copies() -> None:
        folder.path.mkdir()
        for n in range(number):
            _written(block.copy(), folder.path / str(n))

    def settled() -> None:
        """What was there is gone, the disk is idle, and free memory has been touched.

        A virtual machine gets memory from its host when it is touched first, which takes longer
        than the disk does; what was freed last is given first.
        """
        folder.clear()
        os.sync()
        np.ones(2 * number * each, np.uint8)

    print(f"  {'bandwidth against NumPy, each file synced':42s} {'wall':>6s} {'CPU':>8s}")
    contenders = {
        "extract": kept,
        "NumPy, a copy of the block each time": raw_of_copies,
    }
    gb = number * each / 1e9
    for name, work in contenders.items():
        found = pairs(work, raw, count, settled)
        speed = statistics.median(gb / base.wall for _, base in found)
        low, _, high = statistics.quantiles([base.wall / one.wall for one, base in found])
        used, least = (
            statistics.median(t.cpu for t in side) / gb for side in zip(*found, strict=True)
        )
        note = f"half of the pairs {low:.0%} to {high:.0%}; NumPy {speed:.2f} GB/s; "
        _say(name, found, note + f"CPU {used:.2f} s a GB, NumPy {least:.2f}")
    folder.clear()


# -- memory ----------------------------------------------------------------------------------------


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _memory(batches: int, folder: _Folder) -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU()).eval()
    marks: list[float] = []

    class Endless:
        def __iter__(self) -> Iterator[Tensor]:
            x = torch.randn(64, 64)
            for n in range(batches):
                if n % (batches // 10) == 0:
                    marks.append(_resident())
                yield x

    extract(model, Endless(), "0", folder.path, progress=False)
    marks.append(_resident())
    written = sum(p.stat().st_size for p in folder.path.rglob("*") if p.is_file())
    print(f"memory over {batches:,} batches, {written / 1e6:,.0f} MB written")
    print("  resident, MB: " + " ".join(f"{mark:.0f}" for mark in marks))
    folder.clear()


# -- reading back ----------------------------------------------------------------------------------


def _reading(count: int, folder: _Folder) -> None:
    rows = torch.randn(_ROWS, _WIDE)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(rows), batch_size=4096, collate_fn=_first
    )
    model = nn.Sequential(nn.Identity()).eval()
    extract(model, loader, "0", folder.path, kinds="output", progress=False)
    features = Features(folder.path)
    file = folder.path.parent / "rows.npy"
    np.save(file, rows.numpy())
    mapped = np.load(file, mmap_mode="r")
    order = np.random.default_rng(0)

    def by_numpy() -> None:
        drawn = order.permutation(_ROWS)
        for start in range(0, _ROWS, _BATCH):
            torch.from_numpy(mapped[drawn[start : start + _BATCH]])

    def by_loader() -> None:
        for _ in features.loader("0", _BATCH, buffer=2**16):
            pass

    def by_index() -> None:
        drawn, array = order.permutation(_ROWS), features["0"]
        for start in range(0, _ROWS, _BATCH):
            array[drawn[start : start + _BATCH]]

    print(f"shuffled rows read back, {_ROWS:,} of {_WIDE} float32, in batches of {_BATCH}")
    print(f"  {'throughput against a mapped .npy':42s} {'wall':>6s} {'CPU':>8s}")
    for name, work in {"Features.loader": by_loader, "features[rows]": by_index}.items():
        work()
        _say(name, pairs(work, by_numpy, count))
    file.unlink()
    folder.clear()


def _first(items: list[tuple[Tensor]]) -> Tensor:
    return torch.stack([x for (x,) in items])


def run(
    images: int = 2000,
    size: int = 64,
    batch: int = 32,
    count: int = 5,
    threads: int = 1,
    where: Path | None = None,
    only: str = "",
) -> None:
    """Print the figures.

    Args:
        images: of the pooled features.
        size: of a side of theirs.
        batch: of these.
        count: pairs of each contender; twice as many of what waits for the disk.
        threads: of torch.
        where: on which disk; None for that of temporary files.
        only: pooled, full, memory or rows; "" for all.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    print(", ".join(f"{key}: {value}" for key, value in environment().items()))
    with tempfile.TemporaryDirectory(dir=where) as root:
        folder = _Folder(Path(root))
        if only in ("", "pooled"):
            _pooled(images, size, batch, count, folder)
        if only in ("", "full"):
            _full(1500, 2 * count + 1, folder)
        if only in ("", "memory"):
            _memory(10_000, folder)
        if only in ("", "rows"):
            _reading(count, folder)
