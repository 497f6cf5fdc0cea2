"""Copies, pickles and files of maps: values and tags, and nothing of the model."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmapkit import (
    ArgumentError,
    FeatureMap,
    FeatureMaps,
    MapLookupError,
    MapOverwrittenError,
    UnknownLayerError,
    capture,
)
from tests.truth import same_bits, seed

safetensors_torch = pytest.importorskip("safetensors.torch")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + x)


class Net(nn.Module):
    """A shared block, an in-place σ, attention with `in_proj`, and a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.again = self.blocks[0]  # another name of the same module
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = F.gelu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = self.again(x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens, _ = self.attention(tokens, tokens, tokens)
        return {"logits": self.fc(tokens.mean(1)), "nested": [tokens]}


KINDS: Any = ("input", "response", "preactivation", "activation", "output")


def images(step: int = 0) -> Tensor:
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))


def captured(**options: Any) -> tuple[Net, FeatureMaps]:
    seed(0)
    model = Net()
    options = {"kinds": KINDS, "keep": 2, "gradients": True, **options}
    with capture(model, **options) as maps:
        for step in range(3):
            model(images(step))["logits"].square().sum().backward()
    return model, maps


def pickled(maps: Any) -> Any:
    return pickle.loads(pickle.dumps(maps))


