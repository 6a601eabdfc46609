"""`lift`: any transform of the shape `transform(fn, ...) -> fn`, by reference.

The transform is given a pure function, from the derefed trees of the arrays in each
argument to an `Outcome`. If it maps, as `jax.vmap` does, it maps the updates of refs as it
maps the result, wherever that is. So arrays without elements go out with them, by whose
shapes it is seen.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._core import _trace
from .._core._call import call, dispatching, Opened, running_call
from .._core._errors import describe, RefError, StructureError
from .._core._structure import inside_of, Outcome
from .._engine._argument_trees import ArgumentTrees
from .._engine._call_axes import check_axis, has_places_of
from .._engine._program import ByCall
from .._engine._wrapper import Lifted


__tracebackhide__ = True


_P = ParamSpec("_P")
_T = TypeVar("_T")


class _LiftedTransform(Protocol):
    """A lifted transform keeps the signature of the function that it is given."""

    def __call__(
        self, fn: Callable[_P, _T], /, *args: Any, **kwargs: Any
    ) -> Callable[_P, _T]: ...


_UNKNOWN = object()  # the axis of an array that is mapped, if it cannot be told


class _Traced(NamedTuple):
    """What was seen when the function was traced.

    - `axes`: the axis along which the transform maps each flat array, `None`, or `_UNKNOWN`;
    - `shapes`: of each flat array inside;
    - `written`: the shapes of the new value of each ref that was written;
    - `ranks`: those of the probes that follow the result.
    """

    axes: list[Any]
    shapes: list[tuple[int, ...]]
    written: dict[int, list[tuple[int, ...]]]
    ranks: list[int]


class _Transformed:
    """The function as the transform returns it, for calls of one structure.

    - `traced`: what was seen, by the types of the arrays outside: a transform that caches
        does not run the function again for types that it knows.
    """

    def __init__(self, opened: Opened, of_call: "_Call"):
        self._trees = trees = ArgumentTrees(opened)
        self._name = name = of_call.name
        self.traced: dict[tuple, _Traced] = {}
        self._failed_inside = False
        # The arrays of the callable are constants to the transform.
        constants = {i: opened.arrays[i] for i in trees.positions[0]}
        n = len(opened.arrays)

        @functools.wraps(of_call.__wrapped__, updated=())
        def pure(*args: Any, **keywords: Any) -> Outcome:
            arrays: list[Any] = [None] * n
            for i, x in constants.items():
                arrays[i] = x
            for part, tree in enumerate((*args, *keywords.values()), 1):
                for i, x in trees.read(part, tree):
                    arrays[i] = x
            now = running_call()
            try:
                # What the transform is, and whether it caches, is not known: only what is
                # carried may be read.
                outcome = now.run(name, arrays, transparent=False)
                outcome.info.asked = now.identities()
            except BaseException:
                self._failed_inside = True
                raise
            traced = _what_was_traced(now.arrays, arrays, outcome)
            self.traced[_types(now.arrays)] = traced
            probes = [jnp.zeros((0,) * rank) for rank in traced.ranks]
            return Outcome([*outcome.out, *probes], outcome.updates, outcome.info)

        # `__wrapped__` would show `inspect.signature` the user's arguments, not ours.
        del pure.__wrapped__
        options = of_call.options
        self._transformed = options["transform"](
            pure, *options["args"], **options["kwargs"]
        )

    def __call__(self, opened: Opened) -> Any:
        last = len(opened.structure.parts) - 1
        args = [self._trees.fill(part, opened.arrays) for part in range(1, last)]
        keywords = {}
        if self._trees.positions[last]:
            keywords["carried_by_keyword"] = self._trees.fill(last, opened.arrays)
        self._failed_inside = False
        with dispatching(opened):
            try:
                return self._transformed(*args, **keywords)
            except (ValueError, TypeError) as e:
                is_of_spec = "prefix" in str(e) or "pytree" in str(e)
                if self._failed_inside or isinstance(e, RefError) or not is_of_spec:
                    raise
                raise StructureError(
                    f"`{self._name}`: the options do not fit what the transform is given. "
                    "It sees each argument as a tree of its arrays, as `rx.deref` makes "
                    "it, with `None` for what is no array; and what it returns, the "
                    "written refs among it, can only have one axis, spec or sharding for "
                    f"all. Where that is not enough, use `{_ours(self._name)}`. JAX says: "
                    f"{e}"
                ) from None


# By name: what to use where lifting is not enough.
_OURS = {
    "jit": "rx.filter_jit",
    "vmap": "rx.filter_vmap",
    "checkpoint": "rx.filter_checkpoint",
}


def _ours(name: str) -> str:
    found = (ours for theirs, ours in _OURS.items() if theirs in name)
    return next(found, "rx.functionalize")


def _types(arrays: list[Any]) -> tuple:
    return tuple((jnp.shape(x), getattr(x, "dtype", type(x))) for x in arrays)


def _what_was_traced(
    outside: list[Any], inside: list[Any], outcome: Outcome
) -> _Traced:
    axes = [_mapped_along(a, b) for a, b in zip(outside, inside)]
    shapes = [jnp.shape(x) for x in inside]
    written = _shapes(outcome.updates)
    is_mapped = any(axis is not None for axis in axes)
    ranks = {len(shape) for some in written.values() for shape in some}
    return _Traced(axes, shapes, written, sorted(ranks) if is_mapped else [])


def _mapped_along(outside: Any, inside: Any) -> Any:
    """The axis that an array has outside, and not inside."""
    missing = jnp.ndim(outside) - jnp.ndim(inside)
    if missing != 1:
        return _UNKNOWN if missing else None
    known = _trace.batch_axis(inside)
    if known is not None:
        return known
    # As under `vmap(jit(fn))`: where the shape tells.
    shape = jnp.shape(outside)
    rest = jnp.shape(inside)
    fits = [i for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == rest]
    return fits[0] if len(fits) == 1 else _UNKNOWN


def _shapes(updates: dict[int, Any]) -> dict[int, list[tuple[int, ...]]]:
    return {i: [*map(jnp.shape, jtu.tree_leaves(x))] for i, x in updates.items()}


class _Call(Lifted):
    transform_name = "lift"

    def __init__(self, fn: Any, *, transform: Callable, args: tuple, kwargs: dict):
        super().__init__(fn, transform=transform, args=args, kwargs=kwargs)
        self.name = f"rx.lift({_name_of(transform)})"
        self._transformed: ByCall[_Transformed] = ByCall()

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return call(self.__wrapped__, args, kwargs, self._transform)

    def _transform(self, opened: Opened) -> Outcome:
        if ArgumentTrees(opened).positions[0]:
            # The arrays of the callable are constants to the transform, and so a part of
            # the function that it is given: nothing may be kept from one call to the next.
            return self._dispatch(opened, _Transformed(opened, self))
        while True:
            known = self._transformed.get(opened, self._apply)
            try:
                outcome = self._dispatch(opened, known)
            finally:
                if opened.asked:
                    self._transformed.note(opened, known)
            # Another thread may have traced it in between, for its own refs.
            if outcome.info.asked.holds_for(opened.refs):
                return outcome

    def _apply(self, opened: Opened) -> _Transformed:
        return _Transformed(opened, self)

    def _dispatch(self, opened: Opened, transformed: _Transformed) -> Outcome:
        outcome = transformed(opened)
        if not isinstance(outcome, Outcome):
            raise StructureError(
                f"`{self.name}`: the transform must return a function that returns what "
                "the function it was given returns. For a transform that does not (such "
                "as one that differentiates), write an adapter on `rx.functionalize`."
            )
        traced = transformed.traced[_types(opened.arrays)]
        return _with_axes_in_place(opened, outcome, traced, self.name)


def _with_axes_in_place(
    opened: Opened, outcome: Outcome, traced: _Traced, name: str
) -> Outcome:
    """The outcome without its probes, each update with the axes that the ref came in with.

    **Raises:**

    - `StructureError`: if the transform gave a ref another shape than was written, and the
        ref did not come in mapped.
    """
    n_out = len(outcome.out) - len(traced.ranks)
    probes = dict(zip(traced.ranks, outcome.out[n_out:]))
    updates = {}
    for number, new in outcome.updates.items():
        arrays, treedef = jtu.tree_flatten(new)
        refuse = functools.partial(_refuse, opened, number, name)
        placed = []
        own = _axes_of(opened, traced, number, new)
        for k, (x, axis) in enumerate(zip(arrays, own)):
            written = traced.written[number][k]
            rank = len(written)
            if axis is None:
                expected = _expected(opened, traced, number, k, written)
                if jnp.shape(x) != expected:
                    refuse(
                        f"the shape {jnp.shape(x)}, where {expected} is right: the "
                        "transform maps, or splits, what it returns"
                    )
            elif axis is _UNKNOWN:
                refuse("an axis, and which one it is the shapes do not tell")
            elif jnp.ndim(x) != rank + 1:
                refuse(
                    f"the shape {jnp.shape(x)}, without the axis that it came in with"
                )
            else:
                check_axis(opened.refs[number], axis, rank + 1, name)
                x = jnp.moveaxis(x, _probed(probes[rank]), axis)
            placed.append(x)
        updates[number] = jtu.tree_unflatten(treedef, placed)
    return Outcome(outcome.out[:n_out], updates, outcome.info)


def _probed(probe: Any) -> int:
    """Which axis a probe got: all others are without elements."""
    sizes = jnp.shape(probe)
    return next((i for i, size in enumerate(sizes) if size), 0)


def _axes_of(opened: Opened, traced: _Traced, number: int, new: Any) -> list[Any]:
    own = traced.axes[slice(*opened.spans[number])]
    if has_places_of(inside_of(new), opened.structure.slots[number].inside):
        return own
    one = set(own)
    axis = one.pop() if len(one) == 1 else (_UNKNOWN if one else None)
    return [axis] * len(jtu.tree_leaves(new))


def _expected(
    opened: Opened, traced: _Traced, number: int, k: int, written: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape that the `k`-th array of a ref must come back with: that which was written,
    or the whole, if it is a part of that which the function saw (under `jax.shard_map`)."""
    start, stop = opened.spans[number]
    if start + k < stop and traced.shapes[start + k] == written:
        return jnp.shape(opened.arrays[start + k])
    return written


