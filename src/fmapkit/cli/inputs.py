"""Data sets by their place: folders of images, NumPy files, Hugging Face data sets on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from fmapkit._lazy import needed
from fmapkit.errors import ArgumentError, did_you_mean, listed, near

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
Preparation = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Data:
    """A data set, and how it goes into a model."""

    samples: Dataset[dict[str, Any]]  # by number; each a dict
    # `call(model, batch)`; None where entries go by the names of the model's arguments
    call: Callable[[nn.Module, Any], Any] | None
    keep: tuple[str, ...]  # what is kept beside, unless something else is asked for
    said: str  # what was found, for people
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]  # puts samples into a batch


def open_data(
    place: Path, prepare: Callable[[], Preparation], columns: Sequence[str], split: str | None
) -> Data:
    """The data set at a place; of a Hugging Face one, `columns` for the model, else all numbers."""
    if not place.exists():
        raise ArgumentError(f"there is nothing at {place}")
    if any((place / n).exists() for n in ("dataset_info.json", "dataset_dict.json", "state.json")):
        return _hugging_face(place, prepare, columns, split)
    if columns or split is not None:
        raise ArgumentError(
            f"--columns and --split are of a Hugging Face data set: {place} is none"
        )
    if place.suffix in (".npy", ".npz") and place.is_file():
        return _arrays([place])
    if place.is_dir():
        found = sorted(p for p in place.rglob("*") if p.suffix.lower() in IMAGES)
        if found:
            samples = ImageFolder(place, found, prepare())
            keep = ("path", "label") if samples.labels else ("path",)
            said = f"{len(found):,} images"
            if samples.labels:
                said += f" of {len(samples.labels)} labels: {listed(samples.labels)}"
            return Data(samples, call_input, keep, said, _stacked)
        if arrays := sorted(place.glob("*.npy")):
            return _arrays(arrays)
    raise ArgumentError(
        f"{place} is no folder of images ({', '.join(IMAGES)}), no .npy or .npz file, and no "
        "Hugging Face data set on disk (datasets.Dataset.save_to_disk)"
    )


def call_input(model: nn.Module, batch: Any) -> Any:
    """The entry "input" is the model's first argument."""
    return model(batch["input"])


def call_columns(model: nn.Module, batch: Any, *, columns: tuple[str, ...]) -> Any:
    """These entries are the model's arguments, by their names."""
    return model(**{name: batch[name] for name in columns})


class ImageFolder(Dataset[dict[str, Any]]):
    """Images below a folder, in the order of their paths; their first folder is the label."""

    def __init__(self, root: Path, paths: list[Path], prepare: Preparation) -> None:
        self._root = root
        self._paths = paths
        self._prepare = prepare
        firsts = [p.relative_to(root).parts[0] for p in paths if p.parent != root]
        self.labels = sorted(set(firsts)) if len(firsts) == len(paths) else []

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image

        path = self._paths[index]
        try:
            with Image.open(path) as image:
                pixels = self._prepare(image.convert("RGB"))
        except OSError as error:
            raise ArgumentError(f"cannot read the image {path}: {error}") from error
        inside = path.relative_to(self._root)
        sample: dict[str, Any] = {"input": pixels, "path": str(inside)}
        if self.labels:
            sample["label"] = self.labels.index(inside.parts[0])
        return sample


class _Arrays(Dataset[dict[str, Any]]):
    """Rows of arrays, one array after the other; beside them, arrays of as many rows."""

    def __init__(self, arrays: list[Any], beside: Mapping[str, Any]) -> None:
        self._rows: ConcatDataset[Any] = ConcatDataset(arrays)
        self._beside = beside

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        values = np.array(self._rows[index])
        values = values.astype(_taken_as(values.dtype))
        sample: dict[str, Any] = {"input": torch.from_numpy(values)}
        return sample | {name: array[index] for name, array in self._beside.items()}


