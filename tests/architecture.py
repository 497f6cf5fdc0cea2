"""What `test_architecture.py` holds the house to, as functions of source text.

A house is a dict of module name -> `Module`, made of `{path: text}` by `house`, so that a test can
build a wrong one. Imports count wherever they stand: at the head of a module, in a function, under
`TYPE_CHECKING`. What a module names, it knows.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = "fmapkit"


@dataclass(frozen=True)
class Module:
    """One file of the house."""

    name: str
    path: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """The package that it is in; of a face, the one that it is the face of."""
        return self.name if self.path.endswith("__init__.py") else self.name.rpartition(".")[0]


House = Mapping[str, Module]


def house(files: Mapping[str, str]) -> House:
    """The modules of files, by name: "fmapkit/map/line.py" is `fmapkit.map.line`."""
    modules = {}
    for path, text in files.items():
        name = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        modules[name] = Module(name, path, text, ast.parse(text))
    return modules


def read(source: Path) -> House:
    """The house below a folder, such as `src`."""
    files = {p.relative_to(source).as_posix(): p for p in sorted((source / ROOT).rglob("*.py"))}
    return house({name: p.read_text(encoding="utf-8") for name, p in files.items()})


def imports(modules: House, of: Module) -> Iterator[str]:
    """The modules of the house that a module imports."""
    for node in ast.walk(of.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = of.package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if base in modules and (inner not in modules or _binds(modules[base], alias.name)):
                    yield base
                elif inner in modules:
                    yield inner


def _binds(face: Module, name: str) -> bool:
    """Whether a face has a name of its own, by which a module of the same name is hidden."""
    for node in face.tree.body:
        if isinstance(node, ast.ImportFrom) and node.module != face.name:
            if any((alias.asname or alias.name) == name for alias in node.names):
                return True
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return True
    return False


def edges(modules: House) -> dict[str, set[str]]:
    """Who imports whom."""
    return {name: set(imports(modules, m)) - {name} for name, m in modules.items()}


def room(name: str) -> str:
    """The package below the root, or the module there: where it stands in the order."""
    return name.split(".")[1] if "." in name else ROOT


def upward(modules: House, order: Sequence[str]) -> list[str]:
    """Imports that do not go down, and rooms that have no place in the order."""
    place = {name: i for i, name in enumerate(order)}
    found = [f"{name} has no place in the order" for name in {room(m) for m in modules} - {*place}]
    for name, to in edges(modules).items():
        for other in to:
            a, b = room(name), room(other)
            if a in place and b in place and place[b] > place[a]:
                found.append(f"{name} imports {other}, which lies above it")
    return sorted(found)


def circles(modules: House) -> list[set[str]]:
    """Modules that import each other, by way of others or not; each circle once."""
    known = edges(modules)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [*known[start]]
        while todo:
            one = todo.pop()
            if one not in seen:
                seen.add(one)
                todo += known[one]
        return seen

    reach = {name: reached(name) for name in modules}
    found = {frozenset(b for b in reach[a] if a in reach[b]) for a in modules if a in reach[a]}
    return sorted(map(set, found), key=sorted)


def behind_faces(modules: House, open_house: Collection[str] = ()) -> list[str]:
    """Imports of a module of another package, past that package's face."""
    return sorted(
        f"{name} imports {other}: take it from {other.rpartition('.')[0]}"
        for name, to in edges(modules).items()
        for other in to
        if other != ROOT
        and room(other) not in open_house
        and not f"{modules[name].package}.".startswith(f"{other.rpartition('.')[0]}.")
    )


def full_folders(modules: House, limit: int) -> dict[str, int]:
    """Folders with more files than that."""
    count: dict[str, int] = {}
    for module in modules.values():
        folder = str(PurePosixPath(module.path).parent)
        count[folder] = count.get(folder, 0) + 1
    return {folder: n for folder, n in count.items() if n > limit}


def long_files(modules: House, limit: int) -> dict[str, int]:
    """Files with more lines than that."""
    lines = {m.path: len(m.text.splitlines()) for m in modules.values()}
    return {path: n for path, n in lines.items() if n > limit}


def long_functions(modules: House, limit: int) -> dict[str, int]:
    """Functions whose body has more lines than that, the docstring left out."""
    found = {}
    for module in modules.values():
        for name, node in _functions(module.tree, module.name):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1
            if lines > limit:
                found[name] = lines
    return found


