"""How each array of a call is split over a mesh, and along which axes randomness differs.

As in `_call_axes.py`, the argument that holds a ref decides. A ref that only functions
reach is replicated, or split as its type says under a mesh of explicit axes, unless
`in_specs` is a single `rx.specs`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import AxisType, PartitionSpec

from .._calls._call import Call
from .._calls._structure import Leaves, map_values, values_of
from .._core._errors import CarryError, describe, MismatchError
from .._core._ref import Channeled, Ref
from .._sharding._mesh import check_spec, mesh_axes
from ._agreed import agreed
from ._by_filter import RNG, SAME
from ._by_place import each_array, of_new_value, Place, read_places
from ._rng_split import is_key
from ._specs import (
    AS_TYPED,
    axes_in,
    leaf_specs,
    spec_inside,
    spec_of_array,
    specs,
    specs_of_arrays,
)


_EXAMPLE = "rx.specs(params=P(), default=P()), P('data')"


@dataclasses.dataclass(eq=False)
class Specs:
    """The specs of a call.

    - `trees`: trees like its arrays, with the spec of each;
    - `split`: the numbers of the refs whose randomness differs between shards, with the
        mesh axes along which it does.
    """

    trees: list[Leaves]
    split: dict[tuple[str, ...], tuple[int, ...]]

    def of_update(self, derefed: Call, number: int, new: Any, name: str) -> Any:
        """The spec of each array of the new value of a ref, as a tree like it: those of the
        old value.

        **Raises:**

        - `CarryError`: if the old value has several specs, and the new value another
            structure.
        """

        def refuse(several: list[Any]) -> None:
            raise CarryError(
                f"{describe(derefed.refs[number])} holds arrays that `{name}` splits by "
                f"the specs {sorted(set(map(str, several)))}, but was written with a value "
                "of another structure, for which no specs are given. Keep the structure, "
                "or use one spec for all of its arrays."
            )

        own = values_of(self.trees)[number]
        return of_new_value(own, own, new, PartitionSpec(), refuse)


def call_specs(
    derefed: Call,
    args: tuple,
    in_specs: Any,
    mesh: Any,
    manual: tuple[str, ...],
    name: str,
) -> Specs:
    """The spec of each array of a call with `args`.

    **Arguments:**

    - `in_specs`: a prefix of `args`.
    - `mesh`: the mesh to split over.
    - `manual`: the mesh axes that the function is manual over.

    **Raises:**

    - `TypeError`: if there are no specs, and the types do not give them.
    - `MismatchError`: if arguments give one ref two different specs; if an array cannot be
        split by its spec.
    """
    # With explicit axes a type says how an array is split, and nothing else can be right.
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    is_typed = all(kinds.get(axis) is AxisType.Explicit for axis in manual)
    unsaid = AS_TYPED if is_typed else None
    if in_specs is AS_TYPED and not is_typed:
        raise TypeError(
            f"`{name}` has no `in_specs`, and axes of the mesh are not explicit, so types "
            f"do not say how arrays are split. Pass them, such as `in_specs=({_EXAMPLE})`."
        )

    def of_function(leaf: Any) -> Any:
        is_said = isinstance(leaf, Ref) and isinstance(in_specs, specs)
        return in_specs.of((), leaf) if is_said else unsaid

    outside, said, reached = read_places(
        derefed,
        leaf_specs(in_specs, args, "in_specs"),
        len(args),
        of_function,
        spec_of_array,
        spec_inside,
    )
    found: dict[int, Any] = {}
    split: dict[tuple[str, ...], tuple[int, ...]] = {}
    for i, value in values_of(derefed.arrays).items():
        ref = derefed.refs[i]
        if i in said:
            given = _agreed_spec(derefed, ref, value, said[i], name)
        else:
            given = _reached(reached.get(i, ()), unsaid)
        own = _specs_of_value(ref, given, value, manual, name)
        if ref._collection == RNG and given is not SAME:
            over, own = _randomness(value, own, manual)
            split[over] = (*split.get(over, ()), i)
        found[i] = own
    trees = [map_values(lambda i, _: found[i], leaves) for leaves in outside]
    _check_fit(derefed, trees, mesh, manual if is_typed else (), name)
    trees = jtu.tree_map(lambda spec: part_of(spec, manual), trees)
    return Specs(trees, {over: numbers for over, numbers in split.items() if over})


def _reached(places: Iterable[Place], unsaid: Any) -> Any:
    """The spec of a ref that only functions reach."""
    given = [place.what for place in places]
    return SAME if SAME in given else (given[0] if given else unsaid)


def _agreed_spec(
    derefed: Call, ref: Ref, value: Any, places: list[Place], name: str
) -> Any:
    """The spec that all arguments with this ref give it."""

    def in_full(given: Any) -> Any:
        own = specs_of_arrays(
            given, value.value if type(value) is Channeled else value, "in_specs"
        )
        return given is SAME, [_by_dimension(spec) for spec in jtu.tree_leaves(own)]

    def code(given: Any) -> str | None:
        if given is SAME:
            return "P()"
        is_one = isinstance(given, PartitionSpec)
        return f"P({', '.join(map(repr, given))})" if is_one else None

    is_same = lambda a, b: a is b or in_full(a) == in_full(b)
    return agreed(derefed, ref, places, specs, name, is_same, code)


def _specs_of_value(
    ref: Ref, given: Any, value: Any, manual: tuple[str, ...], name: str
) -> Any:
    if type(value) is not Channeled:
        return specs_of_arrays(given, value, "in_specs")
    own = specs_of_arrays(given, value.value, "in_specs")
    for spec in jtu.tree_leaves(own):
        if not set(manual) <= set(axes_in(spec)):
            # Each shard has its own cotangent, and JAX adds them up.
            raise CarryError(
                f"`{name}` cannot carry {describe(ref)} out of a backward rule that writes "
                f"it: it is not split over all of {manual}, so the writes of the shards "
                "would be added up. Take the gradient inside the function, "
                f"`rx.filter_grad` in `{name}`, and write one value, such as a "
                "`jax.lax.pmax`; or split the ref."
            )
    # A channel consists of pieces with the shape of their array.
    of_pieces = lambda spec, pieces: jtu.tree_map(lambda _: spec, pieces)
    return Channeled(own, jtu.tree_map(of_pieces, own, value.channel))


def part_of(spec: PartitionSpec, manual: tuple[str, ...]) -> PartitionSpec:
    """The part of a spec for the axes that a function is manual over; the compiler handles
    the others."""
    kept = [tuple(x for x in mesh_axes(entry) if x in manual) for entry in spec]
    return PartitionSpec(*(x if len(x) > 1 else (x[0] if x else None) for x in kept))


def _randomness(
    value: Any, own: Any, manual: tuple[str, ...]
) -> tuple[tuple[str, ...], Any]:
    """The mesh axes along which the keys of a ref differ, and how its arrays are split.

    A stack of keys is split like any array. For a single key, the spec gives the axes along
    which it differs: by default all.
    """
    arrays, treedef = jtu.tree_flatten(value)
    given = treedef.flatten_up_to(own)
    named = {name for spec in given for name in axes_in(spec)}
    if all(
        len(spec) <= _rank_without_words(jnp.asarray(x))
        for x, spec in zip(arrays, given)
    ):
        return (() if named else manual), own
    over = tuple(name for name in manual if name in named)
    return over, jtu.tree_map(lambda _: PartitionSpec(), own)


def _rank_without_words(x: jax.Array) -> int:
    """The rank of an array, not counting the words of raw keys."""
    is_raw = is_key(x) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return x.ndim - is_raw


def check_known(spec: PartitionSpec, mesh: Any, which: str) -> None:
    """Checks that a mesh has the axes named by a spec."""
    for axis in axes_in(spec):
        if axis not in mesh.axis_names:
            raise MismatchError(
                f"Cannot split {which} by `{spec}`: it names the mesh axis {axis!r}, but "
                f"the mesh has {', '.join(map(repr, mesh.axis_names))}. Name one of these."
            )


def _check_fit(
    derefed: Call, trees: list[Leaves], mesh: Any, typed: tuple[str, ...], name: str
) -> None:
    """Checks that each array can be split by its spec, and that its type, if explicit,
    agrees."""
    for x, spec, ref in each_array(derefed, trees):
        if ref is None:
            which = f"the array {jax.typeof(x).str_short()} that `{name}` is given"
        else:
            which = f"{describe(ref)} in `{name}`"
        check_spec(spec, jnp.shape(x), mesh, which)
        of_type = part_of(jax.typeof(x).sharding.spec, typed)
        if typed and _by_dimension(of_type) != _by_dimension(part_of(spec, typed)):
            raise MismatchError(
                f"Cannot split {which} by `{spec}`: the mesh has explicit axes, and the "
                f"type of the array says `{of_type}`. Leave out `in_specs`, to use the "
                "types; or reshard it first, with `rx.filter_shard` or "
                "`jax.sharding.reshard`."
            )


def _by_dimension(spec: PartitionSpec) -> list[tuple[str, ...]]:
    axes = [mesh_axes(entry) for entry in spec]
    while axes and not axes[-1]:
        axes.pop()
    return axes
