"""What control flow has in common: bodies that are traced once, and what they must keep.

A loop or a branch is built in two steps. First its body is traced: that tells which refs
it writes, and what becomes of shapes and dtypes. Then the loop is built around the trace:
refs that are written are carried, and those that are only read are constants, at no cost.
"""

import functools
import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._core import _closure, _trace
from .._core._call import Opened
from .._core._deref import path_text
from .._core._errors import describe, StructureError
from .._core._ref import Ref
from .._core._structure import DYNAMIC, inside_of, is_traced, Outcome, Static
from ._program import anchor, Program


__tracebackhide__ = True


class Staged:
    """A body, traced once: from flat arrays to its outcome.

    **Arguments:**

    - `body`: from flat arrays to an `Outcome`.
    - `arrays`: what to trace it for: arrays, or `jax.ShapeDtypeStruct`s.

    It has `avals`: its outcome, with the shape and dtype of each array in place of it.
    """

    def __init__(self, body: Callable[[list], Outcome], arrays: list[Any]):
        closed, outcome = jax.make_jaxpr(body, return_shape=True)(arrays)
        self._treedef = jtu.tree_structure(outcome)
        self.avals: Outcome = jtu.tree_unflatten(self._treedef, closed.out_avals)
        self._closed = closed

    def __call__(self, arrays: list[Any]) -> Outcome:
        out = _trace.eval_jaxpr(self._closed, arrays)
        return jtu.tree_unflatten(self._treedef, out)


class Kind(NamedTuple):
    """The shape and dtype of an array, and whether it came from a Python scalar."""

    shape: tuple[int, ...]
    dtype: Any
    weak: bool

    def __repr__(self) -> str:
        struct = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return eqx.tree_pformat(struct, struct_as_array=True)


def kind_of(aval: Any) -> Kind:
    return Kind(aval.shape, aval.dtype, getattr(aval, "weak_type", False))


def join_kinds(kinds: Iterable[Kind]) -> Kind | None:
    """The kind that all of these can be converted to without loss; `None` if there is none.

    Only a weakly typed array is converted, as everywhere in JAX: `0.0` to `bfloat16`.
    """
    joined, *rest = kinds
    for kind in rest:
        if kind.shape != joined.shape:
            return None
        if kind.dtype == joined.dtype:
            joined = joined._replace(weak=joined.weak and kind.weak)
            continue
        low, high = sorted([joined, kind], key=_order)
        if _order(low) == _order(high):
            low, high = (low, high) if low.weak else (high, low)
        if not low.weak:
            return None
        joined = high
    return joined


def _order(kind: Kind) -> int:
    order = [jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating]
    found = (i for i, of in enumerate(order) if jnp.issubdtype(kind.dtype, of))
    return next(found, -1)


def convert(x: Any, kind: Kind) -> Any:
    """An array as this kind: `join_kinds` has found that it can be."""
    if kind_of(jax.typeof(x)) == kind or (x.dtype == kind.dtype and kind.weak):
        return x
    return jax.lax.convert_element_type(x, kind.dtype)


class Loop(NamedTuple):
    """What to build a loop of.

    - `staged`: one step;
    - `arrays`: those of the call. Weakly typed ones may have become strong;
    - `inputs`: which of them are carried from step to step;
    - `n_bare`: how many of these are bare. A step returns them first;
    - `written`: the numbers of the refs that the others are of;
    - `kinds`: what they are.
    """

    staged: Staged
    arrays: list[Any]
    inputs: list[int]
    n_bare: int
    written: list[int]
    kinds: list[Kind]

    def initial(self) -> list[Any]:
        return [self.arrays[i] for i in self.inputs]

    def with_carry(self, carry: list[Any]) -> list[Any]:
        arrays = list(self.arrays)
        for i, x in zip(self.inputs, carry):
            arrays[i] = x
        return arrays

    def carry_of(self, outcome: Outcome) -> list[Any]:
        return [convert(x, k) for x, k in zip(self._carried(outcome), self.kinds)]

    def _carried(self, outcome: Outcome) -> list[Any]:
        updates = {number: outcome.updates[number] for number in self.written}
        return jtu.tree_leaves((outcome.out[: self.n_bare], updates))

    def rest_of(self, outcome: Outcome) -> tuple[list[Any], dict[int, Any]]:
        """What a step returns and does not carry."""
        updates = outcome.updates.items()
        rest = {i: x for i, x in updates if i not in self.written}
        return outcome.out[self.n_bare :], rest

    def outcome(self, carry: list[Any], rest: tuple[list, dict]) -> Outcome:
        """The opposite of `carry_of` and `rest_of`."""
        out, updates = rest
        mine = {number: self.staged.avals.updates[number] for number in self.written}
        written = jtu.tree_unflatten(jtu.tree_structure(mine), carry[self.n_bare :])
        both = dict(sorted({**updates, **written}.items()))
        return Outcome([*carry[: self.n_bare], *out], both, self.staged.avals.info)