def torch_saved(maps: Any) -> Any:
    file = io.BytesIO()
    torch.save(maps, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def written(maps: FeatureMaps) -> FeatureMaps:
    path = Path(written.folder) / "run.safetensors"  # type: ignore[attr-defined]
    maps.save(path)
    return FeatureMaps.load(path)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> None:
    written.folder = tmp_path  # type: ignore[attr-defined]


WAYS = [copy.copy, copy.deepcopy, pickled, torch_saved, written]


def tags(fm: FeatureMap) -> tuple[Any, ...]:
    return (
        *(fm.kind, fm.layer, fm.filter, fm.call, fm.step, fm.training, fm.nonlinearity, fm.path),
        *(fm.filter_dim, fm.filters, fm.shape, fm.dtype, fm.device),
    )


def assert_same(one: FeatureMap, other: FeatureMap) -> None:
    assert tags(one) == tags(other)
    assert type(one.filters) is type(other.filters)
    assert same_bits(one.tensor.detach(), other.tensor)
    assert not other.tensor.requires_grad
    for mine, its in ((one.grad, other.grad), (one.edited, other.edited)):
        assert (mine is None) == (its is None)
        assert mine is None or same_bits(mine, its)


@pytest.mark.parametrize("way", WAYS)
def test_all_maps_with_their_tags_and_gradients(way: Any) -> None:
    _, maps = captured()
    kept = way(maps)
    assert isinstance(kept, FeatureMaps)
    assert len(kept) == len(maps) > 30
    assert kept.layers == maps.layers
    assert kept.keys() == maps.keys()
    assert repr(kept).split("\n")[:-1] == repr(maps).split("\n")[:-1]
    every = maps.select()
    assert {fm.step for fm in every} == {1, 2}
    assert any(fm.grad is not None for fm in every)
    for one, other in zip(every, kept.select(), strict=True):
        assert_same(one, other)
        if one.filters is not None and one.filters:
            assert_same(one[one.filters[-1]], other[one.filters[-1]])


@pytest.mark.parametrize("way", WAYS)
def test_look_ups_are_those_of_the_capture(way: Any) -> None:
    _, maps = captured()
    kept = way(maps)
    assert_same(maps["stem"], kept["stem"])
    assert_same(
        maps["blocks.1.conv", "preactivation", 2], kept["blocks.1.conv", "preactivation", 2]
    )
    assert_same(maps["attention.in_proj", "response"], kept["attention.in_proj", "response"])
    assert_same(maps["blocks.1"], kept["blocks.1"])  # no filter layer: its output
    assert "again" in kept
    for layer in ("again.conv", "blocks.?.conv", "blocks", "att*", ["fc", "stem"]):
        for one, other in zip(maps.select(layer), kept.select(layer), strict=True):
            assert_same(one, other)
    for key in ("again.conv", "blokcs.1", ("fc", "activation"), "blocks", "stem.*"):
        with pytest.raises(MapLookupError) as live:
            maps[key]
        with pytest.raises(type(live.value)) as held:
            kept[key]
        assert str(held.value) == str(live.value)


@pytest.mark.parametrize("way", WAYS)
def test_edits_and_some_filters(way: Any) -> None:
    seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    edit = {"0": lambda fm: fm.tensor * 2}
    with capture(model, filters={"0": [1, 4], "2": 0}, edit=edit) as maps, torch.no_grad():
        model(images())
    kept = way(maps)
    assert kept["0"].filters == (1, 4)
    assert same_bits(kept["0"].edited, maps["0"].tensor * 2)
    for one, other in zip(maps, kept, strict=True):
        assert_same(one, other)


def test_a_copy_of_a_copy() -> None:
    _, maps = captured()
    again = written(pickled(copy.deepcopy(written(maps))))
    for one, other in zip(maps.select(), again.select(), strict=True):
        assert_same(one, other)


def test_the_copy_is_nobody_elses() -> None:
    """Neither what the model does to its memory, nor `clear()`, reaches it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with capture(model) as maps, torch.no_grad():
        out = model(torch.randn(2, 4))
    before = out.clone()
    kept, one = copy.deepcopy(maps), copy.deepcopy(maps["0"])
    out.fill_(7)
    maps.clear()
    assert same_bits(kept["0"].tensor, before)
    assert same_bits(one.tensor, before)
    kept.clear()
    assert len(kept) == 0
    assert kept.nbytes == 0


def test_a_map_that_was_overwritten_is_not_kept_in_silence(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with capture(model) as maps, torch.no_grad():
        model(torch.randn(2, 4)).add_(1)
    for way in (copy.deepcopy, pickle.dumps, lambda m: m.save(tmp_path / "x")):
        with pytest.raises(MapOverwrittenError, match="activation of layer '0'"):
            way(maps)
    assert not list(tmp_path.iterdir())


def test_bytes_of_a_pickle_are_those_of_the_values() -> None:
    """A map of 8 KB is a view into a megabyte; its pickle has the 8 KB, and the tags."""

    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x)[:1])

    model = Sliced()
    with capture(model) as maps, torch.no_grad():
        model(torch.randn(128, 1, 32, 64))
    z = maps["conv", "preactivation"]
    assert z.nbytes == 8192
    assert z.tensor.untyped_storage().nbytes() == 1 << 20
    assert len(pickle.dumps(z)) < 8192 + 2048
    assert len(pickle.dumps(z[0])) < 8192 + 2048
    file = io.BytesIO()
    torch.save(z, file)
    assert len(file.getvalue()) < 8192 + 4096
    assert same_bits(pickled(z).tensor, z.tensor)


def test_what_maps_share_is_kept_once(tmp_path: Path) -> None:
    seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU())
    with capture(model, kinds=KINDS) as maps, torch.no_grad():
        model(torch.randn(32, 64))
    # x, z = response, a; the outputs are z and a again: 32·64 + 2·32·256 numbers of 4 bytes.
    size = 4 * (32 * 64 + 2 * 32 * 256)
    assert maps.nbytes == size
    maps.save(tmp_path / "x.safetensors")
    assert size < (tmp_path / "x.safetensors").stat().st_size < size + 8192
    for kept in (written(maps), pickled(maps), copy.deepcopy(maps)):
        assert kept.nbytes == size


def test_a_copied_map_is_the_same_memory_and_a_deep_copy_is_not() -> None:
    _, maps = captured()
    fm = maps["stem"]
    assert copy.copy(fm).tensor is fm.tensor
    assert copy.deepcopy(fm).tensor.data_ptr() != fm.tensor.data_ptr()
    assert copy.deepcopy(fm[2]).tensor.is_contiguous()
    assert_same(fm[2], copy.deepcopy(fm[2]))
    for one in (fm, fm[2]):
        assert_same(one, pickled(one))


def test_maps_of_the_graph_are_kept_without_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with capture(model, detach=False) as maps:
        model(torch.randn(2, 4))
    assert maps["0"].tensor.requires_grad
    for way in WAYS:
        assert not way(maps)["0"].tensor.requires_grad
    assert not pickled(maps["0"]).tensor.requires_grad


def test_maps_made_in_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with capture(model) as maps, torch.inference_mode():
        model(torch.randn(2, 4))
        for way in WAYS:
            kept = way(maps)["0"].tensor
            assert same_bits(kept, maps["0"].tensor)
            assert kept.is_inference() == (way in (pickled, torch_saved))  # torch's own way


def test_no_pass_and_no_maps(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with capture(model) as maps:
        kept = written(maps)
        assert len(kept) == 0
        with pytest.raises(MapLookupError, match="no forward pass has run"):
            kept["0"]
        model(torch.randn(0, 4))  # an empty batch
    assert written(maps)["0"].shape == (0, 4)


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


class Given(nn.Module):
    """Returns what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 3), max_size=4),
    step=st.integers(1, 3),
    turn=st.booleans(),
    conj=st.booleans(),
)
def test_every_dtype_shape_and_stride_comes_back(
    dtype: torch.dtype, shape: list[int], step: int, turn: bool, conj: bool
) -> None:
    """Bit for bit, NaN and -0 included, whatever the strides."""
    raw = torch.randint(0, 256, [*shape, step, max(1, torch.empty(0, dtype=dtype).element_size())])
    value = (raw % 2 if dtype is torch.bool else raw).to(torch.uint8).view(dtype)[..., 0]
    value = value[..., 0] if not shape else value.select(-1, 0)
    value = value.T if turn and value.dim() == 2 else value
    value = value.conj() if conj and dtype.is_complex else value
    model = Given()
    with capture(model, kinds="output") as maps, torch.no_grad():
        model(value)
    for kept in (written(maps), torch_saved(maps)):
        found = kept[""].tensor
        assert found.shape == value.shape
        assert found.dtype == value.dtype
        as_bytes = (t.resolve_conj().contiguous().reshape(-1) for t in (found, value))
        one, other = (t.view(torch.uint8) if t.numel() else t for t in as_bytes)
        assert not one.numel() or torch.equal(one, other)


