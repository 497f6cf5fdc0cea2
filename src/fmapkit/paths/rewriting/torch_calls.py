"""Calls in torch's own code that may be tapped, and those by which it fuses layers.

Its transformer layers call layers and nonlinearities themselves. Their code decides nothing that is
not known otherwise, so it has twins that record nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Container

from fmapkit.paths.rewriting.syntax import MARK, position_of, site_at
from fmapkit.torchlib.apart import FACES
from fmapkit.torchlib.fused.paths import FUSING_CALLS

# Functions of torch's of which floats decide neither what runs, nor whose filters come out, nor how
# large anything is.
FLOATS_ARE_IDLE = {
    *("add", "add_", "sub", "sub_", "mul", "mul_", "multiply", "div", "div_", "true_divide"),
    *("lerp", "lerp_", "addcmul", "addcmul_", "addcdiv", "addcdiv_", "gumbel_softmax"),
    *("leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "celu_", "rrelu", "rrelu_", "softplus"),
    *("hardtanh", "hardtanh_", "threshold", "threshold_", "softshrink", "hardshrink"),
    *("normal_", "uniform_", "cross_entropy", "smooth_l1_loss", "huber_loss"),
}
# The same, but for zero: `clamp` is a nonlinearity there, and `dropout` gives its input back.
ONLY_ZERO_DECIDES = {
    *("clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_", "clip", "clip_"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
    *("feature_alpha_dropout", "scaled_dot_product_attention", "masked_fill", "masked_fill_"),
    *("gt", "lt", "ge", "le", "eq", "ne", "where"),
}


# The last names of what may be exchanged at the call itself.
_ASKING = FUSING_CALLS | FACES


class TorchRewriter(ast.NodeTransformer):
    """Puts recorders before these calls of one function."""

    def __init__(self, file: str, tapped: Container[str]) -> None:
        self._file = file
        self._tapped = tapped

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """A call, whoever is called."""
        self.generic_visit(node)
        node.func = replaceable(node, node.func, self._file, self._tapped)
        return node


def replaceable(node: ast.Call, callee: ast.expr, file: str, tapped: Container[str]) -> ast.expr:
    """What a call goes to, handed to whoever may put something else in its place."""
    called = node.func
    site = site_at(position_of(node))
    if site in tapped:
        callee = recorded("tapped", callee, callee, ast.Constant(f"{file}|{site}"))
    if isinstance(called, ast.Attribute) and called.attr in _ASKING:
        callee = recorded("fusing", callee, callee)
    return callee


def recorded(recorder: str, argument: ast.expr, at: ast.AST, *first: ast.expr) -> ast.expr:
    """A call of a recorder, which stands where other code did."""
    call = ast.Call(ast.Name(f"{MARK}{recorder}", ast.Load()), [*first, argument], [])
    return ast.fix_missing_locations(ast.copy_location(call, at))
