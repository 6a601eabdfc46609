"""Donation: which buffers a call donates, but never one that is held elsewhere."""

import dataclasses
from collections.abc import Callable, Sequence
from sys import getrefcount
from typing import Any, Literal

import jax

from .._calls._structure import Structure
from .._core import _trace
from .._core._nodes import is_node
from .._core._ref import commits
from ._contents import Picker, picker


Donate = Literal["all", "all-except-first", "warn", "warn-except-first", "none", "refs"]


@dataclasses.dataclass(slots=True, eq=False)
class Split:
    """Which flat arrays are donated.

    - `donated`, `kept`: their positions;
    - `n_outside`: the number of donated arrays outside refs, which come first;
    - `alone`: for each of the others, its reference count if only its ref holds it (see
        `apart`);
    - `trees`: those that are in a ref to a pytree: the number of the ref, and their
        positions.
    """

    donated: tuple[int, ...]
    kept: tuple[int, ...]
    n_outside: int = 0
    alone: list[int] = dataclasses.field(default_factory=list)
    trees: tuple[tuple[int, tuple[int, ...]], ...] = ()
    take_donated: Picker = dataclasses.field(init=False)
    take_kept: Picker = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.take_donated, self.take_kept = picker(self.donated), picker(self.kept)

    def joined(self, donated: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
        """Restores the flat arrays."""
        flat: list[Any] = [None] * (len(donated) + len(kept))
        for i, x in zip((*self.donated, *self.kept), (*donated, *kept)):
            flat[i] = x
        return flat


def what_to_donate(structure: Structure, donate: str) -> tuple[list[int], set[int]]:
    """The positions of the arrays outside refs that this mode donates, and the numbers of
    written refs that it keeps."""
    first = donate.endswith("-except-first")
    kept = {x.index for x in structure.statics[0] if is_node(x)} if first else set()
    if donate in ("none", "refs"):
        return [], kept
    outside = [i for i, mine in enumerate(structure.statics) for x in mine if x is None]
    return [k for k, i in enumerate(outside) if not (first and i == 0)], kept


def same_buffer_type(old: Any, new: Any) -> bool:
    new = jax.typeof(new)  # a constant of the program may be a Python number
    return old.shape == new.shape and old.dtype == new.dtype


def apart(
    arrays: list[Any], values: list[Any], split: Split
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The donated arrays, and the others.

    If a ref's buffer is also held elsewhere (a snapshot, a clone, another ref, a variable),
    a copy is donated instead. Python's reference count shows the holders of an object: the
    ref or the pytree in it, and `arrays`, `values` and the tuple made here.

    **Arguments:**

    - `arrays`: the flat arrays of the call.
    - `values`: the values of its refs.
    - `split`: which arrays to donate.
    """
    commits.release()
    donated, kept = split.take_donated(arrays), split.take_kept(arrays)
    if _trace.guards.begun():
        # This may find that a ref cannot be written here.
        return tuple(map(_copy, donated)), kept
    n = split.n_outside
    in_refs = donated[n:] if n else donated
    # A slice adds a reference to each.
    counts = list(map(getrefcount, in_refs))
    if (n or counts != split.alone or split.trees) and donated:
        donated = _with_copies(donated, kept, counts, values, split)
    return donated, kept


def _with_copies(
    donated: tuple[Any, ...],
    kept: tuple[Any, ...],
    counts: list[int],
    values: list[Any],
    split: Split,
) -> tuple[Any, ...]:
    n = split.n_outside
    held = [False] * n + [x > y + bool(n) for x, y in zip(counts, split.alone)]
    for number, positions in split.trees:
        if getrefcount(values[number]) > _TREE_ALONE:
            for k in positions:
                held[k] = True
    # The caller may donate an array that a ref also holds, or one array twice.
    seen = set(map(id, (*kept, *donated[n:]))) if n else set()
    for k, x in enumerate(donated[:n]):
        held[k] = id(x) in seen
        seen.add(id(x))
    return tuple(_copy(x) if mine else x for x, mine in zip(donated, held))


def call_into(
    returned: list[Any], outcome_of: Callable, program: Callable, *args: Any
) -> Any:
    """Calls a donating program. The result is stored in `returned`, after the function that
    makes an outcome of it, before any Python code runs: see `rescue`."""
    returned[:1] = [outcome_of]
    returned.extend(map(program, *zip(args)))
    return returned[-1]


def _copy(x: Any) -> Any:
    return x.copy() if isinstance(x, jax.Array) else x  # a Python number


def _count_alone() -> tuple[int, int]:
    """The counts in `apart` for an array that only its ref holds, and for a pytree."""
    ref = [object()]
    values, arrays = ref[:], ref[:]
    donated = tuple(arrays)
    (of_array,) = map(getrefcount, donated)
    del arrays, donated
    return of_array, getrefcount(values[0])


ALONE, _TREE_ALONE = _count_alone()
