"""What many programs came to, and files of those that fail."""

from __future__ import annotations

import pathlib
from collections import Counter
from dataclasses import dataclass, field

from tests.fuzz.check import Report
from tests.fuzz.failures import Failure
from tests.fuzz.programs import Program
from tests.fuzz.shrink import shrink

__all__ = ["Totals", "saved"]


@dataclass
class Totals:
    """Sums over programs."""

    programs: int = 0
    invalid: Counter[str] = field(default_factory=Counter)
    passes: int = 0
    sites: int = 0
    named: int = 0
    named_later: int = 0
    vague: int = 0
    departing: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    drawn: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        """How many programs failed."""
        return sum(self.failures.values())

    @staticmethod
    def kind(failure: Failure) -> str:
        """What a failure is counted by."""
        return f"{failure.kind}{', traced' if failure.traced else ''}"

    def add(self, program: Program, report: Report) -> None:
        """Count one program."""
        self.programs += 1
        self.passes += report.passes
        self.sites += report.sites
        self.named += report.named
        self.named_later += report.named_later
        self.vague += report.vague
        self.departing += report.departing
        if report.invalid:
            self.invalid[report.invalid.splitlines()[0][:80]] += 1
        else:
            self.drawn += program.drawn
        if report.failure is not None:
            self.failures[self.kind(report.failure)] += 1

    def __str__(self) -> str:
        share = 100 / max(self.sites, 1)
        lines = [
            f"{self.programs} programs, {sum(self.invalid.values())} of them cannot run bare",
            f"{self.passes} passes, {self.departing} of them along another way than the one before",
            f"{self.sites} sites; {self.named} named and without maps "
            f"({self.named * share:.2f}%; {self.named_later} of them after a block's first pass), "
            f"{self.vague} without one true label ({self.vague * share:.2f}%)",
            f"{self.failed} failed",
            *(f"  {count} {kind}" for kind, count in self.failures.most_common()),
        ]
        return "\n".join(lines)


def saved(program: Program, report: Report, folder: pathlib.Path, seconds: float) -> pathlib.Path:
    """Shrink a failing program and write it to a file; its path."""
    small, found = shrink(program, report, seconds)
    folder.mkdir(parents=True, exist_ok=True)
    assert found.failure is not None
    kind = "".join(c if c.isalnum() else "_" for c in Totals.kind(found.failure))
    path = folder / f"{kind}_{program.seed}.py"
    lines = [f"# seed {program.seed}, options {program.options if small.options else {}}"]
    lines += [f"# {p}" for p in small.passes]
    lines += [f"# {line}" for line in str(found.failure).splitlines()]
    footer = _FOOTER.format(
        options=small.options, family=small.family, passes=",\n    ".join(map(repr, small.passes))
    )
    path.write_text("\n".join(lines) + "\n\n" + small.texts()[1] + footer, encoding="utf-8")
    return path


# Makes a saved program one that can be run by itself: it prints the maps of each pass.
_FOOTER = """

if __name__ == "__main__":
    from fmapkit import capture
    from tests.fuzz.check import input_of
    from tests.fuzz.programs import PassPlan
    from tests.truth import seed

    passes = [
    {passes}
    ]
    modes = dict(grad=torch.enable_grad, no_grad=torch.no_grad, inference=torch.inference_mode)
    seed(0)
    model = build()
    with capture(model, **{options!r}) as maps:
        for plan in passes:
            prepare(model, plan.k)
            model.train(plan.train)
            seed(plan.seed)
            kwargs = dict() if plan.flag is None else dict(flag=plan.flag)
            with modes[plan.grad]():
                try:
                    model(input_of({family!r}, plan), **kwargs)
                except Odd as error:
                    print("raised", repr(error))
            print(plan)
            for fm in maps.select(step=-1):
                print("  ", fm.layer, fm.call, fm.kind, fm.nonlinearity, fm.filters, fm.filter_dim)
    print(*maps.missed, sep="\\n")
"""
