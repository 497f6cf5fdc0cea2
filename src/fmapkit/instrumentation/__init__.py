"""Hooks and call overrides: set, suspended and removed in one place."""

from fmapkit.instrumentation.hook import Hook, nothing
from fmapkit.instrumentation.hooks import Hooks, Off, hooks_on
from fmapkit.instrumentation.methods import Methods, method_called, methods_of
from fmapkit.instrumentation.pair import FAILED, Pair
from fmapkit.instrumentation.unwatched import without_the_models

__all__ = [
    "FAILED",
    "Hook",
    "Hooks",
    "Methods",
    "Off",
    "Pair",
    "hooks_on",
    "method_called",
    "methods_of",
    "nothing",
    "without_the_models",
]
