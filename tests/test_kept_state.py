"""Models that keep tensors of a pass, and read them in later ones: caches, queues, states.

What is kept is of earlier passes as a pass begins, so it carries no label. Which of its tensors a
pass reads, and whether they are its own, follows from its path and from the form of what is kept.
"""

from __future__ import annotations

import copy
import operator
import random as dice
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmapkit import capture
from fmapkit.instrumentation.pair import Pair
from fmapkit.torchlib.call_override import standing_before
from tests.test_paths import Turn, hold, labels, turns

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")


class Cache:
    """Keys and values of all passes so far, as `transformers` has them."""

    def __init__(self) -> None:
        self.layers: list[dict[str, Tensor]] = []

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values, with some more."""
        if layer == len(self.layers):
            self.layers.append({"k": k, "v": v})
        else:
            own = self.layers[layer]
            own["k"], own["v"] = torch.cat([own["k"], k], 1), torch.cat([own["v"], v], 1)
        return self.layers[layer]["k"], self.layers[layer]["v"]


class Attending(nn.Module):
    """Two layers of attention that keep what they have seen."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        for at, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            q, k, v = qkv(x).chunk(3, -1)
            if cache is not None:
                k, v = cache.update(at, k, v)
            length = k.shape[1]
            weights = (q @ k.transpose(1, 2)).view(x.shape[0], -1, length).softmax(-1)
            x = x + torch.relu(out(weights @ torch.tanh(v)))
        return x


@pytest.mark.parametrize("by_name", [False, True])
def test_a_cache_that_grows_is_no_reason_to_trace(by_name: bool, traced: list[None]) -> None:
    model, n = Attending().eval(), 0
    bare = copy.deepcopy(model)
    with capture(model) as maps, torch.no_grad():
        for text in range(3):
            cache, other = Cache(), Cache()
            for step in range(8):
                x = torch.randn(2, 1 if step else 4, 8)
                alone, given = copy.deepcopy(bare), copy.deepcopy(other)
                if (text, step) == (1, 1):
                    n = len(traced)
                out = model(x, cache=cache) if by_name else model(x, cache)
                before = len(traced)
                assert torch.equal(out, bare(x, other))
                with capture(alone) as own:
                    alone(x, given)
                del traced[before:]
                assert labels(maps) == labels(own)
                assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(maps, own, strict=True))
        assert len(traced) == n
    assert not maps.missed


class Keeping(nn.Module):
    """Keeps tensors in a way that is given."""

    def __init__(self, how: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 4)
        self.how = how
        self.kept: Any = None
        self.queue: deque[Tensor] = deque()
        self.by_name: dict[str, Tensor] = {}
        self.pages: list[list[Tensor]] = [[], []]

    def forward(self, x: Tensor) -> Tensor:
        h = self.how(self, self.one(x), self.two(x))
        return torch.relu(self.last(torch.tanh(h)))


def _state(m: Any, a: Tensor, b: Tensor) -> Tensor:
    old = b if m.kept is None else m.kept
    m.kept = torch.sigmoid(a + old)
    return m.kept


def _swapped(m: Any, a: Tensor, b: Tensor) -> Tensor:
    old, m.kept = m.kept, a
    return b if old is None else old


def _queue(m: Any, a: Tensor, b: Tensor) -> Tensor:
    m.queue.append(a)
    m.queue.append(b)
    return m.queue.popleft() if len(m.queue) > 3 else m.queue[-1]


def _first(m: Any, a: Tensor, b: Tensor) -> Tensor:
    """Of this pass, or of an earlier one: only the number of them tells."""
    m.queue.append(a)
    found = m.queue[0]
    if len(m.queue) > 2:
        m.queue.rotate(1)
        m.queue.pop()
    return found + b


def _by_name(m: Any, a: Tensor, b: Tensor) -> Tensor:
    m.by_name["b"] = b
    m.by_name["a"] = m.by_name.get("a", b) * 0.5 + a
    return next(iter(m.by_name.values()))


