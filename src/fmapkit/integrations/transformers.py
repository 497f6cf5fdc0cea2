"""`TransformersCallback`: analyses while the Hugging Face `Trainer` trains."""

from __future__ import annotations

from typing import Any

from fmapkit.integrations.watching import Watching

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "TransformersCallback needs transformers and accelerate: pip install transformers[torch]"
    ) from error


class TransformersCallback(Watching, TrainerCallback):  # type: ignore[misc]
    """Captures a model while the `Trainer` trains it, and logs what the analyses know.

    ```python
    with TransformersCallback(log=TensorBoardLog("runs/first")) as watch:
        Trainer(model, arguments, train_dataset=data, callbacks=[watch]).train()
    ```

    The capture is open from the start of training to its end. The `Trainer` tells no callback that
    its training has raised: the `with` block then closes the capture, as `close()` does.

    Args:
        analyses: one, or several; None for statistics with histograms, dead filters, and the first
            NaN.
        log: where readings go; None for nowhere: they are read from the analyses.
        log_every: so many optimiser steps are between two writings.
        evaluation: whether the analyses see passes in eval mode, too.
        window: whether `Statistics` forget, after each writing, what they have seen, so that what
            is logged is of the steps since the last one.
        capture: further arguments of `fmapkit.capture`: `layers`, `kinds`, `filters`, `every`, ….

    Raises:
        ImportError: transformers is not installed.
        ArgumentError: an argument is outside what is allowed.

    Attributes:
        analyses: what sees the maps.
        maps: what `capture` gave; None before training has begun.
    """

    def close(self) -> None:
        """Close the capture, if it is open."""
        self._end()

    def __enter__(self) -> TransformersCallback:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the Trainer's hooks -------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the capture."""
        self._begin(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write readings, each `log_every` optimiser steps."""
        self._write(self._log if state.is_world_process_zero else None, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what has not been written, and close the capture."""
        log = self._log if state.is_world_process_zero else None
        self._write(log, state.global_step, last=True)
        self._end()
