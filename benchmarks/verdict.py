"""Was what a contender hands out right? Judged against a witness below autograd.

The truth of a case is taken on a bare copy of its model: `tests/truth.py` clones the input of each
nonlinearity at the moment it runs, and its output right after. Hooks on the same copy clone what
every leaf module returns, and so tell which module's output z was, and which module σ was.

A contender that hands out modules' outputs is asked as its user would ask it: for the z of a
nonlinearity it gives the output of the module whose output z was, for the a that of σ's module.
Where there is no such module (z is a sum, σ is a function), the run is not seen. One that hands out
z and a by name is taken at its word, in order of execution. All is read after the pass.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.cases import Bench

__all__ = ["Handed", "Piece", "Site", "Verdict", "judge", "sites"]

Place = tuple[str, int]  # a module, and which call of it


@dataclass(frozen=True)
class Site:
    """One true run of a nonlinearity, and the module calls that returned its z and its a."""

    z: Tensor
    a: Tensor
    z_of: Place | None
    a_of: Place | None


@dataclass(frozen=True)
class Piece:
    """A map handed out: whole, or some filters along an axis."""

    tensor: Tensor
    dim: int | None = None
    filters: Sequence[int] | None = None

    def of(self, whole: Tensor) -> Tensor:
        """The same filters of another tensor."""
        if self.dim is None or self.filters is None or self.dim >= whole.dim():
            return whole
        if max(self.filters, default=0) >= whole.shape[self.dim]:
            return whole
        index = torch.tensor(list(self.filters), device=whole.device)
        return whole.index_select(self.dim, index)


@dataclass(frozen=True)
class Handed:
    """What a contender hands out after a pass.

    Attributes:
        outputs: of each module, what it returned, call by call; or of the last call alone.
        z: preactivations in order of execution; None where it was not asked for them.
        a: activations.
        more: other tensors that it holds.
    """

    outputs: dict[str, list[Tensor]] | None = None
    z: list[Piece] | None = None
    a: list[Piece] | None = None
    more: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes held, each block of memory once."""
        tensors = [p.tensor for p in (*(self.z or ()), *(self.a or ()))] + list(self.more)
        tensors += [t for outputs in (self.outputs or {}).values() for t in outputs]
        blocks = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        return sum(blocks.values())


@dataclass
class Verdict:
    """Which of a case's true runs were handed out right; how many wrong, or not at all."""

    runs: set[int] = field(default_factory=set)
    wrong: int = 0
    unseen: int = 0

    @property
    def right(self) -> int:
        """How many."""
        return len(self.runs)

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return {"right": self.right, "wrong": self.wrong, "unseen": self.unseen}


def sites(bench: Bench) -> list[Site]:
    """The truth of a case: each run of a nonlinearity in one pass of a bare copy."""
    truth: Any = importlib.import_module("tests.truth")
    model = bench.copy()  # not compiled: nothing below a compiled graph can be witnessed
    returned: list[tuple[int, Place, Tensor]] = []
    calls: Counter[str] = Counter()

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                with _disable_current_modes():
                    kept = output.detach().clone()
                returned.append((len(witness.runs), (name, calls[name]), kept))
            calls[name] += 1

        return note

    leaves = {n: m for n, m in model.named_modules() if not any(m.children())}
    for name, module in leaves.items():
        module.register_forward_hook(hook(name))
    with truth.Witness(model) as witness:
        bench.rehearse(model)
    found = []
    for n, run in enumerate(witness.runs):
        before = (r for r in reversed(returned) if r[0] <= n)
        z_of = next((place for _, place, t in before if truth.same_bits(t, run.z)), None)
        inner = run.inside[-1] if run.inside else ""
        after = (r for r in returned if r[0] == n + 1 and r[1][0] == inner)
        a_of = next((place for _, place, t in after if truth.same_bits(t, run.a)), None)
        found.append(Site(run.z, run.a, z_of, a_of))
    return found


def judge(truth: Sequence[Site], handed: Handed, *, exact: bool) -> dict[str, Verdict | None]:
    """Compare what was handed out with the truth.

    Args:
        truth: of the same inputs and weights.
        handed: after the pass.
        exact: bit for bit; else to a few digits, for kernels that round otherwise.

    Returns:
        A verdict for "z" and one for "a"; None for what was not asked for.
    """
    same = _same_bits() if exact else _close
    if handed.outputs is not None:
        by_module = handed.outputs
        return {
            "z": _by_module([(s.z, s.z_of) for s in truth], by_module, same),
            "a": _by_module([(s.a, s.a_of) for s in truth], by_module, same),
        }
    return {
        "z": None if handed.z is None else _in_order([s.z for s in truth], handed.z, same),
        "a": None if handed.a is None else _in_order([s.a for s in truth], handed.a, same),
    }


Same = Callable[[Tensor, Tensor], bool]


def _by_module(
    true: list[tuple[Tensor, Place | None]], outputs: dict[str, list[Tensor]], same: Same
) -> Verdict:
    verdict = Verdict()
    for k, (tensor, place) in enumerate(true):
        kept = outputs.get(place[0]) if place is not None else None
        if place is None or not kept:
            verdict.unseen += 1
        elif same(kept[min(place[1], len(kept) - 1)].detach(), tensor):
            verdict.runs.add(k)
        else:
            verdict.wrong += 1
    return verdict


def _in_order(true: list[Tensor], pieces: list[Piece], same: Same) -> Verdict:
    """Each true one takes the next piece that equals it; the rest of the pieces are wrong."""
    verdict, at = Verdict(), 0
    for k, tensor in enumerate(true):
        for n in range(at, len(pieces)):
            if same(pieces[n].tensor.detach(), pieces[n].of(tensor)):
                verdict.runs.add(k)
                at = n + 1
                break
    verdict.wrong = len(pieces) - verdict.right
    verdict.unseen = max(0, len(true) - len(pieces))
    return verdict


def _same_bits() -> Same:
    same: Same = importlib.import_module("tests.truth").same_bits
    return same


def _close(left: Tensor, right: Tensor) -> bool:
    left = left.to(right.device)  # `.cpu()` is somebody's way to hold it
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-3, atol=1e-3)
