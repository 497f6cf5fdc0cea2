"""Work of our own while the model runs: no part of its graph, its modes, or its path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from fmapkit._aside import unseen
from fmapkit._form import autocasting
from fmapkit.paths import unrecorded

__all__ = ["without_the_models"]


@contextmanager
def without_the_models() -> Iterator[None]:
    """What runs here is none of the model's: no part of its graph, its modes, its path."""
    with torch.inference_mode(False), torch.no_grad(), unseen(), unrecorded(), ExitStack() as off:
        for device in autocasting():
            off.enter_context(torch.autocast(device, enabled=False))
        yield
