"""Calls by which torch fuses layers, or decides whether to (see `torchlib/fused_paths.py`)."""

from __future__ import annotations

import ast

from fmapkit.paths.recorders import MARK
from fmapkit.torchlib.fused_paths import FUSING_CALLS

__all__ = ["FusingRewriter", "may_fuse", "recorded"]


class FusingRewriter(ast.NodeTransformer):
    """Puts a recorder before these calls, and no other: torch's own forwards need not record."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if may_fuse(node.func):
            node.func = recorded("fusing", node.func, node.func)
        return node


def may_fuse(function: ast.expr) -> bool:
    """Whether a call may be one of these, by the name of what is called."""
    return isinstance(function, ast.Attribute) and function.attr in FUSING_CALLS


def recorded(recorder: str, argument: ast.expr, at: ast.AST, *first: ast.expr) -> ast.expr:
    """A call of a recorder, which stands where other code did."""
    call = ast.Call(ast.Name(f"{MARK}{recorder}", ast.Load()), [*first, argument], [])
    return ast.fix_missing_locations(ast.copy_location(call, at))
