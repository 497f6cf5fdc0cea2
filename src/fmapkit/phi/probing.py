"""Probes: what a simple estimator reads out of each layer (extra: `sklearn`).

Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (2016).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fmapkit.errors import ArgumentError, check_positive
from fmapkit.phi._features import axes_by_layer, gathered, sklearn_needed
from fmapkit.tables import Shown, Table
from fmapkit.torchlib.memory import as_numpy
from fmapkit.torchlib.operators import tree_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fmapkit.phi.function import FeatureFunction

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Probe(Shown):
    """What was read out of each layer.

    Attributes:
        layers: in the order of φ.
        scores: (layers, folds): on the samples that the estimator did not see.
        features: how many there are of each layer.
        scoring: what a score is.
        chance: the accuracy of always saying the most frequent label; None of other scores.
        estimators: by layer, fitted on all samples.
    """

    layers: tuple[str, ...]
    scores: Array
    features: tuple[int, ...]
    scoring: str
    chance: float | None
    estimators: dict[str, Any]

    @property
    def mean(self) -> Array:
        """Of the folds' scores: (layers,)."""
        return np.asarray(self.scores.mean(1))

    @property
    def std(self) -> Array:
        """Of the folds' scores, as of a sample: (layers,); NaN of one fold."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.scores.std(1, ddof=1) if self.scores.shape[1] > 1 else self.mean * np.nan

    @property
    def best(self) -> str:
        """The layer with the highest mean."""
        return self.layers[int(self.mean.argmax())]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: str) -> Array:
        """The scores of one layer, fold by fold.

        Raises:
            KeyError: there is no such layer.
        """
        if layer not in self.layers:
            raise KeyError(layer)
        return np.asarray(self.scores[self.layers.index(layer)])

    def _table(self) -> Table:
        heads = ("layer", "features", "mean", "std", "least", "most")
        body = [
            (
                layer or "(model)",
                str(self.features[i]),
                *(f"{v:.3f}" for v in (self.mean[i], self.std[i], row.min(), row.max())),
            )
            for i, (layer, row) in enumerate(zip(self.layers, self.scores, strict=True))
        ]
        chance = f", {self.chance:.3f} by chance" if self.chance is not None else ""
        last = f"Probe: {self.scoring} over {self.scores.shape[1]} folds{chance}"
        return Table(heads, body, range(1, len(heads)), last)

    def plot(self, ax: Axes | None = None, *, title: str | None = None) -> Figure:
        """Draw the score by layer, the folds as points (extra: `plot`).

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure, ax = axes_by_layer(ax, self.layers)
        at = np.arange(len(self))
        for fold in self.scores.T:
            ax.plot(at, fold, "o", color="0.6", markersize=3, zorder=1)
        ax.plot(at, self.mean, "o-", color="#b11226", zorder=2)
        if self.chance is not None:
            ax.axhline(self.chance, color="0.5", linestyle=":", linewidth=1)
            right: dict[str, Any] = {"ha": "right", "va": "bottom", "fontsize": "small"}
            ax.text(len(self) - 0.6, self.chance, "chance", **right)
        ax.set_ylabel(self.scoring)
        folds = f"read out by a probe, {self.scores.shape[1]} folds"
        ax.set_title(title or folds, loc="left", fontsize="medium")
        return figure


