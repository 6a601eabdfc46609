"""Common parts of control flow: bodies traced once, and what they must preserve.

A loop or a branch is built in two steps. First its body is traced: this shows which refs it
writes, and the resulting shapes and dtypes. Then the loop is built around the trace:
written refs are carried, and refs that are only read are constants, at no cost.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._calls._call import Call
from .._calls._places import leaf_place
from .._calls._structure import (
    arrays_of,
    Leaves,
    map_values,
    Outcome,
    OutcomeInfo,
    values_of,
)
from .._core import _jax
from .._core._errors import describe, MismatchError
from .._core._nodes import is_node
from .._trees._keys import static_keys
from ._kinds import convert, join_kinds, kind_of


class TracedBody:
    """A body that is traced once, from arrays to its outcome.

    **Arguments:**

    - `body`: maps any arrays to an `Outcome`.
    - `args`: the arguments to trace it for: arrays, or `jax.ShapeDtypeStruct`s.

    `avals` is its outcome, with the shape and dtype of each array.
    """

    def __init__(self, body: Callable[..., Outcome], *args: Any):
        # Not by `jax.lax.scan` and the like: these need to know the carry first, but only
        # tracing shows which refs a body writes.
        closed, outcome = jax.make_jaxpr(body, return_shape=True)(*args)
        self._treedef = jtu.tree_structure(outcome)
        self.avals: Outcome = jtu.tree_unflatten(self._treedef, closed.out_avals)
        self._closed = closed

    def __call__(self, *args: Any) -> Outcome:
        out = _jax.eval_jaxpr(self._closed, jtu.tree_leaves(args))
        return jtu.tree_unflatten(self._treedef, out)


def runs_in_python(*decided_on: Any) -> bool:
    """Whether loops and branches run in Python here: under `jax.disable_jit`, if the values
    they depend on are concrete."""
    return _jax.is_jit_disabled() and all(map(_jax.is_concrete, decided_on))


def outside(leaves: Leaves) -> Leaves:
    """The arrays outside refs, with `None` for each ref."""
    return [None if is_node(x) else x for x in leaves]


def with_outside(leaves: Leaves, arrays: Leaves) -> Leaves:
    """`leaves`, with these arrays outside refs."""
    return [x if is_node(x) else array for x, array in zip(leaves, arrays)]


def with_values(arrays: list[Leaves], new: dict[int, Any]) -> list[Leaves]:
    """The arrays of a call, with new values of some of its refs."""
    return [map_values(lambda i, x: new.get(i, x), leaves) for leaves in arrays]


class Loop:
    """What is carried from step to step: the arrays of one tree of the call (the carry),
    and the values of the refs that a step writes.

    - `arrays`: the arrays of the call before a step;
    - `written`: the numbers of the carried refs.

    **Arguments:**

    - `carry`: the number of the tree, or `None` if there is no carry. A step returns its
        leaves first.
    - `name`: the name of the transform, for messages.
    """

    def __init__(
        self, derefed: Call, arrays: list[Leaves], carry: int | None, name: str
    ):
        self.derefed = derefed
        self.arrays = list(arrays)
        self.name = name
        self.written: list[int] = []
        self._carry = carry
        self._size = 0 if carry is None else len(arrays[carry])

    def carried(self, arrays: list[Leaves]) -> tuple[Leaves, dict[int, Any]]:
        """The carried part of the arrays of the call."""
        of_refs = values_of(arrays)
        mine = [] if self._carry is None else outside(arrays[self._carry])
        return mine, {i: of_refs[i] for i in self.written}

    def with_carried(self, carried: tuple[Leaves, dict[int, Any]]) -> list[Leaves]:
        """The arrays of the call for the next step."""
        mine, values = carried
        arrays = with_values(self.arrays, values)
        if self._carry is not None:
            arrays[self._carry] = with_outside(arrays[self._carry], mine)
        return arrays

    def after(self, outcome: Outcome) -> tuple[Leaves, dict[int, Any]]:
        """The carried part of the outcome of a step."""
        mine = outside(outcome.out[: self._size])
        return mine, {i: outcome.updates[i] for i in self.written}

    def rest(self, outcome: Outcome) -> tuple[Leaves, dict[int, Any]]:
        """The part of the outcome of a step that is not carried."""
        updates = outcome.updates.items()
        rest = {i: x for i, x in updates if i not in self.written}
        return outcome.out[self._size :], rest

    def outcome(
        self,
        carried: tuple[Leaves, dict[int, Any]],
        rest: tuple[Leaves, dict[int, Any]],
        like: Outcome,
    ) -> Outcome:
        """The outcome of the loop. The inverse of `after` and `rest`."""
        (mine, values), (out, updates) = carried, rest
        mine = with_outside(like.out[: self._size], mine)
        updates = dict(sorted({**updates, **values}.items()))
        return Outcome([*mine, *out], updates, like.info)

    def check_structure(self, info: OutcomeInfo, updates: dict[int, Any]) -> None:
        """Refuses a step that changes the structure of the value of a ref."""
        before, nodes = values_of(self.arrays), self.derefed.structure.refs()
        for i, new in updates.items():
            same = jtu.tree_structure(new) == jtu.tree_structure(before[i])
            if not same or static_keys(info.written[i]) != static_keys(nodes[i].value):
                raise MismatchError(
                    f"`{self.name}` carries {self._describe(i)} from step to step, but a "
                    "step changes the structure of its value, or a static part of it. "
                    "Give the value the same structure before the loop, with arrays for "
                    "everything that changes."
                )

    def _describe(self, number: int) -> str:
        return describe(self.derefed.refs[number])

    def whats(self) -> list[tuple[str, str]]:
        """A description of each carried array, and what a step should do with it."""
        found = []
        for k, x in enumerate(self.carried(self.arrays)[0]):
            if x is not None:
                where = leaf_place(self.derefed.parts[self._carry or 0], k)
                found.append((f"the array of the carry at {where}", "return the same"))
        values = values_of(self.arrays)
        for i in self.written:
            n = len(jtu.tree_leaves(values[i]))
            found += [(self._describe(i), "write the same")] * n
        return found


def stage_loop(
    derefed: Call,
    arrays: list[Leaves],
    carry: int | None,
    sliced: Collection[int],
    stage: Callable[[list[Leaves]], TracedBody],
    name: str,
) -> tuple[Loop, TracedBody, Callable[[Outcome], Any]]:
    """Finds what a loop carries: the arrays of its carry, and the written refs.

    A step must preserve their shapes and dtypes. A weakly typed array, such as a Python
    scalar, takes the dtype that the step gives it; then the step is traced again. If that
    is its own dtype, it stays weakly typed within the loop, as in JAX. After the loop it is
    weakly typed if the step leaves it so.

    **Arguments:**

    - `carry`: the number of the tree of the call that is the carry.
    - `sliced`: the numbers of refs that are not carried.
    - `stage`: traces a step for given arrays.

    **Returns:**

    The loop, one step, and a function from the outcome of a step to the carried part, with
    the original types.

    **Raises:**

    - `StructureError`: if a step changes a shape, a dtype or a static part.
    """
    loop = Loop(derefed, arrays, carry, name)
    while True:
        staged = stage(loop.arrays)
        updates = staged.avals.updates
        loop.written = [i for i in updates if i not in sliced]
        of_refs = {i: updates[i] for i in loop.written}
        loop.check_structure(staged.avals.info, of_refs)
        before, treedef = jtu.tree_flatten(loop.carried(loop.arrays))
        kinds, promoted = [], []
        for x, aval, what in zip(
            before, jtu.tree_leaves(loop.after(staged.avals)), loop.whats()
        ):
            old, new = kind_of(jax.typeof(x)), kind_of(aval)
            kind = join_kinds([old, new])
            if kind is None:
                raise MismatchError(_changed_kind(*what, old, new, name))
            kinds.append(
                kind._replace(weak=new.weak) if kind.dtype == new.dtype else kind
            )
            if kind.dtype == old.dtype:
                kind = kind._replace(weak=old.weak)
            promoted.append(x if kind == old else convert(x, kind))
        if all(x is y for x, y in zip(before, promoted)):
            break
        loop.arrays = loop.with_carried(treedef.unflatten(promoted))

    def after(outcome: Outcome) -> Any:
        leaves = jtu.tree_leaves(loop.after(outcome))
        return treedef.unflatten(map(convert, leaves, kinds))

    return loop, staged, after


def _changed_kind(what: str, remedy: str, before: Any, after: Any, name: str) -> str:
    if before.split != after.split:
        spec = f"P({', '.join(map(repr, before.split))})"
        return (
            f"`{name}` carries {what} from step to step, so a step must keep how it is "
            f"split over the mesh: it is {before!r} before the step, and {after!r} after "
            f"it. Restore it at the end of the step, `jax.sharding.reshard(x, {spec})`; or "
            "reshard it before the loop."
        )
    return (
        f"`{name}` carries {what} from step to step, so a step must keep its shape and "
        f"dtype: it is {before!r} before the step, and {after!r} after it. Make it "
        f"{after!r} before the loop, or {remedy} in the step, for example with "
        "`x.astype(...)` or `x.reshape(...)`."
    )


class PythonLoop:
    """A loop that runs in Python, step by step, for `jax.disable_jit`.

    Nothing is staged, and a step sees arrays that can be printed or tested with `if`. Steps
    may write different refs.

    - `loop`: the carried state. Its `arrays` are those after the last step.
    """

    def __init__(self, loop: Loop, sliced: Collection[int] = ()):
        self.loop = loop
        self._sliced = sliced
        self._steps: list[tuple[list[Leaves], Outcome]] = []

    @property
    def has_run(self) -> bool:
        return bool(self._steps)

    def step(
        self, run: Callable[[list[Leaves]], Outcome], arrays: list[Leaves]
    ) -> None:
        """One step, on these arrays: those of the loop, except for slices."""
        loop, outcome = self.loop, run(arrays)
        outcome = Outcome(*arrays_of(outcome), outcome.info)
        loop.check_structure(outcome.info, outcome.updates)
        self._check_result(outcome.info)
        loop.written = [i for i in outcome.updates if i not in self._sliced]
        loop.arrays = loop.with_carried(loop.after(outcome))
        self._steps.append((arrays, outcome))

    def _check_result(self, info: OutcomeInfo) -> None:
        if self._steps and info.result.key != self._steps[0][1].info.result.key:
            raise MismatchError(
                f"`{self.loop.name}`: each step must return the same structure, static "
                "values and refs. Only arrays may depend on the step: make it one."
            )

    def outcome(self, reverse: bool = False) -> Outcome:
        """The outcome of the loop, which must have run a step."""
        steps = self._steps[::-1] if reverse else self._steps
        written = sorted({i for _, outcome in steps for i in outcome.updates})
        self.loop.written = [i for i in written if i not in self._sliced]
        ys, stacked = [], {i: [] for i in written if i in self._sliced}
        for arrays, outcome in steps:
            ys.append(self.loop.rest(outcome)[0])
            before = values_of(arrays)
            for i, each in stacked.items():
                each.append(outcome.updates.get(i, before[i]))
        stack = lambda *x: jnp.stack(x)
        rest = (
            jtu.tree_map(stack, *ys),
            {i: jtu.tree_map(stack, *each) for i, each in stacked.items()},
        )
        like = steps[0][1]
        statics = {
            i: x for _, outcome in steps for i, x in outcome.info.written.items()
        }
        in_place = {i for _, outcome in steps for i in outcome.info.in_place}
        info = OutcomeInfo(like.info.result, statics, in_place)
        carried = self.loop.carried(self.loop.arrays)
        return self.loop.outcome(carried, rest, Outcome(like.out, {}, info))
