"""Find the first NaN: `capture(model, check="finite")`, `maps.first_nonfinite()`.

Of each map the least and the greatest value of each filter are computed where the map is: a NaN or
an infinite value shows in one of them, and of a finite map they give the largest value, too. They
stay on the device until the pass has ended. Then one flag is read, which waits for the device once;
only if it says so, the map is looked for.

A capture that checks holds every kind of map until its pass has ended, what each module returns
included; then what was asked for stays. So a norm between a layer and its nonlinearity is named
itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable

from fmapkit.errors import ArgumentError, MapStateError, NonFiniteError
from fmapkit.instrumentation import without_the_models
from fmapkit.map import FeatureMap, read_map
from fmapkit.nonfinite import NonFinite, named
from fmapkit.reasons import Reason
from fmapkit.storage import Gradient
from fmapkit.torchlib.autograd import graph_task
from fmapkit.torchlib.sharded import ends_of
from fmapkit.torchlib.side_ops import unseen

if TYPE_CHECKING:
    from fmapkit.storage import Pass, StoredTensor

__all__ = ["CHECKS", "COMPILED", "Check", "FiniteCheck", "NonFinite", "checked", "first_nonfinite"]

Check = Literal["finite", "finite-forward"]
COMPILED = Reason.CHECK_OF_COMPILED.text()
CHECKS: tuple[Check, ...] = ("finite", "finite-forward")


class _Extremes(NamedTuple):
    """The least and the greatest value of each filter of a map, or of its gradient."""

    fm: FeatureMap  # its tags
    filters: range | tuple[int, ...] | None
    low: Tensor
    high: Tensor


def _extremes(fm: FeatureMap, tensor: Tensor) -> _Extremes | None:
    """Of a map, or of its gradient; None of what has no values, or none that could be infinite."""
    dim = fm.filter_dim if fm.filters is not None else None
    tensor = ends_of(tensor)[-1].detach()  # of a DTensor, this rank's part
    if tensor.is_quantized or tensor.device.type == "meta":
        return None
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    if tensor.layout is torch.sparse_coo:
        tensor, dim = tensor._values(), None
    elif tensor.layout is not torch.strided:  # compressed, or jagged
        tensor, dim = tensor.values(), None
    if not tensor.numel():
        return None
    if tensor.is_complex():
        dim = dim if dim is None else dim % tensor.dim()
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch computes nothing in eight bits
    if dim is None:
        low, high = tensor.aminmax()
        return _Extremes(fm, None, low.reshape(1), high.reshape(1))
    others = [d for d in range(tensor.dim()) if d != dim % tensor.dim()]
    low, high = (tensor.amin(others), tensor.amax(others)) if others else (tensor, tensor)
    return _Extremes(fm, fm.filters, low, high)


def _all_finite(found: Iterable[_Extremes]) -> bool:
    """Whether all values are finite: one flag for each device, read here."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for one in found:
        by_device.setdefault(one.low.device, []).extend((one.low, one.high))
    flags = [torch.isfinite(torch.cat(values)).all() for values in by_device.values()]
    return all(bool(flag) for flag in flags)


def _first(found: list[_Extremes], gradient: bool, keep: bool = False) -> NonFinite | None:
    """The first that has a value which is not finite; waits for the device.

    Args:
        keep: what is told of it has the map itself.
    """
    if not found or _all_finite(found):
        return None
    largest, largest_in, finite = None, None, set()
    for fm, there, low, high in found:
        bounds = torch.stack((low, high)).double().cpu()
        wrong = ~bounds.isfinite()
        if not wrong.any():
            magnitude = float(bounds.abs().max())
            if largest is None or magnitude > largest:
                name = named(fm.layer, fm.kind, fm.path)
                largest, largest_in = magnitude, f"{'the gradient of ' * gradient}{name}"
            finite.add((fm.layer, fm.call, fm.kind))
            continue
        places = wrong.any(0).nonzero().flatten().tolist()
        values = bounds[:, places[0]][wrong[:, places[0]]]
        filters = () if there is None else tuple(there[place] for place in places)
        before = (fm.layer, fm.call, "response")
        return NonFinite(
            *(fm.layer, fm.kind, filters[0] if filters else None, fm.call, fm.step, fm.path),
            float(values[0]),
            filters,
            gradient,
            largest,
            largest_in,
            not gradient and fm.kind == "preactivation" and before in finite,
            fm if keep else None,
        )
    return None


