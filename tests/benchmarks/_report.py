"""The page and the picture, made from the results of every version of JAX that was run."""

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import textwrap
from collections.abc import Iterable
from typing import Any

import jax

from ._arguments import ROWS
from ._contenders import AGAIN, BASE, OURS


ROOT = pathlib.Path(__file__).parents[2]
RESULTS = pathlib.Path(__file__).parent / "results"
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOT = ROOT / "docs" / "img" / "benchmarks.svg"
MARKERS = "os^vDPX*"

Rows = dict[str, dict[str, float]]

_INTRODUCTION = """\
# Benchmarks

What does a ref cost? Every row below is one piece of work, done by every library in one
process, in turns. A number is the time as a multiple of the time that `jax.jit` takes on the
same arrays, with the results rebound by hand. Less is better, and 1.00 is a ref for free.

```bash
python -m nox -s bench                     # all of it, and this page: a quarter of an hour
python -m nox -s bench -- kinds loops      # what users pass, and loops as they write them
python -m nox -s bench -- --quick          # fewer rounds, and no page: some minutes
python -m nox -s bench -- loops calls gpt  # on an accelerator
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
the ratio to `jax.jit` within a round, over the quieter half of the rounds: of the time of the
processor, and of the wall where there is an accelerator. Nothing can be faster than the call
it wraps, so a number below 1.00 is noise, and shows how large the noise is.

![Time of a call by the number of refs](img/benchmarks.svg)
"""

_NOTES = {
    "calls": "A call with next to no computation: the processor time of the call itself. A "
    "call of ours has a fixed part (some microseconds of Python: to find what is known of "
    "the arguments, and to check that it still holds), which shows where there are few "
    "refs. What grows with the refs is to write those that were written; and to read each, if "
    "anything but this call has written since the last one, or if it donates. "
    "To make a new array costs JAX itself some microseconds, and every library pays that: "
    "so they are nearest to each other where many refs are written.",
    "steps": "Whole steps, on one core, without donation. A training step is a gradient and Adam "
    "written by hand; everything is written. The models are small, so that the call still counts. A number is the median "
    "of five starts with half of the rounds each: what is made again runs some hundredths faster "
    f"or slower, by chance, and the column `{AGAIN}` shows by how much.",
    "sharded": "Calls and a training step as above, with the arrays split over a mesh of 2 x 4 "
    "devices that a CPU simulates, and all of them written; the others are told to keep them "
    "where they are. The processor time is that of all devices.",
    "compilation": "Tracing and compiling a training step of a deep network, and importing the "
    "library in a new process: processor time as a multiple of that of plain Equinox, over a "
    "few rounds only.",
    "memory": "The peak memory of a training step with Adam, as the compiler plans it, as a "
    'multiple of that of `jax.jit` with `donate_argnums`. Ours is `donate="refs"`.',
    "kinds": "What is passed makes no difference of kind: every call is a planned one, and runs "
    "a fixed number of Python functions (`tests/test_cost.py` counts them). Each number is "
    f"`{OURS}`, in a call with next to no computation, as a multiple of `{BASE}` on the same "
    "arrays in a flat list. What is a tree outside of a module, or inside of a ref, is read "
    "again by each call: that is what the larger numbers are for. Refs that hold `None` bring no "
    f"array, so there `{BASE}` is called with an empty list, and the number is the fixed part.",
    "loops": "Loops as the docs of each library write them; the first column that is 1.00 says "
    "against what. A decode loop writes and donates its caches, and only reads its parameters: "
    "those of `jax.Ref` and nnx donate nothing. A documented loop is a gradient and Adam of "
    "Optax (`rx.Optimizer`, `nnx.Optimizer`), and donates; nnx does not. A gradient or a scan "
    "of a new lambda is eager, and what it is given is made again at each step. A first call "
    "traces, compiles and runs the gradient of a transformer.",
    "gpt": "A training step of 12 layers of width 768 with AdamW, in bfloat16, on 8 texts of 512 "
    "tokens: written by hand, with `rx.Optimizer`, and for `eqx.filter_jit`; all donate.",
    "dispatch": "The part of a computation of one second that is spent inside the call, "
    "before it returns: 0 is an asynchronous call, 1 is one that waits.",
}
_TITLES = {
    "calls": "Calls",
    "kinds": "Calls, by what is passed",
    "loops": "Loops as users write them",
    "gpt": "A step of the size of GPT-2",
    "steps": "Steps",
    "sharded": "Calls and steps on a mesh",
    "compilation": "Tracing and compiling",
    "memory": "Memory",
    "dispatch": "Asynchronous dispatch",
}


