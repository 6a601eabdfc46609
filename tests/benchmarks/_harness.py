"""How things are timed: in turns, and compared within each round.

Times on a busy machine are worth little, and ratios of times that were taken one after the
other are worth much more. So each round runs a block of calls of every contender, in an
order that changes, and what is reported is the median of the ratio to the first contender
within the round, over the quieter half of the rounds. They are timed by the processor's
clock, which does not run while other processes do.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


Runs = dict[str, Callable[[], Any]]
Clock = Callable[[], float]


def clock_here() -> Clock:
    """The processor's; where there is an accelerator, that of the wall: the processor waits
    for it."""
    return time.process_time if jax.default_backend() == "cpu" else time.perf_counter


def seconds(run: Callable[[], Any], n: int, clock: Clock = time.process_time) -> float:
    """The time of one of `n` calls, until the last result is there."""
    out = None
    start = clock()
    for _ in range(n):
        out = run()
    jax.block_until_ready(out)
    return (clock() - start) / n


def ratios(
    runs: Runs,
    rounds: int,
    block: float,
    limit: float,
    clock: Clock = time.process_time,
) -> dict[str, float]:
    """The time of each contender as a multiple of the first one's.

    **Arguments:**

    - `runs`: what to call, by name. Each is called a few times first, to compile.
    - `rounds`: how many rounds.
    - `block`: how long a block of calls of one contender should take, in seconds.
    - `limit`: no round is begun after this many seconds, but for the first five.
    - `clock`: which time.
    """
    sizes = {}
    for name, run in runs.items():
        seconds(run, 3)
        sizes[name] = max(1, min(2000, int(block / seconds(run, 3, clock))))
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + limit
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            if i >= 5 and time.perf_counter() > end:
                break
            for name in names[i % len(names) :] + names[: i % len(names)]:
                times[name].append(seconds(runs[name], sizes[name], clock))
            gc.collect()
    finally:
        gc.enable()
    quiet = quieter_half(times)
    return {name: median_ratio(quiet[name], quiet[names[0]]) for name in names}


def quieter_half(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """The times of the rounds that took the least time, every contender counting alike."""
    shares = []
    for its_times in times.values():
        typical = statistics.median(its_times)
        shares.append([x / typical for x in its_times])
    totals = [sum(shares_of_round) for shares_of_round in zip(*shares)]
    order = sorted(range(len(totals)), key=totals.__getitem__)
    kept = order[: (len(order) + 1) // 2]
    return {name: [its_times[i] for i in kept] for name, its_times in times.items()}


def median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b))
