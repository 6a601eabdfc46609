"""Applying filters to a tree."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.tree_util as jtu
from jaxtyping import PyTree

from .._core import _trace
from .._core._access import refuse_cycle
from .._core._deref import closed, is_whole, make_ref_of, refuse_lookups
from .._core._errors import describe, StructureError
from .._core._nodes import is_node, Value
from .._core._ref import Ref
from .._fields._misplaced import check_refs_in_place
from .._trees._cells import is_shared, looked_up
from .._trees._closure import opened
from .._trees._equality import Identity
from .._trees._paths import key_text, n_common, Path, path_text, pattern_of
from ._filters import as_filter, Filter, FilterLike, Refs
from ._guard import only_answering


T = TypeVar("T")


def leaves_with_paths(
    tree: Any,
    is_wanted: Callable[[Any], bool] = is_shared,
    is_leaf: Callable[[Any], bool] = is_whole,
) -> tuple[list[tuple[Path, Any]], Any]:
    """The leaves of a tree (with refs or derefed), each with its path; and the treedef. A
    function that holds refs is a node, so call `closed` on a tree rebuilt from them.

    **Arguments:**

    - `is_wanted`: selects the leaves whose functions are nodes.
    """
    refuse_cycle(tree)
    nodes = opened(tree, is_wanted)
    leaves, treedef = jtu.tree_flatten_with_path(nodes, is_leaf=is_leaf)
    pairs, before, path = [], (), ()
    for keys, leaf in leaves:
        n = n_common(before, keys)
        before, path = keys, (*path[:n], *map(key_text, keys[n:]))
        pairs.append((path, leaf))
    return pairs, treedef


def as_closed(leaves: list[Any]) -> list[Any]:
    """The leaves, with refs instead of `Value` and `Index` nodes, as a filter sees them."""
    refs = {x.index: make_ref_of(x) for x in leaves if isinstance(x, Value)}
    closed = []
    for leaf in leaves:
        if is_node(leaf):
            if leaf.index not in refs:
                raise StructureError(
                    f"Index {leaf.index} ({describe(leaf)}) has "
                    "no Value in this tree. Pass the whole derefed tree."
                )
            leaf = refs[leaf.index]
        closed.append(leaf)
    return closed


def refuse_derefed(pairs: list[tuple[Path, Any]], failure: str) -> None:
    """Refuses the leaves of a derefed tree, as returned by `leaves_with_paths`.

    **Raises:**

    - `StructureError`: if the tree is derefed.
    """
    for path, leaf in pairs:
        if is_node(leaf):
            raise StructureError(
                f"{failure}: the tree is derefed: it has a {type(leaf).__name__} at "
                f"{path_text(path)}. Pass the tree of refs itself, or make one of it: "
                "`rx.reref(tree)`."
            )


def check_all_in_tree(pairs: list[tuple[Path, Any]], failure: str) -> None:
    """Checks that each ref in a set, or among the keys of a dict, is also in the tree."""
    in_tree = {id(leaf) for _, leaf in pairs if isinstance(leaf, Ref)}
    for path, leaf in pairs:
        for ref in looked_up(leaf):
            # In a transform the set has the outer refs, and the tree the inner ones.
            if id(ref) not in in_tree and _trace.is_at_home(ref._trace):
                raise StructureError(
                    f"{failure}: {describe(ref)} is in a {type(leaf).__name__} at "
                    f"{path_text(path)}, which is not part of the tree, and nowhere else. "
                    "Hold it in a list, a tuple or a field too."
                )


def check_can_select(tree: Any, *filters: Any) -> None:
    """Checks that a filter by collection or class finds refs wherever the modules of the
    tree declare them.

    **Raises:**

    - `RefTypeError`: if a field that is declared a ref holds an array.
    """
    asking = [f for f in map(as_filter, filters) if f._asks_refs]
    if asking:
        check_refs_in_place(tree, f"Cannot select by {asking[0]!r}")


def choose(pairs: list[tuple[Path, Any]], *filters: Any) -> list[int]:
    """For each leaf, the number of the first filter that selects it; `len(filters)` if none
    does. A filter sees refs even if the tree is derefed.

    **Raises:**

    - `StructureError`: if the answer differs between two places of one ref, or if a name
        in a filter selects nothing.
    """
    resolved = [as_filter(f) for f in filters]
    paths, leaves = [path for path, _ in pairs], as_closed([leaf for _, leaf in pairs])
    with only_answering():
        answers = [
            _first_match(resolved, path, leaf) for path, leaf in zip(paths, leaves)
        ]
    check_names(resolved, paths, leaves)
    _check_ties(resolved, paths, leaves, answers)
    return answers


def check_names(filters: list[Filter], paths: list[Path], leaves: list[Any]) -> None:
    """Checks that each name in these filters selects something in a tree, if it has leaves.

    **Raises:**

    - `StructureError`: if not.
    """
    if not leaves:
        return
    refs = {Identity(leaf) for leaf in leaves if isinstance(leaf, Ref)}
    for f in filters:
        for part in f._each_by_name():
            # First by one look-up: there may be as many parts as leaves.
            is_met = isinstance(part, Refs) and not refs.isdisjoint(part.refs)
            if not is_met and not any(map(part.matches, paths, leaves)):
                raise _selects_nothing(part, f, paths, leaves)


def _first_match(filters: list[Filter], path: Path, leaf: Any) -> int:
    return next(
        (i for i, f in enumerate(filters) if f.matches(path, leaf)), len(filters)
    )


def _check_ties(
    filters: list[Filter], paths: list[Path], leaves: list[Any], answers: list[int]
) -> None:
    first: dict[int, tuple[int, Path]] = {}
    for path, leaf, answer in zip(paths, leaves, answers):
        if isinstance(leaf, Ref):
            earlier, earlier_path = first.setdefault(id(leaf), (answer, path))
            if earlier != answer:
                raise StructureError(
                    f"A filter must select a ref at all of its places or at none: "
                    f"{describe(leaf)} is one ref at "
                    f"{path_text(earlier_path)} and {path_text(path)}, and "
                    f"{', '.join(map(repr, filters))} would tear it apart. Select "
                    f"both, for example with `rx.path({pattern_of(earlier_path)}, "
                    f"{pattern_of(path)})`, or neither."
                )


def _selects_nothing(
    part: Filter, filter: Filter, paths: list[Path], leaves: list[Any]
) -> StructureError:
    refs = [leaf for leaf in leaves if isinstance(leaf, Ref)]
    collections = list(dict.fromkeys(ref._collection for ref in refs))
    places = [f"{path_text(path)}" for path in paths]
    if len(places) > 8:
        places = [*places[:8], f"{len(places) - 8} more"]
    no_refs = "no refs"
    if part._asks_refs:
        no_refs += (
            " (`rx.as_refs(model, 'params')` makes refs of the arrays of a model)"
        )
    return StructureError(
        f"{part!r}{'' if part == filter else f', in {filter!r},'} selects nothing in this "
        "tree, which has "
        + (
            f"refs of the collections {', '.join(map(repr, collections))}"
            if refs
            else no_refs
        )
        + f", and leaves at {', '.join(places)}. Correct the name"
        + part._hint
        + f". If it may be missing, write `({part._code()} | False)` in its place."
    )


def selected_refs(tree: Any, filter: Any) -> list[Ref]:
    """The refs of a tree that a filter selects, each once, in order."""
    check_can_select(tree, filter)
    pairs, _ = leaves_with_paths(tree)
    refuse_derefed(pairs, "Cannot select refs")
    check_all_in_tree(pairs, "Cannot select refs")
    chosen = [leaf for (_, leaf), c in zip(pairs, choose(pairs, filter)) if c == 0]
    return list({id(leaf): leaf for leaf in chosen if isinstance(leaf, Ref)}.values())


def with_other_refs(tree: T, new: Mapping[int, Ref], verb: str) -> T:
    """The tree with other refs for some of its own, by their ids, also in functions.

    **Arguments:**

    - `verb`: for the message: what is done to the refs.

    **Raises:**

    - `StructureError`: if there is a set of refs, or a dict with refs as keys.
    """
    pairs, treedef = leaves_with_paths(tree)
    leaves = [leaf for _, leaf in pairs]
    refuse_lookups(tree, leaves, verb)
    return closed(treedef.unflatten(new.get(id(leaf), leaf) for leaf in leaves))


def values(tree: PyTree, filter: FilterLike = True) -> list[Any]:
    """The values of the refs of a tree, each once, for counts, norms and sizes.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        tied = rx.Ref(jnp.ones((2, 3)), "params")
        model = {"in": tied, "out": tied, "steps": rx.Ref(jnp.array(0), "counts")}
        n_params = sum(x.size for x in jax.tree.leaves(rx.values(model, "params")))
        assert n_params == 6
        ```

    **Arguments:**

    - `tree`: a tree of refs. The selected ones must be readable here.
    - `filter`: any filter.

    **Returns:**

    A list with the value of each selected ref, in tree order. A shared ref appears once.
    For the tree with values instead of refs, see [`refx_eqx.snapshot`][]; for values by
    path, [`refx_eqx.state_dict`][].

    **Raises:**

    - `StructureError`: if `tree` is derefed, if the filter selects a ref at one of its places
        and not at another, or if a name in it is not in the tree.
    - `TraceLevelError`: if a ref cannot be read here.
    """
    return [ref.value for ref in selected_refs(tree, filter)]


def filter_spec(tree: PyTree, filter: FilterLike) -> PyTree[bool]:
    """A filter as an Equinox filter spec for the derefed tree.

    !!! Example

        ```python
        import equinox as eqx
        import refx_eqx as rx

        tree = {"w": rx.Ref(1.0, "params"), "n": rx.Ref(0, "counts")}
        opened = rx.deref(tree)
        params, rest = eqx.partition(opened, rx.filter_spec(tree, "params"))
        assert params["w"].value == 1.0 and params["n"].value is None
        again = rx.reref(eqx.combine(params, rest))
        assert again["n"].value == 0
        ```

    **Arguments:**

    - `tree`: a tree of refs, or a derefed one.
    - `filter`: any filter.

    **Returns:**

    A pytree of bools, one for each ref and each other leaf of `tree`: a prefix of
    `rx.deref(tree)`, for `equinox.partition`, `equinox.filter`, `optax.masked` and others.

    **Raises:**

    - `StructureError`: if the filter selects a ref at one of its places and not at another,
        or if a name in it is not in the tree.
    - `RefTypeError`: if a filter selects by collection or class, and a field that is declared
        a ref holds an array.
    """
    check_can_select(tree, filter)
    pairs, treedef = leaves_with_paths(tree)
    check_all_in_tree(pairs, "Cannot select refs")
    return jtu.tree_unflatten(treedef, [c == 0 for c in choose(pairs, filter)])


def aliases(tree: PyTree) -> dict[Ref[Any], tuple[str, ...]]:
    """Lists the refs of a tree, each with all of its places.

    !!! Example

        ```python
        import refx_eqx as rx

        ref = rx.Ref(1.0)
        tree = {"a": ref, "b": [ref, 2.0]}
        assert rx.aliases(tree) == {ref: ("a", "b.0")}
        ```

    **Arguments:**

    - `tree`: a tree of refs. None is read, so this may be called anywhere.

    **Returns:**

    A dict from each ref to its paths, in the notation of [`refx_eqx.path`][], in order of
    the first places.

    **Raises:**

    - `StructureError`: if `tree` is derefed, or a ref is only in a set, or among the keys of
        a dict.
    """
    places: dict[Ref, tuple[str, ...]] = {}
    pairs, _ = leaves_with_paths(tree)
    refuse_derefed(pairs, "Cannot list the refs")
    check_all_in_tree(pairs, "Cannot list the refs")
    for path, leaf in pairs:
        if isinstance(leaf, Ref):
            places[leaf] = (*places.get(leaf, ()), ".".join(path))
    return places
