"""One map explained: what of the input it sees, and what of the input did it.

```python
from fmapkit.explain import receptive_field

field = receptive_field(model, "layer3.0.conv1", images)
field.size, field.stride, field.box(7, 7)
```

    receptive_field    receptive.py -> _follow.py     a pass on fields, operator by operator
                         -> _rules.py, else _probe.py   what a result depends on
    grad_cam           cam.py
    project            projection.py                  gradients of a map at the input
    effective_field      -> of one location, in the mean
    occlusion          occluding.py
    plot_...           pictures.py
"""

from fmapkit.explain.cam import grad_cam
from fmapkit.explain.occluding import Occlusion, occlusion
from fmapkit.explain.pictures import plot_heat, plot_projection
from fmapkit.explain.projection import effective_field, project
from fmapkit.explain.receptive import Box, ReceptiveField, Span, plot_field, receptive_field

__all__ = [
    "Box",
    "Occlusion",
    "ReceptiveField",
    "Span",
    "effective_field",
    "grad_cam",
    "occlusion",
    "plot_field",
    "plot_heat",
    "plot_projection",
    "project",
    "receptive_field",
]
