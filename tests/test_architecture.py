"""The house: imports go down, packages have faces, nothing grows beyond what a reader can hold.

The lists of exceptions may only shrink: an entry that is no longer needed is an error, too. Below
the checks of the house, each check is shown a house that it has to refuse.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

from fmapkit import errors
from tests import architecture as a

ROOT = Path(__file__).parents[1]
HOUSE = a.read(ROOT / "src")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# From the ground up: each may import those before it, and nothing after it.
GROUND_UP = """
_lazy torchlib kinds reasons readable nonfinite errors _warnings missed layers nonlinearities
paths instrumentation model provenance storage tables views plot page map
checking selectors selection editing edits tracing replay compiled session
saving lookup maps capture explain analysis comparing patching phi fmapkit
data cli integrations __main__
"""
ORDER = GROUND_UP.split()

FILES, LINES, BODY = 20, 400, 50  # files of a folder, lines of a file, lines of a function's body
LIGHT = {"torch", "numpy", "typing_extensions", "fmapkit"}  # what `import fmapkit` may load

# Modules that are imported themselves only where the extra is there.
HEAVY = {
    "fmapkit.analysis._fused imports numba",
    "fmapkit.integrations.lightning imports lightning",
    "fmapkit.integrations.lightning imports pytorch_lightning",
    "fmapkit.integrations.transformers imports transformers",
    "fmapkit.phi.transformer imports sklearn",
}
READERS_OWN = {
    "my_extraction.py",
    "notebooks/NAME.py",
}  # files that a page tells the reader to write

# These lists may only shrink.
PRIVATE_TORCH = {  # names of torch's own, by room: they belong into torchlib
    "model": 2,
    "nonlinearities": 1,
    "paths": 1,
    "provenance": 5,
    "replay": 5,
    "session": 1,
    "storage": 2,
    "tracing": 4,
}
FOREIGN_STORES = {  # attributes of other objects that are written, by room
    "analysis": 8,
    "capture": 1,
    "compiled": 25,
    "data": 12,
    "editing": 2,
    "explain": 3,
    "instrumentation": 2,
    "integrations": 1,
    "paths": 33,
    "phi": 11,
    "replay": 10,
    "saving": 2,
    "session": 45,
    "storage": 9,
    "torchlib": 11,
    "tracing": 78,
}


def only_shrinks(found: Mapping[str, int], listed: Mapping[str, int]) -> None:
    """Nothing beyond the list or larger than it says, and nothing listed that is not needed."""
    more = {k: n for k, n in found.items() if n > listed.get(k, 0)}
    assert not more, f"too large, or too many: {more}"
    done = sorted(listed.keys() - found.keys())
    assert not done, f"not needed any more, take it off the list: {done}"


def only_these(found: Collection[str], listed: Collection[str]) -> None:
    """The same of sentences."""
    only_shrinks(dict.fromkeys(found, 1), dict.fromkeys(listed, 1))


def test_imports_go_down() -> None:
    assert a.upward(HOUSE, ORDER) == []


def test_no_circles() -> None:
    assert a.circles(HOUSE) == []


def test_packages_are_read_through_their_faces() -> None:
    # torchlib's modules are small, and imported as they are.
    assert a.behind_faces(HOUSE, {"torchlib"}) == []


def test_folders_are_small() -> None:
    assert not a.full_folders(HOUSE, FILES)


def test_files_are_short() -> None:
    assert a.long_files(HOUSE, LINES) == {}


def test_functions_are_short() -> None:
    assert a.long_functions(HOUSE, BODY) == {}


def test_class_names_are_unique() -> None:
    assert not a.same_names(HOUSE)


def test_extras_are_imported_in_functions() -> None:
    only_these(set(a.heavy_imports(HOUSE, LIGHT)), HEAVY)


def test_private_names_of_torch_are_in_one_package() -> None:
    only_shrinks(a.private_torch(HOUSE, "torchlib"), PRIVATE_TORCH)


def test_objects_write_their_own_attributes() -> None:
    only_shrinks(a.foreign_stores(HOUSE), FOREIGN_STORES)


def test_errors_carry_what_they_say() -> None:
    assert not a.silent_raises(HOUSE, errors.__all__)


def _files() -> set[str]:
    folders = ("src", "tests", "benchmarks", "examples", "docs", "notebooks")
    return a.endings(
        p.relative_to(ROOT).as_posix() for f in folders for p in (ROOT / f).rglob("*.py")
    )


def test_every_file_that_is_named_exists() -> None:
    known, wrong = _files(), {}
    for page in PAGES:
        wrong[str(page)] = a.unknown_files(page.read_text(encoding="utf-8"), known, READERS_OWN)
    for module in HOUSE.values():
        near = module.path.rpartition("/")[0].removeprefix("fmapkit/")
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                wrong[f"{module.name}:{getattr(node, 'name', '')}"] = a.unknown_files(
                    text, known, READERS_OWN, near
                )
    assert not {where: names for where, names in wrong.items() if names}


def resolves(name: str) -> bool:
    """Whether a name in dots stands for something; what a package offers is not imported for it."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        if i == len(parts) and part in getattr(found, "__all__", ()):
            return True
        if not hasattr(found, part):
            if ".".join(parts[:i]) not in HOUSE:
                return False
            importlib.import_module(".".join(parts[:i]))
        found = getattr(found, part)
    return True


