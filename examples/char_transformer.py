"""Trains a character transformer on the source of Python's standard library.

    python examples/char_transformer.py --steps 3000 --picture char_transformer.png

What to look at:

- `Transformer` reads and writes characters with one matrix: `unembed` is the ref of `embed`.
- `Dropout` draws from a shared `rx.Rngs`. No keys are passed around, and under
  `rx.filter_vmap` each text in a batch has its own mask.
- Attention keeps the keys and values of a text in refs. The same method trains, reads a
  prompt, and continues it one character at a time: `cache=True` appends the input to what is
  cached. `sample` scans over it, and donates the old buffers of the caches.
"""

import pathlib
import sysconfig
from collections.abc import Callable, Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _run import options, picture, progress
from jaxtyping import Array, Float, Int, PRNGKeyArray
from rich.console import Console
from rich.panel import Panel

import refx_eqx as rx


CHARACTERS = "\n" + "".join(chr(i) for i in range(32, 127))

Batch = Int[Array, "batch length"]


class Block(rx.Module):
    norm1: eqx.nn.LayerNorm
    attention: rx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    feed_forward: eqx.nn.MLP
    dropout: rx.nn.Dropout

    def __init__(
        self,
        dim: int,
        heads: int,
        context: int,
        dropout: rx.nn.Dropout,
        *,
        key: PRNGKeyArray,
    ):
        key1, key2 = jr.split(key)
        self.norm1, self.norm2 = rx.nn.LayerNorm(dim), rx.nn.LayerNorm(dim)
        self.attention = rx.nn.MultiheadAttention(
            heads, dim, cache_size=context, key=key1
        )
        self.feed_forward = rx.nn.MLP(dim, dim, 4 * dim, 1, jax.nn.gelu, key=key2)
        self.dropout = dropout

    def __call__(
        self, x: Float[Array, "time dim"], cache: bool
    ) -> Float[Array, "time dim"]:
        causal = None if cache else jnp.tril(jnp.ones((len(x), len(x)), bool))
        y = jax.vmap(self.norm1)(x)
        x = x + self.dropout(self.attention(y, y, y, causal, cache=cache))
        y = jax.vmap(self.norm2)(x)
        return x + self.dropout(jax.vmap(self.feed_forward)(y))


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
        dropout: float,
        *,
        key: PRNGKeyArray,
    ):
        key1, key2, key3, *keys = jr.split(key, 3 + depth)
        self.embed = 0.02 * jr.normal(key1, (len(CHARACTERS), dim))
        self.unembed = self.embed  # tied: one ref, two places
        self.positions = 0.02 * jr.normal(key2, (context, dim))
        self.rngs = rx.Rngs(key3)
        layer = rx.nn.Dropout(dropout, rngs=self.rngs)
        self.blocks = [Block(dim, heads, context, layer, key=key) for key in keys]
        self.norm = rx.nn.LayerNorm(dim)

    def __call__(
        self, tokens: Int[Array, " time"], cache: bool = False
    ) -> Float[Array, "time vocab"]:
        """The logits for each next character. With `cache`, the tokens continue a text."""
        length = self.blocks[0].attention.cache_length
        start = length[...] if cache and length is not None else 0
        x = self.embed[tokens] + self.positions[start + jnp.arange(len(tokens))]
        for block in self.blocks:
            x = block(x, cache)
        return jax.vmap(self.norm)(x) @ self.unembed[...].T

    def reset_cache(self) -> None:
        for block in self.blocks:
            block.attention.reset_cache()


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
    return loss_fn(rx.nn.inference_mode(model), batch)


@rx.filter_jit(donate="refs")
def sample(
    model: Transformer, prompt: Int[Array, " prompt"], temperature: float
) -> Int[Array, " context"]:
    """Continues the prompt up to the length of the context."""
    model = rx.nn.inference_mode(model)  # another tree, the same refs
    model.reset_cache()

    def step(
        logits: Float[Array, " vocab"], _: None
    ) -> tuple[Float[Array, " vocab"], Int[Array, ""]]:
        token = jr.categorical(model.rngs.sample(), logits / temperature)
        return model(token[None], cache=True)[0], token

    logits = model(prompt, cache=True)[-1]
    # `step` closes over the model, whose refs `rx.scan` carries from step to step.
    n_new = len(model.positions.value) - len(prompt)
    _, tokens = rx.scan(step, logits, length=n_new)
    return jnp.concatenate([prompt, tokens])


