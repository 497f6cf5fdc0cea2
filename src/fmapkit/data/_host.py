"""Rows on their way from a GPU: copied beside the model's work, one batch behind it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fmapkit.data._rows import Taken

__all__ = ["Arriving"]


class Arriving:
    """The rows of a batch, which `wait` gives once they are in the host's memory.

    Args:
        taken: where the model made them. On a CPU they are there already.
    """

    def __init__(self, taken: Taken) -> None:
        self._event: Any = None
        device = next((t.device for _, t in taken.arrays if t.device.type == "cuda"), None)
        if device is not None:
            taken = replace(taken, arrays=self._sent(taken, device))
        self._taken = taken

    def _sent(self, taken: Taken, device: torch.device) -> list[Any]:
        stream = _stream(device)
        # What the next pass may overwrite is copied on the device, in the model's own order.
        own = [(spec, rows.contiguous().clone()) for spec, rows in taken.arrays]
        stream.wait_stream(torch.cuda.current_stream(device))
        arrays = []
        with torch.cuda.stream(stream):
            for spec, rows in own:
                host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
                host.copy_(rows, non_blocking=True)
                rows.record_stream(stream)
                arrays.append((spec, host))
            self._event = stream.record_event()
        return arrays

    @property
    def here(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._event is None

    def wait(self) -> Taken:
        """The rows, in the host's memory."""
        if self._event is not None:
            self._event.synchronize()
        return self._taken


_streams: dict[torch.device, Any] = {}


def _stream(device: torch.device) -> Any:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]
