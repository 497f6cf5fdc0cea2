"""`feature_map`: the function φ from a model's inputs to its features, as an `nn.Module`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fmapkit.errors import (
    ArgumentError,
    FilterRangeError,
    check_choice,
    check_module,
    did_you_mean,
    listed,
)
from fmapkit.kinds import Kind
from fmapkit.map import FeatureMap
from fmapkit.model import run
from fmapkit.phi._calls import Calls
from fmapkit.phi._compiled import opaque
from fmapkit.phi._features import one, rows, sklearn_needed
from fmapkit.phi._reader import Found
from fmapkit.phi._request import Request
from fmapkit.readable import tags
from fmapkit.torchlib.compiled_modules import compiled_by, ever_compiled

if TYPE_CHECKING:
    from fmapkit.phi.transformer import FeatureTransformer

Features = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
Pool = str | Callable[[Tensor], Tensor] | None
_POOLS = ("mean", "max", "flatten", "token")


class FeatureFunction(nn.Module):
    """φ: from the inputs of a model to what one or several of its layers make of them.

    Made by `feature_map`, which says what the arguments mean. A call takes what a call of the model
    takes. The model is not copied: it is the submodule `model`, whose parameters, mode and device
    are those of φ, and between calls nothing is set on it.

    Attributes:
        model: the model, as it was given.
        pool: as it was given.
    """

    def __init__(self, model: nn.Module, asked: Request, pool: Pool) -> None:
        super().__init__()
        self._asked = asked
        self._calls = Calls()
        self.pool = _checked(pool)
        self._calls.reader(model, self._asked)  # what cannot be meant is said now
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The features of what the model is given.

        Returns:
            A tensor; a tuple or a dict of tensors where several layers were asked for.

        Raises:
            MapLookupError: a layer has no such map in this pass, or several.
            MapStateError: the pass could not be captured.
            CaptureStateError: a backward pass runs, or a capture with an edit is open.
        """
        # Torch's context of backend, mode and options, if it compiled the code that called us.
        context = compiled_by() if ever_compiled() else None
        if context is None:
            return self._features(self._calls(self.model, self._asked, args, kwargs))
        alone: Any = torch.compiler.disable(self._compiled)  # type: ignore[no-untyped-call]
        return alone(context, args, kwargs)

    opaque(forward)

    def _compiled(self, context: Any, args: Any, kwargs: Any) -> Features:
        return self._features(self._calls.compiled(self.model, self._asked, context, args, kwargs))

    def _features(self, found: Found) -> Features:
        filters_of, pool = self._asked.filters_of, self.pool
        features = [_pooled(fm, _picked(fm, filters_of(fm.layer)), pool) for _, fm in found]
        if self._asked.form == "dict":
            return dict(zip([key for key, _ in found], features, strict=True))
        return features[0] if self._asked.form == "one" else tuple(features)

    @property
    def layers(self) -> list[str]:
        """The names of what φ returns, in order; empty before the first call where it picks them.

        Keys of a dict; else the layers' names, with the kind of one that is there several times.
        """
        return self._calls.reader(self.model, self._asked).keys

    def kernel(
        self,
        x: Any,
        y: Any = None,
        *,
        kind: Literal["linear", "cosine", "rbf"] = "linear",
        centred: bool = False,
        gamma: float | None = None,
    ) -> Tensor:
        """The kernel that φ carries: ⟨φ(x), φ(y)⟩ for each pair of samples; differentiable.

        Args:
            x: what the model is given: a tensor, a tuple of arguments or a dict of keywords.
            y: the same; None for x.
            kind: "linear": the inner product. "cosine": that of features of length 1. "rbf":
                exp(-gamma·|φ(x) - φ(y)|²).
            centred: at the mean of φ(x), in the space of the kernel: of x with itself, H·K·H.
            gamma: of the RBF; None for 1 / the number of features.

        Returns:
            (N of x, N of y), in float32 at least. Features with more axes are flattened.

        Raises:
            ArgumentError: φ is of several layers, or an argument is outside what is allowed.
        """
        a = rows(one(run(self, x), "kernel"))
        b = None if y is None else rows(one(run(self, y), "kernel"))
        check_choice(("linear", "cosine", "rbf"), kind=kind)
        if gamma is not None and (kind != "rbf" or not gamma > 0):
            raise ArgumentError(
                f"gamma must be a positive number, and goes with kind='rbf': {gamma!r}"
            )
        if kind == "linear" and centred:  # at the mean of the features: fewer digits are lost
            mean = a.mean(0)
            return (a - mean) @ (a - mean if b is None else b - mean).T
        gram = _gram(a, a if b is None else b, kind, gamma)
        if not centred:
            return gram
        own = gram if b is None else _gram(a, a, kind, gamma)
        return gram - gram.mean(0) - own.mean(1, keepdim=True) + own.mean()

    def transformer(
        self, *, shape: Sequence[int] | None = None, batch_size: int = 64
    ) -> FeatureTransformer:
        """φ as a transformer of scikit-learn's, for pipelines (extra: `sklearn`).

        Args:
            shape: of one sample as the model takes it, where rows of a table come in; None to
                leave it.
            batch_size: samples of one call.

        Raises:
            ImportError: scikit-learn is not installed.
            ArgumentError: an argument is outside what is allowed.
        """
        sklearn_needed()
        from fmapkit.phi.transformer import FeatureTransformer

        return FeatureTransformer(self, shape, batch_size)

    def extra_repr(self) -> str:
        """What is read of the model."""
        return str(self._asked)


