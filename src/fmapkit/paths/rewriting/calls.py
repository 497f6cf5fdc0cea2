"""Calls and values in the code of a twin: what is called is looked at, and so is what it is given,
and what goes around the parts of code by which Python itself picks one of several values.
"""

from __future__ import annotations

import ast
import builtins
from typing import Any, TypeGuard, TypeVar

from fmapkit.paths.rewriting.kept_numbers import PUT, writes_out
from fmapkit.paths.rewriting.library_calls import (
    HARMLESS,
    PICK,
    TAKE_ALL,
    calls_back,
    goes_through,
    object_named,
    takes_all,
)
from fmapkit.paths.rewriting.syntax import (
    MARK,
    first_argument,
    is_row,
    names_bound,
    names_loaded,
    names_made,
    rows_bound,
    tests_in,
    torch_name,
)
from fmapkit.paths.rewriting.torch_calls import (
    FLOATS_ARE_IDLE,
    ONLY_ZERO_DECIDES,
    recorded,
    replaceable,
)

_Node = TypeVar("_Node", bound=ast.AST)

# What a function's marks are given to, while it runs. No identifier of a model's can be that.
APPEND = f"{MARK}append"

# Methods that Python calls by itself, and by whose results it goes: it hands on those of others.
PYTHON_GOES_BY = {
    *("__bool__", "__contains__", "__eq__", "__exit__", "__ge__", "__getitem__", "__gt__"),
    *("__hash__", "__index__", "__instancecheck__", "__iter__", "__le__", "__length_hint__"),
    *("__lt__", "__ne__", "__next__", "__reversed__", "__subclasscheck__"),
}
_HANDS_ON = {"__getitem__", "__iter__", "__next__", "__reversed__"}
# Functions of torch's whose plain arguments decide neither what runs nor whose filters come out.
_PLAIN_ARGUMENTS_ARE_IDLE = {
    *("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"),
    "_assert",
}


# Methods that enter the context manager which they are given.
_ENTER = {"enter_context", "enter_async_context"}
# Functions and methods that are given an index.
_TAKE = {"__getitem__", "getitem", "itemgetter"}
# The recorders of indices.
_INDEX = {"at", "index"}
# Methods that put what they are given, which is not looked at before, into what may be a module.
_FILL = {"append", "extend", "update"}


