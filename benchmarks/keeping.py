"""What `compare` and `maps.save` cost, beside the same by hand, on the maps of a ResNet-18.

By hand: the relative error of each pair of tensors, in float64; and `safetensors.torch.save_file`
of the same tensors. The ratios are of CPU time, and the maps are captured beforehand.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Figures, Timed, environment, interleave
from benchmarks.models import ResNet
from fmapkit import FeatureMaps, capture, compare

__all__ = ["run"]


def _captured(images: Tensor) -> FeatureMaps:
    torch.manual_seed(0)
    model = ResNet().eval()
    with capture(model) as maps, torch.no_grad():
        model(images)
    return maps


def _errors(one: list[Tensor], other: list[Tensor]) -> Callable[[], object]:
    def by_hand() -> list[float]:
        found = []
        for a, b in zip(one, other, strict=True):
            x = a.double()
            found.append(float((x - b.double()).norm() / x.norm()))
        return found

    return by_hand


def run(threads: int = 1, seconds: float = 5.0) -> None:
    """Print the table.

    Args:
        threads: of torch.
        seconds: for each row.
    """
    from safetensors.torch import save_file

    torch.set_num_threads(threads)
    print(", ".join(f"{key} {value}" for key, value in environment("cpu").items() if value))
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    a, b = _captured(images), _captured(images + 1e-4)
    tensors = [fm.tensor for fm in a]
    named = {f"{i}": t for i, t in enumerate(tensors)}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = str(Path(folder) / "ours"), str(Path(folder) / "theirs")
        timed = {
            "compare(a, b)": Timed(
                lambda: compare(a, b), _errors(tensors, [fm.tensor for fm in b])
            ),
            "maps.save": Timed(lambda: a.save(ours), lambda: save_file(named, theirs)),
            "FeatureMaps.load": Timed(
                lambda: FeatureMaps.load(ours), lambda: torch.load(theirs + ".pt")
            ),
        }
        a.save(ours)
        torch.save(named, theirs + ".pt")
        pairs, _ = interleave(timed, seconds)
    print(f"{len(tensors)} maps, {sum(t.nbytes for t in tensors) / 2**20:.1f} MiB")
    for name, those in pairs.items():
        f = Figures.of(those)
        print(
            f"  {name:18s} {f.cpu:5.2f} of the CPU time by hand (quartiles {f.cpu_low:.2f} to "
            f"{f.cpu_high:.2f}; {f.bare * 1e3:.2f} ms), {f.pairs} pairs"
        )
