"""Partitions: splitting a tree by filters, and combining the parts.

There are two forms. `partition` and `combine` keep the shape of the tree, with `NOTHING`
where a part has no leaf. `tree_partition`, `get_partition` and `merge_partitions` give flat
mappings from path to leaf, as the ancestor of this library did.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax.tree_util as jtu
from jaxtyping import PyTree

from .._core._access import refuse_cycle
from .._core._deref import closed, is_whole, NOTHING
from .._core._errors import MismatchError, StructureError
from .._core._nodes import is_node
from .._core._ref import Ref
from .._trees._paths import path_text
from ._filters import FilterLike, Path
from ._select import check_all_in_tree, check_can_select, choose, leaves_with_paths


T = TypeVar("T")


def _split(tree: Any, filters: tuple) -> tuple[list[Path], list[list[Any]], Any]:
    """The paths of a tree; the leaves for each filter and for the rest, with `NOTHING` for
    the other leaves; and the treedef."""
    check_can_select(tree, *filters)
    pairs, treedef = leaves_with_paths(tree)
    check_all_in_tree(pairs, "Cannot partition")
    chosen = choose(pairs, *filters)
    parts = [
        [leaf if which == i else NOTHING for (_, leaf), which in zip(pairs, chosen)]
        for i in range(len(filters) + 1)
    ]
    return [path for path, _ in pairs], parts, treedef


def partition(tree: T, *filters: FilterLike) -> tuple[T, ...]:
    """Splits a tree by filters, keeping its shape.

    !!! Example

        ```python
        import refx_eqx as rx

        tree = {"w": rx.Ref(1.0, "params"), "n": rx.Ref(0, "counts"), "act": "relu"}
        params, counts, rest = rx.partition(tree, "params", "counts")
        assert params == {"w": tree["w"], "n": rx.NOTHING, "act": rx.NOTHING}
        assert rest == {"w": rx.NOTHING, "n": rx.NOTHING, "act": "relu"}
        assert rx.combine(params, counts, rest) == tree
        ```

    **Arguments:**

    - `tree`: a tree of refs, or a derefed one.
    - `*filters`: any filters. A leaf goes to the first one that selects it.

    **Returns:**

    One tree for each filter and one for the rest, with the structure of `tree`. Each leaf
    is in one of them, and [`refx_eqx.NOTHING`][] (a pytree without leaves) in the others.
    Refs are the same objects.

    **Raises:**

    - `StructureError`: if a filter selects a ref at one of its places and not at another,
        or if a name in it is not in the tree.
    - `RefTypeError`: if a filter selects by collection or class, and a field that is declared
        a ref holds an array.
    """
    _, parts, treedef = _split(tree, filters)
    return tuple(jtu.tree_unflatten(treedef, part) for part in parts)


def _is_missing(x: Any) -> bool:
    return x is None or x is NOTHING


def _is_leaf_of_part(x: Any) -> bool:
    return _is_missing(x) or is_whole(x)


def combine(*parts: T) -> T:
    """Combines the parts returned by `partition`.

    Also accepts parts that `equinox.partition` made from a tree of refs, with `None` for
    missing leaves.

    !!! Example

        ```python
        import refx_eqx as rx

        tree = {"w": rx.Ref(1.0, "params"), "n": rx.Ref(0, "counts")}
        params, rest = rx.partition(tree, "params")
        assert rx.combine(params, rest)["w"] is tree["w"]
        ```

    **Arguments:**

    - `*parts`: trees of the same structure.

    **Returns:**

    The whole tree.

    **Raises:**

    - `StructureError`: if the structures differ, if two parts or no part have a leaf at a
        place, if one ref is in different parts, or if a part contains itself.
    """
    if not parts:
        raise StructureError("Cannot combine nothing: `rx.combine` needs a part.")
    for part in parts:
        refuse_cycle(part)
    flat = [
        jtu.tree_flatten_with_path(part, is_leaf=_is_leaf_of_part) for part in parts
    ]
    (first, treedef), *others = flat
    for i, (_, other) in enumerate(others, start=1):
        if other != treedef:
            raise MismatchError(
                f"Cannot combine: part {i} does not have the structure of part 0: {other} "
                f"and {treedef}. Combine the parts of one tree."
            )
    combined = []
    owners: dict[Any, tuple[int, str]] = {}
    for k, (keys, _) in enumerate(first):
        where = path_text(keys)
        here = [(i, pairs[k][1]) for i, (pairs, _) in enumerate(flat)]
        present = [(i, leaf) for i, leaf in here if not _is_missing(leaf)]
        if len(present) > 1:
            raise MismatchError(
                f"Cannot combine: parts {present[0][0]} and {present[1][0]} both have a "
                f"leaf at {where}. Combine parts that `rx.partition` made from one tree."
            )
        if not present:
            if any(leaf is NOTHING for _, leaf in here):
                raise MismatchError(
                    f"Cannot combine: no part has a leaf at {where}. Pass all the parts "
                    "that `rx.partition` returned, including the last."
                )
            combined.append(None)
            continue
        ((i, leaf),) = present
        if is_node(leaf) or isinstance(leaf, Ref):
            key = leaf.index if is_node(leaf) else id(leaf)
            part, earlier = owners.setdefault(key, (i, where))
            if part != i:
                raise MismatchError(
                    f"Cannot combine: one ref is in part {part} at {earlier} and in part "
                    f"{i} at {where}. A tie cannot be torn: make the parts with one call "
                    "of `rx.partition`."
                )
        combined.append(leaf)
    return _whole(treedef, combined)


def _whole(treedef: Any, leaves: list[Any]) -> Any:
    """The tree that was split; if it was a tree of refs, with its functions."""
    tree = jtu.tree_unflatten(treedef, leaves)
    return tree if any(map(is_node, leaves)) else closed(tree)


class FlatPartition(Mapping[Path, Any]):
    """An immutable mapping from path to leaf: part of a tree, and itself a pytree.

    Made by [`refx_eqx.tree_partition`][] and [`refx_eqx.get_partition`][]. Equal to a dict
    with the same items.

    !!! Example

        ```python
        import jax
        import refx_eqx as rx

        w = rx.Ref(1.0, "params")
        part = rx.get_partition({"w": w, "n": 3}, "params")
        assert isinstance(part, rx.FlatPartition) and part["w",] is w
        assert list(part) == [("n",), ("w",)]
        assert jax.tree.leaves(part) == [w]
        ```

    **Arguments:**

    - `leaves`: a mapping from path to leaf, with `NOTHING` for leaves in other parts.
    """

    __slots__ = ("_leaves",)

    def __init__(self, leaves: Mapping[tuple[str, ...], Any]):
        self._leaves = dict(leaves)

    def __getitem__(self, path: Path) -> Any:
        return self._leaves[path]

    def __iter__(self) -> Iterator[Path]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def __repr__(self) -> str:
        return f"FlatPartition({self._leaves!r})"


jtu.register_pytree_with_keys(
    FlatPartition,
    lambda p: ([(jtu.DictKey(k), v) for k, v in p.items()], tuple(p)),
    lambda paths, leaves: FlatPartition(dict(zip(paths, leaves))),
    lambda p: (tuple(p.values()), tuple(p)),
)


def tree_partition(
    tree: PyTree, *filters: FilterLike
) -> tuple[tuple[FlatPartition, ...], Hashable]:
    """Splits a tree into flat mappings from path to leaf.

    !!! Example

        ```python
        import refx_eqx as rx

        r1, r2 = rx.Ref(1, "params"), rx.Ref(2, "batch_stats")
        tree = {"a": [r1, r1, r2], "b": r2}
        (params, rest), treedef = rx.tree_partition(tree, "params")
        assert params == {
            ("a", "0"): r1, ("a", "1"): r1, ("a", "2"): rx.NOTHING, ("b",): rx.NOTHING
        }
        assert rx.merge_partitions((params, rest), treedef) == tree
        ```

    **Arguments:**

    - `tree`: a tree of refs, or a derefed one.
    - `*filters`: any filters. A leaf goes to the first one that selects it.

    **Returns:**

    `(partitions, treedef)`: one mapping for each filter and one for the rest, each with the
    paths of all leaves as keys; and the `treedef` for [`refx_eqx.merge_partitions`][].

    **Raises:**

    - `StructureError`: if a filter selects a ref at one of its places and not at another,
        if a name in it is not in the tree, or if two leaves have the same path.
    - `RefTypeError`: if a filter selects by collection or class, and a field that is declared
        a ref holds an array.
    """
    paths, parts, treedef = _split(tree, filters)
    if len(set(paths)) != len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise StructureError(
            f"Cannot partition by path: two leaves have the path {path_text(twice)} (such as "
            'the keys `1` and `"1"` of one dict). Use `rx.partition`, which keeps the shape '
            "of the tree."
        )
    return tuple(FlatPartition(dict(zip(paths, part))) for part in parts), treedef


def get_partition(tree: PyTree, filter: FilterLike) -> FlatPartition:
    """The first mapping of `tree_partition`: the leaves selected by `filter`.

    !!! Example

        ```python
        import refx_eqx as rx

        ref = rx.Ref(1, "params")
        assert rx.get_partition([ref, 2], "params") == {("0",): ref, ("1",): rx.NOTHING}
        ```

    **Arguments:**

    - `tree`: a tree of refs, or a derefed one.
    - `filter`: any filter.

    **Returns:**

    A mapping with the paths of all leaves as keys, and `NOTHING` for leaves that are not
    selected.

    **Raises:**

    - `StructureError`: if the filter selects a ref at one of its places and not at another,
        or if a name in it is not in the tree.
    - `RefTypeError`: if a filter selects by collection or class, and a field that is declared
        a ref holds an array.
    """
    (part, _), _ = tree_partition(tree, filter)
    return part


def merge_partitions(
    partitions: Sequence[Mapping[tuple[str, ...], Any]], treedef: Any
) -> PyTree:
    """Combines the mappings returned by `tree_partition`.

    !!! Example

        ```python
        import refx_eqx as rx

        tree = [rx.Ref(1, "params"), 2]
        partitions, treedef = rx.tree_partition(tree, "params")
        assert rx.merge_partitions(partitions, treedef) == tree
        ```

    **Arguments:**

    - `partitions`: all the partitions of a tree, in any order.
    - `treedef`: the second result of `tree_partition`.

    **Returns:**

    The whole tree.

    **Raises:**

    - `StructureError`: if the partitions do not have the same paths, or if a path has a
        leaf in two or none of them.
    """
    if not isinstance(treedef, jtu.PyTreeDef):
        raise StructureError(
            f"Cannot merge partitions: the treedef is {treedef!r}. Pass the second result "
            "of `rx.tree_partition`: `partitions, treedef = rx.tree_partition(tree, ...)`."
        )
    if not partitions:
        raise StructureError("Cannot merge no partitions: pass all of them.")
    first, *others = partitions
    for other in others:
        if list(other) != list(first):
            raise MismatchError(
                "Cannot merge partitions with different paths. Pass those from one call "
                "of `rx.tree_partition`."
            )
    leaves = []
    for path in first:
        present = [p[path] for p in partitions if p[path] is not NOTHING]
        if len(present) != 1:
            count = "no leaf" if not present else f"{len(present)} leaves"
            raise MismatchError(
                f"Cannot merge partitions: {path_text(path)} has {count}, but must have "
                "one. Pass all the partitions of one tree, each once."
            )
        leaves.append(present[0])
    if treedef.num_leaves != len(leaves):
        raise MismatchError(
            f"Cannot merge partitions: {len(leaves)} leaves for a tree of "
            f"{treedef.num_leaves}. Pass the treedef that belongs to them."
        )
    return _whole(treedef, leaves)
