"""Warnings that point at the user's own line."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

import torch

from fmapkit.errors import CaptureWarning

# What runs between a user's line and ours: a module's call, a decorator, a context manager's exit.
_INSIDE = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep for file in (__file__, torch.__file__)
)
_CONTEXTS = os.path.abspath(contextlib.__file__)


def warn(message: str) -> None:
    """Give a `CaptureWarning` whose place is the innermost line outside of fmapkit and torch."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and _inside(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, CaptureWarning, stacklevel=level)


def _inside(file: str) -> bool:
    return file.startswith(_INSIDE) or file == _CONTEXTS
