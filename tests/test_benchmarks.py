"""The benchmarks' machinery on a tiny net: who is judged right, what is counted, what is written.

Nothing is timed here: budgets are zero, and no figure of time is looked at.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import __main__ as command
from benchmarks import (
    editing,
    growth,
    measure,
    peers,
    real,
    real_models,
    report,
    suite,
    torchvision_operators,
)
from benchmarks.cases import CASES, Bench, Case, chosen, classify
from benchmarks.contenders import CONTENDERS, CONTROL, OWN, handed
from benchmarks.measure import Figures, Taken, Timed, interleave
from benchmarks.memory import Live, counted
from benchmarks.verdict import Handed, Piece, judge, sites
from fmapkit import capture
from tests.checks import needs_compiled


class Tiny(nn.Module):
    """Three runs of a nonlinearity.

    0: conv1 -> relu, in place: what conv1 returned is overwritten.
    1: conv2 + x -> the same relu: no module returns this z.
    2: fc -> F.gelu: no module is this σ.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x) + x)
        return F.gelu(self.fc(x.mean((2, 3))))


def _image() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 6, 6),)


@pytest.fixture(scope="module", autouse=True)
def _single_pairs() -> Iterator[None]:
    """A half of a pair is one pass: as short as can be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "BLOCK", 0.0)
        yield


TINY = Case("tiny", Tiny, _image)
TRAINING = Case("tiny training", Tiny, _image, classify)


def _counts(row: dict[str, Any], kind: str) -> tuple[int, int, int] | None:
    found = row[kind]
    return None if found is None else (found["right"], found["wrong"], found["unseen"])


def _measured(case: Case) -> dict[str, dict[str, Any]]:
    found = suite.measure(case, CONTENDERS, budget=0.0)
    assert found["sites"] == 3
    return {row["contender"]: row for row in found["rows"]}


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return _measured(TINY)


@pytest.fixture(scope="module")
def training() -> dict[str, dict[str, Any]]:
    return _measured(TRAINING)


def test_the_truth_says_which_module_returned_z_and_which_was_sigma() -> None:
    found = sites(Bench(TINY))
    assert [s.z_of for s in found] == [("conv1", 0), None, ("fc", 0)]
    assert [s.a_of for s in found] == [("relu", 0), ("relu", 1), None]
    for s, sigma in zip(found, (F.relu, F.relu, F.gelu), strict=True):
        assert torch.equal(sigma(s.z), s.a)


@needs_compiled
def test_verdicts(rows: dict[str, dict[str, Any]], training: dict[str, dict[str, Any]]) -> None:
    for found in (rows, training):
        mine = ("fmapkit", "fmapkit, compiled", "learning", "filters=range(8)", "every=10")
        for name in mine:
            assert (_counts(found[name], "z"), _counts(found[name], "a")) == ((3, 0, 0),) * 2, name
            assert found[name]["both"] == 3
            assert found[name]["exact"]
        assert _counts(found['kinds="activation"'], "z") is None
        assert found['kinds="activation"']["both"] is None
        assert _counts(found['kinds="activation"'], "a") == (3, 0, 0)
        # conv1's output is overwritten; the sum is no module's; the output of fc stays.
        assert _counts(found["hooks, references"], "z") == (1, 1, 1)
        assert _counts(found["hooks, .cpu()"], "z") == (1, 1, 1)  # no copy, where it is there
        assert _counts(found["hooks, clones"], "z") == (2, 0, 1)
        # The second call of relu takes the place of the first; F.gelu is no module.
        for name in ("references", "clones", ".cpu()"):
            assert _counts(found[f"hooks, {name}"], "a") == (1, 1, 1)
        # What is before and behind a module is right; F.gelu is none.
        assert _counts(found["hooks on σ, clones"], "z") == (2, 0, 1)
        assert _counts(found["hooks on σ, clones"], "a") == (2, 0, 1)
        # References: z of fc alone, and a of the second relu. No run has both.
        assert found["hooks, references"]["both"] == 0
        assert found["hooks, clones"]["both"] == 0  # z of conv1 and of fc
        assert found["hooks on σ, clones"]["both"] == 2
    # A quarter of three layers: conv1 alone.
    assert _counts(rows["stop"], "z") == _counts(rows["stop"], "a") == (1, 0, 2)
    for name in ("detach=False", "gradients=True"):
        assert _counts(training[name], "z") == (3, 0, 0)
        assert rows[name] == {"contender": name, "error": "for training"}
    assert "error" in training["stop"]


@needs_compiled
def test_kernels_of_its_own_may_round_otherwise() -> None:
    class Attention(nn.Module):
        """In eval mode torch runs it as one kernel; in what dynamo makes of it, as several."""

        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.attend(x, x, x, need_weights=False)[0])

    case = Case("attention", Attention, lambda: (torch.randn(2, 16, 64),))
    found = suite.measure(case, suite.select(["fmapkit"]), budget=0.0, count=False)
    rows = {row["contender"]: row for row in found["rows"]}
    assert suite.both(rows["fmapkit"]) == "1"
    bench = Bench(case)
    with torch.no_grad():
        outputs = [
            m(*bench.inputs) for m in (bench.model, torch.compile(bench.model, backend="eager"))
        ]
    mark = "" if torch.equal(*outputs) else "≈"  # that is the processor's to say
    assert suite.both(rows["fmapkit, compiled"]) == f"{mark}1"


def test_bytes(rows: dict[str, dict[str, Any]]) -> None:
    maps = 2 * 8 * 6 * 6 * 4  # of a conv, in bytes
    logits = 2 * 10 * 4
    assert rows["fmapkit"]["held_bytes"] == 4 * maps + 2 * logits
    assert rows['kinds="activation"']["held_bytes"] == 2 * maps + logits
    # conv1 (which is the first relu's too), conv2, the sum's relu, fc.
    assert rows["hooks, references"]["held_bytes"] == 3 * maps + logits
    assert rows["hooks, clones"]["held_bytes"] == 3 * maps + logits
    bare = rows[CONTROL]["copied_bytes"]
    # One clone at each of four leaf calls of conv maps, and of fc's.
    assert rows["hooks, clones"]["copied_bytes"] - bare == 4 * maps + logits
    for name in ("fmapkit, compiled", "learning"):  # not below autograd, or the first pass
        assert "copied_bytes" not in rows[name]
    for name in ("hooks, references", "hooks, .cpu()"):
        assert rows[name]["copied_bytes"] == bare, name
    # Where a mode counts operators, z of each in-place σ is copied: of conv1's and of the sum's.
    assert rows["fmapkit"]["copied_bytes"] - bare == 2 * maps
    assert rows["fmapkit"]["peak_bytes"] > rows['kinds="activation"']["peak_bytes"]


def test_what_was_copied_is_what_the_maps_say() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv1(x))
            y = self.conv2(x)
            y += x  # overwrites the response
            return F.relu(y)

    bench = Bench(Case("residual", Residual, _image))
    model = bench.copy()
    with capture(model, kinds=("response", "activation")) as maps:
        count = counted(lambda: bench.run(model), bench.state, warm_up=2)
    assert count.copied == maps.bytes_copied == 2 * 8 * 6 * 6 * 4


def test_copies_are_counted_by_hand() -> None:
    live = Live()
    with live:
        x = torch.ones(100)
        y = x.clone()  # 400 bytes
        y.copy_(x)  # 400
        x.double()  # 800
        (x + y).relu_()
    assert live.copied == 1600


def test_every_row_of_the_control_counts_as_bare(rows: dict[str, dict[str, Any]]) -> None:
    assert {"ratio", "low", "high", "pairs", "bare", "extra"} <= rows[CONTROL].keys()
    for name, row in rows.items():
        if "error" not in row:
            assert row["pairs"] >= measure.LEAST_PAIRS, name


def test_a_wrong_tensor_is_called_wrong() -> None:
    truth = sites(Bench(TINY))
    z, a = [Piece(s.z) for s in truth], [Piece(s.a) for s in truth]
    assert judge(truth, Handed(z=z, a=a), exact=True) == judge(truth, Handed(z=z, a=a), exact=False)
    off = Piece(truth[1].z + 1e-6)
    swapped = judge(truth, Handed(z=[z[0], off, z[2]], a=[a[1], a[0], a[2]]), exact=True)
    assert swapped["z"].as_dict() == {"right": 2, "wrong": 1, "unseen": 0}
    assert swapped["a"].as_dict() == {"right": 2, "wrong": 1, "unseen": 0}  # out of order
    fewer = judge(truth, Handed(z=z[:2]), exact=True)
    assert fewer["z"].as_dict() == {"right": 2, "wrong": 0, "unseen": 1}
    part = [Piece(s.z[:, :4], 1, range(4)) for s in truth]
    assert judge(truth, Handed(z=part), exact=True)["z"].right == 3
    part[0] = Piece(truth[0].z[:, 4:], 1, range(4))
    assert judge(truth, Handed(z=part), exact=True)["z"].right == 2


def test_turns() -> None:
    log: list[str] = []

    def note(what: str) -> Any:
        return lambda: log.append(what)

    def broken() -> None:
        raise ValueError("no more")

    bare = note("bare")
    timed = {
        "a": Timed(note("a"), bare, note("before"), note("after")),
        "b": Timed(note("b"), bare),
        "broken": Timed(broken, bare, after=note("cleaned")),
    }
    times, failed = interleave(timed, 0.0, warm_up=1, least=4)
    assert failed == {"broken": "ValueError: no more"}
    assert times.keys() == {"a", "b"}
    assert all(len(pairs) >= 4 for pairs in times.values())
    assert log.count("cleaned") == 1
    assert log.count("a") + log.count("b") == log.count("bare")
    where = [n for n, what in enumerate(log) if what == "a"]
    assert all(log[n - 1] == "before" and log[n + 1] == "after" for n in where)


def test_a_pass_counts_that_follows_one_of_its_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: a cold pass takes 10 s, others 2 s; the bare model's a second each."""
    log: list[str] = []

    def taken(function: Any, device: str) -> Taken:
        before = log[-1:]
        function()
        if log[-1] == "bare":
            return Taken(1.0, 0.5)
        return Taken(2.0, 1.5) if log[-1:] == before else Taken(10.0, 9.0)

    monkeypatch.setattr(measure, "taken", taken)
    timed = {"a": Timed(lambda: log.append("a"), lambda: log.append("bare"))}
    times, _ = interleave(timed, 0.0, warm_up=0, least=4, block=30.0)
    # 30 s: three passes after one of 10 s. The last half of a pair and the first of the next are of
    # one kind: then the first pass takes 2 s, and fifteen follow.
    assert times["a"] == [(Taken(2.0, 1.5), Taken(1.0, 0.5))] * 4
    assert [len(list(row)) for kind, row in itertools.groupby(log) if kind == "a"] == [20, 20]
    times, _ = interleave(timed, 0.0, warm_up=0, least=4, block=0.0)
    assert sorted(with_.wall for with_, _ in times["a"]) == [2.0, 2.0, 10.0, 10.0]
    figures = Figures.of([(Taken(2.0, 1.5), Taken(1.0, 0.5))] * 4)
    assert (figures.ratio, figures.cpu, figures.extra) == (2.0, 3.0, 1.0)
    assert (figures.bare, figures.bare_cpu) == (1.0, 0.5)


