"""The base of `rx.axes` and `rx.specs`: an option for each leaf, by collection."""

import functools
from collections.abc import Callable, Hashable, Mapping
from keyword import iskeyword
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu

from .._core._errors import describe, MismatchError, StructureError
from .._core._ref import Ref
from .._fields._referenced import in_original_classes
from .._filters._filters import as_filter, as_option, Filter, Path
from .._trees._cells import may_carry
from .._trees._equality import UNSET
from .._trees._paths import key_text


RNG = "rng"
"""The collection of randomness. See `_rng_split.py`."""


class _Same:
    """The option of an unsplit ref of collection "rng": the same randomness everywhere."""

    def __call__(self, array: Any) -> None:
        return None

    def __repr__(self) -> str:
        return "None (the same randomness everywhere)"


SAME = _Same()


# The option at a place of a ref that defers to another place of the same ref.
ELSEWHERE = object()


class ByFilter:
    """An option for each leaf of a tree, by collection or any other filter, with a
    default."""

    called = ""
    """The name of the class in messages and user code."""
    what = ""
    """The name of the option that each leaf has."""

    several = ""
    """Its plural."""

    option = ""
    """The argument of a transform that takes it."""

    example = ""
    """An example of an option, for messages."""

    nothing = ""
    """The option that stands for none, for messages."""

    by_collection: Mapping[Hashable, Any]
    default: Any

    def __init__(
        self,
        by_collection: Mapping[Hashable, Any] | None,
        default: Any,
        collections: dict[str, Any],
    ):
        if by_collection is not None and not isinstance(by_collection, Mapping):
            raise TypeError(
                f"`{self.called}({by_collection!r})`: give a mapping from collection, or "
                f"from any filter, to {self.what}, as in "
                f"`{self.called}({{'params': {self.example}}})`."
            )
        merged = {**(by_collection or {}), **collections}
        merged = {as_option(given): one for given, one in merged.items()}
        for given, one in merged.items():
            merged[given] = self.checked(one, f"{self.called}({{{given!r}: {one!r}}})")
        if default is not UNSET and not callable(default):
            default = self.checked(default, f"{self.called}(default={default!r})")
        object.__setattr__(self, "by_collection", merged)
        object.__setattr__(self, "default", default)

    @classmethod
    def text_for(cls, ref: Ref, one: str) -> str:
        """Code that gives the collection of `ref` this option, for messages."""
        name = ref._collection
        given = f"{{{name!r}: {one}}}"
        if isinstance(name, str) and name.isidentifier() and not iskeyword(name):
            given = f"{name}={one}"
        return f"{cls.called}({given}, default={cls.nothing})"

    def checked(self, one: Any, text: str) -> Any:
        """Checks and converts an option given by a user. `text` is how it was given.

        **Raises:**

        - `TypeError`: if it is not valid.
        """
        raise NotImplementedError("A subclass defines which options are valid.")

    def is_whole(self, one: Any) -> bool:
        """Whether this option leaves a leaf whole, for the same randomness everywhere."""
        return one is None

    def ask(self, function: Callable[[Any], Any], leaf: Any) -> Any:
        """The answer of the default for a leaf, if it is a function."""
        return self.checked(function(leaf), f"{self.called}(default=...)")

    def ask_within(self, function: Callable[[Any], Any], leaf: Any) -> Any:
        """Likewise for a leaf inside a function."""
        return self.ask(function, leaf)

    def named(self, path: Path, leaf: Any) -> Any:
        """The option of a leaf that is named, or `UNSET`."""
        for given, one in self.by_collection.items():
            # A predicate only applies to refs here: arrays have the default.
            if isinstance(given, Filter) or isinstance(leaf, Ref):
                if as_filter(given).matches(path, leaf):
                    is_rng = isinstance(leaf, Ref) and leaf.collection == RNG
                    return SAME if is_rng and self.is_whole(one) else one
        return UNSET

    def of(self, path: Path, leaf: Any) -> Any:
        """The option of one leaf of a tree."""
        one = self.named(path, leaf)
        if one is not UNSET:
            return one
        if self.default is not UNSET:
            default = self.default
            return self.ask(default, leaf) if callable(default) else default
        if isinstance(leaf, Ref):
            which = describe(leaf)
        elif eqx.is_array(leaf):
            which = f"the array {eqx.tree_pformat(leaf)}"
        else:
            return None
        default = self.checked(None, "the default")
        raise StructureError(
            f"{self!r} does not give the {self.what} of {which}. Name its collection, or "
            f"give a default: `{self.called}(..., default={default!r})`."
        )

    def within(self, path: Path, leaf: Any) -> Any:
        """The option of one leaf inside a function, which is itself at `path`."""
        one = self.named(path, leaf)
        if one is not UNSET:
            return one
        default = None if self.default is UNSET else self.default
        return self.ask_within(default, leaf) if callable(default) else default

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"`{self.called}` cannot be changed: make another one.")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, ByFilter)
        return (self.by_collection, self.default) == (
            other.by_collection,
            other.default,
        )

    def __hash__(self) -> int:
        return hash((frozenset(self.by_collection.items()), self.default))

    def __repr__(self) -> str:
        given = [f"{k}={v!r}" for k, v in self.by_collection.items()]
        if self.default is not UNSET:
            given.append(f"default={self.default!r}")
        return f"{self.called}({', '.join(given)})"


class Within(NamedTuple):
    """The option of a function, which applies to its contents: `of` maps each leaf inside
    it to an option."""

    of: Callable[[Any], Any]


def each_leaf(
    prefix: Any,
    tree: Any,
    what: str,
    resolve: Callable[[Any, Any], list[Any]],
    is_leaf: Callable[[Any], bool],
) -> list[Any]:
    """The option of each leaf of `tree`, given a prefix of the tree. For a function it may
    be a `Within`.

    **Arguments:**

    - `what`: the user's name for the prefix.
    - `resolve`: maps a leaf of the prefix, and the tree under it, to the option of each
        leaf there.
    - `is_leaf`: for the prefix.

    **Raises:**

    - `StructureError`: if it is not a prefix of the tree.
    """
    found: list[Any] = []

    def visit(one: Any, subtree: Any) -> None:
        if isinstance(one, ByFilter):
            for keys, leaf in jtu.tree_flatten_with_path(subtree)[0]:
                path = tuple(map(key_text, keys))
                within = Within(functools.partial(one.within, path))
                found.append(within if may_carry(leaf) else one.of(path, leaf))
        else:
            found.extend(resolve(one, subtree))

    try:
        both = in_original_classes(prefix), in_original_classes(tree)
        jtu.tree_map(visit, *both, is_leaf=is_leaf)
    except StructureError:
        raise
    except ValueError as e:
        raise MismatchError(
            f"`{what}` must be a prefix of the tree that it is for. JAX says: {e}"
        ) from None
    return found


class NotGiven(MismatchError):
    """A leaf of a prefix is not an axis, or not a spec."""


# What a user sees of it, and may catch.
NotGiven.__module__ = MismatchError.__module__
NotGiven.__name__ = NotGiven.__qualname__ = MismatchError.__qualname__
