"""A training step of the size of GPT-2, with Adam: `python -m tests.benchmarks.bench_gpt`.

Written by hand for `jax.jit`, by reference with `rx.Optimizer`, and for `eqx.filter_jit`; in one
run. Made for an accelerator: on a CPU a step takes minutes, so `--small` is for trying it out.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import refx_eqx as rx

from ._contenders import BASE, OURS
from ._harness import ratios


def make_params(layers: int, d: int, vocabulary: int, length: int) -> Any:
    keys = iter(jr.split(jr.key(0), 4 * layers + 2))
    normal = lambda *shape: 0.02 * jr.normal(next(keys), shape)
    block = lambda: {
        "norm_1": jnp.ones(d),
        "qkv": normal(d, 3 * d),
        "out": normal(d, d),
        "norm_2": jnp.ones(d),
        "up": normal(d, 4 * d),
        "up_bias": jnp.zeros(4 * d),
        "down": normal(4 * d, d),
        "down_bias": jnp.zeros(d),
    }
    return {
        "embedding": normal(vocabulary, d),
        "positions": normal(length, d),
        "blocks": [block() for _ in range(layers)],
        "norm": jnp.ones(d),
    }


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def loss(params: Any, tokens: jax.Array, heads: int) -> jax.Array:
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    x = p["embedding"][tokens[:, :-1]]
    x = x + p["positions"][: x.shape[1]]
    for b in p["blocks"]:
        q, k, v = jnp.split(_norm(x, b["norm_1"]) @ b["qkv"], 3, -1)
        split = lambda y: y.reshape(*y.shape[:2], heads, -1)
        y = jax.nn.dot_product_attention(split(q), split(k), split(v), is_causal=True)
        x = x + y.reshape(x.shape) @ b["out"]
        y = jax.nn.gelu(_norm(x, b["norm_2"]) @ b["up"] + b["up_bias"])
        x = x + y @ b["down"] + b["down_bias"]
    logits = (_norm(x, p["norm"]) @ p["embedding"].T).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def contenders(params: Any, tokens: jax.Array, heads: int) -> dict[str, Callable]:
    tx = optax.adamw(1e-4)
    of = functools.partial(loss, heads=heads)
    copied = lambda: jax.tree.map(jnp.copy, params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def by_hand(params: Any, state: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(of)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    hand = [copied()]
    hand.append(tx.init(hand[0]))

    def run_hand() -> Any:
        value, *hand[:] = by_hand(*hand, tokens)
        return value

    model = rx.as_refs(copied(), "params")
    opt = rx.Optimizer(model, tx)

    @rx.filter_jit(donate="refs")
    def by_reference(model: Any, opt: Any, tokens: jax.Array) -> jax.Array:
        value, grads = rx.filter_value_and_grad(
            lambda model: of(rx.snapshot(model), tokens)
        )(model)
        opt.update(model, grads)
        return value

    @eqx.filter_jit(donate="all")
    def equinox(both: Any) -> Any:
        params, state = both
        value, grads = eqx.filter_value_and_grad(of)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return value, (eqx.apply_updates(params, updates), state)

    theirs = [(copied(), tx.init(params))]

    def run_equinox() -> Any:
        value, theirs[0] = equinox(theirs[0])
        return value

    return {
        BASE: run_hand,
        OURS: lambda: by_reference(model, opt, tokens),
        "eqx.filter_jit": run_equinox,
    }


def rows(small: bool = False, rounds: int = 12) -> dict[str, dict[str, float]]:
    layers, d, vocabulary, length, batch, heads = (
        (2, 32, 64, 16, 2, 2) if small else (12, 768, 50304, 512, 8, 12)
    )
    params = make_params(layers, d, vocabulary, length)
    tokens = jr.randint(jr.key(1), (batch, length + 1), 0, vocabulary)
    # The time of the wall: the processor waits while the accelerator works.
    runs = contenders(params, tokens, heads)
    found = ratios(runs, rounds, 1.0, 40.0, time.perf_counter)
    return {"a training step of the size of GPT-2": found}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_gpt")
    parser.add_argument("--small", action="store_true", help="a model that fits a CPU")
    print(jax.devices()[0].device_kind, rows(parser.parse_args().small))


if __name__ == "__main__":
    main()
