"""`update_refs`: writes the values of one tree into the refs of another, all or none."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._core import _jax
from .._core._access import check_value, check_writable, refuse_cycle
from .._core._deref import NOTHING
from .._core._errors import CollectionError, describe, MismatchError, StructureError
from .._core._nodes import Index, is_convertible, is_node, Value
from .._core._on_mesh import put
from .._core._ref import commits, Ref
from .._fields._misplaced import check_refs_in_place
from .._fields._referenced import in_original_classes
from .._trees._cells import is_lookup
from .._trees._changes import try_leaves
from .._trees._closure import contents_by_name, is_closure, opened
from .._trees._equality import is_same_tree
from .._trees._functions import names_in
from .._trees._paths import path_text
from ._as_held import as_held, is_key, is_number, number_as_held, sharding_of
from ._select import check_all_in_tree


def _is_place(x: Any) -> bool:
    return x is None or x is NOTHING or isinstance(x, (Ref, Value, Index))


def update_refs(target: PyTree, source: PyTree) -> None:
    """Writes the values of `source` into the aligned refs of `target`.

    Everything is validated first: on any mismatch nothing is written. The values replace
    those of the refs. To add the updates of an Optax transformation, which have the same
    structure, use [`refx_eqx.apply_updates`][].

    !!! Example

        ```python
        import jax
        import refx_eqx as rx

        model = {"w": rx.Ref(2.0, "params"), "n": rx.Ref(0, "counts")}
        params = rx.get_partition(model, "params")
        grads = jax.grad(lambda p: p["w",].value ** 2)(rx.deref(params))
        new = jax.tree.map(lambda w, g: w - 0.25 * g, rx.deref(params), grads)
        rx.update_refs(params, new)
        assert model["w"].value == 1.0
        ```

    **Arguments:**

    - `target`: a tree of refs. Its other leaves stay unchanged.
    - `source`: a tree of the same structure, such as a snapshot of the target. For each ref
        it has a ref, a `Value`, an `Index` (which stands for the `Value` of that index), a
        bare value, or `None` or `NOTHING` to leave the ref unchanged. Arrays must have the
        shape and dtype of those they replace. A Python number that replaces an array
        becomes an array of its dtype, as in `x.at[...].set(0.1)`, if it is of the same kind
        (bool, integer, floating-point or complex) and in range. An array that JAX may move
        (one that is not committed to devices) goes to the devices of the one it replaces.

    **Raises:**

    - `StructureError`: if `target` is derefed, if the structures differ, if a value has
        another shape or dtype, if a number is out of range, or if one ref of `target` gets two different values.
    - `CollectionError`: if a ref or node of `source` has another collection.
    - `RefTypeError`: if a value breaks the declared type of its ref.
    - `TraceLevelError`, `ImmutableError`: if a ref cannot be written here.
    """
    new_values: dict[int, tuple[Ref, Any]] = {}
    for ref, value, where in aligned(target, source, "Cannot update refs", "source"):
        check_writable(ref)  # before reading its value, which may be forbidden too
        value = as_held(ref.value, value, number_as_held)
        # A broken declared type is more informative than a wrong shape.
        stored = check_value(ref, value)
        check_fits(ref, value, "Cannot update refs", where, "the source")
        new_values[id(ref)] = ref, as_held(ref.value, stored, _on_sharding)
    write_all(list(new_values.values()))


def _on_sharding(old: Any, new: Any) -> Any:
    """`new`, on the sharding of what it replaces, unless it was put elsewhere itself."""
    sharding = sharding_of(old)
    if sharding is None:
        return new
    is_array = isinstance(new, jax.Array) and not _jax.is_tracer(new)
    is_free = is_array and not new.committed
    is_asked = isinstance(old, jax.ShapeDtypeStruct)
    return put(new, sharding) if is_free or is_asked else new


def aligned(
    target: Any, source: Any, failure: str, what: str
) -> Iterator[tuple[Ref, Any, str]]:
    """Each ref of `target` for which `source` has a value, with that value and its place.

    Yields a ref once for each place with a value, which is the same at all of them.
    """
    check_refs_in_place(target, failure)
    refuse_cycle(source)
    error = functools.partial(not_aligned, failure, what)
    pairs = list(aligned_leaves(target, source, error))
    check_all_in_tree([(path, ref) for path, ref, _ in pairs], failure)
    nodes = {new.index: new for *_, new in pairs if isinstance(new, Value)}
    first: dict[int, tuple[Any, str]] = {}
    for path, ref, new in pairs:
        if is_node(ref):
            raise StructureError(
                f"{failure}: the target is derefed: it has a {type(ref).__name__} at "
                f"{path_text(path)}. Pass the tree of refs itself."
            )
        if not isinstance(ref, Ref) or new is None or new is NOTHING:
            continue
        if isinstance(new, (Ref, Value, Index)):
            _check_collection(ref, new, path, failure, what)
        if isinstance(new, Index):
            if new.index not in nodes:
                raise StructureError(
                    f"{failure}: Index {new.index} of the {what}, at {path_text(path)}, has "
                    f"no Value in it. Deref the whole {what} at once, or put `rx.NOTHING` "
                    "there."
                )
            new = nodes[new.index]
        value = new.value if isinstance(new, (Ref, Value)) else new
        if not isinstance(new, Ref) and not jtu.tree_leaves(value):
            continue  # `Value(None)`: the source filtered out this ref
        where = path_text(path)
        earlier, at = first.setdefault(id(ref), (value, where))
        if earlier is not value:
            one = "one of them" if what == "source" else "their sum"
            raise MismatchError(
                f"{failure}: {describe(ref)} is one ref at {at} and {where} of the target, "
                f"but the {what} has a different value at each. Give {one} at one "
                "place, and `rx.NOTHING` at the other."
            )
        yield ref, value, where


def aligned_leaves(
    target: Any,
    source: Any,
    error: Callable[[str], MismatchError],
    path: tuple = (),
) -> Iterator[tuple[tuple, Any, Any]]:
    """Each leaf of `target`, with its key path, and what `source` has there. Modules are
    aligned by their original classes, and functions by the names of what they carry.

    **Arguments:**

    - `error`: makes the error to raise if the structure differs, from the reason.
    - `path`: the place of both in larger trees.
    """
    target, source = (in_original_classes(opened(tree)) for tree in (target, source))
    is_leaf = lambda x: is_closure(x) or _is_place(x) or is_lookup(x)
    leaves, treedef = jtu.tree_flatten_with_path(target, is_leaf=is_leaf)
    try:
        sources = treedef.flatten_up_to(source)
    except (ValueError, TypeError):
        where, reason = _first_difference(target, source, is_leaf, path)
        raise error(f"JAX says of {path_text(where)}: {reason}") from None
    for (keys, leaf), new in zip(leaves, sources):
        place = (*path, *keys)
        if not is_closure(leaf):
            yield place, leaf, new
        elif new is not None and new is not NOTHING:
            names = list(names_in(leaf.head))
            carried = contents_by_name(new, names)
            if list(carried) != names:
                raise error(
                    f"The function at {path_text(place)} carries {names}, and is aligned "
                    f"with {eqx.tree_pformat(new)}, which carries {list(carried)}."
                )
            for name, mine in zip(names, leaf.contents):
                keyed = (*place, jtu.GetAttrKey(name))
                yield from aligned_leaves(mine, carried[name], error, keyed)


def _first_difference(
    target: Any, source: Any, is_leaf: Callable[[Any], bool], path: tuple
) -> tuple[tuple, str]:
    """The place of the first node that differs, and what JAX says of it: of a whole tree it
    says no place."""
    children, treedef = jtu.tree_flatten_with_path(
        target, is_leaf=lambda x: x is not target
    )
    try:
        sources = treedef.flatten_up_to(source)
    except (ValueError, TypeError) as e:
        return path, str(e)
    keys, child, new = next(
        (keys, child, new)
        for (keys, child), new in zip(children, sources)
        if not _is_prefix(jtu.tree_structure(child, is_leaf=is_leaf), new)
    )
    return _first_difference(child, new, is_leaf, (*path, *keys))


def _is_prefix(treedef: Any, tree: Any) -> bool:
    try:
        treedef.flatten_up_to(tree)
    except (ValueError, TypeError):
        return False
    return True


def not_aligned(failure: str, what: str, reason: str) -> MismatchError:
    return MismatchError(
        f"{failure}: target and {what} do not have the same structure. {reason} The {what} "
        "must be a tree aligned with the target, with `rx.NOTHING` or `None` where a ref "
        "should stay unchanged."
    )


def write_all(checked: list[tuple[Ref, Any]]) -> None:
    """Writes values that have all been checked, for refs that may be written."""
    with commits.lock:
        commits.store(checked)


def check_and_write(updates: list[tuple[Ref, Any]]) -> None:
    """Writes all or none: every check comes before the first write."""
    for ref, _ in updates:
        check_writable(ref)
    write_all([(ref, check_value(ref, value)) for ref, value in updates])


def _check_collection(
    ref: Ref, new: Ref | Value | Index, path: tuple, failure: str, what: str
) -> None:
    if ref.collection != new.collection:
        raise CollectionError(
            f"{failure}: at {path_text(path)} the target has {describe(ref)}, but the "
            f"{what} has collection {new.collection!r}. Align the two trees, or put "
            "`rx.NOTHING` there."
        )


def check_fits(ref: Ref, value: Any, failure: str, place: str, source: str) -> None:
    """Checks for the structure, shapes and dtypes of the current value of `ref`. A consumed
    state does not have them anymore."""
    old = ref.value
    if try_leaves(old) is not None and not is_same_tree(_same_kind, old, value):
        remedy = "If the change is intended, write it: `ref.value = ...`."
        if _only_precisions_differ(old, value):
            remedy += f' Or convert it: `jnp.asarray(value, "{old.dtype}")`.'
        raise MismatchError(
            f"{failure}: {describe(ref)} at {place} holds "
            f"{eqx.tree_pformat(old)}, and {source} has {eqx.tree_pformat(value)}. {remedy}"
        )


def _only_precisions_differ(old: Any, new: Any) -> bool:
    """Whether `jnp.asarray` converts `new`, and drops no imaginary part."""
    both = [x for x in (old, new) if hasattr(x, "dtype")]
    return (
        len(both) == 2
        and jnp.shape(old) == jnp.shape(new)
        and is_convertible(new.dtype, old.dtype)
    )


def _same_kind(old: Any, new: Any) -> bool:
    if isinstance(old, jax.ShapeDtypeStruct):  # stands for a future array
        found = getattr(new, "shape", None), getattr(new, "dtype", None)
        return found == (old.shape, old.dtype)
    if not eqx.is_array_like(old):
        return not eqx.is_array_like(new)
    if not eqx.is_array_like(new):
        return False
    if is_number(old):  # weakly typed
        return jnp.shape(new) == () and _dtype_kind(old) == _dtype_kind(new)
    # `number_as_held` has made an array of a number that fits.
    return eqx.is_array(new) and (old.shape, old.dtype) == (new.shape, new.dtype)


def _dtype_kind(x: Any) -> str:
    if is_key(x):  # for which NumPy has none
        return "key"
    # NumPy has dtypes that JAX does not, such as strings.
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    # To NumPy, `bfloat16` has the kind of unknown dtypes.
    return "f" if jnp.issubdtype(dtype, jnp.floating) else dtype.kind
