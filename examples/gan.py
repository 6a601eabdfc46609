"""Trains a generative adversarial network (DCGAN) on scikit-learn's digits.

    python examples/gan.py --steps 1500 --picture gan.png

What to look at:

- One `train_step` writes two models, two optimizers, the batch statistics of both, and the
  stream of noise. It returns only the two losses.
- Each model is trained on its own loss. The other one only runs, but the batch statistics
  that it tracks meanwhile are kept as well.
- The convolutions are Equinox's own, with refs: `rx.nn.Conv2d` makes an `eqx.nn.Conv2d`.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _run import options, picture, progress
from jaxtyping import Array, Float, PRNGKeyArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import refx_eqx as rx


LATENT = 16

Image = Float[Array, "1 8 8"]
Images = Float[Array, "batch 1 8 8"]
Noise = Float[Array, " latent"]
Scalar = Float[Array, ""]


def batch_norm(channels: int) -> rx.nn.BatchNorm:
    return rx.nn.BatchNorm(channels, axis_name="batch", momentum=0.9)


class Generator(rx.Module):
    first: eqx.nn.Linear
    norm1: rx.nn.BatchNorm
    up1: eqx.nn.ConvTranspose2d
    norm2: rx.nn.BatchNorm
    up2: eqx.nn.ConvTranspose2d

    def __init__(self, channels: int = 64, *, key: PRNGKeyArray):
        key1, key2, key3 = jr.split(key, 3)
        half = channels // 2
        self.first = rx.nn.Linear(LATENT, 4 * channels, key=key1)
        self.norm1 = batch_norm(channels)
        self.up1 = rx.nn.ConvTranspose2d(channels, half, 4, 2, padding=1, key=key2)
        self.norm2 = batch_norm(half)
        self.up2 = rx.nn.ConvTranspose2d(half, 1, 4, 2, padding=1, key=key3)

    def __call__(self, noise: Noise) -> Image:
        x = self.first(noise).reshape(-1, 2, 2)
        x = self.up1(jax.nn.relu(self.norm1(x)))
        x = self.up2(jax.nn.relu(self.norm2(x)))
        return jax.nn.sigmoid(x)


class Discriminator(rx.Module):
    down1: eqx.nn.Conv2d
    down2: eqx.nn.Conv2d
    norm: rx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, channels: int = 64, *, key: PRNGKeyArray):
        key1, key2, key3 = jr.split(key, 3)
        half = channels // 2
        self.down1 = rx.nn.Conv2d(1, half, 4, 2, padding=1, key=key1)
        self.down2 = rx.nn.Conv2d(half, channels, 4, 2, padding=1, key=key2)
        self.norm = batch_norm(channels)
        self.last = rx.nn.Linear(4 * channels, "scalar", key=key3)

    def __call__(self, image: Image) -> Scalar:
        """How real the image looks, as a logit."""
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
        # Not quite 1, so that the discriminator does not become too sure of itself.
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

    # Only the first argument is differentiated: `judge` runs, but is not trained.
    loss_g, grads = rx.filter_value_and_grad(generator_loss, wrt="params")(
        generator.model, discriminator.model
    )
    generator.optimizer.update(generator.model, grads)
    return loss_g, loss_d


@rx.filter_jit
def generate(model: Generator, noise: Float[Array, "batch latent"]) -> Images:
    return jax.vmap(rx.nn.inference_mode(model))(noise)


def digits_seen(images: np.ndarray) -> tuple[int, float]:
    """What a classifier of real digits makes of the images: how many of the ten digits it
    sees in at least 1% of them, and how sure it is on average."""
    pixels, labels = load_digits(return_X_y=True)
    classifier = LogisticRegression(max_iter=1000).fit(pixels / 16, labels)
    probabilities = classifier.predict_proba(images.reshape(len(images), -1))
    shares = np.bincount(np.argmax(probabilities, axis=1), minlength=10) / len(images)
    return int(np.sum(shares >= 0.01)), float(np.mean(np.max(probabilities, axis=1)))


def plot(path: pathlib.Path, losses: np.ndarray, images: np.ndarray) -> None:
    with picture(path) as (curves, digits):
        width = max(1, len(losses) // 50)
        whole = losses[: len(losses) // width * width]
        smooth = whole.reshape(-1, width, 2).mean(axis=1)
        steps = width * np.arange(1, len(smooth) + 1)
        curves.plot(steps, smooth, label=["generator", "discriminator"])
        curves.set(xlabel="step", ylabel="loss")
        curves.legend()
        curves.grid(alpha=0.3)
        padded = np.pad(images.reshape(5, 10, 8, 8), [(0, 0), (0, 0), (1, 1), (1, 1)])
        digits.imshow(padded.swapaxes(1, 2).reshape(50, 100), cmap="gray_r")
        digits.set_title("Generated digits")
        digits.set_axis_off()


def main() -> None:
    args = options(__doc__, steps=1500, batch_size=64)
    pixels, _ = load_digits(return_X_y=True)
    real = jnp.asarray(pixels, jnp.float32).reshape(-1, 1, 8, 8) / 16
    key1, key2, key3, key4 = jr.split(jr.key(args.seed), 4)
    generator = Player(Generator(key=key1))
    discriminator = Player(Discriminator(key=key2))
    rngs = rx.Rngs(key3)
    for name, player in (("generator", generator), ("discriminator", discriminator)):
        number = rx.count(player.model, "params")
        print(f"{name}: {number:,} parameters")

    rng = np.random.default_rng(args.seed)
    losses = []
    with progress(args.steps) as report:
        for _ in range(args.steps):
            rows = rng.integers(0, len(real), args.batch_size)
            step_losses = train_step(generator, discriminator, rngs, real[rows])
            losses.append([float(loss) for loss in step_losses])
            report(f"generator {losses[-1][0]:.2f}, discriminator {losses[-1][1]:.2f}")

    images = np.asarray(generate(generator.model, jr.normal(key4, (500, LATENT))))
    seen, sure = digits_seen(images)
    print(f"A classifier of real digits sees {seen} of the 10 digits.")
    print(f"It is {sure:.1%} sure of them on average.")
    if args.picture:
        plot(args.picture, np.asarray(losses), images[:50])


if __name__ == "__main__":
    main()
