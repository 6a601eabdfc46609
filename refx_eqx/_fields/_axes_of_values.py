"""The axis names of the value of a ref, from its declared types and `Batched`.

`weight: rx.Param[Float[Array, "out in"]]` names two axes. A ref shared by several fields
has the names of all of them. A stack (`filter_vmap(Linear)`) has additional axes, which
`layers: rx.Batched[Linear, "depth"]` names.
"""

import types
from typing import Any, get_args, get_origin, Union

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


Stack = tuple[str, ...]
"""The names of the axes of a stack, outermost first."""


def declared_axes(ref: Ref, stack: Stack = ()) -> list[list[DeclaredAxes]]:
    """For each leaf of the value of a ref, the axes according to each declared type that
    fixes their number."""
    value = peek(ref)
    leaves, treedef = jtu.tree_flatten(value)
    found: list[list[DeclaredAxes]] = [[] for _ in leaves]
    for bound in ref._declared or ():
        if type(bound) is Following:
            for x, axes in zip(leaves, found):
                axes += [of_weight.with_rank(_rank(x)) for of_weight in bound.axes]
            continue
        told = treedef.flatten_up_to(_of_type(bound, value, stack))
        for of_array, axes in zip(told, found):
            axes += [] if of_array is None else [of_array]
    return found


def _of_type(bound: BoundType, value: Any, stack: Stack) -> Any:
    """The value, with each leaf replaced by `DeclaredAxes` or `None`."""
    extra = _extra_axes(bound, value)

    def of_array(x: Any, hint: Any) -> DeclaredAxes | None:
        rank = _rank(x)
        rest = [i for i in range(rank) if i not in extra]
        words = words_of(hint, len(rest))
        if words is None:
            if bound.declared.sharding is None:
                return None
            words = (None,) * len(rest)
        names: list[str | None] = [None] * rank
        for i, word in zip(rest, words):
            names[i] = word
        # If a `Batched` is itself in a stack, the outer axes have no name.
        for i, word in zip(reversed(extra), reversed(stack)):
            names[i] = word
        return DeclaredAxes(tuple(names), extra, bound.declared.sharding)

    return _walk(of_array, value, bound.declared.hint)


def _extra_axes(bound: BoundType, value: Any) -> tuple[int, ...]:
    """As positions in the stack. (A type says which to remove, one after the other.)"""
    if words_of(bound.declared.hint, _rank(value)):
        return ()  # the common case, without a check
    rest = list(range(min(map(_rank, jtu.tree_leaves(value)), default=0)))
    return tuple(rest.pop(axis) for axis in bound.extra_axes(value) or ())


def _rank(x: Any) -> int:
    return len(getattr(x, "shape", ()))  # also for a `jax.ShapeDtypeStruct`


def _walk(of_array: Any, value: Any, hint: Any) -> Any:
    """Applies `of_array(x, hint)` to each leaf of `value`, with the part of the type for
    that leaf."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        of_all = [_walk(of_array, value, member) for member in args]
        told = (x for x in of_all if jtu.tree_leaves(x))
        return next(told, of_all[0])
    if origin in (tuple, list) and type(value) is origin:
        same = origin is list or args[1:] == (Ellipsis,)
        hints = args[:1] * len(value) if same else args
        return origin(_walk(of_array, x, h) for x, h in zip(value, hints))
    if origin is dict and type(value) is dict:
        return {key: _walk(of_array, x, args[1]) for key, x in value.items()}
    leaves, treedef = jtu.tree_flatten(value)
    is_one = len(leaves) == 1 and leaves[0] is value
    return treedef.unflatten([of_array(x, hint if is_one else None) for x in leaves])


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
