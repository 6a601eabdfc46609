"""Fine-tunes a network with LoRA, the rest frozen, and keeps a moving average of it.

    python examples/ema_and_lora.py --steps 600 --picture ema_and_lora.png

A network learns scikit-learn's digits. Then low-rank changes of its weights adapt it to the
mirrored digits. What to look at:

- `adapted` holds the *same* refs as `model`, and those of the changes. Nothing is copied.
- `wrt="lora"` tells the gradient, the optimizer and the average what is trained.
- `rx.mutable` makes sure that nothing else is written.
- `rx.nn.merge_lora` turns it into a plain network, and `rx.save` can store only the changes.
"""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _run import options, picture, progress
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import refx_eqx as rx


class Data(NamedTuple):
    images: Float[Array, "batch 64"]
    labels: Int[Array, " batch"]

    def split(self) -> tuple["Data", "Data"]:
        """The training data, and the test data, which other people wrote."""
        return Data(*(x[:1300] for x in self)), Data(*(x[1300:] for x in self))


def load_data() -> tuple[Data, Data]:
    """The digits, and their mirror images."""
    pixels, digits = load_digits(return_X_y=True)
    images = jnp.asarray(pixels, jnp.float32).reshape(-1, 8, 8) / 16
    labels = jnp.asarray(digits, jnp.int32)
    mirrored = jnp.flip(images, axis=2)
    return Data(images.reshape(-1, 64), labels), Data(mirrored.reshape(-1, 64), labels)


def loss_fn(model: eqx.nn.MLP, data: Data) -> Float[Array, ""]:
    logits = jax.vmap(model)(data.images)  # refs may be read under a plain `jax.vmap`
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels)
    return jnp.mean(losses)


@rx.filter_jit
def accuracy(model: eqx.nn.MLP, data: Data) -> Float[Array, ""]:
    guesses = jnp.argmax(jax.vmap(model)(data.images), axis=1)
    return jnp.mean(guesses == data.labels)


@rx.filter_jit(donate="refs")
def train_step(
    model: eqx.nn.MLP, optimizer: rx.Optimizer, ema: rx.nn.EMA, batch: Data
) -> Float[Array, ""]:
    value_and_grad = rx.filter_value_and_grad(loss_fn, wrt=optimizer.wrt)
    loss, grads = value_and_grad(model, batch)
    optimizer.update(model, grads)
    ema.update(model)
    return loss


def train(
    model: eqx.nn.MLP,
    data: Data,
    tests: tuple[Data, Data],
    wrt: str,
    *,
    steps: int,
    seed: int,
    report: Callable[[str], None],
) -> tuple[rx.nn.EMA, list[tuple[float, ...]]]:
    """Trains what `wrt` selects, in place. Returns the average of the model, and the
    test accuracies along the way."""
    ema = rx.nn.EMA(model, decay=0.95, wrt=wrt)
    tx = optax.adamw(optax.cosine_decay_schedule(1e-2, steps))
    optimizer = rx.Optimizer(model, tx, wrt=wrt)
    rng = np.random.default_rng(seed)
    accuracies = []
    for i in range(steps):
        rows = rng.integers(0, len(data.images), 128)
        loss = train_step(model, optimizer, ema, Data(*(x[rows] for x in data)))
        if i % 10 == 0 or i == steps - 1:
            accuracies.append(tuple(float(accuracy(model, test)) for test in tests))
        report(f"{wrt}: loss {loss:.4f}")
    return ema, accuracies


def plot(path: pathlib.Path, trained: Any, adapted: Any) -> None:
    with picture(path) as axes:
        for ax, curves, title in zip(
            axes,
            (trained, adapted),
            ("Trained on plain digits", "LoRA, on mirrored ones"),
        ):
            steps = 10 * np.arange(len(curves))
            ax.plot(steps, 100 * np.asarray(curves), label=["plain", "mirrored"])
            ax.set(xlabel="step", ylabel="accuracy, %", title=title, ylim=(0, 100))
            ax.legend()
            ax.grid(alpha=0.3)


def main() -> None:
    args = options(__doc__, steps=600, rank=8, width=128)
    plain, mirrored = load_data()
    (train_plain, test_plain), (train_mirrored, test_mirrored) = (
        plain.split(),
        mirrored.split(),
    )
    tests = test_plain, test_mirrored
    key1, *keys = jr.split(jr.key(args.seed), 4)
    model = rx.nn.MLP(64, 10, args.width, 2, key=key1)
    how = {"steps": args.steps, "seed": args.seed}

    with progress(2 * args.steps) as report:
        ema, trained = train(model, train_plain, tests, "params", report=report, **how)
        before = rx.snapshot(model)  # plain values, which training does not change

        layers = [rx.nn.LoRA(x, args.rank, key=k) for x, k in zip(model.layers, keys)]
        adapted = eqx.tree_at(lambda m: m.layers, model, tuple(layers))
        assert layers[0].layer.weight is model.layers[0].weight
        with rx.mutable(rx.collection("lora", "ema", "opt_state")):
            adapted_ema, adapting = train(
                adapted, train_mirrored, tests, "lora", report=report, **how
            )
    assert eqx.tree_equal(rx.snapshot(model), before)

    table = Table("network", "trained", title="Accuracy on the test digits")
    table.add_column("plain", justify="right")
    table.add_column("mirrored", justify="right")
    merged = rx.nn.merge_lora(adapted)
    for name, network, numbers in (
        ("trained on plain", model, rx.count(model, "params")),
        ("  its average", ema.model, 0),
        ("adapted to mirrored", adapted, rx.count(adapted, "lora")),
        ("  its average", adapted_ema.model, 0),
        ("  merged", merged, 0),
    ):
        both = (f"{accuracy(network, x):.1%}" for x in tests)
        table.add_row(name, f"{numbers:,}" if numbers else "", *both)
    Console().print(table)

    with tempfile.TemporaryDirectory() as folder:
        for name, filter in (("the changes", "lora"), ("all of it", True)):
            file = pathlib.Path(folder, "network.safetensors")
            rx.save(file, adapted, filter)
            print(f"A file with {name}: {file.stat().st_size:,} bytes")
    if args.picture:
        plot(args.picture, trained, adapting)


if __name__ == "__main__":
    main()
