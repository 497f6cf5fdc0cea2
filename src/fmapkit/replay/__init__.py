"""A traced call compiled to taps, and one later call read with them."""

from fmapkit.replay.call_taps import can_stand
from fmapkit.replay.effects import ChannelLabelRef, Effects, PassPiece, Ref, Relations, SiteMap
from fmapkit.replay.escapes import EscapedTensors
from fmapkit.replay.gradient_taps import GradientOutputTap, GradientTap
from fmapkit.replay.model_guard import ModelGuard
from fmapkit.replay.plan import Plan, make_plan
from fmapkit.replay.regions import ReplayRegion, ReplayRegions, carried, shape_of, sizes_of
from fmapkit.replay.run import LightMode, ReplayRun
from fmapkit.replay.taps import CurrentRun, KeepingTap, OutputTap, OutsideHook, Tap

__all__ = [
    "ChannelLabelRef",
    "CurrentRun",
    "Effects",
    "EscapedTensors",
    "GradientOutputTap",
    "GradientTap",
    "KeepingTap",
    "LightMode",
    "ModelGuard",
    "OutputTap",
    "OutsideHook",
    "PassPiece",
    "Plan",
    "Ref",
    "Relations",
    "ReplayRegion",
    "ReplayRegions",
    "ReplayRun",
    "SiteMap",
    "Tap",
    "can_stand",
    "carried",
    "make_plan",
    "shape_of",
    "sizes_of",
]
