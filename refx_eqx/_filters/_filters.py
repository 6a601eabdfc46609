"""Filters: which refs of a tree are meant.

A filter is

- a collection name: `"params"`, or any other hashable;
- a subclass of `Ref`;
- `True` (everything) or `False` (nothing);
- `rx.collection("params", "lora")` or `rx.path("encoder.**.weight")`;
- a ref, or a tree or set of refs, such as a part of the model: these very refs;
- a predicate: a function of a leaf that returns a bool;
- a combination of these with `&`, `|` and `~`.

A filter decides per ref, not per place. It sees a ref also where the tree is derefed, and
it must give the same answer at every place of one ref, so that a tie cannot be torn.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._core._closure import is_table, reachable
from .._core._errors import describe, StructureError
from .._core._functions import opened
from .._core._identity import Identity
from .._core._nodes import is_node, Value
from .._core._ref import guarded, make_ref, Ref
from .._fields._instance import check_refs_in_place


__tracebackhide__ = True


Path = tuple[str, ...]
"""The keys on the way to a leaf, as text: `("layers", "0", "weight")`."""


_ONLY_ANSWERS = "in a filter, which only answers which refs are meant. Write the ref before, or after."


def _nothing(ref: Any) -> bool:
    return False


class Filter:
    """The base of the filters that can be combined with `&`, `|` and `~`.

    A filter is also a function of a leaf, so on a tree of refs it is an Equinox filter
    spec: `eqx.partition(model, rx.collection("params"))`.
    """

    def matches(self, path: Path | None, leaf: Any) -> bool:
        raise NotImplementedError(f"{type(self).__name__} must say what it matches.")

    def __call__(self, leaf: Any) -> bool:
        with guarded(_nothing, _ONLY_ANSWERS):
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


FilterLike: TypeAlias = Filter | Hashable | Callable[[Any], bool] | PyTree
"""What may stand where a filter is asked for: a [`refx_eqx.Filter`][], the name of a
collection, a subclass of [`refx_eqx.Ref`][], a function of a leaf, `True`, `False`, a ref,
or a tree or set of refs."""


@dataclasses.dataclass(frozen=True)
class _Collections(Filter):
    names: tuple[Hashable, ...]

    def matches(self, path: Path | None, leaf: Any) -> bool:
        return isinstance(leaf, Ref) and leaf.collection in self.names

    def __repr__(self) -> str:
        return f"rx.collection({', '.join(map(repr, self.names))})"


@dataclasses.dataclass(frozen=True)
class _Paths(Filter):
    patterns: tuple[str | Path, ...]
    _walks: tuple["_Walk", ...] = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        walks = tuple(_Walk(p) for p in self.patterns if isinstance(p, str))
        object.__setattr__(self, "_walks", walks)

    def matches(self, path: Path | None, leaf: Any) -> bool:
        if path is None:
            raise TypeError(
                f"`{self!r}` selects by place, so it needs the tree, not a leaf. Make an "
                "Equinox filter spec of it: `rx.filter_spec(tree, filter)`. Under "
                "`rx.mutable`, pass the tree too: `rx.mutable(filter, tree)`."
            )
        # One key may be several names: "encoder.weight" in the state of an optimizer.
        names = tuple(".".join(path).split(".")) if path else ()
        return path in self.patterns or any(w.matches(names) for w in self._walks)

    def __repr__(self) -> str:
        return f"rx.path({', '.join(map(repr, self.patterns))})"


class _Walk:
    """A pattern, walked along one path after the other.

    The paths of a tree come in order, so each begins like the one before: what is known of
    that is kept, or a deep tree would take the square of its depth.
    """

    __slots__ = ("_last", "_pattern")

    def __init__(self, pattern: str):
        self._pattern = tuple(pattern.split("."))
        # A path, and after each of its keys: how much of the pattern may be behind us.
        self._last: tuple[Path, list[frozenset[int]]] = ((), [self._skip({0})])

    def matches(self, path: Path) -> bool:
        before, reached = self._last
        n = n_common(before, path)
        reached = reached[: n + 1]
        for key in path[n:]:
            reached.append(self._step(reached[-1], key))
        self._last = path, reached
        return len(self._pattern) in reached[-1]

    def _step(self, reached: frozenset[int], key: str) -> frozenset[int]:
        found = set()
        for i in reached:
            head = self._pattern[i] if i < len(self._pattern) else None
            if head == "**":
                found.add(i)
            elif head is not None and fnmatch.fnmatchcase(key, head):
                found.add(i + 1)
        return self._skip(found)

    def _skip(self, reached: set[int]) -> frozenset[int]:
        """`**` stands for no key, too."""
        for i, head in enumerate(self._pattern):
            if i in reached and head == "**":
                reached.add(i + 1)
        return frozenset(reached)


def n_common(a: tuple, b: tuple) -> int:
    """How many first items of two tuples are the same; or fewer. In few steps of Python."""
    n, step = min(len(a), len(b)), 1
    while a[:n] != b[:n]:
        n, step = max(0, n - step), 2 * step
    return n


@dataclasses.dataclass(frozen=True)
class _OfType(Filter):
    ref_type: type[Ref]

    def matches(self, path: Path | None, leaf: Any) -> bool:
        return isinstance(leaf, self.ref_type)

    def __repr__(self) -> str:
        return self.ref_type.__name__


@dataclasses.dataclass(frozen=True)
class _Refs(Filter):
    """These very refs. Held weakly: options of a transform, and so of a cache, have it."""

    refs: tuple[Identity, ...]
    text: str = dataclasses.field(compare=False)

    def matches(self, path: Path | None, leaf: Any) -> bool:
        if not isinstance(leaf, Ref):
            return False
        if Identity(leaf) in self._set:
            return True
        # Refs of one body are told apart without asking which refs they stand for.
        alive = [ref for ref in (x.recall() for x in self.refs) if ref is not None]
        return any(ref._body is not leaf._body and ref == leaf for ref in alive)

    @functools.cached_property
    def _set(self) -> frozenset[Identity]:
        return frozenset(self.refs)

    def __repr__(self) -> str:
        return self.text


def _refs_in(tree: Any) -> list[Ref]:
    """The refs in a ref, a tree or a set of refs."""
    if isinstance(tree, set | frozenset) or is_table(tree):
        return [x for x in tree if isinstance(x, Ref)]
    return [x for x in reachable(tree) if isinstance(x, Ref)]


def _these(tree: Any) -> _Refs | None:
    """The filter for the refs of a tree; `None` for what is no tree of refs."""
    refs = list({id(ref): ref for ref in _refs_in(tree)}.values())
    if not refs:
        return None
    names = [describe(ref._name, ref._collection) for ref in refs[:3]]
    more = [f"{len(refs) - 3} more"] if len(refs) > 3 else []
    return _Refs(tuple(map(Identity, refs)), f"these refs: {', '.join(names + more)}")


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

    **Raises:**

    - `TypeError`: if a name is not hashable, or is a ref: a ref is a filter itself.
    """
    for name in names:
        if isinstance(name, Ref):
            which = describe(name._name, name._collection)
            raise TypeError(
                f"`rx.collection` takes the names of collections, and was given a ref, "
                f"{which}. For this very ref, use the ref itself as the filter; for those "
                "of its collection, `rx.collection(ref.collection)`."
            )
        try:
            hash(name)
        except TypeError:
            raise TypeError(
                f"`rx.collection` takes the names of collections, which are hashable, and "
                f"was given {name!r}. Pass several one by one: `rx.collection('params', "
                "'lora')`, or `rx.collection(*names)`."
            ) from None
    return _Collections(names)


