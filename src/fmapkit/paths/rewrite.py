"""Twins of functions: the same code with a recorder at each decision that it takes.

A decision is whatever can make two runs of the same code do different things: a branch taken, a
turn of a loop, a later operand of `and` or `or`, a handler entered; the callable that a call goes
to; a plain value that is an argument or an index. Of the two ways a branch may go, one is marked:
every loop and every function marks its own beginning, so what comes next tells the other.

Line numbers, names, closures and defaults stay as they are. Nothing is bound that was not.
"""

from __future__ import annotations

import ast
import builtins
from typing import Any, TypeVar

from fmapkit.paths.fixed_attributes import OF_TORCHS
from fmapkit.paths.recorders import MARK
from fmapkit.paths.syntax import names_bound, torch_name
from fmapkit.paths.torch_calls import handed, recorded

__all__ = ["Rewriter"]

_Node = TypeVar("_Node", bound=ast.AST)
# Builtins whose arguments need no look: what they return is looked at where it is used.
_HARMLESS = {
    *("abs", "all", "any", "bool", "callable", "dict", "enumerate", "float", "hasattr", "id"),
    *("int", "isinstance", "issubclass", "iter", "len", "list", "max", "min", "print", "range"),
    *("repr", "reversed", "round", "set", "str", "sum", "super", "tuple", "type", "zip"),
}


# What a function's marks are given to, while it runs. No identifier of a model's can be that.
_APPEND = f"{MARK}append"
# A function that may look at its own variables has none of ours.
_LOOKS_AT_LOCALS = {"locals", "vars", "dir", "eval", "exec"}
# Functions of torch's whose plain arguments decide neither what runs nor whose filters come out.
_PLAIN_ARGUMENTS_ARE_IDLE = {
    *("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"),
    "_assert",
}


