"""A model by its name: of timm, torchvision, transformers, or of any package."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmapkit._lazy import needed
from fmapkit.errors import ArgumentError, did_you_mean, listed, near

FORMS = "timm:NAME, torchvision:NAME, transformers:NAME_OR_FOLDER or package.module:factory"


def _options_of(given: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs, with values as Python literals, else as text."""
    options = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ArgumentError(f"--set takes key=value, such as num_classes=10, not {pair!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def load(name: str, pretrained: bool, weights: Path | None, options: Sequence[str]) -> nn.Module:
    """The model of a name in one of the forms above, in eval mode.

    `weights` is a `state_dict` in a file of safetensors, or of `torch.save`; options are
    `key=value`, for the function that makes the model.
    """
    given = _options_of(options)
    home, colon, rest = name.partition(":")
    if not colon or not rest:
        raise ArgumentError(f"a model is named as {FORMS}, not {name!r}")
    make = _PACKAGES.get(home, _factory)
    torch.manual_seed(0)  # weights that are drawn are the same each time
    model = make(home, rest, pretrained, given)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{name!r} gave {type(model).__name__}, and no torch.nn.Module")
    if weights is not None:
        _load_weights(model, weights)
    return model.eval()


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        home = name.partition(".")[0]
        raise ImportError(f"{home} is not installed: pip install {home} ({error})") from error


def _no_model(package: str, name: str, known: Sequence[str]) -> ArgumentError:
    said = f"{package} has no model {name!r}{did_you_mean(name, known)}"
    return ArgumentError(said, candidates=near(name, known))


def _timm(home: str, name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    timm = _package("timm")
    if not timm.is_model(name.split(".")[0]):
        raise _no_model(home, name, timm.list_models())
    return timm.create_model(name, pretrained=pretrained, **options)


def _torchvision(home: str, name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    models = _package("torchvision.models")
    if name not in models.list_models():
        raise _no_model(home, name, models.list_models())
    return models.get_model(name, weights="DEFAULT" if pretrained else None, **options)


def _transformers(home: str, name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    package = _package("transformers")
    if pretrained or Path(name).is_dir():
        return package.AutoModel.from_pretrained(name, **options)
    known = list(package.CONFIG_MAPPING)
    if name not in known:
        raise ArgumentError(
            f"{name!r} is no folder and no kind of model{did_you_mean(name, known)}; --pretrained "
            "loads a model of that name with its weights",
            candidates=near(name, known) or known,
        )
    return package.AutoModel.from_config(package.AutoConfig.for_model(name, **options))


def _factory(home: str, name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    if pretrained:
        raise ArgumentError(
            f"--pretrained is for timm, torchvision and transformers; {home}:{name} loads its own "
            "weights, or give --weights FILE"
        )
    if os.getcwd() not in sys.path:  # as python -m has it; a script does not
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = import_module(home)
    except ImportError as error:
        raise ArgumentError(
            f"cannot import {home!r}: {error}; a model is named as {FORMS}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n in dir(found) if not n.startswith("_")]
            raise ArgumentError(
                f"{home} has no {name!r}{did_you_mean(part, names)}; it has {listed(names)}",
                candidates=near(part, names) or names,
            )
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ArgumentError(f"{home}:{name} is neither a model nor a function that makes one")
    return found(**options)


_PACKAGES: dict[str, Callable[[str, str, bool, dict[str, Any]], Any]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.exists():
        raise ArgumentError(f"--weights {path}: there is no such file")
    if path.suffix == ".safetensors":
        says = "weights of safetensors need it: pip install fmapkit[safetensors]"
        state: Any = needed("safetensors.torch", says).load_file(str(path))
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model", "model_state_dict"):  # as training scripts wrap it
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"--weights {path} is of another model: {error}") from error
