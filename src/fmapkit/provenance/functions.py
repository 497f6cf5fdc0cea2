"""What a torch function is, looked up once: its name, whether it is a σ, what it writes to."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmapkit import nonlinearities
from fmapkit.provenance.conditional_sigma import FOLLOWED, SOMETIMES
from fmapkit.provenance.layer_ops import is_fused, is_weighted, weighs
from fmapkit.provenance.rule_basics import argument
from fmapkit.provenance.vocabulary import (
    ADDING_WRITES,
    DATA_TO_PYTHON,
    DATA_TO_SIZES,
    FRESH,
    GROUPED,
    METADATA,
    WRITES,
    words,
)
from fmapkit.torchlib.apart import runs_apart
from fmapkit.torchlib.nested import tensors_in
from fmapkit.torchlib.operators import mutated, namespace_of, operators_of


@dataclass(frozen=True, slots=True)
class Function:
    """One torch function, as the tracer sees it."""

    name: str  # without module, overload and the "_" of an in-place form
    sigma: str | None  # the nonlinearity it is, if it is one
    in_place: bool  # it always writes to its first argument
    inplace_at: int | None  # place of its `inplace` parameter, if it has one
    silent: bool  # it returns no data (`shape`, `size`, …)
    never_writes: bool  # no argument but `out` can make it write
    packed: bool  # it is a quantised layer
    fused: bool  # it is a quantised function with a nonlinearity inside
    opened: Any = None  # the same function with its inside visible, for functions made of others
    # Tells of a call whether it lets data become a number of Python's, or a size; None: none does.
    reads: Callable[[Any, Any], bool] | None = None
    indexed: bool = False  # such a call lets data decide only by a tensor beside its first argument
    sometimes: bool = False  # it is a nonlinearity in some of its calls
    passive: bool = False  # nothing has to be done before it runs, unless it is given `out`
    weighs: str = ""  # in which form it takes its weight; empty where no call of it is a layer
    followed: bool = False  # what it computes point by point is followed inside a module
    fresh: bool = False  # it makes a tensor from nothing
    on_lists: bool = False  # it stands for as many calls as there are tensors in a list
    # Arguments that an operator writes to by what it says itself, of no such name.
    mutates: tuple[tuple[int, str], ...] = ()
    higher_order: bool = False  # it is an operator that is given code to run

    def writes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Tensor]:
        """The tensors that a call writes to."""
        if self.name in _ESCAPES or self.name in _MOVES:
            yield from tensors_in(args[:1])
        if self.name in _RENORMING and argument(args, kwargs, 3, "max_norm") is not None:
            yield from tensors_in(argument(args, kwargs, 1, "weight"))
        if (self.in_place or self.asked_in_place(args, kwargs)) and not self._drops_none(
            args, kwargs
        ):
            first = next(iter(kwargs.values()), None)
            yield from tensors_in(args[0] if args else kwargs.get("self", first))
        if "out" in kwargs:
            yield from tensors_in(kwargs["out"])
        for at, name in self.mutates:
            yield from tensors_in(argument(args, kwargs, at, name))

    def _drops_none(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it is a dropout that is not in training: it gives its input back as it is."""
        named = any(kwargs.get(name) is False for name in ("training", "train"))
        return self.name in _DROPS and (named or (len(args) > 2 and args[2] is False))

    def asked_in_place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the call passes `inplace=True`."""
        if self.inplace_at is None:
            return False
        if "inplace" in kwargs:
            return bool(kwargs["inplace"])
        return len(args) > self.inplace_at and bool(args[self.inplace_at])


# What the name of a function on lists of tensors begins with.
ON_LISTS = "_foreach_"
# Hand the memory to code that torch does not see: it may be written to from there.
_ESCAPES = {"numpy", "__array__", "__dlpack__", "untyped_storage"}
# With (input, p, training). Those with a number of axes may have changed the shape meanwhile.
_DROPS = words("dropout alpha_dropout feature_dropout feature_alpha_dropout")
# Gives a tensor other memory: what was held of it as the same tensor is no longer that.
_MOVES = {"__set__.data"}
# Give the rows of a weight, their second argument, another norm if they are asked to.
_RENORMING = {"embedding", "embedding_bag"}
# In-place forms that change no data.
_HARMLESS = {"requires_grad", "detach", "retain_grad", "rename", "share_memory", "pin_memory"}
# In-place forms that change the shape: what the tensor carried before cannot be followed.
RESHAPED_IN_PLACE = words("squeeze unsqueeze as_strided resize resize_as set")
_known: dict[Any, Function] = {}
_registered = -1


def described() -> dict[Any, Function]:
    """The functions that are described already; to be asked for anew when a pass begins."""
    global _registered
    if _registered != nonlinearities.version:
        _known.clear()
        _registered = nonlinearities.version
    return _known


def describe(function: Any) -> Function:
    """The description of a torch function, made once."""
    known = described()
    found = known.get(function)
    if found is None:
        found = known[function] = _describe(function)
    return found


def _raw_name(function: Any) -> str:
    """Its name in torch: `torch.erf`, `torch.special.erf` and `aten.erf.default` share it."""
    name: str = getattr(function, "__name__", "")
    if name in ("__get__", "__set__"):
        owner = getattr(function, "__self__", None)
        return f"{name}.{getattr(owner, '__name__', '')}"
    name = name.split(".")[0].removeprefix("special_")
    return GROUPED if name == f"_{GROUPED}" else name


def _describe(function: Any) -> Function:
    raw = _raw_name(function)
    marked = raw.endswith("_") and not raw.endswith("__")
    operator = raw.startswith("__i") and raw not in ("__invert__", "__index__", "__int__")
    in_place = marked or operator or raw == "__setitem__"
    name = raw[3:-2] if operator else raw[:-1] if marked else raw
    operators = operators_of(function)
    others = namespace_of(operators)
    if others:
        name = f"{others}::{name}"
    place = _inplace_at(function)
    if name.startswith("__get__"):
        tensors = ("T", "mT", "H", "mH", "data", "real", "imag", "grad")
        silent = name.partition(".")[2] not in tensors
    else:
        silent = (
            (name in METADATA and name not in _ESCAPES)
            or name == "is_"
            or (name.startswith("__set__") and name not in _MOVES)
        )
    writes = in_place and name not in _HARMLESS
    mutates = mutated(operators) if others or not writes else ()
    otherwise = name in _ESCAPES | _MOVES | _RENORMING
    never_writes = not (writes or mutates or otherwise) and place is None
    sigma, reads = nonlinearities.function_sigma(function), _reads(name)
    return Function(
        name=name,
        sigma=sigma,
        in_place=writes,
        inplace_at=place,
        silent=silent,
        never_writes=never_writes,
        packed=is_weighted(function),
        fused=is_fused(function),
        opened=_opened(function),
        reads=reads,
        indexed=reads is _has_tensor or reads is _picks_by_data,
        sometimes=name in SOMETIMES,
        passive=sigma is None and name not in SOMETIMES and never_writes,
        weighs=weighs(name),
        followed=name in FOLLOWED,
        fresh=name in FRESH,
        on_lists=name.startswith(ON_LISTS),
        mutates=mutates,
        higher_order=runs_apart(function),
    )


def _inplace_at(function: Any) -> int | None:
    if not isinstance(function, types.FunctionType):
        return None
    try:
        parameters = list(inspect.signature(function).parameters)
    except ValueError:  # a wrapped builtin, as Tensor.__pow__ is: it takes no `inplace`
        return None
    return parameters.index("inplace") if "inplace" in parameters else None


def _reads(name: str) -> Callable[[Any, Any], bool] | None:
    if name in DATA_TO_PYTHON or name in DATA_TO_SIZES:
        return lambda args, kwargs: True
    return _SOMETIMES_READS.get(name)


def _picks_by_data(args: Any, kwargs: Any) -> bool:
    """Whether an index has a mask in it, or tensors for the bounds of a slice."""
    if any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(*args[1:], kwargs)):
        return True
    index = args[1] if len(args) > 1 else None
    rows = [part for part in _parts(index) if isinstance(part, (tuple, list))]
    return any(isinstance(p, Tensor) for part in (*rows, bounds_in(index)) for p in part)


def bounds_in(index: Any) -> list[Any]:
    """The bounds and steps of the slices in an index."""
    slices = [part for part in _parts(index) if isinstance(part, slice)]
    return [bound for s in slices for bound in (s.start, s.stop, s.step)]


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _has_tensor(args: Any, kwargs: Any) -> bool:
    """Whether there is a tensor beside what the function is of."""
    named = {key: given for key, given in kwargs.items() if key not in _OPERANDS}
    return bool(tensors_in(*args[1:], named))


_OPERANDS = words("input self tensor tensors out")


_NUMBERS = frozenset({int, bool, float, str, type(None), type(...), torch.Size, torch.dtype})


def beside_numbers(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function is given nothing beside its first argument but numbers and their like.

    None of it is a tensor then; to see that takes no look at one.
    """
    if kwargs:
        return False
    for given in args[1:]:
        if type(given) in _NUMBERS:
            continue
        for part in given if type(given) in (tuple, list) else (given,):
            if type(part) is slice:
                if not _NUMBERS.issuperset((type(part.start), type(part.stop), type(part.step))):
                    return False
            elif type(part) not in _NUMBERS:
                return False
    return True


