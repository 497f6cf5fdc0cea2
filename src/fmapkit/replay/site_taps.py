"""Taps of functions that a module calls itself: what is called where the call is written.

A twin asks what to call at such a place (see `recorders.tapped`). At most of them one function is
called, of which references to z and a are all that is held. A `PlainSite` gives what notes these,
and never looks at the plan. What is not so plain is a matter of `ReplayRun.call`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodDescriptorType
from typing import Any

from torch import Tensor
from torch.overrides import _get_current_function_mode

from fmapkit.provenance import describe, out_of_place
from fmapkit.replay.taps import CurrentRun
from fmapkit.torchlib.autograd import graph_task
from fmapkit.torchlib.in_place import sigma_apart
from fmapkit.torchlib.modes import ObserverMode, leave_mode

_FUNCTIONS = frozenset({FunctionType, BuiltinMethodType, MethodDescriptorType})


@dataclass(slots=True, eq=False)
class PlainSite:
    """A place in the source where one function is called, and is read plainly."""

    _site: str
    _name: str
    # What is noted: "xy", "y", "nothing", "y, if asked": by the plan's next step, or "kept": of an
    # in-place nonlinearity, z as it was, and y.
    _how: str
    _line: CurrentRun
    _function: Any = None  # what was called here before
    _tap: Any = None

    def instead_of(self, function: Any) -> Callable[..., Any] | None:
        """What to call in the place of a function; None if it is not the one that is read here."""
        if function is self._function:
            tap: Callable[..., Any] = self._tap
            return tap
        plain, name = unbound_and_named(function)
        if name != self._name:
            return None
        tap = _TAPS.get(self._how, _SiteTap)(plain, self._site, self._how, self._line)
        if plain is not function:
            return partial(tap, function.__self__)
        self._function, self._tap = function, tap
        return tap


class _SiteTap:
    """Calls a function, and notes what it was given and what it returned."""

    __slots__ = ("function", "line", "of_x", "site")

    def __init__(self, function: Any, site: str, how: str, line: CurrentRun) -> None:
        self.function = function
        self.site = site
        self.of_x = how == "xy"
        self.line = line

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cell = self.line.cell
        output = self.function(*args, **kwargs)
        if cell is None:
            return output
        note, how, _, drop, _ = cell
        x: Any = args[0] if args else None
        if (
            type(output) is not Tensor
            or (self.of_x and type(x) is not Tensor)
            or output.is_inference()
        ):
            run = self.line.run
            run.note_plainly(self.site, run.step_at(self.site), args, kwargs, output)
            return output
        y = output.detach() if how and output.requires_grad else output
        if self.of_x:
            x = x.detach() if how and x.requires_grad else x
            note((self.site, y, y._version, x, x._version))
        else:
            note((self.site, y, y._version))
        drop(None)
        return output


class _SeldomTap(_SiteTap):
    """The same at a place of which some calls have no map: what they return is not held."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cell = self.line.cell
        if cell is None or self.line.run.asks_next():
            return super().__call__(*args, **kwargs)
        output = self.function(*args, **kwargs)
        note, _, _, drop, _ = cell
        note((self.site,))
        drop(None)
        return output


class _KeptTap(_SiteTap):
    """The same of an in-place nonlinearity: z is kept as it was (see `torchlib/in_place.py`)."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cell = self.line.cell
        if cell is None:
            return self.function(*args, **kwargs)
        note, _, _, drop, fresh = cell
        other = out_of_place(self.function, args, kwargs) if fresh and args else None
        z = None if other is None else sigma_apart(args[0], *other)
        if z is None:
            return self.slowly(args, kwargs)
        x = args[0]
        note((self.site, x, x._version, z, z._version, False))
        drop(None)
        return x

    def slowly(self, args: Any, kwargs: Any) -> Any:
        """The same by the plan, which says what else lies in the memory of x."""
        run = self.line.run
        return run.call(describe(self.function).name, self.function, args, kwargs, self.site)


_TAPS: dict[str, type[_SiteTap]] = {
    "kept": _KeptTap,
    "nothing": _SeldomTap,
    "y, if asked": _SeldomTap,
}


def unbound_and_named(function: Any) -> tuple[Any, str]:
    """A tensor's method without the tensor, any other function as it is; and its name.

    The name is empty for what is no function of Python's or of C code.
    """
    if type(function) not in _FUNCTIONS:
        return function, ""
    if type(function) is BuiltinMethodType and issubclass(type(function.__self__), Tensor):
        function = getattr(type(function.__self__), function.__name__)
    return function, describe(function).name


class LightMode(ObserverMode):
    """Sees the nonlinearities that a module of torch calls itself, and lets the rest pass."""

    def __init__(self, names: Collection[str], call: Callable[..., Any]) -> None:
        super().__init__()
        self.names = names  # of the functions that are read
        self.call = call  # calls one of them: (name, function, args, kwargs)
        self.on = False
        self._pushed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = describe(func)
        if not self.on or graph_task() != -1:
            return func(*args, **(kwargs or {}))
        if known.opened is not None:  # as the tracer saw its inside
            with self:
                return known.opened(*args, **(kwargs or {}))
        if known.name in self.names:
            return self.call(known.name, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def resume(self) -> None:
        """From here on it sees what runs."""
        self.on = True
        if not self._pushed:
            self._pushed = True
            self.__enter__()  # type: ignore[no-untyped-call]

    def pause(self) -> bool:
        """From here on it sees nothing; whether it did.

        It leaves torch's stack, where it costs time, unless another mode lies on top of it: that
        one expects to be taken off first.
        """
        was, self.on = self.on, False
        if self._pushed and _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self._pushed = False
            self.__exit__(None, None, None)
        return was

    def leave(self) -> None:
        """Leave the stack for good."""
        self.on = False
        if self._pushed:
            self._pushed = False
            leave_mode(self)
