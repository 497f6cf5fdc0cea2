"""The gradient of a map: what backward sends to the model's own tensor, as it was when mapped.

A hook on that tensor hands the gradient over. torch keeps a hook with the version of the tensor it
was set on, so an in-place consumer does not disturb it. The graph holds the hook, the hook holds
the `Gradient` weakly, and the map holds the `Gradient`: no cycle, no graph kept alive by it, and
what arrives after the map was let go is let go, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmapkit.errors import MapOverwrittenError, MapStateError
from fmapkit.torchlib.autograd import graph_task
from fmapkit.torchlib.side_ops import select

_forward_grads: Callable[[], bool] = torch._C._is_fwd_grad_enabled
_inference: Callable[[], bool] = torch.is_inference_mode_enabled


class _Post:
    """The hook: passes each gradient on to whoever still waits for it."""

    __slots__ = (
        *("__weakref__", "_handle", "_task", "_used", "listeners", "of_view", "spoiled"),
        "targets",
    )
    # torch warns when it pickles a tensor with a hook, unless the hook says that it may be lost.
    __torch_unserializable__ = True

    def __init__(self, tensor: Tensor) -> None:
        self.targets: list[weakref.ref[Gradient]] = []
        self.listeners: list[Callable[[Tensor], None]] = []
        self.of_view = tensor._is_view()
        self.spoiled = False
        self._used = False  # it is known by which calls a leaf is used
        self._task = -1  # the latest backward that went through one of them
        # A view that was written to through another tensor learns of it only when it is asked:
        # until then a new hook goes to its former node, or crashes torch (2.13).
        node = tensor.grad_fn
        if node is not None and tensor._backward_hooks is not None:
            # After `t_()` and the like, torch would set a further hook on the former node.
            place = tensor.output_nr
            node.register_prehook(lambda grads: self(grads[place]))
            self._handle = None
            return
        handle = tensor.register_hook(self)  # type: ignore[no-untyped-call]
        # Hooks of other tensors go with the graph; those of leaves have to be taken off.
        self._handle = handle if tensor.is_leaf else None

    def __call__(self, grad: Tensor | None) -> None:
        if grad is None:  # a node ran that had nothing to pass on
            return
        if self._used and self._task != graph_task():
            return
        for target in self.targets:
            gradient = target()
            if gradient is not None:
                gradient.receive(grad)
        for listener in self.listeners:
            listener(grad)

    @property
    def goes_with_the_graph(self) -> bool:
        """Whether the hook is the graph's, and not a leaf's."""
        return self._handle is None

    def used_by(self, result: Any) -> None:
        """Of a leaf, only a backward counts from here on that goes through what was made of it.

        Any other one that reaches it comes from somewhere else: another pass, or another model.
        """
        if self.goes_with_the_graph:
            return
        self._used = True
        node = result.grad_fn if isinstance(result, Tensor) else None
        if node is not None:
            post = weakref.ref(self)
            node.register_prehook(lambda grads: _passed(post))

    def passed(self) -> None:
        """A backward has gone through what was made of the tensor."""
        self._task = graph_task()

    def gone(self, reference: weakref.ref[Gradient]) -> None:
        self.targets.remove(reference)
        if not self.targets and self._handle is not None:
            self._handle.remove()


def _passed(post: weakref.ref[_Post]) -> None:
    found = post()
    if found is not None:
        found.passed()


class Gradient:
    """Where the gradient of one held tensor arrives.

    It is the tensor that backward made, not a copy; of several backward passes, their sum, as in
    `.grad` of a tensor that retains it.
    """

    __slots__ = ("__weakref__", "_lost", "_pick", "_post", "_value", "_version")

    def __init__(self, post: _Post, pick: tuple[int, tuple[int, ...]] | None = None) -> None:
        self._post = post
        self._pick = pick  # an axis, and the filters held along it
        self._value: Tensor | None = None
        self._version = 0
        self._lost = False
        post.targets.append(weakref.ref(self, post.gone))

    def picked(self, dim: int, places: tuple[int, ...]) -> Gradient:
        """The same for some filters alone."""
        return Gradient(self._post, (dim, places))

    def used_by(self, result: Any) -> None:
        """The map's tensor was what a call was given that has returned `result`."""
        self._post.used_by(result)

    def tell(self, listener: Callable[[Tensor], None]) -> None:
        """Hand each gradient on to somebody else, too, for as long as the graph lives.

        Not of a leaf, which would keep the hook for good.
        """
        if self._post.goes_with_the_graph:
            self._post.listeners.append(listener)

    def overwritten(self) -> None:
        """The tensor is about to be written to. What a view was has no gradient of its own then.

        torch attaches the write to the base; a hook on the view would miss that part.
        """
        self._post.spoiled = self._post.of_view

    @property
    def of_view(self) -> bool:
        """Whether a write to the tensor would leave none to be had."""
        return self._post.of_view

    @property
    def spoiled(self) -> bool:
        """Whether there is none to be had."""
        return self._post.spoiled

    def receive(self, grad: Tensor) -> None:
        """One backward pass has reached the tensor."""
        if self._pick is not None:
            grad = select(grad, *self._pick)
        if self._value is not None:
            self._check()
            grad = self._value + grad
        self._value = grad
        self._version = grad._version

    def _check(self) -> None:
        # What backward makes may be handed on: a view of it can become the `.grad` of a parameter.
        if self._value is not None and self._value._version != self._version:
            self._lost = True

    def read(self, what: str) -> Tensor | None:
        """The gradient so far; None before any backward pass, and where none gets there.

        Raises:
            MapOverwrittenError: its memory was written to since.
        """
        if self.spoiled:
            return None
        self._check()
        if self._lost:
            raise MapOverwrittenError(
                f"the gradient of {what} was written to in place after backward (it shares memory "
                "with the .grad of a parameter or input); read and clone it right after backward"
            )
        return self._value


class NotYet:
    """In the place of the gradient of a map that an analysis is shown."""

    def read(self, what: str) -> Tensor | None:
        """Say that there is none yet.

        Raises:
            MapStateError: always.
        """
        raise MapStateError(
            f"an analysis is shown {what} as it is made, before any backward: it has no gradient "
            "yet; read fm.grad of the held maps after backward, with capture(gradients=True), and "
            "give those to an analysis with update(dataclasses.replace(fm, tensor=fm.grad))"
        )


class Received:
    """A gradient that has arrived: of a map that was copied, pickled or saved."""

    __slots__ = ("_value",)

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def read(self, what: str) -> Tensor:
        """It."""
        return self._value


def watch(tensor: Tensor) -> Gradient | None:
    """Where the gradient of the tensor as it is now will arrive; None if it can have none."""
    return Gradient(_Post(tensor)) if tensor.requires_grad else None


def in_function() -> bool:
    """Whether the forward of a `torch.autograd.Function` runs, as in reentrant checkpointing.

    No graph is recorded there. The tensors it returns become part of the graph only afterwards.
    """
    return not (_forward_grads() or _inference())