def _functions(tree: ast.AST, inside: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        name = f"{inside}.{node.name}" if named else inside  # type: ignore[attr-defined]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, node  # type: ignore[misc]
        yield from _functions(node, name)


def same_names(modules: House) -> dict[str, list[str]]:
    """Names of classes that several modules have."""
    found: dict[str, list[str]] = {}
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(module.name)
    return {name: where for name, where in found.items() if len(where) > 1}


def heavy_imports(modules: House, light: Collection[str]) -> list[str]:
    """Imports of extras that run as soon as a module is imported."""
    found = []
    for module in modules.values():
        for node in _at_import(module.tree.body):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            if isinstance(node, ast.ImportFrom) and node.level:
                continue
            for name in names:
                top = (name or "").partition(".")[0]
                if top not in light and top not in sys.stdlib_module_names:
                    found.append(f"{module.name} imports {top}")
    return sorted(found)


def _at_import(body: Iterable[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _at_import(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for part in ("body", "orelse", "finalbody"):
                yield from _at_import(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _at_import(handler.body)


def private_torch(modules: House, home: str) -> dict[str, int]:
    """How many private names of torch the modules of each room know, outside of their home."""
    found = {}
    for module in modules.values():
        if room(module.name) == home:
            continue
        names = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
                start: ast.expr = node.value
                while isinstance(start, ast.Attribute):
                    start = start.value
                if isinstance(start, ast.Name) and start.id in ("torch", "nn", "F", "dist"):
                    names.add(ast.unparse(node))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {a.name for a in node.names if a.name.startswith("torch")}
        private = {name for name in names if re.search(r"\._[^_]", name)}
        longest = {n for n in private if not any(o.startswith(f"{n}.") for o in private)}
        if longest:
            found[room(module.name)] = found.get(room(module.name), 0) + len(longest)
    return found


def foreign_stores(modules: House) -> dict[str, int]:
    """How often each room writes an attribute of what is not `self` (or `cls`)."""
    found: dict[str, int] = {}
    for module in modules.values():
        for node in ast.walk(module.tree):
            if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)):
                continue
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                where = room(module.name)
                found[where] = found.get(where, 0) + 1
    return found


def silent_raises(modules: House, errors: Collection[str]) -> list[str]:
    """Errors whose message names a layer, or what is meant instead, and whose data do not."""
    found = []
    for module in modules.values():
        for node in ast.walk(module.tree):
            made = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if not made or node.func.id not in errors or not node.args:  # type: ignore[attr-defined]
                continue
            given = {k.arg for k in node.keywords}  # type: ignore[attr-defined]
            says = ast.unparse(node.args[0])  # type: ignore[attr-defined]
            about = re.search(r"\{(\w+\.)?layer(!r)?\}|\{_name\(fm\)", says)
            lacks = ["layer"] if about and not given & {"layer", None} else []
            if re.search(r"did_you_mean\(|listed\(", says) and not given & {"candidates", None}:
                lacks.append("candidates")
            if lacks:
                found.append(f"{module.path}: {' and '.join(lacks)} of {says[:60]}")
    return found


_FILE = re.compile(r"(?<![\w/.*-])([\w*-]+(?:/[\w*-]+)*\.py)\b")


def endings(files: Iterable[str]) -> set[str]:
    """By what a file may be named: "a/b/c.py" as that, "b/c.py" and "c.py"."""
    return {
        "/".join(parts[i:]) for f in files if (parts := f.split("/")) for i in range(len(parts))
    }


def unknown_files(
    text: str, known: Collection[str], allowed: Collection[str] = (), near: str = ""
) -> list[str]:
    """Files that a text names, and that are not there.

    Args:
        text: of a page.
        known: the `endings` of all files.
        allowed: names of files that are the reader's own.
        near: a folder in which names without one may be.
    """
    return [
        name
        for name in dict.fromkeys(_FILE.findall(text))
        if name not in allowed and name not in known and f"{near}/{name}" not in known
    ]


_DOTTED = re.compile(r"\bfmapkit(?:\.\w+)+")


def dotted_names(text: str) -> list[str]:
    """The names in dots that a text has of the package: `fmapkit.map.FeatureMap`."""
    return list(dict.fromkeys(_DOTTED.findall(text)))
