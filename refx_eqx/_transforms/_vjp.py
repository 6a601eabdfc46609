"""`filter_vjp`: cotangents, from the result to the arguments."""

from collections.abc import Callable
from typing import Any, Literal, overload, TypeVar

import jax
from jaxtyping import PyTree

from .._engine._autodiff import LinearMap, with_linear_map
from .._filters._filters import FilterLike


T = TypeVar("T")


Aux = TypeVar("Aux")


class _Pullback(LinearMap):
    """Maps cotangents of the result to those of the primals."""

    def __call__(self, cotangents: Any, /) -> tuple:
        given = self.outputs.read((cotangents,), "The cotangents")
        (result,) = self.linear(given)
        return self.inputs.trees(result)


@overload
def filter_vjp(
    fun: Callable[..., T],
    *primals: PyTree,
    has_aux: Literal[False] = False,
    wrt: FilterLike | None = None,
) -> tuple[T, Callable[[PyTree], tuple[PyTree, ...]]]: ...


@overload
def filter_vjp(
    fun: Callable[..., tuple[T, Aux]],
    *primals: PyTree,
    has_aux: Literal[True],
    wrt: FilterLike | None = None,
) -> tuple[T, Callable[[PyTree], tuple[PyTree, ...]], Aux]: ...


def filter_vjp(
    fun: Callable[..., Any],
    *primals: PyTree,
    has_aux: bool = False,
    wrt: FilterLike | None = None,
) -> tuple[Any, ...]:
    """As `equinox.filter_vjp`, by reference. The function runs once, during this call, and
    what it writes to a ref is written to the caller's ref. The returned function may be
    called later, any number of times; it does not read or write refs.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        def f(model, x):
            model["uses"].value += 1
            return model["w"].value * x

        model = {"w": rx.Ref(jnp.array(3.0)), "uses": rx.Ref(jnp.array(0))}
        out, vjp_fn = rx.filter_vjp(f, model, jnp.array(2.0))
        of_model, of_x = vjp_fn(jnp.array(1.0))
        assert of_model["w"].value == 2.0 and of_x == 3.0
        assert of_model["uses"].value is None and model["uses"].value == 1
        ```

    **Arguments:**

    - `fun`: the function to differentiate. Called as `fun(*primals)`.
    - `*primals`: its arguments. Their floating-point and complex arrays are
        differentiated, both inside and outside refs.
    - `has_aux`: whether `fun` returns a pair `(out, aux)`. Only `out` is differentiated.
    - `wrt`: any filter, which narrows what is differentiated. The paths of a path filter
        begin with the number of the argument.

    **Returns:**

    `(out, vjp_fn)`, or `(out, vjp_fn, aux)`. `vjp_fn` takes a cotangent with the structure
    of `rx.deref(out)`, with `None` for zero and for anything without a derivative. It
    returns a tuple with the structure of `rx.deref(primals)`, with `None` for anything that
    is not differentiated. It is a pytree whose leaves are the residuals.

    **Raises:**

    - `StructureError`: if `wrt` selects a ref at one of its places and not at another; and
        from `vjp_fn`, if the cotangent has another structure.
    """
    return with_linear_map("filter_vjp", jax.vjp, _Pullback, fun, primals, has_aux, wrt)
