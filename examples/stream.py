"""Learns to forecast a chaotic signal from a stream, with a network that remembers.

    python examples/stream.py --steps 1500 --picture stream.png

What to look at:

- `rx.nn.GRUCell` keeps its hidden state in a ref. Each training step reads the next piece of
  the stream, from the state that the last step left. No state is passed around.
- `rx.add_axis` adds an axis to the state of each cell. So there are many streams, each with
  its own state, and one set of weights.
- Within a piece `rx.map` carries the state, and the gradient goes through all its steps.
- `rx.clone` makes a copy to forecast with, which leaves the model on the stream as it is.
"""

import pathlib

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _run import options, picture, progress
from jaxtyping import Array, Float, PRNGKeyArray

import refx_eqx as rx


Signal = Float[Array, " time"]
Streams = Float[Array, "streams time"]


class Forecaster(rx.Module):
    cells: list[rx.nn.GRUCell]
    last: eqx.nn.Linear

    def __init__(self, width: int, *, key: PRNGKeyArray):
        key1, key2, key3 = jr.split(key, 3)
        self.cells = [
            rx.nn.GRUCell(1, width, key=key1),
            rx.nn.GRUCell(width, width, key=key2),
        ]
        self.last = rx.nn.Linear(width, "scalar", key=key3)

    def __call__(self, x: Float[Array, ""]) -> Float[Array, ""]:
        """The next value of the signal, after `x` and all that came before."""
        hidden = x[None]
        for cell in self.cells:
            hidden = cell(hidden)
        return x + self.last(hidden)

    def follow(self, signal: Signal) -> Signal:
        """The forecasts one step ahead, along a signal."""
        return rx.map(self, signal)

    def go_on(self, x: Float[Array, ""], n: int) -> Signal:
        """A forecast of the next `n` values, each made from the one before."""

        def step(x: Array, _: None) -> tuple[Array, Array]:
            return (x := self(x)), x

        return rx.scan(step, x, length=n)[1]


# One state per stream, and the same weights for all.
EACH = rx.axes(cache=0, default=None)


def loss_fn(models: Forecaster, pieces: Streams) -> Float[Array, ""]:
    follow = rx.filter_vmap(Forecaster.follow, in_axes=(EACH, 0))
    return jnp.mean(jnp.square(follow(models, pieces[:, :-1]) - pieces[:, 1:]))


@rx.filter_jit(donate="refs")
def train_step(
    models: Forecaster, optimizer: rx.Optimizer, pieces: Streams
) -> Float[Array, ""]:
    loss, grads = rx.filter_value_and_grad(loss_fn, wrt="params")(models, pieces)
    optimizer.update(models, grads)
    return loss


@rx.filter_jit
def forecast(models: Forecaster, now: Float[Array, " streams"], n: int) -> Streams:
    go_on = rx.filter_vmap(Forecaster.go_on, in_axes=(EACH, 0, None))
    return go_on(models, now, n)


def mackey_glass(n: int, length: int, *, seed: int) -> Float[np.ndarray, "n length"]:
    """Solutions of the Mackey-Glass equation x' = 0.2 x(t-17) / (1 + x(t-17)^10) - x/10, with
    one value per unit of time."""
    delay, warm_up = 170, 3000  # in steps of 0.1
    x = np.empty((n, delay + warm_up + 10 * length))
    rng = np.random.default_rng(seed)
    x[:, :delay] = 1.2 + 0.2 * rng.uniform(-1, 1, (n, 1))
    for i in range(delay, x.shape[1]):
        old = x[:, i - delay]
        x[:, i] = x[:, i - 1] + 0.02 * old / (1 + old**10) - 0.01 * x[:, i - 1]
    return x[:, delay + warm_up :: 10] - 0.9


def plot(
    path: pathlib.Path, losses: list[float], errors: np.ndarray, pair: Streams
) -> None:
    with picture(path) as (curve, signal):
        curve.semilogy(losses, lw=0.5)
        curve.set(xlabel="step", ylabel="squared error, one step ahead")
        curve.grid(alpha=0.3)
        signal.plot(pair[0], "k--", label="the signal")
        signal.plot(pair[1], label="a forecast, made of itself")
        signal.plot(errors, color="tab:red", label="error, of all streams")
        signal.set(xlabel="units of time ahead")
        signal.legend(loc="lower left")
        signal.grid(alpha=0.3)


def main() -> None:
    args = options(__doc__, steps=1500, streams=16, piece=32, width=48)
    ahead = 200
    signals = jnp.asarray(
        mackey_glass(args.streams, args.steps * args.piece + 1 + ahead, seed=args.seed),
        jnp.float32,
    )
    model = Forecaster(args.width, key=jr.key(args.seed))
    models = rx.add_axis(model, args.streams, "cache")
    assert models.last.weight is model.last.weight
    schedule = optax.cosine_decay_schedule(3e-3, args.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    optimizer = rx.Optimizer(models, tx)

    losses = []
    with progress(args.steps) as report:
        for i in range(args.steps):
            start = i * args.piece
            piece = signals[:, start : start + args.piece + 1]
            losses.append(float(train_step(models, optimizer, piece)))
            report(f"squared error {np.mean(losses[-50:]):.1e}")

    # The model has followed the streams up to here, so the present value is all it needs.
    present, future = jnp.split(signals[:, args.steps * args.piece :], [1], axis=1)
    guesses = forecast(rx.clone(models), present[:, 0], ahead)
    errors = np.sqrt(np.mean(np.square(guesses - future), axis=0))
    spread = float(jnp.std(future))
    print(f"The signal varies by {spread:.3f}. The forecasts are off by")
    for n in (1, 20, 100, ahead):
        print(f"  {errors[n - 1]:.4f}, {n} ahead")
    if args.picture:
        plot(args.picture, losses, errors, jnp.stack([future[0], guesses[0]]))


if __name__ == "__main__":
    main()
