"""Reads from the annotation of a field what its class declares about refs."""

import dataclasses
import inspect
import itertools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Annotated, Any, ClassVar, Final, get_args, get_origin, Union

from .._core._errors import CollectionError
from .._core._ref import Ref
from ._collection import Collection
from ._declared import Declared, DeclaredContainer, DeclaredRef
from ._hints import alias_of, hint_text, split_hint, value_of_alias, without_names
from ._names_of_class import is_unknown, Names
from ._ref_type import OpenRefHint, RefHint


class Annotation:
    """The annotation of a field: a type, or a string with one.

    It may name what is defined later in its module. So it can be read twice: when the class
    is made, and again when the first instance is, which is the last time.
    """

    def __init__(self, owner: type, field: str, annotation: Any):
        self.owner = owner
        self.field = field
        self._annotation = annotation
        self._names = Names(owner)
        self.place = f"{owner.__name__}.{field}"

    def declared(self, is_last: bool) -> Declared | None:
        """What it declares about refs; `None` if it contains none.

        **Raises:**

        - `NameError`: if it uses a name that is not defined. At last: only if a type alias
            does, because then it is not known whether the alias stands for a ref.
        - `TypeError`: if it puts refs into something that is not a pytree, or is a union of a
            ref and another type.
        - `CollectionError`: if it gives a ref two collections, or a collection to what is not
            a ref; or if it is a union of refs.
        """
        self._names.is_last = is_last
        try:
            return self._read(self._annotation, itertools.count())
        except NameError as e:
            if not is_last:
                raise
            name = self.owner.__name__
            raise NameError(
                f"`{self.place}` is annotated with a type alias that uses an "
                f"undefined name: {e}. So it is not known whether the field holds a ref. "
                f"Define that name before the first `{name}` is made (an import under `if "
                "TYPE_CHECKING` does not), or write what the alias stands for, in quotes, "
                "instead of the alias.",
                name=e.name,
            ) from None

    def is_plain(self) -> bool:
        """Whether it declares no ref, as far as is known when the class is made."""
        try:
            return self.declared(is_last=False) is None
        except NameError:
            return not self.is_of_instance()  # for a field, it is not yet known

    def is_of_instance(self) -> bool:
        """Whether it is of a field, not of a class variable, say."""
        self._names.is_last = True
        hint = self._names.evaluate(self._annotation)
        is_of_class = hint is ClassVar or get_origin(hint) is ClassVar
        return not is_of_class and not isinstance(hint, dataclasses.InitVar)

    def hint(self) -> Any:
        """The type, as far as its names are defined."""
        self._names.is_last = True
        return self._as_far_as_defined(self._annotation)

    def _read(
        self, annotation: Any, numbers: Iterator[int], inside: tuple = ()
    ) -> Declared | None:
        """As `declared`.

        **Arguments:**

        - `annotation`: all of the annotation, or a part.
        - `numbers`: numbers for the refs in it.
        - `inside`: the enclosing aliases. A recursive one declares nothing more.
        """
        hint, metadata = self._opened(annotation)
        while (alias := alias_of(hint)) is not None:
            if alias in inside:
                return None
            inside = (*inside, alias)
            hint, more = self._opened(value_of_alias(hint))
            metadata = (*more, *metadata)  # as in a nested `Annotated`
        collections = dict.fromkeys(x for x in metadata if isinstance(x, Collection))
        if isinstance(hint, RefHint | OpenRefHint):
            ref_type, hint = hint.ref_type, self._type_of_value(hint.value_hint)
        elif isinstance(hint, type) and issubclass(hint, Ref):
            ref_type, hint = hint, Any
        else:
            self._refuse_without_a_ref(hint, collections)
            return self._read_around(hint, numbers, inside)
        if len(collections) > 1:
            names = " and ".join(repr(x.name) for x in collections)
            raise CollectionError(
                f"The field `{self.place}` is annotated with collections {names}. Give "
                "only one."
            )
        collection = next((x.name for x in collections), None)
        number = next(numbers)
        return DeclaredRef(self.owner, self.field, number, hint, ref_type, collection)

    def _read_around(
        self, hint: Any, numbers: Iterator[int], inside: tuple
    ) -> Declared | None:
        """As `_read`, for what may contain refs, but is none."""
        origin: Any = get_origin(hint)
        arguments = get_args(hint)
        if origin is Final and arguments:
            return self._read(arguments[0], numbers, inside)
        if origin in (Union, types.UnionType):
            return self._read_union(arguments, numbers, inside)
        if inspect.isclass(origin) and issubclass(origin, Sequence | Mapping | Set):  # pyright: ignore[reportArgumentType] (`Final`)
            is_same_for_all = True
            if issubclass(origin, Mapping):
                arguments = arguments[1:]
            elif issubclass(origin, tuple):
                is_same_for_all = arguments[1:] == (Ellipsis,)
                arguments = arguments[:1] if is_same_for_all else arguments
            items = tuple(self._read(x, numbers, inside) for x in arguments)
            if all(item is None for item in items):
                return None
            if issubclass(origin, Set):
                raise TypeError(
                    f"A field is annotated as a {origin.__name__} of refs, which is not a "
                    "pytree. Use a tuple, a list or a dict."
                )
            return DeclaredContainer(origin, items, is_same_for_all)
        return None

    def _read_union(
        self, members: tuple, numbers: Iterator[int], inside: tuple
    ) -> Declared | None:
        """As `_read`, for a union: of a ref and `None`, or without refs."""
        found = [self._read(x, numbers, inside) for x in members]
        refs = [x for x in found if x is not None]
        if not refs:
            return None
        of_several = "Its value may be of several types: `rx.Param[A | B]`."
        if len(refs) > 1:
            raise CollectionError(
                f"The field `{self.place}` is annotated with a union of refs, of which "
                f"each may have its own collection and type. Give only one. {of_several}"
            )
        others = [
            self._type_of_value(x) for x, ref in zip(members, found) if ref is None
        ]
        for other in others:
            if other not in (None, type(None), Any) and not is_unknown(other):
                raise TypeError(
                    f"The field `{self.place}` is annotated with a union of a ref and "
                    f"`{hint_text(other)}`, but what is assigned to it becomes the value of "
                    f"a ref. Leave the other type out, or declare two fields. {of_several}"
                )
        refs[0].optional = type(None) in others or None in others
        return refs[0]

    def _opened(self, annotation: Any) -> tuple[Any, tuple]:
        """An annotation as `(hint, metadata)`, where the hint is not `Annotated`."""
        hint, metadata = self._names.evaluate(annotation), ()
        while get_origin(hint) is Annotated:
            hint, more = split_hint(hint)
            hint = self._names.evaluate(hint)  # in quotes
            metadata = (*more, *metadata)
        return hint, metadata

    def _refuse_without_a_ref(
        self, hint: Any, collections: Iterable[Collection]
    ) -> None:
        for collection in () if is_unknown(hint) else collections:
            text = f"rx.Collection({collection.name!r})"
            raise CollectionError(
                f"The field `{self.place}` is annotated with `{text}`, but "
                f"`{hint_text(hint)}` is not a ref, so it has no collection. Annotate a "
                f"ref: `Annotated[rx.Ref[...], {text}]`."
            )

    def _type_of_value(self, hint: Any) -> Any:
        if self._names.is_last:
            return self._as_far_as_defined(hint)
        return without_names(hint, self._names.evaluate)

    def _as_far_as_defined(self, hint: Any) -> Any:
        try:
            return without_names(hint, self._names.evaluate)
        except NameError:  # a name that exists only for the type checker
            return Any
