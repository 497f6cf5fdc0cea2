"""What source says: where an expression stands, which names it binds, and what is torch's in it."""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# What marks begin with: no string of a model does.
MARK = "\0"

# Attributes that torch's own modules decide by, as they are compiled: `inplace`, `p`, `dim`, …
OF_TORCHS = frozenset({"training"}).union(
    *(
        getattr(kind, "__constants__", ())
        for kind in vars(nn).values()
        if isinstance(kind, type) and issubclass(kind, nn.Module)
    )
)
# The same, and those by which Python decides what a module is, and what runs as it is called.
DECIDING = OF_TORCHS | {"__class__", "__dict__", "_modules", "forward"}

# The functions that comparisons are, by the nodes that stand for them.
COMPARED: dict[type[ast.cmpop], str] = {
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Eq: "eq",
    ast.NotEq: "ne",
}
# A function that may look at its own variables has none of ours.
_LOOKS_AT_LOCALS = {"locals", "vars", "dir", "eval", "exec"}

# What binds its name, if it has one.
_NAMED = (
    *(ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef),
    *(ast.ExceptHandler, ast.MatchAs, ast.MatchStar),
)
# Displays that make a list or a dict.
_MADE = ast.Dict | ast.DictComp | ast.List | ast.ListComp
# Builtins that make rows.
_MAKE_ROWS = {"list", "sorted", "tuple"}

Position = tuple[int | None, int | None, int | None, int | None]


def position_of(node: ast.expr) -> Position:
    """Where an expression begins and ends: lines, then columns, as code objects have it."""
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def site_at(position: Position) -> str:
    """The name of a place in a file."""
    return "{}-{}:{}-{}".format(*position)


def dotted(expression: ast.expr, local: frozenset[str]) -> list[str] | None:
    """The names of `a.b.c`, where `a` is not bound in the code; None of anything else."""
    path: list[str] = []
    while isinstance(expression, ast.Attribute):
        path.insert(0, expression.attr)
        expression = expression.value
    if not isinstance(expression, ast.Name) or expression.id in local:
        return None
    return [expression.id, *path]


def in_modules(found: Any, names: Iterable[str]) -> Any:
    """What `found.a.b` is, if `found` and all before the last are modules; else None."""
    for name in names:
        if not issubclass(type(found), types.ModuleType):
            return None
        found = vars(found).get(name)
    return found


def torch_name(
    function: ast.expr, names: dict[str, Any], local: frozenset[str]
) -> tuple[dict[str, Any], str] | None:
    """The namespace and the name of a function of torch's that an expression stands for.

    It is in code that has these globals, and binds these local names.
    """
    path = dotted(function, local)
    if path is None:
        return None
    home = in_modules(names.get(path[0]), path[1:-1])
    if len(path) == 1:  # by a name of its own, which other code may bind anew while a pass runs
        return (names, path[0]) if home is torch._assert else None
    if not isinstance(home, types.ModuleType) or home.__name__.partition(".")[0] != "torch":
        return None
    found = vars(home).get(path[-1])
    if isinstance(found, (types.FunctionType, types.BuiltinFunctionType)):
        return vars(home), path[-1]
    return None


def watched_names(
    nodes: Iterable[ast.AST], names: dict[str, Any], local: frozenset[str]
) -> list[tuple[dict[str, Any], str, Any]]:
    """The functions of torch's that code calls by a name, each with where it was found."""
    found: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
    for node in nodes:
        if isinstance(node, ast.Call):
            place = torch_name(node.func, names, local)
            if place is not None:
                space, name = place
                found[id(space), name] = (space, name, space[name])
    return list(found.values())


def names_bound(node: ast.AST) -> frozenset[str]:
    """Every name that is bound somewhere in code, or declared global there."""
    found: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and not isinstance(inner.ctx, ast.Load):
            found.add(inner.id)
        elif isinstance(inner, ast.arg):
            found.add(inner.arg)
        elif isinstance(inner, ast.Global | ast.Nonlocal):
            found.update(inner.names)
        elif isinstance(inner, ast.alias):
            found.add((inner.asname or inner.name).partition(".")[0])
        elif isinstance(inner, _NAMED) and inner.name:
            found.add(inner.name)
        elif isinstance(inner, ast.MatchMapping) and inner.rest:
            found.add(inner.rest)
    return frozenset(found)


