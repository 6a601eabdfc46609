"""The axes that a user gives: `in_axes` and `out_axes`, for `filter_vmap`, `scan` and `map`."""

import dataclasses
import inspect
import itertools
import keyword
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu

from .._core._errors import describe, MismatchError, StructureError
from .._core._identity import UNSET
from .._core._ref import Ref
from .._filters._filters import as_filter, as_option, Filter, FilterLike, Path
from .._trees._carried import Carried, counts
from .._trees._cells import may_carry
from .._trees._paths import key_text


__tracebackhide__ = True


RNG = "rng"
"""The collection of what randomness is drawn from. See `_rng_split.py`."""


@dataclasses.dataclass(frozen=True, init=False)
class axes:
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

    A broadcast ref of collection `"rng"` is split along the mapped axis. One that is named
    with `None`, by whichever filter, is not: `rx.axes(rng=None)` asks for the same
    randomness everywhere, and `rx.axes({rx.path("**.noise.**"): None}, default=None)` for
    the same noise and another dropout.

    **Arguments:**

    - `by_collection`: a mapping from collection to axis (an `int`, or `None` to
        broadcast). A key may be any filter, such as `rx.path("**.shared.**")`; paths are
        those of the tree that these axes are given for. The first that matches decides. One
        that matches nothing has no effect, so the same axes serve a model with batch
        statistics and one without.
    - `default`: the axis of all other leaves: an `int`, `None`, or a function of a leaf.
        If omitted, a leaf that is not named is an error, which finds a misspelled key.
    - `**collections`: the axis of each collection.

    **Raises:**

    - `TypeError`: if an axis is neither an `int` nor `None`.

    When used:

    - `StructureError`: if a ref or an array is met for which no axis is given.
    """

    by_collection: Mapping[Hashable, int | None]
    default: Any

    def __init__(
        self,
        by_collection: Mapping[FilterLike, int | None] | None = None,
        *,
        default: int | Callable[[Any], int | None] | None = UNSET,
        **collections: int | None,
    ):
        if by_collection is not None and not isinstance(by_collection, Mapping):
            raise TypeError(
                f"`rx.axes({by_collection!r})`: give a mapping from collection, or from "
                "any filter, to axis, as in `rx.axes({'params': 0})`."
            )
        merged = {**(by_collection or {}), **collections}
        merged = {as_option(given): axis for given, axis in merged.items()}
        for given, axis in merged.items():
            merged[given] = _as_axis(axis, f"rx.axes({{{given!r}: {axis!r}}})")
        if default is not UNSET and not callable(default):
            default = _as_axis(default, f"rx.axes(default={default!r})")
        object.__setattr__(self, "by_collection", merged)
        object.__setattr__(self, "default", default)

    def named(self, path: Path, leaf: Any) -> Any:
        """The axis of a leaf that is named, or `UNSET`."""
        for given, axis in self.by_collection.items():
            # A predicate on a leaf is for refs here: arrays have the default.
            if isinstance(given, Filter) or isinstance(leaf, Ref):
                if as_filter(given).matches(path, leaf):
                    is_rng = isinstance(leaf, Ref) and leaf.collection == RNG
                    return SAME if is_rng and axis is None else axis
        return UNSET

    def of(self, path: Path, leaf: Any) -> Any:
        """The axis of one leaf of a tree."""
        axis = self.named(path, leaf)
        if axis is not UNSET:
            return axis
        if self.default is not UNSET:
            return _ask(self.default, leaf) if callable(self.default) else self.default
        if isinstance(leaf, Ref):
            what = describe(leaf._name, leaf._collection)
        elif eqx.is_array(leaf):
            what = f"the array {eqx.tree_pformat(leaf)}"
        else:
            return None
        raise StructureError(
            f"{self!r} does not say what the axis of {what} is. Name its collection, or "
            "give a default: `rx.axes(..., default=None)`."
        )

    def __hash__(self) -> int:
        return hash((frozenset(self.by_collection.items()), self.default))

    def __repr__(self) -> str:
        given = [f"{k}={v!r}" for k, v in self.by_collection.items()]
        if self.default is not UNSET:
            given.append(f"default={self.default!r}")
        return f"rx.axes({', '.join(given)})"


def axes_text(ref: Ref, axis: int | None) -> str:
    """How to give the collection of `ref` this axis; for messages."""
    name = ref._collection
    if isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name):
        return f"rx.axes({name}={axis}, default=None)"
    return f"rx.axes({{{name!r}: {axis}}}, default=None)"


class _Same:
    """The axis of a ref of collection "rng" that is broadcast without being split."""

    def __call__(self, array: Any) -> None:
        return None

    def __repr__(self) -> str:
        return "None (the same randomness everywhere)"


SAME = _Same()


class Within(NamedTuple):
    """`rx.axes` at the place of a function: they are asked of what is inside it."""

    axes: axes
    path: Path

    def of(self, leaf: Any) -> Any:
        axis = self.axes.named(self.path, leaf)
        if axis is UNSET:
            axis = self.axes.default
        return None if axis is UNSET else axis


def _as_axis(axis: Any, what: str) -> int | None:
    if axis is None:
        return None
    try:
        return operator.index(axis)
    except TypeError:
        raise TypeError(
            f"`{what}`: an axis is an int, or `None` to broadcast, and this is {axis!r}."
        ) from None


def _is_none(x: Any) -> bool:
    return x is None


def leaf_axes(spec: Any, tree: Any, what: str) -> list[Any]:
    """The axis of each leaf of `tree`, as `in_axes` gives it: an int, `None`, or a function
    that is still to be called on the arrays of a ref. For a function it may be a `Within`;
    see `axes_of_leaves`."""

    # Not a tree: `None` is an axis here, and no leaf of the tree that has it.
    found: list[Any] = []

    def resolve(axis: Any, subtree: Any) -> None:
        if isinstance(axis, axes):
            for keys, leaf in jtu.tree_flatten_with_path(subtree)[0]:
                path = tuple(map(key_text, keys))
                inside = Within(axis, path) if may_carry(leaf) else None
                found.append(inside or axis.of(path, leaf))
            return
        leaves = jtu.tree_leaves(subtree)
        if axis is None or hasattr(axis, "__index__"):
            found.extend([_as_axis(axis, what)] * len(leaves))
        elif callable(axis):
            found.extend(_ask(axis, leaf) for leaf in leaves)
        else:
            raise _NoAxis(
                f"`{what}` must consist of None, ints, functions of a leaf and "
                f"`rx.axes`, and it has {axis!r}."
            )

    try:
        jtu.tree_map(resolve, spec, tree, is_leaf=_is_none)
    except (_NoAxis, StructureError):
        raise
    except ValueError as e:
        raise MismatchError(
            f"`{what}` must be a prefix of the tree that it is for. JAX says: {e}"
        ) from None
    return found


class _NoAxis(ValueError):
    """What was given for an axis is none."""


_NO_ANSWER = object()


def _ask(axis: Any, leaf: Any) -> Any:
    """What a function from leaf to axis says of a leaf; the function itself where it is to
    be asked for each array in the leaf.

    A ref is a leaf, so the function may tell it by its collection. Most know only arrays
    (`eqx.if_array(0)`): they say of a ref what they say of anything that is no array.
    """
    if may_carry(leaf):
        return axis
    if not isinstance(leaf, Ref):
        return _answer_of(axis, leaf)
    of_ref, of_anything = _try(axis, leaf), _try(axis, _NO_ANSWER)
    return axis if of_ref is _NO_ANSWER or of_ref == of_anything else of_ref


def _try(axis: Any, leaf: Any) -> Any:
    try:
        return _answer_of(axis, leaf)
    except Exception:
        return _NO_ANSWER


def _answer_of(axis: Any, leaf: Any) -> int | None:
    return _as_axis(axis(leaf), "a function from leaf to axis")


def array_axis(axis: Any, array: Any) -> int | None:
    """The axis of one array of the value of a ref."""
    return axis if axis is None or isinstance(axis, int) else _answer_of(axis, array)


class Given(NamedTuple):
    """The axis of one leaf, and whether the leaf is inside a function."""

    axis: Any
    is_inside: bool


def axes_of_leaves(part: Carried, own: list[Any], leaves: list[Any]) -> list[Given]:
    """The axis of each leaf, those inside functions that close over refs included. Such
    a function is one leaf of the tree, whose axis is that of all that is inside it.

    **Arguments:**

    - `own`: what `leaf_axes` has found.
    - `leaves`: all leaves of the part, those inside functions included.
    """
    if not part.nodes:
        return [Given(axis, False) for axis in own]
    rest = iter(leaves)
    given = []
    for node, n, axis in zip(part.nodes, counts(part), own):
        for leaf in itertools.islice(rest, n):
            inner = axis.of(leaf) if isinstance(axis, Within) else axis
            given.append(Given(inner, node is not None))
    return given


def named_in_axes(fn: Any, in_axes: Any, args: tuple) -> Any:
    """A dict of `in_axes` by argument name, as a tuple. As in Equinox."""
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