def _taken_as(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """As what a model takes such numbers; torch has few functions of large unsigned ones."""
    if dtype.kind == "f":
        return np.dtype(np.float32)
    return (
        np.dtype(np.int64) if dtype.kind == "u" and dtype.itemsize > 1 else dtype.newbyteorder("=")
    )


def _loaded(path: Path) -> Any:
    try:
        return dict(np.load(path)) if path.suffix == ".npz" else np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ArgumentError(f"cannot read the arrays of {path}: {error}") from error


def _arrays(paths: list[Path]) -> Data:
    beside: dict[str, Any] = {}
    if paths[0].suffix == ".npz":
        inside = _loaded(paths[0])
        first = "input" if "input" in inside else next(iter(inside), None)
        if first is None:
            raise ArgumentError(f"{paths[0]} holds no array")
        arrays = [inside.pop(first)]
        beside = {n: a for n, a in inside.items() if a.shape[:1] == arrays[0].shape[:1]}
    else:
        arrays = list(map(_loaded, paths))
    if any(a.ndim < 2 for a in arrays):
        raise ArgumentError(f"{paths[0]} has no axis beside that of samples")
    if wrong := [a.dtype for a in arrays if a.dtype.kind not in "biufc"]:
        raise ArgumentError(f"{paths[0]} has values of type {wrong[0]}, and a model takes numbers")
    shape = "×".join(map(str, arrays[0].shape[1:]))
    said = f"{sum(len(a) for a in arrays):,} arrays {shape} of {arrays[0].dtype}"
    return Data(_Arrays(arrays, beside), call_input, tuple(beside), said, _stacked)


def _hugging_face(
    place: Path, prepare: Callable[[], Preparation], columns: Sequence[str], split: str | None
) -> Data:
    datasets = needed("datasets", "a Hugging Face data set needs: pip install datasets")
    found: Any = datasets.load_from_disk(str(place))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ArgumentError(
                f"{place} has the splits {listed(found)}; choose one with --split"
                + (did_you_mean(split, found) if split else ""),
                candidates=near(split, found) or found,
            )
        found = found[split]
    names = list(found.features)
    for name in columns:
        if name not in names:
            raise ArgumentError(
                f"{place} has no column {name!r}{did_you_mean(name, names)}; it has "
                f"{listed(names)}",
                candidates=near(name, names) or names,
            )
    images = [n for n, f in found.features.items() if type(f).__name__ == "Image"]
    images = [n for n in images if not columns or n in columns]
    said = f"{len(found):,} rows of {listed(names)}"
    if images:
        return Data(_Rows(found, images[0], prepare()), call_input, (), said, _stacked)
    call = partial(call_columns, columns=tuple(columns)) if columns else None
    return Data(_Rows(found), call, (), said, _padded)


@dataclass(frozen=True)
class _Rows(Dataset[dict[str, Any]]):
    """Rows of a Hugging Face data set; an image is prepared, and named "input"."""

    rows: Any
    image: str | None = None
    prepare: Preparation | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = dict(self.rows[index])
        if self.image is not None and self.prepare is not None:
            row["input"] = self.prepare(row.pop(self.image).convert("RGB"))
        return row


def _padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Puts rows into a batch: lists of numbers of different lengths are padded with zeros.

    Where no column says which positions are padding, "attention_mask" does.
    """
    batch: dict[str, Any] = {}
    lengths: list[int] | None = None
    for name in rows[0]:
        values = [row[name] for row in rows]
        if isinstance(values[0], (list, tuple)) and all(
            isinstance(number, (int, float)) for value in values for number in value
        ):
            tensors = [torch.as_tensor(value) for value in values]
            lengths = lengths or [len(t) for t in tensors]
            batch[name] = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        else:
            batch[name] = _together(values)
    if lengths is not None and "attention_mask" not in batch:
        longest = torch.arange(max(lengths))
        batch["attention_mask"] = (longest < torch.tensor(lengths)[:, None]).long()
    return batch


def _stacked(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Puts rows of equal shapes into a batch."""
    return {name: _together([row[name] for row in rows]) for name in rows[0]}


def _together(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise ArgumentError(
                f"inputs of different shapes, {sorted(shapes)[:3]}, make no batch: --image-size "
                "makes images of one size, --batch 1 takes each by itself"
            )
        return torch.stack(values)
    if isinstance(values[0], (bool, int, float, np.number, np.bool_)):
        return torch.as_tensor(np.asarray(values))
    return values


# -- images -------------------------------------------------------------------------------------


def preparation(
    name: str,
    model: nn.Module,
    size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Preparation:
    """What turns an image into the tensor that a model takes.

    Args:
        name: of the model: timm and torchvision know what their models were trained with.
        model: of that name.
        size: pixels of a side: the shorter side is scaled to it, and the middle cut out.
        mean: of each channel, is taken away.
        std: of each channel, is divided by.
    """
    home, _, rest = name.partition(":")
    if size is None and mean is None and std is None:
        if home == "timm":
            timm: Any = import_module("timm.data")
            made: Preparation = timm.create_transform(**timm.resolve_model_data_config(model))
            return made
        if home == "torchvision":
            weights: Any = import_module("torchvision.models").get_model_weights(rest)
            if list(weights):
                transforms: Preparation = weights.DEFAULT.transforms()
                return transforms
        raise ArgumentError(
            f"which images {name} was trained on is not known: give --image-size, and --mean and "
            "--std of each channel where they were normalised"
        )
    if size is None:
        raise ArgumentError("--mean and --std go with --image-size")
    if (mean is None) != (std is None):
        raise ArgumentError("--mean and --std go together")
    return partial(_resized, side=size, mean=mean, std=std)


def _resized(
    image: Any, side: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    """An image scaled and cut to a square, values in [0, 1], normalised."""
    from PIL import Image

    scale = side / min(image.size)
    wide, high = (max(side, round(n * scale)) for n in image.size)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - side) // 2, (high - side) // 2
    image = image.crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    if mean is not None and std is not None:
        pixels = (pixels - _channels(mean)) / _channels(std)
    return pixels


def _channels(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers).view(-1, 1, 1)
