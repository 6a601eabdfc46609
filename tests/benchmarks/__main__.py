"""`python -m tests.benchmarks [--quick]`: runs everything, and writes the page.

Prints one line for each piece of work. The results are kept for each version of JAX, and
`docs/benchmarks.md` and its picture are made of all of them. What `--only` runs takes the
place of what was kept of the same work.
"""

import argparse
import importlib.metadata
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor

import jax

from . import _compile, _problems, _report
from ._contenders import AGAIN, BASE, contenders, OURS
from ._harness import ratios
from ._problems import Problem


_LIMIT = 30.0  # seconds for one piece of work, once it is compiled
# At 10,000 refs the others take minutes to compile.
_AT_10_000 = (BASE, OURS, "eqx.filter_jit")


def _run_calls(problem: Problem, rounds: int, block: float) -> dict[str, float]:
    makers = contenders()
    if problem.name.startswith("10000 refs"):
        makers = {name: makers[name] for name in _AT_10_000}
    runs = {name: make(problem) for name, make in makers.items()}
    return ratios(runs, rounds, block, _LIMIT)


def _pin() -> None:
    # How the threads of a step share the cores differs from start to start, by more than
    # what is to be measured.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def _run_steps(name: str, rounds: int, block: float) -> dict[str, float]:
    """Several times from the start: by chance, what is made once runs some hundredths
    quicker or slower than what is made again. `AGAIN` shows how much."""
    problem = next(problem for problem in _steps() if problem.name == name)
    makers = contenders()
    makers[AGAIN] = makers[BASE]
    found = []
    for _ in range(5):
        runs = {name: make(problem) for name, make in makers.items()}
        found.append(ratios(runs, rounds // 2, block, _LIMIT))
        del runs
        jax.clear_caches()
    return {name: statistics.median(x[name] for x in found) for name in makers}


def _steps() -> list[Problem]:
    return [
        _problems.decode(),
        _problems.mlp(),
        _problems.conv(),
        _problems.transformer(),
    ]


def _versions() -> dict[str, str]:
    found = {}
    for name in ("refx_eqx", "equinox", "flax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no page")
    parser.add_argument("--only", default="", help="a part of the name of what to run")
    parser.add_argument("--dry", action="store_true", help="print, and keep nothing")
    options = parser.parse_args()
    quick = options.quick
    rounds, block = (7, 0.01) if quick else (40, 0.03)

    keep = not (options.dry or quick)

    def show(kind: str, found: _report.Rows) -> None:
        if keep:
            _report.save(_versions(), kind, found)
        for work, row in found.items():
            text = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
            print(f"{work}: {text}", flush=True)

    sizes = (10, 100, 1000) if quick else (10, 100, 1000, 10_000)
    for written in ("all", "one", "none"):
        for n in sizes:
            problem = _problems.calls(n, written)
            if options.only in problem.name:
                show("calls", {problem.name: _run_calls(problem, rounds, block)})
    # In another process, which is on one core before JAX starts its threads.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_pin) as pool:
        for problem in _steps():
            if options.only in problem.name:
                row = pool.submit(_run_steps, problem.name, rounds, block).result()
                show("steps", {problem.name: row})
    if options.only in "compilation":
        show("compilation", _compile.compilation(50 if quick else 200, rounds // 6))
    if options.only in "memory":
        show("memory", _compile.memory())
    if options.only in "dispatch":
        show("dispatch", _compile.share_inside(0.2 if quick else 1.0, rounds // 4))

    if keep:
        _report.write_page()


if __name__ == "__main__":
    main()
