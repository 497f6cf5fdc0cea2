"""Receptive fields: against changing each pixel, and against closed forms and published sizes."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmapkit.explain import receptive_field
from tests.explain_nets import STEPS, fitting, seen

# Of weights and images, until each pixel that can matter has mattered in one of them.
DRAWS = 100


def _boxes(changed: Tensor) -> list[tuple[int, ...]]:
    found = []
    for one in changed.flatten(0, 1):
        rows, columns = one.any(1).nonzero().flatten(), one.any(0).nonzero().flatten()
        if len(rows) == 0:
            found.append((0, 0, 0, 0))
            continue
        edges = (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)
        found.append(tuple(int(e) for e in edges))
    return found


@given(st.lists(STEPS, min_size=1, max_size=5), st.integers(5, 9), st.integers(4, 9))
@settings(max_examples=int(__import__("os").environ.get("EX", "60")))
def test_boxes_hold_the_pixels_that_change_a_location(
    steps: list[nn.Module], height: int, width: int
) -> None:
    image = torch.randn(1, 2, height, width)
    model = fitting(steps, image).eval()
    last = str(len(model) - 1)
    field = receptive_field(model, last, image, kind="response")
    rows, columns = field.shape
    boxes = [tuple(field.box(y, x)) for y in range(rows) for x in range(columns)]
    for changed in islice(seen(model, image), DRAWS):
        if _boxes(changed) == boxes:
            break
    assert boxes == _boxes(changed), model
    assert not field.assumed