def probe(
    phi: FeatureFunction,
    data: Any,
    labels: Any = None,
    *,
    estimator: Any = None,
    cv: Any = 5,
    scoring: Any = None,
    batch_size: int = 64,
) -> Probe:
    """Fit an estimator on the features of each layer, and score it by cross-validation.

    The model runs in eval mode, without gradients, once over the data; the features of all samples
    are held in memory, so pool large maps (`feature_map(..., pool="mean")`). All layers have the
    same folds.

    Args:
        phi: of one layer or several.
        data: a tensor of all inputs, or batches of inputs (a loader); without `labels`, batches of
            (inputs, labels). An input of several arguments is a tuple of tensors, or a dict of
            keywords.
        labels: (N,), in the order of the data.
        estimator: of scikit-learn's, cloned for each layer; None for a logistic regression on
            standardised features, and for labels that are floating-point numbers a ridge
            regression on these.
        cv: folds, as scikit-learn takes them.
        scoring: as scikit-learn takes it; None for the estimator's own: accuracy, or R².
        batch_size: samples of one call, where `data` is a tensor.

    Raises:
        ImportError: scikit-learn is not installed.
        ArgumentError: there are no data, or not as many labels as samples, or features of a layer
            are not finite.
    """
    sklearn_needed()
    from sklearn.base import clone, is_classifier
    from sklearn.model_selection import check_cv, cross_val_score

    features, y = _collect(phi, data, labels, batch_size)
    model = estimator if estimator is not None else _default(y)
    folds = check_cv(cv, y, classifier=is_classifier(model))
    splits = list(folds.split(np.zeros(len(y)), y))
    scores = [
        cross_val_score(clone(model), x, y, cv=splits, scoring=scoring) for x in features.values()
    ]
    accuracy = is_classifier(model) and scoring in (None, "accuracy")
    chance = float(np.unique(y, return_counts=True)[1].max() / len(y)) if accuracy else None
    own = "accuracy" if is_classifier(model) else "R²"
    name = own if scoring is None else str(getattr(scoring, "__name__", scoring))
    return Probe(
        layers=tuple(features),
        scores=np.stack(scores),
        features=tuple(x.shape[1] for x in features.values()),
        scoring=name,
        chance=chance,
        estimators={layer: clone(model).fit(x, y) for layer, x in features.items()},
    )


def _default(y: Array) -> Any:
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if np.issubdtype(y.dtype, np.floating):
        return make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 3, 7)))
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def _collect(
    phi: FeatureFunction, data: Any, labels: Any, batch_size: int
) -> tuple[dict[str, Array], Array]:
    """The features of all samples by layer, and their labels."""
    check_positive(batch_size=batch_size)
    seen: list[Any] = []
    first = next(phi.parameters(), None)

    def moved(value: Any) -> Any:
        return value.to(first.device) if first is not None and isinstance(value, Tensor) else value

    batches = _batches(data, labels is None, seen, batch_size)
    found = gathered(phi, (tree_map(moved, inputs) for inputs in batches))
    if not found:
        raise ArgumentError("probe needs data, and there are none")
    features = {layer: x.numpy() for layer, x in found.items()}
    y = np.concatenate([_array(part) for part in (seen if labels is None else [labels])])
    for layer, matrix in features.items():
        if len(matrix) != len(y):
            raise ArgumentError(
                f"probe has {len(y)} labels, and {len(matrix)} samples of layer {layer!r}",
                layer=layer,
            )
    return features, y


def _batches(data: Any, labelled: bool, labels: list[Any], batch_size: int) -> Iterator[Any]:
    """The inputs of each batch; labels that come with it go into the list."""
    if isinstance(data, Tensor):
        if labelled:
            raise ArgumentError("probe of a tensor of inputs needs labels=")
        yield from torch.split(data, batch_size)
        return
    if not isinstance(data, Iterable):
        raise ArgumentError(
            f"data must be a tensor of inputs or batches of them, not {type(data).__name__}"
        )
    for batch in data:
        if not labelled:
            yield batch
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            labels.append(batch[1])
            yield batch[0]
        else:
            raise ArgumentError(
                "without labels=, each batch is a pair (inputs, labels), and this one is "
                f"{type(batch).__name__}"
                + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
            )


def _array(labels: Any) -> Array:
    found = as_numpy(labels) if isinstance(labels, Tensor) else np.asarray(labels)
    if found.ndim != 1:
        raise ArgumentError(f"labels must be one for each sample, not of shape {found.shape}")
    return found
