"""What is held of a tensor, and for how long: references, copies, conversion, passes, a budget."""

from fmapkit.storage.aliases import Aliases as Aliases
from fmapkit.storage.conversion import Place as Place
from fmapkit.storage.conversion import StorageConversion as StorageConversion
from fmapkit.storage.gradients import Gradient as Gradient
from fmapkit.storage.gradients import NotYet as NotYet
from fmapkit.storage.gradients import Received as Received
from fmapkit.storage.gradients import in_function as in_function
from fmapkit.storage.gradients import watch as watch
from fmapkit.storage.held import StoredTensor as StoredTensor
from fmapkit.storage.held import check_all as check_all
from fmapkit.storage.held import unheld as unheld
from fmapkit.storage.inference_tensors import has_inference_tensors as has_inference_tensors
from fmapkit.storage.inference_tensors import settle as settle
from fmapkit.storage.offload import Cuda as Cuda
from fmapkit.storage.passes import Block as Block
from fmapkit.storage.passes import Budget as Budget
from fmapkit.storage.passes import MapRecord as MapRecord
from fmapkit.storage.passes import Pass as Pass
from fmapkit.storage.passes import PassStore as PassStore
from fmapkit.storage.passes import given_budget as given_budget
from fmapkit.storage.value_copies import ValueCopies as ValueCopies
