"""`python -m tests.benchmarks [--quick] [--calls]`: runs everything, and writes the page.

Prints one line for each piece of work. The results are kept for each version of JAX, and
`docs/benchmarks.md` and its picture are made of all of them. What `--only` runs takes the
place of what was kept of the same work. `--calls` runs what is passed to a call, and the loops
of users: a few minutes.
"""

import argparse
import importlib.metadata
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from . import _compile, _kinds, _loops, _problems, _repeated, _report


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
    parser.add_argument("--calls", action="store_true", help="only the kinds of calls")
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

    for name, n, written in _kinds.table():
        if options.only in name:
            row = _kinds.run_kind(name, n, written, rounds // 3 + 3, block)
            show("kinds", {f"{name}, {n} refs, {written} written": row})
    for name, run in _loops.run_all(rounds, block).items():
        if options.only in name:
            show("loops", {name: run()})
    if options.calls:
        return _report.write_page() if keep else None

    sizes = (10, 100, 1000) if quick else (10, 100, 1000, 10_000)
    for written in ("all", "one", "none"):
        for n in sizes:
            problem = _problems.calls(n, written)
            if options.only in problem.name:
                show(
                    "calls", {problem.name: _repeated.run_calls(problem, rounds, block)}
                )
    # In another process, which is on one core before JAX starts its threads.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_repeated.pin) as pool:
        for problem in _repeated.steps():
            if options.only in problem.name:
                row = pool.submit(
                    _repeated.run_steps, problem.name, rounds, block
                ).result()
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
