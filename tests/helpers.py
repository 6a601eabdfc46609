"""Random trees of refs, described by plain data so that each can be built again."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import refx_eqx as rx


class Lora(rx.Ref):
    """A subclass of `Ref`, at the top level so that it can be pickled."""


class Pair(eqx.Module):
    """A module of Equinox with a static field."""

    left: Any
    right: Any
    tag: str = eqx.field(static=True, default="pair")


class Holder(rx.Module):
    """A module with a field that is declared to be a ref of any collection."""

    ref: rx.Ref[Any]


class RefSpec(NamedTuple):
    """A ref: what is in it, and of which collection and type it is."""

    value: Any
    collection: Hashable
    ref_type: type[rx.Ref]


class Place(NamedTuple):
    """A place in a tree: that of the ref with this number in the pool."""

    ref: int


class PairSpec(NamedTuple):
    left: Any
    right: Any
    tag: str


class HolderSpec(NamedTuple):
    place: Place


class TreeSpec(NamedTuple):
    """A tree, and the pool of refs that it takes from. One ref may be at many places."""

    pool: tuple[RefSpec, ...]
    tree: Any


def build(spec: TreeSpec) -> Any:
    """The tree of a spec, with refs of its own."""
    refs = [ref_type(value, c) for value, c, ref_type in spec.pool]
    return _build(spec.tree, refs)


def _build(tree: Any, refs: list[rx.Ref]) -> Any:
    match tree:
        case Place(i):
            return refs[i % len(refs)]
        case HolderSpec(place):
            return Holder(_build(place, refs))
        case PairSpec(left, right, tag):
            return Pair(_build(left, refs), _build(right, refs), tag)
        case dict():
            return {k: _build(v, refs) for k, v in tree.items()}
        case list() | tuple():
            return type(tree)(_build(x, refs) for x in tree)
        case _:
            return tree


def canonical(spec: TreeSpec) -> Any:
    """What the treedef of a derefed tree stands for, worked out from the spec by hand:
    structure, sharing, collections, ref types and the structure of values."""
    numbers: dict[int, int] = {}

    def walk(tree: Any) -> Any:
        match tree:
            case Place(i):
                i %= len(spec.pool)
                value, collection, ref_type = spec.pool[i]
                if i in numbers:
                    return "again", numbers[i]
                numbers[i] = len(numbers)
                inside = _shape_of_value(value)
                return "ref", numbers[i], collection, ref_type.__name__, inside
            case HolderSpec(place):
                return "Holder", walk(place)
            case PairSpec(left, right, tag):
                return "Pair", tag, walk(left), walk(right)
            case dict():
                # JAX visits a dict in the order of its keys.
                return "dict", tuple((k, walk(tree[k])) for k in sorted(tree))
            case list() | tuple():
                return type(tree).__name__, tuple(map(walk, tree))
            case None:
                return None
            case _:
                return "leaf"

    return walk(spec.tree)


def _shape_of_value(value: Any) -> Any:
    match value:
        case dict():
            return tuple((k, _shape_of_value(value[k])) for k in sorted(value))
        case list() | tuple():
            return type(value).__name__, tuple(map(_shape_of_value, value))
        case None:
            return None
        case _:
            return "leaf"


def arrays() -> st.SearchStrategy[Any]:
    """Small arrays of whole numbers: sums of them are exact in any order."""
    pair = st.tuples(st.integers(-4, 4), st.integers(-4, 4))
    return pair.map(lambda x: jnp.array(x, jnp.float32))


def values() -> st.SearchStrategy[Any]:
    """What may be in a ref: arrays of both kinds, scalars, static things, trees of these."""
    leaves = st.one_of(
        st.integers(-4, 4),
        st.booleans(),
        st.sampled_from([0.0, -0.0, 1.5, "relu", None, 2j]),
        st.just(np.arange(3)),
        st.just(np.float32(2)),
        st.integers(0, 3).map(lambda n: jnp.arange(n, dtype=jnp.float32)),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=2),
            st.tuples(inner, inner),
            st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
        ),
        max_leaves=3,
    )


def pools(value: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[RefSpec, ...]]:
    ref = st.builds(
        RefSpec,
        value,
        st.sampled_from([None, "params", "counts", ("a", 1)]),
        st.sampled_from([rx.Ref, rx.Ref, Lora]),
    )
    return st.lists(ref, min_size=1, max_size=4).map(tuple)


def trees(leaf: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Any]:
    """Trees with places for refs. Most leaves are such places, so that refs are shared."""
    place = st.integers(0, 3).map(Place)
    if leaf is None:
        leaf = st.sampled_from([None, 1, "x"])
    leaves = st.one_of(place, place, place.map(HolderSpec), leaf)
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            st.builds(PairSpec, inner, inner, st.sampled_from(["pair", "other"])),
        ),
        max_leaves=8,
    )


def specs(value: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[TreeSpec]:
    return st.builds(TreeSpec, pools(values() if value is None else value), trees())


def refs_of(tree: Any) -> list[rx.Ref]:
    """The refs of a tree, in order, as often as they are in it."""
    return [x for x in jax.tree.leaves(tree) if isinstance(x, rx.Ref)]


def sharing(tree: Any) -> list[int]:
    """For each place of a ref, the number of the first place of the same ref."""
    refs = refs_of(tree)
    ids = [id(ref) for ref in refs]
    return [ids.index(i) for i in ids]


def same_value(a: Any, b: Any) -> bool:
    """The same structure with equal leaves of equal types."""
    a_leaves, a_def = jax.tree.flatten(a)
    b_leaves, b_def = jax.tree.flatten(b)
    return a_def == b_def and all(map(_same_leaf, a_leaves, b_leaves))


def _same_leaf(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray | np.generic | jax.Array):
        return (
            type(a) is type(b)
            and (a.shape, a.dtype) == (b.shape, b.dtype)
            and a.tolist() == b.tolist()
        )
    # `0.0`, `-0.0`, `0` and `False` are equal in Python.
    return type(a) is type(b) and repr(a) == repr(b)


def assert_same_tree(a: Any, b: Any) -> None:
    """Two trees of refs are the same up to the identity of their refs."""
    a_leaves, a_def = jax.tree.flatten(a)
    b_leaves, b_def = jax.tree.flatten(b)
    assert a_def == b_def
    assert sharing(a) == sharing(b)
    for x, y in zip(a_leaves, b_leaves):
        if isinstance(x, rx.Ref):
            assert type(x) is type(y)
            assert x.collection == y.collection
            assert same_value(x.value, y.value)
        else:
            assert same_value(x, y)
