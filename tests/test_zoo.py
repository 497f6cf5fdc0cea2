"""Real architectures: every nonlinearity captured exactly once, and nothing else changed.

Three passes in one block: the first is learned, the later ones are read by taps. Each has other
inputs, and is compared with a bare copy of the model that ran under the witness.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from fmapkit import CaptureWarning, capture
from tests.truth import (
    NO_MODES,
    assert_captured_exactly_once,
    assert_nothing_left,
    assert_same_pass,
    bare_copy,
    fingerprint,
    modes,
    run_pass,
)
from tests.zoo import ZOO, Entry, vary

PASSES = 3


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
@pytest.mark.usefixtures("no_fast_path")
def test_every_nonlinearity_captured_and_nothing_changed(entry: Entry, train: bool) -> None:
    model, args, kwargs = entry.build()
    if entry.name == "hf_mistral" and torch.__version__ < "2.5":
        pytest.skip("the bare model of transformers 4 fails with torch 2.4")
    model.train(train)
    bare = bare_copy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)  # recurrent nets: named in `missed`
        with capture(model) as maps:
            for step in range(PASSES):
                given, named = vary(args, kwargs, step)
                expected = run_pass(bare, given, named, train=train, seed_=step, witness=True)
                watched = run_pass(model, given, named, train=train, seed_=step)
                assert_same_pass(expected, watched)
                assert_captured_exactly_once(maps, expected.truth)
                assert {fm.step for fm in maps} <= {step}
                assert not any(fm.tensor.requires_grad for fm in maps)
    assert_nothing_left(fingerprint(bare), model)
    assert modes() == NO_MODES
    # The block is over: the last pass is still there to read, and as it was.
    assert_captured_exactly_once(maps, expected.truth)
    with torch.no_grad():
        model(*args, **kwargs)
    assert_captured_exactly_once(maps, expected.truth)


def test_there_are_enough_architectures() -> None:
    names = [entry.name for entry in ZOO]
    assert len(names) == len(set(names))
    pytest.importorskip("pytorchcv")
    pytest.importorskip("transformers")
    assert len(names) >= 60
