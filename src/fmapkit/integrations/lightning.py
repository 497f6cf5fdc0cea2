"""`LightningCallback`: analyses while Lightning trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fmapkit.errors import ArgumentError, CaptureWarning, did_you_mean, listed, near
from fmapkit.integrations.logs import Log, TensorBoardLog, WandbLog
from fmapkit.integrations.reading import Readings
from fmapkit.integrations.watching import Watching

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
except ImportError:
    try:
        from pytorch_lightning import Callback
        from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
    except ImportError as error:
        raise ImportError("LightningCallback needs Lightning: pip install lightning") from error

if TYPE_CHECKING:
    from torch import nn

    from fmapkit.analysis import Analysis


class LightningCallback(Watching, Callback):  # type: ignore[misc]
    """Captures a module while Lightning trains it, and logs what the analyses know.

    ```python
    trainer = Trainer(callbacks=[LightningCallback()], logger=TensorBoardLogger("runs"))
    trainer.fit(module, loader)
    ```

    The capture is open from the start of training to its end, however it ends. Readings go to the
    trainer's loggers: TensorBoard and W&B get scalars, histograms and sentences, all others get
    the scalars by `log_metrics`. With several ranks, each one's analyses see its own batches, and
    rank 0 writes. What analyses with a `state_dict` know goes into
    Lightning's checkpoints.

    Args:
        analyses: one, or several; None for statistics with histograms, dead filters, and the first
            NaN.
        module: the qualified name of what is captured, below the LightningModule: that which its
            steps call. `""` for itself (`self(x)`), `"net"` for `self.net(x)`.
        log: where readings go; None for the trainer's loggers.
        log_every: so many optimiser steps are between two writings.
        evaluation: whether the analyses see passes in eval mode, too.
        window: whether `Statistics` forget, after each writing, what they have seen, so that what
            is logged is of the steps since the last one.
        capture: further arguments of `fmapkit.capture`: `layers`, `kinds`, `filters`, `every`, ….

    Raises:
        ImportError: Lightning is not installed.
        ArgumentError: an argument is outside what is allowed.

    Attributes:
        analyses: what sees the maps.
        maps: what `capture` gave; None before training has begun.
    """

    def __init__(
        self,
        analyses: Analysis | Iterable[Analysis] | None = None,
        *,
        module: str = "",
        log: Log | None = None,
        log_every: int = 50,
        evaluation: bool = False,
        window: bool = True,
        **capture: Any,
    ) -> None:
        super().__init__(
            analyses,
            log=log,
            log_every=log_every,
            evaluation=evaluation,
            window=window,
            **capture,
        )
        self._module = module
        self._to: Log | None = None
        self._checked = False

    # -- Lightning's hooks ---------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the capture."""
        self._checked = False
        self._to = self._log
        if self._to is None and trainer.loggers:
            self._to = _Loggers(trainer.loggers)
        self._to = self._to if trainer.is_global_zero else None
        self._begin(_submodule(pl_module, self._module), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write readings, each `log_every` optimiser steps."""
        if not self._checked:
            self._checked = True
            self._check_that_a_pass_came(pl_module)
        self._write(self._to, trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what has not been written, and close the capture."""
        self._write(self._to, trainer.global_step, last=True)
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the capture."""
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the capture, if nobody has."""
        self._end()

    # ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the analyses know, for Lightning's checkpoints."""
        return {"analyses": [_state(analysis) for analysis in self.analyses]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ArgumentError: it was written with other analyses.
        """
        states = state_dict["analyses"]
        if [s is None for s in states] != [_state(a) is None for a in self.analyses]:
            raise ArgumentError(
                f"LightningCallback has {len(self.analyses)} analyses, and the checkpoint was "
                f"written with {len(states)}, or with others"
            )
        for analysis, state in zip(self.analyses, states, strict=True):
            if state is not None:
                analysis.load_state_dict(state)  # type: ignore[attr-defined]

    def _check_that_a_pass_came(self, pl_module: Any) -> None:
        """Warn where the steps call something else than what is captured."""
        maps = self.maps
        assert maps is not None
        if self._seen:
            return
        named = f"module={self._module!r}" if self._module else "the LightningModule itself"
        called = listed(dict.fromkeys(m.layer for m in maps.missed))
        warnings.warn(
            f"LightningCallback saw no pass of {named} in the first batch: training_step calls "
            f"something else{f', such as {called}' if maps.missed else ''}; say it with module=…",
            CaptureWarning,
            stacklevel=2,
        )


class _Loggers(Log):
    """The trainer's own loggers."""

    def __init__(self, loggers: Iterable[Any]) -> None:
        self._logs: list[Log] = []
        self._others: list[Any] = []
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                self._logs.append(TensorBoardLog(logger.experiment))
            elif isinstance(logger, WandbLogger):
                self._logs.append(WandbLog(logger.experiment))
            else:
                self._others.append(logger)

    def put(self, readings: Readings, step: int) -> None:
        for log in self._logs:
            log.put(readings, step)
        for logger in self._others:
            logger.log_metrics(readings.scalars, step)


def _state(analysis: Any) -> dict[str, Any] | None:
    return analysis.state_dict() if hasattr(analysis, "state_dict") else None


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        known = [n for n, _ in module.named_modules() if n]
        raise ArgumentError(
            f"module={name!r} is no module of {type(module).__name__}{did_you_mean(name, known)} "
            f"(its modules: {listed(known)})",
            candidates=near(name, known) or known,
        ) from None
