"""`as_refs`: turns the arrays of a plain tree into refs, while its modules keep working."""

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._core._deref import NOTHING, refuse_lookups
from .._core._errors import check_name, CollectionError, RefTypeError, StructureError
from .._core._nodes import is_module
from .._core._ref import is_ref, Ref
from .._fields._config import config
from .._fields._declared import DeclaredRef
from .._fields._instance import check_instance, plan_of
from .._fields._misplaced import instead_of_refs
from .._fields._referenced import (
    as_referenced,
    is_referenced,
    refs_in_zone,
    snapshot_of,
    with_fields,
    zone,
)
from .._trees._cells import is_lookup, is_opaque
from .._trees._equality import is_same_tree
from .._trees._paths import key_text, Path, path_text
from ._filters import as_filter, Filter, FilterLike
from ._guard import only_answering
from ._select import (
    check_all_in_tree,
    check_names,
    leaves_with_paths,
    refuse_derefed,
)


T = TypeVar("T")


def as_refs(
    tree: T,
    collection: Hashable | Mapping[Hashable, FilterLike] = None,
    where: Callable[[Any], bool] | None = None,
) -> T:
    """Turns the arrays of a plain tree into refs: the inverse of `snapshot`.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        linear = rx.as_refs(eqx.nn.Linear(3, 2, key=jax.random.key(0)), "params")
        assert isinstance(linear, eqx.nn.Linear)
        assert linear.weight.collection == "params"

        before = linear(jnp.ones(3))  # a method sees the values
        linear.weight.value *= 2
        linear.bias.value *= 2
        assert jnp.allclose(linear(jnp.ones(3)), 2 * before)
        ```

    Equinox modules keep working: their methods and properties see the current values of the
    refs, and their attributes are the refs. Methods write nothing, and return plain values.
    So any stateless layer of any library becomes a layer with refs, whose weights can be
    shared with others.

    **Arguments:**

    - `tree`: any pytree. Existing refs are kept, and so are modules that hold some, or whose
        fields are declared refs, as in a snapshot: their methods are written for refs.
    - `collection`: the collection of the new refs; or, for several, a dict from collection
        to filter. A leaf goes to the first one whose filter selects it. `None` is the
        collection that a field declares, if it is declared a ref.
    - `where`: a function of a leaf, which says whether to turn it into a ref. By default,
        arrays are turned into refs, and so is all that is in a field that is declared a ref.

    **Returns:**

    The tree, with a ref for each selected leaf. An array object that occurs twice becomes
    one ref. In a field that is declared a ref, the whole value becomes one ref, of the
    declared class: a pair of arrays, or a module, if `where` selects any leaf of it. It has
    the declared type again, if its module fits its types (a stack does not). Elsewhere a
    snapshot does not say that a ref held a pytree, and each of its arrays becomes a ref.
    The arrays inside a function stay.

    **Raises:**

    - `StructureError`: if `tree` is derefed, if a module in it uses `equinox.nn.State`, or if
        a filter names something that is not in the tree.
    - `CollectionError`: if one array would be in two collections.
    - `TypeError`: if `where` is not a function.
    """
    if not (where is None or callable(where)):
        raise TypeError(
            "`rx.as_refs`: `where` must be a function of a leaf that returns a bool, but "
            f"was given {where!r}. Pass, for example, `where=eqx.is_inexact_array`."
        )
    pairs, _ = leaves_with_paths(tree)
    refuse_derefed(pairs, "Cannot make refs")
    if not isinstance(collection, Mapping):
        check_name("rx.as_refs", collection=collection)
        collection = {collection: True}
    for name in collection:
        check_name("rx.as_refs", collection=name)
    filters = {name: as_filter(f) for name, f in collection.items()}
    conversion = _Conversion(filters, where, _declarations(tree))
    with only_answering():
        converted = conversion.tree(tree, ())
    check_all_in_tree(pairs, "Cannot make refs")
    check_names(list(filters.values()), *conversion.met)
    return converted


def _declarations(tree: Any) -> dict[int, DeclaredRef]:
    """By the ids of arrays in fields that are declared refs, what the fields declare."""
    found: dict[int, DeclaredRef] = {}

    def visit(x: Any) -> bool:
        for declared, leaf, _ in instead_of_refs(x):
            if eqx.is_array(leaf):
                found.setdefault(id(leaf), declared)
        return is_opaque(x)

    jtu.tree_leaves(tree, is_leaf=visit)
    return found


@dataclasses.dataclass(eq=False)
class _Slot:
    """A leaf: a value that is to become a ref, in a field that is declared one."""

    declared: DeclaredRef
    value: Any


