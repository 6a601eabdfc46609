"""`filter_grad` and `filter_value_and_grad`."""

from collections.abc import Callable, Hashable
from typing import Any, Concatenate, Literal, overload, ParamSpec, TypeVar

import equinox as eqx
import jax

from .._calls._call import Call, call
from .._calls._structure import Leaves, Outcome, values_of
from .._core._nodes import is_node
from .._engine._autodiff import (
    differentiable,
    first_of,
    first_of_pair,
    nothing_to_differentiate,
)
from .._engine._backward import (
    BackwardWrite,
    check_mutable,
    new_channels,
    with_backward_writes,
    with_channels,
    with_channels_ended,
    with_outer_channels,
    without_channels,
)
from .._engine._wrapper import Lifted
from .._filters._filters import as_option, FilterLike


P = ParamSpec("P")
T = TypeVar("T")
Tree = TypeVar("Tree", bound=Any)
Aux = TypeVar("Aux")


class _ValueAndGrad(Lifted):
    transform_name = "filter_value_and_grad"

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        name, options = self.transform_name, self.options
        first = first_of(args, name)
        found: dict[str, Any] = {}

        def transform(derefed: Call) -> Outcome:
            wrt = options["wrt"]
            derefed, outer = without_channels(derefed)
            diff, rest = differentiable(derefed, (first,), wrt, by_first=True)
            if not jax.tree.leaves(diff):
                raise nothing_to_differentiate(name, self.__wrapped__, wrt)
            # The collections in which a backward rule writes a ref: tracing finds them.
            collections: list[Hashable] = []
            # Each retry adds one, because the rules are traced one after the other, so this
            # ends.
            while True:
                try:
                    outcome, grads = self._differentiate(
                        derefed, diff, rest, collections
                    )
                    break
                except BackwardWrite as e:
                    if e.collection in collections:
                        check_mutable(derefed, e)
                        raise
                    collections.append(e.collection)
            found["grads"] = derefed.tree(0, grads[0])
            return with_outer_channels(outcome, outer)

        out = call(self.__wrapped__, args, kwargs, transform)
        return self._result(out, found["grads"])

    def _differentiate(
        self,
        derefed: Call,
        diff: list[Leaves],
        rest: list[Leaves],
        collections: list[Hashable],
    ) -> tuple[Outcome, list[Leaves]]:
        """The outcome and the gradients, with channels for the refs of `collections`."""
        name, options = self.transform_name, self.options
        found: dict[str, Any] = {}

        # Writes to refs are auxiliary outputs: they come out once, and have no derivative.
        def differentiated(
            diff: list[Leaves], channels: dict[int, Any]
        ) -> tuple[Any, Outcome]:
            arrays = [*eqx.combine(diff, rest), *derefed.arrays[1:]]
            outcome = derefed.run(name, with_channels(arrays, channels))
            value = _differentiated_value(outcome, options["has_aux"], name)
            value, outcome, found["seeds"] = with_channels_ended(
                value, outcome, channels
            )
            return value, outcome

        # Also with respect to the channels: a write in a backward rule arrives as the gradient
        # of the channel of its ref. See `_engine/_backward.py`.
        value_and_grad = jax.value_and_grad(
            differentiated, argnums=(0, 1), has_aux=True, **options["gradkwargs"]
        )
        channels = new_channels(derefed, collections)
        (_, outcome), (grads, ends) = value_and_grad(diff, channels)
        before = values_of(derefed.arrays)
        return with_backward_writes(outcome, ends, found["seeds"], before), grads

    def _result(self, out: Any, grads: Any) -> Any:
        return out, grads


class _Grad(_ValueAndGrad):
    transform_name = "filter_grad"

    def _result(self, out: Any, grads: Any) -> Any:
        return (grads, out[1]) if self.options["has_aux"] else grads


def _differentiated_value(outcome: Outcome, has_aux: bool, name: str) -> Any:
    """The value to differentiate, from the result of a body."""
    structure = outcome.info.result
    (part,), (statics,), out = structure.parts, structure.statics, outcome.out
    if has_aux:
        _, statics = first_of_pair(part, statics, name)
        part, out = first_of_pair(part, out, name)
    if len(out) == 1 and not is_node(out[0]):
        # A Python scalar is a constant, whose gradient is zero everywhere.
        value = statics[0] if out[0] is None else out[0]
        if eqx.is_array_like(value):
            return value
    if len(out) == 1 and is_node(out[0]):
        raise TypeError(
            f"`{name}`: the function must return a scalar to differentiate, but returned a "
            "ref. Return its value: `ref.value`."
        )
    raise TypeError(
        f"`{name}`: the function must return one scalar to differentiate"
        + (
            ", with everything else as aux."
            if has_aux
            else ". For more, use has_aux=True."
        )
    )


