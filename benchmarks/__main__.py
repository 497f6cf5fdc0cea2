"""What capture costs, and whether it is right.

python -m benchmarks [suite] [--seconds S] [--case NAME] [--contender NAME] [--json FILE]
python -m benchmarks real [--training | --compute | --data-dependent] [--models GLOB] [--seconds S]
    [--threads N] [--contender NAME] [--json FILE] [--markdown]
python -m benchmarks growth [--json FILE]
python -m benchmarks taps [--seconds S] [--threads N]
python -m benchmarks render FILE [FILE]
python -m benchmarks overhead [--seconds S] [--case NAME] [--threads N] [--json FILE]
python -m benchmarks compiled [--backend NAME] [--seconds S] [--threads N]
python -m benchmarks zoo [--out FILE] [--model NAME] [--threads N]
python -m benchmarks memory [--device DEVICE]
python -m benchmarks longrun [--steps N] [--figure FILE]
python -m benchmarks editing [--seconds S] [--threads N]
python -m benchmarks statistics [--device DEVICE] [--seconds S] [--threads N] [--no-compile]
python -m benchmarks extractor [--seconds S] [--threads N]
python -m benchmarks keeping [--seconds S] [--threads N]
python -m benchmarks texts [--seconds S] [--threads N]
python -m benchmarks checking [--device DEVICE] [--seconds S] [--threads N]
python -m benchmarks extract [--only PART] [--images N] [--size PX] [--pairs N] [--where FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import (
    checking,
    contenders,
    editing,
    extract,
    extractor,
    growth,
    keeping,
    longrun,
    memory,
    real,
    report,
    statistics,
    suite,
    taps,
    texts,
    zoo,
)
from benchmarks.cases import CASES, chosen


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="What capture costs, and whether it is right. "
        "Without a command, the whole suite runs.",
    )
    commands = top.add_subparsers(dest="command")

    def add(
        name: str, about: str, seconds: float | None = None, threads: int = 2
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        if seconds is not None:
            command.add_argument(
                "--seconds",
                type=float,
                default=seconds,
                metavar="S",
                help=f"for each contender in each case (default: {seconds:g})",
            )
            command.add_argument(
                "--threads",
                type=int,
                default=threads,
                help=f"of torch (default: {threads})",
            )
        return command

    def add_cases(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--case", default="", metavar="NAME", help="only cases whose name contains this"
        )
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")

    def add_contenders(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--contender",
            action="append",
            default=[],
            metavar="NAME",
            help="only contenders whose name contains this; may be given again",
        )

    command = add("suite", "all contenders, peers included, on all cases", 3.0)
    add_cases(command)
    add_contenders(command)
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    about = "beside hooks and peers, on models as their packages build them"
    command = add("real", about, 1.5, threads=1)
    modes = command.add_mutually_exclusive_group()
    for mode, what in real.MODES.items():
        if mode != "inference":
            modes.add_argument(
                f"--{mode}",
                action="store_const",
                dest="mode",
                const=mode,
                default="inference",
                help=what.title,
            )
    command.add_argument(
        "--models", default="*", metavar="GLOB", help="only models whose name fits, e.g. 'timm/*'"
    )
    add_contenders(command)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    command.add_argument(
        "--markdown",
        action="store_true",
        help="write the tables into docs/benchmarks.md and README.md, as `render` does of the JSON",
    )
    command.add_argument("--docs", type=Path, default=report.DOCS, help=argparse.SUPPRESS)
    command = add("growth", "cost against number of sites, batch and steps", 1.0)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    add("taps", "what one site costs, beside a hook that does nothing", 10.0, threads=1)
    command = add("render", "write tables and charts from the JSON of suite, real and growth")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE")
    command.add_argument("--docs", type=Path, default=report.DOCS, help=argparse.SUPPRESS)
    add_cases(add("overhead", "the suite without peers, for a look before and after a change", 5.0))
    command = add("compiled", "the suite's compiled cases", 10.0)
    command.add_argument("--backend", default="inductor", help="of torch.compile")
    command = add("zoo", "is every map right, on real architectures?")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="write the page there, e.g. docs/zoo.md"
    )
    command.add_argument("--model", default="", help="only models whose name contains this")
    command.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    command = add("memory", "bytes at the peak of a training step, counted")
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    command = add("longrun", "is memory flat over thousands of steps?")
    command.add_argument("--steps", type=int, default=5000, help="of training (default: 5000)")
    command.add_argument("--figure", type=Path, metavar="FILE", help="draw the curves there")
    add("editing", "edits, patching and attention, beside hooks by hand", 3.0, threads=1)
    command = add("statistics", "running statistics beside one read of each map", 1.0)
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    command.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    add("extractor", "feature_map beside torchvision's extractor", 5.0, threads=1)
    add("keeping", "compare and save, beside the same by hand", 5.0, threads=1)
    add("texts", "texts with padding, and one token at a time", 5.0, threads=1)
    command = add("checking", "check= beside hooks that look for NaN by hand", 5.0, threads=1)
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    command = add("extract", "features of a data set, beside the loop that throws them away")
    parts = ("pooled", "full", "memory", "rows")
    command.add_argument("--only", default="", choices=parts, help="one part of it")
    command.add_argument("--images", type=int, default=2000, help="(default: 2000)")
    command.add_argument("--size", type=int, default=64, help="of a side (default: 64)")
    command.add_argument("--pairs", type=int, default=5, help="of each contender (default: 5)")
    command.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    command.add_argument("--where", type=Path, metavar="FOLDER", help="on the disk to measure")
    return top


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and run."""
    top = parser()
    given = top.parse_args(arguments)
    if given.command is None:
        given = top.parse_args(["suite"])
    if given.command == "suite":
        suite.run(
            given.seconds,
            chosen(given.case, given.device),
            suite.select(given.contender),
            device=given.device,
            threads=given.threads,
            json_file=given.json,
        )
    elif given.command == "real":
        found = real.run(
            given.seconds,
            given.mode,
            given.models,
            real.cast(given.contender),
            threads=given.threads,
            json_file=given.json,
        )
        if given.markdown:
            report.write(found, given.docs)
    elif given.command == "growth":
        growth.run(given.seconds, given.threads, given.json)
    elif given.command == "taps":
        taps.run(given.seconds, given.threads)
    elif given.command == "render":
        report.render(given.files, given.docs)
    elif given.command == "overhead":
        cases = [c for c in CASES if not c.compiled]
        own = [c for c in contenders.CONTENDERS if c.name in contenders.OWN]
        suite.run(
            given.seconds,
            chosen(given.case, "cpu", cases),
            own,
            threads=given.threads,
            json_file=given.json,
        )
    elif given.command == "compiled":
        suite.run(
            given.seconds,
            [c for c in CASES if c.compiled],
            contenders.CONTENDERS,
            threads=given.threads,
            backend=given.backend,
        )
    elif given.command == "zoo":
        zoo.run(given.out, given.model, given.threads)
    elif given.command == "memory":
        memory.run(given.device)
    elif given.command == "editing":
        editing.run(given.seconds, given.threads)
    elif given.command == "statistics":
        statistics.run(given.device, given.threads, given.seconds, not given.no_compile)
    elif given.command == "extractor":
        extractor.run(given.seconds, given.threads)
    elif given.command == "keeping":
        keeping.run(given.threads, given.seconds)
    elif given.command == "texts":
        texts.run(given.threads, given.seconds)
    elif given.command == "checking":
        checking.run(given.device, given.threads, given.seconds)
    elif given.command == "extract":
        extract.run(
            given.images,
            given.size,
            count=given.pairs,
            threads=given.threads,
            where=given.where,
            only=given.only,
        )
    else:
        longrun.run(given.steps, given.figure)


if __name__ == "__main__":
    main()