def path(*patterns: str | tuple[str, ...]) -> Filter:
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
        keys, none included. Or a tuple of keys, which are taken literally: for a key with
        a dot, a bracket or a star in it.

    **Returns:**

    A filter. It needs the tree, so it is not a function of a leaf alone: use it where a
    filter is asked for, or through [`refx_eqx.filter_spec`][].

    **Raises:**

    - `TypeError`: if a pattern is neither a text nor a tuple of texts.
    """
    for pattern in patterns:
        keys = pattern if isinstance(pattern, tuple) else (pattern,)
        if not all(isinstance(key, str) for key in keys):
            raise TypeError(
                "`rx.path` takes patterns, such as 'encoder.**.weight', or tuples of keys, "
                f"such as ('layers', '0', 'weight'), and was given {pattern!r}. Positions "
                "are text too: '0'. Pass several patterns one by one."
            )
    return _Paths(patterns)


def as_filter(filter: Any) -> Filter:
    """The filter that is meant, whatever its form (see the top of this file)."""
    if isinstance(filter, Filter):
        return filter
    if isinstance(filter, bool):
        return _Constant(filter)
    if isinstance(filter, type) and issubclass(filter, Ref):
        return _OfType(filter)
    if _is_tree(filter):
        these = _these(filter)
        if these is not None:
            return these
    if callable(filter):
        return _Where(filter)
    try:
        hash(filter)
    except TypeError:
        raise TypeError(
            f"{filter!r} is not a filter. A filter is a collection name, a subclass of "
            "`rx.Ref`, `rx.collection(...)`, `rx.path(...)`, a ref or a tree of refs, a "
            "function of a leaf, or a combination of these with `&`, `|` and `~`."
        ) from None
    return _Collections((filter,))


def _is_tree(filter: Any) -> bool:
    """Whether a filter may be a tree of refs: a module is, also one that can be called; a
    function or a partial is a predicate, whatever it holds."""
    if isinstance(filter, eqx.Module):
        return not isinstance(filter, eqx.Partial)
    return not callable(filter)


def as_option(filter: Any) -> Any:
    """A filter as an option that is kept: a tree of refs is not held, only known again."""
    found = as_filter(filter)
    return found if isinstance(found, _Refs) else filter


def key_text(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def dotted(path: Path) -> str:
    return ".".join(path) or "the root of the tree"


def leaves_with_paths(tree: Any) -> tuple[list[tuple[Path, Any]], Any]:
    """The leaves of a tree, of refs or derefed, each with its path; and the treedef. A
    function that holds refs is a node, so `closed` is to be called on what is made of it."""
    leaves, treedef = jtu.tree_flatten_with_path(opened(tree), is_leaf=is_node)
    pairs, before, path = [], (), ()
    for keys, leaf in leaves:
        n = n_common(before, keys)
        before, path = keys, (*path[:n], *map(key_text, keys[n:]))
        pairs.append((path, leaf))
    return pairs, treedef


def as_closed(leaves: list[Any]) -> list[Any]:
    """The leaves with refs instead of `Value` and `Index` nodes, for a filter to see."""
    refs = {
        leaf.index: make_ref(
            leaf.ref_type,
            leaf.value,
            leaf.collection,
            leaf.label.name,
            leaf.label.declared,
        )
        for leaf in leaves
        if isinstance(leaf, Value)
    }
    closed = []
    for leaf in leaves:
        if is_node(leaf):
            if leaf.index not in refs:
                raise StructureError(
                    f"Index {leaf.index} ({describe(leaf.label.name, leaf.collection)}) has "
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

    - `StructureError`: if the answer differs between two places of one ref, or if a filter
        names what there is not.
    """
    resolved = [as_filter(f) for f in filters]
    with guarded(_nothing, _ONLY_ANSWERS):
        answers = [_first(resolved, path, leaf) for path, leaf in zip(paths, leaves)]
    for i, f in enumerate(resolved):
        if leaves and i not in answers and _is_by_name(f):
            # It may be that those before it took all.
            if not any(map(f.matches, paths, leaves)):
                raise _selects_nothing(f, paths, leaves)
    _check_ties(resolved, paths, leaves, answers)
    return answers


