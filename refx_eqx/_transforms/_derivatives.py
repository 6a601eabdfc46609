"""`filter_jvp`, `filter_vjp`, `filter_linearize`, and the matrices of derivatives.

Each is the transform of JAX of the same name, on the flat arrays of one opened call. The
function runs once, in Python and in what it counts: the state that it writes is auxiliary
to the derivative, and is written when the transform returns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .. import _trace
from .._errors import StructureError
from .._functionalize import call, Opened
from .._lifted import Lifted
from .._structure import Outcome
from ._backward import stripped
from ._layout import (
    differentiable,
    first_of,
    is_inexact,
    Layout,
    layout_of_args,
    layout_of_first,
    nothing_to_differentiate,
    replaced,
    Result,
    result_of,
    Sparse,
)


_trace.register_exclusion(__file__)


def filter_jvp(
    fn: Callable[..., Any], primals: Sequence, tangents: Sequence, **kwargs: Any
) -> tuple[Any, Any]:
    """As `equinox.filter_jvp`, by reference. The function runs once: what it writes to a
    ref is written to the caller's ref, the value without its tangent.

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
    - `tangents`: of the structure of `primals`, with `None` for a tangent of zero, and so
        for all that is not a floating-point or complex number. At the place of a ref, the
        tangent of its value: bare, or in a `Value`, as gradients have it. A ref that is at
        several places has one tangent, at one of them.
    - `**kwargs`: keyword arguments of `fn`, which are not differentiated.

    **Returns:**

    `(primals_out, tangents_out)`. The tangents have the structure of
    `rx.deref(primals_out)`, with `None` for what does not depend on an input that has a
    tangent. A ref of the caller that is returned has the tangent of the value it ends with.

    **Raises:**

    - `StructureError`: if the tangents are not of the structure of the primals, or if
        something that cannot be differentiated has one.
    """
    __tracebackhide__ = True
    if len(primals) != len(tangents):
        raise StructureError(
            f"`filter_jvp` takes one tangent for each primal: it was given {len(primals)} "
            f"primals and {len(tangents)} tangents. Pass `None` for a tangent of zero."
        )
    args = tuple(map(_traced_where_differentiated, primals, tangents))
    found: dict[str, Any] = {}

    def transform(opened: Opened) -> Outcome:
        __tracebackhide__ = True
        layout = layout_of_args(opened, len(args))
        given = layout.read(_opened_tree(layout, tangents), "The tangents")
        positions = [i for i, t in given.items() if t is not None]
        for i in positions:
            if not is_inexact(opened.arrays[i]):
                raise StructureError(
                    "`filter_jvp`: the tangent of "
                    f"{eqx.tree_pformat(opened.arrays[i])} must be `None`: only "
                    "floating-point and complex numbers are differentiated."
                )

        def differentiated(arrays: list[Any]) -> tuple[list[Any], Outcome]:
            __tracebackhide__ = True
            everything = replaced(opened.arrays, positions, arrays)
            outcome = opened.run("filter_jvp", everything)
            result = result_of(opened, outcome, everything)
            moved = [
                i
                for i, x in enumerate(result.arrays)
                if _trace.has_tangent(x) and is_inexact(x)
            ]
            found.update(layout=result.layout, moved=moved)
            return [result.arrays[i] for i in moved], outcome

        primals_in = [opened.arrays[i] for i in positions]
        tangents_in = [given[i] for i in positions]
        _, out, outcome = jax.jvp(
            differentiated, (primals_in,), (tangents_in,), has_aux=True
        )
        found["tangents"] = dict(zip(found["moved"], out))
        return outcome

    out = call(fn, args, kwargs, stripped(transform))
    return out, found["layout"].fill(Sparse(found["tangents"]))


def _traced_where_differentiated(primal: Any, tangent: Any) -> Any:
    """Numbers of Python that have a tangent, as arrays."""
    if isinstance(primal, float | complex) and tangent is not None:
        return jnp.asarray(primal)
    leaves, treedef = jtu.tree_flatten(primal)
    if tangent is None or not any(isinstance(x, float | complex) for x in leaves):
        return primal
    try:
        given = treedef.flatten_up_to(tangent)
    except (ValueError, TypeError):
        return primal  # the layout says what is wrong
    return jtu.tree_unflatten(
        treedef,
        [
            jnp.asarray(x) if isinstance(x, float | complex) and t is not None else x
            for x, t in zip(leaves, given)
        ],
    )


def _opened_tree(layout: Layout, trees: Sequence) -> tuple:
    """One tree for each argument; `None` in place of a whole one is `None` everywhere."""
    children = layout.treedef.children()
    return tuple(
        jtu.tree_unflatten(child, [None] * child.num_leaves) if tree is None else tree
        for child, tree in zip(children, trees)
    )


class _Differentiated:
    """A call as a function of the arrays that are differentiated, of the arrays of its
    result that have a derivative. All else is auxiliary."""

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
        self.layout = layout
        self.has_aux = has_aux
        self.positions = differentiable(opened, layout, tree, wrt)
        self.out_layout: Layout = layout
        self.out_positions: list[int] = []

    def inputs(self) -> list[Any]:
        return [self.opened.arrays[i] for i in self.positions]

    def __call__(self, arrays: list[Any]) -> tuple[list[Any], Outcome]:
        __tracebackhide__ = True
        everything = replaced(self.opened.arrays, self.positions, arrays)
        outcome = self.opened.run(self.name, everything)
        result: Result = result_of(self.opened, outcome, everything)
        layout = result.layout
        self.out_layout = layout.first_of_pair(self.name) if self.has_aux else layout
        self.out_positions = [
            i for i in self.out_layout.positions() if is_inexact(result.arrays[i])
        ]
        return [result.arrays[i] for i in self.out_positions], outcome

    def fill_in(self, values: Sequence[Any]) -> Any:
        return self.layout.fill(Sparse(zip(self.positions, values)))

    def fill_out(self, values: Sequence[Any]) -> Any:
        return self.out_layout.fill(Sparse(zip(self.out_positions, values)))


class _Transpose(eqx.Module):
    """What `filter_vjp` returns: from cotangents of the result to those of the primals."""

    pullback: Any
    in_layout: Layout = eqx.field(static=True)
    in_positions: tuple[int, ...] = eqx.field(static=True)
    out_layout: Layout = eqx.field(static=True)
    out_positions: tuple[int, ...] = eqx.field(static=True)
    out_types: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)

    def __call__(self, cotangents: Any, /) -> tuple:
        __tracebackhide__ = True
        given = self.out_layout.read(cotangents, "The cotangents")
        filled = _zeros_for_none(given, self.out_positions, self.out_types)
        (result,) = self.pullback(filled)
        return self.in_layout.fill(Sparse(zip(self.in_positions, result)))


class _Linear(eqx.Module):
    """What `filter_linearize` returns: from tangents of the primals to those of the result."""

    pushforward: Any
    in_layout: Layout = eqx.field(static=True)
    in_positions: tuple[int, ...] = eqx.field(static=True)
    in_types: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    out_layout: Layout = eqx.field(static=True)
    out_positions: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, /, *tangents: Any) -> Any:
        __tracebackhide__ = True
        n = len(self.in_layout.treedef.children())
        if len(tangents) != n:
            raise StructureError(
                f"The linear function of `filter_linearize` takes {n} tangents, one for "
                f"each primal, and was given {len(tangents)}. Pass `None` for zero."
            )
        given = self.in_layout.read(
            _opened_tree(self.in_layout, tangents), "The tangents"
        )
        filled = _zeros_for_none(given, self.in_positions, self.in_types)
        result = self.pushforward(filled)
        return self.out_layout.fill(Sparse(zip(self.out_positions, result)))


def _zeros_for_none(
    given: dict[int, Any], positions: Sequence[int], types: Sequence[Any]
) -> list[Any]:
    __tracebackhide__ = True
    for i, x in given.items():
        if x is not None and i not in positions:
            raise StructureError(
                f"There is a tangent or cotangent, {eqx.tree_pformat(x)}, for something "
                "that is not differentiated. Put `None` there."
            )
    return [
        jnp.zeros(t.shape, t.dtype) if given[i] is None else given[i]
        for i, t in zip(positions, types)
    ]


def _types(arrays: Sequence[Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in arrays)


def filter_vjp(
    fun: Callable[..., Any], *primals: Any, has_aux: bool = False, wrt: Any = None
) -> Any:
    """As `equinox.filter_vjp`, by reference. The function runs once, and what it writes to a
    ref is written to the caller's ref, once: at this call. The function that is returned
    may be called later, and often; it reads and writes no ref.

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
        differentiated, in refs and beside them.
    - `has_aux`: whether `fun` returns a pair `(out, aux)`, of which `out` is
        differentiated.
    - `wrt`: any filter, which narrows what is differentiated. The paths of a path filter
        begin with the number of the argument.

    **Returns:**

    `(out, vjp_fn)`, or `(out, vjp_fn, aux)`. `vjp_fn` takes a cotangent of the structure of
    `rx.deref(out)`, with `None` for zero and for what has no derivative. It returns a tuple
    of the structure of `rx.deref(primals)`, with `None` for what is not differentiated. It
    is a pytree, whose leaves are the residuals.

    **Raises:**

    - `StructureError`: if `wrt` selects a ref at one of its places and not at another; and
        by `vjp_fn`, if the cotangent has another structure.
    """
    __tracebackhide__ = True
    found: dict[str, Any] = {}

    def transform(opened: Opened) -> Outcome:
        __tracebackhide__ = True
        layout = layout_of_args(opened, len(primals))
        diff = _Differentiated("filter_vjp", opened, layout, primals, wrt, has_aux)
        out, pullback, outcome = jax.vjp(diff, diff.inputs(), has_aux=True)
        found["vjp"] = _Transpose(
            pullback,
            layout,
            tuple(diff.positions),
            diff.out_layout,
            tuple(diff.out_positions),
            _types(out),
        )
        return outcome

    result = call(fun, primals, {}, stripped(transform))
    if has_aux:
        out, aux = result
        return out, found["vjp"], aux
    return result, found["vjp"]


def filter_linearize(
    fun: Callable[..., Any], *primals: Any, has_aux: bool = False, wrt: Any = None
) -> Any:
    """As `jax.linearize`, for any pytrees and by reference. The function runs once, and what
    it writes to a ref is written to the caller's ref, once: at this call.

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
    [`refx_eqx.filter_jvp`][] does, and returns the tangent of `out`: of the structure of
    `rx.deref(out)`, with `None` for what has no derivative. It is a pytree.

    **Raises:**

    As [`refx_eqx.filter_vjp`][].
    """
    __tracebackhide__ = True
    found: dict[str, Any] = {}

    def transform(opened: Opened) -> Outcome:
        __tracebackhide__ = True
        layout = layout_of_args(opened, len(primals))
        diff = _Differentiated(
            "filter_linearize", opened, layout, primals, wrt, has_aux
        )
        inputs = diff.inputs()
        _, pushforward, outcome = jax.linearize(diff, inputs, has_aux=True)
        found["jvp"] = _Linear(
            pushforward,
            layout,
            tuple(diff.positions),
            _types(inputs),
            diff.out_layout,
            tuple(diff.out_positions),
        )
        return outcome

    result = call(fun, primals, {}, stripped(transform))
    if has_aux:
        out, aux = result
        return out, found["jvp"], aux
    return result, found["jvp"]


class _Matrix(Lifted):
    """The derivative of every array of the result by every array of the first argument."""

    # How many times the derivative is taken: how deep the trees are nested.
    order = 1

    def __init__(self, fn: Any, *, has_aux: bool, wrt: Any, holomorphic: bool):
        super().__init__(fn, has_aux=has_aux, wrt=wrt, holomorphic=holomorphic)

    def _jacobian(self, fn: Callable) -> Callable:
        raise NotImplementedError

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        name, has_aux = self.transform_name, self.options["has_aux"]
        first = first_of(args, name)
        found: dict[str, Any] = {}

        def transform(opened: Opened) -> Outcome:
            __tracebackhide__ = True
            wrt = self.options["wrt"]
            layout = layout_of_first(opened)
            diff = _Differentiated(name, opened, layout, first, wrt, has_aux)
            if not diff.positions:
                raise nothing_to_differentiate(name, self.__wrapped__, wrt)
            rows, outcome = self._jacobian(diff)(diff.inputs())
            found["matrix"] = diff.fill_out(
                [_fill_columns(diff, row, self.order) for row in rows]
            )
            return outcome

        out = call(self.__wrapped__, args, kwargs, stripped(transform))
        return (found["matrix"], out[1]) if has_aux else found["matrix"]


def _fill_columns(diff: _Differentiated, row: Any, order: int) -> Any:
    if order == 0:
        return row
    return diff.fill_in([_fill_columns(diff, x, order - 1) for x in row])


class _JacFwd(_Matrix):
    transform_name = "filter_jacfwd"

    def _jacobian(self, fn: Callable) -> Callable:
        holomorphic = self.options["holomorphic"]
        return jax.jacfwd(fn, has_aux=True, holomorphic=holomorphic)


class _JacRev(_Matrix):
    transform_name = "filter_jacrev"

    def _jacobian(self, fn: Callable) -> Callable:
        holomorphic = self.options["holomorphic"]
        return jax.jacrev(fn, has_aux=True, holomorphic=holomorphic)


class _Hessian(_Matrix):
    transform_name = "filter_hessian"
    order = 2

    def _jacobian(self, fn: Callable) -> Callable:
        holomorphic = self.options["holomorphic"]
        once = jax.jacrev(fn, has_aux=True, holomorphic=holomorphic)
        return jax.jacfwd(once, has_aux=True, holomorphic=holomorphic)


def filter_jacfwd(
    fun: Callable[..., Any],
    has_aux: bool = False,
    *,
    wrt: Any = None,
    holomorphic: bool = False,
) -> Any:
    """As `equinox.filter_jacfwd`, by reference: the Jacobian, by forward-mode
    differentiation of all directions at once.

    The function runs once, whatever the number of directions: a counter that it adds one to
    is one more after the call. What it writes to a ref is written to the caller's ref.

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

    - `fun`: the function to differentiate by its first argument.
    - `has_aux`: whether `fun` returns a pair `(out, aux)`, of which `out` is
        differentiated.
    - `wrt`: any filter, which narrows what is differentiated.
    - `holomorphic`: as in `jax.jacfwd`; needed for complex arrays.

    **Returns:**

    A function with the arguments of `fun`, which returns the Jacobian, or `(jacobian,
    aux)`. In place of each floating-point array of `rx.deref(out)` it has a tree of the
    structure of `rx.deref(first_argument)`, with `None` for what is not differentiated. What
    else there is in the result has `None`.

    **Raises:**

    When called:

    - `StructureError`: if there is nothing to differentiate, or if `wrt` selects a ref at
        one of its places and not at another.
    """
    return _JacFwd(fun, has_aux=has_aux, wrt=wrt, holomorphic=holomorphic)


def filter_jacrev(
    fun: Callable[..., Any],
    has_aux: bool = False,
    *,
    wrt: Any = None,
    holomorphic: bool = False,
) -> Any:
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
    return _JacRev(fun, has_aux=has_aux, wrt=wrt, holomorphic=holomorphic)


def filter_hessian(
    fun: Callable[..., Any],
    has_aux: bool = False,
    *,
    wrt: Any = None,
    holomorphic: bool = False,
) -> Any:
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
    a tree of the structure of the Jacobian, with such a tree again for each of its arrays.
    """
    return _Hessian(fun, has_aux=has_aux, wrt=wrt, holomorphic=holomorphic)
