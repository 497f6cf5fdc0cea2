"""One map explained: what of the input it sees, and what of the input did it.

```python
from fmapkit.explain import receptive_field

field = receptive_field(model, "layer3.0.conv1", images)
field.size, field.stride, field.box(7, 7)
```
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmapkit.explain.projection import project
    from fmapkit.explain.receptive import Box, ReceptiveField, Span, receptive_field

__all__ = ["Box", "ReceptiveField", "Span", "project", "receptive_field"]

# Imported when asked for.
_HOMES = {
    "Box": "receptive",
    "ReceptiveField": "receptive",
    "Span": "receptive",
    "project": "projection",
    "receptive_field": "receptive",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
