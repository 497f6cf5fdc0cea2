"""Statistics against NumPy in float64 over the concatenated data."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fmapkit
from fmapkit import (
    AmbiguousMapError,
    ArgumentError,
    CaptureWarning,
    DistributedError,
    FeatureMap,
    KindNotCapturedError,
    MapLookupError,
    NoActivationError,
    NoPassError,
    UnknownLayerError,
    capture,
)
from fmapkit.analysis import (
    Analysis,
    DeadFilters,
    LayerStatistics,
    Statistics,
    _blocks,
    _moments,
    _of_map,
    dead,
)
from fmapkit.analysis import statistics as statistics_module

Array = np.ndarray[Any, Any]


def fmap(tensor: Tensor, dim: int | None = 1, **tags: Any) -> FeatureMap:
    """A map as capture makes them."""
    filters = None if dim is None else range(tensor.shape[dim])
    known = {"kind": "activation", "layer": "conv", "filters": filters, **tags}
    return FeatureMap(tensor, filter_dim=dim, **known)


def fed(*tensors: Tensor, dim: int | None = 1, **options: Any) -> Statistics:
    stats = Statistics(**options)
    for tensor in tensors:
        stats.update(fmap(tensor, dim))
    return stats


def rows(tensors: Sequence[Tensor], dim: int | None) -> Array:
    """(filters, values) in float64: what was seen, put together."""
    arrays = [t.detach().cpu().to(torch.float64).numpy() for t in tensors]
    if dim is None:
        return np.concatenate([a.reshape(1, -1) for a in arrays], 1)
    moved = [np.moveaxis(a, dim, 0) for a in arrays]
    return np.concatenate([m.reshape(m.shape[0], -1) for m in moved], 1)


def assert_right(s: LayerStatistics, x: Array) -> None:
    """Within the tolerances that the docstring of Statistics states."""
    for name in ("mean", "variance", "std", "minimum", "maximum", "zero_fraction"):
        tensor = getattr(s, name)
        assert tensor.shape == (len(x),), name
        assert tensor.dtype == torch.float64, name
    assert s.count.tolist() == [x.shape[1]] * len(x)
    if not x.shape[1]:
        for name in ("mean", "variance", "minimum", "maximum", "zero_fraction"):
            assert getattr(s, name).isnan().all(), name
        assert s.nonfinite.tolist() == [0] * len(x)
        return
    with np.errstate(invalid="ignore"):
        mean, variance = x.mean(1), x.var(1)
    np.testing.assert_array_equal(s.minimum.cpu().numpy(), x.min(1))
    np.testing.assert_array_equal(s.maximum.cpu().numpy(), x.max(1))
    np.testing.assert_array_equal(s.zero_fraction.cpu().numpy(), (x == 0).sum(1) / x.shape[1])
    assert s.nonfinite.tolist() == (~np.isfinite(x)).sum(1).tolist()
    for got, true, allowed in (
        (s.mean.cpu().numpy(), mean, 1e-12 * (np.abs(mean) + np.sqrt(variance))),
        (s.variance.cpu().numpy(), variance, 1e-9 * variance + (1e-15 * mean) ** 2),
    ):
        finite = np.isfinite(true)
        np.testing.assert_array_equal(got[~finite], true[~finite])
        wrong = np.abs(got[finite] - true[finite]) > allowed[finite]
        assert not wrong.any(), (got, true)


# -- right, whatever the scale ------------------------------------------------------------------

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CENTRES = {torch.float64: 1e38, torch.float32: 1e36, torch.float16: 6e4, torch.bfloat16: 1e36}


@st.composite
def data(draw: st.DrawFn) -> tuple[list[Tensor], int]:
    """Batches of one layer: any scale, offset, type, split, order of axes and strides."""
    dtype = draw(st.sampled_from(DTYPES))
    scale = 10.0 ** draw(st.integers(-30, 30))
    offset = draw(st.sampled_from([0.0, 1.0, -3.0, 1e3, -1e8])) * scale
    filters = draw(st.sampled_from([1, 2, 3, 7]))
    form = draw(st.sampled_from(["images", "rows", "long rows", "unbatched", "volumes"]))
    shape, dim = {
        "images": ((filters, 3, 5), 1),
        "rows": ((filters,), 1),
        "long rows": ((filters, 200), 1),
        "unbatched": ((4, 3), 0),
        "volumes": ((2, 3, filters), -1),
    }[form]
    tensors = []
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draw(st.integers(1, 4))):
        batch = draw(st.sampled_from([0, 1, 1, 2, 5, 40]))
        size = (filters, *shape) if form == "unbatched" else (batch, *shape)
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        if draw(st.booleans()):
            x = x.relu()
        x = (x * scale + offset).clamp(-CENTRES[dtype], CENTRES[dtype]).to(dtype)
        if draw(st.booleans()) and x.dim() > 2:
            x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        if draw(st.booleans()) and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if draw(st.booleans()):
            x = torch.stack([x, -x], -1)[..., 0]  # every second value in memory
        tensors.append(x)
    return tensors, dim


@pytest.fixture(params=["by torch", "by numba"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the sums of a map on a CPU come from."""
    if request.param == "by torch":
        monkeypatch.setattr(_of_map, "_fused", lambda: None)
    else:
        pytest.importorskip("numba")
    return str(request.param)


