"""Sessions that rest from one block to the next, of the same model, that asks for the same.

Nothing is set of one that rests, and it lives as long as somebody has the maps of its block. When
its path is relied on, and when not, is told in docs/how-it-works.md, "From block to block".
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from fmapkit.missed import Missed
from fmapkit.model import Names, unwrap
from fmapkit.selection import Selection
from fmapkit.storage import PassStore
from fmapkit.torchlib.compiled_modules import compiled_roots, ever_compiled

_ALIKE = 16  # blocks in a row
_PLAIN = (type(None), bool, int, str)


_Session = TypeVar("_Session")


class RestingSession(Generic[_Session]):
    """A session between two blocks; `before` is it as it rested before the latest block."""

    def __init__(
        self,
        session: _Session,
        model: nn.Module,
        request: Hashable,
        paths: list[Any],
        before: RestingSession[Any] | None,
    ) -> None:
        self.session = session
        self.paths = paths  # what was known of the model's paths as the latest block ended
        # So many blocks in a row, up to that one, have found no path that was new.
        self.alike: int = 0
        if before is not None and list(map(id, paths)) == list(map(id, before.paths)):
            self.alike = before.alike + 1
        with _lock:
            _resting[id(model), request] = self

    @property
    def reliable(self) -> bool:
        """Whether the next block's passes are to be read by what is known."""
        return self.alike >= _ALIKE


@dataclass(slots=True)
class EndedBlock:
    """What a block has captured, once it has ended: the session may be another block's by then."""

    names: Names  # of the model's modules
    wants: Selection  # which maps to hold, and how
    store: PassStore  # where passes are kept
    missed: list[Missed]  # what ran and was not captured
    steps: int  # how many passes there were
    # The block's session, for the next block.
    resting: RestingSession[Any] | None = field(default=None, repr=False)

    def tell(self, ids: Tensor | None, mask: Tensor | None) -> None:
        """No pass comes any more that these could be of."""


# By a model's id and what was asked for: the maps of a block alone keep its session, and that its
# model. What a class takes for equal is not the same model.
_resting: weakref.WeakValueDictionary[tuple[int, Hashable], RestingSession[Any]] = (
    weakref.WeakValueDictionary()
)
# By id: models that have left a path that was relied on in a block's first pass.
_wayward: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def request_of(asked: Any) -> Hashable | None:
    """What a capture is asked for, to be compared with; None where it cannot be."""
    if isinstance(asked, (tuple, list)):
        parts = tuple(map(request_of, asked))
        return None if None in parts else parts
    if type(asked) is dict:
        return request_of([*asked.items()])
    if isinstance(asked, nn.Module):
        return nn.Module, id(asked)  # it is a part of the model, which is compared
    told = type(asked) in _PLAIN or isinstance(asked, (type, re.Pattern))
    return (type(asked), asked) if told else None


def resting_session(model: nn.Module, request: Hashable | None) -> RestingSession[Any] | None:
    """The session that has captured a model for the same, if it rests and nobody has taken it."""
    if request is None or unwrap(model) is not model:
        return None
    with _lock:
        found = _resting.pop((id(model), request), None)
    return None if found is None or (ever_compiled() and compiled_roots(model)) else found


def is_wayward(model: nn.Module, strayed: bool) -> bool:
    """Whether a model's blocks are to be learned anew: it has `strayed` from what was relied on."""
    if strayed:
        _wayward[id(model)] = model
    return id(model) in _wayward
