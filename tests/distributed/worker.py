"""One rank of a suite: `torchrun --nproc-per-node 2 -m tests.distributed.worker SUITE FOLDER`.

With names of cases after that, only these run.

Runs the suite's cases in order and notes each outcome in `FOLDER/<rank>.json`. The first failure
ends it: the ranks are out of step from there on.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# A collective that not every rank reaches fails after this long, rather than never.
TIMEOUT = timedelta(seconds=20)


def main(suite: str, folder: str, *only: str) -> int:
    faulthandler.dump_traceback_later(80)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*FSDP.*")
    dist.init_process_group("gloo", timeout=TIMEOUT)
    cases = importlib.import_module(f"tests.distributed.{suite}").CASES
    outcomes: dict[str, str] = {}
    note = Path(folder) / f"{dist.get_rank()}.json"
    for case in cases:
        if only and case.__name__ not in only:
            continue
        try:
            case()
            dist.barrier()
            outcomes[case.__name__] = "ok"
        except BaseException:
            outcomes[case.__name__] = traceback.format_exc()
        note.write_text(json.dumps(outcomes))
        if outcomes[case.__name__] != "ok":
            # Not by way of destructors, which may wait for the other rank.
            os._exit(1)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