def test_a_block_rests_while_the_bare_model_runs() -> None:
    """The two share a class, whose functions are to run their own code for the bare model."""
    model, bare, x = Tiny(), Tiny(), torch.randn(2, 3, 8, 8)
    own, codes = Tiny.forward.__code__, []
    with torch.no_grad(), capture(model) as maps:
        for _ in range(3):
            model(x)
        awake = measure.resting(maps)

        def watched(run: Any) -> Any:
            return lambda: (codes.append((run, Tiny.forward.__code__)), run(x))

        timed = {"a": Timed(watched(model), watched(bare), awake=awake)}
        _, failed = interleave(timed, 0.0, warm_up=1, least=4)
        with awake():
            y = model(x)
            assert torch.equal(maps[("fc", "activation")].tensor, y)
    assert not failed
    assert {code for run, code in codes if run is bare} == {own}
    assert own not in {code for run, code in codes if run is model}
    assert Tiny.forward.__code__ is own
    assert measure.resting(None) is nullcontext


def test_every_judged_pass_draws_the_same() -> None:
    """Dropout in the truth is dropout in what is compared with it."""
    bench = Bench(Case("dropout", lambda: nn.Sequential(Tiny(), nn.Dropout()), _image, classify))
    model, seen = bench.copy(), []

    def call(*inputs: Tensor) -> Tensor:
        seen.append(model(*inputs))
        return seen[-1]

    for _ in range(2):
        bench.rehearse(call)
    assert torch.equal(*seen)
    assert (seen[0] == 0).any()


