"""Maps on their way from a device to the host, beside the model's own work.

Copies run on a stream of their own. Nothing here makes Python wait, but for reading a map:

- the copy starts once the model's stream has made the map;
- the memory it reads is not given to anybody else before it has ended (`record_stream`);
- where that memory may be written to next, the model's stream waits for the copy, on the device:
  before a write that is known of, and when a pass ends and other people's code goes on;
- where copies lag behind by more than a limit, the model's stream waits for the oldest ones, so
  that the device's memory holds no more than that for their sake.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor


class Arrival(Protocol):
    """The end of a copy."""

    def synchronize(self) -> None:
        """Wait for it, in Python."""

    def query(self) -> bool:
        """Whether it is there, without waiting."""


class Cuda:
    """One CUDA device, with a stream for copies.

    Tests put another one in its place, which is late on purpose.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, source: Tensor, target: Tensor) -> Arrival:
        """Copy beside the model's work, after what it has started so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._stream)
        arrival: Arrival = self._stream.record_event()
        return arrival

    def wait(self, arrival: Arrival) -> None:
        """Let what the model starts from here on wait for a copy; Python goes on."""
        torch.cuda.current_stream(self._device).wait_event(arrival)  # type: ignore[arg-type]


class Offload:
    """The copies of one capture from one device."""

    def __init__(self, device: Cuda, limit: int = 1 << 28) -> None:
        self._device = device  # that they come from
        # How many bytes may be on their way, before the model's work waits for some.
        self._limit = limit
        self._under_way: deque[tuple[Arrival, int]] = deque()
        self._bytes = 0

    def send(self, source: Tensor, target: Tensor) -> Arrival:
        """Start a copy to pinned memory, which is to be read after the arrival only.

        What is copied may be let go at once.
        """
        arrival = self._device.copy(source, target)
        size = target.numel() * target.element_size()
        self._under_way.append((arrival, size))
        self._bytes += size
        while self._under_way and self._under_way[0][0].query():
            self._bytes -= self._under_way.popleft()[1]
        waits = None
        while self._bytes > self._limit and len(self._under_way) > 1:
            waits, size = self._under_way.popleft()
            self._bytes -= size
        if waits is not None:  # copies end in the order in which they began
            self._device.wait(waits)
        return arrival

    def settle(self) -> None:
        """What the model's stream does from here on comes after every copy so far."""
        if self._under_way:
            self._device.wait(self._under_way[-1][0])
            self._under_way.clear()
            self._bytes = 0
