"""The arrays of a call in one flat list, the fastest form for JAX's dispatch.

First the arrays outside refs, then those of each ref: a repeated call, which knows
everything else, just reads and appends the values of its refs. Only programs and plans use
this form.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax.tree_util as jtu

from .._calls._call import Call
from .._calls._places import place
from .._calls._structure import Leaves, Structure, values_of
from .._core import _jax
from .._core._errors import describe
from .._core._nodes import Index, is_node, Value
from .._core._on_mesh import on_mesh, Shardings
from .._trees._keys import weakly


class Flat(NamedTuple):
    """The arrays, the trees that they are leaves of (the arrays outside refs, and the
    values), and the shardings of those in refs that are on a mesh."""

    arrays: list[Any]
    treedef: Any
    shardings: Shardings


def flat_of(derefed: Call) -> Flat:
    """The flat arrays of a call, which are flattened once."""
    if derefed.flat is None:
        outside = [
            x
            for leaves in derefed.arrays
            for x in leaves
            if x is not None and type(x) is not Value and type(x) is not Index
        ]
        values = list(values_of(derefed.arrays).values())
        flat, treedef = jtu.tree_flatten((outside, values))
        shardings: Shardings = ()
        if _jax.is_evaluating():
            shardings = on_mesh(flat[treedef.children()[0].num_leaves :])
        derefed.flat = Flat(flat, treedef, shardings)
    return derefed.flat


def program_key(derefed: Call) -> Hashable:
    """Equal for two calls that can run the same program: the structure, and which refs have
    a channel."""
    return derefed.structure.key, flat_of(derefed).treedef


def unflatten(structure: Structure, treedef: Any, flat: list[Any]) -> list[Leaves]:
    """Restores the arrays of a call of this structure."""
    outside, values = treedef.unflatten(flat)
    rest = iter(outside)
    return [
        [
            next(rest)
            if static is None
            else static.with_value(values[static.index])
            if type(static) is Value
            else (static if type(static) is Index else None)
            for static in statics
        ]
        for statics in structure.statics
    ]


def forget_values(derefed: Call) -> None:
    """Makes the call keep no arrays and no static leaves alive, for a plan."""
    derefed.flat = flat_of(derefed)._replace(arrays=[])
    derefed.arrays, derefed.values, derefed.leaves = [], [], []
    statics = [
        [x if is_node(x) else weakly(x) or x for x in statics]
        for statics in derefed.structure.statics
    ]
    derefed.structure = derefed.structure.with_statics(statics)


def flat_place(derefed: Any, n: int) -> str:
    """The place in a call of its flat array number `n`."""
    places = [
        (i, k, leaf)
        for i, leaves in enumerate(derefed.arrays)
        for k, leaf in enumerate(leaves)
    ]
    # The arrays in refs come last.
    for i, k, leaf in sorted(places, key=lambda x: type(x[2]) is Value):
        n -= len(jtu.tree_leaves(leaf))
        if n < 0:
            where = place(derefed.parts, i, k)
            if type(leaf) is not Value:
                return where
            ref = derefed.refs[leaf.index]
            return f"{describe(ref)}, in {where}"
    raise AssertionError("every array of a call has a place in it")
