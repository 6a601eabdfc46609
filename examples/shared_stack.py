"""A stack of attention layers that share one feed-forward network learns to sort numbers.

    python examples/shared_stack.py --steps 600 --picture shared_stack.png

What to look at:

- `rx.filter_vmap` makes the stack. What a block makes for itself gets an axis in front. What
  it is given does not: all blocks share one feed-forward network.
- `rx.scan` runs the stack, so a block is compiled once, however many there are. A filter in
  `in_axes` says what they share.
- The gradient of the shared network is the sum over the blocks. The optimizer holds it once.
"""

import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _run import options, picture, progress
from jaxtyping import Array, Float, Int, PRNGKeyArray

import refx_eqx as rx


Hidden = Float[Array, "length dim"]
Batch = Int[Array, "batch length"]


class Block(rx.Module):
    norm1: eqx.nn.LayerNorm
    attention: rx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    feed_forward: eqx.nn.MLP  # shared by all blocks

    def __init__(self, dim: int, feed_forward: eqx.nn.MLP, *, key: PRNGKeyArray):
        self.norm1, self.norm2 = rx.nn.LayerNorm(dim), rx.nn.LayerNorm(dim)
        self.attention = rx.nn.MultiheadAttention(4, dim, key=key)
        self.feed_forward = feed_forward

    def __call__(self, x: Hidden) -> Hidden:
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(self.feed_forward)(jax.vmap(self.norm2)(x))


class Sorter(rx.Module):
    embed: rx.Param[Float[Array, "vocab dim"]]
    positions: rx.Param[Float[Array, "length dim"]]
    blocks: Block  # a stack of them
    norm: eqx.nn.LayerNorm
    unembed: eqx.nn.Linear

    def __init__(
        self, vocab: int, length: int, dim: int, depth: int, *, key: PRNGKeyArray
    ):
        keys = jr.split(key, 5)
        self.embed = jr.normal(keys[0], (vocab, dim))
        self.positions = jr.normal(keys[1], (length, dim))
        shared = rx.nn.MLP(dim, dim, 4 * dim, 1, jax.nn.gelu, key=keys[2])
        make = lambda shared, key: Block(dim, shared, key=key)
        block_keys = jr.split(keys[3], depth)
        self.blocks = rx.filter_vmap(make, in_axes=(None, 0))(shared, block_keys)
        self.norm = rx.nn.LayerNorm(dim)
        self.unembed = rx.nn.Linear(dim, vocab, key=keys[4])

    def __call__(self, numbers: Int[Array, " length"]) -> Float[Array, "length vocab"]:
        return self.after_each_block(numbers)[-1]

    def after_each_block(
        self, numbers: Int[Array, " length"]
    ) -> Float[Array, "depth length vocab"]:
        """The logits after each block, as if it were the last one."""

        def step(x: Hidden, block: Block) -> tuple[Hidden, Hidden]:
            return (x := block(x)), x

        one_for_all = rx.axes({rx.path("feed_forward.**"): None}, default=0)
        x = self.embed[numbers] + self.positions[...]
        _, xs = rx.scan(step, x, self.blocks, in_axes=one_for_all)
        read = lambda x: self.unembed(self.norm(x))
        return jax.vmap(jax.vmap(read))(xs)


def loss_fn(model: Sorter, batch: Batch) -> Float[Array, ""]:
    logits = jax.vmap(model)(batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.sort(batch, axis=1)
    )
    return jnp.mean(losses)


@rx.filter_jit(donate="refs")
def train_step(
    model: Sorter, optimizer: rx.Optimizer, batch: Batch
) -> Float[Array, ""]:
    loss, grads = rx.filter_value_and_grad(loss_fn, wrt="params")(model, batch)
    optimizer.update(model, grads)
    return loss


@rx.filter_jit
def guesses(model: Sorter, batch: Batch) -> Int[Array, "batch depth length"]:
    return jnp.argmax(jax.vmap(model.after_each_block)(batch), axis=-1)


def plot(path: pathlib.Path, losses: list[float], one: Array, guess: Array) -> None:
    with picture(path) as (curve, table):
        curve.semilogy(losses)
        curve.set(xlabel="step", ylabel="loss")
        curve.grid(alpha=0.3)
        rows = np.concatenate([one[None], guess, np.sort(one)[None]])
        names = ["given", *(f"block {i + 1}" for i in range(len(guess))), "sorted"]
        table.imshow(rows, cmap="viridis", aspect="auto")
        table.set_yticks(range(len(rows)), names)
        table.set_xticks([])
        table.set_title("What is read after each block")
        for (i, j), number in np.ndenumerate(rows):
            is_right = number == rows[-1, j]
            color = "white" if is_right or i == 0 else "tab:red"
            table.text(j, i, number, ha="center", va="center", color=color)


def main() -> None:
    args = options(
        __doc__, steps=600, batch_size=64, length=12, vocab=32, dim=48, depth=6
    )
    key = jr.key(args.seed)
    model = Sorter(args.vocab, args.length, args.dim, args.depth, key=key)
    print(rx.tabulate(model.blocks))
    shared = rx.count(model, rx.path("blocks.feed_forward.**"))
    print(
        f"Without sharing, it would have {(args.depth - 1) * shared:,} more parameters."
    )

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 3e-3, args.steps // 10, args.steps
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    optimizer = rx.Optimizer(model, tx)
    rng = np.random.default_rng(args.seed)
    shape = args.batch_size, args.length
    losses = []
    with progress(args.steps) as report:
        for _ in range(args.steps):
            batch = jnp.asarray(rng.integers(0, args.vocab, shape))
            losses.append(float(train_step(model, optimizer, batch)))
            report(f"loss {losses[-1]:.4f}")

    test = rng.integers(0, args.vocab, (1000, args.length))
    guess = np.asarray(guesses(model, jnp.asarray(test)))
    right = guess[:, -1] == np.sort(test, axis=1)
    print(f"Of 1000 new lists of {args.length} numbers:")
    print(f"  numbers in their place  {right.mean():.2%}")
    print(f"  lists that are sorted   {right.all(axis=1).mean():.2%}")
    if args.picture:
        plot(args.picture, losses, test[0], guess[0])


if __name__ == "__main__":
    main()
