"""Times that can be compared on a machine that drifts, and what machine it was.

Nothing here compares a time with one taken later. A contender's pass and a bare one run back to
back, in alternating order: a pair. All contenders of a case take turns in one run. A turn is 0.1 s
of pairs after one that does not count, or one long pair; the contender that has had least time so
far is next, so that a slow one has few pairs, spread over the whole run. Of the pairs' ratios the
median is told, with its quartiles.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fmapkit

__all__ = [
    *("LEAST_PAIRS", "Figures", "Timed", "environment", "interleave", "load", "package"),
    *("reason", "seconds"),
]

WARM_UP = 3  # pairs that do not count
TURN = 0.1  # seconds of pairs in a row
LEAST_PAIRS = 5
_GARBAGE = 10_000  # young objects between two pairs that are worth a collection


@dataclass(frozen=True)
class Timed:
    """What takes turns: `run` is timed, `bare` beside it; `before` and `after` `run` is not."""

    run: Callable[[], object]
    bare: Callable[[], object]
    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None


@dataclass(frozen=True)
class Figures:
    """Of a contender's pairs; times in seconds.

    Attributes:
        ratio: median of contender to bare.
        low: lower quartile.
        high: upper quartile.
        pairs: how many there were.
        bare: median time of the bare pass.
        extra: median of what the contender took more than the bare pass.
    """

    ratio: float
    low: float
    high: float
    pairs: int
    bare: float
    extra: float

    @staticmethod
    def of(pairs: list[tuple[float, float]]) -> Figures:
        """From (contender, bare) times of at least two pairs."""
        low, middle, high = statistics.quantiles([with_ / bare for with_, bare in pairs], n=4)
        return Figures(
            ratio=round(middle, 4),
            low=round(low, 4),
            high=round(high, 4),
            pairs=len(pairs),
            bare=statistics.median(bare for _, bare in pairs),
            extra=statistics.median(with_ - bare for with_, bare in pairs),
        )


def seconds(function: Callable[[], object], device: str = "cpu") -> float:
    """How long a call takes, the device's share of it included."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleave(
    timed: Mapping[str, Timed],
    budget: float,
    device: str = "cpu",
    *,
    warm_up: int = WARM_UP,
    least: int = LEAST_PAIRS,
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, str]]:
    """Let all take turns until each has had `budget` seconds, pairs included.

    Args:
        timed: by name.
        budget: seconds for each.
        device: where the passes run.
        warm_up: pairs of each that do not count.
        least: pairs that each has, whatever time they take.

    Returns:
        The (contender, bare) times of each, and the errors of those that failed on the way.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
    spent = dict.fromkeys(timed, 0.0)
    failed: dict[str, str] = {}

    def alone(one: Timed) -> float:
        if one.before is not None:
            one.before()
        try:
            return seconds(one.run, device)
        finally:
            if one.after is not None:
                one.after()

    def pair(name: str, first: bool) -> tuple[float, float]:
        one = timed[name]
        if first:
            with_ = alone(one)
            return with_, seconds(one.bare, device)
        bare = seconds(one.bare, device)
        return alone(one), bare

    def attempt(name: str, first: bool) -> tuple[float, float] | None:
        start = time.perf_counter()
        try:
            return pair(name, first)
        except Exception as error:
            failed[name] = reason(error)
            del spent[name]
            return None
        finally:
            if name in spent:
                spent[name] += time.perf_counter() - start

    # The contender first: the first pass of `every=n` is a captured one.
    for name in list(spent):
        for _ in range(warm_up):
            if attempt(name, first=True) is None:
                break
    spent = dict.fromkeys(spent, 0.0)
    with _between_pairs() as collect:
        while spent:
            name = min(spent, key=spent.__getitem__)
            begin = spent[name]
            if begin >= budget and len(times[name]) >= least:
                del spent[name]
                continue
            # The bare model has just run; a contender's objects have not, while all others had
            # their turns. In a short pass that tells, so the first pair of a turn does not count.
            done = attempt(name, first=len(times[name]) % 2 == 1)
            end = spent.get(name, begin) + TURN
            if done is not None and end - begin > 2 * TURN:
                times[name].append(done)
                collect()
                continue
            while spent.get(name, end) < end:
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
