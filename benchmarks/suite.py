"""All contenders on each case, in one interleaved run: time, bytes, and whose maps are right.

First each contender is alone with the model. Bytes are counted there (below autograd on a CPU, by
the allocator on CUDA), and what it hands out after a pass is judged against the truth. Then all of
them are open at once and take turns beside the bare model, timed (see `measure.py`).

`python -m benchmarks real` runs other cases in the same way (see `real.py`).
"""

from __future__ import annotations

import gc
import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.cases import Bench, Case
from benchmarks.contenders import CONTENDERS, CONTROL, Contender, Opened
from benchmarks.measure import Figures, Timed, environment, interleave, load, reason, seconds
from benchmarks.memory import counted
from benchmarks.verdict import Site, judge, sites

__all__ = ["measure", "run", "select"]

Row = dict[str, Any]


def select(names: Sequence[str]) -> list[Contender]:
    """The control, and the contenders of which a name contains one of these; all if there is none.

    Raises:
        SystemExit: a name fits none.
    """
    for name in names:
        if not any(name in c.name for c in CONTENDERS):
            known = [c.name for c in CONTENDERS]
            raise SystemExit(f"no contender has {name!r} in its name: {known}")
    return [
        c for c in CONTENDERS if not names or c.name == CONTROL or any(n in c.name for n in names)
    ]


def run(
    budget: float,
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    *,
    kind: str = "suite",
    packages: Sequence[str] = peers.PACKAGES,
    count: bool = True,
    device: str = "cpu",
    threads: int = 2,
    json_file: Path | None = None,
    backend: str = "inductor",
) -> dict[str, Any]:
    """Measure, print a table for each case, and write all as JSON if asked to.

    Args:
        budget: seconds for each contender in each case.
        cases: in this order.
        contenders: in this order; the control has to be among them.
        kind: of the JSON.
        packages: whose versions are told.
        count: bytes too.
        device: "cpu" or "cuda".
        threads: of torch.
        json_file: where to write, anew after each case; None for nowhere.
        backend: of torch.compile, for compiled cases.

    Raises:
        SystemExit: there is no CUDA device.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is there")
    torch.set_num_threads(threads)
    about = environment(device) | peers.versions(packages)
    about["load at the start"] = load()
    about["seconds per contender"] = f"{budget:g}"
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    notes = {c.name: c.note for c in contenders}
    result: dict[str, Any] = {"kind": kind, "environment": about, "notes": notes, "cases": []}
    began = time.perf_counter()
    for case in cases:
        with torch._dynamo.config.patch(recompile_limit=64):  # one for each copy of a model
            found = measure(case, contenders, budget, device, backend, count=count)
        torch._dynamo.reset()
        result["cases"].append(found)
        _print(found)
        about["took"] = f"{time.perf_counter() - began:.0f} s"
        if json_file is not None:
            json_file.write_text(json.dumps(result, indent=1) + "\n")
        gc.collect()
    print(f"\n{about['took']}" + ("" if json_file is None else f", written to {json_file}"))
    return result


def measure(
    case: Case,
    contenders: Sequence[Contender],
    budget: float,
    device: str = "cpu",
    backend: str = "inductor",
    *,
    count: bool = True,
) -> dict[str, Any]:
    """One case, as it stands in the JSON; with an "error" if the bare model cannot be run."""
    if why := peers.missing(case.package):
        return {"case": case.name, "error": f"{case.package} {why}"}
    try:
        bench = Bench(case, device, backend)
        bench.run(bench.model)  # the optimizer's state is there before anybody counts
        truth = sites(bench)
    except Exception as error:
        return {"case": case.name, "error": reason(error)}
    rows: dict[str, Row] = {}
    for contender in contenders:
        why = peers.missing(contender.package) or contender.unfit(case)
        rows[contender.name] = {"error": why} if why else _attempt(bench, contender, truth, count)
    open_to = [c for c in contenders if "error" not in rows[c.name]]
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        bare = bench.ready(bench.copy())
        timed: dict[str, Timed] = {}
        for contender in open_to:
            opened = stack.enter_context(contender.open(bench))
            timed[contender.name] = _timed(bench, contender, opened, bare)
        times, failed = interleave(timed, budget, device)
    for name, why in failed.items():
        rows[name] = {"error": why}
    for name, pairs in times.items():
        rows[name] |= vars(Figures.of(pairs))
    return {
        "case": case.name,
        "device": device,
        "training": case.trains,
        "compiled": case.compiled,
        "sites": len(truth),
        "bare_seconds": rows[CONTROL].get("bare"),
        "bare_cpu_seconds": rows[CONTROL].get("bare_cpu"),
        "rows": [{"contender": name, **row} for name, row in rows.items()],
    }


def _timed(bench: Bench, contender: Contender, opened: Opened, bare: Any) -> Timed:
    def run() -> None:
        with opened.around():
            bench.run(opened.call)

    def plain() -> None:
        bench.run(bare)

    def repeated(once: Callable[[], None]) -> Callable[[], None]:
        def several() -> None:
            for _ in range(contender.passes):
                once()

        return several

    if contender.passes == 1:
        return Timed(run, plain, opened.before, opened.after, opened.awake)
    several, bare_several = repeated(run), repeated(plain)
    return Timed(several, bare_several, opened.before, opened.after, opened.awake)


def _attempt(bench: Bench, contender: Contender, truth: Sequence[Site], count: bool) -> Row:
    """What can be said of a contender alone with the model; its error if it has one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about the model, and the verdict says more
        try:
            return _alone(bench, contender, truth, count)
        except Exception as error:
            return {"error": reason(error)}


