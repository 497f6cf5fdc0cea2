"""The model, batch by batch: a capture around its passes, and what is taken of their maps."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fmapkit import CaptureWarning, FeatureMap, FeatureMaps, capture
from fmapkit.data._batches import Batch, moved
from fmapkit.data._riding import Riding
from fmapkit.data._rows import Rows, Taken
from fmapkit.errors import ArgumentError, check_device, check_module
from fmapkit.map import PassTag

_TRIALS = 3  # of a batch whose pass could not be kept
_RUN_AGAIN = ".*a way through its code that no earlier pass had taken"


class Run:
    """A model that runs over batches, and what is taken of its maps; arguments as in `extract`."""

    def __init__(
        self,
        model: nn.Module,
        layers: Any,
        kinds: Any,
        filters: Any,
        stop: bool,
        rows: Rows,
        riding: Riding,
        device: Any,
        call: Callable[[nn.Module, Any], Any] | None,
    ) -> None:
        self.model = _checked(model)  # without what `DistributedDataParallel` has around it
        self._watch = partial(capture, self.model, layers, kinds=kinds, filters=filters, stop=stop)
        self._watch()  # has `capture` check its arguments before anything else happens
        self.rows = rows
        self.riding = riding
        self._device = _device_of(self.model, device)
        self._call = call or _default_call(self.model, rows.keep)
        self._keys: list[tuple[Any, ...]] = []  # of the maps of a pass
        self._last = PassTag(-1)
        self._calls = 0  # since that one
        self.missed: list[Any] = []  # as of the latest pass

    def _taken(self, maps: FeatureMaps, batch: Batch, ride: bool = True) -> Taken:
        """Run a batch; where `capture` could not keep its pass, run it again.

        A pass that leaves the ways that are known is let go, and the next one is traced as a whole.
        So analyses are shown the maps after the pass, when all of them are there.
        """
        with torch.no_grad():
            for _ in range(_TRIALS):
                maps.clear()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", _RUN_AGAIN, CaptureWarning)
                    self._call(self.model, moved(batch.data, self._device))
                found = list(maps)
                self._check_passes(batch, found)
                keys = [(fm.layer, fm.kind, fm.call, fm.path, fm.nonlinearity) for fm in found]
                self._keys = self._keys or keys
                if keys == self._keys:
                    break
            self.missed = maps.missed
            taken = self.rows.take(found, batch.data, batch.start)
            if ride:
                self.riding.show(found, taken.mask, batch.start, taken.samples)
        return taken

    def _check_passes(self, batch: Batch, found: list[FeatureMap]) -> None:
        """A call is to be of one pass: of several, the last one alone has its maps here."""
        self._calls += 1
        if not found:
            return
        this = PassTag.of(found[0])
        passes, calls = this.since(self._last), self._calls
        self._last, self._calls = this, 0
        if passes > calls:
            raise ArgumentError(
                f"call= ran the model {passes - calls + 1} times for batch {batch.number}, and the "
                "rows of a sample are of one pass: let it run the model once, on all inputs of the "
                "batch"
            )

    def probe(self, batch: Batch) -> Taken:
        """What a batch gives, in a pass of its own that no analysis sees."""
        with self._watch() as maps:
            return self._taken(maps, batch, ride=False)

    def over(self, batches: Iterable[Batch]) -> Generator[tuple[Batch, Taken], None, None]:
        """What each batch gives, to be read before the next one; to be closed where it is left.

        One capture is around all passes. It is entered with the first batch, if there is one.
        """
        maps: FeatureMaps | None = None
        with ExitStack() as stack:
            for batch in batches:
                if maps is None:
                    maps = stack.enter_context(self._watch())
                yield batch, self._taken(maps, batch)


def _checked(model: Any) -> nn.Module:
    """The model that runs, in eval mode."""
    check_module("extract", model)
    # The forward of DistributedDataParallel talks to other ranks.
    plain: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    if plain.training:
        raise ArgumentError(
            "the model is in training mode: dropout would draw, and batch norms would learn from "
            "the data; call model.eval() first"
        )
    return plain


def _device_of(model: nn.Module, given: Any) -> torch.device:
    """Where batches go: to the model."""
    tensors = [*model.parameters(), *model.buffers()]
    there = tensors[0].device if tensors else torch.device("cpu")
    if given is None:
        return there
    device = check_device(given)
    if tensors and device.type != there.type:
        raise ArgumentError(
            f"device={given!r}, and the model is on {there}: move it, model.to({given!r})"
        )
    return device


def _default_call(model: nn.Module, kept: Mapping[str, Any]) -> Callable[[nn.Module, Any], Any]:
    """How a batch goes into the model, where nobody has said it.

    Its `forward` says which entries of a dict it takes; one with `**kwargs` is not given those that
    are kept beside.
    """
    parameters = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    beside = {where for where in kept.values() if isinstance(where, str)}

    def call(model: nn.Module, data: Any) -> Any:
        if isinstance(data, Mapping):
            given = {
                key: value
                for key, value in data.items()
                if key in parameters or (anything and key not in beside)
            }
            if not given:
                raise ArgumentError(
                    f"forward of {type(model).__name__} takes none of the batch's entries "
                    f"{list(data)}; say how it is run with call=function(model, batch)"
                )
            return model(**given)
        if isinstance(data, (list, tuple)):
            return model(data[0])
        return model(data)

    return call
