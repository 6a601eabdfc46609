"""What both interpretations have in common: expressions, and statements but for transforms."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from .program import (
    Apply,
    Block,
    Checked,
    Const,
    Count,
    Draw,
    Expr,
    Fit,
    Let,
    Mix,
    Name,
    New,
    Product,
    Retype,
    SetPart,
    Sin,
    Stack,
    Statement,
    Swap,
    Tie,
    Write,
    WriteIfSame,
)


Env = dict[str, Any]

LANES = 3

# So precise that rounding, which is another in each interpretation, never shows.
FLOAT = jnp.float64


def is_typed_key(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def is_key(x: Any) -> bool:
    return is_typed_key(x) or x.dtype == jnp.uint32


def raw(x: Any) -> Any:
    """The numbers of a key."""
    return jr.key_data(x) if is_typed_key(x) else x


def keys_like(x: Any, keys: Any) -> Any:
    """These keys, typed if `x` is."""
    return keys if is_typed_key(x) else jr.key_data(keys)


def typed(x: Any) -> Any:
    return x if is_typed_key(x) else jr.wrap_key_data(x)


def number(x: jax.Array) -> jax.Array:
    """As an array of the one floating-point type."""
    if x.dtype == FLOAT:
        return x.astype(FLOAT)  # not weakly typed
    if jnp.issubdtype(x.dtype, jnp.floating):
        # Its derivative would be rounded, in another way in each interpretation.
        return jax.lax.stop_gradient(x.astype(FLOAT))
    if is_key(x):
        x = raw(x) % 7
    return 0.1 * x.astype(FLOAT)


def fit(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    x = number(x)
    return x if x.shape == shape else jnp.broadcast_to(jnp.mean(x), shape)


def retyped(x: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    if dtype == "weak":
        return jnp.asarray(0.375)
    x = fit(x, shape)
    # Far from where rounding to an integer makes a difference.
    return (97.3 * x + 0.41).astype(jnp.int32) if dtype == "int32" else x.astype(dtype)


def logged(log: jax.Array, cotangents: Sequence[jax.Array]) -> jax.Array:
    """What a backward rule makes of a log. The order of the rules makes a difference; a
    cotangent of zero makes none, as the rule need not run for it."""
    return log + sum((jnp.sum(x) for x in cotangents), 0.0) * jnp.cos(log)


def flat(arrays: Sequence[jax.Array]) -> jax.Array:
    """All of these in one vector."""
    parts = [jnp.ravel(number(x)) for x in arrays]
    return jnp.concatenate(parts) if parts else jnp.zeros(0, FLOAT)


def test(x: jax.Array, threshold: float) -> jax.Array:
    return jnp.sum(number(x)) > threshold


def choice(x: jax.Array, n: int) -> jax.Array:
    """One of the numbers below `n`."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.sum(x) % n
    return sum((test(x, t).astype(jnp.int32) for t in (-0.3, 0.4)), jnp.int32(0)) % n


def seed_vector(x: jax.Array, k: int) -> jax.Array:
    """A tangent or cotangent."""
    return jnp.full_like(x, 0.7 + 0.2 * k)


class Bag(eqx.Module):
    """A module that holds things."""

    first: Any
    others: Any


def pack(items: Sequence[Any], style: str) -> Any:
    """Refs, in a tree. JAX's order of the tree is theirs."""
    items = list(items)
    if style == "dict":
        return {f"k{i}": x for i, x in enumerate(items)}
    if style == "module":
        return Bag(items[:1], {"others": tuple(items[1:])})
    if style == "nested":
        return (items[:1], [{"a": x} for x in items[1:]])
    return items


def unpack(tree: Any, style: str) -> list[Any]:
    if style == "dict":
        return list(tree.values())
    if style == "module":
        return [*tree.first, *tree.others["others"]]
    if style == "nested":
        return [*tree[0], *(x["a"] for x in tree[1])]
    return list(tree)


