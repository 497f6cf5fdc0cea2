"""Passes through other methods of the model than its call: `capture(model, method="encode")`.

Such a method is called without the module's own call around it, where no hook of any kind runs. A
callable stands in its place on the instance while the block is open, and tells the session when the
method begins and ends, as a `Pair` does of a call.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fmapkit.errors import ArgumentError, did_you_mean, listed, near
from fmapkit.instrumentation.pair import FAILED
from fmapkit.torchlib.call_override import lock

_NOTHING = object()


def methods_of(model: nn.Module, given: Any) -> tuple[str, ...]:
    """The names of the methods that were asked for, without that of its call.

    Raises:
        ArgumentError: the model has no such method, or it runs after it has returned.
    """
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, Iterable) or not (names := tuple(names)):
        raise ArgumentError(f"method must be a method's name, or several, not {given!r}")
    for name in names:
        found = getattr(model, name, None) if isinstance(name, str) else None
        if not callable(found) or isinstance(found, nn.Module):
            own = [k for k in dir(type(model)) if not hasattr(nn.Module, k) and k[0] != "_"]
            own = [k for k in own if callable(getattr(type(model), k))]
            hint = did_you_mean(name, own) if isinstance(name, str) else ""
            there = f" (its own: {listed(own)})" if own else ""
            raise ArgumentError(
                f"method={name!r} is no method of {type(model).__name__}{hint}{there}",
                candidates=near(name, own) or own,
            )
        code = inspect.unwrap(found)
        if inspect.isgeneratorfunction(code) or inspect.iscoroutinefunction(code):
            raise ArgumentError(
                f"method={name!r} is a generator or a coroutine: it runs after it has returned, "
                "in pieces; name a method that it calls"
            )
    return tuple(name for name in dict.fromkeys(names) if name not in ("forward", "__call__"))


def method_called(self: nn.Module, method: _Method, args: Any, kwargs: Any) -> Any:
    """A pass through a method of the model. `self` is looked for on Python's stack."""
    given = method.pre(self, args, kwargs)
    args, kwargs = (args, kwargs) if given is None else given
    try:
        output = method.inner(*args, **kwargs)
    except Exception:
        method.post(self, args, kwargs, FAILED)
        raise
    except BaseException as error:
        if not method.broken_off(self, error):
            raise
        output = None
    replaced = method.post(self, args, kwargs, output)
    return output if replaced is None else replaced


class _Method:
    """Stands in the place of one method of one model.

    Args:
        calls: of the session: (inside, pre, post, broken_off), as of a `Pair`; `inside` tells
            whether a pass is under way, of which the method is then a part.
    """

    def __init__(self, model: nn.Module, name: str, calls: tuple[Callable[..., Any], ...]) -> None:
        self.model, self.name = model, name
        self.inside, self.pre, self.post, self.broken_off = calls
        self.before = model.__dict__.get(name, _NOTHING)
        self.inner: Any = getattr(model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.inside():
            return self.inner(*args, **kwargs)
        return method_called(self.model, self, args, kwargs)

    def leave(self) -> None:
        """Give the place back; a capture that came later stays."""
        there = self.model.__dict__.get(self.name)
        if there is self:
            if self.before is _NOTHING:
                del self.model.__dict__[self.name]
            else:
                self.model.__dict__[self.name] = self.before
            return
        while isinstance(there, _Method):
            if there.before is self:
                there.before, there.inner = self.before, self.inner
            there = there.before

    def __deepcopy__(self, memo: Any) -> Any:
        copied = memo.get(id(self.model), self.model)
        return types.MethodType(getattr(type(self.model), self.name), copied)

    def __reduce__(self) -> Any:
        return getattr, (self.model, self.name)


class Methods:
    """The methods of a model whose calls are passes of one session."""

    def __init__(
        self, model: nn.Module, names: tuple[str, ...], calls: tuple[Callable[..., Any], ...]
    ) -> None:
        self._model, self._names, self._calls = model, names, calls
        self._set: list[_Method] = []

    def stand(self) -> None:
        """The block begins."""
        with lock:
            for name in self._names:
                made = _Method(self._model, name, self._calls)
                self._model.__dict__[name] = made
                self._set.append(made)

    def leave(self) -> None:
        """The block has ended."""
        with lock:
            while self._set:
                self._set.pop().leave()
