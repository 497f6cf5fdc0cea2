"""Programs that nobody has run before: `tests/fuzz` writes some anew for each run of the suite.

`FMAPKIT_FUZZ_SEED=random` draws the seed, and prints it; without it, the programs are the same each
time. To run others: `FMAPKIT_FUZZ_SEED=<seed>`; more of them: `FMAPKIT_FUZZ_PROGRAMS=<number>`, or
`python -m tests.fuzz`.
"""

from __future__ import annotations

import os
import pathlib
import random
from collections.abc import Iterator

import pytest

from tests.fuzz.check import check
from tests.fuzz.programs import write
from tests.fuzz.runs import Totals, saved

PROGRAMS = int(os.environ.get("FMAPKIT_FUZZ_PROGRAMS", "150"))
_GIVEN = os.environ.get("FMAPKIT_FUZZ_SEED", "70000")
SEED = random.SystemRandom().randrange(10**9) if _GIVEN == "random" else int(_GIVEN)


@pytest.fixture
def environment() -> Iterator[None]:
    """Some programs decide by environment variables; none is left behind."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("blocks", [False, True], ids=["one block", "a block each"])
def test_fresh_programs(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], blocks: bool
) -> None:
    totals, failing = Totals(), []
    programs = PROGRAMS // 3 if blocks else PROGRAMS
    with capsys.disabled():
        print(f"\nFMAPKIT_FUZZ_SEED={SEED} ({programs} programs)")
    for seed in range(SEED, SEED + programs):
        program = write(seed).in_blocks() if blocks else write(seed)
        report = check(program)
        totals.add(program, report)
        if report.failure is not None:
            failing.append(f"seed {seed}: {report.failure}")
            if len(failing) == 1:  # in full, and as small as a quarter of a minute makes it
                path = saved(program, report, tmp_path, seconds=15)
                failing.append(path.read_text(encoding="utf-8"))
    with capsys.disabled():
        print(totals)
    if failing:
        pytest.fail(f"FMAPKIT_FUZZ_SEED={SEED}\n" + "\n\n".join(failing), pytrace=False)
    # Most programs run, and what they do is known.
    assert sum(totals.invalid.values()) < 0.1 * programs + 3
    assert totals.sites > 10 * programs
    assert totals.vague < 0.1 * totals.sites
