"""What capture costs on texts as they come: batches with padding, and one token at a time.

Of four texts one is padded, so that the model makes a mask and asks it whether it masks anything.
A generation begins with eight tokens and goes on by 24, each in a pass of its own with a cache of
keys and values. Beside fmapkit, hooks on every leaf module that keep references; of generations,
also such that add a vector to what a block returns, by an edit and by a hook. Ratios are of CPU
time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.editing import hooked
from benchmarks.measure import Figures, Timed, environment, interleave, resting
from fmapkit import capture, edits
from fmapkit.edits import Where

__all__ = ["run"]

_WIDE = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "hidden_size": 256,
}
_GROUPED = {"intermediate_size": 688, "num_key_value_heads": 2}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("BertModel", _WIDE | {"intermediate_size": 1024}),
    "GPT-2": ("GPT2LMHeadModel", {"n_layer": 4, "n_head": 4, "n_embd": 256, "vocab_size": 1024}),
    "Llama": ("LlamaForCausalLM", _WIDE | _GROUPED),
    "Qwen3": (
        "Qwen3ForCausalLM",
        _WIDE | _GROUPED | {"head_dim": 64},
    ),
}


def _made(name: str) -> nn.Module:
    import transformers

    kind, sizes = _MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, kind)
    model: nn.Module = made(made.config_class(**sizes))
    return model.eval()


def _padded(model: nn.Module, ids: Tensor, mask: Tensor) -> Any:
    return model(input_ids=ids, attention_mask=mask)


def _generated(model: Any, ids: Tensor) -> Any:
    return model.generate(
        ids, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None
    )


@contextmanager
def _hooked(model: nn.Module) -> Iterator[None]:
    held: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        held.append(output)

    def clear(module: nn.Module, args: Any) -> None:
        held.clear()

    handles = [m.register_forward_hook(keep) for m in model.modules() if not m._modules]
    handles.append(model.register_forward_pre_hook(clear))
    yield
    for handle in handles:
        handle.remove()


def _edited(model: nn.Module) -> Any:
    return capture(model, edit={Where(_block(model), "output", filter_axis=-1): edits.add(_VECTOR)})


def _changed(model: nn.Module) -> Any:
    return hooked(_block(model), _moved, model)


def _moved(output: Any) -> Any:
    return (output[0] + _VECTOR, *output[1:]) if isinstance(output, tuple) else output + _VECTOR


def _block(model: nn.Module) -> str:
    """The third of a decoder's blocks."""
    there = dict(model.named_modules())
    return next(name for name in ("transformer.h.2", "model.layers.2") if name in there)


_VECTOR = torch.ones(_WIDE["hidden_size"])
_With = dict[str, Callable[[nn.Module], Any]]
_WITH: _With = {"fmapkit": capture, "references": _hooked}
_STEERED: _With = {"fmapkit, edit": _edited, "hook, edit": _changed}


def run(threads: int = 1, seconds: float = 5.0) -> None:
    """Print the table.

    Args:
        threads: of torch.
        seconds: for each row.
    """
    torch.set_num_threads(threads)
    print(", ".join(f"{key} {value}" for key, value in environment("cpu").items() if value))
    mask = torch.ones(4, 32, dtype=torch.long)
    mask[0, 20:] = 0
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 1000, (4, 32), generator=drawn)
    for name in _MODELS:
        bare = _made(name)
        jobs: dict[str, Callable[[nn.Module], Any]] = {
            "padded": partial(_padded, ids=ids, mask=mask)
        }
        if name != "BERT":
            jobs["generation"] = partial(_generated, ids=ids[:1, :8])
        for job, call in jobs.items():
            with ExitStack() as stack, torch.no_grad():
                timed: dict[str, Timed] = {}
                contenders = _WITH | (_STEERED if job == "generation" else {})
                for row, opened in contenders.items():
                    model = copy.deepcopy(bare)
                    awake = resting(stack.enter_context(opened(model)))
                    with awake():
                        for _ in range(3):  # the first passes are traced
                            call(model)
                    timed[row] = Timed(partial(call, model), partial(call, bare), awake=awake)
                pairs, _ = interleave(timed, seconds * len(timed))
            for row, those in pairs.items():
                f = Figures.of(those)
                print(
                    f"  {name:8s} {job:12s} {row:14s} {f.cpu:5.2f} (quartiles {f.cpu_low:.2f} to "
                    f"{f.cpu_high:.2f}; bare {f.bare * 1e3:.1f} ms), {f.pairs} pairs"
                )
