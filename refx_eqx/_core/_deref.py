"""Opening a tree of refs at a JAX boundary, and closing it again.

    tree of refs   -- deref -->  pytree of Value and Index  -- JAX -->  ...  -- reref -->

`deref` and `reref` are inverse to each other, up to the identity of the refs. The rest of
this file is small things built on the two.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, PyTree

from .._trees import _closure
from .._trees._cells import is_lookup, shared_in
from .._trees._changes import owned
from .._trees._closure import opened
from .._trees._equality import Unlike
from .._trees._functions import FirstPlaceGone
from .._trees._paths import path_text
from . import _trace
from ._access import check_not_deleted, refuse_cycle
from ._errors import describe, StructureError, TraceLevelError
from ._nodes import Index, index_node, is_node, label_of, Value, value_node
from ._ref import check_no_attributes, is_ref, make_ref, Ref


__tracebackhide__ = True


T = TypeVar("T")


class _Nothing(Unlike):
    """The class of [`refx_eqx.NOTHING`][], which is a node of a pytree."""


NOTHING = _Nothing(__name__, "NOTHING")
"""What is at a place of a tree that has no leaf there: a pytree without leaves. See
[`refx_eqx.partition`][] and [`refx_eqx.update_refs`][]."""

jtu.register_pytree_node(
    _Nothing, lambda _: ((), None), lambda _aux, _children: NOTHING
)


def path_of(tree: Any, found: Callable[[Any], bool]) -> str:
    """Where the first leaf of `tree` is that `found` holds for; for messages."""
    leaves, _ = jtu.tree_flatten_with_path(tree, is_leaf=_is_whole)
    return next((path_text(path) for path, leaf in leaves if found(leaf)), "unknown")


def closed(tree: Any) -> Any:
    """The tree with functions again instead of the nodes that hold their refs.

    **Raises:**

    - `StructureError`: if the first place of a function is not in the tree.
    """
    try:
        return _closure.closed(tree)
    except FirstPlaceGone:
        raise StructureError(
            "Cannot reref: a function that was at two places of a tree is here at the "
            "later one alone. A part of a derefed tree was taken out of it; call "
            "`rx.reref` on the whole tree, or `rx.combine` the parts first."
        ) from None


def deref(tree: T) -> T:
    """Opens every ref of a tree: the first place of each becomes a `Value`, every later
    one an `Index`. The result is a pure pytree, for any JAX transform to carry.

    "First" is in JAX's flattening order. A function in the tree that holds refs (in what it
    closes over, in a partial, as the object of a bound method) becomes a node as well, whose
    children are what it holds, by name; `reref` makes a function of it again. Two derefed trees have equal treedefs exactly
    when they have the same structure, sharing, collections and ref types.

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

    The same tree with `Value` and `Index` nodes instead of refs. Values are not copied.

    **Raises:**

    - `StructureError`: if `tree` holds a `Value` or an `Index` already, or itself, or refs in
        a set or as the keys of a dict.
    - `TraceLevelError`: if a ref may not be read here.
    """
    refuse_cycle(tree)
    leaves, treedef = jtu.tree_flatten(opened(tree), is_leaf=_is_whole)
    refuse_lookups(tree, leaves, "deref")
    for leaf in leaves:
        if is_node(leaf):
            raise StructureError(
                f"Cannot deref a tree that is derefed already: {type(leaf).__name__} found "
                f"at {path_of(tree, is_node)}. Call `rx.reref` on it first, or do not "
                "call `rx.deref` twice."
            )
    return jtu.tree_unflatten(treedef, deref_leaves(leaves, {}, lambda ref: ref.value))


def _is_whole(x: Any) -> bool:
    return is_node(x) or is_lookup(x)


def refuse_lookups(tree: Any, leaves: list[Any], verb: str) -> None:
    """That no refs would be left behind in what refs are looked up in.

    **Raises:**

    - `StructureError`: if a leaf is a set of refs, or a dict with refs as keys.
    """
    for leaf in leaves:
        looked_up = shared_in(leaf)
        if looked_up is not None:
            raise StructureError(
                f"Cannot {verb} a {type(leaf).__name__} of refs, such as "
                f"{describe(looked_up)} at "
                f"{path_of(tree, lambda x: x is leaf)}: what is in a set, or a key of a dict, is "
                "no part of a tree, and would stay the ref that it is. Hold the refs in a "
                "list or a tuple, and make the set of them where you look one up."
            )


def deref_leaves(
    leaves: list[Any], numbers: dict[int, int], read: Callable[[Ref], Any]
) -> list[Any]:
    """The leaves of a tree, derefed.

    **Arguments:**

    - `numbers`: by `id`, the numbers of the refs that have one already, and so a `Value`
        elsewhere. A ref that is met for the first time gets the next number, and is added.
    - `read`: takes the value of a ref that is met for the first time.
    """
    derefed = []
    for leaf in leaves:
        if isinstance(leaf, Ref):
            if type(leaf) is not Ref:
                check_no_attributes(leaf)
            what = leaf._collection, type(leaf), label_of(leaf)
            # By `id`: who hashes a ref asks which one it is, and a program that asks is used
            # for no other. See `_identity.py`.
            number = numbers.get(id(leaf))
            if number is None:
                number = numbers[id(leaf)] = len(numbers)
                leaf = value_node(read(leaf), number, *what)
            else:
                leaf = index_node(number, *what)
        derefed.append(leaf)
    return derefed


def reref_leaves(leaves: list[Any], refs: dict[int, Ref]) -> list[Any]:
    """The opposite of `deref_leaves`, of leaves that no other code has touched.

    `refs` are those that are known, by number; those that are made are added.
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
    """The inverse of `deref`: makes a new ref for each `Value`, and puts the
    same one wherever an `Index` refers to it.

    The new refs are owned by the trace that is running, so inside a transformed
    function they may be read and written.

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

    The same tree with refs instead of the nodes.

    **Raises:**

    - `StructureError`: if `tree` holds a ref already (in a `Value` too), an `Index` without
        its `Value`, two values for one ref, a node whose collection disagrees with its
        `Value`'s, or one whose `ref_type` is no class of refs.
    - `TraceLevelError`: if a value holds a tracer of a transform that has ended.
    - `RefTypeError`: if a value breaks the declared type of its ref.
    - `DonatedError`: if the buffer of a value is gone.
    """
    refuse_cycle(tree)
    leaves, treedef = jtu.tree_flatten(tree, is_leaf=is_node)
    refs: dict[int, Ref] = {}
    for leaf in leaves:
        if isinstance(leaf, Value):
            if leaf.index in refs:
                raise StructureError(
                    f"Cannot reref: two values for ref {leaf.index} "
                    f"({describe(leaf)}). Were two trees put "
                    "together after they were derefed? Deref the whole of them at once: "
                    "`rx.deref((tree1, tree2))`."
                )
            _check_node(tree, leaf)
            refs[leaf.index] = _close(leaf)
    made = []
    for leaf in leaves:
        if is_node(leaf):
            made.append(_resolve(tree, leaf, refs))
        elif isinstance(leaf, Ref):
            raise StructureError(
                "Cannot reref a tree that holds refs already: "
                f"{describe(leaf)} found at "
                f"{path_of(tree, is_ref)}. Call `rx.deref` on the whole tree first."
            )
        else:
            made.append(leaf)
    return closed(jtu.tree_unflatten(treedef, made))


