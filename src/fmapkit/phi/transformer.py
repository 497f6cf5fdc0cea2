"""φ as a transformer of scikit-learn's; importing this module imports scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from torch import nn

from fmapkit.errors import ArgumentError, check_positive
from fmapkit.phi._features import evaluating, one, rows


class FeatureTransformer(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """φ in a pipeline: from an array of inputs to one of features. Made by `phi.transformer()`.

    There is nothing to fit. The model runs in eval mode, without gradients; its own modes are as
    they were afterwards. A clone (cross-validation makes them) has the same φ, not a copy of it.

    Args:
        phi: a `FeatureFunction` of one layer.
        shape: of one sample as the model takes it; None to leave the arrays as they are.
        batch_size: samples of one call.
    """

    def __init__(
        self, phi: nn.Module, shape: Sequence[int] | None = None, batch_size: int = 64
    ) -> None:
        check_positive(batch_size=batch_size)
        self.phi = phi
        self.shape = shape
        self.batch_size = batch_size

    def __sklearn_clone__(self) -> FeatureTransformer:
        return FeatureTransformer(self.phi, self.shape, self.batch_size)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, X: Any, y: Any = None) -> FeatureTransformer:  # noqa: N803
        """Nothing is learned."""
        return self

    def transform(self, X: Any) -> np.ndarray[Any, Any]:  # noqa: N803
        """The features of samples.

        Args:
            X: (N, …): an array or a tensor.

        Returns:
            (N, d) in float32 at least.

        Raises:
            ArgumentError: the samples do not have as many values as `shape` says.
        """
        inputs = torch.as_tensor(np.asarray(X) if not isinstance(X, torch.Tensor) else X)
        first = next(self.phi.parameters(), None)
        if first is not None:
            inputs = inputs.to(first.device)
            if inputs.is_floating_point():
                inputs = inputs.to(first.dtype)
        if self.shape is not None:
            shape = tuple(self.shape)
            if inputs[:1].numel() != int(np.prod(shape)) * len(inputs[:1]):
                raise ArgumentError(
                    f"samples of shape {tuple(inputs.shape[1:])} cannot be given as {shape}"
                )
            inputs = inputs.reshape(len(inputs), *shape)
        with evaluating(self.phi), torch.no_grad():
            parts = [
                rows(one(self.phi(part), "a transformer")).cpu()
                for part in torch.split(inputs, self.batch_size)
            ]
        return torch.cat(parts).numpy()
