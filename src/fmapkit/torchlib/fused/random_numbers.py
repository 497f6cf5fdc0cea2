"""The state of torch's random numbers: what runs for its maps alone draws none of the model's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fmapkit.torchlib.nested import tensors_in


def random_state(output: Any) -> Callable[[], None]:
    """Note how far the numbers were drawn.

    Args:
        output: that was computed on the devices in question, beside the CPU.

    Returns:
        Has them drawn from there on again.
    """
    cpu = torch.get_rng_state()
    states = {t.device: torch.cuda.get_rng_state(t.device) for t in tensors_in(output) if t.is_cuda}
    return partial(_put_back, cpu, states)


def _put_back(cpu: torch.Tensor, states: dict[torch.device, torch.Tensor]) -> None:
    torch.set_rng_state(cpu)
    for device, state in states.items():
        torch.cuda.set_rng_state(state, device)
