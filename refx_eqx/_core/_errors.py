"""The errors of the library, and how a message names a ref.

Every message answers three questions: which ref, where, and what to do about it. The
texts live next to the checks that raise them; what they share is here.
"""

from collections.abc import Hashable
from typing import Any


__tracebackhide__ = True


class RefError(Exception):
    """The base of every error that this library raises.

    Catch one of its subclasses to be specific:

    - [`refx_eqx.TraceLevelError`][]: a ref was touched where JAX would go stale;
    - [`refx_eqx.StructureError`][]: a tree of refs that is not of the structure that was
        asked for; of this,
    - [`refx_eqx.CarryError`][]: what a function did cannot be carried out of a transform;
    - [`refx_eqx.MismatchError`][]: two things that belong together do not fit;
    - [`refx_eqx.CollectionError`][]: a ref of one collection where another is declared;
    - [`refx_eqx.RefTypeError`][]: a value that breaks the declared type of a ref;
    - [`refx_eqx.ImmutableError`][]: a write that [`refx_eqx.mutable`][] does not allow;
    - [`refx_eqx.ConcurrencyError`][]: a donated ref was changed by another thread;
    - [`refx_eqx.DonatedError`][]: an array whose buffer was donated, and is gone;
    - [`refx_eqx.CheckpointError`][]: a file that is not a checkpoint, or not a whole one.
    """


class TraceLevelError(RefError, ValueError):
    """A ref was read or written inside a JAX trace that must not see it.

    Pass the ref to a lifted transform, and use the ref that the function is given.

    !!! Example

        ```python
        import jax
        import refx_eqx as rx

        ref = rx.Ref(1.0)
        try:
            jax.jit(lambda x: x * ref.value)(2.0)
        except rx.TraceLevelError:
            out = rx.filter_jit(lambda ref, x: x * ref.value)(ref, 2.0)
        assert out == 2.0
        ```
    """


class StructureError(RefError, ValueError):
    """A tree of refs does not have the structure that was asked for.

    The message names the place, or the two places, where it differs.

    !!! Example

        ```python
        import refx_eqx as rx

        ref = rx.Ref(1.0)
        try:
            rx.partition({"a": ref, "b": ref}, rx.path("a"))  # tears a tie
        except rx.StructureError:
            both, rest = rx.partition({"a": ref, "b": ref}, rx.path("a", "b"))
        assert both["a"] is both["b"]
        ```
    """


class CarryError(StructureError):
    """What a function did to a tree or a ref cannot be carried out of the transform that runs
    it: it changed a list in place, or wrote where it may only read. The function is to be
    written otherwise.

    !!! Example

        ```python
        import equinox as eqx
        import refx_eqx as rx

        class History(eqx.Module):
            items: list

        @rx.filter_jit
        def remember(history, x):
            history.items.append(x)

        @rx.filter_jit
        def remember_in_ref(seen, x):
            seen.value = x

        seen = rx.Ref(0.0)
        try:
            remember(History([1.0]), 2.0)
        except rx.CarryError:
            remember_in_ref(seen, 2.0)  # what changes is held in a ref
        assert seen.value == 2.0
        ```
    """


class MismatchError(StructureError):
    """Two things that belong together do not fit: a tree and the axes, the gradients or the
    state that are for it; what a step was given and what it returns; two branches. One of the
    two is to be corrected.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        model = {"w": rx.Ref(jnp.ones(2), "params")}
        try:
            rx.update_refs(model, {"v": jnp.zeros(2)})
        except rx.MismatchError:
            rx.update_refs(model, {"w": jnp.zeros(2)})
        assert model["w"].value[0] == 0.0
        ```
    """