def _machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "processor": platform.machine(),
        "device": "CPU" if device.platform == "cpu" else device.device_kind,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("refx_eqx", "equinox", "flax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save(folder: pathlib.Path, part: str, group: str, rows: Rows) -> None:
    """Keeps these results; what was kept of other work stays.

    `part` is a part of the name of the file: several processes each have their own.
    """
    machine = _machine()
    device = machine["device"].lower().replace(" ", "-")
    name = f"jax-{jax.__version__}-{device}"
    results = dict(machine=machine, versions=_versions(), rows={group: rows})
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}{part}.json"
    if path.exists():
        results = _joined(json.loads(path.read_text()), results)
    path.write_text(json.dumps(results, indent=2) + "\n")


def _joined(*several: dict[str, Any]) -> dict[str, Any]:
    """The rows of all; in the order of the page, whatever was run first."""
    groups: dict[str, Rows] = {group: {} for group in _TITLES}
    for results in several:
        for group, rows in results["rows"].items():
            groups[group] |= rows
    groups["calls"] = dict(sorted(groups["calls"].items(), key=_order_of_calls))
    groups["kinds"] = dict(sorted(groups["kinds"].items(), key=_order_of_kinds))
    versions = several[-1]["versions"] or several[0]["versions"]
    return dict(machine=several[-1]["machine"], versions=versions, rows=groups)


def _order_of_calls(item: tuple[str, Any]) -> tuple[int, int]:
    n_refs, _, written, _ = item[0].split()
    return ("all", "one", "none").index(written), int(n_refs)


def _order_of_kinds(item: tuple[str, Any]) -> tuple[int, int, str]:
    kind, n_refs, written = item[0].rsplit(", ", 2)
    return list(ROWS).index(kind), int(n_refs.split()[0]), written


def collect() -> None:
    """Joins the files that several processes made into one for each device."""
    of_device: dict[str, list[pathlib.Path]] = {}
    for path in sorted(RESULTS.glob("jax-*.json")):
        machine = json.loads(path.read_text())["machine"]
        name = f"jax-{machine['jax']}-{machine['device'].lower().replace(' ', '-')}"
        of_device.setdefault(name, []).append(path)
    for name, paths in of_device.items():
        joined = _joined(*(json.loads(path.read_text()) for path in paths))
        for path in paths:
            path.unlink()
        (RESULTS / f"{name}.json").write_text(json.dumps(joined, indent=2) + "\n")


def _key(results: dict[str, Any]) -> tuple[Any, ...]:
    machine = results["machine"]
    version = tuple(int(part) for part in machine["jax"].split(".")[:3])
    return machine["device"] == "CPU", version


def load() -> list[dict[str, Any]]:
    """What was saved: on a CPU first, and the newest JAX first."""
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


