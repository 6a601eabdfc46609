"""The page and the picture, made from the results of every version of JAX that was run."""

import json
import os
import pathlib
import platform
from collections.abc import Iterable
from typing import Any

import jax

from ._contenders import AGAIN, BASE, OURS


ROOT = pathlib.Path(__file__).parents[2]
RESULTS = pathlib.Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOT = ROOT / "docs" / "img" / "benchmarks.svg"

Rows = dict[str, dict[str, float]]

_INTRODUCTION = """\
# Benchmarks

What does a ref cost? Every row below is one piece of work, done by every library in one
process, in turns. A number is the time as a multiple of the time that `jax.jit` takes on a
flat list of the same arrays, with the results rebound by hand. Less is better, and 1.00 is a
ref for free.

```bash
python -m nox -s bench             # all of it, and this page: a quarter of an hour
python -m nox -s bench -- --quick  # fewer rounds, and no page: some minutes
```

The work is written once, as a pure function of arrays (`tests/benchmarks/_problems.py`).
Each library holds the arrays in its own way, in modules of two to nineteen leaves, and
calls its own compiled function on them (`tests/benchmarks/_contenders.py`):

| | what one step is |
| --- | --- |
| `jax.jit` | arrays in a flat list; those the function returns are put back by hand |
| `rx.filter_jit` | a `rx.Module` of refs, which the function writes |
| `eqx.filter_jit` | an `eqx.Module`, a new one returned if anything in it changes, and rebound |
| `jax.Ref` | a list of dicts of `jax.new_ref(...)`, passed to `jax.jit` and written |
| `nnx.jit` | an `nnx.Module` of `nnx.Param`, which the function writes |
| `nnx.jit, tree mode` | the same, with `graph=False` |
| `nnx.cached_partial` | the same, with the module bound by `nnx.cached_partial` |

A round runs a block of calls of each, in an order that changes. A number is the median of
the ratio to `jax.jit` within a round, over the quieter half of up to 40 rounds. Nothing is
donated. With 10,000 refs the others take minutes to compile, and are left out. All ran on
the CPU of a small virtual machine: read the second digit with care, and the third not at
all. Nothing can be faster than the call it wraps, so a number below 1.00 is noise, and shows how
large the noise is.

![Time of a call by the number of refs](img/benchmarks.svg)
"""

_NOTES = {
    "calls": "A call with next to no computation: the processor time of the call itself. A "
    "call of ours has a fixed part (some microseconds of Python: to find what is known of "
    "the arguments, and to check that it still holds), which shows where there are few "
    "refs. What grows with the refs is to read each, and to write those that were written. "
    "To make a new array costs JAX itself some microseconds, and every library pays that: "
    "so they are nearest to each other where many refs are written.",
    "steps": "Whole steps, on one core. A training step is a gradient and Adam; everything "
    "is written. The models are small, so that the call still counts. A number is the median "
    "of five starts with 20 rounds each: what is made again runs some hundredths faster "
    f"or slower, by chance, and the column `{AGAIN}` shows by how much.",
    "compilation": "Tracing and compiling a training step of a deep network: processor time "
    "as a multiple of that of the same network in plain Equinox, over a few rounds only.",
    "memory": "The peak memory of a training step with Adam, as the compiler plans it, as a "
    'multiple of that of `jax.jit` with `donate_argnums`. Ours is `donate="refs"`.',
    "kinds": "What is passed makes no difference of kind: every call is a planned one. Each row "
    "is a call with next to no computation, as a multiple of that of `jax.jit` on the same "
    "arrays in a flat list.",
    "loops": "Each loop as its users write it; the first column that is 1.00 says against what.",
    "dispatch": "The part of a computation of one second that is spent inside the call, "
    "before it returns: 0 is an asynchronous call, 1 is one that waits.",
}
_TITLES = {
    "calls": "Calls",
    "kinds": "Calls, by what is passed",
    "loops": "Loops as users write them",
    "steps": "Steps",
    "compilation": "Tracing and compiling",
    "memory": "Memory",
    "dispatch": "Asynchronous dispatch",
}


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def save(versions: dict[str, str], kind: str, rows: Rows) -> None:
    """Keeps these results; what was kept of other work stays."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"jax-{jax.__version__}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else {}
    kept[kind] = kept.get(kind, {}) | rows
    # In the order of the page, whatever was run first.
    kept["calls"] = dict(sorted(kept.get("calls", {}).items(), key=_order_of_calls))
    ordered = {kind: kept.get(kind, {}) for kind in _TITLES}
    results = dict(machine=_machine(), versions=versions, rows=ordered)
    path.write_text(json.dumps(results, indent=2) + "\n")


def _order_of_calls(item: tuple[str, Any]) -> tuple[int, int]:
    n_refs, _, written, _ = item[0].split()
    return ("all", "one", "none").index(written), int(n_refs)


def _key(results: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(part) for part in results["machine"]["jax"].split(".")[:3])


def load() -> list[dict[str, Any]]:
    """What was saved, the newest JAX first."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("jax-*.json")]
    return sorted(found, key=_key, reverse=True)


