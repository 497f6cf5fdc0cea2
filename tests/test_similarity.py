"""`Similarity`: CKA and RSA of all pairs of layers, against direct computation in float64."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmapkit import ArgumentError, CaptureWarning, NoPassError, UnknownLayerError, capture
from fmapkit.analysis import Similarity


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 36, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu_()
        return self.out(torch.tanh(self.fc(x.flatten(1))))


NAMES = ["conv", "fc"]


def features(net: Net, x: Tensor) -> list[np.ndarray[Any, Any]]:
    with torch.no_grad():
        a = net.conv(x).relu().flatten(1)
        return [t.double().numpy() for t in (a, torch.tanh(net.fc(a)))]


def hsic_by_definition(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    """The mean of the kernel of the U-statistic, as Song et al. (2012), equation 5, has it."""
    k, l = x @ x.T, y @ y.T  # noqa: E741
    n = len(k)
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    one = np.ones(n)
    whole = np.trace(k @ l)
    whole += (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    whole -= 2 / (n - 2) * (one @ k @ l @ one)
    return float(whole / (n * (n - 3)))


def cka_by_definition(
    batches: list[tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]],
) -> np.ndarray[Any, Any]:
    """Each HSIC is its mean over batches, weighted by samples."""

    def mean(pick: Any) -> float:
        weights = [len(a[0]) for a, _ in batches]
        return float(
            np.average([hsic_by_definition(*pick(a, b)) for a, b in batches], weights=weights)
        )

    rows, columns = len(batches[0][0]), len(batches[0][1])
    found = np.empty((rows, columns))
    for i in range(rows):
        for j in range(columns):
            both = mean(lambda a, b, i=i, j=j: (a[i], b[j]))
            first = mean(lambda a, b, i=i: (a[i], a[i]))
            second = mean(lambda a, b, j=j: (b[j], b[j]))
            found[i, j] = both / np.sqrt(first * second)
    return found


def rsa_by_definition(parts: list[list[np.ndarray[Any, Any]]]) -> np.ndarray[Any, Any]:
    """The correlation of 1 - np.corrcoef over all pairs of samples of a batch, batches joined."""
    apart = []
    for layer in range(len(parts[0])):
        pieces = []
        for batch in parts:
            table = 1 - np.corrcoef(batch[layer])
            pieces.append(table[np.triu_indices(len(table), 1)])
        apart.append(np.concatenate(pieces))
    return np.corrcoef(np.stack(apart))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("sizes", [[32], [8, 8, 8], [16, 4, 9]])
def test_equals_direct_computation_in_float64(sizes: list[int], train: bool) -> None:
    torch.manual_seed(0)
    net, found = Net(), Similarity(rsa=True)
    batches = [torch.randn(n, 1, 8, 8) for n in sizes]
    with (
        torch.set_grad_enabled(train),
        capture(net, NAMES, kinds="activation", analyses=found, keep=0),
    ):
        for x in batches:
            net(x)
    parts = [features(net, x) for x in batches]
    assert found.layers == (NAMES, NAMES)
    expected = cka_by_definition([(p, p) for p in parts])
    assert np.abs(found.cka.numpy() - expected).max() < 1e-12
    assert np.abs(found.rsa.numpy() - rsa_by_definition(parts)).max() < 1e-9
    assert found["conv", "fc"] == found.cka[0, 1].item() == found["fc", "conv"]
    assert torch.equal(found.cka, found.cka.T)
    assert not found.missed


@pytest.mark.parametrize("together", [False, True])
def test_two_models_that_see_the_same_batches(together: bool) -> None:
    torch.manual_seed(0)
    a, b, found = Net(), Net(), Similarity()
    batches = [torch.randn(n, 1, 8, 8) for n in (8, 8, 5)]
    options: dict[str, Any] = {"kinds": "activation", "keep": 0}
    if together:
        with (
            capture(a, NAMES, analyses=found.first, **options),
            capture(b, "fc", analyses=found.second, **options),
        ):
            for x in batches:
                a(x), b(x)
    else:  # a block for each pass
        for x in batches:
            with capture(b, "fc", analyses=found.second, **options):
                b(x)
            with capture(a, NAMES, analyses=found.first, **options):
                a(x)
    assert found.layers == (NAMES, ["fc"])
    expected = cka_by_definition([(features(a, x), features(b, x)[1:]) for x in batches])
    assert np.abs(found.cka.numpy() - expected).max() < 1e-12
    assert found["conv", "fc"] == found.cka[0, 0].item()


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_small_pass_is_left_out_alone_where_each_has_a_block_of_its_own(by_hand: bool) -> None:
    torch.manual_seed(0)
    net, apart, together = Net(), Similarity(), Similarity()
    batches = [torch.randn(n, 1, 8, 8) for n in (8, 3, 3, 7, 5)]
    for x in batches:
        given: Any = None if by_hand else apart
        with capture(net, NAMES, kinds="activation", analyses=given or []) as maps:
            net(x)
        for fm in pickle.loads(pickle.dumps(list(maps))) if by_hand else ():
            apart.update(fm)
    with capture(net, NAMES, kinds="activation", analyses=together, keep=0):
        for x in batches:
            net(x)
    assert torch.equal(apart.cka, together.cka)
    parts = [features(net, x) for x in batches if len(x) > 3]
    expected = cka_by_definition([(p, p) for p in parts])
    assert np.abs(apart.cka.numpy() - expected).max() < 1e-12
    assert set(apart.missed.values()) == {"a pass of 3 samples: the estimate takes 4 or more"}


def test_layers_that_take_turns_have_no_pass_in_common_in_blocks_of_their_own_either() -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.even = nn.Linear(8, 6), nn.Linear(8, 6), True

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu((self.a if self.even else self.b)(x))

    torch.manual_seed(0)
    net, held, apart, copied = Turns(), [], Similarity(), Similarity()
    for i, x in enumerate(torch.randn(4, 10, 8)):
        net.even = i % 2 == 0
        with capture(net, kinds="activation", analyses=apart, keep="all") as maps, torch.no_grad():
            net(x)
        held.append(maps)
    for maps in (copy.copy(maps) for maps in held):
        for fm in maps:
            copied.update(fm)
    for found in (apart, copied):
        assert found.layers[0] == ["a", "b"]
        assert np.isnan(found["a", "b"])
        assert found["a", "a"] == found["b", "b"] == 1


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(4, 20),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    shift=st.sampled_from([0.0, 1e4]),
)
def test_rotations_scales_and_shifts_of_features_change_nothing(
    seed: int, count: int, scale: float, shift: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 6, dtype=torch.float64))
    with torch.no_grad():
        model[1].weight.copy_(scale * rotation)
        model[1].bias.fill_(shift)
    found = Similarity()
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    with capture(model, ["0", "1"], kinds="output", analyses=found), torch.no_grad():
        model(x)
    lost = 1e-9 if shift == 0 or scale >= 1 else 1e-4  # what the shift itself rounds away
    assert abs(found["0", "1"] - 1) < lost


def test_independent_features_have_none_in_the_mean_where_the_biased_estimate_has_much() -> None:
    # Gretton's biased HSIC of 8 samples in 50 dimensions would give a CKA of about 0.85.
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(y)

    model, found = Two(), Similarity()
    with capture(model, ["a", "b"], kinds="output", analyses=found, keep=0):
        for _ in range(300):
            model(torch.randn(8, 50), torch.randn(8, 50))
    assert abs(found["a", "b"]) < 0.1
    assert found["a", "a"] == pytest.approx(1)


def test_kinds_calls_and_nonlinearities_of_a_layer_are_told_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.fc(x)
            return self.fc(torch.tanh(z) * torch.sigmoid(z)).relu()

    model, found = Twice(), Similarity()
    with capture(model, analyses=found, keep=0):
        for _ in range(3):
            model(torch.randn(6, 4))
    rows, _ = found.layers
    assert rows == [
        "fc preactivation",
        "fc",
        "fc preactivation (sigmoid)",
        "fc (sigmoid)",
        "fc preactivation #1",
        "fc #1",
    ]
    assert found["fc preactivation", "fc preactivation (sigmoid)"] == pytest.approx(1)


def test_outputs_go_by_the_layer_where_that_is_free() -> None:
    model, found = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), Similarity()
    with capture(model, kinds=("activation", "output"), analyses=found, keep=0):
        model(torch.randn(6, 4))
    assert found.layers[0] == ["0 output", "0", "1", "2", "(model)"]
    assert found["0", "1"] == pytest.approx(1)  # what the tanh returned: one map, two names
    assert found["2", "(model)"] == pytest.approx(1)


def test_what_is_left_out_is_named() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(2, 4), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.complex(self.a(x).relu(), x)).real + self.b(
                x.reshape(-1, 2)
            ).relu().reshape(len(x), 2, 4).sum(1)

    model, found = Windows(), Similarity()
    with capture(model, ["a", "b", "c"], kinds=("activation", "output"), analyses=found, keep=0):
        model(torch.randn(6, 4))
    assert found.missed["b"] == "it has 12 samples, and the first map of the pass 6"
    assert found.missed["c"].startswith("it is complex")
    small = Similarity()
    with capture(model, "a", kinds="activation", analyses=small, keep=0):
        model(torch.randn(3, 4))
    assert small.missed == {"a": "a pass of 3 samples: the estimate takes 4 or more"}
    with pytest.raises(NoPassError) as caught:
        _ = small.cka
    assert str(caught.value) == (
        "Similarity: no pass has been seen; left out: 'a: a pass of 3 samples: the estimate takes "
        "4 or more'"
    )


class Beside(nn.Module):
    """Two layers beside one another."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.one(x)).sum() + torch.relu(self.two(x)).sum()


