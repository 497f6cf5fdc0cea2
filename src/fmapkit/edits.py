"""The usual edits for `capture(model, edit={where: ...})`; any FeatureMap -> Tensor will do.

```python
with capture(model, edit={("conv2", "activation"): edits.only(17)}):
    model(images)  # every other activation of the layer is 0
with capture(model, edit={edits.Where("transformer.h.6", "output", at=-1): edits.add(v)}):
    model(tokens)  # v is added to the residual stream of the last token
```

An edit gets the part of a map that its key means, and gives a tensor of that shape. A value that is
given to an edit is broadcast as torch does it, but for a vector: that is one number for each
filter (hidden unit), along the axis of filters, wherever that is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmapkit.editing import Where, part_of
from fmapkit.errors import ArgumentError, EditError, is_int
from fmapkit.map import FeatureMap
from fmapkit.readable import tags

__all__ = [
    "Where",
    "add",
    "clamp",
    "noise",
    "only",
    "project_out",
    "scale",
    "set",
    "swap",
    "zero",
]

Edit = Callable[[FeatureMap], Tensor]


def add(value: Tensor | float) -> Edit:
    """The map plus a steering vector, a tensor or a number.

    Gradients flow into the value: a direction may be trained.

    Args:
        value: a number; a vector of one value for each filter; or a tensor that is broadcast.

    Raises:
        EditError: when the model runs: the value does not fit the map.
    """
    return lambda fm: fm.tensor + _fitted(value, fm)


def set(value: Tensor | float) -> Edit:
    """Another tensor in place of the map, or a number.

    Args:
        value: a number; a vector of one value for each filter; or a tensor that is broadcast.

    Raises:
        EditError: when the model runs: the value does not fit the map.
    """
    return lambda fm: _fitted(value, fm).expand(fm.shape).clone()


def scale(factor: Tensor | float) -> Edit:
    """The map times a number, or times one for each filter.

    Raises:
        EditError: when the model runs: the factor does not fit the map.
    """
    return lambda fm: fm.tensor * (_fitted(factor, fm) if isinstance(factor, Tensor) else factor)


def zero() -> Edit:
    """Zeros, of the map's shape: what the key names is silenced."""
    return lambda fm: torch.zeros_like(fm.tensor)


def clamp(minimum: float | None = None, maximum: float | None = None) -> Edit:
    """The map with its values kept within bounds.

    Raises:
        ArgumentError: neither bound is given.
    """
    if minimum is None and maximum is None:
        raise ArgumentError("clamp needs a minimum, a maximum, or both")
    return lambda fm: fm.tensor.clamp(minimum, maximum)


def noise(std: float, *, seed: int | None = None) -> Edit:
    """The map plus Gaussian noise.

    How subjects are corrupted in Meng et al., "Locating and Editing Factual Associations in GPT"
    (2022), section 2.1: there, of the embeddings, with three times their standard deviation.

    Args:
        std: standard deviation of the noise.
        seed: the same noise in each pass, of the same shape, from a generator of its own. By
            default other noise each time, from torch's global generator, as dropout takes it.

    Raises:
        ArgumentError: `std` is not positive, or the seed is no int.
        EditError: when the model runs: the map has no floating-point values.
    """
    if isinstance(std, bool) or not isinstance(std, (int, float)) or not std > 0:
        raise ArgumentError(f"std must be a positive number, not {std!r}")
    if seed is not None and not is_int(seed):
        raise ArgumentError(f"seed must be an int or None, not {seed!r}")

    def edit(fm: FeatureMap) -> Tensor:
        if not fm.dtype.is_floating_point:
            raise EditError(
                f"noise() takes floating-point values, and {_name(fm)} has {fm.dtype}", **tags(fm)
            )
        generator = None
        if seed is not None:
            generator = torch.Generator(fm.device)
            generator.manual_seed(seed)
        drawn = torch.randn(fm.shape, generator=generator, dtype=fm.dtype, device=fm.device)
        return fm.tensor + std * drawn

    return edit


def only(*filters: int, at: Any = None) -> Edit:
    """These filters as they are, at these positions, and zero in all others.

    How a single activation is examined in Zeiler & Fergus, "Visualizing and Understanding
    Convolutional Networks" (2014), section 2.1.

    Args:
        filters: indices along the layer's filters; none, with `at`, means all of them.
        at: positions, as in `edits.Where(at=...)`: (y, x) of an image, -1 for the last token, or
            each sample's own; None for all of them.

    Raises:
        ArgumentError: neither is given, or they are of no allowed form.
        FilterRangeError: when the model runs: the layer has no such filter.
        EditError: when the model runs: the map has no such positions.
    """
    if not filters and at is None:
        raise ArgumentError("only() needs at least one filter, or at=")
    where = Where("", "activation", filters or None, at=at)

    def edit(fm: FeatureMap) -> Tensor:
        part, _ = part_of(fm, where)
        _, put = part_of(dataclasses.replace(fm, tensor=torch.zeros_like(fm.tensor)), where)
        return put(part.tensor)

    return edit


