"""Trains a small convolutional network on scikit-learn's digits.

    python examples/train_digits.py --epochs 40 --out out --seed 0

What to look at:

- `BatchNorm` keeps running statistics in refs of its own. Nothing is threaded through the
  network: no state goes in, and none comes out.
- `Network` has one kernel at two places: the second block is given the ref of the first.
- `train_step` returns the loss, and nothing else. The model and the state of the optimizer
  are written in place, also under `jit`, `grad` and `vmap`.
"""

import argparse
import pathlib
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import refx_eqx as rx


matplotlib.use("Agg")
import matplotlib.pyplot as plt


Images = Float[Array, "batch 1 8 8"]
Labels = Int[Array, " batch"]


class BatchNorm(rx.Module):
    scale: rx.Param[Float[Array, " channels"]]
    shift: rx.Param[Float[Array, " channels"]]
    mean: rx.BatchStat[Float[Array, " channels"]]
    var: rx.BatchStat[Float[Array, " channels"]]
    inference: bool

    def __init__(self, channels: int):
        self.scale = jnp.ones(channels)
        self.shift = jnp.zeros(channels)
        self.mean = jnp.zeros(channels)
        self.var = jnp.ones(channels)
        self.inference = False

    def __call__(self, x: Float[Array, "channels h w"]) -> Float[Array, "channels h w"]:
        if self.inference:
            mean, var = self.mean.value, self.var.value
        else:
            # This runs for one image of the batch. `pmean` makes one value for all of
            # them, so it may be written to a ref that is the same for all of them.
            mean = jax.lax.pmean(jnp.mean(x, axis=(1, 2)), "batch")
            squares = jnp.square(x - mean[:, None, None])
            var = jax.lax.pmean(jnp.mean(squares, axis=(1, 2)), "batch")
            self.mean.value = 0.9 * self.mean.value + 0.1 * mean
            self.var.value = 0.9 * self.var.value + 0.1 * var
        scale = self.scale.value / jnp.sqrt(var + 1e-5)
        shift = self.shift.value - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Block(rx.Module):
    """A convolution and a batch norm."""

    kernel: rx.Param[Float[Array, "out in 3 3"]]
    norm: BatchNorm

    def __init__(
        self,
        kernel: Float[Array, "out in 3 3"] | rx.Ref[Float[Array, "out in 3 3"]],
    ):
        self.kernel = kernel  # an array becomes a ref of this field; a ref is shared
        self.norm = BatchNorm(kernel.shape[0])

    def __call__(self, x: Float[Array, "in h w"]) -> Float[Array, "out h w"]:
        (x,) = jax.lax.conv(x[None], self.kernel.value, (1, 1), "SAME")
        return self.norm(x)


class Network(rx.Module):
    stem: Block
    first: Block
    second: Block
    dropout: eqx.nn.Dropout
    head: rx.Param[Float[Array, "features 10"]]

    def __init__(self, channels: int = 32, *, key: PRNGKeyArray):
        key1, key2, key3 = jr.split(key, 3)
        init = jax.nn.initializers.he_normal(in_axis=1, out_axis=0)
        self.stem = Block(init(key1, (channels, 1, 3, 3)))
        self.first = Block(init(key2, (channels, channels, 3, 3)))
        self.second = Block(self.first.kernel)  # one parameter, at two places
        self.dropout = eqx.nn.Dropout(0.2)
        self.head = 0.05 * jr.normal(key3, (channels * 4 * 4, 10))

    def __call__(
        self, x: Float[Array, "1 8 8"], key: PRNGKeyArray | None = None
    ) -> Float[Array, " 10"]:
        x = jax.nn.relu(self.stem(x))
        x = x + jax.nn.relu(self.first(x))
        x = x + jax.nn.relu(self.second(x))
        x = jnp.max(x.reshape(-1, 4, 2, 4, 2), axis=(2, 4))
        return self.dropout(x.reshape(-1), key=key) @ self.head.value


def loss_fn(
    model: Network, images: Images, labels: Labels, key: PRNGKeyArray
) -> Float[Array, ""]:
    keys = jr.split(key, len(images))
    # The images and keys are mapped over. The model is the function, so it is not.
    logits = rx.filter_vmap(model, axis_name="batch")(images, keys)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


@rx.filter_jit(donate="refs")
def train_step(
    model: Network,
    optimizer: rx.Optimizer,
    images: Images,
    labels: Labels,
    key: PRNGKeyArray,
) -> Float[Array, ""]:
    value_and_grad = rx.filter_value_and_grad(loss_fn, wrt="params")
    loss, grads = value_and_grad(model, images, labels, key)
    optimizer.update(model, grads)
    return loss


@rx.filter_jit
def predict(model: Network, images: Images) -> Float[Array, "batch 10"]:
    # A module in inference mode is another module that holds the same refs.
    model = eqx.nn.inference_mode(model)
    return jax.nn.softmax(rx.filter_vmap(model)(images))


