"""`lift`: any transform of the shape `transform(fn, ...) -> fn`, by reference."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import jax.numpy as jnp
import jax.tree_util as jtu

from .._core._call import call, dispatching, Opened, running_call
from .._core._errors import describe, StructureError
from .._core._structure import DYNAMIC, Outcome
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


class _Arrays:
    """What one argument carries, as a pytree: an `in_axes` or a `donate_argnums` of the
    transform finds the argument where the user put it."""

    __slots__ = ("arrays",)

    def __init__(self, arrays: list[Any]):
        self.arrays = arrays


jtu.register_pytree_node(
    _Arrays, lambda x: (x.arrays, None), lambda _, arrays: _Arrays(list(arrays))
)


def _positions(opened: Opened) -> list[list[int]]:
    """For each part of the call, which of the flat arrays it brings: its bare arrays, and
    those of the refs that are met in it first."""
    parts: list[list[int]] = []
    seen: set[int] = set()
    leaf = bare = 0
    for size in opened.structure.sizes:
        mine: list[int] = []
        for code in opened.structure.codes[leaf : leaf + size]:
            if code == DYNAMIC:
                mine.append(bare)
                bare += 1
            elif code >= 0 and code not in seen:
                seen.add(code)
                mine.extend(range(*opened.spans[code]))
        leaf += size
        parts.append(mine)
    return parts


class _Call(Lifted):
    transform_name = "lift"

    def __init__(self, fn: Any, *, transform: Callable, args: tuple, kwargs: dict):
        super().__init__(fn, transform=transform, args=args, kwargs=kwargs)
        name = getattr(transform, "__name__", type(transform).__name__)
        self._name = f"rx.lift({name})"
        self._transformed: ByCall[tuple[Callable, dict[str, Any]]] = ByCall()

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return call(self.__wrapped__, args, kwargs, self._transform)

    def _transform(self, opened: Opened) -> Outcome:
        of_fn, *_ = _positions(opened)
        if of_fn:
            # The arrays of the callable are constants to the transform, and so a part of
            # the function that it is given: nothing may be kept from one call to the next.
            return self._dispatch(opened, *self._apply(opened))
        while True:
            known = self._transformed.get(opened, self._apply)
            try:
                outcome = self._dispatch(opened, *known)
            finally:
                if opened.asked:
                    self._transformed.note(opened, known)
            # Another thread may have traced it in between, for its own refs.
            if outcome.info.asked.holds_for(opened.refs):
                return outcome

    def _dispatch(
        self, opened: Opened, transformed: Callable, traced: dict[str, Any]
    ) -> Outcome:
        _, *of_args, of_kwargs = _positions(opened)
        arrays = opened.arrays
        args = [_Arrays([arrays[i] for i in mine]) for mine in of_args]
        keywords = {}
        if of_kwargs:
            keywords["carried_by_keyword"] = _Arrays([arrays[i] for i in of_kwargs])
        with dispatching(opened):
            outcome = transformed(*args, **keywords)
        if not isinstance(outcome, Outcome):
            raise StructureError(
                f"`{self._name}`: the transform must return a function that returns what "
                "the function it was given returns. For a transform that does not (such "
                "as one that differentiates), write an adapter on `rx.functionalize`."
            )
        _check_updates(opened, outcome, traced["shapes"], self._name)
        return outcome

    def _apply(self, opened: Opened) -> tuple[Callable, dict[str, Any]]:
        of_fn, *of_args, of_kwargs = _positions(opened)
        constants = [opened.arrays[i] for i in of_fn]
        n = len(opened.arrays)
        traced: dict[str, Any] = {}

        @functools.wraps(self.__wrapped__, updated=())
        def pure(*args: _Arrays, **keywords: _Arrays) -> Outcome:
            carried = [_Arrays(constants), *args, *keywords.values()]
            positions = [of_fn, *of_args, of_kwargs]
            arrays: list[Any] = [None] * n
            for mine, part in zip(positions, carried):
                for i, x in zip(mine, part.arrays):
                    arrays[i] = x
            # What the transform is, and whether it caches, is not known: only what is
            # carried may be read.
            now = running_call()
            outcome = now.run(self._name, arrays, transparent=False)
            outcome.info.asked = now.identities()
            inputs = [jnp.shape(x) for x in arrays]
            traced["shapes"] = inputs, _shapes(outcome.updates)
            return outcome

        # `__wrapped__` would show `inspect.signature` the user's arguments, not ours.
        del pure.__wrapped__
        options = self.options
        transformed = options["transform"](pure, *options["args"], **options["kwargs"])
        return transformed, traced


def _check_updates(opened: Opened, outcome: Outcome, shapes: tuple, name: str) -> None:
    """Refuses a ref that went in as it is, and came back with another shape than it has
    inside: the transform batched it."""
    before, inside = shapes
    for number, after in _shapes(outcome.updates).items():
        start, stop = opened.spans[number]
        unmapped = all(
            jnp.shape(opened.arrays[i]) == before[i] for i in range(start, stop)
        )
        for found, shape in zip(after, inside[number]):
            if unmapped and found != shape:
                ref = opened.refs[number]
                raise StructureError(
                    f"`{name}` gave {describe(ref._name, ref._collection)} the shape "
                    f"{found}, where the function wrote {shape}: the transform "
                    "maps what it returns. Use `rx.filter_vmap`, which knows of refs."
                )


def _shapes(updates: dict[int, Any]) -> dict[int, list[tuple[int, ...]]]:
    return {i: [*map(jnp.shape, jtu.tree_leaves(x))] for i, x in updates.items()}


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
        `jax.vmap`, or one of your own. It sees each argument as a pytree of arrays: `static
        _argnums` are not needed, because static values stay outside.

    **Returns:**

    The lifted transform: a function of the same arguments, which takes a function that reads
    and writes refs.

    **Raises:**

    When the transformed function is called:

    - `StructureError`: if the transform does not return what `fn` returns, or if it gives a
        ref another shape than the function wrote (as `jax.vmap` does: use
        [`refx_eqx.filter_vmap`][]).
    """

    @functools.wraps(transform, updated=())
    def lifted(fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return _Call(fn, transform=transform, args=args, kwargs=kwargs)

    return lifted
