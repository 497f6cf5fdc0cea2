"""Hooks and call overrides: set, suspended and removed in one place."""

from fmapkit.instrumentation.hook import Hook as Hook
from fmapkit.instrumentation.hook import nothing as nothing
from fmapkit.instrumentation.hook_registry import Hooks as Hooks
from fmapkit.instrumentation.hook_registry import Off as Off
from fmapkit.instrumentation.methods import Methods as Methods
from fmapkit.instrumentation.methods import method_called as method_called
from fmapkit.instrumentation.methods import methods_of as methods_of
from fmapkit.instrumentation.own_work import without_the_models as without_the_models
from fmapkit.instrumentation.pair import FAILED as FAILED
from fmapkit.instrumentation.pair import Returned as Returned
