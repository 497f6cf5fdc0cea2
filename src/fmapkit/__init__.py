"""See inside a PyTorch model: `with capture(model) as maps:`."""

from fmapkit import edits
from fmapkit.capture import capture
from fmapkit.comparing import compare
from fmapkit.errors import (
    AmbiguousMapError,
    ArgumentError,
    BudgetError,
    CaptureStateError,
    CaptureWarning,
    DistributedError,
    EditError,
    FilterRangeError,
    FmapkitError,
    KindNotCapturedError,
    MapLookupError,
    MapOverwrittenError,
    MapReleasedError,
    MapStateError,
    NoActivationError,
    NonFiniteError,
    NoPassError,
    NotAModuleError,
    StoreError,
    StoreMismatchError,
    UnknownLayerError,
)
from fmapkit.kinds import Kind
from fmapkit.layers import register_layer
from fmapkit.maps import FeatureMap, FeatureMaps
from fmapkit.nonlinearities import register_nonlinearity
from fmapkit.patching import patch
from fmapkit.phi import FeatureFunction, feature_map
from fmapkit.session import Analysis

__version__ = "0.1.0"

__all__ = [
    "AmbiguousMapError",
    "Analysis",
    "ArgumentError",
    "BudgetError",
    "CaptureStateError",
    "CaptureWarning",
    "DistributedError",
    "EditError",
    "FeatureFunction",
    "FeatureMap",
    "FeatureMaps",
    "FilterRangeError",
    "FmapkitError",
    "Kind",
    "KindNotCapturedError",
    "MapLookupError",
    "MapOverwrittenError",
    "MapReleasedError",
    "MapStateError",
    "NoActivationError",
    "NoPassError",
    "NonFiniteError",
    "NotAModuleError",
    "StoreError",
    "StoreMismatchError",
    "UnknownLayerError",
    "capture",
    "compare",
    "edits",
    "feature_map",
    "patch",
    "register_layer",
    "register_nonlinearity",
]
