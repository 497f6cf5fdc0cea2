"""What code puts into modules while it runs: settings, classes and children, looked at.

Torch's own code goes by them and leaves no mark, and nothing announces them before the call.
"""

from __future__ import annotations

import ast
from typing import Any

from fmapkit.paths.rewriting.calls import CallRewriting
from fmapkit.paths.rewriting.library_calls import HARMLESS
from fmapkit.paths.rewriting.syntax import DECIDING, MARK, torch_name
from fmapkit.paths.rewriting.torch_calls import recorded

# Targets that are given parts of a value.
_SEVERAL = ast.Tuple | ast.List
# Expressions whose value may be a module.
_OPEN = (
    *(ast.Name, ast.Attribute, ast.Subscript, ast.Call, ast.IfExp, ast.BoolOp, ast.NamedExpr),
    *(ast.Yield, ast.YieldFrom, ast.Await),
)
# Attributes that parameters are, as a rule; and that turn a parameter into another tensor.
_PARAMETERS = {"bias", "weight"}
_TURNED = {"H", "T", "data", "mH", "mT"}
_OF_TENSORS = _TURNED | {"device", "dtype", "grad", "ndim", "shape"}


class StoreRewriting(CallRewriting, ast.NodeTransformer):
    """Looks at what becomes attributes and elements.

    A plain assignment looks at its value. Any other target looks at what it is given itself: so it
    is where a value is unpacked, in a loop, a comprehension or a `with` statement.
    """

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        """A value becomes one or several targets."""
        if any(isinstance(target, _SEVERAL) for target in node.targets):
            return self.generic_visit(node)
        how = self._look_at(node.targets, node.value)
        self.generic_visit(node)
        value = self._put(node.targets, node.value, how)
        return ast.copy_location(ast.Assign(node.targets, value), node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """Annotations are left alone: of locals they are not evaluated."""
        how = self._look_at([node.target], node.value)
        target, value = self.visit(node.target), node.value
        if value is not None:
            value = self._put([target], self.visit(value), how)
        same = ast.AnnAssign(target, node.annotation, value, node.simple)
        return ast.copy_location(same, node)

    def _look_at(self, targets: list[Any], value: ast.expr | None) -> str | None:
        """How to look at a value that is about to be put; None if that need not be."""
        self._whole.update(targets)
        if value is None:
            return None
        if any(isinstance(t, ast.Attribute) and t.attr in DECIDING for t in targets):
            return "put"
        if not self._may_be_module(value):
            return None
        into = [t for t in targets if self._may_hold(t)]
        if not isinstance(value, ast.Name):  # asked of what it is put into, where that is cheaper
            self._whole.difference_update(t for t in into if _in_a_name(t))
            into = [t for t in into if not _in_a_name(t)]
        return "child" if into else None

    def _put(self, targets: list[Any], value: ast.expr, how: str | None) -> ast.expr:
        """A value that is put, looked at."""
        if how is None or isinstance(value, ast.Constant | ast.Lambda | ast.GeneratorExp):
            return value
        owner = targets[0].value if how == "put" and len(targets) == 1 else None
        if how == "put" and not isinstance(owner, ast.Name):
            return self._value(value)
        given = [self._append(), value]
        if isinstance(owner, ast.Name):  # that is asked for after the value
            given.append(ast.copy_location(ast.Name(owner.id, ast.Load()), value))
        called: ast.expr = ast.Call(ast.Name(f"{MARK}{how}", ast.Load()), given, [])
        called = ast.fix_missing_locations(ast.copy_location(called, value))
        return self._if_no_tensor(value, called)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Such a target; or what may be a parameter, of something that is not compared."""
        turned = isinstance(node.ctx, ast.Load) and node.attr in _TURNED
        if turned:
            self._operands.add(node.value)
        self.generic_visit(node)
        if node in self._whole:
            return node
        if isinstance(node.ctx, ast.Load):
            if turned and isinstance(node.value, ast.Name | ast.Subscript):
                return self._turned(node, node.value)
            may_be = node.attr in _PARAMETERS or node in self._operands
            if not may_be or node.attr in _OF_TENSORS or self._is_compared(node.value):
                return node
            return self._whose(node)
        if not isinstance(node.ctx, ast.Store) or not self._may_hold(node):
            return node
        owner = recorded("owner", node.value, node.value, self._append())
        return ast.copy_location(ast.Attribute(owner, node.attr, ast.Store()), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """So may be what `getattr` gives."""
        named = self._builtin(node.func) == "getattr" and any(map(names_parameter, node.args[1:2]))
        found: Any = super().visit_Call(node)
        return self._whose(found) if named else found

    def _as_it_is(self, node: ast.pattern) -> ast.AST:
        """No call may stand in a pattern."""
        return node

    visit_MatchValue = visit_MatchMapping = visit_MatchClass = _as_it_is  # noqa: N815

    def _turned(self, node: ast.Attribute, of: ast.expr) -> ast.expr:
        if isinstance(of, ast.Name) and of.id == self._self:
            return node
        value = self._if_no_tensor(of, recorded("parameter", of, of, self._append()))
        return ast.copy_location(ast.Attribute(value, node.attr, ast.Load()), node)

    def _is_compared(self, owner: ast.expr) -> bool:
        """Whether what has an attribute is the module at hand, or a child of it that it has yet."""
        if isinstance(owner, ast.Subscript) and isinstance(owner.slice, ast.Constant):
            owner = owner.value
        if isinstance(owner, ast.Attribute) and owner.attr in self._fixed:
            owner = owner.value
        return isinstance(owner, ast.Name) and owner.id == self._self

    def _whose(self, node: ast.expr) -> ast.expr:
        """A look at whose parameter a value is, if it is one."""
        looked_at = recorded("parameter", node, node, self._append())
        self._told.add(looked_at)
        return looked_at

    def _into(self, node: ast.Subscript) -> ast.expr:
        """What gets an element, and looks at that; the same as a target that is looked at."""
        looked_at = node in self._whole and not _is_setting(node)
        if looked_at or not isinstance(node.ctx, ast.Store) or not self._may_hold(node):
            return node.value
        parent = recorded("parent", node.value, node.value, self._append())
        return self._if_no_tensor(node.value, parent)

    def _may_hold(self, target: ast.expr) -> bool:
        """Whether a target may be a setting, or a child of a module that is called unrecorded.

        What is no child of `self` yet tells which one it is where it is called; a class that no
        module is of has none.
        """
        if isinstance(target, ast.Attribute):
            if target.attr in DECIDING or not isinstance(target.value, ast.Name):
                return True
            return target.value.id != self._owner or target.attr in self._fixed
        if not isinstance(target, ast.Subscript):
            return False
        at = target.slice
        if isinstance(target.value, ast.Name) and target.value.id in self._made:
            return False
        if isinstance(at, ast.Constant):
            return type(at.value) in (int, str)
        return not isinstance(at, ast.Tuple | ast.Slice | ast.Compare)

    def _may_be_module(self, node: ast.expr) -> bool:
        """Whether a value may be a module, as far as its source tells."""
        if isinstance(node, ast.Call):
            if self._is_fixed(node.func) or self._builtin(node.func) in HARMLESS:
                return False
            return torch_name(node.func, self._names, self._local) is None
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
            return False
        if isinstance(node, ast.Attribute) and node.attr in _OF_TENSORS:
            return False
        return isinstance(node, _OPEN)

    def _more(self, target: ast.expr, value: ast.expr) -> ast.expr:
        """What is added to a row of modules, perhaps, by `+=`; its children are looked at."""
        if isinstance(value, ast.Tuple | ast.List):
            same = type(value)([self._child(each) for each in value.elts], ast.Load())
            return ast.copy_location(same, value)
        if isinstance(target, ast.Name) and not isinstance(value, ast.Name | ast.ListComp):
            return value
        if isinstance(value, ast.ListComp) or self._may_be_module(value):
            return self._if_no_tensor(value, recorded("children", value, value, self._append()))
        return value

    def _child(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Starred) or not self._may_be_module(node):
            return node
        return self._if_no_tensor(node, recorded("child", node, node, self._append()))

    def _if_no_tensor(self, node: ast.expr, looked_at: ast.expr) -> ast.expr:
        if isinstance(node, ast.Name):
            return self._unless_tensor(node.id, node, looked_at)
        return looked_at


def names_parameter(index: ast.expr) -> bool:
    """Whether an index is a name that parameters have, as a rule."""
    return isinstance(index, ast.Constant) and index.value in _PARAMETERS


def _in_a_name(target: ast.expr) -> bool:
    return isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name)


def _is_setting(target: ast.Subscript) -> bool:
    """Whether what gets an element may be the dict of an object's attributes."""
    at, of = target.slice, target.value
    if isinstance(at, ast.Constant):
        return at.value in DECIDING if type(at.value) is str else False
    if isinstance(of, ast.Attribute):
        return of.attr == "__dict__"
    return isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "vars"
