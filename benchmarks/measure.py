"""Times that can be compared on a machine that drifts, and what machine it was.

Nothing here compares a time with one taken later. Some passes of a contender and some of the bare
model run back to back, in alternating order: a pair. The first pass of each half finds the caches
full of what ran before, and does not count if there is time for more, 20 ms; of these the mean
counts. So a contender's figure is that of its passes in a row, and so is the bare model's, beside
which nothing of any contender is set: a block that is open rests then (see `resting`). All
contenders of a case take turns in one run: next is one of those that have had least time so far,
drawn by lot, so that a slow one has few pairs, spread over the whole run, and none follows the same
neighbour each time. Of the pairs' ratios the median is told, with its quartiles: of wall-clock
time, and of CPU time, which does not count what other processes take.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fmapkit
from fmapkit import FeatureMaps

__all__ = [
    *("LEAST_PAIRS", "Figures", "Pair", "Taken", "Timed", "environment", "interleave", "load"),
    *("package", "reason", "resting", "seconds", "taken"),
]

WARM_UP = 2  # pairs that do not count
BLOCK = 0.02  # seconds of passes in a row, in each half of a pair
AHEAD = 0.1  # seconds that one contender may have had more than another
LEAST_PAIRS = 5
_GARBAGE = 10_000  # young objects between two pairs that are worth a collection


@dataclass(frozen=True)
class Timed:
    """What takes turns.

    Attributes:
        run: is timed.
        bare: is timed beside it.
        before: comes before each `run`, not timed.
        after: comes after each, not timed.
        awake: entered around some of `run` in a row, not timed.
    """

    run: Callable[[], object]
    bare: Callable[[], object]
    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None
    awake: Callable[[], AbstractContextManager[Any]] = nullcontext


def resting(opened: object) -> Callable[[], AbstractContextManager[Any]]:
    """Have the open block of a capture set nothing, but within what is returned.

    The bare model shares its classes with the captured one. Their functions run other code as long
    as that is captured, which is a few percent slower, for the bare model, too.
    """
    if not isinstance(opened, FeatureMaps):
        return nullcontext
    session: Any = opened._session
    rest = session.rest()

    @contextmanager
    def awake() -> Iterator[None]:
        nonlocal rest
        session.wake(rest)
        try:
            yield
        finally:
            rest = session.rest()

    return awake


@dataclass(frozen=True)
class Taken:
    """What one call took, in seconds.

    Attributes:
        wall: from its beginning to its end.
        cpu: of the CPU: of this thread, or of the whole process where torch has more threads.
    """

    wall: float
    cpu: float


Pair = tuple[Taken, Taken]  # of a contender, and of the bare model beside it


@dataclass(frozen=True)
class Figures:
    """Of a contender's pairs; times in seconds, by the wall clock if nothing else is said.

    Attributes:
        ratio: median of contender to bare.
        low: lower quartile.
        high: upper quartile.
        cpu: median of contender to bare, in CPU time.
        cpu_low: lower quartile.
        cpu_high: upper quartile.
        pairs: how many there were.
        bare: median time of the bare pass.
        bare_cpu: median CPU time of the bare pass.
        extra: median of what the contender took more than the bare pass.
    """

    ratio: float
    low: float
    high: float
    cpu: float
    cpu_low: float
    cpu_high: float
    pairs: int
    bare: float
    bare_cpu: float
    extra: float

    @staticmethod
    def of(pairs: Sequence[Pair]) -> Figures:
        """Of two pairs or more."""
        low, middle, high = _quartiles([with_.wall / bare.wall for with_, bare in pairs])
        # Some systems' clock of CPU time stands still for the length of a short pass.
        cpus = [with_.cpu / bare.cpu if bare.cpu else math.nan for with_, bare in pairs]
        cpu_low, cpu, cpu_high = _quartiles(cpus)
        return Figures(
            ratio=middle,
            low=low,
            high=high,
            cpu=cpu,
            cpu_low=cpu_low,
            cpu_high=cpu_high,
            pairs=len(pairs),
            bare=statistics.median(bare.wall for _, bare in pairs),
            bare_cpu=statistics.median(bare.cpu for _, bare in pairs),
            extra=statistics.median(with_.wall - bare.wall for with_, bare in pairs),
        )


def _quartiles(ratios: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in statistics.quantiles(ratios, n=4)]


def taken(function: Callable[[], object], device: str = "cpu") -> Taken:
    """What a call takes, the device's share of it included."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.process_time
    if device != "cpu":
        torch.cuda.synchronize()
    start, cpu = time.perf_counter(), clock()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    cpu = clock() - cpu
    return Taken(time.perf_counter() - start, cpu)


