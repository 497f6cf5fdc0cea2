"""The commands, their arguments, and what they print."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit import FmapkitError, __version__, capture
from fmapkit.cli.inputs import open_data, preparation
from fmapkit.cli.models import load
from fmapkit.errors import ArgumentError

_NAMES = """\
how a model is named:
  timm:resnet18               a model of timm
  torchvision:resnet18        a model of torchvision
  transformers:bert           a kind of model of transformers, as its configuration has it
  transformers:./my-model     a folder that save_pretrained has written
  package.module:factory      a function (or class) that makes a model, or a model
With --pretrained its package loads the weights that it knows; --weights FILE loads a state_dict;
else they are drawn, the same ones each time.
"""

_SHOW = """\
examples:
  fmapkit show timm:resnet18 --input 1x3x224x224
  fmapkit show transformers:bert --input input_ids=1x16:int64 --layers 'encoder.layer.0*'
  fmapkit show my_models:make_net --set width=64 --input 4x10
"""

_EXTRACT = """\
what DATA can be:
  photos/            a folder of images; its first folders are labels, kept beside with the paths
  images.npy         an array of samples; a folder of .npy files is read one after the other
  arrays.npz         the array "input" (else the first); others of as many rows are kept beside
  tokenised/         what datasets.Dataset.save_to_disk has written

examples:
  fmapkit extract timm:resnet18 photos/ --pretrained --layers layer3 layer4 --pool mean --to f.zarr
  fmapkit extract transformers:./my-bert tokenised/ --layers encoder.layer.5 \\
      --mask attention_mask --to f.zarr
  torchrun --nproc-per-node 8 -m fmapkit extract timm:vit_base_patch16_224 photos/ --pretrained \\
      --layers blocks.11 --pool mean --device cuda --to s3://bucket/f.zarr

Interrupted in whatever way, the same command goes on where it was. In Python:
  from fmapkit.data import Features
  Features("f.zarr")["layer3"][:100]        # a tensor: the first hundred samples