def _alone(bench: Bench, contender: Contender, truth: Sequence[Site], count: bool) -> Row:
    row: Row = {}
    with contender.open(bench) as opened, opened.awake():

        def once(run: Callable[[Any], None]) -> None:
            if opened.before is not None:
                opened.before()
            try:
                with opened.around():
                    run(opened.call)
            finally:
                if opened.after is not None:
                    opened.after()

        if contender.passes == 1:
            row["first_seconds"] = seconds(lambda: once(bench.rehearse), bench.device)
        settling = 2 if contender.passes == 1 else contender.passes
        judged = opened.read is not None or contender.name == CONTROL
        # A graph that inductor made calls nothing that could be counted from Python.
        compiled = bench.case.compiled and bench.device == "cpu"
        if count and judged and contender.counted and not compiled:
            bytes_ = counted(lambda: once(bench.run), bench.state, settling, bench.device)
            row |= {"peak_bytes": bytes_.peak, "copied_bytes": bytes_.copied}
        else:
            for _ in range(settling + 1):
                once(bench.run)
        for _ in range(contender.passes):  # so that the last one is a captured one
            once(bench.rehearse)
        if opened.read is not None:
            handed = opened.read()
            row["held_bytes"] = handed.nbytes
            exact = bench.device == "cpu" and not bench.case.compiled
            verdicts = judge(truth, handed, exact=exact)
            if exact and contender.own_kernels and any(v and v.wrong for v in verdicts.values()):
                exact = False
                verdicts = judge(truth, handed, exact=exact)
            row["exact"] = exact
            for kind, verdict in verdicts.items():
                row[kind] = None if verdict is None else verdict.as_dict()
            z, a = verdicts["z"], verdicts["a"]
            row["both"] = None if z is None or a is None else len(z.runs & a.runs)
    return row


def _print(found: dict[str, Any]) -> None:
    if "error" in found:
        print(f"\n{found['case']}: {found['error']}", flush=True)
        return
    bare = found["bare_seconds"]
    print(
        f"\n{found['case']} ({found['device']}): a bare pass takes {1e3 * bare:.2f} ms "
        f"({1e3 * found['bare_cpu_seconds']:.2f} of the CPU), {found['sites']} sites"
    )
    control = found["rows"][0]
    counted = "peak_bytes" in control
    heads = [f"{'CPU':>7} {'quartiles':>15} {'wall':>7} {'quartiles':>15} {'pairs':>6}"]
    heads += [f"{head:>8}" for head in ("held", "peak", "copied") if counted]
    print(f"  {'':18} {' '.join(heads)}  z, a: right/wrong/not seen; both right")
    for row in found["rows"]:
        name = f"  {row['contender']:18}"
        if "error" in row:
            print(f"{name} {row['error']}")
            continue
        cells = [f"{row['cpu']:7.3f} {_span(row['cpu_low'], row['cpu_high']):>15}"]
        cells += [f"{row['ratio']:7.3f} {_span(row['low'], row['high']):>15} {row['pairs']:6}"]
        if counted:
            sizes = [
                _megabytes(row.get("held_bytes")),
                _megabytes(above(row, control, "peak_bytes"), "+"),
                _megabytes(above(row, control, "copied_bytes")),
            ]
            cells += [f"{size:>8}" for size in sizes]
        verdicts = [counts(row[kind]) for kind in ("z", "a") if kind in row]
        verdicts.append(both(row))
        print(f"{name} {' '.join(cells)}  {'  '.join(verdicts)}", flush=True)


def _span(low: float, high: float) -> str:
    return f"{low:.3f}-{high:.3f}"


def above(row: Row, control: Row, key: str) -> int | None:
    """Bytes more than the bare pass."""
    mine, bare = row.get(key), control.get(key)
    return None if mine is None or bare is None else mine - bare


def counts(verdict: dict[str, int] | None) -> str:
    """A verdict in three numbers."""
    if verdict is None:
        return "not asked"
    return f"{verdict['right']}/{verdict['wrong']}/{verdict['unseen']}"


def both(row: Row) -> str:
    """Of how many runs z and a were right; with a mark where not each bit was."""
    return "" if row.get("both") is None else f"{'' if row['exact'] else '≈'}{row['both']}"


def _megabytes(count: int | None, sign: str = "") -> str:
    return "-" if count is None else f"{count / 1e6:{sign}.2f}"
