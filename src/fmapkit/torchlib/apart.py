"""Functions that run apart: as if nobody captured, with nothing of ours in sight.

A plain model may call what torch.compile has compiled; and torch's higher-order operators
(`torch.cond`, `flex_attention`) compile what they are given to run. dynamo looks at the stack of
function modes as it begins, and cannot go through one of ours. So such a call is made with our
modes off the stack, and with every capture of the thread looking away. What runs inside is seen by
nobody; what becomes of its results is a matter of each capture, which is an `Onlooker` here.

Whoever has such a call to make, makes it by `run_apart`, or within `apart`. Whoever sees that
somebody is about to call something, has `instead_of` tell what to call in its place.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any, Protocol

import torch
from torch._ops import HigherOrderOperator, OperatorBase

from fmapkit.torchlib.modes import when_asked, without_ours

# The last names of the operators' public faces, and where these are written.
FACES = frozenset(
    {
        *("cond", "while_loop", "scan", "associative_scan", "map", "strict_mode", "foreach_map"),
        *("flex_attention", "_flex_attention", "create_block_mask"),
    }
)
_HOMES = (
    *("torch._higher_order_ops.", "torch.nn.attention.flex_attention"),
    "torch.nn.attention._flex_attention",  # up to torch 2.4
)
_META = type(HigherOrderOperator)  # asked first: it is that of few callables
# Kinds of callables of which none has to run apart: most of those that are called.
_NEVER = frozenset({types.MethodType, types.BuiltinFunctionType, types.MethodDescriptorType, type})


@dataclass(slots=True)
class ApartCall:
    """A call that runs apart."""

    name: str  # of the function
    given: tuple[Any, ...] = ()  # to it, where it may write to that
    inside: bool = True  # it runs code of the model's, whose maps are missed


class Onlooker(Protocol):
    """Somebody who captures what runs in a thread."""

    def watches(self) -> bool:
        """Whether a pass of theirs is under way, and is seen."""
        ...

    def begins(self, call: ApartCall) -> None:
        """A call is about to be made."""
        ...

    def away(self) -> AbstractContextManager[None]:
        """They do not look on while this is entered; what they have put on a stack stays there."""
        ...

    def ran(self, call: ApartCall, output: Any) -> None:
        """A call has ended: what it returned."""
        ...


_onlookers: dict[int, tuple[Onlooker, ...]] = {}  # by thread


def look_on(onlooker: Onlooker) -> None:
    """Tell somebody of the calls in this thread that run apart."""
    _onlookers[get_ident()] = (*_onlookers.get(get_ident(), ()), onlooker)


def look_on_no_more(onlooker: Onlooker) -> None:
    """Undo `look_on`, in whatever thread that was."""
    for thread, there in tuple(_onlookers.items()):
        left = tuple(one for one in there if one is not onlooker)
        if left:
            _onlookers[thread] = left
        else:
            _onlookers.pop(thread, None)


@contextmanager
def apart(call: ApartCall) -> Iterator[Callable[[Any], None]]:
    """What runs here in this thread is seen by none of us; gives what is told of the output."""
    ours = [one for one in _onlookers.get(get_ident(), ()) if one.watches()]

    def told(output: Any) -> None:
        for one in ours:
            one.ran(call, output)

    for one in ours:
        one.begins(call)
    with ExitStack() as stack:
        stack.enter_context(without_ours())  # and all is on it again as the last of them comes back
        for one in ours:
            stack.enter_context(one.away())
        yield told


def run_apart(call: ApartCall, function: Any, args: Any, kwargs: Any) -> Any:
    """Call a function apart; what it returns."""
    with apart(call) as told:
        output = function(*args, **kwargs)
        told(output)
    return output


def run(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """The same of a function that `runs_apart`, in those of its calls that have to."""
    call = call_of(function, args, kwargs)
    if call is None:
        return function(*args, **kwargs)
    return run_apart(call, function, args, kwargs)


def run_compiled(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """The same of what torch.compile has made of a function, or of a module."""
    name = getattr(function, "__qualname__", type(function).__name__)
    return run_apart(ApartCall(name, (*args, kwargs)), function, args, kwargs)


def instead_of(function: Any) -> Any:
    """What to call in the place of a function: `run` for one that has to run apart."""
    if type(function) in _NEVER or get_ident() not in _onlookers or not runs_apart(function):
        return function
    return partial(run, function)


# -- where nobody has told beforehand -------------------------------------------------------------


class _UnderWay:
    """A call of one of `FACES` that no recorder has seen, by code that has no twin.

    It is about to compile. From there on it runs apart, until a profiler of ours sees it return.
    """

    def __init__(self, frame: types.FrameType) -> None:
        self.frame = frame
        self._before: Any = None  # a survey of ours
        self._told: Callable[[Any], None] | None = None
        self._back = ExitStack()

    def start(self) -> None:
        """Look from here on; not where somebody else has a profiler."""
        self._before = sys.getprofile()
        kind = type(getattr(self._before, "__self__", None))
        if self._before is None or kind.__module__.startswith("fmapkit."):
            if kind is not _UnderWay:
                sys.setprofile(self._see)

    def _see(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "call" and self._told is None:
            if frame.f_code is torch.compile.__code__:
                call = call_by_name(self.frame.f_code.co_name, (), self.frame.f_locals)
                if call is not None:
                    self._told = self._back.enter_context(apart(call))
        elif event == "return" and frame is self.frame:
            told, self._told = self._told, None
            if told is not None and argument is not None:  # as it is after an exception
                told(argument)
            self._back.close()
            sys.setprofile(self._before)


def _asked(at: types.FrameType | None) -> None:
    """torch asks of which kind a mode is: its operators do so just before they compile."""
    for _ in range(12):
        if at is None:
            return
        if at.f_code.co_name in FACES and is_face(at.f_globals):
            _UnderWay(at).start()
            return
        at = at.f_back


when_asked.append(_asked)


# -- which functions ------------------------------------------------------------------------------


def runs_apart(function: Any) -> bool:
    """Whether a function, or what it is a part of, is a higher-order operator's."""
    while type(function) is partial:
        function = function.func
    if type(function) is types.FunctionType:
        return function.__name__ in FACES and is_face(function.__globals__)
    return type(type(function)) is _META and isinstance(function, HigherOrderOperator)


