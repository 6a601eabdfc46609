"""Trains an actor and a critic, with a shared trunk, to balance a pole on a cart.

    python examples/actor_critic.py --updates 1000 --picture actor_critic.png

What to look at:

- The actor and the critic share a trunk, the refs of one `rx.nn.MLP`. It has one gradient,
  the sum of both, and one slot in the optimizer.
- The environment is a module too. Its state and its randomness are refs, so `step` takes
  only an action. `rx.filter_vmap` makes many environments, and steps all of them.
- The target network is an `rx.nn.EMA` of the critic, so it lags a few updates behind.
- An update is one compiled function. `rx.scan` plays, the networks learn from what they saw,
  and environments, networks, target and optimizer are written in place.
"""

import pathlib
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _run import options, picture, progress
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import refx_eqx as rx


State = Float[Array, "4"]  # cart position and velocity, pole angle and velocity
Values = Float[Array, "steps envs"]
Scalar = Float[Array, ""]

STEPS_AT_MOST = 500
DISCOUNT = 0.99
TRUST = 0.95  # in the rewards seen, over the critic: the lambda of TD(lambda)


class CartPole(rx.Module):
    """The classic control problem of Barto, Sutton and Anderson. It restarts by itself."""

    state: rx.Ref[State] = rx.field(collection="environment")
    age: rx.Ref[Int[Array, ""]] = rx.field(collection="environment")
    rngs: rx.Rngs

    def __init__(self, *, key: PRNGKeyArray):
        self.rngs = rx.Rngs(key)
        self.state = self._start()
        self.age = jnp.zeros((), jnp.int32)

    def _start(self) -> State:
        return jr.uniform(self.rngs.start(), (4,), minval=-0.05, maxval=0.05)

    def step(self, action: Int[Array, ""]) -> tuple[State, Array, Array]:
        """Pushes the cart to the left (0) or to the right (1). Returns the new state,
        whether the pole has fallen, and whether this was the last step of the episode."""
        _, v, angle, spin = self.state.value
        force = jnp.where(action == 1, 10.0, -10.0)
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        push = (force + 0.05 * spin**2 * sin) / 1.1
        spin_up = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        speed_up = push - 0.05 * spin_up * cos / 1.1
        change = jnp.stack([v, speed_up, spin, spin_up])
        state = self.state.value + 0.02 * change

        fallen = (jnp.abs(state[0]) > 2.4) | (jnp.abs(state[2]) > 0.2095)
        age = self.age.value + 1
        is_last = fallen | (age >= STEPS_AT_MOST)
        self.state.value = jnp.where(is_last, self._start(), state)
        self.age.value = jnp.where(is_last, 0, age)
        return state, fallen, is_last


class Head(rx.Module):
    """A linear layer on top of a trunk, which other heads may share."""

    trunk: eqx.nn.MLP
    last: eqx.nn.Linear

    def __init__(
        self, trunk: eqx.nn.MLP, n_out: int | Literal["scalar"], *, key: PRNGKeyArray
    ):
        self.trunk = trunk
        self.last = rx.nn.Linear(trunk.out_size, n_out, key=key)

    def __call__(self, state: State) -> Array:
        return self.last(self.trunk(state))


class Agent(rx.Module):
    actor: Head
    critic: Head

    def __init__(self, width: int, *, key: PRNGKeyArray):
        key1, key2, key3 = jr.split(key, 3)
        trunk = rx.nn.MLP(
            4, width, width, 1, jnp.tanh, final_activation=jnp.tanh, key=key1
        )
        self.actor = Head(trunk, 2, key=key2)
        self.critic = Head(trunk, "scalar", key=key3)


class Played(NamedTuple):
    """The recorded steps of all environments."""

    state: Float[Array, "steps envs 4"]
    action: Int[Array, "steps envs"]
    following: Float[Array, "steps envs 4"]
    fallen: Bool[Array, "steps envs"]
    is_last: Bool[Array, "steps envs"]
    age: Int[Array, "steps envs"]


def play(agent: Agent, envs: CartPole, rngs: rx.Rngs, steps: int) -> Played:
    def step(_: None, __: None) -> tuple[None, Played]:
        state, age = envs.state.value, envs.age.value
        action = jr.categorical(rngs.action(), jax.vmap(agent.actor)(state))
        out = rx.filter_vmap(CartPole.step)(envs, action)
        return None, Played(state, action, *out, age + 1)

    _, played = rx.scan(step, None, length=steps)
    return played


