"""Random histories: many calls of the same functions, with changes between them. See
`tests/fuzz/history.py`."""

from collections.abc import Callable

import fuzz.history
import pytest
from fuzz.functions import FUNCTIONS, write
from fuzz.history import run_history

import refx_eqx as rx


@pytest.mark.parametrize("seed", range(3))
def test_a_history_is_that_of_plain_python(seed):
    difference, done = run_history(seed, steps=20)
    assert difference is None, done


def test_the_histories_have_calls_and_changes_between_them():
    done = {name for seed in range(3) for name in steps_of(seed)}
    assert done >= {"call", "call_closure", "write", "append", "share", "clone", "keep"}


def steps_of(seed: int) -> list[str]:
    world = fuzz.history.World(seed, lifted=False)
    return [world.step()[0] for _ in range(20)]


def on_a_clone(fn: Callable) -> Callable:
    return lambda tree, x: fn(rx.clone(tree), x)


def as_it_was_at_first(fn: Callable) -> Callable:
    results = []

    def stale(tree, x):
        results.append(fn(tree, x))
        return results[0]

    return stale


def written_though_it_fails(fn: Callable) -> Callable:
    def without_the_state(tree, x):
        with rx.mutable("params"):
            return fn(tree, x)

    return without_the_state


@pytest.mark.parametrize(
    "wrong", [on_a_clone, as_it_was_at_first, written_though_it_fails]
)
def test_a_wrong_transform_is_found(wrong, monkeypatch):
    assert "write" in FUNCTIONS
    monkeypatch.setattr(fuzz.history, "FUNCTIONS", {"write": (wrong(write), write)})
    assert any(run_history(seed, steps=20)[0] is not None for seed in range(3))
