"""The peers from PyPI, each used as its documentation says. None is needed to run the rest.

Each is asked for the same: the outputs of all leaf modules, or whatever comes nearest. An opened
peer is a tuple: what to call in the model's place, how to read what it hands out, and, where it
has to be kept from its neighbours, what comes before and after each pass, untimed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from benchmarks import torchvision_operators
from benchmarks.cases import Bench, Call
from benchmarks.measure import package, reason
from benchmarks.verdict import Handed, Piece

__all__ = [
    *("PACKAGES", "captum", "missing", "nnsight", "tensors", "torchlens", "torchvision"),
    "versions",
]

PACKAGES = ("captum", "nnsight", "torchlens", "torchvision")

CAPTUM = (
    "`LayerActivation(model, leaf modules).attribute(x)`, made once; z: the output of the module "
    "before σ. Gives no output of the model; sets and removes its hooks in each pass"
)
NNSIGHT = (
    "`tracer.cache(modules=leaf modules, device=None)`, wrapped once, one `trace` for each pass; "
    "z: the output of the module before σ, call by call"
)
TORCHLENS = (
    "`trace(model, x)`, which logs every operation, once for each pass; z: the output of the "
    "operation before σ. torch is wrapped before a pass and unwrapped after it, untimed"
)
TORCHVISION = (
    "`create_feature_extractor`, made once, of all leaf nodes; z: the output of the node before σ"
)

Peer = tuple[Call, Callable[[], Handed]]


def missing(name: str) -> str:
    """Why a package cannot take part; "" if it can."""
    if not name:
        return ""
    if package(name) == "not installed":
        return "not installed"
    if name in ("timm", "torchvision"):
        torchvision_operators.declare()
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"does not load: {reason(error)}"
    return ""


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of each package, or why it takes no part."""
    return {name: missing(name) or package(name) for name in packages}


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if not any(m.children())}


def tensors(value: Any) -> list[Tensor]:
    """What a module returned, tensor by tensor."""
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if _is(v)]


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def _called(bench: Bench) -> list[str]:
    """The leaf modules that a pass calls, by name: captum fails on any other."""
    model = bench.copy()
    called: set[str] = set()
    for name, module in _leaves(model).items():
        module.register_forward_pre_hook(lambda _module, _args, name=name: called.add(name))
    bench.rehearse(model)
    return [name for name in _leaves(model) if name in called]


@contextmanager
def captum(bench: Bench) -> Iterator[Peer]:
    """captum's layer activations."""
    attr: Any = importlib.import_module("captum.attr")
    model, leaves = bench.copy(), _called(bench)
    layers = attr.LayerActivation(model, [model.get_submodule(name) for name in leaves])
    kept: dict[str, list[Tensor]] = {}

    def call(*inputs: Tensor) -> None:
        found = layers.attribute(inputs)
        kept.update((name, tensors(each)) for name, each in zip(leaves, found, strict=True))

    yield call, lambda: Handed(outputs=dict(kept))


@contextmanager
def nnsight(bench: Bench) -> Iterator[Peer]:
    """nnsight's cache."""
    library: Any = importlib.import_module("nnsight")
    wrapped = library.NNsight(bench.copy())
    paths = {f"model.{name}": name for name in _called(bench)}
    latest: list[Any] = []

    def call(*inputs: Tensor) -> Any:
        with wrapped.trace(*inputs) as tracer:
            cache = tracer.cache(modules=list(paths), device=None)
            output = wrapped.output.save()
        latest[:] = [cache]
        return output

    def read() -> Handed:
        (cache,) = latest
        keys = cache.keys()  # it does not iterate by itself
        return Handed(outputs={paths[key]: tensors(cache[key].output) for key in keys})

    yield call, read


@contextmanager
def torchlens(bench: Bench) -> Iterator[tuple[Any, ...]]:
    """torchlens's trace."""
    library: Any = importlib.import_module("torchlens")
    wrappers: Any = importlib.import_module("torchlens.backends.torch.wrappers")
    sigmas: frozenset[str] = importlib.import_module("tests.truth").SIGMAS
    model = bench.copy()
    latest: list[Any] = []

    def call(*inputs: Tensor) -> Any:
        log = library.trace(model, inputs)
        latest[:] = [log]
        return log[log.output_layers[0]].out

    def read() -> Handed:
        (log,) = latest
        runs = [op for op in log.layer_list if str(op.func_name).rstrip("_") in sigmas]
        return Handed(
            z=[Piece(log[op.parents[0]].out) for op in runs],
            a=[Piece(op.out) for op in runs],
            more=tuple(op.out for op in log.layer_list if isinstance(op.out, Tensor)),
        )

    yield call, read, wrappers.wrap_torch, wrappers.unwrap_torch


@contextmanager
def torchvision(bench: Bench) -> Iterator[Peer]:
    """torchvision's feature extractor: a graph that was traced beforehand."""
    extraction: Any = importlib.import_module("torchvision.models.feature_extraction")
    model = bench.copy()
    train, evaluate = extraction.get_graph_node_names(model)
    wanted = train if bench.case.trains else evaluate
    calls: dict[str, list[str]] = {name: [] for name in _leaves(model)}
    for node in wanted:  # the second call of `layer1.0.relu` is the node `layer1.0.relu_1`
        name, _, number = node.rpartition("_")
        owner = name if number.isdigit() and name in calls else node
        calls.setdefault(owner, []).append(node)
    extractor = extraction.create_feature_extractor(model, wanted)
    kept: dict[str, Any] = {}

    def call(*inputs: Tensor) -> Any:
        kept.clear()
        kept.update(extractor(*inputs))
        return kept[wanted[-1]]

    def read() -> Handed:
        found = {name: [kept[n] for n in nodes if n in kept] for name, nodes in calls.items()}
        return Handed(outputs={n: [t for t in ts if _is(t)] for n, ts in found.items()})

    yield call, read
