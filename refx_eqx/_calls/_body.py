"""The body of a lifted transform: the function of a call, run on inner refs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._core import _jax, _trace
from .._core._access import check_value, peek, refuse_cycle, Withheld
from .._core._deref import deref_leaves, make_ref_of, refuse_lookups
from .._core._errors import CarryError, describe, TraceLevelError
from .._core._nodes import is_traced_in_ref, split_value
from .._core._ref import content, IN_PLACE, Ref, set_value
from .._trees._cells import is_lookup, looked_up
from .._trees._changes import Changes, owned, place_of
from ._structure import flatten, Leaves, Outcome, OutcomeInfo, split, Structure


# Called with an error of the user's function and the trees it was given, to add a note. (A
# room that knows what classes declare adds to it.)
explanations: list[Callable[[Exception, Any], None]] = []


def apply(fn: Any, /, *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


def run_body(
    structure: Structure,
    body: _trace.Body,
    refs: Sequence[Ref | None],
    arrays: list[Leaves],
    apply: Callable[..., Any] = apply,
    withheld: Mapping[tuple[int, int], Withheld] = {},
) -> Outcome:
    """Calls the function of a call on inner refs made from these arrays.

    The inner refs belong to the current trace, and stand for `refs` (`None` if these are
    unknown) in `body`. This is a pure function of `arrays`. `apply` is given the callable
    and its arguments; if the callable contains several functions, it chooses. Leaves in
    `withheld`, by the numbers of tree and leaf, get refs that must not be touched.

    **Raises:**

    - `StructureError`: if the function made a change that cannot be carried back.
    - `RefTypeError`: if an in-place change of a value breaks the declared type of its ref.
    """
    name = body.name
    # Made where the function runs, so they belong to the current trace, which may write
    # them.
    inner: dict[int, Ref] = {}
    leaves = structure.leaves(arrays, inner)
    both = [*inner.items(), *_withhold(structure, leaves, withheld).items()]
    for i, ref in both:
        ref._body, ref._outer = body, refs[i]
    # Identifies returned refs, including withheld ones. (By `id`: each is alive until the
    # body has ended, and hashing a ref would count as asking for its identity.)
    numbers = {id(ref): i for i, ref in both}
    trees = structure.trees(leaves)
    before = {i: (ref._collection, _Before(ref)) for i, ref in inner.items()}
    # From here on, changes by the function to anything but refs would be lost.
    changes = Changes(trees)
    *args, kwargs, fn = trees

    try:
        result = apply(fn, *args, **kwargs)
    except (AttributeError, TypeError) as e:
        for explain in explanations:
            explain(e, trees)
        raise

    if changes.any():
        _check_changes(changes, trees, result, name)
    updates, written, in_place = {}, {}, set()
    for i, ref in inner.items():
        collection, earlier = before[i]
        if ref._collection != collection:
            raise CarryError(
                f"`{name}` cannot carry a change of collection: "
                f"{describe(ref)} had no collection when it came "
                "in. Give it one where it is made: `rx.Ref(value, collection)`."
            )
        # Always called, as it also checks the types of values changed in place.
        differs = earlier.differs(ref)
        if ref._written or differs:
            peek(ref)  # a list may have changed after it was assigned
            updates[i], written[i] = split_value(content(ref))
        if earlier.changed_in_place() or ref._written == IN_PLACE:
            in_place.add(i)
    out, result_structure = _deref_result(result, numbers, name)
    return Outcome(out, updates, OutcomeInfo(result_structure, written, in_place))


def _check_changes(changes: Changes, trees: list[Any], result: Any, name: str) -> None:
    """Refuses in-place changes to the trees of a call that would be lost, and those that
    made a tree hold itself."""
    refuse_cycle((*trees, result))
    lost = changes.lost(result)
    if lost is not None:
        raise CarryError(
            f"`{name}` cannot carry back a change of structure: the function changed "
            f"{place_of(lost, trees)} in place (a list appended to, an entry of a dict "
            "replaced, a closure variable rebound, ...). Put changing state into a "
            "`rx.Ref`, or change a copy, such as `list(...)` or `dict(...)`, and return "
            "that."
        )


def _withhold(
    structure: Structure,
    leaves: list[Leaves],
    withheld: Mapping[tuple[int, int], Withheld],
) -> dict[int, Ref]:
    """Puts refs that must not be touched at these leaves. Returns them, by the numbers of
    the refs that they replace."""
    made: dict[int, Ref] = {}
    for (i, k), reason in withheld.items():
        node = structure.statics[i][k]
        if node.index not in made:
            made[node.index] = make_ref_of(node.with_value(reason))
        leaves[i][k] = made[node.index]
    return made


class _Before:
    """The value of a ref when a body began, to notice changes without an assignment."""

    __slots__ = ("_changes", "_channel", "_value")

    def __init__(self, ref: Ref):
        self._channel = ref._channel
        value = ref._value
        self._changes = None if is_traced_in_ref(value) else Changes([value])
        self._value = owned(value)

    def changed_in_place(self) -> bool:
        return self._changes is not None and self._changes.any()

    def differs(self, ref: Ref) -> bool:
        if ref._channel is not self._channel:
            return True
        if not self.changed_in_place():
            return False
        # It was changed in place: its type is checked only now, against the old value.
        value = ref._value
        set_value(ref, self._value)
        set_value(ref, check_value(ref, value))
        return True


def is_ref_or_tracer(leaf: Any) -> bool:
    """The leaves for which a returned function becomes a node: an array of the trace must
    come out like the other results, and not stay in a cell."""
    return isinstance(leaf, Ref) or _jax.is_tracer(leaf)


def _refuse_inner_lookups(result: Any, name: str) -> None:
    """Refuses a set of inner refs, or a dict with such keys: the trace of these refs ends here,
    and they are not part of the tree."""

    def is_inner(x: Any) -> bool:
        return isinstance(x, Ref) and x._trace() is _jax.current_trace()

    leaves = jtu.tree_leaves(result, is_leaf=is_lookup)
    inner = [x for x in leaves if any(map(is_inner, looked_up(x)))]
    refuse_lookups(result, inner, f"return from `{name}`")


def _deref_result(
    result: Any, numbers: dict[int, int], name: str
) -> tuple[Leaves, Structure]:
    """`numbers` are the numbers of the inner refs in the call, by `id`."""
    leaves, part = flatten(result, is_ref_or_tracer)
    _refuse_inner_lookups(result, name)

    def read(ref: Ref) -> Any:
        if ref._trace() is not _jax.current_trace():
            raise TraceLevelError(
                f"`{name}` cannot return {describe(ref)}: it was "
                "created outside the function and was not passed in. Pass the ref, or "
                "the module that holds it, as an argument."
            )
        return peek(ref)

    # A `jax.ShapeDtypeStruct` stands for an array in the arguments of a function, but not
    # in its result.
    out, statics = split(deref_leaves(leaves, numbers, read), eqx.is_array)
    return out, Structure([part], [statics])
