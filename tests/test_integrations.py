"""Callbacks and logs, with the real packages; each is left out, by name, where it is missing."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmapkit
from fmapkit import ArgumentError, CaptureWarning, capture
from fmapkit.analysis import DeadFilters, Statistics
from fmapkit.integrations import FirstNonFinite, Log, Readings, readings
from fmapkit.integrations.watching import Watching


def _hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


class Kept(Log):
    """A log that keeps what it was given."""

    def __init__(self) -> None:
        self.put_at: list[tuple[int, Readings]] = []

    def put(self, readings: Readings, step: int) -> None:
        self.put_at.append((step, readings))


# -- what is read --------------------------------------------------------------------------------


def test_readings_of_statistics_are_those_of_all_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    stats, seen = Statistics(bins=[-0.5, 0.0, 0.5]), []
    with capture(model, analyses=stats, keep="all") as maps, torch.no_grad():
        for _ in range(3):
            model(torch.randn(5, 3))
        seen = [m.tensor.double() for m in maps.select("0", "preactivation")]
    values = torch.cat(seen).flatten().numpy()
    read = readings(stats)
    expected = {
        "mean": values.mean(),
        "std": values.std(),
        "min": values.min(),
        "max": values.max(),
        "zeros": 0.0,
        "nonfinite": 0.0,
    }
    found = {k: v for k, v in read.scalars.items() if k.startswith("preactivation.")}
    assert {k.split("/")[0].split(".")[1] for k in found if k.endswith("/0")} == set(expected)
    for what, value in expected.items():
        assert read.scalars[f"preactivation.{what}/0"] == pytest.approx(value, rel=1e-9)
    assert "activation.saturated/0" in read.scalars  # a sigmoid has bounds
    histogram = read.histograms["preactivation/0"]
    assert histogram.edges[[0, -1]].tolist() == [values.min(), values.max()]
    # NumPy's last bin is closed, as that of the extremes is.
    truth, _ = np.histogram(values, histogram.edges)
    assert histogram.counts.tolist() == truth.tolist()
    assert (histogram.mean, histogram.std) == pytest.approx((values.mean(), values.std()))


def test_a_histogram_leaves_out_empty_ends_and_survives_what_is_not_finite() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(1, 1, bias=False))
    nn.init.ones_(model[1].weight)
    stats = Statistics(bins="log2")
    with capture(model, analyses=stats, keep=0), torch.no_grad():
        model(torch.tensor([[1.5], [3.0], [math.nan], [math.inf]]))
    found = readings(stats).histograms["preactivation/1"]
    assert (np.diff(found.edges) > 0).all()
    assert np.isfinite(found.edges).all()
    assert found.counts.sum() == 3  # a NaN lies nowhere
    assert found.counts[[0, 1]].tolist() == [1, 1]
    assert found.edges[:2].tolist() == [1.0, 2.0]


def test_two_nonlinearities_of_one_layer_have_names_of_their_own() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            z = self.lin(x)
            return torch.tanh(z) * torch.sigmoid(z)

    stats, dead, gate = Statistics(), DeadFilters(), Gate()
    with capture(gate, analyses=[stats, dead], keep=0), torch.no_grad():
        gate(torch.randn(4, 2))
    for read in (readings(stats), readings(dead)):
        names = {k.partition("/")[2] for k in read.scalars if not k.startswith("pre")}
        assert names - {"all"} == {"lin tanh", "lin sigmoid"}


def test_readings_of_dead_filters() -> None:
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU())
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([9.0, -9.0, 9.0]))
        model[2].bias.fill_(-99.0)
    dead = DeadFilters(after=4)
    with capture(model, analyses=dead, keep=0), torch.no_grad():
        model(torch.zeros(4, 1))
    assert readings(dead).scalars == {
        "dead.count/0": 1.0,
        "dead.share/0": pytest.approx(1 / 3),
        "dead.revivals/0": 0.0,
        "dead.count/2": 2.0,
        "dead.share/2": 1.0,
        "dead.revivals/2": 0.0,
        "dead.count/all": 3.0,
        "dead.share/all": pytest.approx(3 / 5),
    }


def test_the_first_nan_is_found_in_its_pass_and_its_map() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Tanh())
    first = FirstNonFinite()
    assert repr(first) == "FirstNonFinite: no map seen yet"
    with capture(model, analyses=first, keep=0), torch.no_grad():
        model(torch.randn(1, 2))
        assert (first.found, readings(first).texts) == ([], {})
        assert repr(first) == "FirstNonFinite: all values of 4 maps are finite"
        model[2].weight[0, 0] = math.inf
        model[2].weight[0, 1] = -math.inf
        model[0].bias.fill_(5.0)
        model(torch.randn(1, 2))
        model[2].weight.fill_(1.0)
        model(torch.randn(1, 2))
        model[0].weight.fill_(math.nan)
        model(torch.randn(1, 2))
    assert [(f.step, f.layer, f.kind) for f in first.found] == [
        (1, "2", "preactivation"),
        (1, "2", "activation"),
        (3, "0", "preactivation"),
        (3, "0", "activation"),
    ]
    read = readings(first)
    assert read.scalars == {"nonfinite/maps": 4.0, "nonfinite/first_pass": 1.0}
    assert read.texts == {"nonfinite/first": "the preactivation of layer '2', pass 1"}
    assert repr(first) == (
        "FirstNonFinite: in 4 of 4 maps, first in the preactivation of layer '2', pass 1"
    )
    first.reset()
    assert first.found == []


def test_passes_of_several_blocks_are_counted_on() -> None:
    torch.manual_seed(0)
    model, first = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), FirstNonFinite()
    with torch.no_grad():
        for broken in (None, 2, None, 0):
            with capture(model, analyses=first, keep=0):
                model(torch.randn(1, 2))
                if broken is not None:
                    model[broken].bias.fill_(math.nan)
                model(torch.randn(1, 2))
    assert [(f.step, f.layer, f.kind) for f in first.found] == [
        (3, "2", "preactivation"),
        (7, "0", "preactivation"),
        (7, "0", "activation"),
    ]


def test_complex_and_sparse_maps_are_looked_at_or_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sparse, self.complex = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.sparse(x.to_sparse())
            return self.complex(torch.complex(x, x / 0))

    odd, first = Odd(), FirstNonFinite()
    with capture(odd, ["sparse", "complex"], kinds="output", analyses=first, keep=0):
        odd(torch.ones(1, 2))
    assert [f.layer for f in first.found] == ["complex"]
    assert first.missed == {("sparse", "output"): "it is sparse, quantized or nested"}


def test_an_analysis_of_ones_own_is_logged_once_it_is_registered() -> None:
    class Own:
        def update(self, fm: fmapkit.FeatureMap) -> None: ...

    log = Kept()
    with pytest.raises(ArgumentError) as caught:
        log.write(Own(), 3)
    assert str(caught.value) == (
        "nothing is known of what there is to log of a Own; say it with "
        "@fmapkit.integrations.readings.register"
    )
    readings.register(Own, lambda own: Readings({"own/value": 1.0}))
    log.write([Own(), DeadFilters()], 3)
    assert [(s, r.scalars) for s, r in log.put_at] == [(3, {"own/value": 1.0})]


# -- the capture around a training -------------------------------------------------------------


def _watching(analyses: Any = None, **options: Any) -> Watching:
    return Watching(analyses, **{"log_every": 2, **options})


def test_what_is_written_is_of_the_window() -> None:
    model, stats, log = nn.Sequential(nn.Linear(1, 1, bias=False)), Statistics(), Kept()
    nn.init.ones_(model[0].weight)
    watching = _watching([stats])
    watching._begin(model, 0)
    for step in range(1, 6):
        model(torch.tensor([[float(step)]]))
        with torch.no_grad():
            model.eval()(torch.tensor([[100.0]]))  # not seen
            model.train()
        watching._write(log, step)
    watching._write(log, 5, last=True)
    watching._write(log, 5, last=True)
    watching._end()
    means = [(s, r.scalars["preactivation.mean/0"]) for s, r in log.put_at]
    assert means == [(2, 1.5), (4, 3.5), (5, 5.0)]
    assert _hooks(model) == 0


def test_evaluation_is_seen_where_asked_for() -> None:
    model, stats = nn.Sequential(nn.Linear(1, 1)), Statistics()
    watching = _watching(stats, evaluation=True, window=False)
    watching._begin(model.eval(), 0)
    model(torch.zeros(3, 1))
    watching._end()
    assert int(stats["0", "preactivation"].count) == 3


def test_the_first_nan_is_told_once() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    watching = _watching(log_every=1)
    watching._begin(model, 0)
    with torch.no_grad():
        model[0].bias.fill_(math.nan)
    model(torch.zeros(1, 1))
    with pytest.warns(CaptureWarning) as told:
        watching._write(None, 1)
    assert [str(w.message) for w in told] == [
        "a NaN or an infinity, seen at step 1: first in the preactivation of layer '0', pass 0, "
        "and in 1 maps after it"
    ]
    model(torch.zeros(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watching._write(None, 2)
    watching._end()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_every": 0}, "log_every must be a positive int, not 0"),
        ({"evaluation": 1}, "evaluation must be True or False, not 1"),
        ({"window": None}, "window must be True or False, not None"),
        ({"every": 0}, "every must be a positive int, not 0"),
    ],
)
def test_wrong_arguments_fail_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        _watching(**options)
    assert str(caught.value) == message


def test_an_argument_that_capture_lacks() -> None:
    with pytest.raises(ArgumentError) as caught:
        _watching(layer="conv1")
    assert str(caught.value).startswith("capture has no argument 'layer'; did you mean 'layers'")


# -- the real packages ---------------------------------------------------------------------------


@pytest.fixture
def quiet() -> Iterator[None]:
    """Without what the frameworks have to say of loaders and devices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", CaptureWarning)
        yield


