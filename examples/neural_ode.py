"""Learns the forces of a pendulum from its motion: a neural ODE, solved by Diffrax.

    python examples/neural_ode.py --steps 1000 --picture neural_ode.png

What to look at:

- The vector field is a module of refs: a network for the force at an angle, and a number for
  the friction. Diffrax does not know refs: `rx.Dag` carries them through its solver by value.
- The gradient goes through the solver with Diffrax's own adjoint, and ends at the refs.
"""

import pathlib
from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _run import options, picture, progress
from jaxtyping import Array, Float, PRNGKeyArray

import refx_eqx as rx


State = Float[Array, "2"]  # an angle and its velocity
Times = Float[Array, " times"]
Motion = Float[Array, "times 2"]

FRICTION = 0.15


class Pendulum(rx.Module):
    """The acceleration: a force that depends on the angle, and friction."""

    force: eqx.nn.MLP
    friction: rx.Param[Float[Array, ""]]

    def __init__(self, *, key: PRNGKeyArray):
        self.force = rx.nn.MLP(2, "scalar", 32, 2, jax.nn.softplus, key=key)
        self.friction = jnp.array(0.0)

    def force_at(self, angle: Float[Array, ""]) -> Float[Array, ""]:
        return self.force(jnp.array([jnp.sin(angle), jnp.cos(angle)]))

    def __call__(self, y: State) -> State:
        angle, velocity = y
        return jnp.array(
            [velocity, self.force_at(angle) - self.friction[...] * velocity]
        )


def real_pendulum(y: State) -> State:
    angle, velocity = y
    return jnp.array([velocity, -jnp.sin(angle) - FRICTION * velocity])


def solve(field: Callable[[State], State], start: State, times: Times) -> Motion:
    """The motion from `start`, at `times`."""
    # Diffrax needs the arguments of a term to be a pytree of arrays. A `Dag` is one: it is
    # derefed when it is flattened, and inside the solver `dag.value` is the module again.
    term = diffrax.ODETerm(lambda t, y, dag: dag.value(y))
    solution = diffrax.diffeqsolve(
        term,
        diffrax.Tsit5(),
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=start,
        args=rx.Dag(field),
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-6),
    )
    assert solution.ys is not None
    return solution.ys


def solve_all(
    field: Callable[[State], State], starts: Float[Array, "batch 2"], times: Times
) -> Float[Array, "batch times 2"]:
    return rx.filter_vmap(solve, in_axes=(None, 0, None))(field, starts, times)


@rx.filter_jit(donate="refs")
def train_step(
    model: Pendulum,
    optimizer: rx.Optimizer,
    motions: Float[Array, "batch times 2"],
    times: Times,
) -> Float[Array, ""]:
    def loss_fn(model: Pendulum) -> Float[Array, ""]:
        return jnp.mean(jnp.square(solve_all(model, motions[:, 0], times) - motions))

    loss, grads = rx.filter_value_and_grad(loss_fn, wrt="params")(model)
    optimizer.update(model, grads)
    return loss


def plot(path: pathlib.Path, model: Pendulum, start: State) -> None:
    with picture(path) as (force, motion):
        angles = jnp.linspace(-np.pi, np.pi, 200)
        force.plot(angles, -jnp.sin(angles), "k--", label="real")
        force.plot(angles, jax.vmap(model.force_at)(angles), label="learned")
        force.set(xlabel="angle", ylabel="force")
        force.legend()
        force.grid(alpha=0.3)
        times = jnp.linspace(0.0, 30.0, 600)
        motion.plot(times, solve(real_pendulum, start, times)[:, 0], "k--")
        motion.plot(times, solve(model, start, times)[:, 0])
        motion.axvspan(0, 4, alpha=0.1, label="as long as the motions it learned from")
        motion.set(xlabel="time", ylabel="angle")
        motion.legend()
        motion.grid(alpha=0.3)


def main() -> None:
    args = options(__doc__, steps=1000, batch_size=32, motions=256)
    key1, key2, key3 = jr.split(jr.key(args.seed), 3)
    limits = jnp.array([3.0, 2.0])
    starts = jr.uniform(key1, (args.motions, 2), minval=-limits, maxval=limits)
    times = jnp.linspace(0.0, 4.0, 20)
    motions = rx.filter_jit(solve_all)(real_pendulum, starts, times)
    motions += 0.01 * jr.normal(key2, motions.shape)  # measurement noise

    model = Pendulum(key=key3)
    schedule = optax.cosine_decay_schedule(1e-2, args.steps)
    optimizer = rx.Optimizer(model, optax.adam(schedule))
    rng = np.random.default_rng(args.seed)
    with progress(args.steps) as report:
        for _ in range(args.steps):
            rows = rng.integers(0, args.motions, args.batch_size)
            loss = train_step(model, optimizer, motions[rows], times)
            report(f"loss {loss:.5f}, friction {model.friction.value:.3f}")

    angles = jnp.linspace(-np.pi, np.pi, 200)
    errors = jnp.abs(jax.vmap(model.force_at)(angles) + jnp.sin(angles))
    print(f"Friction: {model.friction.value:.3f} (true value: {FRICTION})")
    print(f"The force, which is at most 1, is off by at most {jnp.max(errors):.3f}.")
    if args.picture:
        plot(args.picture, model, jnp.array([2.8, 0.0]))


if __name__ == "__main__":
    main()
