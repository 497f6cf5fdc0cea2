"""What the names in one function stand for, as far as it can be told without running it.

A value is *static* if it is made of constants, plain attributes of `self` and loop counters: what
is read of it is guarded, and a branch on it is the same in every pass. All else is data.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fmapkit._guards import SIMPLE, Evidence, is_plain
from fmapkit._proof_trusted import JIT_QUESTIONS

__all__ = ["Scope", "UnprovenError"]


class UnprovenError(Exception):
    """Raised inside the proof at the first construct that could take another road."""


class Scope:
    """One function that is being read.

    Args:
        evidence: where to note what is looked at.
        function: the function.
        self_name: the parameter that is the module; empty if none is.
        dirty: names that are bound from data somewhere in the function.

    Attributes:
        locals: the function's own names.
        callable: those that can only be modules, or parts of them.
    """

    def __init__(
        self, evidence: Evidence, function: types.FunctionType, self_name: str, dirty: set[str]
    ) -> None:
        self.evidence = evidence
        self.module = evidence.module
        self.function = function
        self.self_name = self_name
        self.locals = {*function.__code__.co_varnames, *function.__code__.co_cellvars}
        self.callable: set[str] = set()
        self._static: set[str] = set()
        code = function.__code__
        count = code.co_argcount + code.co_kwonlyargcount
        self._given = set(code.co_varnames[:count]) - {self_name}
        self._dirty = dirty

    # -- names that the function binds --------------------------------------------------------

    def assign(self, name: str, static: bool, given: bool = True) -> None:
        """A name is bound."""
        self.callable.discard(name)
        if given:
            self._given.add(name)
        else:
            self._given.discard(name)
        if static and name not in self._dirty:
            self._static.add(name)
        else:
            self._static.discard(name)

    def count(self, names: list[str]) -> None:
        """Names are bound by a loop over modules or static values."""
        clean = set(names) - self._dirty
        self._static |= clean
        self.callable |= clean

    def is_given(self, node: ast.expr | None) -> bool:
        """Whether it may be a number that the function was given, or was computed of one."""
        match node:
            case ast.Name(id=name):
                return name in self._given
            case ast.BinOp(left=left, right=right):
                return self.is_given(left) or self.is_given(right)
            case ast.UnaryOp(operand=value) | ast.Starred(value=value):
                return self.is_given(value)
            case ast.IfExp(body=body, orelse=orelse):
                return self.is_given(body) or self.is_given(orelse)
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                return any(map(self.is_given, elements))
            case ast.Slice(lower=lower, upper=upper, step=step):
                return any(map(self.is_given, (lower, upper, step)))
        return False

    # -- static values ------------------------------------------------------------------------

    def is_static(self, node: ast.expr) -> bool:
        """Whether it is made of constants, plain attributes of self and loop counters."""
        match node:
            case ast.Constant():
                return True
            case ast.Name(id=name):
                return name in self._static
            case ast.Attribute():
                path = self.path(node)
                return path is not None and self._readable(path)
            case ast.BoolOp(values=values):
                return all(map(self.is_static, values))
            case ast.UnaryOp(operand=operand):
                return self.is_static(operand)
            case ast.BinOp(left=left, right=right):
                return self.is_static(left) and self.is_static(right)
            case ast.Compare(left=left, comparators=others):
                return all(map(self.is_static, (left, *others)))
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                return all(map(self.is_static, elements))
            case ast.Call(func=ast.Name(id="len"), args=[value]):
                self.evidence.deep = True
                return isinstance(self.resolve(value), nn.Module) or self.is_static(value)
            case ast.Call(func=ast.Attribute() as function, args=[]):
                return self.resolve(function) in JIT_QUESTIONS
            case ast.Subscript(value=value, slice=index):
                return self.is_static(value) and self.is_static(index)
        return False

    def _readable(self, path: str) -> bool:
        """Plain instance attributes all the way: no property that could compute anything."""
        at: Any = self.module
        for name in path.split("."):
            if not isinstance(at, nn.Module):
                return False
            for place in (at.__dict__, at._modules, at._parameters, at._buffers):
                if name in place:
                    at = place[name]
                    break
            else:
                at = inspect.getattr_static(type(at), name, None)
                if not isinstance(at, SIMPLE) or at is None:
                    return False
        return isinstance(at, (nn.Module, torch.Tensor)) or is_plain(at)

    def guard(self, node: ast.expr) -> bool:
        """Remember every attribute the expression reads; True for use in conditions.

        Raises:
            UnprovenError: a tensor is read for more than whether it is None.
        """
        nones = {
            id(c.left)
            for c in ast.walk(node)
            if isinstance(c, ast.Compare) and isinstance(c.ops[0], (ast.Is, ast.IsNot))
        }
        for part in _attributes(node):
            path = self.path(part)
            if path is None:
                continue
            value = operator.attrgetter(path)(self.module)
            if isinstance(value, torch.Tensor) and id(part) not in nones:
                raise UnprovenError("a branch on a tensor")
            if not isinstance(value, nn.Module):  # the structure is compared as a whole
                self.evidence.add(self.module, path, id(part) in nones)
        return True

    def is_known(self, test: ast.expr) -> bool:
        """Whether a static test has one outcome: nothing in it changes from turn to turn."""
        return not {n.id for n in ast.walk(test) if isinstance(n, ast.Name)} & self._static

    def evaluate(self, test: ast.expr) -> bool:
        """The outcome of a static test, under the guards."""
        code = compile(ast.Expression(test), "<guard>", "eval")
        return bool(eval(code, self.function.__globals__, {self.self_name: self.module}))

    # -- what is bound outside the function ---------------------------------------------------

    def path(self, node: ast.expr) -> str | None:
        """`"a.b"` for `self.a.b`; None for anything else."""
        root, names = _dotted(node)
        if root is None or root != self.self_name or not names:
            return None
        self.evidence.deep = self.evidence.deep or len(names) > 1
        return ".".join(names)

    def resolve(self, node: ast.expr) -> Any:
        """The object a name or dotted name stands for, if it is bound outside the function."""
        root, names = _dotted(node)
        if root is None:
            return None
        if root == self.self_name:
            found: Any = self.module
            self.evidence.deep = self.evidence.deep or len(names) > 1
        elif root in self.locals:
            return None
        elif root in self.function.__globals__:
            found = self.function.__globals__[root]
        elif root in self.function.__code__.co_freevars:
            return None
        else:
            found = getattr(builtins, root, None)
        for name in names:
            if isinstance(found, nn.Module) and isinstance(
                inspect.getattr_static(type(found), name, None), property
            ):
                return None  # a property may compute anything
            found = getattr(found, name, None)
        return found

    def home(self) -> Any:
        """The class in whose body the function was written; None where nothing tells."""
        code = self.function.__code__
        cells = dict(zip(code.co_freevars, self.function.__closure__ or (), strict=False))
        return cells["__class__"].cell_contents if "__class__" in cells else None


def _dotted(node: ast.expr) -> tuple[str | None, list[str]]:
    """`("a", ["b", "c"])` for `a.b.c`; the first is None where it does not begin with a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id if isinstance(node, ast.Name) else None), names[::-1]


def _attributes(node: ast.AST) -> Iterator[ast.Attribute]:
    if isinstance(node, ast.Attribute):
        yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from _attributes(child)
