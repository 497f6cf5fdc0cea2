"""Which names may stand for what outlives a call: what is put in there can be read after it.

A proven module's in-place nonlinearities may run out of place, with the new tensor handed to all
that reads the old one during the call. Whoever looks into a list of the caller's afterwards would
find the old one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache

__all__ = ["Lasting", "lasting_of"]

# Methods of containers that put something in.
_PUTS = {"append", "extend", "insert"}


class Lasting:
    """What is there before a call of one function, and after it.

    Args:
        node: the function.
        self_name: the parameter that is the module; empty if none is.
    """

    def __init__(self, node: ast.FunctionDef, self_name: str) -> None:
        a = node.args
        every = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
        given = {g.arg for g in every if g is not None} - {self_name}
        bound = [b for n in ast.walk(node) for b in _bindings(n)]
        made = {b[0] for b in bound} - given - {self_name}
        self._fresh = _Names(made, bound)  # for nothing but what is made in the call
        self._not_kept = _Names(made | given, bound)  # for that, or what it was given

    def put_by(self, function: ast.Attribute) -> bool:
        """Whether a method that is called may put something into what lasts."""
        return function.attr in _PUTS and not self._fresh.allow(function.value)

    def put_at(self, node: ast.Subscript) -> bool:
        """Whether an assignment to an item may; a tuple indexes a tensor."""
        return not isinstance(node.slice, ast.Tuple) and not self._fresh.allow(node.value)

    def put_by_adding(self, target: ast.expr, value: ast.expr) -> bool:
        """Whether `target += value` may: an argument is a tensor, unless a list is added to it."""
        a_list = isinstance(value, (ast.List, ast.ListComp, ast.Tuple))
        return not (self._fresh if a_list else self._not_kept).allow(target)


@lru_cache(maxsize=4096)
def lasting_of(node: ast.FunctionDef, self_name: str) -> Lasting:
    """The same for a function that may have been read before: it takes two walks over its tree."""
    return Lasting(node, self_name)


# A name, its value, and whether it is bound to a part of that.
_Binding = tuple[str, ast.expr, bool]


class _Names:
    """Those of some names that never stand for what any other name does."""

    def __init__(self, names: set[str], bound: list[_Binding]) -> None:
        self._inside = set(names)  # nor does anything in what they stand for
        self._names = set(names)
        while True:
            inside = {n for n, value, _ in bound if not self.allow(value, True)}
            aliases = {n for n, value, part in bound if not self.allow(value, part)}
            if not self._inside & inside and not self._names & aliases:
                return
            self._inside -= inside
            self._names -= aliases

    def allow(self, value: ast.expr, part: bool = False) -> bool:
        """Whether a value, or a part of it, comes from these names alone."""
        return all(n in (self._inside if p else self._names) for n, p in _sources(value, part))


def _sources(node: ast.expr, part: bool) -> Iterator[tuple[str, bool]]:
    """Names that a value may be what they stand for, or a part of that; not those it is made of."""
    match node:
        case ast.Name(id=name):
            yield name, part
        case ast.Attribute(value=value) | ast.Subscript(value=value) | ast.Starred(value=value):
            yield from _sources(value, True)
        case ast.IfExp(body=body, orelse=orelse):
            yield from _sources(body, part)
            yield from _sources(orelse, part)
        case ast.BoolOp(values=values):
            for value in values:
                yield from _sources(value, part)
        case ast.Tuple(elts=values) | ast.List(elts=values) if part:
            for value in values:
                yield from _sources(value, part)
        case ast.NamedExpr(value=value):
            yield from _sources(value, part)


def _bindings(node: ast.AST) -> Iterator[_Binding]:
    """The names that a node binds."""
    match node:
        case ast.Assign(targets=targets, value=value):
            pairs = [(target, value, not isinstance(target, ast.Name)) for target in targets]
        case ast.AnnAssign(target=target, value=ast.expr() as value):
            pairs = [(target, value, False)]
        case ast.NamedExpr(target=target, value=value):
            pairs = [(target, value, False)]
        case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
            pairs = [(target, value, True)]
        case ast.withitem(context_expr=value, optional_vars=ast.expr() as target):
            pairs = [(target, value, True)]
        case _:
            return
    for target, value, part in pairs:
        for name in ast.walk(target):
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                yield name.id, value, part
