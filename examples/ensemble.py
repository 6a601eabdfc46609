"""Trains an ensemble of networks with batch norm on scikit-learn's digits, all at once.

    python examples/ensemble.py --members 8 --epochs 30 --picture ensemble.png

What to look at:

- The ensemble is the network under `rx.filter_vmap`: the code that makes one makes all of
  them, and each ref gets an axis in front. `rx.Batched` is the type of such a stack.
- The optimizers and the step are made in the same way. The step is written for one network,
  whose weights and batch statistics it updates in place. Mapped, it updates those of all.
- Only the data is not mapped: `in_axes` says so.
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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import refx_eqx as rx


Images = Float[Array, "batch 64"]
Labels = Int[Array, " batch"]


class Network(rx.Module):
    layers: list[eqx.nn.Linear]
    norms: list[rx.nn.BatchNorm]
    last: eqx.nn.Linear

    def __init__(self, width: int, *, key: PRNGKeyArray):
        key1, key2, key3 = jr.split(key, 3)
        self.layers = [
            rx.nn.Linear(64, width, key=key1),
            rx.nn.Linear(width, width, key=key2),
        ]
        self.norms = [rx.nn.BatchNorm(width, momentum=0.9) for _ in self.layers]
        self.last = rx.nn.Linear(width, 10, key=key3)

    def __call__(self, x: Images) -> Float[Array, "batch 10"]:
        for layer, norm in zip(self.layers, self.norms):
            x = jax.nn.relu(norm(jax.vmap(layer)(x)))  # normalizes over the whole batch
        return jax.vmap(self.last)(x)


Ensemble = rx.Batched[Network, "members"]


def loss_fn(model: Network, images: Images, labels: Labels) -> Float[Array, ""]:
    losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
    return jnp.mean(losses)


def train_step(
    model: Network, optimizer: rx.Optimizer, images: Images, labels: Labels
) -> Float[Array, ""]:
    """One step of one network."""
    value_and_grad = rx.filter_value_and_grad(loss_fn, wrt="params")
    loss, grads = value_and_grad(model, images, labels)
    optimizer.update(model, grads)
    return loss


@rx.filter_jit(donate="refs")
def train_all(
    models: Ensemble, optimizers: rx.Optimizer, images: Images, labels: Labels
) -> Float[Array, " members"]:
    step = rx.filter_vmap(train_step, in_axes=(0, 0, None, None))
    return step(models, optimizers, images, labels)


@rx.filter_jit
def predict_all(models: Ensemble, images: Images) -> Float[Array, "members batch 10"]:
    predict = lambda model, images: jax.nn.softmax(model(images))
    models = rx.nn.inference_mode(models)
    return rx.filter_vmap(predict, in_axes=(0, None))(models, images)


def accuracy(probabilities: Float[Array, "... batch 10"], labels: Labels) -> np.ndarray:
    guesses = jnp.argmax(probabilities, axis=-1)
    return np.asarray(jnp.mean(guesses == labels, axis=-1))


def log_loss(probabilities: Float[Array, "... batch 10"], labels: Labels) -> np.ndarray:
    of_truth = probabilities[..., jnp.arange(len(labels)), labels]
    return np.asarray(-jnp.mean(jnp.log(of_truth), axis=-1))


def plot(
    path: pathlib.Path,
    errors: np.ndarray,
    digits: Images,
    noise: Images,
    models: Ensemble,
) -> None:
    with picture(path) as (curves, histogram):
        epochs = range(1, len(errors) + 1)
        curves.plot(epochs, 100 * errors[:, :-1], color="tab:gray", alpha=0.5)
        curves.plot(epochs, 100 * errors[:, -1], color="tab:red", lw=2)
        curves.set(xlabel="epoch", ylabel="test error, %", yscale="log")
        curves.set_title("Each network, and all together (red)")
        curves.grid(alpha=0.3)
        for images, label in ((digits, "digits"), (noise, "shuffled pixels")):
            members = predict_all(models, images)
            for p, which in ((members[0], "one network"), (members.mean(0), "all")):
                surest = np.asarray(p.max(axis=-1))
                bins = np.linspace(0, 1, 41)
                histogram.hist(surest, bins, histtype="step", label=f"{label}, {which}")
        histogram.set(xlabel="probability of the guess", yscale="log")
        histogram.legend(loc="upper left")


def main() -> None:
    args = options(__doc__, members=8, epochs=30, width=64, batch_size=64)
    pixels, digits = load_digits(return_X_y=True)
    split = train_test_split(
        pixels / 16, digits, test_size=0.25, stratify=digits, random_state=args.seed
    )
    train_x, test_x = (jnp.asarray(x, jnp.float32) for x in split[:2])
    train_y, test_y = (jnp.asarray(y, jnp.int32) for y in split[2:])
    steps = len(train_x) // args.batch_size

    keys = jr.split(jr.key(args.seed), args.members)
    models = rx.filter_vmap(lambda key: Network(args.width, key=key))(keys)
    schedule = optax.cosine_decay_schedule(1e-2, args.epochs * steps)
    tx = optax.adamw(schedule, weight_decay=1e-2)
    optimizers = rx.filter_vmap(lambda model: rx.Optimizer(model, tx))(models)
    print(models)

    rng = np.random.default_rng(args.seed)
    errors = []
    with progress(args.epochs) as report:
        for _ in range(args.epochs):
            order = rng.permutation(len(train_x))[: steps * args.batch_size]
            for rows in order.reshape(steps, -1):
                train_all(models, optimizers, train_x[rows], train_y[rows])
            members = predict_all(models, test_x)
            together = members.mean(axis=0, keepdims=True)
            found = accuracy(jnp.concatenate([members, together]), test_y)
            errors.append(1 - found)
            report(f"one network {found[:-1].mean():.2%}, all {found[-1]:.2%}")

    members, together = predict_all(models, test_x), predict_all(models, test_x).mean(0)
    one, all_ = accuracy(members, test_y), accuracy(together, test_y)
    print(f"Accuracy on the {len(test_y)} test digits:")
    print(f"  one network, on average  {one.mean():.2%}")
    print(f"  all together             {all_:.2%}")
    print(
        f"Log loss: {log_loss(members, test_y).mean():.3f} for one on average, "
        f"{log_loss(together, test_y):.3f} for all together."
    )
    if args.picture:
        noise = jr.permutation(jr.key(args.seed), test_x, axis=1, independent=True)
        plot(args.picture, np.asarray(errors), test_x, noise, models)


if __name__ == "__main__":
    main()
