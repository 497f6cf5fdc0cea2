"""Training frameworks and generation loops: their code runs unchanged inside the block.

Each test runs the framework twice, bare and captured, from the same seed: weights and losses must
be the same bits. In the bare run a witness below autograd (`tests/truth.py`) takes every pass; the
captured run is compared with it pass by pass.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fmapkit import capture
from tests import truth


class record:  # noqa: N801
    """Around a bare run: what each pass of the model truly did, and in which mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.passes: list[tuple[bool, list[truth.Run]]] = []

    def __enter__(self) -> list[tuple[bool, list[truth.Run]]]:
        self._handles = [
            self.model.register_forward_pre_hook(self._before),
            self.model.register_forward_hook(self._after),
        ]
        return self.passes

    def _before(self, module: nn.Module, args: Any) -> None:
        self._witness = truth.Witness(module)
        self._mode = module.training
        self._witness.__enter__()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._witness.__exit__(None, None, None)
        self.passes.append((self._mode, self._witness.runs))

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


def assert_same_passes(maps: Any, passes: list[tuple[bool, list[truth.Run]]]) -> None:
    """Every pass that the captured run kept has the bits of the bare run's, in the same mode."""
    assert maps.missed == []
    assert sorted({fm.step for fm in maps.select()}) == list(range(len(passes)))
    for step, (mode, runs) in enumerate(passes):
        found = maps.select(step=step)
        assert {fm.training for fm in found} == {mode}
        found = [fm for fm in found if fm.nonlinearity is not None]
        zs = [fm.tensor for fm in found if fm.kind == "preactivation"]
        activations = [fm.tensor for fm in found if fm.kind == "activation"]
        assert len(runs) == len(zs) == len(activations) > 0
        for run, z, a in zip(runs, zs, activations, strict=True):
            assert truth.same_bits(run.z, z), step
            assert truth.same_bits(run.a, a), step


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    """Bit for bit; and nothing is left behind on the captured one."""
    a, b = left.state_dict(), right.state_dict()
    assert a.keys() == b.keys()
    assert all(truth.same_bits(a[k], b[k]) for k in a)


class Net(nn.Module):
    """A small net with an in-place ReLU, a norm and a random draw."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.body(x)))


def data(count: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(count, 6, generator=generator),
        torch.randint(3, (count,), generator=generator),
    )


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(before)


def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    truth.seed(0)
    model = make()
    return copy.deepcopy(model), model


# -- Hugging Face Trainer -------------------------------------------------------------------------


class Tokens(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(20, (count, 7), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=32, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def _trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=4,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        seed=3,
        **options,
    )
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=Tokens(32), eval_dataset=Tokens(8)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"eval_strategy": "steps", "eval_steps": 2},
        {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"max_grad_norm": 0.1, "optim": "adamw_torch", "lr_scheduler_type": "cosine"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    bare, model = twins(gpt2)
    with record(bare) as passes:
        expected = _trainer(bare, tmp_path, **options).train()
    with capture(model, keep="all") as maps:
        got = _trainer(model, tmp_path, **options).train()
    assert expected.training_loss == got.training_loss
    assert_same_weights(bare, model)
    assert_same_passes(maps, passes)
    micro = options.get("gradient_accumulation_steps", 1)
    rounds = 2 if "eval_steps" in options else 0
    assert len(passes) == 4 * micro + rounds * 2  # two batches for each evaluation
    assert sum(mode for mode, _ in passes) == 4 * micro
    truth.assert_nothing_left(truth.fingerprint(bare), model)


def test_trainer_with_a_capture_inside_a_callback(tmp_path: Path) -> None:
    # The other way round: the block is opened and closed by the training, step by step.
    class Watch(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.block: Any = None
            self.layers: list[list[str]] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.block = capture(given["model"], kinds="activation")
            self.maps = self.block.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.layers.append(self.maps.layers)
            self.block.__exit__(None, None, None)

    bare, model = twins(gpt2)
    _trainer(bare, tmp_path).train()
    trainer = _trainer(model, tmp_path)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert_same_weights(bare, model)
    assert watch.layers == [["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]] * 4
    truth.assert_nothing_left(truth.fingerprint(bare), model)


# -- Lightning ------------------------------------------------------------------------------------


class Lit(lightning.LightningModule):
    """Trained by Lightning; `forward` is what its steps call."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.net = Net()
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        self.log("loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def _fit(model: Any, folder: Path, **options: Any) -> None:
    truth.seed(5)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(model, DataLoader(data(), 8, shuffle=True), DataLoader(data(16), 8))


@pytest.mark.parametrize("part", ["module", "net"])
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"manual": True}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_lightning(tmp_path: Path, options: dict[str, Any], part: str) -> None:
    options = dict(options)
    manual = options.pop("manual", False)
    bare, model = twins(lambda: Lit(manual))
    # The module as a whole, or the net inside, which is what one would train without Lightning.
    of_bare, of_model = (m if part == "module" else m.net for m in (bare, model))
    with record(of_bare) as passes:
        _fit(bare, tmp_path, **options)
    with capture(of_model, keep="all") as maps:
        _fit(model, tmp_path, **options)
    assert_same_weights(bare, model)
    assert_same_passes(maps, passes)
    # Two batches of a sanity check; then twice three of training and two of validation.
    modes = [False] * 2 + ([True] * 3 + [False] * 2) * 2
    assert [mode for mode, _ in passes] == modes
    truth.assert_nothing_left(truth.fingerprint(of_bare), of_model)


