"""Control paths: which decisions a pass took, and whether another pass took the same ones.

    ControlPaths                    what one capture knows, and what it has set
        twins.Twins                 functions run twins of their code while the block is open
            rewrite.Rewriter        … the same code with a recorder at each decision
        recorders.Sink              where the decisions of this thread's pass go
        survey.Survey               which functions ran that do not record yet
    known.KnownPaths                the paths of one kind of call, each with its plan

If a pass takes the decisions of an earlier one, on inputs of the same form, in the same modes, of a
model of the same structure, it makes the same calls of torch on the same tensors.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fmapkit.paths import recorders
from fmapkit.paths.fixed import FixedAttributes
from fmapkit.paths.known import KnownPaths, Sizes
from fmapkit.paths.survey import Survey, is_trusted
from fmapkit.paths.twins import Twins

__all__ = ["ControlPaths", "KnownPaths", "Sizes"]

# Paths, told by the hash of their items, in which every function that ran has recorded.
_complete: set[int] = set()
_surveyed: set[type] = set()  # classes of models of which there is one


class ControlPaths:
    """The control paths of one capture's passes.

    Args:
        model: the captured one.
        place_of: names the place of a parameter in the model; None for any other tensor.
        running: the modules whose calls are under way, outermost first.
    """

    def __init__(
        self,
        model: nn.Module,
        place_of: Callable[[Tensor], str | None],
        running: Callable[[], Iterable[nn.Module]],
    ) -> None:
        self._model = model
        self._place_of = place_of
        self._running = running
        self._sink: recorders.Sink | None = None
        self._survey: Survey | None = None
        self._cold = type(model) not in _surveyed
        self._tried: set[types.CodeType] = set()
        self.refresh()

    def refresh(self) -> None:
        """The model has other modules than it had."""
        self._modules = set(self._model.modules())
        if hasattr(self, "twins"):
            self.twins.clear()
        self.twins = Twins(FixedAttributes(self._modules))
        self._ready = False

    # -- a pass -------------------------------------------------------------------------------

    def begin(self, traced: bool) -> None:
        """A pass begins: record.

        Args:
            traced: some of it will be traced, and may become known.
        """
        if not self._ready:
            self._ready = True
            for kind in {type(m) for m in self._modules}:
                self._set_class(kind)
        self._sink = recorders.start(self._place_of, self._modules)
        if traced and self._cold:
            self._survey = Survey(lambda: tuple(self._running()))
            self._survey.start()

    def _set_class(self, kind: type) -> None:
        """Have the forward of a class record, and what was seen to run in its place."""
        forward = kind.forward
        if isinstance(forward, types.FunctionType) and not is_trusted(forward.__code__):
            self.twins.set(forward)

    def end(self) -> set[nn.Module]:
        """The pass has ended.

        Returns:
            Modules in which code ran that cannot record: these are to be traced in every pass.
        """
        if self._sink is None:
            return set()
        self._sink = None
        recorders.stop()
        survey, self._survey = self._survey, None
        if survey is None:
            return set()
        survey.stop()
        hopeless: set[nn.Module] = set()
        for code, (_, who) in survey.found.items():
            if code in self._tried:
                hopeless.update(m for modules in who for m in modules)
        self._tried.update(survey.found)
        self.twins.set_all(survey.found)
        return hopeless

    def renamed(self) -> bool:
        """Whether a name in one of torch's modules stands for something else than it did."""
        return self.twins.renamed()

    @property
    def position(self) -> int:
        """How many decisions were recorded so far."""
        return len(self._sink.items) if self._sink is not None else 0

    def since(self, position: int) -> list[Any]:
        """The decisions from a position on."""
        return self._sink.items[position:] if self._sink is not None else []

    def is_complete(self, items: list[Any], module: nn.Module) -> bool:
        """Whether every function that ran in a call of a module has recorded.

        Args:
            items: the path of the call, which has just ended.
            module: that was called.
        """
        told = hash(tuple(map(_lasting, items)))
        if self._survey is None:
            self._cold = self._cold or told not in _complete
            return told in _complete
        if not self._survey.complete:
            return False
        if any(module in modules for _, who in self._survey.found.values() for modules in who):
            return False
        _complete.add(told)
        if module is self._model:
            _surveyed.add(type(module))
            self._cold = False
        return True

    def clear(self) -> None:
        """The block has ended: every function has its own code again."""
        self.end()
        self.twins.clear()


def _lasting(item: Any) -> Any:
    """The same of an item that is of one model alone."""
    if isinstance(item, tuple):
        return tuple(map(_lasting, item))
    return type(item) if isinstance(item, nn.Module) else item
