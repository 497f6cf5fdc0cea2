"""Follow fields through a pass: a dispatch mode that runs each operator, and then its rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fmapkit.errors import ArgumentError
from fmapkit.explain._fields import Call, Fields, reaches, tensors_of, written
from fmapkit.explain._rules import rule_for
from fmapkit.model import tensors_in
from fmapkit.torchlib.operators import (
    TorchDispatchMode,
    is_composite,
    tree_map,
    without_torch_function,
)

_LEAVES = {"numpy", "__array__", "__dlpack__", "tolist", "data_ptr"}
_DECIDES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows the fields of all tensors that are computed while it is entered.

    Attributes:
        decided: Python, or the shape of a tensor, has depended on a value of the input.
        assumed: operators of which every result is taken to depend on all of some operand.
    """

    def __init__(self, fields: Fields) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fields = fields
        self.decided = False
        self.assumed: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with without_torch_function(), torch.no_grad():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = tensors_in((args, kwargs))
        fields = {id(t): f for t in operands if (f := self.fields.of(t)) is not None}
        if not fields:
            return func(*args, **kwargs)
        if is_composite(func):  # as it is in inference mode
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if _DECIDES & set(func.tags) and any(map(reaches, fields.values())):
            self.decided = True
        arguments = func._schema.arguments
        given = {a.name: a.default_value for a in arguments if a.has_default_value()}
        given |= dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        overwritten = written(func, given)
        given = {a.name: given[a.name] for a in arguments if not a.is_out}
        if overwritten:
            given = tree_map(lambda v: _before(v, overwritten, fields), given)
        out = func(*args, **kwargs)
        fresh = tensors_of(overwritten, out)
        if not overwritten:
            fresh = [t for t in fresh if not any(self.fields.same(t, o) for o in operands)]
        if not fresh:
            return out  # a view: its memory is known
        name = func._schema.name.partition("::")[2]
        call = Call(name.rstrip("_"), _functional(func), given, fields, fresh, self._assume)
        for result, found in zip(fresh, rule_for(call)(call), strict=True):
            self.fields.put(result, found)
        return out

    def _assume(self, name: str) -> None:
        if name not in self.assumed:
            self.assumed.append(name)


class Leaving(TorchFunctionMode):
    """Sees values leave torch, where nobody can follow them."""

    def __init__(self, follow: Follow) -> None:
        super().__init__()
        self.follow = follow

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LEAVES and args and isinstance(args[0], Tensor):
            with without_torch_function():
                reached = reaches(self.follow.fields.of(args[0]))
            if reached and name == "tolist":
                self.follow.decided = True
            elif reached and name == "data_ptr":
                self.follow._assume(name)  # a kernel may write what comes of it anywhere
            elif reached:
                raise ArgumentError(
                    f"receptive_field follows what torch computes, and the model hands a tensor of "
                    f"shape {tuple(args[0].shape)} on to another library ({name})"
                )
        return func(*args, **(kwargs or {}))


def _functional(func: Any) -> Any:
    """The form of an operator that returns its result, where `out=` was given."""
    wanted = [a.name for a in func._schema.arguments if not a.is_out]
    if len(wanted) == len(func._schema.arguments):
        return func
    forms = (getattr(func._overloadpacket, name) for name in func._overloadpacket.overloads())
    return next(f for f in forms if [a.name for a in f._schema.arguments] == wanted)


def _before(value: Any, written: list[Tensor], fields: dict[int, Tensor]) -> Any:
    """A copy of what will be overwritten, with its field."""
    if not any(value is t for t in written):
        return value
    kept = value.clone()
    if id(value) in fields:
        fields[id(kept)] = fields[id(value)].clone()
    return kept