def kinds_table(rows: Rows) -> str:
    """A row for each kind, a column for each number of refs."""
    columns: dict[str, dict[str, float]] = {}
    for work, row in rows.items():
        kind, n_refs, written = work.rsplit(", ", 2)
        columns.setdefault(f"{n_refs}, {written}", {})[kind] = row[OURS]
    names = sorted(columns, key=lambda name: (int(name.split()[0]), name))
    kinds = dict.fromkeys(work.rsplit(", ", 2)[0] for work in rows)
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for kind in kinds:
        cells = [_number(x) if (x := columns[name].get(kind)) else "" for name in names]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
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
    if rows["kinds"]:
        found = sorted((row[OURS], work) for work, row in rows["kinds"].items())
        middle = _number(statistics.median(x for x, _ in found))
        most, which = found[-1]
        lines.append(
            f"By what is passed: {middle} in the middle, {_number(most)} at most ({which})."
        )
    documented = _documented(rows)
    if documented:
        ours = _range(row[OURS] for row in documented)
        lines.append(f"The documented training loop: {ours}; {_best_peer(documented)}.")
    if rows["steps"]:
        steps = list(rows["steps"].values())
        ours = _range(row[OURS] for row in steps)
        lines.append(f"A whole step: {ours}; {_best_peer(steps)}.")
    return "\n".join(f"- {line}" for line in lines)


def _documented(rows: dict[str, Rows]) -> list[dict[str, float]]:
    loops = rows["loops"].items()
    return [row for work, row in loops if work.startswith("the documented loop")]


def _best_peer(rows: list[dict[str, float]]) -> str:
    peers = _range(
        min(x for name, x in row.items() if name not in (BASE, AGAIN, OURS))
        for row in rows
    )
    return f"of the best of the peers: {peers}"


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
        found = [row[name] for row in rows if name in row]
        low, high = (
            f"{x:.1f}" if x < 10 else f"{x:.0f}" for x in (min(found), max(found))
        )
        times[name] = f"{low} to {high} times"
    return (
        f"a repeated call takes {times[OURS]} as long as `jax.jit` on a flat list of the same "
        f"10 to 1,000 arrays; `eqx.filter_jit` takes {times['eqx.filter_jit']}, and `nnx.jit` "
        f"{times['nnx.jit']}"
    )


_SENTENCE = re.compile(r"(?<=^What it costs: ).*?(?= \(\[Benchmarks\])", re.S | re.M)


def readme(text: str, everything: list[dict[str, Any]]) -> str:
    """The README, with the sentence of what was measured in it."""
    return _SENTENCE.sub(lambda _: in_short(everything), text)


def page(everything: list[dict[str, Any]]) -> str:
    parts = [_INTRODUCTION]
    for results in everything:
        about, rows = results["machine"], results["rows"]
        versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
        title = f"JAX {about['jax']}, {about['device']}"
        parts.append(
            f"## {title}\n\n{about['cores']} cores ({about['processor']}), "
            f"{about['system']}, Python {about['python']}; {versions}. In short:\n\n"
            f"{summary(rows)}\n"
        )
        for kind, its_rows in rows.items():
            if its_rows:
                parts.append(
                    f"### {_TITLES[kind]} ({title})\n\n{_NOTES[kind]}\n\n"
                    f"{(kinds_table if kind == 'kinds' else table)(its_rows)}\n"
                )
    return "\n".join(parts)


def write_page() -> None:
    collect()
    everything = load()
    PAGE.write_text(page(everything))
    README.write_text(_wrapped(readme(README.read_text(), everything)))
    _draw(everything[0])


def _wrapped(text: str) -> str:
    """With the lines of the paragraph of the sentence in their length."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(
        textwrap.fill(" ".join(x.split()), 120, break_on_hyphens=False)
        if x.startswith("What it costs: ")
        else x
        for x in paragraphs
    )


def _draw(results: dict[str, Any]) -> None:
    import matplotlib

    rows = results["rows"]["calls"]
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 4.2), sharey=True)
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
            # A marker of its own for each, where two lines are near.
            marker = MARKERS[len(panel.lines)]
            panel.plot(xs, ys, marker=marker, label=name, lw=width, ms=5)
        panel.set(xscale="log", yscale="log", title=f"{written} written", xlabel="refs")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time / time of jax.jit")
    machine = results["machine"]
    figure.suptitle(f"JAX {machine['jax']}, {machine['device']}", fontsize=10)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="lower center", ncols=len(names), fontsize=9)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})
    # Matplotlib ends lines with blanks, which editors and hooks take away.
    lines = PLOT.read_text().splitlines()
    PLOT.write_text("".join(line.rstrip() + "\n" for line in lines))
