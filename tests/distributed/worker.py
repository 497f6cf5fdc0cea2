"""One rank: `torchrun --nproc-per-node 2 -m tests.distributed.worker FOLDER SUITE...`.

Runs the suites' cases in order (`SUITE.CASE` means that one only) and notes each outcome in
`FOLDER/<rank>.json`. The first failure ends it: the ranks are out of step from there on.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# A collective that not every rank reaches fails after this long, rather than never.
TIMEOUT = timedelta(seconds=20)


def main(folder: str, *suites: str) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gpus = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
    if gpus:
        torch.cuda.set_device(dist.get_rank())
    outcomes: dict[str, str] = {}
    note = Path(folder) / f"{dist.get_rank()}.json"
    for wanted in suites:
        suite, _, only = wanted.partition(".")
        for case in importlib.import_module(f"tests.distributed.{suite}").CASES:
            if only and case.__name__ != only:
                continue
            name = f"{suite}.{case.__name__}"
            # Where a rank hangs: should it wait for something else than a collective.
            faulthandler.dump_traceback_later(3 * TIMEOUT.total_seconds(), exit=True)
            try:
                case()
                dist.barrier()
                outcomes[name] = "ok"
            except BaseException:
                outcomes[name] = traceback.format_exc()
            note.write_text(json.dumps(outcomes))
            if outcomes[name] != "ok":
                # Not by way of destructors, which may wait for the other rank.
                os._exit(1)
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
