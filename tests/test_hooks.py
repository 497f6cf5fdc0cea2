"""What is set before a module's call: set at once, removed without a trace."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import FeatureMaps, capture
from fmapkit.instrumentation.hook_registry import Hooks
from fmapkit.torchlib.call_override import standing_before


def _hooks() -> Hooks:
    return Hooks(object(), lambda *_: False)


def _is_bare(module: nn.Module) -> bool:
    """Whether it has no hooks, and nobody stands before its call."""
    hooks: list[dict[int, Any]] = [
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    ]
    return not any(hooks) and "_compiled_call_impl" not in module.__dict__


def test_what_is_set_is_removed_and_no_more() -> None:
    first, second = nn.Linear(2, 2), nn.ReLU()
    calls: list[str] = []
    theirs = first.register_forward_hook(lambda *_: calls.append("theirs"))
    hooks = _hooks()
    hooks.around([first, second], lambda *_: calls.append("pre"), lambda *_: calls.append("post"))
    hooks.around([first], None, None)  # it has them
    first(torch.ones(1, 2))
    assert calls == ["pre", "theirs", "post"]
    assert hooks.modules() == {first, second}

    hooks.drop("around", keep=[first])
    assert _is_bare(second)
    first(torch.ones(1, 2))
    assert calls[3:] == ["pre", "theirs", "post"]

    hooks.drop("around", only=[first, first, second])
    assert list(first._forward_hooks) == [theirs.id]
    theirs.remove()
    assert _is_bare(first)
    assert hooks.modules() == set()


def test_several_stand_one_behind_the_other() -> None:
    module = nn.ReLU()
    one, other = _hooks(), _hooks()
    for hooks in (one, other):
        hooks.around([module], lambda *_: None, lambda *_: None)
    assert [s.owner for s in standing_before(module)] == [one.owner, other.owner]
    one.drop()
    assert [s.owner for s in standing_before(module)] == [other.owner]
    other.drop()
    assert _is_bare(module)


def test_removed_in_the_middle_of_a_call_they_do_nothing() -> None:
    module, calls = nn.ReLU(), []
    hooks = _hooks()
    theirs = module.register_forward_hook(lambda *_: hooks.drop())
    hooks.around([module], lambda *_: calls.append("pre"), lambda *_: calls.append("post"))
    module(torch.ones(1))
    assert calls == ["pre"]
    hooks.around([module], lambda *_: calls.append("new"), lambda *_: None)  # and may come again
    module(torch.ones(1))
    assert calls == ["pre", "new"]
    theirs.remove()
    assert _is_bare(module)


def test_what_others_took_away_is_not_missed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with capture(model):
        for module in model:
            module.__dict__.pop("_compiled_call_impl", None)
    assert all(map(_is_bare, model.modules()))


def _one_pass(model: nn.Module, x: Tensor) -> None:
    handle = model[0].register_forward_hook(lambda *_: None)  # type: ignore[index]
    model(x)
    handle.remove()


def _inner_capture(model: nn.Module, x: Tensor) -> None:
    with capture(model) as inner:
        model(x)
    assert len(inner) == 4


@pytest.mark.parametrize("meanwhile", [_one_pass, _inner_capture])
def test_what_was_hooked_for_a_while_is_replayed_again(
    meanwhile: Callable[[nn.Module, Tensor], None], traced: list[None]
) -> None:
    model, x = (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh()),
        torch.ones(2, 4),
    )
    with torch.no_grad(), capture(model) as maps:
        for n in range(12):
            if n == 4:
                meanwhile(model, x)
            traced.clear()
            model(x)
            assert len(maps) == 4
            assert not traced or n < 8
        assert not maps.missed


class HookedForAWhile(nn.Module):
    """Steers a nonlinearity by a hook that is there while its forward runs."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(4, 4), nn.ReLU(inplace), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        handle = self.act.register_forward_hook(lambda module, args, output: output + 1)
        y = self.act(self.fc(x))
        handle.remove()
        z: Tensor = self.out(y)
        return z


def _lost(maps: FeatureMaps, layer: str, z: Tensor) -> bool:
    """Whether a pass was lost; else z and a of a layer are as they have to be."""
    if not maps:
        assert maps.missed
        return True
    assert torch.equal(maps[layer, "preactivation"].tensor, z)
    assert torch.equal(maps[layer, "activation"].tensor, z.relu())
    return False


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_hook_that_is_set_in_the_forward(inplace: bool, mode: Any) -> None:
    model, lost = HookedForAWhile(inplace), 0
    with mode(), capture(model) as maps:
        for _ in range(6):
            x = torch.randn(2, 4)
            model(x)
            z = F.linear(x, model.fc.weight, model.fc.bias)
            lost += _lost(maps, "fc", z)
    assert lost < 2


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_that_were_taken_off_are_put_back(inplace: bool, before: bool, whole: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace), nn.Linear(4, 4))
    act, lost = model[1], 0
    if before:
        act.register_forward_pre_hook(lambda module, args: args[0] + 1)
    else:
        act.register_forward_hook(lambda module, args, output: output + 1)
    name = "_forward_pre_hooks" if before else "_forward_hooks"
    hooks = getattr(act, name)
    setattr(act, name, OrderedDict())
    with torch.no_grad(), capture(model) as maps:
        for n in range(8):
            if n == 4 and whole:
                setattr(act, name, hooks)
            elif n == 4:
                getattr(act, name).update(hooks)
            x = torch.randn(2, 4)
            model(x)
            z = F.linear(x, model[0].weight, model[0].bias) + (before and n >= 4)
            lost += _lost(maps, "0", z)
    assert lost < 2
