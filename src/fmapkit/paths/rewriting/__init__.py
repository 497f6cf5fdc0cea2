"""Rewriting: what the code of a twin is, made from the source of a function.

No recorder is known here but by its name: what they do is in `paths/recorders.py`.
"""

from fmapkit.paths.rewriting.source_files import Code as Code
from fmapkit.paths.rewriting.source_files import known_as as known_as
from fmapkit.paths.rewriting.source_files import qualified_name as qualified_name
from fmapkit.paths.rewriting.syntax import DECIDING as DECIDING
from fmapkit.paths.rewriting.syntax import MARK as MARK
from fmapkit.paths.rewriting.syntax import site_at as site_at
from fmapkit.paths.rewriting.torch_calls import FLOATS_ARE_IDLE as FLOATS_ARE_IDLE
from fmapkit.paths.rewriting.torch_calls import ONLY_ZERO_DECIDES as ONLY_ZERO_DECIDES
from fmapkit.paths.rewriting.twin_source import Twin as Twin
from fmapkit.paths.rewriting.twin_source import make_twins as make_twins
