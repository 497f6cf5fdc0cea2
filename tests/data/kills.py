"""Extractions that are killed at random moments, and what is left of them.

    python -m tests.data.kills --kills 100

Each process is a fork of this one, so that a kill takes no time to prepare. It is killed at a
random moment, the store is read by another process, and the same call is made again, until the
data set is complete; then a new store is begun, until there were enough kills.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import zarr.codecs  # noqa: F401  (imported once, not in each fork)
from torch import Tensor, nn

from fmapkit import StoreError
from fmapkit.analysis import Statistics
from fmapkit.data import Features, RowLoader, extract  # noqa: F401

SAMPLES, BATCH, UNIT = 203, 8, 3
_AT_MOST = 12  # kills of one store, so that there are several


class Net(nn.Module):
    """Two layers of images, or of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 32), nn.ReLU(inplace=True))
        self.second = nn.Linear(32, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.tanh(self.second(self.first(x)))


def model() -> Net:
    """The same one each time."""
    torch.manual_seed(0)
    return Net().eval()


class Slow:
    """A loader that takes its time, of images or of tokens; batches of tokens differ in size."""

    def __init__(self, tokens: bool, pause: float) -> None:
        self.tokens = tokens
        self.pause = pause

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        drawn = torch.Generator().manual_seed(1)
        start = 0
        while start < SAMPLES:
            size = min(BATCH + (start % 3 if self.tokens else 0), SAMPLES - start)
            length = 4 + start % 5
            shape = (size, length, 6) if self.tokens else (size, 6)
            batch = {"x": torch.randn(shape, generator=drawn)}
            batch["label"] = torch.arange(start, start + size)
            if self.tokens:
                batch["mask"] = torch.rand((size, length), generator=drawn) < 0.7
            time.sleep(self.pause)
            yield batch
            start += size


class Images(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The same images, by index: such a loader makes one Zarr array of each layer."""

    def __init__(self, pause: float) -> None:
        self.x = torch.cat([batch["x"] for batch in Slow(False, 0)])
        self.pause = pause

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        time.sleep(self.pause / BATCH)
        return {"x": self.x[index], "label": torch.tensor(index)}


@dataclass(frozen=True)
class Job:
    """One call of `extract`."""

    name: str
    loader: Callable[[float], Any]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, to: Path, pause: float) -> Statistics:
        """Make it; returns the analysis that rode along."""
        stats = Statistics()
        extract(
            model(),
            self.loader(pause),
            ["first.0", "second"],
            to,
            keep="label",
            analyses=stats,
            batches_per_commit=UNIT,
            progress=False,
            **self.options,
        )
        return stats


JOBS = [
    Job("an array a layer", lambda p: torch.utils.data.DataLoader(Images(p), batch_size=BATCH)),
    Job("a stream of images", lambda p: Slow(False, p)),
    Job("a stream of tokens", lambda p: Slow(True, p), {"mask": "mask"}),
]


def expected(job: Job) -> dict[str, list[Tensor]]:
    """By hand: rows of each unit, from the layers themselves."""
    net = model()
    found: dict[str, list[list[Tensor]]] = {"first.0": [], "second": [], "label": []}
    with torch.no_grad():
        for number, batch in enumerate(job.loader(0.0)):
            h = net.first(batch["x"])
            rows = {"first.0": h, "second": torch.tanh(net.second(h)), "label": batch["label"]}
            for name, values in rows.items():
                if number % UNIT == 0:
                    found[name].append([])
                if "mask" in job.options and name != "label":
                    values = values[batch["mask"]]
                found[name][-1].append(values)
    return {name: [torch.cat(parts) for parts in units] for name, units in found.items()}


def check(job: Job, to: Path, whole: dict[str, list[Tensor]], complete: bool) -> int:
    """That all of a store is right; returns the number of its units, -1 where nothing is begun."""
    try:
        features = Features(to)
    except StoreError:
        assert not complete
        return -1
    labels = whole["label"]
    starts = torch.tensor([0, *map(len, labels)]).cumsum(0).tolist()
    there = set(features.samples.tolist())
    units = [u for u in range(len(labels)) if starts[u] in there]
    # Whole units only, each sample once, in order.
    samples = [torch.arange(starts[u], starts[u + 1]) for u in units]
    assert torch.equal(features.samples, torch.cat(samples) if samples else torch.arange(0))
    assert features.complete or not complete
    assert not features.complete or units == list(range(len(labels)))
    arrays = {name: features[name] for name in ("first.0", "second")}
    for name, array in {**arrays, "label": features.fields["label"]}.items():
        rows = [whole[name][u] for u in units]
        assert torch.equal(array[:], torch.cat(rows) if rows else array[:0]), name
    return len(units)


def fork(work: Callable[[], object]) -> int:
    """Do work in a fork of this process; returns its id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def forked(work: Callable[[], object], kill_after: float | None = None) -> int:
    """The same, and maybe kill it; returns how it ended."""
    pid = fork(work)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def same_statistics(job: Job, to: Path, plain: Statistics) -> None:
    """What rode along has seen each sample once, in order: the same bits as without a kill."""
    stats = job.run(to, 0.0)  # all is there: this reads the state
    for layer, kind in (("first.0", "activation"), ("second", "activation")):
        for name in ("count", "mean", "variance", "minimum", "maximum"):
            assert torch.equal(getattr(stats[layer, kind], name), getattr(plain[layer, kind], name))


def torture(kills: int, seed: int, folder: Path, pause: float = 0.004) -> list[str]:
    """Kill so many processes; returns a line for each store that came to be complete."""
    drawn = random.Random(seed)
    moments = [drawn.uniform(0.0, 0.8) for _ in range(kills)]  # in runs that nobody kills
    told: list[str] = []
    while moments:
        job = JOBS[len(told) % len(JOBS)]
        told.append(_one(job, folder / f"{len(told)}.zarr", moments, pause))
    return told


def _one(job: Job, to: Path, moments: list[float], pause: float) -> str:
    """Make one store, killed at these moments; those that it takes are taken out."""
    whole, plain = expected(job), to.with_suffix(".plain")
    began = time.perf_counter()
    assert forked(lambda: job.run(plain, pause)) == 0
    took = time.perf_counter() - began
    units, survived = [], False
    while not survived:
        moment = moments.pop() if moments and len(units) < _AT_MOST else None
        ended = forked(lambda: job.run(to, pause), None if moment is None else moment * took)
        survived = ended == 0
        if survived and moment is not None:
            moments.append(moment)
        assert survived or (moment is not None and ended == signal.SIGKILL), ended
        at = forked(partial(_answer, job, to, whole, survived)) >> 8
        assert at >= 99, f"the store is wrong after units {units}"
        units.append(at - 100)
    assert forked(lambda: same_statistics(job, to, job.run(plain, 0.0))) == 0
    return f"{job.name}: complete after {len(units) - 1} kills, units {units}"


def _answer(job: Job, to: Path, whole: dict[str, list[Tensor]], complete: bool) -> None:
    """The number of units, as the status of the process."""
    os._exit(100 + check(job, to, whole, complete))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for line in torture(given.kills, given.seed, Path(folder)):
            print(line)


if __name__ == "__main__":
    main()
