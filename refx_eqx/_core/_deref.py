"""Opening a tree of refs at a JAX boundary, and closing it again.

    tree of refs   -- deref -->  pytree of Value and Index  -- JAX -->  ...  -- reref -->

`deref` and `reref` are inverses of each other, up to the identity of the refs. The rest of
this file is small functions built on the two.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, PyTree

from .._trees import _closure
from .._trees._cells import held_by, is_lookup, looked_up
from .._trees._changes import owned
from .._trees._closure import opened
from .._trees._equality import Unlike
from .._trees._functions import FirstPlaceGone
from .._trees._paths import path_text
from . import _trace
from ._access import check_not_deleted, refuse_cycle
from ._errors import describe, StructureError, TraceLevelError
from ._nodes import Index, index_node, is_node, label_of, Value, value_node
from ._ref import check_no_attributes, is_ref, make_ref, Ref, taken


T = TypeVar("T")


class _Nothing(Unlike):
    """The class of [`refx_eqx.NOTHING`][], which is a pytree node."""


NOTHING = _Nothing(__name__, "NOTHING")
"""Marks a place of a tree that has no leaf: a pytree without leaves. See
[`refx_eqx.partition`][] and [`refx_eqx.update_refs`][]."""

jtu.register_pytree_node(
    _Nothing, lambda _: ((), None), lambda _aux, _children: NOTHING
)


_INSIDE = "a place inside a function"


def path_of(tree: Any, found: Callable[[Any], bool]) -> str:
    """The path of the first leaf of `tree` that satisfies `found`, for messages."""
    leaves, _ = jtu.tree_flatten_with_path(opened(tree), is_leaf=is_whole)
    return next((path_text(path) for path, leaf in leaves if found(leaf)), _INSIDE)


def closed(tree: Any) -> Any:
    """The tree, with the nodes of functions turned back into functions.

    **Raises:**

    - `StructureError`: if the first place of a function is not in the tree.
    """
    try:
        return _closure.closed(tree)
    except FirstPlaceGone:
        raise StructureError(
            "Cannot reref: a function that was at two places of a tree is only at the "
            "later one here. This is part of a derefed tree; call `rx.reref` on the whole "
            "tree, or `rx.combine` the parts first."
        ) from None


def deref(tree: T) -> T:
    """Opens every ref of a tree: the first place of each becomes a `Value`, every later
    one an `Index`. The result is a pure pytree, for any JAX transform to carry.

    "First" is in JAX's flattening order. A function in the tree that holds refs (in its
    closure, in a partial, as the object of a bound method) also becomes a node, whose
    children are its contents by name; `reref` turns it back into a function. Two derefed
    trees have equal treedefs exactly when they have the same structure, sharing,
    collections and ref types.

    !!! Example

        ```python
        import jax
        import refx_eqx as rx

        ref = rx.Ref(1.0)
        tree = {"a": ref, "b": [ref, 2.0]}

        opened = rx.deref(tree)
        assert jax.tree.leaves(opened) == [1.0, 2.0]
        closed = rx.reref(opened)
        assert closed["a"] is closed["b"][0] and closed["a"] is not ref
        ```

    **Arguments:**

    - `tree`: any pytree. Its refs must be readable here.

    **Returns:**

    The tree, with each ref replaced by a `Value` or `Index`. Values are not copied.

    **Raises:**

    - `StructureError`: if `tree` already holds a `Value` or an `Index`, if it contains
        itself, or if it holds refs in a set or as the keys of a dict.
    - `TraceLevelError`: if a ref cannot be read here.
    - `DonatedError`: if the buffer of a value is gone.
    """
    refuse_cycle(tree)
    leaves, treedef = jtu.tree_flatten(opened(tree), is_leaf=is_whole)
    refuse_lookups(tree, leaves, "deref")
    for leaf in leaves:
        if is_node(leaf):
            raise StructureError(
                f"Cannot deref a tree that is already derefed: {type(leaf).__name__} found "
                f"at {path_of(tree, is_node)}. Call `rx.reref` on it first, or do not call "
                "`rx.deref` twice."
            )
    return jtu.tree_unflatten(treedef, deref_leaves(leaves, {}, taken))


def is_whole(x: Any) -> bool:
    return is_node(x) or is_lookup(x)


def refuse_lookups(tree: Any, leaves: list[Any], verb: str) -> None:
    """Refuses refs in sets or as dict keys, which would be left behind.

    **Raises:**

    - `StructureError`: if a leaf is a set of refs, or a dict with refs as keys.
    """
    for leaf in leaves:
        ref = next(looked_up(leaf), None)
        if ref is not None:
            raise StructureError(
                f"Cannot {verb} a {type(leaf).__name__} of refs, such as "
                f"{describe(ref)} at {path_of(tree, lambda x: x is leaf)}: elements "
                "of a set and keys of a dict are not part of a tree, so these refs would "
                "not be carried. Hold the refs in a list or a tuple, and make the set "
                "where you use it."
            )


def deref_leaves(
    leaves: list[Any], numbers: dict[int, int], read: Callable[[Ref], Any]
) -> list[Any]:
    """The leaves of a tree, derefed.

    **Arguments:**

    - `numbers`: the numbers of the refs that already have one, and so a `Value` elsewhere,
        by `id`. Any other ref gets the next number, and is added.
    - `read`: returns the value of a ref at its first place.
    """
    derefed = []
    for leaf in leaves:
        if isinstance(leaf, Ref):
            if type(leaf) is not Ref:
                check_no_attributes(leaf)
            what = leaf._collection, type(leaf), label_of(leaf)
            # By `id`: hashing a ref depends on its identity, and a program that does so is
            # not used for other refs. See `_identity.py`.
            number = numbers.get(id(leaf))
            if number is None:
                number = numbers[id(leaf)] = len(numbers)
                leaf = value_node(read(leaf), number, *what)
            else:
                leaf = index_node(number, *what)
        derefed.append(leaf)
    return derefed


def reref_leaves(leaves: list[Any], refs: dict[int, Ref]) -> list[Any]:
    """The inverse of `deref_leaves`, for leaves that no other code has touched.

    `refs` are the known refs by number; new ones are added.
    """
    with_refs = []
    for leaf in leaves:
        if type(leaf) is Value:
            refs[leaf.index] = make_ref_of(leaf)
            leaf = refs[leaf.index]
        elif type(leaf) is Index:
            leaf = refs[leaf.index]
        with_refs.append(leaf)
    return with_refs


def reref(tree: T) -> T:
    """The inverse of `deref`: makes a new ref for each `Value`, and puts the same ref
    wherever an `Index` refers to it.

    The new refs belong to the current trace, so they may be read and written inside a
    transformed function.

    !!! Example

        ```python
        import jax
        import refx_eqx as rx

        ref = rx.Ref(1.0)

        @jax.jit
        def double(tree):
            tree = rx.reref(tree)
            tree["a"].value *= 2
            return rx.deref(tree)

        tree = rx.reref(double(rx.deref({"a": ref, "b": ref})))
        assert tree["b"].value == 2.0 and ref.value == 1.0
        ```

    **Arguments:**

    - `tree`: a tree with `Value` and `Index` nodes, in any state: after a transform, a
        filter, or with its leaves replaced.

    **Returns:**

    The tree, with each node replaced by a ref.

    **Raises:**

    - `StructureError`: if `tree` already holds a ref (even in a `Value`), an `Index`
        without its `Value`, two values for one ref, a node whose collection differs from
        that of its `Value`, or a node whose `ref_type` is not a ref class.
    - `TraceLevelError`: if a value holds a tracer of a transform that has ended.
    - `RefTypeError`: if a value breaks the declared type of its ref.
    - `DonatedError`: if the buffer of a value is gone.
    """
    refuse_cycle(tree)
    leaves, treedef = jtu.tree_flatten(tree, is_leaf=is_whole)
    refs: dict[int, Ref] = {}
    for leaf in leaves:
        if isinstance(leaf, Value):
            if leaf.index in refs:
                raise StructureError(
                    f"Cannot reref: two values for ref {leaf.index} ({describe(leaf)}). "
                    "Were two trees combined after they were derefed? Deref them "
                    "together: `rx.deref((tree1, tree2))`."
                )
            _check_node(tree, leaf)
            refs[leaf.index] = _close(leaf)
    made = []
    for leaf in leaves:
        if is_node(leaf):
            made.append(_resolve(tree, leaf, refs))
        elif isinstance(leaf, Ref):
            raise StructureError(
                f"Cannot reref a tree that already holds refs: {describe(leaf)} found at "
                f"{path_of(tree, is_ref)}. Call `rx.deref` on the whole tree first."
            )
        else:
            made.append(leaf)
    return closed(jtu.tree_unflatten(treedef, made))


def _check_node(tree: Any, node: Value) -> None:
    """Checks the value of a node, which any code may have made."""
    if not (isinstance(node.ref_type, type) and issubclass(node.ref_type, Ref)):
        raise StructureError(
            f"Cannot reref: the Value of {describe(node)} at "
            f"{path_of(tree, lambda x: x is node)} has ref_type={node.ref_type!r}, which "
            "is not a subclass of `rx.Ref`. Leave `ref_type` as `rx.deref` sets it."
        )
    for leaf in jtu.tree_leaves(node.value, is_leaf=is_node):
        if is_node(leaf) or held_by(leaf) is not None:
            raise StructureError(
                "Cannot reref: the value of a ref cannot hold a ref, and that of "
                f"{describe(node)} at {path_of(tree, lambda x: x is node)} holds {leaf!r}. Put "
                "the two refs side by side in a tuple or a module."
            )
        reason = _trace.why_not_alive(leaf)
        if reason is not None:
            raise TraceLevelError(
                f"Cannot reref in a different trace level: {describe(node)} at "
                f"{path_of(tree, lambda x: x is node)}: {reason}"
            )


def make_ref_of(node: Value) -> Ref:
    """The ref of a `Value`, owned by the running trace. Nothing is checked."""
    return make_ref(
        node.ref_type, node.value, node.collection, node.label.name, node.label.declared
    )


def _close(node: Value) -> Ref:
    # A list in the value may belong to another ref that this one copies.
    ref = make_ref_of(node.with_value(owned(node.value)))
    for leaf in jtu.tree_leaves(node.value):
        check_not_deleted(ref, leaf)
    for bound in ref._declared or ():
        bound.check_rebuilt(ref)
    return ref


def _resolve(tree: Any, node: Value | Index, refs: dict[int, Ref]) -> Ref:
    ref = refs.get(node.index)
    if ref is None:
        where = path_of(tree, lambda x: isinstance(x, Index) and x.index == node.index)
        raise StructureError(
            f"Cannot reref: Index {node.index} ({describe(node)}) at {where} has no Value "
            "in this tree. This is part of a derefed tree; call `rx.reref` on the whole "
            "tree, or `rx.combine` the parts first."
        )
    if (ref._collection, type(ref)) != (node.collection, node.ref_type):
        raise StructureError(
            f"Cannot reref: Index {node.index} is of {node.ref_type.__name__} "
            f"{describe(node)}, but its Value is of {type(ref).__name__} {describe(ref)}. "
            "Were two trees combined after they were derefed? Deref them together: "
            "`rx.deref((tree1, tree2))`."
        )
    return ref


def clone(tree: T) -> T:
    """Copies a tree, with new refs of the same sharing, values and names.

    !!! Example

        ```python
        import refx_eqx as rx

        ref = rx.Ref(1.0)
        a, b = rx.clone((ref, ref))
        a.value = 2.0
        assert b.value == 2.0 and ref.value == 1.0
        ```

    **Arguments:**

    - `tree`: any pytree. Its refs must be readable here. Values are not copied: arrays are
        immutable.

    **Returns:**

    The tree, with new refs that belong to the current trace.

    **Raises:**

    - `StructureError`: if `tree` contains itself, or holds refs in a set or as dict keys.
    - `TraceLevelError`: if a ref cannot be read here.
    - `DonatedError`: if the buffer of a value is gone.
    """
    return reref(deref(tree))


def tree_equal(
    *trees: PyTree,
    typematch: bool = False,
    rtol: ArrayLike = 0.0,
    atol: ArrayLike = 0.0,
) -> bool | Array:
    """As `equinox.tree_equal`, by value: refs are equal if their values are, and if they
    are shared at the same places.

    !!! Example

        ```python
        import equinox as eqx
        import refx_eqx as rx

        ref = rx.Ref(1.0, "params")
        tied, untied = [ref, ref], [ref, rx.clone(ref)]
        assert rx.tree_equal(tied, rx.clone(tied))
        assert not rx.tree_equal(tied, untied)
        assert not eqx.tree_equal(tied, rx.clone(tied))  # other refs
        ```

    **Arguments:**

    - `*trees`: any pytrees, with refs or derefed. Their refs must be readable here.
    - `typematch`, `rtol`, `atol`: as in `equinox.tree_equal`.

    **Returns:**

    Whether all trees are equal in structure, sharing, collections, ref types and values. A
    `bool`, or possibly a traced scalar inside a transform, as in Equinox.

    **Raises:**

    - `StructureError`: if a tree contains itself, or holds refs in a set or as dict keys.
    - `TraceLevelError`: if a ref cannot be read here.
    - `DonatedError`: if the buffer of a value is gone.
    - `TypeError`: if there is no tree.
    """
    if not trees:
        raise TypeError("`rx.tree_equal` compares trees, but was given none. Pass two.")
    derefed = [_derefed(tree) for tree in trees]
    return eqx.tree_equal(*derefed, typematch=typematch, rtol=rtol, atol=atol)


def _derefed(tree: Any) -> Any:
    refuse_cycle(tree)
    leaves = jtu.tree_leaves(tree, is_leaf=is_whole)
    return tree if any(map(is_node, leaves)) else deref(tree)


def block_until_ready(tree: T) -> T:
    """As `jax.block_until_ready`, which also waits for the refs of a tree, but not for
    those held by a function in it: waits until all of its arrays are computed.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        ref = rx.Ref(jnp.ones(3))
        ref.value = ref.value @ jnp.ones((3, 3))
        assert rx.block_until_ready(ref) is ref
        ```

    **Arguments:**

    - `tree`: any pytree. Its refs must be readable here.

    **Returns:**

    The tree itself.

    **Raises:**

    - `StructureError`: if `tree` contains itself, or holds refs in a set or as dict keys.
    - `TraceLevelError`: if a ref cannot be read here.
    - `DonatedError`: if the buffer of a value is gone.
    """
    jax.block_until_ready(_derefed(tree))
    return tree
