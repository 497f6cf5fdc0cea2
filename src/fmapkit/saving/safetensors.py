"""Maps in a safetensors file: the values as its tensors, the tags in its metadata as JSON.

Nothing of it runs when it is read. `safetensors.torch.load_file` opens it without fmapkit, too: its
tensors are called `step0/conv1/activation`. What several maps share is written once.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmapkit._lazy import needed
from fmapkit.errors import ArgumentError
from fmapkit.kinds import KINDS
from fmapkit.map import FeatureMap, restored
from fmapkit.provenance import Heads, Projection
from fmapkit.readable import tags as map_tags
from fmapkit.saving.kept import KeptModule, KeptPass, Snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEY, _FORMAT = "fmapkit", 1
# Of these the format has a name in every version that is allowed.
_NAMED = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}
# Of a map, beside its values: what a message calls each.
_TENSORS = {
    "tensor": "",
    "ids": "the numbers of ",
    "edited": "the edit of ",
    "grad": "the gradient of ",
}
_OF_PASS = ("step", "training")


def save(snapshot: Snapshot, path: str | os.PathLike[str]) -> None:
    """Write maps to a file; it is there as a whole, or not at all (see `FeatureMaps.save`)."""
    save_file = _library("safetensors.torch").save_file
    writer = _Writer()
    passes = [
        {"step": p.step, "training": p.training, "maps": [writer.map(fm) for fm in p.maps]}
        for p in snapshot.passes
    ]
    about = {
        "format": _FORMAT,
        "steps": snapshot.steps,
        "kinds": snapshot.kinds,
        "fleeting": snapshot.fleeting,
        "missed": snapshot.missed,
        "modules": [asdict(module) for module in snapshot.modules],
        "passes": passes,
    }
    path = os.fspath(path)
    unfinished = f"{path}.{os.getpid()}.part"
    try:
        save_file(
            writer.tensors, unfinished, {_KEY: json.dumps(about, default=_of_range), "format": "pt"}
        )
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.unlink(unfinished)


def load(path: str | os.PathLike[str], device: Any) -> Snapshot:
    """Read maps from a file that `save` wrote (see `FeatureMaps.load`)."""
    library, path = _library("safetensors"), os.fspath(path)
    try:
        where = str(torch.device(device))
        with (
            torch.inference_mode(False),
            library.safe_open(path, framework="pt", device=where) as file,
        ):
            about = _about(path, file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ArgumentError(f"{path!r} is no whole safetensors file: {error}") from None
    return Snapshot(
        tuple(
            KeptPass(p["step"], p["training"], tuple(_map(tags, tensors, p) for tags in p["maps"]))
            for p in about["passes"]
        ),
        about["steps"],
        tuple(about["kinds"]),
        about["fleeting"],
        tuple((layer, reason) for layer, reason in about["missed"]),
        tuple(KeptModule(**{**m, "weights": tuple(m["weights"])}) for m in about["modules"]),
    )


def _about(path: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _KEY not in metadata:
        raise ArgumentError(
            f"{path!r} is a safetensors file, and not one that FeatureMaps.save wrote: it has no "
            "tags; safetensors.torch.load_file reads its tensors"
        )
    about: dict[str, Any] = json.loads(metadata[_KEY])
    if about["format"] != _FORMAT:
        raise ArgumentError(
            f"{path!r} is of version {about['format']} of this format, and this fmapkit reads "
            f"version {_FORMAT}: update fmapkit"
        )
    return about


class _Writer:
    """Gives each tensor a name in the file."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, dict[str, Any]] = {}  # of tensors that are there already

    def map(self, fm: FeatureMap) -> dict[str, Any]:
        """The tags of a map, as JSON has them; its values become tensors of the file."""
        name = f"step{fm.step}/{fm.layer}{fm.path}/{fm.kind}" + f"/call{fm.call}" * (fm.call > 0)
        what = f"the {fm.kind} of layer {fm.layer!r} (step {fm.step}, call {fm.call})"
        tags = {k: v for k, v in fm._data().items() if k not in _OF_PASS and v is not None}
        for key, of in _TENSORS.items():
            if key in tags:
                place = name if key == "tensor" else f"{name}/{key}"
                tags[key] = self._add(place, tags[key], fm, of + what)
        tags["filters"] = fm.filters
        if fm.heads is not None:
            tags["heads"] = {k: part for k, part in asdict(fm.heads).items() if part is not None}
        return tags

    def _add(self, name: str, tensor: Tensor, fm: FeatureMap, what: str) -> dict[str, Any]:
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        dense = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
        complex_ = tensor.is_complex()
        named = complex_ or tensor.dtype in _NAMED
        if not (dense and named) or tensor.device.type == "meta":
            kind = tensor.dtype if dense else "nested" if tensor.is_nested else tensor.layout
            raise ArgumentError(
                f"{what} cannot be saved: a safetensors file holds dense tensors with values, of "
                f"the usual types, and it is {kind} on {tensor.device}; choose with "
                "capture(layers=...), or keep it by torch.save(maps, ...)",
                **map_tags(fm),
            )
        stored = torch.view_as_real(tensor.resolve_conj()) if complex_ else tensor
        unique, number = name, 1
        while unique in self.tensors:
            unique, number = f"{name}#{number}", number + 1
        self.tensors[unique] = stored.resolve_neg().contiguous()
        found = {"name": unique, "complex": complex_}
        self._names[id(tensor)] = found
        return found


def _map(
    tags: Mapping[str, Any], tensors: Mapping[str, Tensor], at: Mapping[str, Any]
) -> FeatureMap:
    if tags["kind"] not in KINDS:
        raise ArgumentError(f"a map of the file is of an unknown kind {tags['kind']!r}")
    found = {"grad": None, "made_by": None, **tags, **{key: at[key] for key in _OF_PASS}}
    for key in _TENSORS.keys() & tags.keys():
        tensor = tensors[tags[key]["name"]]
        found[key] = torch.view_as_complex(tensor) if tags[key]["complex"] else tensor
    filters = tags["filters"]
    if filters is not None:
        is_range = isinstance(filters, dict)
        found["filters"] = range(*filters["range"]) if is_range else tuple(filters)
    found["heads"] = _heads(tags.get("heads"))
    return restored(found)


def _heads(stored: Mapping[str, Any] | None) -> Heads | None:
    if stored is None:
        return None
    return Heads(
        **{
            name: Projection(part["layer"], tuple(range(*f["range"]) for f in part["filters"]))
            for name, part in stored.items()
        }
    )


def _of_range(filters: range) -> dict[str, Any]:
    return {"range": [filters.start, filters.stop, filters.step]}


def _library(module: str) -> Any:
    return needed(
        module,
        "maps are kept in safetensors files, and safetensors is not installed: "
        "pip install fmapkit[safetensors]",
    )
