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
import functools
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu

from . import _closure, _trace
from ._closure import Carried, static_key, weakly
from ._deref import deref, path_text, reref
from ._errors import ConcurrencyError, describe, StructureError, TraceLevelError
from ._ref import check_readable, check_writable, commits, make_ref, Note, note_of, Ref


_trace.register_exclusion(__file__)

# What a leaf is: the number of a ref (0, 1, ...), or one of these.
DYNAMIC = -1
STATIC = -2

_UNWRITTEN: Any = object()

_P = ParamSpec("_P")
_T = TypeVar("_T")


def is_traced_in_ref(leaf: Any) -> bool:
    """Which leaves of the value of a ref are traced: what JAX can trace."""
    if type(leaf) is _trace.ConcreteArray:
        return True
    return eqx.is_array_like(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def is_traced(leaf: Any) -> bool:
    """Which leaves beside refs are traced: arrays, as in Equinox."""
    if type(leaf) is _trace.ConcreteArray:
        return True
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


class Static:
    """A static leaf, with the key that stands for it (see `static_key`)."""

    __slots__ = ("_obj", "key")

    def __init__(self, obj: Any, is_result: bool = False):
        self.key = static_key(obj)
        # Nobody else may hold what was made inside of a function and returned.
        self._obj = obj if is_result else weakly(obj)

    @property
    def obj(self) -> Any:
        obj = self._obj
        return obj() if isinstance(obj, weakref.ref) else obj

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Static) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class Slot(NamedTuple):
    """The structure of one ref, beside the arrays of its value.

    `inside` is `None` where the value is one array, and else `(treedef, statics)`, with
    `None` in `statics` for each leaf that is traced.
    """

    ref_type: type[Ref]
    collection: Hashable
    declared: Any
    inside: tuple[Any, tuple] | None


@functools.lru_cache(maxsize=4096)
def _slot_of_array(ref_type: type[Ref], collection: Hashable, declared: Any) -> Slot:
    """The slot of a ref to one array: the same object each time, quick to compare."""
    return Slot(ref_type, collection, declared, None)


def split_value(value: Any) -> tuple[tuple | None, list[Any]]:
    """The value of a ref as `(inside, arrays)`."""
    if is_traced_in_ref(value):
        return None, [value]
    leaves, treedef = jtu.tree_flatten(value)
    arrays = [x for x in leaves if is_traced_in_ref(x)]
    statics = tuple(None if is_traced_in_ref(x) else Static(x, True) for x in leaves)
    return (treedef, statics), arrays


def n_arrays(inside: tuple | None) -> int:
    """How many arrays a value has."""
    return 1 if inside is None else sum(static is None for static in inside[1])


def join_value(inside: tuple | None, arrays: Iterator[Any]) -> Any:
    """The opposite of `split_value`; takes what it needs from `arrays`."""
    if inside is None:
        return next(arrays)
    treedef, statics = inside
    leaves = [next(arrays) if static is None else static.obj for static in statics]
    return jtu.tree_unflatten(treedef, leaves)


