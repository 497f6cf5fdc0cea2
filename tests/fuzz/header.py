"""What every program begins with: imports, and the classes and functions that it decides with."""

__all__ = ["HEADER"]

HEADER = """\
import contextlib
import contextvars
import enum
import functools
import itertools
import json
import operator
import os
import random
import threading
import types
import weakref
from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from dataclasses import dataclass
from functools import partial, reduce
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Odd(Exception):
    pass


def check(v):
    if v:
        raise Odd(v)


class Swallow:
    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        return kind is not None and issubclass(kind, Odd)


@contextlib.contextmanager
def quiet():
    try:
        yield
    except Odd:
        pass


class Chooser:
    def __init__(self, v):
        self.v = v

    def __enter__(self):
        return self.v > 0

    def __exit__(self, *_):
        return False


class Left:
    pass


class Right(Left):
    pass


class Mode(enum.Enum):
    A = 0
    B = 1
    C = 2


@dataclass
class Config:
    k: int = 0


class Dynamic:
    def __init__(self, value):
        self.value = value

    def __getattr__(self, name):
        if name != 'whatever':
            raise AttributeError(name)
        return self.value


class Slotted:
    __slots__ = ('value',)

    def __init__(self, value):
        self.value = value


class Knob:
    def __get__(self, obj, kind=None):
        return self if obj is None else obj.__dict__.get('_knob', 0)


class Pick:
    def __init__(self, *names):
        self.names = names

    def __get__(self, obj, kind=None):
        return self if obj is None else getattr(obj, self.names[obj.__dict__.get('_second', 0)])


class Cycle:
    def __init__(self, values):
        self.values = values
        self.at = -1

    def __next__(self):
        self.at += 1
        return self.values[self.at % len(self.values)]


class Value:
    def __init__(self, v):
        self.v = v

    def __bool__(self):
        return bool(self.v)

    def __len__(self):
        return self.v

    def __eq__(self, other):
        return self.v == other

    def __hash__(self):
        return 0

    def __lt__(self, other):
        return self.v < other

    def __contains__(self, other):
        return self.v == other

    def __index__(self):
        return self.v

    def __int__(self):
        return self.v

    def __getitem__(self, key):
        return self.v

    def __call__(self):
        return self.v

    def __add__(self, other):
        return self.v + other

    def __iter__(self):
        yield self.v

    def __str__(self):
        return str(self.v)

    def __format__(self, spec):
        return str(self.v)


class Box:
    def __init__(self, x, v):
        self.x = x
        self.v = v

    def __add__(self, m):
        return Box(T.call(m, self.x), self.v)

    def __matmul__(self, ms):
        return Box(T.call(ms[1 if self.v else 0], self.x), self.v)

    def __getitem__(self, ms):
        return self @ ms

    def __call__(self, m, act):
        return Box(T.call(act, T.call(m, self.x)), self.v) if self.v else self

    def __rshift__(self, m):
        return self + m if self.v else self

    def __neg__(self):
        return Box(T.sig('relu', lambda t: F.relu(t), self.x), self.v)


class Rotating(nn.ModuleList):
    turn = 0

    def __iter__(self):
        self.turn += 1
        return iter(list(self.children())[:: 1 if self.turn % 2 else -1])


class Picky(nn.ModuleList):
    turn = 0

    def __getitem__(self, i):
        if isinstance(i, int):
            self.turn += 1
            return super().__getitem__((i + self.turn) % len(self))
        return super().__getitem__(i)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class HandSwish(nn.Module):
    def forward(self, x):
        return x * (x + 3).clamp(0, 6) / 6


class Bent(nn.Module):
    def forward(self, x):
        return torch.where(x > 0, x, 0.1 * x)


class Missing(dict):
    other = 0

    def __missing__(self, key):
        return self.other


class Checks(type):
    answer = False

    def __instancecheck__(cls, obj):
        return cls.answer


class Checked(metaclass=Checks):
    pass


@functools.singledispatch
def kind_of(v):
    return 2


@kind_of.register
def _(v: Left):
    return 0


@kind_of.register
def _(v: Right):
    return 1


class RootMeanSquare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * x.pow(2).mean(-1, keepdim=True).add(0.1).rsqrt() * self.weight


class Stored:
    pass


Pair = namedtuple('Pair', 'p q')
KEPT = {}
LOCAL = threading.local()
VARIABLE = contextvars.ContextVar('VARIABLE', default=None)


def elsewhere(f):
    found = []

    def run():
        with torch.no_grad():
            found.append(f())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def twice(f):
    @functools.wraps(f)
    def run(self, x):
        return f(self, f(self, x))
    return run


def maybe(f):
    @functools.wraps(f)
    def run(self, x):
        if self.turns == 1:
            self.turns = 0
            return x
        return f(self, x)
    return run


def plain(f):
    def run(*args, **kwargs):
        return f(*args, **kwargs)
    return run


def of(model, kind):
    return [m for m in model.modules() if type(m) is kind]


def put(d, v):
    d.clear()
    if v:
        d['k'] = v


def cell(v=0):
    def get():
        return v

    def set(new):
        nonlocal v
        v = new
    return get, set
"""