def _pages(m: Any, a: Tensor, b: Tensor) -> Tensor:
    m.pages[0], m.pages[1] = m.pages[1], [a, b]
    return m.pages[0][1] if m.pages[0] else b


def _written(m: Any, a: Tensor, b: Tensor) -> Tensor:
    if m.kept is None:
        m.kept = a.clone()
    m.kept.mul_(0.5).add_(b)
    return m.kept.clone()


def _same_twice(m: Any, a: Tensor, b: Tensor) -> Tensor:
    """One tensor under two names, and then two: a write to the one is one to the other."""
    if m.kept is None:
        m.kept = a.detach().clone()
        m.by_name["x"] = m.kept
    with torch.no_grad():
        m.by_name["x"].copy_(b)
    found = m.kept + 0
    m.kept = m.kept.clone() if found.sum() > 0 else m.kept
    return found


def _history(m: Any, a: Tensor, b: Tensor) -> Tensor:
    m.pages[0].append(a)
    return torch.stack(m.pages[0]).sum(0) + b


def _of_first_pass(m: Any, a: Tensor, b: Tensor) -> Tensor:
    if m.kept is None:
        m.kept = a.detach()
    return m.kept + b


WAYS = [_state, _swapped, _queue, _first, _by_name, _pages, _written, _same_twice, _history]
WAYS += [_of_first_pass]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("train", [False, True])
def test_what_is_kept_is_of_earlier_passes(how: Any, train: bool) -> None:
    if train and how in (_written, _state, _queue, _swapped, _first, _by_name, _pages, _history):
        pytest.skip("the second backward would go through the first graph")
    hold(Keeping(how), turns(*[(2, 3)] * 9), train=train, most=1)


@pytest.mark.parametrize("how", [_state, _swapped, _by_name, _pages])
def test_it_is_replayed_once_its_form_is_known(how: Any, traced: list[None]) -> None:
    model = Keeping(how).eval()
    with capture(model) as maps, torch.no_grad():
        for _ in range(6):
            model(torch.randn(2, 3))
        learned = len(traced)
        for _ in range(6):
            model(torch.randn(2, 3))
        assert len(traced) == learned
    assert not maps.missed


class Inside(nn.Module):
    """What keeps tensors is a part of a model that is traced, which may look at what it keeps."""

    def __init__(self, how: Callable[[Any, Tensor, Tensor], Tensor], then: str) -> None:
        super().__init__()
        self.first, self.part, self.other = nn.Linear(3, 3), Keeping(how), nn.Linear(4, 3)
        self.then = then
        self.part.kept = None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if float(x.sum()) > 1e9:
            return x
        if self.then == "before":
            x = x + self._seen(x)
        y = self.part(x)
        if self.then == "after":
            y = y + torch.sigmoid(self._seen(y))
        elif self.then == "writes" and isinstance(self.part.kept, Tensor):
            self.part.kept = self.part.kept.detach()
            self.part.kept.clamp_(-1, 1)
        elif self.then == "twice":
            y = y + self.part(torch.tanh(self.other(y)))
        elif self.then == "puts":
            self.part.kept = torch.tanh(y)
        return torch.relu(self.other(y))

    def _seen(self, like: Tensor) -> Tensor:
        kept = [self.part.kept, *self.part.queue, *self.part.by_name.values(), *self.part.pages[0]]
        found = [t for t in kept if isinstance(t, Tensor)]
        whole = torch.tanh(sum(found)[:, : like.shape[1]]) if found else like  # type: ignore[index]
        return torch.nn.functional.silu(whole)


def _seen_only(m: Any, a: Tensor, b: Tensor) -> Tensor:
    m.kept = torch.softmax(a, -1)
    return m.kept @ m.kept.T @ b


