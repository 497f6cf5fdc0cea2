"""Whose map it is, where names are not plain: stacked weights, layers that are not registered,
message passing, quantisers, other names of a module, containers.
"""

from __future__ import annotations

import re
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, FusedMovingAvgObsFakeQuantize
from torch.nn.utils import parametrizations, weight_norm

from fmapkit import CaptureWarning, UnknownLayerError, capture, edits
from fmapkit.analysis import DeadFilters, Statistics
from tests.checks import check, images, tags


class Body(nn.Module):
    """A forward given as a function of the module and its inputs, and what the module has."""

    def __init__(self, body: Callable[..., Tensor], **has: Any) -> None:
        super().__init__()
        for name, value in has.items():
            setattr(self, name, value)
        self.other = nn.Parameter(torch.zeros(2, 2))  # so that parameters go by their own names
        self.body = body

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.body(self, *inputs)


def stack(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


def labels(maps: Any, kind: str = "activation") -> list[tuple[str, int, range | None]]:
    return [(fm.layer, fm.call, fm.filters) for fm in maps.select(kind=kind, step=-1)]


# -- weights that are stacked in one parameter ---------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "weight", "label", "filters"),
    [
        # Three layers of 6 filters on 4 inputs each; the second, by an int and by a tensor.
        ((3, 6, 4), lambda w, i: w[1], "w[1]", range(6)),
        ((3, 6, 4), lambda w, i: w[-2], "w[1]", range(6)),
        ((3, 6, 4), lambda w, i: w[i], "w[1]", range(6)),
        ((3, 6, 4), lambda w, i: w[i, 2:5], "w[1]", range(2, 5)),
        ((3, 6, 4), lambda w, i: w[i][2:5], "w[1]", range(2, 5)),
        ((3, 6, 4), lambda w, i: w.select(0, 1), "w[1]", range(6)),
        ((3, 6, 4), lambda w, i: list(w)[1], "w[1]", range(6)),
        ((3, 6, 4), lambda w, i: w.unbind()[1], "w[1]", range(6)),
        ((3, 6, 4), lambda w, i: w.chunk(3)[1].squeeze(0), "w[1]", range(6)),
        ((3, 6, 4), lambda w, i: w.double()[i].float() * 2, "w[1]", range(6)),
        ((3, 6, 4), lambda w, i: w.view(18, 4)[6:12], "w[1]", range(6)),
        ((3, 6, 4), lambda w, i: w.flatten(0, 1)[7:9], "w[1]", range(1, 3)),
        ((3, 6, 4), lambda w, i: w.view(18, 4)[3:9], "w", None),  # of two of them
        ((3, 4, 6), lambda w, i: w.transpose(1, 2)[i], "w[1]", range(6)),
        ((3, 4, 6), lambda w, i: w[i].t()[::2], "w[1]", range(0, 6, 2)),
        ((2, 3, 6, 4), lambda w, i: w[1][i], "w[1, 1]", range(6)),
        ((2, 3, 6, 4), lambda w, i: w[i, i], "w[1, 1]", range(6)),
        ((6, 3, 4), lambda w, i: w[:, i], "w[:, 1]", range(6)),
        ((6, 4, 3), lambda w, i: w[..., i], "w[:, :, 1]", range(6)),
        # One layer, of which some filters are used.
        ((6, 4), lambda w, i: w[2:5], "w", range(2, 5)),
        ((9, 4), lambda w, i: w[i:][::3], "w", range(1, 9, 3)),
        ((6, 4), lambda w, i: w[torch.tensor([1, 0, 5])], "w", None),
        ((6, 8), lambda w, i: w[:, torch.tensor([1, 0, 5, 2])], "w", range(6)),
    ],
)
def test_which_weight_of_a_stack(shape: Any, weight: Any, label: str, filters: Any) -> None:
    model = Body(lambda m, x, i: F.linear(x, weight(m.w, i)).relu(), w=stack(*shape))
    with capture(model) as maps, torch.no_grad():
        for n in range(3):
            x = torch.randn(5, 4)
            model(x, torch.tensor(1))
            assert labels(maps) == [(label, 0, filters)], n
            z = F.linear(x, weight(model.w, torch.tensor(1)))
            assert torch.equal(maps[label, "preactivation"].tensor, z)
            assert torch.equal(maps[label].tensor, z.relu())


