"""`python -m tests.benchmarks [--quick]`: runs everything, and writes the page.

Prints one line for each piece of work. The results are kept for each version of JAX, and
`docs/benchmarks.md` and its picture are made of all of them.
"""

import argparse
import importlib.metadata
import time

from . import _compile, _problems, _report
from ._contenders import contenders
from ._harness import ratios
from ._problems import Problem


def _run(problem: Problem, kind: str, rounds: int, block: float) -> dict[str, float]:
    runs = {name: make(problem) for name, make in contenders().items()}
    clock = time.process_time if kind == "calls" else time.perf_counter
    return ratios(runs, rounds, block, clock)


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
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no 10,000")
    parser.add_argument("--only", default="", help="a part of the name of what to run")
    parser.add_argument("--dry", action="store_true", help="print, and write no page")
    options = parser.parse_args()
    quick = options.quick
    rounds, block = (7, 0.01) if quick else (40, 0.03)

    rows: dict[str, _report.Rows] = {}

    def show(kind: str, found: _report.Rows) -> None:
        for work, row in found.items():
            rows.setdefault(kind, {})[work] = row
            text = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
            print(f"{work}: {text}", flush=True)

    sizes = (10, 100, 1000) if quick else (10, 100, 1000, 10_000)
    problems = {
        "calls": [
            _problems.calls(n, written)
            for written in ("all", "one", "none")
            for n in sizes
        ],
        "steps": [
            _problems.decode(),
            _problems.mlp(),
            _problems.conv(),
            _problems.transformer(),
        ],
    }
    for kind, its_problems in problems.items():
        for problem in its_problems:
            if options.only in problem.name:
                show(kind, {problem.name: _run(problem, kind, rounds, block)})
    if options.only in "compilation":
        show("compilation", _compile.compilation(50 if quick else 200, rounds // 5))
    if options.only in "memory":
        show("memory", _compile.memory())
    if options.only in "dispatch":
        show("dispatch", _compile.share_inside(0.2 if quick else 1.0, rounds // 5))

    if options.dry or options.only:
        return
    machine = _report.machine()
    _report.save(dict(machine=machine, versions=_versions(), rounds=rounds, rows=rows))
    _report.write_page()


if __name__ == "__main__":
    main()
