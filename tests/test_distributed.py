"""Several ranks: real processes over gloo, started by torchrun; see `tests/distributed`.

The suites are started once, and each of their cases is a test of its own here.
"""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor, nn

from fmapkit import (
    ArgumentError,
    CaptureWarning,
    DistributedError,
    FeatureMaps,
    FmapkitError,
    MapReleasedError,
    capture,
)
from tests import truth

ROOT = Path(__file__).parent.parent
RANKS = 2
_VERSION = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
SUITES = (
    *(("ddp", "statistics") if torch.distributed.is_available() else ()),
    *(("fsdp", "tp", "phi") if torch.distributed.is_available() and _VERSION >= (2, 6) else ()),
    *(("cuda",) if torch.cuda.device_count() >= RANKS else ()),
)
# For all suites, in seconds; a collective that waits in vain fails long before.
LIMIT = 240

gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)


@cache
def _outcomes() -> tuple[list[dict[str, str]], str]:
    """What each rank notes of each case, and what was printed."""
    outcomes: list[dict[str, str]] = [{} for _ in range(RANKS)]
    printed, todo = "", list(SUITES)
    while todo:  # a failure ends the processes: those of the suites after it are started anew
        notes, said = _launch(todo)
        printed += said
        for outcome, note in zip(outcomes, notes, strict=True):
            outcome.update(note)
        broken = [s for s in todo if any(f"{s}.{case}" not in notes[0] for case in _names(s))]
        todo = broken[1:]
    return outcomes, printed


def _launch(suites: list[str]) -> tuple[list[dict[str, str]], str]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(RANKS), "-m", "tests.distributed.worker"),
    ]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*command, folder, *suites],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that the ranks can be ended with it
        )
        try:
            printed, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed = process.communicate()[0] + f"\nended after {LIMIT} s"
        notes = [Path(folder) / f"{rank}.json" for rank in range(RANKS)]
        return [json.loads(n.read_text()) if n.exists() else {} for n in notes], printed


def _names(suite: str) -> list[str]:
    return [case.__name__ for case in import_module(f"tests.distributed.{suite}").CASES]


@gloo
@pytest.mark.parametrize("case", [f"{suite}.{case}" for suite in SUITES for case in _names(suite)])
def test_on_two_ranks(case: str) -> None:
    outcomes, printed = _outcomes()
    said = [o.get(case, "did not get that far") for o in outcomes]
    wrong = [f"rank {n}: {text}" for n, text in enumerate(said) if text != "ok"]
    assert not wrong, "\n".join([*wrong, *([] if any(outcomes) else [printed])])


# -- without a process group --------------------------------------------------------------------


class Net(nn.Module):
    """A convolution, an in-place σ, and one that only a function mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(self.layer1(x).mean((2, 3))))


def _check_wrapped(wrapper: nn.Module, plain: nn.Module, *paths: str) -> None:
    """The wrapper's maps, by whatever module it is captured, are those of the plain model."""
    x = torch.randn(2, 3, 6, 6)
    for kinds in (("preactivation", "activation"), ("output",)):
        for target in (wrapper, *map(wrapper.get_submodule, paths)):
            with capture(plain, kinds=kinds) as expected:
                _, runs = truth.run_with_truth(copy.deepcopy(plain), x)
                plain(x)
            with capture(target, kinds=kinds) as maps:
                for _ in range(2):
                    wrapper(x)
            assert not maps.missed
            assert [(m.layer, m.kind, m.path) for m in maps] == [
                (m.layer, m.kind, m.path) for m in expected
            ]
            for mine, other in zip(maps, expected, strict=True):
                assert truth.same_bits(mine.tensor, other.tensor)
            if kinds != ("output",):
                truth.assert_captured_exactly_once(maps, runs)
    with capture(wrapper, layers="layer1.*") as maps:
        wrapper(x)
    assert maps.layers == ["layer1.0"]
    truth.assert_nothing_left(truth.fingerprint(copy.deepcopy(wrapper)), wrapper)


def test_data_parallel_on_one_device() -> None:
    """Without a GPU, or with one, it runs the module itself."""
    model = Net()
    _check_wrapped(nn.DataParallel(copy.deepcopy(model), device_ids=[]), model, "module")


def test_wrappers_in_wrappers() -> None:
    wrappers = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model = Net()
    inside = copy.deepcopy(model)
    inside.layer1 = wrappers.checkpoint_wrapper(inside.layer1)
    _check_wrapped(nn.DataParallel(inside, device_ids=[]), model, "module")
    outside = nn.DataParallel(wrappers.checkpoint_wrapper(copy.deepcopy(model)), device_ids=[])
    _check_wrapped(outside, model, "module", "module._checkpoint_wrapped_module")