def returns_of(played: Played, values: Values) -> Values:
    """The discounted return from each step on. The reward is `1 - DISCOUNT` per step, so the
    return is 1 if the pole never falls. `values` are the critic's, for the next states."""

    def before(later: Array, x: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        fallen, is_last, value = x
        # An episode that was only cut off would have gone on: ask the critic.
        rest = jnp.where(is_last, value, (1 - TRUST) * value + TRUST * later)
        total = (1 - DISCOUNT) + DISCOUNT * jnp.where(fallen, 0.0, rest)
        return total, total

    xs = played.fallen, played.is_last, values
    return jax.lax.scan(before, values[-1], xs, reverse=True)[1]


def of_each(network: Head, states: Float[Array, "steps envs 4"]) -> Array:
    return jax.vmap(jax.vmap(network))(states)


def loss_fn(agent: Agent, played: Played, returns: Values) -> Scalar:
    logits = of_each(agent.actor, played.state)
    errors = returns - of_each(agent.critic, played.state)
    advantages = jax.lax.stop_gradient(errors / (jnp.std(errors) + 1e-8))
    surprise = optax.softmax_cross_entropy_with_integer_labels(logits, played.action)
    entropy = optax.softmax_cross_entropy(logits, jax.nn.softmax(logits))
    return jnp.mean(advantages * surprise + jnp.square(errors) - 0.01 * entropy)


@rx.filter_jit(donate="refs")
def update(
    agent: Agent,
    target: rx.nn.EMA,
    optimizer: rx.Optimizer,
    envs: CartPole,
    rngs: rx.Rngs,
    steps: int,
) -> tuple[Scalar, Scalar]:
    """Plays, and learns from it. Returns the total length of the episodes that ended, and
    their number."""
    played = play(agent, envs, rngs, steps)
    returns = returns_of(played, of_each(target.model, played.following))
    grads = rx.filter_grad(loss_fn, wrt="params")(agent, played, returns)
    optimizer.update(agent, grads)
    target.update(agent.critic)
    n_ended = jnp.sum(played.is_last)
    return jnp.sum(jnp.where(played.is_last, played.age, 0)), n_ended


@rx.filter_jit
def balance(agent: Agent, env: CartPole) -> tuple[Array, Array]:
    """Plays one episode, always with the likelier action. Returns the states, and whether
    the episode was still going on in each."""

    def step(goes_on: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        state = env.state.value
        is_last = env.step(jnp.argmax(agent.actor(state)))[2]
        return goes_on & ~is_last, (state, goes_on)

    return rx.scan(step, jnp.array(True), length=STEPS_AT_MOST)[1]


def plot(
    path: pathlib.Path, lengths: list[float], states: Array, goes_on: Array
) -> None:
    with picture(path) as (curve, episode):
        curve.plot(lengths)
        curve.set(xlabel="update", ylabel="length of the episodes that ended")
        curve.axhline(STEPS_AT_MOST, color="k", ls="--")
        curve.grid(alpha=0.3)
        seconds = 0.02 * np.arange(int(np.sum(goes_on)))
        shown = np.asarray(states)[: len(seconds)]
        episode.plot(seconds, shown[:, 0], label="place of the cart, m")
        episode.plot(
            seconds, np.degrees(shown[:, 2]), label="angle of the pole, degrees"
        )
        episode.set(xlabel="time, s", title="An episode, after the training")
        episode.legend()
        episode.grid(alpha=0.3)


def main() -> None:
    args = options(__doc__, updates=1000, envs=32, steps=32, width=64)
    key1, key2, key3, key4 = jr.split(jr.key(args.seed), 4)
    agent = Agent(args.width, key=key1)
    assert agent.actor.trunk is agent.critic.trunk
    target = rx.nn.EMA(agent.critic, decay=0.9)
    schedule = optax.linear_schedule(3e-3, 0.0, args.updates)
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(schedule))
    optimizer = rx.Optimizer(agent, tx)
    envs = rx.filter_vmap(lambda key: CartPole(key=key))(jr.split(key2, args.envs))
    rngs = rx.Rngs(key3)

    lengths: list[float] = []
    length = np.nan
    with progress(args.updates) as report:
        for _ in range(args.updates):
            total, n = update(agent, target, optimizer, envs, rngs, args.steps)
            length = float(total / n) if n > 0 else length
            lengths.append(length)
            report(f"{length:5.1f} steps per episode")

    test = [balance(agent, CartPole(key=key)) for key in jr.split(key4, 20)]
    balanced = [int(jnp.sum(goes_on)) for _, goes_on in test]
    print(f"Episodes of at most {STEPS_AT_MOST} steps, after {args.updates} updates:")
    print(f"  the first in training had {np.nanmean(lengths[:5]):.0f} steps on average")
    print(f"  20 by the trained actor had {np.mean(balanced):.0f} steps on average")
    if args.picture:
        plot(args.picture, lengths, *test[0])


if __name__ == "__main__":
    main()
