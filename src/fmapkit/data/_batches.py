"""What a loader gives, batch by batch: numbered, shared out, and skipped where it is there already.

A `DataLoader` over a data set with an index is asked for the wanted batches alone. Anything else
is iterated from its start, and what is not wanted is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from fmapkit.errors import ArgumentError

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True, slots=True)
class Batch:
    """One of a loader's batches."""

    number: int  # in the order of the loader, from 0
    start: int  # number of its first sample
    data: Any  # what the loader gave


class Batches:
    """A loader, with what can be known of it before it runs."""

    def __init__(self, loader: Any) -> None:
        if isinstance(loader, (Tensor, np.ndarray, str, bytes, Mapping)):
            raise ArgumentError(
                f"loader must give batches, and is a {type(loader).__name__}: wrap it, such as "
                "DataLoader(dataset, batch_size=64)"
            )
        if not any(hasattr(loader, name) for name in ("__next__", "__iter__", "__getitem__")):
            raise ArgumentError(
                f"loader must be an iterable of batches, such as a DataLoader, not {loader!r}"
            )
        if hasattr(loader, "__next__"):
            raise ArgumentError(
                f"loader is a {type(loader).__name__}, which can be read once only: give what "
                "makes it (a DataLoader, a list, an object with __iter__), so that an interrupted "
                "run can go on"
            )
        self._loader = loader  # any iterable of batches that can be iterated again
        self.total: int | None = None  # batches, after `read` has come to the end
        dataset = getattr(loader, "dataset", None)
        sampler: Any = getattr(loader, "batch_sampler", None)
        # Whether single batches can be asked for: a subclass may do anything in __iter__.
        self.indexed = (
            type(loader) is DataLoader
            and not isinstance(dataset, IterableDataset)
            and sampler is not None
        )
        plain = self.indexed and type(sampler) is BatchSampler
        # Of each batch but the last, and of the data set; None where that is not certain.
        self.batch_size: int | None = sampler.batch_size if plain else None
        self.samples: int | None = None
        if plain and hasattr(sampler.sampler, "__len__"):
            total = len(sampler.sampler)
            whole = total // sampler.batch_size * sampler.batch_size
            self.samples = whole if sampler.drop_last else total

    @property
    def shuffled(self) -> str | None:
        """The sampler's name, where another iteration would give another order."""
        random = (s for s in self._samplers() if isinstance(s, _RANDOM))
        return next((type(s).__name__ for s in random), None)

    @property
    def divided(self) -> bool:
        """Whether the loader gives this rank a part of the data only."""
        return any(isinstance(sampler, DistributedSampler) for sampler in self._samplers())

    def _samplers(self) -> list[Any]:
        inner = getattr(self._loader, "batch_sampler", None)
        return [getattr(self._loader, "sampler", None), inner, getattr(inner, "sampler", None)]

    def describe(self) -> dict[str, Any]:
        """For the fingerprint."""
        dataset = getattr(self._loader, "dataset", None)
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        return {
            "dataset": None if dataset is None else type(dataset).__qualname__,
            "samples": self.samples,
            "batch_size": self.batch_size or getattr(self._loader, "batch_size", None),
        }

    def first(self) -> Batch:
        """The first batch, without workers; an error where there is none."""
        loader = self._of(lambda n: n == 0, workers=False) if self.indexed else self._loader
        for data in loader:
            return Batch(0, 0, data)
        raise none_there()

    def read(
        self, wanted: Callable[[int], bool], skipped: Callable[[Batch], None] | None = None
    ) -> Iterator[Batch]:
        """The wanted batches, in order.

        Args:
            wanted: whether the batch of that number is.
            skipped: is shown the others, where they are read at all.
        """
        if self.indexed:
            yield from self._indexed(wanted)
            return
        start = total = 0
        for number, data in enumerate(self._loader):
            batch = Batch(number, start, data)
            if wanted(number):
                yield batch
            elif skipped is not None:
                skipped(batch)
            start += first_size(data)
            total = number + 1
        self.total = total

    def _indexed(self, wanted: Callable[[int], bool]) -> Iterator[Batch]:
        loader = self._of(wanted)
        sampler: Any = loader.batch_sampler
        for data in loader:
            number, start = sampler.asked.pop(0)
            yield Batch(number, start, data)
        self.total = sampler.total

    def _of(self, wanted: Callable[[int], bool], workers: bool = True) -> DataLoader[Any]:
        """A loader like the one given, of some of its batches."""
        given = self._loader
        options: dict[str, Any] = {
            "collate_fn": given.collate_fn,
            "pin_memory": given.pin_memory,
            "worker_init_fn": given.worker_init_fn,
            "generator": given.generator,
            "timeout": given.timeout if workers else 0,
        }
        if workers and given.num_workers:
            options |= {
                "num_workers": given.num_workers,
                "prefetch_factor": given.prefetch_factor,
                "multiprocessing_context": given.multiprocessing_context,
            }
        some = _Some(given.batch_sampler, wanted)
        return DataLoader(given.dataset, batch_sampler=some, **options)


class _Some:
    """The wanted ones of a sampler's batches; notes which they are."""

    def __init__(self, sampler: Iterable[list[int]], wanted: Callable[[int], bool]) -> None:
        self._sampler = sampler
        self._wanted = wanted
        self.asked: list[tuple[int, int]] = []  # number and first sample; workers are some ahead
        self.total = 0

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for number, indices in enumerate(self._sampler):
            self.total = number + 1
            if self._wanted(number):
                self.asked.append((number, start))
                yield list(indices)
            start += len(indices)


def none_there() -> ArgumentError:
    """What to raise where there is no first batch."""
    return ArgumentError("the loader is empty: there is no batch to take features of")


def tensors_of(data: Any) -> Iterator[Tensor]:
    """Every tensor in a batch, in order."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from tensors_of(value)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from tensors_of(value)


def first_size(data: Any) -> int:
    """How many samples a batch has: the length of its first tensor, else of its first list."""
    first = next(tensors_of(data), None)
    if first is not None and first.dim():
        return first.shape[0]
    for column in data.values() if isinstance(data, Mapping) else (data,):
        if isinstance(column, (list, tuple, np.ndarray)):
            return len(column)
    raise ArgumentError(
        f"how many samples a batch of type {type(data).__name__} has is not known; let the loader "
        "collate its batches into tensors whose first axis counts samples"
    )


def moved(data: Any, device: torch.device) -> Any:
    """A batch with its tensors on that device."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, Mapping):
        items = {key: moved(value, device) for key, value in data.items()}
        with suppress(TypeError):  # Hugging Face's BatchEncoding takes a dict, as does a plain one
            return type(data)(items)  # type: ignore[call-arg]
        return items
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(moved(value, device) for value in data))
    if isinstance(data, (list, tuple)):
        return type(data)(moved(value, device) for value in data)
    if hasattr(data, "to") and callable(data.to):  # a batch object, e.g. of a graph
        return data.to(device)
    return data
