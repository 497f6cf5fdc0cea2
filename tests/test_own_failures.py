"""A fault of our own is never the user's: forward goes on, and `maps.missed` names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmapkit
from fmapkit import capture
from fmapkit.replay.run import ReplayRun
from fmapkit.tracing.layer_calls import LayerCalls
from fmapkit.tracing.module_calls import ModuleCalls
from fmapkit.tracing.record import Record
from fmapkit.tracing.sigma_calls import SigmaCalls
from fmapkit.tracing.tracer import Tracer
from tests import truth


class Branching(nn.Module):
    """Unproven at the top, proven below: traced and replayed in the same pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            x = -x
        return torch.tanh(self.head(self.body(x)))


def _broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("a fault of our own")


# As what it stands for: it is no code of the model's, which would record what it decides.
_broken.__code__ = _broken.__code__.replace(co_filename=fmapkit.__file__)


PLACES = [
    *((SigmaCalls, name) for name in ("before", "after")),
    *((ModuleCalls, name) for name in ("_sort", "close")),
    *((Tracer, "_after"), (LayerCalls, "weighed")),
    *((Record, name) for name in ("sigma", "hold")),
    *((ReplayRun, name) for name in ("follows", "start", "entries")),
]


@pytest.mark.parametrize("proven", [True, False])
@pytest.mark.parametrize(("where", "name"), PLACES, ids=lambda v: getattr(v, "__name__", v))
@pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")
def test_a_fault_of_ours_goes_to_missed(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, proven: bool
) -> None:
    model: nn.Module = Branching()
    model = model.body if proven else model
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = model(x)
        with capture(model) as maps:
            model(x)  # learned soundly, so that later passes are replayed
            if where is not ReplayRun:
                model.train(False)
                torch.set_grad_enabled(True)  # another plan: learned anew
            monkeypatch.setattr(where, name, _broken)
            assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
            if name != "entries":
                assert any("a fault of our own" in m.reason for m in maps.missed) or (
                    any("left the road" in m.reason for m in maps.missed)
                )
        monkeypatch.undo()
    torch.set_grad_enabled(True)
    assert truth.modes() == truth.NO_MODES
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(m.inplace for m in model.modules() if isinstance(m, nn.ReLU))


@pytest.mark.parametrize("kinds", ["preactivation", ("preactivation", "activation")])
@pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")
def test_a_fault_in_a_tap(monkeypatch: pytest.MonkeyPatch, kinds: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    with torch.inference_mode():
        expected = model(x)
        with capture(model, kinds=kinds) as maps:
            model(x)
            monkeypatch.setattr("fmapkit.replay.run_log.version_of", _broken)
            monkeypatch.setattr("fmapkit.replay.taps.version_of", _broken)
            assert torch.equal(model(x), expected)
            monkeypatch.undo()
            assert any("a fault of our own" in m.reason for m in maps.missed)
            assert torch.equal(model(x), expected)
            assert torch.equal(maps["2", "preactivation"].tensor, expected)
    assert model[1].inplace
