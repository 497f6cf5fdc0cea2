"""The calls of φ: by which capture each is read, eagerly or by compiled code."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

from torch import nn

from fmapkit.errors import CaptureStateError
from fmapkit.phi._compiled import CompiledOutputs
from fmapkit.phi._reader import Found, Reader
from fmapkit.phi._request import Request
from fmapkit.torchlib.autograd import in_backward
from fmapkit.torchlib.compiled_modules import compiled_roots

_MOST = 8  # readers of one thread


class Calls:
    """The captures by which one φ reads its maps: each thread has its own, a copy of φ none yet."""

    def __init__(self) -> None:
        self._local = threading.local()
        # What is compiled, by torch's context and the model.
        self._wholes: dict[tuple[Any, nn.Module], nn.Module] = {}
        self._outputs: dict[tuple[Any, nn.Module], tuple[CompiledOutputs | None, Found]] = {}

    def __reduce__(self) -> Any:
        return Calls, ()

    def __call__(self, model: nn.Module, asked: Request, args: Any, kwargs: Any) -> Found:
        """Run the model, and read what was asked for: each map with its key.

        The errors are those of `FeatureFunction.forward`.
        """
        if in_backward():
            raise CaptureStateError(
                "a feature_map was called while a backward pass runs, as activation checkpointing "
                "does to compute it once more; put the checkpoint inside of the model"
            )
        reader = self.reader(model, asked)
        found = reader(args, kwargs)
        if found is None and not model.training:  # it took a new way; the next pass is traced
            found = reader(args, kwargs)
        if found is None:
            raise reader.nothing()
        return found

    def compiled(
        self, model: nn.Module, asked: Request, context: Any, args: Any, kwargs: Any
    ) -> Found:
        """The same by compiled code, as torch's context compiles it.

        Where outputs of modules are asked for, a first call has to run eagerly, which shows what
        there is. With `fullgraph=True` torch wants compiled code to run all the same: both run.
        """
        reader, key = self.reader(model, asked), (context, model)
        if compiled_roots(model):
            return self(model, asked, args, kwargs)
        if not reader.may_be_outputs:  # `capture` reads the model as it is compiled
            if key not in self._wholes:
                self._wholes[key] = context(model)
            return self(self._wholes[key], asked, args, kwargs)
        if key not in self._outputs:
            first = None if reader.tags else self(model, asked, args, kwargs)
            if first is not None and not reader.tags:  # another capture saw it, too
                return first
            outputs = reader.outputs(context)
            self._outputs[key] = outputs, reader.tags
            if first is not None and not (outputs and getattr(context, "fullgraph", False)):
                return first
        outputs, tags = self._outputs[key]
        tensors = outputs(args, kwargs) if outputs is not None else None
        if tensors is None:  # it is none that compiled code tells, or did not run this time
            return self(model, asked, args, kwargs)
        pairs = list(zip(tags, tensors, strict=True))
        if any(fm.tensor.dim() != tensor.dim() for (_, fm), tensor in pairs):
            return self(model, asked, args, kwargs)  # its filters lie elsewhere
        return [(name, replace(fm, tensor=tensor)) for (name, fm), tensor in pairs]

    def reader(self, model: nn.Module, asked: Request) -> Reader:
        """What reads the next call."""
        found = self._known(model, asked, stop=True)
        # Another capture sees this pass, too, and would lose what comes after the last map.
        return found if found.recurring.alone else self._known(model, asked, stop=False)

    def _known(self, model: nn.Module, asked: Request, stop: bool) -> Reader:
        readers: list[Reader] = self._local.__dict__.setdefault("readers", [])
        for reader in readers:
            # A hook of the model's may call φ again, in the middle of a call.
            if reader.model is model and reader.stop == stop and not reader.recurring.inside:
                return reader
        if len(readers) >= _MOST:  # of models that were exchanged for others
            readers.clear()
        readers.append(Reader(model, asked, stop))
        return readers[-1]
