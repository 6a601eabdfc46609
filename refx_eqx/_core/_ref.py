"""`Ref`: a shared, mutable cell.

A `Ref` is a *leaf*: JAX never looks inside it. So a tree may hold one ref at two places,
and both are the same parameter.
"""

import copy
import itertools
import threading
import types
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, NamedTuple, overload, Self, TYPE_CHECKING, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._trees._changes import owned
from .._trees._equality import Shared
from .._trees._keys import gone
from . import _jax, _trace
from ._access import (
    check_readable,
    check_taken,
    check_unleaked,
    check_value,
    check_writable,
    Withheld,
)
from ._errors import check_name, describe, RefTypeError, StructureError
from ._identity import is_same, outermost
from ._misuse import (
    is_compared_by,
    missing_attribute,
    misuse,
    not_an_array,
    numpy_function,
    refuse_to_be_a_value,
)
from ._on_mesh import has_moved
from ._shown import pdoc, treescope_repr
from ._trace import Body


if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from jax.typing import ArrayLike


T = TypeVar("T")
_R = TypeVar("_R", bound="Ref")


IN_PLACE = "in place"


class _Commits:
    """Counts the writes to refs.

    - `count`: the number of writes. A lifted call reads its refs, computes, and writes
        back: if the count has not changed in between, no other thread wrote anything.
    - `restructured`: the number of writes that may have changed the structure of a ref
        whose value was a single JAX array (the new value is not one, or the collection or
        declared type differs), or that moved it to another sharding. Until it changes, what
        a repeated call knows about its refs still holds.
    - `lock`: held during each write.
    - `reader`: a weak reference to the plan that keeps the values it last read and wrote, if
        any. It drops them at the next write, so it keeps nothing alive that no ref holds.
    """

    __slots__ = ("count", "lock", "reader", "restructured")

    def __init__(self):
        self.count = 0
        self.restructured = 0
        self.lock = threading.Lock()
        self.reader: Callable[[], Any] = gone

    def written(self) -> None:
        """Notes a write. The lock must be held."""
        self.count += 1
        self.release()

    def release(self) -> None:
        """Drops the values that a plan keeps."""
        reader, self.reader = self.reader(), gone
        if reader is not None:
            reader.release()

    def store(self, updates: Iterable[tuple["Ref", Any]]) -> None:
        """Writes checked values in a single step. The lock must be held."""
        refs, values, channeled, channels = [], [], [], []
        for ref, value in updates:
            if (
                type(value) is not _jax.ConcreteArray
                and type(ref._value) is _jax.ConcreteArray
            ) or has_moved(ref._value, value):
                self.restructured += 1
            if type(value) is Channeled:
                channeled.append(ref)
                channels.append(value.channel)
                value = value.value
            refs.append(ref)
            values.append(value)
        try:
            one_step(
                itertools.chain(
                    map(set_value, refs, values),
                    map(_set_channel, channeled, channels),
                    map(_set_written, refs, itertools.repeat(True)),
                )
            )
        finally:
            # Last: a reader that saw half of this began with the old count, and will see
            # the new one.
            self.written()


# Exhausts an iterator written in C, over slot setters, which return `None`. CPython handles
# signals between interpreter steps, and there are none here: a `KeyboardInterrupt` comes
# before all of the writes, or after all of them.
one_step = any


commits = _Commits()

# Negative, so that it is never the address of an object.
_numbers = itertools.count(-1, -1)


