"""Twins in the place of code: each made once (`twin_source.py`), set while a block is open.

A function runs its twin because its `__code__` is exchanged: whoever calls it, by whatever way (a
property, an operator, a callback from C), runs the twin then. Other threads and other models may
run it, too: it does the same, and records nothing there.
"""

from __future__ import annotations

import functools
import gc
import itertools
import operator
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fmapkit.paths.branches import handles
from fmapkit.paths.recorder_names import RECORDERS
from fmapkit.paths.recorders import twins as _codes
from fmapkit.paths.rewriting import Code, Twin, known_as, make_twins, qualified_name, site_at
from fmapkit.torchlib.caching import DictWatch

_lock = threading.RLock()
# The code of torch's functions that call another one of the same name, and do nothing else.
_HANDING_ON = {
    id(getattr(F, name).__code__) for name in ("sigmoid", "tanh", "grouped_mm") if hasattr(F, name)
}
_code_of = operator.attrgetter("__code__")
# By the original, and the attributes that are known to be fixed; None where there is no twin.
_twins: dict[tuple[Code, frozenset[str], frozenset[str]], Twin | None] = {}
_made: dict[Code, Twin] = {}  # by the code of the twin
# The same by its identity, as far as it was seen to run, with the places of calls in it.
_Run = tuple[types.CodeType, "Twin | None", dict[int, str]]
_run: dict[int, _Run] = {}
# By file: places of calls at which some capture has set a tap. It may do so again.
_tapped: dict[str, frozenset[str]] = {}
# By function: how many captures want its twin, its own code, and the twin's fixed attributes. (What
# is known of a twin by its code is no answer to that: twins with others may have equal code.)
_set: weakref.WeakKeyDictionary[types.FunctionType, list[Any]] = weakref.WeakKeyDictionary()


def is_twin(code: types.CodeType) -> bool:
    """Whether code is a twin, or a part of one."""
    return known_as(code) in _made


def twin_of(code: types.CodeType, names: dict[str, Any], attributes: frozenset[str]) -> Twin | None:
    """The twin of code of which some attributes are fixed (see `Twins`); None without a source."""
    with _lock:
        tapped = _tapped.get(code.co_filename, frozenset())
        key = (known_as(code), attributes, tapped)
        if key not in _twins:
            found = make_twins(code, names, attributes, tapped)
            for inner, twin in found.items():
                _twins[known_as(inner), attributes, tapped] = twin
            _twins.setdefault(key, None)
            _made.update({known_as(t.code): t for t in found.values()})
            _run.clear()
            _codes.update(id(t.code) for t in found.values())
        return _twins[key]


def call_site(frame: types.FrameType | None, function: Any) -> str | None:
    """The site of the call of a torch function that is under way; None if no tap can be set there.

    Args:
        frame: the one that the function was called from, or the function's own.
    """
    own = getattr(function, "__code__", None)
    while frame is not None and (frame.f_code is own or id(frame.f_code) in _HANDING_ON):
        frame = frame.f_back
    run = _run_in(frame)
    if frame is None or run is None or run[1] is None:
        return None
    site = _site_in(frame, run[2])
    if not _goes_to(function, run[1].calls.get(site), frame):
        return None
    return f"{frame.f_code.co_filename}|{site}"


def keeps_number(frame: types.FrameType) -> bool:
    """Whether a number that code is about to get is kept or printed, and decides nothing."""
    run = _run_in(frame)
    if run is None or run[1] is None or not run[1].kept:
        return False
    return _site_in(frame, run[2]) in run[1].kept


def may_be_handled(frame: types.FrameType | None) -> bool:
    """Whether code of the model's, in a frame or around it, may handle an exception."""
    while frame is not None:
        if id(frame.f_code) in _codes and handles(frame):
            return True
        frame = frame.f_back
    return False


def _run_in(frame: types.FrameType | None) -> _Run | None:
    """What is known of the twin that a frame runs; None where that is no twin."""
    if frame is None or id(frame.f_code) not in _codes:
        return None
    code = frame.f_code
    found = _run.get(id(code))
    if found is None or found[0] is not code:
        # A twin without a tap, of torch's own code, is equal to that.
        twin = _made.get(known_as(code)) if hasattr(code, "co_positions") else None
        found = _run[id(code)] = code, twin, {}
    return found


