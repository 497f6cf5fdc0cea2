"""A traced call compiled to taps, and one later call read with them."""

from fmapkit.replay.call_taps import can_stand, tap_of
from fmapkit.replay.effects import ChannelLabelRef, Effects, PassPiece, Ref, Relations, SiteMap
from fmapkit.replay.escapes import EscapedTensors
from fmapkit.replay.light_mode import LightMode
from fmapkit.replay.model_guard import ModelGuard
from fmapkit.replay.plan import Plan
from fmapkit.replay.planning import make_plan
from fmapkit.replay.regions import ReplayRegion, ReplayRegions, carried, shape_of, sizes_of
from fmapkit.replay.run import ReplayRun
from fmapkit.replay.taps import CurrentRun

__all__ = [
    "ChannelLabelRef",
    "CurrentRun",
    "Effects",
    "EscapedTensors",
    "LightMode",
    "ModelGuard",
    "PassPiece",
    "Plan",
    "Ref",
    "Relations",
    "ReplayRegion",
    "ReplayRegions",
    "ReplayRun",
    "SiteMap",
    "can_stand",
    "carried",
    "make_plan",
    "shape_of",
    "sizes_of",
    "tap_of",
]
