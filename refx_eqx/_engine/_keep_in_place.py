"""What a program writes to a ref that is on a mesh stays where it was.

JAX leaves it to the compiler how a result is split. So the state of a training step would move
with each call, be compiled for again, and be none that a program compiled ahead of time takes.
Where the refs are is known when a call is made: there is a program for each.
"""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._calls._structure import Leaves, Outcome, values_of
from .._core._on_mesh import Shardings


__tracebackhide__ = True


def keep_in_place(outcome: Outcome, arrays: list[Leaves], shardings: Shardings) -> None:
    """Constrains what a body writes to refs to stay where these are. A value of another
    structure or shape goes where the compiler puts it.

    **Arguments:**

    - `arrays`: of the call, as the body had them.
    - `shardings`: where the arrays in its refs are.
    """
    rest = iter(shardings)
    for number, old in values_of(arrays).items():
        leaves, treedef = jtu.tree_flatten(old)
        places = [next(rest) for _ in leaves]
        if number not in outcome.updates:
            continue
        new, new_treedef = jtu.tree_flatten(outcome.updates[number])
        if new_treedef == treedef:
            outcome.updates[number] = treedef.unflatten(map(_stay, new, leaves, places))


def _stay(new: Any, old: Any, sharding: Any) -> Any:
    if sharding is None or jnp.shape(new) != jnp.shape(old):
        return new
    return jax.lax.with_sharding_constraint(new, sharding)