# torch takes a tensor of one number for a number, and reads it then.
_NUMBERED = words(
    """narrow select split split_with_sizes chunk tensor_split hsplit vsplit dsplit unsafe_split
    unsafe_chunk roll rot90 flip unbind view reshape expand unflatten flatten transpose swapaxes
    swapdims permute movedim moveaxis unsqueeze squeeze repeat tile diagonal unfold as_strided
    pad cat concat concatenate stack softmax log_softmax softmin glu cumsum cumprod argmax argmin
    sort topk mean sum amax amin std var logsumexp norm prod any all nanmean nansum median mode
    dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d"""
)
# A mask picks as many as it has of true; so does `where` of a condition alone.
_SOMETIMES_READS: dict[str, Callable[[Any, Any], bool]] = {
    "__getitem__": _picks_by_data,
    "where": lambda args, kwargs: len(args) + len(kwargs) == 1,
    "repeat_interleave": _has_tensor,
    **dict.fromkeys(_NUMBERED, _has_tensor),
}


# They write elements of one tensor into another, and add none.
_COPIES = WRITES - ADDING_WRITES | {"copy"}


def target_of(name: str, args: Any, kwargs: Any) -> Tensor | None:
    """What a function, told by its name, writes elements of another tensor to, if it does."""
    out = kwargs.get("out")
    if isinstance(out, Tensor):
        return out
    if name not in _COPIES or not args:
        return None
    return args[0] if isinstance(args[0], Tensor) else None