def _refuse(opened: Opened, number: int, name: str, what: str) -> None:
    ref = opened.refs[number]
    if "shard_map" in name:
        remedy = (
            "`rx.functionalize`, with a spec for each of the updates that it returns"
        )
    else:
        remedy = "`rx.filter_vmap`, which knows of refs"
    raise StructureError(
        f"`{name}` gave {describe(ref._name, ref._collection)} {what}. Use {remedy}."
    )


def _name_of(transform: Any) -> str:
    while isinstance(transform, functools.partial):
        transform = transform.func
    return getattr(transform, "__name__", type(transform).__name__)


# Those that do not return what the function returns, so that they cannot be lifted.
_INSTEAD = {
    jax.grad: "filter_grad",
    eqx.filter_grad: "filter_grad",
    jax.value_and_grad: "filter_value_and_grad",
    eqx.filter_value_and_grad: "filter_value_and_grad",
    jax.jacfwd: "filter_jacfwd",
    eqx.filter_jacfwd: "filter_jacfwd",
    jax.jacrev: "filter_jacrev",
    eqx.filter_jacrev: "filter_jacrev",
    jax.hessian: "filter_hessian",
    eqx.filter_hessian: "filter_hessian",
    jax.custom_jvp: "filter_custom_jvp",
    eqx.filter_custom_jvp: "filter_custom_jvp",
    jax.custom_vjp: "filter_custom_vjp",
    eqx.filter_custom_vjp: "filter_custom_vjp",
    jax.make_jaxpr: "filter_make_jaxpr",
    eqx.filter_make_jaxpr: "filter_make_jaxpr",
}


