"""Twins of functions: the same code with a recorder at each decision that it takes.

A decision is whatever can make two runs of the same code do different things: a branch taken, a
turn of a loop, a later operand of `and` or `or`, a handler entered; the callable that a call goes
to; a plain value that is an argument or an index, or by which Python itself picks: a key of a dict,
how often a list is repeated, what a function gives back to code in C. Of the two ways a branch may
go, one is marked: every loop and every function marks its own beginning, so what comes next tells
the other.

Line numbers, names, closures and defaults stay as they are. Nothing is bound that was not.
"""

from __future__ import annotations

import ast
from typing import Any, TypeVar

from fmapkit.paths.rewriting.calls import APPEND, PYTHON_GOES_BY, returned_by
from fmapkit.paths.rewriting.library_calls import GIVE_ALL
from fmapkit.paths.rewriting.stores import StoreRewriting, names_parameter
from fmapkit.paths.rewriting.syntax import (
    COMPARED,
    DECIDING,
    is_plain_function,
    jumps_out,
    may_be_asked_for,
)
from fmapkit.paths.rewriting.torch_calls import recorded

_Node = TypeVar("_Node", bound=ast.AST)


class Rewriter(StoreRewriting, ast.NodeTransformer):
    """Puts recorders into one function."""

    _depth = 0  # of functions around the code at hand
    _from_c = False  # code in C may call the function at hand
    _returned = "value"  # the recorder of what it gives back

    # -- statements ---------------------------------------------------------------------------

    def _body(self, node: _Node) -> _Node:
        self.generic_visit(node)
        node.body.insert(0, self._mark(node.body[0]))  # type: ignore[attr-defined]
        return node

    visit_If = visit_match_case = _body  # noqa: N815

    def _loop(self, node: ast.For | ast.While) -> ast.AST:
        if isinstance(node, ast.For):
            self._looped_over(node.iter)
        self._body(node)
        if node.orelse:
            node.orelse.insert(0, self._mark(node.orelse[0]))
        return node

    visit_For = visit_While = _loop  # noqa: N815

    def _looped_over(self, node: ast.expr) -> None:
        if isinstance(node, ast.Call) and self._object_named(node.func) in GIVE_ALL:
            self._idle.add(node)
            for argument in node.args:
                self._looped_over(argument)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        self.generic_visit(node)
        node.body.insert(0, self._caught(node.body[0]))
        return node

    def visit_With(self, node: ast.With) -> ast.AST:
        """A context manager may swallow an exception: where that came from is told first.

        What it turns on is told by which one it is; of a call, what is called tells.
        """
        self.generic_visit(node)
        for item in node.items:
            if not isinstance(item.context_expr, ast.Call):
                self._looked_at(item, "context_expr", how="entered")
        node.body = self._telling(node.body)
        return node

    def _finally(self, node: Any) -> Any:
        """So may a `finally` that has a `return`, a `break` or a `continue`."""
        self.generic_visit(node)
        if jumps_out(node.finalbody):
            within = type(node)(node.body, node.handlers, node.orelse, [])
            inner = [ast.copy_location(within, node)] if node.handlers else node.body
            whole = ast.Try(self._telling(inner), [], [], node.finalbody)
            return ast.copy_location(whole, node)
        return node

    visit_Try = visit_TryStar = _finally  # noqa: N815

    def _telling(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """The same statements; they tell where an exception came from, and raise it once more."""
        at = body[0]
        again = ast.copy_location(ast.Raise(), at)
        every = ast.copy_location(ast.Name("BaseException", ast.Load()), at)
        handler = ast.copy_location(ast.ExceptHandler(every, None, [self._caught(at), again]), at)
        if "BaseException" in self._local or "BaseException" in self._names:
            handler.type = None
        return [ast.copy_location(ast.Try(body, [handler], [], []), at)]

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        """The same of `+=` and its kin; and what they stand for is what it is without `=`."""
        self._whole.add(node.target)
        self._operands.add(node.value)
        self.generic_visit(node)
        if isinstance(node.op, ast.MatMult | ast.Pow):
            self._looked_at(node, "value")
        elif isinstance(node.op, ast.Mult) and isinstance(node.target, ast.Name):
            if node.target.id in self._rows:
                node.value = self._repeated(node.target, node.value)
        if isinstance(node.target, ast.Attribute) and node.target.attr in DECIDING:
            value = self._value(node.value)
        elif isinstance(node.op, ast.Add):
            value = self._more(node.target, node.value)
        else:
            return node
        return ast.copy_location(ast.AugAssign(node.target, node.op, value), node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """A function marks where it begins, after its docstring."""
        node.args = self.visit(node.args)
        node.decorator_list = [self.visit(d) for d in node.decorator_list]
        documented = ast.get_docstring(node, clean=False) is not None
        head, rest = node.body[:documented], node.body[documented:]
        before = self._quick, self._from_c
        self._quick = is_plain_function(node)
        telling = self._quick and may_be_asked_for(node)
        inner = self._depth > 0 and (node.name in self._loaded or bool(node.decorator_list))
        self._from_c = inner or node.name in PYTHON_GOES_BY
        returned, self._returned = self._returned, returned_by(node.name)
        self._depth += 1
        body = [self.visit(statement) for statement in rest]
        body = self._telling(body) if telling and body else body
        self._depth -= 1
        at = rest[0] if rest else head[0]
        if self._quick:
            target = ast.Name(APPEND, ast.Store())
            begin: ast.stmt = ast.Assign([target], recorded("enter", self._site(at), at))
            ast.fix_missing_locations(ast.copy_location(begin, at))
        else:
            begin = self._mark(at)
        self._quick, self._from_c = before
        self._returned = returned
        node.body = [*head, begin, *body]
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        """What code in C does with a plain value leaves no mark; other callers' code does."""
        self.generic_visit(node)
        return self._looked_at(node, "value", how=self._returned) if self._from_c else node

    def _elsewhere(self, node: _Node) -> _Node:
        """Code with variables of its own."""
        before, self._quick = self._quick, False
        self.generic_visit(node)
        self._quick = before
        return node

    visit_ClassDef = _elsewhere  # noqa: N815

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        node.args = self.visit(node.args)
        before, self._quick = self._quick, False
        body = self.visit(node.body)
        if node in self._ranks:
            body = self._ranked(node.args.args[0].arg, body)
        elif node in self._keys:
            body = self._value(body, "exact")
        elif node in self._given:
            body = self._value(body)
        node.body = self._marked(body)
        self._quick = before
        return node

    def visit_arguments(self, node: ast.arguments) -> ast.AST:
        """Defaults are evaluated where the function is made; annotations are left alone."""
        node.defaults = [self.visit(d) for d in node.defaults]
        node.kw_defaults = [None if d is None else self.visit(d) for d in node.kw_defaults]
        return node

    # -- expressions --------------------------------------------------------------------------

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        node.body = self._marked(node.body)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        node.values[1:] = map(self._marked, node.values[1:])
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """`a < b < c` looks at c only where a < b; what a tensor is compared with makes a mask."""
        masks = node not in self._tests and type(node.ops[0]) in COMPARED
        self.generic_visit(node)
        node.comparators[1:] = map(self._marked, node.comparators[1:])
        both = node.left, *node.comparators
        if not masks or len(both) > 2 or any(isinstance(b, ast.Constant) for b in both):
            return node
        name = ast.copy_location(ast.Constant(COMPARED[type(node.ops[0])]), node)
        return recorded("compared", node.comparators[0], node, self._append(), name, node.left)

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        """What a condition leaves out is marked, and so is each element: that makes each turn."""
        self._looped_over(node.iter)
        self.generic_visit(node)
        # With a mark where a condition does not hold.
        either = [ast.BoolOp(ast.Or(), [test, self._marking(test)]) for test in node.ifs]
        node.ifs = list(map(ast.copy_location, either, node.ifs))
        return node

    def _elements(self, node: Any) -> Any:
        before, self._quick = self._quick, False
        self.generic_visit(node)
        for outer in node.generators[:-1]:  # whose turn may have no element
            none = ast.copy_location(ast.Constant(None), outer.target)
            marked = ast.Compare(self._marking(outer.target), [ast.Is()], [none])
            outer.ifs.insert(0, ast.copy_location(marked, outer.target))
        of = "key" if isinstance(node, ast.DictComp) else "elt"
        element = getattr(node, of)
        if of == "key" or (isinstance(node, ast.GeneratorExp) and node not in self._idle):
            exact = of == "key" or isinstance(element, ast.Tuple)
            element = self._value(element, "exact" if exact else "value")
        setattr(node, of, self._marked(element))
        self._quick = before
        return node

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _elements  # noqa: N815

    def visit_Yield(self, node: ast.Yield) -> ast.AST:
        """Where a generator goes on is a decision of whoever has left it there."""
        site = self._site(node)
        self.generic_visit(node)
        self._looked_at(node, "value")
        return recorded("resumed", node, node, site)

    def visit_YieldFrom(self, node: ast.YieldFrom) -> ast.AST:
        """The same; what it delegates to tells where that goes on itself."""
        site = self._site(node)
        self.generic_visit(node)
        self._looked_at(node, "value", how="unpacked")
        return recorded("resumed", node, node, site)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """An index decides something where Python picks by it."""
        plain = self._is_plain(node.slice)
        self.generic_visit(node)
        into = self._into(node)
        self._reads = isinstance(node.ctx, ast.Load)
        if isinstance(node.value, ast.Name):
            of = ast.copy_location(ast.Name(node.value.id, ast.Load()), node.value)
            at = self._value(node.slice, "index", of)
        else:
            if not plain:
                into = recorded("indexed", into, node.value, self._append())
            at = self._value(node.slice, "at" if self._reads else "value")
        self._reads = False
        found = ast.copy_location(ast.Subscript(into, at, node.ctx), node)
        return (
            self._whose(found) if isinstance(node.ctx, ast.Load) and names_parameter(at) else found
        )

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """Products may be layers, and powers may be nonlinear: it depends on what is given."""
        self._operands.update((node.left, node.right))
        self.generic_visit(node)
        if isinstance(node.op, ast.MatMult):
            self._looked_at(node, "left", "right")
        elif isinstance(node.op, ast.Pow):
            self._looked_at(node, "right")
        elif isinstance(node.op, ast.Mult):
            left, right = self._times(node.left, node.right)
            return ast.copy_location(ast.BinOp(left, node.op, right), node)
        return node

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        """By its keys a dict is asked later on; those of another one may be put in."""
        self.generic_visit(node)
        each = zip(node.keys, node.values, strict=True)
        keys = [None if key is None else self._value(key, "exact") for key in node.keys]
        values = [v if key is not None else self._value(v, "keys") for key, v in each]
        return ast.copy_location(ast.Dict(keys, values), node)