@pytest.mark.parametrize("then", ["nothing", "before", "after", "writes", "twice", "puts"])
@pytest.mark.parametrize("how", [*WAYS, _seen_only])
def test_what_a_part_of_a_traced_model_keeps(how: Any, then: str) -> None:
    more = 2 + (how is _seen_only and then != "before")  # of the others, all have to fit
    hold(Inside(how, then), turns(*[(2, 3), (2, 3), (more, 3), (2, 3)] * 4), most=0)


@pytest.mark.parametrize("then", ["nothing", "after"])
@pytest.mark.parametrize("how", [_seen_only, _state, _by_name])
def test_a_part_is_replayed_all_the_same(how: Any, then: str) -> None:
    model = Inside(how, then).eval()
    with capture(model), torch.no_grad():
        for _ in range(8):
            model(torch.randn(2, 3))
        around = {
            m for m in model.modules() if any(isinstance(h, Pair) for h in standing_before(m))
        }
    assert around == {model, model.first, model.part, model.other}


def test_a_list_that_grows_is_traced_and_not_learned_again_each_time() -> None:
    model = Keeping(_history).eval()
    with capture(model) as maps, torch.no_grad():
        for _ in range(24):
            model(torch.randn(2, 3))
        assert model in maps._session.parts.regions._opened
    assert not maps.missed


class Held:
    """An object with slots."""

    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner


class Named(NamedTuple):
    """A tuple with names."""

    inner: Any


@dataclass(slots=True)
class Field:
    """A dataclass with slots."""

    inner: Any


class Key:
    """Equal to no other."""


def _first_key(m: Any, a: Tensor, b: Tensor) -> Tensor:
    m.kept = m.kept or dict.fromkeys(m.keys, b)
    m.kept[m.keys[0]] = a
    return next(iter(m.kept.values()))


def _other_order(m: Any) -> None:
    if m.kept is not None:
        first = next(iter(m.kept))
        m.kept[first] = m.kept.pop(first)


def _oldest(m: Any, a: Tensor, b: Tensor) -> Tensor:
    m.kept = m.kept or OrderedDict(a=b, b=b)
    m.kept["a"] = a
    return next(iter(m.kept.values()))


def _sorted(m: Any, a: Tensor, b: Tensor) -> Tensor:
    m.kept = m.kept or [[0, b], [1, b]]
    m.kept[0][1] = a
    m.kept.sort(key=operator.itemgetter(0))
    return m.kept[0][1] * 1.0


def _named(m: Any, a: Tensor, b: Tensor) -> Tensor:
    m.kept = m.kept or [{"x": b, "y": b}, ["x", "y"]]
    m.kept[1].reverse()
    m.kept[0].update(zip(m.kept[1], (a, b), strict=True))
    return m.kept[0]["x"]


def _registered(m: Any, a: Tensor, b: Tensor) -> Tensor:
    """What is kept is a buffer, too, or it is none."""
    with torch.no_grad():
        m.kept = m.kept.copy_(a)
    return m.buffer * 1.0


def _set(m: Any, a: Tensor, b: Tensor) -> Tensor:
    m.kept = m.kept or {b.detach()}
    m.kept.add(a)
    found = next(iter(m.kept)) * 1.0
    while len(m.kept) > 2:
        m.kept.pop()
    return found


def _turned(m: Any) -> None:
    if isinstance(m.kept, OrderedDict) and torch.initial_seed() % 2:
        m.kept.move_to_end(next(iter(m.kept)))
    elif isinstance(m.kept, list) and isinstance(m.kept[0], list) and torch.initial_seed() % 2:
        m.kept[0][0], m.kept[1][0] = m.kept[1][0], m.kept[0][0]


KEYS: list[list[Any]] = [["x", "y"], [(0, "k"), (1, "k")], [0.5, 1.5], [True, None], [Key(), Key()]]


