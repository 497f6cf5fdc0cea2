"""Inputs that an analysis has numbers of: taken from a data set, and what of them a map sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from fmapkit.errors import ArgumentError
from fmapkit.kinds import Kind

if TYPE_CHECKING:
    from fmapkit.explain import ReceptiveField


def fields_for(
    layer: str, kind: str, path: str, model: nn.Module | None, given: ReceptiveField | None
) -> Callable[[Tensor], ReceptiveField]:
    """What tells the receptive fields of a layer's map for an image (channels, rows, columns).

    They are the given ones, of images of one size, or the model's, of images of each size.
    """
    if (model is None) == (given is None):
        raise ArgumentError(
            "which pixels a location sees is told by model=, the one that was captured, or by "
            "field=, what fmapkit.explain.receptive_field gave: give one of them"
        )
    known: dict[tuple[int, ...], ReceptiveField] = {}

    def fields(image: Tensor) -> ReceptiveField:
        if given is not None:
            if tuple(given.input_shape) != tuple(image.shape[1:]):
                raise ArgumentError(
                    f"field= is of images of {tuple(given.input_shape)} pixels, and the data set "
                    f"has one of {tuple(image.shape[1:])}; model= finds the field of each size"
                )
            return given
        size = tuple(image.shape)
        if size not in known:
            from fmapkit.explain import receptive_field

            assert model is not None
            first = next(model.parameters(), image)
            example = image.unsqueeze(0).to(first.device)
            if example.is_floating_point() and first.is_floating_point():
                example = example.to(first.dtype)
            its = cast("Kind", kind)
            known[size] = receptive_field(model, layer, example, kind=its, path=path or None)
        return known[size]

    return fields


def image_of(dataset: Any, number: int, take: Callable[[Any], Any] | None) -> Tensor:
    """An image of a data set by its number, (channels, rows, columns).

    Args:
        take: what to take of that; None for the first tensor or sequence in it.
    """
    found = _taken(dataset, number, take)
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        said = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ArgumentError(
            f"input {number} of the data set is {said}, not an image as a tensor (channels, "
            "rows, columns); image= takes a function that makes one of it, and of sequences "
            "there are contexts()"
        )
    return found if found.dim() == 3 else found.unsqueeze(0)


def sequence_of(dataset: Any, number: int, take: Callable[[Any], Any] | None) -> list[Any]:
    """A sequence of tokens of a data set; the arguments are those of `image_of`."""
    found = _taken(dataset, number, take)
    if isinstance(found, Tensor):
        found = found.flatten().tolist()
    if not isinstance(found, (list, tuple)):
        raise ArgumentError(
            f"input {number} of the data set is {type(found).__name__}, not a sequence of "
            "tokens; tokens= takes a function that makes one of it"
        )
    return list(found)


def _taken(dataset: Any, number: int, take: Callable[[Any], Any] | None) -> Any:
    try:
        sample = dataset[number]
    except (IndexError, KeyError) as error:
        size = f" (it has {len(dataset)})" if hasattr(dataset, "__len__") else ""
        raise ArgumentError(
            f"the data set has no input {number}{size}: the numbers are those that "
            "maps.batch(ids) gave, or count the inputs from 0 as they came"
        ) from error
    if take is not None:
        return take(sample)
    while isinstance(sample, (tuple, list, Mapping)) and sample:
        first = next(iter(sample.values() if isinstance(sample, Mapping) else sample))
        if isinstance(first, (int, float)):
            break
        sample = first
    return sample
