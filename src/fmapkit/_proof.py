"""Which modules take the same road in every pass, proven from their source.

A later pass can be read with one hook per nonlinearity only where the data is bound to flow as it
did when it was learned. A module is *proven* when its forward, and that of everything below it,
has no branch, loop or choice that could depend on data: each test reads only plain attributes of
`self` (they become guards, compared before each pass), constants, or whether a value is None.
Anything else is unproven, which costs time, never correctness: an unproven module's own forward is
watched in each pass.

Names of torch are trusted to do one thing; Python functions are followed into.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import math
import operator
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fmapkit._optimized import is_compiled
from fmapkit._stop import has_own_forward

__all__ = ["Guard", "Proofs"]

_SIMPLE = (type(None), bool, int, float, str, torch.dtype, torch.device)
_BUILTINS = {
    *("len", "range", "int", "float", "list", "tuple", "dict", "isinstance", "enumerate", "zip"),
    *("reversed", "str", "bool", "print", "round", "sum", "abs", "slice"),
}
_CONTAINER_METHODS = {
    *("append", "extend", "insert", "items", "values", "keys", "copy", "format", "reverse", "pop"),
    *("children", "named_children"),
}
# Tensor methods whose result is a Python value taken from the data, or that run other code.
_LEAKS = {
    *("item", "tolist", "numpy", "__bool__", "apply_", "map_", "map2_", "register_hook"),
    "backward",
}
_FUNCTION_MODULES = {"torch.nn.functional", "torch.functional", "torch._jit_internal", "math"}


_JIT_QUESTIONS = (torch.jit.is_scripting, torch.jit.is_tracing)  # type: ignore[attr-defined]


class _UnprovenError(Exception):
    """Raised inside the proof at the first construct that could take another road."""


@dataclass(frozen=True, slots=True)
class Guard:
    """A plain value, or a function, the road was learned under."""

    module: Any  # a module or a class; or a dict: a function's globals, an instance's attributes
    path: str
    none_only: bool

    def value(self) -> Any:
        """The value now; a changed one asks for a plan of its own."""
        if isinstance(self.module, dict):
            return _Same(self.module.get(self.path))
        try:
            found = operator.attrgetter(self.path)(self.module)
        except AttributeError:
            return AttributeError
        if self.none_only:
            return found is None
        return _frozen(found)

    def place(self) -> tuple[dict[str, Any], str] | None:
        """The dict and key it reads, where the identity of what is there tells all."""
        if isinstance(self.module, dict):
            return self.module, self.path
        own = self.module.__dict__
        return (own, self.path) if isinstance(own.get(self.path), _SIMPLE) else None


class _Same:
    """Equal to itself alone, whatever the value's own idea of equality; keeps it alive."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    return value if isinstance(value, _SIMPLE) else _Same(value)


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(v) for v in value)
    return isinstance(value, _SIMPLE)


class Proofs:
    """Proofs for the modules of one model, made on demand and kept while its structure stands."""

    def __init__(self, is_ours: Callable[[Any], bool]) -> None:
        self._known: dict[int, bool] = {}
        self._guards: dict[int, list[Guard]] = {}
        self._alike: dict[Any, _Reader] = {}  # by signature
        self._is_ours = is_ours

    def proven(self, module: nn.Module) -> bool:
        """Whether the module and everything below it always takes the same road."""
        found = self._known.get(id(module))
        if found is None:
            self._known[id(module)] = False  # a module inside itself is unproven
            found = self._own(module) and all(self.proven(c) for c in module.children())
            self._known[id(module)] = found
        return found

    def guards(self, module: nn.Module) -> list[Guard]:
        """Every guard the proof of a module and those below it rests on."""
        guards = (g for m in module.modules() for g in self._guards.get(id(m), ()))
        return list({(id(g.module), g.path, g.none_only): g for g in guards}.values())

    def _own(self, module: nn.Module) -> bool:
        hooks = (
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *module._backward_hooks.values(),
            *module._backward_pre_hooks.values(),
        )
        if not all(map(self._is_ours, hooks)) or has_own_forward(module):
            return False
        if is_compiled(module):
            return False
        kind = type(module)
        if kind.__getattr__ is not nn.Module.__getattr__:
            return False  # reading an attribute may run anything
        if kind.__call__ is not nn.Module.__call__ or isinstance(module, torch.jit.ScriptModule):
            return False
        if _trusted(module):
            return True
        alike = _signature(module)
        read = self._alike.get(alike)
        if read is None:
            read = _Reader(module)
            read.guards.append(Guard(kind, "forward", none_only=False))
            try:
                read.function(kind.forward)
            except (_UnprovenError, RecursionError):
                read.proven = False
            if not read.deep:
                self._alike[alike] = read
        mine = {id(read.module): module, id(read.module.__dict__): module.__dict__}
        self._guards[id(module)] = [
            replace(g, module=mine.get(id(g.module), g.module)) for g in read.guards
        ]
        return read.proven


