"""Grad-CAM: where the maps of a layer speak for an output of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit.errors import ArgumentError
from fmapkit.explain._locations import has_samples, input_axes, map_axes, no_locations
from fmapkit.explain._passes import WantedMap, differentiating, eager, first_tensor
from fmapkit.kinds import Kind
from fmapkit.model import run, tensors_in
from fmapkit.readable import tags

Target = int | Tensor | Callable[[Any], Tensor]


def grad_cam(
    model: nn.Module,
    inputs: Any,
    layer: Any,
    target: Target,
    *,
    relu: bool = True,
    upsample: bool = False,
    kind: Kind | None = None,
    call: int | None = None,
    path: str | None = None,
    axes: int | tuple[int, ...] | None = None,
) -> Tensor:
    """The maps of a layer, summed: each by the mean gradient of an output with respect to it.

    Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization" (2017), equations 1 and 2.

    Args:
        model: any `nn.Module`, run as it is, in its own mode. Nothing is left on it: no gradients
            of parameters, and buffers and the random state are put back.
        inputs: the model's argument, a tuple of its arguments, or a dict of those by name.
        layer: whose maps: a name, module, or whatever else `maps.select(layer=)` takes that means
            one.
        target: which output: the index of a class, along the last axis of the first tensor that the
            model returns, (…, classes) with three axes at most; a tensor with an index for each
            sample; or a function of what the model returns that gives a number, or one for each
            sample.
        relu: keep what speaks for the output only, as in the paper.
        upsample: bilinear, to the locations of the input, for an image.
        kind: of the map; by default the activation, or the preactivation where no nonlinearity
            follows, or what a module returns that is no layer with filters.
        call: which call of the layer, where it has several.
        path: place in a nested output.
        axes: which axes of the input are its locations (see `receptive_field`).

    Returns:
        Of each sample, a number for each location of the map: (N, H', W'), or (N, H, W).

    Raises:
        NotAModuleError: `model` is no module.
        ArgumentError: an argument cannot be meant, or the output does not depend on the map.
        MapLookupError: there is no such map, or there are several.
    """
    model = eager(model, "grad_cam")
    tensor = first_tensor(inputs, "grad_cam")
    along = input_axes(tensor, axes)
    wanted = WantedMap(layer, kind, call, path)
    with differentiating(model, inputs, tensor) as (x, given):
        by = [x] if x.requires_grad else [p for p in model.parameters() if p.requires_grad]
        with wanted.capture(model, gradients=True) as maps:
            score = _score(run(model, given), target)
            fm = wanted.among(maps)
            if not by or not score.requires_grad:
                raise ArgumentError(
                    "the model's output depends on nothing that takes a gradient: the model "
                    "detaches it, runs without gradients, or is frozen and "
                    "has token numbers for an input"
                )
            torch.autograd.grad(score, by, allow_unused=True)
            gradient = fm.grad
    if gradient is None:
        raise ArgumentError(
            f"no gradient of the output gets to the {fm.kind} of layer {fm.layer!r}: the layer "
            "comes after what was asked for, or the model detaches what it makes",
            **tags(fm),
        )
    where = map_axes(fm, tensor, along)
    if not where:
        raise no_locations(fm)
    many = has_samples(fm, along)
    weights = gradient.mean(where, keepdim=True)
    others = [a for a in range(fm.tensor.dim()) if a not in where and (a or not many)]
    cam = weights * fm.tensor.detach()
    cam = cam.sum(others) if others else cam
    cam = F.relu(cam) if relu else cam
    return _upsampled(cam, tensor, along) if upsample else cam


def _score(output: Any, target: Target) -> Tensor:
    """What is differentiated: the sum over samples, none of which is in another's score."""
    if callable(target) and not isinstance(target, Tensor):
        score = target(output)
        if not isinstance(score, Tensor) or score.dim() > 1:
            found = (
                f"one of shape {tuple(score.shape)}" if isinstance(score, Tensor) else repr(score)
            )
            raise ArgumentError(
                f"target= must give a number, or one for each sample, as a tensor, not {found}"
            )
        return score.sum()
    logits = next(iter(tensors_in(output)), None)
    if logits is None or logits.dim() == 0 or not logits.is_floating_point():
        raise ArgumentError(
            f"the model returned {type(output).__name__}, in which no class can be chosen: give "
            "target= a function of it"
        )
    if logits.dim() > 3:
        raise ArgumentError(
            f"the model returned a tensor of shape {tuple(logits.shape)}, of which classes may lie "
            "along another axis than the last one: give target= a function of it, such as "
            "lambda output: output[:, 3].sum((1, 2))"
        )
    classes = logits.shape[-1]
    index = torch.as_tensor(target, device=logits.device)
    fits = index.dim() == 0 or index.shape == logits.shape[:-1]
    whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if not whole or not fits or bool(((index < -classes) | (index >= classes)).any()):
        raise ArgumentError(
            f"target must be a class, or one for each sample, of the {classes} in an output of "
            f"shape {tuple(logits.shape)}, not {target!r}"
        )
    index = (index % classes).expand(logits.shape[:-1])
    return logits.gather(-1, index.unsqueeze(-1)).sum()


def _upsampled(cam: Tensor, tensor: Tensor, along: tuple[int, ...]) -> Tensor:
    size = tuple(tensor.shape[a] for a in along)
    if len(size) != 2 or cam.dim() not in (2, 3):
        raise ArgumentError(
            f"upsample=True is for maps of an image, and these have shape {tuple(cam.shape)} over "
            f"an input with locations {size}"
        )
    flat = cam.reshape(1, -1, *cam.shape[-2:])
    wide = F.interpolate(flat, size, mode="bilinear", align_corners=False)
    return wide.reshape(*cam.shape[:-2], *size)
