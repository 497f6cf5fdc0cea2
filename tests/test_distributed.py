"""Several ranks: real processes over gloo, started by torchrun; see `tests/distributed`.

A suite is started once, and each of its cases is a test of its own here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

ROOT = Path(__file__).parent.parent
RANKS = 2
# For a whole suite, in seconds; a collective that waits in vain fails long before.
LIMIT = 120

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)


@cache
def _outcomes(suite: str) -> tuple[list[dict[str, str]], str]:
    """What each rank notes of each case, and what was printed."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(RANKS), "-m", "tests.distributed.worker", suite),
    ]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*command, folder],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that the ranks can be ended with it
        )
        try:
            printed, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed = process.communicate()[0] + f"\nended after {LIMIT} s"
        notes = [Path(folder) / f"{rank}.json" for rank in range(RANKS)]
        return [json.loads(n.read_text()) if n.exists() else {} for n in notes], printed


def _cases(*suites: str) -> list[tuple[str, str]]:
    found = []
    for suite in suites:
        cases = import_module(f"tests.distributed.{suite}").CASES
        found += [(suite, case.__name__) for case in cases]
    return found


@pytest.mark.parametrize(("suite", "case"), _cases("ddp"))
def test_on_two_ranks(suite: str, case: str) -> None:
    outcomes, printed = _outcomes(suite)
    said = [o.get(case, "did not get that far") for o in outcomes]
    wrong = [f"rank {n}: {text}" for n, text in enumerate(said) if text != "ok"]
    assert not wrong, "\n".join([*wrong, *([] if any(outcomes) else [printed])])
