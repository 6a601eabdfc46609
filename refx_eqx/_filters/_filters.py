"""Filters: which refs of a tree are meant.

A filter is

- a collection name: `"params"`, or any other hashable;
- a subclass of `Ref`;
- `True` (everything) or `False` (nothing);
- `rx.collection("params", "lora")` or `rx.path("encoder.**.weight")`;
- a predicate: a function of a leaf that returns a bool;
- a combination of these with `&`, `|` and `~`.

A filter decides per ref, not per place. It sees a ref also where the tree is derefed, and
it must give the same answer at every place of one ref, so that a tie cannot be torn.
"""

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax.tree_util as jtu

from .._core import _trace
from .._core._errors import describe, StructureError
from .._core._nodes import is_opened, Value
from .._core._ref import make_ref, Ref
from .._fields._instance import check_refs_in_place


__tracebackhide__ = True


Path = tuple[str, ...]
"""The keys on the way to a leaf, as text: `("layers", "0", "weight")`."""


class Filter:
    """The base of the filters that can be combined with `&`, `|` and `~`.

    A filter is also a function of a leaf, so on a tree of refs it is an Equinox filter
    spec: `eqx.partition(model, rx.collection("params"))`.
    """

    def matches(self, path: Path | None, leaf: Any) -> bool:
        raise NotImplementedError(f"{type(self).__name__} must say what it matches.")

    def __call__(self, leaf: Any) -> bool:
        return self.matches(None, leaf)

    def __and__(self, other: Any) -> "Filter":
        return _All((self, as_filter(other)))

    def __rand__(self, other: Any) -> "Filter":
        return _All((as_filter(other), self))

    def __or__(self, other: Any) -> "Filter":
        return _Any((self, as_filter(other)))

    def __ror__(self, other: Any) -> "Filter":
        return _Any((as_filter(other), self))

    def __invert__(self) -> "Filter":
        return _Not(self)


@dataclasses.dataclass(frozen=True)
class _Collections(Filter):
    names: tuple[Hashable, ...]

    def matches(self, path: Path | None, leaf: Any) -> bool:
        return isinstance(leaf, Ref) and leaf.collection in self.names

    def __repr__(self) -> str:
        return f"rx.collection({', '.join(map(repr, self.names))})"


@dataclasses.dataclass(frozen=True)
class _Paths(Filter):
    patterns: tuple[str, ...]

    def matches(self, path: Path | None, leaf: Any) -> bool:
        if path is None:
            raise TypeError(
                f"`{self!r}` selects by place, so it needs the tree, not a leaf. Make an "
                "Equinox filter spec of it: `rx.filter_spec(tree, filter)`. Under "
                "`rx.mutable`, pass the tree too: `rx.mutable(filter, tree)`."
            )
        # One key may be several names: "encoder.weight" in the state of an optimizer.
        names = tuple(".".join(path).split(".")) if path else ()
        return any(_matches(names, tuple(p.split("."))) for p in self.patterns)

    def __repr__(self) -> str:
        return f"rx.path({', '.join(map(repr, self.patterns))})"


def _matches(path: Path, pattern: Path) -> bool:
    if not pattern:
        return not path
    head, rest = pattern[0], pattern[1:]
    if head == "**":
        return any(_matches(path[i:], rest) for i in range(len(path) + 1))
    return (
        bool(path) and fnmatch.fnmatchcase(path[0], head) and _matches(path[1:], rest)
    )


@dataclasses.dataclass(frozen=True)
class _OfType(Filter):
    ref_type: type[Ref]

    def matches(self, path: Path | None, leaf: Any) -> bool:
        return isinstance(leaf, self.ref_type)

    def __repr__(self) -> str:
        return self.ref_type.__name__


@dataclasses.dataclass(frozen=True)
class _Where(Filter):
    predicate: Callable[[Any], Any]

    def matches(self, path: Path | None, leaf: Any) -> bool:
        return bool(self.predicate(leaf))

    def __repr__(self) -> str:
        return getattr(self.predicate, "__name__", repr(self.predicate))


@dataclasses.dataclass(frozen=True)
class _Constant(Filter):
    answer: bool

    def matches(self, path: Path | None, leaf: Any) -> bool:
        return self.answer

    def __repr__(self) -> str:
        return repr(self.answer)


@dataclasses.dataclass(frozen=True)
class _All(Filter):
    filters: tuple[Filter, ...]

    def matches(self, path: Path | None, leaf: Any) -> bool:
        return all(f.matches(path, leaf) for f in self.filters)

    def __repr__(self) -> str:
        return f"({' & '.join(map(repr, self.filters))})"


