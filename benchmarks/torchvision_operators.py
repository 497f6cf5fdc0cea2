"""torchvision beside a torch that its compiled library was not built for.

`import torchvision` registers shapes for its own operators. Where the library that has them does
not load, as that of PyPI beside a CPU build of torch, the import fails on the first one, though
none of the classification models calls any. Their names suffice.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

__all__ = ["declare"]

# What is registered at import, library or not: torchvision/_meta_registrations.py.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[object] = []  # what declares them: they are gone with it


def declare() -> None:
    """Declare the operators, before torchvision is imported, unless its own library has them."""
    if _declared or _loads():
        return
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)


def _loads() -> bool:
    """Whether torchvision is not there at all, or its library loads, as it does at import."""
    operators: Any = torch.ops
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    for file in Path(spec.origin).parent.glob("_C.*"):
        try:
            operators.load_library(file)
        except OSError:
            return False
    return hasattr(operators.torchvision, "nms")
