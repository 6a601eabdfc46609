"""What is called again and again: calls that hardly compute, and whole steps."""

import os
import statistics

import jax

from . import _problems
from ._contenders import AGAIN, BASE, contenders, OURS
from ._harness import clock_here, ratios
from ._problems import Problem


_LIMIT = 30.0  # seconds for one piece of work, once it is compiled
# At 10,000 refs the others take minutes to compile.
_AT_10_000 = (BASE, OURS, "eqx.filter_jit")


def run_calls(problem: Problem, rounds: int, block: float) -> dict[str, float]:
    makers = contenders()
    if problem.name.startswith("10000 refs"):
        makers = {name: makers[name] for name in _AT_10_000}
    runs = {name: make(problem) for name, make in makers.items()}
    return ratios(runs, rounds, block, _LIMIT, clock_here())


def prepare() -> None:
    # On one core, before JAX starts its threads. How the threads of a step share the cores
    # differs from start to start, by more than what is to be measured.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def run(name: str, rounds: int, block: float) -> dict[str, float]:
    """Several times from the start: by chance, what is made once runs some hundredths
    quicker or slower than what is made again. `AGAIN` shows how much."""
    problem = next(problem for problem in steps() if problem.name == name)
    makers = contenders()
    makers[AGAIN] = makers[BASE]
    found = []
    for _ in range(5):
        runs = {name: make(problem) for name, make in makers.items()}
        found.append(ratios(runs, rounds // 2, block, _LIMIT, clock_here()))
        del runs
        jax.clear_caches()
    return {name: statistics.median(x[name] for x in found) for name in makers}


def steps() -> list[Problem]:
    return [
        _problems.decode(),
        _problems.with_adam(_problems.mlp()),
        _problems.with_adam(_problems.conv()),
        _problems.with_adam(_problems.transformer()),
    ]