"""


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    top = argparse.ArgumentParser(
        prog="fmapkit",
        description="See inside a PyTorch model: which feature maps it has, and features of a "
        "whole data set.",
        epilog=_NAMES + "\nfmapkit COMMAND --help tells more of each command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fmapkit {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    show = commands.add_parser(
        "show",
        help="the table of a model's feature maps",
        description="Run a model once and print the table of its feature maps: layer, kind, "
        "filters, shape, σ.",
        epilog=_NAMES + "\n" + _SHOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(show)
    show.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="shape of an input, e.g. 1x3x224x224; filled with noise, of integers with 0 and 1. "
        "Several are the model's arguments, in order or by name. Without it, the dummy inputs of "
        "a transformers model",
    )
    show.add_argument("--layers", nargs="+", metavar="L", help="names or globs; default: all")
    show.add_argument(
        "--kinds",
        nargs="+",
        default=["preactivation", "activation"],
        metavar="K",
        help="of input, response, preactivation, activation, output (default: preactivation "
        "activation)",
    )
    extract = commands.add_parser(
        "extract",
        help="features of a data set, in a Zarr store",
        description="Run a data set through a model and keep the features of some layers.",
        epilog=_NAMES + "\n" + _EXTRACT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(extract)
    _add_extract(extract)
    return top


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="the model; see below")
    command.add_argument("--pretrained", action="store_true", help="with the package's weights")
    command.add_argument("--weights", type=Path, metavar="FILE", help="a state_dict to load")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of what makes the model, e.g. num_classes=10; may be given again",
    )


def _add_extract(command: argparse.ArgumentParser) -> None:
    command.add_argument("data", metavar="DATA", type=Path, help="the data set; see below")
    command.add_argument(
        "--layers", nargs="+", metavar="L", required=True, help="names or globs (fmapkit show)"
    )
    command.add_argument("--to", required=True, metavar="PLACE", help="a folder, or a URL")
    command.add_argument(
        "--kinds",
        nargs="+",
        default=["activation"],
        metavar="K",
        help="as of show; of a block, activation means its output (default: activation)",
    )
    command.add_argument("--pool", choices=("mean", "max"), help="over positions")
    command.add_argument("--mask", metavar="COLUMN", help="of sequences: rows are tokens")
    command.add_argument("--dtype", metavar="D", help="of the features, e.g. float16, bfloat16")
    command.add_argument("--device", metavar="D", help="cuda takes LOCAL_RANK's (default: cpu)")
    command.add_argument("--batch", type=int, default=64, metavar="N", help="(default: 64)")
    command.add_argument("--workers", type=int, default=0, metavar="N", help="that read the data")
    command.add_argument("--keep", nargs="+", metavar="C", help="columns to keep beside")
    command.add_argument("--columns", nargs="+", default=[], metavar="C", help="for the model")
    command.add_argument("--split", metavar="S", help="of a Hugging Face data set with several")
    command.add_argument("--image-size", type=int, metavar="PX", help="of a side")
    command.add_argument("--mean", type=float, nargs="+", metavar="M", help="of each channel")
    command.add_argument("--std", type=float, nargs="+", metavar="S", help="of each channel")
    command.add_argument("--compress", choices=("zstd",), help="the store")
    command.add_argument("--stop", action="store_true", help="end passes at the last wanted map")
    command.add_argument("--no-progress", action="store_true", help="show no bar")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run; returns the process's status."""
    given = parser().parse_args(arguments)
    try:
        (_show if given.command == "show" else _extract)(given)
    except (FmapkitError, ImportError) as error:
        print(f"fmapkit {given.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


# -- show ---------------------------------------------------------------------------------------


def _show(given: argparse.Namespace) -> None:
    model = load(given.name, given.pretrained, given.weights, given.set)
    positional, named = _inputs(given.input, model)
    with capture(model, given.layers, kinds=given.kinds) as maps, torch.no_grad():
        model(*positional, **named)
    print(maps)
    for missed in maps.missed:
        print(f"not captured: {missed.layer or 'the model'}: {missed.reason}")


def _inputs(given: list[str], model: nn.Module) -> tuple[list[Any], dict[str, Any]]:
    if not given:
        dummy = getattr(model, "dummy_inputs", None)
        if isinstance(dummy, dict):
            return [], dummy
        raise ArgumentError("--input says the shape of what the model takes, e.g. 1x3x224x224")
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for text in given:
        name, equals, rest = text.rpartition("=")
        if equals:
            named[name] = _tensor(rest)
        else:
            positional.append(_tensor(rest))
    return positional, named


def _tensor(text: str) -> Tensor:
    shape, _, name = text.partition(":")
    dtype = _dtype(name or "float32")
    try:
        sizes = [int(n) for n in shape.split("x")]
    except ValueError:
        raise ArgumentError(
            f"--input {text!r}: a shape is numbers with x between them, e.g. 1x3x224x224"
        ) from None
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(sizes, dtype=dtype)
    return torch.randint(0, 2, sizes).to(dtype)  # token ids and masks of any model


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ArgumentError(f"{name!r} is no torch dtype, such as float32 or int64")
    return found


# -- extract ------------------------------------------------------------------------------------


def _extract(given: argparse.Namespace) -> None:
    from torch.utils.data import DataLoader

    from fmapkit.data import extract

    model = load(given.name, given.pretrained, given.weights, given.set)
    device = _device(given.device)
    prepare = partial(preparation, given.name, model, given.image_size, given.mean, given.std)
    data = open_data(given.data, prepare, given.columns, given.split)
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        print(f"{given.data}: {data.said}", file=sys.stderr)
        drawn = not (given.pretrained or given.weights)
        if drawn and given.name.startswith(("timm:", "torchvision:")):
            print("weights are drawn: --pretrained or --weights FILE", file=sys.stderr)
    loader: DataLoader[Any] = DataLoader(
        data.samples,
        batch_size=given.batch,
        num_workers=given.workers,
        collate_fn=data.collate,
        pin_memory=device.type == "cuda",
    )
    features = extract(
        model.to(device),
        loader,
        given.layers,
        given.to,
        kinds=given.kinds,
        pool=given.pool,
        mask=given.mask,
        dtype=None if given.dtype is None else _dtype(given.dtype),
        keep=data.keep if given.keep is None else given.keep,
        call=data.call,
        stop=given.stop,
        compress=given.compress,
        progress=not given.no_progress,
    )
    if first:
        print(features)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"--device {name}: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"--device {name}: torch sees no CUDA device here")
    return device