def test_a_package_that_is_not_there_or_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        raise RuntimeError("operator is\n not there")

    monkeypatch.setattr(peers, "package", lambda name: "not installed")
    assert peers.missing("captum") == "not installed"
    (captum,) = [c for c in CONTENDERS if c.name == "captum"]
    (control,) = [c for c in CONTENDERS if c.name == CONTROL]
    found = suite.measure(TINY, [control, captum], budget=0.0)
    assert found["rows"][1] == {"contender": "captum", "error": "not installed"}
    monkeypatch.setattr(peers, "package", lambda name: "1.0")
    monkeypatch.setattr(peers.importlib, "import_module", load)
    assert peers.missing("x") == "does not load: RuntimeError: operator is not there"
    assert peers.versions()["captum"].startswith("does not load")


@pytest.mark.parametrize("name", ["captum", "nnsight", "torchlens"])
def test_a_peer_that_is_installed(name: str) -> None:
    if why := peers.missing(name):
        pytest.skip(why)
    (control,) = [c for c in CONTENDERS if c.name == CONTROL]
    (peer,) = [c for c in CONTENDERS if c.name == name]
    before = torch.relu, F.relu, Tensor.relu_
    row = suite.measure(TINY, [control, peer], budget=0.0)["rows"][1]
    assert (torch.relu, F.relu, Tensor.relu_) == before
    expected = {  # as PEERS says of in-place ReLUs, sums and modules that are called twice
        "captum": ((2, 0, 1), (1, 1, 1)),
        "nnsight": ((1, 1, 1), (2, 0, 1)),
        "torchlens": ((3, 0, 0), (3, 0, 0)),
    }
    assert (_counts(row, "z"), _counts(row, "a")) == expected[name]


