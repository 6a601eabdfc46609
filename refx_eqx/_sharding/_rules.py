"""`axis_rules`: how a model is split over a mesh, by the names of the axes of its arrays."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax.tree_util as jtu
from jax.sharding import NamedSharding, PartitionSpec

from .._core._deref import deref
from .._core._errors import describe, MismatchError, StructureError
from .._core._nodes import is_node, Value
from .._core._ref import make_ref, Ref
from .._core._structure import is_traced, is_traced_in_ref
from .._fields._axes_of_values import declared_axes, stacks_in
from .._fields._following import DeclaredAxes, followed
from .._filters._filters import as_filter, as_option
from .._filters._select import as_closed, leaves_with_paths
from .._trees._paths import dotted, Path
from ._mesh import check_spec, current_mesh, mesh_axes


__tracebackhide__ = True


MeshAxes = str | tuple[str, ...] | None
"""What splits one axis of an array: one mesh axis, several, or none."""


@dataclasses.dataclass(frozen=True, init=False)
class axis_rules:
    """How a model is split over a mesh: by the names of the axes in the types that its
    fields declare.

    `weight: rx.Param[Float[Array, "ffn embed"]]` says what the axes of the weight are. The
    rules say which axis of a mesh splits each of them.

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
        specs = rules.specs(model)  # of the form of `rx.deref(model)`
        assert specs.up.value == P("tensor", "fsdp")
        assert specs.bias.value == P("tensor") and specs.scale.value == P()

        mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
        shardings = rules.shardings(model, mesh)
        placed = jax.device_put(rx.deref(model), shardings)
        assert placed.up.value.sharding.spec == P("tensor", "fsdp")
        ```

    For each array, what comes first of these decides:

    1. a rule by filter;
    2. `rx.field(sharding=P(...))` of the field that declares its ref;
    3. the rules for the names of its axes. An axis whose name has no rule is not split;
    4. `default`.

    A stack of modules (`filter_vmap(Layer)(keys)`) has axes on top of those that are
    declared. They are not split, unless `layers: rx.Batched[Layer, "depth"]` names them, and
    `depth` has a rule. The slots of an [`refx_eqx.Optimizer`][] that have the shape of a
    weight, and the averages of an [`refx_eqx.nn.EMA`][], follow the weight.

    **Arguments:**

    - `rules`: a mapping. A text as a key is the name of an axis; its rule is the axis of the
        mesh that splits it, a tuple of several, or `None`. Any other key is a filter, such as
        `rx.path("**.bias")` or `rx.collection("batch_stats")`; its rule is a
        `jax.sharding.PartitionSpec` for all axes of what it selects. The first that selects
        decides, and one that selects nothing has no effect.
    - `default`: for arrays whose axes have no declared names: a `PartitionSpec`, or a function
        from such an array (with `shape` and `dtype`) to one. As a rule they are not split.
    - `strict`: whether all is to be said. If so, there is an error for an array without
        declared names that no filter selects, for an axis whose name has no rule, and for a
        rule by name that is for no axis.
    - `**by_axis`: more rules by name.

    **Raises:**

    - `TypeError`: if a rule is neither of these.

    When used:

    - `StructureError`: if two types of one ref name an axis differently, and the rules for
        these names differ; if a name in the rules looks like a misspelled one; if an axis of
        the mesh does not divide, is used twice for one array, or does not exist; under
        `strict`, whenever something is not said.
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
                    f"`rx.axis_rules({{{name!r}: {rule!r}}})`: the rule for the axes with this "
                    "name is the name of a mesh axis, a tuple of names, or `None`. To give a "
                    "collection a `PartitionSpec`, use a filter as the key: "
                    f"`rx.axis_rules({{rx.collection({name!r}): P(...)}})`."
                )
        for key, rule in filters.items():
            if not isinstance(rule, PartitionSpec):
                raise TypeError(
                    f"`rx.axis_rules({{{key!r}: {rule!r}}})`: the rule of a filter is for all "
                    "axes of what it selects: a `PartitionSpec`, such as `P('fsdp')`."
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
        - `mesh`: what the specs are for, a `jax.sharding.Mesh` or `AbstractMesh`: that of
            `jax.set_mesh` if omitted. Without one, whether they fit is not checked.

        **Returns:**

        A tree of the form of `rx.deref(tree)`, with a `PartitionSpec` for each array, and
        `None` for what is no array.

        **Raises:**

        - `StructureError`: see [`refx_eqx.axis_rules`][].
        """
        mesh = current_mesh() if mesh is None else mesh
        return _Reading(self, tree, mesh).specs()

    def shardings(self, tree: Any, mesh: Any = None) -> Any:
        """The `NamedSharding` of each array of a tree.

        **Arguments:**

        - `tree`, `mesh`: as for `specs`. There must be a mesh.

        **Returns:**

        A tree of the form of `rx.deref(tree)`, with a `jax.sharding.NamedSharding` for each
        array, and `None` for what is no array.

        **Raises:**

        - `ValueError`: if there is no mesh.
        - `StructureError`: see [`refx_eqx.axis_rules`][].
        """
        mesh = current_mesh() if mesh is None else mesh
        if mesh is None:
            raise ValueError(
                "`rx.axis_rules(...).shardings(tree)`: there is no mesh. Give one, "
                "`rules.shardings(tree, mesh)`, or run this under `jax.set_mesh(mesh)`."
            )
        return jtu.tree_map(
            lambda spec: NamedSharding(mesh, spec),
            self.specs(tree, mesh),
            is_leaf=_is_spec,
        )


def _is_mesh_axes(rule: Any) -> bool:
    if isinstance(rule, PartitionSpec):  # a tuple, in some versions of JAX
        return False
    names = rule if isinstance(rule, tuple) else (rule,)
    return rule is None or all(isinstance(name, str) for name in names)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


class _Reading:
    """The rules, read for one tree."""

    def __init__(self, rules: axis_rules, tree: Any, mesh: Any):
        self.rules = rules
        self.mesh = mesh
        self.filters = [(as_filter(f), spec) for f, spec in rules.by_filter.items()]
        pairs, self.treedef = leaves_with_paths(tree)
        self.paths = [path for path, _ in pairs]
        self.closed = as_closed([leaf for _, leaf in pairs])
        self.stacks = stacks_in(jtu.tree_unflatten(self.treedef, self.closed))
        nodes = jtu.tree_leaves(tree, is_leaf=is_node)
        if any(map(is_node, nodes)):
            self.derefed = [leaf for _, leaf in pairs]
        else:
            derefed, self.treedef = leaves_with_paths(deref(tree))
            self.derefed = [leaf for _, leaf in derefed]
        # The names that the types in the tree declare, each with a place.
        self.declared: dict[str, str] = {}

    def specs(self) -> Any:
        found = []
        for path, leaf, node in zip(self.paths, self.closed, self.derefed):
            if isinstance(node, Value):
                found.append(node.with_value(self._of_ref(path, leaf)))
            elif is_node(node):
                found.append(node)
            else:
                is_array = is_traced(leaf)
                found.append(self._of_array(path, leaf, leaf, []) if is_array else None)
        self._check_names()
        return jtu.tree_unflatten(self.treedef, found)

    def _of_ref(self, path: Path, ref: Ref) -> Any:
        arrays, treedef = jtu.tree_flatten(ref._value)
        declared = declared_axes(ref, self.stacks.get(id(ref), ()))
        specs = [
            self._of_array(path, ref, x, axes) if is_traced_in_ref(x) else None
            for x, axes in zip(arrays, declared)
        ]
        return treedef.unflatten(specs)

    def _of_array(
        self, path: Path, leaf: Any, array: Any, declared: list[DeclaredAxes]
    ) -> PartitionSpec:
        """`leaf` is what the array is in: a ref, or the array itself."""
        shape = tuple(getattr(array, "shape", ()))
        what = f"`{dotted(path)}`"
        if isinstance(leaf, Ref):
            what += f", {describe(leaf._name, leaf._collection)}"
        for axes in declared:
            for name in axes.names:
                if name is not None:
                    self.declared.setdefault(name, what)
        spec = self._by_filter(path, leaf)
        if spec is None:
            spec = self._by_field(declared, what)
        if spec is None and any(any(axes.names) for axes in declared):
            spec = self._by_name(declared, len(shape), what)
        if spec is None and not shape:
            spec = PartitionSpec()
        if spec is None:
            spec = self._by_default(shape, array, what)
        check_spec(spec, shape, self.mesh, what)
        return PartitionSpec(*_trimmed(spec))

    def _by_filter(self, path: Path, leaf: Any) -> PartitionSpec | None:
        asked = [(path, leaf)]
        weight = followed(leaf) if isinstance(leaf, Ref) else None
        if weight is not None:
            stand_in = make_ref(Ref, leaf._value, weight.collection, leaf._name, None)
            asked.append((weight.path, stand_in))
        for filter, spec in self.filters:
            if any(filter.matches(*where) for where in asked):
                return spec
        return None

    def _by_field(
        self, declared: list[DeclaredAxes], what: str
    ) -> PartitionSpec | None:
        specs = {
            _in_stack(axes, self.rules.by_axis)
            for axes in declared
            if axes.sharding is not None
        }
        if len(specs) > 1:
            raise MismatchError(
                f"Cannot split {what}: it is one ref in two fields, which give it the "
                f"shardings {' and '.join(map(str, specs))}. Give it one: "
                "`rx.axis_rules({rx.path(...): P(...)}, ...)`."
            )
        return next(iter(specs), None)

    def _by_name(
        self, declared: list[DeclaredAxes], rank: int, what: str
    ) -> PartitionSpec:
        rules, entries = self.rules.by_axis, []
        for i in range(rank):
            names = [axes.names[i] for axes in declared if axes.names[i] is not None]
            told = {name: rules[name] for name in names if name and name in rules}
            if len({mesh_axes(rule) for rule in told.values()}) > 1:
                each = " and ".join(f"`{k!r}: {rule!r}`" for k, rule in told.items())
                raise MismatchError(
                    f"Cannot split {what}: its fields call axis {i} "
                    f"{' and '.join(map(repr, told))}, and the rules are {each}. Make them "
                    "the same, or give this ref a spec of its own: "
                    "`rx.axis_rules({rx.path(...): P(...)}, ...)`."
                )
            if self.rules.strict and names and not told:
                raise MismatchError(
                    f"Cannot split {what}: there is no rule for its axis {names[0]!r}, and "
                    f"the rules are strict. Add one: `rx.axis_rules({{{names[0]!r}: None}}, "
                    "...)`, if it is not to be split."
                )
            entries.append(next(iter(told.values()), None))
        return PartitionSpec(*entries)

    def _by_default(
        self, shape: tuple[int, ...], array: Any, what: str
    ) -> PartitionSpec:
        if self.rules.strict:
            raise MismatchError(
                f"Cannot split {what}: no type declares the names of its axes, and the rules "
                'are strict. Declare them, as in `rx.Param[Float[Array, "out in"]]`; or '
                "add a rule: `rx.axis_rules({rx.path(...): P()}, ...)`."
            )
        default = self.rules.default
        if not callable(default):
            return default
        spec = default(array)
        if not isinstance(spec, PartitionSpec):
            raise TypeError(
                f"The `default` of `rx.axis_rules` must return a `PartitionSpec`, and "
                f"returned {spec!r} for {what}."
            )
        return spec

    def _check_names(self) -> None:
        rules = self.rules.by_axis
        free = [name for name in self.declared if name not in rules]
        for name in rules:
            if name in self.declared:
                continue
            alike = difflib.get_close_matches(name, free, 1)
            if not alike and not self.rules.strict:
                continue  # the rules may be for other trees too
            declared = ", ".join(map(repr, self.declared)) or "none"
            text = f"no axis in this tree is called {name!r}: the types declare {declared}."
            if alike:
                text += (
                    f" Is {alike[0]!r} meant, of {self.declared[alike[0]]}? If not, say that "
                    f"this one is not to be split: `rx.axis_rules({{{alike[0]!r}: None}}, ...)`."
                )
            else:
                text += " Leave the rule out, or do not make the rules strict."
            raise StructureError(f"`rx.axis_rules`: {text}")


def _in_stack(axes: DeclaredAxes, rules: Mapping[str, MeshAxes]) -> PartitionSpec:
    """The sharding of a field, with the axes of the stack that its ref is in."""
    given = iter(axes.sharding)
    entries = [
        rules.get(name or "") if i in axes.extra else next(given, None)
        for i, name in enumerate(axes.names)
    ]
    return PartitionSpec(*entries, *given)


def _trimmed(spec: PartitionSpec) -> list[Any]:
    """Without what says nothing at the end, as JAX returns it."""
    entries = list(spec)
    while entries and (entries[-1] is None or entries[-1] == ()):
        entries.pop()
    return entries