@pytest.mark.parametrize("keys", KEYS)
def test_the_keys_of_what_is_kept_are_a_part_of_its_form(keys: list[Any]) -> None:
    model = Keeping(_first_key)
    model.keys = keys  # type: ignore[assignment]
    passes = turns(*[(2, 3)] * 9)
    for n in (3, 5, 6):
        passes[n].before = _other_order
    hold(model, passes)


@pytest.mark.parametrize("how", [_oldest, _sorted, _named])
def test_what_python_itself_picks_by_is_a_part_of_the_form(how: Any) -> None:
    passes = turns(*[(2, 3)] * 12)
    for n, turn in enumerate(passes):
        turn.before = lambda m, n=n: (torch.manual_seed(n // 3), _turned(m))  # type: ignore[misc]
    hold(Keeping(how), passes, most=1)


def test_a_buffer_that_is_kept_under_another_name_and_then_not() -> None:
    model = Keeping(_registered)
    model.register_buffer("buffer", torch.zeros(2, 4))
    passes = turns(*[(2, 3)] * 9)
    for n, turn in enumerate(passes):
        turn.before = lambda m, n=n: setattr(  # type: ignore[misc]
            m, "kept", torch.zeros(2, 4) if n in (3, 4, 7) else m.buffer
        )
    hold(model, passes, most=1)


@pytest.mark.parametrize("kind", [Held, Named, Field])
def test_whatever_holds_a_queue_is_looked_into(kind: Any) -> None:
    class Delayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.kept.inner.append(self.one(x))
            return torch.tanh(self.kept.inner[0])

    model, bare = Delayed(), Delayed()
    bare.load_state_dict(model.state_dict())
    queues: list[deque[Tensor]] = [deque(maxlen=2), deque(maxlen=2)]
    model.kept, bare.kept = map(kind, queues)
    with capture(model) as maps, torch.no_grad():
        for n in range(8):
            x = torch.randn(2, 3)
            if n in (4, 6):
                queues[0].clear()
                queues[1].clear()
            model(x)
            given, alone = labels(maps), copy.deepcopy(bare)
            bare(x)
            with capture(alone) as own:
                alone(x)
            assert given == labels(own)


class InPlace(nn.Module):
    """The input itself is kept, once the model has written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.kept: deque[Tensor] = deque(maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        x += self.one(x)
        self.kept.append(x)
        return torch.tanh(self.kept[0])


class FarInside(nn.Module):
    """A queue in dicts of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.kept: Any = {"a": {"b": {"c": {"d": {"e": {"f": deque(maxlen=2)}}}}}}

    def forward(self, x: Tensor) -> Tensor:
        own = self.kept["a"]["b"]["c"]["d"]["e"]["f"]
        own.append(self.one(x))
        return torch.tanh(own[0])


@pytest.mark.parametrize("kind", [InPlace, FarInside])
def test_an_input_that_was_written_to_and_a_queue_far_inside(kind: Any) -> None:
    model, bare = kind(), kind()
    bare.load_state_dict(model.state_dict())
    with capture(model) as maps, torch.no_grad():
        for _ in range(6):
            x = torch.randn(2, 3)
            model(x.clone())
            given, alone = [m.tensor.clone() for m in maps], copy.deepcopy(bare)
            tags = labels(maps)
            bare(x.clone())
            with capture(alone) as own:
                alone(x.clone())
            assert tags == labels(own)
            assert all(torch.equal(a, b.tensor) for a, b in zip(given, own, strict=True))


class Turning(nn.Module):
    """Python itself picks by an attribute under which name a tensor is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 4)
        self.kept = {"x": torch.zeros(2, 4), "y": torch.zeros(2, 4)}
        self.now, self.then = "x", "y"

    def forward(self, x: Tensor) -> Tensor:
        self.now, self.then = self.then, self.now
        self.kept.update({self.now: self.one(x)})
        return torch.tanh(self.kept["x"])


def test_an_attribute_is_compared_where_tensors_are_kept() -> None:
    model = Turning()
    with capture(model) as maps, torch.no_grad():
        for n in range(8):
            model(torch.randn(2, 3))
            assert maps["one", "preactivation"].nonlinearity == ("tanh" if n % 2 else None)
    assert not maps.missed


def test_what_has_no_order_is_traced_in_every_pass(traced: list[None]) -> None:
    """Which tensor of a set comes first, their addresses decide."""
    model = Keeping(_set).eval()
    with capture(model), torch.no_grad():
        for n in range(6):
            model(torch.randn(2, 3))
            assert len(traced) == n + 1


def test_a_state_that_is_deleted_or_emptied_in_between() -> None:
    def state(m: Any, a: Tensor, b: Tensor) -> Tensor:
        old = m.kept if hasattr(m, "kept") and m.kept is not None else a
        m.kept = old * 0.5 + b
        return torch.tanh(old)

    def empty(m: Any) -> None:
        m.kept = None

    passes = turns(*[(2, 3)] * 9)
    passes[3].before = lambda m: delattr(m, "kept")
    passes[5].before = empty
    seen = hold(Keeping(state), passes, most=1)
    assert not any("failed here" in reason for _, reason in seen.missed)


def test_a_cache_with_places_that_a_number_tells() -> None:
    """As the first Llama had it: memory for all positions, and where to begin."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kv = nn.Linear(4, 8)
            self.memory = torch.zeros(2, 16, 8)

        def forward(self, x: Tensor, start: int) -> Tensor:
            self.memory[:, start : start + x.shape[1]] = torch.relu(self.kv(x))
            return torch.tanh(self.memory[:, : start + x.shape[1]]).sum(1)

    passes = []
    for text in range(3):
        start = 0
        for length in (5, 1, 1, 1, 2, 1):
            x = torch.randn(2, length, 4, generator=torch.Generator().manual_seed(text))
            passes.append(Turn((x, start)))
            start += length
    hold(Places(), passes)


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(["push", "pop", "first", "last", "swap", "turn", "new"]), max_size=5),
    st.integers(0, 3),
)
def test_any_queue_in_any_pass(steps: list[str], at_first: int) -> None:
    class Queue(Keeping):
        def __init__(self) -> None:
            super().__init__(_state)
            self.queue.extend(torch.zeros(2, 4) for _ in range(at_first))

        def forward(self, x: Tensor) -> Tensor:
            a, b = torch.sigmoid(self.one(x)), self.two(x)
            found = b
            for step in self.steps:
                if step == "push":
                    self.queue.append(a)
                elif step == "new":
                    self.queue.appendleft(b)
                elif not self.queue:
                    continue
                elif step == "pop":
                    found = self.queue.popleft()
                elif step == "swap":
                    self.queue[0], self.queue[-1] = self.queue[-1], self.queue[0]
                elif step == "turn":
                    self.queue.rotate(1)
                else:
                    found = self.queue[0 if step == "first" else -1]
            while len(self.queue) > 3:
                self.queue.pop()
            return torch.relu(found)

    model = Queue()
    model.steps = steps  # type: ignore[assignment]
    hold(model, turns(*[(2, 3)] * 8), most=2)


def test_the_passes_of_two_texts_in_turn() -> None:
    """Two caches, of which one is longer: what is kept is another's in each pass."""
    model, own = Attending().eval(), Attending().eval()
    own.load_state_dict(model.state_dict())
    drawn = dice.Random(0)
    with capture(model) as maps, torch.no_grad():
        caches, others = [Cache(), Cache(), Cache()], [Cache(), Cache(), Cache()]
        for n in range(24):
            at = drawn.randrange(3)
            if drawn.random() < 0.15:
                caches[at], others[at] = Cache(), Cache()
            x = torch.randn(1, drawn.choice((1, 1, 3)), 8)
            out = model(x, caches[at])
            assert torch.equal(out, own(x, others[at])), n
            assert [m.layer for m in maps if m.kind == "activation" and m.nonlinearity == "relu"]
    assert not maps.missed