# -- real models ----------------------------------------------------------------------------------


def test_torchvisions_operators_are_declared_where_its_library_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "torchvision" in sys.modules:
        pytest.skip("the true one is there")
    declared: list[object] = []
    monkeypatch.setattr(torchvision_operators, "_declared", declared)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        torchvision_operators.declare()
    assert not declared  # no torchvision at all
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_C.so").write_text("built for another torch")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        torchvision_operators.declare()
        assert len(declared) == 1
        assert torch.ops.torchvision.nms.default._schema.name == "torchvision::nms"


def test_the_real_models_that_are_installed_can_be_run() -> None:
    names = [model.name for model in real_models.MODELS]
    assert len(set(names)) == len(names) >= 34
    assert {model.package for model in real_models.MODELS} == {*real_models.PACKAGES}
    assert len(real.cases(real.MODES["compute"])) == 5
    for case in real.cases(real.MODES["inference"]):
        if not peers.missing(case.package):
            bench = Bench(case)
            bench.run(bench.model)


def test_a_glob_of_real_models() -> None:
    def found(pattern: str) -> list[str]:
        return [case.name for case in real.cases(real.MODES["training"], pattern)]

    assert found("resnet18") == ["timm/resnet18", "torchvision/resnet18"]
    assert found("pytorchcv/*net18") == ["pytorchcv/preresnet18"]
    with pytest.raises(SystemExit, match="no model fits 'vgg'"):
        found("vgg")
    assert {c.name for c in real.cast()} == {*real.CAST}
    assert [c.name for c in real.cast(["torchlens"])] == [CONTROL, "torchlens"]
    for case in real.cases(real.MODES["data-dependent"]):
        assert sites(Bench(case))


