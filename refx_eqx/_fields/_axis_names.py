"""The axis names of jaxtyping: opening a scope with names bound, and reading them back.

This is the only file that touches the internals of jaxtyping, which binds the names of one
call (`"out in"`) in a stack of dictionaries, with one entry per running `jaxtyped`
function. We need two things for which it has no public function:

1. to keep the names bound by the fields of an instance, for as long as it lives;
2. to bind these names again when a `jaxtyped` method of the instance is called.
"""

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxtyping import _decorator, _storage


class AxisNames(NamedTuple):
    """Names and their bindings: hashable, compared by value.

    - `single`: `"in"`, of size 3;
    - `variadic`: `"*batch"`, of sizes (2, 3), with jaxtyping's flag for broadcasting;
    - `structures`: the `"T"` of `PyTree[..., "T"]`;
    - `attributes`: instance attributes named by an axis such as `"{self.size}"`.
    """

    single: tuple[tuple[str, int], ...] = ()
    variadic: tuple[tuple[str, tuple[bool, tuple[int, ...]]], ...] = ()
    structures: tuple[tuple[str, Any], ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        bound = [f"{name}={size}" for name, size in self.single]
        bound += [f"{name}={sizes}" for name, (_, sizes) in self.variadic]
        bound += [f"{name}={structure}" for name, structure in self.structures]
        bound += [f"self.{name}={value!r}" for name, value in self.attributes]
        return ", ".join(bound)


NO_NAMES = AxisNames()


@contextlib.contextmanager
def name_scope(names: AxisNames = NO_NAMES, instance: Any = None) -> Iterator[None]:
    """A scope in which `names` are bound, and checks bind more.

    **Arguments:**

    - `names`: bound from the start.
    - `instance`: the `self` of axes such as `"{self.size}"`.
    """
    if instance is None:
        instance = types.SimpleNamespace(**dict(names.attributes))
    memos = ({}, {}, {}, {"self": instance})
    _bind(memos, names)
    scopes = vars(_storage._shape_storage).setdefault("memo_stack", [])
    depth = len(scopes)
    try:
        scopes.append(memos)
        yield
    finally:
        # Not the last: a signal may come before it is pushed. Nor `memos`: a check replaces
        # it with a new tuple.
        del scopes[depth:]


def _bind(memos: tuple, names: AxisNames) -> None:
    single, variadic, structures, _ = memos
    single.update(names.single)
    variadic.update(names.variadic)
    structures.update(names.structures)


def tried(check: Callable[..., bool], *args: Any) -> bool:
    """`check(*args)`. If it fails, the names that it bound are free again."""
    before = [memo.copy() for memo in _storage.get_shape_memo()]
    passed = False
    try:
        passed = check(*args)
    finally:
        if not passed:
            _storage.set_shape_memo(*before)
    return passed


def names_bound(words: frozenset[str] | None = None) -> AxisNames:
    """The names bound in the running scope: all, or those among `words`."""
    *memos, _ = _storage.get_shape_memo()
    # A name that varies with the place in a tree, `"?n"`, is bound as "(Leaf 0 ...) n".
    found = [
        tuple(
            item
            for item in sorted(memo.items(), key=lambda item: item[0])
            if words is None or item[0].rpartition(" ")[2] in words
        )
        for memo in memos
    ]
    return AxisNames(*found)


def words_of(hint: Any, rank: int) -> tuple[str | None, ...] | None:
    """The name of each axis of an array of this rank in a type such as `Float[Array, "out
    in"]`, with `None` for an axis without a name. `None` if the type does not fix the rank,
    or fixes another.
    """
    words = getattr(hint, "dim_str", None)
    if words is None:
        return None
    found: list[str | None] = []
    every = words.split()
    for word in every:
        name = word.lstrip("#*_?").partition("=")[0]
        several = "*" in word or word == "..."
        times = rank - len(every) + 1 if several else 1
        found += [name if name.isidentifier() else None] * max(times, 0)
    return tuple(found) if len(found) == rank else None


def union(all_names: list[AxisNames]) -> AxisNames:
    """The union of several, without names that disagree."""
    merged = []
    for kind in zip(*all_names):
        bound: dict[str, Any] = {}
        torn = set()
        for name, to in (item for items in kind for item in items):
            if bound.setdefault(name, to) != to:
                torn.add(name)
        merged.append(tuple((k, v) for k, v in bound.items() if k not in torn))
    return AxisNames(*merged)


def bind_in_methods(cls: type, names_of: Callable[[Any], AxisNames]) -> None:
    """Makes each `jaxtyped` method of `cls` start with `names_of(self)` bound.

    jaxtyping has no hook for this (its issue 241): it opens a fresh scope after the method
    is called and before the first argument is checked, so this replaces the function that
    opens it. All other functions are unchanged.
    """

    if not hasattr(_decorator, "push_shape_memo"):
        warnings.warn(
            "jaxtyping no longer has `jaxtyping._decorator.push_shape_memo`: the axis "
            "names of the fields of a module are not bound in its `jaxtyped` methods. "
            "Everything else is checked. Use a version of jaxtyping that refx_eqx was "
            "tested with (0.3.11).",
            stacklevel=2,
        )
        return

    def push_shape_memo(arguments: dict[str, Any]) -> tuple:
        memos = _storage.push_shape_memo(arguments)
        instance = arguments.get("self")
        if isinstance(instance, cls):
            _bind(memos, names_of(instance))
        return memos

    setattr(_decorator, "push_shape_memo", push_shape_memo)  # noqa: B010 (it is private)
