"""Where in a tree something is: for messages, and for filters."""

from typing import Any

import jax.tree_util as jtu


__tracebackhide__ = True


Path = tuple[str, ...]
"""The keys on the way to a leaf, as text: `("layers", "0", "weight")`."""


def path_text(path: tuple) -> str:
    """A key path as the user would write it: `.layers[0].weight`."""
    return jtu.keystr(path) or "the root of the tree"


def key_text(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def dotted(path: Path) -> str:
    return ".".join(path) or "the root of the tree"


def n_common(a: tuple, b: tuple) -> int:
    """How many first items of two tuples are the same; or fewer. In few steps of Python."""
    n, step = min(len(a), len(b)), 1
    while a[:n] != b[:n]:
        n, step = max(0, n - step), 2 * step
    return n
