"""`T`: what a told program says of itself while it runs, bare. The truth that maps are held to.

Each tensor of a pass may have a *tag*: the layer whose filters it carries, and a *shadow*, an
integer tensor of the same shape that says of each element which filter it belongs to. What moves
elements about (reshapes, slices, permutations) does the same to the shadow, so that no rule about
axes is needed. Which operand's filters go on is what `docs/vocabulary.md` says.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Owner", "Response", "Site", "Tag", "Told"]

# How sure the layer of a tensor is. LOOSE: what the docs do not promise to follow, so the layer is
# either this one, exactly, or none. VAGUE: several answers are good; only values are compared.
STRICT, LOOSE, VAGUE = _TRUST = ("strict", "loose", "vague")

_LAYERS: dict[type, int] = {
    nn.Linear: -1,
    nn.Bilinear: -1,
    nn.Conv1d: -2,
    nn.Conv2d: -3,
    nn.ConvTranspose2d: -3,
}
_NORMS: dict[type, int] = {
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 1,
    nn.GroupNorm: 1,
    nn.InstanceNorm2d: 1,
    nn.LayerNorm: -1,
}
_SIGMA_MODULES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.ELU: "elu",
    nn.LeakyReLU: "leaky_relu",
    nn.Softplus: "softplus",
    nn.Hardtanh: "hardtanh",
    nn.PReLU: "prelu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
    nn.Softsign: "softsign",
    nn.GLU: "glu",
}
_SIGMA_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.elu: "elu",
    F.leaky_relu: "leaky_relu",
    F.softplus: "softplus",
    F.mish: "mish",
    F.hardswish: "hardswish",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    torch.tanh_: "tanh",
    Tensor.relu: "relu",
    Tensor.relu_: "relu",
    Tensor.tanh: "tanh",
    Tensor.sigmoid_: "sigmoid",
}
_KEEPERS = (nn.Dropout, nn.Identity, nn.Dropout2d)
_RESIZERS = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d, nn.Upsample)
# Norms and activations that a program writes out by hand, by their class names.
HAND_NORMS = frozenset({"RootMeanSquare"})
HAND_SIGMAS = frozenset({"Swish", "HandSwish", "Bent"})


@dataclass(eq=False)
class Owner:
    """One call of a layer (or of a norm that stands in for one)."""

    name: str
    call: int | None  # None: not known
    kind: str = "layer"
    claimed: bool = False  # a nonlinearity received its filters
    maybe: bool = False  # or might have


@dataclass(frozen=True)
class Tag:
    """Whose filters a tensor carries; `owner` None: nobody's, or those of several layers."""

    owner: Owner | None
    shadow: Tensor | None = None
    trust: str = STRICT


@dataclass(frozen=True)
class Site:
    """One run of a nonlinearity."""

    sigma: str
    z: Tensor
    a: Tensor
    tag: Tag
    a_shadow: Tensor | None
    own: tuple[str, ...]  # by which names it may go if it has no layer
    own_call: int | None  # None: not known
    inside: tuple[str, ...]  # names of the modules it ran in, outermost first
    # What backward brought: dL/dz and dL/da; empty where it did not get there.
    z_grad: list[Tensor] | None  # None: a leaf's, which is not asked for
    a_grad: list[Tensor] | None


@dataclass(frozen=True)
class Response:
    """What one call of a layer returned."""

    owner: Owner
    tensor: Tensor
    shadow: Tensor
    inside: tuple[str, ...]


# Functions that are a nonlinearity in some calls, and none of a number or of one for each filter.
_SOMETIMES = frozenset({"clamp", "clamp_min", "maximum", "where", "mul", "masked_fill"})


@dataclass(frozen=True)
class Edit:
    """What becomes of the preactivations or activations of a layer, or of one filter in it."""

    layer: str
    kind: str
    factor: float
    filter: int | None

    def is_of(self, tag: Tag) -> bool:
        """Whether it is for a nonlinearity of these filters."""
        return tag.owner is not None and tag.owner.name == self.layer

    def of(self, site_kind: str, tag: Tag, shadow: Tensor | None, value: Tensor) -> Tensor | None:
        """The tensor that goes on instead; None: the same."""
        if site_kind != self.kind or not self.is_of(tag):
            return None
        if self.filter is None:
            return value * self.factor
        assert shadow is not None
        return torch.where(shadow == self.filter, torch.zeros_like(value), value)