@dataclasses.dataclass(frozen=True)
class _Any(Filter):
    filters: tuple[Filter, ...]

    def matches(self, path: Path | None, leaf: Any) -> bool:
        return any(f.matches(path, leaf) for f in self.filters)

    def __repr__(self) -> str:
        return f"({' | '.join(map(repr, self.filters))})"


@dataclasses.dataclass(frozen=True)
class _Not(Filter):
    filter: Filter

    def matches(self, path: Path | None, leaf: Any) -> bool:
        return not self.filter.matches(path, leaf)

    def __repr__(self) -> str:
        return f"~{self.filter!r}"


def collection(*names: Hashable) -> Filter:
    """The refs of any of these collections.

    !!! Example

        ```python
        import equinox as eqx
        import refx_eqx as rx

        tree = {"w": rx.Ref(1.0, "params"), "n": rx.Ref(0, "counts")}
        params, rest = eqx.partition(tree, rx.collection("params"))
        assert params["w"] is tree["w"] and params["n"] is None
        ```

    **Arguments:**

    - `*names`: the collections; `None` for refs without one.

    **Returns:**

    A filter.
    """
    return _Collections(names)


def path(*patterns: str) -> Filter:
    """The leaves at places that match any of these patterns.

    !!! Example

        ```python
        import refx_eqx as rx

        tree = {"encoder": [{"weight": rx.Ref(1.0)}], "weight": rx.Ref(2.0)}
        spec = rx.filter_spec(tree, rx.path("encoder.**.weight"))
        assert spec == {"encoder": [{"weight": True}], "weight": False}
        ```

    **Arguments:**

    - `*patterns`: the keys on the way to a leaf, joined with dots: attribute names, dict
        keys, positions. `*` stands for one key or a part of one, `**` for any number of
        keys, none included.

    **Returns:**

    A filter. It needs the tree, so it is not a function of a leaf alone: use it where a
    filter is asked for, or through [`refx_eqx.filter_spec`][].
    """
    return _Paths(patterns)


def as_filter(filter: Any) -> Filter:
    """The filter that is meant, whatever its form (see the top of this file)."""
    if isinstance(filter, Filter):
        return filter
    if isinstance(filter, bool):
        return _Constant(filter)
    if isinstance(filter, type) and issubclass(filter, Ref):
        return _OfType(filter)
    if callable(filter):
        return _Where(filter)
    try:
        hash(filter)
    except TypeError:
        raise TypeError(
            f"{filter!r} is not a filter. A filter is a collection name, a subclass of "
            "`rx.Ref`, `rx.collection(...)`, `rx.path(...)`, a function of a leaf, or a "
            "combination of these with `&`, `|` and `~`."
        ) from None
    return _Collections((filter,))


