"""Paths in a tree, for messages and filters."""

import fnmatch
from typing import Any


Path = tuple[str, ...]
"""The keys on the way to a leaf, as text: `("layers", "0", "weight")`."""


def key_text(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def dotted(path: Path) -> str:
    return ".".join(path) or "the root of the tree"


def pattern_of(path: Path) -> str:
    """The pattern of this place for `rx.path`."""
    special = any(set(key) & set(".*?[") for key in path)
    return repr(path) if special else f'"{dotted(path)}"'


def path_text(path: tuple) -> str:
    """A path in a tree for messages, in the form that `rx.path` takes. Accepts strings or
    JAX's keys."""
    names = tuple(map(key_text, path))
    return f"`{pattern_of(names).strip(chr(34))}`" if names else "the root of the tree"


def n_common(a: tuple, b: tuple) -> int:
    """A lower bound on the length of the common prefix of two tuples. Takes few Python
    steps."""
    n, step = min(len(a), len(b)), 1
    while a[:n] != b[:n]:
        n, step = max(0, n - step), 2 * step
    return n


class Pattern:
    """A pattern of `rx.path`, matched against one path after another.

    The paths of a tree come in order, so each shares a prefix with the one before. The
    result for that prefix is kept; otherwise a deep tree would take time quadratic in its
    depth.
    """

    __slots__ = ("_last", "_pattern")

    def __init__(self, pattern: str):
        self._pattern = tuple(pattern.split("."))
        # A path, and after each of its keys, the possible positions in the pattern.
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
        """`**` also matches zero keys."""
        for i, head in enumerate(self._pattern):
            if i in reached and head == "**":
                reached.add(i + 1)
        return frozenset(reached)
