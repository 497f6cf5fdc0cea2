"""Outputs asked for: whatever a module returns, and however it is called, is a map or is named."""

from __future__ import annotations

import copy
import re
import types
import warnings
from collections import OrderedDict, UserDict, UserList, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmapkit import CaptureWarning, MapLookupError, capture

Box = namedtuple("Box", "corners score")


class Plain:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.note, self.self = tensor, "x", self  # a cycle


class Slotted:
    __slots__ = ("__hidden", "never_filled", "shown")

    def __init__(self, tensor: Tensor) -> None:
        self.shown, self.__hidden = tensor, tensor + 1


class Inherited(Slotted):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        self.more = {"k": tensor * 2}


@dataclass
class Data:
    mean: Tensor
    boxes: list[Any] = field(default_factory=list)


class Items(list[Tensor]):
    scale: Tensor


def items(tensor: Tensor) -> Items:
    found = Items([tensor])
    found.scale = tensor * 3
    return found


class Attentive:
    """Says if anything of it is called."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)

    @property
    def costly(self) -> Tensor:
        raise AssertionError

    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError

    def __eq__(self, other: object) -> bool:
        raise AssertionError

    __hash__ = None  # type: ignore[assignment]


Wrap = Callable[[Tensor], Any]
Paths = dict[str, Callable[[Tensor], Tensor]]


def same(t: Tensor) -> Tensor:
    return t


FORMS: dict[str, tuple[Wrap, Paths]] = {
    "object": (Plain, {".tensor": same}),
    "namespace": (lambda t: types.SimpleNamespace(a=[t]), {".a[0]": same}),
    "slots": (Slotted, {".shown": same, "._Slotted__hidden": lambda t: t + 1}),
    "slots and more": (
        Inherited,
        {".shown": same, ".more['k']": lambda t: t * 2, "._Slotted__hidden": lambda t: t + 1},
    ),
    "attentive": (Attentive, {".tensor": same}),
    "dataclass": (
        lambda t: Data(t, [Box(t, None), Plain(t * 2)]),
        {".mean": same, ".boxes[0].corners": same, ".boxes[1].tensor": lambda t: t * 2},
    ),
    "user dict": (lambda t: UserDict(w={"v": t}), {"['w']['v']": same}),
    "user list": (lambda t: UserList([1, t]), {"[1]": same}),
    "deque": (lambda t: deque([t, t + 1]), {"[0]": same, "[1]": lambda t: t + 1}),
    "proxy": (lambda t: types.MappingProxyType({3: t}), {"[3]": same}),
    "ordered": (lambda t: OrderedDict(a=t, b=2), {"['a']": same}),
    "list with attributes": (items, {"[0]": same, ".scale": lambda t: t * 3}),
    "normal": (
        lambda t: torch.distributions.Normal(t, t.exp()),
        {".loc": same, ".scale": torch.exp},
    ),
    "wrapped normal": (
        lambda t: torch.distributions.Independent(torch.distributions.Normal(t, t.exp()), 1),
        {".base_dist.loc": same, ".base_dist.scale": torch.exp},
    ),
    # Its logits are there under two names, and are one map.
    "categorical": (
        lambda t: torch.distributions.Categorical(logits=t),
        {".logits": lambda t: t - t.logsumexp(-1, keepdim=True)},
    ),
    "objects in a list": (
        lambda t: [Plain(t), deque([Plain(t + 1)]), t],
        {"[0].tensor": same, "[1][0].tensor": lambda t: t + 1, "[2]": same},
    ),
}


class Block(nn.Module):
    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        self.fc, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.fc(x))


class Net(nn.Module):
    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        self.block, self.last = Block(wrap), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.block(x)
        return self.last(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", ["block", None])
def test_each_tensor_of_an_output_is_a_map_with_its_path(form: str, layers: str | None) -> None:
    torch.manual_seed(0)
    wrap, paths = FORMS[form]
    model = Net(wrap)
    bare = copy.deepcopy(model.block.fc)
    with capture(model, layers=layers, kinds="output") as maps, torch.no_grad():
        for _ in range(3):
            x = torch.randn(5, 4)
            t = bare(x)
            model(x)
            found = {fm.path: fm.tensor for fm in maps.select(layer="block")}
            assert list(found) == list(paths)
            for path, expected in paths.items():
                assert torch.equal(found[path], expected(t)), path
    assert maps.missed == []


def test_filters_are_followed_through_objects() -> None:
    class Through(Net):
        def forward(self, x: Tensor) -> Tensor:
            held = self.block(x)
            return self.last(torch.nn.functional.pad(torch.relu(held.tensor), (0, 1)))

    for wrap in (Plain, lambda t: types.SimpleNamespace(tensor=t)):
        model = Through(wrap)
        with capture(model) as maps, torch.no_grad():
            for _ in range(3):
                model(torch.randn(2, 4))
                assert maps["block.fc"].nonlinearity == "relu"
                assert maps["block.fc"].filter_dim == 1


def test_what_a_model_is_given_may_be_an_object() -> None:
    class OfABatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, batch: Any) -> Tensor:
            return torch.relu(batch.tensor @ self.weight)

    model = OfABatch()
    x = torch.randn(2, 4)
    with capture(model) as maps, torch.no_grad():
        for _ in range(2):
            model(Plain(x))
            assert torch.equal(maps["", "preactivation"].tensor, x @ model.weight)
            assert maps["", "activation"].filter_dim == 1


# -- what is no map is named ---------------------------------------------------------------------


def missed(model: nn.Module, *args: Any, **asked: Any) -> list[tuple[str, str]]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model, **asked) as maps:
            for _ in range(3):
                model(*args)
        return [(m.layer, m.reason) for m in maps.missed]


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda t: (x for x in [t]), "a generator, which cannot be looked into"),
        (lambda t: [t, iter([t])], r"a list_iterator at \[1\], which cannot be"),
        (lambda t: {"s": {t}}, r"a set at \['s'\], which cannot be"),
        (lambda t: lambda: t, "a function, which cannot be looked into"),
        (lambda t: t.numpy(), "an? ndarray, which cannot be looked into"),
        (lambda t: None, "it returned no tensor, but a NoneType"),
        (lambda t: float(t.sum()), "it returned no tensor, but a float"),
        (lambda t: [], "it returned no tensor, but a list"),
    ],
)
def test_an_output_without_a_map_is_named(wrap: Wrap, said: str) -> None:
    (entry,) = missed(Net(wrap), torch.ones(2, 4), layers="block", kinds="output")
    assert entry[0] == "block"
    assert re.search(said, entry[1])


def test_constants_are_not_named_where_nobody_asked_for_them() -> None:
    assert missed(Net(lambda t: (None, 3, "x")), torch.ones(2, 4), kinds="output") == []


# -- modules that are called past their hooks ----------------------------------------------------


class Soft(nn.Module):
    """A nonlinearity written by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs())


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.soft = nn.Linear(4, 4), Soft()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.soft(self.fc(x))