class CallRewriting(ast.NodeTransformer):
    """Makes the nodes that are put in: marks, and calls that look at a value on its way."""

    def __init__(
        self,
        place: str,
        names: dict[str, Any],
        node: ast.AST,
        fixed: frozenset[str],
        tapped: frozenset[str],
    ) -> None:
        self._place = place  # names the function, for its marks
        # The variable that is the module which a method runs of, if there is one.
        self._self = first_argument(node) if fixed else None
        self._owner = None if place.endswith(":") else first_argument(node)  # the same of any class
        self._made = names_made(node)  # names of nothing but lists and dicts of its own
        self._rows = rows_bound(node)  # names that may stand for lists and tuples
        self._count = 0
        self._quick = False  # the code at hand has a variable that its marks are given to
        self._ranks: set[ast.AST] = set()  # lambdas by which something is sorted
        self._keys: set[ast.AST] = set()  # lambdas by which something is picked otherwise
        self._picked_from: set[ast.AST] = set()  # calls of `map` whose results Python picks from
        self._names = names  # the function's globals
        self._local = names_bound(node)
        self._loaded = names_loaded(node)
        self._tests = tests_in(node)
        # Attributes of its first argument that are compared before each pass: children, and
        # functions of its class.
        self._fixed = fixed
        self._tapped = tapped  # the places of calls at which a tap may be set
        self._given: set[ast.AST] = set()  # functions that a call is given
        self._reads = False  # the index at hand is one by which something is read
        self._operands: set[ast.AST] = set()  # what operators are given
        self._told: set[ast.AST] = set()  # recorders of what may be a parameter
        self._whole: set[ast.AST] = set()  # targets that get a whole value, which is looked at
        self._idle: set[ast.AST] = set()  # calls and generators that decide nothing themselves

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

    def _looked_at(
        self, node: _Node, *parts: str, how: str = "value", first: tuple[ast.expr, ...] = ()
    ) -> _Node:
        """`node`, with the values of some parts of it looked at."""
        for part in parts:
            value = getattr(node, part)
            if value is not None:
                setattr(node, part, self._value(value, how, *first))
        return node

    def _value(self, node: ast.expr, how: str = "value", *first: ast.expr) -> ast.expr:
        """An argument or an index, looked at; in a display, each of its elements.

        Of `id(t)`, which is another number in each pass, t is looked at.

        Args:
            how: by which recorder: "value", or another where Python goes through it or picks.
            first: what else that is given.
        """
        if self._identifies(node):
            return ast.copy_location(ast.Call(node.func, [*map(self._value, node.args)], []), node)
        if isinstance(node, ast.Call) and node in self._told:
            node = node.args[-1]  # whose parameter it is, is told below
        hands_on = how in ("value", "unpacked", "handed", "at")
        each = how if how in _INDEX else "value" if hands_on else "exact"
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
            return self._looked_at(node, "lower", "upper", "step", how=how, first=first)
        if isinstance(node, ast.Starred):
            self._looked_at(node, "value", how="unpacked" if hands_on else "elements")
            return self._looked_at(node, "value", how="at") if how in _INDEX else node
        looked_at = recorded(how, node, node, self._append(), *first)
        if isinstance(node, ast.Name):
            if node.id == self._self:
                return node  # whose method runs is told by the call
            if how in ("value", "handed") and self._quick:
                looked_at = self._unless_none(node.id, looked_at)
            if how in _INDEX and self._reads:
                return looked_at  # by which tensor, too
            same = ast.copy_location(ast.Name(node.id, ast.Load()), node)
            return self._unless_tensor(node.id, same, looked_at)
        return looked_at

    # -- where Python itself picks ----------------------------------------------------------------

    def _hand_on(self, node: ast.Call, found: Any) -> None:
        """What a function gives back to code in C is looked at; and so is a list that is sorted."""
        if isinstance(node.func, ast.Attribute) and node.func.attr == "sort":
            self._looked_at(node.func, "value", how="elements")
        at, name, how = self._calls_back(node, found)
        if at is not None and at < len(node.args):
            node.args[at] = self._keyed(node.args[at], how)
        for keyword in node.keywords:
            if keyword.arg == name is not None:
                keyword.value = self._keyed(keyword.value, how)

    def _calls_back(self, node: ast.Call, found: Any) -> tuple[int | None, str | None, str]:
        at, name, how = calls_back(node, found)
        return at, name, "keyed" if how == "mapped" and node in self._picked_from else how

    def _goes_through(self, node: ast.Call, found: Any) -> str | None:
        """The recorder of what a call goes through (see `goes_through`)."""
        how = goes_through(node, found)
        if how in ("elements", "keys", "ordered") or found in (max, min):
            self._picked_from.update(a for a in node.args if isinstance(a, ast.Call))
        return "elements" if how == "unpacked" and node in self._picked_from else how

    def _before_hand_on(self, node: ast.Call, found: Any) -> None:
        """Of a lambda that ranks, what it is given tells whether its result needs a look."""
        at, name, how = self._calls_back(node, found)
        keys = [k.value for k in node.keywords if k.arg == name]
        if at is not None:
            keys += node.args[at : at + 1]
        for key in keys:
            if isinstance(key, ast.Lambda):
                if how == "ranking" and key.args.args:
                    self._ranks.add(key)
                elif how != "mapped":
                    self._keys.add(key)

    def _keyed(self, function: ast.expr, how: str) -> ast.expr:
        if isinstance(function, ast.Constant | ast.Lambda | ast.Starred):
            return function
        return recorded(how, function, function, self._append())

    def _ranked(self, name: str, node: ast.expr) -> ast.expr:
        """A number by which something is sorted, looked at unless that is plain itself."""
        of = ast.copy_location(ast.Name(name, ast.Load()), node)
        return recorded("ranked", node, node, self._append(), of)

    def _picked(self, node: ast.expr) -> ast.expr:
        """One of several to pick from, looked at unless it is a number."""
        if isinstance(node, ast.Constant | ast.UnaryOp | ast.BinOp | ast.GeneratorExp):
            return node
        if isinstance(node, ast.Starred):
            return ast.copy_location(ast.Starred(self._picked(node.value), node.ctx), node)
        return recorded("picked", node, node, self._append())

    def _times(self, left: ast.expr, right: ast.expr) -> tuple[ast.expr, ast.expr]:
        """Two factors, with a look at the one by which a list, tuple or string is repeated."""
        if is_row(left):
            return left, self._value(right, _repeats(left))
        if is_row(right):
            return self._value(left, _repeats(right)), right
        if isinstance(left, ast.Name) and left.id in self._rows:
            return left, self._repeated(left, right)
        if isinstance(right, ast.Name) and right.id in self._rows:
            return self._repeated(right, left), right
        return left, right

    def _repeated(self, row: ast.Name, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Constant):
            return node
        append, same = self._append(), ast.Name(row.id, ast.Load())
        return recorded("repeated", node, node, append, ast.copy_location(same, row))

    # -- calls ----------------------------------------------------------------------------------

    def _identifies(self, node: ast.expr) -> TypeGuard[ast.Call]:
        return isinstance(node, ast.Call) and self._builtin(node.func) in ("id", "hash")

    def _is_plain(self, node: ast.expr) -> bool:
        """Whether a value is the same in each pass, or tells itself what has to be looked at."""
        if isinstance(node, ast.Tuple | ast.Slice | ast.UnaryOp):
            return all(map(self._is_plain, ast.iter_child_nodes(node)))  # type: ignore[arg-type]
        same = isinstance(node, ast.Constant | ast.expr_context | ast.unaryop)
        return same or self._identifies(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = node.func
        fixed = self._is_fixed(function)
        of_torch = torch_name(function, self._names, self._local)
        builtin = self._builtin(function)
        found = self._object_named(function)
        how = self._goes_through(node, found)
        if isinstance(function, ast.Attribute) and function.attr in _ENTER:
            how = "entered"
        if builtin in TAKE_ALL or builtin in PICK or (how is None and takes_all(function, found)):
            self._idle.update(a for a in node.args if _is_idle(a, builtin))
        self._given.update(a for a in node.args if isinstance(a, ast.Lambda))
        self._given.update(k.value for k in node.keywords if isinstance(k.value, ast.Lambda))
        self._before_hand_on(node, found)
        self._whole.add(function)
        plain = all(map(self._is_plain, node.args[:1]))
        self.generic_visit(node)
        self._hand_on(node, found)
        if builtin in HARMLESS or node in self._idle:
            return node
        if builtin in PICK:
            node.args = [self._picked(a) for a in node.args]
            return node
        idle = of_torch is not None and of_torch[0][of_torch[1]].__name__
        puts = isinstance(function, ast.Attribute) and function.attr in PUT and of_torch is None
        kept = puts or writes_out(function, self._names, self._local)
        if idle not in _PLAIN_ARGUMENTS_ARE_IDLE and not kept:
            # What a module of the model is given first is its input.
            first = [a for a in node.args[:1] if fixed and isinstance(a, ast.Name)]
            rest = node.args[len(first) :]
            node.args = [*first, *(self._argument(a, how, function, builtin, idle) for a in rest)]
            for key in node.keywords:
                to = None if key.arg else "unpacked"
                key.value = self._argument(key.value, to, function, builtin, idle)
        callee = node.func
        fills = isinstance(function, ast.Attribute) and function.attr in _FILL
        if (fills or not fixed) and of_torch is None and builtin is None:
            how = "filled" if fills else "called" if plain else "chosen"
            callee = self._callee(callee, how)
        node.func = replaceable(node, callee, self._place.rpartition(":")[0], self._tapped)
        return node

    def _argument(
        self, node: ast.expr, how: str | None, to: ast.expr, builtin: str | None, torchs: Any
    ) -> ast.expr:
        """An argument of a call, looked at; a float by what is called, if that is easily told."""
        owner = to.value if isinstance(to, ast.Attribute) else to
        if how is None and (torchs in FLOATS_ARE_IDLE or torchs in ONLY_ZERO_DECIDES):
            return self._value(node, "handed", ast.Constant(None), ast.Constant(torchs))
        takes = getattr(to, "attr", getattr(to, "id", None)) in _TAKE
        if not (how or builtin or torchs or takes) and isinstance(owner, ast.Name):
            at = ast.Name(owner.id, ast.Load()), ast.Constant(getattr(to, "attr", None))
            return self._value(node, "handed", *at)
        looked_at = self._value(node, how or "value")
        if not takes or isinstance(node, ast.Constant | ast.Starred):
            return looked_at
        return recorded("at", looked_at, node, self._append())

    def _callee(self, function: ast.expr, how: str) -> ast.expr:
        """What is called, looked at; a tensor's method is what its name says."""
        if not isinstance(function, ast.Attribute):
            return recorded(how, function, function, self._append())
        if isinstance(function.value, ast.Name):
            owner = ast.Name(function.value.id, ast.Load())
            method = ast.copy_location(ast.Attribute(owner, function.attr, ast.Load()), function)
            looked_at = recorded(how, function, function, self._append())
            return self._unless_tensor(owner.id, method, looked_at)
        how = {"called": "method", "chosen": "chosen_method"}.get(how, how)
        return recorded(how, function, function, self._append())

    def _is_fixed(self, function: ast.expr) -> bool:
        return (
            isinstance(function, ast.Attribute)
            and function.attr in self._fixed
            and isinstance(function.value, ast.Name)
            and function.value.id == self._self
        )

    def _object_named(self, function: ast.expr) -> Any:
        return object_named(function, self._names, self._local)

    def _builtin(self, function: ast.expr) -> str | None:
        """The name of a builtin, if an expression is that, and nothing else has it here."""
        if not isinstance(function, ast.Name) or not hasattr(builtins, function.id):
            return None
        return None if function.id in self._local or function.id in self._names else function.id


def _is_idle(node: ast.expr, builtin: str | None) -> bool:
    """Whether what a call is given is a generator whose elements need no look."""
    if not isinstance(node, ast.GeneratorExp):
        return False
    return builtin not in PICK or not isinstance(node.elt, ast.Tuple)


def _repeats(row: ast.expr) -> str:
    """The recorder of how often a display is repeated: of numbers, shapes are made."""
    elements = row.elts if isinstance(row, ast.List | ast.Tuple) else []
    return "value" if all(isinstance(e, ast.Constant) for e in elements) else "exact"


def returned_by(name: str) -> str:
    """The recorder of what a function gives back to code in C."""
    if name in ("__iter__", "__reversed__"):
        return "unpacked"
    return "exact" if name in PYTHON_GOES_BY - _HANDS_ON else "value"
