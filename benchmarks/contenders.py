"""Who takes part: fmapkit in each of its modes, hooks written by hand, and the peers.

A contender gets a case's model and says what to call in its place, and what it hands out after a
pass. What its API lets a user pay once is paid before the passes that are timed.

A mode of fmapkit is one line in `CONTENDERS`.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.cases import Bench, Call, Case
from benchmarks.measure import resting
from benchmarks.verdict import Handed, Piece
from fmapkit import CaptureWarning, FeatureMaps, capture
from fmapkit.analysis import Statistics
from fmapkit.nonlinearities import module_sigma

__all__ = ["CONTENDERS", "CONTROL", "OWN", "Contender", "Opened"]

NEVER = 10**9


@dataclass(frozen=True)
class Opened:
    """A contender at work on a model.

    Attributes:
        call: what is called in place of the model.
        read: what it hands out, after a pass; None where there is nothing to judge.
        before: comes before each pass, not timed.
        after: comes after each pass, not timed.
        around: entered and left in each pass, timed.
        awake: entered around whatever it does, not timed.
    """

    call: Call
    read: Callable[[], Handed] | None = None
    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    awake: Callable[[], AbstractContextManager[Any]] = nullcontext


Open = Callable[[Bench], AbstractContextManager[Opened]]


def _anywhere(case: Case) -> str:
    return ""


def _inference(case: Case) -> str:
    return "gives no output to take a loss of" if case.trains else ""


def _training(case: Case) -> str:
    return "" if case.trains else "for training"


def _short(case: Case) -> str:
    return "a round of it takes too long" if case.heavy else _eager(case)


def _eager(case: Case) -> str:
    return "not measured compiled" if case.compiled else ""


def _eager_inference(case: Case) -> str:
    return _eager(case) or _inference(case)


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        name: of the row.
        note: what is taken as z, and what is within a timed pass.
        open: puts it to work on a case.
        unfit: why it takes no part in a case; "" if it does.
        passes: of a timed round; the bare model's round has as many.
        package: that has to be imported; "" for none.
        counted: whether its bytes can be counted below autograd.
        own_kernels: whether it may run other kernels than the model does, that round otherwise.
    """

    name: str
    note: str
    open: Open
    unfit: Callable[[Case], str] = _anywhere
    passes: int = 1
    package: str = ""
    counted: bool = True
    own_kernels: bool = False


@contextmanager
def nothing(bench: Bench) -> Iterator[Opened]:
    """The bare model again."""
    yield Opened(bench.ready(bench.copy()))


def mode(**options: Any) -> Open:
    """fmapkit, one block around all passes."""

    @contextmanager
    def opened(bench: Bench) -> Iterator[Opened]:
        model = bench.ready(bench.copy())
        with capture(model, **options) as maps:
            yield Opened(model, lambda: handed(maps), awake=resting(maps))

    return opened


@contextmanager
def a_block_each(bench: Bench) -> Iterator[Opened]:
    """A block for each pass, entered and left in the time that counts; the first twenty learn."""
    model = bench.ready(bench.copy())
    maps: FeatureMaps | None = None  # the next block goes on with what these have

    def call(*inputs: Tensor) -> Any:
        nonlocal maps
        with capture(model) as maps:
            return model(*inputs)

    for _ in range(20):
        bench.run(call)
    yield Opened(call, lambda: Handed() if maps is None else handed(maps))


def unjudged(options: Callable[[], dict[str, Any]]) -> Open:
    """The same, where what is handed out is not z and a to the last bit, or nothing."""

    @contextmanager
    def opened(bench: Bench) -> Iterator[Opened]:
        model = bench.ready(bench.copy())
        with capture(model, **options()) as maps:
            yield Opened(model, awake=resting(maps))

    return opened


def handed(maps: FeatureMaps) -> Handed:
    """The maps of the latest pass; z are those preactivations that a nonlinearity received."""
    found = list(maps)
    z = [fm for fm in found if fm.kind == "preactivation" and fm.nonlinearity is not None]
    a = [fm for fm in found if fm.kind == "activation"]
    pieces = ([Piece(fm.tensor, fm.filter_dim, fm.filters) for fm in each] for each in (z, a))
    before, after = pieces
    return Handed(z=before or None, a=after or None, more=tuple(fm.tensor for fm in found))


@contextmanager
def idle(bench: Bench) -> Iterator[Opened]:
    """The passes of `every=n` that are not captured; the first, which is, is the warm-up's."""
    model = bench.ready(bench.copy())
    with capture(model, every=NEVER) as maps:
        yield Opened(model, awake=resting(maps))