class Structure:
    """All of an opened call that is not an array: hashable, and the key of every cache.

    - `parts`: the structure of the callable, of each argument, and of the keywords;
    - `codes`: what each leaf is;
    - `statics`: the static leaves, in order;
    - `slots`: the structure of each ref. Equal numbers in `codes` are the sharing;
    - `notes`: what the refs are called. Not a part of the key.
    """

    __slots__ = (
        "_hash",
        "codes",
        "n_bare",
        "notes",
        "parts",
        "sizes",
        "slots",
        "statics",
    )

    def __init__(
        self,
        parts: tuple[Carried, ...],
        codes: tuple[int, ...],
        statics: tuple[Static, ...],
        slots: tuple[Slot, ...],
        notes: list[Note],
    ):
        self.parts = parts
        self.codes = codes
        self.statics = statics
        self.slots = slots
        self.notes = notes
        self.n_bare = codes.count(DYNAMIC)
        self.sizes = [_count(part) for part in parts]
        self._hash: int | None = None

    def _key(self) -> tuple:
        return self.parts, self.codes, self.statics, self.slots

    def __hash__(self) -> int:
        if self._hash is None:
            for static in self.statics:
                try:
                    hash(static)
                except TypeError:
                    raise TypeError(
                        f"Cannot cache on the static value {static.obj!r}: a "
                        f"{type(static.obj).__name__} is not hashable. Make it hashable, "
                        "or put the arrays in it into a pytree."
                    ) from None
            self._hash = hash(self._key())
        return self._hash

    def __eq__(self, other: Any) -> bool:
        if self is other:
            return True
        return isinstance(other, Structure) and self._key() == other._key()

    def close(self, arrays: Iterable[Any], refs: list[Ref]) -> list[Any]:
        """The parts again, with these refs and arrays in them; and all of their leaves."""
        dynamic, statics = iter(arrays), iter(self.statics)
        leaves = []
        for code in self.codes:
            if code == DYNAMIC:
                leaves.append(next(dynamic))
            elif code == STATIC:
                leaves.append(next(statics).obj)
            else:
                leaves.append(refs[code])
        return leaves

    def unflatten(self, leaves: list[Any]) -> list[Any]:
        rest = iter(leaves)
        return [
            _closure.unflatten(part, [next(rest) for _ in range(n)])
            for part, n in zip(self.parts, self.sizes)
        ]


def _count(part: Carried) -> int:
    """How many leaves a part has, those inside of functions included."""
    n = part.treedef.num_leaves
    for node in part.nodes:
        if node is not None:
            n -= 1
            if isinstance(node, tuple):
                n += _count(node[-1])
    return n


class _Reader:
    """Classifies leaves, and numbers the refs among them by their first place."""

    def __init__(
        self,
        is_dynamic: Callable[[Any], bool] = is_traced,
        is_result: bool = False,
    ):
        self.is_dynamic = is_dynamic
        self.is_result = is_result
        self.parts: list[Carried] = []
        self.leaves: list[Any] = []
        self.codes: list[int] = []
        self.bare: list[Any] = []
        self.statics: list[Static] = []
        self.refs: list[Ref] = []
        self._numbers: dict[int, int] = {}

    def read(self, tree: Any) -> None:
        leaves, carried = _closure.flatten(tree)
        self.parts.append(carried)
        self.leaves.extend(leaves)
        for leaf in leaves:
            if isinstance(leaf, Ref):
                number = self._numbers.get(id(leaf))
                if number is None:
                    number = self._numbers[id(leaf)] = len(self.refs)
                    self.refs.append(leaf)
                self.codes.append(number)
            elif self.is_dynamic(leaf):
                self.codes.append(DYNAMIC)
                self.bare.append(leaf)
            else:
                self.codes.append(STATIC)
                self.statics.append(Static(leaf, self.is_result))

    def structure(self, slots: list[Slot]) -> Structure:
        return Structure(
            tuple(self.parts),
            tuple(self.codes),
            tuple(self.statics),
            tuple(slots),
            [note_of(ref) for ref in self.refs],
        )


