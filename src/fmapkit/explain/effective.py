"""The effective receptive field: how much each location of the input matters to one of a map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.explain._axes import has_samples, input_axes, map_axes, no_locations
from fmapkit.explain._locations import At, chosen
from fmapkit.explain._passes import WantedMap, eager, exchanged, kept_state, run
from fmapkit.explain.projection import differentiable, gradient_of
from fmapkit.kinds import Kind


def effective_field(
    model: nn.Module,
    layer: Any,
    inputs: Any,
    *,
    at: At = None,
    filter: int | None = None,
    kind: Kind | None = None,
    call: int | None = None,
    path: str | None = None,
    axes: int | tuple[int, ...] | None = None,
) -> Tensor:
    """How much each location of the input matters to a location of a map, in the mean over inputs.

    Luo, Li, Urtasun & Zemel, "Understanding the Effective Receptive Field in Deep Convolutional
    Neural Networks" (2016): the gradient of the location, its absolute value, in the mean over
    samples, summed over the channels of the input. The theoretical field (`receptive_field`) says
    where it can be other than zero.

    Args:
        model: any `nn.Module`, run as it is. Nothing is left on it.
        layer: whose map: a name, module, or whatever else `maps.select(layer=)` takes that means
            one.
        inputs: what the model is given, as in `receptive_field`: many samples, drawn from data or
            at random, since the gradient of one is noise.
        at: the location; by default the middle of the map.
        filter: one filter; by default the sum of all.
        kind: of the map, as in `receptive_field`.
        call: which call of the layer, where it has several.
        path: place in a nested output.
        axes: which axes of the input are its locations.

    Returns:
        (H, W), or along whatever axes of locations the input has.

    Raises:
        NotAModuleError: `model` is no module.
        ArgumentError: the input is not differentiable (tokens), or an argument cannot be meant.
        MapLookupError: there is no such map, or there are several.
    """
    model = eager(model, "effective_field")
    tensor = differentiable(inputs, "effective_field")
    along = input_axes(tensor, axes)
    wanted = WantedMap(layer, kind, call, path)
    with kept_state(model), torch.inference_mode(False), torch.enable_grad():
        x = tensor.detach().clone().requires_grad_()
        with wanted.capture(model, detach=False) as maps:
            run(model, exchanged(inputs, tensor, x))
            fm = wanted.among(maps)
            if at is None:
                where = map_axes(fm, tensor, along)
                if not where:
                    raise no_locations(fm)
                at = tuple(fm.shape[a] // 2 for a in where)
            signal = chosen(fm, tensor, along, filter, at).to(fm.dtype)
            found = gradient_of(fm, fm.tensor, x, signal).abs()
    many = has_samples(fm, along)
    channels = [a for a in range(found.dim()) if a not in along and (a or not many)]
    found = found.sum(channels, keepdim=True) if channels else found
    others = [a for a in range(found.dim()) if a not in along]
    return found.mean(others) if others else found
