"""What is differentiated in a call, and what has a derivative in its result.

Each transform of this family is the transform of JAX of the same name, on the flat arrays of
one opened call. The function runs once, in Python and in what it counts: the state that it
writes is auxiliary to the derivative, and is written when the transform returns.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._call import call, Opened
from .._core._errors import name_of, StructureError
from .._core._structure import is_traced_in_ref, Outcome
from .._filters._filters import check_can_select, choose, leaves_with_paths
from ._backward import stripped
from ._layout import Layout, layout_of_args, replaced, result_of, Sparse


__tracebackhide__ = True


def is_inexact(x: Any) -> bool:
    """Whether `x` is array-like, and floating-point or complex."""
    return is_traced_in_ref(x) and bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact))


def first_of(args: tuple, name: str) -> Any:
    """The first argument: what most of these transforms differentiate."""
    if not args:
        raise TypeError(
            f"`{name}` differentiates the first argument, which must be passed by "
            "position: none was given."
        )
    return args[0]


def differentiable(
    opened: Opened, layout: Layout, tree: Any, wrt: Any = None
) -> list[int]:
    """The positions of what is differentiated in a tree: its inexact arrays, of those that
    `wrt` selects. A Python `float` in a ref is one of them, because it is one under `jit`.
    """
    selected = [0] * len(layout.places)
    if wrt is not None:
        check_can_select(tree, wrt)
        pairs, _ = leaves_with_paths(tree)
        leaves = [leaf for _, leaf in pairs]
        selected = choose([path for path, _ in pairs], leaves, (wrt,))
    return [
        i
        for places, answer in zip(layout.by_leaf(), selected)
        for i in places
        if answer == 0 and is_inexact(opened.arrays[i])
    ]


def nothing_to_differentiate(name: str, fn: Any, wrt: Any) -> StructureError:
    return StructureError(
        f"`{name}` found nothing to differentiate in the first argument of "
        f"`{name_of(fn)}`"
        + ("" if wrt is None else f" for wrt={wrt!r}")
        + ": it differentiates floating-point and complex arrays, in refs and beside them. "
        "Pass what is to be differentiated first; a filter that is a predicate is called "
        "with the ref, not with its value."
    )


class Side(NamedTuple):
    """One side of a derivative: the arrays of a tree that have one.

    - `layout`: of the tree; `positions`: where the arrays are; `types`: what they are.
    """

    layout: Layout
    positions: tuple[int, ...]
    types: tuple[jax.ShapeDtypeStruct, ...]

    def fill(self, values: Sequence[Any]) -> Any:
        """The derefed tree, with these values for the arrays."""
        return self.layout.fill(Sparse(zip(self.positions, values)))

    def select(self, given: dict[int, Any]) -> list[Any]:
        """The tangents or cotangents of the arrays, of what `layout` read: zeros for
        `None`."""
        for i, x in given.items():
            if x is not None and i not in self.positions:
                raise StructureError(
                    f"There is a tangent or cotangent, {eqx.tree_pformat(x)}, for "
                    "something that is not differentiated. Put `None` there."
                )
        return [
            jnp.zeros(t.shape, t.dtype) if given[i] is None else given[i]
            for i, t in zip(self.positions, self.types)
        ]


def _side(layout: Layout, arrays: Sequence[Any], positions: list[int]) -> Side:
    types = [
        jax.ShapeDtypeStruct(jnp.shape(arrays[i]), jnp.result_type(arrays[i]))
        for i in positions
    ]
    return Side(layout, tuple(positions), tuple(types))


class Differentiated:
    """A call as a function of the arrays that are differentiated, of the arrays of its
    result that have a derivative. All else is auxiliary.

    - `arrays`: those that are differentiated. `inputs`: their side.
    - `outputs`: the other side, known once it was called.
    """

    outputs: Side

    def __init__(
        self,
        name: str,
        opened: Opened,
        layout: Layout,
        tree: Any,
        wrt: Any,
        has_aux: bool,
    ):
        self.name = name
        self.opened = opened
        self.has_aux = has_aux
        positions = differentiable(opened, layout, tree, wrt)
        self.arrays = [opened.arrays[i] for i in positions]
        self.inputs = _side(layout, opened.arrays, positions)

    def __call__(self, arrays: list[Any]) -> tuple[list[Any], Outcome]:
        everything = replaced(self.opened.arrays, self.inputs.positions, arrays)
        outcome = self.opened.run(self.name, everything)
        result = result_of(self.opened, outcome, everything)
        layout = result.layout.first(self.name) if self.has_aux else result.layout
        positions = [i for i in layout.positions() if is_inexact(result.arrays[i])]
        self.outputs = _side(layout, result.arrays, positions)
        return [result.arrays[i] for i in positions], outcome


def with_linear_map(
    name: str,
    derive: Callable[[Differentiated], tuple[Any, Outcome]],
    fun: Callable[..., Any],
    primals: tuple,
    has_aux: bool,
    wrt: Any,
) -> Any:
    """Calls the function. Returns its result, the linear map that `derive` makes of the
    call, and the auxiliary result if there is one."""
    found: dict[str, Any] = {}

    def transform(opened: Opened) -> Outcome:
        layout = layout_of_args(opened, len(primals))
        fn = Differentiated(name, opened, layout, primals, wrt, has_aux)
        found["map"], outcome = derive(fn)
        return outcome

    result = call(fun, primals, {}, stripped(transform))
    if has_aux:
        out, aux = result
        return out, found["map"], aux
    return result, found["map"]