class Opened:
    """A call, opened: the refs it carries, the arrays in and beside them, the structure.

    The arrays are flat: those beside refs first (`n_bare` of them), then those of each ref,
    in order. `spans[k]` is where the arrays of ref `k` are.
    """

    __slots__ = (
        "arrays",
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
        self, reader: _Reader, values: list[Any], arrays: list, spans: list, slots: list
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

    def run(self, name: str, arrays: list[Any], transparent: bool = True) -> "Outcome":
        """The body of the lifted transform `name`, on these arrays. See `run_body`."""
        __tracebackhide__ = True
        with _trace.running_body(name, self.refs, self.trace, transparent):
            return run_body(self.structure, name, arrays)

    def refs_after(self, outcome: "Outcome", arrays: list[Any]) -> list[Ref]:
        """Copies of the refs, as they would be after `finish`. Nothing is written.

        `arrays` are those before the call: `self.arrays`, or what stands for them.
        """
        written = iter(outcome.updates)
        new = {i: join_value(inside, written) for i, inside in outcome.info.written}
        copies = []
        for i, (ref, slot) in enumerate(zip(self.refs, self.structure.slots)):
            value = new.get(i, _UNWRITTEN)
            if value is _UNWRITTEN:
                value = join_value(slot.inside, iter(arrays[slice(*self.spans[i])]))
            copies.append(make_ref(slot.ref_type, value, slot.collection, note_of(ref)))
        return copies

    def finish(self, outcome: "Outcome") -> Any:
        """Writes back what was written, and closes the result."""
        __tracebackhide__ = True
        updates = updates_of(outcome, self.refs)
        commit(self.refs, self.values, self.commit, updates)
        return close_result(outcome, self.refs)


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
    __tracebackhide__ = True
    reader = _Reader(is_dynamic)
    reader.read(fn)
    for arg in args:
        reader.read(arg)
    reader.read(kwargs)
    return open_refs(reader)


def open_refs(reader: _Reader) -> Opened:
    """Reads the refs that were found, at one moment."""
    __tracebackhide__ = True
    started = commits.count
    values, slots, spans = [], [], []
    arrays = list(reader.bare)
    trace, in_body = _trace.current_trace(), bool(_trace.thread.state.bodies)
    for ref in reader.refs:
        if in_body or ref._trace() is not trace:
            check_readable(ref)
        value = ref._value
        values.append(value)
        start = len(arrays)
        if type(value) is _trace.ConcreteArray:
            arrays.append(value)
            slot = _slot_of_array(type(ref), ref._collection, ref._declared)
        else:
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
    return _trace.thread.state.calls[-1]


class Outcome:
    """What a body returns: a pytree node whose children are flat lists of arrays.

    - `out`: the arrays of the result: those beside refs, then those of new refs;
    - `updates`: the arrays of the refs that were written;
    - `info`: all the rest. Made anew whenever the body is traced.
    """

    __slots__ = ("info", "out", "updates")

    def __init__(self, out: list[Any], updates: list[Any], info: "OutcomeInfo"):
        self.out = out
        self.updates = updates
        self.info = info


jtu.register_pytree_node(
    Outcome,
    lambda x: ((x.out, x.updates), x.info),
    lambda info, children: Outcome(children[0], children[1], info),
)


RETURNS_NONE = jtu.tree_structure(None)


class OutcomeInfo:
    """What a body did, beside the arrays. Equal only to itself.

    - `result`: the structure of the result. The refs in it are numbered: first those of
        the call, by `carried`, then the new ones.
    - `carried`: for each ref of the result that the call carries, its number in the call.
    - `written`: `(number in the call, inside of the new value)` of each ref written.

    By itself it is a pytree node without children, which is how it gets out of `jax.jit`.
    """

    __slots__ = ("carried", "result", "treedef", "waits", "written")

    def __init__(self, result: Structure, carried: dict[int, int], written: list):
        self.result = result
        self.carried = carried
        self.written = written
        # Whether a call must wait for run-time checks: `filter_jit` finds out.
        self.waits = False
        # The common case of a result that has arrays only.
        (part,) = result.parts
        only_arrays = result.n_bare == len(result.codes) and not part.nodes
        self.treedef = part.treedef if only_arrays else None
        if only_arrays and part.treedef == RETURNS_NONE:
            self.treedef = RETURNS_NONE  # to be told by identity


jtu.register_pytree_node(OutcomeInfo, lambda info: ((), info), lambda info, _: info)


def run_body(structure: Structure, name: str, arrays: list[Any]) -> Outcome:
    """Calls the function of an opened call on inner refs, made of these arrays.

    The refs are owned by the running trace. This is a pure function of `arrays`.

    **Raises:**

    - `StructureError`: if the function changed something that cannot be carried back.
    """
    __tracebackhide__ = True
    rest = iter(arrays)
    bare = [next(rest) for _ in range(structure.n_bare)]
    inner = []
    for slot, note in zip(structure.slots, structure.notes):
        value = join_value(slot.inside, rest)
        inner.append(make_ref(slot.ref_type, value, slot.collection, note))
    before = [ref._value for ref in inner]
    snapshots = [_value_leaves(value) for value in before]
    leaves = structure.close(bare, inner)
    trees = structure.unflatten(leaves)
    fn, *args, kwargs = trees

    result = fn(*args, **kwargs)

    _check_unchanged(structure, name, trees, leaves)
    written, updates = [], []
    for i, (ref, old, snapshot) in enumerate(zip(inner, before, snapshots)):
        if ref._collection != structure.slots[i].collection:
            raise StructureError(
                f"`{name}` cannot carry a change of collection: "
                f"{describe(ref._name, ref._collection)} had no collection when it came "
                "in. Give it one where it is made: `rx.Ref(value, collection)`."
            )
        if ref._value is old and _same(snapshot, old):
            continue
        inside, its_arrays = split_value(ref._value)
        written.append((i, inside))
        updates.extend(its_arrays)
    out, info = _open_result(result, inner, name)
    info.written = written
    return Outcome(out, updates, info)


def _value_leaves(value: Any) -> tuple | None:
    """To notice a change inside of a value. `None` for one array, which cannot change."""
    if is_traced_in_ref(value):
        return None
    return jtu.tree_flatten(value)


def _same(snapshot: tuple | None, value: Any) -> bool:
    if snapshot is None:
        return True
    old_leaves, old_def = snapshot
    leaves, treedef = jtu.tree_flatten(value)
    return treedef == old_def and all(a is b for a, b in zip(leaves, old_leaves))


def _check_unchanged(
    structure: Structure, name: str, trees: list, placed: list
) -> None:
    """Refuses what could not be carried back: a list appended to, an entry replaced."""
    __tracebackhide__ = True
    reader = _Reader()
    for tree in trees:
        reader.read(tree)
    same_parts = tuple(reader.parts) == structure.parts
    if same_parts and all(a is b for a, b in zip(reader.leaves, placed)):
        return
    raise StructureError(
        f"`{name}` cannot carry back a change of structure: the function changed "
        f"{_what_changed(structure, trees, placed)} in place (a list appended to, an entry "
        "of a dict replaced, a closure variable rebound, ...). Put what changes into a "
        "`rx.Ref`, or return the new tree."
    )


def _what_changed(structure: Structure, trees: list, placed: list) -> str:
    rest = iter(placed)
    last = len(trees) - 1
    for i, (part, tree) in enumerate(zip(structure.parts, trees)):
        mine = [next(rest) for _ in range(structure.sizes[i])]
        leaves, carried = _closure.flatten(tree)
        if carried == part and all(a is b for a, b in zip(leaves, mine)):
            continue
        if i == 0:
            return "the callable, or what it closes over,"
        which = "a keyword argument" if i == last else f"argument {i - 1}"
        if carried == part:
            pairs, _ = jtu.tree_flatten_with_path(tree)
            for (path, _), leaf, old in zip(pairs, leaves, mine):
                if leaf is not old:
                    return f"{which} at `{path_text(path)}`"
        return which
    return "an argument"


def _open_result(result: Any, inner: list[Ref], name: str) -> tuple[list, OutcomeInfo]:
    __tracebackhide__ = True
    reader = _Reader(is_result=True)
    reader.read(result)
    numbers = {id(ref): i for i, ref in enumerate(inner)}
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
    return out, OutcomeInfo(reader.structure(slots), carried, [])


def close_result(outcome: Outcome, refs: list[Ref]) -> Any:
    """The result with refs in it: those of the call are `refs`, the others are new."""
    if outcome.info.treedef is not None:
        return jtu.tree_unflatten(outcome.info.treedef, outcome.out)
    structure = outcome.info.result
    carried = outcome.info.carried
    rest = iter(outcome.out)
    bare = [next(rest) for _ in range(structure.n_bare)]
    closed = []
    for i, (slot, note) in enumerate(zip(structure.slots, structure.notes)):
        if i in carried:
            closed.append(refs[carried[i]])
        else:
            value = join_value(slot.inside, rest)
            closed.append(make_ref(slot.ref_type, value, slot.collection, note))
    (result,) = structure.unflatten(structure.close(bare, closed))
    return result


class Disturbed(Exception):
    """Another thread wrote a ref while a call was using it: the call must run again."""


def updates_of(outcome: Outcome, refs: list[Ref]) -> list[tuple[Ref, Any]]:
    """The refs of a call that were written, each with its new value."""
    arrays = iter(outcome.updates)
    return [
        (refs[i], next(arrays) if inside is None else join_value(inside, arrays))
        for i, inside in outcome.info.written
    ]


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
    __tracebackhide__ = True
    trace, state = _trace.current_trace(), _trace.thread.state
    quiet = not state.bodies and not state.guards
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


_MAX_TRIES = 1000


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
    __tracebackhide__ = True
    for _ in range(_MAX_TRIES):
        opened = open_call(fn, args, kwargs, is_dynamic)
        try:
            return opened.finish(transform(opened))
        except Disturbed:
            continue
    raise ConcurrencyError(
        f"Other threads changed the refs of `{name_of(fn)}` during each of {_MAX_TRIES} "
        "calls. Take turns: guard the calls with a lock."
    )


def name_of(fn: Any) -> str:
    fn = getattr(fn, "__wrapped__", fn)
    return getattr(fn, "__qualname__", type(fn).__qualname__)


class Lifted:
    """The base of what a lifted transform returns: a callable, and a pytree.

    The wrapped callable is its child, so the refs in a wrapped module or closure are seen
    by whatever carries the lifted function in turn.
    """

    transform_name = "a lifted transform"

    def __init__(self, fn: Any, **options: Any):
        self.__wrapped__ = fn
        self.options = options
        functools.update_wrapper(self, fn, updated=())

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else eqx.Partial(self, instance)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("A lifted transform says what a call does.")

    def __repr__(self) -> str:
        return f"{self.transform_name}({name_of(self.__wrapped__)})"

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        jtu.register_pytree_with_keys(
            cls,
            lambda x: (
                ((jtu.GetAttrKey("__wrapped__"), x.__wrapped__),),
                _Options(x.options),
            ),
            lambda aux, children: cls(*children, **aux.options),
        )


class _Options:
    """The options of a lifted function, as the static part of a pytree."""

    __slots__ = ("options",)

    def __init__(self, options: dict[str, Any]):
        self.options = options

    def _key(self) -> tuple:
        return tuple(sorted(self.options.items(), key=lambda item: item[0]))

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Options) and self._key() == other._key()

    def __hash__(self) -> int:
        try:
            return hash(self._key())
        except TypeError:  # a list or a dict among the options
            return hash(tuple(self.options))


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

    - `StructureError`: if the arguments are not derefed, or if `fn` changes the structure of
        an argument.
    """

    @functools.wraps(fn)
    def pure(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        __tracebackhide__ = True
        inner_args, inner_kwargs = reref((args, kwargs))
        opened = open_call(fn, inner_args, inner_kwargs)
        outcome = opened.run("functionalize", opened.arrays)
        numbers = {id(ref): i for i, ref in enumerate(opened.refs)}
        arrays = iter(outcome.updates)
        new = {i: join_value(inside, arrays) for i, inside in outcome.info.written}
        # The caller's tree, with `None` in place of all but what was written.
        carried = inner_args if not kwargs else (inner_args, inner_kwargs)
        updates = deref(carried)
        updates = _replace_values(
            carried, updates, lambda ref: new.get(numbers[id(ref)])
        )
        final = opened.refs_after(outcome, opened.arrays)
        return deref(close_result(outcome, final)), updates

    return pure


def _replace_values(closed: Any, opened: Any, value: Callable[[Ref], Any]) -> Any:
    """`opened`, the derefed form of `closed`, with `value(ref)` in each `Value`."""
    from ._ref import is_opened, Value

    refs = jtu.tree_leaves(closed)
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
