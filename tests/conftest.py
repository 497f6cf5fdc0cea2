"""Fixtures of every test: nothing global may be left behind, whatever a test did."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

# Before torch is imported: also for the processes that tests start, and for other libraries.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import nn

from fmapkit.missed import Missed, MissedLog, Reason
from fmapkit.tracing import Tracer
from tests.truth import modes

# One thread: the models are small, and on a machine that others use too, threads that wait for
# each other at every small kernel cost ten times what they bring. Also the sums keep their order.
torch.set_num_threads(1)

# Where tensors and modules are made unless a test says otherwise: the suite runs on any device.
if "FMAPKIT_DEVICE" in os.environ:
    torch.set_default_device(os.environ["FMAPKIT_DEVICE"])

# The suite draws the same examples each time, so that a failure is due to the change. The others
# explore.
settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,  # a first pass compiles kernels, and CI machines stall
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(
    "thorough", parent=settings.get_profile("default"), max_examples=1000, derandomize=False
)
# For a first look at new failures: no shrinking, which takes minutes.
settings.register_profile(
    "quick",
    parent=settings.get_profile("default"),
    phases=[Phase.explicit, Phase.generate],
    derandomize=False,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
    "_global_module_registration_hooks",
    "_global_parameter_registration_hooks",
    "_global_buffer_registration_hooks",
)


def _are_made_by_torch(home: object) -> bool:
    """Whether modules that torch.compile makes are made by its own function, if it is there."""
    return not hasattr(
        getattr(getattr(home, "OptimizedModule", None), "__init__", 0), "__wrapped__"
    )


def _global_state() -> dict[str, object]:
    hooks = {name: len(getattr(nn.modules.module, name, ())) for name in _GLOBAL_HOOKS}
    return {
        **hooks,
        "modes": modes(),
        "module call": nn.Module.__call__,
        "module setattr": nn.Module.__setattr__,
        "grad enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "torch.compile's modules": _are_made_by_torch(sys.modules.get("torch._dynamo.eval_frame")),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "saved tensor hooks": torch._C._autograd._saved_tensors_hooks_is_enabled(),  # type: ignore
    }


def _set_aside() -> None:
    """Take all that lives out of what the garbage collector, and `gc.get_objects`, look through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """Start a file with the million objects of torch, transformers and pytest set aside.

    Once torch._dynamo is there, every block looks through all objects for compiled models around
    its own: a tenth of a second, in thousands of tests. A test makes its own models, so what is to
    be found is among what is left.
    """
    _set_aside()


@pytest.fixture(autouse=True)
def leak_guard() -> Iterator[None]:
    """Fail a test that leaves a mode, a global hook, a patch or a switched flag behind."""
    before = _global_state()
    torch.set_flush_denormal(False)  # what torch 2.4's inductor compiles sets it as it is loaded
    yield
    after = _global_state()
    changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    assert not changed, f"left behind (before, after): {changed}"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with each pass that is traced, or a part of it."""
    found: list[None] = []
    of_pass = Tracer.of_pass
    monkeypatch.setattr(Tracer, "of_pass", lambda *a: found.append(None) or of_pass(*a))
    return found


@pytest.fixture(autouse=True)
def reasons_are_members(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test in which something is missed for a reason that `Reason` does not have."""
    # At the end: code of ours that runs in a pass would be recorded as the model's.
    logs: list[list[Missed]] = []
    init, take = MissedLog.__init__, MissedLog.take

    def noted(self: MissedLog, model: nn.Module) -> None:
        init(self, model)
        logs.append(self.entries)

    def taken(self: MissedLog) -> list[Missed]:
        before = take(self)
        logs.append(self.entries)
        return before

    monkeypatch.setattr(MissedLog, "__init__", noted)
    monkeypatch.setattr(MissedLog, "take", taken)
    yield
    unknown = [m for log in logs for m in log if m.why is Reason.OF_ANOTHER_VERSION]
    assert not unknown, f"no member of Reason: {unknown}"


@pytest.fixture
def collected() -> None:
    """For tests that count what is alive: what lived before is set aside, and not counted."""
    _set_aside()


@pytest.fixture
def no_fast_path() -> Iterator[None]:
    """nn.TransformerEncoderLayer's fused kernel off, so that a bare run rounds as a watched one."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)