def test_every_name_in_dots_exists() -> None:
    texts = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    names = {name: page for page, text in texts.items() for name in a.dotted_names(text)}
    assert not {name: page for name, page in names.items() if not resolves(name)}


# -- each check, of a house that is wrong ---------------------------------------------------------

_BACK = "from fmapkit.b import B\n\nclass A: pass\n"
_LONG = "def f():\n" + "    pass\n" * 51
WRONG: list[tuple[Callable[[a.House], Any], dict[str, str], Any]] = [
    (
        lambda h: a.upward(h, ["a", "b", "fmapkit"]),
        {"a.py": "def f():\n    from fmapkit.b import B\n", "b.py": "class B: pass\n"},
        ["fmapkit.a imports fmapkit.b, which lies above it"],
    ),
    (
        lambda h: a.upward(h, ["a", "b", "fmapkit"]),
        {
            "a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B\n",
            "b.py": "class B: pass\n",
        },
        ["fmapkit.a imports fmapkit.b, which lies above it"],
    ),
    (
        lambda h: a.upward(h, ["a", "fmapkit"]),
        {"a.py": "", "new.py": ""},
        ["new has no place in the order"],
    ),
    (
        a.circles,
        {"a.py": _BACK, "b.py": "import fmapkit.c\n", "c.py": "def f():\n    from . import a\n"},
        [{"fmapkit.a", "fmapkit.b", "fmapkit.c"}],
    ),
    (
        a.behind_faces,
        {"a.py": "from fmapkit.p.inner import f\n", "p/__init__.py": "", "p/inner.py": "f = 1\n"},
        ["fmapkit.a imports fmapkit.p.inner: take it from fmapkit.p"],
    ),
    (
        a.behind_faces,  # a module as a name of its package
        {"a.py": "from fmapkit.p import inner\n", "p/__init__.py": "", "p/inner.py": "f = 1\n"},
        ["fmapkit.a imports fmapkit.p.inner: take it from fmapkit.p"],
    ),
    (
        a.behind_faces,  # of a package in the same package
        {
            "p/one.py": "from fmapkit.p.q.inner import f\n",
            "p/__init__.py": "",
            "p/q/__init__.py": "",
            "p/q/inner.py": "f = 1\n",
        },
        ["fmapkit.p.one imports fmapkit.p.q.inner: take it from fmapkit.p.q"],
    ),
    (lambda h: a.full_folders(h, 2), {"p/a.py": "", "p/b.py": "", "p/c.py": ""}, {"fmapkit/p": 3}),
    (lambda h: a.long_files(h, 2), {"a.py": "1\n2\n3\n"}, {"fmapkit/a.py": 3}),
    (lambda h: a.long_functions(h, 50), {"a.py": _LONG}, {"fmapkit.a.f": 51}),
    (
        a.same_names,
        {"a.py": "class Same: pass\n", "b.py": "def f():\n    class Same: pass\n"},
        {"Same": ["fmapkit.a", "fmapkit.b"]},
    ),
    (
        lambda h: a.heavy_imports(h, LIGHT),
        {"a.py": "import os, torch\ntry:\n    import zarr\nexcept ImportError:\n    pass\n"},
        ["fmapkit.a imports zarr"],
    ),
    (
        lambda h: a.private_torch(h, "torchlib"),
        {
            "a.py": "import torch\nfrom torch.utils import _pytree\ntorch._C._x()\n",
            "torchlib.py": "import torch\ntorch._C._x()\n",
        },
        {"a": 2},
    ),
    (
        lambda h: a.silent_raises(h, ["MapLookupError"]),
        {
            "a.py": "MapLookupError(f'no {layer!r}')\n"
            "MapLookupError(f'no {x}{did_you_mean(x, y)}', layer=x)\n"
            "MapLookupError(f'no {layer!r}, {listed(y)}', layer=layer, candidates=y)\n"
        },
        [
            "fmapkit/a.py: layer of f'no {layer!r}'",
            "fmapkit/a.py: candidates of f'no {x}{did_you_mean(x, y)}'",
        ],
    ),
    (a.foreign_stores, {"a.py": "def f(self, o):\n    self.x = 1\n    o.x = o.y = 2\n"}, {"a": 2}),
]


