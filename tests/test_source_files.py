"""What source tells of code: Python 3.10 keeps the full name of a function, and not of its code."""

from __future__ import annotations

import copy
import gc
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmapkit import capture
from fmapkit.paths.control import fixed_attributes
from fmapkit.paths.rewriting.source_files import name_in_source, qualified_name
from fmapkit.paths.survey import is_trusted


def _as_it_is(function: Any) -> Any:
    return function


def plain() -> None:
    """In no class."""


async def waiting() -> None:
    """It may wait."""


class Outer:
    """Holds whatever has a name."""

    one = lambda self: 1  # noqa: E731

    def method(self) -> None:
        """In a class."""

    @staticmethod
    @_as_it_is
    def decorated() -> None:
        """Begins at its first decorator."""

    class Inner:
        """In another one."""

        def method(self) -> None:
            """In both."""

        def has_another(self) -> Callable[[], types.CodeType]:
            """Makes one."""

            def another() -> types.CodeType:
                return (lambda: None).__code__

            return another


ANOTHER = Outer.Inner().has_another()


@pytest.mark.parametrize(
    "function", [plain, waiting, Outer.one, Outer.method, Outer.decorated, Outer.Inner.method]
)
def test_code_has_the_name_of_its_function(function: Any) -> None:
    assert name_in_source(function.__code__) == function.__qualname__
    assert qualified_name(function.__code__) == function.__qualname__


@pytest.mark.parametrize("code", [ANOTHER.__code__, ANOTHER()])  # type: ignore[attr-defined]
def test_code_in_functions_has_the_name_of_the_outermost(code: types.CodeType) -> None:
    for name in (name_in_source(code), qualified_name(code)):
        assert name.partition(".<locals>.")[0] == "Outer.Inner.has_another"
        assert name.rpartition(".<locals>.")[2] == code.co_name


def test_code_without_a_source_has_its_plain_name() -> None:
    names: dict[str, Any] = {}
    exec("class Made:\n    def method(self): pass", names)
    assert name_in_source(names["Made"].method.__code__) == "method"


class _Scale:
    """No module: nobody knows of it before it runs."""

    def of(self, x: Tensor) -> Tensor:
        """Some x, by its sign."""
        return -x if len(x) > 2 else x


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.scale = nn.Linear(3, 3), _Scale()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.one(self.scale.of(x)))


def test_children_of_every_module_of_a_class_are_fixed() -> None:
    fixed, (one, two) = fixed_attributes, (_Net(), _Net())
    assert {"one", "forward"} <= fixed([one, two])(_Net.forward.__code__)
    two.one = None  # type: ignore[assignment]
    found = fixed([one, two])(_Net.forward.__code__)
    assert "one" not in found
    assert "forward" in found
    assert not fixed([one])(plain.__code__)


def test_what_gc_freeze_hides_is_found_by_its_name(traced: list[None]) -> None:
    assert not any(found is _Scale.of for found in gc.get_referrers(_Scale.of.__code__))
    model, x = _Net(), torch.randn(2, 3)
    out = copy.deepcopy(model)(x)
    with capture(model) as maps:
        for _ in range(5):
            model(x)
            assert torch.equal(maps["one"].tensor, out)
    assert len(traced) == 2  # in the first, a method was found to run that did not record
    assert not maps.missed


def test_outputs_of_transformers_are_plain_data() -> None:
    generic = pytest.importorskip("transformers.utils.generic")
    assert is_trusted(generic.ModelOutput.__getitem__.__code__)
    assert not is_trusted(generic.ContextManagers.__enter__.__code__)
