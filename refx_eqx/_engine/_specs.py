"""The `in_specs` and `out_specs` given by users, for `filter_shard_map`."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.tree_util as jtu
from jax.sharding import NamedSharding, PartitionSpec

from .._core._nodes import Index, is_node, Value
from .._filters._filters import FilterLike
from .._sharding._mesh import mesh_axes
from .._sharding._rules import axis_rules
from .._trees._equality import Unlike, UNSET
from ._by_filter import ByFilter, each_leaf, ELSEWHERE, NotGiven, SAME


class specs(ByFilter):
    """Specs by collection, or by any other filter, for the `in_specs` and `out_specs` of
    [`refx_eqx.filter_shard_map`][]. The counterpart of [`refx_eqx.axes`][].

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx
        from jax import P

        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        model = {
            "w": rx.Ref(jnp.ones(4), "params"),
            "mean": rx.Ref(jnp.zeros(()), "batch_stats"),
        }

        def step(model, x):
            model["mean"].value = jax.lax.pmean(jnp.mean(x), "data")
            return model["w"].value * jnp.sum(x)

        by_collection = rx.specs(params=P("data"), batch_stats=P())
        sharded = rx.filter_shard_map(
            step, mesh=mesh, in_specs=(by_collection, P("data")), out_specs=P("data")
        )
        assert sharded(model, jnp.arange(4.0))[0] == 6.0 and model["mean"].value == 1.5
        ```

    A replicated ref of collection `"rng"` is split by shard: each shard draws different
    numbers. `rx.specs(rng=P())` gives the same randomness in all shards, and, for a single
    key, `rx.specs(rng=P("data"))` gives randomness that differs only along the mesh axis
    `data` (a stack of keys is split like any array).

    **Arguments:**

    - `by_collection`: a mapping from collection to spec: a `jax.P`, a `NamedSharding`, or
        `None`, which is `P()`. A key may be any filter, such as `rx.path("**.shared.**")`.
        The first match decides, and a key that matches nothing has no effect.
    - `default`: the spec of all other leaves. If omitted, a leaf that is not named is an
        error, which catches misspelled keys.
    - `**collections`: the spec of each collection.

    **Raises:**

    - `TypeError`: if a spec is not a `jax.P`, a `NamedSharding` or `None`.

    When used:

    - `StructureError`: if no spec is given for a ref or an array.
    """

    called = "rx.specs"
    what = "spec"
    several = "specs"
    option = "in_specs"
    example = "P('data')"
    nothing = "P()"

    def __init__(
        self,
        by_collection: Mapping[FilterLike, Any] | None = None,
        *,
        default: Any = UNSET,
        **collections: Any,
    ):
        if default is not UNSET:
            default = self.checked(default, f"rx.specs(default={default!r})")
        super().__init__(by_collection, default, collections)

    def checked(self, one: Any, text: str) -> PartitionSpec:
        try:
            return _as_spec(one, "rx.specs")
        except NotGiven:
            raise TypeError(
                f"`{text}`: a spec must be a `jax.P`, or `None` for `P()`, but this is "
                f"{one!r}."
            ) from None

    def is_whole(self, one: Any) -> bool:
        return not axes_in(one)


AS_TYPED = Unlike(__name__, "AS_TYPED", "the sharding of its type")
"""The spec of an array without a given one, under a mesh of explicit axes."""


class OfValue:
    """The specs of the arrays of the value of one ref: a prefix of the value."""

    __slots__ = ("prefix",)

    def __init__(self, prefix: Any):
        self.prefix = prefix

    def __repr__(self) -> str:
        return repr(self.prefix)


def axes_in(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a spec names."""
    return tuple(name for entry in spec for name in mesh_axes(entry))


def _as_spec(one: Any, what: str) -> PartitionSpec:
    """Converts the option given for a leaf to a spec."""
    if one is None:
        return PartitionSpec()
    if isinstance(one, NamedSharding):
        return one.spec
    if isinstance(one, axis_rules) and what == "out_specs":
        raise NotGiven(
            f"`out_specs` has `{one!r}`, but rules need a tree: JAX needs the specs of a "
            "result before it is known. Give the specs of a tree like it, "
            "`out_specs=rules.specs(model)`; `rx.filter_eval_shape` makes one of shapes. "
            "(Refs that the function is given and returns need none.)"
        )
    if not isinstance(one, PartitionSpec):
        also = ", `rx.axis_rules`" if what == "in_specs" else ""
        raise NotGiven(
            f"`{what}` must consist of `jax.P`, `NamedSharding`, None, `rx.specs`{also} "
            f"and trees of these, but has {one!r}."
        )
    return one


def _is_given(x: Any) -> bool:
    return x is None or is_node(x)


def leaf_specs(prefix: Any, tree: Any, what: str) -> list[Any]:
    """What each leaf of `tree` is given: a spec, `SAME`, or the `OfValue` of a ref whose
    arrays have their own specs; `ELSEWHERE` at the second place of a ref in a derefed tree.
    For a function it may be a `Within`.

    **Arguments:**

    - `prefix`: as given by the user, possibly a derefed tree.
    """

    def resolve(one: Any, subtree: Any) -> list[Any]:
        if isinstance(one, axis_rules):
            return leaf_specs(one.specs(subtree), subtree, what)
        if type(one) is Index:
            given = ELSEWHERE
        elif type(one) is Value:
            given = OfValue(one.value)
        else:
            given = one if one is AS_TYPED else _as_spec(one, what)
        return [given] * len(jtu.tree_leaves(subtree))

    return each_leaf(prefix, tree, what, resolve, _is_given)


def specs_of_arrays(given: Any, value: Any, what: str) -> Any:
    """The spec of each array in the value of a ref, as a tree like it. Also for a single
    array outside refs."""
    if type(given) is not OfValue:
        return jtu.tree_map(lambda x: spec_of_array(given, x), value)
    found = leaf_specs(given.prefix, value, what)
    return jtu.tree_unflatten(jtu.tree_structure(value), found)


def spec_of_array(given: Any, array: Any) -> PartitionSpec:
    if given is None or given is SAME:
        return PartitionSpec()
    return jax.typeof(array).sharding.spec if given is AS_TYPED else given


def specs_in(prefix: Any) -> Iterator[PartitionSpec]:
    """All specs that `out_specs` may give, for any result."""
    for one in jtu.tree_leaves(
        prefix, is_leaf=lambda x: x is None or isinstance(x, ByFilter)
    ):
        if not isinstance(one, ByFilter):
            yield _as_spec(one, "out_specs")
            continue
        yield from one.by_collection.values()
        if one.default is not UNSET:
            yield one.default


def spec_inside(given: Any) -> Any:
    """The spec of a leaf inside a function, from that of the function: `P()` gives none."""
    is_silent = given is SAME or given is AS_TYPED
    if is_silent or (isinstance(given, PartitionSpec) and not axes_in(given)):
        return None
    return given
