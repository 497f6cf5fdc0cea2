"""The pair of hooks that all modules share: set at once, removed without a trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fmapkit import capture
from fmapkit._hooks import Hooks


def _dicts(module: nn.Module) -> list[dict[int, Any]]:
    return [
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    ]


def test_what_is_set_is_removed_and_no_more() -> None:
    first, second = nn.Linear(2, 2), nn.ReLU()
    calls: list[str] = []
    theirs = first.register_forward_hook(lambda *_: calls.append("theirs"))
    hooks = Hooks(object())
    hooks.around([first, second], lambda *_: calls.append("pre"), lambda *_: calls.append("post"))
    hooks.around([first], None, None)  # it has them
    first(torch.ones(1, 2))
    assert calls == ["pre", "theirs", "post"]
    assert hooks.modules() == {first, second}

    hooks.drop("around", keep=[first])
    assert not any(_dicts(second))
    first(torch.ones(1, 2))
    assert calls[3:] == ["pre", "theirs", "post"]

    hooks.drop("around", only=[first, first, second])
    assert list(first._forward_hooks) == [theirs.id]
    assert not any(d for d in _dicts(first) if d is not first._forward_hooks)
    assert hooks.modules() == set()


def test_they_go_by_numbers_of_their_own() -> None:
    module = nn.ReLU()
    one, other = Hooks(object()), Hooks(object())
    for hooks in (one, other):
        hooks.around([module], lambda *_: None, lambda *_: None)
    theirs = module.register_forward_hook(lambda *_: None)
    assert len(module._forward_hooks) == 3
    assert theirs.id in module._forward_hooks
    assert len(module._forward_pre_hooks) == 2
    one.drop()
    assert len(module._forward_hooks) == 2
    assert len(module._forward_pre_hooks) == 1
    other.drop()
    theirs.remove()
    assert not any(_dicts(module))


def test_removed_while_torch_goes_through_them_they_do_nothing() -> None:
    """torch has read the list of a module's hooks when one of them has ours removed."""
    module, calls = nn.ReLU(), []
    hooks = Hooks(object())
    module.register_forward_hook(lambda *_: hooks.drop())
    hooks.around([module], lambda *_: calls.append("pre"), lambda *_: calls.append("post"))
    module(torch.ones(1))
    assert calls == ["pre"]
    hooks.around([module], lambda *_: calls.append("new"), lambda *_: None)  # and may come again
    module(torch.ones(1))
    assert calls == ["pre", "new"]


def test_what_others_took_away_is_not_missed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with capture(model):
        model[0]._forward_hooks.clear()
        model[1]._forward_hooks_with_kwargs.clear()
    assert not any(d for module in model.modules() for d in _dicts(module))
