"""`mutable`: limits which refs may be written."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxtyping import PyTree

from .._core import _trace
from .._core._ref import Ref
from ._filters import as_filter, FilterLike
from ._guard import guarded
from ._select import selected_refs


@contextlib.contextmanager
def mutable(filter: FilterLike, tree: PyTree = None) -> Iterator[None]:
    """Inside the `with` block, only refs selected by `filter` may be written.

    The limit applies to this thread and this `asyncio` task. It may be nested; then all of
    the filters must allow a write. A generator that yields inside the block limits its
    caller, as a context manager made from a generator is meant to, until the block ends, in
    whichever thread or task. Writes by lifted transforms are checked too. So is a list, dict
    or NumPy array in a value that is read inside the block; one that was read before can
    still be changed in place, unnoticed.

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

    - `filter`: any filter. `False` forbids every write. Without a tree, misspelled names
        cannot be detected; a ref that is not selected cannot be written either way.
    - `tree`: the tree for the paths of a path filter. Other filters do not need it.

    **Raises:**

    - `ImmutableError`: on a write that is not allowed.
    """
    resolved = as_filter(filter)
    allows: Callable[[Any], bool] = resolved
    if tree is not None:
        allowed = {id(ref): ref for ref in selected_refs(tree, resolved)}

        def allows_in_tree(ref: Ref) -> bool:
            # An inner ref of a lifted transform is not in the tree. Its write is checked
            # when it is written back to the ref that is.
            return id(ref) in allowed or _trace.is_inner(ref._trace)

        allows = allows_in_tree

    where = (
        f"under `rx.mutable({resolved!r})`, which does not select it. Widen the filter, or "
        "write the ref outside the `with` block."
    )
    with guarded(allows, where):
        yield