@given(data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equal_to_numpy_at_any_scale(way: str, drawn: tuple[list[Tensor], int]) -> None:
    tensors, dim = drawn
    assert_right(fed(*tensors, dim=dim)["conv"], rows(tensors, dim))


@settings(max_examples=40)
@given(data(), st.sampled_from([50, 150, 2000]))
def test_equal_to_numpy_over_many_blocks(drawn: tuple[list[Tensor], int], size: int) -> None:
    """Blocks that split the batch, the filters, and the rows of one filter."""
    tensors, dim = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_of_map, "_fused", lambda: None)
        patch.setitem(_blocks._BLOCK, "cpu", size)
        assert_right(fed(*tensors, dim=dim)["conv"], rows(tensors, dim))


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """What runs on other devices, here: nothing is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (_moments, dead):
            patch.setattr(module, "at_hand", lambda device: False)
        yield


@settings(max_examples=30)
@given(data(), st.sampled_from([3, 50, 2**18]))
def test_equal_to_numpy_as_on_a_device(drawn: tuple[list[Tensor], int], size: int) -> None:
    tensors, dim = drawn
    with pytest.MonkeyPatch.context() as patch, as_on_a_device():
        patch.setitem(_blocks._BLOCK, "cpu", size)
        assert_right(fed(*tensors, dim=dim)["conv"], rows(tensors, dim))


SORTS: dict[str, Callable[[Array], Array]] = {
    "both signs": lambda x: x,
    "relu": lambda x: x.clip(0),
    "above 0": lambda x: abs(x) + 0.01,
    "below 0": lambda x: -abs(x) - 0.01,
    "at most 0": lambda x: -x.clip(0),  # with -0
    "constant": lambda x: 0 * x + float(np.float32(0.1)),  # of which NumPy's sums are exact
    "far": lambda x: x + 1000,
    "nothing": lambda x: 0 * x,
    "nan": lambda x: np.where(x == x.max(), np.nan, x),
    "-nan": lambda x: np.where(x == x.max(), -np.nan, x),
    "infinity": lambda x: np.where(x == x.max(), np.inf, x),
    "-infinity": lambda x: np.where(x == x.max(), -np.inf, x),
    "infinities": lambda x: np.where(x == x.max(), np.inf, np.where(x == x.min(), -np.inf, x)),
}


@pytest.mark.parametrize("shape", [(3, 1, 700), (41, 1, 5), (600, 1, 1), (1, 1, 9), (2, 1, 2100)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_filters_of_every_sort_beside_each_other(
    way: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    draw = np.random.default_rng(0)
    wanted = [sort(draw.standard_normal(shape)) for sort in SORTS.values()]
    for some in (wanted, wanted[1:3], wanted[2:3], wanted[3:4], wanted[2:4], wanted[4:6]):
        x = torch.from_numpy(np.concatenate(some, 1)).to(dtype)
        with np.errstate(invalid="ignore"):
            assert_right(fed(x, x)["conv"], rows([x, x], 1))
        with as_on_a_device(), np.errstate(invalid="ignore"):
            assert_right(fed(x, x)["conv"], rows([x, x], 1))


def test_a_map_is_gone_through_once() -> None:
    """Far from 0 it is the maps before that tell what to take off; constant filters too."""
    seen = []
    sums = _of_map._sums

    def counted(values: Tensor, *others: Any) -> Any:
        seen.append(values.numel())
        return sums(values, *others)

    x = torch.randn(16, 3, 700) * torch.tensor([1.0, 0, 1])[:, None]
    x += torch.tensor([0.0, 0.1, 1000])[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_of_map, "_sums", counted)
        stats = fed(x)
        assert seen == [x.numel()] * 2
        seen.clear()
        for _ in range(3):
            stats.update(fmap(x))
        assert seen == [x.numel()] * 3
    assert_right(stats["conv"], rows([x] * 4, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8, 1e30])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_million_values(way: str, dtype: torch.dtype, scale: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, 4, 25_000, generator=generator, dtype=torch.float64)
    x = ((x + offset) * scale).to(dtype)
    batches = x.split([1, 5, 0, 4])
    assert_right(fed(*batches)["conv"], rows(batches, 1))


def test_the_worst_value_to_shift_by(way: str) -> None:
    """The first one is far from all others, which n·eps bounds."""
    x = torch.randn(1, 2, 10**6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, :, 0] = torch.tensor([1e12, -1e30])
    assert_right(fed(x)["conv"], rows([x], 1))


def test_a_tiny_variance_far_from_zero(way: str) -> None:
    """float32 at 1e8 is spaced by 8: the values are 1e8 and 1e8 + 8, half of them each.

    Mean 1e8 + 4, variance 16, exactly; a sum of squares in float64 would be off by percents.
    """
    x = torch.full((1000, 1, 1000), 1e8)
    x[:, :, ::2] += 8
    s = fed(*x.split(100))["conv"]
    assert s.mean.item() == 1e8 + 4
    assert s.variance.item() == pytest.approx(16, rel=1e-9)


def test_float16_does_not_overflow(way: str) -> None:
    x = torch.full((64, 2, 8, 8), 6e4, dtype=torch.float16)
    x[:32] *= -1
    s = fed(x)["conv"]
    edge = float(torch.tensor(6e4, dtype=torch.float16))
    assert s.mean.tolist() == [0, 0]
    assert s.std.tolist() == [edge, edge]
    assert (s.minimum[0], s.maximum[0]) == (-edge, edge)


def test_a_drift_over_many_batches() -> None:
    """10,000 merges whose means wander far from the first."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, 4, 3, generator=generator) + torch.arange(10_000.0)[:, None, None]
    assert_right(fed(*x.split(1), dim=2)["conv"], rows([x], 2))


