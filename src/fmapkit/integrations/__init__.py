"""Where people train: callbacks for Lightning and transformers, logs for TensorBoard and W&B.

```python
from fmapkit.integrations import LightningCallback

trainer = lightning.Trainer(callbacks=[LightningCallback()], logger=TensorBoardLogger("runs"))
trainer.fit(module, loader)
```

Each name imports its package when it is asked for, so that none is needed for the others.

| file | what it does |
| --- | --- |
| `reading.py` | what analyses know, as scalars, histograms and sentences by name |
| `nonfinite.py` | `FirstNonFinite`, an analysis: where the first NaN or infinity was |
| `logs.py` | `Log`, what a place to write readings to is; `TensorBoardLog`, `WandbLog` |
| `watching.py` | the capture around a training, whoever runs it |
| `lightning.py`, `transformers.py` | that, as their callbacks |
"""

from typing import TYPE_CHECKING

from fmapkit._lazy import lazy

if TYPE_CHECKING:
    from fmapkit.integrations.lightning import LightningCallback
    from fmapkit.integrations.logs import Log, TensorBoardLog, WandbLog
    from fmapkit.integrations.nonfinite import FirstNonFinite, NonFiniteMap
    from fmapkit.integrations.reading import Histogram, Readings, readings
    from fmapkit.integrations.transformers import TransformersCallback

__all__ = [
    "FirstNonFinite",
    "Histogram",
    "LightningCallback",
    "Log",
    "NonFiniteMap",
    "Readings",
    "TensorBoardLog",
    "TransformersCallback",
    "WandbLog",
    "readings",
]

_HOMES = {
    "lightning": "LightningCallback",
    "logs": "Log TensorBoardLog WandbLog",
    "nonfinite": "FirstNonFinite NonFiniteMap",
    "reading": "Histogram Readings readings",
    "transformers": "TransformersCallback",
}

__getattr__, __dir__ = lazy(__name__, _HOMES)