def test_columns_of_a_product_are_numbered_as_in_the_parameter() -> None:
    # x @ w has a filter for each column; the parameter has as many rows as columns are used.
    model = Body(
        lambda m, x: torch.relu(x @ m.w[:, 4:]) + torch.tanh(x @ m.w[:, :4]), w=stack(4, 8)
    )
    expected = [("w", 0, "relu", range(4, 8)), ("w", 1, "tanh", range(4))]
    check(model, images(3, 4), expected, train=False)
    check(
        Body(lambda m, x: torch.relu(x @ m.w), w=stack(4)), images(3, 4), [("w", 0, "relu", None)]
    )


@pytest.mark.parametrize("grads", [False, True])
def test_an_index_from_data_is_read_in_each_pass(grads: bool) -> None:
    class Pick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = stack(3, 6, 4), stack(3, 4, 6)

        def forward(self, x: Tensor, i: Tensor) -> Tensor:
            return F.linear(F.relu(F.linear(x, self.up[i])), self.down[i])

    model = nn.ModuleDict({"pick": Pick()})
    whole = Body(lambda m, x, i: m.pick(x, i), pick=model["pick"])
    with capture(whole, kinds="response") as maps, torch.set_grad_enabled(grads):
        for i in (0, 2, 2, 1, 0):
            x = torch.randn(5, 4)
            whole(x, torch.tensor(i))
            assert [fm.layer for fm in maps] == [f"pick.up[{i}]", f"pick.down[{i}]"]
            true = F.linear(x, model["pick"].up[i])
            assert torch.equal(maps[f"pick.up[{i}]", "response"].tensor, true)


