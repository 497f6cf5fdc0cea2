"""Many ranks, one store: forks that speak over gloo, and two ranks of torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("zarr", minversion="3.1.4")

from fmapkit import DistributedError, analysis
from fmapkit.data import Features, extract
from tests.data import kills
from tests.data.kills import (
    BATCH,
    JOBS,
    SAMPLES,
    UNIT,
    Job,
    check,
    expected,
    fork,
    forked,
    model,
)

ROOT = Path(__file__).parent.parent
UNITS = -(-SAMPLES // (BATCH * UNIT))

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)


def _port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def ranks(size: int, work: Callable[[int], object]) -> list[int]:
    """Run work as so many ranks, with what torchrun would set; returns how each ended."""
    port = _port()

    def one(rank: int) -> None:
        setting = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in setting.items()})
        os.environ["MASTER_ADDR"] = "localhost"
        work(rank)

    pids = [fork(partial(one, rank)) for rank in range(size)]
    return [os.waitpid(pid, 0)[1] for pid in pids]


def _checked(job: Job, to: Path, complete: bool) -> int:
    return (forked(lambda: os._exit(100 + check(job, to, expected(job), complete))) >> 8) - 100


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_the_store_is_that_of_a_single_process(job: Job, tmp_path: Path) -> None:
    """Nine units, of which the last is not full, for two ranks."""
    to = tmp_path / "f"
    assert ranks(2, lambda rank: job.run(to, 0.0)) == [0, 0]
    assert _checked(job, to, complete=True) == UNITS or "tokens" in job.name


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
@pytest.mark.parametrize("then", [1, 3])
def test_a_rank_that_dies_and_another_number_of_ranks(job: Job, then: int, tmp_path: Path) -> None:
    to = tmp_path / "f"

    slept: list[float] = []

    def sleep(seconds: float) -> None:
        """It dies in its seventh batch of thirteen, however slow the machine is."""
        slept.append(seconds)
        if sum(slept) > 0.35:
            os.kill(os.getpid(), signal.SIGKILL)

    def work(rank: int) -> None:
        if rank == 1:
            kills.time = SimpleNamespace(sleep=sleep)  # type: ignore[assignment]
        job.run(to, 0.05 if rank == 1 else 0.0)  # seconds a batch

    ended = ranks(2, work)
    assert ended[1] == signal.SIGKILL
    # The other one has done its share, and then noticed.
    assert ended[0] != 0
    there = _checked(job, to, complete=False)
    assert there >= UNITS // 2
    assert ranks(then, lambda rank: job.run(to, 0.0)) == [0] * then
    assert _checked(job, to, complete=True) >= UNITS - 1
    assert forked(lambda: _check_statistics(job, to)) == 0


def _check_statistics(job: Job, to: Path) -> None:
    """What all ranks and runs have seen, put together, is every row once."""
    stats, rows = job.run(to, 0.0), Features(to)["second"].tensor().double()
    assert stats["second"].count.tolist() == [len(rows)] * 16
    torch.testing.assert_close(stats["second"].mean, rows.mean(0))


@pytest.mark.skipif(not hasattr(analysis, "TopInputs"), reason="there is no TopInputs yet")
def test_top_inputs_go_by_their_numbers_in_the_data_set(tmp_path: Path) -> None:
    """On whatever rank a sample was seen."""
    to, job = tmp_path / "f", JOBS[0]

    def run() -> Any:
        top = analysis.TopInputs(k=3)
        given = (model(), job.loader(0.0), "first.0", to)
        extract(*given, analyses=top, batches_per_commit=UNIT, progress=False)
        return top

    assert ranks(2, lambda rank: run()) == [0, 0]
    rows = Features(to)["first.0"].tensor()
    assert torch.equal(run()["first.0"].inputs, rows.topk(3, dim=0).indices.T)


def test_ranks_that_are_asked_for_different_things_are_refused(tmp_path: Path) -> None:
    to = tmp_path / "f"

    def work(rank: int) -> None:
        job = Job("other", JOBS[0].loader, {"dtype": torch.float16} if rank else {})
        with pytest.raises(DistributedError) as caught:
            job.run(to, 0.0)
        words = "None on rank 0, 'torch.float16'" if rank else "'torch.float16' on rank 1, None"
        assert str(caught.value) == (
            f"ranks {1 - rank} and {rank} were asked for different things: dtype: {words} now"
        )

    assert ranks(2, work) == [0, 0]
    assert not to.exists()


def test_ranks_whose_loaders_give_different_data_are_refused(tmp_path: Path) -> None:
    """A stream that each rank has split already: what the others have would be missing."""
    to = tmp_path / "f"

    def loader(rank: int) -> object:
        return list(JOBS[1].loader(0.0))[rank::2]

    def work(rank: int) -> None:
        Job("split", lambda pause: loader(rank)).run(to, 0.0)

    ended = ranks(2, work)
    assert 0 not in ended


def test_under_torchrun(tmp_path: Path) -> None:
    to = tmp_path / "f"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", "2", "-m", "tests.data.worker", str(to)),
    ]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert _checked(JOBS[0], to, complete=True) == UNITS
