"""Control paths: which decisions a pass took, and whether another pass took the same ones.

    control.ControlPaths            what one capture knows, and what it has set
        twins.Twins                 functions run twins of their code while the block is open
            rewriting/              … which are made here
        recorders                   what a twin calls at each decision
            items                   … an item of a plain value, or of a callable; what a call runs
            elements                … of what Python goes through
        sinks.DecisionSink          where the decisions of this thread's pass go
        branches                    what bytecode says of a branch, and of an exception
        survey.Survey               which functions ran that do not record yet
    known_paths.KnownPaths          the paths of one kind of call, each with its plan
        number_rules                numbers that follow the sizes of the inputs

If a pass takes the decisions of an earlier one, on inputs of the same form, in the same modes, of a
model of the same structure, it makes the same calls of torch on the same tensors.
"""

from fmapkit.paths.branches import only_raises
from fmapkit.paths.control import ControlPaths
from fmapkit.paths.known_paths import Expected, KnownPaths
from fmapkit.paths.number_rules import Sizes, by_rule, rules_of, same_but_for_numbers
from fmapkit.paths.recorders import taps
from fmapkit.paths.sinks import unrecorded
from fmapkit.paths.survey import runs_own_code
from fmapkit.paths.twins import Resting, keeps_number, may_be_handled

__all__ = [
    "ControlPaths",
    "Expected",
    "KnownPaths",
    "Resting",
    "Sizes",
    "by_rule",
    "keeps_number",
    "may_be_handled",
    "only_raises",
    "rules_of",
    "runs_own_code",
    "same_but_for_numbers",
    "taps",
    "unrecorded",
]
