"""Trains a small convolutional network on scikit-learn's digits.

    python examples/train_digits.py --epochs 40 --picture digits.png

What to look at:

- `rx.nn.BatchNorm` keeps its running statistics in refs. No state is passed into the
  network, and none comes out.
- `Network` has one kernel in two places: the second block gets the ref of the first.
- `train_step` returns only the loss. The model and the state of the optimizer are written in
  place, also under `jit`, `grad` and `vmap`.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _run import options, picture, progress
from jaxtyping import Array, Float, Int, PRNGKeyArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import refx_eqx as rx


Images = Float[Array, "batch 1 8 8"]
Labels = Int[Array, " batch"]
Kernel = Float[Array, "out in 3 3"]


class Block(rx.Module):
    """A convolution and a batch norm."""

    kernel: rx.Param[Kernel]
    norm: rx.nn.BatchNorm

    def __init__(self, kernel: Kernel | rx.Ref[Kernel]):
        self.kernel = kernel  # an array becomes a ref of this field; a ref is shared
        self.norm = rx.nn.BatchNorm(kernel.shape[0], axis_name="batch", momentum=0.9)

    def __call__(self, x: Float[Array, "in h w"]) -> Float[Array, "out h w"]:
        (x,) = jax.lax.conv(x[None], self.kernel.value, (1, 1), "SAME")
        return self.norm(x)


class Network(rx.Module):
    stem: Block
    first: Block
    second: Block
    dropout: rx.nn.Dropout
    head: rx.Param[Float[Array, "features 10"]]

    def __init__(self, channels: int = 32, *, key: PRNGKeyArray):
        key1, key2, key3, key4 = jr.split(key, 4)
        init = jax.nn.initializers.he_normal(in_axis=1, out_axis=0)
        self.stem = Block(init(key1, (channels, 1, 3, 3)))
        self.first = Block(init(key2, (channels, channels, 3, 3)))
        self.second = Block(self.first.kernel)  # one parameter, in two places
        self.dropout = rx.nn.Dropout(0.2, rngs=rx.Rngs(key3))
        self.head = 0.05 * jr.normal(key4, (channels * 4 * 4, 10))

    def __call__(self, x: Float[Array, "1 8 8"]) -> Float[Array, " 10"]:
        x = jax.nn.relu(self.stem(x))
        x = x + jax.nn.relu(self.first(x))
        x = x + jax.nn.relu(self.second(x))
        x = jnp.max(x.reshape(-1, 4, 2, 4, 2), axis=(2, 4))
        return self.dropout(x.reshape(-1)) @ self.head.value


def loss_fn(model: Network, images: Images, labels: Labels) -> Float[Array, ""]:
    # Maps over the images. The model is the function, so it is not mapped; but its stream of
    # random numbers is split, so that each image has its own dropout.
    logits = rx.filter_vmap(model, axis_name="batch")(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


@rx.filter_jit(donate="refs")
def train_step(
    model: Network, optimizer: rx.Optimizer, images: Images, labels: Labels
) -> Float[Array, ""]:
    value_and_grad = rx.filter_value_and_grad(loss_fn, wrt="params")
    loss, grads = value_and_grad(model, images, labels)
    optimizer.update(model, grads)
    return loss


@rx.filter_jit
def predict(model: Network, images: Images) -> Float[Array, "batch 10"]:
    # A module in inference mode is another module that holds the same refs.
    return jax.nn.softmax(jax.vmap(rx.nn.inference_mode(model))(images))


def accuracy(model: Network, images: Images, labels: Labels) -> float:
    return float(jnp.mean(jnp.argmax(predict(model, images), axis=1) == labels))


class Data(NamedTuple):
    images: Images
    labels: Labels


def load_data(seed: int) -> tuple[Data, Data]:
    """The 1797 digits, with a quarter of them held out for the test."""
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
    seed: int,
    report: Callable[[str], None],
) -> tuple[list[float], list[float]]:
    """Trains the model in place. Returns the losses and the test accuracies."""
    steps = len(train_data.images) // batch_size
    schedule = optax.cosine_decay_schedule(4e-3, epochs * steps)
    # Its state is in refs, so a step updates it in place too. It has a shared weight once.
    optimizer = rx.Optimizer(model, optax.adamw(schedule, weight_decay=1e-2))

    losses, accuracies = [], []
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(train_data.images))
        batches = order[: steps * batch_size].reshape(steps, batch_size)
        step_losses = [
            train_step(model, optimizer, *(x[rows] for x in train_data))
            for rows in batches
        ]
        losses.append(float(np.mean(step_losses)))
        accuracies.append(accuracy(model, *test_data))
        report(f"loss {losses[-1]:.4f}, test accuracy {accuracies[-1]:.2%}")
    return losses, accuracies


def plot(
    path: pathlib.Path,
    losses: list[float],
    accuracies: list[float],
    data: Data,
    probabilities: Float[Array, "batch 10"],
) -> None:
    """The curves, and the digits that the network is least sure of."""
    with picture(path) as (curve, digits):
        curve.semilogy(range(1, len(losses) + 1), losses, "b.-", label="training loss")
        errors = 1 - np.asarray(accuracies)
        curve.semilogy(range(1, len(losses) + 1), errors, "g.-", label="test error")
        curve.set_xlabel("epoch")
        curve.legend()
        curve.grid(alpha=0.3)
        predicted = np.argmax(probabilities, axis=1)
        least_sure = np.argsort(np.max(probabilities, axis=1))
        digits.set_title("Test digits: the least sure predictions")
        digits.set_axis_off()
        for n, i in enumerate(least_sure[:18]):
            axes = digits.inset_axes((n % 6 / 6, 1 - (n // 6 + 1) / 3, 0.15, 0.27))
            guess, truth = int(predicted[i]), int(data.labels[i])
            axes.imshow(data.images[i, 0], cmap="gray_r")
            is_right = guess == truth
            axes.set_title(
                f"{guess}" if is_right else f"{guess}, is {truth}",
                color="tab:green" if is_right else "tab:red",
                fontsize=9,
            )
            axes.set_axis_off()


def main() -> None:
    args = options(
        __doc__,
        epochs=40,
        batch_size=64,
        checkpoint=pathlib.Path("out/digits.safetensors"),
    )
    train_data, test_data = load_data(args.seed)
    model = Network(key=jr.key(args.seed))
    print(rx.tabulate(model))
    with progress(args.epochs) as report:
        losses, accuracies = train(
            model,
            train_data,
            test_data,
            epochs=args.epochs,
            batch_size=args.batch_size,
            seed=args.seed,
            report=report,
        )
    assert model.first.kernel is model.second.kernel  # still one parameter

    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    rx.save(args.checkpoint, model)
    restored = Network(key=jr.key(args.seed + 1))  # with other weights, at first
    rx.load(args.checkpoint, restored)
    assert restored.first.kernel is restored.second.kernel

    print(f"Accuracy on the {len(test_data.images)} test digits:")
    print(f"  trained model        {accuracies[-1]:.2%}")
    print(f"  restored checkpoint  {accuracy(restored, *test_data):.2%}")
    print(f"Written: {args.checkpoint}")
    if args.picture:
        probabilities = predict(restored, test_data.images)
        plot(args.picture, losses, accuracies, test_data, probabilities)


if __name__ == "__main__":
    main()