def key_text(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def dotted(path: Path) -> str:
    return ".".join(path) or "the root of the tree"


def leaves_with_paths(tree: Any) -> tuple[list[tuple[Path, Any]], Any]:
    """The leaves of a tree, opened or not, each with its path; and the treedef."""
    leaves, treedef = jtu.tree_flatten_with_path(tree, is_leaf=is_opened)
    return [(tuple(map(key_text, keys)), leaf) for keys, leaf in leaves], treedef


def as_closed(leaves: list[Any]) -> list[Any]:
    """The leaves with refs in place of `Value` and `Index` nodes, for a filter to see."""
    refs = {
        leaf.index: make_ref(
            leaf.ref_type,
            leaf.value,
            leaf.collection,
            leaf.note.name,
            leaf.note.declared,
        )
        for leaf in leaves
        if isinstance(leaf, Value)
    }
    closed = []
    for leaf in leaves:
        if is_opened(leaf):
            if leaf.index not in refs:
                raise StructureError(
                    f"Index {leaf.index} ({describe(leaf.note.name, leaf.collection)}) has "
                    "no Value in this tree. Pass the whole derefed tree."
                )
            leaf = refs[leaf.index]
        closed.append(leaf)
    return closed


def check_can_select(tree: Any, *filters: Any) -> None:
    """That a filter which asks what a ref is finds refs wherever the modules of the tree
    declare them.

    **Raises:**

    - `RefTypeError`: if a field that is declared a ref holds an array.
    """
    asking = [f for f in map(as_filter, filters) if _asks_refs(f)]
    if asking:
        check_refs_in_place(tree, f"Cannot select by {asking[0]!r}")


def _asks_refs(filter: Filter) -> bool:
    if isinstance(filter, _All | _Any):
        return any(map(_asks_refs, filter.filters))
    if isinstance(filter, _Not):
        return _asks_refs(filter.filter)
    return isinstance(filter, _Collections | _OfType)


def choose(paths: list[Path], leaves: list[Any], filters: tuple[Any, ...]) -> list[int]:
    """For each leaf, which of the filters is the first to select it; `len(filters)` if
    none does.

    **Raises:**

    - `StructureError`: if the answer differs between two places of one ref.
    """
    resolved = [as_filter(f) for f in filters]
    answers: list[int] = []
    first: dict[int, tuple[int, Path]] = {}
    for path, leaf in zip(paths, leaves):
        answer = next(
            (i for i, f in enumerate(resolved) if f.matches(path, leaf)), len(resolved)
        )
        if isinstance(leaf, Ref):
            earlier, earlier_path = first.setdefault(id(leaf), (answer, path))
            if earlier != answer:
                raise StructureError(
                    f"A filter must select a ref at all of its places or at none: "
                    f"{describe(leaf._name, leaf._collection)} is one ref at "
                    f"`{dotted(earlier_path)}` and `{dotted(path)}`, and "
                    f"{', '.join(map(repr, resolved))} would tear it apart. Select "
                    f'both, for example with `rx.path("{dotted(earlier_path)}", '
                    f'"{dotted(path)}")`, or neither.'
                )
        answers.append(answer)
    return answers


def selected_refs(tree: Any, filter: Any) -> list[Ref]:
    """The refs of a tree that a filter selects, each once, in order."""
    check_can_select(tree, filter)
    pairs, _ = leaves_with_paths(tree)
    paths, leaves = [p for p, _ in pairs], [x for _, x in pairs]
    chosen = choose(paths, leaves, (filter,))
    found = {id(x): x for x, c in zip(leaves, chosen) if c == 0 and isinstance(x, Ref)}
    return list(found.values())


def filter_spec(tree: Any, filter: Any) -> Any:
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

    - `StructureError`: if the filter selects a ref at one of its places and not at another.
    - `RefTypeError`: if a field that is declared a ref holds an array, where a filter asks
        what is a ref (a collection, a class).
    """
    check_can_select(tree, filter)
    pairs, treedef = leaves_with_paths(tree)
    closed = as_closed([leaf for _, leaf in pairs])
    chosen = choose([path for path, _ in pairs], closed, (filter,))
    return jtu.tree_unflatten(treedef, [answer == 0 for answer in chosen])


def aliases(tree: Any) -> dict[Ref[Any], tuple[str, ...]]:
    """Each ref of a tree, with all the places where it is.

    !!! Example

        ```python
        import refx_eqx as rx

        ref = rx.Ref(1.0)
        tree = {"a": ref, "b": [ref, 2.0]}
        assert rx.aliases(tree) == {ref: ("a", "b.0")}
        ```

    **Arguments:**

    - `tree`: a tree of refs. Nothing is read, so it may be called anywhere.

    **Returns:**

    A dict from each ref to its paths, in the notation of [`refx_eqx.path`][]. In order of
    the first place.
    """
    places: dict[Ref, tuple[str, ...]] = {}
    pairs, _ = leaves_with_paths(tree)
    for path, leaf in pairs:
        if isinstance(leaf, Ref):
            places[leaf] = (*places.get(leaf, ()), ".".join(path))
    return places


@contextlib.contextmanager
def mutable(filter: Any, tree: Any = None) -> Iterator[None]:
    """While the context lasts, only the refs that `filter` selects may be written.

    The limit holds for this thread. It may be nested; then all of the filters must allow
    a write. What a lifted transform writes back is checked too.

    !!! Example

        ```python
        import refx_eqx as rx

        weight, count = rx.Ref(1.0, "params"), rx.Ref(0, "counts")
        with rx.mutable("counts"):
            count.value += 1
            try:
                weight.value = 2.0
            except rx.ImmutableError:
                pass
        assert weight.value == 1.0 and count.value == 1
        ```

    **Arguments:**

    - `filter`: any filter. `False` forbids every write.
    - `tree`: the tree that the paths of a path filter are of. Not needed for others.

    **Raises:**

    - `ImmutableError`: at a write that is not allowed.
    """
    resolved = as_filter(filter)
    allows: Callable[[Any], bool] = resolved
    if tree is not None:
        allowed = {id(ref): ref for ref in selected_refs(tree, resolved)}

        def allows_in_tree(ref: Ref) -> bool:
            # An inner ref of a lifted transform is not in the tree. Its write is checked
            # when it comes back to the ref that is.
            return id(ref) in allowed or _trace.is_inner(ref._trace)

        allows = allows_in_tree

    guards = _trace.thread.state.guards
    guards.append((allows, repr(resolved)))
    try:
        yield
    finally:
        guards.pop()
