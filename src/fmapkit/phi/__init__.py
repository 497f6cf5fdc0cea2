"""The feature map as a function, and what can be read out of it."""

from fmapkit.phi.function import FeatureFunction, feature_map

__all__ = ["FeatureFunction", "feature_map"]
