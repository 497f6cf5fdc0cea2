"""The form of a call: what its plan may rest on, and what may change from call to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.paths import Sizes
from fmapkit.provenance import ChannelLabel, Label, ParamLabel
from fmapkit.torchlib.nested import contents
from fmapkit.torchlib.tensor_spec import form_of
from fmapkit.torchlib.transforms import is_shapeless

# Arguments that are told by their values.
TOLD = frozenset({bool, str, type(None), torch.dtype, torch.device})


def shape_of(value: Any) -> Any:
    """What kind of arguments these are: form of tensors, types of the rest, by place."""
    if type(value) is Tensor:
        return form_of(value)
    if isinstance(value, nn.Parameter):  # whose it is says whose the maps are
        return form_of(value), type(value), id(value)
    if isinstance(value, Tensor):
        return form_of(value), type(value)
    if isinstance(value, (tuple, list)):
        return tuple([shape_of(v) for v in contents(value)])
    if isinstance(value, dict):
        return tuple([(k, shape_of(v)) for k, v in dict.items(value)])
    return value if type(value) in TOLD else type(value)


def sizes_of(tensors: list[Tensor], args: Any, kwargs: Any) -> Sizes:
    """The sizes of tensors, one after the other, and the whole numbers that a module is given."""
    sizes = [size for t in tensors if not is_shapeless(t) for size in t.shape]
    _numbers_in(sizes, (args, kwargs))
    return tuple(sizes)


def _numbers_in(found: list[int], value: Any) -> None:
    if isinstance(value, int):
        found.append(value)
    elif isinstance(value, (tuple, list, dict)):
        for inner in contents(value):
            _numbers_in(found, inner)


def form_of_labels(inputs: list[Label], asked: Callable[[str], Any]) -> Any:
    """What the inputs carry, origins numbered in order of their first mention.

    With what was `asked` for of each layer: which of its maps are held may differ from another's.
    """
    origins: dict[int, int] = {}
    found: list[Any] = []
    for label in inputs:
        if isinstance(label, ChannelLabel):
            place = origins.setdefault(id(label.origin), len(origins))
            found.append((label.origin.kind, label.axes, place, asked(label.origin.name)))
        else:
            found.append("weight" if isinstance(label, ParamLabel) else None)
    return tuple(found)