def test_sparse_quantized_and_nested_tensors_are_refused_by_the_file(tmp_path: Path) -> None:
    model = Given()
    sparse = torch.eye(3).to_sparse()
    with capture(model, kinds="output") as maps, torch.no_grad():
        model.forward = lambda x: x  # type: ignore[method-assign]
        model(sparse)
    text = (
        "the output of layer '' (step 0, call 0) cannot be saved: a safetensors file holds dense "
        "tensors with values, of the usual types, and it is torch.sparse_coo on cpu; choose with "
        "capture(layers=...), or keep it by torch.save(maps, ...)"
    )
    with pytest.raises(ArgumentError) as caught:
        maps.save(tmp_path / "x")
    assert str(caught.value) == text
    assert (caught.value.layer, caught.value.kind, caught.value.step) == ("", "output", 0)
    assert torch.equal(torch_saved(maps)[""].tensor.to_dense(), sparse.to_dense())


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    """No pickle; another library reads the values, by names that say what they are."""
    _, maps = captured(keep=1, gradients=False)
    path = tmp_path / "run.safetensors"
    maps.save(path)
    tensors = safetensors_torch.load_file(path)
    assert same_bits(tensors["step2/stem/activation"], maps["stem"].tensor)
    again = maps.select("blocks.0.conv", "activation", call=1)[0]
    assert same_bits(tensors["step2/blocks.0.conv/activation/call1"], again.tensor)
    header = path.read_bytes()
    length = int.from_bytes(header[:8], "little")
    metadata = json.loads(header[8 : 8 + length])["__metadata__"]
    assert set(metadata) == {"fmapkit", "format"}
    assert json.loads(metadata["fmapkit"])["format"] == 1
    assert b"cpickle" not in header.lower()


def test_selectors_that_need_the_model_are_refused() -> None:
    model, maps = captured()
    kept = copy.deepcopy(maps)
    for selector in (nn.Conv2d, model.stem, lambda name, module: True):
        with pytest.raises(ArgumentError, match="have no modules any more; select them by name"):
            kept.select(selector)
    assert kept.select(lambda name: name == "stem")
    with pytest.raises(UnknownLayerError, match="did you mean 'stem'"):
        kept.select("stme")


def test_files_that_are_none_of_ours(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FeatureMaps.load(tmp_path / "none")
    broken = tmp_path / "broken"
    broken.write_bytes(b"no safetensors file at all")
    with pytest.raises(ArgumentError, match="is no whole safetensors file"):
        FeatureMaps.load(broken)
    other = tmp_path / "other"
    safetensors_torch.save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(ArgumentError, match=r"not one that FeatureMaps\.save wrote"):
        FeatureMaps.load(other)
    later = tmp_path / "later"
    safetensors_torch.save_file({}, later, {"fmapkit": '{"format": 2}'})
    with pytest.raises(ArgumentError, match=r"is of version 2 of this format, .* version 1"):
        FeatureMaps.load(later)
    _, maps = captured(keep=1)
    whole = tmp_path / "whole"
    maps.save(whole)
    whole.write_bytes(whole.read_bytes()[:-5])  # a copy that broke off
    with pytest.raises(ArgumentError, match="is no whole safetensors file"):
        FeatureMaps.load(whole)


def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, maps = captured(keep=1)
    path = tmp_path / "run.safetensors"
    maps.save(path)
    before = path.read_bytes()

    def full(tensors: Any, where: str, metadata: Any) -> None:
        Path(where).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors_torch, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        maps.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_without_safetensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, maps = captured(keep=1)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for way in (lambda: maps.save(tmp_path / "x"), lambda: FeatureMaps.load(tmp_path / "x")):
        with pytest.raises(ImportError, match=r"pip install fmapkit\[safetensors\]"):
            way()


def test_a_pickle_needs_no_class_of_the_models() -> None:
    """It opens in a process where the model's class does not exist."""
    _, maps = captured(keep=1)
    code = (
        "import pickle, sys; maps = pickle.load(sys.stdin.buffer); "
        "print(maps.layers[0], float(maps['stem'].tensor.sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(maps), capture_output=True, check=True
    )
    layer, total = done.stdout.decode().split()
    assert layer == "stem"
    assert float(total) == float(maps["stem"].tensor.sum())


def test_a_part_of_a_map_stays_a_part() -> None:
    """Whether other ranks have more of it is not known any more; that there may be is."""
    from fmapkit.torchlib.sharded import Parts

    _, maps = captured(keep=1)
    fm = replace(maps["stem"], parts=Parts(total=8))
    for kept in (pickled(fm), copy.deepcopy(fm)):
        assert kept.parts == Parts(unknown=True)
    assert pickled(maps["stem"]).parts is None
