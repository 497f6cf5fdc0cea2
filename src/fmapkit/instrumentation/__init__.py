"""Hooks and call overrides: set, suspended and removed in one place."""

from fmapkit.instrumentation.hook import Hook, nothing
from fmapkit.instrumentation.hook_registry import Hooks, Off, hooks_on
from fmapkit.instrumentation.methods import Methods, method_called, methods_of
from fmapkit.instrumentation.own_work import without_the_models
from fmapkit.instrumentation.pair import FAILED, Pair

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
