"""The `in_axes` and `out_axes` given by users, for `filter_vmap`, `scan` and `map`."""

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._core._ref import Ref
from .._filters._filters import FilterLike
from .._trees._cells import may_carry
from .._trees._equality import UNSET
from ._answers import answer_about_ref
from ._by_filter import ByFilter, each_leaf, NotGiven, Within


class axes(ByFilter):
    """Axes by collection, or by any other filter, for the `in_axes` of
    [`refx_eqx.filter_vmap`][], [`refx_eqx.scan`][] and [`refx_eqx.map`][].

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        model = {"w": rx.Ref(jnp.array(2.0), "params"), "n": rx.Ref(jnp.zeros(3), "counts")}

        def step(model, x):
            model["n"].value += 1
            return model["w"].value * x

        by_collection = rx.axes(params=None, counts=0)
        out = rx.filter_vmap(step, in_axes=(by_collection, 0))(model, jnp.arange(3.0))
        assert out[2] == 4.0 and model["n"].value[2] == 1.0
        ```

    A broadcast ref of collection `"rng"` is split along the mapped axis, unless it is named
    with `None`, by any filter: `rx.axes(rng=None)` gives the same randomness everywhere,
    and `rx.axes({rx.path("**.noise.**"): None}, default=None)` the same noise but different
    dropout.

    **Arguments:**

    - `by_collection`: a mapping from collection to axis (an `int`, or `None` to broadcast).
        A key may be any filter, such as `rx.path("**.shared.**")`; paths are relative to
        the tree that these axes are given for. The first match decides. A key that matches
        nothing has no effect, so the same axes work for a model with batch statistics and
        one without.
    - `default`: the axis of all other leaves: an `int`, `None`, or a function of a leaf (a
        ref is a leaf: see the `in_axes` of [`refx_eqx.filter_vmap`][]). If omitted, a leaf
        that is not named is an error, which catches misspelled keys.
    - `**collections`: the axis of each collection.

    **Raises:**

    - `TypeError`: if an axis is neither an `int` nor `None`.

    When used:

    - `StructureError`: if no axis is given for a ref or an array.
    """

    called = "rx.axes"
    what = "axis"
    several = "axes"
    option = "in_axes"
    example = "0"
    nothing = "None"

    def __init__(
        self,
        by_collection: Mapping[FilterLike, int | None] | None = None,
        *,
        default: int | Callable[[Any], int | None] | None = UNSET,
        **collections: int | None,
    ):
        super().__init__(by_collection, default, collections)

    def checked(self, one: Any, text: str) -> int | None:
        return _as_axis(one, text)

    def ask(self, function: Any, leaf: Any) -> Any:
        return _ask(function, leaf)

    def ask_within(self, function: Any, leaf: Any) -> Any:
        return _ask_within(function, leaf)


def _as_axis(axis: Any, what: str) -> int | None:
    if axis is None:
        return None
    try:
        number = operator.index(axis)
    except TypeError:
        number = None
    if number is None or isinstance(axis, bool):
        raise TypeError(
            f"`{what}`: an axis must be an int, or `None` to broadcast, but this is "
            f"{axis!r}."
        )
    return number


def leaf_axes(spec: Any, tree: Any, what: str) -> list[Any]:
    """The axis of each leaf of `tree` according to `in_axes`: an int, `None`, or a function
    yet to be called on the arrays of a ref. For a function it may be a `Within`."""

    def resolve(axis: Any, subtree: Any) -> list[Any]:
        leaves = jtu.tree_leaves(subtree)
        if axis is None or hasattr(axis, "__index__"):
            return [_as_axis(axis, what)] * len(leaves)
        if callable(axis):
            within = Within(functools.partial(_ask_within, axis))
            return [within if may_carry(x) else _ask(axis, x) for x in leaves]
        raise NotGiven(
            f"`{what}` must consist of None, ints, functions of a leaf and `rx.axes`, but "
            f"has {axis!r}."
        )

    # Not a tree: `None` is an axis here, but not a leaf of a tree.
    return each_leaf(spec, tree, what, resolve, lambda x: x is None)


def _ask(function: Any, leaf: Any) -> Any:
    """The axis of a leaf; the function itself if it is to be called for each array in the
    leaf."""
    if isinstance(leaf, Ref):
        return answer_about_ref(_answer_of, function, leaf)
    return _answer_of(function, leaf)


def _ask_within(function: Any, leaf: Any) -> Any:
    """Likewise for a leaf inside a function, whose arrays outside refs the axis does not
    concern: a function is not an array."""
    return _ask(function, leaf) if isinstance(leaf, Ref) else function


def _answer_of(function: Any, leaf: Any) -> int | None:
    return _as_axis(function(leaf), "a function from leaf to axis")


def array_axis(axis: Any, array: Any) -> int | None:
    """The axis of one array in the value of a ref."""
    return axis if axis is None or isinstance(axis, int) else _answer_of(axis, array)


def named_in_axes(fn: Any, in_axes: Any, args: tuple) -> Any:
    """Converts a dict of `in_axes` by argument name to a tuple, as in Equinox."""
    if not isinstance(in_axes, dict):
        return in_axes
    rest = dict(in_axes)
    names = list(inspect.signature(fn).parameters)[: len(args)]
    by_position = tuple(rest.pop(name, eqx.if_array(0)) for name in names)
    if rest:
        raise ValueError(
            "These `in_axes` do not belong to any argument: "
            f"{', '.join(map(repr, rest))}."
        )
    return by_position
