"""`lift`: any transform of the form `transform(fn, ...) -> fn`, by reference.

The transform is given a pure function, from the derefed trees of the arrays in each
argument to an `Outcome`. If it maps, as `jax.vmap` does, it maps the updates of refs like
the result, along an axis unknown to us. So empty arrays are returned with them, whose
shapes show the axis.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._calls._call import Call, call, dispatching, running_call
from .._calls._structure import Leaves, Outcome, values_of
from .._core import _jax
from .._core._errors import describe, MismatchError, RefError, StructureError
from .._core._ref import Ref
from .._engine._by_call import ByCall
from .._engine._by_place import of_new_value
from .._engine._call_axes import check_axis
from .._engine._wrapper import Lifted
from .._trees._closure import Part


P = ParamSpec("P")
T = TypeVar("T")


class LiftedTransform(Protocol):
    """A lifted transform keeps the signature of the function it is given."""

    def __call__(
        self, fn: Callable[P, T], /, *args: Any, **kwargs: Any
    ) -> Callable[P, T]: ...


_UNKNOWN = object()  # the axis of a mapped array, if it cannot be determined


class _Traced(NamedTuple):
    """What tracing the function showed.

    - `axes`: for each ref, the axes along which the transform maps the arrays of its value:
        `None` if it does not, or `_UNKNOWN`;
    - `inside`: for each ref, the shapes of its arrays as the function saw them;
    - `written`: the same for the new value of each ref that was written;
    - `ranks`: the ranks of the probes that follow the result.
    """

    axes: dict[int, Any]
    inside: dict[int, Any]
    written: dict[int, Any]
    ranks: list[int]


class _Seen:
    """What running the function showed. Separate from the transformed function, which holds
    it, so that no cycle keeps a program alive that can no longer be called.

    - `traced`: keyed by the types of the arrays outside: a transform that caches does not
        run the function again for known types;
    - `failed`: whether the last call failed in the function.
    """

    def __init__(self):
        self.traced: dict[tuple, _Traced] = {}
        self.failed = False


class _Transformed:
    """The function returned by the transform, for calls of one structure."""

    def __init__(self, derefed: Call, of_call: "_Call"):
        self._name = name = of_call.name
        self.seen = seen = _Seen()
        # The arrays of the callable are constants to the transform; keywords without arrays
        # are not passed.
        parts, (of_kwargs, of_fn) = derefed.parts, derefed.arrays[-2:]

        @functools.wraps(of_call.__wrapped__, updated=())
        def pure(*args: Any, **keywords: Any) -> Outcome:
            given = zip(parts, (*args, *keywords.values()))
            read = [part.treedef.flatten_up_to(tree) for part, tree in given]
            arrays = [*read, *([] if keywords else [of_kwargs]), of_fn]
            now = running_call()
            try:
                # We do not know the transform or whether it caches: only carried refs may
                # be read.
                outcome = now.run(name, arrays, transparent=False)
                outcome.info.asked = now.identities()
            except BaseException:
                seen.failed = True
                raise
            traced = _what_was_traced(now.arrays, arrays, outcome)
            seen.traced[_types_of_arrays(now.arrays)] = traced
            probes = [jnp.zeros((0,) * rank) for rank in traced.ranks]
            return Outcome([*outcome.out, *probes], outcome.updates, outcome.info)

        # `__wrapped__` would show `inspect.signature` the user's arguments, not ours.
        del pure.__wrapped__
        options = of_call.options
        self._transformed = options["transform"](
            pure, *options["args"], **options["kwargs"]
        )

    def __call__(self, derefed: Call) -> Any:
        *args, of_kwargs = map(Part.tree, derefed.parts[:-1], derefed.arrays)
        keywords = {}
        if jtu.tree_leaves(of_kwargs):
            keywords["carried_by_keyword"] = of_kwargs
        self.seen.failed = False
        with dispatching(derefed):
            try:
                return self._transformed(*args, **keywords)
            except (ValueError, TypeError) as e:
                is_of_spec = any(
                    word in str(e) for word in ("prefix", "pytree", "_specs")
                )
                if self.seen.failed or isinstance(e, RefError) or not is_of_spec:
                    raise
                raise MismatchError(
                    f"`{self._name}`: the options do not fit the arguments of the "
                    "transform. It sees each argument as a tree of arrays, as returned by "
                    "`rx.deref`, with `None` for anything that is not an array; and its "
                    "result, including the written refs, can only have one axis, spec or "
                    f"sharding for all. If that is not enough, use `{_ours(self._name)}`. "
                    f"JAX says: {e}"
                ) from None


# By name: what to use when lifting is not enough.
_OURS = {
    "jit": "rx.filter_jit",
    "vmap": "rx.filter_vmap",
    "checkpoint": "rx.filter_checkpoint",
    "shard_map": "rx.filter_shard_map",
}


def _ours(name: str) -> str:
    found = (ours for theirs, ours in _OURS.items() if theirs in name)
    return next(found, "rx.functionalize")


def _types_of_arrays(arrays: list[Leaves]) -> tuple:
    leaves = jtu.tree_leaves(arrays)
    # The dtypes that JAX has: it does not trace again for a NumPy array of 64 bits.
    return tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)


def _what_was_traced(
    outside: list[Leaves], inside: list[Leaves], outcome: Outcome
) -> _Traced:
    axes = jtu.tree_map(_mapped_along, outside, inside)
    is_mapped = bool(jtu.tree_leaves(axes))
    ranks = {x.ndim for x in jtu.tree_leaves(outcome.updates)} if is_mapped else set()
    return _Traced(
        values_of(axes),
        values_of(jtu.tree_map(_shape, inside)),
        jtu.tree_map(_shape, outcome.updates),
        sorted(ranks),
    )


class _Shape(tuple):
    """A shape: one leaf of a tree."""

    __slots__ = ()


def _shape(x: Any) -> _Shape:
    return _Shape(jnp.shape(x))


def _mapped_along(outside: Any, inside: Any) -> Any:
    """The axis that an array has outside but not inside."""
    missing = jnp.ndim(outside) - jnp.ndim(inside)
    if missing != 1:
        return _UNKNOWN if missing else None
    known = _jax.batch_axis(inside)
    if known is not None:
        return known
    # As under `vmap(jit(fn))`: if the shape shows it.
    shape = jnp.shape(outside)
    rest = jnp.shape(inside)
    fits = [i for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == rest]
    return fits[0] if len(fits) == 1 else _UNKNOWN


class _Call(Lifted):
    transform_name = "lift"

    def __init__(self, fn: Any, *, transform: Callable, args: tuple, kwargs: dict):
        super().__init__(fn, transform=transform, args=args, kwargs=kwargs)
        self.name = f"rx.lift({_name_of_transform(transform)})"
        self._transformed: ByCall[_Transformed] = ByCall()

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return call(self.__wrapped__, args, kwargs, self._transform)

    def _transform(self, derefed: Call) -> Outcome:
        if jtu.tree_leaves(derefed.arrays[-1]):
            # The arrays of the callable are constants to the transform, thus part of the
            # function it is given: nothing may be kept from one call to the next.
            return self._dispatch(derefed, _Transformed(derefed, self))
        while True:
            known = self._transformed.get(
                derefed, lambda _: _Transformed(derefed, self)
            )
            try:
                outcome = self._dispatch(derefed, known)
            finally:
                if derefed.asked:
                    self._transformed.note(derefed, known)
            # Another thread may have traced it meanwhile, for its own refs.
            if outcome.info.asked.holds_for(derefed.refs):
                return outcome

    def _dispatch(self, derefed: Call, transformed: _Transformed) -> Outcome:
        outcome = transformed(derefed)
        if not isinstance(outcome, Outcome):
            raise MismatchError(
                f"`{self.name}`: the transform must return a function with the same result "
                "as the function it was given. For a transform that does not (such as one "
                "that differentiates), write an adapter with `rx.functionalize`."
            )
        traced = transformed.seen.traced[_types_of_arrays(derefed.arrays)]
        return _with_axes_in_place(derefed, outcome, traced, self.name)


def _with_axes_in_place(
    derefed: Call, outcome: Outcome, traced: _Traced, name: str
) -> Outcome:
    """The outcome without its probes, with each update on the axes that its ref came in
    with.

    **Raises:**

    - `StructureError`: if the transform changed the shape of a written value, and the ref
        did not come in mapped.
    """
    n_out = len(outcome.out) - len(traced.ranks)
    probes = dict(zip(traced.ranks, outcome.out[n_out:]))
    before = values_of(derefed.arrays)

    def placed(ref: Ref, x: Any, axis: Any, written: tuple, expected: tuple) -> Any:
        rank = len(written)
        if axis is None:
            if jnp.shape(x) == expected:
                return x
            what = (
                f"the shape {jnp.shape(x)}, where {expected} is right: the transform maps, "
                "or splits, its results"
            )
        elif axis is _UNKNOWN:
            what = "an axis, and the shapes do not show which one"
        elif jnp.ndim(x) != rank + 1:
            what = f"the shape {jnp.shape(x)}, without the axis that it came in with"
        else:
            check_axis(ref, axis, rank + 1, name)
            return jnp.moveaxis(x, _probed(probes[rank]), axis)
        raise _refusal(ref, name, what)

    updates = {}
    for i, new in outcome.updates.items():
        written = traced.written[i]
        axes, expected = traced.axes[i], _expected(traced.inside[i], before[i], written)
        axes = of_new_value(before[i], axes, new, None, lambda _: _UNKNOWN)
        of_ref = functools.partial(placed, derefed.refs[i])
        updates[i] = jtu.tree_map(of_ref, new, axes, written, expected)
    return Outcome(outcome.out[:n_out], updates, outcome.info)


def _expected(inside: Any, before: Any, written: Any) -> Any:
    """The shapes that the arrays of a ref must come back with: those written, or the whole,
    if the function saw only a part (under `jax.shard_map`)."""
    if jtu.tree_structure(written) != jtu.tree_structure(inside):
        return written
    return jtu.tree_map(
        lambda new, old, x: _shape(x) if new == old else new, written, inside, before
    )


def _probed(probe: Any) -> int:
    """Which axis a probe got: all others have size zero."""
    sizes = jnp.shape(probe)
    return next((i for i, size in enumerate(sizes) if size), 0)


def _refusal(ref: Ref, name: str, what: str) -> StructureError:
    ours = "rx.filter_shard_map" if "shard_map" in name else "rx.filter_vmap"
    return StructureError(
        f"`{name}` gave {describe(ref)} {what}. Use `{ours}`, which handles refs."
    )


def _unbound(transform: Any) -> Any:
    """The function inside a partial."""
    while isinstance(transform, functools.partial):
        transform = transform.func
    return transform


def _name_of_transform(transform: Any) -> str:
    transform = _unbound(transform)
    return getattr(transform, "__name__", type(transform).__name__)


# These do not return what the function returns, so they cannot be lifted.
_NOT_LIFTABLE = (
    "grad value_and_grad jacfwd jacrev hessian custom_jvp custom_vjp make_jaxpr"
)
_INSTEAD = {
    theirs: f"filter_{name}"
    for name in _NOT_LIFTABLE.split()
    for theirs in (getattr(jax, name), getattr(eqx, f"filter_{name}"))
}


def _check_liftable(transform: Any) -> None:
    try:
        ours = _INSTEAD.get(_unbound(transform))
    except TypeError:  # not hashable, so not one of these
        return
    if ours is not None:
        raise StructureError(
            f"`rx.lift({_name_of_transform(transform)})`: this transform does not return "
            f"what the function returns, so it cannot be lifted. Use `rx.{ours}`, its "
            "counterpart by reference."
        )


def lift(transform: Callable[..., Any]) -> LiftedTransform:
    """Makes any transform reference-aware.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        count = rx.Ref(jnp.array(0))

        @rx.lift(jax.checkpoint)
        def f(count, x):
            count.value += 1
            return jnp.sin(x)

        f(count, 1.0)
        assert count.value == 1
        ```

    **Arguments:**

    - `transform`: a function `transform(fn, *args, **kwargs)` that returns a function with
        the arguments and the result of `fn`, such as `jax.jit`, `jax.checkpoint`,
        `jax.vmap`, or one of your own. It sees each argument derefed, with `None` for
        anything that is not an array: `static_argnums` are not needed, and `in_axes` and
        `in_shardings` are prefixes of the derefed arguments, in which a function of a leaf is
        called with arrays, never with refs. One `out_axes` applies to the whole result.

    **Returns:**

    The lifted transform, with the same arguments. The function it takes may read and write
    refs.

    **Raises:**

    When the transformed function is called:

    - `StructureError`: if the transform does not return what `fn` returns; if it maps a ref
        that did not come in mapped (as `jax.vmap` does: use [`refx_eqx.filter_vmap`][]); if
        its options do not fit its arguments.
    """
    _check_liftable(transform)

    @functools.wraps(transform, updated=())
    def lifted(fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return _Call(fn, transform=transform, args=args, kwargs=kwargs)

    return lifted