def cache_error(model: Transformer, tokens: Int[Array, " time"]) -> float:
    """How much decoding one character at a time differs from reading the whole text."""
    model = rx.nn.inference_mode(model)
    model.reset_cache()
    whole = rx.filter_jit(model)(tokens)
    one = lambda token: model(token[None], cache=True)[0]
    decoded = rx.filter_jit(lambda tokens: rx.map(one, tokens))(tokens)
    return float(jnp.max(jnp.abs(decoded - whole)))


class Data(NamedTuple):
    train: np.ndarray
    validation: np.ndarray

    def batches(
        self, part: str, size: int, length: int, seed: int
    ) -> Iterator[np.ndarray]:
        """Random pieces of one part of the text, forever."""
        tokens, rng = getattr(self, part), np.random.default_rng(seed)
        while True:
            starts = rng.integers(0, len(tokens) - length, size)
            yield np.stack([tokens[start : start + length] for start in starts])


def load_data(n_characters: int) -> Data:
    """Files of the standard library, with the last tenth of the text held out."""
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


def optimizer_of(steps: int, decayed: object) -> optax.GradientTransformation:
    """AdamW with warm-up, clipped gradients, and weight decay for what `decayed` selects."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=0.1, mask=decayed),
    )


def train(
    model: Transformer,
    data: Data,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    report: Callable[[str], None],
) -> tuple[list[float], list[tuple[int, float]]]:
    """Trains the model in place. Returns the training losses, and the validation losses with
    their steps."""
    length = len(model.positions.value) + 1
    batches = data.batches("train", batch_size, length, seed)
    validation = next(data.batches("validation", 8 * batch_size, length, 0))
    decayed = rx.param_mask(model, lambda ref: rx.is_ref(ref) and ref.ndim > 1)
    optimizer = rx.Optimizer(model, optimizer_of(steps, decayed))

    losses, validations = [], []
    every = max(1, steps // 20)
    for step in range(1, steps + 1):
        losses.append(float(train_step(model, optimizer, jnp.asarray(next(batches)))))
        if step % every == 0 or step == steps:
            validations.append((step, float(evaluate(model, jnp.asarray(validation)))))
        held_out = f"{validations[-1][1]:.3f}" if validations else "?"
        report(f"loss {losses[-1]:.3f}, held-out {held_out}")
    return losses, validations


def plot(
    path: pathlib.Path,
    losses: list[float],
    validations: list[tuple[int, float]],
    text: str,
) -> None:
    with picture(path) as (curves, page):
        curves.plot(range(1, len(losses) + 1), losses, alpha=0.5, label="training")
        curves.plot(*zip(*validations), "r.-", label="held-out files")
        curves.set(xlabel="step", ylabel="loss, nats a character")
        curves.legend()
        curves.grid(alpha=0.3)
        page.set_axis_off()
        page.set_title("A sample")
        lines = [ln[i : i + 64] for ln in text.split("\n") for i in range(0, 128, 64)]
        # Matplotlib starts a formula at a dollar sign.
        shown = "\n".join(line for line in lines if line).replace("$", r"\$")
        page.text(0, 0.98, shown, va="top", family="monospace", fontsize=8)


def main() -> None:
    args = options(
        __doc__,
        steps=3000,
        batch_size=8,
        context=64,
        dim=96,
        depth=2,
        heads=4,
        dropout=0.05,
        characters=2_000_000,
    )
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
        "parameters"
    )
    with progress(args.steps) as report:
        losses, validations = train(
            model,
            data,
            steps=args.steps,
            batch_size=args.batch_size,
            seed=args.seed,
            report=report,
        )
    assert model.unembed is model.embed  # still one matrix

    prompt = jnp.asarray(encode("def test_"))
    texts = [decode(sample(model, prompt, 0.7)) for _ in range(3)]
    for text in texts:
        console.print(Panel(text, width=80), markup=False)
    error = cache_error(model, jnp.asarray(data.validation[: args.context]))
    print(f"Loss on held-out files, nats a character: {validations[-1][1]:.3f}")
    print(f"Decoding with the cache differs by at most {error:.1e}")
    if args.picture:
        plot(args.picture, losses, validations, "\n---\n".join(texts))


if __name__ == "__main__":
    main()
