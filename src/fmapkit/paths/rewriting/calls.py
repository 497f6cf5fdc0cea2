"""Calls in the code of a twin: what is called is looked at, and so is what it is given."""

from __future__ import annotations

import ast
import builtins
from typing import Any, TypeGuard

from fmapkit.paths.rewriting.inserting import Inserting
from fmapkit.paths.rewriting.kept_numbers import PUT, writes_out
from fmapkit.paths.rewriting.library_calls import (
    HARMLESS,
    PICK,
    TAKE_ALL,
    object_named,
    takes_all,
)
from fmapkit.paths.rewriting.syntax import (
    first_argument,
    names_bound,
    names_loaded,
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

# Functions of torch's whose plain arguments decide neither what runs nor whose filters come out.
_PLAIN_ARGUMENTS_ARE_IDLE = {
    *("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"),
    "_assert",
}


# Methods that enter the context manager which they are given.
_ENTER = {"enter_context", "enter_async_context"}


class CallRewriting(Inserting, ast.NodeTransformer):
    """Makes the calls of recorders that look at other calls."""

    def __init__(
        self,
        place: str,
        names: dict[str, Any],
        node: ast.AST,
        fixed: frozenset[str],
        tapped: frozenset[str],
    ) -> None:
        super().__init__(place, first_argument(node) if fixed else None, rows_bound(node))
        self._names = names  # the function's globals
        self._local = names_bound(node)
        self._loaded = names_loaded(node)
        self._tests = tests_in(node)
        # Attributes of its first argument that are compared before each pass: children, and
        # functions of its class.
        self._fixed = fixed
        self._tapped = tapped  # the places of calls at which a tap may be set
        self._given: set[ast.AST] = set()  # functions that a call is given
        self._idle: set[ast.AST] = set()  # calls and generators that decide nothing themselves

    def _value(self, node: ast.expr, how: str = "value", *first: ast.expr) -> ast.expr:
        """The same; of `id(t)`, which is another number in each pass, t is looked at."""
        if self._identifies(node):
            return ast.copy_location(ast.Call(node.func, [*map(self._value, node.args)], []), node)
        return super()._value(node, how, *first)

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
        if not fixed and of_torch is None and builtin is None:
            callee = self._callee(callee, "called" if plain else "chosen")
        node.func = replaceable(node, callee, self._place.rpartition(":")[0], self._tapped)
        return node

    def _argument(
        self, node: ast.expr, how: str | None, to: ast.expr, builtin: str | None, torchs: Any
    ) -> ast.expr:
        """An argument of a call, looked at; a float by what is called, if that is easily told."""
        owner = to.value if isinstance(to, ast.Attribute) else to
        if how is None and (torchs in FLOATS_ARE_IDLE or torchs in ONLY_ZERO_DECIDES):
            return self._value(node, "handed", ast.Constant(None), ast.Constant(torchs))
        if not (how or builtin or torchs) and isinstance(owner, ast.Name):
            at = ast.Name(owner.id, ast.Load()), ast.Constant(getattr(to, "attr", None))
            return self._value(node, "handed", *at)
        return self._value(node, how or "value")

    def _callee(self, function: ast.expr, how: str) -> ast.expr:
        """What is called, looked at; a tensor's method is what its name says."""
        if not isinstance(function, ast.Attribute):
            return recorded(how, function, function, self._append())
        if isinstance(function.value, ast.Name):
            owner = ast.Name(function.value.id, ast.Load())
            method = ast.copy_location(ast.Attribute(owner, function.attr, ast.Load()), function)
            looked_at = recorded(how, function, function, self._append())
            return self._unless_tensor(owner.id, method, looked_at)
        how = "method" if how == "called" else "chosen_method"
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
