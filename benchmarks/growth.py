"""How cost grows: with the number of sites, with the batch, and with the number of steps.

- Sites: a chain of tiny linear layers with in-place ReLUs, of 1 to 1,000 sites. Nothing but
  dispatch; what a site costs is the slope.
- Batch: a small CNN. What is held is in proportion; what a pass takes more has a fixed part, for
  the taps, and one that grows with the memory that is held.
- Steps: thousands of training steps in one block, each beside a bare one. Ratio and bytes alive
  have to stay as they are.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import suite
from benchmarks.cases import Bench, Case, classify
from benchmarks.contenders import mode
from benchmarks.measure import Figures, Timed, environment, interleave, load
from benchmarks.memory import Live
from benchmarks.models import small_cnn

__all__ = ["fit", "run"]

SITES = (1, 3, 10, 30, 100, 300, 1000)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
STEPS, WINDOWS = 3000, 10
LIVE_AT = (2, 5, 10, 20, 50, 100, 200)
CONTENDERS = ("nothing", "fmapkit", "hooks, clones")


def chain(sites: int) -> nn.Module:
    """So many linear layers of width 8, each with an in-place ReLU."""
    parts = (part for _ in range(sites) for part in (nn.Linear(8, 8), nn.ReLU(inplace=True)))
    return nn.Sequential(*parts)


def _images(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(shape),)


def run(
    budget: float,
    threads: int = 2,
    json_file: Path | None = None,
    *,
    sizes: Sequence[int] = SITES,
    batches: Sequence[int] = BATCHES,
    steps: int = STEPS,
) -> dict[str, Any]:
    """Measure, print, and write as JSON if asked to.

    Args:
        budget: seconds for each contender at each size.
        threads: of torch.
        json_file: where to write; None for nowhere.
        sizes: numbers of sites.
        batches: sizes of the batch.
        steps: of training.
    """
    torch.set_num_threads(threads)
    began = time.perf_counter()
    about = environment() | {"load at the start": load(), "seconds per contender": f"{budget:g}"}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    result: dict[str, Any] = {"kind": "growth", "environment": about}
    result["sites"] = [
        _at(n, Case(f"{n} sites", functools.partial(chain, n), lambda: _images(4, 8)), budget)
        for n in sizes
    ]
    _print("sites", result["sites"])
    result["batch"] = [
        _at(n, Case(f"batch {n}", small_cnn, functools.partial(_images, n, 3, 32, 32)), budget)
        for n in batches
    ]
    _print("batch", result["batch"])
    result["steps"] = _steps(steps)
    for window in result["steps"]["windows"]:
        print(f"  step {window['step']:5}: {window['ratio']:.3f}")
    alive = result["steps"]["alive"]
    print("  bytes alive after step: " + ", ".join(f"{a['step']}: {a['bytes']:,}" for a in alive))
    result["fits"] = _fits(result)
    for name, found in result["fits"].items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
    about["took"] = f"{time.perf_counter() - began:.0f} s"
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {json_file}")
    return result


def _at(size: int, case: Case, budget: float) -> dict[str, Any]:
    """One size: what the contenders take more than a bare pass, and what they hold."""
    those = [c for c in suite.select(()) if c.name in CONTENDERS]
    found = suite.measure(case, those, budget)
    rows = {
        row["contender"]: {key: row.get(key) for key in ("ratio", "extra", "held_bytes", "pairs")}
        for row in found["rows"]
    }
    return {"size": size, "bare_seconds": found["bare_seconds"], "contenders": rows}


def _steps(steps: int) -> dict[str, Any]:
    """Pairs of a captured training step and a bare one, all in one block, in windows."""
    case = Case("steps", small_cnn, lambda: _images(4, 3, 32, 32), classify)
    bench = Bench(case)
    windows: list[dict[str, float]] = []
    done = 0
    with mode()(bench) as opened:
        bare = bench.copy()

        def step() -> None:
            nonlocal done
            bench.run(opened.call)
            done += 1

        timed = {"fmapkit": Timed(step, lambda: bench.run(bare))}
        while done < steps:
            times, failed = interleave(timed, 0.0, least=max(2, steps // WINDOWS), block=0.0)
            if failed:
                raise SystemExit(f"a step failed: {failed['fmapkit']}")
            windows.append({"step": done, "ratio": Figures.of(times["fmapkit"]).ratio})
    return {"windows": windows, "alive": _alive(bench)}


def _alive(bench: Bench) -> list[dict[str, int]]:
    """Bytes alive after some of the steps, counted below autograd: maps, weights and gradients."""
    live = Live()
    live.see(bench.state)
    found = []
    with mode()(bench) as opened, live:
        for n in range(1, LIVE_AT[-1] + 1):
            bench.run(opened.call)
            if n in LIVE_AT:
                found.append({"step": n, "bytes": live.bytes})
    return found


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """A straight line by least squares.

    Args:
        x: sizes.
        y: as many figures.

    Returns:
        Slope, intercept, their share of the variance (`r2`), and the `exponent`: slope of the
        logarithms over the upper half of the sizes, 1 for a straight line; NaN where some figure is
        not positive.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    slope, intercept = np.polyfit(xs, ys, 1)
    left = ys - (slope * xs + intercept)
    spread = float(((ys - ys.mean()) ** 2).sum())
    r2 = 1.0 - float((left**2).sum()) / spread if spread else 1.0
    upper = slice(len(xs) // 2, None)
    exponent = float("nan")
    if (xs[upper] > 0).all() and (ys[upper] > 0).all() and len(xs[upper]) > 1:
        exponent = float(np.polyfit(np.log(xs[upper]), np.log(ys[upper]), 1)[0])
    return {"slope": float(slope), "intercept": float(intercept), "r2": r2, "exponent": exponent}


def _fits(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    def of(rows: list[dict[str, Any]], key: str) -> dict[str, float]:
        return fit([r["size"] for r in rows], [r["contenders"]["fmapkit"][key] for r in rows])

    windows, alive = result["steps"]["windows"], result["steps"]["alive"]
    return {
        "sites, seconds more": of(result["sites"], "extra"),
        "sites, bytes held": of(result["sites"], "held_bytes"),
        "batch, seconds more": of(result["batch"], "extra"),
        "batch, bytes held": of(result["batch"], "held_bytes"),
        "steps, ratio": fit([w["step"] for w in windows], [w["ratio"] for w in windows]),
        "steps, bytes alive": fit([a["step"] for a in alive], [a["bytes"] for a in alive]),
    }


def _print(name: str, rows: list[dict[str, Any]]) -> None:
    print(f"{name:>6} {'bare':>10}  fmapkit: ratio, more, held; clones: ratio, more")
    for row in rows:
        mine, clones = row["contenders"]["fmapkit"], row["contenders"]["hooks, clones"]
        print(
            f"{row['size']:6} {1e3 * row['bare_seconds']:7.3f} ms  {mine['ratio']:6.3f} "
            f"{1e6 * mine['extra']:9.1f} µs {mine['held_bytes']:11,} B; "
            f"{clones['ratio']:6.3f} {1e6 * clones['extra']:9.1f} µs",
            flush=True,
        )
