"""`python -m tests.benchmarks [GROUP ...]`: measures, and writes the page.

Prints one line for each piece of work. The results are kept in `results/`, a file for each
version of JAX and device, and `docs/benchmarks.md`, its picture and the sentence of the README
are made of these files: by `python -m tests.benchmarks --page`, too, when files were put there
that another machine has made.
"""

import argparse
import multiprocessing
import pathlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax

from . import (
    _compile,
    _kinds,
    _loops,
    _problems,
    _repeated,
    _report,
    _sharded,
    bench_gpt,
)
from ._harness import clock_here


# The group; what it is called; and what measures it.
Work = tuple[str, str, Callable[[], _report.Rows]]


def _works(rounds: int, block: float, most: int) -> Iterator[Work]:
    """All there is. What takes longest comes first, for those who run it in parts."""
    clock = clock_here()
    for name, run in _loops.rows(rounds, block, clock).items():
        yield "loops", name, _bind(lambda name, run: {name: run()}, name, run)
    yield "gpt", "GPT-2", bench_gpt.rows
    for written in ("all", "one", "none"):
        for n in (10, 100, 1000, 10_000):
            if n <= most:
                problem = _problems.calls(n, written)
                run = lambda x: {x.name: _repeated.run_calls(x, rounds, block)}
                yield "calls", problem.name, _bind(run, problem)
    for problem in _repeated.steps():
        yield "steps", problem.name, _apart(_repeated, problem.name, rounds, block)
    for name in _sharded.NAMES:
        yield "sharded", name, _apart(_sharded, name, rounds, block)
    n_layers = 50 if rounds < 10 else 200
    yield "compilation", "tracing", lambda: _compile.compilation(n_layers, rounds // 6)
    yield "compilation", "importing", lambda: _compile.imports(rounds // 3)
    yield "memory", "memory", _compile.memory
    seconds = 0.2 if rounds < 10 else 1.0
    yield "dispatch", "dispatch", lambda: _compile.share_inside(seconds, rounds // 4)
    for name, n, written in _kinds.table():
        if n <= most:
            full = f"{name}, {n} refs, {written} written"
            run = lambda full, name, n, written: {
                full: _kinds.run_kind(name, n, written, rounds // 3 + 3, block)
            }
            yield "kinds", full, _bind(run, full, name, n, written)


def _bind(run: Callable, *args: Any) -> Callable[[], _report.Rows]:
    return lambda: run(*args)


def _apart(
    module: Any, name: str, rounds: int, block: float
) -> Callable[[], _report.Rows]:
    """In a process of its own, which is prepared before JAX asks for devices."""

    def run() -> _report.Rows:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            1, mp_context=spawn, initializer=module.prepare
        ) as pool:
            return {name: pool.submit(module.run, name, rounds, block).result()}

    return run


# What is run if nothing is said. The others are for an accelerator.
_USUAL = (
    "kinds",
    "loops",
    "calls",
    "steps",
    "sharded",
    "compilation",
    "memory",
    "dispatch",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(_USUAL)}, gpt")
    parser.add_argument("--only", default="", help="a part of the name of what to run")
    parser.add_argument("--quick", action="store_true", help="few rounds, no page")
    parser.add_argument("--dry", action="store_true", help="print, and keep nothing")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--most", type=int, default=10_000, help="refs in a call")
    parser.add_argument("--part", default="0/1", help="I/N: of what is run, every Nth")
    parser.add_argument("--results", type=pathlib.Path, help="keep them in this folder")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    rounds, block = (7, 0.01) if options.quick else (options.rounds, 0.03)
    keep = not (options.dry or options.quick)
    part, n_parts = map(int, options.part.split("/"))

    if options.page:
        return _report.write_page()
    found = [
        work
        for work in _works(rounds, block, options.most)
        if work[0] in (options.groups or _USUAL) and options.only in work[1]
    ]
    for group, name, run in found[part::n_parts]:
        try:
            rows = run()
        except (
            Exception
        ) as e:  # of a peer, on this version: the others are still measured
            print(f"{name}: {type(e).__name__}: {e}", flush=True)
            continue
        if keep:
            name_of_part = f"-{part}" if n_parts > 1 else ""
            _report.save(options.results or _report.RESULTS, name_of_part, group, rows)
        for work, row in rows.items():
            text = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
            print(f"{work}: {text}", flush=True)
        jax.clear_caches()
    if keep and not options.results:
        _report.write_page()


if __name__ == "__main__":
    main()
