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
"""

from fmapkit.replay.caches import Fill as Fill
from fmapkit.replay.caches import fill_of as fill_of
from fmapkit.replay.caches import has_more as has_more
from fmapkit.replay.call_form import carried as carried
from fmapkit.replay.call_form import shape_of as shape_of
from fmapkit.replay.call_form import sizes_of as sizes_of
from fmapkit.replay.call_taps import can_stand as can_stand
from fmapkit.replay.call_taps import tap_of as tap_of
from fmapkit.replay.effects import ChannelLabelRef as ChannelLabelRef
from fmapkit.replay.effects import Effects as Effects
from fmapkit.replay.effects import PassPiece as PassPiece
from fmapkit.replay.effects import Ref as Ref
from fmapkit.replay.effects import Relations as Relations
from fmapkit.replay.effects import SiteMap as SiteMap
from fmapkit.replay.escapes import EscapedTensors as EscapedTensors
from fmapkit.replay.input_truths import InputTruths as InputTruths
from fmapkit.replay.input_truths import Truths as Truths
from fmapkit.replay.model_guard import ModelGuard as ModelGuard
from fmapkit.replay.plan import KernelSteps as KernelSteps
from fmapkit.replay.plan import Plan as Plan
from fmapkit.replay.planning import make_plan as make_plan
from fmapkit.replay.regions import ReplayRegion as ReplayRegion
from fmapkit.replay.regions import ReplayRegions as ReplayRegions
from fmapkit.replay.run import ReplayRun as ReplayRun
from fmapkit.replay.site_taps import LightMode as LightMode
from fmapkit.replay.site_taps import PlainSite as PlainSite
from fmapkit.replay.taps import CurrentRun as CurrentRun
