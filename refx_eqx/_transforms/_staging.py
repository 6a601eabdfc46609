"""`filter_make_jaxpr` and `filter_closure_convert`: functions as jaxprs."""

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._calls._call import Call, call
from .._calls._structure import arrays_of, Key, Leaves, Outcome, OutcomeInfo, tree_of
from .._core import _jax
from .._core._deref import deref
from .._core._errors import MismatchError, name_of
from .._core._jax import ClosedJaxpr
from .._core._nodes import is_node
from .._engine._autodiff import arrays_of_result, derefed_result
from .._engine._wrapper import Lifted
from .._trees._closure import Part


P = ParamSpec("P")
T = TypeVar("T")


class _MakeJaxpr(Lifted):
    transform_name = "filter_make_jaxpr"

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        derefed = Call(self.__wrapped__, args, kwargs)
        found: dict[str, Any] = {}

        def run(given: list[Leaves]) -> tuple[Leaves, dict[int, Any]]:
            *of_args, in_refs = given
            of_fn = [x if is_node(x) else y for x, y in zip(in_refs, of_function)]
            arrays = [*of_args, of_fn]
            outcome = derefed.run("filter_make_jaxpr", arrays, transparent=False)
            result = arrays_of_result(derefed.structure, outcome, arrays)
            found["part"], leaves = result
            found["statics"] = _statics(outcome)
            return leaves, outcome.updates

        # Arrays that the function holds outside refs are constants of the program.
        *of_arguments, of_function = derefed.arrays
        given = [*of_arguments, [x if is_node(x) else None for x in of_function]]
        jaxpr, (types, _) = jax.make_jaxpr(run, return_shape=True)(given)
        return jaxpr, tree_of(found["part"], types), found["statics"]


def _statics(outcome: Outcome) -> Any:
    """The result with `None` for each array and ref."""
    (part,), (statics,) = outcome.info.result.parts, outcome.info.result.statics
    return tree_of(part, [None if is_node(x) else x for x in statics])


def filter_make_jaxpr(
    fun: Callable[..., Any],
) -> Callable[..., tuple[ClosedJaxpr, PyTree, PyTree]]:
    """As `equinox.filter_make_jaxpr`, by reference: the jaxpr of a function.

    Nothing is computed or written.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        def f(count, x):
            count.value += 1
            return x * 2

        count = rx.Ref(jnp.array(0))
        jaxpr, out_struct, _ = rx.filter_make_jaxpr(f)(count, jnp.ones(3))
        assert out_struct.shape == (3,)
        assert len(jaxpr.in_avals) == 2  # `count` and `x`
        assert len(jaxpr.out_avals) == 2  # the result, and the new value of `count`
        assert count.value == 0
        ```

    **Arguments:**

    - `fun`: the function. Its arguments and its result may be anything.

    **Returns:**

    A function with the arguments of `fun`, whose arrays may be `jax.ShapeDtypeStruct`s. It
    returns a triple:

    - a `ClosedJaxpr`. Its inputs are the leaves of `rx.deref` of the positional arguments,
        then the arrays of the keyword arguments and of the refs held only by the function.
        Its outputs are the leaves of `rx.deref(result)`, then the new values of the written
        refs, in the order in which the call first encounters them;
    - the derefed result, with `jax.ShapeDtypeStruct`s instead of arrays;
    - the non-array leaves of the result, with `None` elsewhere.

    **Raises:**

    When called:

    - `TraceLevelError`: if `fun` touches a ref that it reaches through a global name.
    """
    return _MakeJaxpr(fun)


