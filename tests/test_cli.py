"""The command line: models by their names, data sets by their places."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fmapkit.cli import main

pytest.importorskip("zarr", minversion="3.1.4")

from fmapkit.data import Features

ROOT = Path(__file__).parent.parent
NET = "tests.test_cli:net"


def net(width: int = 4) -> nn.Module:
    """What the commands name."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 2),
    )


fixed = net()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images of two labels, of different sizes."""
    image = pytest.importorskip("PIL.Image")
    drawn = np.random.default_rng(0)
    for n in range(6):
        folder = tmp_path / "photos" / ("cat", "dog")[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = drawn.integers(0, 255, (12 + n, 16, 3), dtype=np.uint8)
        image.fromarray(pixels).save(folder / f"{n}.png")
    return tmp_path / "photos"


def test_show_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", NET, "--input", "2x3x8x8", "--set", "width=5"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "layer  kind           filters  shape    dtype    device    bytes  σ",
        "─────  ─────────────  ───────  ───────  ───────  ──────  ───────  ────",
        "0      preactivation        5  2×5×6×6  float32  cpu     1.4 KiB  relu",
        "0      activation           5  2×5×6×6  float32  cpu     1.4 KiB  relu",
        "4      preactivation        2  2×2      float32  cpu        16 B",
        "FeatureMaps: 3 maps of 2 layers, 2.8 KiB held, step 0",
    ]


def test_show_takes_names_and_integers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 1, "vocab_size": 30}
    options = [text for k, v in sizes.items() for text in ("--set", f"{k}={v}")]
    name = ["show", "transformers:bert", *options, "--kinds", "activation"]
    assert main([*name, "--input", "input_ids=1x6:int64"]) == 0
    assert "encoder.layer.0.intermediate.dense" in capsys.readouterr().out
    assert main(name) == 0  # its dummy inputs
    assert "gelu" in capsys.readouterr().out


def test_extract_a_folder_of_images(images: Path, tmp_path: Path) -> None:
    to = str(tmp_path / "f.zarr")
    command = ["extract", NET, str(images), "--layers", "0", "--to", to, "--no-progress"]
    command += ["--pool", "mean", "--image-size", "8", "--batch", "4"]
    command += ["--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]
    assert main(command) == 0
    features = Features(to)
    assert features.fields["path"][:].tolist() == [
        *("cat/0.png", "cat/2.png", "cat/4.png", "dog/1.png", "dog/3.png", "dog/5.png"),
    ]
    assert features.fields["label"][:].tolist() == [0, 0, 0, 1, 1, 1]
    assert features["0"].shape == (6, 4)
    from PIL import Image

    with Image.open(images / "dog" / "1.png") as image:  # 16 wide, 13 high
        assert image.size == (16, 13)
        small = image.convert("RGB").resize((10, 8), Image.Resampling.BICUBIC).crop((1, 0, 9, 8))
    x = (torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255 - 0.5) / 0.25
    torch.manual_seed(0)
    model = net().eval()
    with torch.no_grad():
        expected = model[1](model[0](x[None])).mean((2, 3))[0]
    torch.testing.assert_close(features["0"][3], expected)
    assert main(command) == 0  # all is there
    assert main([*command, "--stop", "--dtype", "float16"]) == 2


floats = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).eval()
tokens = nn.Sequential(nn.Embedding(4, 2), nn.Tanh()).eval()


def test_extract_numpy_files(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(10, 3, 6, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", input=x, y=np.arange(10), scale=np.float32(2), z=np.arange(3))
    (tmp_path / "parts").mkdir()
    np.save(tmp_path / "parts" / "0.npy", x[:7])
    np.save(tmp_path / "parts" / "1.npy", x[7:])
    with torch.no_grad():
        rows = torch.cat([fixed[:2](part) for part in torch.from_numpy(x).split(4)])
    for place in ("x.npy", "x.npz", "parts"):
        to = str(tmp_path / f"{place}.zarr")
        command = ["extract", "tests.test_cli:fixed", str(tmp_path / place), "--layers", "0"]
        assert main([*command, "--to", to, "--batch", "4", "--no-progress"]) == 0
        assert torch.equal(Features(to)["0"].tensor(), rows)
    fields = Features(str(tmp_path / "x.npz.zarr")).fields
    assert list(fields) == ["y"]  # the others are not of as many rows
    assert fields["y"][:].tolist() == list(range(10))


@pytest.mark.parametrize("dtype", ["f2", "f8", ">f4", ">f8", ">i4", "u2", "u4", ">u2"])
def test_extract_numbers_of_any_type_with_text_beside(tmp_path: Path, dtype: str) -> None:
    x = np.random.default_rng(0).integers(0, 4, (6, 3)).astype(dtype)
    name, two = np.array([*"abcdé", "fgh"]), np.array([["a", "b"]] * 6)
    beside = {"name": name, "two": two, "x": x, "y": x[:, 0]}
    np.savez(tmp_path / "x.npz", input=x, **beside)
    model = "floats" if "f" in dtype else "tokens"
    to = str(tmp_path / "f.zarr")
    command = ["extract", f"tests.test_cli:{model}", str(tmp_path / "x.npz"), "--layers", "0"]
    assert main([*command, "--to", to, "--kinds", "output", "--no-progress"]) == 0
    given = torch.from_numpy(x.astype(np.float32 if model == "floats" else np.int64))
    with torch.no_grad():
        assert torch.equal(Features(to)["0"].tensor(), globals()[model][0](given))
    for field, values in beside.items():
        assert Features(to).fields[field][:].tolist() == values.tolist()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.array([["a", "b"]]), "x.npy has values of type <U1, and a model takes numbers"),
        (np.array([["2020"]], "datetime64[D]"), "has values of type datetime64[D], and a model"),
        (np.array([[None, 1]]), "cannot read the arrays of"),
        (b"nothing of NumPy's", "cannot read the arrays of"),
        (b"", "cannot read the arrays of"),
    ],
)
def test_arrays_that_no_model_takes(
    values: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "x.npy"
    if isinstance(values, bytes):
        place.write_bytes(values)
    else:
        np.save(place, values)
    command = ["extract", "tests.test_cli:floats", str(place), "--layers", "0"]
    assert main([*command, "--to", str(tmp_path / "f")]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--columns", "y"], ["--split", "train"]])
def test_options_of_another_data_set_are_refused(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "x.npz", input=np.zeros((4, 3, 6, 6), np.float32), y=np.arange(4))
    where = [str(tmp_path / "x.npz"), "--layers", "0", "--to", str(tmp_path / "f")]
    assert main(["extract", "tests.test_cli:fixed", *where, *option]) == 2
    assert "--columns and --split are of a Hugging Face data set" in capsys.readouterr().err


class Tokens(nn.Module):
    """Takes what a tokenised data set has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(10, 4), nn.Linear(4, 6)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.up(self.embed(input_ids)))