def table(rows: Rows) -> str:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [
        "| | " + " | ".join(f"`{name}`" for name in names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for work, row in rows.items():
        cells = [_number(row[name]) if name in row else "" for name in names]
        lines.append(f"| {work} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(x: float) -> str:
    return f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 0.1 else f"{x:.4f}"


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    low, high = _number(found[0]), _number(found[-1])
    return low if low == high else f"{low} to {high}"


def summary(rows: dict[str, Rows]) -> str:
    """The tables in a few lines."""
    lines = []
    for written in ("all", "one", "none"):
        chosen = [
            row
            for work, row in rows["calls"].items()
            if work.endswith(f" {written} written")
        ]
        if chosen:
            ours = _range(row[OURS] for row in chosen)
            lines.append(f"A call with {written} of the refs written: {ours}.")
    for name in next(iter(rows["calls"].values()), {}):
        if name not in (BASE, OURS):
            times = _range(
                row[name] / row[OURS] for row in rows["calls"].values() if name in row
            )
            lines.append(f"A call of `{name}` takes {times} times as long as ours.")
    steps = rows["steps"].values()
    if steps:
        ours = _range(row[OURS] for row in steps)
        peers = _range(
            min(x for name, x in row.items() if name not in (BASE, AGAIN, OURS))
            for row in steps
        )
        lines.append(f"A whole step: {ours}; of the best of the peers: {peers}.")
    return "\n".join(f"- {line}" for line in lines)


def in_short(everything: list[dict[str, Any]]) -> str:
    """The sentence of the README."""
    rows = [
        row
        for results in everything
        for work, row in results["rows"]["calls"].items()
        if not work.startswith("10000 refs")
    ]
    times = {}
    for name in (OURS, "eqx.filter_jit", "nnx.jit"):
        found = [row[name] for row in rows]
        low, high = (
            f"{x:.1f}" if x < 10 else f"{x:.0f}" for x in (min(found), max(found))
        )
        times[name] = f"{low} to {high} times"
    return (
        f"a repeated call takes {times[OURS]} as long as `jax.jit` on a flat list of the same "
        f"10 to 1,000 arrays; `eqx.filter_jit` takes {times['eqx.filter_jit']}, and `nnx.jit` "
        f"{times['nnx.jit']}"
    )


def page(everything: list[dict[str, Any]]) -> str:
    parts = [_INTRODUCTION]
    for results in everything:
        about, rows = results["machine"], results["rows"]
        versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
        title = f"JAX {about['jax']}"
        parts.append(
            f"## {title}\n\n{about['cores']} cores ({about['processor']}), "
            f"{about['system']}, Python {about['python']}; {versions}. In short:\n\n"
            f"{summary(rows)}\n"
        )
        for kind, its_rows in rows.items():
            if its_rows:
                parts.append(
                    f"### {_TITLES[kind]} ({title})\n\n{_NOTES[kind]}\n\n"
                    f"{table(its_rows)}\n"
                )
    return "\n".join(parts)


def write_page() -> None:
    everything = load()
    PAGE.write_text(page(everything))
    _draw(everything[0])


def _draw(results: dict[str, Any]) -> None:
    import matplotlib

    rows = results["rows"]["calls"]
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    for panel, written in zip(panels, ("all", "one", "none")):
        chosen = {
            int(work.split()[0]): row
            for work, row in rows.items()
            if work.endswith(f" {written} written")
        }
        for name in dict.fromkeys(name for row in chosen.values() for name in row):
            xs = [n for n, row in chosen.items() if name in row]
            ys = [chosen[n][name] for n in xs]
            width = 2.5 if name == OURS else 1.2
            panel.plot(xs, ys, "o-", label=name, lw=width, ms=3)
        panel.set(xscale="log", yscale="log", title=f"{written} written", xlabel="refs")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time / time of jax.jit")
    panels[0].legend(fontsize=7)
    figure.suptitle(f"JAX {results['machine']['jax']}", fontsize=9)
    figure.tight_layout()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})
    # Matplotlib ends lines with blanks, which editors and hooks take away.
    lines = PLOT.read_text().splitlines()
    PLOT.write_text("".join(line.rstrip() + "\n" for line in lines))
