"""Activation patching: maps of one run put into another, one at a time, and what that changes.

patch(model, clean, corrupted)   _run.py       layers by positions by filters, piece by piece
  Runs                           _edited_runs.py one run for each piece, by edits
Patching                         _result.py    the metric of each run; its picture
"""

from fmapkit.patching._result import Patching
from fmapkit.patching._run import patch

__all__ = ["Patching", "patch"]
