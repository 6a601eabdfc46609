"""The table of argument kinds: what a call costs, whatever is passed to it."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax

import refx_eqx as rx

from ._arguments import Arguments, CARRIERS, new_value, refs_inside, ROWS, step
from ._contenders import BASE, OURS
from ._harness import clock_here, ratios


_LIMIT = 3.0  # seconds for one row


def _ours(arguments: Arguments, written: str) -> Callable[[], Any]:
    args, kwargs = arguments
    compiled = rx.filter_jit(step(written))
    return lambda: compiled(*args, **kwargs)


def _by_hand(arguments: Arguments, written: str) -> Callable[[], Any]:
    """The same arrays in a flat list, rebound to what comes back."""
    values = [ref.value for ref in refs_inside(arguments)]
    outside = jax.tree.leaves(eqx.filter(arguments, eqx.is_array))
    flat = [x for x in jax.tree.leaves(values) if eqx.is_array_like(x)]
    n = len(flat)
    if written == "one":
        n = len([x for x in jax.tree.leaves(values[:1]) if eqx.is_array_like(x)])

    @jax.jit
    def compiled(flat: list) -> tuple[Any, list]:
        return jax.numpy.zeros(()), [new_value(x) for x in flat[:n]]

    def run() -> Any:
        out, flat[:n] = compiled(flat + outside)
        return out

    return run


def table() -> Iterator[tuple[str, int, str]]:
    """The rows: the kind, the number of refs, and which of them are written."""
    for row in ROWS:
        for n in (10, 100):
            for written in ("all", "one"):
                yield row, n, written
        if row in CARRIERS:
            # What else is passed costs as much with 1000 refs, which take long to compile.
            yield row, 1000, "one"
    yield "a module", 1000, "all"


def run_kind(row: str, n: int, written: str, rounds: int, block: float) -> dict:
    runs = {
        BASE: _by_hand(ROWS[row](n), written),
        OURS: _ours(ROWS[row](n), written),
    }
    return ratios(runs, rounds, block, _LIMIT, clock_here())
