"""A sparse autoencoder on a layer's features, straight from the model: `fmapkit.data.stream`.

A small net learns to read digits; then a dictionary of 256 directions is learned in which each of
its hidden vectors is a sum of a few (Bricken et al. 2023, "Towards Monosemanticity"; top-k as in
Makhzani & Frey 2014 and Gao et al. 2024). The features are never stored: a buffer is refilled by
running the net. Half way the training is stopped, and goes on from its state.

    python examples/sparse_autoencoder.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fmapkit.data import RowLoader, stream

WIDTH, LATENTS, ACTIVE = 64, 256, 8


class SparseAutoencoder(nn.Module):
    """x ≈ decoder(the largest few of relu(encoder(x - b))) + b."""

    def __init__(self, width: int, latents: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.bias = nn.Parameter(torch.zeros(width))
        self.encoder = nn.Linear(width, latents)
        self.decoder = nn.Linear(latents, width, bias=False)
        with torch.no_grad():
            self.decoder.weight.copy_(F.normalize(self.encoder.weight.t(), dim=0))

    def encode(self, x: Tensor) -> Tensor:
        """(rows, width) -> (rows, latents), all but `active` of each row zero."""
        latents = F.relu(self.encoder(x - self.bias))
        top = latents.topk(self.active, dim=-1)
        return torch.zeros_like(latents).scatter(-1, top.indices, top.values)

    def forward(self, x: Tensor) -> Tensor:
        rebuilt: Tensor = self.decoder(self.encode(x)) + self.bias
        return rebuilt


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 8x8 pixels, and what they show."""
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def reader(x: Tensor, y: Tensor) -> nn.Sequential:
    """A net that reads digits."""
    net = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return net.eval()


def rows(net: nn.Module, x: Tensor) -> RowLoader:
    """The hidden vectors, shuffled in a buffer of 1,024 rows."""
    loader = DataLoader(TensorDataset(x), batch_size=64)
    return stream(net, loader, "0", batch=128, buffer=1024, seed=0, stop=True)


def train(sae: SparseAutoencoder, loader: RowLoader, epochs: int, steps: int | None = None) -> int:
    """Learn from some epochs, or up to some steps; returns how many steps there were."""
    optimiser = torch.optim.Adam(sae.parameters(), 3e-3)
    done = 0
    for _ in range(epochs):
        for x in loader:
            optimiser.zero_grad()
            F.mse_loss(sae(x), x).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():  # directions have length 1
                sae.decoder.weight.copy_(F.normalize(sae.decoder.weight, dim=0))
            done += 1
            if done == steps:
                return done
    return done


@torch.no_grad()
def explained(sae: SparseAutoencoder, loader: RowLoader) -> float:
    """Share of the rows' variance that the autoencoder gives back."""
    x = torch.cat(list(loader))
    lost = (sae(x) - x).square().sum()
    return 1 - float(lost / (x - x.mean(0)).square().sum())


def main() -> None:
    """Train both, and say what was found."""
    torch.manual_seed(0)
    x, y = digits()
    net = reader(x, y)
    sae = SparseAutoencoder(WIDTH, LATENTS, ACTIVE)
    loader = rows(net, x)
    print(f"before: {explained(sae, rows(net, x)):.1%} of the variance explained")
    train(sae, loader, epochs=20, steps=100)
    state = loader.state_dict()  # into your checkpoint, beside the model's

    loader = rows(net, x)
    loader.load_state_dict(state)
    train(sae, loader, epochs=20)
    print(f"after:  {explained(sae, rows(net, x)):.1%}, by {ACTIVE} of {LATENTS} directions each")

    with torch.no_grad():
        latents = sae.encode(net[:2](x))
    used = (latents > 0).sum(0)
    share = torch.stack([(latents[y == digit] > 0).sum(0) for digit in range(10)]) / used
    best = share.max(0)
    for latent in torch.where(used >= 20, best.values, 0).topk(5).indices.tolist():
        digit, part = int(best.indices[latent]), float(best.values[latent])
        print(f"direction {latent}: on {int(used[latent])} images, {part:.0%} of them a {digit}")


if __name__ == "__main__":
    main()