class CollectionError(RefError, ValueError):
    """A ref belongs to another collection than the one declared.

    !!! Example

        ```python
        import refx_eqx as rx

        class Scale(rx.Module):
            by: rx.Param[float]

        mean = rx.Ref(2.0, "batch_stats")
        try:
            Scale(mean)  # shares the ref
        except rx.CollectionError:
            scale = Scale(mean.value)  # makes one of its own
        assert scale.by.collection == "params"
        ```
    """


class RefTypeError(RefError, TypeError):
    """A value does not have the type that its ref declares; or a ref was used as if it were
    the value that it holds.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx
        from jaxtyping import Array, Float

        class Linear(rx.Module):
            weight: rx.Param[Float[Array, "out in"]]

        linear = Linear(jnp.zeros((2, 3)))
        for wrong in (
            lambda: linear.weight @ jnp.ones(3),  # `linear.weight[...] @ ...`
            lambda: setattr(linear.weight, "value", jnp.zeros(2)),
        ):
            try:
                wrong()
            except rx.RefTypeError:
                pass
        assert linear.weight.shape == (2, 3)
        ```
    """


class ImmutableError(RefError, ValueError):
    """A write was refused by [`refx_eqx.mutable`][].

    !!! Example

        ```python
        import refx_eqx as rx

        weight = rx.Ref(1.0, "params")
        try:
            with rx.mutable(False):
                weight.value = 2.0
        except rx.ImmutableError:
            pass
        assert weight.value == 1.0
        ```
    """


class ConcurrencyError(RefError, RuntimeError):
    """Another thread changed a ref while a call was using it, and the call could not
    be retried, either because a buffer had been donated or because every retry was
    interrupted as well.

    Serialize the calls with a lock.
    """


class DonatedError(RefError, RuntimeError):
    """An array whose buffer is gone: it was donated to a call, or deleted.

    A call of [`refx_eqx.filter_jit`][] with `donate=` takes no buffer of a ref that
    something else holds, so it was another library's call, or `.delete()`.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        ref = rx.Ref(jnp.zeros(3))
        add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
        add_one(jnp.array(ref.value, copy=True))  # without the copy, `ref` loses its value
        x = jnp.ones(3)
        add_one(x)
        try:
            ref.value = x
        except rx.DonatedError:
            pass
        assert ref.value[0] == 0.0
        ```
    """


class CheckpointError(RefError, ValueError):
    """A file could not be read as a checkpoint: it is cut off, of another format, or of a
    newer version. Nothing was loaded.

    !!! Example

        ```python
        import pathlib
        import tempfile
        import refx_eqx as rx

        model = {"w": rx.Ref(1.0, "params")}
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "model.safetensors")
            path.write_bytes(b"not a checkpoint")
            try:
                rx.load(path, model)
            except rx.CheckpointError:
                pass
        assert model["w"].value == 1.0
        ```
    """


# In a traceback an error shows where it is imported from, not where it is written.
for _error in (
    RefError,
    *RefError.__subclasses__(),
    *StructureError.__subclasses__(),
):
    _error.__module__ = "refx_eqx"


def describe(ref: Any) -> str:
    """How every message refers to a ref, or to a node that stands for one:
    `` `Linear.weight` (collection 'params')``."""
    return describe_named(ref._name, ref._collection)


def describe_named(name: str | None, collection: Hashable) -> str:
    which = "an unnamed ref" if name is None else f"`{name}`"
    if collection is None:
        return f"{which} (no collection)"
    return f"{which} (collection {collection!r})"


def name_of(fn: Any) -> str:
    """How every message refers to a function."""
    fn = getattr(fn, "__wrapped__", fn)
    return getattr(fn, "__qualname__", type(fn).__qualname__)


def check_hashable(what: str, **given: Any) -> None:
    """That what names a ref, or its place, can be a part of a key.

    **Raises:**

    - `TypeError`: if not.
    """
    try:
        hash(tuple(given.values()))
    except TypeError:
        texts = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise TypeError(
            f"`{what}` was given {texts}, which is not hashable. Use a string, or a tuple of "
            "them."
        ) from None
