"""What a class declares about the refs in a field.

`weight: rx.Param[Float[Array, "out in"]]` declares one ref; `tuple[rx.Param[Array], ...]`
declares a container of refs. `_annotation.py` reads this from the annotation. An
instance binds the names: see `_bound.py`.
"""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import jaxtyping

from .._core._access import peek, Withheld
from .._core._errors import CollectionError, describe, RefTypeError
from .._core._ref import commits, Ref
from ._axis_names import AxisNames, names_bound
from ._bound import BoundType
from ._conformance import has_placeholder, why_not_of_type
from ._construction import keep_state
from ._hints import hint_text
from ._parts import texts_in


# Visits each place that is declared a ref: with the declaration, the object there, and its
# place.
Visit = Callable[["DeclaredRef", Any, str], Any]


@dataclasses.dataclass(eq=False)
class DeclaredRef:
    """What a class declares about one ref in a field. Made once per class, compared by
    identity.

    - `owner`, `field`: the class, and the name of the field;
    - `number`: which of the refs in the annotation of the field, for a container;
    - `hint`: the type of the value;
    - `ref_type`, `collection`: those of the ref;
    - `sharding`: the `PartitionSpec` given by `rx.field`, or `None`;
    - `optional`: whether `None` is allowed instead.
    """

    owner: type
    field: str
    number: int
    hint: Any
    ref_type: type[Ref] = Ref
    collection: Hashable = None
    sharding: Any = None
    optional: bool = False

    def __post_init__(self) -> None:
        # Whether only shape and dtype matter.
        self.by_shape = "self." not in hint_text(self.hint) and (
            self.hint is jax.Array
            or isinstance(self.hint, type(jaxtyping.AbstractArray))
        )

    @functools.cached_property
    def _words(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """The names in the hint, and the attributes it uses as `{self.name}`."""
        text = " ".join(texts_in(self.hint))
        attributes = sorted(set(re.findall(r"\bself\.(\w+)", text)))
        return frozenset(re.findall(r"\w+", text)), tuple(attributes)

    def refs(self) -> Iterator["DeclaredRef"]:
        """All refs declared here."""
        yield self

    def map(self, visit: Visit, value: Any, where: str) -> Any:
        """Replaces each `x` in `value` that is declared a ref with `visit(declared, x,
        where)`. Returns the same object if nothing changes.

        **Raises:**

        - `RefTypeError`: if a container has the wrong kind or the wrong number of items.
        """
        if value is None and self.optional:
            return value
        return visit(self, value, where)

    def names(self, instance: Any = None) -> AxisNames:
        """The names bound in the running scope that this type mentions."""
        words, attributes = self._words
        names = names_bound(words)
        found = []
        # A field of a bare `equinox.Module` is made without its instance.
        for attribute in attributes if instance is not None else ():
            value = getattr(instance, attribute, None)
            value = tuple(value) if type(value) is list else value  # which has a hash
            if isinstance(value, Hashable) and not isinstance(value, jax.Array):
                found.append((attribute, value))
        return names._replace(attributes=tuple(found)) if found else names

    def bound(self, instance: Any = None) -> BoundType:
        """The type, with its names bound as in the running scope."""
        return BoundType(self, self.names(instance))

    def wrapped(self, value: Any, where: str) -> Ref:
        """A new ref for `value`; or `value` itself if it is a ref."""
        if isinstance(value, Ref):
            return value
        ref = self.ref_type(value, self.collection)
        ref._name = where
        return ref

    def ref_of(self, value: Any, where: str) -> Ref:
        """As `wrapped`; a ref takes the name and the collection of the field unless it
        already has them."""
        if not isinstance(value, Ref):
            return self.wrapped(value, where)
        keep_state(value)
        if value._collection is None:
            value._collection = self.collection
            commits.restructured += 1
        elif self.collection is not None and value._collection != self.collection:
            raise CollectionError(
                f"The field `{where}` has collection {self.collection!r}, but was given "
                f"{describe(value)}. Give it a ref of that collection, or pass the value "
                "(`ref.value`) to make a new ref."
            )
        if value._name is None:
            value._name = where
        return value

    def check(self, ref: Any, where: str, instance: Any = None) -> None:
        """Checks that this place has a ref of the declared class, with a value of its type.
        Binds axis names in the running scope.

        **Raises:**

        - `RefTypeError`: if it does not.
        """
        if not isinstance(ref, self.ref_type):
            raise RefTypeError(
                f"`{where}` is declared a `{self.ref_type.__name__}`, but holds "
                f"{eqx.tree_pformat(ref)}. Put `rx.Ref(value)` there, or assign the whole "
                "field, which wraps each value in a ref."
            )
        value = peek(ref)
        if type(value) is Withheld:
            return  # a module rebuilt where its refs must not be touched
        if has_placeholder(value):
            return  # shapes instead of arrays, to build a model without allocating it
        reason = why_not_of_type(value, self.hint)
        if reason is None:
            return
        bound = self.bound(instance)
        new = bound.converted(value)
        if new is None:
            raise bound.error(where, ref._collection, value, reason)
        keep_state(ref)
        with commits.lock:
            commits.store(((ref, new),))


@dataclasses.dataclass(eq=False)
class DeclaredContainer:
    """What a class declares about a tuple, list or dict that holds refs.

    - `kind`: the type of the container;
    - `items`: the declaration of each item, or one for all of them; `None` for an item
        without refs.
    """

    kind: type
    items: tuple["DeclaredRef | DeclaredContainer | None", ...]
    is_same_for_all: bool
    optional: bool = False

    def refs(self) -> Iterator[DeclaredRef]:
        for item in self.items:
            if item is not None:
                yield from item.refs()

    def map(self, visit: Visit, value: Any, where: str) -> Any:
        """See `DeclaredRef.map`."""
        if value is None and self.optional:
            return value
        self._check(value, where)
        container: Any = value  # pyright considers it possibly `None` until here
        keys = list(container) if isinstance(value, Mapping) else range(len(container))
        items = self.items * len(keys) if self.is_same_for_all else self.items
        new = {
            key: container[key]
            if item is None
            else item.map(visit, container[key], f"{where}[{key!r}]")
            for key, item in zip(keys, items)
        }
        if all(new[key] is container[key] for key in keys):
            return container
        if isinstance(value, Mapping):
            changed: Any = copy.copy(container)  # a `defaultdict` keeps its factory
            changed.update(new)
            return changed
        kind: Any = type(container)
        if hasattr(value, "_fields"):  # a named tuple
            return kind(*new.values())
        return kind(new.values())

    def _check(self, value: Any, where: str) -> None:
        n = len(self.items)
        if not isinstance(value, self.kind):
            expected = f"a {self.kind.__name__}"
        elif not self.is_same_for_all and len(value) != n:
            expected = f"a {self.kind.__name__} of {n} items"
        elif jtu.all_leaves([value]):  # a range, a string, a subclass of `list`
            raise RefTypeError(
                f"`{where}` is declared a {self.kind.__name__} of refs, but was given "
                f"{eqx.tree_pformat(value)}, which is not a pytree. Assign a tuple, a list "
                "or a dict."
            )
        else:
            return
        raise RefTypeError(
            f"`{where}` is declared {expected}, and cannot hold "
            f"{eqx.tree_pformat(value)}. Assign a value of the declared type, or change "
            "the declaration."
        )


Declared = DeclaredRef | DeclaredContainer
