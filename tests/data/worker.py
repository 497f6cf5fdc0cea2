"""One rank of an extraction that torchrun started: `python -m tests.data.worker TO [options]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tests.data.kills import JOBS


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("to", type=Path)
    parser.add_argument("--job", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    JOBS[given.job].run(given.to, 0.0)


if __name__ == "__main__":
    main()
