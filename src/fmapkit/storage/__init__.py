"""What is held of a tensor, and for how long: references, copies, conversion, passes, a budget.

PassStore            passes.py  the passes that are kept, their records, a budget (budget.py)
  StoredTensor       held.py        alias or copy; whether it was written to since
    Aliases          aliases.py     what has to be copied before a write
  StorageConversion  conversion.py  filters=, dtype=, device= -> buffers.py, offload.py
  Gradient           gradients.py   what backward sends to a map
"""

from fmapkit.storage.aliases import Aliases
from fmapkit.storage.budget import Budget, policy
from fmapkit.storage.conversion import Place, StorageConversion
from fmapkit.storage.gradients import (
    Gradient,
    NotYet,
    Received,
    in_function,
    watch,
)
from fmapkit.storage.held import StoredTensor, unheld
from fmapkit.storage.inference_tensors import has_inference_tensors, settle
from fmapkit.storage.passes import MapRecord, Pass, PassStore
from fmapkit.storage.value_copies import ValueCopies

__all__ = [
    "Aliases",
    "Budget",
    "Gradient",
    "MapRecord",
    "NotYet",
    "Pass",
    "PassStore",
    "Place",
    "Received",
    "StorageConversion",
    "StoredTensor",
    "ValueCopies",
    "has_inference_tensors",
    "in_function",
    "policy",
    "settle",
    "unheld",
    "watch",
]
