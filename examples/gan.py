"""Trains a generative adversarial network (DCGAN) on scikit-learn's digits.

    python examples/gan.py --steps 1500 --out out --seed 0

What to look at:

- One `train_step` writes two models, two optimizers, the batch statistics of both, and the
  stream of noise. It returns two losses, and nothing else.
- `BatchNorm` keeps running statistics in refs. Each model is trained by the gradient of its
  own loss; what the other one tracks while it is run is kept as well.
- The convolutions are Equinox's own, with refs: `rx.as_refs` leaves them callable.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import refx_eqx as rx


matplotlib.use("Agg")
import matplotlib.pyplot as plt


LATENT = 16

Image = Float[Array, "1 8 8"]
Images = Float[Array, "batch 1 8 8"]
Noise = Float[Array, " latent"]
Scalar = Float[Array, ""]


class BatchNorm(rx.Module):
    scale: rx.Param[Float[Array, " channels"]]
    shift: rx.Param[Float[Array, " channels"]]
    mean: rx.BatchStat[Float[Array, " channels"]]
    var: rx.BatchStat[Float[Array, " channels"]]
    inference: bool

    def __init__(self, channels: int):
        self.scale, self.shift = jnp.ones(channels), jnp.zeros(channels)
        self.mean, self.var = jnp.zeros(channels), jnp.ones(channels)
        self.inference = False

    def __call__(self, x: Float[Array, "channels h w"]) -> Float[Array, "channels h w"]:
        if self.inference:
            mean, var = self.mean.value, self.var.value
        else:
            # This runs for one image. `pmean` makes one value for the whole batch.
            mean = jax.lax.pmean(jnp.mean(x, axis=(1, 2)), "batch")
            squares = jnp.square(x - mean[:, None, None])
            var = jax.lax.pmean(jnp.mean(squares, axis=(1, 2)), "batch")
            self.mean.value = 0.9 * self.mean.value + 0.1 * mean
            self.var.value = 0.9 * self.var.value + 0.1 * var
        scale = self.scale.value / jnp.sqrt(var + 1e-5)
        shift = self.shift.value - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Generator(rx.Module):
    first: eqx.nn.Linear
    norm1: BatchNorm
    up1: eqx.nn.ConvTranspose2d
    norm2: BatchNorm
    up2: eqx.nn.ConvTranspose2d

    def __init__(self, channels: int = 64, *, key: PRNGKeyArray):
        key1, key2, key3 = jr.split(key, 3)
        half = channels // 2
        first = eqx.nn.Linear(LATENT, 4 * channels, key=key1)
        up1 = eqx.nn.ConvTranspose2d(channels, half, 4, 2, padding=1, key=key2)
        up2 = eqx.nn.ConvTranspose2d(half, 1, 4, 2, padding=1, key=key3)
        self.first, self.up1, self.up2 = rx.as_refs((first, up1, up2), "params")
        self.norm1, self.norm2 = BatchNorm(channels), BatchNorm(half)

    def __call__(self, noise: Noise) -> Image:
        x = self.first(noise).reshape(-1, 2, 2)
        x = self.up1(jax.nn.relu(self.norm1(x)))
        x = self.up2(jax.nn.relu(self.norm2(x)))
        return jax.nn.sigmoid(x)


class Discriminator(rx.Module):
    down1: eqx.nn.Conv2d
    down2: eqx.nn.Conv2d
    norm: BatchNorm
    last: eqx.nn.Linear

    def __init__(self, channels: int = 64, *, key: PRNGKeyArray):
        key1, key2, key3 = jr.split(key, 3)
        half = channels // 2
        down1 = eqx.nn.Conv2d(1, half, 4, 2, padding=1, key=key1)
        down2 = eqx.nn.Conv2d(half, channels, 4, 2, padding=1, key=key2)
        last = eqx.nn.Linear(4 * channels, "scalar", key=key3)
        self.down1, self.down2, self.last = rx.as_refs((down1, down2, last), "params")
        self.norm = BatchNorm(channels)

    def __call__(self, image: Image) -> Scalar:
        """How real the image is: a logit."""
        x = jax.nn.leaky_relu(self.down1(image), 0.2)
        x = jax.nn.leaky_relu(self.norm(self.down2(x)), 0.2)
        return self.last(x.reshape(-1))


class Player(rx.Module):
    """A model, and the optimizer that trains it."""

    model: Any
    optimizer: rx.Optimizer

    def __init__(self, model: Any):
        self.model = model
        self.optimizer = rx.Optimizer(model, optax.adam(1e-3, b1=0.5))


def batched(model: Callable[[Array], Array], xs: Array) -> Array:
    return rx.filter_vmap(model, axis_name="batch")(xs)


def cross_entropy(logits: Float[Array, " batch"], target: float) -> Scalar:
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, target))


@rx.filter_jit(donate="refs")
def train_step(
    generator: Player, discriminator: Player, rngs: rx.Rngs, real: Images
) -> tuple[Scalar, Scalar]:
    noise = jr.normal(rngs.noise(), (len(real), LATENT))

    def discriminator_loss(model: Discriminator, fake: Images) -> Scalar:
        # Not quite 1: the discriminator is not to be too sure of itself.
        return cross_entropy(batched(model, real), 0.9) + cross_entropy(
            batched(model, fake), 0.0
        )

    def generator_loss(model: Generator, judge: Discriminator) -> Scalar:
        return cross_entropy(batched(judge, batched(model, noise)), 1.0)

    fake = batched(generator.model, noise)
    loss_d, grads = rx.filter_value_and_grad(discriminator_loss, wrt="params")(
        discriminator.model, fake
    )
    discriminator.optimizer.update(discriminator.model, grads)

    # The gradient is that of the first argument: `judge` is run, and not trained.
    loss_g, grads = rx.filter_value_and_grad(generator_loss, wrt="params")(
        generator.model, discriminator.model
    )
    generator.optimizer.update(generator.model, grads)
    return loss_g, loss_d


@rx.filter_jit
def generate(model: Generator, noise: Float[Array, "batch latent"]) -> Images:
    return jax.vmap(eqx.nn.inference_mode(model))(noise)


def digits_seen(images: np.ndarray) -> tuple[int, float]:
    """What a classifier of real digits makes of images: how many of the ten digits it sees
    in at least one of a hundred, and how sure it is on average."""
    pixels, labels = load_digits(return_X_y=True)
    classifier = LogisticRegression(max_iter=1000).fit(pixels / 16, labels)
    probabilities = classifier.predict_proba(images.reshape(len(images), -1))
    shares = np.bincount(np.argmax(probabilities, axis=1), minlength=10) / len(images)
    return int(np.sum(shares >= 0.01)), float(np.mean(np.max(probabilities, axis=1)))


def plot(path: pathlib.Path, losses: np.ndarray, images: np.ndarray) -> None:
    figure, (curves, digits) = plt.subplots(
        1, 2, figsize=(11, 4.2), layout="constrained"
    )
    width = max(1, len(losses) // 50)
    smooth = losses[: len(losses) // width * width].reshape(-1, width, 2).mean(axis=1)
    steps = width * np.arange(1, len(smooth) + 1)
    curves.plot(steps, smooth[:, 0], label="generator")
    curves.plot(steps, smooth[:, 1], label="discriminator")
    curves.set_xlabel("step")
    curves.set_ylabel("loss")
    curves.legend()
    curves.grid(alpha=0.3)
    padded = np.pad(images.reshape(5, 10, 8, 8), [(0, 0), (0, 0), (1, 1), (1, 1)])
    digits.imshow(padded.swapaxes(1, 2).reshape(50, 100), cmap="gray_r")
    digits.set_title("Generated digits")
    digits.set_axis_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="A GAN on digits.")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()

    pixels, _ = load_digits(return_X_y=True)
    real = jnp.asarray(pixels, jnp.float32).reshape(-1, 1, 8, 8) / 16
    key1, key2, key3, key4 = jr.split(jr.key(args.seed), 4)
    generator = Player(Generator(key=key1))
    discriminator = Player(Discriminator(key=key2))
    rngs = rx.Rngs(key3)
    for name, player in (("generator", generator), ("discriminator", discriminator)):
        number = rx.count(player.model, "params")
        console.print(f"{name}: {number:,} numbers in parameters")

    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    rng = np.random.default_rng(args.seed)
    losses = []
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("compiling", total=args.steps)
        for _ in range(args.steps):
            rows = rng.integers(0, len(real), args.batch_size)
            step_losses = train_step(generator, discriminator, rngs, real[rows])
            losses.append([float(loss) for loss in step_losses])
            text = f"generator {losses[-1][0]:.2f}, discriminator {losses[-1][1]:.2f}"
            progress.update(bar, advance=1, description=text)

    images = np.asarray(generate(generator.model, jr.normal(key4, (500, LATENT))))
    seen, sure = digits_seen(images)
    picture = args.out / "gan.png"
    plot(picture, np.asarray(losses), images[:50])
    console.print(f"A classifier of real digits sees {seen} of the 10 digits.")
    console.print(f"It is sure of them by {sure:.1%} on average.")
    console.print(f"Written: {picture}")


if __name__ == "__main__":
    main()
