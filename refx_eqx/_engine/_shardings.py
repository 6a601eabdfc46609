"""The shardings of the arrays of a program: `in_shardings` and `out_shardings`, by
reference; and those of refs on a mesh, which writes preserve.

The shardings are derefed trees, or prefixes of one. These are known when the program is
traced, so they become constraints in its body.

JAX leaves the sharding of a result to the compiler. So the state of a training step would
move with each call, cause recompilation, and not be accepted by a program compiled ahead of
time. The shardings of refs are known when a call is made: there is a separate program for
each.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._calls._call import Call
from .._calls._structure import Leaves, Outcome, values_of
from .._core._nodes import is_node, Value
from .._core._on_mesh import Shardings
from .._sharding._prefix import leaf_shardings
from .._sharding._shard import placed_tree


ProgramBody = Callable[[Call, list[Leaves]], Outcome]


def with_shardings(body: ProgramBody, of_args: Any, of_result: Any) -> ProgramBody:
    """The body with these shardings for its arguments and its result; the body itself if
    none are given.

    **Arguments:**

    - `of_args`: for the positional arguments: a prefix of their derefed tuple, or `None`.
    - `of_result`: for the result: a prefix of the derefed result, or `None`.
    """

    if of_args is None and of_result is None:
        return body

    def sharded(derefed: Call, arrays: list[Leaves]) -> Outcome:
        places: dict[int, list[Any]] = {}
        if of_args is not None:
            arrays, places = _place_arguments(derefed, arrays, of_args)
        outcome = body(derefed, arrays)
        if places:
            # A ref that was on a mesh stays there: the program ensures that afterwards.
            of_refs = [
                places.get(number, [None] * len(jtu.tree_leaves(value)))
                for number, value in values_of(arrays).items()
            ]
            keep_in_place(outcome, arrays, tuple(s for one in of_refs for s in one))
        if of_result is not None:
            _place_result(outcome, of_result)
        return outcome

    return sharded


def _place_arguments(
    derefed: Call, arrays: list[Leaves], given: Any
) -> tuple[list[Leaves], dict[int, list[Any]]]:
    """The arrays with their shardings, and the shardings by the number of the ref."""
    parts = derefed.parts[:-2]  # the last two are the keywords and the callable
    trees = tuple(part.tree(leaves) for part, leaves in zip(parts, arrays))
    shardings = leaf_shardings(given, trees, trees, "`filter_jit(in_shardings=...)`")
    placed = [
        part.leaves_up_to(tree)
        for part, tree in zip(parts, placed_tree(trees, shardings))
    ]
    rest, places = iter(shardings), {}
    for node in jtu.tree_leaves(trees, is_leaf=is_node):
        its_own = [next(rest) for _ in jtu.tree_leaves(node)]
        if isinstance(node, Value):
            places[node.index] = its_own
    return [*placed, *arrays[-2:]], places


def _place_result(outcome: Outcome, given: Any) -> None:
    (part,) = outcome.info.result.parts
    tree = part.tree(outcome.out)
    shardings = leaf_shardings(given, tree, tree, "`filter_jit(out_shardings=...)`")
    outcome.out = part.leaves_up_to(placed_tree(tree, shardings))


def keep_in_place(outcome: Outcome, arrays: list[Leaves], shardings: Shardings) -> None:
    """Constrains the writes of a body to the shardings of its refs. A value of another
    structure or shape goes where the compiler puts it.

    **Arguments:**

    - `arrays`: the arrays of the call, as given to the body.
    - `shardings`: the shardings of the arrays in its refs.
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