def stage_loop(
    opened: Opened,
    arrays: list[Any],
    bare: range,
    sliced: set[int],
    stage: Callable[[list[Any]], Staged],
    name: str,
) -> Loop:
    """Finds what a loop carries: the bare arrays of its carry, and the refs written.

    A step must leave them with the shapes and dtypes that they had. A weakly typed one, as
    a Python scalar is, becomes what the step makes of it; then the step is traced again.

    **Arguments:**

    - `bare`: which arrays are those of the carry. A step returns them first.
    - `sliced`: the numbers of the refs that are not carried.
    - `stage`: traces a step for given arrays.

    **Raises:**

    - `StructureError`: if a step changes a shape, a dtype or a static part.
    """
    arrays = list(arrays)
    while True:
        staged = stage(arrays)
        updates = staged.avals.updates
        written = [number for number in updates if number not in sliced]
        inputs = list(bare)
        for number in written:
            check_inside(opened, number, inside_of(updates[number]), name)
            inputs += range(*opened.spans[number])
        loop = Loop(staged, arrays, inputs, len(bare), written, [])
        promoted = False
        for i, aval in zip(inputs, loop._carried(staged.avals)):
            before, after = kind_of(jax.typeof(arrays[i])), kind_of(aval)
            kind = join_kinds([before, after])
            if kind is None:
                raise StructureError(_changed_kind(opened, i, before, after, name))
            loop.kinds.append(kind)
            if kind != before:
                promoted = True
                arrays[i] = convert(arrays[i], kind)
        if not promoted:
            return loop


def check_inside(opened: Opened, number: int, inside: Any, name: str) -> None:
    """Refuses a step that changes the structure of the value of a ref."""
    if inside != opened.structure.slots[number].inside:
        raise StructureError(
            f"`{name}` carries {_which(opened, number)} from step to step, and a step "
            "changes the structure of its value, or a static part of it. Give the value "
            "the same structure before the loop, with arrays for all that changes."
        )


def _which(opened: Opened, number: int) -> str:
    ref = opened.refs[number]
    return describe(ref._name, ref._collection)


def _changed_kind(
    opened: Opened, position: int, before: Kind, after: Kind, name: str
) -> str:
    for number, (start, stop) in enumerate(opened.spans):
        if start <= position < stop:
            what, remedy = _which(opened, number), "write the same"
            break
    else:
        what = f"the array of the carry at {_bare_path(opened, position)}"
        remedy = "return the same"
    return (
        f"`{name}` carries {what} from step to step, so a step must keep its shape and "
        f"dtype: it is {before!r} before the step, and {after!r} after it. Make it "
        f"{after!r} before the loop, or {remedy} in the step, for example with "
        "`x.astype(...)` or `x.reshape(...)`."
    )


def _bare_path(opened: Opened, position: int) -> str:
    """Where in its argument a bare array is."""
    structure = opened.structure
    for part, (bare, leaves) in enumerate(zip(bare_parts(opened), _leaf_parts(opened))):
        if position in bare:
            treedef = structure.parts[part].treedef
            if structure.parts[part].nodes:
                break
            pairs, _ = jtu.tree_flatten_with_path(jtu.tree_unflatten(treedef, leaves))
            paths = [path for path, leaf in pairs if is_traced(leaf)]
            return place_text(paths[position - bare.start])
    return "one of its arrays"


def place_text(path: tuple) -> str:
    """A key path for a message: `[0].weight`."""
    return f"`{path_text(path)}`" if path else "its root"


def _leaf_parts(opened: Opened) -> list[list[Any]]:
    parts, start = [], 0
    for size in opened.structure.sizes:
        parts.append(opened.leaves[start : start + size])
        start += size
    return parts


def bare_parts(opened: Opened) -> list[range]:
    """Which of the flat arrays are the bare ones of the callable, of each argument, and of
    the keywords."""
    parts, leaf, bare = [], 0, 0
    for size in opened.structure.sizes:
        n = opened.structure.codes[leaf : leaf + size].count(DYNAMIC)
        parts.append(range(bare, bare + n))
        leaf, bare = leaf + size, bare + n
    return parts