@overload
def filter_value_and_grad(
    fun: Callable[Concatenate[Tree, P], T],
    *,
    wrt: FilterLike | None = None,
    has_aux: bool = False,
    **gradkwargs: Any,
) -> Callable[Concatenate[Tree, P], tuple[T, Tree]]: ...


@overload
def filter_value_and_grad(
    *, wrt: FilterLike | None = None, has_aux: bool = False, **gradkwargs: Any
) -> Callable[
    [Callable[Concatenate[Tree, P], T]],
    Callable[Concatenate[Tree, P], tuple[T, Tree]],
]: ...


def filter_value_and_grad(
    fun: Callable[..., Any] | None = None,
    *,
    wrt: FilterLike | None = None,
    has_aux: bool = False,
    **gradkwargs: Any,
) -> Callable[..., Any]:
    """As `equinox.filter_value_and_grad`, by reference.

    Differentiates the floating-point and complex arrays of the first argument, both inside
    and outside refs. What the function writes to a ref is written to the caller's ref.

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

    - `fun`: the function to differentiate. It returns a real scalar, or a pair `(scalar,
        aux)` if `has_aux` is set.
    - `wrt`: any filter, which narrows what is differentiated. Without it, batch statistics
        and the like are differentiated too, and an optimizer step with these gradients
        changes them: say what to train, such as `wrt="params"`.
    - `has_aux`: whether `fun` returns `(value, aux)`.
    - `**gradkwargs`: passed on to `jax.value_and_grad`, such as `holomorphic`.

    **Returns:**

    A function with the arguments of `fun`, which returns `(value, grads)`, or `((value,
    aux), grads)`. `grads` has the structure of `rx.deref(first_argument)`, with `None` for
    anything that is not differentiated. A ref that occurs at several places has one
    gradient: the sum.

    **Raises:**

    When called:

    - `StructureError`: if there is nothing to differentiate, or if `wrt` selects a ref at
        one of its places and not at another.
    """
    return _lift_grad(_ValueAndGrad, fun, wrt, has_aux, gradkwargs)


@overload
def filter_grad(
    fun: Callable[Concatenate[Tree, P], Any],
    *,
    wrt: FilterLike | None = None,
    has_aux: Literal[False] = False,
    **gradkwargs: Any,
) -> Callable[Concatenate[Tree, P], Tree]: ...


@overload
def filter_grad(
    fun: Callable[Concatenate[Tree, P], tuple[Any, Aux]],
    *,
    wrt: FilterLike | None = None,
    has_aux: Literal[True],
    **gradkwargs: Any,
) -> Callable[Concatenate[Tree, P], tuple[Tree, Aux]]: ...


@overload
def filter_grad(
    *, wrt: FilterLike | None = None, has_aux: Literal[False] = False, **gradkwargs: Any
) -> Callable[
    [Callable[Concatenate[Tree, P], Any]], Callable[Concatenate[Tree, P], Tree]
]: ...


@overload
def filter_grad(
    *, wrt: FilterLike | None = None, has_aux: Literal[True], **gradkwargs: Any
) -> Callable[
    [Callable[Concatenate[Tree, P], tuple[Any, Aux]]],
    Callable[Concatenate[Tree, P], tuple[Tree, Aux]],
]: ...


def filter_grad(
    fun: Callable[..., Any] | None = None,
    *,
    wrt: FilterLike | None = None,
    has_aux: bool = False,
    **gradkwargs: Any,
) -> Callable[..., Any]:
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


def _lift_grad(
    cls: type[Lifted], fun: Any, wrt: Any, has_aux: bool, kwargs: dict
) -> Any:
    if "argnums" in kwargs:
        raise ValueError(
            "`argnums` is not supported: the first argument is differentiated. To "
            "differentiate several, pass them as a tuple."
        )
    return cls.of(fun, wrt=as_option(wrt), has_aux=has_aux, gradkwargs=kwargs)