@dataclass
class Told:
    """Keeps what one pass tells. A pass begins with `begin`.

    Attributes:
        sites: that ran.
        responses: of its layers.
        places: the sites that were edited.
        told: whether what runs now belongs to a pass.
        edit: to be made in each pass.
    """

    sites: list[Site] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)
    places: list[Site] = field(default_factory=list)
    told: bool = False
    edit: Edit | None = None

    def begin(self, model: nn.Module) -> None:
        """A pass of a model begins."""
        self.sites, self.responses, self.places = [], [], []
        self._tags: dict[int, tuple[Tensor, Tag]] = {}
        self._counts: Counter[str] = Counter()
        self._unsure: set[str] = set()
        self._names = {id(m): name for name, m in model.named_modules()}
        self._stack: list[nn.Module] = [model]
        self.told = True

    def end(self) -> None:
        """It has ended; what a backward pass runs again is not told."""
        self.told = False
        self._tags = {}
        self._stack = []

    def enter(self, *inputs: Any) -> None:
        """What comes into the model has no layer yet."""
        for value in inputs:
            if isinstance(value, Tensor):
                self._put(value, Tag(None))

    # -- tags -----------------------------------------------------------------------------------

    def _of(self, value: Any) -> Tag | None:
        found = self._tags.get(id(value)) if isinstance(value, Tensor) else None
        return found[1] if found is not None else None

    def _put(self, value: Any, tag: Tag | None) -> None:
        if isinstance(value, Tensor):
            if tag is not None:
                self._tags[id(value)] = (value, tag)
            else:
                self._tags.pop(id(value), None)

    def _next(self, name: str) -> int | None:
        call = self._counts[name]
        self._counts[name] += 1
        return None if name in self._unsure else call

    def _name(self, module: nn.Module) -> str:
        return self._names.get(id(module), _NAMELESS)

    def _inside(self) -> tuple[str, ...]:
        return tuple(self._name(m) for m in self._stack if id(m) in self._names)

    # -- what a told program calls --------------------------------------------------------------

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a module, a function or whatever else can be called."""
        if not self.told:
            return function(*args, **kwargs)
        if isinstance(function, functools.partial) and function.func in _SIGMA_FUNCTIONS:
            name = _SIGMA_FUNCTIONS[function.func]
            return self.sig(name, lambda t: function(t, *args[1:], **kwargs), args[0])
        if not isinstance(function, nn.Module):
            sigma = _function_sigma(function)
            if sigma is None:
                return function(*args, **kwargs)
            return self.sig(sigma, lambda t: function(t, *args[1:], **kwargs), args[0])
        return self._module(function, function, args, kwargs)

    def forward(self, module: nn.Module, *args: Any) -> Any:
        """Call a module's forward, past its own call."""
        if not self.told or type(module) not in _KNOWN:
            return module.forward(*args)
        return self._module(module, module.forward, args, {})

    def _module(self, module: nn.Module, function: Any, args: Any, kwargs: Any) -> Any:
        kind = type(module)
        if parametrize.is_parametrized(module):  # torch has made a class of its own for it
            kind = kind.__bases__[0]
        if kind in _LAYERS:
            return self._layer(module, lambda: function(*args, **kwargs), _LAYERS[kind])
        self._stack.append(module)
        try:
            if kind is nn.Sequential:
                (x,) = args
                for part in module:  # type: ignore[attr-defined]
                    x = self.call(part, x)
                return x
            if kind in _NORMS or kind.__name__ in HAND_NORMS:
                return self._norm(module, function, args[0], _NORMS.get(kind, -1))
            sigma = kind.__name__ if kind.__name__ in HAND_SIGMAS else _SIGMA_MODULES.get(kind)
            if sigma is not None:
                self._stack.pop()
                try:
                    # Past the module's own call, it is a function that the caller applies.
                    name, caller = self._name(module), self._name(self._stack[-1])
                    own = (name,) if function is module else (f"{caller}:{sigma}",)
                    return self._sigma(sigma, function, args[0], own, module)
                finally:
                    self._stack.append(module)
            if kind in _KEEPERS:
                return self.keep(function, *args)
            if kind in _RESIZERS:
                return self.resize(function, *args)
            return function(*args, **kwargs)
        finally:
            self._stack.pop()

    def sig(self, sigma: str, function: Callable[[Any], Any], z: Tensor) -> Tensor:
        """A nonlinearity, called as a function."""
        if not self.told:
            return function(z)  # type: ignore[no-any-return]
        inner = [m for m in self._stack if id(m) in self._names]
        own = (f"{self._name(inner[-1])}:{sigma}",)
        return self._sigma(sigma, function, z, own)

    def _sigma(
        self,
        sigma: str,
        function: Any,
        z: Tensor,
        own: tuple[str, ...],
        module: nn.Module | None = None,
    ) -> Tensor:
        tag = self._of(z) or Tag(None)
        if sigma in _SOMETIMES and z.dim() < 2 and tag.owner is None:
            return function(z)  # type: ignore[no-any-return]  # of a statistic
        before = z.detach().clone()
        z_grad = _gradient(z)
        told, self.told = self.told, False
        try:
            a = self._edited(function, z, tag) if self.edit is not None else function(z)
        finally:
            self.told = told
        shadow = tag.shadow
        if shadow is not None and a.shape != before.shape:  # glu: the first half of its filters
            shadow = shadow[tuple(slice(n) for n in a.shape)]
        inside = self._inside() + ((self._name(module),) if module is not None else ())
        own_call = None
        if tag.owner is None and tag.trust == STRICT:
            own_call = self._next(own[0])
        elif tag.trust != STRICT:
            self._unsure.update(own)
        if tag.owner is not None:
            if tag.trust == STRICT:
                tag.owner.claimed = True
            else:
                tag.owner.maybe = True
        after, a_grad = a.detach().clone(), _gradient(a)
        site = Site(sigma, before, after, tag, shadow, own, own_call, inside, z_grad, a_grad)
        self.sites.append(site)
        if self.edit is not None and self.edit.is_of(tag):
            self.places.append(site)
        self._put(a, Tag(None))
        return a

    def _edited(self, function: Any, z: Tensor, tag: Tag) -> Tensor:
        """σ between the edits; what it does in place, it does to `z`."""
        assert self.edit is not None
        before = self.edit.of("preactivation", tag, tag.shadow, z)
        given = z if before is None else before
        a: Tensor = function(given)
        in_place = a is given
        shadow = tag.shadow
        if shadow is not None and a.shape != shadow.shape:
            shadow = shadow[tuple(slice(n) for n in a.shape)]
        after = self.edit.of("activation", tag, shadow, a)
        a = a if after is None else after
        return z.copy_(a) if in_place and a is not z else a

    def aside(self, function: Any, x: Tensor) -> Tensor:
        """Runs in another thread, which is not captured."""
        out: Tensor = function(x)
        if self.told:
            self._put(out, self._doubted(x))
        return out

    def _layer(self, module: nn.Module, function: Callable[[], Any], axis: int) -> Any:
        self._stack.append(module)
        try:
            out = function()
        finally:
            self._stack.pop()
        return self._responds(module, out, axis)

    def _responds(self, module: nn.Module, out: Tensor, axis: int, first: int = 0) -> Tensor:
        name = self._name(module)
        if name == _NAMELESS:
            self._put(out, Tag(None, None, VAGUE))
            return out
        owner = Owner(name, self._next(name))
        shadow = _along(out, axis) + first
        inside = (*self._inside(), name)
        self.responses.append(Response(owner, out.detach().clone(), shadow, inside))
        self._put(out, Tag(owner, shadow))
        return out

    def weigh(self, module: nn.Module, axis: int, function: Any, *args: Any) -> Tensor:
        """A function of torch's weighs with a parameter of `module`."""
        out: Tensor = function(*args)
        return self._responds(module, out, axis) if self.told else out

    def rows(self, module: nn.Module, first: int, axis: int, function: Any, *args: Any) -> Tensor:
        """The same, with some rows of its weight, the first of which is given."""
        out: Tensor = function(*args)
        return self._responds(module, out, axis, first) if self.told else out

    def _norm(self, module: nn.Module, function: Any, x: Tensor, axis: int) -> Tensor:
        out: Tensor = function(x)
        tag = self._of(x)
        name = self._name(module)
        if tag is None or tag.trust != STRICT:
            self._unsure.add(name)
            tag = Tag(None, None, VAGUE)
        elif tag.owner is None or tag.owner.kind == "norm":
            tag = Tag(Owner(name, self._next(name), "norm"), _along(out, axis))
        self._put(out, tag)
        return out

    def view(self, function: Any, x: Tensor, trust: str = STRICT) -> Any:
        """Moves elements, and does not change them."""
        tag = self._of(x)
        out = function(x)
        if not self.told or tag is None:
            return out
        if tag.shadow is not None:  # which a method may change in place
            tag = replace(tag, shadow=tag.shadow.view_as(tag.shadow))
        if trust == LOOSE and tag.owner is not None:
            tag.owner.maybe = True
        weaker = max(tag.trust, trust, key=_TRUST.index)
        if tag.owner is None and weaker == LOOSE:
            weaker = STRICT
        if isinstance(out, Tensor):
            shadow = None if tag.shadow is None else function(tag.shadow)
            self._put(out, Tag(tag.owner, shadow, weaker))
        else:
            shadows = [None] * len(out) if tag.shadow is None else function(tag.shadow)
            for piece, shadow in zip(out, shadows, strict=True):
                self._put(piece, Tag(tag.owner, shadow, weaker))
        return out

    def loose(self, function: Any, x: Tensor) -> Any:
        """The same, in a way that fmapkit need not follow."""
        return self.view(function, x, LOOSE)

    def keep(self, function: Any, *args: Any) -> Tensor:
        """Works element by element: the first operand of full size hands its filters on."""
        tags = [(a, self._of(a)) for a in args]
        shapes = [a.shape if isinstance(a, Tensor) else None for a in args]
        out: Tensor = function(*args)
        if self.told:
            known = [
                (shape, tag)
                for shape, (_, tag) in zip(shapes, tags, strict=True)
                if tag is not None
            ]
            found = next((tag for shape, tag in known if shape == out.shape), None)
            if found is None and known:
                found = self._doubted(*args)
            self._put(out, found)
        return out

    def mix(self, function: Any, first: Tensor, second: Tensor) -> Tensor:
        """Takes elements of both, or puts them side by side: of two layers, they are no one's."""
        tags = self._of(first), self._of(second)
        names = {tag.owner.name for tag in tags if tag is not None and tag.owner is not None}
        sure = all(tag is None or tag.trust == STRICT for tag in tags)
        if sure and len(names) < 2:
            return self.keep(function, first, second)
        out: Tensor = function(first, second)
        if self.told:  # whose elements they are is not known for sure: nor is that of the result
            self._put(out, Tag(None) if sure else self._doubted(first, second))
        return out

    def aug(self, sign: str, x: Any, y: Any) -> Any:
        """`x += y` and the like."""
        how = {"+": operator.iadd, "*": operator.imul, "-": operator.isub}[sign]
        return self.keep(how, x, y) if isinstance(x, Tensor) else how(x, y)

    def takes(self, function: Any, target: Tensor, source: Tensor) -> Tensor:
        """Writes one tensor over another, which then is a map of the first one's."""
        tag = self._of(source)
        out: Tensor = function(target, source)
        if self.told:
            self._put(out, tag)
        return out

    def resize(self, function: Any, x: Tensor) -> Tensor:
        """Changes the size of other axes than that of the filters, and keeps their number."""
        tag = self._of(x)
        out: Tensor = function(x)
        if self.told and tag is not None:
            shadow = None
            if tag.shadow is not None:
                corner = tag.shadow
                for dim in range(x.dim()):
                    if x.shape[dim] != out.shape[dim]:
                        corner = corner.narrow(dim, 0, 1)
                shadow = corner.expand(out.shape)
            self._put(out, Tag(tag.owner, shadow, tag.trust))
        return out

    def reduce(self, dim: int, function: Any, x: Tensor) -> Tensor:
        """Sums away one axis that does not count filters."""
        tag = self._of(x)
        out: Tensor = function(x)
        if self.told and tag is not None:
            shadow = None if tag.shadow is None else tag.shadow.select(dim, 0)
            self._put(out, Tag(tag.owner, shadow, tag.trust))
        return out

    def lose(self, function: Any, *args: Any) -> Any:
        """Mixes filters: what it returns is no one layer's."""
        out = function(*args)
        if self.told:
            self._put(out, Tag(None))
        return out

    def vague(self, function: Any, *args: Any) -> Any:
        """Whose filters the result carries is a matter of taste."""
        out = function(*args)
        if self.told:
            self._put(out, self._doubted(*args))
        return out

    def note(self, *tensors: Tensor) -> None:
        """The tensors have been written to in a way that makes their layer a matter of taste."""
        if self.told:
            for tensor in tensors:
                if self._of(tensor) is not None:
                    self._put(tensor, self._doubted(tensor))

    def _doubted(self, *args: Any) -> Tag:
        for arg in args:
            tag = self._of(arg)
            if tag is not None and tag.owner is not None:
                tag.owner.maybe = True
        return Tag(None, None, VAGUE)

    @staticmethod
    def source(code: str) -> str:
        """Code that the program compiles itself."""
        return code


_NAMELESS = "<made in the forward>"
_KNOWN = frozenset({*_LAYERS, *_NORMS, *_SIGMA_MODULES})


def _function_sigma(function: Any) -> str | None:
    try:
        return _SIGMA_FUNCTIONS.get(function)
    except TypeError:  # not hashable
        return None


def _gradient(tensor: Tensor) -> list[Tensor] | None:
    """A list that gets the gradient when backward has made it."""
    found: list[Tensor] = []
    if tensor.requires_grad and tensor.is_leaf:
        return None
    if tensor.requires_grad:
        tensor.register_hook(lambda grad: found.append(grad.detach().clone()))
    return found


def _along(out: Tensor, axis: int) -> Tensor:
    """The filters counted along one axis."""
    with torch.no_grad():
        shape = [1] * out.dim()
        shape[axis] = out.shape[axis]
        return torch.arange(out.shape[axis]).view(shape).expand(out.shape)