def seconds(function: Callable[[], object], device: str = "cpu") -> float:
    """How long a call takes by the wall clock, the device's share of it included."""
    return taken(function, device).wall


def interleave(
    timed: Mapping[str, Timed],
    budget: float,
    device: str = "cpu",
    *,
    warm_up: int = WARM_UP,
    least: int = LEAST_PAIRS,
    block: float | None = None,
) -> tuple[dict[str, list[Pair]], dict[str, str]]:
    """Let all take turns until each has had `budget` seconds.

    Args:
        timed: by name.
        budget: seconds for each, bare passes included.
        device: where the passes run.
        warm_up: pairs of each that do not count.
        least: pairs that each has, whatever time they take.
        block: seconds of passes in a row, in each half of a pair; None for `BLOCK`, 0 for one
            pass, which counts.

    Returns:
        The pairs of each, and the errors of those that failed on the way.
    """
    block = BLOCK if block is None else block
    lot = random.Random(0)  # its own: what the models draw stays as it is
    times: dict[str, list[Pair]] = {name: [] for name in timed}
    spent = dict.fromkeys(timed, 0.0)
    failed: dict[str, str] = {}

    def once(one: Timed) -> Taken:
        if one.before is not None:
            one.before()
        try:
            return taken(one.run, device)
        finally:
            if one.after is not None:
                one.after()

    def several(run: Callable[[], Taken]) -> Taken:
        first = run()
        those = [run() for _ in range(int(block / first.wall))] or [first]
        wall, cpu = (statistics.fmean(times) for times in zip(*map(astuple, those), strict=True))
        return Taken(wall, cpu)

    def awake(one: Timed) -> Taken:
        with one.awake():
            return several(lambda: once(one))

    def pair(one: Timed, first: bool) -> Pair:
        if first:
            with_ = awake(one)
            return with_, several(lambda: taken(one.bare, device))
        bare = several(lambda: taken(one.bare, device))
        return awake(one), bare

    def attempt(name: str, first: bool) -> Pair | None:
        start = time.perf_counter()
        try:
            done = pair(timed[name], first)
        except Exception as error:
            failed[name] = reason(error)
            del spent[name]
            return None
        spent[name] += time.perf_counter() - start
        return done

    # The contender first: the first pass of `every=n` is a captured one.
    for name in list(spent):
        for _ in range(warm_up):
            if attempt(name, first=True) is None:
                break
    spent = dict.fromkeys(spent, 0.0)
    with _between_pairs() as collect:
        while spent:
            behind = min(spent.values()) + AHEAD
            name = lot.choice([n for n, seconds_ in spent.items() if seconds_ <= behind])
            if spent[name] >= budget and len(times[name]) >= least:
                del spent[name]
                continue
            done = attempt(name, first=len(times[name]) % 2 == 1)
            if done is not None:
                times[name].append(done)
            collect()
    return {name: pairs for name, pairs in times.items() if name not in failed}, failed


@contextmanager
def _between_pairs() -> Iterator[Callable[[], None]]:
    """Garbage is collected between pairs, never within; what lived before is set aside."""

    def collect() -> None:
        if gc.get_count()[0] > _GARBAGE:
            gc.collect()

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.enable()
        gc.unfreeze()


def reason(error: BaseException) -> str:
    """An error in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160]


def package(name: str) -> str:
    """Its version, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def environment(device: str = "cpu") -> dict[str, str]:
    """Machine, versions and commit that the figures belong to."""
    about = {
        "machine": _processor(),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "fmapkit": fmapkit.__version__,
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("+changes" if _git("status", "--porcelain") else ""),
    }
    if device != "cpu":
        about["device"] = torch.cuda.get_device_name()
        about["cuda"] = str(torch.version.cuda)
    return about


def load() -> str:
    """How many processes wanted a core in the last minute, this one included."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


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
