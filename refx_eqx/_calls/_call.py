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
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from .._core import _jax, _trace
from .._core._access import check_readable, check_unleaked, Withheld
from .._core._deref import deref_leaves
from .._core._errors import ConcurrencyError, name_of, RefTypeError
from .._core._identity import Asked, asked_of
from .._core._nodes import is_traced
from .._core._ref import commits, content, IN_PLACE, Ref
from .._trees._closure import Part
from ._body import apply, run_body
from ._commit import commit, Disturbed, rescue, updates_of
from ._structure import flatten, Leaves, Outcome, split, Structure, tree_of


__tracebackhide__ = True


P = ParamSpec("P")


T = TypeVar("T")


class Call:
    """A call, derefed: the refs that it carries, the arrays of its trees, its structure.

    - `arrays`: for each argument, the keywords and the callable, its derefed leaves, with
        `None` for what is static;
    - `leaves`: the same with refs and statics in it, as they were found;
    - `refs`, `values`: the refs by number, and what was read from them.
    """

    __slots__ = (
        "arrays",
        "asked",
        "flat",
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
        # The function last, so that a ref is first where the arguments have it.
        for tree in (*args, kwargs, fn):
            leaves, part = flatten(tree)
            self.leaves.append(leaves)
            parts.append(part)
            _check_no_lost_write(fn, leaves)
        # A body tells by it which traces a transform of JAX opened around it.
        self.trace = _jax.current_trace()
        # What `filter_jit` learned of this call before it compiles.
        self.traced: Any = None
        # Its arrays as a program takes them: see `_engine/_flat.py`.
        self.flat: Any = None
        # What a program returned that may have been given buffers of the refs: see `rescue`.
        self.returned: list[Any] = []
        # What the body asked of the identity of the refs, by their ids.
        self.asked: dict[int, set[Any]] = {}
        in_body = bool(_trace.thread.state.bodies)
        self.refs: list[Ref] = []
        self.values: list[Any] = []

        def read(ref: Ref) -> Any:
            # Most refs are of the running trace, outside all bodies: nothing to ask.
            is_elsewhere = in_body or ref._trace() is not self.trace
            if is_elsewhere and type(ref._trace) is not Withheld:
                check_readable(ref)
            self.refs.append(ref)
            self.values.append(ref._value)
            if type(ref._value) is not _jax.ConcreteArray:
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
    def parts(self) -> list[Part]:
        return self.structure.parts

    def tree(self, i: int, leaves: Leaves) -> Any:
        """The derefed tree number `i`, with other leaves: a gradient, say."""
        return tree_of(self.parts[i], leaves)

    @_trace.tidying
    def run(
        self,
        name: str,
        arrays: list[Leaves],
        transparent: bool = True,
        apply: Callable[..., Any] = apply,
        withheld: Mapping[tuple[int, int], Withheld] = {},
    ) -> Outcome:
        """The body of the lifted transform `name`, on these arrays. See `run_body`."""
        # Here JAX traces, or evaluates: in a trace of its own, to which the inner refs belong.
        with _trace.running_body(
            name, self.refs, self.trace, transparent, self.asked
        ) as body:
            return run_body(self.structure, body, self.refs, arrays, apply, withheld)

    def identities(self) -> Asked:
        """What the body has asked of the identity of the refs."""
        return asked_of(self.refs, self.asked)

    def finish(self, outcome: Outcome) -> Any:
        """Closes the result, and writes back what was written."""
        # First, because it runs code of others, which may raise: how a node of theirs is made.
        result = close_result(outcome, self.refs)
        commit(self.refs, self.values, self.started, updates_of(outcome, self.refs))
        for i in outcome.info.in_place:
            self.refs[i]._written = IN_PLACE
        return result


def _check_no_lost_write(fn: Any, leaves: list[Any]) -> None:
    """JAX lets any attribute of an array be set. An array in the place of a ref (put there by
    `eqx.tree_at`, say) swallows what is written to it."""
    for leaf in leaves:
        if type(leaf) is _jax.ConcreteArray and "value" in leaf.__dict__:
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

    Why not as an argument: all that `jax.jit` is given is traced, or hashed and kept in its
    cache. A call can be neither: it holds refs and arrays, and is a new one each time. And why
    a list: the function may be traced inside the trace of another.
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


def close_result(outcome: Outcome, refs: list[Ref]) -> Any:
    """The result with refs in it: those of the call are `refs`, the others are new."""
    if outcome.info.build is not None:
        return outcome.info.build(outcome.out)
    structure = outcome.info.result
    (result,) = structure.trees(structure.leaves([outcome.out], dict(enumerate(refs))))
    return result


_MAX_TRIES = 1000


# JAX takes the frames of this library and its own out of a traceback that passes here.
@_jax.api_boundary
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
    hook = _jax.debug_hook()
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
            _jax.restore_debug_hook(hook)
    raise ConcurrencyError(
        f"Other threads changed the refs of `{name_of(fn)}` during each of {_MAX_TRIES} "
        "calls. Serialize the calls with a lock."
    )
