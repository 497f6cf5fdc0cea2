"""What is set before a module's call: set at once, removed without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmapkit import capture
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