@pytest.mark.parametrize(("check", "files", "found"), WRONG)
def test_each_check_finds_what_is_wrong(
    check: Callable[[a.House], Any], files: dict[str, str], found: Any
) -> None:
    wrong = {"fmapkit/__init__.py": "", **{f"fmapkit/{p}": text for p, text in files.items()}}
    assert check(a.house(wrong)) == found


def test_what_is_right_passes() -> None:
    right = a.house(
        {
            "fmapkit/__init__.py": "from fmapkit.b import B\n",
            "fmapkit/p/__init__.py": "from fmapkit.p.inner import inner\n",
            "fmapkit/p/inner.py": "import torch\n\ndef inner(): pass\n",
            "fmapkit/b.py": "from .p import inner\n\nclass B:\n    def f(self): self.x = 1\n",
        }
    )
    assert not a.upward(right, ["p", "b", "fmapkit"])
    assert not a.circles(right)
    assert not a.behind_faces(right)
    assert not a.foreign_stores(right)
    assert not a.heavy_imports(right, LIGHT)


def test_lists_only_shrink() -> None:
    only_shrinks({"a": 3}, {"a": 4})
    for found, listed in (({"a": 5}, {"a": 4}), ({"b": 1}, {}), ({}, {"a": 4})):
        with pytest.raises(AssertionError):
            only_shrinks(found, listed)


def test_names_that_are_not_there() -> None:
    text = "See `map/line.py`, `b.py`, gone/line.py and fmapkit.map.Gone, fmapkit.FeatureMap."
    assert a.unknown_files(text, a.endings(["src/map/line.py", "b.py"])) == ["gone/line.py"]
    assert a.unknown_files("`line.py`", a.endings(["map/line.py"])) == []
    assert a.unknown_files("`_flow*.py`", a.endings(["_flow_a.py"])) == ["_flow*.py"]
    names = a.dotted_names(text)
    assert names == ["fmapkit.map.Gone", "fmapkit.FeatureMap"]
    assert [resolves(name) for name in names] == [False, True]
    assert resolves("fmapkit.map.line")
    assert not resolves("fmapkit.map.gone.FeatureMap")
