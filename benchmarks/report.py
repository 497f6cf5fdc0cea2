"""Tables and charts from the JSON of `suite`, `real` and `growth`: `python -m benchmarks render`.

The page in docs/ is written by hand but for what stands between markers, `<!-- begin NAME -->` and
`<!-- end NAME -->`. That is written anew; in README.md too, the summary of real models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import charts, real
from benchmarks.suite import above, both, counts

__all__ = ["DOCS", "render", "write"]

DOCS = Path(__file__).parent.parent / "docs"
PAGE = "benchmarks.md"
# Columns of the summary.
MAIN = (
    *("nothing", "fmapkit", "hooks, references", "hooks, clones", "hooks on σ, clones"),
    *("captum", "nnsight", "torchlens", "torchvision"),
)


def render(files: Sequence[Path], docs: Path = DOCS) -> None:
    """Write the generated parts of the page, and the charts beside it.

    Args:
        files: JSON of `suite`, of `real` and of `growth`.
        docs: the folder of the page.

    Raises:
        SystemExit: a file is of neither kind, or the page lacks a marker.
    """
    for file in files:
        given = json.loads(file.read_text())
        kind = given.get("kind")
        if kind not in ("suite", "growth", *real.KINDS.values()):
            known = "`suite`, `real` or `growth`"
            raise SystemExit(f"{file} is no JSON of {known}: its kind is {kind!r}")
        write(given, docs)


def write(given: dict[str, Any], docs: Path = DOCS) -> None:
    """Write what one JSON says.

    Args:
        given: the JSON, as `suite`, `real` and `growth` return it too.
        docs: the folder of the page; what is said of real models goes into the README beside that
            folder too, if it has the marker.

    Raises:
        SystemExit: the page lacks a marker.
    """
    kind, page, readme = given["kind"], docs / PAGE, docs.parent / "README.md"
    if kind in real.KINDS.values():
        page.write_text(replaced(page.read_text(), kind, "\n".join(_real(given))))
        print(f"{kind}: written to {page}")
        if readme.exists() and f"<!-- begin {kind} -->" in readme.read_text():
            text = "\n".join(_over_all(given))
            readme.write_text(replaced(readme.read_text(), kind, text))
            print(f"{kind}: written to {readme}")
        return
    if kind == "suite":
        given = given | {"cases": [case for case in given["cases"] if "error" not in case]}
    text = "\n".join(_suite(given) if kind == "suite" else _growth(given))
    page.write_text(replaced(page.read_text(), kind, text))
    (docs / "images").mkdir(exist_ok=True)
    chart = docs / "images" / f"benchmarks-{kind}.png"
    (charts.suite if kind == "suite" else charts.growth)(given, chart)
    print(f"{kind}: written to {page} and {chart}")


def replaced(page: str, name: str, text: str) -> str:
    """The page with another text between the markers of a name.

    Raises:
        SystemExit: they are not there.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, found, rest = page.partition(begin)
    _, also, after = rest.partition(end)
    if not (found and also):
        raise SystemExit(f"the page has no {begin} and {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def _suite(given: dict[str, Any]) -> list[str]:
    cases = given["cases"]
    names = [n for n in MAIN if any(n == r["contender"] for c in cases for r in c["rows"])]
    lines = [_environment(given), ""]
    lines += ["Time of a pass as a ratio to the bare one; in brackets, how many z were right.", ""]
    summary = [_summary(case, names) for case in cases]
    lines += _table(("case", "bare", "sites", *names), summary)
    lines += ["", "![The same as a chart](images/benchmarks-suite.png)", ""]
    for case in cases:
        lines += _case(case)
    lines += ["### Who they are", ""]
    lines += _table(
        ("contender", "what is taken, and what is within a timed pass"), given["notes"].items()
    )
    return lines


def _summary(case: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    rows = {row["contender"]: row for row in case["rows"]}

    def cell(name: str) -> str:
        row = rows.get(name, {"error": ""})
        if "error" in row:
            return "–"
        right = f" ({row['z']['right']})" if row.get("z") else ""
        return f"{row['ratio']:.2f}{right}"

    return (_name(case), _milliseconds(case), str(case["sites"]), *map(cell, names))


def _case(case: dict[str, Any]) -> list[str]:
    control = case["rows"][0]
    heads = ("contender", "time", "quartiles", "pairs", "held", "peak", "copied", "z", "a")
    measured = [row for row in case["rows"] if "error" not in row]
    lines = [
        f"### {_name(case)}",
        "",
        f"A bare pass takes {_milliseconds(case)}; {case['sites']} sites.",
        "",
        *_table(heads, (_cells(row, control) for row in measured)),
        "",
    ]
    absent: dict[str, list[str]] = {}
    for row in case["rows"]:
        if "error" in row:
            absent.setdefault(row["error"], []).append(f"`{row['contender']}`")
    if absent:
        reasons = (f"{', '.join(names)} ({why})" for why, names in absent.items())
        lines += [f"Not here: {'; '.join(reasons)}.", ""]
    return lines


def _cells(row: dict[str, Any], control: dict[str, Any]) -> tuple[str, ...]:
    verdicts = (counts(row[kind]) if kind in row else "–" for kind in ("z", "a"))
    return (
        row["contender"],
        f"{row['ratio']:.3f}",
        f"{row['low']:.3f}–{row['high']:.3f}",
        str(row["pairs"]),
        _megabytes(row.get("held_bytes")),
        _megabytes(above(row, control, "peak_bytes"), "+"),
        _megabytes(above(row, control, "copied_bytes")),
        *verdicts,
    )


def _real(given: dict[str, Any]) -> list[str]:
    measured = [case for case in given["cases"] if "error" not in case]
    names = list(dict.fromkeys(r["contender"] for case in measured for r in case["rows"]))
    ran = [n for n in names if any(n == row.contender for row in real.summary(given))]
    lines = [_environment(given), "", *_over_all(given), ""]
    lines += [
        "Model by model, CPU time: of the bare pass, and as ratios to it, of fmapkit with the "
        "quartiles; in brackets, of how many runs both z and a were right.",
        "",
    ]
    heads = ("model", "bare", "runs", *ran)
    lines += _table(heads, (_model(case, ran) for case in measured))
    absent = [f"{case['case']} ({case['error']})" for case in given["cases"] if "error" in case]
    if absent:
        lines += ["", f"Not here: {'; '.join(absent)}."]
    return lines


def _over_all(given: dict[str, Any]) -> list[str]:
    """The summary of real models, contender by contender."""
    heads = ("contender", "models", "CPU time", "quartiles", "worst", "wall", "z and a right")
    rows = (
        (
            row.contender,
            str(row.models),
            f"{row.cpu:.2f}",
            f"{row.low:.2f}–{row.high:.2f}",
            f"{row.worst:.2f} ({row.worst_model})",
            f"{row.wall:.2f}",
            row.verdict,
        )
        for row in real.summary(given)
    )
    return _table(heads, rows)


def _model(case: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    rows = {row["contender"]: row for row in case["rows"]}

    def cell(name: str) -> str:
        row = rows.get(name, {"error": ""})
        if "error" in row:
            return "–"
        right = f" ({both(row)})" if both(row) else ""
        quartiles = f", {row['cpu_low']:.2f}–{row['cpu_high']:.2f}" if name == "fmapkit" else ""
        return f"{row['cpu']:.2f}{quartiles}{right}"

    bare = f"{1e3 * case['bare_cpu_seconds']:.2f} ms"
    return (_name(case), bare, str(case["sites"]), *map(cell, names))


def _growth(given: dict[str, Any]) -> list[str]:
    fits = given["fits"]
    per_site, held = fits["sites, seconds more"], fits["sites, bytes held"]
    per_image, held_image = fits["batch, seconds more"], fits["batch, bytes held"]
    ratio, alive = fits["steps, ratio"], given["steps"]["alive"]
    steps = given["steps"]["windows"][-1]["step"]
    bytes_ = sorted({a["bytes"] for a in alive})
    flat = f"{bytes_[0]:,}" if len(bytes_) == 1 else f"{bytes_[0]:,} to {bytes_[-1]:,}"
    lines = [
        _environment(given),
        "",
        "![Time and bytes against sites, batch and steps](images/benchmarks-growth.png)",
        "",
        *_table(
            ("against", "what", "growth", "exponent", "R²"),
            [
                _fitted("sites", "time more", f"{1e6 * per_site['slope']:.2f} µs a site", per_site),
                _fitted("sites", "held", f"{held['slope']:,.0f} B a site", held),
                _fitted(
                    "batch", "time more", f"{1e6 * per_image['slope']:.1f} µs an image", per_image
                ),
                _fitted("batch", "held", f"{held_image['slope']:,.0f} B an image", held_image),
                (
                    "steps",
                    "time, ratio",
                    f"{1000 * ratio['slope']:+.4f} in 1,000 steps, of {steps:,}",
                    "",
                    "",
                ),
                (
                    "steps",
                    "bytes alive",
                    f"{flat}, after step {alive[0]['step']} to {alive[-1]['step']}",
                    "",
                    "",
                ),
            ],
        ),
        "",
        "An exponent is the slope of the logarithms over the upper half of the sizes: 1 is linear.",
        "",
    ]
    for name, key in (("sites", "sites"), ("batch", "batch")):
        heads = (name, "bare", "fmapkit", "more", "held", "hooks, clones", "more")
        lines += [*_table(heads, map(_size, given[key])), ""]
    windows = given["steps"]["windows"]
    lines += [
        f"Ratio in each tenth of {steps:,} training steps: "
        + ", ".join(f"{w['ratio']:.3f}" for w in windows)
        + "."
    ]
    return lines


def _fitted(against: str, what: str, growth: str, fit: dict[str, float]) -> tuple[str, ...]:
    return (against, what, growth, f"{fit['exponent']:.2f}", f"{fit['r2']:.3f}")


def _size(row: dict[str, Any]) -> tuple[str, ...]:
    mine, clones = row["contenders"]["fmapkit"], row["contenders"]["hooks, clones"]
    return (
        f"{row['size']:,}",
        f"{1e3 * row['bare_seconds']:.3f} ms",
        f"{mine['ratio']:.2f}",
        f"{1e6 * mine['extra']:,.0f} µs",
        f"{mine['held_bytes']:,} B",
        f"{clones['ratio']:.2f}",
        f"{1e6 * clones['extra']:,.0f} µs",
    )


def _environment(given: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in given["environment"].items()) + "."


def _name(case: dict[str, Any]) -> str:
    return str(case["case"]) + ("" if case["device"] == "cpu" else f", {case['device']}")


def _milliseconds(case: dict[str, Any]) -> str:
    return f"{1e3 * case['bare_seconds']:.2f} ms"


def _megabytes(count: int | None, sign: str = "") -> str:
    return "–" if count is None else f"{count / 1e6:{sign}.2f} MB"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    align = ["---", *["--:"] * (len(heads) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, align, *rows)]
