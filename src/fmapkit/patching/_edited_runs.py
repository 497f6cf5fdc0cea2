"""The runs of patching: the one whose maps are taken, and those that get them, piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmapkit.capture import capture
from fmapkit.editing import Where, part_of
from fmapkit.errors import ArgumentError
from fmapkit.map import FeatureMap
from fmapkit.maps import FeatureMaps
from fmapkit.model import changed, run, tensors_in
from fmapkit.readable import tags
from fmapkit.torchlib.operators import tree_map

Edits = Mapping[Any, Callable[[FeatureMap], Tensor]]

_CONSTANT = (type(None), bool, int, float, complex, str, bytes)

Key = tuple[str, int, str]  # the layer, the call, the path


class PatchPiece(NamedTuple):
    """A map, and which part of it."""

    key: Key
    where: Where


def key_of(fm: FeatureMap) -> Key:
    """What tells a map of one kind from the others of its pass."""
    return fm.layer, fm.call, fm.path


def named(key: Key, keys: Iterable[Key]) -> str:
    """A map's name in a result: its layer, with the call where there are several, and its path."""
    layer, call, path = key
    several = len({other[1] for other in keys if other[0] == layer}) > 1
    return f"{layer}{path}" + (f" (call {call})" if several else "")


class ModelInputs:
    """What a model is given, and what to call it in an error."""

    def __init__(self, given: Any, name: str) -> None:
        self._name = name
        self._given = given if isinstance(given, (tuple, Mapping)) else (given,)
        self._tensors = tensors_in(self._given)
        if not self._tensors:
            raise ArgumentError(
                f"{name} must be a tensor, a tuple of arguments or a dict of keyword arguments "
                f"with tensors in it, not {type(given).__name__}"
            )

    def samples(self) -> int:
        """How many samples there are, if its tensors agree."""
        shapes = [tuple(t.shape) for t in self._tensors]
        counts = {shape[:1] for shape in shapes}
        if len(counts) != 1 or counts == {()}:
            raise ArgumentError(
                f"batch_size > 1 puts copies of {self._name} into one batch, along the first axis, "
                f"and its tensors have shapes {shapes}: give all of them that axis, or batch_size=1"
            )
        return int(counts.pop()[0])

    def run(self, model: nn.Module, copies: int = 1) -> Any:
        """Call the model on so many copies."""

        def repeated(value: Any) -> Any:
            return torch.cat([value] * copies) if isinstance(value, Tensor) else value

        return run(model, changed(self._given, repeated) if copies > 1 else self._given)


