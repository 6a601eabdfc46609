"""`axis_rules`: how a model is split over a mesh, by the names of the axes of its arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.tree_util as jtu
from jax.sharding import NamedSharding, PartitionSpec

from .._filters._filters import as_option
from ._mesh import current_mesh
from ._reading import Reading


MeshAxes = str | tuple[str, ...] | None
"""What splits one axis of an array: one mesh axis, several, or none."""


@dataclasses.dataclass(frozen=True, init=False)
class axis_rules:
    """How a model is split over a mesh, by the axis names in the declared types of its
    fields.

    `weight: rx.Param[Float[Array, "ffn embed"]]` names the axes of the weight. The rules
    say which mesh axis splits each of them.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx
        from jax.sharding import PartitionSpec as P
        from jaxtyping import Array, Float

        class FeedForward(rx.Module):
            up: rx.Param[Float[Array, "ffn embed"]]
            bias: rx.Param[Float[Array, "ffn"]]
            scale: rx.Param[Float[Array, ""]]

        model = FeedForward(jnp.ones((8, 4)), jnp.ones(8), jnp.array(1.0))
        rules = rx.axis_rules(ffn="tensor", embed="fsdp")
        specs = rules.specs(model) # a tree like `rx.deref(model)`
        assert specs.up.value == P("tensor", "fsdp")
        assert specs.bias.value == P("tensor") and specs.scale.value == P()

        mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
        shardings = rules.shardings(model, mesh)
        placed = jax.device_put(rx.deref(model), shardings)
        assert placed.up.value.sharding.spec == P("tensor", "fsdp")
        ```

    For each array, the first of these that applies decides:

    1. a rule by filter;
    2. the `rx.field(sharding=P(...))` that declares its ref;
    3. the rules for the names of its axes. An axis whose name has no rule is not split;
    4. `default`.

    A stack of modules (`filter_vmap(Layer)(keys)`) has axes on top of the declared ones.
    They are not split, unless `layers: rx.Batched[Layer, "depth"]` names them and `depth`
    has a rule. The slots of an [`refx_eqx.Optimizer`][] that have the shape of a weight,
    and the averages of an [`refx_eqx.nn.EMA`][], follow the weight.

    **Arguments:**

    - `rules`: a mapping. A string key is the name of an axis; its rule is the mesh axis
        that splits it, a tuple of several, or `None`. Any other key is a filter, such as
        `rx.path("**.bias")` or `rx.collection("batch_stats")`; its rule is a
        `jax.sharding.PartitionSpec` for all axes of the arrays it selects. The first match
        decides, for a shared ref at any of its places, and a filter that selects nothing
        has no effect.
    - `default`: for arrays whose axes have no declared names: a `PartitionSpec`, or a
        function from such an array (with `shape` and `dtype`) to one. By default they are
        not split.
    - `strict`: whether every axis needs a rule. If so, it is an error if an array without
        declared names is not selected by a filter, if the name of an axis has no rule, or
        if a rule by name matches no axis.
    - `**by_axis`: more rules by name.

    **Raises:**

    - `TypeError`: if a rule is not valid.

    When used:

    - `StructureError`: if two types of one ref name an axis differently, and the rules for
        these names differ; if a name in the rules looks misspelled; if a mesh axis does not
        divide an axis, is used twice for one array, or does not exist; under `strict`, if a
        rule is missing.
    """

    by_axis: Mapping[str, MeshAxes]
    by_filter: Mapping[Any, PartitionSpec]
    default: Any
    strict: bool

    def __init__(
        self,
        rules: Mapping[Any, Any] | None = None,
        /,
        *,
        default: Any = PartitionSpec(),
        strict: bool = False,
        **by_axis: MeshAxes,
    ):
        if rules is not None and not isinstance(rules, Mapping):
            raise TypeError(
                f"`rx.axis_rules({rules!r})`: give a mapping from axis name to mesh axis, as "
                "in `rx.axis_rules({'embed': 'fsdp'})`, or `rx.axis_rules(embed='fsdp')`."
            )
        if not callable(default) and not isinstance(default, PartitionSpec):
            raise TypeError(
                f"`rx.axis_rules(default={default!r})`: give a `PartitionSpec`, such as `P()`, "
                "or a function from array to `PartitionSpec`."
            )
        given = {**(rules or {}), **by_axis}
        names = {key: rule for key, rule in given.items() if isinstance(key, str)}
        filters = {
            as_option(key): rule for key, rule in given.items() if key not in names
        }
        for name, rule in names.items():
            if not _is_mesh_axes(rule):
                raise TypeError(
                    f"`rx.axis_rules({{{name!r}: {rule!r}}})`: the rule for the axes with "
                    "this name must be the name of a mesh axis, a tuple of names, or "
                    "`None`. To give a collection a `PartitionSpec`, use a filter as the "
                    f"key: `rx.axis_rules({{rx.collection({name!r}): P(...)}})`."
                )
        for key, rule in filters.items():
            if not isinstance(rule, PartitionSpec):
                raise TypeError(
                    f"`rx.axis_rules({{{key!r}: {rule!r}}})`: the rule of a filter must be "
                    "a `PartitionSpec` for all axes of the arrays it selects, such as "
                    "`P('fsdp')`."
                )
        object.__setattr__(self, "by_axis", names)
        object.__setattr__(self, "by_filter", filters)
        object.__setattr__(self, "default", default)
        object.__setattr__(self, "strict", strict)

    def __hash__(self) -> int:
        names, filters = self.by_axis.items(), self.by_filter.items()
        return hash((frozenset(names), frozenset(filters), self.default, self.strict))

    def __repr__(self) -> str:
        given = {**self.by_axis, **self.by_filter}
        parts = [repr(given)] if given else []
        if self.default != PartitionSpec():
            parts.append(f"default={self.default!r}")
        if self.strict:
            parts.append("strict=True")
        return f"rx.axis_rules({', '.join(parts)})"

    def specs(self, tree: Any, mesh: Any = None) -> Any:
        """The `PartitionSpec` of each array of a tree.

        **Arguments:**

        - `tree`: a tree of refs, or a derefed one, with arrays or `jax.ShapeDtypeStruct`s. Its
            refs must be readable here.
        - `mesh`: the mesh for the specs, a `jax.sharding.Mesh` or `AbstractMesh`. By
            default, that of `jax.set_mesh`. Without a mesh, specs are not checked against
            one.

        **Returns:**

        A tree like `rx.deref(tree)`, with a `PartitionSpec` for each array, and `None` for
        non-arrays.

        **Raises:**

        - `StructureError`: see [`refx_eqx.axis_rules`][].
        """
        mesh = current_mesh() if mesh is None else mesh
        return Reading(self, tree, mesh).specs()

    def shardings(self, tree: Any, mesh: Any = None) -> Any:
        """The `NamedSharding` of each array of a tree.

        **Arguments:**

        - `tree`, `mesh`: as for `specs`. There must be a mesh.

        **Returns:**

        A tree like `rx.deref(tree)`, with a `jax.sharding.NamedSharding` for each array,
        and `None` for non-arrays.

        **Raises:**

        - `ValueError`: if there is no mesh.
        - `StructureError`: see [`refx_eqx.axis_rules`][].
        """
        mesh = _needed(mesh)
        return jtu.tree_map(
            lambda spec: NamedSharding(mesh, spec),
            self.specs(tree, mesh),
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )

    def leaf_shardings(self, derefed: Any) -> list[NamedSharding | None]:
        """The sharding of each leaf of a derefed tree. For internal use."""
        mesh = _needed(None)
        specs = Reading(self, derefed, mesh).flat()
        return [None if spec is None else NamedSharding(mesh, spec) for spec in specs]


def _needed(mesh: Any) -> Any:
    mesh = current_mesh() if mesh is None else mesh
    if mesh is None:
        raise ValueError(
            "`rx.axis_rules`: there is no mesh. Pass one, `rules.shardings(tree, mesh)`, "
            "or run this under `jax.set_mesh(mesh)`."
        )
    return mesh


def _is_mesh_axes(rule: Any) -> bool:
    if isinstance(rule, PartitionSpec):  # a tuple in some versions of JAX
        return False
    names = rule if isinstance(rule, tuple) else (rule,)
    return rule is None or all(isinstance(name, str) for name in names)