class ClosureConverted(eqx.Module, Generic[P, T]):
    """What `filter_closure_convert` returns. A pytree of the arrays and refs that the
    function held, and of the tracers it closed over."""

    held: list[Any]
    consts: list[Any]
    jaxpr: Any = eqx.field(static=True)
    key: Key = eqx.field(static=True)
    types: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    info: OutcomeInfo = eqx.field(static=True)
    in_leaves: tuple[Any, ...] = eqx.field(static=True)
    in_treedef: Any = eqx.field(static=True)
    out_treedef: Any = eqx.field(static=True)
    out_part: Part = eqx.field(static=True)
    out_leaves: tuple[Any, ...] = eqx.field(static=True)
    name: str = eqx.field(static=True)

    @property
    def in_struct(self) -> Any:
        """The derefed arguments of the example, `(args, kwargs)`, with a
        `jax.ShapeDtypeStruct` for each array."""
        return jtu.tree_unflatten(self.in_treedef, self.in_leaves)

    @property
    def out_struct(self) -> Any:
        """The derefed result of a call, with a `jax.ShapeDtypeStruct` for each array."""
        return tree_of(self.out_part, list(self.out_leaves))

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> T:
        def transform(derefed: Call) -> Outcome:
            if (
                derefed.structure.key != self.key
                or _types_of_call(derefed) != self.types
            ):
                raise MismatchError(
                    f"`{self.name}` was closure-converted for arguments of another "
                    f"structure: it was called with {eqx.tree_pformat((args, kwargs))}. "
                    "Call it with arguments like the example arguments (same sharing of "
                    "refs, shapes, dtypes and static values), or convert it again."
                )
            if not self.info.asked.holds_for(derefed.refs):
                raise MismatchError(
                    f"`{self.name}` was closure-converted for other refs: it depends on "
                    "the identity of its refs (it looks them up in a set or dict, or "
                    "compares them), which is different here. Convert it again, with "
                    "these arguments."
                )
            arrays = jtu.tree_leaves(derefed.arrays)
            out = _jax.eval_jaxpr(self.jaxpr(self.consts), arrays)
            outs, updates = jtu.tree_unflatten(self.out_treedef, out)
            outcome = Outcome(outs, updates, self.info)
            return Outcome(*arrays_of(outcome), self.info)

        return call(self.held, args, kwargs, transform)


class _Jaxpr:
    """A jaxpr without its constants: equal only to itself."""

    # The constants are leaves instead, because a tracer in a static field would leak.

    __slots__ = ("jaxpr",)

    def __init__(self, jaxpr: Any):
        self.jaxpr = jaxpr

    def __call__(self, consts: list[Any]) -> Any:
        return ClosedJaxpr(self.jaxpr, consts)


def _types_of_call(derefed: Call) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jtu.tree_leaves(_types_of(derefed.arrays)))


def _types_of(arrays: Any) -> Any:
    types = jax.eval_shape(lambda x: x, arrays)
    return jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), types)


def filter_closure_convert(
    fn: Callable[P, T], *args: Any, **kwargs: Any
) -> ClosureConverted[P, T]:
    """As `equinox.filter_closure_convert`, by reference: returns a function that closes
    over nothing, and has what `fn` closed over as its leaves.

    These include the refs that `fn` holds or closes over: the returned function reads and
    writes the same refs as `fn`. The conversion itself writes nothing.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        count = rx.Ref(jnp.array(0))

        @jax.jit
        def f(x):
            y = 2 * x

            def g(n, a):
                n.value += 1
                return a + y

            inner = rx.Ref(jnp.array(0))
            converted = rx.filter_closure_convert(g, inner, x)
            assert converted.consts[0] is y
            return converted(inner, x) + inner.value

        assert f(jnp.array(3.0)) == 10.0
        ```

    **Arguments:**

    - `fn`: the function to convert. Called as `fn(*args, **kwargs)`.
    - `*args`, `**kwargs`: example arguments, which may hold `jax.ShapeDtypeStruct`s.

    **Returns:**

    A function with the arguments of `fn`, which must have the structure, shapes and dtypes
    of the example. It is a pytree, and has an `in_struct`, the derefed `(args, kwargs)` of
    the example, and an `out_struct`, the derefed result, both with `jax.ShapeDtypeStruct`s
    instead of arrays.

    **Raises:**

    - `StructureError`: from the returned function, if its arguments are not like the
        example.
    """
    derefed = Call(fn, args, kwargs)

    def run(arrays: list[Leaves]) -> tuple[Leaves, dict[int, Any], OutcomeInfo]:
        outcome = derefed.run("filter_closure_convert", arrays, transparent=False)
        return outcome.out, outcome.updates, outcome.info

    jaxpr, (out, updates, info) = jax.make_jaxpr(run, return_shape=True)(derefed.arrays)
    info.asked = derefed.identities()
    outcome = Outcome(out, updates, info)
    arrays = jax.eval_shape(lambda x: x, derefed.arrays)
    part, leaves = derefed_result(derefed.structure, outcome, arrays)
    given, statics = eqx.partition(deref((args, kwargs)), eqx.is_array)
    in_leaves, in_treedef = jtu.tree_flatten(eqx.combine(_types_of(given), statics))
    both = zip(derefed.leaves[-1], derefed.structure.statics[-1])
    held = [x for x, static in both if static is None or is_node(static)]
    return ClosureConverted(
        held,
        list(jaxpr.consts),
        _Jaxpr(jaxpr.jaxpr),
        Call(held, args, kwargs).structure.key,
        _types_of_call(derefed),
        info,
        tuple(in_leaves),
        in_treedef,
        jtu.tree_structure((out, updates)),
        part,
        tuple(leaves),
        name_of(fn),
    )
