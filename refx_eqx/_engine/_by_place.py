"""The options that arguments give for refs: for each ref, at each of its places."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.tree_util as jtu

from .._calls._call import Call, close_result
from .._calls._structure import flatten, Leaves, Outcome
from .._core._errors import describe, MismatchError
from .._core._nodes import is_node, Value
from .._core._ref import Ref
from .._trees._closure import is_closure, Part
from ._by_filter import ELSEWHERE, Within


class Given(NamedTuple):
    """The option of one leaf, and whether the leaf is inside a function."""

    what: Any
    is_inside: bool


def given_of_leaves(part: Part, own: list[Any], leaves: list[Any]) -> list[Given]:
    """The option of each leaf, including those inside functions that close over refs. Such
    a function is one leaf of the tree, whose option applies to everything inside it.

    **Arguments:**

    - `own`: the option of each leaf of the tree, with a function as one leaf.
    - `leaves`: all leaves of the part, including those inside functions.
    """
    if not part.has_functions:
        return [Given(one, False) for one in own]
    given = []
    for x, one in zip(part.outer(), own):
        for number in jtu.tree_leaves(x):
            inner = one.of(leaves[number]) if isinstance(one, Within) else one
            given.append(Given(inner, is_closure(x)))
    return given


class Place(NamedTuple):
    """One place of a ref in a call: which leaf of which tree, and the option given
    there."""

    tree: int
    leaf: int
    what: Any
    where: str


Places = dict[int, list[Place]]

_FUNCTION = "the function, or what it closes over"


def read_places(
    derefed: Call,
    of_args: list[Any],
    n_args: int,
    of_function: Callable[[Any], Any],
    of_array: Callable[[Any, Any], Any],
    inside: Callable[[Any], Any],
    names: tuple[str, ...] = (),
) -> tuple[list[Leaves], Places, Places]:
    """The options of arrays outside refs; the places of each ref that give an option; and
    those at which a function reaches it, which give none.

    **Arguments:**

    - `of_args`: the options of the leaves of the last `n_args` arguments. The arguments
        before them are the functions of the call.
    - `of_function`: the option of a leaf of a function.
    - `of_array`: maps the option given for an array, and the array, to its own option.
    - `inside`: maps the option of a function to that of a leaf inside it, or `None`.
    - `names`: the names of the arguments, for messages.
    """
    last = len(derefed.parts) - 2
    first = last - n_args
    rest = iter(of_args)
    outside: list[Leaves] = []
    said: Places = {}
    reached: Places = {}
    for i, (part, leaves) in enumerate(zip(derefed.parts, derefed.leaves)):
        if first <= i < last:
            where = names[i - first] if names else f"argument {i - first}"
            own = list(itertools.islice(rest, len(part.outer())))
            given = given_of_leaves(part, own, leaves)
        else:
            where = _FUNCTION
            given = [Given(of_function(leaf), True) for leaf in leaves]
        mine: Leaves = []
        for k, (leaf, node, (what, is_inside)) in enumerate(
            zip(leaves, derefed.arrays[i], given)
        ):
            said_inside = inside(what) if is_inside else what
            if is_node(node):
                if what is ELSEWHERE:
                    mine.append(node)
                    continue
                places = reached if is_inside and said_inside is None else said
                places.setdefault(node.index, []).append(Place(i, k, what, where))
                mine.append(node)
            else:
                mine.append(None if node is None else of_array(said_inside, leaf))
        outside.append(mine)
    return outside, said, reached


def each_array(
    derefed: Call, trees: list[Leaves]
) -> Iterator[tuple[Any, Any, Ref | None]]:
    """Each array of a call, with its option from these trees, which have the form of its
    arrays; and the ref that contains it."""
    for leaves, own in zip(derefed.arrays, trees):
        for node, of_node in zip(leaves, own):
            ref = derefed.refs[node.index] if is_node(node) else None
            arrays, treedef = jtu.tree_flatten(node)
            for x, mine in zip(arrays, treedef.flatten_up_to(of_node)):
                yield x, mine, ref


def of_new_value(
    old: Any, own: Any, new: Any, if_empty: Any, if_several: Callable[[list[Any]], Any]
) -> Any:
    """The option of each array of the new value of a ref, as a tree like it: the options
    `own` of the old value, or a single one if the structure differs.

    **Arguments:**

    - `if_empty`: the option if the old value had no arrays.
    - `if_several`: returns the option if the arrays of the old value had different ones; or
        raises.
    """
    treedef = jtu.tree_structure(old)
    if jtu.tree_structure(new) == treedef:
        return own
    flat = treedef.flatten_up_to(own)
    one = flat[0] if flat else if_empty
    if len(set(flat)) > 1:
        one = if_several(flat)
    return jtu.tree_map(lambda _: one, new)


def given_of_result(
    derefed: Call,
    outcome: Outcome,
    of_leaves: Callable[[Any], list[Any]],
    of_value: Callable[[Any, Any], Any],
    name: str,
    option: str,
) -> Leaves:
    """The option of each array of the result, inside and outside refs.

    **Arguments:**

    - `of_leaves`: maps the result to the option given for each of its leaves.
    - `of_value`: maps that, and an array or the value of a ref, to the options of its
        arrays.
    - `option`: the user's name for the option, for messages.
    """
    (part,) = outcome.info.result.parts
    result = close_result(outcome, derefed.refs)
    leaves, _ = flatten(result)
    given = given_of_leaves(part, of_leaves(result), leaves)
    values = {x.index: x.value for x in outcome.out if type(x) is Value}
    found: Leaves = []
    of_refs: dict[int, Any] = {}
    for leaf, (one, _) in zip(outcome.out, given):
        if not is_node(leaf):
            found.append(None if leaf is None else of_value(one, leaf))
            continue
        found.append(leaf)
        if leaf.index in values and one is not ELSEWHERE:
            mine = of_value(one, values[leaf.index])
            if of_refs.setdefault(leaf.index, mine) != mine:
                raise MismatchError(
                    f"`{name}(..., {option}=...)` gives {describe(leaf)} two "
                    f"{option.removeprefix('out_')}, {of_refs[leaf.index]} and {mine}: it "
                    "is one new ref at two places of the result. Give the same at both "
                    "places."
                )
    return [x.with_value(of_refs[x.index]) if type(x) is Value else x for x in found]