def _opened(function: Any) -> Any:
    """`multi_head_attention_forward` without its override check, so that its inside is seen.

    torch hands the whole call to the mode and would do so again inside; the same code, with the
    check answering no, runs its projections as ordinary calls.
    """
    if function is not F.multi_head_attention_forward:
        return None
    inside = dict(function.__globals__, has_torch_function=lambda *_: False)

    def opened(*args: Any, **kwargs: Any) -> Any:
        code = function.__code__  # of the moment: its twin's tells of its calls
        whole = types.FunctionType(code, inside, function.__name__, function.__defaults__)
        return whole(*args, **kwargs)

    return opened


def out_of_place(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same σ into fresh memory: (function, args, kwargs).

    None where torch has no such form, or where this very call is not in place.
    """
    known = describe(function)
    if known.asked_in_place(args, kwargs):
        if "inplace" in kwargs:
            return function, args, {**kwargs, "inplace": False}
        place = known.inplace_at or 0
        return function, (*args[:place], False, *args[place + 1 :]), kwargs
    if not known.in_place:
        return None
    for home in (torch, F, torch._C._nn, Tensor):
        found = getattr(home, known.name, None)
        if found is not None and nonlinearities.FUNCTIONS.get(found) == known.sigma:
            return found, args, kwargs
    return None
