"""What the source file of a piece of code says of it: the function it is in, and its full name."""

from __future__ import annotations

import ast
import linecache
import types
from typing import Any

Outermost = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

# Code of two files may be equal: the name of the file tells them apart.
Code = tuple[types.CodeType, str]


def known_as(code: types.CodeType) -> Code:
    """What tells a piece of code from all others."""
    return code, code.co_filename


class SourceFile:
    """The functions of one source file that are inside no other, with the classes around them."""

    def __init__(self, source: str) -> None:
        self.source = source
        # The names that it imports: the compiler treats their attributes in a way of its own.
        self.imports: list[ast.alias] = []
        self._outermost: list[tuple[int, int, Outermost, tuple[str, ...]]] = []
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return
        self._walk(tree, ())

    @classmethod
    def of(cls, code: types.CodeType, names: dict[str, Any] | None = None) -> SourceFile | None:
        """The file of a piece of code, each version read once; None if it is not to be had.

        By the code's globals, files are found that are in no folder.
        """
        linecache.checkcache(code.co_filename)
        source = "".join(linecache.getlines(code.co_filename, names))
        if not source:
            return None
        file = _files.get(code.co_filename)
        if file is None or file.source != source:
            file = _files[code.co_filename] = cls(source)
        return file

    def _walk(self, node: ast.AST, classes: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                first = _first_line(child)
                self._outermost.append((first, child.end_lineno or first, child, classes))
            elif isinstance(child, ast.ClassDef):
                self._walk(child, (*classes, child.name))
            elif isinstance(child, (ast.Import, ast.ImportFrom)):
                if not classes and not any(a.name == "*" for a in child.names):
                    self.imports += [
                        ast.alias((a.asname or a.name).partition(".")[0]) for a in child.names
                    ]
            else:
                self._walk(child, classes)

    def around(self, line: int) -> list[tuple[Outermost, tuple[str, ...]]]:
        """The functions that a line is in."""
        return [(node, classes) for a, b, node, classes in self._outermost if a <= line <= b]


_files: dict[str, SourceFile] = {}
_names: dict[Code, str] = {}


def _first_line(node: Outermost) -> int:
    decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
    return min(part.lineno for part in (node, *decorators))


def qualified_name(code: types.CodeType) -> str:
    """The name of code with those of the classes and functions it is in: `Net.forward`.

    Python 3.10 does not keep it; there the source tells.
    """
    found: str | None = getattr(code, "co_qualname", None)
    return name_in_source(code) if found is None else found


def name_in_source(code: types.CodeType) -> str:
    """The same from the source; of functions in functions, the outermost and the innermost name.

    It is the plain name where there is no source.
    """
    key = known_as(code)
    if key not in _names:
        _names[key] = _name_in(SourceFile.of(code), code)
    return _names[key]


def _name_in(file: SourceFile | None, code: types.CodeType) -> str:
    found = file.around(code.co_firstlineno) if file is not None else []
    named = [(node, (*classes, getattr(node, "name", "<lambda>"))) for node, classes in found]
    for node, parts in named:
        if (parts[-1], _first_line(node)) == (code.co_name, code.co_firstlineno):
            return ".".join(parts)
    for _, parts in named:
        return ".".join((*parts, "<locals>", code.co_name))
    return code.co_name