@contextmanager
def stopped(bench: Bench) -> Iterator[Opened]:
    """The maps of the first quarter of the filter layers; the forward ends there."""
    model = bench.copy()
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with capture(model, layers[: max(1, len(layers) // 4)], stop=True) as maps:
        yield Opened(model, lambda: handed(maps), awake=resting(maps))


@contextmanager
def compiled(bench: Bench) -> Iterator[Opened]:
    """A graph of the model's own operations, called in their order, that returns its maps.

    It need not rest: no function runs other code for it.
    """
    model: Any = torch.compile(bench.copy(), backend="eager")
    with capture(model) as maps:
        yield Opened(model, lambda: handed(maps))


def first(*, whole: bool) -> Open:
    """Each pass is the first in a fresh capture of a model that none has seen.

    With `whole`, the capture's beginning and end are timed too.
    """

    @contextmanager
    def opened(bench: Bench) -> Iterator[Opened]:
        model = bench.copy()
        block = capture(model)
        maps: FeatureMaps | None = None

        def before() -> None:
            nonlocal model, block, maps
            model = bench.copy()
            bench.run(model)  # its own first pass is dear for reasons that are not capture's
            block = capture(model)
            if not whole:
                maps = block.__enter__()

        def after() -> None:
            if not whole:
                block.__exit__(None, None, None)

        def call(*inputs: Tensor) -> Any:
            return model(*inputs)

        def read() -> Handed:
            return Handed() if maps is None else handed(maps)

        yield Opened(
            call,
            None if whole else read,
            before,
            after,
            around=lambda: block if whole else nullcontext(),
        )

    return opened


def hooks(keep: Callable[[Tensor], Tensor]) -> Open:
    """What one writes by hand: a hook on every leaf module, and a dict."""

    @contextmanager
    def opened(bench: Bench) -> Iterator[Opened]:
        kept: dict[str, Any] = {}

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
                one = isinstance(output, Tensor)
                kept[name] = keep(output) if one else [keep(t) for t in peers.tensors(output)]

            return note

        model = bench.copy()
        leaves = {n: m for n, m in model.named_modules() if not any(m.children())}
        handles = [m.register_forward_hook(hook(n)) for n, m in leaves.items()]
        try:
            yield Opened(
                bench.ready(model),
                lambda: Handed(outputs={n: peers.tensors(t) for n, t in kept.items()}),
            )
        finally:
            for handle in handles:
                handle.remove()

    return opened


@contextmanager
def sigma_hooks(bench: Bench) -> Iterator[Opened]:
    """What one writes by hand who knows of the traps: clones on both sides of each σ module."""
    model = bench.copy()
    z: list[Tensor] = []
    a: list[Tensor] = []

    def begin(_module: nn.Module, _inputs: Any) -> None:
        z.clear()
        a.clear()

    def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        z.append(inputs[0].detach().clone())

    def after(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        a.append(output.detach().clone())

    home = nn.ReLU.__module__
    sigmas = [m for m in model.modules() if type(m).__module__ == home and not any(m.children())]
    handles: list[Any] = [model.register_forward_pre_hook(begin)]
    handles += [m.register_forward_pre_hook(before) for m in sigmas]
    handles += [m.register_forward_hook(after) for m in sigmas]
    try:
        yield Opened(model, lambda: Handed(z=[Piece(t) for t in z], a=[Piece(t) for t in a]))
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def least(bench: Bench) -> Iterator[Opened]:
    """What holding maps costs by itself: closures at sites that are known beforehand, no checks.

    They stand where torch looks before it takes a module's own call. An in-place σ gets a clone of
    z made. The oldest map goes as a new one comes.
    """
    model, scout = bench.copy(), bench.copy()
    with warnings.catch_warnings(), capture(scout) as maps:
        warnings.simplefilter("ignore", CaptureWarning)
        bench.run(scout)
    alone = {fm.layer for fm in maps if fm.kind == "preactivation" and fm.nonlinearity is None}
    inside = dict(model.named_modules())
    sigmas = [m for m in inside.values() if module_sigma(m) is not None]
    log: deque[tuple[Any, ...]] = deque()

    def stand(module: nn.Module, is_sigma: bool, note: Callable[[Any], None]) -> None:
        inner, overwrites = module._call_impl, bool(getattr(module, "inplace", False))

        def closure(x: Tensor, *args: Any) -> Any:
            z = x.clone() if overwrites else x
            output = inner(x, *args)  # type: ignore[no-untyped-call]
            note((z, output) if is_sigma else (output,))
            return output

        module.__dict__["_compiled_call_impl"] = closure

    def stand_everywhere() -> None:
        for module in sigmas:
            stand(module, True, log.append)
        for name in alone & inside.keys():
            stand(inside[name], False, log.append)

    stand_everywhere()
    bench.run(model)
    log = deque(maxlen=max(1, len(log)))  # as many as a pass has
    stand_everywhere()

    def read() -> Handed:
        pairs = [entry for entry in log if len(entry) == 2]
        return Handed(z=[Piece(z) for z, _ in pairs], a=[Piece(a) for _, a in pairs])

    yield Opened(bench.ready(model), read)


def _detached(output: Tensor) -> Tensor:
    return output.detach()


def _cloned(output: Tensor) -> Tensor:
    return output.detach().clone()


def _on_cpu(output: Tensor) -> Tensor:
    return output.detach().cpu()


def _peer(open_: Callable[[Bench], AbstractContextManager[tuple[Any, ...]]]) -> Open:
    @contextmanager
    def opened(bench: Bench) -> Iterator[Opened]:
        with open_(bench) as (call, read, *around):
            before, after = around or (None, None)
            yield Opened(call, read, before, after)

    return opened


_LEAVES = "each leaf module's output, of its last call; z: that of the module before σ"
_BLOCK = "one block around all passes"

CONTROL = "nothing"
CONTENDERS = [
    Contender(CONTROL, "the bare model again: how far from 1.00 chance goes", nothing),
    Contender("fmapkit", f"every (z, a); {_BLOCK}", mode()),
    Contender(
        "fmapkit, compiled",
        f'every (z, a) of `torch.compile(model, backend="eager")`; {_BLOCK}, compiled before',
        compiled,
        _eager,
        counted=False,
        own_kernels=True,  # without torch's fused path of attention
    ),
    Contender('kinds="activation"', "every a", mode(kinds="activation")),
    Contender("filters=range(8)", "eight filters of every (z, a)", mode(filters=range(8)), _eager),
    Contender(
        "dtype=bfloat16",
        "every (z, a), in half the bytes",
        unjudged(lambda: {"dtype": torch.bfloat16}),
        _eager,
    ),
    Contender(
        "Statistics, keep=0",
        "sees every (z, a), keeps none",
        unjudged(lambda: {"analyses": Statistics(), "keep": 0}),
        _eager,
    ),
    Contender("detach=False", "in the graph", mode(detach=False), _training),
    Contender("gradients=True", "and their gradients", mode(gradients=True), _training),
    Contender("every=10", "per pass, over rounds of ten passes", mode(every=10), _short, passes=10),
    Contender("idle", "the passes between two captured ones of `every=n`", idle, _eager),
    Contender(
        "stop",
        "the first quarter of the layers, and the forward ends there",
        stopped,
        _eager_inference,
    ),
    Contender(
        "learning", "the first pass on a new model", first(whole=False), _eager, counted=False
    ),
    Contender("a block each", "a block for each pass, after twenty", a_block_each, _eager),
    Contender("one-shot", "that pass, with entering and leaving", first(whole=True), _eager),
    Contender("hooks, references", f"detach(): {_LEAVES}", hooks(_detached)),
    Contender("hooks, clones", f"detach().clone(): {_LEAVES}", hooks(_cloned)),
    Contender(
        "hooks on σ, clones",
        "clones of what each σ module gets and returns, call by call; no other layer",
        sigma_hooks,
        _eager,
    ),
    Contender(
        "closures, least",
        "what holding costs by itself: z and a of σ modules, outputs of layers without σ",
        least,
        _eager_inference,
    ),
    Contender("hooks, .cpu()", f"detach().cpu(): {_LEAVES}", hooks(_on_cpu), _eager),
    Contender("captum", peers.CAPTUM, _peer(peers.captum), _eager_inference, package="captum"),
    Contender("nnsight", peers.NNSIGHT, _peer(peers.nnsight), _eager, package="nnsight"),
    Contender("torchlens", peers.TORCHLENS, _peer(peers.torchlens), _eager, package="torchlens"),
    Contender(
        "torchvision", peers.TORCHVISION, _peer(peers.torchvision), _eager, package="torchvision"
    ),
]

# Those of `python -m benchmarks overhead`.
OWN = [
    *(CONTROL, "fmapkit", "hooks, references", "hooks, clones", "hooks on σ, clones"),
    *("idle", "stop", "learning", "one-shot"),
]
