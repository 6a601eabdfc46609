"""How a ref is printed. This bypasses the trace rule, because a message about an unreadable ref
has to print it.
"""

import weakref
from typing import Any


def pdoc(ref: Any, **kwargs: Any) -> Any:
    """The hook of `eqx.tree_pformat`."""
    import wadler_lindig as wl

    docs = [wl.pdoc(ref._value, **kwargs)]
    if isinstance(ref._collection, str):
        docs.append(wl.TextDoc(f'"{ref._collection}"'))
    elif ref._collection is not None:
        docs.append(wl.pdoc(ref._collection, **kwargs))
    return wl.bracketed(
        begin=wl.TextDoc(f"{type(ref).__name__}("),
        docs=docs,
        sep=wl.comma,
        end=wl.TextDoc(")"),
        indent=kwargs.get("indent", 2),
    )


def treescope_repr(ref: Any, path: str | None, subtree_renderer: Any) -> Any:
    """The hook of treescope, as used in Penzai's notebooks."""
    return subtree_renderer(_drawn.setdefault(ref, _Drawn(ref)), path=path)


class _Drawn:
    """What treescope renders for a ref. It marks repeated objects as shared, unless they
    have an `__eq__` and a `__hash__`, as a `Ref` does: those it takes to be immutable."""

    __slots__ = ("__weakref__", "_ref")

    def __init__(self, ref: Any):
        self._ref = weakref.ref(ref)

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from treescope import repr_lib

        ref = self._ref()
        assert ref is not None
        return repr_lib.render_object_constructor(
            object_type=type(ref),
            attributes={"value": ref._value, "collection": ref._collection},
            path=path,
            subtree_renderer=subtree_renderer,
        )


_drawn: "weakref.WeakKeyDictionary[Any, _Drawn]" = weakref.WeakKeyDictionary()