@pytest.mark.parametrize("count", [4, 9, 14])
@pytest.mark.parametrize("same", [0.0, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_that_is_the_same_throughout_is_nan(
    count: int, same: float, dtype: torch.dtype
) -> None:
    # Nine times 0.1, by nine, is not 0.1.
    torch.manual_seed(0)
    model, found = Beside().to(dtype), Similarity(rsa=True)
    with torch.no_grad(), capture(model, kinds="activation", analyses=found, keep=0):
        model.two.weight.zero_()
        model.two.bias.fill_(same)
        model(torch.randn(count, 4, dtype=dtype))
    for table in (found.cka, found.rsa):
        assert table[0, 0].item() == pytest.approx(1)
        assert table[1].isnan().all()


def test_samples_without_a_correlation_are_left_out_of_rsa() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.Tanh())
    x = torch.randn(30, 4)
    x[0] = 0.0  # of which the first layer is 0
    with torch.no_grad():
        net[0].bias.fill_(-1e-3)
        a = net[1](net[0](x)).double().numpy()
        b = torch.tanh(net[2](net[1](net[0](x)))).double().numpy()
    silent = (a == 0).all(1)
    assert 0 < silent.sum() < 20
    alike = Similarity(rsa=True)
    with capture(net, kinds="activation", analyses=alike, keep=0), torch.no_grad():
        net(x)
    rows, columns = np.triu_indices(30, 1)
    both = ~(silent[rows] | silent[columns])
    with np.errstate(invalid="ignore"):
        p, q = ((1 - np.corrcoef(t))[rows, columns] for t in (a, b))
    assert alike.rsa[0, 1] == pytest.approx(np.corrcoef(p[both], q[both])[0, 1], abs=1e-9)
    assert alike.rsa.diagonal().tolist() == pytest.approx([1, 1])


def test_a_layer_that_runs_in_some_passes_only() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x).relu()
            return self.b(x).relu() if x.sum() > 0 else a

    model, found = Either(), Similarity()
    x = torch.rand(8, 4)
    with capture(model, analyses=found, kinds="activation", keep=0):
        for sign in (-1, 1, -1):
            model(sign * x)
    only = Similarity()
    with capture(model, analyses=only, kinds="activation", keep=0):
        model(x)
    assert found["a", "b"] == pytest.approx(only["a", "b"], abs=1e-12)


