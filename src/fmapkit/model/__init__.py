"""Who is who in a model: names of modules and parameters, wrappers, calls that no hook sees.

`inputs.py` says what it is given.
"""

from fmapkit.model.inputs import changed as changed
from fmapkit.model.inputs import run as run
from fmapkit.model.inputs import tensors_in as tensors_in
from fmapkit.model.names import Names, Use, never_called
from fmapkit.model.past_hooks import HOW, doors, has_own_call
from fmapkit.model.wrappers import REPLICAS, unwrap

__all__ = ["HOW", "REPLICAS", "Names", "Use", "doors", "has_own_call", "never_called", "unwrap"]
