"""Run the notebooks, and write what they show: `make notebooks`, or `python -m examples.notebooks`.

Of each `notebooks/NAME.py`, the pair `NAME.ipynb` is written anew. Nothing in it tells of the
machine or the time, so that it changes only where the script or its results do.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jupytext
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def main() -> None:
    """Run those that are named, or all."""
    scripts = [NOTEBOOKS / f"{name}.py" for name in sys.argv[1:]] or sorted(NOTEBOOKS.glob("*.py"))
    for script in scripts:
        notebook = jupytext.read(script)
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(
                notebook,
                timeout=300,  # of a cell, in seconds
                kernel_name="python3",
                resources={"metadata": {"path": folder}},
            ).execute()
        for number, cell in enumerate(notebook.cells):
            cell.id = f"{script.stem}-{number}"
            cell.metadata.pop("execution", None)  # when each ran
        notebook.metadata.pop("language_info", None)
        target = script.with_suffix(".ipynb")
        jupytext.write(notebook, target)
        print(f"{target}: {target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
