"""Activation patching: maps of one run put into another, one at a time, and what that changes."""

from fmapkit.patching._result import Patching
from fmapkit.patching._run import patch

__all__ = ["Patching", "patch"]
