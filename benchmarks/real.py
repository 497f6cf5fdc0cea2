"""What capture costs on real models: `python -m benchmarks real`.

The models of `real_models.py`, measured as the cases of the suite are, in one of four modes. One
thread; what counts is CPU time, which other processes on the machine do not change. A summary over
all models says what a contender costs on most of them and on the worst, and of how many runs of a
nonlinearity both z and a were right.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks import suite
from benchmarks.cases import Case
from benchmarks.contenders import CONTROL, Contender
from benchmarks.real_models import BRANCHING, COMPUTE, MODELS, PACKAGES, RealModel

__all__ = ["KINDS", "MODES", "Mode", "Summary", "cases", "cast", "run", "summary"]

CAST = (
    *(CONTROL, "fmapkit", "a block each", "fmapkit, compiled", "learning", "hooks, references"),
    *("hooks, clones", "hooks on σ, clones", "closures, least", "captum", "nnsight"),
)


@dataclass(frozen=True)
class Mode:
    """What the models are, and what a pass of them is.

    Attributes:
        title: in words.
        models: in this order.
        batch: images or texts in a pass.
        trains: a pass is a training step of SGD with momentum.
    """

    title: str
    models: Sequence[RealModel]
    batch: int = 1
    trains: bool = False


MODES = {
    "inference": Mode("no gradients, one small image or text", MODELS),
    "training": Mode("a training step, eight small images or texts", MODELS, 8, True),
    "compute": Mode("no gradients, eight images of 160 pixels", COMPUTE, 8),
    "data-dependent": Mode("no gradients, with and without branches on data", BRANCHING),
}


# Of the JSON, and the names of the markers in the page.
KINDS = {mode: "real" if mode == "inference" else f"real-{mode}" for mode in MODES}


def cases(mode: Mode, pattern: str = "*") -> list[Case]:
    """Of the models whose name, or its part after the package, fits a glob.

    Raises:
        SystemExit: there are none.
    """
    fitting = [
        model
        for model in mode.models
        if any(fnmatchcase(name, pattern) for name in (model.name, model.name.partition("/")[2]))
    ]
    if not fitting:
        raise SystemExit(f"no model fits {pattern!r}: {[model.name for model in mode.models]}")
    return [
        Case(
            model.name,
            model.build,
            partial(model.inputs, mode.batch),
            _loss if mode.trains else None,
            package=model.package,
        )
        for model in fitting
    ]


def _loss(output: Any) -> Tensor:
    """That all that a model returns is one; zero would leave weights alone that begin as zero."""
    floats = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    total: Tensor = sum((t - 1).square().mean() for t in floats)  # type: ignore[assignment]
    return total


def cast(names: Sequence[str] = ()) -> list[Contender]:
    """The contenders, the control among them, of which a name contains one of these."""
    return [c for c in suite.select(names) if names or c.name in CAST]


def run(
    budget: float,
    mode: str = "inference",
    pattern: str = "*",
    contenders: Sequence[Contender] = (),
    *,
    threads: int = 1,
    json_file: Path | None = None,
) -> dict[str, Any]:
    """Measure, print a table for each model and a summary, and write all as JSON if asked to.

    Args:
        budget: seconds for each contender on each model.
        mode: one of `MODES`.
        pattern: a glob of models' names.
        contenders: in this order, the control first; none for the usual ones.
        threads: of torch.
        json_file: where to write, anew after each model; None for nowhere.

    Raises:
        SystemExit: no model fits.
    """
    result = suite.run(
        budget,
        cases(MODES[mode], pattern),
        contenders or cast(),
        kind=KINDS[mode],
        packages=("captum", "nnsight", *PACKAGES),
        count=False,
        threads=threads,
        json_file=json_file,
    )
    print(f"\n{MODES[mode].title}: ratios to the bare model, over all models")
    print(f"  {'':18} {'models':>6} {'CPU':>7} {'quartiles':>15} {'worst':>7} {'wall':>7}  right")
    for row in summary(result):
        print(
            f"  {row.contender:18} {row.models:6} {row.cpu:7.3f} "
            f"{f'{row.low:.3f}-{row.high:.3f}':>15} {row.worst:7.3f} {row.wall:7.3f}  "
            f"{row.verdict}; worst: {row.worst_model}"
        )
    return result


@dataclass(frozen=True)
class Summary:
    """A contender over all models that it ran on; ratios to the bare model.

    Attributes:
        contender: its name.
        models: how many.
        cpu: median over the models of the median CPU time.
        low: lower quartile of these.
        high: upper quartile.
        worst: the highest.
        worst_model: whose it is.
        wall: median over the models of the median time by the wall clock.
        right: runs of a nonlinearity of which both z and a were right; None if it hands out none.
        runs: of how many.
        first: median of the seconds that its first pass took.
    """

    contender: str
    models: int
    cpu: float
    low: float
    high: float
    worst: float
    worst_model: str
    wall: float
    right: int | None
    runs: int
    first: float

    @property
    def verdict(self) -> str:
        """How many were right, in words."""
        return "–" if self.right is None else f"{self.right:,} of {self.runs:,}"


def summary(result: dict[str, Any]) -> list[Summary]:
    """Of the JSON: a row for each contender that ran on some model, in their order."""
    rows: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for case in result["cases"]:
        for row in case.get("rows", ()):
            if "error" not in row:
                rows.setdefault(row["contender"], []).append((case, row))
    return [_summed(name, those) for name, those in rows.items()]


def _summed(name: str, those: list[tuple[dict[str, Any], dict[str, Any]]]) -> Summary:
    ratios = [row["cpu"] for _, row in those]
    low, middle, high = _quartiles(ratios)
    worst, model = max((row["cpu"], case["case"]) for case, row in those)
    judged = [row["both"] for _, row in those if row.get("both") is not None]
    return Summary(
        contender=name,
        models=len(those),
        cpu=middle,
        low=low,
        high=high,
        worst=worst,
        worst_model=model,
        wall=statistics.median(row["ratio"] for _, row in those),
        right=sum(judged) if judged else None,
        runs=sum(case["sites"] for case, _ in those),
        first=statistics.median(row["first_seconds"] for _, row in those),
    )


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
