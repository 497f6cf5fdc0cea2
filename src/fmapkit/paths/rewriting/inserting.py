"""What is put into the code of a twin: marks, and calls that look at a value on its way."""

from __future__ import annotations

import ast
from typing import TypeVar

from fmapkit.paths.rewriting.syntax import MARK
from fmapkit.paths.rewriting.torch_calls import recorded

_Node = TypeVar("_Node", bound=ast.AST)

# What a function's marks are given to, while it runs. No identifier of a model's can be that.
APPEND = f"{MARK}append"


class Inserting:
    """Makes the nodes that are put in.

    Args:
        place: names the function, for its marks.
        own: the variable that is the module which a method runs of; None if there is none.
    """

    def __init__(self, place: str, own: str | None) -> None:
        self._place = place
        self._self = own
        self._count = 0
        self._quick = False  # the code at hand has a variable that its marks are given to

    def _site(self, node: ast.AST) -> ast.Constant:
        self._count += 1
        line = getattr(node, "lineno", 0)
        return ast.Constant(f"{MARK}{self._place}:{line}:{self._count}")

    def _append(self) -> ast.expr:
        """What items are given to."""
        if self._quick:
            return ast.Name(APPEND, ast.Load())
        return ast.Call(ast.Name(f"{MARK}current", ast.Load()), [], [])

    def _marking(self, at: ast.AST) -> ast.expr:
        call = ast.Call(self._append(), [self._site(at)], [])
        return ast.fix_missing_locations(ast.copy_location(call, at))

    def _mark(self, at: ast.AST) -> ast.stmt:
        return ast.copy_location(ast.Expr(self._marking(at)), at)

    def _caught(self, at: ast.AST) -> ast.stmt:
        return ast.copy_location(ast.Expr(recorded("caught", self._site(at), at)), at)

    def _marked(self, node: ast.expr) -> ast.expr:
        """`node`, after a mark: marking returns None."""
        return ast.copy_location(ast.BoolOp(ast.Or(), [self._marking(node), node]), node)

    def _unless_tensor(self, name: str, node: ast.expr, otherwise: ast.expr) -> ast.expr:
        """`node` where a variable is a plain tensor: asked without a call into Python."""
        kind = recorded("type", ast.Name(name, ast.Load()), node)
        test = ast.Compare(kind, [ast.Is()], [ast.Name(f"{MARK}Tensor", ast.Load())])
        choice = ast.IfExp(test, node, otherwise)
        return ast.fix_missing_locations(ast.copy_location(choice, node))

    def _unless_none(self, name: str, otherwise: ast.expr) -> ast.expr:
        """The item None where a variable is that: what records it returns None, too."""
        test = ast.Compare(ast.Name(name, ast.Load()), [ast.Is()], [ast.Constant(None)])
        item = ast.Call(self._append(), [ast.Name(name, ast.Load())], [])
        return ast.copy_location(ast.IfExp(test, item, otherwise), otherwise)

    def _looked_at(self, node: _Node, *parts: str, how: str = "value") -> _Node:
        """`node`, with the values of some parts of it looked at."""
        for part in parts:
            value = getattr(node, part)
            if value is not None:
                setattr(node, part, self._value(value, how))
        return node

    def _value(self, node: ast.expr, how: str = "value", *first: ast.expr) -> ast.expr:
        """An argument or an index, looked at; in a display, each of its elements.

        Args:
            node: it.
            how: by which recorder: "value", or another where Python goes through it or picks.
            first: what else that is given.
        """
        hands_on = how in ("value", "unpacked", "handed")
        each = "value" if hands_on else "index" if how == "index" else "exact"
        of = first if each == "index" else ()
        if isinstance(node, ast.Constant | ast.Lambda | ast.GeneratorExp):
            return node
        if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
            return node
        if isinstance(node, ast.Tuple | ast.List):
            node.elts = [self._value(e, each, *of) for e in node.elts]
            return node
        if isinstance(node, ast.Dict):
            node.values = [self._value(v, each, *of) for v in node.values]
            return node
        if isinstance(node, ast.Slice):
            for part in ("lower", "upper", "step"):
                value = getattr(node, part)
                if value is not None:
                    setattr(node, part, self._value(value, how, *first))
            return node
        if isinstance(node, ast.Starred):
            return self._looked_at(node, "value", how="unpacked" if hands_on else "elements")
        looked_at = recorded(how, node, node, self._append(), *first)
        if isinstance(node, ast.Name):
            if node.id == self._self:
                return node  # whose method runs is told by the call
            if how in ("value", "handed") and self._quick:
                looked_at = self._unless_none(node.id, looked_at)
            same = ast.copy_location(ast.Name(node.id, ast.Load()), node)
            return self._unless_tensor(node.id, same, looked_at)
        return looked_at
