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

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    "FirstNonFinite": "nonfinite",
    "Histogram": "reading",
    "LightningCallback": "lightning",
    "Log": "logs",
    "NonFiniteMap": "nonfinite",
    "Readings": "reading",
    "TensorBoardLog": "logs",
    "TransformersCallback": "transformers",
    "WandbLog": "logs",
    "readings": "reading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