@needs_compiled
def test_real_models_are_measured_summed_and_written(
    tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def images(batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 3, 6, 6),)

    def broken() -> nn.Module:
        raise ValueError("no such model")

    def small() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh())

    models = [
        real_models.RealModel("own/tiny", Tiny, images),
        real_models.RealModel("own/small", small, images),
        real_models.RealModel("own/broken", broken, images),
        real_models.RealModel("absent/tiny", Tiny, images, "absent"),
    ]
    monkeypatch.setitem(real.MODES, "training", real.Mode("training", models, 2, trains=True))
    readme = tmp_path / "README.md"
    readme.write_text("head\n<!-- begin real-training -->\nold\n<!-- end real-training -->\n")
    text = (page / "benchmarks.md").read_text()
    (page / "benchmarks.md").write_text(text + readme.read_text())
    file = tmp_path / "real.json"
    given = ["--training", "--seconds", "0", "--contender", "fmapkit", "--contender", "references"]
    command.main(["real", *given, "--json", str(file), "--markdown", "--docs", str(page)])

    result = json.loads(file.read_text())
    assert result["kind"] == "real-training"
    assert result["environment"]["threads"] == "1"
    first, second, *rest = result["cases"]
    assert (first["sites"], second["sites"]) == (3, 1)
    assert rest == [
        {"case": "own/broken", "error": "ValueError: no such model"},
        {"case": "absent/tiny", "error": "absent not installed"},
    ]
    summed = {row.contender: row for row in real.summary(result)}
    assert [*summed] == [CONTROL, "fmapkit", "fmapkit, compiled", "hooks, references"]
    ratios = [case["rows"][1]["cpu"] for case in (first, second)]
    assert summed["fmapkit"].models == 2
    assert summed["fmapkit"].cpu == pytest.approx(sum(ratios) / 2)
    assert summed["fmapkit"].worst == max(ratios)
    assert summed["fmapkit"].verdict == "4 of 4"
    assert summed["hooks, references"].verdict == "1 of 4"  # that of the small one
    assert summed[CONTROL].verdict == "–"

    printed = capsys.readouterr().out
    assert "absent/tiny: absent not installed" in printed
    row = next(line for line in printed.splitlines() if "4 of 4" in line and "worst:" in line)
    assert row.split()[:2] == ["fmapkit", "2"]
    written, told = (page / "benchmarks.md").read_text(), readme.read_text()
    assert written.startswith(text)
    assert written.count("4 of 4") == told.count("4 of 4") == 2
    assert "| own/tiny | " in written
    assert "own/tiny |" not in told
    assert "Not here: own/broken (ValueError: no such model); absent/tiny (absent not" in written
    command.main(["render", str(file), "--docs", str(page)])  # the same from the file
    assert ((page / "benchmarks.md").read_text(), readme.read_text()) == (written, told)


# -- commands, JSON and pages -------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Path]:
    """A page with text around the markers."""
    docs = tmp_path / "docs"
    docs.mkdir()
    marks = (f"<!-- begin {name} -->\nold\n<!-- end {name} -->" for name in ("suite", "growth"))
    (docs / "benchmarks.md").write_text("# Head\n\n" + "\n\nbetween\n\n".join(marks) + "\n\ntail\n")
    return docs