def accuracy(model: Network, images: Images, labels: Labels) -> float:
    return float(jnp.mean(jnp.argmax(predict(model, images), axis=1) == labels))


class Data(NamedTuple):
    images: Images
    labels: Labels


def load_data(seed: int) -> tuple[Data, Data]:
    """The 1797 digits, a quarter of them held out for the test."""
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 1, 8, 8) / 16
    split = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=seed
    )
    train_x, test_x = (jnp.asarray(x, jnp.float32) for x in split[:2])
    train_y, test_y = (jnp.asarray(y, jnp.int32) for y in split[2:])
    return Data(train_x, train_y), Data(test_x, test_y)


def train(
    model: Network,
    train_data: Data,
    test_data: Data,
    *,
    epochs: int,
    batch_size: int,
    key: PRNGKeyArray,
    progress: Progress,
) -> tuple[list[float], list[float]]:
    """Trains the model that it is given. Returns the losses and the test accuracies."""
    steps = len(train_data.images) // batch_size
    schedule = optax.cosine_decay_schedule(4e-3, epochs * steps)
    # Its state is in refs, so a step updates it in place too. A shared weight is in it once.
    optimizer = rx.Optimizer(model, optax.adamw(schedule, weight_decay=1e-2))

    losses, accuracies = [], []
    bar = progress.add_task("compiling", total=epochs)
    for epoch_key in jr.split(key, epochs):
        order_key, *step_keys = jr.split(epoch_key, steps + 1)
        order = jr.permutation(order_key, len(train_data.images))
        batches = order[: steps * batch_size].reshape(steps, batch_size)
        step_losses = [
            train_step(
                model,
                optimizer,
                train_data.images[rows],
                train_data.labels[rows],
                step_key,
            )
            for rows, step_key in zip(batches, step_keys)
        ]
        losses.append(float(np.mean(step_losses)))
        accuracies.append(accuracy(model, *test_data))
        text = f"loss {losses[-1]:.4f}, test accuracy {accuracies[-1]:.2%}"
        progress.update(bar, advance=1, description=text)
    return losses, accuracies


def table_of(model: Network) -> Table:
    """Each ref of the model, once, with all of its places."""
    table = Table("ref", "collection", "shape", title="What is trained and tracked")
    table.add_column("numbers", justify="right")
    for ref, paths in rx.aliases(model).items():
        where = " = ".join(paths)
        table.add_row(where, str(ref.collection), str(ref.shape), f"{ref.size:,}")
    table.caption = f"{rx.count(model, 'params'):,} numbers in parameters"
    return table


def plot(
    path: pathlib.Path,
    losses: list[float],
    accuracies: list[float],
    data: Data,
    probabilities: Float[Array, "batch 10"],
) -> None:
    """The curves, and the digits that the network is least sure of."""
    figure = plt.figure(figsize=(11, 4.5), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 1.2))
    epochs = range(1, len(losses) + 1)
    top, bottom = figure.add_subfigure(grid[0]).subplots(2, 1, sharex=True)
    top.semilogy(epochs, losses, color="tab:blue", marker=".")
    top.set_ylabel("training loss")
    bottom.plot(epochs, 100 * np.asarray(accuracies), color="tab:green", marker=".")
    bottom.set_ylabel("test accuracy, %")
    bottom.set_xlabel("epoch")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)

    digits = figure.add_subfigure(grid[1])
    digits.suptitle("Test digits: the least sure predictions")
    predicted = np.argmax(probabilities, axis=1)
    least_sure = np.argsort(np.max(probabilities, axis=1))
    for axes, i in zip(digits.subplots(3, 6).flat, least_sure):
        guess, truth = int(predicted[i]), int(data.labels[i])
        axes.imshow(data.images[i, 0], cmap="gray_r")
        axes.set_title(
            f"{guess}" if guess == truth else f"{guess}, is {truth}",
            color="tab:green" if guess == truth else "tab:red",
        )
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a network on digits.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()

    train_data, test_data = load_data(args.seed)
    model_key, train_key = jr.split(jr.key(args.seed))
    model = Network(key=model_key)
    console.print(table_of(model))

    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        losses, accuracies = train(
            model,
            train_data,
            test_data,
            epochs=args.epochs,
            batch_size=args.batch_size,
            key=train_key,
            progress=progress,
        )
    assert model.first.kernel is model.second.kernel  # still one parameter

    checkpoint = args.out / "digits.safetensors"
    rx.save(checkpoint, model)
    restored = Network(key=jr.key(args.seed + 1))  # of other weights, at first
    rx.load(checkpoint, restored)
    assert restored.first.kernel is restored.second.kernel

    picture = args.out / "digits.png"
    plot(picture, losses, accuracies, test_data, predict(restored, test_data.images))
    console.print(f"Accuracy on the {len(test_data.images)} test digits:")
    console.print(f"  trained model        {accuracies[-1]:.2%}")
    console.print(f"  restored checkpoint  {accuracy(restored, *test_data):.2%}")
    console.print(f"Written: {checkpoint}, {picture}")


if __name__ == "__main__":
    main()
