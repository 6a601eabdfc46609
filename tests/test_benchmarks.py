"""The benchmarks run, and their page says what was measured."""

import itertools

import jax
import numpy as np
from benchmarks import _report, char_twin
from benchmarks._harness import quieter_half, ratios


def test_ratios_are_to_the_first_contender():
    ticks = itertools.count()
    runs = {"base": lambda: next(ticks), "other": lambda: [next(ticks) for _ in "abc"]}
    found = ratios(runs, rounds=4, block=1.0, limit=60.0, clock=lambda: next(ticks))
    # A block reads the clock twice: 2 ticks, and 4.
    assert found == {"base": 1.0, "other": 2.0}


def test_the_quieter_half_is_of_whole_rounds():
    times = {"a": [1.0, 5.0, 1.1, 1.0], "b": [20.0, 20.0, 20.0, 90.0]}
    assert quieter_half(times) == {"a": [1.0, 1.1], "b": [20.0, 20.0]}


def test_the_twin_of_the_character_model_has_its_losses():
    sizes = {"batch_size": 4, "context": 16, "dim": 16, "depth": 2, "heads": 2}
    with jax.numpy_dtype_promotion("standard"):  # as Optax 0.2 needs
        done = char_twin.run(6, characters=20_000, dropout=0.5, **sizes)
    ours, theirs = done.losses.T
    np.testing.assert_array_equal(ours, theirs)  # to the last bit
    assert done.held_out[0] == done.held_out[1]
    assert ours[0] != ours[1] and (done.seconds > 0).all()


def test_the_page_is_what_was_measured():
    assert _report.PAGE.read_text() == _report.page(_report.load())


def test_the_readme_says_what_was_measured():
    readme = " ".join((_report.ROOT / "README.md").read_text().split())
    assert _report.in_short(_report.load()) in readme