class Experts(nn.Module):
    """As in `transformers`: which experts run, and on which rows, depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = stack(2, 4, 4), stack(2, 4, 4)
        with torch.no_grad():
            self.up.abs_()
            self.up[0, 0] = -1.0  # filter 0 of expert 0 is dead for positive inputs

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in route.unique():
            rows = torch.where(route == e)[0]
            h = F.relu(F.linear(x[rows], self.up[e]))
            out.index_add_(0, rows, F.linear(h, self.down[e]))
        return out


def test_experts_are_kept_apart() -> None:
    torch.manual_seed(0)
    model = Body(lambda m, x, route: m.experts(x, route), experts=Experts())
    dead, stats = DeadFilters(after=1), Statistics()
    rows = {0: 0, 1: 0}
    with capture(model, kinds=("response", "activation"), analyses=[dead, stats]) as maps:
        for route in ([0, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]):
            x = torch.rand(5, 4)
            model(x, torch.tensor(route))
            for e in set(route):
                mine = x[torch.tensor(route) == e]
                rows[e] += len(mine)
                assert torch.equal(
                    maps[f"experts.up[{e}]"].tensor, F.relu(F.linear(mine, model.experts.up[e]))
                )
    assert dead["experts.up[0]"].dead_filters == [0]
    assert dead["experts.up[1]"].dead_filters == []
    for e, count in rows.items():
        for part in ("up", "down"):
            assert stats[f"experts.{part}[{e}]", "response"].count.tolist() == [count] * 4
    assert dead.missed == stats.missed == {}


def test_an_edit_of_one_expert_s_filter_changes_no_other_s() -> None:
    model = Experts()
    x, route = torch.rand(4, 4), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        bare = model(x, route)
        with capture(model, edit={("up[1]", "activation", 2): edits.zero()}) as maps:
            changed = model(x, route)
        h = F.relu(F.linear(x[1::2], model.up[1]))
        h[:, 2] = 0
        assert torch.equal(changed[::2], bare[::2])
        assert torch.equal(changed[1::2], F.linear(h, model.down[1]))
        assert maps.missed == []
        with capture(model, layers="up[*]", filters={"up[1]": [3], "up[0]": [0, 2]}) as maps:
            model(x, route)
        assert labels(maps) == [("up[0]", 0, (0, 2)), ("up[1]", 0, (3,))]
        assert torch.equal(maps["up[1]"][3].tensor, F.relu(F.linear(x[1::2], model.up[1]))[:, 3])


def test_the_sum_of_experts_is_no_one_expert_s() -> None:
    model = Body(lambda m, x, route: torch.tanh(m.experts(x, route)), experts=Experts())
    with capture(model, kinds="activation") as maps:
        model(torch.rand(4, 4), torch.tensor([0, 1, 0, 1]))
        assert labels(maps)[-1] == (":tanh", 0, range(4))
        model(torch.rand(4, 4), torch.tensor([1, 1, 1, 1]))  # one alone
        assert labels(maps)[-1] == ("experts.down[1]", 0, range(4))


def test_a_product_with_a_whole_stack_has_no_single_filter_axis() -> None:
    # Filter k of layer e is number 6 e + k: neither axis alone counts them.
    x = torch.randn(3, 5, 4)
    for product in (
        lambda m, x: torch.bmm(x, m.w).relu(),
        lambda m, x: torch.einsum("end,edh->enh", x, m.w).relu(),
        lambda m, x: torch.bmm(x, m.w[torch.tensor([2, 0, 1])]).relu(),
    ):
        with capture(Body(product, w=stack(3, 4, 6))) as maps:
            maps_of_each_pass = [
                labels(maps) for _ in range(2) if maps._session.asked.model(x) is not None
            ]
        assert maps_of_each_pass == [[("w", 0, None)]] * 2
    with capture(Body(lambda m, x: torch.bmm(x, m.w[1:2]).relu(), w=stack(3, 4, 6))) as maps:
        maps._session.asked.model(x[:1])
        assert labels(maps) == [("w[1]", 0, range(6))]
    # Heads that are put together are counted along one axis again.
    heads = Body(
        lambda m, x: torch.einsum("nd,dhk->nhk", x, m.w).flatten(1).relu(), w=stack(4, 2, 3)
    )
    check(heads, images(5, 4), [("w", 0, "relu", range(6))])


# -- layers that are not registered --------------------------------------------------------------


class Held:
    __slots__ = ("empty", "first")

    def __init__(self) -> None:
        self.first = nn.Linear(4, 4)


class Backwards(list[nn.Module]):
    def __iter__(self) -> Any:
        return reversed([*super().__iter__()])


def chain(layers: Callable[[Any], Any]) -> Callable[..., Tensor]:
    def body(m: Any, x: Tensor) -> Tensor:
        for layer in layers(m):
            x = torch.relu(layer(x) + 1)
        return x

    return body


def two(width: int = 4) -> list[nn.Module]:
    return [nn.Linear(4, 4), nn.Linear(4, width)]


@pytest.mark.parametrize(
    ("has", "layers", "names"),
    [
        (two(), lambda at: at, ["at[0]", "at[1]"]),
        (two(6), lambda at: at, ["at[0]", "at[1]"]),
        (tuple(two()), lambda at: [f.forward for f in at], ["at[0]", "at[1]"]),
        (deque(two()), lambda at: at, ["at[0]", "at[1]"]),
        (Backwards(two()), lambda at: at, ["at[1]", "at[0]"]),
        (dict(zip(["a", 3], two(), strict=True)), lambda at: at.values(), ["at['a']", "at[3]"]),
        (SimpleNamespace(of=[two()]), lambda at: at.of[0], ["at.of[0][0]", "at.of[0][1]"]),
        (Held(), lambda at: [at.first], ["at.first"]),
        ([nn.Sequential(*two())], lambda at: at[0], ["at[0].0", "at[0].1"]),
        ([weight_norm(two()[0]), parametrizations.orthogonal(two()[0])], list, ["at[0]", "at[1]"]),
        ([nn.LayerNorm(4), nn.LayerNorm(4)], lambda at: at, ["at[0]", "at[1]"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_layers_in_plain_python_go_by_how_python_gets_at_them(
    has: Any, layers: Any, names: list[str]
) -> None:
    torch.manual_seed(0)
    model, stats = Body(chain(lambda m: layers(m.at)), at=has), Statistics()
    with capture(model, analyses=stats) as maps, torch.no_grad():
        for _ in range(3):
            x = torch.randn(3, 4)
            model(x)
            assert [fm.layer for fm in maps.select(kind="activation", step=-1)] == names
            for name, layer in zip(names, layers(has), strict=True):
                assert torch.equal(maps[name, "preactivation"].tensor, layer(x) + 1)
                x = maps[name].tensor
                assert maps[name].filters == range(x.shape[1])
    assert stats.layers == names
    assert all(stats[name].count.tolist() == [9] * len(stats[name]) for name in names)
    assert stats.missed == {}


def test_plain_layers_can_be_asked_for() -> None:
    model = Body(chain(lambda m: m.at), at=two())
    for asked in ("at[0]", "at[0]*", re.compile(r"t\[0"), lambda name: name == "at[0]"):
        with capture(model, layers=asked, edit={"at[0]": edits.zero()}) as maps:
            out = model(torch.randn(2, 4))
        assert maps.layers == ["at[0]"]
        assert torch.equal(out, torch.relu(model.at[1](torch.zeros(2, 4)) + 1))
    with capture(model, layers=nn.Linear) as maps:
        model(torch.randn(2, 4))
    assert maps.layers == ["at[0]", "at[1]"]
    with pytest.raises(UnknownLayerError, match=r"layers='at' .* did you mean 'at\["):
        capture(model, layers="at")


OUTSIDE = two()


def test_layers_that_nothing_leads_to_have_names_of_their_own() -> None:
    def body(m: Any, x: Tensor, turn: bool) -> Tensor:
        for layer in OUTSIDE if turn else reversed(OUTSIDE):
            x = torch.relu(layer(x))
        return x

    model = Body(body)
    with capture(model, kinds="activation") as maps, torch.no_grad():
        for n in range(4):
            x = torch.randn(3, 4)
            model(x, n % 2 == 0)
            names = [":linear", ":linear#1"]
            assert maps.layers == (names[::-1] if n % 2 else names)
            for name, layer in zip(names, OUTSIDE, strict=True):
                if maps.layers[0] == name:
                    assert torch.equal(maps[name].tensor, torch.relu(layer(x)))


def test_weights_that_a_forward_makes_are_not_one_layer() -> None:
    def made(m: Any, x: Tensor) -> Tensor:
        x = F.linear(x, m.one(x).t() @ x).relu()  # which filters these are, nobody knows
        x = F.linear(x, m.two(x).t() @ x).relu()
        x = F.linear(x, torch.ones(4, 4)).relu()
        return nn.Linear(4, 3)(x).relu()

    model, stats = Body(made, one=nn.Linear(4, 4), two=nn.Linear(4, 4)), Statistics()
    with capture(model, kinds="activation", analyses=stats) as maps, torch.no_grad():
        model(torch.randn(5, 4))
        found = labels(maps)
    assert len({layer for layer, _, _ in found}) == 4
    assert [filters for _, _, filters in found] == [None, None, range(4), range(3)]
    assert all(layer.startswith(":linear") for layer, _, _ in found)


def test_buffers_and_plain_tensors_that_weigh() -> None:
    model = Body(lambda m, x: F.linear(F.linear(x, m.p).relu(), m.plain[0]).tanh())
    model.register_buffer("p", torch.randn(4, 4))
    model.plain = [torch.randn(4, 4)]
    check(
        model,
        images(3, 4),
        [("p", 0, "relu", range(4)), ("plain[0]", 0, "tanh", range(4))],
        train=False,
    )


@pytest.mark.parametrize("first", ["registered", "called"])
def test_a_layer_that_the_first_pass_builds_has_one_name(first: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.a(x).relu()
        if hasattr(m, "fc"):
            return m.fc(x).sigmoid()
        fc = nn.Linear(4, 3)
        if first == "registered":
            m.fc = fc
        x = fc(x).sigmoid()
        m.fc = fc
        return x

    model, stats = Body(body, a=nn.Linear(4, 4)), Statistics()
    name = "fc" if first == "registered" else ":linear"
    with capture(model, kinds="activation", analyses=stats) as maps, torch.no_grad():
        for _ in range(3):
            model(torch.randn(5, 4))
            assert labels(maps) == [("a", 0, range(4)), (name, 0, range(3))]
    assert stats[name].count.tolist() == [15] * 3


def test_an_analysis_goes_on_where_a_layer_comes_with_other_filters() -> None:
    class Slim(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, x: Tensor, width: Tensor) -> Tensor:
            if width.sum() > 0:
                return F.relu(F.linear(x, self.fc.weight[:3]))
            return F.relu(self.fc(x))

    model, stats, dead = Slim(), Statistics(), DeadFilters(after=1)

    def run() -> None:
        with capture(model, kinds="activation", analyses=[stats, dead]), torch.no_grad():
            for width in (0, 1, 0):
                model(torch.randn(2, 4), torch.tensor(width))

    with pytest.warns(CaptureWarning, match=r"fc.* had 6 filters .* has 3 filters"):
        run()
    assert stats["fc"].count.tolist() == [4] * 6
    assert list(stats.missed) == list(dead.missed) == [("fc", "activation")]


# -- what keeps filters apart --------------------------------------------------------------------

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 2, 2]])
ADJACENCY = torch.zeros(6, 6).index_put((EDGES[1], EDGES[0]), torch.ones(8), accumulate=True)


def columns(index: Tensor) -> Tensor:
    return index[:, None].expand(-1, 5)


MESSAGES: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "index_add": (
        lambda h, e: torch.zeros_like(h).index_add_(0, e[1], h.index_select(0, e[0])),
        EDGES,
    ),
    "keywords": (
        lambda h, e: torch.index_add(input=torch.zeros_like(h), dim=0, index=e[1], source=h[e[0]]),
        EDGES,
    ),
    "scatter_add": (
        lambda h, e: h.new_zeros(6, 5).scatter_add(0, columns(e[1]), h.gather(0, columns(e[0]))),
        EDGES,
    ),
    "scatter_reduce": (
        lambda h, e: h.new_zeros(6, 5).scatter_reduce(0, columns(e[1]), h[e[0]], "amax"),
        EDGES,
    ),
    "index_put": (
        lambda h, e: h.new_zeros(6, 5).index_put((e[1],), h[e[0]], accumulate=True),
        EDGES,
    ),
    "segments": (
        lambda h, e: torch.segment_reduce(h, "sum", lengths=torch.tensor([2, 4]), axis=0),
        EDGES,
    ),
    "mm": (lambda h, a: torch.mm(a, h), ADJACENCY),
    "matmul": (lambda h, a: a / a.sum(1, keepdim=True).clamp_min(1) @ h, ADJACENCY),
    "einsum": (lambda h, a: torch.einsum("ij,jd", a, h), ADJACENCY),
    "transposed": (lambda h, a: (h.t() @ a).t(), ADJACENCY),
    "sparse": (lambda h, a: torch.sparse.mm(a, h), ADJACENCY.to_sparse()),
    "sparse @": (lambda h, a: a @ h, ADJACENCY.to_sparse_csr()),
    "sparse sum": (lambda h, a: torch.sparse.addmm(h, a, h), ADJACENCY.to_sparse()),
    "sparse, made": (
        lambda h, e: torch.sparse.mm(torch.sparse_coo_tensor(e, torch.ones(8), (6, 6)), h),
        EDGES,
    ),
    "attention": (lambda h, a: torch.softmax(h @ h.t(), -1) @ h, ADJACENCY),
    "mask": (lambda h, a: torch.where(a[:, :5] > 0, h, 0.0), ADJACENCY),
    "padded": (
        lambda h, e: padded(h, (torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1] * 3))),
        EDGES,
    ),
    "masked in": (lambda h, e: padded(h, torch.ones(3, 2, dtype=torch.bool)), EDGES),
}


def padded(h: Tensor, index: Any) -> Tensor:
    out = h.new_zeros(3, 2, 5)
    out[index] = h
    return out


@pytest.mark.parametrize("how", MESSAGES)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_messages_keep_filters_apart(how: str) -> None:
    torch.manual_seed(0)
    message, graph = MESSAGES[how]
    model = Body(lambda m, x, g: F.relu(message(m.fc(x), g)), fc=nn.Linear(4, 5))
    with torch.no_grad():
        model.fc.bias[3] = 0
        model.fc.weight[3] = 0  # filter 3 is dead, in whichever place
    dead = DeadFilters(after=1)
    with capture(model, analyses=dead) as maps, torch.no_grad():
        for _ in range(2):
            out = model(torch.randn(6, 4), graph)
            assert [t[0] for t in tags(maps)] == ["fc"]
            assert maps["fc"].filters == range(5)
            assert torch.equal(maps["fc"].tensor, out)
    assert 3 in dead["fc"].dead_filters


@pytest.mark.parametrize(
    "mixed",
    [
        lambda h, e: h @ h.new_ones(5, 5),  # sums over filters
        lambda h, e: h.t() @ h,  # filters by filters
        lambda h, e: h.new_zeros(6, 5).scatter_add(1, e[:1, :5].expand(6, -1) % 5, h),
        lambda h, e: h.new_zeros(6, 5).index_add(1, e[0, :5] % 5, h),
        lambda h, e: torch.einsum("nd,dk->nk", h, h.new_ones(5, 5)),
        lambda h, e: torch.cat([h.new_zeros(6, 1), h], 1)[:, :5],
    ],
)
def test_sums_over_filters_are_no_layer_s(mixed: Any) -> None:
    torch.manual_seed(0)
    model = Body(lambda m, x: F.relu(mixed(m.fc(x), EDGES)), fc=nn.Linear(4, 5))
    check(model, images(6, 4), [(":relu", 0, "relu", None)], train=False)


def test_of_two_layers_that_write_the_target_s_name_a_sum() -> None:
    def sage(m: Any, x: Tensor) -> Tensor:  # x of the node, and of those around it
        return F.relu(m.own(x).index_add_(0, EDGES[1], m.around(x)[EDGES[0]]))

    model = Body(sage, own=nn.Linear(4, 5), around=nn.Linear(4, 5))
    check(model, images(6, 4), [("own", 0, "relu", range(5))])

    def halves(m: Any, x: Tensor) -> Tensor:  # rows of one, and rows of another
        out = x.new_zeros(6, 5)
        out[:3], out[3:] = m.own(x[:3]), m.around(x[3:])
        return F.relu(out)

    model = Body(halves, own=nn.Linear(4, 5), around=nn.Linear(4, 5))
    check(model, images(6, 4), [(":relu", 0, "relu", range(5))], train=False)
    model.around = model.own
    check(model, images(6, 4), [("own", 0, "relu", range(5))], train=False)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("quantizer", [FakeQuantize, FusedMovingAvgObsFakeQuantize])
def test_a_quantiser_is_no_nonlinearity(quantizer: Any, training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), quantizer(), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model.train(training)
    passes = images(2, 3, 4, 4)
    check(model, passes, [("0", 0, "relu", range(4))], train=training)


def test_a_quantiser_called_as_a_function() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = torch.fake_quantize_per_channel_affine(
            m.conv(x), torch.full((4,), 0.1), torch.zeros(4), 1, -128, 127
        )
        return F.relu(torch.fake_quantize_per_tensor_affine(y, 0.1, 0, -128, 127))

    model = Body(body, conv=nn.Conv2d(3, 4, 1))
    check(model, images(2, 3, 4, 4), [("conv", 0, "relu", range(4))], train=False)


# -- names that mean a module --------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4))
        self.second = self.first
        self.attention = nn.MultiheadAttention(4, 2)
        self.again = self.attention

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(
    "layers",
    ["second.0", "first.0", "sec*", re.compile("^second"), lambda name: name == "second.0"],
)
def test_a_module_is_found_by_each_of_its_names(layers: Any) -> None:
    model, x = Tied(), torch.randn(3, 4)
    with capture(model, layers=layers, kinds="activation") as maps:
        model(x)
    assert [(fm.layer, fm.call) for fm in maps] == [("first.0", 0), ("first.0", 1)]
    for name in ("first.0", "second.0"):
        assert name in maps
        assert [fm.call for fm in maps.select(layer=name)] == [0, 1]


def test_other_names_in_look_ups_filters_and_edits() -> None:
    model, x = Tied(), torch.randn(3, 4)
    kinds = ("response", "preactivation", "activation", "output")
    with capture(model, layers=["second", "again.in_proj"], kinds=kinds) as maps:
        model(x)
    assert {fm.layer for fm in maps} == {"first", "attention.in_proj"}
    assert [fm.call for fm in maps.select("again.in_proj", "response")] == [0, 1, 2]
    with capture(
        model, filters={"second.0": [1]}, edit={("second.0", "activation"): edits.zero()}
    ) as maps:
        model(x)
    (a, _) = maps.select("second.0", "activation")
    assert a.filters == (1,)
    assert torch.equal(a.edited, torch.zeros(3, 1))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pair = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.blocks = nn.ModuleList([nn.Linear(4, 4), pair, nn.ModuleDict({"a": nn.Linear(4, 4)})])
        self.weights = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](x).relu())
        x = self.blocks[2]["a"](x).sigmoid()
        for weight in self.weights:
            x = F.linear(x, weight).relu()
        return self.head(x)


@pytest.mark.parametrize("layers", ["blocks", "block?", nn.ModuleList, re.compile("blocks$")])
def test_a_container_stands_for_what_it_holds(layers: Any) -> None:
    model, x = Blocks(), torch.randn(3, 4)
    with capture(model, layers=layers) as maps:
        for _ in range(2):
            model(x)
            found = [(fm.layer, fm.kind) for fm in maps if fm.kind not in ("preactivation",)]
            # The pair in the middle is no layer with filters: what it returns is meant.
            expected = [("blocks.0", "activation"), ("blocks.1", "output")]
            assert found == [*expected, ("blocks.2.a", "activation")]
            assert torch.equal(maps["blocks.1"].tensor, model.blocks[1](maps["blocks.0"].tensor))
    held = [fm.layer for fm in maps.select("blocks", kind="activation")]
    assert held == ["blocks.0", "blocks.2.a"]
    with pytest.raises(
        UnknownLayerError,
        match=re.escape(
            "'blocks' is a ModuleList, which is never called and has no map of its own; "
        ),
    ):
        maps["blocks"]


def test_a_container_of_parameters_stands_for_their_layers() -> None:
    model = Blocks()
    with capture(model, layers="weights", kinds="activation") as maps:
        model(torch.randn(3, 4))
    assert maps.layers == ["weights.0", "weights.1"]


class Turning(nn.ModuleList):
    """Another order in each loop, and another item for the same index."""

    turn = 0

    def __iter__(self) -> Any:
        self.turn += 1
        return iter([*self._modules.values()][:: 1 if self.turn % 2 else -1])

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index if self.turn % 2 else 1 - index)


class Chosen:
    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self if owner is None else owner.b if owner.blocks.turn % 2 else owner.a


class Containers(nn.Module):
    fc = Chosen()

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Turning([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).relu()
        return torch.tanh(self.fc(self.blocks[0](x)))


@pytest.mark.parametrize("turn", [0, 1])
def test_owners_behind_containers_and_descriptors_of_one_s_own(turn: int) -> None:
    model = Containers()
    model.blocks.turn = turn
    with capture(model, kinds="activation") as maps:
        model(torch.randn(2, 4))
    names = [("blocks.0", 0), ("blocks.1", 0), ("b", 0)]
    swapped = [("blocks.1", 0), ("blocks.0", 0), ("a", 0)]
    assert [(fm.layer, fm.call) for fm in maps] == (swapped if turn else names)


def test_nothing_of_a_capture_is_taken_for_a_part_of_the_model() -> None:
    # What a model holds of a capture leads to tensors of its passes.
    model = Body(lambda m, x: nn.Linear(4, 4)(x).relu())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with capture(model, kinds="activation") as maps, torch.no_grad():
            object.__setattr__(model, "maps", maps)
            for _ in range(3):
                model(torch.randn(2, 4))
                assert all(layer.startswith(":linear") for layer in maps.layers)


class Hostile:
    """Nothing of it may be asked while a pass runs."""

    def __init__(self) -> None:
        self.layers = [nn.Linear(4, 4)]

    def __getattribute__(self, name: str) -> Any:
        asks = sys._getframe(1).f_globals["__name__"]
        if asks.startswith("fmapkit") and name != "__class__":  # which `isinstance` asks for
            raise AssertionError(f"{name} was asked for")
        return super().__getattribute__(name)

    @property
    def other(self) -> Any:
        raise AssertionError("a property was asked for")


def test_the_way_to_a_layer_runs_none_of_the_model_s_own_code() -> None:
    model = Body(chain(lambda m: m.at.layers), at=Hostile())
    model.beside = [list(range(10**6)), weakref.ref(model), model, torch.optim.SGD]
    check(model, images(2, 4), [("at.layers[0]", 0, "relu", range(4))], train=False)


class _Joins(nn.Module):
    """Puts what layers return into one tensor, along another axis than that of the filters."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8)
        self.stacked = nn.Parameter(torch.randn(3, 4, 4))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.how(self, x))


