"""`filter_checkpoint`."""

from collections.abc import Callable
from typing import Any, overload, ParamSpec, TypeVar

import jax

from .._calls._call import Call, call
from .._calls._structure import Leaves, Outcome
from .._core._errors import name_of
from .._engine._program import Program, program_of
from .._engine._wrapper import Lifted


P = ParamSpec("P")
T = TypeVar("T")


class _Checkpoint(Lifted):
    transform_name = "filter_checkpoint"

    def __init__(self, fn: Any, *, prevent_cse: bool, policy: Any):
        super().__init__(fn, prevent_cse=prevent_cse, policy=policy)

        def body(derefed: Call, arrays: list[Leaves]) -> Outcome:

            # A new function per trace, because `jax.checkpoint` caches by function.
            def checkpointed(arrays: list[Leaves]) -> Outcome:
                return derefed.run("filter_checkpoint", arrays, transparent=False)

            # The recomputation runs the recorded operations, without the refs: writes are
            # among the results, and come out once.
            transformed = jax.checkpoint(
                checkpointed, prevent_cse=prevent_cse, policy=policy
            )
            return transformed(arrays)

        self._program = program_of(
            (fn,),
            ("filter_checkpoint", prevent_cse, policy),
            lambda: Program(name_of(fn), body, as_a_whole=False),
        )

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return call(self.__wrapped__, args, kwargs, self._program)


@overload
def filter_checkpoint(
    fun: Callable[P, T],
    *,
    prevent_cse: bool = True,
    policy: Callable[..., bool] | None = None,
) -> Callable[P, T]: ...


@overload
def filter_checkpoint(
    *, prevent_cse: bool = True, policy: Callable[..., bool] | None = None
) -> Callable[[Callable[P, T]], Callable[P, T]]: ...


def filter_checkpoint(
    fun: Callable[..., Any] | None = None,
    *,
    prevent_cse: bool = True,
    policy: Callable[..., bool] | None = None,
) -> Callable[..., Any]:
    """As `equinox.filter_checkpoint`, by reference: intermediate values are recomputed in
    the backward pass instead of being stored.

    Values, gradients and writes to refs are exactly those of the function itself. The
    recomputation starts from the values the refs had at the call, and does not write them
    again.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        @rx.filter_checkpoint(policy=jax.checkpoint_policies.dots_saveable)
        def layer(model, x):
            model["uses"].value += 1
            return jnp.sin(model["w"].value * x)

        model = {"w": rx.Ref(jnp.array(0.0), "params"), "uses": rx.Ref(jnp.array(0))}
        grads = rx.filter_grad(layer)(model, jnp.array(3.0))
        assert grads["w"].value == 3.0 and model["uses"].value == 1
        ```

    A second call with arguments of the same structure, sharing, shapes and dtypes does not
    trace again.

    **Arguments:**

    - `fun`: the function to checkpoint. It is staged, as under `filter_jit`: Python control
        flow cannot depend on the values of its arrays.
    - `prevent_cse`: as in `jax.checkpoint`: whether to stop the compiler from merging the
        recomputation with the original computation.
    - `policy`: which intermediate values to store anyway: one of `jax.checkpoint_policies`.

    **Returns:**

    A function with the signature of `fun`.

    **Raises:**

    When called:

    - `TraceLevelError`: if the function touches a ref that it reaches through a global name.
    - `StructureError`: if it changes a list, a dict or a closure variable of its inputs in
        place.
    """
    return _Checkpoint.of(fun, prevent_cse=prevent_cse, policy=policy)
