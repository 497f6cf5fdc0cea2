"""What tells one call of `extract` from another: the model, its weights, and the arguments.

Two calls at one place have to agree in all of it. A description is plain JSON, so that what differs
can be named.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmapkit.errors import ArgumentError

_PIECE = 2**20  # words of a tensor that are summed at once
_SAMPLED = 1024  # numbers of a batch's tensor that its digest looks at
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def of_model(model: nn.Module) -> dict[str, str]:
    """The model's class, a hash of its structure, and one of every value of its weights."""
    structure = _ADDRESS.sub("", repr(model))
    weights = hashlib.blake2b(digest_size=8)
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            weights.update(str(_checksum(tensor)).encode())
    return {
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "structure": hashlib.blake2b(structure.encode(), digest_size=8).hexdigest(),
        "weights": weights.hexdigest(),
    }


@torch.no_grad()
def _checksum(tensor: Tensor) -> int:
    """Of all bits of a tensor, worked out where it lies: a sum in which each place has a weight.

    Integers that wrap around give the same on every device, whatever the order of the sum.
    """
    if tensor.device.type == "meta":
        raise ArgumentError("the model has parameters on the meta device: load its weights first")
    if hasattr(tensor, "to_local"):  # a DTensor: of this rank's part
        tensor = tensor.to_local()
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    flat = flat.view(torch.uint8)
    words = len(flat) // 8 * 8
    whole = (flat.clone() if flat.storage_offset() % 8 else flat)[:words].view(torch.int64)
    rest = flat[words:].to(torch.int64)
    most = max(8, min(_PIECE, len(whole)))
    places = 2 * torch.arange(most, device=flat.device) + 1
    weighted = torch.empty_like(places)  # one memory for all pieces
    total = 0
    for number, piece in enumerate((*torch.split(whole, _PIECE), rest)):
        of_piece = torch.mul(piece, places[: len(piece)], out=weighted[: len(piece)]).sum()
        total = (total * 0x9E3779B97F4A7C15 + int(of_piece) + number) % 2**64
    return total


def digest(batch: Any) -> str:
    """A short hash of what a loader gave: of sampled values of its tensors, and of the rest."""
    seen = hashlib.blake2b(digest_size=8)
    _digest(batch, seen)
    return seen.hexdigest()


def _digest(value: Any, seen: Any) -> None:
    if isinstance(value, Tensor):
        seen.update(f"{tuple(value.shape)} {value.dtype}".encode())
        picked = _sampled(value.detach().reshape(-1)).contiguous().cpu()
        seen.update(picked.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        seen.update(f"{value.shape} {value.dtype}".encode())
        some = _sampled(value.reshape(-1))
        seen.update(repr(some.tolist()).encode() if value.dtype.hasobject else some.tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            seen.update(repr(key).encode())
            _digest(value[key], seen)
    elif isinstance(value, (list, tuple)):
        seen.update(f"{len(value)}".encode())
        for item in value:
            _digest(item, seen)
    elif isinstance(value, (str, bytes, int, float, complex, bool, np.generic, type(None))):
        seen.update(repr(value).encode())
    else:  # an object of somebody's: what it says of itself may be an address
        seen.update(type(value).__qualname__.encode())


def _sampled(flat: Any) -> Any:
    return flat[:: max(1, len(flat) // _SAMPLED)]


def describe(value: Any, model: nn.Module | None = None, *, pure: bool = True) -> Any:
    """An argument as JSON that is the same for equal arguments, in other processes too.

    Args:
        value: a plain value, a module, type, regex or function, or several of these.
        model: whose modules go by their names.
        pure: what a function holds says what it gives; else it may as well count or log.

    Raises:
        ArgumentError: it is none of these.
    """
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item, model) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((describe(item, model) for item in value), key=repr)
    if isinstance(value, (list, tuple, range)):
        return [describe(item, model) for item in value]
    if isinstance(value, re.Pattern):
        return f"regex {value.pattern!r}"
    if isinstance(value, nn.Module):
        names = [n for n, m in model.named_modules() if m is value] if model is not None else []
        return f"module {names[0]!r}" if names else f"module {type(value).__qualname__}"
    if isinstance(value, (torch.dtype, torch.device, np.generic)):
        return str(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if callable(value):
        return _function(value, 4 if pure else 0)
    raise ArgumentError(f"{value!r} cannot be described, so it could not be told from another")


def _function(function: Any, depth: int) -> str:
    """Name of a function, what it holds, and a hash of its code; what it reads elsewhere is not in.

    What functions in it hold is looked at up to a depth; a partial's arguments always are.
    """
    inner = getattr(function, "func", function)  # of a functools.partial
    given: list[Any] = []
    if inner is not function:
        given += getattr(function, "args", ())
        given += (getattr(function, "keywords", None) or {}).values()
    given += _holdings(inner) if depth else ()
    bound = [_held(value, depth - 1) for value in given]
    owner = getattr(inner, "__self__", None)
    home = inner if hasattr(inner, "__qualname__") else type(inner)
    code = getattr(inner, "__code__", None)
    if code is None and not isinstance(inner, type):  # an object that can be called
        code = getattr(type(inner).__call__, "__code__", None)
    name = f"{home.__module__}.{home.__qualname__}"
    name += f" of {type(owner).__qualname__}" if owner is not None else ""
    name += f" with {bound}" if bound else ""
    return f"{name} ({_code(code)})" if isinstance(code, CodeType) else name


def _holdings(inner: Any) -> Iterator[Any]:
    """What a function holds: defaults, variables around it, and attributes of an object."""
    yield from getattr(inner, "__defaults__", None) or ()
    yield from (getattr(inner, "__kwdefaults__", None) or {}).values()
    for cell in getattr(inner, "__closure__", None) or ():
        with suppress(ValueError):  # it is empty yet
            yield cell.cell_contents
    if not hasattr(inner, "__qualname__") and not isinstance(inner, nn.Module):
        yield from getattr(inner, "__dict__", {}).values()


def _held(value: Any, depth: int) -> Any:
    """A value as far as it is told from others in any process: else its type."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {digest(value)}"
    if isinstance(value, (list, tuple, Mapping, set, frozenset)):
        if depth <= 0:
            return len(value)
        if isinstance(value, Mapping):
            return {str(key): _held(item, depth - 1) for key, item in value.items()}
        found = [_held(item, depth - 1) for item in value]
        return found if isinstance(value, (list, tuple)) else sorted(found, key=repr)
    if isinstance(value, type) or not callable(value) or isinstance(value, nn.Module):
        try:
            return describe(value)
        except ArgumentError:
            return type(value).__qualname__
    return _function(value, max(depth, 0))


def _code(code: CodeType) -> str:
    seen = hashlib.blake2b(digest_size=4)

    def take(one: CodeType) -> None:
        seen.update(one.co_code)
        seen.update(repr(one.co_names).encode())
        for constant in one.co_consts:
            if isinstance(constant, CodeType):
                take(constant)
            elif isinstance(constant, frozenset):  # whose order is another in each process
                seen.update(repr(sorted(constant, key=repr)).encode())
            else:
                seen.update(repr(constant).encode())

    take(code)
    return seen.hexdigest()


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions, each in a few words."""
    words = []
    for key in {**then, **now}:
        was, is_ = then.get(key), now.get(key)
        if was == is_:
            continue
        if isinstance(was, Mapping) and isinstance(is_, Mapping):
            words += [f"{key} {text}" for text in differences(was, is_)]
        else:
            words.append(f"{key}: {was!r} then, {is_!r} now")
    return words
