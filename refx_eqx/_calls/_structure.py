"""The boundary: the derefed trees of a call, split into arrays and everything else.

    (*args, kwargs, fn)  -- deref -->  Value, Index, arrays, statics  -- split -->  arrays | statics

Every tree of a call is flattened once, including functions that close over refs (see
`_trees/`); its leaves are derefed as by `deref`, with a common numbering. JAX is then given
`arrays`: for each tree the list of its leaves, with `None` for static leaves. Gradients,
tangents, axes and shardings are lists of the same form, and `tree_of` turns such a list
back into a derefed tree. Everything else is a `Structure`: the key of every cache.

A result is derefed in the same way, with the numbering of its call: a ref of the call is an
`Index`, whose `Value` is in the call, and a new ref gets the next number.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._core._access import refuse_cycle
from .._core._deref import make_ref_of, refuse_lookups, reref_leaves
from .._core._errors import describe
from .._core._identity import NOTHING_ASKED
from .._core._nodes import Index, is_node, is_traced, join_value, split_value, Value
from .._core._ref import is_ref, Ref
from .._trees import _closure
from .._trees._cells import reachable
from .._trees._closure import Part, without_empty
from .._trees._keys import identities_in, recalled, static_key, static_keys
from ._places import place


# The derefed leaves of one tree: a `Value` or an `Index` for each ref.
Leaves = list[Any]


def map_values(fn: Callable[[int, Any], Any], leaves: Leaves) -> Leaves:
    """`leaves`, with `fn(i, value)` for the value of ref number `i`."""
    return [
        leaf.with_value(fn(leaf.index, leaf.value)) if type(leaf) is Value else leaf
        for leaf in leaves
    ]


def values_of(trees: Iterable[Leaves]) -> dict[int, Any]:
    """The value of each ref, by number."""
    return {x.index: x.value for leaves in trees for x in leaves if type(x) is Value}


def split(
    leaves: Leaves, is_dynamic: Callable[[Any], bool] = is_traced
) -> tuple[Leaves, Leaves]:
    """Derefed leaves as `(arrays, statics)`, each with `None` for the other."""
    # As `eqx.partition`, but the nodes stay whole: an `Index` is in both, and a `Value` in
    # each has one part of the value.
    arrays, statics = [], []
    for leaf in leaves:
        if type(leaf) is Value:
            of_arrays, of_statics = split_value(leaf.value)
            arrays.append(leaf.with_value(of_arrays))
            statics.append(leaf.with_value(of_statics))
        elif type(leaf) is Index:
            arrays.append(leaf)
            statics.append(leaf)
        elif is_dynamic(leaf):
            arrays.append(leaf)
            statics.append(None)
        else:
            arrays.append(None)
            statics.append(leaf)
    return arrays, statics


def join(arrays: Leaves, statics: Leaves) -> Leaves:
    """The inverse of `split`."""
    return [
        x.with_value(join_value(x.value, static.value))
        if type(x) is Value
        # Static leaves may be held weakly: a plan does not keep functions alive.
        else (x if static is None else recalled(static))
        for x, static in zip(arrays, statics)
    ]


def flatten(
    tree: Any, is_wanted: Callable[[Any], bool] = is_ref
) -> tuple[list[Any], Part]:
    """The leaves of a tree, including those inside functions that carry refs.

    **Arguments:**

    - `is_wanted`: selects the leaves whose functions become nodes.

    **Raises:**

    - `StructureError`: if a list or a dict contains itself, or a dict has refs as keys.
    """
    refuse_cycle(tree)
    try:
        return _closure.flatten(tree, is_wanted)
    except (ValueError, TypeError):
        # JAX sorts the keys of a dict, and refs have no order.
        dicts = [x for x in reachable(tree) if isinstance(x, dict)]
        refuse_lookups(tree, dicts, "carry")
        raise


def tree_of(part: Part, leaves: Leaves) -> Any:
    """The derefed tree with these leaves. A call opens more functions than a derefed tree:
    here, each that holds no refs is `None`."""
    tree = part.tree(leaves)
    return without_empty(tree, is_node) if part.has_functions else tree


class Structure:
    """Everything in a call or a result that is not an array.

    - `parts`: the structure of each tree;
    - `statics`: the derefed leaves, with `None` for arrays;
    - `key`: equal for two calls that can run the same program. It is hashable, and holds no
        refs or arrays, and no functions strongly.
    """

    __slots__ = ("_key", "parts", "statics")

    def __init__(self, parts: list[Part], statics: list[Leaves]):
        self.parts = parts
        self.statics = statics
        self._key: Key | None = None

    @property
    def key(self) -> "Key":
        if self._key is None:
            self._key = Key(self)
        return self._key

    def leaves(self, arrays: list[Leaves], refs: dict[int, Ref]) -> list[Leaves]:
        """Restores the leaves of the trees. `refs` are the known refs by number; the others
        are made in the current trace, and added to it."""
        return [
            reref_leaves(join(mine, statics), refs)
            for mine, statics in zip(arrays, self.statics)
        ]

    def trees(self, leaves: list[Leaves]) -> list[Any]:
        """Restores the trees from their leaves."""
        return list(map(Part.unflatten, self.parts, leaves))

    def with_statics(self, statics: list[Leaves]) -> "Structure":
        """The same structure with other objects as static leaves."""
        structure = Structure(self.parts, statics)
        structure._key = self.key
        return structure

    def mortal(self) -> list[Any]:
        """The objects that the key holds weakly: functions, refs in a frozenset or a cell.
        Once one of them is gone, the key matches no call."""
        return list(self.key.mortal())

    def refs(self) -> dict[int, Value]:
        """The nodes of the refs by number, with the name and collection of each."""
        return {x.index: x for mine in self.statics for x in mine if type(x) is Value}

    def refs_after(self, outcome: "Outcome", arrays: list[Leaves]) -> list[Ref]:
        """New refs, with the values of the refs of the call after it. `arrays` are those of
        the call."""
        before = values_of(arrays)
        copies = []
        for i, node in self.refs().items():
            if i in outcome.updates:
                value = outcome.info.value(i, outcome.updates[i])
            else:
                value = join_value(before[i], node.value)
            copies.append(make_ref_of(node.with_value(value)))
        return copies


class Key:
    """The key of a `Structure`. See there."""

    __slots__ = ("_hash", "_what")

    def __init__(self, structure: Structure):
        statics, treedef = jtu.tree_flatten(structure.statics)
        declared = tuple(
            leaf.label.declared
            for leaves in structure.statics
            for leaf in leaves
            if type(leaf) is Value
        )
        keys = tuple(map(static_key, statics))
        # Declared types separately: in the treedef any two labels are equal.
        self._what = tuple(structure.parts), treedef, keys, declared
        try:
            self._hash = hash(self._what)
        except TypeError:
            raise _not_hashable(structure) from None

    def mortal(self) -> Iterator[Any]:
        keys = self._what[2]
        return (x for identity in identities_in(keys) for x in identity.mortal())

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Key)
            and self._hash == other._hash
            and self._what == other._what
        )


def _not_hashable(structure: Structure) -> TypeError:
    for i, statics in enumerate(structure.statics):
        for k, static in enumerate(statics):
            for leaf in jtu.tree_leaves(static):
                try:
                    hash(static_key(leaf))
                except TypeError:
                    where = place(structure.parts, i, k)
                    if type(static) is Value:
                        where = f"{describe(static)}, in {where}"
                    return TypeError(
                        f"Cannot cache on the static value {leaf!r} ({where}): "
                        f"{_why_not_hashable(leaf)}"
                    )
    return TypeError("Cannot cache on a declared type that is not hashable.")


def _why_not_hashable(leaf: Any) -> str:
    if isinstance(leaf, np.ndarray):
        return (
            f"JAX has no arrays of {leaf.dtype}. Make a tuple of it, such as "
            "`tuple(array.tolist())`, or an array of numbers."
        )
    remedy = "Make it hashable, or put the arrays in it into a pytree."
    if isinstance(leaf, set):
        remedy = "Make it a `frozenset`, or a tuple if there are arrays in it."
    elif dataclasses.is_dataclass(leaf):
        remedy = (
            "If there are arrays or refs in it, make it an `equinox.Module`; otherwise make "
            "it hashable: `@dataclasses.dataclass(frozen=True)`."
        )
    return f"a {type(leaf).__name__} is not hashable. {remedy}"


class Outcome:
    """What a body returns: a pytree node whose children are arrays.

    - `out`: the derefed leaves of the result. Each of the call's own refs is an `Index`,
        and each new one has the next free number;
    - `updates`: the new value of each ref that was written, by number;
    - `info`: everything else. Made again whenever the body is traced.
    """

    __slots__ = ("info", "out", "updates")

    def __init__(self, out: Leaves, updates: dict[int, Any], info: "OutcomeInfo"):
        self.out = out
        self.updates = updates
        self.info = info


jtu.register_pytree_node(
    Outcome,
    lambda x: ((x.out, x.updates), x.info),
    lambda info, children: Outcome(*children, info),
)


ONE_ARRAY = jtu.tree_structure(0)


class OutcomeInfo:
    """What a body did, apart from arrays. Compared by value: JAX's caches keep one entry
    for each distinct one.

    - `result`: the structure of the result;
    - `written`: the statics of the new value of each written ref;
    - `build`: makes the result from its arrays, if it has nothing else; or `None`.
        `is_one`: whether it is a single array.
    - `waits`: whether a call must wait for run-time checks. `filter_jit` finds out.
    - `in_place`: the refs whose values were changed in place.
    - `asked`: what was asked about the identity of the refs, which limits the refs that the
        program is right for.

    By itself it is a pytree node without children, which is how it gets out of `jax.jit`.
    """

    __slots__ = ("asked", "build", "in_place", "is_one", "result", "waits", "written")

    def __init__(
        self,
        result: Structure,
        written: dict[int, Any],
        in_place: Iterable[int] = (),
    ):
        self.result = result
        self.written = written
        self.in_place = frozenset(in_place)
        self.waits = False
        self.asked = NOTHING_ASKED
        ((part,), (statics,)) = result.parts, result.statics
        self.build: Callable[[list[Any]], Any] | None = None
        self.is_one = False
        if all(x is None for x in statics) and not part.has_functions:
            self.is_one = part.treedef == ONE_ARRAY
            self.build = itemgetter(0) if self.is_one else part.treedef.unflatten

    def __hash__(self) -> int:
        key = self._key()
        return object.__hash__(self) if key is None else hash(key[0])

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, OutcomeInfo) or self.asked is not other.asked:
            return False
        key = self._key()
        return key is not None and key == other._key()

    def _key(self) -> Any:
        """`None` if a static value is not hashable."""
        try:
            written = self.written_keys()
            return self.result.key, written, self.in_place, self.waits
        except TypeError:
            return None

    def written_keys(self) -> dict[int, Any]:
        """The static parts of the new values, for comparison."""
        return {i: static_keys(statics) for i, statics in self.written.items()}

    def value(self, number: int, arrays: Any) -> Any:
        """The new value of a ref, from its arrays."""
        return join_value(arrays, self.written[number])


jtu.register_pytree_node(OutcomeInfo, lambda info: ((), info), lambda info, _: info)


def arrays_of(outcome: Outcome) -> tuple[Leaves, dict[int, Any]]:
    """The results and updates of a body, with numbers (Python numbers in a ref, and
    constants of a jaxpr) converted to arrays."""
    return jtu.tree_map(array_of, (outcome.out, outcome.updates))


def array_of(x: Any) -> Any:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)
