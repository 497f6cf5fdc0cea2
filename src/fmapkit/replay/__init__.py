"""A traced call compiled to taps, and one later call read with them."""

from fmapkit.replay.call_taps import can_stand, tap_of
from fmapkit.replay.escapes import EscapedTensors
from fmapkit.replay.model_guard import ModelGuard
from fmapkit.replay.plan import Plan, Ref
from fmapkit.replay.planning import make_plan
from fmapkit.replay.regions import ReplayRegion, ReplayRegions, carried, shape_of, sizes_of
from fmapkit.replay.run import LightMode, ReplayRun, tag_outputs
from fmapkit.replay.taps import CurrentRun

__all__ = [
    "CurrentRun",
    "EscapedTensors",
    "LightMode",
    "ModelGuard",
    "Plan",
    "Ref",
    "ReplayRegion",
    "ReplayRegions",
    "ReplayRun",
    "can_stand",
    "carried",
    "make_plan",
    "shape_of",
    "sizes_of",
    "tag_outputs",
    "tap_of",
]
