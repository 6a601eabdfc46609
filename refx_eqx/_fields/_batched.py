"""`Batched[Linear, "n"]`: the type of a stack of modules, as made by
`filter_vmap(Linear)`."""

import operator
from typing import Any, TYPE_CHECKING

import jax
import jax.tree_util as jtu
import jaxtyping
import numpy as np

from .._core._access import peek
from .._core._ref import Ref
from ._bound import BoundType
from ._conformance import conforms
from ._hints import hint_text


class BatchedHint(type):
    """The class of `Batched[T, "n"]`: a type whose instances are stacks of `T`."""

    inside: Any
    axes: str

    def __instancecheck__(cls, obj: Any) -> bool:
        return cls.__instancecheck_str__(obj) == ""

    def __instancecheck_str__(cls, obj: Any) -> str:
        """Why `obj` is not such a stack; empty if it is one. (A beartype hook.)"""
        n = len(cls.axes.split())
        if not conforms(obj, cls.inside):
            return f"it is not of type {hint_text(cls.inside)}"
        found: dict[tuple[int, ...], str] = {}
        for leaf in jtu.tree_leaves(obj):
            sizes = _sizes_of(leaf, n)
            what = f"`{leaf._name}`" if isinstance(leaf, Ref) else "an array"
            if sizes is None:
                return f"{what} in it is not stacked along {_count(n)}"
            if sizes:
                found.setdefault(sizes, what)
        if not found:
            return f"no array in it is stacked along {_count(n)}"
        if len(found) > 1:
            texts = [f"{'x'.join(map(str, s))} of {what}" for s, what in found.items()]
            return (
                f"its arrays are stacks of different sizes, {' and '.join(texts[:2])}: an "
                "array for the whole stack is recognized by the axes that its field "
                "declares; if it declares none, hold the array in a field next to the "
                "stack"
            )
        (sizes,) = found
        stand_in = np.broadcast_to(np.zeros((), np.int8), sizes)
        hint: Any = jaxtyping.Shaped[np.ndarray, cls.axes]  # `Annotated` to pyright
        return hint.__instancecheck_str__(stand_in)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"`rx.{cls.__name__}` is a type, and does not make a stack. Make one with "
            f"`rx.filter_vmap({hint_text(cls.inside)})(...)`."
        )

    def __reduce__(cls):
        return operator.getitem, (Batched, (cls.inside, cls.axes))


def _count(n: int) -> str:
    return "one axis" if n == 1 else f"{n} axes"


def _sizes_of(leaf: Any, n: int) -> tuple[int, ...] | None:
    """The sizes of the first `n` axes of a stacked leaf. `()` for a leaf that cannot be
    stacked, or is shared by the whole stack; `None` for any other leaf."""
    value = peek(leaf) if isinstance(leaf, Ref) else leaf
    types = leaf._declared or () if isinstance(leaf, Ref) else ()
    found: tuple[int, ...] = ()
    for array in jtu.tree_leaves(value):
        if not isinstance(array, (jax.Array, jax.ShapeDtypeStruct)):
            continue
        axes = _stacked_along(value, n, types)
        if axes is None and all(bound.why_not(value) is None for bound in types):
            return ()
        if axes is None or len(array.shape) < n:
            return None
        shape = list(array.shape)
        found = tuple(shape.pop(axis) for axis in axes)
    return found


def _stacked_along(
    value: Any, n: int, types: tuple[BoundType, ...]
) -> tuple[int, ...] | None:
    in_front = (0,) * n
    if all(bound.why_not(value, in_front) is None for bound in types):
        return in_front
    # `filter_vmap(..., out_axes=1)`: the axis is elsewhere.
    along = types[0].extra_axes(value)
    return along if along is not None and len(along) == n else None


if TYPE_CHECKING:
    # A stack has the attributes of the stacked class, so editors show those.
    from typing import Annotated as Batched
else:

    class Batched:
        """The type of a stack of modules, as made by `filter_vmap`: `Batched[T, "n"]`.

        It works with jaxtyping, beartype and typeguard, in signatures and fields, and in
        `isinstance`. The name of the axis is bound like that of an array axis.

        !!! Example

            ```python
            import jax
            import jax.numpy as jnp
            import jax.random as jr
            import refx_eqx as rx
            from jaxtyping import Array, Float

            class Linear(rx.Module):
                weight: rx.Param[Float[Array, "out in"]]

                def __init__(self, key):
                    self.weight = jr.normal(key, (2, 3))

            class Deep(rx.Module):
                layers: rx.Batched[Linear, "depth"]
                scale: rx.Param[Float[Array, "depth"]]

            stack = rx.filter_vmap(Linear)(jr.split(jr.key(0), 4))
            deep = Deep(stack, jnp.ones(4))
            assert isinstance(stack, rx.Batched[Linear, "n"])
            assert not isinstance(Linear(jr.key(0)), rx.Batched[Linear, "n"])
            ```

        A stack differs from a plain module in its refs, which have these axes on top of
        their declared types. A ref without them is shared by the whole stack, such as the
        weight of a feed-forward network common to all layers; at least one ref must have
        them. In a module whose fields do not declare their rank, any arrays of equal
        leading sizes are a stack.

        **Arguments:**

        - `T`: the stacked type: a module, or another `Batched` for a stack of stacks.
        - `"n"`: the axes, one or more, as in jaxtyping. Each stands for one axis: `"..."`
            and `"*n"` are not allowed.

        **Raises:**

        - `ValueError`: if an axis stands for several.
        """

        def __new__(cls, *args, **kwargs):
            raise TypeError(
                '`rx.Batched` is a type to subscript: `rx.Batched[Linear, "n"]`. A '
                "stack is made with `rx.filter_vmap(Linear)(...)`."
            )

        def __class_getitem__(cls, item):
            if not isinstance(item, tuple) or len(item) != 2:
                raise TypeError(
                    '`rx.Batched` takes a type and its axes: `rx.Batched[Linear, "n"]`.'
                )
            inside, axes = item
            if not isinstance(axes, str) or not axes.split():
                raise TypeError(
                    f"`rx.Batched[..., {axes!r}]`: the axes are names, in a string: "
                    '`rx.Batched[Linear, "n"]`.'
                )
            if any("..." in axis or "*" in axis for axis in axes.split()):
                raise ValueError(
                    f"`rx.Batched[..., {axes!r}]`: each name must stand for one axis. Name "
                    'them one by one: `rx.Batched[Linear, "n m"]`.'
                )
            if isinstance(inside, BatchedHint):
                inside, axes = inside.inside, f"{axes} {inside.axes}"
            name = f'Batched[{hint_text(inside)}, "{axes}"]'
            return BatchedHint(name, (), {"inside": inside, "axes": axes})