@dataclasses.dataclass
class _Conversion:
    filters: dict[Hashable, Filter]
    where: Callable[[Any], bool] | None
    declared: dict[int, DeclaredRef]
    # By the id of the first array: the values that hold it first, with their refs.
    made: dict[int, list[tuple[Any, Ref]]] = dataclasses.field(default_factory=dict)
    # The paths of all leaves, and the leaves.
    met: tuple[list[Path], list[Any]] = dataclasses.field(
        default_factory=lambda: ([], [])
    )

    def tree(self, tree: Any, path: tuple) -> Any:
        """The tree, with its leaves converted, and the modules in it."""
        if isinstance(tree, eqx.nn.StateIndex):
            raise StructureError(
                f"`rx.as_refs`: there is an `equinox.nn.StateIndex` at {path_text(path)}. "
                "A module with `equinox.nn.State` gets its state as an argument, so its "
                "methods cannot run on the values of refs. Use `rx.nn.BatchNorm` or "
                "`rx.nn.SpectralNorm`, which keep their state in refs; write any other "
                "layer with a ref for its state: an `rx.Module` with a field of "
                "`rx.BatchStat[...]`."
            )
        knew_refs = isinstance(tree, eqx.Module) and (
            next(refs_in_zone(tree), None) is not None
            or bool(plan_of(type(tree)).of_refs)
        )
        is_leaf = is_module
        if isinstance(tree, eqx.Module):
            tree = self.slotted(tree)
            is_leaf = zone(tree)
        leaves, treedef = jtu.tree_flatten_with_path(
            tree, is_leaf=lambda x: is_leaf(x) or is_lookup(x)
        )
        new = [
            self.tree(leaf, (*path, *keys))
            if isinstance(leaf, eqx.Module) and leaf is not tree
            else self.leaf(leaf, (*path, *keys))
            for keys, leaf in leaves
        ]
        converted = jtu.tree_unflatten(treedef, new)
        if knew_refs and config.check_types:
            # Not of a stack, or with arrays that `where` leaves in the places of refs.
            with contextlib.suppress(RefTypeError):
                check_instance(converted)
        if not isinstance(tree, eqx.Module) or knew_refs or is_referenced(tree):
            return converted
        sees_values = any(isinstance(x, Ref) or is_referenced(x) for x in new)
        return as_referenced(converted) if sees_values else converted

    def slotted(self, module: eqx.Module) -> eqx.Module:
        """The module, with slots in its fields that are declared refs."""
        fields = dict(vars(module))
        for field in plan_of(type(module)).of_refs:
            # Not in a tree that is being manipulated, where a field has another structure.
            with contextlib.suppress(RefTypeError):
                declared: Any = field.declared
                value = fields.get(field.name)
                fields[field.name] = declared.map(self.slot, value, field.name)
        return with_fields(module, type(module), fields)

    def slot(self, declared: DeclaredRef, value: Any, where: str) -> Any:
        leaves = jtu.tree_leaves(value)
        if value is None or value is NOTHING or any(map(is_ref, leaves)):
            return value
        selected = self.where is None or any(map(self.where, leaves))
        return _Slot(declared, value) if selected else value

    def leaf(self, leaf: Any, path: tuple) -> Any:
        is_slot = isinstance(leaf, _Slot)
        value = leaf.value if is_slot else leaf
        names = tuple(map(key_text, path))
        self.met[0].append(names)
        self.met[1].append(value)
        where = self.where or eqx.is_array
        if isinstance(value, Ref) or not (is_slot or where(value)):
            return value
        declared = leaf.declared if is_slot else self.declared.get(id(value))
        for collection, selects in self.filters.items():
            if selects.matches(names, value):
                if collection is None and declared is not None:
                    collection = declared.collection
                kind = Ref if declared is None else declared.ref_type
                return self.ref(value, kind, collection, path)
        return value

    def ref(
        self, value: Any, kind: type[Ref], collection: Hashable, path: tuple
    ) -> Ref:
        arrays = filter(eqx.is_array, jtu.tree_leaves(value))
        made = self.made.setdefault(id(next(arrays, None)), [])
        ref = next((ref for other, ref in made if _is_same(other, value)), None)
        if ref is None:
            ref = kind(value, collection)
            ref._name = jtu.keystr(path, simple=True, separator=".") or None
            made.append((value, ref))
        if ref.collection != collection:
            raise CollectionError(
                f"`rx.as_refs`: one array is at `{ref.name}` and at {path_text(path)}, and "
                f"would be in the collections {ref.collection!r} and {collection!r}. Let one "
                "filter select both places."
            )
        return ref


def _is_same(a: Any, b: Any) -> bool:
    """Whether two values are one, or hold the same arrays in the same places."""
    has_arrays = any(map(eqx.is_array, jtu.tree_leaves(a)))
    return has_arrays and is_same_tree(operator.is_, a, b)


def snapshot(tree: PyTree) -> PyTree:
    """Replaces every ref with its current value, giving a plain tree for code that does not
    know about refs.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        ref = rx.Ref(jnp.ones(2))
        plain = rx.snapshot({"a": ref, "b": ref})
        ref.value = jnp.zeros(2)
        assert plain["a"] is plain["b"] and plain["a"][0] == 1
        ```

    **Arguments:**

    - `tree`: any pytree. Its refs must be readable here.

    **Returns:**

    The tree without refs. A shared ref becomes the same array object at each place. A module
    has arrays in its fields, so a method that is to run on the snapshot too reads
    `self.weight[...]`, which works for refs and arrays alike; `.value` and writes are for
    refs.

    **Raises:**

    - `StructureError`: if `tree` is derefed, contains itself, or holds refs in a set or as
        dict keys.
    - `TraceLevelError`: if a ref cannot be read here.
    - `DonatedError`: if the buffer of a value is gone.
    """
    pairs, _ = leaves_with_paths(tree)
    refuse_derefed(pairs, "Cannot make a snapshot")
    refuse_lookups(tree, [leaf for _, leaf in pairs], "snapshot")
    return snapshot_of(tree)