class OwnCall(Part):
    def __call__(self, x: Tensor) -> Tensor:
        return self.fc(x) * 2


class OwnCallGoesOn(Part):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x)  # type: ignore[no-any-return]


class Calls(nn.Module):
    def __init__(self, part: nn.Module, directly: bool) -> None:
        super().__init__()
        self.part, self.directly = part, directly
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part.forward(x) if self.directly else self.part(x))


@pytest.mark.parametrize(
    ("part", "directly", "said"),
    [
        (Part, True, "its forward was called directly"),
        (nn.ReLU, True, "its forward was called directly"),
        (OwnCall, False, "its class has a __call__ of its own"),
    ],
)
def test_outputs_that_no_hook_sees_are_named(
    part: type[nn.Module], directly: bool, said: str
) -> None:
    (entry,) = missed(Calls(part(), directly), torch.ones(2, 4), layers="part", kinds="output")
    assert entry[0] == "part"
    assert entry[1].startswith(said)


def test_a_call_of_its_own_that_goes_on_to_torch_s_is_seen() -> None:
    model = Calls(OwnCallGoesOn(), directly=False)
    bare, x = copy.deepcopy(model.part), torch.randn(2, 4)
    with capture(model, layers="part", kinds="output") as maps, torch.no_grad():
        for _ in range(2):
            model(x)
            assert torch.equal(maps["part"].tensor, bare(x))
    assert maps.missed == []


def test_a_nonlinearity_by_hand_that_no_hook_sees_is_named() -> None:
    (entry,) = missed(Calls(Soft(), directly=True), torch.ones(2, 4))
    assert entry == (
        "part",
        "its forward was called directly, which runs no hooks: what it is as a whole is not seen",
    )
    # What torch has as a function is seen as that.
    assert missed(Calls(nn.ReLU(), directly=True), torch.ones(2, 4)) == []
    assert missed(Calls(nn.Linear(4, 4), directly=True), torch.ones(2, 4)) == []


class ModelWithOwnCall(Part):
    def __call__(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


class OfFunctions(nn.Module):
    def __call__(self, x: Tensor) -> Tensor:
        return torch.relu(x)


@pytest.mark.parametrize("kind", [ModelWithOwnCall, OfFunctions])
def test_a_captured_model_with_a_call_of_its_own_says_why_there_is_no_pass(
    kind: type[nn.Module],
) -> None:
    entries = missed(kind(), torch.ones(2, 4))
    assert {layer for layer, _ in entries} == {""}
    # Where something was compiled before, that is named as another reason there may be.
    assert any(reason.startswith("its class has a __call__ of its own") for _, reason in entries)


def test_a_captured_model_whose_forward_is_called_says_why_there_is_no_pass() -> None:
    model = Part()
    said = pytest.warns(CaptureWarning, match="its forward was called directly")
    with said, capture(model) as maps:
        model.forward(torch.ones(2, 4))
    assert [m.layer for m in maps.missed] == [""]
    with pytest.raises(MapLookupError, match="its forward was called directly"):
        maps["fc"]
