"""Where readings are written: TensorBoard, W&B, and what any other place has to have."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from fmapkit._lazy import needed
from fmapkit.integrations.reading import Readings, readings


class Log(ABC):
    """A place to write what analyses know, step by step."""

    def write(self, analyses: Any, step: int) -> None:
        """Write what analyses know now; waits for the device.

        Args:
            analyses: an analysis, or several: `Statistics`, `DeadFilters`, `FirstNonFinite`, and
                those of your own that `readings` was told of.
            step: of the training.

        Raises:
            ArgumentError: nothing is known of what there is to log of one of them.
        """
        several = isinstance(analyses, Iterable) and not hasattr(analyses, "update")
        known = Readings()
        for analysis in analyses if several else [analyses]:
            one = readings(analysis)
            known.scalars.update(one.scalars)
            known.histograms.update(one.histograms)
            known.texts.update(one.texts)
        self.put(known, step)

    @abstractmethod
    def put(self, readings: Readings, step: int) -> None:
        """Write readings."""


class TensorBoardLog(Log):
    """Writes scalars, histograms and sentences to TensorBoard.

    ```python
    log = TensorBoardLog("runs/first")
    log.write([stats, dead], step)
    ```

    Args:
        writer: a directory, or a `SummaryWriter` that is open; the latter stays its owner's.
        prefix: stands before all names.

    Raises:
        ImportError: a directory was given, and tensorboard is not installed.
    """

    def __init__(self, writer: Any, *, prefix: str = "") -> None:
        self._own = isinstance(writer, (str, os.PathLike))
        if self._own:
            says = "TensorBoardLog needs tensorboard: pip install tensorboard"
            writer = needed("torch.utils.tensorboard", says).SummaryWriter(os.fspath(writer))
        self._writer = writer
        self._prefix = prefix

    def put(self, readings: Readings, step: int) -> None:
        """Write readings."""
        for name, value in readings.scalars.items():
            self._writer.add_scalar(self._prefix + name, value, step)
        for name, found in readings.histograms.items():
            count, mean, std = int(found.counts.sum()), found.mean, found.std
            self._writer.add_histogram_raw(
                self._prefix + name,
                min=float(found.edges[0]),
                max=float(found.edges[-1]),
                num=count,
                sum=mean * count,
                sum_squares=(std * std + mean * mean) * count,
                bucket_limits=found.edges[1:].tolist(),
                bucket_counts=found.counts.tolist(),
                global_step=step,
            )
        for name, text in readings.texts.items():
            self._writer.add_text(self._prefix + name, text, step)
        self._writer.flush()

    def close(self) -> None:
        """Write out what waits; close the writer if it was opened here."""
        if self._own:
            self._writer.close()


class WandbLog(Log):
    """Writes scalars, histograms and sentences to Weights & Biases.

    The step goes in as a value, `"step"`, over which W&B draws the others. W&B's own step may only
    grow, and belongs to whoever else writes to the run.

    Args:
        run: a run; None for the one that is open when something is written (`wandb.run`).
        prefix: stands before all names.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, run: Any = None, *, prefix: str = "") -> None:
        self._wandb = needed("wandb", "WandbLog needs wandb: pip install wandb")
        self._run = run
        self._prefix = prefix
        self._defined: tuple[Any, set[str]] = (None, set())  # the run, and the names it knows

    def put(self, readings: Readings, step: int) -> None:
        """Write readings, as one entry.

        Raises:
            RuntimeError: no run was given, and none is open.
        """
        run = self._run if self._run is not None else self._wandb.run
        if run is None:
            raise RuntimeError("WandbLog: no run is open; call wandb.init() first, or give a run")
        entry: dict[str, Any] = {self._prefix + n: v for n, v in readings.scalars.items()}
        for name, found in readings.histograms.items():
            drawn = (found.counts.tolist(), found.edges.tolist())
            entry[self._prefix + name] = self._wandb.Histogram(np_histogram=drawn)
        entry.update({self._prefix + n: t for n, t in readings.texts.items()})
        key = f"{self._prefix}step"
        if self._defined[0] is not run:
            self._defined = (run, set())
            run.define_metric(key, hidden=True)
        for name in entry.keys() - self._defined[1]:
            run.define_metric(name, step_metric=key)
            self._defined[1].add(name)
        run.log({**entry, key: step})
