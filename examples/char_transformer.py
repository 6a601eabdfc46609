"""Trains a character transformer on the source of Python's standard library.

    python examples/char_transformer.py --steps 2000 --out out --seed 0

What to look at:

- `Transformer` reads and writes characters by one matrix: `unembed` is the ref of `embed`.
- The linear and norm layers are Equinox's own, with refs: `rx.as_refs` leaves them callable.
- `Dropout` draws from a shared `rx.Rngs`. No key is threaded, and under `rx.filter_vmap`
  each text of a batch has its own mask.
- `Attention` keeps keys and values of a text in refs. `sample` scans over one character at
  a time, writes these caches in place, and donates their old buffers.
"""

import argparse
import pathlib
import sysconfig
from collections.abc import Callable, Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

import refx_eqx as rx


matplotlib.use("Agg")
import matplotlib.pyplot as plt


CHARACTERS = "\n" + "".join(chr(i) for i in range(32, 127))


def linear(n_in: int, n_out: int, *, key: PRNGKeyArray) -> eqx.nn.Linear:
    return rx.as_refs(eqx.nn.Linear(n_in, n_out, key=key), "params")


def layer_norm(n: int) -> eqx.nn.LayerNorm:
    return rx.as_refs(eqx.nn.LayerNorm(n), "params")


class Dropout(rx.Module):
    rngs: rx.Rngs
    rate: float
    inference: bool = False

    def __call__(self, x: Array) -> Array:
        if self.inference or self.rate == 0:
            return x
        keep = jr.bernoulli(self.rngs.dropout(), 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), 0.0)


