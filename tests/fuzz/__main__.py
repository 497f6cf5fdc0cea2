"""`python -m tests.fuzz --programs 1000 --seed 7 --out failing/`"""

from __future__ import annotations

import argparse
import pathlib
import random
import sys
import time
from collections import Counter

import torch

from tests.fuzz.check import check
from tests.fuzz.programs import write
from tests.fuzz.runs import Totals, saved


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--seed", type=int, help="of the first program; drawn if not given")
    parser.add_argument("--seconds", type=float, help="stop after so many")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("fuzz-failing"))
    parser.add_argument("--shrink", type=float, default=20.0, help="seconds for each failure")
    parser.add_argument("--per-kind", type=int, default=10, help="failures kept of each kind")
    parser.add_argument("--blocks", action="store_true", help="each pass in a block of its own")
    parser.add_argument("--show", type=int, help="print the program of this seed, and stop")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.show is not None:
        print(write(asked.show).texts()[1])
        return 0
    first = asked.seed if asked.seed is not None else random.SystemRandom().randrange(10**9)
    print(f"seeds {first} to {first + asked.programs - 1}", flush=True)
    totals, begun, kept = Totals(), time.monotonic(), Counter[str]()
    for number in range(first, first + asked.programs):
        if asked.seconds is not None and time.monotonic() - begun > asked.seconds:
            break
        program = write(number).in_blocks() if asked.blocks else write(number)
        report = check(program)
        totals.add(program, report)
        if report.failure is not None:
            kind = totals.kind(report.failure)
            kept[kind] += 1
            if kept[kind] <= asked.per_kind:
                path = saved(program, report, asked.out, asked.shrink)
                print(f"seed {number}: {str(report.failure).splitlines()[0][:200]}\n  {path}")
        done = totals.programs
        if done % 100 == 0:
            print(f"{done} programs, {totals.failed} failed, {time.monotonic() - begun:.0f} s")
        sys.stdout.flush()
    print(totals)
    return 1 if totals.failed else 0


if __name__ == "__main__":
    sys.exit(main())
