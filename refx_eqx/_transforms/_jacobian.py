"""`filter_jacfwd`, `filter_jacrev` and `filter_hessian`: matrices of derivatives."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
from jaxtyping import PyTree

from .._calls._call import Call, call
from .._calls._structure import Outcome
from .._engine._autodiff import (
    DifferentiableCall,
    first_of,
    nothing_to_differentiate,
    TangentSpace,
)
from .._engine._backward import apart_from_channels
from .._engine._wrapper import Lifted
from .._filters._filters import as_option, FilterLike


class _Jacobian(Lifted):
    """The derivative of every array of the result with respect to every array of the first
    argument."""

    # The JAX transforms that compute it, in order of application.
    steps: ClassVar[tuple[Callable[..., Any], ...]]

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        name, has_aux = self.transform_name, self.options["has_aux"]
        first = first_of(args, name)
        found: dict[str, Any] = {}

        def transform(derefed: Call) -> Outcome:
            wrt = self.options["wrt"]
            fn = DifferentiableCall(
                name, derefed, (first,), wrt, has_aux, by_first=True
            )
            if not fn.inputs.types:
                raise nothing_to_differentiate(name, self.__wrapped__, wrt)
            # Only the innermost step runs `fn`, and each passes the outcome on as its auxiliary
            # result. So the function runs, and writes, once.
            derivative: Callable = fn
            for step in self.steps:
                derivative = step(
                    derivative, has_aux=True, holomorphic=self.options["holomorphic"]
                )
            matrix, outcome = derivative(fn.arrays)
            sides = [fn.outputs, *[fn.inputs] * len(self.steps)]
            found["matrix"] = _fill(sides, matrix)
            return outcome

        out = call(self.__wrapped__, args, kwargs, apart_from_channels(transform))
        return (found["matrix"], out[1]) if has_aux else found["matrix"]


def _fill(sides: list[TangentSpace], matrix: Any) -> Any:
    """The trees of a matrix: the tree of the first side, with each array replaced by a tree
    of the next side."""
    if not sides:
        return matrix
    this, *others = sides
    rows = [_fill(others, row) for row in this.treedef.flatten_up_to(matrix)]
    (tree,) = this.trees(jax.tree.unflatten(this.treedef, rows))
    return tree


class _JacFwd(_Jacobian):
    transform_name = "filter_jacfwd"
    steps = (jax.jacfwd,)


class _JacRev(_Jacobian):
    transform_name = "filter_jacrev"
    steps = (jax.jacrev,)


class _Hessian(_Jacobian):
    transform_name = "filter_hessian"
    steps = (jax.jacrev, jax.jacfwd)


def filter_jacfwd(
    fun: Callable[..., Any],
    has_aux: bool = False,
    *,
    wrt: FilterLike | None = None,
    holomorphic: bool = False,
) -> Callable[..., PyTree]:
    """As `equinox.filter_jacfwd`, by reference: the Jacobian, by forward-mode
    differentiation of all directions at once.

    The function runs once, whatever the number of directions: a counter that it increments
    goes up by one. What it writes to a ref is written to the caller's ref.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        def f(model):
            model["uses"].value += 1
            return model["w"].value ** 2

        model = {"w": rx.Ref(jnp.array([1.0, 2.0])), "uses": rx.Ref(jnp.array(0))}
        jacobian = rx.filter_jacfwd(f)(model)
        assert jnp.array_equal(jacobian["w"].value, jnp.diag(jnp.array([2.0, 4.0])))
        assert jacobian["uses"].value is None and model["uses"].value == 1
        ```

    **Arguments:**

    - `fun`: the function to differentiate with respect to its first argument.
    - `has_aux`: whether `fun` returns a pair `(out, aux)`. Only `out` is differentiated.
    - `wrt`: any filter, which narrows what is differentiated.
    - `holomorphic`: as in `jax.jacfwd`; needed for complex arrays.

    **Returns:**

    A function with the arguments of `fun`, which returns the Jacobian, or `(jacobian,
    aux)`. In it, each floating-point array of `rx.deref(out)` is replaced with a tree of
    the structure of `rx.deref(first_argument)`, with `None` for anything that is not
    differentiated. Every other leaf of the result is replaced with `None`.

    **Raises:**

    When called:

    - `StructureError`: if there is nothing to differentiate, or if `wrt` selects a ref at
        one of its places and not at another.
    """
    return _JacFwd(fun, has_aux=has_aux, wrt=as_option(wrt), holomorphic=holomorphic)


def filter_jacrev(
    fun: Callable[..., Any],
    has_aux: bool = False,
    *,
    wrt: FilterLike | None = None,
    holomorphic: bool = False,
) -> Callable[..., PyTree]:
    """As `equinox.filter_jacrev`, by reference: the Jacobian, by reverse-mode
    differentiation. The function runs once.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        w = rx.Ref(jnp.array([1.0, 2.0]), "params")
        jacobian = rx.filter_jacrev(lambda w: jnp.sum(w.value**2))(w)
        assert jnp.array_equal(jacobian.value, jnp.array([2.0, 4.0]))
        ```

    **Arguments:**, **Returns:**, **Raises:** as for [`refx_eqx.filter_jacfwd`][].
    """
    return _JacRev(fun, has_aux=has_aux, wrt=as_option(wrt), holomorphic=holomorphic)


def filter_hessian(
    fun: Callable[..., Any],
    has_aux: bool = False,
    *,
    wrt: FilterLike | None = None,
    holomorphic: bool = False,
) -> Callable[..., PyTree]:
    """As `equinox.filter_hessian`, by reference: the matrix of second derivatives. The
    function runs once.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        w = rx.Ref(jnp.array([1.0, 2.0]), "params")
        hessian = rx.filter_hessian(lambda w: jnp.sum(w.value**3))(w)
        assert jnp.array_equal(hessian.value.value, jnp.diag(jnp.array([6.0, 12.0])))
        ```

    **Arguments:**, **Raises:** as for [`refx_eqx.filter_jacfwd`][].

    **Returns:**

    A function with the arguments of `fun`, which returns the Hessian, or `(hessian, aux)`:
    the Jacobian, with each of its arrays replaced with another such tree.
    """
    return _Hessian(fun, has_aux=has_aux, wrt=as_option(wrt), holomorphic=holomorphic)
