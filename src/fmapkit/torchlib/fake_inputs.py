"""Fake tensors in the place of a graph's inputs: run on these, it says what it does, and does none.

To import this takes torch's tracing tools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


class UnreadableError(Exception):
    """The graph has something that cannot be read; the message says what."""


class FakeInputs:
    """A graph's inputs as fake tensors of static shape."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.values = [self.of(value) for value in inputs]

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if any(not isinstance(n, int) for n in value.shape):
                raise UnreadableError("its graph was traced with symbolic inputs")
            fake = self.mode.from_tensor(value, static_shapes=True)
            if value.dim() == 0 and value.device.type == "cpu" and not value.requires_grad:
                # A Python number that changes from call to call comes as a tensor, and is read.
                fake.constant = value.detach().clone()
                self.mode.fake_tensor_converter.add_constant_storage_mapping(fake)
            return fake
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return value.node.hint
        return value