def feature_map(
    model: nn.Module,
    layers: Any,
    *,
    kind: Kind | None = None,
    filters: int | Iterable[int] | Mapping[str, int | Iterable[int]] | None = None,
    pool: Pool = None,
    call: int | None = None,
    path: str | None = None,
) -> FeatureFunction:
    """The feature map φ of a model as a function: from its inputs to the features of a layer.

    ```python
    phi = feature_map(model, "layer3", pool="mean")
    features = phi(images)                             # (N, d), differentiable
    probe = nn.Sequential(phi, nn.Linear(256, 10))     # f∘φ
    ```

    φ is an `nn.Module` that takes what the model takes. It runs the model up to the last layer that
    was asked for, and returns the maps as they were made, in the autograd graph. The model is not
    copied, and between two calls nothing is set on it. In the first call the model runs to its end,
    to show which maps there are; so it does where it is compiled or exchanges data with other
    ranks, and where another capture is open that sees the pass.

    Under `torch.no_grad()`, autocast and the transforms of `torch.func`, φ does what the model
    does. For several ranks, wrap φ, not the model: `DistributedDataParallel(phi)`.

    `torch.compile(phi)` compiles the model, with the backend, mode and options that were asked for.
    Where modules' outputs are asked for, the graph ends with the last of them, and the first call
    runs eagerly; of other maps, the model runs to its end; where both are, it runs eagerly.

    Args:
        model: any `nn.Module`.
        layers: a name or a module: φ returns a tensor. A list or tuple of these: a tuple. A dict of
            key -> one of these: a dict. A glob, regex, module type or callable: a dict by layer.
            In a list or dict, (layer, kind) in the place of a layer has a kind of its own.
        kind: "input", "response", "preactivation", "activation" or "output". None: what
            `maps[layer]` is, the activation, or where a module has none and is no layer with
            filters (a block), what it returns.
        filters: return these filters only: an int, several, or a dict of layer -> these.
        pool: one vector for each sample: "mean" or "max" over all axes but those of samples and
            filters, "flatten", "token" (the first one of (samples, tokens, features)), or a
            function of the tensor; an `nn.Module` is a part of φ and may have parameters.
        call: which call of the layer, where a pass has several.
        path: which tensor of an output with several, such as "[0]" or ".logits".

    Raises:
        NotAModuleError: `model` is no `nn.Module`.
        ArgumentError: another argument is outside what is allowed.
        UnknownLayerError: a selector matches nothing in the model.
        FilterRangeError: a layer of torch's own has no such filter.
    """
    check_module("feature_map", model)
    return FeatureFunction(model, Request.of(layers, kind, filters, call, path), pool)


def _gram(x: Tensor, y: Tensor, kind: str, gamma: float | None) -> Tensor:
    if kind == "rbf":
        # By differences: |x|² + |y|² - 2xy would lose what is near.
        distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return (-(1 / x.shape[1] if gamma is None else gamma) * distances.square()).exp()
    if kind == "cosine":
        x, y = torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)
    return x @ y.T


# -- from a feature map to a feature vector --------------------------------------------------------


def _checked(pool: Any) -> Pool:
    """A way to pool, if it is of an allowed form."""
    if pool is None or pool in _POOLS or (callable(pool) and not isinstance(pool, type)):
        return pool  # type: ignore[no-any-return]
    hint = did_you_mean(pool, _POOLS)
    raise ArgumentError(
        f"pool must be one of {listed(_POOLS)}, a function or None, not {pool!r}{hint}",
        candidates=_POOLS,
    )


def _picked(fm: FeatureMap, filters: tuple[int, ...] | None) -> Tensor:
    """The map's tensor, or some filters of it, along the axis where they lie."""
    if filters is None:
        return fm.tensor
    if fm.filters is None or fm.filter_dim is None:
        raise ArgumentError(
            f"filters= was given, and the {fm.kind} of layer {fm.layer!r} has no single filter "
            "axis",
            **tags(fm),
        )
    there = list(fm.filters)
    places = []
    for wanted in filters:
        index = wanted if wanted >= 0 else there[-1] + 1 + wanted
        if index not in there:
            raise FilterRangeError(
                f"filters={wanted} is out of range for the {fm.kind} of layer {fm.layer!r}, which "
                f"has {len(there)} filters ({there[0]} to {there[-1]})",
                filter=wanted,
                candidates=there,
                **tags(fm),
            )
        places.append(there.index(index))
    # By slices: an index tensor would have to be sent to the device, which waits for it.
    pieces = [fm.tensor.narrow(fm.filter_dim, place, 1) for place in places]
    return torch.cat(pieces, fm.filter_dim)


def _pooled(fm: FeatureMap, tensor: Tensor, pool: Pool) -> Tensor:
    """One vector for each sample, if the map has axes for that."""
    if pool is None:
        return tensor
    if callable(pool):
        return pool(tensor)
    if pool == "flatten":
        return tensor.flatten(1)
    dim = fm.filter_dim
    if dim is None:
        if tensor.dim() <= 2:
            return tensor
        raise ArgumentError(
            f"pool={pool!r} needs to know which axis has the filters, and the {fm.kind} of layer "
            f"{fm.layer!r}, of shape {tuple(tensor.shape)}, has no single one; give a function",
            **tags(fm),
        )
    dim %= tensor.dim()
    if pool == "token":
        if tensor.dim() != 3 or dim != 2:
            raise ArgumentError(
                f"pool='token' takes the first token of (samples, tokens, features), and the "
                f"{fm.kind} of layer {fm.layer!r} has shape {tuple(tensor.shape)} with its filters "
                f"along axis {dim}; give a function",
                **tags(fm),
            )
        return tensor[:, 0]
    # Filters on axis 0 are those of an input without a batch axis.
    others = [d for d in range(tensor.dim()) if d != dim and (d > 0 or dim == 0)]
    if not others:
        return tensor
    return tensor.mean(others) if pool == "mean" else tensor.amax(others)
