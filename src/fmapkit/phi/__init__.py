"""The feature map as a function, and what can be read out of it.

`feature_map` makes φ. `probe` tells what a linear model reads out of each layer, `kept` what φ
keeps of distances, and `losses` has losses on features.

    feature_map(model, layers)   function.py    φ, an `nn.Module`
      φ(x)                       _calls.py      eager, or while torch.compile traces: _compiled.py
        -> _reader               _reader.py     which map of the pass is meant (_request.py)
        -> _recurring            _recurring.py  one capture for all calls
    probe, kept, singular_values  probing.py, distortion.py, jacobian.py
"""

from typing import TYPE_CHECKING

from fmapkit._lazy import lazy
from fmapkit.phi.function import FeatureFunction, feature_map

if TYPE_CHECKING:
    from fmapkit.phi.distortion import Kept, LayerKept, kept
    from fmapkit.phi.jacobian import singular_values
    from fmapkit.phi.losses import gram, perceptual_loss, style_loss
    from fmapkit.phi.probing import Probe, probe

__all__ = [
    "FeatureFunction",
    "Kept",
    "LayerKept",
    "Probe",
    "feature_map",
    "gram",
    "kept",
    "perceptual_loss",
    "probe",
    "singular_values",
    "style_loss",
]

# Imported when asked for: `import fmapkit` needs φ alone.
_HOMES = {
    "distortion": "Kept LayerKept kept",
    "jacobian": "singular_values",
    "losses": "gram perceptual_loss style_loss",
    "probing": "Probe probe",
}

__getattr__, __dir__ = lazy(__name__, _HOMES)
