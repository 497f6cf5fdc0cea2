"""A device whose copies are late on purpose, in place of a GPU's: the model's own work is not.

Copies run one after another in a thread of their own, as on a CUDA stream, each after a pause. What
the model does meanwhile to the memory that a copy has yet to read is what would go wrong on a GPU.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fmapkit.storage.buffers import Buffers
from fmapkit.storage.conversion import StorageConversion


class Arrival:
    def __init__(self) -> None:
        self.event = threading.Event()

    def synchronize(self) -> None:
        assert self.event.wait(30)

    def query(self) -> bool:
        return self.event.is_set()


class Late:
    """`fmapkit.storage.Cuda`, with a pause of up to `delay` seconds before each copy."""

    def __init__(self, delay: float, seed: int = 0) -> None:
        self.delay = delay
        self.waits = 0
        self.copies = 0
        self._random = random.Random(seed)
        self._queue: queue.Queue[tuple[Tensor, Tensor, Arrival] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            source, target, arrival = job
            time.sleep(self._random.random() * self.delay)
            with torch.no_grad():
                target.data.copy_(source)  # on a GPU, the version was counted when it was sent
            del source, job
            arrival.event.set()

    def copy(self, source: Tensor, target: Tensor) -> Arrival:
        self.copies += 1
        arrival = Arrival()
        with torch.inference_mode(False):  # another thread's modes are not this one's
            self._queue.put((source.detach(), target, arrival))
        return arrival

    def wait(self, arrival: Any) -> None:
        self.waits += 1
        arrival.synchronize()

    def stop(self) -> None:
        self._queue.put(None)
        self._thread.join(30)


def _is_the_models(self: StorageConversion, tensor: Tensor) -> bool:
    lent = {one.buffer.untyped_storage()._cdata for one in self.buffers._lent.values()}
    return self.device is not None and tensor.untyped_storage()._cdata not in lent


@contextmanager
def late(delay: float = 0.002) -> Iterator[Late]:
    """`capture(device="cpu")` takes a CPU model's maps for those of a late device."""
    device = Late(delay)
    made = Buffers.like

    def unpinned(self: Any, tensor: Tensor, dtype: Any, home: Any, pin: bool = False) -> Tensor:
        return made(self, tensor, dtype, home, False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StorageConversion, "_leaves", staticmethod(lambda tensor, device: True))
        patch.setattr(StorageConversion, "_moves", _is_the_models)
        patch.setattr(StorageConversion, "_carrier", staticmethod(lambda home: device))
        patch.setattr(Buffers, "like", unpinned)
        try:
            yield device
        finally:
            device.stop()
