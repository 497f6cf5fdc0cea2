"""Thousands of training steps in one block: does memory stay flat?

Every contender runs in a process of its own, so that none inherits another's memory. In it, a small
convolutional net is trained, all steps in one `with capture(model)`. Along the way the resident
memory of the process is read, and the objects that Python's garbage collector knows of are counted,
after a collection.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import capture

__all__ = ["CONTENDERS", "Run", "measure", "run"]

WARM_UP = 100  # steps before the first reading: allocators and caches settle
READINGS = 50

CONTENDERS: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "bare": lambda model: nullcontext(),
    "keep=1": lambda model: capture(model, keep=1),
    "keep=3": lambda model: capture(model, keep=3),
    "every=10": lambda model: capture(model, every=10),
}


class Net(nn.Module):
    """Traps included: ReLUs in place, a sum in place, a nonlinearity that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.conv2(x)
        y += x
        logits: Tensor = self.fc(F.gelu(self.drop(y)).mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Run:
    """Readings of one contender: after each of `steps`, bytes resident and objects known to gc."""

    contender: str
    steps: list[int]
    resident: list[int]
    objects: list[int]

    @property
    def slope(self) -> float:
        """Bytes of resident memory per step, by least squares over the later half."""
        half = len(self.steps) // 2
        x, y = self.steps[half:], self.resident[half:]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        return above / sum((a - mean_x) ** 2 for a in x)


def measure(contender: str, steps: int) -> Run:
    """Train in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    images, labels = torch.randn(64, 8, 1, 12, 12), torch.randint(10, (64, 8))

    def train(first: int, last: int) -> None:
        for n in range(first, last):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[n % 64]), labels[n % 64])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    result = Run(contender, [], [], [])
    every = max((steps - WARM_UP) // READINGS, 1)
    with CONTENDERS[contender](model):
        train(0, WARM_UP)
        for n in range(WARM_UP, steps + 1, every):
            gc.collect()
            result.steps.append(n)
            result.resident.append(_resident())
            result.objects.append(len(gc.get_objects()))
            train(n, n + every)
    return result


def _resident() -> int:
    """Bytes of this process that are in memory now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not tell: /proc/self/status has no VmRSS")


def run(steps: int, figure: Path | None) -> None:
    """Measure each contender in a process of its own, print the figures and draw the curves."""
    runs = []
    for name in CONTENDERS:
        code = (
            "import json, dataclasses; from benchmarks import longrun; "
            f"print(json.dumps(dataclasses.asdict(longrun.measure({name!r}, {steps}))))"
        )
        printed = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
        runs.append(Run(**json.loads(printed)))
    print(f"{steps} steps; resident memory and gc objects at the first reading and the last")
    for r in runs:
        print(
            f"  {r.contender:10s} {r.resident[0] / 1e6:7.1f} -> {r.resident[-1] / 1e6:7.1f} MB"
            f"  ({r.slope:+8.1f} bytes a step in the later half)"
            f"  {r.objects[0]:7d} -> {r.objects[-1]:7d} objects"
        )
    if figure is not None:
        _draw(runs, figure)


def _draw(runs: list[Run], to: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5))
    for r in runs:
        grey = {"color": "0.6", "zorder": 1} if r.contender == "bare" else {}
        above.plot(
            r.steps, [(b - r.resident[0]) / 1e6 for b in r.resident], label=r.contender, **grey
        )
        below.plot(r.steps, [n - r.objects[0] for n in r.objects], label=r.contender, **grey)
    above.set_ylabel("resident memory (MB)")
    below.set_ylabel("objects")
    above.set_title("growth since the first reading", loc="left", fontsize="medium")
    above.set_ylim(-5, 20)
    below.set_ylim(-50, 200)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    below.set_xlabel("training step")
    above.legend(frameon=False, ncols=len(runs))
    figure.tight_layout()
    figure.savefig(to, dpi=120)
    pyplot.close(figure)
