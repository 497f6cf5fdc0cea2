"""Run the suite on the oldest and the newest of what `pyproject.toml` allows: `make test-matrix`.

Between the two comes the oldest torch that compiled models take.

Each environment gets a Python (pyenv's, or one on the path) and a virtual environment of its own,
under `.venv-matrix/`. The runtime dependencies are pinned; what the tests take beside them is
installed package by package, as far as it goes with the pins, and what is not there in the end is
named: its tests skip. A torch from a registry brings gigabytes of CUDA packages with it.

    python -m tests.matrix --only oldest --tests tests/test_maps.py
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".venv-matrix"
# transformers 5 switches itself off where torch is older than 2.6; its metadata name no torch.
OLDEST_TAKES = ("transformers<5",)
# Without these nothing runs.
RUNNER = ("pytest", "pytest-xdist", "hypothesis")


# Which of its arguments are not installed.
_ABSENT = """
import sys
from importlib import metadata
here = {found.metadata["Name"].lower().replace("_", "-") for found in metadata.distributions()}
print(*sorted({*sys.argv[1:]} - here))
"""


@dataclass(frozen=True)
class Environment:
    """What is to be run.

    Attributes:
        name: by which it is asked for.
        python: versions to look for, the first that is here is taken.
        pins: of the runtime dependencies.
        beside: what of the tests' own packages goes with these, where pip cannot know it.
    """

    name: str
    python: tuple[str, ...]
    pins: tuple[str, ...]
    beside: tuple[str, ...] = ()


def environments() -> list[Environment]:
    """The oldest, and the newest, of what pyproject.toml allows; the oldest for compiled models."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lowest = _found(r'requires-python = ">=([\d.]+)"', text)
    known = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    newest = sorted(known, key=_number, reverse=True)
    runtime = list(_block("dependencies", text))
    oldest = tuple(re.sub(r">=([\d.]+)", r"==\1.*", need) for need in runtime)
    newer = tuple(re.sub(r"[><=].*", "", need) for need in runtime)
    compiled = f"torch=={_found(r'compiled ones take ([0-9.]+) ', text)}.*"
    return [
        Environment("oldest", (lowest,), oldest, OLDEST_TAKES),
        Environment("compiled", tuple(newest[1:]), tuple(_with_torch(newer, compiled))),
        Environment("newest", tuple(newest), newer),
    ]


def _with_torch(needs: Sequence[str], torch: str) -> Iterator[str]:
    return (torch if need == "torch" else need for need in needs)


def main() -> None:
    """Run what was asked for, and say of each how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[e.name for e in environments()])
    parser.add_argument("--tests", nargs="*", default=["tests"], help="files to run")
    parser.add_argument("--workers", default="2", help="processes, each on one core")
    given = parser.parse_args()
    said = []
    for environment in environments():
        if given.only in (None, environment.name):
            said.append(f"{environment.name}: {_run(environment, given.tests, given.workers)}")
    print("\n".join(["", *said]))
    if any(": FAILED" in line for line in said):
        raise SystemExit(1)


def _run(environment: Environment, tests: list[str], workers: str) -> str:
    found = [p for version in environment.python for p in _pythons(version)]
    if not found:
        return f"not run: no Python {' or '.join(environment.python)} is here"
    python = HOME / environment.name / "bin" / "python"
    if not python.exists():
        _call(found[0], "-m", "venv", str(python.parent.parent))
    pins = HOME / f"{environment.name}.txt"
    pins.write_text("\n".join((*environment.pins, *environment.beside)) + "\n")
    install = (str(python), "-m", "pip", "install", "--quiet", "--constraint", str(pins))
    upgrade = ("--upgrade",) if environment.name == "newest" else ()
    done = _call(*install, *upgrade, *environment.pins, *RUNNER, "setuptools>=77")
    if done.returncode:
        return f"not run: pip says {_last(done.stderr)!r}"
    optional = list(_optional())
    for need in optional:
        _call(*install, need)
    done = _call(*install, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    if done.returncode:
        return f"FAILED: the package does not install: {_last(done.stderr)!r}"
    versions = _call(
        str(python),
        "-c",
        "import platform, torch, numpy; print('Python', platform.python_version() + ', torch', "
        "torch.__version__ + ', numpy', numpy.__version__)",
    ).stdout.strip()
    left_out = _call(str(python), "-c", _ABSENT, *map(_name, optional)).stdout.split()
    options = ("--numprocesses", workers, "--dist", "loadfile", "-p", "no:cacheprovider")
    ran = subprocess.run([str(python), "-m", "pytest", *options, *tests], cwd=ROOT, check=False)
    outcome = "passed" if ran.returncode == 0 else f"FAILED (pytest's exit {ran.returncode})"
    without = f", without {', '.join(left_out)}" if left_out else ""
    return f"{outcome}: {versions}{without}"


def _optional() -> Iterator[str]:
    """What the tests take beside the runner, through all extras."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    seen = set()
    for extra in ("test", "plot", "data", "fast", "safetensors", "sklearn", "notebooks"):
        for need in _block(extra, text):
            name = _name(need)
            if name not in seen and name != "fmapkit" and name not in RUNNER:
                seen.add(name)
                yield need


def _name(need: str) -> str:
    return re.split(r"[><=\[ ]", need)[0]


def _block(name: str, text: str) -> Iterator[str]:
    """The entries of a list of strings in pyproject.toml."""
    body = _found(rf"^{name} = \[(.*?)\]$", text)
    yield from re.findall(r'"([^"]+)"', body)


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE | re.DOTALL)
    assert found is not None, pattern
    return found[1]


def _pythons(version: str) -> Iterator[str]:
    """Interpreters of a minor version, those of pyenv first."""
    for home in sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*")):
        if (home / "bin" / "python").exists():
            yield str(home / "bin" / "python")
    on_path = shutil.which(f"python{version}")
    if on_path:
        yield on_path


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