def _check_liftable(transform: Any) -> None:
    known = transform
    while isinstance(known, functools.partial):
        known = known.func
    try:
        ours = _INSTEAD.get(known)
    except TypeError:  # not hashable: none of these
        return
    if ours is not None:
        raise StructureError(
            f"`rx.lift({_name_of(transform)})`: this transform does not return what the "
            f"function returns, so it cannot be lifted. Use `rx.{ours}`, which is the same "
            "by reference."
        )


def lift(transform: Callable[..., Any]) -> _LiftedTransform:
    """Makes a transform reference-aware, whoever wrote it.

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
        `jax.vmap`, or one of your own. It sees each argument as `rx.deref` of it, with
        `None` for what is no array: `static_argnums` are not needed, and `in_axes` and
        `in_shardings` are prefixes of that. The result has one `out_axes` for all.

    **Returns:**

    The lifted transform: a function of the same arguments, which takes a function that reads
    and writes refs.

    **Raises:**

    When the transformed function is called:

    - `StructureError`: if the transform does not return what `fn` returns; if it maps a
        ref that did not come in mapped (as `jax.vmap` does: use
        [`refx_eqx.filter_vmap`][]); if its options do not fit what it sees.
    """
    _check_liftable(transform)

    @functools.wraps(transform, updated=())
    def lifted(fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return _Call(fn, transform=transform, args=args, kwargs=kwargs)

    return lifted