class Rewriter(ast.NodeTransformer):
    """Puts recorders into one function.

    Args:
        place: names the function, for its marks.
        names: its globals.
        node: the function.
        fixed: attributes of its first argument that are compared before each pass: children, and
            functions of its class.
        tapped: the places of calls at which a tap may be set.
    """

    def __init__(
        self,
        place: str,
        names: dict[str, Any],
        node: ast.AST,
        fixed: frozenset[str],
        tapped: frozenset[str],
    ) -> None:
        self._place = place
        self._names = names
        self._local = names_bound(node)
        self._fixed = fixed
        self._tapped = tapped
        self._self = _first_argument(node) if fixed else None
        self._count = 0
        self._quick = False  # the code at hand has a variable that its marks are given to

    # -- what is put in -----------------------------------------------------------------------

    def _site(self, node: ast.AST) -> ast.Constant:
        self._count += 1
        line = getattr(node, "lineno", 0)
        return ast.Constant(f"{MARK}{self._place}:{line}:{self._count}")

    def _append(self) -> ast.expr:
        """What items are given to."""
        if self._quick:
            return ast.Name(_APPEND, ast.Load())
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

    def _value(self, node: ast.expr) -> ast.expr:
        """An argument or an index, looked at; in a display, each of its elements."""
        if isinstance(node, ast.Constant | ast.Lambda | ast.GeneratorExp):
            return node
        if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
            return node
        if isinstance(node, ast.Tuple | ast.List):
            node.elts = [self._value(e) for e in node.elts]
            return node
        if isinstance(node, ast.Dict):
            node.values = [self._value(v) for v in node.values]
            return node
        if isinstance(node, ast.Slice):
            for part in ("lower", "upper", "step"):
                bound = getattr(node, part)
                if bound is not None:
                    setattr(node, part, self._value(bound))
            return node
        if isinstance(node, ast.Starred):
            node.value = self._value(node.value)
            return node
        looked_at = recorded("value", node, node, self._append())
        if isinstance(node, ast.Name):
            same = ast.copy_location(ast.Name(node.id, ast.Load()), node)
            return self._unless_tensor(node.id, same, looked_at)
        return looked_at

    # -- statements ---------------------------------------------------------------------------

    def _body(self, node: _Node) -> _Node:
        self.generic_visit(node)
        node.body.insert(0, self._mark(node.body[0]))  # type: ignore[attr-defined]
        return node

    visit_If = visit_match_case = _body  # noqa: N815

    def _loop(self, node: ast.For | ast.While) -> ast.AST:
        self._body(node)
        if node.orelse:
            node.orelse.insert(0, self._mark(node.orelse[0]))
        return node

    visit_For = visit_While = _loop  # noqa: N815

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        self.generic_visit(node)
        node.body.insert(0, self._caught(node.body[0]))
        return node

    def visit_With(self, node: ast.With) -> ast.AST:
        """A context manager may swallow an exception: where that came from is told first."""
        self.generic_visit(node)
        at = node.body[0]
        again = ast.copy_location(ast.Raise(), at)
        every = ast.copy_location(ast.Name("BaseException", ast.Load()), at)
        handler = ast.copy_location(ast.ExceptHandler(every, None, [self._caught(at), again]), at)
        if "BaseException" in self._local or "BaseException" in self._names:
            handler.type = None
        node.body = [ast.copy_location(ast.Try(node.body, [handler], [], []), at)]
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        """An attribute that torch's own code decides by may get another value in a pass."""
        self.generic_visit(node)
        targets = [t for target in node.targets for t in ast.walk(target)]
        if any(isinstance(t, ast.Attribute) and t.attr in OF_TORCHS for t in targets):
            return ast.copy_location(ast.Assign(node.targets, self._value(node.value)), node)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        """The same of `+=` and its kin."""
        self.generic_visit(node)
        if isinstance(node.target, ast.Attribute) and node.target.attr in OF_TORCHS:
            value = self._value(node.value)
            return ast.copy_location(ast.AugAssign(node.target, node.op, value), node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """Annotations are left alone: of locals they are not evaluated."""
        node.target = self.visit(node.target)
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """A function marks where it begins, after its docstring."""
        node.args = self.visit(node.args)
        node.decorator_list = [self.visit(d) for d in node.decorator_list]
        documented = ast.get_docstring(node, clean=False) is not None
        head, rest = node.body[:documented], node.body[documented:]
        before, self._quick = self._quick, _is_quick(node)
        body = [self.visit(statement) for statement in rest]
        at = rest[0] if rest else head[0]
        if self._quick:
            target = ast.Name(_APPEND, ast.Store())
            begin: ast.stmt = ast.Assign([target], recorded("enter", self._site(at), at))
            ast.fix_missing_locations(ast.copy_location(begin, at))
        else:
            begin = self._mark(at)
        self._quick = before
        node.body = [*head, begin, *body]
        return node

    def _elsewhere(self, node: _Node) -> _Node:
        """Code with variables of its own."""
        before, self._quick = self._quick, False
        self.generic_visit(node)
        self._quick = before
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._elsewhere(node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        node.args = self.visit(node.args)
        before, self._quick = self._quick, False
        node.body = self._marked(self.visit(node.body))
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
        """`a < b < c` looks at c only where a < b."""
        self.generic_visit(node)
        node.comparators[1:] = map(self._marked, node.comparators[1:])
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        """What a condition leaves out is marked, and so is each element: that makes each turn."""
        self.generic_visit(node)
        node.ifs = [self._or_marked(test) for test in node.ifs]
        return node

    def _or_marked(self, test: ast.expr) -> ast.expr:
        """The same condition, with a mark where it does not hold."""
        return ast.copy_location(ast.BoolOp(ast.Or(), [test, self._marking(test)]), test)

    def _elements(self, node: Any) -> Any:
        before, self._quick = self._quick, False
        self.generic_visit(node)
        for outer in node.generators[:-1]:  # whose turn may have no element
            none = ast.copy_location(ast.Constant(None), outer.target)
            marked = ast.Compare(self._marking(outer.target), [ast.Is()], [none])
            outer.ifs.insert(0, ast.copy_location(marked, outer.target))
        of = "key" if isinstance(node, ast.DictComp) else "elt"
        setattr(node, of, self._marked(getattr(node, of)))
        self._quick = before
        return node

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _elements  # noqa: N815

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = node.func
        fixed = self._is_fixed(function)
        of_torch = torch_name(function, self._names, self._local)
        self.generic_visit(node)
        builtin = self._builtin(function)
        if builtin in _HARMLESS:
            return node
        idle = of_torch is not None and of_torch[0][of_torch[1]].__name__
        if idle not in _PLAIN_ARGUMENTS_ARE_IDLE:
            # What a module of the model is given first is its input.
            first = node.args[:1] if fixed and _is_name(node.args) else []
            node.args = [*first, *map(self._value, node.args[len(first) :])]
            for keyword in node.keywords:
                keyword.value = self._value(keyword.value)
        callee = node.func
        if not fixed and of_torch is None and builtin is None:
            callee = self._callee(callee)
        node.func = handed(node, callee, self._place.rpartition(":")[0], self._tapped)
        return node

    def _callee(self, function: ast.expr) -> ast.expr:
        """What is called, looked at; a tensor's method is what its name says."""
        looked_at = recorded("called", function, function, self._append())
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            owner = ast.Name(function.value.id, ast.Load())
            method = ast.copy_location(ast.Attribute(owner, function.attr, ast.Load()), function)
            return self._unless_tensor(owner.id, method, looked_at)
        return looked_at

    def _is_fixed(self, function: ast.expr) -> bool:
        return (
            isinstance(function, ast.Attribute)
            and function.attr in self._fixed
            and isinstance(function.value, ast.Name)
            and function.value.id == self._self
        )

    def _builtin(self, function: ast.expr) -> str | None:
        """The name of a builtin, if an expression is that, and nothing else has it here."""
        if not isinstance(function, ast.Name) or not hasattr(builtins, function.id):
            return None
        return None if function.id in self._local or function.id in self._names else function.id

    def visit_Yield(self, node: ast.Yield) -> ast.AST:
        """Where a generator goes on is a decision of whoever has left it there."""
        site = self._site(node)
        self.generic_visit(node)
        return recorded("resumed", node, node, site)

    def visit_YieldFrom(self, node: ast.YieldFrom) -> ast.AST:
        """The same; what it delegates to tells where that goes on itself."""
        site = self._site(node)
        self.generic_visit(node)
        return recorded("resumed", node, node, site)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        node.slice = self._value(node.slice)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """Products may be layers, and powers may be nonlinear: it depends on what is given."""
        self.generic_visit(node)
        if isinstance(node.op, ast.MatMult):
            node.left, node.right = self._value(node.left), self._value(node.right)
        elif isinstance(node.op, ast.Pow):
            node.right = self._value(node.right)
        return node


def _first_argument(node: ast.AST) -> str | None:
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


def _is_quick(node: ast.FunctionDef) -> bool:
    """Whether a function may have a variable of ours: one call runs it, and none looks."""
    for inner in ast.walk(node):
        if isinstance(inner, (ast.Yield, ast.YieldFrom, ast.Await)):
            return False
        if isinstance(inner, ast.Name) and inner.id in _LOOKS_AT_LOCALS:
            return False
    return True


def _is_name(arguments: list[ast.expr]) -> bool:
    return bool(arguments) and isinstance(arguments[0], ast.Name)
