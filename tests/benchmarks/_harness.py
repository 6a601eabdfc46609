"""How things are timed: in turns, and compared within each round.

Times on a busy machine are worth little, and ratios of times that were taken one after the
other are worth much more. So each round runs a block of calls of every contender, in an
order that changes, and what is reported is the median over the rounds of the ratio to the
first contender within the round. Calls that hardly compute are timed by the processor's
clock, which does not run while other processes do; whole steps by the clock on the wall.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


Runs = dict[str, Callable[[], Any]]


def seconds(
    run: Callable[[], Any], n: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The time of one of `n` calls, until the last result is there."""
    out = None
    start = clock()
    for _ in range(n):
        out = run()
    jax.block_until_ready(out)
    return (clock() - start) / n


def ratios(
    runs: Runs, rounds: int, block: float, clock: Callable[[], float]
) -> dict[str, float]:
    """The time of each contender as a multiple of the first one's.

    **Arguments:**

    - `runs`: what to call, by name. Each is called a few times first, to compile.
    - `rounds`: how many rounds.
    - `block`: how long a block of calls of one contender should take, in seconds.
    - `clock`: which time: `time.perf_counter` or `time.process_time`.
    """
    sizes = {}
    for name, run in runs.items():
        seconds(run, 3)
        sizes[name] = max(1, min(2000, int(block / seconds(run, 3, clock))))
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                times[name].append(seconds(runs[name], sizes[name], clock))
            gc.collect()
    finally:
        gc.enable()
    return {name: median_ratio(times[name], times[names[0]]) for name in names}


def median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b))