def test_a_lightning_step_that_bypasses_forward_is_named(tmp_path: Path) -> None:
    # A step that calls `self.net(x)` runs outside of the captured module's own forward: named.
    class Bypassing(Lit):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        validation_step = None  # type: ignore[assignment]

    model = Bypassing()
    with capture(model) as maps:
        _fit(model, tmp_path)
    assert [m.layer for m in maps.missed] == ["net"]
    assert "capture(model.net)" in maps.missed[0].reason


# -- accelerate -----------------------------------------------------------------------------------


def _accelerated(model: nn.Module, around: Callable[[nn.Module], Any], **options: Any) -> Any:
    truth.seed(5)
    accelerator = accelerate.Accelerator(cpu=True, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    prepared, optimizer, loader, schedule = accelerator.prepare(
        model, optimizer, DataLoader(data(), 8, shuffle=True), schedule
    )
    losses = []
    with around(model) as result:
        for _ in range(2):
            prepared.train()
            for x, y in loader:
                with accelerator.accumulate(prepared):
                    loss = F.cross_entropy(prepared(x), y)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                losses.append(loss.detach())
            prepared.eval()
            with torch.no_grad():
                prepared(torch.ones(2, 6))
    accelerator.free_memory()
    accelerate.state.AcceleratorState._reset_state(True)
    return result, losses


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_accelerate(options: dict[str, Any]) -> None:
    bare, model = twins(Net)
    passes, expected = _accelerated(bare, record, **options)
    maps, got = _accelerated(model, lambda m: capture(m, keep="all"), **options)
    assert_same_weights(bare, model)
    assert all(truth.same_bits(x, y) for x, y in zip(expected, got, strict=True))
    assert [mode for mode, _ in passes] == ([True] * 3 + [False]) * 2
    assert_same_passes(maps, passes)


def test_accelerate_hooks_of_a_dispatched_model() -> None:
    # Weights that lie elsewhere and come only for the call: accelerate replaces each forward.
    bare, model = twins(Net)
    bare.eval(), model.eval()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with capture(model, keep="all") as maps, torch.no_grad():
        for step in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            with truth.Witness(bare) as witness:
                expected = bare(x)
            assert truth.same_bits(expected, model(x))
            truth.assert_captured_exactly_once(maps, witness.runs)
        assert maps.missed == []


# -- generation -----------------------------------------------------------------------------------


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=20,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _generate(model: Any, **options: Any) -> Tensor:
    truth.seed(2)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, **options
    )


GENERATION: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "top_k": 5},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": False, "use_cache": False},
]


@pytest.mark.parametrize("options", GENERATION, ids=str)
@pytest.mark.parametrize("make", [gpt2, llama, t5])
def test_generate(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    bare, model = twins(make)
    bare.eval(), model.eval()
    with record(bare) as passes:
        expected = _generate(bare, **options)
    with capture(model, keep="all") as maps, capture(model, keep=2) as latest:
        assert torch.equal(_generate(model, **options), expected)
    assert len(passes) == 6  # one for each new token, the first one of the whole prompt
    kept = sorted({fm.step for fm in latest.select()})
    assert kept == [4, 5]
    if make is t5:
        # `generate` calls the encoder by itself, before the first pass: named, with what to do.
        assert [m.layer for m in maps.missed] == ["encoder"]
        assert "capture(model.encoder)" in maps.missed[0].reason
        maps._session.missed.clear()
    assert_same_passes(maps, passes)
    for fm in latest.select():
        twin = maps.select(layer=fm.layer, kind=fm.kind, step=fm.step, call=fm.call)
        assert any(truth.same_bits(fm.tensor, t.tensor) for t in twin)
    truth.assert_nothing_left(truth.fingerprint(bare), model)


def test_the_encoder_of_t5_has_a_capture_of_its_own() -> None:
    bare, model = twins(t5)
    bare.eval(), model.eval()
    encoder: Any = model.encoder
    with record(bare.encoder) as passes:  # type: ignore[arg-type]
        expected = _generate(bare)
    with capture(encoder, keep="all") as maps:
        assert torch.equal(_generate(model), expected)
    assert len(passes) == 1
    if model.decoder.embed_tokens is encoder.embed_tokens:  # of transformers 4
        assert [m.layer for m in maps.missed] == ["embed_tokens"]
        maps._session.missed.clear()
    assert_same_passes(maps, passes)
