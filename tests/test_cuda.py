"""What only a GPU can show; skipped where there is none.

The rest of the suite runs on one with `FMAPKIT_DEVICE=cuda make test`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import CaptureWarning, capture, edits
from fmapkit.analysis import Statistics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class Net(nn.Module):
    """In-place modules, functions, a residual sum; `branch` makes it unproven."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 4)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        if self.branch and x.shape[0] > 1000:  # by the shape: a branch on data would wait for it
            return x
        x = self.relu(self.norm(self.conv1(x)))
        y = F.gelu(self.conv2(x))
        y += x
        return self.head(F.relu(y).mean((2, 3)))


@pytest.fixture
def no_waiting() -> Iterator[Any]:
    """A context in which a wait for the device is an error."""

    class NoWaiting:
        def __enter__(self) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_: object) -> None:
            torch.cuda.set_sync_debug_mode("default")

    yield NoWaiting()
    torch.cuda.set_sync_debug_mode("default")


OPTIONS: list[dict[str, Any]] = [
    {},
    {"filters": [0, 2]},
    {"kinds": ("input", "response", "preactivation", "activation", "output")},
    {"detach": False},
    {"edit": {"conv1": edits.scale(2.0)}},
    {"keep": 3},
    {"dtype": torch.bfloat16},
    {"filters": [1], "dtype": torch.bfloat16},
    {"device": "cpu"},
    {"analyses": "statistics"},
    {"analyses": "statistics", "keep": 0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options))
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_never_waits_for_the_device(
    no_waiting: Any, options: dict[str, Any], branch: bool, train: bool
) -> None:
    model = Net(branch).cuda().train(train)
    x = torch.randn(2, 3, 16, 16, device="cuda")
    model(x)
    options = dict(options)
    if "analyses" in options:
        options["analyses"] = Statistics()
    with no_waiting, capture(model, **options) as maps, torch.set_grad_enabled(train):
        for _ in range(4):
            out = model(x)
            if train:
                out.sum().backward()
        if "device" not in options:  # to read what is on its way is to wait for it
            assert all(fm.device.type == "cuda" for fm in maps)
        assert (maps.nbytes > 0) == (options.get("keep") != 0)


@pytest.mark.parametrize("branch", [False, True])
def test_a_model_on_a_side_stream(branch: bool) -> None:
    model = Net(branch).cuda().eval()
    bare = copy.deepcopy(model)
    stream = torch.cuda.Stream()
    with torch.no_grad(), capture(model) as maps:
        for n in range(20):
            x = torch.randn(8, 3, 64, 64, device="cuda", generator=_seeded(n))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)  # the reads below come long before the values
                model(x)
            torch.cuda.current_stream().wait_stream(stream)
            z = maps["conv1", "preactivation"].tensor
            expected = bare.norm(bare.conv1(x))
            assert torch.equal(z, expected)
            assert torch.equal(maps["conv1"].tensor, F.relu(expected))


def _seeded(n: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(n)


def test_a_cuda_graph_is_refused_by_name() -> None:
    model = Net(branch=False).cuda().eval()
    x = torch.randn(2, 3, 16, 16, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                expected = model(x)
        torch.cuda.current_stream().wait_stream(stream)
        with pytest.warns(CaptureWarning, match="CUDA graph"), capture(model) as maps:  # noqa: PT031
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = model(x)
            assert "CUDA graph" in maps.missed[0].reason
            graph.replay()
            torch.cuda.synchronize()
            assert torch.allclose(out, expected, atol=1e-5)
            assert torch.allclose(model(x), expected, atol=1e-5)
            assert len(maps) > 0


def test_memory_is_flat() -> None:
    model = Net(branch=False).cuda()
    x = torch.randn(16, 3, 64, 64, device="cuda")
    peaks = []
    with capture(model):
        for _ in range(8):
            torch.cuda.reset_peak_memory_stats()
            model(x).sum().backward()
            model.zero_grad()
            peaks.append(torch.cuda.max_memory_allocated())
    assert len(set(peaks[3:])) == 1, peaks


@pytest.mark.parametrize("filters", [None, [0, 3]])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("branch", [False, True])
def test_offload(branch: bool, dtype: Any, filters: Any) -> None:
    """Copies that begin late, the model overwriting its memory meanwhile, several passes kept."""
    model = Net(branch).cuda().eval()
    bare = copy.deepcopy(model)
    expected: list[Tensor] = []
    options: dict[str, Any] = {"filters": filters, "dtype": dtype, "device": "cpu", "keep": 3}
    kinds = ("response", "preactivation", "activation")
    with torch.no_grad(), capture(model, kinds=kinds, **options) as maps:
        for n in range(12):
            x = torch.randn(8, 3, 64, 64, device="cuda", generator=_seeded(n))
            torch.cuda._sleep(2_000_000)
            out = model(x)
            z = bare.norm(bare.conv1(x))
            expected.append(z if filters is None else z[:, filters])
            out.zero_()  # as soon as the pass has ended
        for fm in maps.select(layer="conv1", kind="preactivation"):
            assert fm.device.type == "cpu"
            assert fm.tensor.is_pinned()
            wanted = expected[fm.step].to(dtype or torch.float32).cpu()
            assert torch.equal(fm.tensor, wanted)
        assert not torch.equal(maps["head", "preactivation"].tensor, out.cpu())


def test_offload_uses_its_pinned_buffers_again() -> None:
    model = Net(branch=False).cuda().eval()
    with torch.no_grad(), capture(model, device="cpu") as maps:
        made = []
        for n in range(6):
            model(torch.randn(8, 3, 64, 64, device="cuda", generator=_seeded(n)))
            made.append(maps._session.wants.conversion.buffers.made)
        assert len(set(made[2:])) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_devices() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).to("cuda:0")
            self.b = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).to("cuda:1")

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.to("cuda:0")).to("cuda:1"))

    model = Split()
    with capture(model) as maps:
        for _ in range(3):
            model(torch.randn(2, 4))
        assert [str(maps[n].device) for n in ("a.0", "b.0")] == ["cuda:0", "cuda:1"]
