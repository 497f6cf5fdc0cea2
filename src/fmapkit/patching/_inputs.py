"""Inputs of a model: as positional and keyword arguments, and several copies in one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.errors import ArgumentError
from fmapkit.model import changed, run, tensors_in
from fmapkit.torchlib.operators import tree_map

_CONSTANT = (type(None), bool, int, float, complex, str, bytes)


class ModelInputs:
    """What a model is given.

    Args:
        given: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        name: what to call it in an error.
    """

    def __init__(self, given: Any, name: str) -> None:
        self._name = name
        self._given = given if isinstance(given, (tuple, Mapping)) else (given,)
        self._tensors = tensors_in(self._given)
        if not self._tensors:
            raise ArgumentError(
                f"{name} must be a tensor, a tuple of arguments or a dict of keyword arguments "
                f"with tensors in it, not {type(given).__name__}"
            )

    def samples(self) -> int:
        """How many samples there are.

        Raises:
            ArgumentError: its tensors do not agree.
        """
        shapes = [tuple(t.shape) for t in self._tensors]
        counts = {shape[:1] for shape in shapes}
        if len(counts) != 1 or counts == {()}:
            raise ArgumentError(
                f"batch_size > 1 puts copies of {self._name} into one batch, along the first axis, "
                f"and its tensors have shapes {shapes}: give all of them that axis, or batch_size=1"
            )
        return int(counts.pop()[0])

    def run(self, model: nn.Module, copies: int = 1) -> Any:
        """Call the model on so many copies."""

        def repeated(value: Any) -> Any:
            return torch.cat([value] * copies) if isinstance(value, Tensor) else value

        return run(model, changed(self._given, repeated) if copies > 1 else self._given)


def rows(output: Any, copy: int, copies: int, samples: int) -> Any:
    """What the model returned for one of several copies.

    Raises:
        ArgumentError: something in it cannot be told apart by copies.
    """
    if copies == 1:
        return output

    def part(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == copies * samples:
            return value[copy * samples : (copy + 1) * samples]
        if isinstance(value, _CONSTANT):
            return value
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise ArgumentError(
            f"batch_size > 1 runs {copies} copies of {samples} samples at once, and the model "
            f"returned {what or f'a {type(value).__name__}'}, which has no row for each: make it "
            "return tensors of the batch alone (use_cache=False, no labels), or batch_size=1"
        )

    return tree_map(part, output)
