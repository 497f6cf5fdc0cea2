"""From source to twin: a function parsed, given recorders, and compiled where it stands.

A piece of code has a twin only if its source, compiled again, gives the very same code.
"""

from __future__ import annotations

import ast
import copy
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fmapkit.paths.rewriting.kept_numbers import kept_numbers
from fmapkit.paths.rewriting.rewrite import Rewriter
from fmapkit.paths.rewriting.source_files import Outermost, SourceFile
from fmapkit.paths.rewriting.syntax import names_bound, position_of, site_at, watched_names
from fmapkit.paths.rewriting.torch_calls import TorchRewriter
from fmapkit.torchlib.fused.paths import is_torchs

_FUTURE = 0x1FF0000  # the flags that `from __future__ import …` sets in a code object


@dataclass(frozen=True, slots=True, eq=False)
class Twin:
    """Code with recorders in it."""

    code: types.CodeType  # to run in the place of the original
    original: types.CodeType
    fixed: frozenset[str]  # attributes that it takes to be compared by other means (see `Twins`)
    calls: Mapping[str, str]  # the places of the calls in it, each with the name of what is called
    # Functions of torch's that it calls by a name: where that is, the name, and what it stood for.
    watched: Sequence[tuple[dict[str, Any], str, Any]]
    loads: frozenset[str]  # names of attributes that are read in the source around it, or globals
    # The places of calls whose numbers are kept or printed, and decide nothing.
    kept: frozenset[str]


def make_twins(
    code: types.CodeType, names: dict[str, Any], fixed: frozenset[str], tapped: frozenset[str]
) -> dict[types.CodeType, Twin]:
    """Twins of a piece of code, and of all code in the same outermost function."""
    file = SourceFile.of(code, names)
    if file is None:
        return {}
    for node, classes in file.around(code.co_firstlineno):
        originals, own = _compiled(node, classes, file.imports, code), _key(code)
        if own not in map(_key, originals):
            continue
        if isinstance(node, ast.AsyncFunctionDef):
            return {}
        place = f"{code.co_filename}:{'.'.join(classes)}"
        rewriter = (
            TorchRewriter(code.co_filename, tapped)
            if is_torchs(code)
            else Rewriter(place, names, node, fixed, tapped)
        )
        twins = _compiled(rewriter.visit(copy.deepcopy(node)), classes, file.imports, code)
        if list(map(_begins, twins)) != list(map(_begins, originals)):
            return {}
        made, found = _looked_up(node, names, fixed), {}
        for original, twin in zip(originals, twins, strict=True):
            # What stands in a function's constants is compared by value: this is its equal.
            real = code if _key(original) == own else original
            found[real] = made(twin, real)
        return found
    return {}


def _begins(code: types.CodeType) -> tuple[str, int]:
    return code.co_name, code.co_firstlineno


def _looked_up(node: Outermost, names: dict[str, Any], fixed: frozenset[str]) -> partial[Twin]:
    """What all twins in an outermost function have in common."""
    inner, bound = list(ast.walk(node)), names_bound(node)
    read = [n for n in inner if isinstance(getattr(n, "ctx", None), ast.Load)]
    attributes = {n.attr for n in read if isinstance(n, ast.Attribute)}
    strings = {n.value for n in inner if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return partial(
        Twin,
        fixed=fixed,
        calls={site_at(position_of(n)): _name_of(n.func) for n in inner if isinstance(n, ast.Call)},
        watched=watched_names(inner, names, bound),
        loads=frozenset(attributes | strings | {n.id for n in read if isinstance(n, ast.Name)}),
        kept=kept_numbers(inner, names, bound),
    )


def _name_of(function: ast.expr) -> str:
    """`f` for f(x), `a.f` for a.f(x), `.f` where something longer stands before it."""
    if isinstance(function, ast.Name):
        return function.id
    if isinstance(function, ast.Attribute):
        owner = function.value.id if isinstance(function.value, ast.Name) else ""
        return f"{owner}.{function.attr}"
    return "."


def _compiled(
    node: Outermost, classes: tuple[str, ...], imports: list[ast.alias], like: types.CodeType
) -> list[types.CodeType]:
    """The code of an outermost function, and all in it, in order; none if it cannot be compiled.

    It is compiled where it stands: in its classes, on its lines. Its defaults and decorators may
    have code, too.
    """
    inner: ast.stmt = node if not isinstance(node, ast.Lambda) else ast.Expr(node)
    for name in reversed(classes):
        inner = ast.ClassDef(name, [], [], [inner], [])
        if sys.version_info >= (3, 12):
            inner.type_params = []
    made: ast.stmt = inner
    while made is not node and not hasattr(made, "lineno"):  # those made here have no place yet
        ast.copy_location(made, node)
        if not isinstance(made, ast.ClassDef):
            break
        made = made.body[0]
    known = [ast.fix_missing_locations(ast.Import(imports))] if imports else []
    module = ast.Module([*known, inner], [])
    flags = like.co_flags & _FUTURE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the model's code, which was compiled before
            found: types.CodeType = compile(
                module, like.co_filename, "exec", flags=flags, dont_inherit=True
            )
    except (SyntaxError, ValueError, RecursionError):
        return []
    for _ in classes:
        found = next((c for c in found.co_consts if isinstance(c, types.CodeType)), found)
    return list(_inside(found))[1:]


def _inside(code: types.CodeType) -> Iterator[types.CodeType]:
    """A piece of code and all code in it, outermost first."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _inside(constant)


def _key(code: types.CodeType) -> Any:
    """Tells the equals of a piece of code."""
    constants = tuple(
        (type(c), _key(c) if isinstance(c, types.CodeType) else c) for c in code.co_consts
    )
    return (
        *(code.co_name, code.co_firstlineno, code.co_code, code.co_names, code.co_varnames),
        *(code.co_freevars, code.co_cellvars, code.co_flags, repr(constants)),
    )
