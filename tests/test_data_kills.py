"""Extractions killed at random; `python -m tests.data.kills --kills 100` kills a hundred times."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("zarr", minversion="3.1.4")

from tests.data.kills import JOBS, torture

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def test_killed_at_random_nothing_is_lost(tmp_path: Path) -> None:
    told = torture(18, 0, tmp_path)
    assert len(told) >= len(JOBS)  # each of them came to be complete