def _in_view(z: Tensor, write: Any) -> Tensor:
    """What is written into a view of a tensor is in the tensor, too."""
    write(z)
    return z


def _written(m: Any, x: Tensor) -> Tensor:
    """Other filters of one layer in the two halves of the rows."""
    both, y = m.c(x), torch.zeros(6, 4)
    y[:3], y[3:] = both[:3, :4], both[3:, 4:]
    return y


def _experts(m: Any, x: Tensor) -> Tensor:
    """As JetMoe has them: rows of one expert may be none."""
    parts = x.split([2, 0, 4])
    return torch.cat([F.linear(part, w) for part, w in zip(parts, m.stacked, strict=True)])


@pytest.mark.parametrize(
    ("how", "layer", "dim"),
    [
        (lambda m, x: torch.cat([m.a(x[:2]), m.b(x[2:])]), ":relu", 1),
        (lambda m, x: torch.cat([m.a(x)[:0], m.b(x)]), ":relu", 1),
        (lambda m, x: torch.stack([m.a(x), m.b(x)]), ":relu", 2),
        (lambda m, x: torch.where(x[:, :1] > 0, m.a(x), m.b(x)), ":relu", 1),
        (_experts, ":relu", 1),
        (lambda m, x: torch.maximum(m.a(x), m.b(x)), ":relu", 1),
        (lambda m, x: torch.max(m.a(x), m.b(x)), ":relu", 1),
        (lambda m, x: torch.complex(m.a(x), m.b(x)).imag, ":relu", 1),
        (lambda m, x: _in_view(m.a(x), lambda z: z[:2].copy_(m.b(x)[:2])), ":relu", 1),
        (lambda m, x: _in_view(m.a(x), lambda z: z.view(-1)[:4].copy_(m.b(x)[0])), ":relu", 1),
        (lambda m, x: _in_view(m.a(x), lambda z: z[:, :2].copy_(m.b(x)[:, 2:])), ":relu", 1),
        (lambda m, x: _in_view(m.a(x), lambda z: z.detach()[1:].copy_(m.b(x)[1:])), ":relu", 1),
        (lambda m, x: _in_view(m.a(x), lambda z: torch.add(m.b(x)[0], 1, out=z[0])), ":relu", 1),
        (lambda m, x: _in_view(m.c(x), lambda z: z[:, :4].copy_(z[:, 4:].clone())), "c", None),
        (lambda m, x: _in_view(m.a(x), lambda z: z[:2].copy_(m.a(x + 1)[:2])), "a", 1),
        (lambda m, x: _in_view(m.a(x), lambda z: z[:2].zero_()), "a", 1),
        (lambda m, x: _in_view(m.a(x), lambda z: z[:2].add_(m.b(x)[:2])), "a", 1),
        (lambda m, x: torch.maximum(m.a(x), m.a(x + 1)), "a", 1),
        (lambda m, x: torch.cat([m.a(x[:2]), m.a(x[2:])]), "a", 1),
        (lambda m, x: torch.cat([m.a(x), torch.zeros(1, 4)]), "a", 1),
        (lambda m, x: torch.where(x[:, :1] > 0, m.a(x), 0.1 * x.new_ones(6, 1)), "a", 1),
        (lambda m, x: torch.cat(m.c(x).chunk(2, 1)), "c", None),
        (lambda m, x: torch.stack(m.c(x).chunk(2, 1)), "c", None),
        (_written, "c", None),
    ],
)
def test_rows_of_several_layers_are_no_one_layers(how: Any, layer: str, dim: int | None) -> None:
    model = _Joins(how)
    with capture(model) as maps, torch.no_grad():
        for _ in range(3):
            x = torch.randn(6, 4)
            out = model(x)
            (a,) = maps.select(kind="activation", step=-1)
            assert (a.layer, a.call, a.nonlinearity, a.filter_dim) == (layer, 0, "relu", dim)
            assert torch.equal(a.tensor, out)
    assert list(maps.missed) == []


