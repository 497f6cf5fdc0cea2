"""The benchmarks' machinery on a tiny net: who is judged right, what is counted, what is written.

Nothing is timed here: budgets are zero, and no figure of time is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import __main__ as command
from benchmarks import growth, measure, peers, report, suite
from benchmarks.cases import CASES, Bench, Case, chosen, classify
from benchmarks.contenders import CONTENDERS, CONTROL, OWN, handed
from benchmarks.measure import Timed, interleave
from benchmarks.memory import Live, counted
from benchmarks.verdict import Handed, Piece, judge, sites
from fmapkit import capture


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


def test_verdicts(rows: dict[str, dict[str, Any]], training: dict[str, dict[str, Any]]) -> None:
    for found in (rows, training):
        for name in ("fmapkit", "filters=range(8)", "every=10"):
            assert (_counts(found[name], "z"), _counts(found[name], "a")) == ((3, 0, 0),) * 2, name
        assert _counts(found['kinds="activation"'], "z") is None
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
    # A quarter of three layers: conv1 alone.
    assert _counts(rows["stop"], "z") == _counts(rows["stop"], "a") == (1, 0, 2)
    for name in ("detach=False", "gradients=True"):
        assert _counts(training[name], "z") == (3, 0, 0)
        assert rows[name] == {"contender": name, "error": "for training"}
    assert "error" in training["stop"]


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
    for name in ("fmapkit", 'kinds="activation"', "hooks, references", "hooks, .cpu()"):
        assert rows[name]["copied_bytes"] == bare, name
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


# -- commands, JSON and pages -------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Path]:
    """A page with text around the markers."""
    docs = tmp_path / "docs"
    docs.mkdir()
    marks = (f"<!-- begin {name} -->\nold\n<!-- end {name} -->" for name in ("suite", "growth"))
    (docs / "benchmarks.md").write_text("# Head\n\n" + "\n\nbetween\n\n".join(marks) + "\n\ntail\n")
    return docs


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
    with pytest.raises(SystemExit, match=r"other\.json is no JSON of `suite` or `growth`"):
        report.render([other], page)
    with pytest.raises(SystemExit, match=r"benchmarks\.md has no <!-- begin more -->"):
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