def test_extract_a_hugging_face_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    ids = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 1]]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "label": [0, 1, 1, 0]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "d")
    to = str(tmp_path / "f.zarr")
    command = ["extract", "tests.test_cli:Tokens", str(tmp_path / "d"), "--layers", "up"]
    command += ["--to", to, "--mask", "attention_mask", "--keep", "label", "input_ids"]
    command += ["--batch", "2", "--no-progress"]
    assert main(command) == 2
    assert "has the splits 'train'; choose one with --split" in capsys.readouterr().err
    assert main([*command, "--split", "train"]) == 0
    features = Features(to)
    assert features.fields["input_ids"][:].tolist() == [n for row in ids for n in row]
    assert features.fields["sample"][:].tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3, 3]
    torch.manual_seed(0)
    model = Tokens()
    with torch.no_grad():
        flat = torch.tensor([n for row in ids for n in row])
        expected = torch.tanh(model.up(model.embed(flat)))
    torch.testing.assert_close(features["up"].tensor(), expected)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "resnet18"], "a model is named as timm:NAME, torchvision:NAME, transformers:"),
        (["show", "tests.nowhere:net"], "cannot import 'tests.nowhere'"),
        (["show", "tests.test_cli:nett"], "tests.test_cli has no 'nett'; did you mean 'net'"),
        (["show", "tests.test_cli:ROOT"], "is neither a model nor a function that makes one"),
        (["show", NET], "--input says the shape of what the model takes"),
        (["show", NET, "--input", "1,3,8"], "a shape is numbers with x between them"),
        (["show", NET, "--input", "1x3:int65"], "'int65' is no torch dtype"),
        (["show", NET, "--set", "width:5"], "--set takes key=value"),
        (["show", NET, "--pretrained"], "--pretrained is for timm, torchvision and transformers"),
        (["show", NET, "--weights", "no.pt"], "--weights no.pt: there is no such file"),
        (["show", NET, "--input", "1x3x8x8", "--layers", "9"], "layers='9' matches no module"),
        (["extract", NET, "nowhere", "--layers", "0", "--to", "f"], "there is nothing at nowhere"),
        (["extract", NET, str(ROOT / "docs"), "--layers", "0", "--to", "f"], "is not known: give"),
        (["extract", NET, str(ROOT / ".ci"), "--layers", "0", "--to", "f"], "no folder of images"),
    ],
)
def test_what_cannot_be_is_said(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith(f"fmapkit {arguments[0]}: ")


def test_weights_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": net(6).state_dict()}, tmp_path / "w.pt")
    command = ["show", NET, "--input", "1x3x8x8", "--weights", str(tmp_path / "w.pt")]
    assert main([*command, "--set", "width=6"]) == 0
    assert main(command) == 2
    assert "is of another model" in capsys.readouterr().err


def test_as_a_module() -> None:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "fmapkit", "extract", "--help"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "timm:resnet18" in done.stdout