def first_nonfinite(maps: Iterable[FeatureMap]) -> NonFinite | None:
    """The first of these maps that has a NaN or an infinite value; None if none has.

    Args:
        maps: in the order in which they were made.
    """
    with torch.inference_mode(False), torch.no_grad():
        found = [_extremes(fm, fm.tensor) for fm in maps]
        return _first([one for one in found if one is not None], gradient=False, keep=True)


class FiniteCheck:
    """Looks at each pass, and at each backward, as it ends.

    Attributes:
        gradients_unseen: whether gradients were asked for, and are nobody's to see.
    """

    def __init__(self, backward: bool, compiled: bool) -> None:
        self.backward = backward and not compiled
        self.compiled = compiled
        self.gradients_unseen = backward and compiled
        self._found: NonFinite | None = None  # and not yet raised
        self._gradients: dict[int, list[_Extremes]] = {}  # by backward that is under way
        self._open = True

    def look(self, at: Pass) -> Iterator[tuple[str, str]]:
        """A pass has ended: look at its maps, in order, and read the flag.

        Yields:
            What could not be looked at: (layer, why).
        """
        found: list[_Extremes] = []
        known: set[Any] = set()
        self._gradients.clear()
        with without_the_models():
            for entry in at.entries():
                # The same memory, unchanged, is looked at once: all of it is held until here.
                place = None if entry.edited is not None else _place(entry.held)
                if place is not None and place in known:
                    continue
                known.add(place)
                try:
                    fm = read_map(at, entry)
                except MapStateError as error:
                    yield entry.origin.name, Reason.CHECK_DID_NOT_SEE.text(error=error)
                    continue
                for tensor in (fm.tensor, fm.edited):
                    one = None if tensor is None else _extremes(fm, tensor)
                    if one is not None:
                        found.append(one)
                if self.backward and isinstance(fm._gradient, Gradient):
                    fm._gradient.tell(partial(self._received, fm.without_values()))
            self._found = _first(found, gradient=False)

    def raise_found(self, cause: Exception | None = None) -> None:
        """Raise what was found, once.

        Raises:
            NonFiniteError: something was found.
        """
        found, self._found = self._found, None
        if found is None:
            return
        names = ("layer", "kind", "filter", "call", "step")
        data = {name: getattr(found, name) for name in names}
        raise NonFiniteError(str(found), found=found, candidates=found.filters, **data) from cause

    def close(self) -> None:
        """The block has ended: gradients that come later are not looked at."""
        self._open = False
        self._gradients.clear()

    def _received(self, fm: FeatureMap, grad: Tensor) -> None:
        """A backward has reached a map, of which the tags alone are known here."""
        task = graph_task()
        if not self._open or task == -1:
            return
        with torch.no_grad(), unseen():
            found = _extremes(fm, grad)
        if found is None:
            return
        if task not in self._gradients:
            self._gradients[task] = []
            Variable._execution_engine.queue_callback(partial(self._backward_ended, task))
        self._gradients[task].append(found)

    def _backward_ended(self, task: int) -> None:
        found = self._gradients.pop(task, [])
        with torch.no_grad(), unseen():
            self._found = _first(found, gradient=True)
        self.raise_found()


def _place(held: StoredTensor | None) -> Any:
    """Where the values of a map lie, and in which version; None where torch does not tell."""
    tensor = None if held is None else held.tensor
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_inference():
        return None
    if tensor.is_quantized or not tensor.numel():
        return None
    place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor._version)
    return (*place, tuple(tensor.shape), tensor.stride())


def checked(check: Any) -> Check | None:
    """A check as it was given.

    Raises:
        ArgumentError: there is no such check.
    """
    if check is None or check in CHECKS:
        return check  # type: ignore[no-any-return]
    raise ArgumentError(
        f"check must be 'finite', 'finite-forward' (gradients left out) or None, not {check!r}"
    )