def _first(filters: list[Filter], path: Path, leaf: Any) -> int:
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
                    f"{describe(leaf._name, leaf._collection)} is one ref at "
                    f"`{dotted(earlier_path)}` and `{dotted(path)}`, and "
                    f"{', '.join(map(repr, filters))} would tear it apart. Select "
                    f"both, for example with `rx.path({_pattern(earlier_path)}, "
                    f"{_pattern(path)})`, or neither."
                )


def _pattern(path: Path) -> str:
    """How to give this place to `rx.path`."""
    special = any(set(key) & set(".*?[") for key in path)
    return repr(path) if special else f'"{dotted(path)}"'


def _selects_nothing(
    filter: Filter, paths: list[Path], leaves: list[Any]
) -> StructureError:
    refs = [leaf for leaf in leaves if isinstance(leaf, Ref)]
    collections = list(dict.fromkeys(ref._collection for ref in refs))
    places = [f"`{dotted(path)}`" for path in paths]
    if len(places) > 8:
        places = [*places[:8], f"{len(places) - 8} more"]
    return StructureError(
        f"{filter!r} selects nothing in this tree, which has "
        + (
            f"refs of the collections {', '.join(map(repr, collections))}"
            if refs
            else "no refs"
        )
        + f", and leaves at {', '.join(places)}. Correct the name"
        + _hint(filter)
        + ". If there may be none, say so: `rx.collection('lora') | False`."
    )