def first_argument(node: ast.AST) -> str | None:
    """The name of a method's first argument, if nothing else is ever bound to it there."""
    arguments = getattr(node, "args", None)
    if not isinstance(arguments, ast.arguments):
        return None
    first = [*arguments.posonlyargs, *arguments.args][:1]
    if not first:
        return None
    name, times = first[0].arg, 0
    for inner in ast.walk(node):
        if isinstance(inner, ast.arg):
            times += inner.arg == name
        elif isinstance(inner, ast.Name) and inner.id == name:
            times += not isinstance(inner.ctx, ast.Load)
        elif isinstance(inner, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
            times += inner.name == name
    return name if times == 1 else None


def is_plain_function(node: ast.FunctionDef) -> bool:
    """Whether a function may have a variable of ours: one call runs it, and none looks."""
    for inner in ast.walk(node):
        if isinstance(inner, (ast.Yield, ast.YieldFrom, ast.Await)):
            return False
        if isinstance(inner, ast.Name) and inner.id in _LOOKS_AT_LOCALS:
            return False
    return True


def may_be_asked_for(node: ast.FunctionDef) -> bool:
    """Whether a function may be what makes an attribute: `hasattr` swallows what it raises."""
    given = node.args
    alone = len(given.posonlyargs) + len(given.args) == 1
    alone = alone and not (given.vararg or given.kwonlyargs or given.kwarg)
    return node.name == "__getattr__" or (alone and bool(node.decorator_list))


def jumps_out(body: Iterable[ast.stmt]) -> bool:
    """Whether a `return`, `break` or `continue` may leave statements, or a loop in them."""
    todo: list[ast.AST] = [*body]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Return | ast.Break | ast.Continue):
            return True
        if not isinstance(node, ast.expr | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            todo += ast.iter_child_nodes(node)
    return False


def tests_in(node: ast.AST) -> set[ast.AST]:
    """The expressions in code of which nothing but the truth is asked."""
    found: set[ast.AST] = set()
    for each in ast.walk(node):
        if isinstance(each, ast.If | ast.While | ast.IfExp | ast.Assert):
            found.add(each.test)
        elif isinstance(each, ast.comprehension):
            found.update(each.ifs)
        elif isinstance(each, ast.UnaryOp) and isinstance(each.op, ast.Not):
            found.add(each.operand)
    todo = [each for each in found if isinstance(each, ast.BoolOp)]
    while todo:
        values = todo.pop().values
        found.update(values)
        todo += [each for each in values if isinstance(each, ast.BoolOp)]
    return found


def is_row(node: ast.expr) -> bool:
    """Whether an expression is, by what it says, a list or a tuple that may hold tensors."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _MAKE_ROWS
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add | ast.Mult) and (is_row(node.left) or is_row(node.right))
    if isinstance(node, ast.List | ast.Tuple):
        return not node.elts or not all(isinstance(e, ast.Constant) for e in node.elts)
    return isinstance(node, ast.ListComp)


def names_loaded(node: ast.AST) -> frozenset[str]:
    """Every name whose value code uses otherwise than by calling it at once."""
    called = {id(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    return frozenset(
        n.id
        for n in ast.walk(node)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and id(n) not in called
    )


def rows_bound(node: ast.AST) -> frozenset[str]:
    """Every name that code binds a list or a tuple to; it may bind others to it, too."""
    found: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assign | ast.AnnAssign | ast.NamedExpr | ast.AugAssign):
            targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
            if inner.value is not None and is_row(inner.value):
                found.update(t.id for t in targets if isinstance(t, ast.Name))
    return frozenset(found)


def names_made(node: ast.AST) -> frozenset[str]:
    """Every name that code binds to nothing but lists and dicts which it makes there."""
    made: list[str] = []
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assign | ast.AnnAssign) and isinstance(inner.value, _MADE):
            targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
            made += [t.id for t in targets if isinstance(t, ast.Name)]
    stores = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not _is_load(n)]
    others = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    for inner in ast.walk(node):
        others.update(inner.names if isinstance(inner, ast.Global) else ())
    return frozenset(n for n in made if stores.count(n) == made.count(n)) - others


def _is_load(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)
