"""What a training step takes at its peak, as a ratio to the bare step: counted, not sampled.

On a CPU, `Live` sees each block of memory that an operation makes, and its end, and so knows the
bytes that are alive at any moment; nothing is estimated from the process's size. What a kernel
takes and gives back inside itself is not seen, in the bare step neither. On CUDA the allocator
counts by itself.
"""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.models import GPT, ResNet
from fmapkit import capture
from fmapkit.paths import survey, unrecorded

__all__ = ["CASES", "CONTENDERS", "Case", "Count", "Live", "counted", "peak", "run", "unnoticed"]

_Mode = TypeVar("_Mode", bound=TorchDispatchMode)
aten = torch.ops.aten
_COPIES = {aten.clone, aten.copy_, aten._to_copy, aten.index_select}

WARM_UP = 3  # steps before the one that counts: learned, then replayed


def unnoticed(mode: type[_Mode]) -> type[_Mode]:
    """A mode that only counts, taken for one of torch's: others have fmapkit trace each pass."""
    count: Any = mode.__torch_dispatch__

    def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with unrecorded():
            return count(self, func, types, args, kwargs)

    mode.__module__ = f"torch.{mode.__module__}"
    mode.__torch_dispatch__ = dispatch  # type: ignore[method-assign]
    functions = [dispatch, *map(inspect.unwrap, [count, *filter(callable, vars(mode).values())])]
    codes = [f.__code__ for f in functions if isinstance(f, FunctionType)]
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]
        survey.trust(code)
    return mode


@unnoticed
class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all memory that was made, or shown to it, and is still alive.

    Attributes:
        bytes: alive now.
        peak: most that were alive at once.
        copied: bytes that the calls whose whole purpose is a copy have written.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.peak = 0
        self.copied = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def see(self, value: Any) -> None:
        """Count the memory of the tensors in a value, each block once."""
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.bytes -= size

        self._known[key] = weakref.ref(storage, gone)
        self.bytes += size

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.see(output)
        if func._overloadpacket in _COPIES:
            self.copied += sum(t.nbytes for t in tree_leaves(output) if isinstance(t, Tensor))
        return output


@dataclass(frozen=True)
class Case:
    """A model, and the loss of a step."""

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Tensor]


def _classify(shape: tuple[int, ...]) -> Callable[[nn.Module], Tensor]:
    def loss(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        images = torch.ones(shape, device=device)
        return F.cross_entropy(model(images), torch.zeros(shape[0], dtype=torch.long).to(device))

    return loss


def _predict(model: nn.Module) -> Tensor:
    tokens = torch.ones(8, 64, dtype=torch.long, device=next(model.parameters()).device)
    logits: Tensor = model(tokens)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


CASES = [
    Case("resnet18 16x3x64x64", ResNet, _classify((16, 3, 64, 64))),
    Case("resnet18 8x3x224x224", ResNet, _classify((8, 3, 224, 224))),
    Case("gpt 8x64 tokens", GPT, _predict),
]

Around = Callable[[nn.Module], AbstractContextManager[Any]]
CONTENDERS: dict[str, Around] = {
    "bare": lambda model: nullcontext(),
    "capture": capture,
    'kinds="activation"': lambda model: capture(model, kinds="activation"),
    'kinds="preactivation"': lambda model: capture(model, kinds="preactivation"),
    "keep=3": lambda model: capture(model, keep=3),
    "filters=range(8)": lambda model: capture(model, filters=range(8)),
}


def peak(case: Case, around: Around, device: str = "cpu") -> int:
    """Bytes alive at the peak of one step of SGD with momentum, after a few steps before it.

    Weights, gradients and the optimizer's state count too.
    """
    torch.manual_seed(0)
    model = case.model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        case.loss(model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    with around(model):
        state = [*model.parameters(), *model.buffers()]
        return counted(step, state, WARM_UP, device).peak


@dataclass(frozen=True)
class Count:
    """Of one pass: bytes alive at its peak, and bytes copied."""

    peak: int
    copied: int


def counted(
    step: Callable[[], object], state: Sequence[Tensor], warm_up: int, device: str = "cpu"
) -> Count:
    """Count a pass, after some that only settle what is held.

    Args:
        step: the pass.
        state: what was there before: weights.
        warm_up: passes before the one that counts.
        device: on CUDA the peak is the allocator's.
    """
    gc.collect()
    live = Live()
    live.see(state)
    with live:
        for _ in range(warm_up):
            step()
        live.peak = live.bytes
        live.copied = 0
        step()
    if device == "cpu":
        return Count(live.peak, live.copied)
    torch.cuda.reset_peak_memory_stats()
    step()
    return Count(torch.cuda.max_memory_allocated(), live.copied)


def run(device: str = "cpu") -> None:
    """Print the table."""
    for case in CASES:
        bare = peak(case, CONTENDERS["bare"], device)
        print(f"{case.name}: {bare / 1e6:.1f} MB at the peak of a bare training step ({device})")
        for name, around in CONTENDERS.items():
            bytes_ = peak(case, around, device)
            print(f"  {name:24s} {bytes_ / bare:6.3f} {(bytes_ - bare) / 1e6:+9.1f} MB")
