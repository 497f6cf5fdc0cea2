"""Code in which Python itself picks by plain values, and no recorder is told which it has picked.

`max(pairs, key=...)`, `dict(zip(names, maps))` and `{n: one, m: other}[1]` take one tensor or
another by numbers that are no argument or index there. So what such a function was handed is
recorded where it begins: nobody else tells it (see `fixed_attributes.py`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

__all__ = ["parameters", "picks"]

_DISPLAYS = (ast.List, ast.Tuple, ast.ListComp)
_SORTING = {"sort", "sorted"}
_EXTREMES = {"max", "min"}
_COUNTED = {"zip", "enumerate"}


def picks(function: ast.FunctionDef) -> bool:
    """Whether a function picks in such a way."""
    turned = set(_turned(function))
    return any(_picks(node) for node in ast.walk(function) if node not in turned | {function})


def parameters(function: ast.FunctionDef) -> list[str]:
    """The names of what a function is given."""
    given = function.args
    several = [a for a in (given.vararg, given.kwarg) if a is not None]
    rows = [*given.posonlyargs, *given.args, *given.kwonlyargs, *several]
    return [argument.arg for argument in rows]


def _turned(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Calls whose elements a loop takes one by one: that marks each turn."""
    for node in ast.walk(function):
        if isinstance(node, (ast.For, ast.comprehension)):
            at: ast.AST = node.iter
            while isinstance(at, ast.Call) and _name_of(at) in _COUNTED | {"reversed"}:
                yield at
                if not at.args:
                    break
                at = at.args[0]


def _picks(node: ast.AST) -> bool:
    if isinstance(node, (ast.Lambda, ast.FunctionDef, ast.DictComp)):
        return True  # who calls it takes what it gives for what it likes
    if isinstance(node, ast.AugAssign):
        return isinstance(node.op, ast.Mult)  # of a list, perhaps
    if isinstance(node, ast.Dict):
        return any(key is not None and not isinstance(key, ast.Constant) for key in node.keys)
    if isinstance(node, ast.BinOp):
        sides = node.left, node.right
        return isinstance(node.op, ast.Mult) and any(isinstance(s, _DISPLAYS) for s in sides)
    if not isinstance(node, ast.Call):
        return False
    name = _name_of(node)
    if name in _SORTING or any(keyword.arg == "key" for keyword in node.keywords):
        return True
    return name == "zip" or (name in _EXTREMES and len(node.args) == 1) or _starts(node)


def _starts(node: ast.Call) -> bool:
    """Whether a call counts from a number that it is given."""
    return _name_of(node) == "enumerate" and len(node.args) + len(node.keywords) > 1


def _name_of(node: ast.Call) -> str | None:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else None