def _events(directory: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(directory), size_guidance={"histograms": 0})
    return found.Reload()


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from fmapkit.integrations import TensorBoardLog

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    stats, first = Statistics(bins=[-1.0, 0.0, 1.0]), FirstNonFinite()
    log = TensorBoardLog(tmp_path, prefix="run/")
    with capture(model, analyses=[stats, first], keep=0), torch.no_grad():
        for step in (10, 20):
            model(torch.randn(8, 2))
            if step == 20:
                model[0].weight.fill_(math.nan)
                model(torch.randn(8, 2))
            log.write([stats, first], step)
    log.close()
    events = _events(tmp_path)
    assert "run/preactivation.mean/0" in events.Tags()["scalars"]
    maps = [(e.step, e.value) for e in events.Scalars("run/nonfinite/maps")]
    assert maps == [(10, 0.0), (20, 2.0)]
    histogram = events.Histograms("run/activation/0")[0]
    assert (histogram.step, histogram.histogram_value.num) == (10, 24.0)
    read = readings(stats).histograms["activation/0"]
    assert sum(events.Histograms("run/activation/0")[1].histogram_value.bucket) == read.counts.sum()
    assert events.Tags()["tensors"] == ["run/nonfinite/first/text_summary"]


def test_a_writer_of_somebody_else_stays_open(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from fmapkit.integrations import TensorBoardLog

    writer = tensorboard.SummaryWriter(str(tmp_path))
    log = TensorBoardLog(writer)
    log.put(Readings({"a/b": 1.0}), 1)
    log.close()
    writer.add_scalar("a/b", 2.0, 2)
    writer.close()
    assert [e.value for e in _events(tmp_path).Scalars("a/b")] == [1.0, 2.0]


def test_wandb_takes_it_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from fmapkit.integrations import WandbLog

    monkeypatch.setenv("WANDB_SILENT", "true")
    log = WandbLog()
    with pytest.raises(RuntimeError) as caught:
        log.put(Readings({"a/b": 1.0}), 1)
    assert "no run is open" in str(caught.value)
    model, stats = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), Statistics(bins="log2")
    with wandb.init(mode="offline", dir=str(tmp_path), project="p") as run:
        with capture(model, analyses=stats, keep=0), torch.no_grad():
            for step in (5, 10):
                model(torch.randn(8, 2))
                log.write(stats, step)
        summary = dict(run.summary)
    assert summary["step"] == 10
    assert summary["preactivation.mean/0"] == readings(stats).scalars["preactivation.mean/0"]
    assert summary["activation/0"]["_type"] == "histogram"
    assert sum(summary["activation/0"]["values"]) == 48


