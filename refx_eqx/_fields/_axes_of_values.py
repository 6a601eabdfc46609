"""The axis names of the value of a ref, from its declared types and `Batched`.

`weight: rx.Param[Float[Array, "out in"]]` names two axes. A ref shared by several fields
has the names of all of them. A stack (`filter_vmap(Linear)`) has additional axes, which
`layers: rx.Batched[Linear, "depth"]` names.
"""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._core._access import peek
from .._core._ref import Ref
from .._trees._cells import is_lookup
from ._axis_names import words_of
from ._batched import BatchedHint
from ._bound import BoundType
from ._following import DeclaredAxes, Following
from ._module_fields import plain_hints
from ._parts import arrays_in


Stack = tuple[str, ...]
"""The names of the axes of a stack, outermost first."""


def declared_axes(ref: Ref, stack: Stack = ()) -> list[list[DeclaredAxes]]:
    """For each leaf of the value of a ref, the axes according to each declared type that
    fixes their number."""
    value = peek(ref)
    leaves = jtu.tree_leaves(value)
    found: list[list[DeclaredAxes]] = [[] for _ in leaves]
    for bound in ref._declared or ():
        if type(bound) is Following:
            for x, axes in zip(leaves, found):
                axes += [of_weight.with_rank(_rank(x)) for of_weight in bound.axes]
            continue
        for of_array, axes in zip(_of_type(bound, value, stack), found):
            axes += [] if of_array is None else [of_array]
    return found


def _of_type(
    bound: BoundType, value: Any, stack: Stack
) -> Iterator[DeclaredAxes | None]:
    """For each leaf of the value."""
    extra = _extra_axes(bound, value)
    leaves, treedef = jtu.tree_flatten(value)
    # Instead of the leaves, of which two may be the same array.
    places = [object() for _ in leaves]
    hints: dict[int, list[Any]] = {id(place): [] for place in places}
    for place, hint in arrays_in(treedef.unflatten(places), bound.declared.hint):
        hints.get(id(place), []).append(hint)
    for x, place in zip(leaves, places):
        rank = _rank(x)
        rest = [i for i in range(rank) if i not in extra]
        told = (words_of(hint, len(rest)) for hint in hints[id(place)])
        words = next((words for words in told if words is not None), None)
        if words is None:
            if bound.declared.sharding is None:
                yield None
                continue
            words = (None,) * len(rest)
        names: list[str | None] = [None] * rank
        for i, word in zip(rest, words):
            names[i] = word
        # If a `Batched` is itself in a stack, the outer axes have no name.
        for i, word in zip(reversed(extra), reversed(stack)):
            names[i] = word
        yield DeclaredAxes(tuple(names), extra, bound.declared.sharding)


def _extra_axes(bound: BoundType, value: Any) -> tuple[int, ...]:
    """As positions in the stack. (A type says which to remove, one after the other.)"""
    if words_of(bound.declared.hint, _rank(value)):
        return ()  # the common case, without a check
    rest = list(range(min(map(_rank, jtu.tree_leaves(value)), default=0)))
    return tuple(rest.pop(axis) for axis in bound.extra_axes(value) or ())


def _rank(x: Any) -> int:
    return len(getattr(x, "shape", ()))  # also for a `jax.ShapeDtypeStruct`


def stacks_in(tree: Any) -> dict[int, Stack]:
    """The stack axis names given by the `Batched` fields of the modules in a tree, by the
    `id` of the ref."""
    found: dict[int, Stack] = {}

    def visit(module: Any) -> bool:
        if isinstance(module, eqx.Module):
            for name, hint in plain_hints(type(module)).items():
                if isinstance(hint, BatchedHint):
                    refs = jtu.tree_leaves(vars(module).get(name))
                    for ref in {id(x): x for x in refs if isinstance(x, Ref)}.values():
                        # Modules are visited from the outside in, and so are their axes.
                        stack = found.get(id(ref), ())
                        found[id(ref)] = (*stack, *hint.axes.split())
        return is_lookup(module)

    jtu.tree_leaves(tree, is_leaf=visit)
    return found
