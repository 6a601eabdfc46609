"""`check`: checks that all arrays of a model are in refs."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._core._deref import is_whole
from .._core._errors import StructureError
from .._fields._misplaced import check_refs_in_place
from .._trees._cells import is_shared
from .._trees._paths import Path, path_text
from ._filters import FilterLike
from ._select import check_all_in_tree, choose, leaves_with_paths


_MOST = 8


def check(tree: PyTree, constants: FilterLike = False) -> None:
    """Checks that every array of a model is in a ref. Use it at the end of an `__init__`,
    or in a test.

    An array in a field that is not declared a ref is a constant. Training `wrt="params"`
    and [`refx_eqx.update_refs`][] do not change it, and [`refx_eqx.state_dict`][] does not
    contain it. If it was meant to be a parameter, nothing else reports it. The same holds
    for an array that a function in the model holds: a partial, a closure, a bound method.
    (Those of an Optax transformation are options.)

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        class Scale(rx.Module):
            by: rx.Param[jax.Array]
            offset: jax.Array  # not declared a ref

        scale = Scale(jnp.ones(3), jnp.zeros(3))
        try:
            rx.check(scale)
        except rx.StructureError as e:
            assert "`offset`" in str(e)
        rx.check(scale, constants=rx.path("offset"))
        ```

    **Arguments:**

    - `tree`: a tree of refs, or a derefed one. No ref is read, so this may be called
        anywhere.
    - `constants`: any filter. The arrays it selects need not be in refs.

    **Returns:**

    Nothing.

    **Raises:**

    - `StructureError`: if there are arrays outside refs, or a ref is only in a set, or among
        the keys of a dict. It names them.
    - `RefTypeError`: if a field that is declared a ref holds an array.
    """
    check_refs_in_place(tree, "`rx.check`")
    pairs, in_functions = also_in_functions(tree)
    check_all_in_tree(pairs, "`rx.check`")
    outside = [
        (path, leaf)
        for (path, leaf), answer in zip(pairs, choose(pairs, constants))
        if answer != 0 and is_array(leaf)
    ]
    if outside:
        found = [f"{path_text(path)}, {x.dtype}{list(x.shape)}" for path, x in outside]
        remedies = dict.fromkeys(remedy_for(path, in_functions) for path, _ in outside)
        more = [f"{len(found) - _MOST} more"] if len(found) > _MOST else []
        raise StructureError(
            f"`rx.check`: {len(found)} of the arrays are not in refs: "
            f'{"; ".join(found[:_MOST] + more)}. They are not trained by `wrt="params"`, and '
            f"not in the state dict. {' '.join(remedies)} If they are constants, say "
            "so: `rx.check(model, constants=rx.path(...))`."
        )


def also_in_functions(tree: Any) -> tuple[list[tuple[Path, Any]], set[Path]]:
    """The leaves of a tree, each with its path, also the arrays that functions hold, except
    the options of Optax transformations; and the paths of the leaves in functions."""
    is_seen = lambda x: is_shared(x) or is_array(x)
    is_leaf = lambda x: is_whole(x) or _is_transformation(x)
    whole, _ = leaves_with_paths(tree, is_seen, is_leaf)
    starts = [path for path, leaf in whole if _is_transformation(leaf)]
    pairs = [
        (path, leaf)
        for path, leaf in leaves_with_paths(tree, is_seen)[0]
        if not (is_array(leaf) and any(path[: len(p)] == p for p in starts))
    ]
    not_in_functions, _ = leaves_with_paths(tree, lambda _: False)
    return pairs, {path for path, _ in pairs} - {path for path, _ in not_in_functions}


def remedy_for(path: Path, in_functions: set[Path]) -> str:
    """How to put the array at this path in a ref."""
    if path in in_functions:
        return (
            'Let a function hold a ref, `rx.Ref(array, "params")`, and read `ref[...]`: '
            "`rx.as_refs` does not look into functions."
        )
    return (
        "Declare a field a ref, such as `weight: rx.Param[Array]`, or turn the arrays of "
        "a tree into refs with `rx.as_refs`."
    )


def is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, np.ndarray | jax.ShapeDtypeStruct)


def _is_transformation(x: Any) -> bool:
    """Whether `x` is one of Optax's, such as the `tx` of an `rx.Optimizer`: functions that
    close over their options, which may be arrays. The program that resumes makes it
    again."""
    return getattr(type(x), "_fields", None) == ("init", "update")
