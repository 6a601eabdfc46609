"""`filter_grad` and `filter_value_and_grad`."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, Literal, overload, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu

from .. import _trace
from .._deref import deref
from .._errors import StructureError
from .._filters import choose, leaves_with_paths
from .._functionalize import call, DYNAMIC, Lifted, name_of, Opened, Outcome
from .._ref import Index, is_opened, Ref, Value


_trace.register_exclusion(__file__)

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Tree = TypeVar("_Tree", bound=Any)
_Aux = TypeVar("_Aux")


class Differentiated:
    """Which arrays of a call are differentiated: the inexact ones of its first argument.

    - `positions`: where they are among the flat arrays of the call;
    - `rebuild`: from one result for each, the tree of the derefed first argument.
    """

    def __init__(self, opened: Opened, first: Any, wrt: Any):
        pairs, self._treedef = leaves_with_paths(first)
        leaves = [leaf for _, leaf in pairs]
        wanted = [0] * len(leaves)
        if wrt is not None:
            wanted = choose([path for path, _ in pairs], leaves, (wrt,))
        numbers = {id(ref): i for i, ref in enumerate(opened.refs)}
        # The bare arrays of the callable come first, then those of the first argument.
        n_before = opened.structure.codes[: opened.structure.sizes[0]].count(DYNAMIC)
        self._nodes, _ = jtu.tree_flatten(deref(first), is_leaf=is_opened)
        self._places: list[Any] = []
        self.positions: list[int] = []
        for leaf, node, answer in zip(leaves, self._nodes, wanted):
            if isinstance(leaf, Ref):
                start, stop = opened.spans[numbers[id(leaf)]]
                if isinstance(node, Index):
                    start = stop
            elif eqx.is_array(leaf):
                start, stop = n_before, n_before + 1
                n_before += 1
            else:
                start = stop = 0
            places = []
            for position in range(start, stop):
                if answer == 0 and eqx.is_inexact_array(opened.arrays[position]):
                    places.append(len(self.positions))
                    self.positions.append(position)
                else:
                    places.append(None)
            self._places.append(places)

    def apart(self, arrays: list[Any]) -> list[Any]:
        return [arrays[i] for i in self.positions]

    def together(self, arrays: list[Any], diff: list[Any]) -> list[Any]:
        arrays = list(arrays)
        for i, x in zip(self.positions, diff):
            arrays[i] = x
        return arrays

    def rebuild(self, results: list[Any]) -> Any:
        leaves = []
        for node, places in zip(self._nodes, self._places):
            found = iter([None if i is None else results[i] for i in places])
            if isinstance(node, Index):
                leaves.append(node)
            elif isinstance(node, Value):
                # The leaves of the value that were not traced have no gradient either.
                value = jtu.tree_map(
                    lambda x: next(found) if eqx.is_array_like(x) else None, node.value
                )
                leaves.append(
                    Value(value, node.index, node.collection, node.ref_type, node.note)
                )
            else:
                leaves.append(next(found, None))
        return jtu.tree_unflatten(self._treedef, leaves)


def require_first(args: tuple, name: str) -> Any:
    if not args:
        raise TypeError(
            f"`{name}` differentiates the first argument, which must be passed by "
            "position: none was given."
        )
    return args[0]


class _ValueAndGrad(Lifted):
    transform_name = "filter_value_and_grad"

    def __init__(self, fn: Any, *, wrt: Any, has_aux: bool, gradkwargs: dict):
        super().__init__(fn, wrt=wrt, has_aux=has_aux, gradkwargs=gradkwargs)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        name, options = self.transform_name, self.options
        first = require_first(args, name)
        found: dict[str, Any] = {}

        def transform(opened: Opened) -> Outcome:
            __tracebackhide__ = True
            diff = Differentiated(opened, first, options["wrt"])
            if not diff.positions:
                raise StructureError(
                    f"`{name}` found nothing to differentiate in the first argument of "
                    f"`{name_of(self.__wrapped__)}`"
                    + ("" if options["wrt"] is None else f" for wrt={options['wrt']!r}")
                    + ": it differentiates floating-point and complex arrays, in refs and "
                    "beside them. Pass what is to be differentiated first; a filter that "
                    "is a predicate is called with the ref, not with its value."
                )

            def differentiated(arrays: list[Any]) -> tuple[Any, Outcome]:
                __tracebackhide__ = True
                outcome = opened.run(name, diff.together(opened.arrays, arrays))
                return _scalar(outcome, options["has_aux"], name), outcome

            value_and_grad = jax.value_and_grad(
                differentiated, has_aux=True, **options["gradkwargs"]
            )
            (_, outcome), grads = value_and_grad(diff.apart(opened.arrays))
            found["grads"] = diff.rebuild(grads)
            return outcome

        out = call(self.__wrapped__, args, kwargs, transform)
        return self._result(out, found["grads"])

    def _result(self, out: Any, grads: Any) -> Any:
        return out, grads


class _Grad(_ValueAndGrad):
    transform_name = "filter_grad"

    def _result(self, out: Any, grads: Any) -> Any:
        return (grads, out[1]) if self.options["has_aux"] else grads


def _scalar(outcome: Outcome, has_aux: bool, name: str) -> Any:
    """The value to differentiate, in the result of a body."""
    result = outcome.info.result
    (part,) = result.parts
    codes = result.codes
    if has_aux:
        children = part.treedef.children()
        is_pair = part.treedef.node_data() and part.treedef.node_data()[0] is tuple
        if not is_pair or len(children) != 2:
            raise TypeError(
                f"`{name}(..., has_aux=True)`: the function must return a pair "
                "`(value, aux)`."
            )
        codes = codes[: children[0].num_leaves]
    if len(codes) != 1 or codes[0] != DYNAMIC:
        if len(codes) == 1 and codes[0] < DYNAMIC:
            # A Python scalar: a constant, whose gradient is zero everywhere.
            value = result.statics[0].obj
            if eqx.is_array_like(value):
                return value
        raise TypeError(
            f"`{name}`: the function must return one scalar to differentiate"
            + (", and the rest as aux." if has_aux else ". For more, use has_aux=True.")
        )
    return outcome.out[0]


@overload
def filter_value_and_grad(
    *, wrt: Any = None, has_aux: bool = False, **gradkwargs: Any
) -> Callable[
    [Callable[Concatenate[_Tree, _P], _T]],
    Callable[Concatenate[_Tree, _P], tuple[_T, _Tree]],
]: ...


@overload
def filter_value_and_grad(
    fun: Callable[Concatenate[_Tree, _P], _T],
    *,
    wrt: Any = None,
    has_aux: bool = False,
    **gradkwargs: Any,
) -> Callable[Concatenate[_Tree, _P], tuple[_T, _Tree]]: ...


def filter_value_and_grad(
    fun: Any = None, *, wrt: Any = None, has_aux: bool = False, **gradkwargs: Any
) -> Any:
    """As `equinox.filter_value_and_grad`, by reference.

    Differentiates the floating-point and complex arrays of the first argument, in refs and
    beside them. What the function writes to a ref is written to the caller's ref.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        def loss(model, x):
            return jnp.sum(model["w"].value * x) ** 2

        model = {"w": rx.Ref(jnp.array(2.0), "params"), "n": rx.Ref(jnp.array(0))}
        value, grads = rx.filter_value_and_grad(loss)(model, jnp.array(3.0))
        assert value == 36.0
        assert grads["w"].value == 36.0 and grads["n"].value is None
        ```

    **Arguments:**

    - `fun`: the function to differentiate. It returns a real scalar, or a pair of one and
        anything if `has_aux` is set.
    - `wrt`: any filter, which narrows what is differentiated.
    - `has_aux`: whether `fun` returns `(value, aux)`.
    - `**gradkwargs`: passed on to `jax.value_and_grad`, such as `holomorphic`.

    **Returns:**

    A function with the arguments of `fun`, which returns `(value, grads)`, or `((value,
    aux), grads)`. `grads` has the structure of `rx.deref(first_argument)`, with `None` for
    what is not differentiated. A ref that is at several places has one gradient: the sum.

    **Raises:**

    When called:

    - `StructureError`: if there is nothing to differentiate, or if `wrt` selects a ref at
        one of its places and not at another.
    """
    return _lift_grad(_ValueAndGrad, fun, wrt, has_aux, gradkwargs)


@overload
def filter_grad(
    *, wrt: Any = None, has_aux: Literal[False] = False, **gradkwargs: Any
) -> Callable[
    [Callable[Concatenate[_Tree, _P], Any]], Callable[Concatenate[_Tree, _P], _Tree]
]: ...


@overload
def filter_grad(
    *, wrt: Any = None, has_aux: Literal[True], **gradkwargs: Any
) -> Callable[
    [Callable[Concatenate[_Tree, _P], tuple[Any, _Aux]]],
    Callable[Concatenate[_Tree, _P], tuple[_Tree, _Aux]],
]: ...


@overload
def filter_grad(
    fun: Callable[Concatenate[_Tree, _P], Any],
    *,
    wrt: Any = None,
    has_aux: Literal[False] = False,
    **gradkwargs: Any,
) -> Callable[Concatenate[_Tree, _P], _Tree]: ...


@overload
def filter_grad(
    fun: Callable[Concatenate[_Tree, _P], tuple[Any, _Aux]],
    *,
    wrt: Any = None,
    has_aux: Literal[True],
    **gradkwargs: Any,
) -> Callable[Concatenate[_Tree, _P], tuple[_Tree, _Aux]]: ...


def filter_grad(
    fun: Any = None, *, wrt: Any = None, has_aux: bool = False, **gradkwargs: Any
) -> Any:
    """As `equinox.filter_grad`, by reference.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        w = rx.Ref(jnp.array(2.0), "params")
        calls = rx.Ref(jnp.array(0), "counts")

        @rx.filter_grad
        def loss(model):
            model["calls"].value += 1
            return model["encoder"].value * model["decoder"].value

        grads = loss({"encoder": w, "decoder": w, "calls": calls})
        assert grads["decoder"].value == 4.0  # one ref, one gradient
        assert calls.value == 1
        ```

    **Arguments:**

    - `fun`, `wrt`, `has_aux`, `**gradkwargs`: as for
        [`refx_eqx.filter_value_and_grad`][].

    **Returns:**

    A function with the arguments of `fun`, which returns `grads`, or `(grads, aux)`.

    **Raises:**

    As [`refx_eqx.filter_value_and_grad`][].
    """
    return _lift_grad(_Grad, fun, wrt, has_aux, gradkwargs)


def _lift_grad(cls: Callable, fun: Any, wrt: Any, has_aux: bool, kwargs: dict) -> Any:
    if "argnums" in kwargs:
        raise ValueError(
            "`argnums` is not taken: the first argument is differentiated. To "
            "differentiate several, pass them as a tuple."
        )
    if fun is None:
        return functools.partial(
            _lift_grad, cls, wrt=wrt, has_aux=has_aux, kwargs=kwargs
        )
    return cls(fun, wrt=wrt, has_aux=has_aux, gradkwargs=kwargs)
