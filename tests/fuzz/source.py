"""A program as a tree of statements, and its two texts: one that tells what it does, one plain.

Statements are written once, with calls of `T` around what matters:

    x = T.sig("relu", lambda t: F.relu(t), T.call(self.fc, x))

That is the told text. The plain one is made of its syntax tree, with each call of `T` replaced by
what it calls: `x = F.relu(self.fc(x))`. So both do the same by construction.
"""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Union

__all__ = ["Code", "Unit", "plain", "separate", "text", "units"]

# A line, an indented block, or statements that can be dropped together.
Code = list[Union[str, "Unit", list[Any]]]

# What the outside calls.
ENTRIES = ("build", "prepare", "Odd")
_ids = itertools.count()


@dataclass(eq=False)
class Unit:
    """Statements that can be left out, and the program is one still (if perhaps one that fails)."""

    code: Code
    id: int = field(default_factory=lambda: next(_ids))


def separate(code: Code) -> Code:
    """The same code, with each statement (heads and their blocks together) a unit."""
    result: Code = []
    head: Code = []
    for item in code:
        if isinstance(item, Unit):
            result.append(item)
            continue
        head.append(item)
        goes_on = isinstance(item, str) and (item.endswith(":") or item.startswith("@"))
        if not goes_on:
            result.append(Unit(head))
            head = []
    return result + head


def text(code: Code, dropped: Collection[int] = ()) -> str:
    """The told text, without the units that are dropped, and definitions that nobody uses."""
    tree = ast.parse("\n".join(_lines(code, 0, dropped)) + "\n")
    defined = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    todo: list[ast.AST] = [n for n in tree.body if getattr(n, "name", "") not in defined]
    todo += [defined[name] for name in ENTRIES]
    used = set(todo)
    while todo:
        names = {n.id for n in ast.walk(todo.pop()) if isinstance(n, ast.Name)}
        found = {defined[name] for name in names & defined.keys()} - used
        used |= found
        todo += found
    tree.body = [n for n in tree.body if n in used]
    return ast.unparse(tree) + "\n"


def _lines(code: Code, depth: int, dropped: Collection[int]) -> Iterator[str]:
    for item in code:
        if isinstance(item, str):
            yield from ("    " * depth + line for line in item.split("\n"))
        elif isinstance(item, list):
            inner = list(_lines(item, depth + 1, dropped))
            yield from inner or ["    " * (depth + 1) + "pass"]
        elif item.id not in dropped:
            yield from _lines(item.code, depth, dropped)


def units(code: Code) -> Iterator[Unit]:
    """Every unit, the outer ones first."""
    for item in code:
        if isinstance(item, Unit):
            yield item
            yield from units(item.code)
        elif isinstance(item, list):
            yield from units(item)


def plain(told: str) -> str:
    """The same program without `T`."""
    tree = _Plain().visit(ast.parse(told))
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


class _Plain(ast.NodeTransformer):
    """Replaces each call of `T` by what it calls."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if _of_t(node.value) == "note":  # tells, and does nothing
            return ast.Pass()
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if _of_t(node.value) == "aug":  # x = T.aug("+", x, y) is x += y
            assert isinstance(node.value, ast.Call)
            sign, target, operand = node.value.args
            assert isinstance(sign, ast.Constant)
            assert isinstance(target, ast.Name)
            line = f"{target.id} {sign.value}= {ast.unparse(self.visit(operand))}"
            return ast.parse(line).body[0]
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = _of_t(node)
        if name is None:
            return self.generic_visit(node)
        if name == "source":  # code that the program compiles itself
            (code,) = node.args
            assert isinstance(code, ast.Constant)
            assert isinstance(code.value, str)
            return ast.Constant(plain(code.value))
        if name == "call":
            return self.generic_visit(ast.Call(node.args[0], node.args[1:], node.keywords))
        if name == "forward":
            function = ast.Attribute(node.args[0], "forward", ast.Load())
            return self.generic_visit(ast.Call(function, node.args[1:], node.keywords))
        place = next(i for i, a in enumerate(node.args) if isinstance(a, ast.Lambda))
        function = node.args[place]
        assert isinstance(function, ast.Lambda)
        given = [self.visit(a) for a in node.args[place + 1 :]]
        names = [a.arg for a in function.args.args]
        uses = Counter(n.id for n in ast.walk(function.body) if isinstance(n, ast.Name))
        if any(
            uses[n] > 1 and not isinstance(a, ast.Name) for n, a in zip(names, given, strict=True)
        ):
            return ast.Call(self.generic_visit(function), given, [])  # each argument runs once
        return _Substituted(dict(zip(names, given, strict=True))).visit(self.visit(function.body))


class _Substituted(ast.NodeTransformer):
    """The body of a lambda, with its arguments put in."""

    def __init__(self, values: dict[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.values.get(node.id, node)


def _of_t(node: ast.AST) -> str | None:
    """The method of `T` that is called."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "T":
            return node.func.attr
    return None
