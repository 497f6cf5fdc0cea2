"""A nested value with another tensor in one of its places; nothing of the given value is changed.

Places are told as `nested.leaves` tells them: `[0]`, `['w']`, `.logits`, `[1].box.corners`. Each
container on the way is copied, all else is shared, as in what a forward hook would return that was
written by hand.
"""

from __future__ import annotations

import copy
import types
from typing import Any

from torch import Tensor

from fmapkit.torchlib.nested import Attribute, attributes, parts


def rebuilt(value: Any, path: str, tensor: Tensor) -> Any:
    """The value with the tensor at a path of it.

    Args:
        value: nested tuples, lists, dicts, dataclasses, or objects with attributes.
        path: one that `leaves` tells of it; empty where the value is a tensor itself.

    Raises:
        KeyError: the value has no such path.
    """
    return _rebuilt(value, "", path, tensor)


def _rebuilt(value: Any, here: str, path: str, tensor: Tensor) -> Any:
    if here == path:
        return tensor
    for key, place, part in (*parts(value, here), *attributes(value, here)):
        if place == path or (path.startswith(place) and path[len(place)] in "[."):
            return _with(value, key, _rebuilt(part, place, path, tensor))
    raise KeyError(path)


def _with(value: Any, key: Any, part: Any) -> Any:
    """A copy of a container with another part."""
    if isinstance(value, tuple):
        named: Any = getattr(value, "_replace", None)
        if isinstance(key, Attribute) and named is not None:
            return named(**{str(key): part})
        items = [part if i == key else item for i, item in enumerate(value)]
        kind: Any = type(value)  # torch's own named ones (`torch.return_types`) take a list, too
        return kind(items)
    if isinstance(value, types.MappingProxyType):
        return types.MappingProxyType({**value, key: part})
    made = copy.copy(value)
    if isinstance(key, Attribute):
        try:
            setattr(made, key, part)
        except AttributeError:  # of a frozen dataclass
            object.__setattr__(made, key, part)
    else:
        made[key] = part
    return made
