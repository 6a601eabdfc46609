"""`filter_jit`: one compiled program per structure, called with flat arrays."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any, overload, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._calls._call import Call, call
from .._calls._structure import Leaves, Outcome
from .._core import _trace
from .._core._errors import MismatchError, name_of
from .._engine._donation import apart, call_into, Donate, Split
from .._engine._fast_path import Plans
from .._engine._flat import flat_of, flat_place, program_key
from .._engine._plan import NO_PLAN
from .._engine._program import Program, program_of, Variant
from .._engine._run_time_errors import explain
from .._engine._shardings import with_shardings
from .._engine._wrapper import Lifted


P = ParamSpec("P")
T = TypeVar("T")


def _run(derefed: Call, arrays: list[Leaves]) -> Outcome:
    return derefed.run("filter_jit", arrays, transparent=False)


class _Jit(Lifted):
    transform_name = "filter_jit"

    def __init__(
        self,
        fn: Any,
        *,
        donate: Donate,
        shardings: tuple[Any, Any],
        jitkwargs: dict[str, Any],
    ):
        super().__init__(fn, donate=donate, shardings=shardings, jitkwargs=jitkwargs)
        body = with_shardings(_run, *shardings)
        self._program = program_of(
            (fn,),
            ("filter_jit", donate, shardings, tuple(sorted(jitkwargs.items()))),
            lambda: Program(name_of(fn), body, donate, **jitkwargs),
        )
        self._plans = Plans(fn, self._program)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        out = self._plans.call(args, kwargs)
        if out is NO_PLAN:
            out = call(self.__wrapped__, *self._bind(args, kwargs), self._program)
        return out

    def _bind(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if kwargs and not args and self.options["donate"].endswith("-except-first"):
            # "First" is the first parameter, even if it is passed by name.
            bound = inspect.signature(self.__wrapped__).bind(*args, **kwargs)
            return bound.args, bound.kwargs
        return args, kwargs

    @_trace.tidying
    def lower(self, /, *args: Any, **kwargs: Any) -> "Lowered":
        """Traces and lowers the function for these arguments. No ref is written."""
        derefed = Call(self.__wrapped__, *self._bind(args, kwargs))
        variant, flat = self._program.variant(derefed)
        lowered, split = variant.lower(derefed, flat)
        types = list(map(_type_text, flat))
        return Lowered(self, lowered, variant, program_key(derefed), split, types)


@dataclasses.dataclass(eq=False, repr=False)
class Lowered:
    """A lowered `filter_jit` function: what `.lower(...)` returns.

    It has the attributes of `jax.stages.Lowered`, with a `compile` that handles refs.
    """

    _jit: _Jit
    lowered: Any
    _variant: Variant
    _key: Hashable
    _split: Split
    _types: list[str]

    def compile(
        self, compiler_options: dict[str, str | bool] | None = None
    ) -> "Compiled":
        compiled = self.lowered.compile(compiler_options=compiler_options)
        return Compiled(self, compiled)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lowered, name)

    def _run(self, compiled: Any, derefed: Call) -> Outcome:
        if program_key(derefed) != self._key:
            raise self._misfit(
                "arguments of another structure (different sharing of refs, static "
                "values, ...)"
            )
        flat = flat_of(derefed).arrays
        # In its own function, because `apart` counts the holders of a buffer.
        self._check_types(derefed, flat)
        try:
            if self._jit.options["donate"] == "none":
                result = compiled(flat)
            else:
                derefed.arrays = []  # these hold them too
                both = apart(flat, derefed.values, self._split)
                make = self._variant.outcome
                result = call_into(derefed.returned, make, compiled, *both)
            outcome = self._variant.outcome(result)
            if not outcome.info.asked.holds_for(derefed.refs):
                raise self._misfit(
                    "other refs: it depends on the identity of its refs (it looks them up "
                    "in a set or dict, or compares them), which is different here"
                )
            if outcome.info.waits:
                jax.block_until_ready(result)
        except (ValueError, RuntimeError) as e:
            explain(e, derefed.refs, derefed.values)
            raise
        return outcome

    def _check_types(self, derefed: Call, flat: list[Any]) -> None:
        for k, (x, known) in enumerate(zip(flat, self._types)):
            if _type_text(x) != known:
                where = flat_place(derefed, k)
                raise self._misfit(
                    f"{known} in {where}, but is called with {_type_text(x)} there"
                )

    def _misfit(self, what: str) -> MismatchError:
        return MismatchError(
            f"`{name_of(self._jit.__wrapped__)}` was compiled for {what}. Call the "
            "`filter_jit` function itself, which recompiles when needed."
        )


class Compiled:
    """A compiled `filter_jit` function: takes arguments of the structure and shapes that it
    was compiled for, and writes refs as the function itself does.

    It has the attributes of `jax.stages.Compiled`.
    """

    def __init__(self, lowered: Lowered, compiled: Any):
        self._lowered = lowered
        self.compiled = compiled

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        jit: _Jit = self._lowered._jit
        args, kwargs = jit._bind(args, kwargs)
        run = functools.partial(self._lowered._run, self.compiled)
        return call(jit.__wrapped__, args, kwargs, run)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.compiled, name)


def _type_text(x: Any) -> str:
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"


@overload
def filter_jit(
    fun: Callable[P, T],
    *,
    donate: Donate = "none",
    in_shardings: PyTree = None,
    out_shardings: PyTree = None,
    **jitkwargs: Any,
) -> Callable[P, T]: ...


@overload
def filter_jit(
    *,
    donate: Donate = "none",
    in_shardings: PyTree = None,
    out_shardings: PyTree = None,
    **jitkwargs: Any,
) -> Callable[[Callable[P, T]], Callable[P, T]]: ...


def filter_jit(
    fun: Callable[..., Any] | None = None,
    *,
    donate: Donate = "none",
    in_shardings: PyTree = None,
    out_shardings: PyTree = None,
    **jitkwargs: Any,
) -> Callable[..., Any]:
    """As `equinox.filter_jit`, by reference: what the function writes to a ref is written
    to the caller's ref.

    JAX and NumPy arrays are traced, inside and outside refs; everything else is static.
    Refs in the arguments, in the function itself (a module, a bound method, a partial) and
    in its closure are carried. Only those that were written are returned.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        count = rx.Ref(jnp.array(0), "counts")

        @rx.filter_jit
        def step(count, x):
            count.value += 1
            return x * count.value

        assert step(count, jnp.array(3.0)) == 3.0
        assert step(count, jnp.array(3.0)) == 6.0
        assert count.value == 2
        ```

    A second call with arguments of the same structure, sharing, shapes and dtypes does not
    retrace, even for different objects. Different sharing does. The call returns before the
    computation is done, unless the program has a run-time check (`equinox.error_if`). If
    the function raises, or a check fails, no ref has changed.

    **Arguments:**

    - `fun`: the function to compile.
    - `donate`: whose buffers may be reused for the results. `"refs"`: those of the refs it
        overwrites. The others are Equinox's: `"all"`, `"all-except-first"`, `"warn"`,
        `"warn-except-first"`, `"none"` (the default); except for `"none"`, they also donate
        the arrays outside refs, in all arguments or all but the first. A ref that is not
        overwritten is never donated, nor is anything in a program with a run-time check: it
        would be lost if the check failed. A ref's buffer that is also held elsewhere (by a
        [`refx_eqx.snapshot`][], a clone, another ref, a variable) is copied first, and
        keeps its contents. (Another array that JAX made of the same buffer is not seen, as
        `jax.device_put` makes for the device that it is on: copy that, with `jnp.copy`.) If
        such a call is interrupted after the program ran, or its result cannot be built, the
        refs have their new values: the old ones are gone.
    - `in_shardings`: the shardings of the positional arguments: a `jax.sharding.Sharding`,
        an [`refx_eqx.axis_rules`][] under `jax.set_mesh`, or a tree of these that is a
        prefix of the derefed tuple of arguments: `in_shardings=(rules.shardings(model,
        mesh), None)`. `None` accepts any placement. Arrays that are elsewhere are moved for
        the call. A ref on a mesh keeps its sharding when it is written; a ref that is not
        on a mesh takes the one given here when it is written.
    - `out_shardings`: the same for the result. `filter_jit(Model, out_shardings=rules)`
        thus makes a model that is never on a single device. The caller's refs stay where
        they are when returned.
    - `**jitkwargs`: passed on to `jax.jit`, such as `compiler_options`.

    **Returns:**

    A function with the signature of `fun` and a method `.lower(*args, **kwargs)`, whose
    result has `.compile()`.

    **Raises:**

    - `ValueError`: if `donate` is invalid, or if `jitkwargs` say what is traced.

    When called:

    - `TraceLevelError`: if the function touches a ref that it reaches through a global name.
    - `StructureError`: if the shardings are not a prefix of the arguments or the result, or
        cannot split an array.
    - `StructureError`: if it mutates something that was not copied (a list in a module, the
        refs in a dict, a closure variable), and does not return it.
    - `ConcurrencyError`: if another thread wrote a ref whose buffer was donated, or if a
        callback in the function writes a ref that the call carries.
    - `DonatedError`: if the array in a ref was donated or deleted elsewhere.
    """
    modes = Donate.__args__  # type: ignore[attr-defined]
    if donate not in modes:
        raise ValueError(
            f"`filter_jit(..., donate={donate!r})` must be one of "
            f"{', '.join(map(repr, modes))}."
        )
    unsupported = sorted(_UNSUPPORTED & jitkwargs.keys())
    if unsupported:
        raise ValueError(
            f"`filter_jit` does not take {', '.join(map(repr, unsupported))}: arrays are "
            "traced and everything else is static. Use `donate=` to donate."
        )
    shardings = in_shardings, out_shardings
    return _Jit.of(fun, donate=donate, shardings=shardings, jitkwargs=jitkwargs)


_UNSUPPORTED = {
    f"{of}_{by}" for of in ("static", "donate") for by in ("argnums", "argnames")
}
