"""Modules that a model keeps in a plain list or object: no guard of the model knows of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import CaptureWarning, capture
from fmapkit.missed import Reason


class Kept(nn.Module):
    """A layer, and what comes behind it, which is not registered."""

    def __init__(self, part: nn.Module, within: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.parts = [nn.Sequential(part) if within else part]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.parts[0](self.fc(x))
        y += 1
        return F.relu(y)


def _shifted(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * 2,)


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object]]] = {
    "eval": (lambda: nn.Dropout(0.5), lambda part: part.eval()),
    "attribute": (lambda: nn.Flatten(1, 2), lambda part: setattr(part, "end_dim", 3)),
    "hook": (nn.Identity, lambda part: part.register_forward_pre_hook(_shifted)),
    "class": (nn.Hardswish, lambda part: setattr(part, "__class__", nn.Identity)),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_to_one_is_noticed(name: str, within: bool, mode: Callable[[], Any]) -> None:
    """No pass has a wrong map; the one that finds the change loses its maps, by name."""
    make, change = CHANGES[name]
    model = Kept(make(), within)
    x = torch.randn(2, 1, 3, 8) if name == "attribute" else torch.randn(2, 8)
    lost = 0
    with warnings.catch_warnings(), mode():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model, kinds=("response", "activation")) as maps:
            for n in range(8):
                if n == 4:
                    change(model.parts[0][0] if within else model.parts[0])  # type: ignore[index]
                y = model(x)
                if not len(maps):
                    lost += 1
                    continue
                z = F.linear(x, model.fc.weight, model.fc.bias)
                assert torch.equal(maps["fc", "response"].tensor, z)
                assert torch.equal(maps.select(kind="activation")[-1].tensor, y)
    assert lost <= 1
    assert [m.why for m in maps.missed] == [Reason.NEW_PATH] * lost


@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_that_torch_fuses_stays_fused(nested: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            make = nn.TransformerEncoderLayer
            self.layers = [make(64, 4, 128, batch_first=True).eval() for _ in range(2)]
            self.head = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            x = torch.nested.to_padded_tensor(x, 0.0) if nested else x
            return F.relu(self.head(x))

    model = Net().eval()
    parts = [torch.randn(n, 64) for n in (7, 3)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor(parts) if nested else torch.stack([parts[0], parts[0] * 2])
        expected = model(x)
        with capture(model) as maps:
            for _ in range(4):
                assert torch.equal(model(x), expected)
                assert torch.equal(maps["head"].tensor, expected)
    assert Reason.FUSED_TRANSFORMER in [m.why for m in maps.missed]
