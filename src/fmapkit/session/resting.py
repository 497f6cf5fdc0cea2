"""Sessions that rest from one block to the next, of the same model, that asks for the same.

A block's first pass is traced, and so would each pass be where a block is opened for each. So the
session of a block that has ended rests: nothing is set, and it lives as long as somebody has the
maps of that block. The next block goes on with it. Whatever is compared between two passes of one
block is compared between the blocks.

What nothing but the path tells of (a list, a global, a counter) may have changed since. A pass that
leaves its path is lost, and may be all that its block has. So the next blocks trace once more what
they call, and only where three in a row have found the same is the path relied on. A model that has
left such a path after all is traced anew in every block from then on.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fmapkit.missed import Missed
from fmapkit.model import Names, unwrap
from fmapkit.selection import Selection
from fmapkit.storage import PassStore
from fmapkit.torchlib.compiled_modules import compiled_roots, ever_compiled

if TYPE_CHECKING:
    from fmapkit.session.session import Rest, Session

__all__ = ["EndedBlock", "RestingSession", "end_block", "request_of", "resting_session"]

_ALIKE = 2  # blocks after the first
_PLAIN = (type(None), bool, int, str)


class RestingSession:
    """A session between two blocks.

    Args:
        session: it.
        rest: what it has taken away.
        request: what its blocks ask for.
        paths: what was known of the model's paths as the latest block ended.
        alike: so many blocks in a row, up to that one, have found no path that was new.
    """

    __slots__ = ("__weakref__", "alike", "paths", "request", "rest", "session")

    def __init__(
        self, session: Session, rest: Rest, request: Hashable, paths: list[Any], alike: int
    ) -> None:
        self.session = session
        self.rest = rest
        self.request = request
        self.paths = paths
        self.alike = alike

    @property
    def reliable(self) -> bool:
        """Whether the next block's passes are to be read by what is known."""
        return self.alike >= _ALIKE


@dataclass(slots=True)
class EndedBlock:
    """What a block has captured, once it has ended: the session may be another block's by then.

    Attributes:
        names: of the model's modules.
        wants: which maps to hold, and how.
        store: where passes are kept.
        missed: what ran and was not captured.
        steps: how many passes there were.
        ids: of no pass any more.
        resting: the block's session, for the next block.
    """

    names: Names
    wants: Selection
    store: PassStore
    missed: list[Missed]
    steps: int
    resting: RestingSession | None = field(default=None, repr=False)
    ids: Tensor | None = None


# By a model's id and what was asked for: the maps of a block alone keep its session, and that its
# model. What a class takes for equal is not the same model.
_resting: weakref.WeakValueDictionary[tuple[int, Hashable], RestingSession] = (
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


def resting_session(
    model: nn.Module, request: Hashable | None, named: bool
) -> RestingSession | None:
    """The session that has captured a model for the same, if it rests and nobody has taken it.

    Args:
        model: to be captured.
        request: what is asked for; None if no session may go on with it.
        named: layers or filters are asked for: whether they are there is told of a new session.
    """
    if request is None or unwrap(model) is not model:
        return None
    with _lock:
        found = _resting.pop((id(model), request), None)
    if found is None or (ever_compiled() and compiled_roots(model)):
        return None
    if named and found.session.passes.watch.changed():
        return None
    return found


def end_block(
    session: Session, request: Hashable | None, before: RestingSession | None, failed: bool
) -> EndedBlock:
    """A block has ended: its session rests, if the next may go on with it, or else is closed.

    Args:
        session: of the block.
        request: what was asked for; None if no other block may go on with it.
        before: the session as it rested before the block; None if it is new.
        failed: an exception has ended the block.

    Returns:
        What was captured.
    """
    model = session.asked.model
    relied = before is not None and before.reliable
    if relied and session.missed:
        _wayward[id(model)] = model
    paths = session.parts.regions.paths()
    seen = session.steps and paths and session.parts.live.current is None
    usual = not (failed or session.missed or session.compiled or id(model) in _wayward)
    if request is None or not seen or not usual:
        session.close(failed)
        return session.ended()
    alike = 0
    if before is not None and list(map(id, paths)) == list(map(id, before.paths)):
        alike = before.alike + 1
    rest = session.rest()
    ended = session.ended()
    ended.resting = RestingSession(session, rest, request, paths, alike)
    with _lock:
        _resting[id(model), request] = ended.resting
    return ended
