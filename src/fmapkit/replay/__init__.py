"""A traced call compiled to taps, and one later call read with them.

make_plan             planning.py     from the record of a traced call: a Plan (plan.py)
  Reading             plan_steps.py   which hook points are tapped, and what is read at each
  Relations, Effects  effects.py      what the call means to the rest of a pass
ReplayRegions         regions.py      which modules are replayed as a whole; kinds of calls
  shape_of, sizes_of  call_form.py    what tells calls apart that are given other arguments
fill_of               caches.py      how much is in the caches that a call may fill
KeptState             kept_state.py  the form of what is kept of earlier passes (escapes.py)
InputTruths           input_truths.py  what calls read of their inputs, known before them
Probation             probation.py   modules that left their path, until they take one for long
AttributeGuard        attribute_guard.py  plain attributes, compared before each call
ModelGuard            model_guard.py  is the model the one that was traced?
ReplayRun             run.py          one call: what it notes is compared with the plan
  RunLog              run_log.py      what was noted, and the maps that it stands for
  taps                taps.py         hooks; call_taps.py: before the calls of modules;
                                      site_taps.py: where calls of functions are written
  LightMode           light_mode.py   σ in torch's own code, where no tap can be set
"""

from fmapkit.replay.caches import Fill, fill_of, has_more
from fmapkit.replay.call_form import carried, shape_of, sizes_of
from fmapkit.replay.call_taps import can_stand, tap_of
from fmapkit.replay.effects import ChannelLabelRef, Effects, PassPiece, Ref, Relations, SiteMap
from fmapkit.replay.escapes import EscapedTensors
from fmapkit.replay.input_truths import InputTruths, Truths
from fmapkit.replay.light_mode import LightMode
from fmapkit.replay.model_guard import ModelGuard
from fmapkit.replay.plan import KernelSteps, Plan
from fmapkit.replay.planning import make_plan
from fmapkit.replay.regions import ReplayRegion, ReplayRegions
from fmapkit.replay.run import ReplayRun
from fmapkit.replay.site_taps import PlainSite
from fmapkit.replay.taps import CurrentRun

__all__ = [
    "ChannelLabelRef",
    "CurrentRun",
    "Effects",
    "EscapedTensors",
    "Fill",
    "InputTruths",
    "KernelSteps",
    "LightMode",
    "ModelGuard",
    "PassPiece",
    "PlainSite",
    "Plan",
    "Ref",
    "Relations",
    "ReplayRegion",
    "ReplayRegions",
    "ReplayRun",
    "SiteMap",
    "Truths",
    "can_stand",
    "carried",
    "fill_of",
    "has_more",
    "make_plan",
    "shape_of",
    "sizes_of",
    "tap_of",
]