@pytest.mark.parametrize("compiled", [False, True])
def test_nan_and_infinity_are_seen(compiled: bool) -> None:
    nan, inf = torch.nan, torch.inf
    columns = [[1.0, nan], [inf, 2.0], [-inf, inf], [inf, inf], [0.0, -0.0], [-inf, 5.0]]
    first, second = torch.tensor(columns).T.reshape(2, 6, 1).split(1)
    for batches in ([first, second], [second, first], [torch.cat([first, second])]):
        stats = fed(*batches, compile=compiled)
        assert_right(stats["conv"], rows(batches, 1))
    s = stats["conv"]
    assert s.nonfinite.tolist() == [1, 1, 2, 2, 0, 1]
    assert s.mean.isnan().tolist() == [True, False, True, False, False, False]
    assert s.mean[1] == inf
    assert s.mean[5] == -inf
    assert s.zero_fraction.tolist() == [0, 0, 0, 0, 1, 0]
    assert "nan" in repr(s)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool])
def test_integers_and_booleans_are_numbers(way: str, dtype: torch.dtype) -> None:
    x = torch.arange(-12, 12).reshape(4, 3, 2).to(dtype)
    assert_right(fed(x, x)["conv"], rows([x, x], 1))


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (0, 3, 4)])
def test_empty_batches(way: str, shape: tuple[int, ...]) -> None:
    empty, full = torch.empty(shape), torch.randn(2, 3)
    assert_right(fed(empty)["conv"], rows([empty], 1))
    assert "0" in repr(fed(empty))
    for batches in ([empty, full], [full, empty], [empty, full, empty]):
        assert_right(fed(*batches)["conv"], rows([full], 1))


def test_no_filter_axis_is_one_value() -> None:
    maps = [torch.randn(2, 3, 4), torch.randn(5), torch.randn(())]
    s = fed(*maps, dim=None)["conv"]
    assert s.filters is None
    assert_right(s, rows(maps, None))


def test_a_map_of_one_filter() -> None:
    x = torch.randn(4, 3, 5)
    stats = Statistics()
    for index in (2, 0, 1):
        stats.update(fmap(x)[index])
    assert stats["conv"].filters == (0, 1, 2)
    assert_right(stats["conv"], rows([x], 1))


def test_expanded_and_overlapping_memory(way: str) -> None:
    x = torch.randn(3, 1, 4).expand(3, 5, 4)
    assert_right(fed(x)["conv"], rows([x], 1))
    y = torch.arange(30.0).as_strided((4, 3, 5), (2, 1, 3))
    assert_right(fed(y)["conv"], rows([y], 1))


def test_a_dtype_that_changes() -> None:
    maps = [torch.randn(4, 3), torch.randn(4, 3).half(), torch.randn(4, 3).double()]
    assert_right(fed(*maps)["conv"], rows(maps, 1))


