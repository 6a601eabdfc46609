"""The errors of the library, and how a message names a ref.

Every message answers three questions: which ref, where, and what to do about it. The texts
are next to the checks that raise them; shared parts are here.
"""

import re
import sys
import textwrap
from collections.abc import Hashable
from typing import Annotated, Any, get_origin

from .._trees._equality import Shared


# The line length of the code of most readers; a terminal is rarely narrower.
_WIDTH = 88
_CODE = re.compile("`[^`]*`")


class RefError(Exception):
    """The base of every error that this library raises.

    `str(error)` is the message as Python prints it below a traceback, wrapped to 88
    columns; `error.args[0]` is the same message with each paragraph in one line, to be
    searched or logged.

    Catch one of its subclasses to be specific:

    - [`refx_eqx.TraceLevelError`][]: a ref was touched where its value could go stale;
    - [`refx_eqx.StructureError`][]: a tree of refs does not have the required structure.
        Its subclasses are the next two;
    - [`refx_eqx.CarryError`][]: a change made by a function cannot be carried out of a
        transform;
    - [`refx_eqx.MismatchError`][]: two things that belong together do not fit;
    - [`refx_eqx.CollectionError`][]: a ref has another collection than the declared one;
    - [`refx_eqx.RefTypeError`][]: a value breaks the declared type of a ref;
    - [`refx_eqx.ImmutableError`][]: [`refx_eqx.mutable`][] does not allow a write;
    - [`refx_eqx.ConcurrencyError`][]: a ref was written while a call was using it;
    - [`refx_eqx.DonatedError`][]: the buffer of an array was donated, and is gone;
    - [`refx_eqx.CheckpointError`][]: a file is not a checkpoint, or is incomplete.
    """

    def __str__(self) -> str:
        error = type(self)
        printed_before = len(f"{error.__module__}.{error.__qualname__}: ")
        first, *others = super().__str__().split("\n")
        return "\n".join([wrapped(first, printed_before), *map(wrapped, others)])


class TraceLevelError(RefError, ValueError):
    """A ref was read or written inside a JAX trace that must not see it.

    Pass the ref to a lifted transform, and use the ref given to the function.

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
    """A tree of refs does not have the required structure.

    The message names the place or places where it differs.

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
    """A function's change to a tree or a ref cannot be carried out of the transform that
    runs it: it changed a list in place, or wrote where it may only read. Rewrite the
    function.

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
            remember_in_ref(seen, 2.0)  # changing state is in a ref
        assert seen.value == 2.0
        ```
    """


class MismatchError(StructureError):
    """Two things that belong together do not match: a tree and its axes, gradients or
    state; the input and output of a step; two branches. Correct one of the two.

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
    """A ref has another collection than the declared one.

    !!! Example

        ```python
        import refx_eqx as rx

        class Scale(rx.Module):
            by: rx.Param[float]

        mean = rx.Ref(2.0, "batch_stats")
        try:
            Scale(mean)  # shares the ref
        except rx.CollectionError:
            scale = Scale(mean.value)  # makes a new one
        assert scale.by.collection == "params"
        ```
    """


class RefTypeError(RefError, TypeError):
    """A value does not have the declared type of its ref, or a ref was used as if it were
    its value.

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
    """Another thread, or a callback in the call, wrote a ref while a call was using it. And
    the call could not be retried: a buffer had been donated, or the same happened at every
    retry.

    Serialize the calls of several threads with a lock. Let a callback return the new value,
    and write it in the function: `ref.value = jax.pure_callback(...)`.
    """


class DonatedError(RefError, RuntimeError):
    """The buffer of an array is gone: it was donated to a call, or deleted.

    [`refx_eqx.filter_jit`][] with `donate=` does not donate a ref's buffer that is also
    held elsewhere, so the cause is a call of another library, or `.delete()`.

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
    """A file could not be read as a checkpoint: it is truncated, or has another format or a
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


# Tracebacks show where an error is imported from, not where it is defined.
for _error in (
    RefError,
    *RefError.__subclasses__(),
    *StructureError.__subclasses__(),
):
    _error.__module__ = "refx_eqx"


def wrapped(line: str, start: int = 0) -> str:
    """A line of a message, if it starts at this column.

    Code in it stays whole, to be copied. An indented line belongs to a tree, as
    `eqx.tree_pformat` shows it, and stays as it is.
    """
    if line.startswith(" "):
        return line
    text = textwrap.fill(
        _CODE.sub(lambda code: code[0].replace(" ", "\0"), line),
        _WIDTH,
        initial_indent=" " * start,
        subsequent_indent=" " * 4,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return text[start:].replace("\0", " ")


def describe(ref: Any) -> str:
    """How every message refers to a ref, or to its node: `` `Linear.weight` (collection
    'params')``."""
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


def hide_frames(package: str) -> None:
    """Hides the frames of all imported modules of a package from pytest's tracebacks. pytest
    reads this variable of each module; JAX takes a path instead, see `_jax.py`."""
    for name, module in list(sys.modules.items()):
        if f"{name}.".startswith(f"{package}."):
            vars(module)["__tracebackhide__"] = True


def is_annotation(x: Any) -> bool:
    """Whether `x` annotates a field, and is not a class: `rx.Param`, say."""
    # `typing` has the class of type aliases from 3.12 on, `typing_extensions` before.
    return get_origin(x) is Annotated or type(x).__name__ == "TypeAliasType"


def check_name(what: str, **given: Any) -> None:
    """Checks that the name of a collection can be part of a key, and is not something that
    has a collection.

    **Raises:**

    - `TypeError`: if not.
    """
    for name, value in given.items():
        if type(value) is str:
            continue
        if isinstance(value, Shared):
            raise TypeError(
                f"`{what}` was given {name}={describe(value)}, a ref, instead of a name. Use "
                f"its collection: `{name}=ref.collection`."
            )
        if is_annotation(value):
            raise TypeError(
                f"`{what}` was given {name}={value!r}, an annotation, instead of a name. Use "
                f"the name: `{name}='params'`, for `rx.Param`."
            )
    try:
        hash(tuple(given.values()))
    except TypeError:
        texts = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise TypeError(
            f"`{what}` was given {texts}, which is not hashable. Use a string, or a tuple of "
            "them."
        ) from None
