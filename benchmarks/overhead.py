"""What it costs to hold every (z, a), as a ratio to the bare model.

Shared machines drift, so nothing here compares a time with a time taken later. A contender is
measured in pairs: one pass of it and one of the bare model, back to back, in alternating order; of
the pairs' ratios the median is told. Pairs of the bare model with itself say how far from 1.00 a
figure may be by chance.

Contenders:

- nothing: the bare model again.
- capture: one `with capture(model)` around all passes.
- hooks, references: a hand-written hook on every leaf module that keeps its output. Cheap, and
  wrong wherever the model overwrites what was kept; it sees no functional nonlinearity.
- hooks, clones: the same, keeping clones.
- idle: `capture(model, every=n)`, between two captured passes.
- stop: `capture(model, layers=..., stop=True)` for the first of four parts of the filter layers.
- learning: the first pass in a fresh `capture` of a model never seen before.
- one-shot: entering a fresh `capture`, that pass, and leaving.
"""

from __future__ import annotations

import copy
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fmapkit
from benchmarks.models import GPT, ResNet
from fmapkit import capture

__all__ = ["run"]

WARM_UP = 5  # pairs that do not count
NEVER = 10**9

Pass = Callable[[nn.Module], None]
# Bytes held and bytes copied by the latest pass.
Account = Callable[[], tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """A model and what one pass of it is."""

    name: str
    model: nn.Module
    run: Pass
    trains: bool = False

    def copy(self) -> nn.Module:
        """Another model that does the same.

        Inference shares the weights, so that both models of a pair find them in the same cache.
        """
        if self.trains:
            return copy.deepcopy(self.model)
        shared = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(t): t for t in shared})


@dataclass(frozen=True)
class Result:
    """Figures of one contender in one case; times in seconds, sizes in bytes."""

    case: str
    contender: str
    ratio: float
    ratio_low: float  # lower and upper quartile of the pairs' ratios
    ratio_high: float
    pairs: int
    bare_seconds: float
    bytes_held: int | None = None
    bytes_copied: int | None = None


def cases() -> list[Case]:
    """The cases, smallest passes first."""

    def forward(*inputs: Tensor) -> Pass:
        def run(model: nn.Module) -> None:
            with torch.no_grad():
                model(*inputs)

        return run

    def step(images: Tensor, labels: Tensor) -> Pass:
        optimisers: dict[int, torch.optim.Optimizer] = {}

        def run(model: nn.Module) -> None:
            if id(model) not in optimisers:
                optimisers[id(model)] = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
            optimisers[id(model)].zero_grad()
            F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
            optimisers[id(model)].step()

        return run

    small, large = torch.randn(1, 3, 64, 64), torch.randn(8, 3, 160, 160)
    tokens = torch.randint(1024, (4, 64))
    train_step = step(torch.randn(8, 3, 64, 64), torch.randint(1000, (8,)))
    return [
        Case("resnet18 1x3x64x64", ResNet().eval(), forward(small)),
        Case("resnet18 1x3x64x64, F.relu", ResNet(functional=True).eval(), forward(small)),
        Case("gpt 4x64 tokens", GPT().eval(), forward(tokens)),
        Case("resnet18 training 8x3x64x64", ResNet().train(), train_step, trains=True),
        Case("resnet18 8x3x160x160", ResNet().eval(), forward(large)),
        Case("resnet18 8x3x160x160, F.relu", ResNet(functional=True).eval(), forward(large)),
    ]


@contextmanager
def nothing(model: nn.Module) -> Iterator[Account | None]:
    """The control: no contender at all."""
    yield None


@contextmanager
def captured(model: nn.Module) -> Iterator[Account]:
    """All (z, a), in one block."""
    with capture(model) as maps:
        yield lambda: (maps.nbytes, maps.bytes_copied)


@contextmanager
def idle(model: nn.Module) -> Iterator[Account | None]:
    """The passes of `every=n` that are not captured; the first, which is, is the warm-up's."""
    with capture(model, every=NEVER):
        yield None


