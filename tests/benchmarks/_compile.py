"""What is not a repeated call: tracing, compilation, memory, and asynchronous dispatch."""

import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import refx_eqx as rx

from ._contenders import BASE, OURS
from ._harness import median_ratio
from ._problems import Layers, mlp, Problem, with_adam


def _deep(n_layers: int) -> Any:
    """A deep network, in plain Equinox."""
    keys = jr.split(jr.key(0), n_layers)
    return eqx.nn.Sequential(
        [eqx.nn.Linear(8, 8, key=keys[i]) for i in range(n_layers)]
    )


def _plain_loss(model: Any, x: jax.Array) -> jax.Array:
    for layer in model.layers:
        x = jnp.tanh(layer.weight @ x + layer.bias)
    return jnp.sum(x)


def _ref_loss(model: Any, x: jax.Array) -> jax.Array:
    for layer in model.layers:
        x = jnp.tanh(layer.weight.value @ x + layer.bias.value)
    return jnp.sum(x)


def _plain_step(model: Any, x: jax.Array) -> Any:
    value, grads = eqx.filter_value_and_grad(_plain_loss)(model, x)
    return value, eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads))


def _ref_step(model: Any, x: jax.Array) -> Any:
    value, grads = rx.filter_value_and_grad(_ref_loss)(model, x)
    pairs = zip(model.layers, grads.layers)
    for layer, grad in pairs:
        layer.weight.value -= 0.1 * grad.weight.value
        layer.bias.value -= 0.1 * grad.bias.value
    return value


def _lower_and_compile(jit: Callable, step: Callable, *args: Any) -> tuple[float, ...]:
    # A new function object, so that nothing is cached.
    fresh = lambda *args: step(*args)
    # Else the collector runs for the one and not for the other, by chance.
    gc.collect()
    start = time.process_time()
    lowered = jit(fresh).lower(*args)
    between = time.process_time()
    lowered.compile()
    return between - start, time.process_time() - between


def compilation(n_layers: int, rounds: int) -> dict[str, dict[str, float]]:
    """Tracing, and compiling, as multiples of what plain Equinox takes."""
    plain = _deep(n_layers)
    model, x = rx.as_refs(plain, "params"), jnp.ones(8)
    times: dict[str, list] = {"plain": [], "refs": []}
    runs = [
        lambda: ("plain", _lower_and_compile(eqx.filter_jit, _plain_step, plain, x)),
        lambda: ("refs", _lower_and_compile(rx.filter_jit, _ref_step, model, x)),
    ]
    gc.disable()
    try:
        for i in range(rounds + 1):
            for run in runs[:: 1 if i % 2 else -1]:
                name, taken = run()
                if i > 0:  # the first warms up
                    times[name].append(taken)
    finally:
        gc.enable()

    def ratio(kind: int) -> dict[str, float]:
        ours, theirs = ([t[kind] for t in times[k]] for k in ("refs", "plain"))
        return {"eqx.filter_jit": 1.0, OURS: median_ratio(ours, theirs)}

    return {
        f"tracing, {n_layers} layers": ratio(0),
        f"compiling, {n_layers} layers": ratio(1),
    }


def imports(rounds: int) -> dict[str, dict[str, float]]:
    """Importing, in a new process each time; JAX included."""
    times: dict[str, list[float]] = {"equinox": [], "refx_eqx": []}
    # What is compiled is kept, whatever the environment says; for both alike.
    env = {k: x for k, x in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        env["PYTHONPYCACHEPREFIX"] = folder
        for i in range(rounds + 1):
            for name in times:
                code = (
                    "import time; start = time.process_time(); "
                    f"import {name}; print(time.process_time() - start)"
                )
                out = subprocess.run(
                    [sys.executable, "-c", code],
                    check=True,
                    capture_output=True,
                    text=True,
                    env=env,
                )
                if i > 0:  # the first compiles
                    times[name].append(float(out.stdout))
    base = statistics.median(times["equinox"])
    row = {name: statistics.median(taken) / base for name, taken in times.items()}
    return {"importing": {"eqx.filter_jit": row["equinox"], OURS: row["refx_eqx"]}}


def _bytes(compiled: Any) -> int:
    stats = compiled.memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )


def memory(problem: Problem | None = None) -> dict[str, dict[str, float]]:
    """The peak memory of a training step with Adam, as the compiler plans it."""
    problem = with_adam(mlp()) if problem is None else problem
    layers = problem.make()
    places = [(i, name) for i, layer in enumerate(layers) for name in layer]

    def by_hand(layers: Layers, x: jax.Array) -> tuple[jax.Array, Layers]:
        out, updates = problem.work(layers, x)
        new: Layers = [{} for _ in layers]
        for i, name in places:
            new[i][name] = updates[i, name]
        return out, new

    def by_reference(model: list, x: jax.Array) -> jax.Array:
        values = [{k: ref.value for k, ref in layer.items()} for layer in model]
        out, updates = problem.work(values, x)
        for (i, name), value in updates.items():
            model[i][name].value = value
        return out

    def refs(donate: Any) -> int:
        model = rx.as_refs(layers)
        jitted: Any = rx.filter_jit(by_reference, donate=donate)
        return _bytes(jitted.lower(model, problem.x).compile())

    donated = jax.jit(by_hand, donate_argnums=0).lower(layers, problem.x).compile()
    base = _bytes(donated)
    kept = jax.jit(by_hand).lower(layers, problem.x).compile()
    return {
        "memory, donated": {BASE: 1.0, OURS: refs("refs") / base},
        "memory, not donated": {BASE: _bytes(kept) / base, OURS: refs("none") / base},
    }


def _slow(x: jax.Array, n: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x) * 0.1, x)


def share_inside(target: float, rounds: int) -> dict[str, dict[str, float]]:
    """The part of a computation of `target` seconds that is spent inside the call."""
    size = (512, 512)
    ref = rx.Ref(jnp.full(size, 0.01))
    n = jnp.int32(4)

    @rx.filter_jit
    def by_reference(ref: Any, n: jax.Array) -> jax.Array:
        ref.value = _slow(ref.value, n)
        return ref.value

    plain = eqx.filter_jit(_slow)
    by_hand = jax.jit(_slow)
    x = jnp.full(size, 0.01)
    runs = {
        BASE: lambda n: by_hand(x, n),
        OURS: lambda n: by_reference(ref, n),
        "eqx.filter_jit": lambda n: plain(x, n),
    }

    def time_one(run: Callable) -> tuple[float, float]:
        start = time.perf_counter()
        out = run(n)
        inside = time.perf_counter() - start
        jax.block_until_ready(out)
        return inside, time.perf_counter() - start

    for run in runs.values():
        time_one(run)
    n = jnp.int32(max(4, int(4 * target / time_one(runs[BASE])[1])))
    shares: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            inside, total = time_one(run)
            shares[name].append(inside / total)
    row = {name: sorted(found)[len(found) // 2] for name, found in shares.items()}
    return {"share of the time inside the call": row}
