"""Promises 1 to 5 of the design, each a property of models that nobody has seen before."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmapkit import CaptureWarning, capture
from tests.strategies import Model, models
from tests.truth import (
    NO_MODES,
    Pass,
    assert_captured_exactly_once,
    assert_nothing_left,
    assert_same_pass,
    bare_copy,
    captured_pairs,
    fingerprint,
    graph_of,
    modes,
    run_pass,
    same_bits,
)

EXAMPLES = settings(max_examples=60)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        yield


def _bare_pass(model: nn.Module, x: Tensor, train: bool, step: int) -> Pass | None:
    """A pass of the bare model under the witness; None where autograd refuses it.

    The strategies write in-place code without asking autograd first. Such a model cannot be
    trained by anybody: there is nothing to compare with.
    """
    try:
        return run_pass(model, (x,), train=train, seed_=step, witness=True)
    except RuntimeError as error:
        if "inplace" in str(error) or "does not require grad" in str(error):
            return None
        if "expected a non-empty" in str(error) or "Expected more than 1 value" in str(error):
            return None
        raise


def _compare(drawn: Model, train: bool, passes: int = 4, **options: Any) -> None:
    model = drawn.build().train(train)
    bare = bare_copy(model)
    with _quiet(), capture(model, **options) as maps:
        for step in range(passes):
            x = drawn.inputs(step)
            expected = _bare_pass(bare, x.clone(), train, step)
            assume(expected is not None)
            assert expected is not None
            watched = run_pass(model, (x.clone(),), train=train, seed_=step)
            assert_same_pass(expected, watched)
            assert_captured_exactly_once(maps, expected.truth)
    assert_nothing_left(fingerprint(bare), model)
    assert_captured_exactly_once(maps, expected.truth)


# -- promises 1 and 2: every pair is right, and the model cannot tell -----------------------------


@EXAMPLES
@given(models())
def test_pairs_are_true_and_outputs_untouched_in_eval(drawn: Model) -> None:
    _compare(drawn, train=False)


@EXAMPLES
@given(models())
def test_pairs_are_true_and_gradients_untouched_in_training(drawn: Model) -> None:
    _compare(drawn, train=True)


@EXAMPLES
@given(models(roads=False))
def test_pairs_are_true_where_taps_serve_every_later_pass(drawn: Model) -> None:
    _compare(drawn, train=False)


@settings(max_examples=30)
@given(models(), st.data())
def test_pairs_stay_as_they_were_when_made(drawn: Model, data: st.DataObject) -> None:
    """Later passes, an optimiser and writes into inputs and outputs change no map that is kept."""
    model = drawn.build().train()
    kept: list[tuple[int, list[Any]]] = []
    with _quiet(), capture(model, keep="all") as maps:
        for step in range(3):
            x = drawn.inputs(step)
            with torch.no_grad():
                run_pass(model, (x,), train=False, seed_=step)
            now = [(p.z.clone(), p.a.clone()) for p in captured_pairs(maps)]
            kept.append((step, now))
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)
            x.zero_()
    for step, pairs in kept:
        for kind, at in (("preactivation", 0), ("activation", 1)):
            held = [fm.tensor for fm in maps.select(kind=kind, step=step) if fm.nonlinearity]
            assert len(held) == len(pairs)
            for tensor in held:
                assert any(same_bits(tensor, pair[at]) for pair in pairs)


@settings(max_examples=30)
@given(models(), st.integers(2, 3))
def test_every_nth_pass_is_captured_and_the_others_run_bare(drawn: Model, every: int) -> None:
    model = drawn.build().eval()
    bare = bare_copy(model)
    last = None
    with _quiet(), capture(model, every=every) as maps:
        for step in range(2 * every + 1):
            x = drawn.inputs(step)
            expected = run_pass(bare, (x.clone(),), train=False, seed_=step, witness=True)
            assert_same_pass(expected, run_pass(model, (x,), train=False, seed_=step))
            if step % every == 0:
                last = expected
            assert last is not None
            assert_captured_exactly_once(maps, last.truth)


@settings(max_examples=30)
@given(models(), st.lists(st.booleans(), min_size=3, max_size=5))
def test_switching_between_train_and_eval_is_noticed(drawn: Model, flags: list[bool]) -> None:
    model = drawn.build()
    bare = bare_copy(model)
    with _quiet(), capture(model) as maps:
        for step, train in enumerate(flags):
            x = drawn.inputs(step)
            model.train(train)
            bare.train(train)
            expected = run_pass(bare, (x.clone(),), train=False, seed_=step, witness=True)
            assert_same_pass(expected, run_pass(model, (x,), train=False, seed_=step))
            assert_captured_exactly_once(maps, expected.truth)


# -- promise 3: nothing is left behind, and captures do not disturb each other --------------------


class _Interrupt(BaseException):
    """Like KeyboardInterrupt: no `except Exception` sees it."""


@settings(max_examples=30)
@given(models(), st.integers(0, 12), st.sampled_from([RuntimeError, _Interrupt]), st.booleans())
def test_nothing_left_behind_however_it_ends(
    drawn: Model, when: int, kind: type[BaseException], later: bool
) -> None:
    """An error in the n-th module called, in the first pass or in a later one."""
    model = drawn.build().eval()
    before = fingerprint(model)
    calls = iter(range(1000))

    def bomb(module: nn.Module, args: object) -> None:
        if next(calls) == when:
            raise kind("boom")

    with _quiet():
        try:
            with capture(model) as maps, torch.no_grad():
                if later:
                    model(drawn.inputs(0))
                    model(drawn.inputs(1))
                handle = nn.modules.module.register_module_forward_pre_hook(bomb)
                try:
                    model(drawn.inputs(2))
                finally:
                    handle.remove()
        except kind:
            pass
    assert modes() == NO_MODES
    assert_nothing_left(before, model)
    repr(maps)  # readable still, whatever was captured
    copy.deepcopy(model)
    # The next capture starts afresh.
    bare = bare_copy(model)
    expected = run_pass(bare, (drawn.inputs(3),), train=False, witness=True)
    with _quiet(), capture(model) as maps:
        assert_same_pass(expected, run_pass(model, (drawn.inputs(3),), train=False))
    assert_captured_exactly_once(maps, expected.truth)


@settings(max_examples=30)
@given(models())
def test_nested_captures_do_not_disturb_each_other(drawn: Model) -> None:
    model = drawn.build().eval()
    bare = bare_copy(model)
    with _quiet(), capture(model) as outer:
        for step in range(2):
            x = drawn.inputs(step)
            expected = run_pass(bare, (x.clone(),), train=False, seed_=step, witness=True)
            with capture(model) as inner:
                for _ in range(2):
                    watched = run_pass(model, (x.clone(),), train=False, seed_=step)
                    assert_same_pass(expected, watched)
                    assert_captured_exactly_once(inner, expected.truth)
                    assert_captured_exactly_once(outer, expected.truth)
            assert_same_pass(expected, run_pass(model, (x,), train=False, seed_=step))
            assert_captured_exactly_once(inner, expected.truth)
            assert_captured_exactly_once(outer, expected.truth)
    assert_nothing_left(fingerprint(bare), model)


@settings(max_examples=10)
@given(models())
def test_two_threads_do_not_disturb_each_other(drawn: Model) -> None:
    # Seeds are the process's own: only models that draw no random numbers (eval) are compared.
    model = drawn.build().eval()
    truths = {n: run_pass(model, (drawn.inputs(n),), train=False, witness=True) for n in range(2)}
    failures: list[BaseException] = []
    barrier = threading.Barrier(2)

    def work(n: int) -> None:
        try:
            torch.set_num_threads(1)
            with torch.no_grad(), capture(model) as maps:
                for _ in range(4):
                    barrier.wait(timeout=60)
                    model(drawn.inputs(n))
                    assert_captured_exactly_once(maps, truths[n].truth)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    before = fingerprint(model)
    with _quiet():
        threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    assert_nothing_left(before, model)


# -- promise 4: nothing silently missing ----------------------------------------------------------


@settings(max_examples=30)
@given(models())
def test_without_warning_nothing_is_missing(drawn: Model) -> None:
    """`missed` is empty, or there was a warning; and then no run may be without its pair."""
    model = drawn.build().eval()
    bare = bare_copy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with capture(model) as maps:
            for step in range(3):
                x = drawn.inputs(step)
                expected = run_pass(bare, (x.clone(),), train=False, seed_=step, witness=True)
                run_pass(model, (x,), train=False, seed_=step)
                pairs = captured_pairs(maps)
                if not maps.missed:
                    assert len(pairs) == len(expected.truth)
    if maps.missed:
        assert any(issubclass(w.category, CaptureWarning) for w in caught)
        assert all(m.reason and isinstance(m.layer, str) for m in maps.missed)


# -- promise 5: memory ----------------------------------------------------------------------------


def _live_tensors() -> tuple[int, int]:
    gc.collect()
    live = [t for t in gc.get_objects() if isinstance(t, Tensor)]
    # `gc` sees Python objects; a storage may be shared by several, and counts once.
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in live}
    return len(live), sum(storages.values())


@settings(max_examples=20)
@given(models(roads=False))
@pytest.mark.usefixtures("collected")
def test_memory_is_flat_from_the_second_pass_on(drawn: Model) -> None:
    model = drawn.build().eval()
    counts = []
    with _quiet(), torch.no_grad(), capture(model) as maps:
        for step in range(5):
            model(drawn.inputs(step % 2))
            counts.append((*_live_tensors(), maps.nbytes))
    assert len(set(counts[1:])) == 1, counts


@settings(max_examples=20)
@given(models())
@pytest.mark.usefixtures("collected")
def test_no_graph_is_kept_alive(drawn: Model) -> None:
    model = drawn.build().train()
    bare = bare_copy(model)
    with _quiet(), capture(model) as maps:
        for step in range(3):
            try:
                output = bare(drawn.inputs(step))
            except RuntimeError:
                assume(False)
            graph = graph_of(output)
            del output
            # `relu(x)` written to in place keeps its own graph alive: that is torch's cycle.
            assume(graph() is None)
            output = model(drawn.inputs(step))
            graph = graph_of(output)
            del output
            assert not any(fm.tensor.requires_grad or fm.tensor.grad_fn for fm in maps)
            assert graph() is None
    pickle.dumps([fm.tensor for fm in maps])