class Ref(Shared, Generic[T]):
    """A shared, mutable, typed cell: a leaf of a pytree, held by identity.

    The same `Ref` at two places of a tree is one cell: a write through one place is seen at
    the other.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        ref = rx.Ref(jnp.zeros(3), collection="params")
        tree = {"a": ref, "b": [ref]}

        tree["a"].value += 1.0
        assert tree["b"][0].value[2] == 1.0
        assert ref.shape == (3,)
        ```

    The value is any pytree without a `Ref` inside. Its array-like leaves (JAX and NumPy
    arrays; Python `bool`, `int`, `float`, `complex`) are traced by the lifted transforms,
    and everything else is static. In an Equinox module inside the value, Python numbers are
    static too, as in Equinox: `inference` of an `eqx.nn.Dropout` is not state.

    A ref belongs to the JAX trace it was created in. It may be written only there, and read
    there and under `vmap`; anything else raises a [`refx_eqx.TraceLevelError`][], because
    the result would be silently stale.

    Refs are equal when they are the same ref. In this sense the ref that a lifted transform
    passes to its function *is* the outer ref, though it is another object: so a set, dict
    or predicate over refs that was made outside means the same inside. Use `==`, `in` or a
    look-up, never `is` or `id`. A program that compares refs is never used for refs that
    would compare differently.

    `copy.deepcopy` and `pickle` keep the sharing within what they copy. (A copied tree has
    the same closures, with the same refs; [`refx_eqx.clone`][] copies those too.)
    Subclasses survive `deref` and `reref`, but only their type does: a subclass may add
    methods, not attributes.

    **Arguments:**

    - `value`: the initial value.
    - `collection`: the purpose of the ref, such as `"params"`. Any hashable, or `None`.

    **Raises:**

    - `StructureError`: if `value`, or a function in it, holds a ref, or a `Value`, `Index` or
        `Dag`, which stand for refs.

    When it is read or written:

    - `TraceLevelError`: if the current trace does not allow it.
    - `ImmutableError`: if it is written where [`refx_eqx.mutable`][] forbids it.
    - `RefTypeError`: if the new value breaks the declared type, or if an index is assigned
        to a value that is not an array.
    """

    __slots__ = (
        "__weakref__",
        "_body",
        "_channel",
        "_collection",
        "_declared",
        "_hashed",
        "_name",
        "_number",
        "_outer",
        "_trace",
        "_value",
        "_written",
    )

    _value: Any
    _collection: Hashable
    _name: str | None
    # Identifies the ref, for the plans of `filter_jit`: no other ref ever has this number.
    _number: int
    # How a backward rule writes the ref, if it may. See `_engine/_backward.py`.
    _channel: Any
    # For an inner ref: the body it was made for, and the ref it stands for there (`None` if
    # unknown: in a rule that JAX runs after the call).
    _body: Body | None
    _outer: "Ref | None"
    # Whether this ref itself was hashed, and so may be in a set or a dict.
    _hashed: bool
    # The types declared by the fields that hold the ref, with their names bound.
    _declared: tuple[Any, ...] | None
    _trace: Any
    # Whether it was assigned since it was made: this shows that a body writes it, even with
    # an equal value. (Writes by a plan are not noted: none runs in a body.) `IN_PLACE` if
    # only something in its value was changed, by a transform inside the body.
    _written: "bool | str"

    def __init__(self, value: T, collection: Hashable = None):
        check_name("rx.Ref", collection=collection)
        self._collection = collection
        self._name = None
        self._declared = None
        self._trace = _jax.current_trace_ref()
        self._written = self._hashed = False
        self._number = next(_numbers)
        self._channel = self._body = self._outer = None
        self._value = check_value(self, value)

    if TYPE_CHECKING:
        __iter__ = None  # else `__getitem__` alone would make it iterable

        # To a type checker, a field annotated `Ref[T]` is a descriptor: it reads as the
        # ref, and accepts a value or a ref. At run time there is no such descriptor; the
        # field machinery wraps the value.
        def __get__(self, instance: Any, owner: Any = None, /) -> Self: ...
        # `None` is for `Param[...] | None`: pyright requires `__set__` of each union member
        # to accept the whole value. And mypy takes `Self` for the class of the field.
        def __set__(self, instance: Any, value: "T | Ref[T] | None", /) -> None: ...

    @property
    def value(self) -> T:
        """The current value."""
        if not _trace.is_at_home(self._trace):
            check_readable(self)
        value: Any = self._value
        if type(value) is not _jax.ConcreteArray:
            check_unleaked(self, value)
            for guard in _trace.guards.begun():
                guard.read(self, value)
        return value  # pyright: ignore[reportReturnType] (it is narrowed, to no end)

    @value.setter
    def value(self, value: T) -> None:
        check_writable(self)
        value = check_value(self, value)
        with commits.lock:
            commits.store(((self, value),))

    @overload
    def __getitem__(self, index: types.EllipsisType) -> T: ...
    @overload
    def __getitem__(self: "Ref[Array]", index: Any) -> Array: ...
    @overload
    def __getitem__(self, index: Any) -> Any: ...
    def __getitem__(self, index: Any) -> Any:
        """`ref[...]` is the value, and `ref[index]` a part of it."""
        return self.value if index is Ellipsis else self.value[index]  # type: ignore

    @overload
    def __setitem__(self, index: types.EllipsisType, value: T) -> None: ...
    @overload
    def __setitem__(
        self, index: "ArrayLike | slice | tuple[Any, ...] | None", value: Any
    ) -> None: ...
    def __setitem__(self, index: Any, value: Any) -> None:
        """`ref[...] = x` sets the value, and `ref[i] = x` is `value.at[i].set(x)`. The value
        is a new array: NumPy's, if it was."""
        if index is not Ellipsis:
            old: Any = self.value
            if not eqx.is_array_like(old):
                remedy = "Write a new value, `ref.value = ...`"
                if hasattr(old, "__setitem__"):
                    remedy += ", or change it in place, `ref.value[i] = x`"
                raise RefTypeError(
                    f"`ref[i] = x` sets part of an array, but {describe(self)} holds a "
                    f"{type(old).__name__}. {remedy}."
                )
            value = _with_part(old, index, value)
        self.value = value

    @property
    def collection(self) -> Hashable:
        """The purpose of the ref, such as `"params"`."""
        return self._collection

    @property
    def name(self) -> str | None:
        """The field that first held the ref, such as `"Linear.weight"`; for messages.

        A program is not compiled for a name. In a body it may be the name of another ref of
        the same kind, for which the program was compiled.
        """
        return self._name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value, which must be array-like."""
        return jnp.shape(_array_like(self))

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the value, which must be array-like."""
        return jnp.result_type(_array_like(self))

    @property
    def ndim(self) -> int:
        """The number of axes of the value, which must be array-like."""
        return jnp.ndim(_array_like(self))

    @property
    def size(self) -> int:
        """The number of elements of the value, which must be array-like."""
        return jnp.size(_array_like(self))

    def block_until_ready(self) -> Self:
        """Waits until the value is computed. `jax.block_until_ready(model)` calls it."""
        jax.block_until_ready(self.value)
        return self

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, Ref):
            return is_same(self, other)
        # JAX and Equinox compare arbitrary leaves: in trees that are cache keys.
        if eqx.is_array_like(other) and not is_compared_by("jax", "equinox"):
            raise misuse(self, "`==`")
        return NotImplemented

    def __ne__(self, other: object) -> bool:
        if isinstance(other, Ref):
            return not self == other
        # No look-up comes here. But `jax.lax.cond(ref, ...)` does, with `pred != 0`; and
        # `eqx.tree_equal`.
        if eqx.is_array_like(other) and not is_compared_by("equinox"):
            raise misuse(self, "`!=`")
        return NotImplemented

    def __hash__(self) -> int:
        if not self._hashed:
            self._hashed = True
            # A plan may depend on its refs not being in a set or dict.
            commits.restructured += 1
        return object.__hash__(outermost(self))

    if not TYPE_CHECKING:  # else every attribute is there for a type checker

        def __getattr__(self, name: str) -> Any:
            own = getattr(type(self), name, None)
            if isinstance(own, property) and own.fget is not None:
                return own.fget(self)  # called again if the property itself raised
            # An empty slot, as in a ref that is being made, also arrives here.
            value = None if name == "_value" else self._value
            raise missing_attribute(self, name, value)

    def __copy__(self) -> Self:
        return like(self, owned(taken(self)))

    def __deepcopy__(self, memo: dict) -> Self:
        return like(self, copy.deepcopy(taken(self), memo))

    def __reduce__(self):
        check_no_attributes(self)
        state = type(self), taken(self), self._collection, self._name, self._declared
        return _unpickle, state

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        # Without it NumPy makes an array of the `Ref` object itself.
        not_an_array(self)

    def __array_function__(self, fn: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        return numpy_function(self, fn, args, kwargs)

    def __jax_array__(self) -> Any:
        # Without it `eqx.tree_serialise_leaves` silently omits a ref. JAX refuses the
        # result; Equinox calls this for every field with `init=False`.
        return self

    def __repr__(self) -> str:
        return eqx.tree_pformat(self)

    __treescope_repr__ = treescope_repr
    __pdoc__ = pdoc


def is_ref(x: Any) -> "TypeIs[Ref]":
    """Whether `x` is a [`refx_eqx.Ref`][]. For use as an `is_leaf` or a filter.

    !!! Example

        ```python
        import equinox as eqx
        import refx_eqx as rx

        tree = {"w": rx.Ref(1.0), "act": "relu"}
        refs, rest = eqx.partition(tree, rx.is_ref)
        assert rx.is_ref(refs["w"]) and refs["act"] is None
        ```

    **Arguments:**

    - `x`: anything.

    **Returns:**

    A `bool`.
    """
    return isinstance(x, Ref)


class Channeled(NamedTuple):
    """The value of a ref together with its channel, as a transform carries them."""

    value: Any
    channel: Any


def content(ref: Ref) -> Any:
    """What a transform carries for a ref: its value, with the channel if there is one."""
    return ref._value if ref._channel is None else Channeled(ref._value, ref._channel)


# Bypasses the `__setattr__` of a subclass, which might raise between two refs of one call.
set_value = Ref.__dict__["_value"].__set__
_set_channel = Ref.__dict__["_channel"].__set__
_set_written = Ref.__dict__["_written"].__set__


def set_content(ref: Ref, x: Any) -> None:
    if type(x) is Channeled:
        set_value(ref, x.value)
        _set_channel(ref, x.channel)
    else:
        set_value(ref, x)


def taken(ref: Ref) -> Any:
    """The value of a ref, for other code, to which a donated buffer has no name."""
    value = ref.value
    check_taken(ref, value)
    return value


def _with_part(old: Any, index: Any, part: Any) -> Any:
    """The array, with another part. A NumPy array stays one if it can: JAX may not have its
    dtype, and would change its other elements."""
    if isinstance(old, np.ndarray) and not any(
        map(_jax.is_tracer, jax.tree.leaves((index, part)))
    ):
        new = old.copy()
        new[index] = part
        return new
    old = jnp.asarray(old)
    return old.at[index].set(part, out_sharding=_jax.typed_sharding(old))


def _array_like(ref: Ref) -> Any:
    value = ref.value
    if not eqx.is_array_like(value) and not hasattr(value, "dtype"):
        raise AttributeError(
            f"{describe(ref)} holds {type(value).__name__}, which has no shape or dtype."
        )
    return value


def declare(ref: Ref, bound: Any) -> None:
    """Adds a declared type to `ref`: each field that shares a ref declares one."""
    known = ref._declared or ()
    if bound not in known:
        others = tuple(x for x in known if x.declared is not bound.declared)
        ref._declared = (*others, bound)
        commits.restructured += 1


def make_ref(
    ref_type: type[_R],
    value: Any,
    collection: Hashable,
    name: str | None,
    declared: tuple[Any, ...] | None,
) -> _R:
    """A new ref that belongs to the current trace. Its value is not checked.

    JAX rebuilds trees with placeholder leaves (`None`, `True`, `object()`, a
    `ShapeDtypeStruct`), so a ref made by the library must be able to hold anything.
    """
    ref = object.__new__(ref_type)
    ref._channel = ref._body = ref._outer = None
    set_content(ref, value)
    ref._collection = collection
    ref._name = name
    ref._declared = declared
    ref._trace = value if type(value) is Withheld else _jax.current_trace_ref()
    ref._written = ref._hashed = False
    ref._number = next(_numbers)
    return ref


def check_no_attributes(ref: Ref) -> None:
    """Refuses attributes of a subclass, which copies and inner refs would lose.

    **Raises:**

    - `StructureError`: if there is one.
    """
    own = dict(getattr(ref, "__dict__", ()))
    for cls in type(ref).__mro__[: type(ref).__mro__.index(Ref)]:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(ref, name):
                own[name] = None
    if own:
        raise StructureError(
            f"Cannot carry the attribute `{next(iter(own))}` of a {type(ref).__name__}, "
            f"{describe(ref)}: a subclass of `rx.Ref` may only add methods: its type is "
            "kept, but not its attributes. Put the attribute into the value, or into a "
            "module that has the ref; one common to all refs, into the class."
        )


def like(ref: _R, value: Any) -> _R:
    """A new ref that differs from `ref` only in its value."""
    check_no_attributes(ref)
    return make_ref(type(ref), value, ref._collection, ref._name, ref._declared)


def _unpickle(
    ref_type: type,
    value: Any,
    collection: Hashable,
    name: str | None,
    declared: tuple[Any, ...] | None = None,
) -> Ref:
    known = tuple(bound for bound in declared or () if bound)
    return make_ref(ref_type, value, collection, name, known or None)


_jax.refuse_as_array(Ref, not_an_array)
refuse_to_be_a_value(Ref, misuse)
