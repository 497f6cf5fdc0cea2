"""What one capture knows of its control paths, and what it has set to record them."""

from __future__ import annotations

import os
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.paths import sinks
from fmapkit.paths.known_paths import Expected
from fmapkit.paths.rewriting import qualified_name
from fmapkit.paths.survey import Survey, is_installed, is_trusted
from fmapkit.paths.twins import Fixed, Twins, call_site
from fmapkit.torchlib.caching import remembered
from fmapkit.torchlib.compiled_modules import is_compiled_function
from fmapkit.torchlib.fused.paths import functions_inside
from fmapkit.torchlib.nested import modules_in

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_HANDLER = torch.overrides.handle_torch_function.__code__
# Paths, told by the hash of their items, in which every function that ran has recorded.
_complete: set[int] = set()
# By class of module: functions that were found to run in its calls.
_helpers: dict[type, weakref.WeakSet[types.FunctionType]] = {}
_surveyed: set[Any] = set()  # modules, told by their form, of which there is one


class ControlPaths:
    """The control paths of one capture's passes."""

    def __init__(
        self,
        model: nn.Module,
        place_of: Callable[[Tensor], str | None],
        running: Callable[[], Iterable[nn.Module]],
    ) -> None:
        self._model = model
        # Names the place of a parameter in the model; None for any other tensor.
        self._place_of = place_of
        self._running = running  # the modules whose calls are under way, outermost first
        self._items: list[Any] = []  # the decisions of the pass
        self._records = False
        self._survey: Survey | None = None
        self._tried: dict[int, types.CodeType] = {}
        self._doubted: set[nn.Module] = set()
        self.twins = Twins()
        self.refresh()

    def refresh(self) -> None:
        """The model has other modules than it had."""
        self._modules = set(self._model.modules())
        # Each look at an attribute runs these, ours and torch's as well: they tell of no way, and
        # such modules are traced in every pass.
        found = {getattr(type(m).__getattribute__, "__code__", None) for m in self._modules}
        self._lookers = frozenset(code for code in found if code is not None)
        self.twins.clear()
        self.twins = Twins(fixed_attributes(self._modules))
        self._doubted.clear()
        self._kinds_met: set[type] = set()
        self._ready = False

    # -- a pass -------------------------------------------------------------------------------

    def begin(self) -> None:
        """A pass begins: record."""
        if not self._ready:
            self._ready = True
            for kind in {type(m) for m in self._modules}:
                self._set_class(kind)
                for function in tuple(_helpers.get(kind, ())):
                    self.twins.exchange(function)
        self.twins.set_again()
        sink = sinks.start(self._place_of, self._modules, self._met)
        self._items, self._records = sink.items, True

    def _met(self, kind: type) -> None:
        """A module that is not registered is about to run: the code of its class is to record."""
        if kind not in self._kinds_met:
            self._kinds_met.add(kind)
            self._set_class(kind)

    def _set_class(self, kind: type) -> None:
        """Have the forward of a class record, and what it is likely to call.

        What a survey finds to run in a traced pass records from the next pass on. To guess spares
        that pass; of large libraries, which have hundreds of methods, only the forward is taken.
        """
        for torchs in functions_inside(kind):
            self.twins.exchange(torchs)
        forward = getattr(kind, "forward", None)
        if type(forward) is not types.FunctionType:
            return
        if is_trusted(forward.__code__):
            self.twins.watch(forward)
            return
        self.twins.exchange(forward)
        if is_installed(forward.__code__):
            return
        todo = [f for base in kind.__mro__ if base is not nn.Module for f in _functions_in(base)]
        seen: set[types.FunctionType] = set()
        while todo:
            function = todo.pop()
            if function in seen or is_trusted(function.__code__):
                continue
            seen.add(function)
            if not is_installed(function.__code__) and self.twins.exchange(function):
                named = (function.__globals__.get(n) for n in function.__code__.co_names)
                todo += [f for f in named if type(f) is types.FunctionType]

    def end(self) -> None:
        """The pass has ended."""
        if self._survey is not None:
            self._end_survey()
        if self._records:
            self._items, self._records = [], False
            sinks.stop()

    @contextmanager
    def away(self) -> Iterator[None]:
        """What runs here is no part of the pass, and is not surveyed."""
        with sinks.unrecorded(), self._survey.away() if self._survey else nullcontext():
            yield

    # -- a call that is traced ----------------------------------------------------------------

    def begin_lesson(self, module: nn.Module) -> None:
        """A call of a module is traced, to know its path.

        Where such a path was complete in another capture, it is taken to be complete now, and its
        items tell in the end whether that was right: to look at each function costs time.
        """
        known = _form(module) in _surveyed and module not in self._doubted
        # Hooks are an object's own, and torch calls them: no item tells of one that has no twin.
        known = known and not any(m._forward_hooks for m in modules_in(module))
        self._doubted.add(module)
        if not known:
            self._survey = Survey(lambda: tuple(self._running()), self._lookers)
            self._survey.start()

    def end_lesson(self, items: list[Any], module: nn.Module) -> tuple[bool, set[nn.Module]]:
        """The call has ended: whether all that ran has recorded, and the modules where it cannot.

        These are to be traced in every pass.
        """
        told = hash(tuple([i if type(i) in _PLAIN else _lasting(i) for i in items]))
        survey = self._end_survey()
        if survey is None:
            return told in _complete, set()
        hopeless: set[nn.Module] = set()
        for told_by, (_, _, who) in survey.found.items():
            if told_by in self._tried:
                hopeless.update(m for modules in who for m in modules)
        self._tried.update({at: code for at, (code, _, _) in survey.found.items()})
        self.twins.exchange_all([(code, names) for code, names, _ in survey.found.values()])
        if survey.found:
            helpers = _helpers.setdefault(type(module), weakref.WeakSet())
            helpers.update(self.twins.functions())
        if survey.complete and not survey.found:
            _complete.add(told)
            _surveyed.add(_form(module))
            return True, set()
        return False, hopeless

    def _end_survey(self) -> Survey | None:
        survey, self._survey = self._survey, None
        if survey is not None:
            survey.stop()
        return survey

    def expect(self, path: list[Any] | None) -> Expected:
        """A call begins that is taken to take a path."""
        return Expected(self._items, len(self._items), path)

    @property
    def position(self) -> int:
        """How many decisions were recorded so far."""
        return len(self._items)

    def clock(self) -> Callable[[], int]:
        """The same, for whoever asks often in this pass."""
        return self._items.__len__

    def since(self, position: int) -> list[Any]:
        """The decisions from a position on."""
        return self._items[position:]

    def site_of(self, asking: types.FrameType, function: Any) -> str | None:
        """Where in the model's source a torch function was called, in a frame or one around it."""
        frame: types.FrameType | None = asking
        while frame is not None and frame.f_code.co_filename.startswith(_OURS):
            frame = frame.f_back
        while frame is not None and frame.f_code is _HANDLER:
            frame = frame.f_back
        return call_site(frame, function)

    def clear(self) -> None:
        """The block has ended: every function has its own code again."""
        self.end()
        self.twins.clear()


