"""`functionalize`: the pure function underlying the lifted transforms."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from jaxtyping import PyTree

from .._calls._call import Call, close_result
from .._calls._structure import tree_of, values_of
from .._core._deref import deref, reref
from .._core._errors import CarryError, describe, name_of
from .._core._nodes import Index, Value


P = ParamSpec("P")
T = TypeVar("T")


def functionalize(fn: Callable[P, T]) -> Callable[P, tuple[T, PyTree]]:
    """The pure function underlying the lifted transforms, to use by hand.

    !!! Example

        ```python
        import jax
        import refx_eqx as rx

        def step(ref, x):
            ref.value += x
            return ref.value * 2

        ref = rx.Ref(1.0, "counts")
        args = (ref, 2.0)
        out, updates = jax.jit(rx.functionalize(step))(*rx.deref(args))
        assert out == 6.0 and ref.value == 1.0  # nothing was written yet
        rx.update_refs(args, updates)
        assert ref.value == 3.0
        ```

    **Arguments:**

    - `fn`: a function that reads and writes the refs in its arguments.

    **Returns:**

    A pure function `(*args, **kwargs) -> (out, updates)`. It takes derefed arguments: deref
    all of them at once, to preserve sharing between them. `out` is the derefed result.
    `updates` has the structure of the derefed positional arguments (of `(args, kwargs)` if
    there are keywords), with the new values of the refs that were written and `None`
    elsewhere. Pass it to [`refx_eqx.update_refs`][].

    **Raises:**

    - `StructureError`: if the arguments are not derefed, if `fn` changes the structure of
        an argument, or if it writes a ref that is not in its arguments.
    """

    @functools.wraps(fn)
    def pure(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        # Not by `call`, which would write the updates: here the refs are temporary, and the
        # updates are part of the result.
        inner_args, inner_kwargs = reref((args, kwargs))
        derefed = Call(fn, inner_args, inner_kwargs)
        outcome = derefed.run("functionalize", derefed.arrays)
        result = close_result(
            outcome, derefed.structure.refs_after(outcome, derefed.arrays)
        )
        new = {i: outcome.info.value(i, x) for i, x in outcome.updates.items()}
        _check_passed(fn, derefed, new)
        *of_args, of_kwargs = (
            tree_of(part, [_only_updated(leaf, new) for leaf in leaves])
            for part, leaves in zip(derefed.parts[:-1], derefed.arrays)
        )
        updates = (tuple(of_args), of_kwargs) if kwargs else tuple(of_args)
        return deref(result), updates

    return pure


def _check_passed(fn: Any, derefed: Call, written: Iterable[int]) -> None:
    """Refuses a write to a ref outside the arguments, which the updates cannot hold."""
    passed = values_of(derefed.arrays[:-1])
    for i in written:
        if i not in passed:
            raise CarryError(
                f"`functionalize`: `{name_of(fn)}` writes {describe(derefed.refs[i])}, "
                "which is not in its arguments: it closes over the ref, or is a module "
                "that holds it. The updates cover only the arguments, so this write would "
                "be lost. Pass the ref, or the module that holds it, as an argument."
            )


def _only_updated(leaf: Any, new: dict[int, Any]) -> Any:
    if type(leaf) is Value:
        return leaf.with_value(new.get(leaf.index))
    return leaf if type(leaf) is Index else None