def is_face(names: dict[str, Any]) -> bool:
    """Whether a function that is called as one of `FACES` and has these globals is torch's."""
    return str(names.get("__name__")).startswith(_HOMES)


def is_operator(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is a higher-order operator itself, and what it is given is code to run."""
    if not isinstance(function, HigherOrderOperator):
        return False
    given = (*args, *kwargs.values())
    return any(callable(a) and not isinstance(a, (type, OperatorBase)) for a in given)


def call_of(function: Any, args: Any, kwargs: Any) -> ApartCall | None:
    """A call as it is to run apart; None if it may run as any other."""
    while type(function) is partial:
        args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
        function = function.func
    name = function.__name__
    if isinstance(function, HigherOrderOperator):
        return ApartCall(name) if is_operator(function, args, kwargs) else None
    return call_by_name(name, args, kwargs)


def call_by_name(name: str, args: Any, kwargs: Any) -> ApartCall | None:
    """The same of one of `FACES`."""
    if name == "cond" and isinstance(args[0] if args else kwargs.get("pred"), (bool, int, float)):
        return None  # a branch is called as any function is
    if name == "create_block_mask":  # masks have no maps
        return ApartCall(name, inside=False) if kwargs.get("_compile") else None
    scores = args[3] if len(args) > 3 else kwargs.get("score_mod")
    return ApartCall(name, inside=not name.endswith("flex_attention") or scores is not None)
