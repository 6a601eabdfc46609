"""A call of a lifted transform: derefed, run on inner refs, written back.

Every lifted transform is the same three steps, with a transform of JAX in the middle:

    derefed = Call(fn, args, kwargs)         # trees of refs -> arrays | structure
    outcome = transform(derefed.run)(...)    # the body runs on inner refs, of its own
    result = derefed.finish(outcome)         # close the result, write back what was written

`Call` finds every ref that the call carries: in the arguments, in the callable, in what a
function closes over. `run` makes an inner ref for each, rebuilds the trees around them, calls
the function, and returns an `Outcome`: the arrays of the result and of the refs that were
written, and no others. `finish` is the only place where a caller's ref is written: all at
once, last. The arguments come first, so the refs of a call are numbered as `rx.deref(args)`
numbers them.
"""

import copy
from collections.abc import (
    Callable,
    Hashable,
    Mapping,
    Sequence,
    Set,
)
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax.tree_util as jtu

from .._trees._carried import Carried
from .._trees._changes import place_of, Watch
from .._trees._containers import containers, owned
from . import _trace
from ._access import (
    check_readable,
    check_unleaked,
    check_value,
    check_writable,
    Withheld,
)
from ._dag import Dag
from ._deref import deref_leaves, make_ref_of
from ._derefed import tree_of
from ._errors import (
    CarryError,
    ConcurrencyError,
    describe,
    name_of,
    RefTypeError,
    StructureError,
    TraceLevelError,
)
from ._identity import Asked, asked_of
from ._nodes import value_node
from ._on_mesh import on_mesh, Shardings
from ._ref import commits, content, IN_PLACE, Ref, set_value
from ._structure import (
    flatten,
    is_traced,
    is_traced_in_ref,
    Leaves,
    Outcome,
    OutcomeInfo,
    split,
    split_value,
    Structure,
)


__tracebackhide__ = True


P = ParamSpec("P")


T = TypeVar("T")


