"""What one capture consists of: each part is made here, once, from those that it needs.

What a part is given has the same name there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fmapkit.instrumentation import Hooks
from fmapkit.missed import MissedLog
from fmapkit.paths import ControlPaths
from fmapkit.replay import ReplayRegions
from fmapkit.session.config import CaptureConfig
from fmapkit.session.fused_paths import FusedPaths
from fmapkit.session.hook_installer import HookCallbacks, HookInstaller
from fmapkit.session.kept_maps import KeptMaps
from fmapkit.session.recording import Recorder
from fmapkit.session.redistribution import RedistributionTracker
from fmapkit.session.region_calls import RegionCalls
from fmapkit.session.state import PassState
from fmapkit.session.unseen import UnseenCalls
from fmapkit.storage import Budget, PassStore

__all__ = ["SessionParts"]


@dataclass(frozen=True, slots=True)
class SessionParts:
    """The parts of one capture.

    Attributes:
        asked: by the capture.
        live: what is under way.
        misses: what ran and was not captured.
        store: where passes are kept.
        hooks: what is set on modules.
        paths: which decisions passes take.
        regions: which modules are replayed as a whole.
        installer: sets hooks, and removes them.
        recorder: makes the plans of regions.
        region_calls: reads regions by their plans.
        kept_maps: what becomes of the maps of a pass.
        redistribution: follows tensors through hooks of others that only move data.
        fused: runs modules by their fused paths.
        unseen: names what runs outside of passes.
    """

    asked: CaptureConfig
    live: PassState
    misses: MissedLog
    store: PassStore
    hooks: Hooks
    paths: ControlPaths
    regions: ReplayRegions
    installer: HookInstaller
    recorder: Recorder
    region_calls: RegionCalls
    kept_maps: KeptMaps
    redistribution: RedistributionTracker
    fused: FusedPaths
    unseen: UnseenCalls

    @staticmethod
    def of(
        asked: CaptureConfig,
        hooks: Hooks,
        keep: int | None,
        budget: Budget | None,
        callbacks: Callable[[], HookCallbacks],
    ) -> SessionParts:
        """The parts of a capture.

        Args:
            asked: by it.
            hooks: of it.
            keep: how many passes stay readable; None for all of them.
            budget: how many bytes the maps may take; None for any.
            callbacks: what hooks call; asked for as they are set.
        """

        def running() -> list[nn.Module]:
            tracer = live.tracer
            return [frame.module for frame in tracer.trace.frames] if tracer is not None else []

        misses = MissedLog(asked.model)
        store = PassStore(keep)
        paths = ControlPaths(asked.model, asked.names.place_of, running)
        live = PassState(asked, misses, paths)
        # Code that has not recorded yet takes a pass more, which stop= would have ended early.
        barring = hooks.others_on if asked.stop is not None else hooks.unrecorded_on
        regions = ReplayRegions(hooks.others_on, barring)
        redistribution = RedistributionTracker(live)
        installer = HookInstaller(asked, hooks, regions, redistribution, callbacks)
        recorder = Recorder(asked, live, misses, regions, installer, paths)
        kept_maps = KeptMaps(asked, live, misses, store, budget)
        region_calls = RegionCalls(
            asked, live, misses, regions, installer, recorder, kept_maps, paths
        )

        def fault(module: nn.Module, error: Exception) -> None:
            callbacks().fault(module, error)

        fused = FusedPaths(asked, live, hooks, misses, paths, fault)
        unseen = UnseenCalls(asked, misses)
        return SessionParts(
            *(asked, live, misses, store, hooks, paths, regions, installer, recorder, region_calls),
            *(kept_maps, redistribution, fused, unseen),
        )
