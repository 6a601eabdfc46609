"""Where in a tree something is: for messages, and for filters."""

from typing import Any


__tracebackhide__ = True


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
    """How `rx.path` is given this place."""
    special = any(set(key) & set(".*?[") for key in path)
    return repr(path) if special else f'"{dotted(path)}"'


def path_text(path: tuple) -> str:
    """Where in a tree something is, for messages: what `rx.path` takes. Of texts, or of the
    keys that JAX has."""
    names = tuple(map(key_text, path))
    return f"`{pattern_of(names).strip(chr(34))}`" if names else "the root of the tree"


def n_common(a: tuple, b: tuple) -> int:
    """How many first items of two tuples are the same; or fewer. In few steps of Python."""
    n, step = min(len(a), len(b)), 1
    while a[:n] != b[:n]:
        n, step = max(0, n - step), 2 * step
    return n
