"""Modules that only carry another one: `DistributedDataParallel` and its kin.

They compute nothing of their own, and their level (`module.`, `_fsdp_wrapped_module.`) is no part
of the plain model's names. What they are is told by their type, never by a name.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from fmapkit.reasons import Reason
from fmapkit.torchlib.caching import remembered
from fmapkit.torchlib.compiled_modules import is_optimized_type

REPLICAS = Reason.DATA_PARALLEL.text()
_SHARDED = "_fsdp_wrapped_module"
# Where nobody has imported such a class, no module can be of it, and to import it would take long.
_KINDS = (
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        _SHARDED,
    ),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
)


def _imported(home: str, name: str) -> Any:
    return getattr(sys.modules.get(home), name, None)


# By type: what is not imported yet is no base of a class that is there already.
@remembered
def _wrapper(given: type) -> tuple[type[nn.Module], str] | None:
    """Which kind of wrapper a class is, and its key for what it carries; None if it is none."""
    if is_optimized_type(given):
        return given, "_orig_mod"
    for home, name, key in _KINDS:
        kind = _imported(home, name)
        if kind is not None and issubclass(given, kind):
            return kind, key
    return None


@remembered
def is_special(given: type) -> bool:
    """Whether modules of a class may be wrappers, or lend their parameters."""
    return _wrapper(given) is not None or _shards(given)


def inner_key(module: nn.Module) -> str | None:
    """Under which key it holds the module that it carries; None if it is no wrapper."""
    found = _wrapper(type(module))
    return found[1] if found is not None and found[1] in module._modules else None


def unwrap(module: nn.Module) -> nn.Module:
    """The module that a pass really begins with: the innermost one of nested wrappers.

    A subclass with a forward of its own may do more than carry: it is left as it is.
    """
    while (found := _wrapper(type(module))) is not None:
        kind, key = found
        child = module._modules.get(key)
        own = "forward" in module.__dict__ or not _plain(type(module), kind)
        if child is None or own:
            break
        module = child
    return module


def _plain(given: type[nn.Module], kind: type[nn.Module]) -> bool:
    """Whether its forward is torch's: the wrapper's, or that of a subclass that torch defines."""
    home = next(base for base in given.__mro__ if "forward" in base.__dict__)
    return issubclass(home, kind) and home.__module__.startswith("torch.")


def flat_parameters(module: nn.Module) -> list[Any]:
    """Of a `FullyShardedDataParallel` module: the one parameter that it made of many."""
    found = _wrapper(type(module))
    if found is None or found[1] != _SHARDED or module._handle is None:
        return []
    return [module._handle.flat_param]  # type: ignore[union-attr]


def is_flat(value: Any) -> bool:
    """Whether it is such a parameter."""
    kind = _imported("torch.distributed.fsdp._flat_param", "FlatParameter")
    return kind is not None and isinstance(value, kind)


def places_in(flat: Any) -> list[tuple[nn.Module, str]]:
    """The modules that had the parameters in it, and as what."""
    infos = (*flat._param_infos, *flat._shared_param_infos)
    return [(info.module, info.param_name) for info in infos]


def lends_parameters(module: nn.Module) -> bool:
    """Whether parameters in it have memory only while it runs: FSDP, old and new."""
    return _shards(type(module)) or bool(flat_parameters(module))


@remembered
def _shards(given: type) -> bool:
    homes = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")  # the latter until 2.5
    kinds = [_imported(home, "FSDPModule") for home in homes]
    return any(kind is not None and issubclass(given, kind) for kind in kinds)
