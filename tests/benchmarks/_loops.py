"""Loops as users write them: a decode loop with donated caches, the documented training
loop, a loss that is a new lambda at each step, and the first call."""

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import refx_eqx as rx

from ._contenders import BASE, OURS
from ._harness import ratios
from ._problems import decode, Layers


_LIMIT = 15.0
Row = dict[str, float]


def decode_loop(rounds: int, block: float) -> Row:
    """A token: the caches are written and donated, the parameters only read."""
    problem = decode()

    def split(layers: Layers) -> tuple[Layers, Layers]:
        caches = [
            {k: x for k, x in layer.items() if k in ("keys", "values", "position")}
            for layer in layers
        ]
        rest = [
            {k: x for k, x in layer.items() if k not in cache}
            for layer, cache in zip(layers, caches)
        ]
        return caches, rest

    def by_hand() -> Callable[[], Any]:
        caches, rest = split(problem.make())

        def step(caches: Layers, rest: Layers, x: jax.Array) -> tuple[Any, Layers]:
            layers = [{**a, **b} for a, b in zip(caches, rest)]
            out, updates = problem.work(layers, x)
            for (i, name), value in updates.items():
                caches[i][name] = value
            return out, caches

        compiled = jax.jit(step, donate_argnums=0)

        def run() -> Any:
            nonlocal caches
            out, caches = compiled(caches, rest, problem.x)
            return out

        return run

    def by_reference() -> Callable[[], Any]:
        layers = rx.as_refs(problem.make())

        @rx.filter_jit(donate="refs")
        def step(layers: Any, x: jax.Array) -> Any:
            values = [{k: ref.value for k, ref in layer.items()} for layer in layers]
            out, updates = problem.work(values, x)
            for (i, name), value in updates.items():
                layers[i][name].value = value
            return out

        return lambda: step(layers, problem.x)

    return ratios({BASE: by_hand(), OURS: by_reference()}, rounds, block, _LIMIT)


def _mlp() -> Any:
    return eqx.nn.MLP(16, "scalar", 32, 3, key=jr.key(0))


def _loss(model: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jax.vmap(model)(x) ** 2)


def training_loop(rounds: int, block: float) -> Row:
    """A step with Optax: by hand on flat arrays, and as the docs write it."""
    import optax

    transform, x = optax.adam(1e-3), jr.normal(jr.key(1), (8, 16))

    def by_hand() -> Callable[[], Any]:
        params, static = eqx.partition(_mlp(), eqx.is_inexact_array)
        flat, treedef = jax.tree.flatten(params)
        state = transform.init(flat)

        @jax.jit
        def step(flat: list, state: Any, x: jax.Array) -> Any:
            def loss(flat: list) -> jax.Array:
                return _loss(eqx.combine(treedef.unflatten(flat), static), x)

            value, grads = jax.value_and_grad(loss)(flat)
            updates, state = transform.update(grads, state)
            return value, optax.apply_updates(flat, updates), state

        def run() -> Any:
            nonlocal flat, state
            value, flat, state = step(flat, state, x)
            return value

        return run

    def by_reference() -> Callable[[], Any]:
        model = rx.as_refs(_mlp(), "params", eqx.is_inexact_array)
        optimizer = rx.Optimizer(model, transform, wrt="params")

        @rx.filter_jit
        def step(model: Any, optimizer: Any, x: jax.Array) -> Any:
            loss = lambda model: _loss(rx.snapshot(model), x)
            value, grads = rx.filter_value_and_grad(loss, wrt="params")(model)
            optimizer.update(model, grads)
            return value

        return lambda: step(model, optimizer, x)

    return ratios({BASE: by_hand(), OURS: by_reference()}, rounds, block, _LIMIT)


def fresh_lambda(rounds: int, block: float) -> Row:
    """An eager gradient of a loss that is made again at each step."""
    x = jr.normal(jr.key(1), (8, 16))
    plain = _mlp()
    model = rx.as_refs(plain, "params", eqx.is_inexact_array)
    runs = {
        "eqx.filter_grad": lambda: eqx.filter_grad(lambda m: _loss(m, x))(plain),
        OURS: lambda: rx.filter_grad(lambda m: _loss(rx.snapshot(m), x))(model),
    }
    return ratios(
        {k: lambda run=run: jax.tree.leaves(run()) for k, run in runs.items()},
        rounds,
        block,
        _LIMIT,
    )


def first_call(rounds: int) -> Row:
    """Tracing, compiling and running for the first time."""
    x = jr.normal(jr.key(1), (8, 16))
    plain = _mlp()
    model = rx.as_refs(plain, "params", eqx.is_inexact_array)
    runs = {
        "eqx.filter_jit": lambda: eqx.filter_jit(lambda m: _loss(m, x))(plain),
        OURS: lambda: rx.filter_jit(lambda m: _loss(rx.snapshot(m), x))(model),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            jax.block_until_ready(run())
            if i > 0:
                times[name].append(time.process_time() - start)
    base = sorted(times["eqx.filter_jit"])[rounds // 2]
    return {name: sorted(taken)[rounds // 2] / base for name, taken in times.items()}


def run_all(rounds: int, block: float) -> dict[str, Callable[[], Row]]:
    return {
        "a decode loop, caches donated": lambda: decode_loop(rounds, block),
        "the documented training loop": lambda: training_loop(rounds, block),
        "a gradient of a new lambda": lambda: fresh_lambda(rounds // 2, block),
        "a first call": lambda: first_call(5),
    }
