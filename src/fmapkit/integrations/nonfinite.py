"""`FirstNonFinite`: in which map of which pass the first NaN or infinity was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmapkit.map import PassTag
from fmapkit.readable import plain_values

if TYPE_CHECKING:
    from fmapkit.maps import FeatureMap


@dataclass(frozen=True, slots=True, order=True)
class NonFiniteMap:
    """A map that had a NaN or an infinity, for the first time.

    Attributes:
        step: the pass, by the map's step; those of several blocks are counted on.
        order: which map of a pass it is, by when it was first seen.
        layer: its layer.
        kind: its kind.
        call: which call of the layer.
        path: its place in a nested output; else "".
    """

    step: int
    order: int
    layer: str
    kind: str
    call: int
    path: str

    def __str__(self) -> str:
        call = f", call {self.call}" if self.call else ""
        return f"the {self.kind} of layer {self.layer + self.path!r}, pass {self.step}{call}"


class FirstNonFinite:
    """Where the first NaN or infinity came up, and where they did afterwards; an `Analysis`.

    ```python
    first = FirstNonFinite()
    with capture(model, analyses=[first], keep=0):
        train(model)
    print(first.found[:1])   # [NonFiniteMap(step=312, order=4, layer='blocks.1.fc', ...)]
    ```

    Training goes on: of each map one number is kept, the first pass in which a value was not
    finite. `update` never waits for the device; reading does.
    """

    def __init__(self) -> None:
        self._last: PassTag
        self.reset()

    def update(self, fm: FeatureMap) -> None:
        """Take one map in; one without values to look at is named in `missed`."""
        this = PassTag.of(fm)
        self._step += this.since(self._last)
        self._last = this
        with torch.inference_mode(False), torch.no_grad():
            # Complex numbers have no order, which is all that is wrong with their values.
            tensor, reason = (fm.tensor, "") if fm.tensor.is_complex() else plain_values(fm)
            if tensor is None:
                self._missed.setdefault((fm.layer, fm.kind), reason)
                return
            key = (fm.layer, fm.kind, fm.call, fm.path)
            before = self._steps.get(key)
            if before is None:
                before = torch.full((), -1, dtype=torch.int64, device=tensor.device)
            before = before.to(tensor.device)
            bad = ~torch.isfinite(tensor).all()
            self._steps[key] = torch.where(bad & (before < 0), self._step, before)

    @property
    def missed(self) -> dict[tuple[str, str], str]:
        """Maps that have no values to look at: the reason by (layer, kind)."""
        return dict(self._missed)

    @property
    def found(self) -> list[NonFiniteMap]:
        """Each map that had one, the first of them first; waits for the device.

        Within a pass, in the order in which maps were first seen, which is that of execution as
        long as the model takes one path.
        """
        steps = {key: int(step) for key, step in self._steps.items()}
        every = enumerate(steps.items())
        return sorted(NonFiniteMap(step, order, *key) for order, (key, step) in every if step >= 0)

    def reset(self) -> None:
        """Forget all that was seen."""
        self._steps: dict[tuple[str, str, int, str], Tensor] = {}
        self._missed: dict[tuple[str, str], str] = {}
        self._step, self._last = -1, PassTag(-1)

    def __repr__(self) -> str:
        if not self._steps:
            return "FirstNonFinite: no map seen yet"
        found = self.found
        if not found:
            return f"FirstNonFinite: all values of {len(self._steps)} maps are finite"
        return f"FirstNonFinite: in {len(found)} of {len(self._steps)} maps, first in {found[0]}"
