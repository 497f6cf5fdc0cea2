"""One `with` block: when a pass begins and ends, who answers a module's call, what is missed.

Session           session.py         open, close; its parts: parts.py
  HookDispatcher  dispatch.py        each call of a module -> who answers: answers.py
  CompiledCalls   compiled_calls.py  each call of compiled code
  Passes          passes.py          when a pass begins and ends; what is under way: state.py
  recording       recording.py       a call under the tracer, which leaves a plan
  region_calls    region_calls.py    guards; taps; the path compared as the call ends
  kept_maps       kept_maps.py       what becomes of the maps
  fused paths     fused_paths.py     a module runs by its fused path
  analyses        analyses.py        who is shown them
  hooks           hook_installer.py  which of ours stand where
  other captures  concurrent.py
  other blocks    resting.py         the next block goes on with what was learned
  out of sight    unseen.py          code that no hook of a pass sees
"""

from fmapkit.session.analyses import Analyses as Analyses
from fmapkit.session.analyses import Analysis as Analysis
from fmapkit.session.config import CaptureConfig as CaptureConfig
from fmapkit.session.resting import EndedBlock as EndedBlock
from fmapkit.session.resting import RestingSession as RestingSession
from fmapkit.session.resting import request_of as request_of
from fmapkit.session.resting import resting_session as resting_session
from fmapkit.session.session import Rest as Rest
from fmapkit.session.session import Session as Session
