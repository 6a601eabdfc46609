"""The carry of a loop: what a step is given, and what it must return."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._calls._places import place_text
from .._calls._structure import flatten
from .._core._access import refuse_cycle
from .._core._errors import describe, MismatchError
from .._core._nodes import is_module, is_traced
from .._core._ref import Ref
from .._trees._cells import is_lookup
from .._trees._keys import static_keys


def numbers_to_arrays(tree: Any) -> Any:
    """Converts Python numbers to arrays, as in JAX, except those in a module, which are
    static, as in Equinox."""

    def is_number(x: Any) -> bool:
        return isinstance(x, bool | int | float | complex)

    refuse_cycle(tree)
    leaves, treedef = jtu.tree_flatten(
        tree, is_leaf=lambda x: is_module(x) or is_lookup(x)
    )
    # The very same tree if it has none, so that a function returns the object it was given.
    if not any(map(is_number, leaves)):
        return tree
    return treedef.unflatten([jnp.asarray(x) if is_number(x) else x for x in leaves])


def whole_number(x: Any, name: str, what: str, least: int | None = None) -> int:
    """Checks that `x` is an integer, known while tracing.

    **Raises:**

    - `TypeError`, `ValueError`: if it is not, or if it is less than `least`.
    """
    try:
        number = operator.index(x)
    except TypeError:
        raise TypeError(
            f"`{name}`: {what} must be an integer that is known while tracing, but is "
            f"{eqx.tree_pformat(x)}. Pass an `int`."
        ) from None
    if least is not None and number < least:
        raise ValueError(f"`{name}`: {what} must be at least {least}, but is {number}.")
    return number


def reverse_flag(x: Any, name: str) -> bool:
    """Checks that `reverse` is `True` or `False`, known while tracing.

    **Raises:**

    - `TypeError`: if it is not.
    """
    if isinstance(x, bool | np.bool_) or (type(x) is int and x in (0, 1)):
        return bool(x)
    raise TypeError(
        f"`{name}`: `reverse` must be `True` or `False`, but is {eqx.tree_pformat(x)}."
    )


def unroll_steps(x: Any, name: str) -> int | bool:
    """Checks `unroll`, as for `jax.lax.scan`.

    **Raises:**

    - `TypeError`, `ValueError`: if it is not valid.
    """
    if isinstance(x, bool):
        return x
    return whole_number(x, name, "`unroll`", 0)


def as_callable(fn: Any) -> Any:
    """Converts a `functools.partial` to a pytree, so that its arrays are carried and not
    kept by a cache."""
    if type(fn) is functools.partial:
        return eqx.Partial(fn.func, *fn.args, **fn.keywords)
    return fn


class CarryBefore:
    """The carry given to a step, which may change it in place or consume it."""

    __slots__ = ("leaves", "structure")

    def __init__(self, carry: Any):
        self.leaves, self.structure = flatten(carry)

    def tree(self) -> Any:
        return self.structure.unflatten(self.leaves)


def check_carry(given: CarryBefore, after: Any, name: str) -> None:
    """Refuses a step that changes the carry in anything but the values of arrays.

    **Raises:**

    - `StructureError`: if the structure, a static leaf, or the place of a ref differs.
    """
    new_leaves, new = flatten(after)
    old_leaves = given.leaves
    if given.structure != new:
        raise MismatchError(
            f"`{name}`: a step must return a carry of the structure it was given. It was "
            f"given {eqx.tree_pformat(given.tree())} and returned "
            f"{eqx.tree_pformat(after)}. Return the same structure from each step."
        )
    for i, (a, b) in enumerate(zip(old_leaves, new_leaves)):
        if a is b or (is_traced(a) and is_traced(b)):
            continue
        if isinstance(a, Ref) or isinstance(b, Ref):
            remedy = (
                "Return the carry's own refs, each at its place, and write to them: "
                "`ref.value = ...`."
            )
        elif is_traced(a) or is_traced(b):
            remedy = "Make it an array before the loop and after each step."
        elif static_keys(a) == static_keys(b):
            continue
        else:
            remedy = "Only arrays can change: make it one, `jnp.asarray(...)`."
        raise MismatchError(
            f"`{name}`: a step must return the carry it was given, except for the values "
            f"of arrays. At {_path(given.tree(), i)} it was given {_carried_text(a)}, but "
            f"returned {_carried_text(b)}{_whence(b, given)}. {remedy}"
        )


def next_carry(step: Callable[[Any], Any], carry: Any, name: str) -> Any:
    """Runs one step on a carry, and checks that only the values of arrays change."""
    given = CarryBefore(carry)
    new = numbers_to_arrays(step(carry))
    check_carry(given, new, name)
    return new


def _whence(leaf: Any, given: CarryBefore) -> str:
    """The place of a ref in the carry before it was moved."""
    if isinstance(leaf, Ref):
        for i, other in enumerate(given.leaves):
            if other is leaf:
                return f" from {_path(given.tree(), i)}"
    return ""


def _path(tree: Any, i: int) -> str:
    pairs, _ = jtu.tree_flatten_with_path(tree)
    return place_text(pairs[i][0]) if i < len(pairs) else "one of its leaves"


def _carried_text(leaf: Any) -> str:
    if isinstance(leaf, Ref):
        return describe(leaf)
    if is_traced(leaf):
        return f"an array {eqx.tree_pformat(leaf)}"
    return f"the static value {leaf!r}"