# -- Lightning -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightning() -> Any:
    return pytest.importorskip("lightning.pytorch", reason="lightning is not installed")


def _module(lightning: Any, through: str = "self", fail_at: int = -1) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            if index == fail_at:
                raise ValueError("the step fails")
            x, y = batch
            out = self(x) if through == "self" else self.net(x)
            return nn.functional.cross_entropy(out, y)

        def validation_step(self, batch: Any, index: int) -> None:
            self(batch[0] + 100)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def _loader() -> Any:
    torch.manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(24, 4), torch.randint(2, (24,)))
    return torch.utils.data.DataLoader(data, batch_size=4)


def _trainer(lightning: Any, tmp_path: Path, callback: Any, **options: Any) -> Any:
    given = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(tmp_path),
        **options,
    }
    return lightning.Trainer(callbacks=[callback], **given)


def test_lightning_logs_by_step_and_trains_as_without(
    lightning: Any, quiet: None, tmp_path: Path
) -> None:
    from fmapkit.integrations import LightningCallback

    log, stats = Kept(), Statistics()
    callback = LightningCallback([stats, DeadFilters()], log=log, log_every=2)
    module, bare = _module(lightning), _module(lightning)
    _trainer(lightning, tmp_path, callback).fit(module, _loader(), _loader())
    _trainer(lightning, tmp_path, lightning.Callback()).fit(bare, _loader(), _loader())
    for a, b in zip(module.parameters(), bare.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [step for step, _ in log.put_at] == [2, 4, 6]
    # By hand: what net.0 gave in steps 3 and 4, and in no validation.
    twin, seen = _module(lightning), []
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.1)
    for x, y in _loader():
        seen.append(twin.net[0](x).detach())
        optimiser.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        optimiser.step()
    mean = log.put_at[1][1].scalars["preactivation.mean/net.0"]
    assert mean == pytest.approx(float(torch.cat(seen[2:4]).double().mean()), rel=1e-6)
    assert _hooks(module) == 0
    assert callback.maps is not None
    assert not callback.maps.missed


