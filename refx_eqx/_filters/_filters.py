"""Filters: selecting refs of a tree.

A filter is

- a collection name: `"params"`, or any other hashable;
- a subclass of `Ref`, or an annotation such as `rx.Param`: its collection;
- `True` (everything) or `False` (nothing);
- `rx.collection("params", "lora")` or `rx.path("encoder.**.weight")`;
- a ref, or a tree or set of refs, such as part of the model: exactly these refs. Of a list,
    each item must select something;
- a predicate: a function of a leaf that returns a bool;
- a combination of these with `&`, `|` and `~`.

A filter decides per ref, not per place. It sees refs even if the tree is derefed, and it
must give the same answer at every place of a ref, so that a tie cannot be torn.

Each name in a filter, also in a part of one, must be in the tree: otherwise `~rx.path("bais")`
would silently select everything. `f | False` says that the names in `f` may be missing.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
from jaxtyping import PyTree

from .._core._access import refuse_cycle
from .._core._errors import describe, is_annotation
from .._core._ref import Ref
from .._fields._collection import Collection
from .._fields._hints import alias_of, split_hint, value_of_alias
from .._fields._ref_type import OpenRefHint
from .._trees._cells import looked_up, reachable
from .._trees._equality import Identity
from .._trees._paths import Path, Pattern
from ._guard import only_answering
from ._not_a_filter import refuse_what_is_no_filter


class Filter:
    """The base class of filters, which can be combined with `&`, `|` and `~`.

    [`refx_eqx.collection`][] and [`refx_eqx.path`][] make them. A filter is also a function
    of a leaf, so on a tree of refs it is an Equinox filter spec.

    !!! Example

        ```python
        import equinox as eqx
        import refx_eqx as rx

        model = {"w": rx.Ref(1.0, "params"), "n": rx.Ref(0, "counts")}
        chosen = rx.collection("params") & ~(rx.path("**.bias") | False)
        assert rx.filter_spec(model, chosen) == {"w": True, "n": False}
        assert eqx.filter(model, rx.collection("counts"))["w"] is None
        ```

    Each collection and each path that a filter names must be in the tree it is used on.
    `f | False` says that those of `f` may be missing, such as a bias here.
    """

    # Whether it depends on what a ref is: its collection, its class.
    _asks_refs = False
    # Whether it consists only of names: if it selects nothing, that is probably a typo. A
    # predicate, a type, `~` or `False` may rightly select nothing.
    _is_by_name = False
    # Another possible mistake if it selects nothing.
    _hint = ""

    def matches(self, path: Path | None, leaf: Any) -> bool:
        """Whether the filter selects a leaf. `path` is `None` if it is unknown."""
        raise NotImplementedError(f"{type(self).__name__} must define `matches`.")

    def _each_by_name(self) -> "Iterator[Filter]":
        """The parts that consist only of names, so that each must select something, from
        single names to the whole."""
        if self._is_by_name:
            yield self

    def _code(self) -> str:
        """How a message writes it in code."""
        return repr(self)

    def __call__(self, leaf: Any) -> bool:
        with only_answering():
            return self.matches(None, leaf)

    def __and__(self, other: Any) -> "Filter":
        return _Joined(all, (self, as_filter(other)))

    def __rand__(self, other: Any) -> "Filter":
        return _Joined(all, (as_filter(other), self))

    def __or__(self, other: Any) -> "Filter":
        return _Joined(any, (self, as_filter(other)))

    def __ror__(self, other: Any) -> "Filter":
        return _Joined(any, (as_filter(other), self))

    def __invert__(self) -> "Filter":
        return _Not(self)

    def __bool__(self) -> bool:
        # `f and g` would be just `g`, and `not f` would select nothing.
        raise TypeError(
            f"The filter {self!r} has no truth value, so it cannot be used with `and`, "
            "`or`, `not` and `if`. Combine filters with `&`, `|` and `~`."
        )


FilterLike: TypeAlias = Filter | Hashable | Callable[[Any], bool] | PyTree
"""Anything accepted as a filter: a [`refx_eqx.Filter`][], the name of a collection, a
subclass of [`refx_eqx.Ref`][], an annotation such as [`refx_eqx.Param`][], a function of a
leaf, `True`, `False`, a ref, or a tree or set of refs."""


@dataclasses.dataclass(frozen=True)
class _Collections(Filter):
    names: tuple[Hashable, ...]

    _asks_refs = True

    @property
    def _is_by_name(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bool(self.names)

    @property
    def _hint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        if len(self.names) == 1 and isinstance(self.names[0], tuple):
            # A tuple of names is itself a name.
            return f" (for several collections, write `rx.collection{self.names[0]!r}`)"
        return ""

    def _each_by_name(self) -> Iterator[Filter]:
        return (_Collections((name,)) for name in self.names)

    def matches(self, path: Path | None, leaf: Any) -> bool:
        return isinstance(leaf, Ref) and leaf.collection in self.names

    def __repr__(self) -> str:
        return f"rx.collection({', '.join(map(repr, self.names))})"


@dataclasses.dataclass(frozen=True)
class _Paths(Filter):
    patterns: tuple[str | Path, ...]
    _walked: tuple[Pattern, ...] = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        walked = tuple(Pattern(p) for p in self.patterns if isinstance(p, str))
        object.__setattr__(self, "_walked", walked)

    @property
    def _is_by_name(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bool(self.patterns)

    def _each_by_name(self) -> Iterator[Filter]:
        return (_Paths((pattern,)) for pattern in self.patterns)

    def matches(self, path: Path | None, leaf: Any) -> bool:
        if path is None:
            raise TypeError(
                f"`{self!r}` selects by place, so it needs the tree, not a leaf. Convert "
                "it to an Equinox filter spec: `rx.filter_spec(tree, filter)`. Under "
                "`rx.mutable`, pass the tree too: `rx.mutable(filter, tree)`."
            )
        # One key may hold several names: "encoder.weight" in the state of an optimizer.
        names = tuple(".".join(path).split(".")) if path else ()
        return path in self.patterns or any(w.matches(names) for w in self._walked)

    def __repr__(self) -> str:
        return f"rx.path({', '.join(map(repr, self.patterns))})"


@dataclasses.dataclass(frozen=True)
class _OfType(Filter):
    ref_type: type[Ref]

    _asks_refs = True

    def matches(self, path: Path | None, leaf: Any) -> bool:
        return isinstance(leaf, self.ref_type)

    def __repr__(self) -> str:
        return self.ref_type.__name__


@dataclasses.dataclass(frozen=True)
class Refs(Filter):
    """Exactly these refs. Held weakly, as options of a transform, and thus cache keys,
    contain it.

    - `parts`: the refs of each item of a list, which must select something.
    """

    refs: tuple[Identity, ...]
    text: str = dataclasses.field(compare=False)
    parts: "tuple[Refs, ...]" = dataclasses.field(default=(), compare=False)

    _is_by_name = True
    _hint = (
        " (a copy has other refs, and a derefed tree has none: select from the tree)"
    )

    def matches(self, path: Path | None, leaf: Any) -> bool:
        if not isinstance(leaf, Ref):
            return False
        if Identity(leaf) in self._set:
            return True
        # Refs of one body are distinguished without asking which refs they stand for.
        alive = [ref for ref in (x.recall() for x in self.refs) if ref is not None]
        return any(ref._body is not leaf._body and ref == leaf for ref in alive)

    def _each_by_name(self) -> Iterator[Filter]:
        return iter(self.parts or (self,))

    def _code(self) -> str:
        return "rx.refs_in(...)"

    @functools.cached_property
    def _set(self) -> frozenset[Identity]:
        return frozenset(self.refs)

    def __repr__(self) -> str:
        return self.text


def _refs_in(tree: Any) -> list[Ref]:
    """The refs in a ref or a tree, also those in its sets and among its keys."""
    found = ((leaf, *looked_up(leaf)) for leaf in reachable(tree))
    return [x for x in itertools.chain.from_iterable(found) if isinstance(x, Ref)]


def _these(tree: Any) -> Refs | None:
    """The filter for the refs of a tree; `None` if it is not a tree of refs."""
    refuse_cycle(tree)
    refs = list({id(ref): ref for ref in _refs_in(tree)}.values())
    if not refs:
        return None
    names = [ref._name or "an unnamed ref" for ref in refs[:3]]
    more = [f"{len(refs) - 3} more"] if len(refs) > 3 else []
    return Refs(tuple(map(Identity, refs)), f"rx.refs_in({', '.join(names + more)})")


def _each_of(trees: Sequence[Any]) -> Filter:
    """The filter for the refs of several trees, each of which must select something if it
    has any."""
    parts = tuple(these for these in map(_these, trees) if these is not None)
    # One filter, not one for each item: it looks up a leaf in a set.
    whole = _these(trees)
    return (
        _Constant(False) if whole is None else dataclasses.replace(whole, parts=parts)
    )


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
class _Joined(Filter):
    """Several filters: `all` of them, or `any`."""

    quantifier: Callable[[Iterable[bool]], bool]
    filters: tuple[Filter, ...]

    @property
    def _asks_refs(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(f._asks_refs for f in self.filters)

    @property
    def _is_by_name(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(f._is_by_name for f in self.filters)

    def _each_by_name(self) -> Iterator[Filter]:
        if self.quantifier is any and _Constant(False) in self.filters:
            return  # `f | False`: what `f` names may be missing
        for f in self.filters:
            yield from f._each_by_name()
        # Names that are all there may have nothing in common (`&`).
        yield from super()._each_by_name()

    def matches(self, path: Path | None, leaf: Any) -> bool:
        return self.quantifier(f.matches(path, leaf) for f in self.filters)

    def __repr__(self) -> str:
        joint = " & " if self.quantifier is all else " | "
        return f"({joint.join(map(repr, self.filters))})"


@dataclasses.dataclass(frozen=True)
class _Not(Filter):
    filter: Filter

    @property
    def _asks_refs(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.filter._asks_refs

    def _each_by_name(self) -> Iterator[Filter]:
        return self.filter._each_by_name()

    def matches(self, path: Path | None, leaf: Any) -> bool:
        return not self.filter.matches(path, leaf)

    def __repr__(self) -> str:
        return f"~{self.filter!r}"


def collection(*names: Hashable) -> Filter:
    """Selects the refs of any of these collections.

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

    - `TypeError`: if a name is not hashable, or is a ref (which is itself a filter).
    """
    for name in names:
        if is_annotation(name):
            raise TypeError(
                "`rx.collection` takes the names of collections, but was given an "
                f"annotation, {name!r}. Use its name, such as 'params'; or combine filters "
                "with `|`: an annotation such as `rx.Param` is one."
            )
        if isinstance(name, Ref):
            raise TypeError(
                "`rx.collection` takes the names of collections, but was given a ref, "
                f"{describe(name)}. To select this ref, use the ref itself as the filter; "
                "to select its collection, `rx.collection(ref.collection)`."
            )
        try:
            hash(name)
        except TypeError:
            raise TypeError(
                "`rx.collection` takes the names of collections, which are hashable, but "
                f"was given {name!r}. Pass several one by one: `rx.collection('params', "
                "'lora')`, or `rx.collection(*names)`."
            ) from None
    return _Collections(names)


def refs_in(*trees: PyTree) -> Filter:
    """Selects exactly the refs that are in these trees, such as parts of a model.

    A tree of refs is itself a filter; this is for combining two of them, and for `~`.

    !!! Example

        ```python
        import refx_eqx as rx

        model = {"encoder": [rx.Ref(1.0, "params")], "decoder": [rx.Ref(2.0, "params")]}
        spec = rx.filter_spec(model, rx.collection("params") & ~rx.refs_in(model["decoder"]))
        assert spec == {"encoder": [True], "decoder": [False]}
        ```

    **Arguments:**

    - `*trees`: refs, and trees or sets of refs. They are not kept alive.

    **Returns:**

    A filter.

    **Raises:**

    - `TypeError`: if there is no ref in one of them.
    - `StructureError`: if one of them contains itself.
    """
    for tree in trees:
        if _these(tree) is None:
            raise TypeError(
                f"`rx.refs_in` was given a `{type(tree).__name__}` without a ref. (A "
                "snapshot has none, nor does a derefed tree.) Pass the tree of refs, or a part "
                "of it; for a name, use `rx.collection` or `rx.path`."
            )
    return _each_of(trees)


def path(*patterns: str | tuple[str, ...]) -> Filter:
    """Selects the leaves at places that match any of these patterns.

    !!! Example

        ```python
        import refx_eqx as rx

        tree = {"encoder": [{"weight": rx.Ref(1.0)}], "weight": rx.Ref(2.0)}
        spec = rx.filter_spec(tree, rx.path("encoder.**.weight"))
        assert spec == {"encoder": [{"weight": True}], "weight": False}
        ```

    **Arguments:**

    - `*patterns`: the keys on the way to a leaf, joined with dots: attribute names, dict
        keys, positions. `*` matches one key or part of one, `**` any number of keys,
        including none. Or a tuple of keys, taken literally, for keys that contain a dot, a
        bracket or a star.

    **Returns:**

    A filter. It needs the tree, so it is not a function of a leaf: use it wherever a filter
    is accepted, or through [`refx_eqx.filter_spec`][].

    **Raises:**

    - `TypeError`: if a pattern is neither a string nor a tuple of strings.
    """
    for pattern in patterns:
        keys = pattern if isinstance(pattern, tuple) else (pattern,)
        if not all(isinstance(key, str) for key in keys):
            raise TypeError(
                "`rx.path` takes patterns, such as 'encoder.**.weight', or tuples of "
                f"keys, such as ('layers', '0', 'weight'), but was given {pattern!r}. "
                "Positions are strings too: '0'. Pass several patterns one by one."
            )
    return _Paths(patterns)


def as_filter(filter: Any) -> Filter:
    """Converts any form of a filter (see the top of this file) to a `Filter`."""
    if isinstance(filter, Filter):
        return filter
    if alias_of(filter) is not None:
        filter = value_of_alias(filter)
    if isinstance(filter, bool):
        return _Constant(filter)
    if isinstance(filter, type) and issubclass(filter, Ref):
        return _OfType(filter)
    of_annotation = _of_annotation(filter)
    if of_annotation is not None:
        return of_annotation
    these = _these(filter) if _is_tree(filter) else None
    if these is not None:
        if isinstance(filter, list | tuple | set | frozenset):
            _refuse_other_filters(filter)
        return _each_of(filter) if isinstance(filter, list | tuple) else these
    refuse_what_is_no_filter(filter)
    return _Where(filter) if callable(filter) else _Collections((filter,))


def _of_annotation(hint: Any) -> Filter | None:
    """The filter for the refs that an annotation declares without their type: `rx.Param`."""
    inner, metadata = split_hint(hint)
    names = [m.name for m in metadata if isinstance(m, Collection)]
    if isinstance(inner, OpenRefHint) and isinstance(inner.value_hint, TypeVar):
        inner = inner.ref_type
    if not names or not (isinstance(inner, type) and issubclass(inner, Ref)):
        return None
    of_collection = _Collections((names[0],))
    return of_collection if inner is Ref else of_collection & _OfType(inner)


def _refuse_other_filters(items: Iterable[Any]) -> None:
    """Refuses a filter of another form in a list of refs.

    **Raises:**

    - `TypeError`: if there is one.
    """
    for x in items:
        if isinstance(x, str | type | Filter) or _of_annotation(x) is not None:
            raise TypeError(
                f"Refs in a list are a filter that selects these refs alone, but this one "
                f"has {x!r} in it. Combine two filters with `|`: `rx.refs_in(model.decoder) "
                "| 'lora'`. If it is a leaf of a tree, say so: `rx.refs_in(tree)`."
            )


def asks_identity(filter: Filter) -> bool:
    """Whether a filter depends on the identity of refs, so that it selects no copies."""
    if isinstance(filter, _Joined):
        return any(map(asks_identity, filter.filters))
    if isinstance(filter, _Not):
        return asks_identity(filter.filter)
    return isinstance(filter, Refs)


def _is_tree(filter: Any) -> bool:
    """Whether a filter may be a tree of refs: a module is, even if it is callable; a
    function or a partial is a predicate, whatever it holds."""
    if isinstance(filter, eqx.Module):
        return not isinstance(filter, eqx.Partial)
    return not callable(filter)


def as_option(filter: Any) -> Any:
    """A filter as a stored option: a tree of refs is not kept alive, only recognized."""
    found = as_filter(filter)
    return found if asks_identity(found) or is_annotation(filter) else filter