# What every module has, whatever its class.
_COMMON = frozenset(nn.Module().__dict__) - {"training"}


def _signature(module: nn.Module) -> Any:
    """What a proof can rest on that looks no deeper than the module's own attributes."""
    own = tuple(
        (name, type(value), value if isinstance(value, _SIMPLE) else id(value))
        for name, value in module.__dict__.items()
        if name not in _COMMON
    )
    children = tuple((name, type(child)) for name, child in module._modules.items())
    tensors = (*module._parameters.items(), *module._buffers.items())
    return type(module), own, children, tuple((name, value is None) for name, value in tensors)


def _trusted(module: nn.Module) -> bool:
    """torch's own modules of one operation, and `nn.Sequential`."""
    kind = type(module)
    if kind is nn.Sequential:
        return True
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Transformer)):
        return False
    home = kind.__module__
    own = home.startswith("torch.nn.modules.") and not home.endswith((".transformer", ".container"))
    return own and not module._modules


@lru_cache(maxsize=4096)
def _tree(
    code: types.CodeType, function: types.FunctionType
) -> tuple[ast.FunctionDef, set[str]] | None:
    """The source of a function, and its names that are bound from data."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    node = tree.body[0] if tree.body else None
    if not isinstance(node, ast.FunctionDef) or node.decorator_list or node.name != code.co_name:
        return None
    # The file may have changed since it was imported: what runs must be what is read.
    read = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    read |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    read |= {n.arg for n in ast.walk(node) if isinstance(n, (ast.arg, ast.keyword)) and n.arg}
    if not {*code.co_names, *code.co_varnames} - {"AssertionError"} <= read:
        return None
    return node, _assigned_from_data(node)


class _Reader:
    """Reads one forward, and the functions and methods it calls."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.guards: list[Guard] = []
        self.proven = True
        self.deep = False  # it looked at more than the module's own attributes
        self._seen: set[types.CodeType] = set()
        self._function: types.FunctionType | None = None
        self._self = ""
        self._locals: set[str] = set()
        self._static: set[str] = set()
        self._callable: set[str] = set()
        self._dirty: set[str] = set()

    def function(self, function: Any, bound: bool = True) -> None:
        """Prove a Python function; `bound` if its first argument is the module."""
        if not isinstance(function, types.FunctionType):
            raise _UnprovenError("no Python function")
        if function.__code__ in self._seen:
            return
        self._seen.add(function.__code__)
        tree = _tree(function.__code__, function)
        if tree is None:
            raise _UnprovenError("no source")
        node, dirty = tree
        kept = (
            *(self._function, self._self, self._locals),
            *(self._static, self._callable, self._dirty),
        )
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        self._function = function
        self._self = names[0] if bound and names else ""
        self._locals = set(function.__code__.co_varnames) | set(function.__code__.co_cellvars)
        self._static, self._callable = set(), set()
        self._dirty = dirty
        for statement in node.body:
            self._statement(statement)
        self._function, self._self, self._locals = kept[:3]
        self._static, self._callable, self._dirty = kept[3:]

    # -- statements ---------------------------------------------------------------------------

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Pass() | ast.Raise() | ast.Assert() | ast.Break() | ast.Continue():
                pass
            case ast.Return(value=value) | ast.Expr(value=value):
                self._expression(value)
            case ast.Assign(targets=targets, value=value):
                self._expression(value)
                for target in targets:
                    self._target(target, static=self._is_static(value))
            case ast.AnnAssign(target=target, value=value):
                self._expression(value)
                self._target(target, static=value is not None and self._is_static(value))
            case ast.AugAssign(target=target, value=value):
                self._expression(value)
                self._target(target, static=False)
            case ast.If(test=test, body=body, orelse=orelse):
                if not orelse and all(isinstance(s, ast.Raise) for s in body):
                    return  # this pass would end, not take another road
                for statement in self._taken(test, body, orelse):
                    self._statement(statement)
            case ast.For(target=target, iter=iterable, body=body, orelse=orelse):
                self._loop(target, iterable)
                for statement in (*body, *orelse):
                    self._statement(statement)
            case ast.With(items=items, body=body):
                for item in items:
                    self._expression(item.context_expr)
                for statement in body:
                    self._statement(statement)
            case _:
                raise _UnprovenError(type(node).__name__)

    def _target(self, node: ast.expr, static: bool) -> None:
        match node:
            case ast.Name(id=name):
                self._callable.discard(name)
                static = static and name not in self._dirty
                (self._static.add if static else self._static.discard)(name)
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                for element in elements:
                    self._target(element, static=False)
            case ast.Starred(value=value):
                self._target(value, static=False)
            case ast.Subscript(value=ast.Name(), slice=index):
                self._index(index)
            case _:
                raise _UnprovenError("assigns to state")

    def _taken(self, test: ast.expr, body: Any, orelse: Any) -> list[Any]:
        """The branches that can be taken: one where the guards decide, both where None does."""
        if not self._is_static(test):
            self._structural(test)
            return [*body, *orelse]
        self._guard(test)
        if self._names(test) & self._static:
            return [*body, *orelse]
        return list(body if self._evaluate(test) else orelse)

    def _loop(self, target: ast.expr, iterable: ast.expr) -> None:
        modules = self._iterates(iterable)
        names = [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]
        if not modules:
            raise _UnprovenError("loops over data")
        self._static.update(n for n in names if n not in self._dirty)
        self._callable.update(n for n in names if n not in self._dirty)

    def _iterates(self, node: ast.expr) -> bool:
        match node:
            case ast.Call(func=ast.Name(id="range"), args=args):
                return all(self._is_static(a) and self._guard(a) for a in args)
            case ast.Call(func=ast.Name(id="enumerate" | "zip" | "reversed"), args=args):
                return all(self._iterates(a) for a in args)
            case ast.Call(
                func=ast.Attribute(
                    value=value, attr="children" | "values" | "items" | "named_children" | "keys"
                ),
                args=[],
            ):
                return isinstance(self._resolve(value), nn.Module)
            case ast.Name() | ast.Attribute():
                found = self._resolve(node)
                if isinstance(found, nn.Module):
                    return True
                return self._is_static(node) and self._guard(node)
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return all(self._iterates(e) or self._is_static(e) for e in elements)
        return False

    # -- tests --------------------------------------------------------------------------------

    def _structural(self, node: ast.expr) -> None:
        """A test on what a value is, not on what it holds: `x is None`, `isinstance(x, tuple)`."""
        if self._is_static(node):
            self._guard(node)
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
                raise _UnprovenError("a branch on data")

    def _is_static(self, node: ast.expr) -> bool:
        """Whether it is made of constants, plain attributes of self and loop counters."""
        match node:
            case ast.Constant():
                return True
            case ast.Name(id=name):
                return name in self._static
            case ast.Attribute():
                path = self._path(node)
                return path is not None and self._readable(path)
            case ast.BoolOp(values=values):
                return all(map(self._is_static, values))
            case ast.UnaryOp(operand=operand):
                return self._is_static(operand)
            case ast.BinOp(left=left, right=right):
                return self._is_static(left) and self._is_static(right)
            case ast.Compare(left=left, comparators=others):
                return all(map(self._is_static, (left, *others)))
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                return all(map(self._is_static, elements))
            case ast.Call(func=ast.Name(id="len"), args=[value]):
                self.deep = True
                return isinstance(self._resolve(value), nn.Module) or self._is_static(value)
            case ast.Call(func=ast.Attribute() as function, args=[]):
                return self._resolve(function) in _JIT_QUESTIONS
            case ast.Subscript(value=value, slice=index):
                return self._is_static(value) and self._is_static(index)
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
                if not isinstance(at, _SIMPLE) or at is None:
                    return False
        return isinstance(at, (nn.Module, torch.Tensor)) or _plain(at)

    def _guard(self, node: ast.expr) -> bool:
        """Remember every attribute the expression reads; True for use in conditions."""
        nones = {
            id(c.left)
            for c in ast.walk(node)
            if isinstance(c, ast.Compare) and isinstance(c.ops[0], (ast.Is, ast.IsNot))
        }
        for part in self._attributes(node):
            path = self._path(part)
            if path is None:
                continue
            value = operator.attrgetter(path)(self.module)
            if isinstance(value, torch.Tensor) and id(part) not in nones:
                raise _UnprovenError("a branch on a tensor")
            if not isinstance(value, nn.Module):  # the structure is compared as a whole
                self.guards.append(Guard(self.module, path, id(part) in nones))
        return True

    def _attributes(self, node: ast.AST) -> Iterator[ast.Attribute]:
        if isinstance(node, ast.Attribute):
            yield node
            return
        for child in ast.iter_child_nodes(node):
            yield from self._attributes(child)

    def _names(self, node: ast.AST) -> set[str]:
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}

    def _evaluate(self, node: ast.expr) -> bool:
        assert self._function is not None
        code = compile(ast.Expression(node), "<guard>", "eval")
        return bool(eval(code, self._function.__globals__, {self._self: self.module}))

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
                raise _UnprovenError(type(node).__name__)

    def _index(self, node: ast.expr) -> None:
        """A tuple indexes a tensor, whatever it holds; a bare index may pick from a list."""
        if isinstance(node, ast.Tuple):
            return
        if isinstance(node, ast.Slice):
            parts = [p for p in (node.lower, node.upper, node.step) if p is not None]
        else:
            parts = [node]
        if not all(self._is_static(p) and self._guard(p) for p in parts):
            raise _UnprovenError("an index from data")

    def _call(self, node: ast.Call) -> None:
        for argument in node.args:
            self._expression(argument)
        for keyword in node.keywords:
            self._expression(keyword.value)
        function = node.func
        if isinstance(function, ast.Name) and function.id in self._locals:
            if function.id not in self._callable:
                raise _UnprovenError("calls a value")
            return
        if isinstance(function, ast.Subscript):
            if not isinstance(self._resolve(function.value), nn.Module):
                raise _UnprovenError("calls an item")
            self._index(function.slice)
            return
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Call):
            if isinstance(function.value.func, ast.Name) and function.value.func.id == "super":
                self._super(function.attr)
                return
        found = self._resolve(function)
        if found is not None:
            self._callee(found, node)
            self._guard_function(function, found)
            path = self._path(function)
            if path is not None and not isinstance(found, (nn.Module, types.MethodType)):
                # A function kept as an attribute: another one would be another road.
                self.guards.append(Guard(self.module, path, none_only=False))
            return
        if isinstance(function, ast.Attribute):
            self._expression(function.value)
            name = function.attr
            if name == "pop" and not all(map(self._is_static, node.args)):
                raise _UnprovenError("pops by data")
            known = hasattr(torch.Tensor, name) and name not in _LEAKS
            of_self = self._path(function) is not None
            if of_self or not (known or name in _CONTAINER_METHODS):
                raise _UnprovenError(f"calls .{name}")
            return
        raise _UnprovenError("calls something unknown")

    def _guard_function(self, node: ast.expr, found: Any) -> None:
        """A Python function that was followed into may be bound to another one later."""
        if not isinstance(found, types.FunctionType) or found.__module__ in _FUNCTION_MODULES:
            return
        names = ast.unparse(node).split(".")
        if self._function is None or names[0] not in self._function.__globals__:
            return
        if len(names) == 1:
            self.guards.append(Guard(self._function.__globals__, names[0], none_only=False))
        else:
            root = self._function.__globals__[names[0]]
            self.guards.append(Guard(root, ".".join(names[1:]), none_only=False))

    def _callee(self, found: Any, call: ast.Call) -> None:
        if isinstance(found, nn.Module):
            if found is self.module:
                raise _UnprovenError("calls itself")
            return  # a child: proven for itself
        if isinstance(found, types.MethodType) and found.__self__ is self.module:
            name = found.__name__
            if name in ("children", "named_children"):
                return
            if isinstance(getattr(nn.Module, name, None), types.FunctionType):
                raise _UnprovenError("calls the machinery of modules")
            # Neither the instance nor the class may have another one later.
            called = call.func.attr if isinstance(call.func, ast.Attribute) else name
            self.guards.append(Guard(self.module.__dict__, called, none_only=False))
            self.guards.append(Guard(type(self.module), called, none_only=False))
            self.function(found.__func__)
            return
        if isinstance(found, types.MethodType) and isinstance(found.__self__, nn.Module):
            if found.__name__ in ("children", "named_children", "values", "items", "keys"):
                return
            raise _UnprovenError("calls another module's method")
        if isinstance(found, types.FunctionType):
            if found.__module__ in _FUNCTION_MODULES:
                return
            if found.__module__.split(".")[0] == "einops":
                return
            self.function(found, bound=False)
            return
        home = str(getattr(found, "__module__", None) or "")
        if isinstance(found, types.BuiltinFunctionType):
            name = str(getattr(found, "__name__", ""))
            if found is getattr(builtins, name, None):
                if name in _BUILTINS or (name in ("max", "min") and _with_number(call)):
                    return
            elif home.split(".")[0] in ("torch", "math") or found in _torch_builtins():
                return
        if isinstance(found, type) and (found.__name__ in _BUILTINS or _is_context(found)):
            return
        if isinstance(found, type(torch.Tensor.relu)):  # a method of Tensor, as torch.Tensor.relu
            return
        raise _UnprovenError(f"calls {found!r}")

    def _super(self, name: str) -> None:
        assert self._function is not None
        cells = dict(
            zip(self._function.__code__.co_freevars, self._function.__closure__ or (), strict=False)
        )
        if "__class__" not in cells or not self._self:
            raise _UnprovenError("super() of something else")
        home = cells["__class__"].cell_contents
        order = type(self.module).__mro__
        for base in order[order.index(home) + 1 :]:
            if name in base.__dict__:
                if base.__module__.startswith("torch.nn.modules."):
                    return
                self.guards.append(Guard(base, name, none_only=False))
                self.function(base.__dict__[name])
                return
        raise _UnprovenError("super() has no such method")

    # -- names --------------------------------------------------------------------------------

    def _path(self, node: ast.expr) -> str | None:
        """`"a.b"` for `self.a.b`; None for anything else."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id == self._self and names:
            self.deep = self.deep or len(names) > 1
            return ".".join(reversed(names))
        return None

    def _resolve(self, node: ast.expr) -> Any:
        """The object a name or dotted name stands for, if it is bound outside the function."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or self._function is None:
            return None
        if node.id == self._self:
            found: Any = self.module
            self.deep = self.deep or len(names) > 1
        elif node.id in self._locals:
            return None
        elif node.id in self._function.__globals__:
            found = self._function.__globals__[node.id]
        elif node.id in self._function.__code__.co_freevars:
            return None
        else:
            found = getattr(builtins, node.id, None)
        for name in reversed(names):
            if isinstance(found, nn.Module) and isinstance(
                inspect.getattr_static(type(found), name, None), property
            ):
                return None  # a property may compute anything
            found = getattr(found, name, None)
        return found