class _Writes(nn.Module):
    """Writes into what it is given, and returns nothing of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.b, self.act, self.how = nn.Linear(4, 4), nn.ReLU(inplace=True), how

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        if self.how == "rows":
            z[:2] = self.b(x)[:2]
        elif self.how == "whole":
            z.copy_(self.b(x))
        elif self.how == "view":
            z[:2].copy_(self.b(x)[:2])
        elif self.how == "turned":
            z.t_()
        else:
            return self.b(self.act(z))
        return x


class _Decides(nn.Module):
    """Is traced in every pass, and its parts are read by their plans."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.part, self.how = nn.Linear(4, 4), _Writes(how.partition(" ")[0]), how

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        z = self.a(x)
        self.part(z[:] if self.how == "view of it" else z, x)
        return torch.tanh(z)


@pytest.mark.parametrize(
    ("how", "layer", "dim"),
    [
        ("rows", ":tanh", 1),
        ("whole", "part.b", 1),
        ("view", ":tanh", 1),
        ("view of it", ":tanh", 1),
        ("turned", "a", 0),
        ("act", ":tanh", 1),
    ],
)
def test_what_a_part_does_to_its_argument_is_known_in_every_pass(
    how: str, layer: str, dim: int
) -> None:
    model = _Decides(how)
    with capture(model) as maps, torch.no_grad():
        for _ in range(5):
            out = model(torch.randn(4, 4))
            last = maps.select(kind="activation", step=-1)[-1]
            assert (last.layer, last.call, last.nonlinearity, last.filter_dim) == (
                *(layer, 0, "tanh", dim),
            )
            assert torch.equal(last.tensor, out)
    assert list(maps.missed) == []