class Interpreter:
    """Runs statements. What a ref is, and what a transform does, the subclasses say."""

    def is_ref(self, x: Any) -> bool:
        raise NotImplementedError

    def read(self, ref: Any) -> jax.Array:
        raise NotImplementedError

    def write(self, ref: Any, value: jax.Array) -> None:
        raise NotImplementedError

    def new(self, value: jax.Array, collection: str | None) -> Any:
        raise NotImplementedError

    def is_same(self, a: Any, b: Any) -> bool:
        raise NotImplementedError

    def apply(self, s: Apply, env: Env) -> tuple[Sequence[Any], Sequence[Any]]:
        raise NotImplementedError

    def check(self, x: jax.Array, fails: jax.Array) -> jax.Array:
        raise NotImplementedError

    def set_first(self, ref: Any, value: jax.Array) -> None:
        raise NotImplementedError

    def value(self, e: Expr, env: Env) -> jax.Array:
        match e:
            case Name(name):
                x = env[name]
                x = self.read(x) if self.is_ref(x) else x
                return number(x) if is_key(x) or x.dtype == jnp.float32 else x
            case Checked(a, largest):
                x = number(self.value(a, env))
                return self.check(x, jnp.sum(x) > largest)
            case Const(value):
                return FLOAT(value)
            case Sin(a):
                return jnp.sin(number(self.value(a, env)))
            case Mix(a, b):
                x = number(self.value(a, env))
                return 0.5 * x + 0.25 * fit(self.value(b, env), x.shape)
            case Product(a, b):
                x = number(self.value(a, env))
                return jnp.sin(x * fit(self.value(b, env), x.shape))
            case Fit(a, shape):
                return fit(self.value(a, env), shape)
            case Stack(parts, shape, axis):
                return jnp.stack([fit(self.value(a, env), shape) for a in parts], axis)

    def run(self, s: Statement, env: Env) -> None:
        match s:
            case Write(ref, e):
                shape = self.read(env[ref]).shape
                self.write(env[ref], fit(self.value(e, env), shape))
            case Count(ref, by):
                if isinstance(by, str):
                    more = self.read(env[by])
                    shape = self.read(env[ref]).shape
                    more = jnp.broadcast_to(jnp.sum(more % 5, dtype=more.dtype), shape)
                else:
                    more = by
                self.write(env[ref], self.read(env[ref]) + more)
            case SetPart(ref, e):
                shape = self.read(env[ref]).shape[1:]
                self.set_first(env[ref], fit(self.value(e, env), shape))
            case Retype(ref, e, shape, dtype):
                self.write(env[ref], retyped(self.value(e, env), shape, dtype))
            case Draw():
                self.draw(s, env)
            case Let(name, e):
                env[name] = self.value(e, env)
            case New(name, e, collection):
                env[name] = self.new(number(self.value(e, env)), collection)
            case Swap(a, b):
                env[a], env[b] = env[b], env[a]
            case Tie(a, b):
                env[a] = env[b]
            case WriteIfSame(a, b, e):
                if self.is_same(env[a], env[b]):
                    shape = self.read(env[a]).shape
                    self.write(env[a], fit(self.value(e, env), shape))
            case Apply():
                values, refs = self.apply(s, env)
                env.update(zip(s.out_values, values, strict=True))
                env.update(zip(s.out_refs, refs, strict=True))

    def draw(self, s: Draw, env: Env) -> None:
        ref = env[s.key]
        key = typed(self.read(ref))
        if s.how == "split":
            kept, key = jr.split(key)
            self.write(ref, keys_like(self.read(ref), kept))
        elif s.counter is not None:
            counter = env[s.counter]
            key = jr.fold_in(key, self.read(counter))
            self.write(counter, self.read(counter) + 1)
        env[s.name] = jr.normal(key, s.shape, FLOAT)

    def call(
        self, block: Block, closed: Env, refs: Sequence, sliced: Sequence, inputs: Any
    ) -> tuple:
        """Calls a block: `(values, refs)`, and the refs of its params if it loops."""
        env = dict(closed)
        env.update(zip(block.params, refs, strict=True))
        env.update(zip(block.sliced, sliced, strict=True))
        env.update(zip(block.inputs, inputs, strict=True))
        for s in block.body:
            self.run(s, env)
        values = tuple(self.value(e, env) for e in block.values)
        out = tuple(env[name] for name in block.refs)
        if block.loops:
            return values, out, tuple(env[name] for name in block.params)
        return values, out
