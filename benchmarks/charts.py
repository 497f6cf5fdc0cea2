"""The charts beside the tables (matplotlib, extra `bench`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["growth", "suite"]

# In the order of the legend; the control is a grey line's width.
_COLORS = {
    "fmapkit": "#0072b2",
    "hooks, references": "#999999",
    "hooks, clones": "#e69f00",
    "hooks on σ, clones": "#b8a100",
    "captum": "#009e73",
    "nnsight": "#cc79a7",
    "torchlens": "#d55e00",
    "torchvision": "#56b4e9",
}
_EDGE = 2.2  # what costs more is told in words at this edge


def suite(given: dict[str, Any], to: Path) -> None:
    """Time of a pass beside the bare one, by case; filled where every z was right.

    Args:
        given: the JSON of `suite`.
        to: the PNG to write.
    """
    pyplot = _pyplot()
    cases = given["cases"]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.62 * len(cases)))
    drawn: set[str] = set()
    for at, case in enumerate(cases):
        rows = {row["contender"]: row for row in case["rows"] if "error" not in row}
        control = rows["nothing"]
        axes.fill_betweenx([at - 0.42, at + 0.42], control["low"], control["high"], color="0.92")
        names = [name for name in _COLORS if name in rows]
        beyond = 0
        for k, name in enumerate(names):
            row, color = rows[name], _COLORS[name]
            y = at - 0.3 + 0.6 * k / max(len(names) - 1, 1)
            right = row["z"] is not None and row["z"]["right"] == case["sites"]
            label = None if name in drawn else name
            drawn.add(name)
            ratio = min(row["ratio"], _EDGE)
            if row["ratio"] <= _EDGE:
                ends = [row["low"], min(row["high"], _EDGE)]
                axes.plot(ends, [y, y], color=color, linewidth=1)
            else:
                place = (6 + 26 * beyond, 0)  # side by side
                beyond += 1
                axes.annotate(
                    f"{row['ratio']:.1f}", (_EDGE, y), place, textcoords="offset points",
                    va="center", fontsize=7, color=color,
                )  # fmt: skip
            axes.plot(
                ratio, y, "o" if row["ratio"] <= _EDGE else ">", color=color, label=label,
                markersize=5, markerfacecolor=color if right else "white",
            )  # fmt: skip
    axes.axvline(1, color="0.5", linewidth=0.8)
    axes.set_xlim(0.9, _EDGE + 0.3)
    axes.set_yticks(range(len(cases)), [f"{c['case']}\n{c['sites']} sites" for c in cases])
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.invert_yaxis()
    axes.set_xlabel(
        "time of a pass, bare = 1 (median, quartiles; grey: the bare model against itself)\n"
        "filled: every z was right; hollow: some were wrong or not seen"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda n: list(_COLORS).index(labels[n]))
    legend = axes.legend(
        [handles[n] for n in order], [labels[n] for n in order],
        frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0),
        fontsize=8, handletextpad=0.2, columnspacing=1.0,
    )  # fmt: skip
    for handle, n in zip(legend.legend_handles, order, strict=True):
        handle.set_markerfacecolor(_COLORS[labels[n]])
        handle.set_marker("o")
    figure.tight_layout()
    figure.savefig(to, dpi=120)
    pyplot.close(figure)


def growth(given: dict[str, Any], to: Path) -> None:
    """What a captured pass takes more: against sites, batch and steps.

    Args:
        given: the JSON of `growth`.
        to: the PNG to write.
    """
    pyplot = _pyplot()
    figure, (sites, batch, steps) = pyplot.subplots(1, 3, figsize=(9.5, 3.2))
    for axes, key, unit in ((sites, "sites", "sites"), (batch, "batch", "batch")):
        x = [row["size"] for row in given[key]]
        for name in ("fmapkit", "hooks, clones"):
            y = [1e3 * row["contenders"][name]["extra"] for row in given[key]]
            axes.plot(x, y, "o-", color=_COLORS[name], markersize=4, linewidth=1, label=name)
        fit = given["fits"][f"{key}, seconds more"]
        line = [1e3 * (fit["intercept"] + fit["slope"] * n) for n in (min(x), max(x))]
        axes.plot([min(x), max(x)], line, ":", color="0.3", linewidth=1, label="straight line")
        axes.set_xlabel(unit)
        axes.set_ylabel("more than a bare pass (ms)")
    sites.legend(frameon=False, fontsize=8)
    windows = given["steps"]["windows"]
    steps.plot(
        [w["step"] for w in windows], [w["ratio"] for w in windows], "o-",
        color=_COLORS["fmapkit"], markersize=4, linewidth=1,
    )  # fmt: skip
    steps.axhline(1, color="0.5", linewidth=0.8)
    steps.set_ylim(0.9, max(1.3, *(w["ratio"] + 0.05 for w in windows)))
    steps.set_xlabel("training steps in one block")
    steps.set_ylabel("time of a step, bare = 1")
    for axes in (sites, batch, steps):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(to, dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("charts need matplotlib: pip install 'fmapkit[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
