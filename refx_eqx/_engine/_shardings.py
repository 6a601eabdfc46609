"""`in_shardings` and `out_shardings` of a program, by reference.

They are trees of the derefed form, or prefixes of one: what is known when the program is traced,
so they are constraints in its body.
"""

from collections.abc import Callable
from typing import Any

import jax.tree_util as jtu

from .._calls._call import Call
from .._calls._structure import Leaves, Outcome, values_of
from .._core._nodes import is_node, Value
from .._sharding._prefix import leaf_shardings
from .._sharding._shard import placed_tree
from ._keep_in_place import keep_in_place


__tracebackhide__ = True


ProgramBody = Callable[[Call, list[Leaves]], Outcome]


def with_shardings(body: ProgramBody, of_args: Any, of_result: Any) -> ProgramBody:
    """The body with its arguments and its result where these say; itself if they say nothing.

    **Arguments:**

    - `of_args`: of the positional arguments: a prefix of the tuple of them, derefed; or
        `None`.
    - `of_result`: a prefix of the derefed result, or `None`.
    """

    if of_args is None and of_result is None:
        return body

    def sharded(derefed: Call, arrays: list[Leaves]) -> Outcome:
        places: dict[int, list[Any]] = {}
        if of_args is not None:
            arrays, places = _place_arguments(derefed, arrays, of_args)
        outcome = body(derefed, arrays)
        if places:
            # A ref that was on a mesh stays there: the program sees to that afterwards.
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
    """The arrays in their places, and these places by the number of the ref."""
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
