"""`patch`: run a model many times, each time with one piece of another run's maps in its place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fmapkit._lazy import with_bar
from fmapkit.editing import Where
from fmapkit.errors import ArgumentError, check_choice, check_positive
from fmapkit.map import FeatureMap
from fmapkit.patching._edited_runs import Key, ModelInputs, PatchPiece, Runs, named
from fmapkit.patching._result import OTHER, Patching


def patch(
    model: nn.Module,
    clean: Any,
    corrupted: Any,
    metric: Callable[[Any], Any],
    *,
    layers: Any,
    kind: str = "output",
    positions: Literal["each"] | Iterable[Any] | None = None,
    filters: Iterable[int | Iterable[int]] | None = None,
    path: str | None = None,
    into: Literal["corrupted", "clean"] = "corrupted",
    edit: Mapping[Any, Callable[[FeatureMap], Tensor]] | None = None,
    of: Any = None,
    batch_size: int = 1,
    filter_axis: int | None = None,
    progress: bool = True,
) -> Patching:
    """Put maps of one run into another run, one piece at a time, and measure what that changes.

    Each piece is a layer's map, at one position if positions are given, of one group of filters if
    those are. The model runs twice to make the maps and the metrics to compare with, and once for
    each piece. Activation patching: Vig et al., "Investigating Gender Bias in Language Models Using
    Causal Mediation Analysis" (2020); Meng et al., "Locating and Editing Factual Associations in
    GPT" (2022), who call it causal tracing.

    ```python
    found = patch(model, clean, corrupted, metric, layers="transformer.h.*", positions="each")
    found.plot(positions=tokens)
    ```

    Args:
        model: in eval mode: with dropout, no two runs could be compared.
        clean: what the model is given in the clean run: a tensor, a tuple of arguments, or a dict
            of keyword arguments.
        corrupted: the same of the corrupted run: of the same shape, so that places agree.
        metric: gets what the model returned, and gives a number, or one for each sample.
        layers: which maps are patched, as in `capture(layers=...)`.
        kind: "input", "response", "preactivation", "activation" or "output" of these.
        positions: patch position by position: "each" of the tokens; or several of what
            `edits.Where(at=...)` takes, such as `[(y, x), ...]` of an image; None for whole maps.
        filters: patch group by group: ints, or ranges of filters, such as the slices of heads.
        path: which tensor of a nested output, as in `edits.Where(path=...)`.
        into: "corrupted" puts clean maps into the corrupted run, and asks what is enough to restore
            it; "clean" the other way, and asks what is needed.
        edit: edits that make the corrupted run corrupted, as in `capture(edit=...)`: noise on the
            embeddings, say, with the clean input given twice. Each run is one pass, of step 0.
        of: what the metric is of: a layer, or (layer, kind). The metric then gets that tensor, and
            the forward ends once it is there. None for what the model returns.
        batch_size: how many patched runs go into one forward, one after the other along the first
            axis. Results then differ in the last bits. A pass without patches is run so first, and
            compared with the plain one: a model that mixes samples is refused.
        filter_axis: as in `edits.Where`, where the data does not tell the axis of filters.
        progress: show a bar, where tqdm is installed and the output is a terminal.

    Returns:
        The metric of each patched run.

    Raises:
        ArgumentError: an argument cannot be meant, or the two runs have maps of other shapes.
        UnknownLayerError: a selector matches nothing in the model.
    """
    _check(model, metric, into, batch_size)
    given = {"clean": ModelInputs(clean, "clean"), "corrupted": ModelInputs(corrupted, "corrupted")}
    patched, source = into, OTHER[into]
    samples = given[patched].samples() if batch_size > 1 else 0
    edits = {"clean": None, "corrupted": edit}
    where = Where(layers, kind, path=path, filter_axis=filter_axis)
    runs = Runs(model, metric, where, of)
    with torch.no_grad():
        metrics = {source: runs.take(given[source], edits[source])}
        pieces, places, groups = _pieces_of(runs.maps, where, positions, filters)
        found: list[Tensor] = []
        with runs.patched(given[patched], edits[patched], samples) as run:
            [metrics[patched]] = run([None])
            if batch_size > 1:
                _check_copies(metrics[patched], run([None] * batch_size))
            for start in with_bar(range(0, len(pieces), batch_size), "patch", progress):
                found += run(pieces[start : start + batch_size])
    shape = [len(axis) for axis in (runs.maps, places, groups) if axis]
    return Patching(
        effect=torch.stack(found).cpu().reshape(*shape, *found[0].shape),
        clean=metrics["clean"].cpu(),
        corrupted=metrics["corrupted"].cpu(),
        layers=tuple(named(key, runs.maps) for key in runs.maps),
        positions=places,
        filters=groups,
        kind=kind,
        into=into,
    )


def _check(model: nn.Module, metric: Any, into: Any, batch_size: Any) -> None:
    check_choice(tuple(OTHER), into=into)
    if not callable(metric):
        raise ArgumentError(f"metric must be a function of what the model returns, not {metric!r}")
    check_positive(batch_size=batch_size)
    if isinstance(model, nn.Module) and model.training:
        raise ArgumentError(
            f"{type(model).__name__} is in training mode, in which two runs may differ by more "
            "than a patch (dropout, batch norm): call model.eval() first"
        )


def _check_copies(plain: Tensor, copies: Sequence[Tensor]) -> None:
    """Several copies in one batch have to do what one does, up to the order of sums."""
    close = torch.finfo(plain.dtype).eps ** 0.5
    for value in copies:
        same = value.shape == plain.shape
        if not same or not torch.allclose(value, plain, rtol=close, atol=close, equal_nan=True):
            raise ArgumentError(
                f"with batch_size={len(copies)}, the metric of a run without patches is "
                f"{value.tolist()}, and {plain.tolist()} when it runs alone: the model or the "
                "metric mixes samples of a batch; batch_size=1 runs each patch alone"
            )


# -- which pieces ----------------------------------------------------------------------------------


def _pieces_of(
    maps: Mapping[Key, FeatureMap], where: Where, positions: Any, filters: Any
) -> tuple[list[PatchPiece], tuple[Any, ...], tuple[Any, ...]]:
    """All pieces, in the order of the result: of each map each position, and of that each group.

    Beside them the positions, none for whole maps, and the groups of filters, none for all of them.
    """
    if isinstance(positions, str) and positions == "each":
        places = tuple(range(_count(maps, where)))
    else:
        places = _several(positions, "positions", "'each', ")
    groups = tuple(k if isinstance(k, int) else tuple(k) for k in _several(filters, "filters"))
    axis, kind = where.filter_axis, where.kind
    parts = [
        Where("", kind, group, at=at, filter_axis=axis)
        for at, group in itertools.product(places or (None,), groups or (None,))
    ]
    return [PatchPiece(key, part) for key in maps for part in parts], places, groups


def _several(given: Any, name: str, also: str = "") -> tuple[Any, ...]:
    if given is None:
        return ()
    if isinstance(given, (str, int)) or not isinstance(given, Iterable):
        raise ArgumentError(f"{name} must be {also}several of these in a list, or None")
    found = tuple(given)
    if not found:
        raise ArgumentError(f"{name}=[] leaves nothing to patch; None, the default, means all")
    return found


def _count(maps: Mapping[Key, FeatureMap], where: Where) -> int:
    """How many positions each map has, if these lie along one axis and are as many in each."""
    counts: dict[int, Key] = {}
    for key, fm in maps.items():
        rank, filters = fm.tensor.dim(), fm.filter_dim
        if where.filter_axis is not None:
            filters = where.filter_axis % rank
        if filters is None:
            raise ArgumentError(
                f"positions='each': which axis of the {fm.kind} of {named(key, maps)!r} counts "
                "filters is not told by the data: say it with filter_axis=-1"
            )
        axes = [d for d in range(1, rank) if d != filters]
        if len(axes) != 1:
            raise ArgumentError(
                f"positions='each' is for maps with one axis of positions, and that of "
                f"{named(key, maps)!r}, of shape {tuple(fm.shape)}, has {len(axes)}: list them"
            )
        counts.setdefault(fm.shape[axes[0]], key)
    if len(counts) > 1:
        told = ", ".join(f"{named(key, maps)!r} has {count}" for count, key in counts.items())
        raise ArgumentError(f"positions='each' needs maps of as many positions: {told}")
    return next(iter(counts))
