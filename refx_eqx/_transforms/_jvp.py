"""`filter_jvp` and `filter_linearize`: tangents, from the arguments to the result."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._calls._call import Call, call
from .._calls._structure import Leaves, Outcome, tree_of
from .._core import _jax
from .._core._errors import MismatchError
from .._core._nodes import is_inexact
from .._engine._autodiff import arrays_of_result, LinearMap, with_linear_map
from .._engine._backward import apart_from_channels
from .._engine._tangents import read_tangents
from .._fields._referenced import in_original_classes
from .._filters._filters import FilterLike


Aux = TypeVar("Aux")


T = TypeVar("T")


def filter_jvp(
    fn: Callable[..., T],
    primals: Sequence[PyTree],
    tangents: Sequence[PyTree],
    **kwargs: Any,
) -> tuple[T, T]:
    """As `equinox.filter_jvp`, by reference. The function runs once: what it writes to a
    ref is written to the caller's ref, without its tangent.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        def f(model, x):
            model["uses"].value += 1
            return model["w"].value * x

        model = {"w": rx.Ref(jnp.array(3.0)), "uses": rx.Ref(jnp.array(0))}
        tangents = {"w": jnp.array(1.0), "uses": None}
        primals = (model, jnp.array(2.0))
        out, tangent_out = rx.filter_jvp(f, primals, (tangents, None))
        assert out == 6.0 and tangent_out == 2.0
        assert model["uses"].value == 1
        ```

    **Arguments:**

    - `fn`: the function to differentiate. Called as `fn(*primals, **kwargs)`.
    - `primals`: its positional arguments.
    - `tangents`: a tree with the structure of `primals`, with `None` for a zero tangent,
        and `None` (or `float0`, as in JAX) for anything that is not a floating-point or
        complex number. For a ref, give the tangent of its value, either bare or in a
        `Value` as in gradients. A ref that occurs at several places has one tangent, at one
        of them.
    - `**kwargs`: keyword arguments of `fn`, which are not differentiated.

    **Returns:**

    `(primals_out, tangents_out)`. The tangents have the structure of
    `rx.deref(primals_out)`, with `None` for anything that does not depend on an input with
    a tangent. A returned ref of the caller has the tangent of its final value.

    **Raises:**

    - `TypeError`: if the primals or the tangents are not a tuple, or if something that
        cannot be differentiated has a tangent.
    - `StructureError`: if the tangents do not have the structure of the primals.
    """
    for what, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, tuple | list):
            raise TypeError(
                f"`filter_jvp`: the {what} must be a tuple, with one item for each "
                f"positional argument, but they are {eqx.tree_pformat(given)}. Pass "
                f"`({what[:-1]},)`."
            )
    if len(primals) != len(tangents):
        raise MismatchError(
            f"`filter_jvp` takes one tangent for each primal: it was given {len(primals)} "
            f"primals and {len(tangents)} tangents. Pass `None` for a zero tangent."
        )
    args = tuple(map(_traced_where_differentiated, primals, tangents))
    found: dict[str, Any] = {}

    def transform(derefed: Call) -> Outcome:
        n = len(args)
        arrays = derefed.arrays[:n]
        given = read_tangents(derefed.parts, arrays, tangents, "The tangents")
        treedef = jtu.tree_structure(arrays)
        tangents_in = treedef.flatten_up_to(given)
        # Only arrays with a tangent are inputs of `jax.jvp`. The others are constants, so a
        # result that depends on them alone has no tangent, rather than one of zeros.
        has_tangent = treedef.unflatten([t is not None for t in tangents_in])
        primals_in, rest = eqx.partition(arrays, has_tangent)

        def differentiated(primals: list[Leaves]) -> tuple[Leaves, Outcome]:
            everything = [*eqx.combine(primals, rest), *derefed.arrays[n:]]
            outcome = derefed.run("filter_jvp", everything)
            found["part"], leaves = arrays_of_result(
                derefed.structure, outcome, everything
            )
            has_derivative = lambda x: _jax.has_tangent(x) and is_inexact(x)
            return eqx.filter(leaves, has_derivative), outcome

        _, found["tangents"], outcome = jax.jvp(
            differentiated,
            (primals_in,),
            (treedef.unflatten(tangents_in),),
            has_aux=True,
        )
        return outcome

    out = call(fn, args, kwargs, apart_from_channels(transform))
    return out, tree_of(found["part"], found["tangents"])


def _traced_where_differentiated(primal: Any, tangent: Any) -> Any:
    """Converts Python numbers that have a tangent to arrays."""
    leaves, treedef = jtu.tree_flatten(primal)
    if tangent is None or not any(isinstance(x, float | complex) for x in leaves):
        return primal
    like = jtu.tree_structure(in_original_classes(primal))
    try:
        given = like.flatten_up_to(in_original_classes(tangent))
    except (ValueError, TypeError):
        return primal  # `read_tangents` says what is wrong
    return jtu.tree_unflatten(
        treedef,
        [
            jnp.asarray(x) if isinstance(x, float | complex) and t is not None else x
            for x, t in zip(leaves, given)
        ],
    )


class _Pushforward(LinearMap):
    """Maps tangents of the primals to those of the result."""

    def __call__(self, /, *tangents: Any) -> Any:
        n = len(self.inputs.parts)
        if len(tangents) != n:
            raise MismatchError(
                f"The linear function of `filter_linearize` takes {n} tangents, one for "
                f"each primal, but was given {len(tangents)}. Pass `None` for zero."
            )
        given = self.inputs.read(tangents, "The tangents")
        (tree,) = self.outputs.trees(self.linear(given))
        return tree


@overload
def filter_linearize(
    fun: Callable[..., T],
    *primals: PyTree,
    has_aux: Literal[False] = False,
    wrt: FilterLike | None = None,
) -> tuple[T, Callable[..., T]]: ...


@overload
def filter_linearize(
    fun: Callable[..., tuple[T, Aux]],
    *primals: PyTree,
    has_aux: Literal[True],
    wrt: FilterLike | None = None,
) -> tuple[T, Callable[..., T], Aux]: ...


def filter_linearize(
    fun: Callable[..., Any],
    *primals: PyTree,
    has_aux: bool = False,
    wrt: FilterLike | None = None,
) -> tuple[Any, ...]:
    """As `jax.linearize`, for any pytrees and by reference. The function runs once, during
    this call, and what it writes to a ref is written to the caller's ref.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        w = rx.Ref(jnp.array(3.0), "params")
        out, f_jvp = rx.filter_linearize(lambda w, x: w.value * x, w, jnp.array(2.0))
        assert out == 6.0
        assert f_jvp(jnp.array(1.0), None) == 2.0
        assert f_jvp(None, jnp.array(1.0)) == 3.0
        ```

    **Arguments:**

    - `fun`, `*primals`, `has_aux`, `wrt`: as for [`refx_eqx.filter_vjp`][].

    **Returns:**

    `(out, f_jvp)`, or `(out, f_jvp, aux)`. `f_jvp(*tangents)` takes tangents as
    [`refx_eqx.filter_jvp`][] does, and returns the tangent of `out`, with the structure of
    `rx.deref(out)` and `None` for anything without a derivative. It is a pytree.

    **Raises:**

    As [`refx_eqx.filter_vjp`][].
    """
    return with_linear_map(
        "filter_linearize", jax.linearize, _Pushforward, fun, primals, has_aux, wrt
    )