def test_a_checkpoint_goes_on_to_the_same_bits() -> None:
    torch.manual_seed(0)
    net, whole, begun = Net(), Similarity(rsa=True), Similarity(rsa=True)
    batches = [torch.randn(8, 1, 8, 8) for _ in range(4)]
    resumed = Similarity(rsa=True)

    def see(found: Similarity, some: list[Tensor]) -> None:
        with capture(net, NAMES, kinds="activation", analyses=found, keep=0):
            for x in some:
                net(x)

    see(whole, batches)
    see(begun, batches[:2])
    resumed.load_state_dict(begun.state_dict())
    see(resumed, batches[2:])
    assert torch.equal(resumed.cka, whole.cka)
    assert torch.equal(resumed.rsa, whole.rsa)
    with pytest.raises(ArgumentError) as caught:
        Similarity().load_state_dict(begun.state_dict())
    assert str(caught.value) == "load_state_dict: the state is of rsa=True, not rsa=False"


def _see(net: Net, side: Any, *sizes: int) -> None:
    with capture(net, NAMES, kinds="activation", analyses=side, keep=0):
        for size in sizes:
            net(torch.randn(size, 1, 8, 8))


def test_errors_say_what_and_what_next() -> None:
    net, found = Net(), Similarity()
    assert repr(found) == "Similarity: no pass seen yet"
    with capture(net, NAMES, kinds="activation", analyses=found, keep=0):
        net(torch.randn(8, 1, 8, 8))
    with pytest.raises(UnknownLayerError, match=re.escape("no layer 'con'; did you mean 'conv'?")):
        found["con", "fc"]
    with pytest.raises(ArgumentError) as caught:
        _ = found.rsa
    assert str(caught.value) == "RSA was not asked for: Similarity(rsa=True)"
    with pytest.raises(ArgumentError) as caught:
        _see(net, found.first, 8)
    assert str(caught.value) == (
        "a Similarity is of one model, as an analysis itself, or of two, by first and second; not "
        "both"
    )
    two = Similarity()
    _see(net, two.first, 8)
    _see(net, two.second, 6)
    with pytest.raises(ArgumentError) as caught:
        _ = two.cka
    assert str(caught.value) == (
        "Similarity: the first model was given 8 samples in a pass, and the second one 6: give "
        "both the same batches"
    )
    ahead = Similarity()
    with pytest.raises(ArgumentError) as caught:
        _see(net, ahead.first, *[4] * 100)
    assert str(caught.value) == (
        "Similarity: the first model is 64 passes ahead of the other one: give both each batch in "
        "turn"
    )
    with pytest.raises(ArgumentError):
        Similarity(rsa=1)  # type: ignore[arg-type]


