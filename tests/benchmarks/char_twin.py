"""The character transformer of the examples, and its twin in plain Equinox.

    python -m tests.benchmarks.char_twin --steps 2000

The twin has the same layers, without refs: the embedding is one array that is used twice, a
key is threaded to each dropout, and model and optimizer go in and out of a step. It starts
with the same numbers, is given the same texts, and draws the same masks. So the losses are
the same, to the last bit. The steps of both are run in turns, and their times compared.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array

import refx_eqx as rx
from refx_eqx._engine._rng_split import fold_in


sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import char_transformer as example  # type: ignore


class TwinBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    feed_forward: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, dim: int, heads: int, dropout: float, *, key: Array):
        key1, key2 = jr.split(key)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(dim), eqx.nn.LayerNorm(dim)
        self.attention = eqx.nn.MultiheadAttention(heads, dim, key=key1)
        self.feed_forward = eqx.nn.MLP(dim, dim, 4 * dim, 1, jax.nn.gelu, key=key2)
        self.dropout = eqx.nn.Dropout(dropout)

    def __call__(self, x: Array, keys: Any) -> Array:
        causal = jnp.tril(jnp.ones((len(x), len(x)), bool))
        y = jax.vmap(self.norm1)(x)
        x = x + self.dropout(self.attention(y, y, y, causal), key=keys[0])
        y = jax.vmap(self.norm2)(x)
        return x + self.dropout(jax.vmap(self.feed_forward)(y), key=keys[1])


class Twin(eqx.Module):
    embed: Array
    positions: Array
    blocks: list[TwinBlock]
    norm: eqx.nn.LayerNorm

    def __init__(
        self, dim: int, depth: int, heads: int, context: int, dropout: float, key: Array
    ):
        keys = jr.split(key, depth)
        self.embed = jnp.zeros((len(example.CHARACTERS), dim))
        self.positions = jnp.zeros((context, dim))
        self.blocks = [TwinBlock(dim, heads, dropout, key=key) for key in keys]
        self.norm = eqx.nn.LayerNorm(dim)

    def __call__(self, tokens: Array, key: Any, count: Any) -> Array:
        """`count` is the number of the first key to be drawn: each dropout needs one."""
        x = self.embed[tokens] + self.positions[: len(tokens)]
        for i, block in enumerate(self.blocks):
            numbers = (2 * i, 2 * i + 1)
            keys = [
                None if key is None else jr.fold_in(key, count + n) for n in numbers
            ]
            x = block(x, keys)
        return jax.vmap(self.norm)(x) @ self.embed.T


def twin_of(model: example.Transformer, dropout: float) -> Twin:
    """A twin with the numbers of the model."""
    context, dim = model.positions.shape
    heads = model.blocks[0].attention.num_heads
    twin = Twin(dim, len(model.blocks), heads, context, dropout, jr.key(0))
    # The fields have the same names. A copy, because the refs are donated.
    state = rx.state_dict(rx.clone(model), "params")

    def value_at(path: Any, leaf: Any) -> Any:
        return state[jtu.keystr(path, simple=True, separator=".")]

    arrays, rest = eqx.partition(twin, eqx.is_array)
    return eqx.combine(jtu.tree_map_with_path(value_at, arrays), rest)


def twin_loss(twin: Twin, batch: Array, keys: Any, count: Any) -> Array:
    logits = jax.vmap(twin, in_axes=(0, None if keys is None else 0, None))(
        batch[:, :-1], keys, count
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return jnp.mean(losses)


@eqx.filter_jit
def evaluate_twin(twin: Twin, batch: Array) -> Array:
    return twin_loss(eqx.nn.inference_mode(twin), batch, None, None)


def by_name(twin: Any) -> dict[str, Array]:
    """The arrays of a twin as Optax is given those of the model, so that it takes them in the
    same order: a global norm is a sum over them."""
    pairs = jtu.tree_leaves_with_path(eqx.filter(twin, eqx.is_inexact_array))
    return {jtu.keystr(path, simple=True, separator="."): x for path, x in pairs}


def twin_step(tx: optax.GradientTransformation) -> Callable:
    @eqx.filter_jit(donate="all-except-first")
    def step(given: Any, twin: Twin, opt_state: Any, count: Array) -> Any:
        batch, key = given
        places = jnp.arange(len(batch))
        keys = jax.vmap(fold_in, in_axes=(None, 0))(key, places)
        loss, grads = eqx.filter_value_and_grad(twin_loss)(twin, batch, keys, count)
        updates: Any
        updates, opt_state = tx.update(by_name(grads), opt_state, by_name(twin))
        leaves = [updates[name] for name in by_name(grads)]
        twin = eqx.apply_updates(twin, jtu.tree_structure(grads).unflatten(leaves))
        return loss, twin, opt_state, count + 2 * len(twin.blocks)

    return step


class Run(NamedTuple):
    """Of both, `[..., 0]` ours and `[..., 1]` the twin."""

    losses: np.ndarray
    seconds: np.ndarray
    held_out: tuple[float, float]


def run(
    steps: int,
    *,
    batch_size: int = 8,
    context: int = 128,
    dim: int = 96,
    depth: int = 2,
    heads: int = 4,
    dropout: float = 0.05,
    characters: int = 2_000_000,
    seed: int = 0,
) -> Run:
    """Trains both in turns, with the arguments of the example."""
    data = example.load_data(characters)
    batches = data.batches("train", batch_size, context + 1, seed)
    held_out = jnp.asarray(
        next(data.batches("validation", 8 * batch_size, context + 1, 0))
    )
    key = jr.key(seed)
    model = example.Transformer(dim, depth, heads, context, dropout, key=key)
    twin = twin_of(model, dropout)

    decayed = rx.param_mask(model, lambda ref: rx.is_ref(ref) and ref.ndim > 1)
    optimizer = rx.Optimizer(model, example.optimizer_of(steps, decayed))
    is_decayed = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    tx = example.optimizer_of(steps, is_decayed)
    stream = model.rngs.dropout
    state = [twin, tx.init(by_name(twin)), stream.count.value]
    state = jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, state)
    step, draw = twin_step(tx), jnp.copy(stream.key.value)

    def ours(batch: Array) -> Array:
        return example.train_step(model, optimizer, batch)

    def theirs(batch: Array) -> Array:
        loss, *state[:] = step((batch, draw), *state)
        return loss

    losses, seconds = np.zeros((steps, 2)), np.zeros((steps, 2))
    for i in range(steps):
        batch = jnp.asarray(next(batches))
        order = ((0, ours), (1, theirs)) if i % 2 else ((1, theirs), (0, ours))
        for which, one in order:
            start = time.perf_counter()
            losses[i, which] = one(batch)  # waits for the number
            seconds[i, which] = time.perf_counter() - start
    held = example.evaluate(model, held_out), evaluate_twin(state[0], held_out)
    return Run(losses, seconds, (float(held[0]), float(held[1])))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.char_twin")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    done = run(options.steps, seed=options.seed)
    apart = np.abs(done.losses[:, 0] - done.losses[:, 1])
    half = options.steps // 2
    fastest, middle = done.seconds.min(axis=0), np.median(done.seconds[half:], axis=0)
    for n in (1, 10, 100, options.steps):
        print(f"losses of the first {n} steps differ by at most {apart[:n].max():.1e}")
    print("held-out loss: refx_eqx {:.4f}, Equinox {:.4f}".format(*done.held_out))
    print("fastest step, ms: refx_eqx {:.2f}, Equinox {:.2f}".format(*1e3 * fastest))
    print("median step, ms: refx_eqx {:.2f}, Equinox {:.2f}".format(*1e3 * middle))


if __name__ == "__main__":
    main()
