"""Dataclass fields that hold refs.

`weight: rx.Param[Float[Array, "out in"]]` and `weight: Ref[...] = rx.field(collection=
"params")` are the same: a dataclass field whose converter wraps a value in a ref of the
field's collection, and keeps a ref unchanged.
"""

import contextlib
import dataclasses
import functools
import inspect
import threading
import types
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
from jax.sharding import PartitionSpec

from .._core._errors import check_name, CollectionError, describe, RefTypeError
from .._core._ref import declare, is_ref, Ref
from .._trees._cells import reachable
from .._trees._equality import UNSET
from ._annotation import Annotation
from ._axis_names import name_scope
from ._config import config
from ._construction import finish_fields, keep_state, ModuleMeta
from ._declared import Declared, DeclaredRef, Visit


# Two threads may make the first two instances.
_reading = threading.RLock()


class RefField(dataclasses.Field):
    """A dataclass field that may hold refs, and what its class declares about them.

    An annotation may use names that are defined after the class: it is then read when the
    first instance is made.
    """

    _annotation: Annotation
    _declared: Declared | None = None
    _is_read = False
    _owner_name = ""
    # Whether it is a field of an `rx.Module`, not of a bare `equinox.Module`.
    of_module: bool

    def __init__(
        self,
        plain: dataclasses.Field,
        collection: Any,
        converter: Any,
        sharding: PartitionSpec | None = None,
    ):
        refuse_shared(plain.default)
        # `Field` gains parameters from one Python to the next (3.14 adds `doc`).
        names = inspect.signature(dataclasses.Field).parameters
        super().__init__(**{name: getattr(plain, name) for name in names})
        with_converter = {**plain.metadata, "converter": self._convert}
        self.metadata = types.MappingProxyType(with_converter)
        self._collection = collection
        self._sharding = sharding
        self._converter: Callable[[Any], Any] | None = converter

    def __set_name__(self, owner: type, name: str) -> None:
        if not issubclass(owner, eqx.Module):
            raise TypeError(
                f"`rx.field` of `{owner.__name__}.{name}` makes no ref: `{owner.__name__}` "
                "is not a module. Derive it from `rx.Module` or `eqx.Module`."
            )
        annotation = inspect.get_annotations(owner).get(name, Any)
        self.bind(Annotation(owner, name, annotation))
        if not self.of_module:
            finish_fields(owner, _finish)

    def bind(self, annotation: Annotation) -> None:
        """Takes the annotation of the field, once its class is known."""
        self._annotation = annotation
        self._owner_name = annotation.owner.__name__
        self.of_module = isinstance(annotation.owner, ModuleMeta)
        with contextlib.suppress(NameError):  # of what is defined later
            self._read(is_last=False)

    @property
    def declared(self) -> Declared | None:
        """One ref, or a container of refs; `None` for a field without refs."""
        if not self._is_read:
            with _reading:
                if not self._is_read:  # by another thread
                    self._read(is_last=True)
        return self._declared

    @property
    def refs(self) -> tuple[DeclaredRef, ...]:
        """All refs declared in it."""
        return () if self.declared is None else tuple(self.declared.refs())

    @functools.cached_property
    def plain_hint(self) -> Any:
        """The type of a field without refs; otherwise `None`."""
        return self._annotation.hint() if self.declared is None else None

    def _read(self, is_last: bool) -> None:
        owner, name = self._annotation.owner, self._annotation.field
        declared = self._annotation.declared(is_last)
        if declared is None and self._collection is not UNSET:
            declared = DeclaredRef(owner, name, 0, Any)
        if self._sharding is not None and declared is None:
            raise TypeError(
                f"`rx.field(sharding=...)` of `{owner.__name__}.{name}`: the field holds "
                "no ref. Annotate it as one, `rx.Param[...]` or `rx.Ref[...]`; arrays "
                "outside refs are placed by `rx.axis_rules({rx.path(...): P(...)})`."
            )
        if declared is not None and self.metadata.get("static"):
            raise ValueError(
                f"`{owner.__name__}.{name}` is annotated as a ref, but is static: a static "
                "field cannot hold a ref, because it is not part of the pytree. Leave out "
                "`static=True`, or annotate the field with the type of the value."
            )
        for ref in () if declared is None else declared.refs():
            ref.sharding = self._sharding
            if self._collection is UNSET:
                continue
            if ref.collection not in (None, self._collection):
                raise CollectionError(
                    f"The field `{owner.__name__}.{name}` is annotated with "
                    f"collection {ref.collection!r}, but `rx.field` says "
                    f"{self._collection!r}. Give only one."
                )
            ref.collection = self._collection
        self._declared, self._is_read = declared, True

    def _convert(self, value: Any) -> Any:
        """Called by Equinox after the `__init__` of an instance."""
        if self.of_module:
            # The module has already converted assigned values, but not unassigned defaults.
            is_default = value is self.default
            done = not is_default and self._is_converted(value)
            return value if done else self.convert(value)
        return self.convert(value, visit=DeclaredRef.wrapped)

    def _is_converted(self, value: Any) -> bool:
        if self.declared is None:
            return self._converter is None
        if type(value) is Ref:
            return True
        try:
            return all(isinstance(ref, Ref) for _, ref, _ in self.refs_in(value))
        except RefTypeError:
            return False

    def finish(self, value: Any) -> None:
        """Gives the refs of a new bare `equinox.Module` what the field declares.

        Each is checked by itself, so axis names are only shared within one annotation.
        """
        for declared, ref, where in self.refs_in(value):
            declared.ref_of(ref, where)
            if config.check_types:
                with name_scope():
                    declared.check(ref, where)
                    bound = declared.bound()
                keep_state(ref)
                declare(ref, bound)

    def convert(
        self,
        value: Any,
        owner_name: str | None = None,
        visit: Visit = DeclaredRef.ref_of,
    ) -> Any:
        """Converts a value for the field: each value that is declared a ref is wrapped in
        one."""
        if self.declared is None:
            return value if self._converter is None else self._converter(value)
        if self._converter is not None and not isinstance(value, Ref):
            if value is not None or not self.declared.optional:
                value = self._converter(value)
        name = f"{owner_name or self._owner_name}.{self.name}"
        return self.declared.map(visit, value, name)

    def refs_in(
        self, value: Any, owner_name: str | None = None
    ) -> list[tuple[DeclaredRef, Any, str]]:
        """For each place that is declared a ref: the declaration, the object there in
        `value`, and the place."""
        found: list[tuple[DeclaredRef, Any, str]] = []

        def visit(declared: DeclaredRef, x: Any, where: str) -> Any:
            found.append((declared, x, where))
            return x

        if self.declared is not None:
            name = f"{owner_name or self._owner_name}.{self.name}"
            self.declared.map(visit, value, name)
        return found


