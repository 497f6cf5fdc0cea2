"""The names by which a twin calls recorders, and what torch.compile sees in their place."""

from __future__ import annotations

import builtins
import operator
import types
from typing import Any

from torch import Tensor

from fmapkit.paths import index_recorders as i
from fmapkit.paths import put_recorders as p
from fmapkit.paths import recorders as r
from fmapkit.paths.items import ignore
from fmapkit.paths.rewriting import MARK

_FUNCTION = types.FunctionType


def _last(*given: Any) -> Any:
    """What most recorders are given last, and return."""
    return given[-1]


# What torch.compile sees where a twin that it traces calls a recorder.
_TRACED_AS: dict[Any, Any] = {
    r.enter: lambda site: ignore,
    r.current: lambda: ignore,
    r.caught: lambda site: None,
    r.compared: lambda append, name, left, right: getattr(operator, name)(left, right),
    **dict.fromkeys(
        (r.value, r.exact, r.parameter, i.at, i.index, i.indexed, r.handed, r.resumed), _last
    ),
    **dict.fromkeys((r.elements, r.unpacked, r.keys, r.ordered, r.picked, r.repeated), _last),
    **dict.fromkeys((r.keyed, r.mapped, r.ranked, r.ranking, r.called, r.chosen), _last),
    p.put: lambda append, given, to: given,
    **dict.fromkeys((p.child, p.children, p.owner, p.parent, p.filled), _last),
    **dict.fromkeys((r.method, r.chosen_method, r.tapped, r.fusing, r.entered), _last),
}
# By the names that stand for them in a twin before it is finished.
RECORDERS: dict[str, Any] = {f"{MARK}{f.__name__}": f for f in (*_TRACED_AS, type, Tensor)}

# Where a twin runs on after its block has ended (a generator's, say), it finds copies of them
# there: torch.compile takes what is among the builtins for a builtin. No name of a model's is one
# of these.
for _name, _recorder in RECORDERS.items():
    if type(_recorder) is _FUNCTION:
        _recorder = _FUNCTION(_recorder.__code__, _recorder.__globals__, _recorder.__name__)
    setattr(builtins, _name, _recorder)

for _recorder, _instead in _TRACED_AS.items():
    _recorder._torchdynamo_inline = _instead
