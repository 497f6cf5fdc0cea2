"""What capture costs, and whether it is right.

python -m benchmarks overhead [--seconds S] [--case NAME] [--threads N] [--json FILE]
python -m benchmarks zoo [--out FILE] [--model NAME] [--threads N]
python -m benchmarks memory [--device DEVICE]
python -m benchmarks compiled [--backend NAME] [--seconds S] [--threads N]
python -m benchmarks longrun [--steps N] [--figure FILE]
python -m benchmarks statistics [--device DEVICE] [--seconds S] [--threads N] [--no-compile]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import compiled, longrun, memory, overhead, statistics, zoo


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="What capture costs, and whether it is right."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("overhead", help="time, bytes held and bytes copied, by case")
    command.add_argument(
        "--seconds", type=float, default=5.0, help="for each contender in each case (default: 5)"
    )
    command.add_argument("--case", default="", help="only cases whose name contains this")
    command.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    command = commands.add_parser("zoo", help="is every map right, on real architectures?")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="write the page there, e.g. docs/zoo.md"
    )
    command.add_argument("--model", default="", help="only models whose name contains this")
    command.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    command = commands.add_parser("memory", help="bytes at the peak of a training step, counted")
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    command = commands.add_parser("compiled", help="time, beside a bare compiled model")
    command.add_argument("--backend", default="inductor", help="of torch.compile")
    command.add_argument("--seconds", type=float, default=10.0, help="for each model")
    command.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    command = commands.add_parser("longrun", help="is memory flat over thousands of steps?")
    command.add_argument("--steps", type=int, default=5000, help="of training (default: 5000)")
    command.add_argument("--figure", type=Path, metavar="FILE", help="draw the curves there")
    command = commands.add_parser("statistics", help="beside one read of each map")
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    command.add_argument("--seconds", type=float, default=1.0, help="for each figure (default: 1)")
    command.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    command.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    given = parser.parse_args()
    if given.command == "zoo":
        zoo.run(given.out, given.model, given.threads)
    elif given.command == "memory":
        memory.run(given.device)
    elif given.command == "compiled":
        compiled.run(given.backend, given.seconds, given.threads)
    elif given.command == "longrun":
        longrun.run(given.steps, given.figure)
    elif given.command == "statistics":
        statistics.run(given.device, given.threads, given.seconds, not given.no_compile)
    else:
        overhead.run(given.seconds, given.case, given.threads, given.json)


if __name__ == "__main__":
    main()
