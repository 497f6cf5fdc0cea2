"""What a call of `feature_map` takes, beside torchvision's extractor, which runs a pruned graph.

Both run the same model up to the same layer, and first have to give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from benchmarks import torchvision_operators
from benchmarks.measure import Figures, Timed, environment, interleave, load
from fmapkit import feature_map

__all__ = ["CASES", "Case", "measure", "run"]


@dataclass(frozen=True)
class Case:
    """A model of torchvision's, the layer that is read, and the images."""

    model: str
    layer: str
    shape: tuple[int, ...]
    gradients: bool = False

    @property
    def name(self) -> str:
        """For the table."""
        size = "×".join(map(str, self.shape))
        return f"{self.model}, {self.layer}, {size}" + ", gradients" * self.gradients


CASES = [
    Case("resnet18", "layer3", (8, 3, 160, 160)),
    Case("resnet18", "layer3", (8, 3, 160, 160), gradients=True),
    Case("resnet50", "layer3", (4, 3, 160, 160)),
    Case("mobilenet_v3_small", "features.8", (8, 3, 160, 160)),
    Case("resnet18", "layer3", (1, 3, 64, 64)),
]


def measure(case: Case, budget: float) -> Figures:
    """The time of φ as a ratio to the extractor's.

    Raises:
        SystemExit: torchvision is not installed, or the two do not give the same bits.
    """
    torchvision_operators.declare()
    try:
        models: Any = import_module("torchvision.models")
        extraction: Any = import_module("torchvision.models.feature_extraction")
    except ImportError as error:
        raise SystemExit(f"torchvision is needed here: {error}") from None
    torch.manual_seed(0)
    model = getattr(models, case.model)(weights=None).eval()
    extractor = extraction.create_feature_extractor(model, [case.layer])
    phi = feature_map(model, case.layer, kind="output")
    images = torch.randn(case.shape)
    with torch.set_grad_enabled(case.gradients):
        for _ in range(3):
            if not torch.equal(phi(images), extractor(images)[case.layer]):
                raise SystemExit(f"{case.name}: the two do not give the same bits")
        timed = Timed(lambda: phi(images), lambda: extractor(images))
        pairs, failed = interleave({case.name: timed}, budget)
    if failed:
        raise SystemExit(failed[case.name])
    return Figures.of(pairs[case.name])


def run(budget: float, threads: int = 1) -> None:
    """Print the table.

    Args:
        budget: seconds for each case.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    print(f"load {load()}; feature_map ÷ torchvision's extractor, CPU time: median and quartiles")
    for case in CASES:
        f = measure(case, budget)
        ratios = f"{f.cpu:.3f} ({f.cpu_low:.3f} to {f.cpu_high:.3f})"
        print(
            f"  {case.name:46s} {f.bare_cpu * 1e3:7.1f} ms  {ratios}  {f.pairs} pairs", flush=True
        )
