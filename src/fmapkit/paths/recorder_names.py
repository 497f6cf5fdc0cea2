"""The names by which a twin calls recorders, and what torch.compile sees in their place."""

from __future__ import annotations

import builtins
import operator
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fmapkit.paths import recorders
from fmapkit.paths.items import ignore
from fmapkit.paths.rewriting import MARK

_FUNCTION = types.FunctionType

# By the names that stand for them in a twin before it is finished.
RECORDERS: dict[str, Any] = {
    f"{MARK}{f.__name__}": f
    for f in (
        recorders.enter,
        recorders.current,
        recorders.resumed,
        recorders.value,
        recorders.exact,
        recorders.index,
        recorders.indexed,
        recorders.handed,
        recorders.compared,
        recorders.put,
        recorders.elements,
        recorders.unpacked,
        recorders.keys,
        recorders.ordered,
        recorders.picked,
        recorders.repeated,
        recorders.keyed,
        recorders.mapped,
        recorders.ranked,
        recorders.ranking,
        recorders.called,
        recorders.chosen,
        recorders.method,
        recorders.chosen_method,
        recorders.tapped,
        recorders.fusing,
        recorders.caught,
        type,
        Tensor,
    )
}


# Where a twin runs on after its block has ended (a generator's, say), it finds copies of them
# there: torch.compile takes what is among the builtins for a builtin. No name of a model's is one
# of these.
for _name, _recorder in RECORDERS.items():
    if type(_recorder) is _FUNCTION:
        _recorder = _FUNCTION(_recorder.__code__, _recorder.__globals__, _recorder.__name__)
    setattr(builtins, _name, _recorder)


def _traced_as(name: str, instead: Callable[..., Any]) -> None:
    """Have torch.compile see something else where a twin that it traces calls a recorder."""
    RECORDERS[f"{MARK}{name}"]._torchdynamo_inline = instead


for _name in ("value", "exact", "elements", "unpacked", "keys", "ordered", "picked"):
    _traced_as(_name, lambda append, given: given)
for _name in ("keyed", "mapped", "ranking", "called", "chosen", "method", "chosen_method"):
    _traced_as(_name, lambda append, function: function)
_traced_as("enter", lambda site: ignore)
_traced_as("current", lambda: ignore)
_traced_as("caught", lambda site: None)
_traced_as("resumed", lambda site, given: given)
_traced_as("index", lambda append, of, given: given)
_traced_as("indexed", lambda append, of: of)
_traced_as("handed", lambda append, to, name, given: given)
_traced_as("compared", lambda append, name, left, right: getattr(operator, name)(left, right))
_traced_as("put", lambda append, to, given: given)
_traced_as("repeated", lambda append, row, given: given)
_traced_as("ranked", lambda append, of, given: given)
_traced_as("tapped", lambda site, function: function)
_traced_as("fusing", lambda function: function)
