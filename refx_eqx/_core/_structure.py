"""The structure of an opened call: all of it that is not an array.

Every ref that a call carries is one `Slot`, however often it is met; every other leaf is an
array, which is traced, or a static value, which is a part of the structure. Structures are
hashable. They are the keys under which programs are kept, so they hold no ref, no array
and no function strongly.
"""

import functools
import weakref
from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from operator import itemgetter
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from . import _closure, _trace
from ._closure import Carried, static_key, weakly
from ._identity import NOTHING_ASKED
from ._nodes import Note, note_of
from ._ref import is_ref, make_ref, Ref


__tracebackhide__ = True


# What a leaf is: the number of a ref (0, 1, ...), or one of these.
DYNAMIC = -1
STATIC = -2


def is_traced_in_ref(leaf: Any) -> bool:
    """Which leaves of the value of a ref are traced: what JAX can trace."""
    if type(leaf) is _trace.ConcreteArray:
        return True
    return eqx.is_array_like(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def is_traced(leaf: Any) -> bool:
    """Which leaves beside refs are traced: arrays, as in Equinox."""
    if type(leaf) is _trace.ConcreteArray:
        return True
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


class Static:
    """A static leaf, with the key that stands for it (see `static_key`)."""

    __slots__ = ("_obj", "key")

    def __init__(self, obj: Any, is_result: bool = False):
        self.key = static_key(obj)
        # Nobody else may hold what was made inside of a function and returned.
        self._obj = obj if is_result else weakly(obj)

    @property
    def obj(self) -> Any:
        obj = self._obj
        return obj() if isinstance(obj, weakref.ref) else obj

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Static) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class Slot(NamedTuple):
    """The structure of one ref, beside the arrays of its value.

    `inside` is `None` where the value is one array, and else `(treedef, statics)`, with
    `None` in `statics` for each leaf that is traced.
    """

    ref_type: type[Ref]
    collection: Hashable
    declared: Any
    inside: tuple[Any, tuple] | None


@functools.lru_cache(maxsize=4096)
def slot_of_array(ref_type: type[Ref], collection: Hashable, declared: Any) -> Slot:
    """The slot of a ref to one array: the same object each time, quick to compare."""
    return Slot(ref_type, collection, declared, None)


def split_value(value: Any) -> tuple[tuple | None, list[Any]]:
    """The value of a ref as `(inside, arrays)`."""
    if is_traced_in_ref(value):
        return None, [value]
    leaves, treedef = jtu.tree_flatten(value)
    arrays = [x for x in leaves if is_traced_in_ref(x)]
    statics = tuple(None if is_traced_in_ref(x) else Static(x, True) for x in leaves)
    return (treedef, statics), arrays


def n_arrays(inside: tuple | None) -> int:
    """How many arrays a value has."""
    return 1 if inside is None else sum(static is None for static in inside[1])


def join_value(inside: tuple | None, arrays: Iterator[Any]) -> Any:
    """The opposite of `split_value`; takes what it needs from `arrays`."""
    if inside is None:
        return next(arrays)
    treedef, statics = inside
    leaves = [next(arrays) if static is None else static.obj for static in statics]
    return jtu.tree_unflatten(treedef, leaves)


class Held:
    """The value of a ref that is not one array, as a pytree node: its children are its
    arrays, and `inside`, as in a `Slot`, is all the rest."""

    __slots__ = ("arrays", "inside")

    def __init__(self, inside: tuple, arrays: Iterable[Any]):
        self.inside = inside
        self.arrays = list(arrays)


jtu.register_pytree_node(Held, lambda x: (x.arrays, x.inside), Held)


def hold(value: Any) -> Any:
    """The value of a ref as a pytree of arrays, and nothing else: one array is itself."""
    inside, arrays = split_value(value)
    return held(inside, arrays)


def held(inside: tuple | None, arrays: list[Any]) -> Any:
    return arrays[0] if inside is None else Held(inside, arrays)


def inside_of(x: Any) -> tuple | None:
    return x.inside if type(x) is Held else None


def release(x: Any) -> Any:
    """The opposite of `hold`."""
    return join_value(x.inside, iter(x.arrays)) if type(x) is Held else x


