"""The layers of a fused kernel, and the names of its maps."""

from __future__ import annotations

from typing import Any

from torch import nn

# Of attention, its two projections; of an encoder layer, these and its own; of all an encoder's
# layers, the same after a number: "0.linear1".
ATTENTION = ("in_proj", "out_proj")
LAYERS = ("linear1", "linear2")
OF_LAYER = (*ATTENTION, *LAYERS, "activation")
SIGMAS = frozenset({"relu", "gelu"})


def weights_of(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The weights and biases that a module's kernel is given, by the names of its maps."""
    if isinstance(module, nn.MultiheadAttention):
        return {
            "in_proj": (module.in_proj_weight, module.in_proj_bias),
            "out_proj": (module.out_proj.weight, module.out_proj.bias),
        }
    if isinstance(module, nn.TransformerEncoder):
        each = [
            (f"{n}.", layer)
            for n, layer in enumerate(module.layers)
            if isinstance(layer, nn.TransformerEncoderLayer)
        ]
        return {at + name: w for at, layer in each for name, w in weights_of(layer).items()}
    layers = {name: getattr(module, name) for name in LAYERS}
    own = {name: (layer.weight, layer.bias) for name, layer in layers.items()}
    attention: Any = module.self_attn
    return weights_of(attention) | own


def activation_of(linear: str) -> str:
    """The map of σ after a layer."""
    return linear.removesuffix("linear1") + "activation"