class Attention(rx.Module):
    """Causal attention, of a whole text or of one character at a time."""

    project: eqx.nn.Linear
    out: eqx.nn.Linear
    keys: rx.Cache[Float[Array, "context heads size"]]
    values: rx.Cache[Float[Array, "context heads size"]]

    def __init__(self, dim: int, heads: int, context: int, *, key: PRNGKeyArray):
        key1, key2 = jr.split(key)
        self.project = linear(dim, 3 * dim, key=key1)
        self.out = linear(dim, dim, key=key2)
        self.keys = jnp.zeros((context, heads, dim // heads))
        self.values = jnp.zeros((context, heads, dim // heads))

    def __call__(self, x: Float[Array, "time dim"]) -> Float[Array, "time dim"]:
        queries, keys, values = self._heads(x)
        return self._attend(queries, keys, values, jnp.arange(len(x)))

    def decode(
        self, x: Float[Array, " dim"], i: Int[Array, ""]
    ) -> Float[Array, " dim"]:
        """The character at position `i`, which sees those that were decoded before it."""
        query, key, value = self._heads(x[None])
        self.keys[i] = key[0]
        self.values[i] = value[0]
        return self._attend(query, self.keys.value, self.values.value, i[None])[0]

    def _heads(self, x: Float[Array, "time dim"]) -> list[Array]:
        _, heads, size = self.keys.shape
        parts = jnp.split(jax.vmap(self.project)(x), 3, axis=1)
        return [part.reshape(-1, heads, size) for part in parts]

    def _attend(self, queries: Array, keys: Array, values: Array, at: Array) -> Array:
        """`at` has the positions of the queries; the keys begin at position 0."""
        scores = jnp.einsum("qhd,khd->hqk", queries, keys) / np.sqrt(keys.shape[-1])
        is_past = jnp.arange(len(keys)) <= at[:, None]
        weights = jax.nn.softmax(jnp.where(is_past, scores, -1e9))
        mixed = jnp.einsum("hqk,khd->qhd", weights, values)
        return jax.vmap(self.out)(mixed.reshape(len(queries), -1))


class Block(rx.Module):
    norm1: eqx.nn.LayerNorm
    attention: Attention
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    dropout: Dropout

    def __init__(
        self,
        dim: int,
        heads: int,
        context: int,
        dropout: Dropout,
        *,
        key: PRNGKeyArray,
    ):
        key1, key2, key3 = jr.split(key, 3)
        self.norm1, self.norm2 = layer_norm(dim), layer_norm(dim)
        self.attention = Attention(dim, heads, context, key=key1)
        self.up = linear(dim, 4 * dim, key=key2)
        self.down = linear(4 * dim, dim, key=key3)
        self.dropout = dropout

    def __call__(self, x: Float[Array, "time dim"]) -> Float[Array, "time dim"]:
        x = x + self.dropout(self.attention(jax.vmap(self.norm1)(x)))
        return x + self.dropout(jax.vmap(self._feed_forward)(x))

    def decode(
        self, x: Float[Array, " dim"], i: Int[Array, ""]
    ) -> Float[Array, " dim"]:
        x = x + self.attention.decode(self.norm1(x), i)
        return x + self._feed_forward(x)

    def _feed_forward(self, x: Float[Array, " dim"]) -> Float[Array, " dim"]:
        return self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Transformer(rx.Module):
    embed: rx.Param[Float[Array, "vocab dim"]]
    positions: rx.Param[Float[Array, "context dim"]]
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    unembed: rx.Param[Float[Array, "vocab dim"]]
    rngs: rx.Rngs

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        context: int,
        rate: float,
        *,
        key: PRNGKeyArray,
    ):
        key1, key2, key3, *block_keys = jr.split(key, 3 + depth)
        self.embed = 0.02 * jr.normal(key1, (len(CHARACTERS), dim))
        self.unembed = self.embed  # tied: one ref, two places
        self.positions = 0.02 * jr.normal(key2, (context, dim))
        self.rngs = rx.Rngs(key3)
        dropout = Dropout(self.rngs, rate)
        self.blocks = [
            Block(dim, heads, context, dropout, key=key) for key in block_keys
        ]
        self.norm = layer_norm(dim)

    def __call__(self, tokens: Int[Array, " time"]) -> Float[Array, "time vocab"]:
        x = self.embed[...][tokens] + self.positions[: len(tokens)]
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.norm)(x) @ self.unembed[...].T

    def decode(
        self, token: Int[Array, ""], i: Int[Array, ""]
    ) -> Float[Array, " vocab"]:
        x = self.embed[token] + self.positions[i]
        for block in self.blocks:
            x = block.decode(x, i)
        return self.unembed[...] @ self.norm(x)


Batch = Int[Array, "batch length"]


def loss_fn(model: Transformer, batch: Batch) -> Float[Array, ""]:
    """The cross-entropy of each character, given those before it."""
    # The texts are mapped over. The model is the function, so it is not; but its stream of
    # randomness is split, so that each text has its own dropout.
    logits = rx.filter_vmap(model)(batch[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return jnp.mean(losses)


@rx.filter_jit(donate="refs")
def train_step(
    model: Transformer, optimizer: rx.Optimizer, batch: Batch
) -> Float[Array, ""]:
    loss, grads = rx.filter_value_and_grad(loss_fn, wrt="params")(model, batch)
    optimizer.update(model, grads)
    return loss


@rx.filter_jit
def evaluate(model: Transformer, batch: Batch) -> Float[Array, ""]:
    return loss_fn(eqx.nn.inference_mode(model), batch)


@rx.filter_jit(donate="refs")
def sample(
    model: Transformer, prompt: Int[Array, " prompt"], temperature: float
) -> Int[Array, " context"]:
    """Continues the prompt, up to the context's length."""
    model = eqx.nn.inference_mode(model)  # another tree, the same refs

    def step(
        token: Int[Array, ""], i: Int[Array, ""]
    ) -> tuple[Int[Array, ""], Int[Array, ""]]:
        logits = model.decode(token, i)  # writes the caches
        drawn = jr.categorical(model.rngs.sample(), logits / temperature)
        given = prompt[jnp.minimum(i + 1, len(prompt) - 1)]
        following = jnp.where(i + 1 < len(prompt), given, drawn)
        return following, following

    # `step` closes over the model, whose refs `rx.scan` carries from step to step.
    _, tokens = rx.scan(step, prompt[0], jnp.arange(len(model.positions.value) - 1))
    return jnp.concatenate([prompt[:1], tokens])


def cache_error(model: Transformer, tokens: Int[Array, " time"]) -> float:
    """How far decoding, one character at a time, is from the model on the whole text."""
    model = eqx.nn.inference_mode(model)
    whole = rx.filter_jit(model)(tokens)
    decode = rx.filter_jit(
        lambda tokens: rx.map(
            lambda pair: model.decode(*pair), (tokens, jnp.arange(len(tokens)))
        )
    )
    return float(jnp.max(jnp.abs(decode(tokens) - whole)))


class Data(NamedTuple):
    train: np.ndarray
    validation: np.ndarray

    def batches(
        self, part: str, size: int, length: int, seed: int
    ) -> Iterator[np.ndarray]:
        """Random pieces of one part of the text, for ever."""
        tokens, rng = getattr(self, part), np.random.default_rng(seed)
        while True:
            starts = rng.integers(0, len(tokens) - length, size)
            yield np.stack([tokens[start : start + length] for start in starts])


def load_data(n_characters: int) -> Data:
    """Files of the standard library, the last tenth of the text held out."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for file in sorted(folder.glob("*.py")):
        text += file.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= n_characters:
            break
    tokens = encode(text[:n_characters])
    cut = len(tokens) * 9 // 10
    return Data(tokens[:cut], tokens[cut:])


def encode(text: str) -> np.ndarray:
    codes = {character: i for i, character in enumerate(CHARACTERS)}
    return np.array([codes[c] for c in text if c in codes], np.int32)


def decode(tokens: Int[Array, " time"]) -> str:
    return "".join(CHARACTERS[i] for i in np.asarray(tokens))


def train(
    model: Transformer,
    data: Data,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    report: Callable[[int, float, float], None],
) -> tuple[list[float], list[tuple[int, float]]]:
    """Trains the model in place. Returns the losses, and those in validation by step."""
    length = len(model.positions.value) + 1
    batches = data.batches("train", batch_size, length, seed)
    held_out = data.batches("validation", 8 * batch_size, length, 0)
    validation = next(held_out)  # the same each time

    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
    decayed = rx.param_mask(model, lambda ref: rx.is_ref(ref) and ref.ndim > 1)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=0.1, mask=decayed),
    )
    optimizer = rx.Optimizer(model, tx)

    losses, validations = [], []
    every = max(1, steps // 20)
    for step in range(1, steps + 1):
        losses.append(float(train_step(model, optimizer, jnp.asarray(next(batches)))))
        if step % every == 0 or step == steps:
            validations.append((step, float(evaluate(model, jnp.asarray(validation)))))
        report(step, losses[-1], validations[-1][1] if validations else np.nan)
    return losses, validations


def plot(
    path: pathlib.Path,
    losses: list[float],
    validations: list[tuple[int, float]],
    text: str,
) -> None:
    figure, (curves, page) = plt.subplots(1, 2, figsize=(11, 4.2))
    curves.plot(range(1, len(losses) + 1), losses, alpha=0.5, label="training")
    curves.plot(*zip(*validations), color="tab:red", marker=".", label="held-out files")
    curves.set_xlabel("step")
    curves.set_ylabel("loss, nats a character")
    curves.legend()
    curves.grid(alpha=0.3)
    page.set_axis_off()
    page.set_title("A sample")
    lines = [line[i : i + 64] for line in text.split("\n") for i in range(0, 128, 64)]
    # A dollar would begin a formula.
    shown = "\n".join(line for line in lines if line).replace("$", r"\$")
    page.text(0, 0.98, shown, va="top", family="monospace", fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="A transformer on Python's source.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--characters", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()

    data = load_data(args.characters)
    model = Transformer(
        args.dim,
        args.depth,
        args.heads,
        args.context,
        args.dropout,
        key=jr.key(args.seed),
    )
    console.print(
        f"{len(data.train):,} characters to train on, {rx.count(model, 'params'):,} "
        "numbers in parameters"
    )

    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("compiling", total=args.steps)

        def report(step: int, loss: float, validation: float) -> None:
            text = f"loss {loss:.3f}, held-out {validation:.3f}"
            progress.update(bar, completed=step, description=text)

        losses, validations = train(
            model,
            data,
            steps=args.steps,
            batch_size=args.batch_size,
            seed=args.seed,
            report=report,
        )
    assert model.unembed is model.embed  # still one matrix

    prompt = encode("def test_")
    texts = [decode(sample(model, jnp.asarray(prompt), 0.7)) for _ in range(3)]
    for text in texts:
        console.print(Panel(text, width=80), markup=False)
    picture = args.out / "char_transformer.png"
    plot(picture, losses, validations, "\n---\n".join(texts))
    error = cache_error(model, jnp.asarray(data.validation[: args.context]))
    console.print(f"Loss on held-out files, nats a character: {validations[-1][1]:.3f}")
    console.print(f"Decoding with the cache differs by at most {error:.1e}")
    console.print(f"Written: {picture}")


if __name__ == "__main__":
    main()
