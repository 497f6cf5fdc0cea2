"""What `capture(check=...)` costs, beside what people write by hand to find a NaN.

Each contender has a model of its own, with its block open all the time; all take turns, see
`measure.py`. By hand: a forward hook on each module that asks `isfinite(output).all()` and reads
the answer; and torch's `detect_anomaly`, which looks at what each backward node gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Figures, Timed, environment, interleave, resting
from benchmarks.models import GPT, ResNet
from fmapkit import capture

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CASES", "CONTENDERS", "Case", "run"]

Around = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Case:
    """A model, what it is given, and whether a pass is a training step."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    train: bool


def _images(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _tokens() -> Tensor:
    return torch.ones(4, 64, dtype=torch.long)


CASES = [
    Case("resnet18 1x3x64x64, inference", ResNet, _images(1, 3, 64, 64), train=False),
    Case("resnet18 8x3x160x160, inference", ResNet, _images(8, 3, 160, 160), train=False),
    Case("resnet18 8x3x160x160, a training step", ResNet, _images(8, 3, 160, 160), train=True),
    Case("gpt 4x64 tokens, inference", GPT, _tokens, train=False),
    Case("gpt 4x64 tokens, a training step", GPT, _tokens, train=True),
]


@contextmanager
def _by_hand(model: nn.Module) -> Iterator[None]:
    def look(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not torch.isfinite(output).all():
            raise ArithmeticError(f"not finite: what {type(module).__name__} returned")

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(look).remove)
        yield


CONTENDERS: dict[str, Around] = {
    "capture": capture,
    'check="finite-forward"': lambda model: capture(model, check="finite-forward"),
    'check="finite"': lambda model: capture(model, check="finite"),
    "hooks by hand, forward": _by_hand,
    "detect_anomaly, backward": lambda model: torch.autograd.detect_anomaly(),
}


def _pass(case: Case, model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    def step() -> None:
        output = model(inputs).float()
        F.mse_loss(output, torch.zeros_like(output)).backward()  # type: ignore[no-untyped-call]

    def read() -> None:
        with torch.no_grad():
            model(inputs)

    return step if case.train else read


def measured(case: Case, seconds: float, device: str) -> dict[str, Figures]:
    """The figures of each contender in one case."""
    torch.manual_seed(0)
    bare = case.model().to(device).train(case.train)
    inputs = case.inputs().to(device)
    bare_pass = _pass(case, bare, inputs)
    timed = {}
    with ExitStack() as blocks:
        for name, around in CONTENDERS.items():
            model = copy.deepcopy(bare)
            run_pass = _pass(case, model, inputs)
            awake: Callable[[], AbstractContextManager[Any]] = nullcontext
            if around is not CONTENDERS["detect_anomaly, backward"]:
                awake = resting(blocks.enter_context(around(model)))
            elif case.train:
                run_pass = _within(around, model, run_pass)  # a switch for the whole process
            else:
                continue
            timed[name] = Timed(run_pass, bare_pass, awake=awake)
        pairs, failed = interleave(timed, seconds, device)
    for name, why in failed.items():
        print(f"  {name}: {why}")
    return {name: Figures.of(those) for name, those in pairs.items()}


def _within(around: Around, model: nn.Module, call: Callable[[], None]) -> Callable[[], None]:
    def inside() -> None:
        with around(model):
            call()

    return inside


def run(device: str = "cpu", threads: int = 1, seconds: float = 5.0) -> None:
    """Print the table.

    Args:
        device: cpu or cuda.
        threads: of torch.
        seconds: for each contender of each case.
    """
    torch.set_num_threads(threads)
    print(", ".join(f"{key} {value}" for key, value in environment(device).items() if value))
    for case in CASES:
        figures = measured(case, seconds, device)
        bare = next(iter(figures.values())).bare
        print(f"{case.name}: a bare pass takes {bare * 1e3:.2f} ms")
        for name, f in figures.items():
            print(
                f"  {name:26s} {f.cpu:6.2f} of its CPU time (quartiles {f.cpu_low:.2f} to "
                f"{f.cpu_high:.2f}), {f.ratio:.2f} by the clock, {f.pairs} pairs"
            )
