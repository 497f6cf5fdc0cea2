"""Losses on features of several layers: perceptual and style.

```python
phi = feature_map(vgg, ["features.3", "features.8", "features.15"])
loss = perceptual_loss(phi(image), phi(content)) + style_loss(phi(image), phi(style))
```

Both are those of Johnson, Alahi and Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and
Super-Resolution" (2016), section 3; the style loss is that of Gatys, Ecker and Bethge (2016).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmapkit.errors import ArgumentError
from fmapkit.phi._features import named


def perceptual_loss(
    features: Any, target: Any, *, weights: Sequence[float] | Mapping[str, float] | None = None
) -> Tensor:
    """How far features are from others: the mean of squared differences, summed over layers.

    Args:
        features: what φ returned: a tensor, a tuple or a dict of tensors.
        target: what φ returned of what is aimed at; no gradient flows into it.
        weights: of the layers, in order or by key; None for 1 each.

    Returns:
        A scalar.

    Raises:
        ArgumentError: the two are not of the same layers and shapes, or the weights not of these.
    """
    pairs = _pairs(features, target, weights)
    return torch.stack([w * F.mse_loss(x, y.detach()) for w, x, y in pairs]).sum()


def style_loss(
    features: Any, target: Any, *, weights: Sequence[float] | Mapping[str, float] | None = None
) -> Tensor:
    """How far the Gram matrices of features are from others: their squared distance, by layer.

    The mean over samples of the squared Frobenius norm of the difference (see `gram`), summed over
    layers. A target of one sample is the style of each.

    Args:
        features: what φ returned: maps (N, C, …) with a filter axis at 1.
        target: what φ returned of what has the style; no gradient flows into it. Its maps may
            have other sizes beyond C.
        weights: of the layers, in order or by key; None for 1 each.

    Returns:
        A scalar.

    Raises:
        ArgumentError: the two are not of the same layers and filters.
    """
    pairs = _pairs(features, target, weights, sizes=False)
    apart = [w * (gram(x) - gram(y.detach())).square().sum((1, 2)).mean() for w, x, y in pairs]
    return torch.stack(apart).sum()


def gram(features: Tensor) -> Tensor:
    """The Gram matrix of each sample's filters: (N, C, C) of a map (N, C, …), over C·H·W.

    Raises:
        ArgumentError: the map has no axes beyond that of filters.
    """
    if features.dim() < 3:
        raise ArgumentError(
            f"a Gram matrix is of maps (N, C, …), and these features have shape "
            f"{tuple(features.shape)}; leave out pool="
        )
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / (flat.shape[1] * flat.shape[2])


def _pairs(
    features: Any, target: Any, weights: Any, sizes: bool = True
) -> list[tuple[float, Tensor, Tensor]]:
    """(weight, features, target) of each layer."""
    mine, theirs = named(count(), features), named(count(), target)
    if mine.keys() != theirs.keys():
        raise ArgumentError(
            f"features are of the layers {list(mine)}, and the target's of {list(theirs)}"
        )
    for key, x in mine.items():
        y = theirs[key]
        same = x.shape == y.shape if sizes else x.shape[1:2] == y.shape[1:2]
        if not same or not (sizes or len(y) in (1, len(x))):
            raise ArgumentError(
                f"features of layer {key!r} have shape {tuple(x.shape)}, and the target's "
                f"{tuple(y.shape)}",
                layer=key if isinstance(key, str) else None,
            )
    given = weights if weights is not None else [1.0] * len(mine)
    by_key = dict(given) if isinstance(given, Mapping) else dict(zip(mine, given, strict=False))
    if by_key.keys() != mine.keys() or len(given) != len(mine):
        raise ArgumentError(f"weights must be one for each of {list(mine)}, not {weights!r}")
    return [(by_key[key], x, theirs[key]) for key, x in mine.items()]
