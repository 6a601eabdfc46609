"""One ref has one option: what its places agree on, and what to do if they do not."""

import re
from collections.abc import Callable
from typing import Any

from .._calls._call import Call
from .._core._errors import describe, MismatchError
from .._core._ref import Ref
from .._trees._paths import dotted, key_text, Path, path_text, pattern_of
from ._by_filter import ByFilter, SAME
from ._by_place import Place


CARRY = "the carry"
"""Where a ref is carried: that gives it no axis, and no user can."""


def agreed(
    derefed: Call,
    ref: Ref,
    places: list[Place],
    kind: type[ByFilter],
    name: str,
    is_same: Callable[[Any, Any], bool],
    code: Callable[[Any], str | None],
) -> Any:
    """The option that all places of this ref agree on.

    **Arguments:**

    - `code`: code for an option; `None` if the arrays of the ref have several.

    **Raises:**

    - `MismatchError`: if they disagree.
    """
    if not places:
        return None
    first, *others = places
    for other in others:
        if is_same(first.what, other.what):
            continue
        texts = [
            repr(SAME) if x.what is SAME else code(x.what) or "one for each array"
            for x in (first, other)
        ]
        raise MismatchError(
            f"`{name}` met {describe(ref)} with two {kind.several}: {texts[0]} in "
            f"{_ref_where(derefed, first)}, {texts[1]} in {_ref_where(derefed, other)}. One ref is "
            f"one parameter: {_how_to_agree(derefed, ref, first, other, kind, code)}"
        )
    return first.what


def _ref_path(derefed: Call, place: Place) -> tuple[Path, bool]:
    """The path of the ref, or of the function that has it; and which of the two."""
    path, is_in_function = derefed.parts[place.tree].place_of(place.leaf)
    return tuple(map(key_text, path)), is_in_function


def _ref_where(derefed: Call, place: Place) -> str:
    path, _ = _ref_path(derefed, place)
    return f"{place.where} at {path_text(path)}" if path else place.where


def _how_to_agree(
    derefed: Call,
    ref: Ref,
    one: Place,
    other: Place,
    kind: type[ByFilter],
    code: Callable[[Any], str | None],
) -> str:
    if CARRY in (one.where, other.where):
        return (
            "take it out of the carry: the step can close over the module that has it, and "
            "use the slice."
        )
    # The place to change: the one without an option, or else the larger tree.
    longer = lambda place: len(_ref_path(derefed, place)[0])
    has_none = lambda x: x.what is not SAME and code(x.what) == kind.nothing
    wrong, right = sorted((other, one), key=lambda x: (not has_none(x), -longer(x)))
    now, wanted = code(wrong.what), code(right.what)
    if now is None or wanted is None:
        return f"give it the same {kind.several} in both."
    path, pattern = _differing(_ref_path(derefed, wrong), _ref_path(derefed, right))
    if path and wrong.tree != right.tree:
        of_place = f"{kind.called}({{rx.path({pattern}): {wanted}}}, default={now})"
        return (
            f"give {path_text(path)} in {wrong.where} the {kind.what} {wanted} too: its "
            f"`{kind.option}` may be `{of_place}`."
        )
    if right.what is SAME:
        wanted = kind.text_for(ref, wanted)
    which = f"{path_text(path)} in {wrong.where}" if path else wrong.where
    return f"give {which} the same `{kind.option}`, `{wanted}`."


def _differing(wrong: tuple[Path, bool], right: tuple[Path, bool]) -> tuple[Path, str]:
    """The path of the largest subtree that is at both places, at the wrong one; and the
    pattern of what is in it."""
    path, is_in_function = wrong
    if is_in_function:
        return path, pattern_of(path)
    n = 0
    while n < min(len(path), len(right[0])) and path[-1 - n] == right[0][-1 - n]:
        n += 1
    path = path[: len(path) - n]
    # Not `pattern_of`, which cannot name all that is in a subtree. No character is escaped
    # in a pattern; a key such as "a.b" is two names.
    return path, f'"{re.sub("[*?[]", "?", dotted(path))}.**"'
