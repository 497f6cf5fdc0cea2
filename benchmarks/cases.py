"""A case: a model, what goes in, and what a pass of it is. The suite's own are listed here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import GPT, ConvNet, ResNet, deep_mlp, small_cnn

__all__ = ["CASES", "Bench", "Case", "chosen", "classify"]

Call = Callable[..., Any]  # what takes the place of `model(*inputs)`


@dataclass(frozen=True)
class Case:
    """A case by its parts; nothing is built yet.

    Attributes:
        name: with the shape that goes in.
        build: makes the model.
        inputs: makes what goes in.
        loss: of an output; a pass is then a training step of SGD with momentum. None for inference.
        compiled: by `torch.compile`.
        heavy: a pass takes 0.1 s or so on a CPU: for contenders that need few passes.
        device: "cuda" for a case that is too large for a CPU; "" for any.
        package: that has the model; "" for none.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    loss: Callable[[Any], Tensor] | None = None
    compiled: bool = False
    heavy: bool = False
    device: str = ""
    package: str = ""

    @property
    def trains(self) -> bool:
        """Whether a pass is a training step."""
        return self.loss is not None


class Bench:
    """A case built on a device, ready to run.

    All copies of its model share their weights, so that both models of a pair find them in the
    same cache; when it trains, they share one optimizer too.
    """

    def __init__(self, case: Case, device: str = "cpu", backend: str = "inductor") -> None:
        torch.manual_seed(0)
        self.case, self.device, self.backend = case, device, backend
        self.model = case.build().train(case.trains).to(device)
        self.inputs = tuple(t.to(device) for t in case.inputs())
        self._state = [*self.model.parameters(), *self.model.buffers()]
        self._initial = [t.detach().clone() for t in self._state]
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    @property
    def state(self) -> list[Tensor]:
        """Parameters and buffers."""
        return self._state

    def copy(self) -> nn.Module:
        """Another model that does the same, not compiled."""
        return copy.deepcopy(self.model, {id(t): t for t in self._state})

    def ready(self, model: nn.Module) -> nn.Module:
        """The model as the case runs it: compiled, if it is a compiled case."""
        if not self.case.compiled:
            return model
        # Copies share code, and torch keeps what it compiled by code and backend, without a look
        # at hooks: with one backend for all, a hooked copy would run the bare one's graph.
        compiler = torch._dynamo.lookup_backend(self.backend)

        def own(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            return compiler(graph, inputs)

        compiled: nn.Module = torch.compile(model, backend=own)  # type: ignore[assignment]
        return compiled

    def run(self, call: Call) -> None:
        """One pass; when the case trains, a whole step."""
        if self.case.loss is None:
            with torch.no_grad():
                call(*self.inputs)
            return
        self._optimizer.zero_grad()
        self.case.loss(call(*self.inputs)).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def rehearse(self, call: Call) -> None:
        """A pass with the weights and the random state of the beginning.

        A training step ends before the optimizer's.
        """
        torch.manual_seed(0)
        with torch.no_grad():
            for tensor, initial in zip(self._state, self._initial, strict=True):
                tensor.copy_(initial)
        if self.case.loss is None:
            self.run(call)
        else:
            self._optimizer.zero_grad()
            self.case.loss(call(*self.inputs)).backward()  # type: ignore[no-untyped-call]


def _images(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape),)


def _tokens(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(1024, shape),)


def classify(logits: Tensor) -> Tensor:
    """A loss of logits (N, classes): image n is of class n % 10."""
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) % 10)


def _predict(logits: Tensor) -> Tensor:
    flat = logits.flatten(0, 1)
    return F.cross_entropy(flat, torch.arange(len(flat), device=flat.device))


def _functional() -> nn.Module:
    return ResNet(functional=True)


def _deep() -> nn.Module:
    return ResNet(deep=True)


# For what no package has, for bytes, for modes of fmapkit, for compilers and GPUs. What capture
# costs on models as people use them is measured on those: `real_models.py`.
CASES = [
    Case("mlp of 200 layers 4x16", deep_mlp, _images(4, 16)),
    Case("resnet18 1x3x64x64, F.relu", _functional, _images(1, 3, 64, 64)),
    Case("convnet 8x3x32x32", ConvNet, _images(8, 3, 32, 32)),
    Case("gpt 4x64 tokens", GPT, _tokens(4, 64)),
    Case("gpt training 4x64 tokens", GPT, _tokens(4, 64), _predict),
    Case("resnet18 training 8x3x64x64", ResNet, _images(8, 3, 64, 64), classify, heavy=True),
    Case("small CNN 4x3x64x64, compiled", small_cnn, _images(4, 3, 64, 64), compiled=True),
    Case("gpt 4x64 tokens, compiled", GPT, _tokens(4, 64), compiled=True),
    Case("resnet50 64x3x224x224", _deep, _images(64, 3, 224, 224), device="cuda"),
    Case(
        "resnet50 training 64x3x224x224", _deep, _images(64, 3, 224, 224), classify, device="cuda"
    ),
]


def chosen(only: str, device: str, among: list[Case] | None = None) -> list[Case]:
    """The cases whose name contains a text and that run on a device.

    Raises:
        SystemExit: there are none.
    """
    cases = [c for c in (CASES if among is None else among) if c.device in ("", device)]
    found = [c for c in cases if only in c.name]
    if not found:
        raise SystemExit(f"no case has {only!r} in its name: {[c.name for c in cases]}")
    return found
