"""The core: a function that reads and writes refs becomes a pure one.

Every lifted transform is the same three steps, with a transform of JAX in the middle:

    opened = open_call(fn, args, kwargs)        # trees of refs -> flat arrays + structure
    outcome = transform(opened.run)(arrays)     # the body runs on inner refs, of its own
    result = opened.finish(outcome)             # write back what was written, close the rest

`open_call` finds every ref that the call carries: in the arguments, in the callable, in
what a function closes over. Each becomes one slot of flat arrays, however often it is met.
`run` makes one inner ref a slot, rebuilds the trees around them, calls the function, and
returns an `Outcome`: the arrays of the result and of the refs that were written, and no
others. `finish` is the only place where a caller's ref is written: all at once, last.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import jax.tree_util as jtu

from . import _trace
from ._changes import place_of, Watch
from ._deref import deref, reref
from ._errors import (
    ConcurrencyError,
    describe,
    name_of,
    StructureError,
    TraceLevelError,
)
from ._identity import Asked, asked_of
from ._nodes import is_opened, Value
from ._ref import (
    Channelled,
    check_readable,
    check_unleaked,
    check_value,
    check_writable,
    commits,
    content,
    make_ref,
    Ref,
    Withheld,
)
from ._structure import (
    hold,
    is_traced,
    is_traced_in_ref,
    join_value,
    Outcome,
    OutcomeInfo,
    Reader,
    release,
    Slot,
    slot_of_array,
    split_value,
    Structure,
)


__tracebackhide__ = True


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _apply(fn: Any, /, *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


class Opened:
    """A call, opened: the refs it carries, the arrays in and beside them, the structure.

    The arrays are flat: those beside refs first (`n_bare` of them), then those of each ref,
    in order. `spans[k]` is where the arrays of ref `k` are.
    """

    __slots__ = (
        "arrays",
        "asked",
        "commit",
        "leaves",
        "refs",
        "spans",
        "structure",
        "trace",
        "traced",
        "values",
    )

    def __init__(
        self, reader: Reader, values: list[Any], arrays: list, spans: list, slots: list
    ):
        self.leaves = reader.leaves
        self.refs = reader.refs
        self.values = values
        self.arrays = arrays
        self.spans = spans
        self.structure = reader.structure(slots)
        self.trace = _trace.current_trace()
        # What `filter_jit` learnt of this call before it compiles.
        self.traced: Any = None
        # What the body asked of the identity of the refs, by their ids.
        self.asked: dict[int, set[Any]] = {}

    def run(
        self,
        name: str,
        arrays: list[Any],
        transparent: bool = True,
        apply: Callable[..., Any] = _apply,
        withheld: Sequence[tuple[int, Withheld]] = (),
    ) -> "Outcome":
        """The body of the lifted transform `name`, on these arrays. See `run_body`."""
        with _trace.running_body(
            name, self.refs, self.trace, transparent, self.asked
        ) as body:
            return run_body(self.structure, body, self.refs, arrays, apply, withheld)

    def identities(self) -> Asked:
        """What the body has asked of the identity of the refs."""
        return asked_of(self.refs, self.asked)

    def refs_after(self, outcome: "Outcome", arrays: list[Any]) -> list[Ref]:
        """Copies of the refs, as they would be after `finish`. Nothing is written.

        `arrays` are those before the call: `self.arrays`, or what stands for them.
        """
        copies = []
        for i, (ref, slot) in enumerate(zip(self.refs, self.structure.slots)):
            if i in outcome.updates:
                value = release(outcome.updates[i])
            else:
                value = join_value(slot.inside, iter(arrays[slice(*self.spans[i])]))
            copies.append(
                make_ref(
                    slot.ref_type, value, slot.collection, ref._name, ref._declared
                )
            )
        return copies

    def finish(self, outcome: "Outcome") -> Any:
        """Closes the result, and writes back what was written."""
        # Closed first, because to rebuild a class of the user's may raise.
        result = close_result(outcome, self.refs)
        updates = updates_of(outcome, self.refs)
        commit(self.refs, self.values, self.commit, updates)
        return result


def open_call(
    fn: Any,
    args: tuple,
    kwargs: dict,
    is_dynamic: Callable[[Any], bool] = is_traced,
) -> Opened:
    """Opens the call `fn(*args, **kwargs)`: everything that it carries, refs and arrays.

    **Arguments:**

    - `fn`, `args`, `kwargs`: the call. Each may be any pytree with refs in it.
    - `is_dynamic`: which leaves beside refs are arrays to carry.

    **Raises:**

    - `TraceLevelError`: if a ref may not be read here.
    """
    reader = Reader(is_dynamic)
    reader.read(fn)
    for arg in args:
        reader.read(arg)
    reader.read(kwargs)
    return open_refs(reader)


def open_refs(reader: Reader) -> Opened:
    """Reads the refs that were found, at one moment."""
    started = commits.count
    values, slots, spans = [], [], []
    arrays = list(reader.bare)
    trace, in_body = _trace.current_trace(), bool(_trace.thread.state.bodies)
    for ref in reader.refs:
        is_elsewhere = in_body or ref._trace() is not trace
        if is_elsewhere and type(ref._trace) is not Withheld:
            check_readable(ref)
        value = content(ref)
        values.append(value)
        start = len(arrays)
        if type(value) is _trace.ConcreteArray:
            arrays.append(value)
            slot = slot_of_array(type(ref), ref._collection, ref._declared)
        else:
            check_unleaked(ref, value)
            inside, its_arrays = split_value(value)
            arrays.extend(its_arrays)
            slot = Slot(type(ref), ref._collection, ref._declared, inside)
        spans.append((start, len(arrays)))
        slots.append(slot)
    opened = Opened(reader, values, arrays, spans, slots)
    opened.commit = started
    return opened


@contextlib.contextmanager
def dispatching(opened: Opened) -> Iterator[None]:
    """While it lasts, `opened` is the call that `running_call` finds.

    A transform that caches gets the structure of a call as static data. Which refs of the
    caller it stands for is no part of that, but a body that is being traced must know.
    """
    calls = _trace.thread.state.calls
    calls.append(opened)
    try:
        yield
    finally:
        calls.pop()


def running_call() -> Opened:
    call = _trace.thread.state.calls[-1]
    if type(call) is tuple:
        # Of a plan, which knows all of a call but the refs that it is given.
        call = with_refs(*call)
    return call


def with_refs(opened: Opened, refs: list[Ref]) -> Opened:
    """The same call, of other refs."""
    if opened.refs is refs:
        return opened
    opened = copy.copy(opened)
    opened.refs, opened.asked = refs, {}
    return opened


def run_body(
    structure: Structure,
    body: _trace.Body,
    refs: Sequence[Ref | None],
    arrays: list[Any],
    apply: Callable[..., Any] = _apply,
    withheld: Sequence[tuple[int, Withheld]] = (),
) -> Outcome:
    """Calls the function of an opened call on inner refs, made of these arrays.

    The inner refs are owned by the running trace, and stand for `refs` (`None` if it is
    not known for which) in `body`. This is a pure function of `arrays`. `apply` is given
    the callable and its arguments: one with several functions in it says which.
    At the leaves that are `withheld` there are refs that may not be touched.

    **Raises:**

    - `StructureError`: if the function changed something that cannot be carried back.
    - `RefTypeError`: if it changed a value in place to one that a ref does not declare.
    """
    name = body.name
    leaves, inner = structure.fill(arrays, body=body, outer=refs)
    before = [_Before(ref) for ref in inner]
    numbers = {id(ref): i for i, ref in enumerate(inner)}
    for ref, number in _withhold(structure, leaves, withheld):
        numbers[id(ref)] = number
        ref._body, ref._outer = body, refs[number]
    trees = structure.unflatten(leaves)
    watch = Watch(trees)
    fn, *args, kwargs = trees

    result = apply(fn, *args, **kwargs)

    lost = watch.lost(result)
    if lost is not None:
        raise StructureError(
            f"`{name}` cannot carry back a change of structure: the function changed "
            f"{place_of(lost, trees)} in place (a list appended to, an entry of a dict "
            "replaced, a closure variable rebound, ...). Put what changes into a `rx.Ref`, "
            "or change a copy, such as `list(...)` or `dict(...)`, and return that."
        )
    updates = {}
    for i, (ref, earlier) in enumerate(zip(inner, before)):
        if ref._collection != structure.slots[i].collection:
            raise StructureError(
                f"`{name}` cannot carry a change of collection: "
                f"{describe(ref._name, ref._collection)} had no collection when it came "
                "in. Give it one where it is made: `rx.Ref(value, collection)`."
            )
        if ref._written or earlier.differs(ref):
            updates[i] = hold(content(ref))
    out, info = _open_result(result, numbers, name)
    return Outcome(out, updates, info)


def _withhold(
    structure: Structure, leaves: list, withheld: Sequence[tuple[int, Withheld]]
) -> list[tuple[Ref, int]]:
    """Puts refs that may not be touched at these leaves; with the numbers of the refs that
    they stand for."""
    made: dict[int, Ref] = {}
    for leaf, reason in withheld:
        number = structure.codes[leaf]
        if number not in made:
            slot, note = structure.slots[number], structure.notes[number]
            made[number] = make_ref(
                slot.ref_type, reason, slot.collection, note.name, note.declared
            )
        leaves[leaf] = made[number]
    return [(ref, number) for number, ref in made.items()]


class _Before:
    """What a ref held when a body began: to notice what was not assigned."""

    __slots__ = ("_channel", "_watch")

    def __init__(self, ref: Ref):
        self._channel = ref._channel
        value = ref._value
        self._watch = None if is_traced_in_ref(value) else Watch([value])

    def differs(self, ref: Ref) -> bool:
        if ref._channel is not self._channel:
            return True
        if self._watch is None or not self._watch.changed():
            return False
        # It was changed in place: only now is its type checked.
        check_value(ref, ref._value)
        return True


def _open_result(
    result: Any, numbers: dict[int, int], name: str
) -> tuple[list, OutcomeInfo]:
    """`numbers` are those of the inner refs in the call, by `id`."""
    reader = Reader(is_result=True)
    reader.read(result)
    carried: dict[int, int] = {}
    slots = []
    out = list(reader.bare)
    for i, ref in enumerate(reader.refs):
        number = numbers.get(id(ref))
        if number is not None:
            carried[i] = number
            slots.append(Slot(type(ref), ref._collection, None, None))
            continue
        if ref._trace() is not _trace.current_trace():
            raise TraceLevelError(
                f"`{name}` cannot return {describe(ref._name, ref._collection)}: it was "
                "created outside of the function and was not passed in. Pass the ref, or "
                "the module that holds it, as an argument."
            )
        # Scalars of Python stay what they are: they are part of the structure here.
        inside, its_arrays = split_value(ref._value)
        slots.append(Slot(type(ref), ref._collection, ref._declared, inside))
        out.extend(its_arrays)
    return out, OutcomeInfo(reader.structure(slots), carried)


def close_result(outcome: Outcome, refs: list[Ref]) -> Any:
    """The result with refs in it: those of the call are `refs`, the others are new."""
    if outcome.info.build is not None:
        return outcome.info.build(outcome.out)
    structure = outcome.info.result
    own = {i: refs[number] for i, number in outcome.info.carried.items()}
    leaves, _ = structure.fill(outcome.out, own)
    (result,) = structure.unflatten(leaves)
    return result


class Disturbed(Exception):
    """Another thread wrote a ref while a call was using it: the call must run again."""


def updates_of(outcome: Outcome, refs: list[Ref]) -> list[tuple[Ref, Any]]:
    """The refs of a call that were written, each with its new value."""
    return [(refs[i], release(x)) for i, x in outcome.updates.items()]


def commit(
    refs: list[Ref], values: list[Any], started: int, updates: list[tuple[Ref, Any]]
) -> None:
    """Writes the updates of a call into the caller's refs: all of them, or none.

    The result of a call is right if no ref that it read was written meanwhile. If one was,
    raises `Disturbed`, and nothing is written.

    **Arguments:**

    - `refs`, `values`: the refs of the call, and what was read from them.
    - `started`: `commits.count` before that.
    - `updates`: the refs to write, with their new values.
    """
    trace, state = _trace.current_trace(), _trace.thread.state
    quiet = not state.bodies and not _trace.guards.get()
    for ref, _ in updates:
        if not (quiet and ref._trace() is trace):
            check_writable(ref)
    with commits.lock:
        if commits.count != started and not all(map(_holds, refs, values)):
            raise Disturbed
        if updates:
            commits.store(updates)


def _holds(ref: Ref, value: Any) -> bool:
    return ref._value is (value.value if type(value) is Channelled else value)


_MAX_TRIES = 1000


# JAX takes the frames of this library and its own out of a traceback that passes here.
@_trace.api_boundary
def call(
    fn: Any,
    args: tuple,
    kwargs: dict,
    transform: Callable[[Opened], Outcome],
    is_dynamic: Callable[[Any], bool] = is_traced,
) -> Any:
    """One call of a lifted transform: open, transform, finish.

    If another thread wrote a ref of the call meanwhile, it starts again: the outcome of
    calls from several threads is that of some order of them.
    """
    hook = _trace.debug_hook()
    for _ in range(_MAX_TRIES):
        opened = open_call(fn, args, kwargs, is_dynamic)
        try:
            return opened.finish(transform(opened))
        except Disturbed:
            continue
        finally:
            _trace.restore_debug_hook(hook)
    raise ConcurrencyError(
        f"Other threads changed the refs of `{name_of(fn)}` during each of {_MAX_TRIES} "
        "calls. Take turns: guard the calls with a lock."
    )


def functionalize(fn: Callable[_P, _T]) -> Callable[_P, tuple[_T, Any]]:
    """The pure function that the lifted transforms are made of, to use by hand.

    !!! Example

        ```python
        import jax
        import refx_eqx as rx

        def step(ref, x):
            ref.value += x
            return ref.value * 2

        ref = rx.Ref(1.0, "counts")
        args = (ref, 2.0)
        out, updates = jax.jit(rx.functionalize(step))(*rx.deref(args))
        assert out == 6.0 and ref.value == 1.0  # nothing was written yet
        rx.update_refs(args, updates)
        assert ref.value == 3.0
        ```

    **Arguments:**

    - `fn`: a function that reads and writes the refs in its arguments.

    **Returns:**

    A pure function `(*args, **kwargs) -> (out, updates)`. It takes derefed arguments: deref
    all of them at once, so that what they share stays shared. `out` is the derefed result.
    `updates` has the structure of the derefed positional arguments (of `(args, kwargs)` if
    there are keywords), with the new values of the refs that were written and `None` for all
    else: what [`refx_eqx.update_refs`][] takes.

    **Raises:**

    - `StructureError`: if the arguments are not derefed, if `fn` changes the structure of
        an argument, or if it writes a ref that it is not given as an argument.
    """

    @functools.wraps(fn)
    def pure(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        inner_args, inner_kwargs = reref((args, kwargs))
        carried = inner_args if not kwargs else (inner_args, inner_kwargs)
        # Before the call, which may consume what it is given.
        leaves, derefed = jtu.tree_leaves(carried), deref(carried)
        opened = open_call(fn, inner_args, inner_kwargs)
        outcome = opened.run("functionalize", opened.arrays)
        numbers = {id(ref): i for i, ref in enumerate(opened.refs)}
        new = {i: release(x) for i, x in outcome.updates.items()}
        _check_passed(fn, [opened.refs[i] for i in new], leaves)
        # The caller's tree, with `None` instead of all but what was written.
        updates = _replace_values(
            leaves, derefed, lambda ref: new.get(numbers[id(ref)])
        )
        final = opened.refs_after(outcome, opened.arrays)
        return deref(close_result(outcome, final)), updates

    return pure


def _check_passed(fn: Any, written: list[Ref], leaves: list[Any]) -> None:
    """Refuses a write that is not among the updates, which are of the arguments."""
    passed = set(map(id, leaves))
    for ref in written:
        if id(ref) not in passed:
            raise StructureError(
                f"`functionalize`: `{name_of(fn)}` writes "
                f"{describe(ref._name, ref._collection)}, which it does not get as an "
                "argument: it closes over it, or is a module that holds it. The updates "
                "are those of the arguments, so this write would be lost. Pass the ref, or "
                "the module that holds it, as an argument."
            )


def _replace_values(refs: list[Any], opened: Any, value: Callable[[Ref], Any]) -> Any:
    """`opened`, the derefed form of a tree with the leaves `refs`, with `value(ref)` in
    each `Value`."""
    nodes, treedef = jtu.tree_flatten(opened, is_leaf=is_opened)
    replaced = []
    for ref, node in zip(refs, nodes):
        if isinstance(node, Value):
            node = Value(
                value(ref), node.index, node.collection, node.ref_type, node.note
            )
        elif not isinstance(ref, Ref):
            node = None
        replaced.append(node)
    return jtu.tree_unflatten(treedef, replaced)
