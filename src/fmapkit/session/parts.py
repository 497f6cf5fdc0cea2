"""What one capture consists of: each part is made here, once, from those that it needs.

What a part is given has the same name there.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fmapkit.instrumentation import Hooks
from fmapkit.missed import MissedLog
from fmapkit.paths import ControlPaths
from fmapkit.replay import ReplayRegions
from fmapkit.session.apart import ApartCalls
from fmapkit.session.config import CaptureConfig
from fmapkit.session.fused_paths import FusedPaths
from fmapkit.session.hook_installer import HookCallbacks, HookInstaller
from fmapkit.session.kept_maps import KeptMaps
from fmapkit.session.recording import Recorder
from fmapkit.session.region_calls import RegionCalls
from fmapkit.session.state import PassState
from fmapkit.session.unseen import UnseenCalls
from fmapkit.storage import Budget, PassStore


class SessionParts:
    """The parts of one capture; what hooks call is asked for as they are set."""

    def __init__(
        self,
        asked: CaptureConfig,
        hooks: Hooks,
        keep: int | None,
        budget: Budget | None,
        callbacks: Callable[[], HookCallbacks],
    ) -> None:
        def running() -> list[nn.Module]:
            tracer = live.tracer
            return [frame.module for frame in tracer.trace.frames] if tracer is not None else []

        self.asked, self.hooks = asked, hooks
        self.misses = misses = MissedLog(asked.model)  # what ran and was not captured
        self.store = PassStore(keep)
        # Which decisions passes take.
        self.paths = paths = ControlPaths(asked.model, asked.names.place_of, running)
        self.live = live = PassState(asked, misses, paths)  # what is under way
        # Code that has not recorded yet takes a pass more, which stop= would have ended early.
        barring = hooks.others_on if asked.stop is not None else hooks.unrecorded_on
        # Which modules are replayed as a whole.
        self.regions = regions = ReplayRegions(hooks.others_on, barring)
        self.installer = HookInstaller(live, hooks, regions, callbacks)
        self.recorder = Recorder(live, regions, self.installer)
        self.kept_maps = KeptMaps(live, self.store, budget)
        told = self.installer, self.recorder, self.kept_maps
        self.region_calls = RegionCalls(live, regions, *told)
        # Runs modules by their fused paths.
        self.fused = FusedPaths(live, hooks, lambda *told: callbacks().fault(*told))
        self.unseen = UnseenCalls(asked, misses)  # names what runs outside of passes
        self.apart = ApartCalls(live, self.unseen)  # looks away from what runs apart
