"""Train a small net on handwritten digits and watch it from inside: `make demo`, under a minute.

One `with capture(model)` stands around the training loop; in its second half, an analysis sees
every map as well. A twin that nobody watches is trained beside it, step by step on the same
batches: the difference in time is what capture costs, and at the end the two must be equal to the
last bit. Then it is asked what its filters look for.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fmapkit import Analysis, FeatureMaps, capture
from fmapkit.analysis import DeadFilters, LayerTops, Statistics, TopInputs
from fmapkit.explain import project, receptive_field

PICTURE = Path("demo.png")
DEAD_PICTURE = Path("demo_dead.png")
FILTERS_PICTURE = Path("demo_filters.png")
TOP_PICTURE = Path("demo_top.png")
FIELD_PICTURE = Path("demo_field.png")
DEEP = "conv3"  # the layer whose filters are looked into
EPOCHS = 8
BATCH = 64


class DigitNet(nn.Module):
    """Small, with the things that make tutorial-style hooks go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU(inplace=True)  # overwrites what bn1 returned
        self.conv2 = nn.Conv2d(24, 24, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.conv3 = nn.Conv2d(24, 32, 3, stride=2, padding=1)
        self.fc = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x  # the residual sum overwrites what bn2 returned
        x = self.relu(y)
        x = F.relu(self.conv3(x))  # a nonlinearity that no module hook can see
        logits: Tensor = self.fc(x.flatten(1))
        return logits


class Trainee:
    """A net, its optimiser, and the time its steps took, in seconds."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.times: list[float] = []  # of all steps so far

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One training step."""
        start = time.perf_counter()
        self.optimiser.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.times.append(time.perf_counter() - start)


def main() -> None:
    """Run the demo."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    began = time.perf_counter()
    train, test = digits()
    watched = Trainee(DigitNet())
    bare = Trainee(copy.deepcopy(watched.model))
    model = watched.model

    heading(f"Training {EPOCHS // 2} epochs, with capture around the loop")
    maps = fit(watched, bare, train, [])
    half = len(watched.times)

    heading(f"{EPOCHS - EPOCHS // 2} epochs more, with an analysis that sees every map")
    dead = DeadFilters(after=len(train[0]))  # silent for a whole epoch
    maps = fit(watched, bare, train, [dead])
    print(dead)
    dead.plot(title="Which filters fired, over the last epochs").savefig(DEAD_PICTURE, dpi=110)

    heading("What is there to read: the maps of the last training step")
    print(maps)
    if maps.missed:
        print("missed:", *maps.missed, sep="\n  ")

    heading("σ(z) == a, bit for bit, on every site")
    prove(maps)

    heading("What it cost")
    report_cost(watched, bare, maps, half)

    heading("The test set, watched: statistics of every layer, and no map kept")
    accuracy, stats = examine(model.eval(), test)
    print(f"accuracy {accuracy:.1%}")
    print(stats)

    heading("One digit")
    digit = test[0][:1]
    with capture(model) as maps, torch.no_grad():
        guess = int(model(digit).argmax())
    figure = maps.plot(
        image=digit[0], title=f"One digit on its way through the net, which says: {guess}"
    )
    figure.savefig(PICTURE, dpi=110)
    maps.plot_filters("conv1", columns=12).savefig(FILTERS_PICTURE, dpi=110)

    heading("What the filters look for, in the digits of the test set")
    look_for(model, test[0])

    heading("Pictures")
    print(f"{PICTURE}: a digit, and per layer its z and a, filter by filter")
    print(f"{FILTERS_PICTURE}: the filters of the first layer")
    print(f"{TOP_PICTURE}: what excites four filters of {DEEP} most, and what of it did")
    print(f"{FIELD_PICTURE}: how much of a digit one location of {DEEP} sees")
    print(f"{DEAD_PICTURE}: which filters fired in training, layer by layer")
    print(f"\nDone in {time.perf_counter() - began:.0f} s.")
    if accuracy <= 0.95:
        raise SystemExit(f"accuracy {accuracy:.1%} is not above 95%")


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Scikit-learn's digits, 8×8 pixels in [0, 1]: 1437 to train on, 360 to test on."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images))
    train, test = order[360:], order[:360]
    return (images[train], labels[train]), (images[test], labels[test])


def batches(
    images: Tensor, labels: Tensor, *, shuffle: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images and labels."""
    order = torch.randperm(len(images)) if shuffle else torch.arange(len(images))
    for chosen in torch.split(order, BATCH):
        yield images[chosen], labels[chosen]


def prove(maps: FeatureMaps) -> None:
    """Apply σ to every z, and compare with every a."""
    preactivations = {(z.layer, z.call): z for z in maps.select(kind="preactivation")}
    for a in maps.select(kind="activation"):
        z = preactivations[a.layer, a.call]
        sigma = getattr(F, a.nonlinearity or "")
        if not torch.equal(sigma(z.tensor), a.tensor):
            raise SystemExit(f"{a.layer}: {a.nonlinearity}(z) is not a")
        print(f"  {a.layer:6} {a.nonlinearity}(z) == a over {a.tensor.numel():,} values")


def fit(
    watched: Trainee, bare: Trainee, train: tuple[Tensor, Tensor], analyses: list[Analysis]
) -> FeatureMaps:
    """Train both for half of the epochs, one of them captured."""
    with capture(watched.model, analyses=analyses) as maps:
        for _ in range(EPOCHS // 2):
            for at, (images, labels) in enumerate(batches(*train, shuffle=True)):
                # Whoever goes second has the warmer caches: take turns.
                for trainee in (watched, bare) if at % 2 else (bare, watched):
                    trainee.step(images, labels)
    return maps


def report_cost(watched: Trainee, bare: Trainee, maps: FeatureMaps, half: int) -> None:
    """Compare the watched trainee with its twin, in each half of the training."""
    step = statistics.median(bare.times) * 1e3
    pairs = list(zip(watched.times, bare.times, strict=True))
    for what, some in (("time:   ", pairs[:half]), ("  with DeadFilters: ", pairs[half:])):
        # The first step learns where the maps are, and is not one of the many.
        ratios = [w / b for w, b in some[1:]]
        overhead = (statistics.median(ratios) - 1) * 100
        print(
            f"{what}{overhead:+.1f}% a step (median of {len(ratios)} interleaved pairs; "
            f"a bare step takes {step:.1f} ms)"
        )
    print(
        f"memory: {maps.nbytes / 1e6:.2f} MB of maps held (bare: 0), of which "
        f"{maps.bytes_copied / 1e6:.2f} MB had to be copied"
    )
    twins = zip(watched.model.state_dict().values(), bare.model.state_dict().values(), strict=True)
    if not all(torch.equal(w, b) for w, b in twins):
        raise SystemExit("the watched net differs from its twin")
    print("model:  all weights and buffers equal those of the unwatched twin, bit for bit")


def examine(model: nn.Module, test: tuple[Tensor, Tensor]) -> tuple[float, Statistics]:
    """Accuracy on the test set, and statistics of every activation on the way."""
    correct, stats = 0, Statistics()
    with capture(model, kinds="activation", analyses=stats, keep=0), torch.no_grad():
        for images, labels in batches(*test):
            correct += int((model(images).argmax(1) == labels).sum())
    return correct / len(test[0]), stats


def look_for(model: nn.Module, images: Tensor) -> None:
    """Draw the nine digits that excite some filters most, with what of them did, and a field."""
    top = TopInputs(k=9)
    with capture(model, DEEP, kinds="activation", analyses=top, keep=0), torch.no_grad():
        for part in torch.split(images, BATCH):
            model(part)
    found = top[DEEP]
    print(found)
    chosen = found.strongest(4)
    figure = found.plot(
        images,
        model=model,
        filters=chosen,
        below=projections(model, images, found, chosen),
        title=f"Four filters of {DEEP}: the parts of nine digits, and their projections",
    )
    figure.savefig(TOP_PICTURE, dpi=110)
    field = receptive_field(model, DEEP, images[:1])
    print(f"a location of {DEEP} sees {field.size} pixels, {field.stride} apart")
    hit = found[chosen[0]][0]
    field.plot(*hit.at, image=images[hit.input]).savefig(FIELD_PICTURE, dpi=110)


def projections(
    model: nn.Module, images: Tensor, found: LayerTops, filters: list[int]
) -> dict[int, list[Tensor]]:
    """What of each input excited each filter, in pixels: Zeiler & Fergus (2014), section 2.1."""
    found_by: dict[int, list[Tensor]] = {}
    for filter in filters:
        hits = found[filter]
        inputs = images[[hit.input for hit in hits]]
        places = [hit.at for hit in hits]
        projected = project(model, inputs, DEEP, filter, method="deconvnet", at=places)
        found_by[filter] = list(projected)
    return found_by


def heading(text: str) -> None:
    """Print a heading."""
    print(f"\n── {text} " + "─" * max(0, 90 - len(text)))


if __name__ == "__main__":
    main()
