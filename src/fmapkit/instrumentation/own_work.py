"""Work of our own while the model runs: no part of its graph, its modes, or its path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from fmapkit.paths import unrecorded
from fmapkit.torchlib.side_ops import unseen
from fmapkit.torchlib.tensor_spec import autocasting


@contextmanager
def without_the_models() -> Iterator[None]:
    """What runs here is none of the model's: no part of its graph, its modes, its path."""
    with torch.inference_mode(False), torch.no_grad(), unseen(), unrecorded(), ExitStack() as off:
        for device in autocasting():
            off.enter_context(torch.autocast(device, enabled=False))
        yield
