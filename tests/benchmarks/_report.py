"""The page and the picture, made from the results of every version of JAX that was run."""

import json
import pathlib
import platform
from typing import Any


ROOT = pathlib.Path(__file__).parents[2]
RESULTS = pathlib.Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOT = ROOT / "docs" / "img" / "benchmarks.svg"

Rows = dict[str, dict[str, float]]

_INTRODUCTION = """\
# Benchmarks

What does a ref cost? Every row below is one piece of work, done by every library in one
process, in turns. A number is the time as a multiple of the time that `jax.jit` takes on a
flat list of the same arrays, with what comes back bound anew by hand: the median over many
rounds of the ratio within a round. Less is better, and 1.00 is a ref for free.

```bash
python -m nox -s bench             # all of it: half an hour, on a machine that is idle
python -m nox -s bench -- --quick  # the same with fewer rounds: some minutes
```

The work is written once, as a pure function of arrays (`tests/benchmarks/_problems.py`).
Each library holds the arrays in its own way, in modules of two to eight leaves, and calls
its own compiled function (`tests/benchmarks/_contenders.py`). A library that is not
installed is left out. "Tree mode" is `nnx.jit(..., graph=False)`.

![Time of a call against the number of refs](img/benchmarks.svg)
"""

_NOTES = {
    "calls": "A call with next to no computation: the processor time of the call itself.",
    "steps": "Whole steps. A training step is a gradient and Adam; everything is written. "
    "The models are small, so that the call still counts.",
    "compilation": "Tracing and compiling a training step of a deep network, as multiples "
    "of the time of the same network in plain Equinox.",
    "memory": "The peak memory of a training step with Adam, as the compiler plans it, as a "
    'multiple of that of `jax.jit` with `donate_argnums`. Ours is `donate="refs"`.',
    "dispatch": "The part of a long computation that is spent inside of the call, before it "
    "returns: 0 is an asynchronous call, 1 is one that waits.",
}
_TITLES = {
    "calls": "Calls",
    "steps": "Steps",
    "compilation": "Tracing and compiling",
    "memory": "Memory",
    "dispatch": "Asynchronous dispatch",
}


def machine() -> dict[str, Any]:
    import os

    import jax

    name = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = models[0] if models else name
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def save(results: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"jax-{results['machine']['jax']}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")


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


def write_page() -> None:
    everything = load()
    parts = [_INTRODUCTION]
    for results in everything:
        about = results["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
        parts.append(
            f"## JAX {about['jax']}\n\n{about['processor']}, {about['cores']} cores, "
            f"{about['system']}, Python {about['python']}; {versions}. "
            f"{results['rounds']} rounds.\n"
        )
        for kind, rows in results["rows"].items():
            parts.append(
                f"### {_TITLES[kind]}\n\n{_NOTES[kind]}\n\n{table(rows)}\n".replace(
                    "### ", f"### JAX {about['jax']}: "
                )
            )
    PAGE.write_text("\n".join(parts))
    if everything:
        _draw(everything[0]["rows"]["calls"])


def _draw(rows: Rows) -> None:
    try:
        import matplotlib
    except ImportError:
        return
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
        for name in next(iter(chosen.values())):
            xs = [n for n, row in chosen.items() if name in row]
            width = 2.5 if name.startswith("rx.") else 1.2
            panel.plot(
                xs, [chosen[n][name] for n in xs], "o-", label=name, lw=width, ms=3
            )
        panel.set(xscale="log", yscale="log", title=f"{written} written", xlabel="refs")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time / time of jax.jit")
    panels[-1].legend(fontsize=7)
    figure.tight_layout()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})
