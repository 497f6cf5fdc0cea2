"""What truly ran: an independent witness, below autograd, that shares no code with fmapkit.

`Witness` is a `TorchDispatchMode`. It sees every aten call a model makes, whatever Python wrote it
(module, function, method, in place), and clones the input of each nonlinearity before it runs and
its output right after. fmapkit looks from above (torch functions, module hooks), the witness from
below; what both agree on, bit for bit, is right.

Two things cannot be judged from aten calls alone:

- An activation written out by hand (`x * torch.sigmoid(x)`) is one site as a whole. Global module
  hooks clone what enters and leaves every module without weight matrices; if all that ran in it is
  pointwise and not linear, the module's own (z, a) replaces the runs inside it.
- A fused kernel's inner gates (`nn.LSTM` on CPU runs `sigmoid_`) are invisible from Python. They
  are excused only where `maps.missed` names the module they ran in.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Every aten overload packet that is one nonlinearity of its first argument. The last line's
# decompose to others before they get here, but not in inference mode.
SIGMAS = _words(
    """relu threshold hardtanh sigmoid tanh silu gelu elu celu selu leaky_relu mish hardswish
    hardsigmoid softplus log_sigmoid_forward glu hardshrink softshrink _prelu_kernel
    rrelu_with_noise rrelu_with_noise_functional
    prelu relu6 rrelu log_sigmoid"""
)
# Pointwise calls that leave a straight line straight, and those that do not.
_POINTWISE_LINEAR = _words(
    """add sub rsub mul div neg detach alias clone _to_copy copy lift_fresh view _unsafe_view
    expand unsqueeze squeeze t permute transpose _reshape_alias lerp scalar_tensor full_like
    ones_like zeros_like positive empty_like fill zero"""
)
_POINTWISE_CURVED = SIGMAS | _words(
    """erf exp expm1 log log1p pow square sqrt rsqrt abs sin cos clamp clamp_min clamp_max maximum
    minimum where sign reciprocal ceil floor round sigmoid atan logaddexp masked_fill gt lt ge le
    addcmul addcdiv eq ne logical_and logical_not"""
)


@dataclass(frozen=True)
class Run:
    """One true run of a nonlinearity."""

    sigma: str
    z: Tensor
    a: Tensor
    inside: tuple[str, ...]  # names of the modules it ran in, outermost first

    def __str__(self) -> str:
        where = self.inside[-1] if self.inside else "<outside any module>"
        return f"{self.sigma} in {where!r}, z {tuple(self.z.shape)} -> a {tuple(self.a.shape)}"


@dataclass
class _Frame:
    """One call of a module that could be an activation written out by hand."""

    module: nn.Module
    name: str
    inside: tuple[str, ...]
    first_run: int
    z: Tensor
    touched: set[int]  # memory that depends on the input ...
    curved: set[int] = field(default_factory=set)  # ... and not as a straight line
    alive: list[Any] = field(default_factory=list)  # so that no memory is used again
    pointwise: bool = True


class Witness(TorchDispatchMode):
    """Records each run of a nonlinearity while it is entered; `runs` in order of execution."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.runs: list[Run] = []
        self._names = {id(m): name for name, m in model.named_modules()}
        self._stack: list[tuple[nn.Module, _Frame | None]] = []
        self._handles: list[Any] = []
        self._maybe: dict[int, bool] = {}

    # -- modules: who is running, and is it an activation as a whole? --------------------------

    def __enter__(self) -> Witness:
        # Global hooks, not hooks on modules: the model under watch keeps none of its own, so
        # code that looks for hooks (nn.TransformerEncoderLayer does) takes its usual road.
        register = nn.modules.module
        self._handles = [
            register.register_module_forward_pre_hook(self._before),
            register.register_module_forward_hook(self._after, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        for handle in self._handles:
            handle.remove()
        self._stack.clear()

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        frame = None
        if self._could_be_activation(module) and len(args) == 1 and isinstance(args[0], Tensor):
            with _unwatched():
                z = args[0].detach().clone()
            touched = {_memory(args[0])}
            frame = _Frame(module, self._name(module), self._inside(), len(self.runs), z, touched)
        self._stack.append((module, frame))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._stack or self._stack[-1][0] is not module:
            return  # a module of before this witness, or one whose pre-hook failed
        _, frame = self._stack.pop()
        if frame is None or not frame.pointwise or not isinstance(output, Tensor):
            return
        if output.shape != frame.z.shape or _memory(output) not in frame.curved:
            return
        with _unwatched():
            self._replace(frame, module, output.detach().clone())

    def _replace(self, frame: _Frame, module: nn.Module, a: Tensor) -> None:
        # The whole module is one site; where it only wraps a function, (z, a) are the same anyway.
        inner = self.runs[frame.first_run :]
        if len(inner) == 1 and same_bits(inner[0].z, frame.z) and same_bits(inner[0].a, a):
            return
        sigma = type(module).__name__
        self.runs[frame.first_run :] = [Run(sigma, frame.z, a, (*frame.inside, frame.name))]

    def _could_be_activation(self, module: nn.Module) -> bool:
        known = self._maybe.get(id(module))
        if known is None:
            weights = [*module.parameters(), *module.buffers()]
            container = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
            known = not container and all(w.dim() <= 1 for w in weights)
            self._maybe[id(module)] = known
        return known

    def _name(self, module: nn.Module) -> str:
        return self._names.get(id(module), f"<{type(module).__name__}>")

    def _inside(self) -> tuple[str, ...]:
        return tuple(self._name(module) for module, _ in self._stack)

    # -- aten calls ---------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        packet = func._schema.name.split("::")[1]
        name = packet[:-1] if packet.endswith("_") and not packet.startswith("__") else packet
        sigma = func.namespace == "aten" and name in SIGMAS
        z = args[0].detach().clone() if sigma else None
        output = func(*args, **(kwargs or {}))
        if sigma:
            result = output[0] if isinstance(output, (tuple, list)) else output
            assert z is not None
            self.runs.append(Run(name, z, result.detach().clone(), self._inside()))
        for _, frame in self._stack:
            if frame is not None:
                _judge(frame, name, args, output)
        return output


def _judge(frame: _Frame, name: str, args: Sequence[Any], output: Any) -> None:
    """Take one aten call into account: is all that runs here pointwise, is any of it curved?"""
    given = {_memory(a) for a in args if isinstance(a, Tensor)}
    touching = sum(isinstance(a, Tensor) and _memory(a) in frame.touched for a in args)
    if name not in _POINTWISE_LINEAR | _POINTWISE_CURVED:
        frame.pointwise = False
    if isinstance(output, Tensor) and touching:
        frame.touched.add(_memory(output))
        # x * f(x), x / f(x): a product of two tensors of the same input is not linear.
        product = name in ("mul", "div") and touching >= 2
        if name in _POINTWISE_CURVED or product or given & frame.curved:
            frame.curved.add(_memory(output))
    frame.alive.append((args, output))


def _memory(tensor: Tensor) -> int:
    """The memory a tensor lies in: views and in-place results share it."""
    return int(tensor.untyped_storage()._cdata)


def _unwatched() -> Any:
    """Step out of every dispatch mode: the witness's own clones are no part of the truth."""
    return _disable_current_modes()


# -- running ----------------------------------------------------------------------------------


@dataclass
class Pass:
    """What one pass of a model gave: outputs, gradients, buffers, RNG state and the truth."""

    outputs: list[Tensor]
    grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    rng: Tensor
    truth: list[Run]


def seed(n: int) -> None:
    """Every generator a model may draw from: torch's, numpy's (LayerDrop) and Python's."""
    torch.manual_seed(n)
    np.random.seed(n)
    random.seed(n)


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in nested containers, dataclasses and ModelOutputs, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_of(v)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for f in dataclasses.fields(value) for t in tensors_of(getattr(value, f.name))]
    return []


def loss_of(output: Any) -> Tensor:
    """A scalar that every floating-point output of the model has a share in."""
    # An output may be a view, or overwritten by nothing any more: the loss is taken after forward.
    parts = [t.float().square().mean() for t in tensors_of(output) if t.requires_grad]
    return torch.stack(parts).sum()


def run_pass(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    train: bool,
    seed_: int = 0,
    witness: bool = False,
    after: Callable[[], None] | None = None,
) -> Pass:
    """One seeded pass: forward (and backward when `train`), with the witness or without.

    `after` is called when the forward (and backward) is over, inside the pass's grad mode.
    """
    seed(seed_)
    model.zero_grad(set_to_none=True)
    watch = Witness(model) if witness else None
    with torch.set_grad_enabled(train):
        if watch is None:
            output = model(*args, **(kwargs or {}))
        else:
            with watch:
                output = model(*args, **(kwargs or {}))
        # A copy: later in-place writes (or another pass) must not change what is compared.
        outputs = [t.detach().clone() for t in tensors_of(output)]
        rng = torch.get_rng_state()
        if train:
            loss_of(output).backward()
        if after is not None:
            after()
    grads = {
        name: None if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
    }
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    return Pass(outputs, grads, buffers, rng, watch.runs if watch else [])


class _Probe:
    """Something that can be weakly referenced, which nodes of the graph cannot."""


def graph_of(output: Tensor) -> Callable[[], object | None]:
    """A weak reference that dies with the autograd node that made `output`."""
    probe = _Probe()
    if output.grad_fn is not None:
        output.grad_fn.metadata["probe"] = probe
    return weakref.ref(probe)


def run_with_truth(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, list[Run]]:
    """The model's output, and every nonlinearity that ran, in order."""
    with Witness(model) as witness:
        output = model(*args, **kwargs)
    return output, witness.runs


# -- comparing --------------------------------------------------------------------------------

_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Same dtype, shape and bits: NaN equals the same NaN, and -0.0 is not 0.0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if torch.equal(left, right):
        if not left.is_floating_point() or left.numel() == 0 or bool(left.all()):
            return True  # equal and without zeros: nothing -0.0 could hide behind
    elif not left.is_floating_point():
        return False
    integer = _AS_INTEGER[left.element_size()]
    left, right = left.detach().contiguous(), right.detach().contiguous()
    return torch.equal(left.view(integer), right.view(integer))


@dataclass(frozen=True)
class Captured:
    """One captured pair, read through the public API only."""

    layer: str
    call: int
    sigma: str | None
    z: Tensor
    a: Tensor


def captured_pairs(maps: Any) -> list[Captured]:
    """Every (preactivation, activation) pair of the latest pass, in the order of the activations.

    Maps of one layer, call and nonlinearity are paired in order; a layer's response without a
    nonlinearity behind it is no pair.
    """
    waiting: dict[tuple[Any, ...], list[Tensor]] = {}
    for fm in maps.select(kind="preactivation", step=-1):
        if fm.nonlinearity is not None:
            key = (fm.layer, fm.call, fm.nonlinearity)
            waiting.setdefault(key, []).append(fm.tensor)
    pairs = []
    for fm in maps.select(kind="activation", step=-1):
        queue = waiting.get((fm.layer, fm.call, fm.nonlinearity))
        assert queue, f"activation without its preactivation: {fm.layer!r} call {fm.call}"
        pairs.append(Captured(fm.layer, fm.call, fm.nonlinearity, queue.pop(0), fm.tensor))
    left = {key: len(queue) for key, queue in waiting.items() if queue}
    assert not left, f"preactivations without their activation: {left}"
    return pairs


def excused(run: Run, maps: Any) -> bool:
    """Whether `maps.missed` names a module this run happened in, with a reason; a fault is none."""
    named = [m for m in maps.missed if "fmapkit failed" not in m.reason]
    return any(m.layer in run.inside and m.reason for m in named)


def assert_captured_exactly_once(maps: Any, truth: Sequence[Run], order: bool = True) -> None:
    """Each true run has one captured pair with the same bits, each pair one true run, in order.

    Raises:
        AssertionError: naming every run that is missing or wrong, and every pair too many.
    """
    pairs = captured_pairs(maps)
    expected = list(truth)
    free = set(range(len(pairs)))
    partner: list[int | None] = []
    for run in expected:
        found = next(
            (
                i
                for i in sorted(free)
                if same_bits(run.z, pairs[i].z) and same_bits(run.a, pairs[i].a)
            ),
            None,
        )
        if found is not None:
            free.discard(found)
        partner.append(found)
    lost = [
        (n, run)
        for n, (run, found) in enumerate(zip(expected, partner, strict=True))
        if found is None and not excused(run, maps)
    ]
    surplus = [pairs[i] for i in sorted(free)]
    if lost or surplus:
        lines = [f"{len(expected)} true runs, {len(pairs)} captured pairs"]
        lines += [f"  missed: {m.layer!r}: {m.reason}" for m in maps.missed]
        for n, run in lost:
            lines.append(f"  not captured: #{n} {run}{_near(run, surplus)}")
        for p in surplus:
            lines.append(f"  no true run: {p.sigma} of {p.layer!r} call {p.call} {_shape(p.a)}")
        raise AssertionError("\n".join(lines[:40]))
    got = [found for found in partner if found is not None]
    if order and got != sorted(got):
        raise AssertionError(f"captured out of order of execution: {got}")


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    """Each parameter has the same gradient in both, or in none of them."""
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def _near(run: Run, surplus: Sequence[Captured]) -> str:
    """Why a run has no partner: a pair with one right half says most."""
    for p in surplus:
        if same_bits(run.a, p.a):
            return f"  (a is that of {p.layer!r} call {p.call}, but z is not)"
        if same_bits(run.z, p.z):
            return f"  (z is that of {p.layer!r} call {p.call}, but a is not)"
    return ""


def assert_same_pass(bare: Pass, watched: Pass) -> None:
    """Outputs, gradients, buffers and RNG state are the same bits with capture and without."""
    assert len(bare.outputs) == len(watched.outputs)
    for n, (left, right) in enumerate(zip(bare.outputs, watched.outputs, strict=True)):
        assert same_bits(left, right), f"output {n} differs"
    assert bare.grads.keys() == watched.grads.keys()
    for name, grad in bare.grads.items():
        other = watched.grads[name]
        assert (grad is None) == (other is None), f"gradient of {name} is there only once"
        assert grad is None or other is None or same_bits(grad, other), f"gradient of {name}"
    for name, buffer in bare.buffers.items():
        assert same_bits(buffer, watched.buffers[name]), f"buffer {name} differs"
    assert torch.equal(bare.rng, watched.rng), "another number of random draws"


# -- what a model looks like from outside -------------------------------------------------------

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def _whose(hooks: Any) -> tuple[str, ...]:
    # By name: a model may set hooks anew in each pass (transformers does), under new ids.
    if not isinstance(hooks, Mapping):
        return ()
    plain = [getattr(hook, "hook", hook) for hook in hooks.values()]  # torch wraps some
    return tuple(getattr(hook, "__qualname__", type(hook).__qualname__) for hook in plain)


def _own_forward(module: nn.Module) -> str | None:
    own = module.__dict__.get("forward")
    return None if own is None else getattr(own, "__qualname__", type(own).__qualname__)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that capture could leave behind: hooks, flags, attributes, classes, tensor hooks."""
    marks: dict[str, Any] = {}
    for name, module in model.named_modules():
        marks[name] = (
            type(module).__qualname__,
            type(module).__bases__,  # parametrize makes a class of its own for each module
            tuple(sorted(module.__dict__)),
            tuple((h, _whose(getattr(module, h, {}))) for h in _HOOKS),
            module.training,
            getattr(module, "inplace", None),
            _own_forward(module),
        )
    for name, p in model.named_parameters():
        marks[f"parameter {name}"] = (type(p), p.requires_grad, bool(p._backward_hooks))
    marks["state_dict"] = tuple(model.state_dict())
    return marks


def modes() -> tuple[int, int]:
    """How many torch function modes and dispatch modes are on this thread's stacks."""
    return (
        torch._C._len_torch_function_stack(),  # type: ignore[attr-defined]
        torch._C._len_torch_dispatch_stack(),  # type: ignore[attr-defined]
    )


# A default device, if the suite runs on one, is a mode that is always there.
NO_MODES = (int("FMAPKIT_DEVICE" in os.environ), 0)


def assert_nothing_left(expected: dict[str, Any], model: nn.Module) -> None:
    """The model's fingerprint is as expected.

    Take it from the bare copy after the same passes: some models set attributes as they run.
    """
    after = fingerprint(model)
    assert expected.keys() == after.keys()
    changed = [key for key in expected if expected[key] != after[key]]
    assert not changed, "left behind at " + "; ".join(
        f"{key!r}: {_difference(expected[key], after[key])}" for key in changed[:4]
    )


def _difference(left: Any, right: Any) -> str:
    if not (isinstance(left, tuple) and isinstance(right, tuple) and len(left) == len(right)):
        return f"{left!r} -> {right!r}"
    for old, new in zip(left, right, strict=True):
        if old != new and all(isinstance(v, tuple) for v in (old, new)):
            return f"gone {sorted(set(old) - set(new))}, new {sorted(set(new) - set(old))}"
        if old != new:
            return f"{old!r} -> {new!r}"
    return "?"


def bare_copy(model: nn.Module) -> nn.Module:
    """A copy that is never captured, to compare with."""
    return copy.deepcopy(model)