class Structure:
    """All of an opened call that is not an array: hashable, and the key of every cache.

    - `parts`: the structure of the callable, of each argument, and of the keywords;
    - `codes`: what each leaf is;
    - `statics`: the static leaves, in order;
    - `slots`: the structure of each ref. Equal numbers in `codes` are the sharing;
    - `notes`: what the refs are called. Not a part of the key.
    """

    __slots__ = (
        "_hash",
        "codes",
        "n_bare",
        "notes",
        "parts",
        "sizes",
        "slots",
        "statics",
    )

    def __init__(
        self,
        parts: tuple[Carried, ...],
        codes: tuple[int, ...],
        statics: tuple[Static, ...],
        slots: tuple[Slot, ...],
        notes: list[Note],
    ):
        self.parts = parts
        self.codes = codes
        self.statics = statics
        self.slots = slots
        self.notes = notes
        self.n_bare = codes.count(DYNAMIC)
        self.sizes = [_count(part) for part in parts]
        self._hash: int | None = None

    def _key(self) -> tuple:
        return self.parts, self.codes, self.statics, self.slots

    def __hash__(self) -> int:
        if self._hash is None:
            for static in self.statics:
                try:
                    hash(static)
                except TypeError:
                    raise TypeError(
                        f"Cannot cache on the static value {static.obj!r}: a "
                        f"{type(static.obj).__name__} is not hashable. Make it hashable, "
                        "or put the arrays in it into a pytree."
                    ) from None
            self._hash = hash(self._key())
        return self._hash

    def __eq__(self, other: Any) -> bool:
        if self is other:
            return True
        return isinstance(other, Structure) and self._key() == other._key()

    def fill(
        self,
        arrays: list[Any],
        given: Mapping[int, Ref] | None = None,
        body: _trace.Body | None = None,
        outer: Sequence[Ref | None] | None = None,
    ) -> tuple[list[Any], list[Ref]]:
        """The leaves of all parts again, made of other arrays; and the refs among them.

        They are new refs, owned by the running trace, but for those that are given by
        their number. In a `body` they stand for those of `outer`, if these are known.
        """
        rest = iter(arrays)
        bare = iter([next(rest) for _ in range(self.n_bare)])
        refs = []
        for i, (slot, note) in enumerate(zip(self.slots, self.notes)):
            if given is not None and i in given:
                refs.append(given[i])
                continue
            value = join_value(slot.inside, rest)
            ref = make_ref(
                slot.ref_type, value, slot.collection, note.name, note.declared
            )
            ref._body = body
            ref._outer = None if outer is None else outer[i]
            refs.append(ref)
        statics = iter(self.statics)
        leaves = []
        for code in self.codes:
            if code == DYNAMIC:
                leaves.append(next(bare))
            elif code == STATIC:
                leaves.append(next(statics).obj)
            else:
                leaves.append(refs[code])
        return leaves, refs

    def unflatten(self, leaves: list[Any]) -> list[Any]:
        """The parts again, of their leaves."""
        rest = iter(leaves)
        return [
            _closure.unflatten(part, [next(rest) for _ in range(n)])
            for part, n in zip(self.parts, self.sizes)
        ]


def _count(part: Carried) -> int:
    """How many leaves a part has, those inside of functions included."""
    n = part.treedef.num_leaves
    for node in part.nodes:
        if node is not None:
            n -= 1
            if isinstance(node, tuple):
                n += _count(node[-1])
    return n


class Reader:
    """Classifies leaves, and numbers the refs among them by their first place."""

    def __init__(
        self,
        is_dynamic: Callable[[Any], bool] = is_traced,
        is_result: bool = False,
    ):
        self.is_dynamic = is_dynamic
        self.is_result = is_result
        self._opens = _closure.is_ref_or_tracer if is_result else is_ref
        self.parts: list[Carried] = []
        self.leaves: list[Any] = []
        self.codes: list[int] = []
        self.bare: list[Any] = []
        self.statics: list[Static] = []
        self.refs: list[Ref] = []
        self._numbers: dict[int, int] = {}

    def read(self, tree: Any) -> None:
        leaves, carried = _closure.flatten(tree, self._opens)
        self.parts.append(carried)
        self.leaves.extend(leaves)
        for leaf in leaves:
            if isinstance(leaf, Ref):
                number = self._numbers.get(id(leaf))
                if number is None:
                    number = self._numbers[id(leaf)] = len(self.refs)
                    self.refs.append(leaf)
                self.codes.append(number)
            elif self.is_dynamic(leaf):
                self.codes.append(DYNAMIC)
                self.bare.append(leaf)
            else:
                self.codes.append(STATIC)
                self.statics.append(Static(leaf, self.is_result))

    def structure(self, slots: list[Slot]) -> Structure:
        return Structure(
            tuple(self.parts),
            tuple(self.codes),
            tuple(self.statics),
            tuple(slots),
            [note_of(ref) for ref in self.refs],
        )


class Outcome:
    """What a body returns: a pytree node whose children are trees of arrays.

    - `out`: the arrays of the result: those beside refs, then those of new refs;
    - `updates`: the refs that were written: the new value of each, as `hold` makes it, by
        the number of the ref in the call;
    - `info`: all the rest. Made anew whenever the body is traced.
    """

    __slots__ = ("info", "out", "updates")

    def __init__(self, out: list[Any], updates: dict[int, Any], info: "OutcomeInfo"):
        self.out = out
        self.updates = updates
        self.info = info


def arrays_of(outcome: Outcome) -> tuple[list[Any], dict[int, Any]]:
    """What a body returns and writes, with arrays in place of numbers: those of Python in a
    ref, and the constants of a jaxpr."""
    return jtu.tree_map(_array_of, (outcome.out, outcome.updates))


def _array_of(x: Any) -> Any:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


jtu.register_pytree_node(
    Outcome,
    lambda x: ((x.out, x.updates), x.info),
    lambda info, children: Outcome(children[0], children[1], info),
)


_ONE_ARRAY = jtu.tree_structure(0)


class OutcomeInfo:
    """What a body did, beside the arrays. Equal only to itself.

    - `result`: the structure of the result. The refs in it are numbered: first those of
        the call, by `carried`, then the new ones.
    - `carried`: for each ref of the result that the call carries, its number in the call.
    - `build`: makes the result of its arrays, if it has nothing else; or `None`.
    - `waits`: whether a call must wait for run-time checks. `filter_jit` finds out.
    - `asked`: what was asked of the identity of the refs: for which the program is right.

    By itself it is a pytree node without children, which is how it gets out of `jax.jit`.
    """

    __slots__ = ("asked", "build", "carried", "result", "waits")

    def __init__(self, result: Structure, carried: dict[int, int]):
        self.result = result
        self.carried = carried
        self.waits = False
        self.asked = NOTHING_ASKED
        (part,) = result.parts
        self.build: Callable[[list[Any]], Any] | None = None
        if result.n_bare == len(result.codes) and not part.nodes:
            is_one = part.treedef == _ONE_ARRAY
            self.build = itemgetter(0) if is_one else part.treedef.unflatten


jtu.register_pytree_node(OutcomeInfo, lambda info: ((), info), lambda info, _: info)
