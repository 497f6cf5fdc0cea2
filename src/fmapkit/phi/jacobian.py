"""Singular values of the Jacobian of φ at points, by products with it alone.

The matrix is never made: `torch.func.jvp` gives J·v and `torch.func.vjp` Jᵀ·u, and a block Krylov
space of these has the leading singular values (Musco & Musco, "Randomized Block Krylov Methods for
Stronger and Faster Approximate Singular Value Decomposition", 2015). As soon as it is as large as
the smaller side of J, it has all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmapkit.errors import ArgumentError, check_positive
from fmapkit.phi._features import evaluating, one

if TYPE_CHECKING:
    from fmapkit.phi.function import FeatureFunction

_EXTRA = 4  # columns of the block beyond those asked for


def singular_values(
    phi: FeatureFunction,
    x: Tensor,
    k: int | None = 8,
    *,
    tolerance: float = 1e-4,
    max_steps: int = 32,
    seed: int = 0,
) -> Tensor:
    """The largest singular values of the Jacobian dφ/dx at each point.

    They say by how much φ stretches a small step from the point, in the directions in which it
    stretches most; those that are 0 are directions that it does not see. The model runs in eval
    mode, on one point at a time. Under scaled-dot-product attention, torch's plain kernel is used,
    since the fused ones have no forward-mode derivative.

    Args:
        phi: of one layer.
        x: (P, …): the points, floating-point, each a sample.
        k: how many; None for all there are: min(input values, features).
        tolerance: largest relative change of a value in the last step, at which it ends; of values
            relative to the largest.
        max_steps: steps after which it ends all the same. A step takes k + 4 products with J, and
            as many with its transpose.
        seed: of the random block that it begins with, in a generator of its own.

    Returns:
        (P, k) in float64, falling. Products are computed in the model's own type, so values below
        its rounding (1e-7 of the largest in float32) are noise.

    Raises:
        ArgumentError: φ is of several layers, the points are no floating-point tensor, a number is
            not positive, or the Jacobian at a point has a NaN or an infinite value.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not len(x):
        raise ArgumentError(
            "points must be a floating-point tensor (P, …): there is no derivative with respect "
            "to anything else"
        )
    check_positive(k=1 if k is None else k, max_steps=max_steps)
    if not tolerance >= 0:
        raise ArgumentError(f"tolerance must not be below 0: {tolerance!r}")
    with evaluating(phi), sdpa_kernel(SDPBackend.MATH):
        found = [
            _at(_Jacobian(phi, point, number), k, tolerance, max_steps, seed)
            for number, point in enumerate(torch.split(x.detach(), 1))
        ]
    return torch.stack(found).detach()


class _Jacobian:
    """Products with the Jacobian of φ at one point, (features, values of the input)."""

    def __init__(self, phi: FeatureFunction, point: Tensor, number: int) -> None:
        def flat(values: Tensor) -> Tensor:
            return one(phi(values.reshape(point.shape)), "a Jacobian").reshape(-1)

        self._function, self._point, self._number = flat, point.reshape(-1), number
        made: Any = torch.func.vjp(flat, self._point)
        output, self._back = made
        self.shape = (output.numel(), point.numel())
        self.device = point.device
        self._dtype = output.dtype

    def times(self, block: Tensor) -> Tensor:
        """J·V for the columns of V, in float64."""
        columns = [
            torch.func.jvp(self._function, (self._point,), (v.to(self._point.dtype),))[1]
            for v in block.T
        ]
        return self._finite(columns)

    def transposed_times(self, block: Tensor) -> Tensor:
        """Jᵀ·U for the columns of U, in float64."""
        return self._finite([self._back(u.to(self._dtype))[0] for u in block.T])

    def _finite(self, columns: list[Tensor]) -> Tensor:
        block = torch.stack(columns, 1).double()
        if not block.isfinite().all():
            raise ArgumentError(
                f"the Jacobian at point {self._number} has a NaN or an infinite value: it has no "
                "singular values"
            )
        return block


def _at(jacobian: _Jacobian, k: int | None, tolerance: float, max_steps: int, seed: int) -> Tensor:
    rank = min(jacobian.shape)
    count = rank if k is None else min(k, rank)
    width = min(count + _EXTRA, rank)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(jacobian.shape[1], width, generator=generator, dtype=torch.float64)
    block = jacobian.times(start.to(jacobian.device))
    basis = torch.empty(len(block), 0, dtype=torch.float64, device=jacobian.device)
    across = torch.empty(jacobian.shape[1], 0, dtype=torch.float64, device=jacobian.device)
    values = torch.zeros(count, dtype=torch.float64, device=jacobian.device)
    for _ in range(max_steps if k is not None else rank):
        new = _beyond(basis, block)
        if not new.shape[1]:  # the space is closed under J·Jᵀ: it has all that is not 0
            break
        basis = torch.cat([basis, new], 1)
        back = jacobian.transposed_times(new)
        across = torch.cat([across, back], 1)
        found = torch.linalg.svdvals(across)[:count]
        before, values = values, torch.zeros_like(values)
        values[: len(found)] = found
        settled = (values - before).abs().max() <= tolerance * values.max()
        if basis.shape[1] >= rank or (k is not None and settled):
            break
        block = jacobian.times(back)
    return values


def _beyond(basis: Tensor, block: Tensor) -> Tensor:
    """An orthonormal basis of what a block adds to the space of another one."""
    scale = block.norm(dim=0)
    block = block[:, scale > 0] / scale[scale > 0]
    for _ in range(2):  # once more, for what rounding has left
        block = block - basis @ (basis.T @ block)
    if not block.numel():
        return block[:, :0]
    u, s, _ = torch.linalg.svd(block, full_matrices=False)
    room = len(basis) - basis.shape[1]
    new: Tensor = u[:, s > 1e-10][:, :room]
    return new