def _check_node(tree: Any, node: Value) -> None:
    """What the value of a ref must be, of a node that any code may have made."""
    if not (isinstance(node.ref_type, type) and issubclass(node.ref_type, Ref)):
        raise StructureError(
            f"Cannot reref: the Value of {describe(node)} at {path_of(tree, lambda x: x is node)} "
            f"has ref_type={node.ref_type!r}, which is no subclass of `rx.Ref`. Leave "
            "`ref_type` as `rx.deref` sets it."
        )
    for leaf in jtu.tree_leaves(node.value, is_leaf=is_node):
        if isinstance(leaf, Ref) or is_node(leaf):
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
    # A list in the value may be another ref's, of which this one is a copy.
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
            f"Cannot reref: Index {node.index} ({describe(node)}) at {where} has no Value in this "
            "tree. A part of a derefed tree was taken out of it; call `rx.reref` on the "
            "whole tree, or `rx.combine` the parts first."
        )
    if (ref._collection, type(ref)) != (node.collection, node.ref_type):
        raise StructureError(
            f"Cannot reref: Index {node.index} is of {node.ref_type.__name__} {describe(node)}, but "
            f"its Value is of {type(ref).__name__} "
            f"{describe(ref)}. Were two trees put together after "
            "they were derefed? Deref the whole of them at once: `rx.deref((tree1, tree2))`."
        )
    return ref


def clone(tree: T) -> T:
    """A copy of a tree with new refs, of the same sharing, values and names.

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

    The same tree with new refs, owned by the running trace.

    **Raises:**

    - `StructureError`: if `tree` holds refs in a set or as the keys of a dict, or itself.
    - `TraceLevelError`: if a ref may not be read here.
    """
    return reref(deref(tree))


def tree_equal(
    *trees: PyTree,
    typematch: bool = False,
    rtol: ArrayLike = 0.0,
    atol: ArrayLike = 0.0,
) -> bool | Array:
    """As `equinox.tree_equal`, by value: refs are equal if what they hold is, and if they
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

    - `*trees`: any pytrees, of refs or derefed. Their refs must be readable here.
    - `typematch`, `rtol`, `atol`: as in `equinox.tree_equal`.

    **Returns:**

    Whether all are equal: in structure, sharing, collections, ref types and values. A `bool`;
    inside a transform it may be a traced scalar, as in Equinox.

    **Raises:**

    - `StructureError`: if a tree holds refs in a set or as the keys of a dict, or itself.
    - `TraceLevelError`: if a ref may not be read here.
    """
    derefed = [_derefed(tree) for tree in trees]
    return eqx.tree_equal(*derefed, typematch=typematch, rtol=rtol, atol=atol)


def _derefed(tree: Any) -> Any:
    refuse_cycle(tree)
    leaves = jtu.tree_leaves(tree, is_leaf=is_node)
    return tree if any(map(is_node, leaves)) else deref(tree)


def block_until_ready(tree: T) -> T:
    """As `jax.block_until_ready`, which waits for the refs of a tree too, but not for those
    that a function in it holds: waits until all of its arrays are computed.

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

    - `StructureError`: if `tree` holds refs in a set or as the keys of a dict, or itself.
    - `TraceLevelError`: if a ref may not be read here.
    """
    jax.block_until_ready(_derefed(tree))
    return tree