def _form(module: nn.Module) -> Any:
    """Tells modules apart that are likely to take other paths."""
    own = tuple((name, v) for name, v in module.__dict__.items() if type(v) in _PLAIN)
    return tuple(map(type, modules_in(module))), own


_PLAIN = frozenset({int, float, bool, str, type(None)})
# Methods that run outside of passes, or tell of no way.
_ASIDE = {
    "__getattribute__",
    *("__init__", "__del__", "__repr__", "extra_repr", "reset_parameters"),
    *("__setstate__", "__getstate__"),
}


def _functions_in(kind: type) -> list[types.FunctionType]:
    """The methods and properties of a class of the model's own."""
    own = {n: getattr(v, "__func__", getattr(v, "fget", v)) for n, v in vars(kind).items()}
    return [f for n, f in own.items() if type(f) is types.FunctionType and n not in _ASIDE]


def _lasting(item: Any) -> Any:
    """The same of an item that is of one model alone."""
    if isinstance(item, tuple):
        return tuple(map(_lasting, item))
    return type(item) if isinstance(item, nn.Module) else item


# -- attributes that need no look -----------------------------------------------------------------


def fixed_attributes(modules: Iterable[nn.Module]) -> Fixed:
    """Tells which attributes of a method's first argument need no look where code reads them.

    In `self.conv(x)`, what is called need not be recorded where `conv` is a child of every module
    that the method may belong to: the model's structure is compared before each pass. The same
    holds for functions of a module's class, which mark where they begin.
    """
    of_class: dict[str, frozenset[str]] = {}
    for module in modules:
        names, functions = _of_own_code(type(module))
        if not names:
            continue
        children = {name for name, child in module._modules.items() if child is not None}
        own = (functions | children).difference(module.__dict__)
        for name in names:
            of_class[name] = own & of_class.get(name, own)

    def fixed(code: types.CodeType) -> frozenset[str]:
        owner = qualified_name(code).partition(".<locals>")[0].rpartition(".")[0]
        return of_class.get(owner, frozenset())

    return fixed


@remembered
def _of_own_code(kind: type) -> tuple[tuple[str, ...], frozenset[str]]:
    """The classes of a module that are not torch's, by name, and the functions of all of them."""
    found: dict[str, object] = {}
    for base in reversed(kind.__mro__):
        found.update(vars(base))
    functions = frozenset(
        name
        for name, value in found.items()
        if type(value) is types.FunctionType and not is_compiled_function(value)
    )
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return tuple(b.__qualname__ for b in bases if not b.__module__.startswith("torch.")), functions
