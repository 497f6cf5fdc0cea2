"""One pass for an explanation: how the model is called, which map is meant, what is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmapkit.capture import capture
from fmapkit.errors import AmbiguousMapError, ArgumentError, MapLookupError, check_module, listed
from fmapkit.kinds import Kind
from fmapkit.map import FeatureMap
from fmapkit.maps import FeatureMaps
from fmapkit.model import changed, tensors_in
from fmapkit.torchlib.compiled_modules import compiled_roots, plain

# What is captured where no kind is asked for; the best of them is taken.
_KINDS: tuple[Kind, ...] = ("preactivation", "activation")
_RANK = {"activation": 0, "preactivation": 1, "response": 2, "output": 3, "input": 4}


def eager(model: nn.Module, what: str) -> nn.Module:
    """The model to run: what `torch.compile` was given, if it is wrapped; no part may be compiled.

    What a compiled part computes in between is not to be had.
    """
    check_module(what, model)
    model = plain(model)
    for module in compiled_roots(model):
        name = next(name for name, m in model.named_modules() if m is module)
        raise ArgumentError(
            f"{what} needs a model that runs eagerly, and {name or type(module).__name__!r} is "
            "compiled: give the model as it was before"
        )
    return model


def first_tensor(inputs: Any, what: str) -> Tensor:
    """The first tensor of what the model is given: its input."""
    tensors = tensors_in(inputs)
    if not tensors:
        raise ArgumentError(f"{what} needs a tensor among the model's inputs, not {inputs!r}")
    found = tensors[0]
    if found.numel() == 0:
        raise ArgumentError(
            f"{what} needs an input with values, and this one has shape {tuple(found.shape)}"
        )
    return found


@contextmanager
def kept_state(model: nn.Module) -> Iterator[None]:
    """Put buffers and the random state back as they were when it ends."""
    before = [(b, b.clone()) for b in model.buffers()]
    devices = {t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, values in before:
                    if not torch.equal(buffer, values):  # norms do not count what they write
                        buffer.copy_(values)


@contextmanager
def differentiating(model: nn.Module, inputs: Any, tensor: Tensor) -> Iterator[tuple[Tensor, Any]]:
    """A pass with gradients, of which nothing is left.

    Yields:
        A copy of the input, which takes a gradient unless it is of integers; the inputs with it.
    """
    with kept_state(model), torch.inference_mode(False), torch.enable_grad():
        x = tensor.detach().clone().requires_grad_(tensor.is_floating_point())
        yield x, exchanged(inputs, tensor, x)


@contextmanager
def step_by_step() -> Iterator[None]:
    """Have torch run attention in steps, and not as one fused kernel that cannot be looked into."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass(frozen=True, slots=True)
class WantedMap:
    """The one map that is meant.

    By default the activation; where no nonlinearity follows, the preactivation; of a module that is
    no layer with filters, its output.
    """

    layer: Any
    kind: Kind | None
    call: int | None
    path: str | None

    def capture(self, model: nn.Module, **options: Any) -> capture:
        """A capture that will have it; options as in `fmapkit.capture`."""
        kinds = _KINDS if self.kind is None else (self.kind,)
        return capture(model, self.layer, kinds=kinds, **options)

    def among(self, maps: FeatureMaps) -> FeatureMap:
        """That map of a pass, if there is one alone."""
        layer, kind, call, path = self.layer, self.kind, self.call, self.path
        found = maps.select(layer=layer, kind=kind, call=call, path=path)
        if found and kind is None:
            best = min(_RANK[fm.kind] for fm in found)
            found = [fm for fm in found if _RANK[fm.kind] == best]
        if len(found) == 1:
            return found[0]
        if not found:
            if isinstance(layer, str) and call is None and path is None:
                return maps[layer] if kind is None else maps[layer, kind]
            missed = "".join(f"; missed: {m.layer}: {m.reason}" for m in maps.missed)
            raise MapLookupError(
                f"no map of layer {layer!r} (kind={kind!r}, call={call!r}, path={path!r}) in this "
                f"pass; its maps are of {listed(maps.layers)}{missed}",
                layer=layer if isinstance(layer, str) else None,
                kind=kind,
                call=call,
                candidates=maps.layers,
            )
        choices = ", ".join(
            f"({fm.layer!r}, {fm.kind!r}, call={fm.call}, path={fm.path!r})" for fm in found
        )
        raise AmbiguousMapError(
            f"{layer!r} could mean {len(found)} maps: {choices}; choose with kind=, call= or path=",
            layer=found[0].layer,
            kind=kind,
            call=call,
            candidates=[
                {"layers": fm.layer, "kind": fm.kind, "call": fm.call, "path": fm.path}
                for fm in found
            ],
        )


def exchanged(inputs: Any, old: Tensor, new: Tensor) -> Any:
    """The same inputs with one tensor in another's place."""
    return changed(inputs, lambda value: new if value is old else value)