def test_without_float64() -> None:
    """As on MPS: sums in float32, with their own precision."""
    torch.manual_seed(0)
    x = torch.randn(64, 3, 200) + 1e4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_moments, "accumulator", lambda device: torch.float32)
        s = fed(*x.split(16), bins="log2")["conv"]
    true = rows([x], 1)
    assert s.edges is not None
    assert s.histogram is not None
    expected = [np.bincount(np.digitize(row, s.edges.cpu().numpy()), minlength=62) for row in true]
    np.testing.assert_array_equal(s.histogram.cpu().numpy(), expected)
    assert s.mean.dtype == torch.float32
    np.testing.assert_allclose(s.mean.cpu().numpy(), true.mean(1), rtol=1e-6)
    np.testing.assert_allclose(s.variance.cpu().numpy(), true.var(1), rtol=1e-5)
    np.testing.assert_array_equal(s.maximum.cpu().numpy(), true.max(1))


def test_compiled_gives_the_same() -> None:
    torch.manual_seed(0)
    images, tall = torch.randn(4, 3, 8, 8).relu(), torch.randn(7, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        for x in (images, tall, images[:2] * 1e20, images.half(), images + 1e8):
            parts = [x, x * 3, x[:0], -x, x[1:]]
            assert_right(fed(*parts, compile=True, bins="log2")["conv"], rows(parts, 1))
        s = Statistics(compile=True)
        for value in (0.5, 0.005, 0.3, 0.2):
            s.update(fmap(torch.tensor([[0.995], [value]]), nonlinearity="sigmoid"))
        assert s["conv"].saturated_fraction.tolist() == [5 / 8]
    histograms = [
        fed(images, images, compile=c, bins="log2")["conv"].histogram for c in (False, True)
    ]
    assert histograms[0] is not None
    assert histograms[1] is not None
    assert torch.equal(*histograms)


def test_the_number_of_compilations_does_not_grow() -> None:
    """Neither with the values seen nor with the shapes: what is compiled is general."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    stats = Statistics(compile=True)
    for n in range(3, 12):
        for shape in ((n, 4, 5, n), (2 * n, n)):
            x = torch.randn(shape)
            for _ in range(3):
                stats.update(fmap(x, layer=f"{shape}"))
        if n == 5:
            assert counters["stats"]["unique_graphs"] > 0
            counters.clear()
    assert counters["stats"]["unique_graphs"] == 0


def test_a_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(statistics_module, "_compiled", lambda: broken)
    x = torch.randn(4, 3)
    with pytest.warns(CaptureWarning, match=r"torch\.compile failed.*no compiler here"):
        stats = fed(x, x, compile=True)
    assert_right(stats["conv"], rows([x, x], 1))


# -- saturation and histogram -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sigma", "low", "high"),
    [
        ("sigmoid", 0.01, 0.99),
        ("tanh", -0.98, 0.98),
        ("softsign", -0.98, 0.98),
        ("hardsigmoid", 0.0, 1.0),
        ("relu6", 0.0, 6.0),
        ("mine", 0.1, 0.9),
    ],
)
def test_saturated(sigma: str, low: float, high: float, dtype: torch.dtype) -> None:
    near = torch.linspace(-0.03, 0.03, 601, dtype=torch.float64)
    x = torch.stack([low + near, high + near, torch.full_like(near, (low + high) / 2)], 1).to(dtype)
    # Next to the bounds, where their rounding to the map's type would tell.
    for column, bound in enumerate((low, high)):
        x[0, column] = bound
        x[1, column] = torch.nextafter(x[0, column], torch.tensor(9.0, dtype=dtype))
        x[2, column] = torch.nextafter(x[0, column], torch.tensor(-9.0, dtype=dtype))
    stats = Statistics(saturation={"mine": (0.1, 0.9)})
    stats.update(fmap(x, nonlinearity=sigma))
    stats.update(fmap(x, nonlinearity=sigma, kind="preactivation"))
    true = rows([x], 1)
    expected = ((true <= low) | (true >= high)).mean(1)
    np.testing.assert_array_equal(stats["conv"].saturated_fraction.cpu().numpy(), expected)
    assert stats["conv", "preactivation"].saturated_fraction.isnan().all()


@pytest.mark.parametrize("sigma", ["relu", "gelu", "hardtanh", None])
def test_saturation_is_not_guessed(sigma: str | None) -> None:
    stats = Statistics()
    stats.update(fmap(torch.ones(2, 3), nonlinearity=sigma))
    assert stats["conv"].saturated_fraction.isnan().all()
    assert "–" in repr(stats)


@pytest.mark.parametrize("bins", ["log2", [0.0], [-1.0, -0.5, 0.0, 0.25, 2.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_histogram(bins: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 3, 7).mul(2).round(decimals=1).to(dtype)
    # On the edges, beside them, and beyond.
    special = [0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30]
    special += [s * 2.0**k * f for s in (1, -1) for k in range(-17, 18) for f in (1, 0.996, 1.008)]
    x.view(-1)[10 : 10 + len(special)] = torch.tensor(special).to(dtype)
    x[0, 0, 0], x[1, 1, 1], x[2, 1, 2] = torch.nan, torch.inf, -torch.inf
    s = fed(*x.split(70), bins=bins)["conv"]
    assert s.edges is not None
    assert s.histogram is not None
    edges = s.edges.cpu().numpy()
    if bins == "log2":
        powers = 2.0 ** np.arange(-14, 16)
        np.testing.assert_array_equal(edges, np.concatenate([-powers[::-1], [0], powers]))
    else:
        assert edges.tolist() == bins
    true = rows([x], 1)
    expected = [
        np.bincount(np.digitize(row[~np.isnan(row)], edges), minlength=len(edges) + 1)
        for row in true
    ]
    np.testing.assert_array_equal(s.histogram.cpu().numpy(), expected)
    assert s.histogram.sum(1).tolist() == [1399, 1400, 1400]  # all values but the NaN


# -- no waiting, nothing kept -------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Fails where a device would be waited for: a value on the host, a shape made of values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = str(func.overloadpacket).partition(".")[2]
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal")
        assert not any(w in name for w in waits), name
        self.seen += 1
        return func(*args, **(kwargs or {}))


def feed(stats: Any) -> None:
    """Every sort of map there is."""
    for _ in range(2):
        for step, x in enumerate((torch.randn(2, 3, 4, 4), torch.empty(0, 3, 4, 4))):
            for sigma in ("relu", "sigmoid", "gelu"):
                stats.update(fmap(x, layer=sigma, nonlinearity=sigma, step=step))
            stats.update(fmap(x.half(), layer="half"))
            stats.update(fmap(x, None, layer="whole", kind="output"))


def test_update_and_reading_wait_for_nothing() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        torch.ones(1).item()
    stats = Statistics(bins="log2")
    with as_on_a_device(), NoWaiting() as mode:
        feed(stats)
        _ = [s.std for s in stats]
    assert mode.seen > 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_is_not_waited_for_and_right(compiled: bool) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 16, 9, 9, device="cuda") * 1e-20 for _ in range(3)]
    stats = Statistics(bins="log2", compile=compiled)
    stats.update(fmap(batches[0]))  # compiles
    resumed = Statistics(bins="log2", compile=compiled)
    state = stats.state_dict()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in batches[1:]:
            stats.update(fmap(x))
        _ = stats["conv"].std
        resumed.load_state_dict(state)
        resumed.update(fmap(batches[1]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    s = stats["conv"]
    assert s.mean.device.type == "cuda"
    true = rows(batches, 1)
    np.testing.assert_allclose(s.variance.cpu().numpy(), true.var(1), rtol=1e-9)
    np.testing.assert_array_equal(s.maximum.cpu().numpy(), true.max(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 3), (2, 3, 4), (1, 3, 1)])
def test_the_maps_memory_is_not_kept(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=dtype)
    true = rows([x], 1)
    stats = fed(x)
    held = {
        t.untyped_storage().data_ptr() for t in stats.state_dict()["groups"][0]["tensors"].values()
    }
    assert x.untyped_storage().data_ptr() not in held
    x.fill_(torch.nan)
    assert_right(stats["conv"], true)


def test_in_inference_mode_and_out_of_it() -> None:
    stats, batches = Statistics(bins="log2"), []
    for mode in (torch.inference_mode, torch.enable_grad, torch.inference_mode, torch.no_grad):
        with mode():
            x = torch.randn(4, 3, requires_grad=mode is torch.enable_grad)
            stats.update(fmap(x))
            batches.append(x.detach())
        (group,) = stats.state_dict()["groups"]
        assert not any(t.is_inference() for t in group["tensors"].values())
    assert_right(stats["conv"], rows(batches, 1))
    assert not stats["conv"].mean.requires_grad
    assert not batches[1].requires_grad


# -- in a capture -------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.shared = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu_().mean((2, 3))
        return self.fc(self.shared(self.shared(x).tanh()).tanh())


def captured(stats: Statistics, passes: int = 3, **options: Any) -> dict[tuple[str, str], Array]:
    """Run a model, feed every map, and put together what the maps were."""
    torch.manual_seed(0)
    model = Net()
    seen: dict[tuple[str, str], list[tuple[Tensor, int | None]]] = {}
    with capture(model, **options) as maps, torch.no_grad():
        for n in range(passes):
            model(torch.randn(n + 1, 3, 6, 6))
            for fm in maps:
                stats.update(fm)
                seen.setdefault((fm.layer, fm.kind), []).append((fm.tensor.clone(), fm.filter_dim))
    return {key: rows([t for t, _ in them], them[0][1]) for key, them in seen.items()}


def test_every_layer_and_kind_over_passes_and_calls() -> None:
    stats = Statistics()
    true = captured(stats, kinds=("input", "response", "preactivation", "activation", "output"))
    assert [(s.layer, s.kind) for s in stats] == list(true)
    for (layer, kind), x in true.items():
        assert_right(stats[layer, kind], x)
    # 1 + 2 + 3 images, called twice in each pass
    assert stats["shared"].count.tolist() == [12] * 6
    assert stats["shared"].nonlinearity == "tanh"
    assert stats.layers == list(dict.fromkeys(layer for layer, _ in true))
    assert "conv" in stats
    assert "nope" not in stats
    assert len(stats) == len(true)


def test_picked_filters_are_named() -> None:
    stats = Statistics()
    true = captured(stats, layers="conv", filters=[1, 4])
    assert stats["conv"].filters == (1, 4)
    assert_right(stats["conv"], true["conv", "activation"])


def test_nested_outputs() -> None:
    lstm = nn.LSTM(3, 4)
    stats = Statistics()
    with capture(lstm, kinds="output") as maps, torch.no_grad():
        lstm(torch.randn(5, 2, 3))
        for fm in maps:
            stats.update(fm)
    paths = [fm.path for fm in maps]
    assert len(paths) == 3
    with pytest.raises(AmbiguousMapError, match=re.escape("path='[0]'")):
        stats[""]
    for fm in maps:
        s = stats["", "output", fm.path]
        assert s.path == fm.path
        assert s.count.sum() == fm.tensor.numel()
    (only,) = stats.select(path="[0]")
    assert only.path == "[0]"
    with pytest.raises(MapLookupError, match=re.escape("has no path '[9]'; seen: '[0]'")):
        stats["", "output", "[9]"]


def test_two_sigmas_of_one_layer_are_kept_apart() -> None:
    stats, x = Statistics(), torch.randn(4, 3)
    stats.update(fmap(x.tanh(), nonlinearity="tanh"))
    stats.update(fmap(x.sigmoid(), nonlinearity="sigmoid"))
    with pytest.raises(AmbiguousMapError, match=r"nonlinearity='tanh'.*nonlinearity='sigmoid'"):
        stats["conv"]
    (s,) = stats.select("c*", nonlinearity="sigmoid")
    assert_right(s, rows([x.sigmoid()], 1))


def test_parts_of_one_layer_are_put_together() -> None:
    x = torch.randn(4, 6)
    stats = Statistics()
    for part in (range(3, 6), range(3)):
        stats.update(fmap(x[:, part.start : part.stop], filters=part))
    assert stats["conv"].filters == (0, 1, 2, 3, 4, 5)
    assert_right(stats["conv"], rows([x], 1))


@pytest.mark.parametrize(
    ("dim", "shape", "says"),
    [
        (1, (4, 6), "had 3 filters (0 to 2) before and has 6 filters (0 to 5) now"),
        (1, (4, 1), "had 3 filters (0 to 2) before and has 1 filter (0) now"),
        (None, (4, 3), "had 3 filters (0 to 2) before and has no filter axis now"),
    ],
)
def test_other_filters_than_before(dim: int | None, shape: tuple[int, ...], says: str) -> None:
    stats = fed(torch.randn(4, 3))
    with pytest.warns(CaptureWarning, match=re.escape(says)):
        stats.update(fmap(torch.randn(shape), dim))
    stats.update(fmap(torch.randn(4, 4), filters=None))  # named already
    assert stats["conv"].count.tolist() == [4, 4, 4]
    assert list(stats.missed) == [("conv", "activation")]
    assert "stats.reset() begins anew" in stats.missed["conv", "activation"]
    stats.reset()
    stats.update(fmap(torch.randn(4, 6)))
    assert len(stats["conv"]) == 6
    assert stats.missed == {}


@pytest.mark.parametrize("kind", [Statistics, DeadFilters])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.ones(2, 3, dtype=torch.complex64), "it is complex"),
        (lambda: torch.ones(2, 3).to_sparse(), "it is sparse"),
        (lambda: torch.ones(2, 3, device="meta"), "it is on the meta device"),
    ],
    ids=["complex", "sparse", "meta"],
)
def test_what_is_left_out_is_named(kind: Any, make: Callable[[], Tensor], says: str) -> None:
    tensor = make()
    stats = kind()
    with pytest.warns(CaptureWarning, match=f"activation of layer 'conv': {says}"):
        stats.update(fmap(tensor))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats.update(fmap(tensor))  # said once
    assert list(stats.missed) == [("conv", "activation")]
    with pytest.raises(UnknownLayerError, match=f"was left out: {says}"):
        stats["conv"]
    stats.update(fmap(torch.ones(2, 3), layer="other"))
    assert "1 missed" in repr(stats)


# -- look-ups and words -------------------------------------------------------------------------


def test_lookups_that_have_no_answer() -> None:
    stats = Statistics()
    with pytest.raises(NoPassError, match=re.escape("capture(model, analyses=[stats])")):
        stats["conv"]
    captured(stats)
    with pytest.raises(UnknownLayerError, match="no layer 'cnv'; did you mean 'conv'"):
        stats["cnv"]
    with pytest.raises(NoActivationError, match=re.escape("stats['fc', 'preactivation']")):
        stats["fc"]
    with pytest.raises(NoActivationError):
        stats["fc", "activation"]
    with pytest.raises(KindNotCapturedError, match="no input of layer 'conv' has been seen"):
        stats["conv", "input"]
    with pytest.raises(KindNotCapturedError, match="'activations'; did you mean 'activation'"):
        stats["conv", "activations"]
    with pytest.raises(MapLookupError, match="the key is a layer's name"):
        stats[0]  # type: ignore[index]
    with pytest.raises(ArgumentError, match="unknown kind 'z'"):
        stats.select(kind="z")
    assert [s.layer for s in stats.select("[cf]*", "preactivation")] == ["conv", "fc"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bins": 10}, "bins takes the edges"),
        ({"bins": []}, "bins takes the edges"),
        ({"bins": [1.0, 1.0]}, "increasing"),
        ({"bins": [0.0, float("inf")]}, "finite"),
        ({"bins": "auto"}, "'log2' or None, not 'auto'"),
        ({"saturation": {"tanh": 1.0}}, "(low, high)"),
        ({"saturation": {"tanh": (1.0, -1.0)}}, "low < high"),
        ({"compile": 1}, "True or False, not 1"),
    ],
)
def test_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(says)):
        Statistics(**options)


def test_tables() -> None:
    """Values by hand: filter 0 is 0, 2, 0, 2; filter 1 is 1, 1, 1, 1."""
    assert repr(Statistics()) == "Statistics: no map seen yet"
    assert Statistics()
    x = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    stats = Statistics()
    for _ in range(2):
        stats.update(fmap(x, nonlinearity="relu"))
    assert repr(stats["conv"]).splitlines() == [
        "filter  values  mean  std  min  max   zero  saturated  non-finite",
        "──────  ──────  ────  ───  ───  ───  ─────  ─────────  ──────────",
        "     0       4     1    1    0    2  50.0%          –           0",
        "     1       4     1    0    1    1   0.0%          –           0",
        "LayerStatistics: 'conv', activation, σ=relu",
    ]
    # All eight together: mean 1, variance (4·1 + 4·0)/8 = 0.5.
    assert repr(stats).splitlines()[2:] == [
        "conv   activation  relu        2       8     1  0.7071    0    2  25.0%          –"
        "           0",
        "Statistics: 1 kinds of map of 1 layers",
    ]
    assert "4 more filters" in repr(fed(torch.randn(2, 20))["conv"])


def test_windows() -> None:
    """What is taken is what was seen since; merged, it is what would have been seen without."""
    tensors = [torch.randn(3, 2, 5) * 10**n for n in range(4)]
    stats, epochs = Statistics(bins=[0.0], saturation={"s": (-1.0, 1.0)}), []
    for first, second in (tensors[:2], tensors[2:]):
        stats.update(fmap(first, nonlinearity="s"))
        stats.update(fmap(second, nonlinearity="s"))
        epochs.append(stats.take())
    assert not len(stats)
    for epoch, seen in zip(epochs, (tensors[:2], tensors[2:]), strict=True):
        assert_right(epoch["conv"], rows(seen, 1))
        assert not epoch["conv"].saturated_fraction.isnan().any()
    epochs[0].merge(epochs[1])
    assert_right(epochs[0]["conv"], rows(tensors, 1))
    dead = DeadFilters(after=2)
    taken = []
    for x in (torch.tensor([[0.0, 1.0]] * 2), torch.tensor([[1.0, 0.0]] * 2)):
        dead.update(fmap(x))
        taken.append(dead.take())
    assert [epoch["conv"].dead_filters for epoch in taken] == [[0], [1]]
    assert not len(dead)


def test_digits_lost_without_a_shift() -> None:
    """Filters far from 0, constant, or without any spread, among others that are near it."""
    x = torch.randn(16, 5, 40, dtype=torch.float64).float()
    x[:, 1] += 1e6
    x[:, 2] = 0.1
    x[:, 3] = 0
    x[:, 4] *= 1e-40
    assert_right(fed(x)["conv"], rows([x], 1))
    assert_right(fed(x.to(torch.float64) * 1e-170)["conv"], rows([x.to(torch.float64) * 1e-170], 1))


def test_it_is_an_analysis() -> None:
    assert isinstance(Statistics(), Analysis)
    assert fmapkit.Analysis is Analysis
    assert not isinstance(object(), Analysis)


# -- merge, checkpoint, copies ------------------------------------------------------------------


def same_bits(a: Statistics, b: Statistics) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    if [g["filters"] for g in mine["groups"]] != [g["filters"] for g in theirs["groups"]]:
        return False
    pairs = zip(mine["groups"], theirs["groups"], strict=True)
    return all(
        g["count"] == h["count"] and torch.equal(g["tensors"][key], h["tensors"][key])
        for g, h in pairs
        for key in g["tensors"]
    )


def through_file(analysis: Any, other: Any) -> Any:
    """Another one, which has loaded what was saved of an analysis."""
    file = io.BytesIO()
    torch.save(analysis.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def pickled(analysis: Any) -> Any:
    return pickle.loads(pickle.dumps(analysis))


@pytest.mark.parametrize(
    "again", [lambda s: through_file(s, Statistics(bins="log2")), copy.deepcopy, pickled]
)
def test_resumed_gives_the_same_bits(again: Callable[[Statistics], Statistics]) -> None:
    whole, first = Statistics(bins="log2"), Statistics(bins="log2")
    batches = [torch.randn(3, 2, 5) for _ in range(6)]
    for n, x in enumerate(batches):
        whole.update(fmap(x, nonlinearity="tanh"))
        if n == 3:
            kept, first = copy.deepcopy(first), again(first)
            assert same_bits(kept, first)
        first.update(fmap(x, nonlinearity="tanh"))
    assert same_bits(whole, first)
    assert_right(first["conv"], rows(batches, 1))
    assert torch.equal(whole["conv"].saturated_fraction, first["conv"].saturated_fraction)


def test_a_state_is_not_changed_by_going_on() -> None:
    stats = fed(torch.randn(4, 3), bins="log2")
    state = stats.state_dict()
    before = copy.deepcopy(state)
    stats.update(fmap(torch.randn(4, 3)))
    other = Statistics(bins="log2")
    other.load_state_dict(state)
    other.update(fmap(torch.randn(4, 3)))
    for key, tensor in state["groups"][0]["tensors"].items():
        assert torch.equal(tensor, before["groups"][0]["tensors"][key])


def test_merge_on_one_process() -> None:
    a, b = [torch.randn(5, 3) for _ in range(2)], [torch.randn(7, 3) + 9]
    first, second = fed(*a), fed(*b)
    second.update(fmap(torch.ones(2, 2), layer="more"))
    first.merge(second)
    assert_right(first["conv"], rows([*a, *b], 1))
    assert_right(second["conv"], rows(b, 1))
    assert first["more"].count.tolist() == [2, 2]


def test_merges_that_cannot_be_meant() -> None:
    stats = fed(torch.randn(2, 3))
    with pytest.raises(ArgumentError, match="merge takes Statistics, not dict"):
        stats.merge({})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="merge: the other one was made with bins="):
        stats.merge(fed(torch.randn(2, 3), bins="log2"))
    with pytest.raises(ArgumentError, match="made with saturation="):
        stats.merge(fed(torch.randn(2, 3), saturation={"hardtanh": (-1.0, 1.0)}))
    with pytest.raises(ArgumentError, match="had 3 filters"):
        stats.merge(fed(torch.randn(2, 4)))
    for state in ({}, {"version": 2, "groups": []}, None):
        with pytest.raises(ArgumentError, match=r"what Statistics\.state_dict\(\) gave"):
            stats.load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(
        ArgumentError,
        match=r"load_state_dict: the other one was made with bins=\[0.0\], this has None",
    ):
        stats.load_state_dict(Statistics(bins=[0.0]).state_dict())
    assert stats["conv"].count.tolist() == [2, 2, 2]


def test_reduce_needs_a_process_group() -> None:
    with pytest.raises(DistributedError, match="init_process_group first"):
        fed(torch.randn(2, 3)).reduce()


def test_import_of_the_library_does_not_pay_for_it() -> None:
    code = """
import sys, fmapkit
print([m for m in sys.modules if "fmapkit.analysis" in m])
from fmapkit.analysis import Statistics
Statistics()
print([m for m in sys.modules if "numba" in m])
"""
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.split("\n") == ["[]", "[]", ""]
    assert {"Statistics", "Analysis"} <= set(dir(fmapkit.analysis))
    with pytest.raises(AttributeError, match=r"'fmapkit\.analysis' has no attribute 'Statistic'"):
        _ = fmapkit.analysis.Statistic