def _site_in(frame: types.FrameType, sites: dict[int, str]) -> str:
    """The place of what is under way in a frame that runs a twin; `sites` are known."""
    site = sites.get(frame.f_lasti)
    if site is None:
        code: Any = frame.f_code
        place = next(itertools.islice(code.co_positions(), frame.f_lasti // 2, None))
        site = sites[frame.f_lasti] = site_at(place)
    return site


def _goes_to(function: Any, name: str | None, frame: types.FrameType) -> bool:
    """Whether a function is what is called at a place, and not what another one calls in its turn.

    Args:
        name: what stands at the place: the last part of it, after "." if there is more.
    """
    if name is None:
        return False
    own = getattr(function, "__name__", "")
    *owner, last = name.split(".")
    if owner and last.strip("_") == own.strip("_"):
        return True
    if not owner:
        found = frame.f_locals.get(last, frame.f_globals.get(last))
        if last == own:  # else it is a builtin, as `abs` is, which nothing can be put before
            return found is not None
    else:
        found = getattr(frame.f_locals.get(owner[0]), "__dict__", {}).get(last)
    while isinstance(found, functools.partial):
        found = found.func
    hands_on = id(getattr(found, "__code__", None)) in _HANDING_ON
    name = getattr(found, "__name__", "")
    return own.strip("_") == name if hands_on else found is function


# A function, the code of its twin, and its own.
Resting = tuple[types.FunctionType, types.CodeType, types.CodeType]

# Tells which attributes of a method's first argument need no look where they are called.
Fixed = Callable[[types.CodeType], frozenset[str]]


class Twins:
    """The twins that one capture has set."""

    def __init__(self, fixed: Fixed = lambda code: frozenset()) -> None:
        # Of a method's code: the attributes of its first argument that are compared before each
        # pass by other means, for every module that the method may belong to.
        self._fixed = fixed
        self._mine: dict[types.FunctionType, types.CodeType] = {}  # with what each runs
        # Functions of torch's that these, and torch's own modules, call by a name, by place.
        self.watched: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        # Where these are, of how many that is known, and whether any is another one.
        self._spaces, self._spaces_of, self._renamed = DictWatch(()), 0, False

    def exchange(self, function: types.FunctionType) -> bool:
        """Have a function run its twin; False if it has none."""
        if function in self._mine and is_twin(function.__code__):
            return True
        with _lock:
            known = _set.get(function)
            original = _own_code(function)
            twin = twin_of(original, function.__globals__, self._fixed(original))
            if twin is None or twin.code.co_freevars != original.co_freevars:
                return False
            ours = is_twin(function.__code__)
            if ours and known is not None and known[2] != twin.fixed:
                return False  # another capture has set a twin that asks for other things
            if known is None or not ours:
                known = _set[function] = [0 if known is None else known[0], original, twin.fixed]
            known[1] = original  # the model's code may have given it another's, which runs a twin
            function.__code__ = twin.code
            if function not in self._mine:
                known[0] += 1
                _lend(function.__globals__)
        self._mine[function] = function.__code__
        self._watch(twin.watched)
        return True

    def watch(self, function: types.FunctionType) -> None:
        """Watch what a function of torch's own calls by a name: it has no twin."""
        kinds, names = (types.FunctionType, types.BuiltinFunctionType), function.__code__.co_names
        found = ((s, name, s.get(name)) for s in (vars(torch), vars(F)) for name in names)
        self._watch((s, name, what) for s, name, what in found if isinstance(what, kinds))

    def _watch(self, found: Iterable[tuple[dict[str, Any], str, Any]]) -> None:
        for space, name, what in found:
            self.watched.setdefault((id(space), name), (space, name, what))

    def rest(self) -> list[Resting]:
        """Give every function its own code back, unless another capture wants its twin.

        Returns what to `wake`: to look a twin up takes a hash of its original, and that a look at
        all of its instructions.
        """
        found = []
        with _lock:
            for function, twin in self._mine.items():
                known = _set.get(function)
                if known is None:
                    continue
                now = function.__code__
                own = known[1] if now is twin else _own_code(function)
                found.append((function, twin, known[1]) if own is now else (function, now, own))
                known[0] -= 1
                _take_back(function.__globals__)
                if not known[0]:
                    del _set[function]
                    function.__code__ = own
        self._mine.clear()
        return found

    def wake(self, resting: Iterable[Resting]) -> None:
        """Have them run their twins again; one that has other code by now records no more."""
        for function, twin, original in resting:
            with _lock:
                if function not in _set and function.__code__ is original:
                    _set[function] = [1, original, _made[known_as(twin)].fixed]
                    function.__code__ = twin
                    _lend(function.__globals__)
                    self._mine[function] = twin
                    continue
            self.exchange(function)

    def tap(self, sites: Iterable[str]) -> None:
        """Have calls at some places ask for a tap (see `recorders.tapped`)."""
        added: dict[str, set[str]] = {}
        for site in sites:
            file, _, place = site.rpartition("|")
            if place not in _tapped.get(file, ()):
                added.setdefault(file, set()).add(place)
        if not added:
            return
        with _lock:
            for file, places in added.items():
                _tapped[file] = _tapped.get(file, frozenset()) | places
            for function, (_, original, fixed) in list(_set.items()):  # other captures' ones, too
                if original.co_filename in added and is_twin(function.__code__):
                    code, names = _own_code(function), function.__globals__
                    twin = twin_of(code, names, fixed)
                    if twin is not None:
                        function.__code__ = twin.code
                        if function in self._mine:
                            self._mine[function] = twin.code

    def set_again(self) -> None:
        """Have functions run twins that were given other code since: `f.__code__ = g.__code__`."""
        # Asked in each pass: in C.
        if any(map(operator.is_not, map(_code_of, self._mine), self._mine.values())):
            for function, code in list(self._mine.items()):
                if function.__code__ is not code:
                    self.exchange(function)

    def exchange_all(self, codes: Sequence[tuple[types.CodeType, dict[str, Any]]]) -> None:
        """The same for whatever functions there are that run some code, each with its globals."""
        for code, names in codes:
            function = _named(code, names)
            if function is not None:
                self.exchange(function)
        for function in functions_of([code for code, _ in codes]):
            self.exchange(function)

    def renamed(self) -> bool:
        """Whether a name in one of torch's modules stands for something else than it did."""
        if len(self.watched) != self._spaces_of:
            self._spaces = DictWatch(space for space, _, _ in self.watched.values())
            self._spaces_of = len(self.watched)
        if self.watched and self._spaces.written():
            spaces, names, what = zip(*self.watched.values(), strict=True)  # in C
            self._renamed = any(map(operator.is_not, map(dict.get, spaces, names), what))
        return self._renamed

    def names_read(self) -> frozenset[str]:
        """What the code reads, as an attribute, a global or a string."""
        twins = [_made.get(known_as(function.__code__)) for function in self._mine]
        return frozenset().union(*[twin.loads for twin in twins if twin is not None])

    def functions(self) -> list[types.FunctionType]:
        """Those that run twins for this capture."""
        return list(self._mine)

    def clear(self) -> None:
        """The same for good."""
        self.rest()
        self.watched.clear()
        self._spaces_of, self._renamed = 0, False


def _own_code(function: types.FunctionType) -> types.CodeType:
    """The code that a function would have without us: the model's code may give it another's."""
    code = function.__code__
    twin, known = _made.get(known_as(code)), _set.get(function)
    if twin is None:
        return code
    if known is not None and known_as(known[1]) == known_as(twin.original):
        original: types.CodeType = known[1]
        return original
    return twin.original


# Globals in which twins find their recorders, as torch.compile can trace it, and for how many.
_lent = Counter[int]()


def _lend(names: dict[str, Any]) -> None:
    if not _lent[id(names)]:
        names.update(RECORDERS)
    _lent[id(names)] += 1


def _take_back(names: dict[str, Any]) -> None:
    _lent[id(names)] -= 1
    if not _lent[id(names)]:
        del _lent[id(names)]
        for name in RECORDERS:
            names.pop(name, None)


def functions_of(codes: Sequence[types.CodeType]) -> list[types.FunctionType]:
    """Every function that runs some code; it takes a look at all objects that there are."""
    wanted = {id(code) for code in codes}
    holders = gc.get_referrers(*codes) if codes else ()
    found = [h for h in holders if isinstance(h, types.FunctionType) and id(h.__code__) in wanted]
    return list({id(function): function for function in found}.values())


def _named(code: types.CodeType, names: dict[str, Any]) -> types.FunctionType | None:
    """The function that runs some code, if it is there by its name: `gc.freeze` hides it."""
    first, *rest = qualified_name(code).split(".")
    found: Any = names.get(first)
    for part in rest:
        found = vars(found).get(part) if isinstance(found, type) else None
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, (staticmethod, classmethod)):
        found = found.__func__
    while type(found) is types.FunctionType and found.__code__ is not code:
        found = found.__dict__.get("__wrapped__")
    return found if type(found) is types.FunctionType else None
