"""The contenders: each holds the state of a problem in its own way.

`contender(problem)` is a function without arguments that makes one step and returns its
result. It is written as the documentation of each library would have it, with nothing
between the caller and the library's own compiled function.
"""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

import refx_eqx as rx

from ._problems import Layers, Problem


try:
    from flax import nnx
except ImportError:
    nnx: Any = None

Step = Callable[[], Any]
BASE = "jax.jit"
# The same once more: how far apart two are between which there is no difference.
AGAIN = "jax.jit again"
OURS = "rx.filter_jit"


def _class(base: type, names: tuple[str, ...], annotation: Any) -> Any:
    return type("Layer", (base,), {"__annotations__": dict.fromkeys(names, annotation)})


def modules(base: type, layers: Layers, annotation: Any) -> Any:
    """The layers as modules of dataclass fields, in a module."""
    classes: dict[tuple[str, ...], Any] = {}
    made = []
    for layer in layers:
        names = tuple(layer)
        if names not in classes:
            classes[names] = _class(base, names, annotation)
        made.append(classes[names](**layer))
    model = type("Model", (base,), {"__annotations__": {"layers": tuple}})
    return model(tuple(made))


def _jax_jit(problem: Problem) -> Step:
    """By hand: a flat list of arrays, rebound to what comes back."""
    layers = problem.make()
    places = [(i, name) for i, layer in enumerate(layers) for name in layer]
    flat = [layers[i][name] for i, name in places]
    written: list[int] = []

    @jax.jit
    def step(flat: list, x: jax.Array) -> tuple[jax.Array, list]:
        layers: Layers = [{} for _ in range(places[-1][0] + 1)]
        for (i, name), value in zip(places, flat):
            layers[i][name] = value
        out, updates = problem.work(layers, x)
        written[:] = [k for k, place in enumerate(places) if place in updates]
        return out, [updates[places[k]] for k in written]

    def run() -> Any:
        out, new = step(flat, problem.x)
        for k, value in zip(written, new):
            flat[k] = value
        return out

    return run


def _refx(problem: Problem) -> Step:
    model = modules(rx.Module, problem.make(), rx.Param[jax.Array])

    @rx.filter_jit
    def step(model: Any, x: jax.Array) -> jax.Array:
        layers = [
            {k: ref.value for k, ref in vars(layer).items()} for layer in model.layers
        ]
        out, updates = problem.work(layers, x)
        for (i, name), value in updates.items():
            getattr(model.layers[i], name).value = value
        return out

    return lambda: step(model, problem.x)


def _equinox(problem: Problem) -> Step:
    """The model comes back as a whole, if anything in it changes."""
    state = {"model": modules(eqx.Module, problem.make(), jax.Array)}
    changes: list[bool] = []

    @eqx.filter_jit
    def step(model: Any, x: jax.Array) -> Any:
        layers = [dict(vars(layer)) for layer in model.layers]
        out, updates = problem.work(layers, x)
        changes[:] = [bool(updates)]
        if not updates:
            return out
        for (i, name), value in updates.items():
            layers[i][name] = value
        new = tuple(type(old)(**layer) for old, layer in zip(model.layers, layers))
        return out, type(model)(new)

    def run() -> Any:
        result = step(state["model"], problem.x)
        if not changes[0]:
            return result
        out, state["model"] = result
        return out

    return run


def _jax_ref(problem: Problem) -> Step:
    layers = [{k: jax.new_ref(v) for k, v in layer.items()} for layer in problem.make()]

    @jax.jit
    def step(layers: list, x: jax.Array) -> jax.Array:
        values = [{k: ref[...] for k, ref in layer.items()} for layer in layers]
        out, updates = problem.work(values, x)
        for (i, name), value in updates.items():
            layers[i][name][...] = value
        return out

    return lambda: step(layers, problem.x)


def nnx_model(layers: Layers) -> Any:
    class Layer(nnx.Module):
        def __init__(self, arrays: dict):
            for name, value in arrays.items():
                setattr(self, name, nnx.Param(value))

    class Model(nnx.Module):
        def __init__(self, layers: Layers):
            self.layers = nnx.List([Layer(arrays) for arrays in layers])

    return Model(layers)


def _nnx_step(problem: Problem) -> Callable:
    names = [tuple(layer) for layer in problem.make()]

    def step(model: Any, x: jax.Array) -> jax.Array:
        layers = [
            {name: getattr(layer, name)[...] for name in its_names}
            for layer, its_names in zip(model.layers, names)
        ]
        out, updates = problem.work(layers, x)
        for (i, name), value in updates.items():
            getattr(model.layers[i], name)[...] = value
        return out

    return step


def _nnx_jit(problem: Problem) -> Step:
    model, step = nnx_model(problem.make()), nnx.jit(_nnx_step(problem))
    return lambda: step(model, problem.x)


def _nnx_tree_mode(problem: Problem) -> Step:
    step = nnx.jit(_nnx_step(problem), graph=False)
    model = nnx_model(problem.make())
    return lambda: step(model, problem.x)


def _nnx_cached(problem: Problem) -> Step:
    step = nnx.cached_partial(nnx.jit(_nnx_step(problem)), nnx_model(problem.make()))
    return lambda: step(problem.x)


def contenders() -> dict[str, Callable[[Problem], Step]]:
    """Those that are installed, by name."""
    found = {BASE: _jax_jit, OURS: _refx, "eqx.filter_jit": _equinox}
    if hasattr(jax, "new_ref"):
        found["jax.Ref"] = _jax_ref
    if nnx is None:
        return found
    if hasattr(nnx, "cached_partial"):
        found["nnx.cached_partial"] = _nnx_cached
    found["nnx.jit"] = _nnx_jit
    if "graph" in inspect.signature(nnx.jit).parameters:
        found["nnx.jit, tree mode"] = _nnx_tree_mode
    return found
