"""Whose filters a tensor carries, and where they lie: labels, and one rule per torch function.

FunctionCall       rule_basics.py  one call of torch, as whoever decides is asked about it
propagate          propagate.py  one call of torch: which rule, and what its results carry
  vocabulary       vocabulary.py         what a function does to data, by name
  layer_ops        layer_ops.py          it is a layer: where its weight and its filters are
  rules            rules.py, index_rules.py
    ChannelLayout  layout.py             filters along axes, through reshapes and slices
  sometimes        conditional_sigma.py  it is σ in some of its calls; a module, by hand
weights            weights.py            from which rows of which parameter a map came
"""

from fmapkit.provenance.attention import Heads as Heads
from fmapkit.provenance.attention import Projection as Projection
from fmapkit.provenance.attention import given as given
from fmapkit.provenance.attention import probabilities as probabilities
from fmapkit.provenance.attention import projection as projection
from fmapkit.provenance.conditional_sigma import FOLLOWED as FOLLOWED
from fmapkit.provenance.conditional_sigma import SOMETIMES as SOMETIMES
from fmapkit.provenance.conditional_sigma import Linearity as Linearity
from fmapkit.provenance.conditional_sigma import Pointwise as Pointwise
from fmapkit.provenance.conditional_sigma import chooses_unseen as chooses_unseen
from fmapkit.provenance.conditional_sigma import operand_of_sigma as operand_of_sigma
from fmapkit.provenance.functions import ON_LISTS as ON_LISTS
from fmapkit.provenance.functions import RESHAPED_IN_PLACE as RESHAPED_IN_PLACE
from fmapkit.provenance.functions import Function as Function
from fmapkit.provenance.functions import beside_numbers as beside_numbers
from fmapkit.provenance.functions import bounds_in as bounds_in
from fmapkit.provenance.functions import describe as describe
from fmapkit.provenance.functions import described as described
from fmapkit.provenance.functions import out_of_place as out_of_place
from fmapkit.provenance.functions import target_of as target_of
from fmapkit.provenance.labels import NOWHERE as NOWHERE
from fmapkit.provenance.labels import STOP as STOP
from fmapkit.provenance.labels import Carried as Carried
from fmapkit.provenance.labels import ChannelLabel as ChannelLabel
from fmapkit.provenance.labels import Label as Label
from fmapkit.provenance.labels import Lookup as Lookup
from fmapkit.provenance.labels import Made as Made
from fmapkit.provenance.labels import OfModule as OfModule
from fmapkit.provenance.labels import Origin as Origin
from fmapkit.provenance.labels import ParamLabel as ParamLabel
from fmapkit.provenance.labels import ParamLabelRef as ParamLabelRef
from fmapkit.provenance.labels import Source as Source
from fmapkit.provenance.labels import flow_of as flow_of
from fmapkit.provenance.labels import is_same as is_same
from fmapkit.provenance.layer_ops import bias_operand as bias_operand
from fmapkit.provenance.layer_ops import filter_places as filter_places
from fmapkit.provenance.layer_ops import input_place as input_place
from fmapkit.provenance.layer_ops import layer_axes as layer_axes
from fmapkit.provenance.layer_ops import packed_axes as packed_axes
from fmapkit.provenance.layer_ops import packed_key as packed_key
from fmapkit.provenance.layer_ops import pads_first as pads_first
from fmapkit.provenance.layer_ops import picked as picked
from fmapkit.provenance.layer_ops import weighs as weighs
from fmapkit.provenance.layer_ops import weight_operand as weight_operand
from fmapkit.provenance.layout import ChannelAxis as ChannelAxis
from fmapkit.provenance.layout import ChannelLayout as ChannelLayout
from fmapkit.provenance.propagate import carried as carried
from fmapkit.provenance.propagate import past_sigma as past_sigma
from fmapkit.provenance.propagate import sigma_axes as sigma_axes
from fmapkit.provenance.rule_basics import FunctionCall as FunctionCall
from fmapkit.provenance.rule_basics import argument as argument
from fmapkit.provenance.rules import einsum_terms as einsum_terms
from fmapkit.provenance.vocabulary import MATMULS as MATMULS
from fmapkit.provenance.vocabulary import NORM_AXIS as NORM_AXIS
from fmapkit.provenance.vocabulary import OPAQUE as OPAQUE
from fmapkit.provenance.vocabulary import words as words
from fmapkit.provenance.weights import PACKED as PACKED
from fmapkit.provenance.weights import REGISTERED as REGISTERED
from fmapkit.provenance.weights import BufferPlace as BufferPlace
from fmapkit.provenance.weights import Buffers as Buffers
from fmapkit.provenance.weights import Lost as Lost
from fmapkit.provenance.weights import StandIns as StandIns
from fmapkit.provenance.weights import WeightRows as WeightRows
from fmapkit.provenance.weights import buffers_at as buffers_at
from fmapkit.provenance.weights import buffers_of as buffers_of
from fmapkit.provenance.weights import note_exchanged as note_exchanged
from fmapkit.provenance.weights import source_of as source_of
from fmapkit.provenance.weights import versions as versions
