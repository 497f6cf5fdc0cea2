"""Numbers that are read of tensors to be kept or printed: `self.loss = h.mean().item()`.

What is read for that decides nothing in the call. Should what was kept decide something after all,
the path tells.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from fmapkit.paths.rewriting.syntax import position_of, site_at

# Methods that put what they are given into a container: it is looked at where it is used.
PUT = frozenset({"append", "appendleft", "add"})
# Calls that give a number, or some, of a tensor; or one of numbers.
_READ = {"item", "tolist"}
_WORKED_ON = {"abs", "float", "int", "round", "str"}


def kept_numbers(
    nodes: Iterable[ast.AST], names: dict[str, Any], local: frozenset[str]
) -> frozenset[str]:
    """The places of calls whose numbers go into attributes, containers and what is printed."""
    found: set[str] = set()
    bound = local | names.keys()  # these are no builtins
    for node in nodes:
        for kept in _kept_by(node, names, local):
            found.update(site_at(position_of(call)) for call in _reads_in(kept, bound))
    return frozenset(found)


def writes_out(function: ast.expr, names: dict[str, Any], local: frozenset[str]) -> bool:
    """Whether what a call is given is printed, or goes to a logger."""
    if isinstance(function, ast.Name):
        return function.id == "print" and function.id not in local | names.keys()
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        return False
    owner = None if function.value.id in local else names.get(function.value.id)
    return owner is logging or isinstance(owner, logging.Logger)


def _kept_by(node: ast.AST, names: dict[str, Any], local: frozenset[str]) -> list[ast.expr]:
    """The values that a statement keeps or prints, and does nothing else with."""
    if isinstance(node, ast.Assign):
        kept = all(isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets)
        return [node.value] if kept else []
    if isinstance(node, ast.AugAssign | ast.AnnAssign):
        kept = isinstance(node.target, ast.Attribute | ast.Subscript)
        return [node.value] if kept and node.value is not None else []
    if isinstance(node, ast.Return):  # beside what is returned: {"loss": loss.item()}
        parts = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        return [part for part in parts if isinstance(part, ast.Dict)]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        function = node.value.func
        puts = isinstance(function, ast.Attribute) and function.attr in PUT
        if puts or writes_out(function, names, local):
            return node.value.args
    return []


def _reads_in(value: ast.AST, bound: frozenset[str]) -> Iterator[ast.Call]:
    """The calls in a value that read a number, where nothing else is done with it."""
    if isinstance(value, ast.Call):
        function = value.func
        if isinstance(function, ast.Attribute) and function.attr in _READ:
            yield value
        elif isinstance(function, ast.Name) and function.id in _WORKED_ON - bound:
            yield value  # `float(t)` reads itself
            for argument in value.args:
                yield from _reads_in(argument, bound)
    else:
        parts: Iterable[ast.AST] = ()
        if isinstance(value, ast.BinOp | ast.UnaryOp | ast.JoinedStr | ast.Tuple | ast.List):
            parts = ast.iter_child_nodes(value)
        elif isinstance(value, ast.Dict):
            parts = value.values
        elif isinstance(value, ast.FormattedValue):
            parts = (value.value,)
        for part in parts:
            yield from _reads_in(part, bound)
