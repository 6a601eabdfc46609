"""What users pass to a compiled function: the rows of the table of argument kinds.

A row makes, of some refs, the arguments of a call: `(args, kwargs)`. The first argument, or
a keyword, has the refs; what is behind it is passed along. `step` is the function that is
compiled; it finds the refs wherever they are.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import refx_eqx as rx


Refs = list[rx.Ref]
Arguments = tuple[tuple, dict]


class Layer(rx.Module):
    weight: Any
    bias: Any


class Model(rx.Module):
    layers: tuple[Layer, ...]

    def write(self, written: str) -> jax.Array:
        return write(self, written)


class State(NamedTuple):
    model: Any
    other: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    model: Any
    name: str = dataclasses.field(metadata=dict(static=True))


class Batch(eqx.Module):
    x: Any
    name: str = eqx.field(static=True)


class Mode(enum.Enum):
    TRAIN = 1


@dataclasses.dataclass(frozen=True)
class Options:
    factor: float


def write(tree: Any, written: str) -> jax.Array:
    """Adds one to all refs, or to one of them."""
    refs = [x for x in jax.tree.leaves(tree) if isinstance(x, rx.Ref)]
    for ref in refs if written == "all" else refs[:1]:
        ref.value = new_value(ref.value)
    return jnp.zeros(())


def new_value(value: Any) -> Any:
    def new(x: Any) -> Any:
        if not eqx.is_array_like(x):
            return x
        is_key = eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.clone(x) if is_key else x + 1.0

    return jax.tree.map(new, value)


def step(written: str) -> Callable:
    def step(first: Any = None, *others: Any, **kwargs: Any) -> Any:
        if callable(first):
            return first(written)
        return write((first, kwargs), written)

    return step


def model(refs: Refs) -> Model:
    pairs = zip(refs[::2], refs[1::2], strict=True)
    return Model(tuple(Layer(weight, bias) for weight, bias in pairs))


def _closure(refs: Refs) -> Callable:
    return lambda written: write(refs, written)


def _with(make: Callable[[], Any]) -> Callable[[Refs], Arguments]:
    """A model, and something else."""
    return lambda refs: ((model(refs), make()), {})


# Made once: under leak checks, JAX 0.10 compiles again for each array.
ONE, KEY = jnp.ones(1), jax.random.key(0)
OPTIMIZER_LIKE = State(jnp.sin, jnp.cos)  # what `optax.adam` returns, but for its name

# How the refs come.
CARRIERS: dict[str, Callable[[Refs], Arguments]] = {
    "a module": lambda refs: ((model(refs),), {}),
    "a list": lambda refs: ((list(refs),), {}),
    "a tuple": lambda refs: ((tuple(refs),), {}),
    "a dict": lambda refs: (({f"{i:04}": ref for i, ref in enumerate(refs)},), {}),
    "refs alone": lambda refs: (tuple(refs[:1]), {"others": refs[1:]}),
    "a NamedTuple of refs": lambda refs: ((State(refs, refs[0]),), {}),
    "a NamedTuple of a module": lambda refs: ((State(model(refs), ONE),), {}),
    "a dataclass": lambda refs: ((Data(refs, "data"),), {}),
    "a nested tree": lambda refs: (({"m": [model(refs)], "n": (None, {})},), {}),
    "a keyword": lambda refs: ((), {"model": model(refs)}),
    "a partial": lambda refs: ((functools.partial(write, model(refs)),), {}),
    "a closure": lambda refs: ((_closure(refs),), {}),
    "a bound method": lambda refs: ((model(refs).write,), {}),
}

# What is passed next to a model.
COMPANIONS: dict[str, Callable[[Refs], Arguments]] = {
    "an array": _with(lambda: ONE),
    "a NumPy array": _with(lambda: np.ones(1, np.float32)),
    "a NumPy scalar": _with(lambda: np.float32(1.0)),
    "a key": _with(lambda: KEY),
    "a float": _with(lambda: 0.5),
    "a negative zero": _with(lambda: -0.0),
    "a NaN": _with(lambda: float("nan")),
    "a complex": _with(lambda: 1j),
    "an int": _with(lambda: 3),
    "a bool": _with(lambda: True),
    "a text": _with(lambda: "train"),
    "None": _with(lambda: None),
    "a dtype": _with(lambda: jnp.bfloat16),
    "a NumPy dtype": _with(lambda: np.dtype("float32")),
    "an enum": _with(lambda: Mode.TRAIN),
    "a type": _with(lambda: Batch),
    "a function": _with(lambda: jnp.sin),
    "a hashable object": _with(lambda: Options(0.5)),
    "a NamedTuple of functions": _with(lambda: OPTIMIZER_LIKE),
    "a new module of arrays": _with(lambda: Batch(ONE, "batch")),
    "a list of arrays": _with(lambda: [ONE, ONE]),
}


# What the refs hold, of arrays.
CONTENTS: dict[str, Callable[[jax.Array], Any]] = {
    "keys": lambda x: KEY,
    "numbers": lambda x: 1.0,
    "NumPy arrays": lambda x: np.asarray(x),
    "pytrees": lambda x: {"mean": x, "count": x},
    "pytrees with texts": lambda x: (x, "name"),
    "None": lambda x: None,
}


def refs_of(n: int, content: Callable[[jax.Array], Any] | None = None) -> Refs:
    values = [jnp.asarray(np.full(1, i, np.float32)) for i in range(n)]
    return [rx.Ref(x if content is None else content(x), "params") for x in values]


def refs_inside(arguments: Arguments) -> Refs:
    """The refs of a call, also those in a partial, a bound method or a closure."""
    first: Any = arguments[0][0] if arguments[0] else None
    inside: Any = arguments
    if isinstance(first, functools.partial):
        inside = first.args
    elif hasattr(first, "__self__"):
        inside = first.__self__
    elif getattr(first, "__closure__", None):
        inside = [cell.cell_contents for cell in first.__closure__]
    return [x for x in jax.tree.leaves(inside) if isinstance(x, rx.Ref)]


ROWS: dict[str, Callable[[int], Arguments]] = {
    **{
        name: lambda n, make=make: make(refs_of(n))
        for name, make in (CARRIERS | COMPANIONS).items()
    },
    **{
        f"refs that hold {name}": lambda n, content=content: CARRIERS["a module"](
            refs_of(n, content)
        )
        for name, content in CONTENTS.items()
    },
}