def numbers_to_arrays(tree: Any) -> Any:
    """Python numbers become arrays, as in JAX. Those in a module stay what they are: there
    they are static, as in Equinox."""

    def is_module(x: Any) -> bool:
        return isinstance(x, eqx.Module)

    def convert_leaf(x: Any) -> Any:
        return jnp.asarray(x) if isinstance(x, bool | int | float | complex) else x

    _closure.refuse_cycle(tree)
    # The very same tree, where it has none: what a function returns is what it was given.
    leaves = jtu.tree_leaves(tree, is_leaf=is_module)
    if not any(isinstance(x, bool | int | float | complex) for x in leaves):
        return tree
    return jtu.tree_map(
        lambda x: x if is_module(x) else convert_leaf(x), tree, is_leaf=is_module
    )


def whole_number(x: Any, name: str, what: str, least: int | None = None) -> int:
    """`x`, which must be a whole number, and known while tracing.

    **Raises:**

    - `TypeError`, `ValueError`: if it is none, or smaller than `least`.
    """
    try:
        number = operator.index(x)
    except TypeError:
        raise TypeError(
            f"`{name}`: {what} must be a whole number that is known while tracing, and it "
            f"is {eqx.tree_pformat(x)}. Pass an `int`."
        ) from None
    if least is not None and number < least:
        raise ValueError(
            f"`{name}`: {what} must be at least {least}, and it is {number}."
        )
    return number


def as_callable(fn: Any) -> Any:
    """A `functools.partial` as a pytree, so that the arrays in it are carried and not
    held by a cache."""
    if type(fn) is functools.partial:
        return eqx.Partial(fn.func, *fn.args, **fn.keywords)
    return fn


class CarryBefore:
    """A carry as it was given to a step, which may change it in place or consume it."""

    __slots__ = ("leaves", "structure")

    def __init__(self, carry: Any):
        self.leaves, self.structure = _closure.flatten(carry)

    def tree(self) -> Any:
        return _closure.unflatten(self.structure, self.leaves)


def check_carry(given: CarryBefore, after: Any, name: str) -> None:
    """Refuses a step that changes the carry in anything but the values of arrays.

    **Raises:**

    - `StructureError`: if the structure differs, a static leaf, or which ref is where.
    """
    new_leaves, new = _closure.flatten(after)
    old_leaves = given.leaves
    if given.structure != new:
        raise StructureError(
            f"`{name}`: a step must return a carry of the structure that it was given. It "
            f"was given {eqx.tree_pformat(given.tree())} and returned "
            f"{eqx.tree_pformat(after)}. Return the same structure from each step."
        )
    for i, (a, b) in enumerate(zip(old_leaves, new_leaves)):
        if a is b or (is_traced(a) and is_traced(b)):
            continue
        if isinstance(a, Ref) or isinstance(b, Ref):
            remedy = (
                "Return the carry's own refs, each at its place, and write to them: "
                "`ref.value = ...`."
            )
        elif is_traced(a) or is_traced(b):
            remedy = "Make it an array before the loop and after each step."
        elif Static(a) == Static(b):
            continue
        else:
            remedy = (
                "What is not an array cannot change: make it one, `jnp.asarray(...)`."
            )
        raise StructureError(
            f"`{name}`: a step must return the carry that it was given, with other values "
            f"in its arrays at most. At {_path(given.tree(), i)} it was given {_text(a)}, "
            f"and returned {_text(b)}{_whence(b, given)}. {remedy}"
        )


def _whence(leaf: Any, given: CarryBefore) -> str:
    """Where in the carry a ref was before it was moved."""
    if isinstance(leaf, Ref):
        for i, other in enumerate(given.leaves):
            if other is leaf:
                return f" from {_path(given.tree(), i)}"
    return ""


def _path(tree: Any, i: int) -> str:
    pairs, _ = jtu.tree_flatten_with_path(tree)
    return place_text(pairs[i][0]) if i < len(pairs) else "one of its leaves"


def _text(leaf: Any) -> str:
    if isinstance(leaf, Ref):
        return describe(leaf._name, leaf._collection)
    if is_traced(leaf):
        return f"an array {eqx.tree_pformat(leaf)}"
    return f"the static value {leaf!r}"


# As `program_of`, for what is made of several functions: a program dies with any of them.
_programs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def program_of_all(
    fns: Iterable[Any], name: str, body: Callable[[Opened, list[Any]], Outcome]
) -> Program:
    """The program `name` of these functions; made of `body` if need be."""
    level: Any = _programs
    programs: dict[str, Program] = {}
    for fn in fns:
        programs, level = level.setdefault(
            anchor(fn), ({}, weakref.WeakKeyDictionary())
        )
    program = programs.get(name)
    if program is None:
        program = programs[name] = Program(name, body)
    return program