def test_lightning_s_own_loggers(lightning: Any, quiet: None, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    from fmapkit.integrations import LightningCallback

    loggers = [TensorBoardLogger(str(tmp_path), name="tb"), CSVLogger(str(tmp_path), name="csv")]
    callback = LightningCallback(log_every=3, layers="net.0")
    _trainer(lightning, tmp_path, callback, logger=loggers).fit(_module(lightning), _loader())
    events = _events(tmp_path / "tb" / "version_0")
    assert [e.step for e in events.Scalars("activation.mean/net.0")] == [3, 6]
    assert events.Tags()["histograms"] == ["preactivation/net.0", "activation/net.0"]
    csv = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert "dead.share/net.0" in csv.splitlines()[0]


def test_lightning_is_told_which_module_its_steps_call(
    lightning: Any, quiet: None, tmp_path: Path
) -> None:
    from fmapkit.integrations import LightningCallback

    callback = LightningCallback()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", CaptureWarning)
        _trainer(lightning, tmp_path, callback).fit(_module(lightning, "net"), _loader())
    assert (
        "LightningCallback saw no pass of the LightningModule itself in the first batch: "
        "training_step calls something else, such as 'net'; say it with module=…"
    ) in [str(w.message) for w in told]
    stats = Statistics()
    callback = LightningCallback(stats, module="net", window=False)
    _trainer(lightning, tmp_path, callback).fit(_module(lightning, "net"), _loader())
    assert stats.layers == ["0", "2"]
    trainer = _trainer(lightning, tmp_path, LightningCallback(module="nett"))
    with pytest.raises(ArgumentError) as caught:
        trainer.fit(_module(lightning), _loader())
    assert str(caught.value) == (
        "module='nett' is no module of Module; did you mean 'net' or 'net.2' or 'net.1'? (its "
        "modules: 'net', 'net.0', 'net.1', 'net.2')"
    )


def test_lightning_lets_go_after_an_error_and_goes_on_from_a_checkpoint(
    lightning: Any, quiet: None, tmp_path: Path
) -> None:
    from fmapkit.integrations import LightningCallback

    module, dead = _module(lightning, fail_at=3), DeadFilters()
    callback = LightningCallback([dead, FirstNonFinite()])
    with pytest.raises(ValueError, match="the step fails"):
        _trainer(lightning, tmp_path, callback).fit(module, _loader())
    assert _hooks(module) == 0
    assert int(dead["net.0"].inputs[0]) == 12

    again = LightningCallback([DeadFilters(), FirstNonFinite()])
    again.load_state_dict(callback.state_dict())
    assert int(again.analyses[0]["net.0"].inputs[0]) == 12  # type: ignore[index]
    with pytest.raises(ArgumentError, match="has 1 analyses, and the checkpoint was written with"):
        LightningCallback(DeadFilters()).load_state_dict(callback.state_dict())


# -- transformers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    found = pytest.importorskip("transformers", reason="transformers is not installed")
    if not found.utils.is_torch_available():
        pytest.skip("this transformers takes a newer torch")
    return found


def _hf(transformers: Any, tmp_path: Path, callbacks: list[Any], **options: Any) -> Any:
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 16, "n_positions": 8}
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    data = [{"input_ids": torch.arange(i, i + 6), "labels": torch.arange(i, i + 6)} for i in (0, 4)]
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 5,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            **options,
        }
    )
    return transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks
    )


