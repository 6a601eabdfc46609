"""Loops as users write them: a decode loop with donated caches, the documented training loop,
a function that is made again at each step, and the first call. With every library that has
the thing."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import refx_eqx as rx

from . import _contenders, _problems
from ._contenders import BASE, modules, nnx, nnx_model, OURS, Step
from ._harness import Clock, ratios
from ._problems import Layers, Training


_LIMIT = 15.0
_CACHES = ("keys", "values", "position")
Row = dict[str, float]


def decode_loop(rounds: int, block: float, clock: Clock) -> Row:
    """A token: the caches are written and donated, the parameters only read."""
    problem = _problems.decode()

    def split(layers: Layers) -> tuple[Layers, Layers]:
        caches = [{k: x for k, x in p.items() if k in _CACHES} for p in layers]
        rest = [{k: x for k, x in p.items() if k not in _CACHES} for p in layers]
        return caches, rest

    def step(caches: Layers, rest: Layers, x: jax.Array) -> tuple[Any, Layers]:
        layers = [{**a, **b} for a, b in zip(caches, rest)]
        out, updates = problem.work(layers, x)
        caches = [dict(cache) for cache in caches]
        for (i, name), value in updates.items():
            caches[i][name] = value
        return out, caches

    def by_hand() -> Step:
        caches, rest = split(problem.make())
        compiled = jax.jit(step, donate_argnums=0)

        def run() -> Any:
            nonlocal caches
            out, caches = compiled(caches, rest, problem.x)
            return out

        return run

    def equinox() -> Step:
        caches, rest = split(problem.make())

        @eqx.filter_jit(donate="all-except-first")
        def compiled(kept: Any, caches: Layers) -> Any:
            return step(caches, *kept)

        def run() -> Any:
            nonlocal caches
            out, caches = compiled((rest, problem.x), caches)
            return out

        return run

    def by_reference(model: Any, arrays_of: Callable) -> Step:
        @rx.filter_jit(donate="refs")
        def step(model: Any, x: jax.Array) -> Any:
            layers = arrays_of(model)
            out, updates = problem.work(
                [{k: ref.value for k, ref in layer.items()} for layer in layers], x
            )
            for (i, name), value in updates.items():
                layers[i][name].value = value
            return out

        return lambda: step(model, problem.x)

    in_modules = modules(rx.Module, problem.make(), rx.Param[jax.Array])
    in_dicts = rx.as_refs(problem.make())
    runs = {
        BASE: by_hand(),
        OURS: by_reference(in_modules, lambda model: list(map(vars, model.layers))),
        f"{OURS}, refs in a list of dicts": by_reference(in_dicts, lambda model: model),
        "eqx.filter_jit": equinox(),
    }
    runs |= {
        name: make(problem)
        for name, make in _contenders.contenders().items()
        if name not in runs
    }
    return ratios(runs, rounds, block, _LIMIT, clock)


def training_loop(training: Training, rounds: int, block: float, clock: Clock) -> Row:
    """A step with Adam of Optax: by hand on flat arrays, and as the docs of each library
    write it."""
    import optax

    tx, x = optax.adam(1e-3), training.x
    loss = training.loss

    def by_hand() -> Step:
        flat, treedef = jax.tree.flatten(training.params())
        state = tx.init(flat)

        def step(flat: list, state: Any, x: jax.Array) -> Any:
            of_flat = lambda flat: loss(treedef.unflatten(flat), x)
            value, grads = jax.value_and_grad(of_flat)(flat)
            updates, state = tx.update(grads, state)
            return value, optax.apply_updates(flat, updates), state

        compiled = jax.jit(step, donate_argnums=(0, 1))

        def run() -> Any:
            nonlocal flat, state
            value, flat, state = compiled(flat, state, x)
            return value

        return run

    def by_reference() -> Step:
        model = modules(rx.Module, training.params(), rx.Param[jax.Array])
        optimizer = rx.Optimizer(model, tx)

        @rx.filter_jit(donate="refs")
        def step(model: Any, optimizer: Any, x: jax.Array) -> Any:
            def of_model(model: Any) -> jax.Array:
                layers = [
                    {k: ref.value for k, ref in vars(layer).items()}
                    for layer in model.layers
                ]
                return loss(layers, x)

            value, grads = rx.filter_value_and_grad(of_model)(model)
            optimizer.update(model, grads)
            return value

        return lambda: step(model, optimizer, x)

    def equinox() -> Step:
        model = modules(eqx.Module, training.params(), jax.Array)
        state = tx.init(eqx.filter(model, eqx.is_inexact_array))

        @eqx.filter_jit(donate="all-except-first")
        def step(x: jax.Array, model: Any, state: Any) -> Any:
            of_model = lambda model: loss(list(map(vars, model.layers)), x)
            value, grads = eqx.filter_value_and_grad(of_model)(model)
            updates, state = tx.update(grads, state)
            return value, eqx.apply_updates(model, updates), state

        def run() -> Any:
            nonlocal model, state
            value, model, state = step(x, model, state)
            return value

        return run

    def of_nnx(jit: Callable, cached: bool = False) -> Step:
        model = nnx_model(training.params())
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        names = [tuple(layer) for layer in training.params()]

        def step(model: Any, optimizer: Any, x: jax.Array) -> Any:
            def of_model(model: Any) -> jax.Array:
                layers = [
                    {name: getattr(layer, name)[...] for name in its_names}
                    for layer, its_names in zip(model.layers, names)
                ]
                return loss(layers, x)

            value, grads = nnx.value_and_grad(of_model)(model)
            optimizer.update(model, grads)
            return value

        compiled = jit(step)
        if cached:
            compiled = nnx.cached_partial(compiled, model, optimizer)
            return lambda: compiled(x)
        return lambda: compiled(model, optimizer, x)

    runs = {BASE: by_hand(), OURS: by_reference(), "eqx.filter_jit": equinox()}
    if nnx is not None:
        runs["nnx.cached_partial"] = of_nnx(nnx.jit, cached=True)
        runs["nnx.jit"] = of_nnx(nnx.jit)
    return ratios(runs, rounds, block, _LIMIT, clock)


def new_lambda(rounds: int, block: float, clock: Clock) -> Row:
    """An eager gradient of a loss that is made again at each step."""
    training = _problems.mlp()
    x, params = training.x, training.params()
    plain = modules(eqx.Module, params, jax.Array)
    model = modules(rx.Module, params, rx.Param[jax.Array])

    def of_refs(model: Any) -> jax.Array:
        return training.loss(
            [
                {k: ref.value for k, ref in vars(layer).items()}
                for layer in model.layers
            ],
            x,
        )

    of_plain = lambda model: training.loss(list(map(vars, model.layers)), x)
    runs: dict[str, Callable[[], Any]] = {
        "eqx.filter_grad": lambda: eqx.filter_grad(lambda m: of_plain(m))(plain),
        "rx.filter_grad": lambda: rx.filter_grad(lambda m: of_refs(m))(model),
        "jax.grad": lambda: jax.grad(lambda p: training.loss(p, x))(params),
    }
    if nnx is not None:
        theirs, names = nnx_model(params), [tuple(layer) for layer in params]

        def of_nnx(model: Any) -> jax.Array:
            return training.loss(
                [
                    {name: getattr(layer, name)[...] for name in its_names}
                    for layer, its_names in zip(model.layers, names)
                ],
                x,
            )

        runs["nnx.grad"] = lambda: nnx.grad(lambda m: of_nnx(m))(theirs)
    return ratios(_leaves_of(runs), rounds, block, _LIMIT, clock)


def new_scan(rounds: int, block: float, clock: Clock) -> Row:
    """An eager scan whose body is made again at each step: it is traced and compiled."""
    weights, x = [jnp.eye(8) for _ in range(4)], jnp.ones(8)
    refs = [rx.Ref(w, "params") for w in weights]

    def body(weights: list, carry: jax.Array) -> tuple[jax.Array, None]:
        for w in weights:
            carry = jnp.tanh(w @ carry)
        return carry, None

    runs: dict[str, Callable[[], Any]] = {
        "jax.lax.scan": lambda: jax.lax.scan(
            lambda c, _: body(weights, c), x, None, length=4
        ),
        "rx.scan": lambda: rx.scan(
            lambda c, _: body([ref.value for ref in refs], c), x, None, length=4
        ),
    }
    return ratios(_leaves_of(runs), rounds, block, _LIMIT, clock)


def _leaves_of(runs: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    return {k: lambda run=run: jax.tree.leaves(run()) for k, run in runs.items()}


def first_call(n_layers: int, rounds: int) -> Row:
    """Tracing, compiling and running a transformer for the first time."""
    training = _problems.transformer(n_layers)
    x, params = training.x, training.params()
    plain = modules(eqx.Module, params, jax.Array)
    model = modules(rx.Module, params, rx.Param[jax.Array])

    def of_refs(model: Any) -> jax.Array:
        layers = [
            {k: ref.value for k, ref in vars(layer).items()} for layer in model.layers
        ]
        return training.loss(layers, x)

    of_plain = lambda model: training.loss(list(map(vars, model.layers)), x)
    runs = {
        "eqx.filter_jit": lambda: eqx.filter_jit(
            lambda m: eqx.filter_value_and_grad(of_plain)(m)
        )(plain),
        OURS: lambda: rx.filter_jit(lambda m: rx.filter_value_and_grad(of_refs)(m))(
            model
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            start = time.process_time()
            jax.block_until_ready(jax.tree.leaves(runs[name]()))
            if i > 0:  # the first warms up
                times[name].append(time.process_time() - start)
    base = statistics.median(times["eqx.filter_jit"])
    return {name: statistics.median(taken) / base for name, taken in times.items()}


def rows(rounds: int, block: float, clock: Clock) -> dict[str, Callable[[], Row]]:
    found: dict[str, Callable[[], Row]] = {
        "a decode loop, caches donated": lambda: decode_loop(rounds, block, clock)
    }
    for make in (_problems.mlp, _problems.conv, _problems.transformer):
        training = make()
        found[f"the documented loop, {training.name}"] = lambda training=training: (
            training_loop(training, rounds, block, clock)
        )
    return found | {
        "a gradient of a new lambda": lambda: new_lambda(rounds // 2, block, clock),
        "a scan of a new lambda": lambda: new_scan(rounds // 4, block, clock),
        "a first call, 12 layers": lambda: first_call(12, max(1, rounds // 8)),
    }
