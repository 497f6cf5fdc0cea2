"""The notebooks run, and each is a pair: a script to edit, and what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("*.py"))


def test_there_are_notebooks() -> None:
    assert {script.stem for script in SCRIPTS} >= {"language", "training", "vision"}
    assert {script.stem for script in SCRIPTS} == {n.stem for n in NOTEBOOKS.glob("*.ipynb")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_says_what_its_script_says(script: Path) -> None:
    jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed")
    pair = [jupytext.read(path) for path in (script, script.with_suffix(".ipynb"))]
    cells = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in pair]
    assert cells[0] == cells[1], "make notebooks writes it anew"
    # What was executed when it was written: all of it, in order, and nothing failed.
    shown = [cell for cell in pair[1].cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in shown] == list(range(1, len(shown) + 1))
    assert script.with_suffix(".ipynb").stat().st_size < 1_000_000


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    for name in _needed(script):
        pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = jupytext.read(script)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,  # of a cell, in seconds: machines stall
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()


def _needed(script: Path) -> set[str]:
    """What a script imports, or what its imports take, beside torch and fmapkit."""
    text = script.read_text(encoding="utf-8")
    found = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    if "fmapkit.phi import probe" in text:
        found.add("sklearn")
    return found - {"copy", "fmapkit", "math", "torch"}