def test_the_trainer_logs_by_step_and_trains_as_without(
    transformers: Any, quiet: None, tmp_path: Path
) -> None:
    from fmapkit.integrations import TransformersCallback

    log, stats = Kept(), Statistics()
    callback = TransformersCallback([stats, DeadFilters()], log=log, log_every=2)
    options = {"eval_strategy": "steps", "eval_steps": 2}
    watched = _hf(transformers, tmp_path, [callback], **options)
    with callback:
        watched.train()
    bare = _hf(transformers, tmp_path, [], **options)
    bare.train()
    for a, b in zip(watched.model.parameters(), bare.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [step for step, _ in log.put_at] == [2, 4, 5]
    assert "activation.mean/transformer.h.0.mlp.c_fc" in log.put_at[0][1].scalars
    assert _hooks(watched.model) == 0


def test_the_trainer_raises_and_the_block_closes(
    transformers: Any, quiet: None, tmp_path: Path
) -> None:
    from fmapkit.integrations import TransformersCallback

    class Fails(transformers.TrainerCallback):  # type: ignore[name-defined, misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    stats = Statistics()
    watch = TransformersCallback(stats, window=False)
    trainer = _hf(transformers, tmp_path, [watch, Fails()])
    with pytest.raises(KeyboardInterrupt), watch:
        trainer.train()
    assert _hooks(trainer.model) == 0
    # Two steps of 2 inputs and 6 tokens.
    assert int(stats["transformer.h.0.mlp.c_fc"].count[0]) == 24


# -- imports -------------------------------------------------------------------------------------


def test_no_package_is_imported_for_another() -> None:
    code = """
import sys
import fmapkit.integrations as i
i.TensorBoardLog, i.WandbLog, i.readings, i.FirstNonFinite
names = ("lightning", "transformers", "tensorboard", "wandb", "matplotlib")
print([n for n in names if n in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "package", "message"),
    [
        ("LightningCallback", "lightning.pytorch", "LightningCallback needs Lightning: pip"),
        ("TransformersCallback", "transformers", "TransformersCallback needs transformers and"),
    ],
)
def test_what_is_missing_is_named(
    name: str, package: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    for home in ("lightning", "transformers"):
        monkeypatch.delitem(sys.modules, f"fmapkit.integrations.{home}", raising=False)
    with pytest.raises(ImportError, match=message):
        getattr(fmapkit.integrations, name)
