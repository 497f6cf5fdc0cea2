"""Rewriting: what the code of a twin is, made from the source of a function.

    twin_source.make_twins      the twins of functions, each made once
        source_files            the file, and the function in it, that code is of
        rewrite.Rewriter        the same code with a recorder at each decision
            calls.CallRewriting         … what is called, and what that is given
            inserting.Inserting … marks, looks at a value on its way, and where Python picks
            library_calls       … what functions of Python's own library go by
            kept_numbers        … but not what is only kept or printed
        torch_calls             calls in torch's own transformer layers
        syntax                  questions to a syntax tree

No recorder is known here but by its name: what they do is in `paths/recorders.py`.
"""

from fmapkit.paths.rewriting.source_files import Code as Code
from fmapkit.paths.rewriting.source_files import known_as as known_as
from fmapkit.paths.rewriting.source_files import qualified_name as qualified_name
from fmapkit.paths.rewriting.syntax import MARK as MARK
from fmapkit.paths.rewriting.syntax import site_at as site_at
from fmapkit.paths.rewriting.torch_calls import FLOATS_ARE_IDLE as FLOATS_ARE_IDLE
from fmapkit.paths.rewriting.torch_calls import ONLY_ZERO_DECIDES as ONLY_ZERO_DECIDES
from fmapkit.paths.rewriting.twin_source import Twin as Twin
from fmapkit.paths.rewriting.twin_source import make_twins as make_twins
