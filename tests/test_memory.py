"""What a training step holds and what it takes at its peak: bytes counted, never sampled.

`Live` of `benchmarks/memory.py` counts each block of memory from below autograd. Python's garbage
collector is off: what only it would free counts as held.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import memory
from benchmarks.memory import Case, Live
from benchmarks.models import ResNet
from fmapkit import capture
from tests import truth
from tests.test_long import Branching, Cnn, image

SMALL = Case("resnet18", ResNet, memory._classify((8, 3, 64, 64)))


@pytest.fixture(autouse=True)
def _without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_the_count_by_hand() -> None:
    live = Live()
    with live:
        x = torch.ones(1000)  # 4,000 bytes
        y = (x + 1).relu_()  # 4,000 more: in place takes none
        view = y[10:]
        assert (live.bytes, live.peak) == (8000, 8000)
        del x
        assert live.bytes == 4000
        del y  # its memory is the view's too
        assert live.bytes == 4000
        w = torch.ones(1000, requires_grad=True)
        loss = (w * 2).exp().sum()  # exp keeps its result, not w * 2
        assert live.bytes == 4000 + 4000 + 4000 + 4
        del loss
        assert live.bytes == 4000 + 4000
        del view, w
        assert (live.bytes, live.peak) == (0, 4 * 4000)  # view, w, w * 2, exp


def _between(model: nn.Module, options: dict[str, Any] | None, steps: int) -> tuple[int, int]:
    """Bytes alive after the last step of some, and the bytes of maps that are held."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    live = Live()
    live.see([*model.parameters(), *model.buffers()])
    with nullcontext() if options is None else capture(model, **options) as maps, live:
        for n in range(steps):
            optimizer.zero_grad()
            loss = model(image(n)).square().mean()
            loss.backward()
            optimizer.step()
        del loss
        return live.bytes, maps.nbytes if maps is not None else 0


@pytest.mark.parametrize("net", [Cnn, Branching])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": 3},
        {"every": 2},
        {"kinds": "activation"},
        {"filters": 0},
        {"filters": (0, 2), "keep": 2},
        {"dtype": torch.float16},
        {"kinds": ("input", "response", "preactivation", "activation")},
    ],
    ids=str,
)
def test_between_the_steps_the_maps_are_held_and_not_a_byte_more(
    net: type[nn.Module], steps: int, options: dict[str, Any]
) -> None:
    truth.seed(0)
    bare, _ = _between(net(), None, steps)
    truth.seed(0)
    watched, held = _between(net(), options, steps)
    assert held > 0
    assert watched - bare == held


def test_at_its_peak_a_step_takes_what_autograd_does_not_hold_anyway() -> None:
    bare = memory.peak(SMALL, memory.CONTENDERS["bare"])
    # Activations are kept by autograd for the layers that follow: the same memory, not held twice.
    assert memory.peak(SMALL, memory.CONTENDERS['kinds="activation"']) <= 1.05 * bare
    assert memory.peak(SMALL, memory.CONTENDERS["filters=range(8)"]) <= 1.05 * bare
    # The z of a ReLU behind a norm are needed by nobody: each costs its own bytes, and no more.
    model = ResNet()
    with capture(model) as maps:
        SMALL.loss(model)
    watched = memory.peak(SMALL, memory.CONTENDERS["capture"])
    assert bare < watched <= bare + maps.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_peak_on_cuda() -> None:
    model = ResNet().cuda()
    with capture(model) as maps:
        SMALL.loss(model)
    held = maps.nbytes
    del model, maps
    gc.collect()
    bare = memory.peak(SMALL, memory.CONTENDERS["bare"], "cuda")
    gc.collect()
    assert memory.peak(SMALL, memory.CONTENDERS['kinds="activation"'], "cuda") <= 1.05 * bare
    gc.collect()
    # The allocator rounds each block up to 512 bytes.
    watched = memory.peak(SMALL, memory.CONTENDERS["capture"], "cuda")
    assert watched <= bare + held + 512 * 200
