"""Whose filters a tensor carries, and where they lie: labels, and one rule per torch function.

propagate          propagate.py  one call of torch: which rule, and what its results carry
  vocabulary       vocabulary.py         what a function does to data, by name
  layer_ops        layer_ops.py          it is a layer: where its weight and its filters are
  rules            rules.py, index_rules.py, product_rules.py
    ChannelLayout  layout.py             filters along axes, through reshapes and slices
  sometimes        conditional_sigma.py  it is σ in some of its calls
weights            weights.py            from which rows of which parameter a map came
"""

from fmapkit.provenance.attention_math import given, probabilities
from fmapkit.provenance.conditional_sigma import (
    FOLLOWED,
    SOMETIMES,
    Pointwise,
    chooses_unseen,
    operand_of_sigma,
)
from fmapkit.provenance.constants import Constants
from fmapkit.provenance.function_call import FunctionCall
from fmapkit.provenance.functions import (
    RESHAPED_IN_PLACE,
    Function,
    describe,
    described,
    out_of_place,
)
from fmapkit.provenance.heads import Heads, Projection, projection
from fmapkit.provenance.labels import (
    NOWHERE,
    STOP,
    Carried,
    ChannelLabel,
    Label,
    Lookup,
    Made,
    Origin,
    ParamLabel,
    ParamLabelRef,
    Source,
    flow_of,
    is_same,
)
from fmapkit.provenance.layer_ops import (
    bias_operand,
    filter_places,
    input_place,
    layer_axes,
    pads_first,
    picked,
    weighs,
    weight_operand,
)
from fmapkit.provenance.layout import ChannelAxis, ChannelLayout
from fmapkit.provenance.linearity import Linearity
from fmapkit.provenance.product_rules import einsum_terms
from fmapkit.provenance.propagate import carried, past_sigma, sigma_axes
from fmapkit.provenance.quantized import packed_axes, packed_key
from fmapkit.provenance.rule_basics import argument
from fmapkit.provenance.vocabulary import (
    ADDING_WRITES,
    FRESH,
    MATMULS,
    NORM_AXIS,
    OPAQUE,
    WRITES,
    words,
)
from fmapkit.provenance.weights import (
    PACKED,
    REGISTERED,
    Lost,
    StandIns,
    WeightRows,
    source_of,
    versions,
)

__all__ = [
    "ADDING_WRITES",
    "FOLLOWED",
    "FRESH",
    "MATMULS",
    "NORM_AXIS",
    "NOWHERE",
    "OPAQUE",
    "PACKED",
    "REGISTERED",
    "RESHAPED_IN_PLACE",
    "SOMETIMES",
    "STOP",
    "WRITES",
    "Carried",
    "ChannelAxis",
    "ChannelLabel",
    "ChannelLayout",
    "Constants",
    "Function",
    "FunctionCall",
    "Heads",
    "Label",
    "Linearity",
    "Lookup",
    "Lost",
    "Made",
    "Origin",
    "ParamLabel",
    "ParamLabelRef",
    "Pointwise",
    "Projection",
    "Source",
    "StandIns",
    "WeightRows",
    "argument",
    "bias_operand",
    "carried",
    "chooses_unseen",
    "describe",
    "described",
    "einsum_terms",
    "filter_places",
    "flow_of",
    "given",
    "input_place",
    "is_same",
    "layer_axes",
    "operand_of_sigma",
    "out_of_place",
    "packed_axes",
    "packed_key",
    "pads_first",
    "past_sigma",
    "picked",
    "probabilities",
    "projection",
    "sigma_axes",
    "source_of",
    "versions",
    "weighs",
    "weight_operand",
    "words",
]