def _is_by_name(filter: Filter) -> bool:
    """Whether a filter is made of names alone: if it selects nothing, that is likely to be
    a typing error. A predicate, a type, `~` and `False` may select nothing: what they
    select depends on the tree."""
    if isinstance(filter, _All | _Any):
        return all(map(_is_by_name, filter.filters))
    if isinstance(filter, _Collections):
        return bool(filter.names)
    return isinstance(filter, _Paths | _Refs) and filter != _Paths(())


def _hint(filter: Filter) -> str:
    """A tuple of names is a name itself."""
    names = filter.names if isinstance(filter, _Collections) else ()
    if len(names) == 1 and isinstance(names[0], tuple):
        return f" (for several collections, write `rx.collection{names[0]!r}`)"
    if isinstance(filter, _Refs):
        return " (a copy has other refs, and a derefed tree has none: select from the tree)"
    return ""


def selected_refs(tree: Any, filter: Any) -> list[Ref]:
    """The refs of a tree that a filter selects, each once, in order."""
    check_can_select(tree, filter)
    pairs, _ = leaves_with_paths(tree)
    paths, leaves = [p for p, _ in pairs], [x for _, x in pairs]
    chosen = choose(paths, leaves, (filter,))
    found = {id(x): x for x, c in zip(leaves, chosen) if c == 0 and isinstance(x, Ref)}
    return list(found.values())


def values(tree: PyTree, filter: FilterLike = True) -> list[Any]:
    """The values of the refs of a tree, each once: for counts, norms and sizes.

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

    - `tree`: a tree of refs. Those that are selected must be readable here.
    - `filter`: any filter.

    **Returns:**

    A list with the value of each ref that is selected, in the order of the tree. A shared
    ref is in it once. For the tree with values instead of refs, see
    [`refx_eqx.snapshot`][]; for values by path, [`refx_eqx.state_dict`][].

    **Raises:**

    - `StructureError`: if the filter selects a ref at one of its places and not at another,
        or names what there is not.
    - `TraceLevelError`: if a ref may not be read here.
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

    - `StructureError`: if the filter selects a ref at one of its places and not at another.
    - `RefTypeError`: if a field that is declared a ref holds an array, where a filter asks
        what is a ref (a collection, a class).
    """
    check_can_select(tree, filter)
    pairs, treedef = leaves_with_paths(tree)
    closed = as_closed([leaf for _, leaf in pairs])
    chosen = choose([path for path, _ in pairs], closed, (filter,))
    return jtu.tree_unflatten(treedef, [answer == 0 for answer in chosen])


def aliases(tree: PyTree) -> dict[Ref[Any], tuple[str, ...]]:
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
