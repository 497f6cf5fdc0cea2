"""What a captured pass costs, counted and not timed: hooks, Python calls, torch calls, bytes.

A ResNet-18 as torchvision lays it out, from the second pass on. The budgets are what the design
comes to, derived by hand; whoever exceeds one has made every pass of every user dearer.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fmapkit
from benchmarks.memory import Live, unnoticed
from benchmarks.models import GPT, ResNet
from fmapkit import capture
from fmapkit.analysis import Statistics
from fmapkit.paths import control
from fmapkit.paths.rewriting.source_files import qualified_name
from fmapkit.torchlib.call_override import there

LOGGER = logging.getLogger(__name__)
HOME = str(Path(fmapkit.__file__).parent)

# Blocks: 8 with one ReLU each, called twice, and the stem's: 9 modules, 17 calls.
SIGMAS, SITES = 9, 17
# Layers without a nonlinearity: 3 convolutions in the shortcuts, and the classifier.
ALONE = 4


@pytest.fixture(autouse=True)
def _without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@unnoticed
class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def image() -> Tensor:
    return torch.ones(1, 3, 64, 64)


def python_calls(run: Callable[[], object]) -> Counter[str]:
    """The Python functions of fmapkit that are called meanwhile, by name."""
    found: Counter[str] = Counter()

    def look(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            found[qualified_name(frame.f_code)] += 1

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    # Where an earlier test of the process has tapped a place in the source, its twins ask there.
    assert found.pop("tapped", 0) <= SITES
    return found


def operators(model: nn.Module, given: Tensor) -> Counter[str]:
    """What runs, as torch's profiler tells it: where a mode sees operators, z is copied."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model(given)
    found = {e.key.removeprefix("aten::"): e.count for e in seen.key_averages()}
    return Counter({name: n for name, n in found.items() if not name.startswith("[")})


# What a twin calls at a decision (see `paths/recorders.py`).
RECORDERS = (
    *("enter", "current", "value", "handed", "picked", "keyed", "called", "chosen", "caught"),
    *("exact", "index", "indexed", "unpacked", "compared", "filled", "at"),
)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks() -> None:
    model = ResNet().eval()
    with torch.no_grad(), capture(model):
        model(image())
        model(image())
        assert hooks(model) == 0
        # Before the model's own call; those of its sites; of layers that no nonlinearity follows.
        assert sum(there(m) is not None for m in model.modules()) == 1 + SIGMAS + ALONE


def test_python_calls() -> None:
    model = ResNet().eval()
    with torch.no_grad(), capture(model):
        for _ in range(3):
            model(image())
        calls = python_calls(lambda: model(image()))
    taps = {k: n for k, n in calls.items() if k.endswith(("Tap.__call__", "_After.around"))}
    alone = {"OutputCallTap.__call__": ALONE}
    assert taps == {"KeepingCallTap.__call__": SITES, **alone}
    # An in-place σ is one more call of ours: its memory is looked at, and it runs out of place.
    assert calls.pop("sigma_apart") == SITES
    recorded = sum(calls.pop(name, 0) for name in RECORDERS)
    # Functions that run, what they are told to call; and whose call it is that we stand before.
    assert recorded <= 9 + 4 * 9 + 1 + ALONE
    # Whatever the rest of the pass takes.
    assert calls.total() - sum(taps.values()) <= 88, calls.most_common(20)


class _Logging(nn.Module):
    """Its code reads a logger, by which all loggers of the process are reached."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.sizes = ResNet(), {n: (n, n) for n in range(1000)}

    def forward(self, x: Tensor) -> Tensor:
        LOGGER.debug("a pass")
        return self.body(x)


def test_python_calls_of_a_pass_that_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for tensors that outlive it: not in what we have set, nor where none can be."""
    monkeypatch.setattr(control, "_helpers", {})  # what other tests' `nn.Sequential`s have called
    for model in (ResNet(), _Logging()):
        with torch.no_grad(), capture(model.eval()):
            model(image())  # the sources of its classes are read
        with torch.no_grad(), capture(model):
            calls = python_calls(lambda model=model: model(image()))  # type: ignore[misc]
        runs = sum(1 for _ in model.modules()) + SITES  # 69 modules, and functions of torch's
        assert calls.total() <= 140 * runs, (calls.total(), runs, calls.most_common(20))


