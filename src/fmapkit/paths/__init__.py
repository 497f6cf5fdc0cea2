"""Control paths: which decisions a pass took, and whether another pass took the same ones.

If a pass takes the decisions of an earlier one, on inputs of the same form, in the same modes, of a
model of the same structure, it makes the same calls of torch on the same tensors.
"""

from fmapkit.paths.branches import only_raises as only_raises
from fmapkit.paths.control import ControlPaths as ControlPaths
from fmapkit.paths.known_paths import Expected as Expected
from fmapkit.paths.known_paths import KnownPaths as KnownPaths
from fmapkit.paths.number_rules import Sizes as Sizes
from fmapkit.paths.number_rules import by_rule as by_rule
from fmapkit.paths.number_rules import differences as differences
from fmapkit.paths.number_rules import rules_of as rules_of
from fmapkit.paths.recorders import taps as taps
from fmapkit.paths.recorders import tells_of_calls as tells_of_calls
from fmapkit.paths.sinks import unrecorded as unrecorded
from fmapkit.paths.sinks import when_unrecorded as when_unrecorded
from fmapkit.paths.survey import runs_own_code as runs_own_code
from fmapkit.paths.twins import Resting as Resting
from fmapkit.paths.twins import keeps_number as keeps_number
from fmapkit.paths.twins import may_be_handled as may_be_handled