@needs_compiled
def test_suite_writes_json_and_render_a_page_and_a_chart(
    tmp_path: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "suite.json"
    suite.run(0.0, [TINY, TRAINING], suite.select(["fmapkit", "hooks"]), threads=1, json_file=file)
    given = json.loads(file.read_text())
    assert given["kind"] == "suite"
    about = given["environment"]
    assert {"machine", "threads", "python", "torch", "fmapkit", "commit", *peers.PACKAGES} <= {
        *about
    }
    assert [c["case"] for c in given["cases"]] == ["tiny", "tiny training"]
    assert {r["contender"] for r in given["cases"][0]["rows"]} == given["notes"].keys()
    command.main(["render", str(file), "--docs", str(page)])
    text = (page / "benchmarks.md").read_text()
    assert text.startswith("# Head\n\n<!-- begin suite -->\n")
    assert text.endswith("<!-- begin growth -->\nold\n<!-- end growth -->\n\ntail\n")
    assert "old" not in text.partition("<!-- end suite -->")[0]
    assert "(3)" in text  # fmapkit's right z, in the summary
    assert "| hooks, references |" in text
    assert "1/1/1" in text
    assert (page / "images" / "benchmarks-suite.png").read_bytes()[1:4] == b"PNG"
    again = text
    command.main(["render", str(file), "--docs", str(page)])
    assert (page / "benchmarks.md").read_text() == again
    assert "tiny training (cpu): a bare pass takes" in capsys.readouterr().out


def test_growth_is_fitted_and_rendered(tmp_path: Path, page: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "growth.json"
    growth.run(0.0, 1, file, sizes=(1, 4), batches=(1, 4), steps=8)
    given = json.loads(file.read_text())
    # z and a of a site: (4, 8) floats each. A batch: in proportion, to the byte.
    held = [row["contenders"]["fmapkit"]["held_bytes"] for row in given["sites"]]
    assert held == [2 * 4 * 8 * 4 * n for n in (1, 4)]
    one, four = (row["contenders"]["fmapkit"]["held_bytes"] for row in given["batch"])
    assert four == 4 * one
    assert len({a["bytes"] for a in given["steps"]["alive"]}) == 1  # flat
    assert given["steps"]["windows"][-1]["step"] >= 8
    report.render([file], page)
    text = (page / "benchmarks.md").read_text()
    assert "256 B a site" in text
    assert text.startswith("# Head\n\n<!-- begin suite -->\nold\n")
    assert (page / "images" / "benchmarks-growth.png").read_bytes()[1:4] == b"PNG"


def test_a_straight_line_is_fitted_by_hand() -> None:
    found = growth.fit([1, 2, 3, 4], [3, 5, 7, 9])  # 2x + 1
    assert found["slope"] == pytest.approx(2)
    assert found["intercept"] == pytest.approx(1)
    assert found["r2"] == pytest.approx(1)
    square = growth.fit([1, 2, 4, 8], [1, 4, 16, 64])
    assert square["exponent"] == pytest.approx(2)
    assert square["r2"] < 0.97
    assert growth.fit([1, 2, 3], [5, 5, 5])["slope"] == pytest.approx(0)


def test_render_says_what_it_lacks(tmp_path: Path, page: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(SystemExit, match=r"other\.json is no JSON of `suite`, `real` or `growth`"):
        report.render([other], page)
    with pytest.raises(SystemExit, match="the page has no <!-- begin more -->"):
        report.replaced("text", "more", "")


def test_the_commands_and_what_they_choose(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.parser().parse_args([]).command is None
    with pytest.raises(SystemExit):
        command.parser().parse_args(["--help"])
    assert "Without a command, the whole suite runs." in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="no case has 'alexnet' in its name"):
        command.main(["suite", "--case", "alexnet"])
    with pytest.raises(SystemExit, match="no contender has 'baukit' in its name"):
        command.main(["suite", "--contender", "baukit"])
    assert [c.name for c in suite.select(["captum"])] == [CONTROL, "captum"]
    names = [c.name for c in CONTENDERS]
    assert len(set(names)) == len(names)
    assert set(OWN) <= set(names)
    assert names[0] == CONTROL
    assert all(c.device != "cuda" for c in chosen("", "cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(SystemExit, match="no CUDA device is there"):
        suite.run(0.0, [TINY], suite.select(()), device="cuda", threads=1)


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.compiled and not c.device], ids=lambda c: c.name
)
def test_fmapkit_is_right_in_every_case(case: Case) -> None:
    bench = Bench(case)
    truth = sites(bench)
    model = bench.copy()
    with capture(model) as maps:
        for _ in range(2):
            bench.rehearse(model)
        verdicts = judge(truth, handed(maps), exact=True)
    assert truth
    for verdict in verdicts.values():
        assert verdict.as_dict() == {"right": len(truth), "wrong": 0, "unseen": 0}


def test_edits_and_attention_are_measured_beside_hooks_by_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each contender runs, and does what its hook does: a table of all of them is printed."""

    def tiny() -> nn.Module:
        return editing.GPT(layers=2, width=16, heads=2, vocabulary=32)

    steering = editing.steering("h.1", 16, "lm_head")
    tokens = torch.randint(0, 32, (1, 8))
    case = editing.Case("tiny", tiny, lambda: tokens, steering)
    torch.manual_seed(0)
    model = tiny().eval()
    with torch.no_grad():
        outs = {}
        for name, contender in steering.items():
            with contender(model):
                outs[name] = model(tokens)
        assert torch.equal(outs["hook by hand: add"], outs["edit: add"])
        assert torch.equal(outs["hook by hand: the last token"], outs["edit: the last token"])
        assert torch.equal(outs["attention by hand"], outs['kinds="attention"'])
    monkeypatch.setattr(editing, "CASES", [case])
    monkeypatch.setattr(editing, "patching", lambda budget: {})
    editing.run(0.0)
    printed = capsys.readouterr().out
    assert all(name in printed for name in steering)
    assert command.parser().parse_args(["editing"]).threads == 1
