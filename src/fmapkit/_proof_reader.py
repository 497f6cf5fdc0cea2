"""Read the forward of one module, and the functions and methods it calls.

Each statement and expression is one that cannot take another road because of data, or it ends the
proof: `UnprovenError`.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fmapkit._guards import Evidence
from fmapkit._proof_escape import Lasting, lasting_of
from fmapkit._proof_scope import Scope, UnprovenError
from fmapkit._proof_source import source_of
from fmapkit._proof_trusted import (
    is_of_torch,
    is_trusted_callable,
    is_trusted_function,
    is_trusted_method,
)

__all__ = ["read_function"]


def read_function(
    evidence: Evidence, function: Any, bound: bool = True, seen: set[types.CodeType] | None = None
) -> None:
    """Prove a Python function, and those that it calls.

    Args:
        evidence: of the module whose forward it is part of; what is looked at is added.
        function: to read.
        bound: its first argument is the module.
        seen: code that was read already.

    Raises:
        UnprovenError: it could take another road.
    """
    seen = set() if seen is None else seen
    if not isinstance(function, types.FunctionType):
        raise UnprovenError("no Python function")
    if function.__code__ in seen:
        return
    seen.add(function.__code__)
    source = source_of(function.__code__, function)
    if source is None:
        raise UnprovenError("no source")
    node, dirty = source
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
    self_name = names[0] if bound and names else ""
    scope, lasting = Scope(evidence, function, self_name, dirty), lasting_of(node, self_name)
    _Reader(scope, lasting, seen).body(node.body)


class _Reader:
    """Reads the body of one function."""

    def __init__(self, scope: Scope, lasting: Lasting, seen: set[types.CodeType]) -> None:
        self._scope = scope
        self._lasting = lasting
        self._evidence = scope.evidence
        self._seen = seen

    def body(self, statements: Sequence[ast.stmt]) -> None:
        """Read it.

        Raises:
            UnprovenError: it could take another road.
        """
        for statement in statements:
            self._statement(statement)

    # -- statements ---------------------------------------------------------------------------

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Pass() | ast.Raise() | ast.Assert() | ast.Break() | ast.Continue():
                pass
            case ast.Return(value=value) | ast.Expr(value=value):
                self._expression(value)
            case ast.Assign(targets=targets, value=value):
                self._expression(value)
                given = self._scope.is_given(value)
                for target in targets:
                    self._target(target, self._scope.is_static(value), given)
            case ast.AnnAssign(target=target, value=value):
                self._expression(value)
                given = self._scope.is_given(value)
                self._target(target, value is not None and self._scope.is_static(value), given)
            case ast.AugAssign(target=target, value=value):
                if self._lasting.put_by_adding(target, value):
                    raise UnprovenError("adds to what outlives the call")
                self._expression(value)
                self._target(target, static=False)
            case ast.If(test=test, body=body, orelse=orelse):
                if not orelse and all(isinstance(s, ast.Raise) for s in body):
                    return  # this pass would end, not take another road
                self.body(self._taken(test, body, orelse))
            case ast.For(target=target, iter=iterable, body=body, orelse=orelse):
                self._loop(target, iterable)
                self.body([*body, *orelse])
            case ast.With(items=items, body=body):
                for item in items:
                    self._expression(item.context_expr)
                self.body(body)
            case _:
                raise UnprovenError(type(node).__name__)

    def _target(self, node: ast.expr, static: bool, given: bool = True) -> None:
        match node:
            case ast.Name(id=name):
                self._scope.assign(name, static, given)
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                for element in elements:
                    self._target(element, False, given)
            case ast.Starred(value=value):
                self._target(value, False, given)
            case ast.Subscript(value=ast.Name(), slice=index) if not self._lasting.put_at(node):
                self._index(index)
            case _:
                raise UnprovenError("assigns to state")

    def _taken(self, test: ast.expr, body: Any, orelse: Any) -> list[Any]:
        """The branches that can be taken: one where the guards decide, both where None does."""
        scope = self._scope
        if not scope.is_static(test):
            self._structural(test)
            return [*body, *orelse]
        scope.guard(test)
        if not scope.is_known(test):
            return [*body, *orelse]
        return list(body if scope.evaluate(test) else orelse)

    def _loop(self, target: ast.expr, iterable: ast.expr) -> None:
        if not self._iterates(iterable):
            raise UnprovenError("loops over data")
        self._scope.count([n.id for n in ast.walk(target) if isinstance(n, ast.Name)])

    def _iterates(self, node: ast.expr) -> bool:
        match node:
            case ast.Call(func=ast.Name(id="range"), args=args):
                return all(self._scope.is_static(a) and self._scope.guard(a) for a in args)
            case ast.Call(func=ast.Name(id="enumerate" | "zip" | "reversed"), args=args):
                return all(self._iterates(a) for a in args)
            case ast.Call(
                func=ast.Attribute(
                    value=value, attr="children" | "values" | "items" | "named_children" | "keys"
                ),
                args=[],
            ):
                return self._is_structure(value)
            case ast.Name() | ast.Attribute():
                found = self._scope.resolve(node)
                if isinstance(found, nn.Module):
                    return True
                return self._scope.is_static(node) and self._scope.guard(node)
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return all(self._iterates(e) or self._scope.is_static(e) for e in elements)
        return False

    def _is_structure(self, node: ast.expr) -> bool:
        """A module, or its `_modules`: what is in there is compared before each pass."""
        if isinstance(node, ast.Attribute) and node.attr == "_modules":
            node = node.value
        return isinstance(self._scope.resolve(node), nn.Module)

    # -- tests --------------------------------------------------------------------------------

    def _structural(self, node: ast.expr) -> None:
        """A test on what a value is, not on what it holds: `x is None`, `isinstance(x, tuple)`."""
        if self._scope.is_static(node):
            self._scope.guard(node)
            return
        match node:
            case ast.BoolOp(values=values):
                for value in values:
                    self._structural(value)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                self._structural(operand)
            case ast.Compare(
                left=ast.Name(),
                ops=[ast.Is() | ast.IsNot()],
                comparators=[ast.Constant(value=None)],
            ):
                pass
            case ast.Call(func=ast.Name(id="isinstance"), args=[ast.Name(), _]):
                pass
            case _:
                raise UnprovenError("a branch on data")

    # -- expressions --------------------------------------------------------------------------

    def _expression(self, node: ast.expr | None) -> None:
        match node:
            case None | ast.Constant() | ast.Name() | ast.JoinedStr():
                pass
            case ast.Attribute(value=value):
                self._expression(value)
            case ast.Tuple() | ast.List() | ast.Set() | ast.Dict() | ast.Slice():
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.expr):
                        self._expression(child)
            case ast.Starred(value=value) | ast.UnaryOp(operand=value):
                self._expression(value)
            case ast.BinOp(left=left, right=right):
                self._expression(left)
                self._expression(right)
            case ast.Compare(left=left, comparators=others):
                for other in (left, *others):
                    self._expression(other)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                for value in self._taken(test, [body], [orelse]):
                    self._expression(value)
            case ast.BoolOp():
                self._structural(node)
            case ast.Subscript(value=value, slice=index):
                self._expression(value)
                if not (isinstance(value, ast.Attribute) and value.attr == "shape"):
                    self._index(index)
            case (
                ast.ListComp(elt=element, generators=generators)
                | ast.GeneratorExp(elt=element, generators=generators)
            ):
                for generator in generators:
                    self._loop(generator.target, generator.iter)
                    for test in generator.ifs:
                        self._structural(test)
                self._expression(element)
            case ast.Call():
                self._call(node)
            case _:
                raise UnprovenError(type(node).__name__)

    def _index(self, node: ast.expr) -> None:
        """A tuple indexes a tensor, whatever it holds; a bare index may pick from a list."""
        self._evidence.numbers |= self._scope.is_given(node)
        if isinstance(node, ast.Tuple):
            return
        if isinstance(node, ast.Slice):
            parts = [p for p in (node.lower, node.upper, node.step) if p is not None]
        else:
            parts = [node]
        if not all(self._scope.is_static(p) and self._scope.guard(p) for p in parts):
            raise UnprovenError("an index from data")

    def _call(self, node: ast.Call) -> None:
        for argument in node.args:
            self._expression(argument)
        for keyword in node.keywords:
            self._expression(keyword.value)
        function, scope = node.func, self._scope
        operands = node.args[1:] if isinstance(function, ast.Name) else node.args
        operands = [*operands, *(keyword.value for keyword in node.keywords)]
        self._evidence.numbers |= any(map(scope.is_given, operands))
        if isinstance(function, ast.Name) and function.id in scope.locals:
            if function.id not in scope.callable:
                raise UnprovenError("calls a value")
            return
        if isinstance(function, ast.Subscript):
            if not isinstance(scope.resolve(function.value), nn.Module):
                raise UnprovenError("calls an item")
            self._index(function.slice)
            return
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Call):
            if isinstance(function.value.func, ast.Name) and function.value.func.id == "super":
                self._super(function.attr)
                return
        if isinstance(function, ast.Attribute) and function.attr in ("values", "items", "keys"):
            if self._is_structure(function.value):
                return
        found = scope.resolve(function)
        path = scope.path(function)
        if isinstance(getattr(found, "__self__", None), torch.Tensor):
            name = str(found.__name__)
            if not is_trusted_method(name) or name.endswith("_"):
                raise UnprovenError(f"calls .{name} of a tensor of its own")
            return  # of a parameter or a buffer, whichever it is then
        if found is not None:
            self._callee(found, node)
            self._guard_function(function, found)
            if path is not None and not isinstance(found, (nn.Module, types.MethodType)):
                # A function kept as an attribute: another one would be another road.
                self._evidence.add(scope.module, path)
            return
        if isinstance(function, ast.Attribute):
            self._expression(function.value)
            name = function.attr
            if self._lasting.put_by(function):
                raise UnprovenError("puts something into what outlives the call")
            if name == "pop" and not all(map(scope.is_static, node.args)):
                raise UnprovenError("pops by data")
            if path is not None or not is_trusted_method(name):
                raise UnprovenError(f"calls .{name}")
            return
        raise UnprovenError("calls something unknown")

    def _guard_function(self, node: ast.expr, found: Any) -> None:
        """A Python function that was followed into may be bound to another one later."""
        if not isinstance(found, types.FunctionType) or is_of_torch(found):
            return
        root, *names = ast.unparse(node).split(".")
        places = self._scope.function.__globals__
        if root not in places:
            return
        if names:
            self._evidence.add(places[root], ".".join(names))
        else:
            self._evidence.add(places, root)

    def _callee(self, found: Any, call: ast.Call) -> None:
        module = self._evidence.module
        if isinstance(found, nn.Module):
            if found is module:
                raise UnprovenError("calls itself")
            return  # a child: proven for itself
        if isinstance(found, types.MethodType) and found.__self__ is module:
            name = found.__name__
            if name in ("children", "named_children"):
                return
            if isinstance(getattr(nn.Module, name, None), types.FunctionType):
                raise UnprovenError("calls the machinery of modules")
            # Neither the instance nor the class may have another one later.
            called = call.func.attr if isinstance(call.func, ast.Attribute) else name
            self._evidence.add(module.__dict__, called)
            self._evidence.add(type(module), called)
            self._follow(found.__func__)
            return
        if isinstance(found, types.MethodType) and isinstance(found.__self__, nn.Module):
            if found.__name__ in ("children", "named_children", "values", "items", "keys"):
                return
            raise UnprovenError("calls another module's method")
        if isinstance(found, types.FunctionType):
            if not is_trusted_function(found):
                self._follow(found, bound=False)
            return
        if not is_trusted_callable(found, call):
            raise UnprovenError(f"calls {found!r}")

    def _follow(self, function: Any, bound: bool = True) -> None:
        read_function(self._evidence, function, bound, self._seen)

    def _super(self, name: str) -> None:
        home = self._scope.home()
        if home is None or not self._scope.self_name:
            raise UnprovenError("super() of something else")
        order = type(self._evidence.module).__mro__
        for base in order[order.index(home) + 1 :]:
            if name in base.__dict__:
                if base.__module__.startswith("torch.nn.modules."):
                    return
                self._evidence.add(base, name)
                self._follow(base.__dict__[name])
                return
        raise UnprovenError("super() has no such method")
