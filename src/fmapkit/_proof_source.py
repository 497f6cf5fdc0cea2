"""The source of a function, as a syntax tree, if what runs is sure to be what is read."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from functools import lru_cache

__all__ = ["source_of"]


@lru_cache(maxsize=4096)
def source_of(
    code: types.CodeType, function: types.FunctionType
) -> tuple[ast.FunctionDef, set[str]] | None:
    """The source of a function, and its names that are bound from data."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    node = tree.body[0] if tree.body else None
    if not isinstance(node, ast.FunctionDef) or node.decorator_list or node.name != code.co_name:
        return None
    # The file may have changed since it was imported: what runs must be what is read.
    read = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    read |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    read |= {n.arg for n in ast.walk(node) if isinstance(n, (ast.arg, ast.keyword)) and n.arg}
    if not {*code.co_names, *code.co_varnames} - {"AssertionError"} <= read:
        return None
    return node, _assigned_from_data(node)


def _assigned_from_data(node: ast.FunctionDef) -> set[str]:
    """Names that are bound, anywhere in the function, to more than constants and attributes.

    Such a name is data everywhere: a loop may reach a use before or after the binding.
    """
    dirty: set[str] = set()
    arguments = node.args.posonlyargs + node.args.args
    self_name = arguments[0].arg if arguments else ""
    for n in ast.walk(node):
        match n:
            case ast.AugAssign(target=ast.Name(id=name)) | ast.NamedExpr(target=ast.Name(id=name)):
                dirty.add(name)
            case ast.Assign(targets=targets, value=value):
                read = {m.id for m in ast.walk(value) if isinstance(m, ast.Name)}
                calls = any(isinstance(m, (ast.Call, ast.Subscript)) for m in ast.walk(value))
                for target in targets:
                    stored = {
                        m.id
                        for m in ast.walk(target)
                        if isinstance(m, ast.Name) and isinstance(m.ctx, ast.Store)
                    }
                    if calls or read - {self_name} or not isinstance(target, ast.Name):
                        dirty |= stored
    return dirty
