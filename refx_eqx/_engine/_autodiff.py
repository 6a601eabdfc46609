"""The differentiated inputs of a call, and the outputs that have a derivative.

Each transform of this family is the JAX transform of the same name, on the arrays of one
call. The function runs only once, also as seen by its counters: the state it writes is
auxiliary to the derivative, and is written when the transform returns.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._calls._call import Call, call, close_result
from .._calls._structure import (
    array_of,
    flatten,
    Leaves,
    Outcome,
    split,
    Structure,
    tree_of,
)
from .._core._deref import deref_leaves
from .._core._errors import name_of, StructureError
from .._core._nodes import is_inexact
from .._filters._select import check_can_select, choose, leaves_with_paths
from .._trees._closure import Part
from ._backward import apart_from_channels
from ._tangents import read_tangents


def first_of(args: tuple, name: str) -> Any:
    """The first argument, which most of these transforms differentiate."""
    if not args:
        raise TypeError(
            f"`{name}` differentiates the first argument, which must be passed by "
            "position: none was given."
        )
    return args[0]


def differentiable(
    derefed: Call, trees: tuple, wrt: Any = None, by_first: bool = False
) -> tuple[list[Leaves], list[Leaves]]:
    """The arrays of the first trees of a call, in two parts: the differentiated ones, and
    the others. Each has `None` for the other.

    A path in `wrt` begins with the number of the tree, or is relative to the first tree if
    `by_first`.

    The inexact arrays selected by `wrt` are differentiated. They include a Python `float`
    in a ref, which is an array under `jit`.
    """
    arrays = derefed.arrays[: len(trees)]
    diff, rest = eqx.partition(arrays, _wanted(derefed, trees, wrt, by_first))
    # An eager derivative would pass Python and NumPy numbers unconverted.
    return jtu.tree_map(array_of, diff), rest


def _wanted(derefed: Call, trees: tuple, wrt: Any, by_first: bool) -> Any:
    """A filter spec for the arrays of these trees that are differentiated."""
    if wrt is None:
        return is_inexact
    check_can_select(trees[0] if by_first else trees, wrt)
    found = [
        part.tree(leaves)
        for part, leaves in zip(derefed.parts, derefed.leaves[: len(trees)])
    ]
    pairs, _ = leaves_with_paths(found[0] if by_first else found)
    answers = iter(choose(pairs, wrt))
    return [
        [
            jtu.tree_map(lambda x, ok=next(answers) == 0: ok and is_inexact(x), leaf)
            for leaf in leaves
        ]
        for leaves in derefed.arrays[: len(trees)]
    ]


def nothing_to_differentiate(name: str, fn: Any, wrt: Any) -> StructureError:
    return StructureError(
        f"`{name}` found nothing to differentiate in the first argument of "
        f"`{name_of(fn)}`"
        + ("" if wrt is None else f" for wrt={wrt!r}")
        + ": it differentiates floating-point and complex arrays, inside and outside refs. "
        "Pass the value to differentiate as the first argument. (A predicate filter receives "
        "the ref, not its value.)"
    )


def derefed_result(
    structure: Structure, outcome: Outcome, arrays: list[Leaves]
) -> tuple[Part, Leaves]:
    """The derefed result of a body that was run on `arrays`: its structure and its leaves.
    A returned ref of the caller has its final value."""
    result = close_result(outcome, structure.refs_after(outcome, arrays))
    leaves, part = flatten(result)
    return part, deref_leaves(leaves, {}, lambda ref: ref._value)


def arrays_of_result(
    structure: Structure, outcome: Outcome, arrays: list[Leaves]
) -> tuple[Part, Leaves]:
    """As `derefed_result`, with `None` for leaves that are not arrays."""
    part, leaves = derefed_result(structure, outcome, arrays)
    return part, split(leaves, eqx.is_array)[0]


def first_of_pair(part: Part, leaves: Leaves, name: str) -> tuple[Part, Leaves]:
    """The differentiated part of a result with `has_aux`."""
    children, node = part.treedef.children(), part.treedef.node_data()
    if node is None or node[0] is not tuple or len(children) != 2:
        raise TypeError(
            f"`{name}(..., has_aux=True)`: the function must return a pair "
            "`(value, aux)`."
        )
    first = Part(children[0], part.has_functions)
    return first, leaves[: children[0].num_leaves]


class TangentSpace(NamedTuple):
    """One side of a derivative: trees of inputs or outputs. Hashable.

    - `parts`: the structure of each tree; `treedef`: that of the derefed leaves, with
        `None` for leaves without a derivative; `types`: those of the arrays.
    """

    parts: tuple[Part, ...]
    treedef: Any
    types: tuple[jax.ShapeDtypeStruct, ...]

    def trees(self, leaves: Sequence[Leaves]) -> tuple:
        """The derefed trees, with these values as arrays."""
        return tuple(map(tree_of, self.parts, leaves))

    def read(self, trees: Sequence[Any], what: str) -> list[Leaves]:
        """The tangents or cotangents given by a user, with zeros for `None`."""
        like = jtu.tree_unflatten(self.treedef, self.types)
        given = read_tangents(self.parts, like, trees, what)
        filled = [
            jnp.zeros(t.shape, t.dtype) if x is None else x
            for x, t in zip(self.treedef.flatten_up_to(given), self.types)
        ]
        return jtu.tree_unflatten(self.treedef, filled)


def tangent_space(parts: Sequence[Part], leaves: list[Leaves]) -> TangentSpace:
    arrays, treedef = jtu.tree_flatten(leaves)
    types = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in arrays]
    return TangentSpace(tuple(parts), treedef, tuple(types))


class DifferentiableCall:
    """A call as a function from its differentiated arrays to the differentiable arrays of
    its result. Everything else is auxiliary.

    - `arrays`: the differentiated arrays. `inputs`: their side.
    - `outputs`: the other side, known after the call.
    """

    outputs: TangentSpace

    def __init__(
        self,
        name: str,
        derefed: Call,
        trees: tuple,
        wrt: Any,
        has_aux: bool,
        by_first: bool = False,
    ):
        n = len(trees)
        self.name = name
        self.derefed = derefed
        self.has_aux = has_aux
        self.arrays, self._rest = differentiable(derefed, trees, wrt, by_first)
        self._others = derefed.arrays[n:]
        self.inputs = tangent_space(derefed.parts[:n], self.arrays)

    def __call__(self, arrays: list[Leaves]) -> tuple[list[Leaves], Outcome]:
        everything = [*eqx.combine(arrays, self._rest), *self._others]
        outcome = self.derefed.run(self.name, everything)
        part, leaves = arrays_of_result(self.derefed.structure, outcome, everything)
        if self.has_aux:
            part, leaves = first_of_pair(part, leaves, self.name)
        out = [eqx.filter(leaves, is_inexact)]
        self.outputs = tangent_space((part,), out)
        return out, outcome


class LinearMap(eqx.Module):
    """What `filter_vjp` and `filter_linearize` return: a pytree whose leaves are the
    residuals.

    - `linear`: JAX's linear map.
    """

    linear: Any
    inputs: TangentSpace = eqx.field(static=True)
    outputs: TangentSpace = eqx.field(static=True)


def with_linear_map(
    name: str,
    derive: Callable[..., Any],
    cls: type[LinearMap],
    fun: Callable[..., Any],
    primals: tuple,
    has_aux: bool,
    wrt: Any,
) -> Any:
    """Calls the function. Returns its result, the linear map that JAX's `derive` makes from
    the call, and the auxiliary result if there is one."""
    found: dict[str, Any] = {}

    def transform(derefed: Call) -> Outcome:
        fn = DifferentiableCall(name, derefed, primals, wrt, has_aux)
        _, linear, outcome = derive(fn, fn.arrays, has_aux=True)
        found["map"] = cls(linear, fn.inputs, fn.outputs)
        return outcome

    result = call(fun, primals, {}, apart_from_channels(transform))
    if has_aux:
        out, aux = result
        return out, found["map"], aux
    return result, found["map"]
