"""Modules that raise where something is wrong. In test files, pytest writes asserts anew."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Normal

__all__ = ["Checked"]


class Checked(nn.Module):
    """It raises where its maps are no numbers, in one of the ways to say so."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.a, self.b, self.by = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 4, 1), by

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if self.by == "assert":
            assert not torch.isnan(h).any()
        elif self.by == "with words":
            assert torch.isfinite(h).all(), f"not finite: {h[~torch.isfinite(h)]}"
        elif self.by == "if":
            if torch.isnan(h).any():
                raise ValueError("not a number")
        elif self.by == "if not":
            if not torch.isfinite(h).all():
                message = "not finite"
                raise ValueError(message)
        elif self.by == "distribution":
            h = h + 0 * Normal(h, torch.ones_like(h), validate_args=True).log_prob(h)
        return torch.relu(self.b(h))