def _apply(fn: Any, /, *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


class Call:
    """A call, derefed: the refs that it carries, the arrays of its trees, its structure.

    - `arrays`: for each argument, the keywords and the callable, its derefed leaves, with
        `None` for what is static;
    - `leaves`: the same with refs and statics in it, as they were found;
    - `refs`, `values`: the refs by number, and what was read from them.
    """

    __slots__ = (
        "_flat",
        "arrays",
        "asked",
        "leaves",
        "refs",
        "returned",
        "started",
        "structure",
        "trace",
        "traced",
        "values",
    )

    def __init__(
        self,
        fn: Any,
        args: tuple,
        kwargs: dict,
        is_dynamic: Callable[[Any], bool] = is_traced,
    ):
        parts, self.leaves = [], []
        for tree in (*args, kwargs, fn):
            leaves, part = flatten(tree)
            self.leaves.append(leaves)
            parts.append(part)
            _check_no_lost_write(fn, leaves)
        self.trace = _trace.current_trace()
        # What `filter_jit` learned of this call before it compiles.
        self.traced: Any = None
        self._flat: tuple[list[Any], Any, Shardings] | None = None
        # What a program returned that may have been given buffers of the refs: see `rescue`.
        self.returned: list[Any] = []
        # What the body asked of the identity of the refs, by their ids.
        self.asked: dict[int, set[Any]] = {}
        in_body = bool(_trace.thread.state.bodies)
        self.refs: list[Ref] = []
        self.values: list[Any] = []

        def read(ref: Ref) -> Any:
            is_elsewhere = in_body or ref._trace() is not self.trace
            if is_elsewhere and type(ref._trace) is not Withheld:
                check_readable(ref)
            self.refs.append(ref)
            self.values.append(ref._value)
            if type(ref._value) is not _trace.ConcreteArray:
                check_unleaked(ref, ref._value)
            return content(ref)

        # At one moment: `commit` compares.
        self.started = commits.count
        numbers: dict[int, int] = {}
        derefed = [deref_leaves(leaves, numbers, read) for leaves in self.leaves]
        arrays, statics = zip(*(split(leaves, is_dynamic) for leaves in derefed))
        self.arrays: list[Leaves] = list(arrays)
        self.structure = Structure(parts, list(statics))

    @property
    def parts(self) -> list[Carried]:
        return self.structure.parts

    def _flatten(self) -> tuple[list[Any], Any, Shardings]:
        if self._flat is None:
            flat, treedef = jtu.tree_flatten(self.structure.flatten(self.arrays))
            shardings: Shardings = ()
            if _trace.is_evaluating():
                shardings = on_mesh(flat[treedef.children()[0].num_leaves :])
            self._flat = flat, treedef, shardings
        return self._flat

    @property
    def flat(self) -> list[Any]:
        """All arrays in one list: those outside refs, then those of each ref."""
        return self._flatten()[0]

    @property
    def treedef(self) -> Any:
        """What `flat` is the leaves of: the result of `Structure.flatten`."""
        return self._flatten()[1]

    @property
    def shardings(self) -> Shardings:
        """Where the arrays in refs are, as far as these are on a mesh."""
        return self._flatten()[2]

    @property
    def key(self) -> Hashable:
        """What two calls have in common that can run one program: the structure, and which
        refs have a channel."""
        return self.structure.key, self.treedef

    def forget_values(self) -> None:
        """Keeps neither arrays nor static leaves alive from now on: for a plan."""
        self._flat = [], self.treedef, self.shardings
        self.arrays, self.values, self.leaves = [], [], []
        self.structure = self.structure.weakened()

    def tree(self, i: int, leaves: Leaves) -> Any:
        """The derefed tree number `i`, with other leaves: a gradient, say."""
        return tree_of(self.parts[i], leaves)

    def run(
        self,
        name: str,
        arrays: list[Leaves],
        transparent: bool = True,
        apply: Callable[..., Any] = _apply,
        withheld: Mapping[tuple[int, int], Withheld] = {},
    ) -> Outcome:
        """The body of the lifted transform `name`, on these arrays. See `run_body`."""
        with _trace.running_body(
            name, self.refs, self.trace, transparent, self.asked
        ) as body:
            return run_body(self.structure, body, self.refs, arrays, apply, withheld)

    def identities(self) -> Asked:
        """What the body has asked of the identity of the refs."""
        return asked_of(self.refs, self.asked)

    def finish(self, outcome: Outcome) -> Any:
        """Closes the result, and writes back what was written."""
        result = close_result(outcome, self.refs)
        commit(self.refs, self.values, self.started, updates_of(outcome, self.refs))
        for i in outcome.info.in_place:
            self.refs[i]._written = IN_PLACE
        return result


def _check_no_lost_write(fn: Any, leaves: list[Any]) -> None:
    """JAX lets any attribute of an array be set. An array in the place of a ref (put there by
    `eqx.tree_at`, say) swallows what is written to it."""
    for leaf in leaves:
        if type(leaf) is _trace.ConcreteArray and "value" in leaf.__dict__:
            raise RefTypeError(
                f"`{name_of(fn)}` is called with {leaf.dtype}{list(leaf.shape)}, an array in "
                "no ref, to which `.value = ...` was written: no ref took that. Put a ref "
                "where the array is, `rx.Ref(value, collection)`, with `eqx.tree_at` for a "
                "field of a module, and write to the ref."
            )


def dispatching(derefed: Call) -> _trace.pushed:
    """While it lasts, `derefed` is the call that `running_call` finds.

    A transform of JAX that caches is given a function that knows nothing of a single call:
    it may be traced now, or was traced for another call of the same structure. Which refs
    and static leaves it runs on, when it is traced, the call says that is running then.
    """
    return _trace.pushed(_trace.thread.state.calls, derefed)


def running_call() -> Call:
    call = _trace.thread.state.calls[-1]
    if type(call) is tuple:
        # A plan: it knows all of a call but the refs that it is given.
        call = with_refs(*call)
    return call


def with_refs(derefed: Call, refs: list[Ref]) -> Call:
    """The same call, of other refs."""
    if derefed.refs is refs:
        return derefed
    derefed = copy.copy(derefed)
    derefed.refs, derefed.asked = refs, {}
    return derefed


def run_body(
    structure: Structure,
    body: _trace.Body,
    refs: Sequence[Ref | None],
    arrays: list[Leaves],
    apply: Callable[..., Any] = _apply,
    withheld: Mapping[tuple[int, int], Withheld] = {},
) -> Outcome:
    """Calls the function of a call on inner refs, made of these arrays.

    The inner refs are owned by the running trace, and stand for `refs` (`None` if it is
    not known for which) in `body`. This is a pure function of `arrays`. `apply` is given
    the callable and its arguments: one with several functions in it says which. At the
    leaves that are `withheld`, by the numbers of tree and leaf, there are refs that
    may not be touched.

    **Raises:**

    - `StructureError`: if the function changed something that cannot be carried back.
    - `RefTypeError`: if it changed a value in place to one that a ref does not declare.
    """
    name = body.name
    inner: dict[int, Ref] = {}
    leaves = structure.leaves(arrays, inner)
    both = [*inner.items(), *_withhold(structure, leaves, withheld).items()]
    for i, ref in both:
        ref._body, ref._outer = body, refs[i]
    numbers = {id(ref): i for i, ref in both}
    trees = structure.trees(leaves)
    before = {i: (ref._collection, _Before(ref)) for i, ref in inner.items()}
    watch = Watch(trees, _OPAQUE)
    *args, kwargs, fn = trees

    result = apply(fn, *args, **kwargs)

    lost = watch.lost(result)
    if lost is not None:
        raise CarryError(
            f"`{name}` cannot carry back a change of structure: the function changed "
            f"{place_of(lost, trees)} in place (a list appended to, an entry of a dict "
            "replaced, a closure variable rebound, ...). Put what changes into a `rx.Ref`, "
            "or change a copy, such as `list(...)` or `dict(...)`, and return that."
        )
    updates, written, in_place = {}, {}, set()
    for i, ref in inner.items():
        collection, earlier = before[i]
        if ref._collection != collection:
            raise CarryError(
                f"`{name}` cannot carry a change of collection: "
                f"{describe(ref._name, ref._collection)} had no collection when it came "
                "in. Give it one where it is made: `rx.Ref(value, collection)`."
            )
        differs = earlier.differs(ref)
        if ref._written or differs:
            updates[i], written[i] = split_value(content(ref))
        if earlier.changed_in_place() or ref._written == IN_PLACE:
            in_place.add(i)
    out, result_structure = _deref_result(result, numbers, name)
    return Outcome(out, updates, OutcomeInfo(result_structure, written, in_place))


def _withhold(
    structure: Structure,
    leaves: list[Leaves],
    withheld: Mapping[tuple[int, int], Withheld],
) -> dict[int, Ref]:
    """Puts refs that may not be touched at these leaves. Returns them, by the numbers of the
    refs that they are instead of."""
    made: dict[int, Ref] = {}
    for (i, k), reason in withheld.items():
        node = structure.statics[i][k]
        if node.index not in made:
            made[node.index] = make_ref_of(
                value_node(
                    reason, node.index, node.collection, node.ref_type, node.label
                )
            )
        leaves[i][k] = made[node.index]
    return made


# A `Dag` is passed by value.
_OPAQUE = (Ref, Dag, eqx.nn.State)


class _Before:
    """What a ref held when a body began: to notice what was not assigned."""

    __slots__ = ("_channel", "_value", "_watch")

    def __init__(self, ref: Ref):
        self._channel = ref._channel
        value = ref._value
        self._watch = None if is_traced_in_ref(value) else Watch([value], _OPAQUE)
        self._value = owned(value)

    def changed_in_place(self) -> bool:
        return self._watch is not None and self._watch.changed()

    def differs(self, ref: Ref) -> bool:
        if ref._channel is not self._channel:
            return True
        if not self.changed_in_place():
            return False
        # It was changed in place: only now is its type checked, against what was there.
        value = ref._value
        set_value(ref, self._value)
        set_value(ref, check_value(ref, value))
        return True


def is_ref_or_tracer(leaf: Any) -> bool:
    """What makes a node of a function that is returned: an array of the trace must come
    out as the other results do, and not stay behind in a cell."""
    return isinstance(leaf, Ref) or _trace.is_tracer(leaf)


def _deref_result(
    result: Any, numbers: dict[int, int], name: str
) -> tuple[Leaves, Structure]:
    """`numbers` are those of the inner refs in the call, by `id`."""
    leaves, part = flatten(result, is_ref_or_tracer)

    def read(ref: Ref) -> Any:
        if ref._trace() is not _trace.current_trace():
            raise TraceLevelError(
                f"`{name}` cannot return {describe(ref._name, ref._collection)}: it was "
                "created outside of the function and was not passed in. Pass the ref, or "
                "the module that holds it, as an argument."
            )
        return ref._value

    # Shapes stand for arrays in what a function is given, not in what it returns.
    out, statics = split(deref_leaves(leaves, numbers, read), eqx.is_array)
    return out, Structure([part], [statics])


def close_result(outcome: Outcome, refs: list[Ref]) -> Any:
    """The result with refs in it: those of the call are `refs`, the others are new."""
    if outcome.info.build is not None:
        return outcome.info.build(outcome.out)
    structure = outcome.info.result
    (result,) = structure.trees(structure.leaves([outcome.out], dict(enumerate(refs))))
    return result


def updates_of(outcome: Outcome, refs: list[Ref]) -> list[tuple[Ref, Any]]:
    """The refs of a call that were written, each with its new value.

    **Raises:**

    - `StructureError`: if a list or a dict was changed in place that another ref holds too.
    """
    if outcome.info.in_place:
        _check_unshared(refs, outcome.info.in_place)
    return [(refs[i], outcome.info.value(i, x)) for i, x in outcome.updates.items()]


def _check_unshared(refs: list[Ref], in_place: Set[int]) -> None:
    held = [containers(ref._value) for ref in refs]
    for i in in_place:
        for other, theirs in zip(refs, held):
            shared = [x for key, x in theirs.items() if key in held[i]]
            if shared and other is not refs[i]:
                both = [describe(r._name, r._collection) for r in (refs[i], other)]
                raise StructureError(
                    f"Cannot write {both[0]}: the function changed a "
                    f"{type(shared[0]).__name__} in its value in place, and {both[1]} holds "
                    "the same one, so Python would change both, and a transform one. Give "
                    "each ref its own, such as `rx.Ref(dict(...))`; or write a new value, "
                    "`ref.value = {**ref.value, ...}`, which changes one."
                )


class Disturbed(Exception):
    """Another thread wrote a ref while a call was using it: the call must run again."""


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
        if commits.count != started and not all(
            ref._value is value for ref, value in zip(refs, values)
        ):
            raise Disturbed
        if updates:
            commits.store(updates)


def rescue(refs: list[Ref], values: list[Any], returned: list[Any]) -> bool:
    """What is done if a call breaks off. Where buffers of its refs were donated, the new
    values are written, because the old ones are gone. Returns whether that was so.

    **Arguments:**

    - `refs`, `values`: the refs of the call, and what was read from them.
    - `returned`: what the program returned, if it did: see `_engine/_donation.py`.
    """
    if not returned or not any(map(_trace.is_deleted, jtu.tree_leaves(values))):
        return False
    flat, packed = returned[-1]
    _, updates, info = packed.treedef.unflatten(flat)
    with commits.lock:
        commits.store(
            (refs[i], info.value(i, x))
            for i, x in updates.items()
            if refs[i]._value is values[i]
        )
    return True


_MAX_TRIES = 1000


# JAX takes the frames of this library and its own out of a traceback that passes here.
@_trace.api_boundary
@_trace.tidying
def call(
    fn: Any,
    args: tuple,
    kwargs: dict,
    transform: Callable[[Call], Outcome],
    is_dynamic: Callable[[Any], bool] = is_traced,
) -> Any:
    """One call of a lifted transform: deref, transform, finish.

    If another thread wrote a ref of the call meanwhile, it starts again: the outcome of
    calls from several threads is that of some order of them.
    """
    hook = _trace.debug_hook()
    for _ in range(_MAX_TRIES):
        derefed = None
        try:
            derefed = Call(fn, args, kwargs, is_dynamic)
            return derefed.finish(transform(derefed))
        except Disturbed:
            continue
        except BaseException:
            if derefed is not None:
                rescue(derefed.refs, derefed.values, derefed.returned)
            raise
        finally:
            _trace.restore_debug_hook(hook)
    raise ConcurrencyError(
        f"Other threads changed the refs of `{name_of(fn)}` during each of {_MAX_TRIES} "
        "calls. Serialize the calls with a lock."
    )
