"""The kinds of feature map, for a layer that computes z = w*x + b and then a = σ(z).

| kind | what it is |
| --- | --- |
| `"input"` | x: what enters the layer |
| `"response"` | w*x + b as it leaves the layer, before any norm or residual sum |
| `"preactivation"` | z: exactly the tensor that the nonlinearity receives |
| `"activation"` | a = σ(z): exactly what the nonlinearity returns |
| `"output"` | what any module returns, asked for by name |
| `"attention"` | the probabilities of attention, by head, asked for by name |
"""

from __future__ import annotations

from typing import Literal, get_args

# A literal type, so that type checkers find `kinds="activaton"`.
Kind = Literal["input", "response", "preactivation", "activation", "output", "attention"]
KINDS: tuple[Kind, ...] = get_args(Kind)