def test_the_table_and_the_picture() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    torch.manual_seed(0)
    net, found = Net(), Similarity(rsa=True)
    with capture(net, NAMES, kinds="activation", analyses=found, keep=0):
        net(torch.randn(8, 1, 8, 8))
    table = repr(found).splitlines()
    assert table[0].split() == ["CKA", "conv", "fc"]
    assert table[-1] == "Similarity: 2 × 2 layers"
    figure = found.plot()
    image = figure.axes[0].images[0]
    assert np.array_equal(image.get_array(), found.cka.numpy())
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == NAMES
    found.plot(figure.axes[0], measure="rsa", title="RSA")
    with pytest.raises(ArgumentError, match="measure must be 'cka' or 'rsa', not 'cca'"):
        found.plot(measure="cca")
    pyplot.close("all")


def test_a_pass_of_one_model_alone_is_warned_of() -> None:
    """It shifts all pairs after it."""
    torch.manual_seed(0)
    a, b, alike = Net(), Net(), Similarity()
    with (
        torch.no_grad(),
        capture(a, NAMES, kinds="activation", analyses=alike.first, keep=0),
        capture(b, NAMES, kinds="activation", analyses=alike.second, keep=0),
    ):
        a(torch.randn(8, 1, 8, 8))  # to warm up
        for _ in range(3):
            x = torch.randn(8, 1, 8, 8)
            a(x)
            b(x)
    with pytest.warns(CaptureWarning, match="the first model was given 1 passes more"):
        table = str(alike)
    assert "paired in their order" in table
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ = alike.cka  # once is enough


@pytest.mark.parametrize("skipped", [((3,), (5,)), ((4,), ()), ((), (2, 3)), ((1, 2, 4), (6, 7))])
def test_a_pass_that_one_model_lost_is_left_out_of_both(skipped: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), torch.randn(64, 4)
    alike, whole = Similarity(), Similarity()
    both = [n for n in range(8) if n not in skipped[0] + skipped[1]]
    with capture(model, kinds="activation") as maps, torch.no_grad():
        for step, batch in enumerate(x.split(8)):
            model(batch)
            fm = maps["0"]
            for side, without in zip((alike.first, alike.second), skipped, strict=True):
                if step not in without:
                    side.update(fm)
            if step in both:
                whole.update(fm)
    assert alike["0", "0"] == pytest.approx(1, abs=1e-12)
    assert torch.equal(alike.cka, whole.cka)


def test_numbered_batches_of_other_inputs_are_refused() -> None:
    torch.manual_seed(0)
    nets, x = (Net(), Net()), torch.randn(24, 1, 8, 8)

    def seen(*orders: Tensor) -> Similarity:
        alike = Similarity()
        for net, side, order in zip(nets, (alike.first, alike.second), orders, strict=True):
            with capture(net, kinds="activation", analyses=side, keep=0) as maps, torch.no_grad():
                for ids in order.split(8):
                    maps.batch(ids)
                    net(x[ids])
        return alike

    order = torch.randperm(24)
    assert seen(order, order)["fc", "fc"] > 0
    other = order.clone()
    other[[9, 10]] = order[[10, 9]]
    with pytest.raises(ArgumentError) as error:
        seen(order, other)
    assert str(error.value) == (
        f"Similarity: the first model was given input {order[9]} as number 1 of a pass, and the "
        f"second one input {order[10]}: give both the same batches"
    )


@pytest.mark.parametrize("by", ["reset", "load_state_dict"])
def test_captures_that_are_open_go_on_after_a_reset(by: str) -> None:
    torch.manual_seed(0)
    a, b, alike, whole = Net(), Net(), Similarity(), Similarity()
    empty = Similarity().state_dict()
    batches = [torch.randn(8, 1, 8, 8) for _ in range(3)]

    def see(found: Similarity, some: list[Tensor], forget: bool) -> None:
        with (
            torch.no_grad(),
            capture(a, NAMES, kinds="activation", analyses=found.first, keep=0),
            capture(b, NAMES, kinds="activation", analyses=found.second, keep=0),
        ):
            if forget:
                a(batches[0])
                if by == "reset":
                    found.reset()
                else:
                    found.load_state_dict(empty)
            for x in some:
                a(x)
                b(x)

    see(alike, batches, forget=True)
    see(whole, batches, forget=False)
    assert torch.equal(alike.cka, whole.cka)