class Runs:
    """Runs a model, with and without patches, and measures it; arguments are those of `patch`.

    Attributes:
        maps: what is put in, by layer, call and path; once they were taken.
    """

    def __init__(self, model: nn.Module, metric: Any, where: Where, of: Any) -> None:
        self._model = model
        self._metric = metric
        self._where = where
        self._of = None if of is None else of if isinstance(of, tuple) else (of, "output")
        self.maps: dict[Key, FeatureMap] = {}
        self._pieces: Sequence[PatchPiece | None] = (None,)  # of the running pass, by copy
        self._samples = 0
        self._done: set[int] = set()

    def _capture(
        self, edit: Edits | None, at_map: Callable[[FeatureMap], Tensor], stop: bool
    ) -> capture:
        """Passes in which a function is given each map that is meant, after other edits."""
        edits: dict[Any, Any] = {
            _in_each_run(where): self._by_copy(function, where)
            for where, function in ((Where.of(key), f) for key, f in (edit or {}).items())
        }
        edits[dataclasses.replace(self._where, optional=True)] = at_map
        layers, kind = self._of if self._of is not None else (self._model, "output")
        return capture(self._model, layers, kinds=kind, edit=edits, stop=stop)

    def take(self, inputs: ModelInputs, edit: Edits | None) -> Tensor:
        """Run the model and take its maps; the metric of that run."""
        with self._capture(edit, self._take, stop=False) as maps:
            metric = self._measured(inputs.run(self._model), maps, 0)
        if not self.maps:
            where = self._where
            raise ArgumentError(
                f"layers={where.layer!r}: none of these has an {where.kind} in this run"
                + (f" at path {where.path!r}" if where.path is not None else ""),
                layer=where.layer if isinstance(where.layer, str) else None,
                kind=where.kind,
            )
        return metric

    def _take(self, fm: FeatureMap) -> Tensor:
        self.maps[key_of(fm)] = dataclasses.replace(fm, tensor=fm.tensor.clone())
        return fm.tensor

    @contextmanager
    def patched(
        self, inputs: ModelInputs, edit: Edits | None, samples: int
    ) -> Iterator[Callable[[Sequence[PatchPiece | None]], list[Tensor]]]:
        """One capture around all patched runs, so that the model is traced once.

        Args:
            samples: in a batch; 0 where each forward runs one copy of the inputs.
        """
        self._samples = samples
        with self._capture(edit, self._patch, stop=self._of is not None) as maps:

            def run_pieces(pieces: Sequence[PatchPiece | None]) -> list[Tensor]:
                self._pieces = pieces
                self._done.clear()
                output = inputs.run(self._model, len(pieces))
                self._check_done()
                return [self._measured(output, maps, copy) for copy in range(len(pieces))]

            yield run_pieces

    def _check_done(self) -> None:
        for place, piece in enumerate(self._pieces):
            if piece is not None and place not in self._done:
                after = ""
                if self._of is not None:
                    after = f", or it runs after {self._of[0]!r}, which the metric is of"
                raise ArgumentError(
                    f"{named(piece.key, self.maps)!r} has no {self._where.kind} in the run that is "
                    f"patched{after}"
                )

    def _by_copy(self, function: Callable[[FeatureMap], Tensor], where: Where) -> Any:
        """An edit of the run, done to each copy by itself: each gets the same noise."""

        def edit(fm: FeatureMap) -> Tensor:
            done = []
            for copy in range(len(self._pieces)):
                part, put = part_of(self._copy_of(fm, copy), where)
                done.append(put(function(part)))
            return done[0] if len(done) == 1 else torch.cat(done)

        return edit

    def _copy_of(self, fm: FeatureMap, copy: int) -> FeatureMap:
        count, samples = len(self._pieces), self._samples
        if count == 1:
            return fm
        if fm.shape[0] != count * samples:
            raise ArgumentError(
                f"batch_size > 1 runs {count} copies of {samples} samples at once, along the "
                f"first axis, and the {fm.kind} of {fm.layer!r} has shape {tuple(fm.shape)}",
                **tags(fm),
            )
        return dataclasses.replace(fm, tensor=fm.tensor[copy * samples : (copy + 1) * samples])

    def _patch(self, fm: FeatureMap) -> Tensor:
        key, result = key_of(fm), fm.tensor
        for copy, piece in enumerate(self._pieces):
            if piece is None or piece.key != key:
                continue
            self._done.add(copy)
            target, donor = self._copy_of(fm, copy), self.maps[key]
            if donor.shape != target.shape:
                raise ArgumentError(
                    f"the {fm.kind} of {named(key, self.maps)!r} has shape {tuple(donor.shape)} in "
                    f"one run and {tuple(target.shape)} in the other: their places do not agree"
                )
            new, _ = part_of(donor, piece.where)
            _, put = part_of(target, piece.where)
            if len(self._pieces) == 1:
                return put(new.tensor)
            result = result.clone() if result is fm.tensor else result
            result[copy * self._samples : (copy + 1) * self._samples] = put(new.tensor)
        return result

    # -- the metric ---------------------------------------------------------------------------

    def _measured(self, output: Any, maps: FeatureMaps, copy: int) -> Tensor:
        if self._of is not None:
            fm = maps[self._of]
            output = fm.tensor if fm.edited is None else fm.edited
        value = self._metric(_rows(output, copy, len(self._pieces), self._samples))
        found = value if isinstance(value, Tensor) else torch.as_tensor(value)
        found = found.detach()
        if found.dim() > 1 or found.is_complex():
            raise ArgumentError(
                "metric must give a number, or one for each sample, not a tensor of shape "
                f"{tuple(found.shape)}"
            )
        return found if found.is_floating_point() else found.float()


def _rows(output: Any, copy: int, copies: int, samples: int) -> Any:
    """What the model returned for one of several copies, if they can be told apart."""
    if copies == 1:
        return output

    def part(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == copies * samples:
            return value[copy * samples : (copy + 1) * samples]
        if isinstance(value, _CONSTANT):
            return value
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise ArgumentError(
            f"batch_size > 1 runs {copies} copies of {samples} samples at once, and the model "
            f"returned {what or f'a {type(value).__name__}'}, which has no row for each: make it "
            "return tensors of the batch alone (use_cache=False, no labels), or batch_size=1"
        )

    return tree_map(part, output)


def _in_each_run(where: Where) -> Where:
    """The whole maps of an edit, in every run: each is one pass, whose number is 0."""
    if not where.has_step(0):
        raise ArgumentError(
            f"edit[{where!r}]: each run of patching is one pass, step 0, and step= leaves it out"
        )
    return dataclasses.replace(where, at=None, filter=None, step=None)
