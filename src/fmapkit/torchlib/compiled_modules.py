"""What torch.compile has compiled: which modules, and with what. Read off them, never guessed."""

from __future__ import annotations

import gc
import sys
import threading
import types
from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from fmapkit.torchlib.caching import remembered
from fmapkit.torchlib.call_override import CallOverride

# Among the attributes of what `torch.compile(function)` returns: the function.
COMPILED = "_torchdynamo_orig_callable"


def is_optimized(module: Any) -> bool:
    """Whether it is what `torch.compile(module)` returns: a module around the plain one."""
    return is_optimized_type(type(module))


@remembered
def is_optimized_type(kind: type) -> bool:
    """Whether its class is that of what `torch.compile(module)` returns."""
    home = sys.modules.get("torch._dynamo.eval_frame")  # imported by the first torch.compile
    return home is not None and issubclass(kind, home.OptimizedModule)


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of it run compiled code: after `torch.compile(module)`, `module.compile()`.

    What `torch.compiler.disable(module)` returns is of the same class, and runs eagerly.
    """
    if is_optimized(module):
        disabled = sys.modules["torch._dynamo.eval_frame"].DisableContext
        return not isinstance(getattr(module, "dynamo_ctx", None), disabled)
    return compiled_call(module.__dict__) is not None


def is_compiled_function(function: Any) -> bool:
    """Whether it is what `torch.compile(function)` returns, or a method that is."""
    function = getattr(function, "__func__", function)
    return getattr(function, COMPILED, None) is not None


def compiled_call(attributes: dict[str, Any]) -> Any:
    """What `module.compile()` has put among a module's attributes; None if it did not."""
    call = attributes.get("_compiled_call_impl")
    return None if isinstance(call, CallOverride) else call


# Each is told of the modules that `torch.compile(module)` makes, and what is in them.
_told_of_new: list[Callable[[nn.Module, nn.Module], None]] = []
_undo: list[Callable[[], None]] = []  # takes away what tells them
_lock = threading.RLock()


def tell_of_new(tell: Callable[[nn.Module, nn.Module], None]) -> None:
    """Have somebody told of each module that `torch.compile(module)` makes, before its first call.

    Its class tells. Before torch.compile was ever imported, torch's hook for the registration of
    modules does: at any other time, compiled code that registers some, as `layers[:4]` does, would
    be compiled anew, since dynamo compares which hooks there are.
    """
    with _lock:
        _told_of_new.append(tell)
        if len(_told_of_new) == 1:
            home = sys.modules.get("torch._dynamo.eval_frame")
            if home is None:
                _undo.append(register_module_module_registration_hook(_registered).remove)
            else:
                _have_told(home.OptimizedModule)


def tell_no_more(tell: Callable[[nn.Module, nn.Module], None]) -> None:
    """Undo `tell_of_new`."""
    with _lock:
        _told_of_new.remove(tell)
        while _undo and not _told_of_new:
            _undo.pop()()


def _have_told(kind: Any) -> None:
    made, become = kind.__init__, partial(setattr, kind, "__init__")

    @wraps(made)
    def made_and_told(module: Any, *args: Any, **kwargs: Any) -> None:
        made(module, *args, **kwargs)
        _tell(module, module._orig_mod)

    become(made_and_told)
    _undo.append(partial(become, made))


def _registered(module: nn.Module, name: str, inner: nn.Module | None) -> None:
    """A module is registered in another one, perhaps in the first that torch.compile makes."""
    if name == "_orig_mod" and inner is not None and is_optimized(module):
        _tell(module, inner)


def _tell(module: nn.Module, inner: nn.Module) -> None:
    for tell in tuple(_told_of_new):
        tell(module, inner)


def plain(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`; any other one as it is."""
    while is_optimized(module):
        module = module._orig_mod  # type: ignore[assignment]
    return module


def compiled_roots(model: nn.Module) -> list[nn.Module]:
    """The outermost compiled modules in a model, itself included, each once."""
    found: dict[nn.Module, None] = {}
    seen: set[nn.Module] = set()

    def walk(module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        marked = "_compiled_call_impl" in module.__dict__ or is_optimized_type(type(module))
        if marked and is_compiled(module):
            found[module] = None
            return
        for child in module._modules.values():
            if child is not None:
                walk(child)

    walk(model)
    return list(found)


def around(model: nn.Module) -> list[nn.Module]:
    """The compiled modules that have a model inside, which the model does not know of.

    `torch.compile(model)` is one of them, and so is a compiled model of which it is a part.
    """
    if not ever_compiled():  # to look through all objects takes a while
        return []
    kind = sys.modules["torch._dynamo.eval_frame"].OptimizedModule
    # What `module.compile()` has made keeps the module's bound method. Not `gc.get_objects`: that
    # has the tuples, too, which other threads have yet to fill, and cannot while we have them.
    holders = gc.get_referrers(kind, *kind.__subclasses__(), nn.Module._call_impl)
    bound = (h.__self__ for h in holders if type(h) is types.MethodType)
    found = {id(o): o for o in (*holders, *bound) if issubclass(type(o), nn.Module)}
    return [o for o in found.values() if _is_whole(o) and is_compiled(o) and holds(o, model)]


def _is_whole(module: nn.Module) -> bool:
    """Whether it was made to its end, and its attributes can be read: it may be anybody's."""
    try:
        return "_modules" in module.__dict__
    except AttributeError:
        return False


def ever_compiled() -> bool:
    """Whether torch.compile was ever called: it imports this on its way, and nothing else does.

    `torch._dynamo` itself is imported by other libraries, too, and by `torch.optim`. A test sees to
    it that this holds.
    """
    return "torch._dynamo.repro.after_dynamo" in sys.modules


def dynamo_has_run() -> bool:
    """Whether dynamo's tracing of code was ever imported."""
    return "torch._dynamo.convert_frame" in sys.modules


def holds(module: nn.Module, model: nn.Module) -> bool:
    """Whether the model is a part of a module, or the module itself."""
    return any(m is model for m in plain(module).modules())


@lru_cache(maxsize=1)
def _wrappers() -> tuple[dict[int, Any], dict[int, Any]]:
    """The code of torch.compile's wrappers around functions, and that of torch.compiler.disable's.

    All wrappers share their code, which is a constant of the function that makes them. By its id:
    to hash code, Python goes through all of its instructions.
    """
    home = sys.modules["torch._dynamo.eval_frame"]
    compiled = filter(_is_code, home._TorchDynamoContext.__call__.__code__.co_consts)
    disabled = filter(_is_code, home.DisableContext.__call__.__code__.co_consts)
    return {id(code): code for code in compiled}, {id(code): code for code in disabled}


def _is_code(value: Any) -> bool:
    return isinstance(value, types.CodeType)


def compiled_by() -> Any:
    """What compiled the code that called us: torch's context of backend, mode and options.

    Called with a module, it compiles that in the same way. None if nothing did.
    """
    compiled, disabled = _wrappers()
    at: types.FrameType | None = sys._getframe(1)
    while at is not None:
        if id(at.f_code) in disabled:
            return None
        if id(at.f_code) in compiled:
            return at.f_locals.get("self")
        at = at.f_back
    return None