def test_a_pass_that_is_not_captured() -> None:
    model = ResNet().eval()
    with torch.no_grad(), capture(model, every=100):
        for _ in range(3):
            model(image())
        assert sum(there(m) is not None for m in model.modules()) == 1
        calls = python_calls(lambda: model(image()))
        # Functions run their twins for as long as the block is open; their recorders do nothing.
        assert sum(calls.pop(name, 0) for name in RECORDERS) <= 9 + 4 * 9
        assert calls.total() <= 13


def _beside_bare(train: bool) -> tuple[Counter[str], Counter[str]]:
    """What runs more with a capture, and what runs less."""
    model = ResNet().eval()
    with torch.set_grad_enabled(train):
        operators(model, image())  # the profiler's own start
        bare = operators(model, image())
        assert bare["relu_"] == SITES
        with capture(model):
            for _ in range(3):
                model(image())
            watched = operators(model, image())
    return watched - bare, bare - watched


def test_operators_in_inference() -> None:
    """None but a ReLU out of place for one in place, and its memory given to the other tensor."""
    more, less = _beside_bare(False)
    assert more == {"relu": SITES, "clamp_min": SITES}
    assert less == {"relu_": SITES, "clamp_min_": SITES}


def test_operators_in_training() -> None:
    """Detached aliases; and a copy of what an in-place σ overwrites, whose graph is the model's."""
    more, less = _beside_bare(True)
    assert more["clone"] == more["copy_"] == SITES
    assert more["detach"] == 2 * (SITES + ALONE) - ALONE
    assert more.keys() <= {"clone", "copy_", "detach", "empty_strided"}
    assert not less


@pytest.mark.parametrize(("model", "given"), [(ResNet, image()), (GPT, torch.ones(1, 8).long())])
def test_bytes(model: Callable[[], nn.Module], given: Tensor) -> None:
    """After a pass, what is alive is the maps; nothing was copied, but where a mode looks on."""
    net = model().eval()
    with torch.no_grad(), capture(net) as maps:
        for _ in range(4):
            net(given)
            assert maps.bytes_copied == 0
    with torch.no_grad(), capture(net) as maps, Live() as live:
        live.see([*net.parameters(), *net.buffers(), given])
        before = live.bytes
        for _ in range(3):
            net(given)
        assert live.bytes - before == maps.nbytes


def test_tensors_alive_do_not_grow() -> None:
    model = ResNet().eval()

    def alive() -> int:
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    with torch.no_grad(), capture(model) as maps:
        counts = []
        for _ in range(5):
            model(image())
            counts.append(alive())
        assert len(set(counts[1:])) == 1
        # Two for a site, one for a layer alone; the parameters were there before.
        assert len(maps) == 2 * SITES + ALONE


def test_filters_copy_what_was_asked_for() -> None:
    model = ResNet().eval()
    with torch.no_grad(), capture(model, filters=range(8)) as maps:
        for _ in range(3):
            model(image())
        made = maps._session.wants.conversion.buffers.made
        with Calls() as calls:
            model(image())
        assert maps._session.wants.conversion.buffers.made == made
        assert calls.count["copy_"] == len(maps) == 2 * SITES + ALONE
        assert calls.count["clone"] == 0
        assert maps.bytes_copied == maps.nbytes


def test_keep_0_holds_one_map_at_a_time() -> None:
    model = ResNet().eval()
    with torch.no_grad():
        with Live() as live:
            model(image())
        bare = live.peak
        with capture(model, analyses=Statistics(), keep=0), Live() as live:
            for _ in range(3):
                model(image())
            live.peak = live.bytes
            model(image())
        largest = 64 * 32 * 32 * 4  # bytes of the stem's z
        assert live.peak - live.bytes <= bare + 3 * largest
