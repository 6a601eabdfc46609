"""The rules of an `axis_rules`, applied to one tree."""

import difflib
from collections.abc import Mapping
from typing import Any

import jax.tree_util as jtu
from jax.sharding import PartitionSpec

from .._core._access import peek
from .._core._deref import deref
from .._core._errors import describe, MismatchError, StructureError
from .._core._nodes import (
    Index,
    is_node,
    is_traced,
    is_traced_in_ref,
    Value,
    value_node,
)
from .._core._ref import make_ref, Ref
from .._fields._axes_of_values import declared_axes, stacks_in
from .._fields._following import DeclaredAxes, followed
from .._filters._filters import as_filter, asks_identity
from .._filters._select import as_closed, leaves_with_paths
from .._trees._paths import Path, path_text
from ._mesh import check_spec, mesh_axes


class Reading:
    """The rules, applied to one tree."""

    def __init__(self, rules: Any, tree: Any, mesh: Any):
        self.rules = rules
        self.mesh = mesh
        self.filters = [(as_filter(f), spec) for f, spec in rules.by_filter.items()]
        pairs, self.treedef = leaves_with_paths(tree)
        self.paths = [path for path, _ in pairs]
        self.derefed = [leaf for _, leaf in pairs]
        if any(map(is_node, self.derefed)):
            # Filters expect refs, so each node of a derefed tree gets a stand-in.
            self._refuse_identity()
            self.closed = as_closed(_with_values(self.derefed))
        else:
            self.closed = self.derefed
            derefed, self.treedef = leaves_with_paths(deref(tree))
            self.derefed = [leaf for _, leaf in derefed]
        self.places: dict[int, list[Path]] = {}
        for path, leaf in zip(self.paths, self.closed):
            if isinstance(leaf, Ref):
                self.places.setdefault(id(leaf), []).append(path)
        self.stacks = stacks_in(jtu.tree_unflatten(self.treedef, self.closed))
        # The names declared by the types in the tree, each with a place.
        self.declared: dict[str, str] = {}

    def specs(self) -> Any:
        """A tree like the derefed one."""
        found = []
        for node, specs in zip(self.derefed, self._of_leaves()):
            if isinstance(node, Value):
                found.append(
                    node.with_value(jtu.tree_structure(node.value).unflatten(specs))
                )
            else:
                found.append(node if is_node(node) else specs[0])
        return jtu.tree_unflatten(self.treedef, found)

    def flat(self) -> list[PartitionSpec | None]:
        """The spec of each leaf of the derefed tree; `None` for non-arrays."""
        return [spec for specs in self._of_leaves() for spec in specs]

    def _of_leaves(self) -> list[list[PartitionSpec | None]]:
        """For each place of the tree, the specs of everything there."""
        found = []
        for path, leaf, node in zip(self.paths, self.closed, self.derefed):
            if isinstance(node, Value):
                found.append(self._of_ref(path, leaf))
            elif is_node(node):
                found.append([])
            else:
                is_array = is_traced(leaf)
                found.append(
                    [self._of_array(path, leaf, leaf, []) if is_array else None]
                )
        self._check_names()
        return found

    def _of_ref(self, path: Path, ref: Ref) -> list[PartitionSpec | None]:
        declared = declared_axes(ref, self.stacks.get(id(ref), ()))
        return [
            self._of_array(path, ref, x, axes) if is_traced_in_ref(x) else None
            for x, axes in zip(jtu.tree_leaves(peek(ref)), declared)
        ]

    def _refuse_identity(self) -> None:
        for filter, _ in self.filters:
            if asks_identity(filter):
                raise StructureError(
                    f"`{self.rules!r}`: {filter!r} selects by the identity of refs, but "
                    "this tree is derefed and has none. Make the shardings from the tree "
                    "of refs: `rules.shardings(tree, mesh)`."
                )

    def _of_array(
        self, path: Path, leaf: Any, array: Any, declared: list[DeclaredAxes]
    ) -> PartitionSpec:
        """`leaf` is the ref that contains the array, or the array itself."""
        shape = tuple(getattr(array, "shape", ()))
        what = f"{path_text(path)}"
        if isinstance(leaf, Ref):
            what += f", {describe(leaf)}"
        for axes in declared:
            for name in axes.names:
                if name is not None:
                    self.declared.setdefault(name, what)
        # From the most specific source to the most general.
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
        # A tied ref is split by the first rule that selects it at any of its places.
        asked = [(place, leaf) for place in self.places.get(id(leaf), [path])]
        weight = followed(leaf) if isinstance(leaf, Ref) else None
        if weight is not None:
            # A filter that selects a weight also selects its moments, wherever they are.
            stand_in = make_ref(Ref, leaf._value, weight.collection, leaf._name, None)
            asked.extend((place, stand_in) for place in weight.paths)
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
                f"Cannot split {what}: it is one ref in two fields, which give it the shardings {' and '.join(map(str, specs))}. Give it only one: "
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
                    f"Cannot split {what}: its fields call axis {i} {' and '.join(map(repr, told))}, but the rules are {each}. Make them the same, or give this ref its own spec: "
                    "`rx.axis_rules({rx.path(...): P(...)}, ...)`."
                )
            if self.rules.strict and names and not told:
                raise MismatchError(
                    f"Cannot split {what}: there is no rule for its axis {names[0]!r}, but "
                    "the rules are strict. Add one: "
                    f"`rx.axis_rules({{{names[0]!r}: None}}, ...)`, if it should not be "
                    "split."
                )
            entries.append(next(iter(told.values()), None))
        return PartitionSpec(*entries)

    def _by_default(
        self, shape: tuple[int, ...], array: Any, what: str
    ) -> PartitionSpec:
        if self.rules.strict:
            raise MismatchError(
                f"Cannot split {what}: no type declares the names of its axes, but the rules "
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
                continue  # the rules may also be for other trees
            declared = ", ".join(map(repr, self.declared)) or "none"
            text = f"no axis in this tree is called {name!r}: the types declare {declared}."
            if alike:
                text += (
                    f" Did you mean {alike[0]!r}, of {self.declared[alike[0]]}? If not, "
                    "say that this axis is not split: "
                    f"`rx.axis_rules({{{alike[0]!r}: None}}, ...)`."
                )
            else:
                text += " Leave the rule out, or do not make the rules strict."
            raise StructureError(f"`rx.axis_rules`: {text}")


def _with_values(leaves: list[Any]) -> list[Any]:
    """Adds an empty `Value` for each ref whose `Value` is in another part of the tree."""
    known = {leaf.index for leaf in leaves if isinstance(leaf, Value)}
    made = []
    for leaf in leaves:
        if isinstance(leaf, Index) and leaf.index not in known:
            known.add(leaf.index)
            what = leaf.index, leaf.collection, leaf.ref_type, leaf.label
            leaf = value_node(None, *what)
        made.append(leaf)
    return made


def _in_stack(axes: DeclaredAxes, rules: Mapping[str, Any]) -> PartitionSpec:
    """The sharding of a field, with the axes of the stack that contains its ref."""
    given = iter(axes.sharding)
    entries = [
        rules.get(name or "") if i in axes.extra else next(given, None)
        for i, name in enumerate(axes.names)
    ]
    return PartitionSpec(*entries, *given)


def _trimmed(spec: PartitionSpec) -> list[Any]:
    """Without trailing `None`s, as JAX returns it."""
    entries = list(spec)
    while entries and (entries[-1] is None or entries[-1] == ()):
        entries.pop()
    return entries