def refuse_shared(default: Any) -> None:
    """Refuses a default that is a ref, or holds one."""
    if isinstance(default, Ref):
        raise TypeError(
            "The default of a field is a ref, which all instances would share. Give "
            "the value, and each instance makes its own ref; or use "
            "`rx.field(default_factory=lambda: ref)` to share it."
        )
    for ref in filter(is_ref, reachable(default)):
        raise TypeError(
            f"The default of a field holds {describe(ref)}, which all instances would "
            "share. Use `rx.field(default_factory=lambda: Linear(...))`, and each instance "
            "makes its own; or `rx.field(default_factory=lambda: linear)` to share it."
        )


def _finish(instance: Any) -> None:
    for field in dataclasses.fields(instance):
        if isinstance(field, RefField) and not field.of_module:
            field.finish(getattr(instance, field.name))


def field(
    *,
    collection: Hashable = UNSET,
    converter: Callable[[Any], Any] | None = None,
    static: bool = False,
    sharding: PartitionSpec | None = None,
    **kwargs: Any,
) -> Any:
    """As `equinox.field`, for a field that holds a ref. Works in an
    [`refx_eqx.Module`][] and in a plain `equinox.Module`.

    !!! Example

        ```python
        import equinox as eqx
        import jax.numpy as jnp
        import refx_eqx as rx
        from jaxtyping import Array, Int

        class Counter(eqx.Module):
            uses: rx.Ref[Int[Array, ""]] = rx.field(
                collection="counts", converter=jnp.asarray
            )

        counter = Counter(0)
        counter.uses.value += 1
        assert counter.uses.collection == "counts" and counter.uses.value == 1
        ```

    **Arguments:**

    - `collection`: the collection of the ref. By default, the one in the annotation.
    - `converter`: as in `equinox.field`; applied to a value before it is wrapped. An
        assigned `Ref` is shared, not converted.
    - `static`: as in `equinox.field`. A static field cannot hold a ref.
    - `sharding`: how the value is split over a mesh, a `jax.sharding.PartitionSpec` of mesh
        axes. It takes precedence over rules for axis names: see [`refx_eqx.axis_rules`][].
    - `**kwargs`: all other arguments of `equinox.field`.

    **Returns:**

    The dataclass field. A value assigned to it is wrapped in a `Ref`; a `Ref` is shared.

    **Raises:**

    - `ValueError`: if `static=True` is combined with `collection` or `sharding`, or with an
        annotation as a ref.
    - `TypeError`: if `collection` is not hashable, if the default is a ref or holds one, if
        the class is not an `equinox.Module`, or if `sharding` is not a `PartitionSpec` or is
        given for a field without refs.
    """
    if sharding is not None and not isinstance(sharding, PartitionSpec):
        raise TypeError(
            f"`rx.field(sharding={sharding!r})`: give a `jax.sharding.PartitionSpec` of "
            "mesh axes. The mesh itself is not part of a class: it is chosen where the "
            "model is placed."
        )
    if static:
        given = {
            "collection": collection is not UNSET,
            "sharding": sharding is not None,
        }
        for name in (name for name, is_given in given.items() if is_given):
            raise ValueError(
                f"`rx.field({name}=..., static=True)`: a static field cannot hold a "
                "ref, because it is not part of the pytree. Leave out one of the two."
            )
    if collection is not UNSET:
        check_name("rx.field", collection=collection)
    return RefField(eqx.field(static=static, **kwargs), collection, converter, sharding)
