"""A call of a lifted transform: derefed, run on inner refs, written back.

Every lifted transform is the same three steps, with a transform of JAX in the middle:

    derefed = Call(fn, args, kwargs)         # trees of refs -> arrays | structure outcome =
    transform(derefed.run)(...) # the body runs on inner refs result =
    derefed.finish(outcome) # close the result, write back the updates

`Call` finds every ref that the call carries: in the arguments, the callable and closures.
`run` makes an inner ref for each, rebuilds the trees around them, calls the function, and
returns an `Outcome`: only the arrays of the result and of the refs that were written.
`finish` is the only place where a caller's refs are written: last, and all at once. The
arguments come first, so the refs of a call are numbered as in `rx.deref(args)`.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from .._core import _jax, _trace
from .._core._access import check_carried, check_readable, Withheld
from .._core._deref import deref_leaves
from .._core._errors import name_of, RefTypeError
from .._core._identity import Asked, asked_of
from .._core._nodes import is_traced
from .._core._ref import commits, content, IN_PLACE, Ref
from .._trees._closure import Part
from ._body import apply, run_body
from ._commit import commit, Disturbed, explain_donated, next_try, rescue, updates_of
from ._structure import flatten, Leaves, Outcome, split, Structure, tree_of


P = ParamSpec("P")


T = TypeVar("T")


class Call:
    """A derefed call: the refs it carries, the arrays of its trees, its structure.

    - `arrays`: the derefed leaves of each argument, the keywords and the callable, with
        `None` for static leaves;
    - `leaves`: the original leaves, including refs and statics;
    - `refs`, `values`: the refs by number, and the values read from them.
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
        # The function last, so that the first place of a ref is in the arguments if
        # possible.
        for tree in (*args, kwargs, fn):
            leaves, part = flatten(tree)
            self.leaves.append(leaves)
            parts.append(part)
            _check_no_lost_write(fn, leaves)
        # Tells a body which traces a JAX transform opened around it.
        self.trace = _jax.current_trace()
        # What `filter_jit` learned about this call before compiling.
        self.traced: Any = None
        # Its arrays in the form a program takes: see `_engine/_flat.py`.
        self.flat: Any = None
        # The result of a program that may have been given buffers of the refs: see
        # `rescue`.
        self.returned: list[Any] = []
        # What the body asked about the identity of the refs, by their ids.
        self.asked: dict[int, set[Any]] = {}
        in_body = bool(_trace.thread.state.bodies)
        self.refs: list[Ref] = []
        self.values: list[Any] = []

        def read(ref: Ref) -> Any:
            # Most refs belong to the current trace, outside all bodies: nothing to check.
            is_elsewhere = in_body or ref._trace() is not self.trace
            if is_elsewhere and type(ref._trace) is not Withheld:
                check_readable(ref)
            self.refs.append(ref)
            self.values.append(ref._value)
            if type(ref._value) is not _jax.ConcreteArray:
                check_carried(ref, ref._value)
            return content(ref)

        # All at one moment: `commit` compares.
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
        """The derefed tree number `i` with other leaves, such as gradients."""
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
        # JAX traces or evaluates here, in a separate trace to which the inner refs belong.
        with _trace.running_body(
            name, self.refs, self.trace, transparent, self.asked
        ) as body:
            return run_body(self.structure, body, self.refs, arrays, apply, withheld)

    def identities(self) -> Asked:
        """What the body has asked about the identity of the refs."""
        return asked_of(self.refs, self.asked)

    def finish(self, outcome: Outcome) -> Any:
        """Closes the result and writes back the updates."""
        # First, because it runs foreign code that may raise: the unflattening of other
        # nodes.
        result = close_result(outcome, self.refs)
        commit(self.refs, self.values, self.started, updates_of(outcome, self.refs))
        for i in outcome.info.in_place:
            self.refs[i]._written = IN_PLACE
        return result


def _check_no_lost_write(fn: Any, leaves: list[Any]) -> None:
    """JAX allows setting any attribute of an array. An array that replaces a ref (put there
    by `eqx.tree_at`, say) silently absorbs a write."""
    for leaf in leaves:
        if type(leaf) is _jax.ConcreteArray and "value" in leaf.__dict__:
            raise RefTypeError(
                f"`{name_of(fn)}` is called with {leaf.dtype}{list(leaf.shape)}, an array "
                "outside refs whose `.value = ...` was assigned: this write was lost. Put "
                "a ref where the array is, `rx.Ref(value, collection)`, with "
                "`eqx.tree_at` for a field of a module, and write to the ref."
            )


def dispatching(derefed: Call) -> _trace.pushed:
    """A context in which `derefed` is the call that `running_call` returns.

    A caching JAX transform is given a function that knows nothing about a single call: it
    may be traced now, or may have been traced for another call of the same structure. When
    it is traced, the running call supplies its refs and static leaves.

    Why not an argument: `jax.jit` either traces its arguments, or hashes them and keeps
    them in its cache. A call allows neither: it holds refs and arrays, and is new each
    time. And why a list: the function may be traced inside the trace of another.
    """
    return _trace.pushed(_trace.thread.state.calls, derefed)


def running_call() -> Call:
    call = _trace.thread.state.calls[-1]
    if type(call) is tuple:
        # A plan: it knows everything about a call except its refs.
        call = with_refs(*call)
    return call


def with_refs(derefed: Call, refs: list[Ref]) -> Call:
    """The same call with other refs."""
    if derefed.refs is refs:
        return derefed
    derefed = copy.copy(derefed)
    derefed.refs, derefed.asked = refs, {}
    return derefed


def close_result(outcome: Outcome, refs: list[Ref]) -> Any:
    """The result with refs: `refs` are those of the call, and the others are new."""
    if outcome.info.build is not None:
        return outcome.info.build(outcome.out)
    structure = outcome.info.result
    (result,) = structure.trees(structure.leaves([outcome.out], dict(enumerate(refs))))
    return result


def _transformed(transform: Callable[[Call], Outcome], derefed: Call) -> Outcome:
    try:
        return transform(derefed)
    except (ValueError, RuntimeError) as e:
        explain_donated(e, derefed.refs, derefed.values)
        raise


# JAX removes its own frames and those of this library from a traceback that passes here.
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

    If a ref of the call was written meanwhile, it is retried: calls from several threads
    have the same outcome as in some sequential order.
    """
    hook = _jax.debug_hook()
    tries = 1
    while True:
        derefed = None
        try:
            derefed = Call(fn, args, kwargs, is_dynamic)
            return derefed.finish(_transformed(transform, derefed))
        except Disturbed as e:
            tries = next_try(fn, e, tries)
        except BaseException:
            if derefed is not None:
                rescue(derefed.refs, derefed.values, derefed.returned)
            raise
        finally:
            _jax.restore_debug_hook(hook)