@contextmanager
def stopped(model: nn.Module) -> Iterator[Account]:
    """The maps of the first quarter of the layers; the forward ends there."""
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with capture(model, layers[: max(1, len(layers) // 4)], stop=True) as maps:
        yield lambda: (maps.nbytes, maps.bytes_copied)


@contextmanager
def hooked(model: nn.Module, *, clones: bool) -> Iterator[Account]:
    """What one writes by hand: a hook on every leaf module."""
    kept: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            kept[name] = output.detach().clone() if clones else output.detach()

        return keep

    def account() -> tuple[int, int]:
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept.values()}
        held = sum(storages.values())
        return held, held if clones else 0

    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        yield account
    finally:
        for handle in handles:
            handle.remove()


CONTENDERS: dict[str, Callable[[nn.Module], AbstractContextManager[Account | None]]] = {
    "nothing": nothing,
    "capture": captured,
    "hooks, references": lambda model: hooked(model, clones=False),
    "hooks, clones": lambda model: hooked(model, clones=True),
    "idle": idle,
    "stop": stopped,
}


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(case: Case, contender: str, budget: float) -> Result:
    """Pairs of a contender's pass and a bare one, for `budget` seconds and at least ten."""
    bare, model = case.copy(), case.copy()
    with CONTENDERS[contender](model) as account:
        # The contender first: the first pass of `every=n` is a captured one.
        for _ in range(WARM_UP):
            case.run(model)
            case.run(bare)
        times = _pairs(lambda: seconds(lambda: case.run(model)), case, bare, budget)
        held = account() if account is not None else (None, None)
    return _result(case, contender, times, *held)


def measure_first(case: Case, budget: float) -> list[Result]:
    """What learning costs: each pair has a copy of the model that no capture has seen."""
    bare = case.copy()
    whole: list[float] = []

    def learning() -> float:
        model = case.copy()
        case.run(model)  # its own first pass is dear for reasons that are not capture's
        start = time.perf_counter()
        with capture(model):
            learn = seconds(lambda: case.run(model))
        whole.append(time.perf_counter() - start)
        return learn

    times = _pairs(learning, case, bare, budget)
    one_shot = [(w, b) for w, (_, b) in zip(whole, times, strict=True)]
    return [_result(case, "learning", times), _result(case, "one-shot", one_shot)]


def _pairs(
    contender: Callable[[], float], case: Case, bare: nn.Module, budget: float
) -> list[tuple[float, float]]:
    """(contender, bare) times; garbage is collected before, not within."""
    times: list[tuple[float, float]] = []
    case.run(bare)
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        while len(times) < 10 or time.perf_counter() < end:
            if len(times) % 2:
                first = contender()
                times.append((first, seconds(lambda: case.run(bare))))
            else:
                second = seconds(lambda: case.run(bare))
                times.append((contender(), second))
    finally:
        gc.enable()
    return times


def _result(
    case: Case,
    contender: str,
    times: list[tuple[float, float]],
    held: int | None = None,
    copied: int | None = None,
) -> Result:
    low, middle, high = statistics.quantiles([with_ / bare for with_, bare in times], n=4)
    return Result(
        case=case.name,
        contender=contender,
        ratio=round(middle, 4),
        ratio_low=round(low, 4),
        ratio_high=round(high, 4),
        pairs=len(times),
        bare_seconds=round(statistics.median(bare for _, bare in times), 6),
        bytes_held=held,
        bytes_copied=copied,
    )


def run(budget: float, only: str, threads: int, json_file: Path | None) -> None:
    """Measure, print a table, and write it as JSON if asked to.

    Args:
        budget: seconds for each contender in each case.
        only: measure the cases whose name contains this.
        threads: of torch.
        json_file: where to write; None for nowhere.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    chosen = [case for case in cases() if only in case.name]
    if not chosen:
        raise SystemExit(f"no case has {only!r} in its name: {[c.name for c in cases()]}")
    about = environment()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results: list[Result] = []
    for case in chosen:
        bare = None
        for contender in (*CONTENDERS, "learning"):
            if contender == "stop" and case.trains:
                continue  # without an output there is no loss
            new = (
                measure_first(case, budget)
                if contender == "learning"
                else [measure(case, contender, budget)]
            )
            if bare is None:
                bare = new[0].bare_seconds
                print(f"\n{case.name}: a bare pass takes {bare * 1e3:.2f} ms")
                print(f"  {'':18} {'ratio':>6} {'quartiles':>13} {'pairs':>6} {'held':>9} copied")
            for result in new:
                print(_line(result), flush=True)
            results += new
    if json_file is not None:
        rows = [asdict(result) for result in results]
        json_file.write_text(json.dumps({"environment": about, "results": rows}, indent=1) + "\n")
        print(f"\nwritten to {json_file}")


def _line(r: Result) -> str:
    def size(count: int | None) -> str:
        return "-" if count is None else f"{count / 1e6:.2f} MB"

    quartiles = f"{r.ratio_low:.3f}-{r.ratio_high:.3f}"
    return (
        f"  {r.contender:18} {r.ratio:6.3f} {quartiles:>13} {r.pairs:6} "
        f"{size(r.bytes_held):>9} {size(r.bytes_copied)}"
    )


def environment() -> dict[str, str]:
    """Machine, versions and commit that the figures belong to."""
    return {
        "machine": _processor(),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "fmapkit": fmapkit.__version__,
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("+changes" if _git("status", "--porcelain") else ""),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x{len(names)}" if names else platform.processor() or "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
