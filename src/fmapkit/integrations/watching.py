"""The capture around a training, whoever runs it: opened, read from time to time, closed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn

from fmapkit._warnings import warn
from fmapkit.analysis import Analysis, DeadFilters, Statistics
from fmapkit.capture import capture as open_capture
from fmapkit.errors import (
    ArgumentError,
    check_flags,
    check_positive,
    did_you_mean,
    listed,
    near,
)
from fmapkit.integrations.nonfinite import FirstNonFinite

if TYPE_CHECKING:
    from fmapkit.integrations.logs import Log
    from fmapkit.maps import FeatureMap, FeatureMaps


class _Shown:
    """Shows an analysis the passes it is for, and notes that there was one at all."""

    def __init__(self, watching: Watching, analysis: Analysis, evaluation: bool) -> None:
        self._watching = watching
        self._analysis = analysis
        self._evaluation = evaluation

    def update(self, fm: FeatureMap) -> None:
        self._watching._seen = True
        if fm.training or self._evaluation:
            self._analysis.update(fm)


class Watching:
    """What the callbacks have in common; each calls these as its trainer tells it to."""

    def __init__(
        self,
        analyses: Analysis | Iterable[Analysis] | None = None,
        *,
        log: Log | None = None,
        log_every: int = 50,
        evaluation: bool = False,
        window: bool = True,
        **capture: Any,
    ) -> None:
        check_positive(log_every=log_every)
        check_flags(evaluation=evaluation, window=window)
        if analyses is None:
            analyses = [Statistics(bins="log2"), DeadFilters(), FirstNonFinite()]
        several = isinstance(analyses, Iterable) and not isinstance(analyses, Analysis)
        self.analyses: list[Analysis] = list(analyses) if several else [analyses]  # type: ignore
        # None before training has begun; with `keep=0`, the default, they tell what was missed.
        self.maps: FeatureMaps | None = None
        self._seen = False
        self._log = log
        self._log_every = log_every
        self._window = window
        shown = [_Shown(self, analysis, evaluation) for analysis in self.analyses]
        self._options = {"keep": 0, **_checked(capture), "analyses": shown}
        # Wrong values fail here, and not when the training begins.
        open_capture(nn.Identity(), **{k: v for k, v in self._options.items() if k in _GENERAL})
        self._open = ExitStack()
        self._written = 0
        self._told = False

    def _begin(self, model: nn.Module, step: int) -> None:
        """Open the capture; one that is open still, as after an error, is closed first."""
        self._end()
        self._seen, self._written, self._told = False, step, False
        self.maps = self._open.enter_context(open_capture(model, **self._options))

    def _end(self) -> None:
        """Close the capture, if it is open."""
        self._open.close()

    def _write(self, log: Log | None, step: int, *, last: bool = False) -> None:
        """Write what the analyses know, if it is time to, and begin the next window.

        Args:
            step: how many optimiser steps there have been.
            last: it is time if there has been any since the last writing.
        """
        if step - self._written < (1 if last else self._log_every):
            return
        self._written = step
        if log is not None:
            log.write(self.analyses, step)
        self._tell(step)
        if self._window:
            for analysis in self.analyses:
                if isinstance(analysis, Statistics):
                    analysis.reset()

    def _tell(self, step: int) -> None:
        """Warn, once, of the first NaN."""
        for analysis in self.analyses:
            if isinstance(analysis, FirstNonFinite) and not self._told and analysis.found:
                self._told = True
                found = analysis.found
                more = f", and in {len(found) - 1} maps after it" if len(found) > 1 else ""
                warn(f"a NaN or an infinity, seen at step {step}: first in {found[0]}{more}")


# What of capture's arguments can be judged without the model.
_GENERAL = frozenset({"kinds", "keep", "every", "analyses", "dtype", "device", "max_bytes"})


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    known = [name for name in inspect.signature(open_capture).parameters if name != "model"]
    for name in options:
        if name not in known or name == "analyses":
            raise ArgumentError(
                f"capture has no argument {name!r}{did_you_mean(name, known)} (it has "
                f"{listed(known, 20)})",
                candidates=near(name, known) or known,
            )
    return options
