"""Donation: which buffers a call gives away, and never one that somebody else holds."""

import functools
import sys
from collections.abc import Callable
from operator import gt
from typing import Any, Literal, NamedTuple

import jax
import jax.tree_util as jtu

from .._core import _trace
from .._core._nodes import is_node
from .._core._structure import Structure


__tracebackhide__ = True


Donate = Literal["all", "all-except-first", "warn", "warn-except-first", "none", "refs"]


class Split(NamedTuple):
    """Which of the flat arrays are donated.

    The first `n_outside` of those that are donated are outside refs. `alone` says for each
    how often Python counts it if nothing but its ref holds it (see `apart`). `trees` says
    which of them are in a ref with a pytree: the number of the ref, and their positions.
    """

    donated: tuple[int, ...]
    kept: tuple[int, ...]
    n_outside: int = 0
    alone: tuple[int, ...] = ()
    trees: tuple[tuple[int, tuple[int, ...]], ...] = ()


def what_to_donate(structure: Structure, donate: str) -> tuple[list[int], set[int]]:
    """The positions of the arrays outside refs that this mode donates, and the numbers of
    the refs that it keeps though they are written."""
    first = donate.endswith("-except-first")
    kept = {x.index for x in structure.statics[0] if is_node(x)} if first else set()
    if donate in ("none", "refs"):
        return [], kept
    outside = [i for i, mine in enumerate(structure.statics) for x in mine if x is None]
    return [k for k, i in enumerate(outside) if not (first and i == 0)], kept


def same_buffer_type(old: Any, new: Any) -> bool:
    new = jax.typeof(new)  # a constant of the program may be a number of Python
    return old.shape == new.shape and old.dtype == new.dtype


def apart(
    arrays: list[Any], values: list[Any], split: Split
) -> tuple[list[Any], list[Any]]:
    """The arrays that are donated, and those that are not.

    A buffer of a ref that somebody else holds too (a snapshot, a clone, another ref, a
    variable) is theirs to keep: a copy is donated in its stead. Python counts who holds an
    object: the ref or the pytree in it, and `arrays`, `values` and the list made here.

    **Arguments:**

    - `arrays`: of the call, flat.
    - `values`: of its refs.
    - `split`: which arrays to donate.
    """
    donated = [arrays[i] for i in split.donated]
    kept = [arrays[i] for i in split.kept]
    if _trace.guards.get():
        # It may turn out that a ref may not be written here.
        return list(map(_copy, donated)), kept
    if any(map(gt, map(sys.getrefcount, donated), split.alone)):
        for k, alone in enumerate(split.alone):
            # Not through a generator or a variable, which are counted.
            if sys.getrefcount(donated[k]) > alone:
                donated[k] = _copy(donated[k])
    for number, positions in split.trees:
        if sys.getrefcount(values[number]) > _TREE_ALONE:
            for k in positions:
                donated[k] = _copy(donated[k])
    if split.n_outside:
        # The caller may donate what a ref has too, or one array twice.
        seen = set(map(id, kept)) | set(map(id, donated[split.n_outside :]))
        for k, x in enumerate(donated[: split.n_outside]):
            if id(x) in seen:
                donated[k] = _copy(x)
            seen.add(id(x))
    return donated, kept


class Packed:
    """In the result of a program: its treedef, next to a list of its leaves. So no code in
    Python runs between the end of a donating call, when its buffers are gone, and the moment
    when what it returned is kept: a signal could come there."""

    __slots__ = ("treedef",)

    def __init__(self, treedef: Any):
        self.treedef = treedef

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Packed) and self.treedef == other.treedef

    def __hash__(self) -> int:
        return hash(self.treedef)


# It is made again of itself and of `()`, of which only the first is true: by a function in C.
_first: Any = functools.partial(max, key=bool)
jtu.register_pytree_node(Packed, lambda packed: ((), packed), _first)


def pack(outcome: Any) -> tuple[list[Any], Packed]:
    """To be returned by a donating program: see `call_into`."""
    flat, treedef = jtu.tree_flatten(outcome)
    return flat, Packed(treedef)


def call_into(returned: list[Any], program: Callable[..., Any], *args: Any) -> Any:
    """What a donating program returns. It is kept in `returned`, packed: see `rescue`."""
    returned.extend(map(program, *zip(args)))
    flat, packed = returned[-1]
    return packed.treedef.unflatten(flat)


def _copy(x: Any) -> Any:
    return x.copy() if isinstance(x, jax.Array) else x  # a number of Python


def _count_alone() -> tuple[int, int]:
    """What `apart` counts for an array that only its ref holds, and for a pytree."""
    ref = [object()]
    values, arrays = ref[:], ref[:]
    donated = [arrays[0]]
    (of_array,) = map(sys.getrefcount, donated)
    del arrays, donated
    return of_array, sys.getrefcount(values[0])


ALONE, _TREE_ALONE = _count_alone()