def _assigned_from_data(node: ast.FunctionDef) -> set[str]:
    """Names that are bound, anywhere in the function, to more than constants and attributes.

    Such a name is data everywhere: a loop may reach a use before or after the binding.
    """
    dirty: set[str] = set()
    arguments = node.args.posonlyargs + node.args.args
    self_name = arguments[0].arg if arguments else ""
    for n in ast.walk(node):
        match n:
            case ast.AugAssign(target=ast.Name(id=name)) | ast.NamedExpr(target=ast.Name(id=name)):
                dirty.add(name)
            case ast.Assign(targets=targets, value=value):
                read = {m.id for m in ast.walk(value) if isinstance(m, ast.Name)}
                calls = any(isinstance(m, (ast.Call, ast.Subscript)) for m in ast.walk(value))
                for target in targets:
                    stored = {
                        m.id
                        for m in ast.walk(target)
                        if isinstance(m, ast.Name) and isinstance(m.ctx, ast.Store)
                    }
                    if calls or read - {self_name} or not isinstance(target, ast.Name):
                        dirty |= stored
    return dirty


def _with_number(call: ast.Call) -> bool:
    """`max(a, 0)` computes a size; `max(a, b)` may choose between tensors."""
    return any(isinstance(a, ast.Constant) for a in call.args)


def _is_context(found: type) -> bool:
    return found.__module__.startswith(("torch.autograd.grad_mode", "torch.amp")) or found in (
        torch.Size,
        math.inf,
    )


@lru_cache(maxsize=1)
def _torch_builtins() -> frozenset[Any]:
    places = (torch, torch._C._nn, torch.special, torch.fft, torch.linalg)
    found = [getattr(p, n, None) for p in places for n in dir(p)]
    return frozenset(f for f in found if isinstance(f, types.BuiltinFunctionType))
