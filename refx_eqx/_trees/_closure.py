"""Functions in a tree as nodes of the tree.

To JAX a function is a leaf. So before a tree is derefed or searched for refs, each
function, bound method and partial in it that reaches a ref becomes a `Closure`: a pytree
node whose children are the trees that the function carries, under the names they have in
it. `closed` turns the nodes back into functions.

    {"f": lambda x: w[...] * x}   -- opened -->  {"f": Closure(w=w)}  -- deref -->  {"f": Closure(w=Value(...))}

The trees of a call are opened in the same way. `_functions.py` defines what a function
carries.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu

from ._cells import is_filled, is_lookup, is_shared, may_carry, reaches
from ._functions import head_of, kind_of, LaterPlace, names_in, rebuilt


class Closure:
    """A function that holds refs, as a pytree node whose children are the trees it carries.

    - `head`: the function without them. Structure.
    """

    __slots__ = ("contents", "head")

    def __init__(self, head: Any, contents: list[Any]):
        self.head = head
        self.contents = contents

    @property
    def kind(self) -> type:
        """The type of the function."""
        return kind_of(self.head)

    def __repr__(self) -> str:
        pairs = zip(names_in(self.head), self.contents)
        return f"Closure({', '.join(f'{name}={x!r}' for name, x in pairs)})"

    def __eq__(self, other: object) -> bool:
        return type(other) is Closure and bool(eqx.tree_equal(self, other))

    __hash__ = None  # type: ignore[assignment]


def _with_keys(closure: Closure) -> tuple[Iterable, Any]:
    keys = map(jtu.GetAttrKey, names_in(closure.head))
    return tuple(zip(keys, closure.contents)), closure.head


jtu.register_pytree_with_keys(
    Closure,
    _with_keys,
    lambda head, contents: Closure(head, list(contents)),
    lambda closure: (tuple(closure.contents), closure.head),
)


def is_closure(x: Any) -> bool:
    return type(x) is Closure


class _Opening(NamedTuple):
    """Which functions to open: those that reach a leaf that `is_wanted`, and all partials
    of a call. `numbers` are the numbers of the functions met so far, by id."""

    is_wanted: Callable[[Any], bool]
    is_call: bool
    numbers: dict[int, int]

    def tree(self, tree: Any) -> Any:
        # JAX cannot flatten a dict of refs, as it sorts the keys; so it is a leaf in a
        # call.
        is_leaf = None if self.is_call else is_lookup
        leaves, treedef = jtu.tree_flatten(tree, is_leaf=is_leaf)
        return self.opened(tree, leaves, treedef)

    def opened(self, tree: Any, leaves: list[Any], treedef: Any) -> Any:
        """The tree of these leaves, or `tree` itself if no function in it is opened."""
        if not any(map(may_carry, leaves)):
            return tree
        new = list(map(self._leaf, leaves))
        return treedef.unflatten(new) if any(map(is_closure, new)) else tree

    def _leaf(self, leaf: Any) -> Any:
        # Only a function that reaches a ref. Others stay the same objects, so that JAX's
        # caches, which go by identity, recognize them.
        is_opened = may_carry(leaf) and (
            (self.is_call and type(leaf) is functools.partial)
            or reaches(leaf, self.is_wanted)
        )
        if not is_opened:
            return leaf
        head, contents = head_of(leaf, self.numbers, self.is_wanted)
        return Closure(head, list(map(self.tree, contents)))


def opened(tree: Any, is_wanted: Callable[[Any], bool] = is_shared) -> Any:
    """The tree with a `Closure` for each function in it that reaches such a leaf: a ref."""
    return _Opening(is_wanted, False, {}).tree(tree)


def closed(tree: Any) -> Any:
    """The inverse of `opened`, whatever has replaced the refs.

    **Raises:**

    - `FirstPlaceGone`: if the first place of a function is not in the tree.
    """
    return _closed(tree, {})


def _closed(tree: Any, made: dict[int, Any]) -> Any:
    leaves, treedef = jtu.tree_flatten(
        tree, is_leaf=lambda x: is_closure(x) or is_lookup(x)
    )
    if not any(map(is_closure, leaves)):
        return tree
    return treedef.unflatten(_closed_leaf(x, made) for x in leaves)


def _closed_leaf(leaf: Any, made: dict[int, Any]) -> Any:
    if not is_closure(leaf):
        return leaf
    # Without its contents yet: a recursive function must exist before its own cells.
    return rebuilt(leaf.head, lambda: _closed(leaf.contents, made), made)


def contents_by_name(x: Any, names: list[str]) -> dict[str, Any]:
    """The trees that an opened function carries, by name. A function that is not opened, as
    it holds no refs, has those of these names. Empty if `x` is no function."""
    if is_closure(x):
        return dict(zip(names_in(x.head), x.contents))
    if not may_carry(x):
        return {}
    cells = getattr(x, "__closure__", None) or ()
    names_of_cells = x.__code__.co_freevars if cells else ()
    filled = {
        name: cell for name, cell in zip(names_of_cells, cells) if is_filled(cell)
    }
    return {
        name: filled[name].cell_contents if name in filled else getattr(x, name)
        for name in names
        if name in filled or hasattr(x, name)
    }


# JAX compares nodes of treedefs by `==` of their heads, but hashes a treedef only by its
# shape (jaxlib 0.10 to 0.12): functions that carry the same trees merely share a hash.


class Part(NamedTuple):
    """The structure of one tree of a call: hashable, and without leaves.

    - `treedef`: that of the tree, with a `Closure` for each opened function;
    - `has_functions`: whether there may be opened functions.
    """

    treedef: Any
    has_functions: bool

    def tree(self, leaves: Iterable[Any]) -> Any:
        """The tree of these leaves, with a `Closure` for each opened function."""
        return self.treedef.unflatten(leaves)

    def unflatten(self, leaves: Iterable[Any]) -> Any:
        """The tree of these leaves. Each opened function is rebuilt."""
        return closed(self.tree(leaves)) if self.has_functions else self.tree(leaves)

    def outer(self) -> list[Any]:
        """For each leaf of the tree itself, its number; for an opened function, the
        `Closure` of the numbers in it."""
        numbers = range(self.treedef.num_leaves)
        if not self.has_functions:
            return list(numbers)
        return jtu.tree_leaves(self.tree(numbers), is_leaf=is_closure)

    def place_of(self, number: int) -> tuple[tuple, bool]:
        """The key path of a leaf, or of the function that it is in; and which of the
        two."""
        numbers = self.tree(range(self.treedef.num_leaves))
        for path, x in jtu.tree_flatten_with_path(numbers, is_leaf=is_closure)[0]:
            if number in jtu.tree_leaves(x):
                return path, is_closure(x)
        raise IndexError(number)

    def leaves_up_to(self, tree: Any) -> list[Any]:
        """The subtrees of a tree that this is a prefix of. The contents of a function get
        `None` if the tree has no node for the function.

        **Raises:**

        - `ValueError`, `TypeError`: from JAX, if the structure differs.
        """
        if not self.has_functions:
            return self.treedef.flatten_up_to(tree)
        return _leaves_up_to(self.tree(range(self.treedef.num_leaves)), tree)


def _leaves_up_to(prefix: Any, tree: Any) -> list[Any]:
    outer, treedef = jtu.tree_flatten(prefix, is_leaf=is_closure)
    found = []
    for x, leaf in zip(outer, treedef.flatten_up_to(tree)):
        if not is_closure(x):
            found.append(leaf)
        elif is_closure(leaf):
            found += _leaves_up_to(x.contents, leaf.contents)
        else:
            found += [None] * len(jtu.tree_leaves(x))
    return found


def flatten(
    tree: Any, is_wanted: Callable[[Any], bool] = is_shared
) -> tuple[list[Any], Part]:
    """The leaves of a tree of a call, including those inside functions.

    In a call more functions are opened than in a derefed tree: a partial always is, because
    its bound arguments are arguments like any other.

    **Arguments:**

    - `is_wanted`: selects the leaves whose functions become nodes.
    """
    leaves, treedef = jtu.tree_flatten(tree)
    # Most trees have no functions, and are flattened only once.
    new = _Opening(is_wanted, True, {}).opened(tree, leaves, treedef)
    if new is tree:
        return leaves, Part(treedef, False)
    leaves, treedef = jtu.tree_flatten(new)
    return leaves, Part(treedef, True)


def without_empty(tree: Any, is_held: Callable[[Any], bool]) -> Any:
    """The tree, with `None` for each `Closure` that holds none of these leaves."""
    return _without_empty(tree, is_held, set())


def _without_empty(tree: Any, is_held: Callable[[Any], bool], met: set[Any]) -> Any:
    def visit(x: Any) -> Any:
        if not is_closure(x):
            return x
        if isinstance(x.head, LaterPlace):
            return x if x.head in met else None
        # A bound method and a partial have no number: they cannot be in their own cells.
        number = x.head[0] if x.head else None
        # Before its contents, where a recursive function is met again.
        met.add(number)
        new = Closure(x.head, _without_empty(x.contents, is_held, met))
        if any(map(is_held, jtu.tree_leaves(new.contents, is_leaf=is_held))):
            return new
        met.discard(number)
        return None

    def is_leaf(x: Any) -> bool:
        return is_closure(x) or is_held(x)

    return jtu.tree_map(visit, tree, is_leaf=is_leaf)