def project_out(direction: Tensor) -> Edit:
    """The map without its component along a direction of the space of filters, or several.

    x - (x·d) d, with d of length 1. Known as directional ablation: Arditi et al., "Refusal in
    Language Models Is Mediated by a Single Direction" (2024), section 2.4. Several directions are
    made orthonormal first, and what lies in the space that they span is taken out.

    Args:
        direction: of shape (filters,), or (directions, filters); of any length but 0.

    Raises:
        ArgumentError: it is of no such shape, is 0, or the directions depend on each other.
        EditError: when the model runs: the map has another number of filters.
    """
    if not isinstance(direction, Tensor) or direction.dim() not in (1, 2):
        raise ArgumentError("project_out takes a tensor (filters,) or (directions, filters)")
    exact = direction.detach().double()
    several = exact.unsqueeze(0) if exact.dim() == 1 else exact
    if not several.numel() or int(torch.linalg.matrix_rank(several)) < len(several):
        raise ArgumentError(
            "project_out takes directions that are not 0 and do not depend on each other"
        )
    single = exact / exact.norm() if exact.dim() == 1 else None
    basis = single.unsqueeze(0) if single is not None else torch.linalg.qr(exact.T).Q.T

    def edit(fm: FeatureMap) -> Tensor:
        axis = _axis(fm, basis.shape[1], "a direction")
        d = basis.to(fm.device, fm.dtype)
        x = fm.tensor.movedim(axis, -1)
        left: Tensor = x - (x @ d.T) @ d
        return left.movedim(-1, axis)

    return edit


def swap(batch: Sequence[int] | Tensor) -> Edit:
    """Each sample gets the map of another sample of the batch.

    An interchange intervention: Geiger et al., "Causal Abstractions of Neural Networks" (2021).

    Args:
        batch: for each sample, which one's map it gets: `[1, 0]` exchanges two.

    Raises:
        ArgumentError: it is no list of ints, nor a tensor of these.
        EditError: when the model runs: the batch has another number of samples.
    """
    order = torch.as_tensor(batch)
    if order.dim() != 1 or not len(order) or order.is_floating_point() or order.dtype is torch.bool:
        raise ArgumentError(f"swap takes an int for each sample, not {batch!r}")

    def edit(fm: FeatureMap) -> Tensor:
        samples = fm.shape[0] if fm.tensor.dim() else 0
        if len(order) != samples or int(order.max()) >= samples or int(order.min()) < -samples:
            raise EditError(
                f"swap({order.tolist()}) does not fit the {samples} samples of {_name(fm)}",
                **tags(fm),
            )
        return fm.tensor[order.to(fm.device)]

    return edit


def _name(fm: FeatureMap) -> str:
    return f"the {fm.kind} of layer {fm.layer!r}, of shape {tuple(fm.shape)},"


def _fitted(value: Tensor | float, fm: FeatureMap) -> Tensor:
    """The value in the map's dtype and on its device, so that torch broadcasts it as is meant."""
    if isinstance(value, Tensor):
        fraction = value.is_floating_point()
    else:
        fraction = isinstance(value, float) and not value.is_integer()
    if fraction and not (fm.dtype.is_floating_point or fm.dtype.is_complex):
        raise EditError(
            f"a value with a fraction would be cut to the {fm.dtype} of {_name(fm)[:-1]}",
            **tags(fm),
        )
    other = torch.as_tensor(value, dtype=fm.dtype, device=fm.device)
    if other.dim() == 1 and fm.tensor.dim() > 1:
        axis = _axis(fm, len(other), "a vector")
        other = other.reshape(-1, *[1] * (fm.tensor.dim() - axis - 1))
    try:
        other.expand(fm.shape)
    except RuntimeError:
        raise EditError(
            f"a value of shape {tuple(other.shape)} does not fit {_name(fm)[:-1]}", **tags(fm)
        ) from None
    return other


def _axis(fm: FeatureMap, count: int, what: str) -> int:
    """The axis of filters, along which a vector lies.

    Where the data does not tell, it is the last axis, as torch broadcasts, if it alone fits.
    """
    shape = tuple(fm.shape)
    if fm.filter_dim is not None:
        if shape[fm.filter_dim] != count:
            raise EditError(
                f"{what} of {count} values has one for each filter, and {_name(fm)} has "
                f"{shape[fm.filter_dim]} filters along axis {fm.filter_dim}",
                **tags(fm),
            )
        return fm.filter_dim
    last = len(shape) - 1
    if shape and shape[last] == count and count not in shape[1:last]:
        return last
    raise EditError(
        f"{what} of {count} values lies along the axis of filters, and of {_name(fm)} the data "
        "does not tell which axis that is: say it with edits.Where(..., filter_axis=-1)",
        **tags(fm),
    )