def test_a_module_named_module_is_a_level_like_any_other() -> None:
    """Wrappers are told by their type, not by what they call what they hold."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    model = Holder()
    with capture(model) as maps:
        model(torch.randn(1, 2))
    assert maps.layers == ["module.0"]


def _replicas(model: nn.Module, count: int) -> list[nn.Module]:
    """What `DataParallel` makes of a model on several devices, all of them on this one."""
    modules = list(model.modules())
    made = []
    for _ in range(count):
        copies = {m: m._replicate_for_data_parallel() for m in modules}
        for module, replica in copies.items():
            for key, child in module._modules.items():
                setattr(replica, key, copies[child])
            for key, parameter in module._parameters.items():
                setattr(replica, key, parameter.detach().clone())
            for key, buffer in module._buffers.items():
                setattr(replica, key, buffer.clone())
        made.append(copies[model])
    return made


class Threaded(nn.DataParallel):
    """`DataParallel` over several devices, but for the devices."""

    def forward(self, x: Tensor) -> Tensor:
        outputs: dict[int, Tensor] = {}
        grad = torch.is_grad_enabled()

        def work(index: int, replica: nn.Module, part: Tensor) -> None:
            with torch.set_grad_enabled(grad):
                outputs[index] = replica(part)

        parts = x.chunk(2)
        replicas = _replicas(self.module, len(parts))
        threads = [
            threading.Thread(target=work, args=(n, r, p))
            for n, (r, p) in enumerate(zip(replicas, parts, strict=True))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return torch.cat([outputs[n] for n in range(len(parts))])


def _thrice(captured: nn.Module, model: nn.DataParallel, x: Tensor, bare: Tensor) -> FeatureMaps:
    """The module itself, here, which sets hooks on all of it; then twice as replicas."""
    with capture(captured) as maps:
        model.module(x[:1])
        for _ in range(2):
            assert truth.same_bits(model(x), bare)
    return maps


@pytest.mark.parametrize("outer", [False, True])
def test_replicas_in_threads_are_named_and_left_alone(outer: bool) -> None:
    """Replicas share the hooks of the module, and run elsewhere: nothing is captured, in so
    many words, and what they compute is not disturbed."""
    model = Threaded(Net().eval(), device_ids=[])
    x = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        bare = model(x)
        before = truth.fingerprint(model)
        # The call of the module by itself is none of the wrapper's passes, and is named first.
        first = "called outside Threaded.forward" if outer else "DataParallel runs copies"
        with pytest.warns(CaptureWarning, match=first):
            maps = _thrice(model if outer else model.module, model, x, bare)
    assert [m.layer for m in maps.missed if "DataParallel" in m.reason] == [""]
    truth.assert_nothing_left(before, model)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_data_parallel_on_several_devices_is_named() -> None:
    model = nn.DataParallel(Net().cuda().eval())
    x = torch.randn(4, 3, 6, 6, device="cuda")
    with torch.no_grad():
        bare = model(x)
        with pytest.warns(CaptureWarning, match="DataParallel runs copies"):
            maps = _thrice(model, model, x, bare)
    assert [m.layer for m in maps.missed if "DataParallel" in m.reason] == [""]


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")
def test_data_parallel_on_one_cuda_device() -> None:
    model = Net().cuda()
    wrapper = nn.DataParallel(copy.deepcopy(model), device_ids=[0])
    x = torch.randn(2, 3, 6, 6, device="cuda")
    with capture(model) as expected, capture(wrapper) as maps:
        model(x)
        wrapper(x)
    assert maps.layers == expected.layers
    for mine, other in zip(maps, expected, strict=True):
        assert truth.same_bits(mine.tensor, other.tensor)


def test_gather_needs_a_process_group() -> None:
    model = Net()
    with capture(model) as maps:
        model(torch.randn(2, 3, 6, 6))
    for asked, key in (("'layer1.0'", ("layer1.0",)), ("'fc', 'preactivation', 1",) * 2):
        arguments = key if isinstance(key, tuple) else ("fc", "preactivation", 1)
        says = f"gather({asked}) puts the maps of several ranks together"
        with pytest.raises(DistributedError, match=re.escape(says)) as caught:
            maps.gather(*arguments)
        assert isinstance(caught.value, (FmapkitError, RuntimeError))
        assert "init_process_group" in str(caught.value)


def test_no_early_stop_where_other_ranks_would_wait() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.ReLU())
    with pytest.raises(ArgumentError, match="'1' exchanges data with them while it runs"):
        capture(model, layers="0", stop=True)


def test_full_of_a_whole_map_is_the_map() -> None:
    model = Net()
    with capture(model) as maps:
        model(torch.randn(2, 3, 6, 6))
    fm = maps["layer1.0"]
    assert fm.full() is fm


def test_memory_that_was_given_back_is_not_read() -> None:
    """FSDP frees parameters by resizing their storage, which no version counter shows."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with capture(model) as maps, torch.no_grad():
        model(torch.randn(3, 2))
        tensor = maps["0"].tensor
        assert tensor.abs().sum() > 0
        tensor.untyped_storage().resize_(0)
    with pytest.raises(MapReleasedError, match="given back when the pass was over"):
        _ = maps["0"]
    assert "released" in str(maps)
